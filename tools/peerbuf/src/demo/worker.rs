//! The second process: it receives buffers and files, and moves the bytes.

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use peerbuf::BufferRange;
use peerbuf::error::ShareError;
use peerbuf::import::file::FileImporter;
use peerbuf::share::Channel;
use rustix::event::{PollFd, PollFlags};

use super::protocol::{MAX_MESSAGE, Request, Response};
use crate::Failure;
use crate::say;

/// Serves the first process, whose socket is standard input.
pub fn run() -> Result<ExitCode, Failure> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let channel = Channel::from_fd(socket)
        .map_err(|_| "`demo-worker` is started by `peerbuf demo`, not by hand")?;
    leave_with_the_first_process(channel.as_fd().try_clone_to_owned()?);
    let mut buffer = None;
    loop {
        let (message, mut files) = match channel.receive_message(MAX_MESSAGE) {
            Err(ShareError::PeerGone) => return Err(GONE.into()),
            other => other?,
        };
        let result = match serde_json::from_slice(&message)? {
            Request::Finish => return Ok(ExitCode::SUCCESS),
            Request::TakeBuffer => {
                buffer = Some(channel.receive_buffer()?);
                continue;
            }
            Request::Read { name } => carry(buffer.as_ref(), files.pop(), name, true),
            Request::Write { name } => carry(buffer.as_ref(), files.pop(), name, false),
        };
        let response = result.unwrap_or_else(|error| Response::Failed(error.to_string()));
        channel.send_message(&serde_json::to_vec(&response)?, &[])?;
    }
}

const GONE: &str = "the first process of the demo has gone";

fn carry(
    buffer: Option<&BufferRange>,
    file: Option<OwnedFd>,
    name: String,
    read: bool,
) -> Result<Response, Failure> {
    let (Some(buffer), Some(file)) = (buffer, file) else {
        return Err("a request came without a buffer or a file".into());
    };
    let file = FileImporter::from_fd(file, name)?;
    let mut attachment = file.attach(buffer)?;
    let receipt = if read {
        attachment.read(0)?
    } else {
        let receipt = attachment.write(0)?;
        file.sync()?;
        receipt
    };
    Ok(Response::Done(receipt.into()))
}

/// Ends this process when the first one dies, even in the middle of a long transfer.
fn leave_with_the_first_process(socket: OwnedFd) {
    std::thread::spawn(move || {
        loop {
            // The poll asks for no events: the kernel reports a hang-up in any case, and no
            // messages.
            let mut sockets = [PollFd::new(&socket, PollFlags::empty())];
            let polled = rustix::event::poll(&mut sockets, None);
            if polled.is_ok() && sockets[0].revents().contains(PollFlags::HUP) {
                say::remark(format_args!("peerbuf: {GONE}"));
                std::process::exit(1);
            }
        }
    });
}

//! `peerbuf demo`: a file's bytes go from the disk into a buffer and back, between two
//! processes.
//!
//! This module is the first process. It exports the buffers, passes them on, and checks the
//! bytes. It moves no data. The second process ([`worker`]) moves the data and exports nothing.
//! The files are unnamed, and every buffer ends with its last descriptor, so nothing remains,
//! however either process ends.

mod files;
mod gpu;
mod protocol;
mod report;
pub mod worker;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use peerbuf::error::{ExportError, ShareError};
use peerbuf::export::{memfd, peerbuf as module, udmabuf};
use peerbuf::import::file::unnamed_file;
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::Channel;
use peerbuf::{Access, Buffer, BufferRange};

use crate::progress::Progress;
use crate::{Failure, places, say, size, table};
use files::RandomFile;
use gpu::Gpu;
use protocol::{Account, MAX_MESSAGE, Request, Response};
use report::Transfer;

/// Arguments of `peerbuf demo`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Where the files are made; nothing is left there [default: a filesystem on an NVMe disk]
    #[arg(long, value_name = "DIRECTORY")]
    dir: Option<PathBuf>,

    /// How many bytes each transfer moves
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = size::parse)]
    size: u64,

    /// The device whose BAR is used [default: the first one with a BAR that files can reach]
    #[arg(long, value_name = "DDDD:BB:DD.F")]
    device: Option<PciAddress>,

    /// One JSON object per transfer and line, instead of the table
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
The first process exports a buffer in the BAR of a device and sends it to the second. The second
reads a file of random bytes into it. The first checks every byte through its own mapping, changes
each and asks for them to be written to a second file; then both files are read ordinarily and
their checksums compared. After that the same with a udmabuf. Where there is a Vulkan driver, a compute
shader on its first device changes the bytes of the first buffer at last, instead of the first process.

What the machine lacks is named on standard error, and plain memory (memfd) stands in for it.

JSON: buffer, source, sink, path (peer-to-peer, shared-host-memory, staged-copy), reasons (why not
a better path: a list of path, code, evidence), bytes, host_bytes (bytes that were in system memory
on their way), verified.";

/// Runs the demo. `Ok` holds the failure status when a byte was wrong.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let directory = match &arguments.dir {
        Some(directory) => directory.clone(),
        None => places::working_directory(),
    };
    let buffers = export_buffers(arguments)?;
    let mut worker = Worker::start()?;
    let mut transfers = Vec::new();
    let mut rounds = Vec::new();
    for buffer in buffers {
        let range = buffer.range(0, arguments.size)?;
        rounds.push((range, None));
    }
    match Gpu::open() {
        Ok(gpu) => {
            let first = rounds.first().map(|(range, _)| range.clone());
            rounds.extend(first.map(|range| (range, Some(gpu))));
        }
        Err(error) => say::remark(format_args!("without a compute shader: {error}")),
    }
    for (range, gpu) in &rounds {
        for transfer in round_trip(&mut worker, range, gpu.as_ref(), &directory)? {
            if arguments.json {
                say::answer(serde_json::to_string(&transfer)?)?;
            }
            transfers.push(transfer);
        }
    }
    worker.finish()?;
    if !arguments.json {
        let place = places::describe(&directory);
        say::answer(report::table(&transfers, &place, table::width()).trim_end())?;
    }
    let wrong = transfers
        .iter()
        .filter(|transfer| !transfer.verified)
        .count();
    if wrong > 0 {
        return Err(format!(
            "{wrong} of {} transfers brought wrong bytes",
            transfers.len()
        )
        .into());
    }
    if !arguments.json {
        say::answer(report::summary(&transfers))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The two buffers, or their substitutes.
fn export_buffers(arguments: &Arguments) -> Result<[Buffer; 2], Failure> {
    let page = rustix::param::page_size() as u64;
    let length = arguments.size.max(1).next_multiple_of(page);
    let bar = match export_bar(arguments.device, length) {
        Ok(buffer) => buffer,
        // A device that the user named has no substitute.
        Err(error) if arguments.device.is_some() => return Err(error.into()),
        Err(error) => stand_in("a BAR", length, error)?,
    };
    let host = match udmabuf::export("udmabuf", length) {
        Ok(buffer) => buffer,
        Err(error) => stand_in("a udmabuf", length, error)?,
    };
    Ok([bar, host])
}

/// System memory instead of an exporter that the machine lacks. A failure of an available
/// exporter is an error.
fn stand_in(for_what: &str, length: u64, error: ExportError) -> Result<Buffer, ExportError> {
    if !matches!(error, ExportError::Unavailable(_)) {
        return Err(error);
    }
    say::remark(format_args!("missing: {error}"));
    memfd::export(&format!("memfd (stand-in for {for_what})"), length)
}

fn export_bar(device: Option<PciAddress>, length: u64) -> Result<Buffer, ExportError> {
    let devices = match device {
        Some(address) => vec![module::Device::open(address)?],
        None => open_devices()?,
    };
    let mut candidates = Vec::new();
    for device in &devices {
        let bars = device
            .query()?
            .bars
            .into_iter()
            .filter(|bar| bar.exportable);
        candidates.extend(bars.map(|bar| (device, bar)));
    }
    // A BAR that files can reach, and of those the one with the most room, and of equal ones
    // the first.
    candidates.sort_by_key(|(_, bar)| std::cmp::Reverse((bar.pages, bar.largest_free)));
    let (device, bar) = match candidates.first() {
        Some((device, bar)) => (*device, bar.index),
        // The module's error says why nothing can be exported.
        None => (&devices[0], 0),
    };
    device.export(module::Request {
        bar,
        offset: None,
        length,
        access: Access::ReadWrite,
    })
}

/// Every device that this user may open, never an empty list; the first error if there is none.
fn open_devices() -> Result<Vec<module::Device>, ExportError> {
    let mut devices = Vec::new();
    let mut refusal = None;
    for node in module::probe()? {
        match module::Device::open_node(node) {
            Ok(device) => devices.push(device),
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    match refusal {
        Some(error) if devices.is_empty() => Err(error),
        _ => Ok(devices),
    }
}

/// Disk to buffer, check, change, buffer to disk, check.
fn round_trip(
    worker: &mut Worker,
    range: &BufferRange,
    gpu: Option<&Gpu>,
    directory: &Path,
) -> Result<Vec<Transfer>, Failure> {
    let place = places::describe(directory);
    let name = range.buffer().name();
    let (source, sink) = (
        format!("first file in {place}"),
        format!("second file in {place}"),
    );

    let progress = Progress::start(format!("writing {} bytes to {source}", range.len()));
    let file = RandomFile::make(directory, range.len())?;
    drop(progress);

    let progress = Progress::start(format!("{source} -> {name}"));
    worker.ask(&Request::TakeBuffer, None)?;
    worker.hand_over(range)?;
    let read = worker.transfer(
        &Request::Read {
            name: source.clone(),
        },
        file.as_fd(),
    )?;
    drop(progress);

    let progress = Progress::start(format!("checking and changing {name}"));
    let mut mapping = range.map(Access::ReadWrite)?;
    let arrived = file.check(&mut mapping, gpu.is_none())?;
    let source_is_whole = file.is_unchanged()?;
    drop(mapping);
    let computed = gpu.map(|gpu| gpu.change(range)).transpose()?;
    drop(progress);

    let progress = Progress::start(format!("{name} -> {sink}"));
    let second = unnamed_file(directory)?;
    let written = worker.transfer(&Request::Write { name: sink.clone() }, second.as_fd())?;
    let sink_is_right = file.is_changed_copy(&second)?;
    drop(progress);

    let full = |account: &Account| account.bytes == range.len();
    let read_is_right = full(&read) && arrived && source_is_whole;
    let write_is_right = full(&written) && sink_is_right;
    let mut transfers = vec![Transfer::new(name, &source, name, read, read_is_right)];
    if let (Some(gpu), Some(account)) = (gpu, computed) {
        // The second file has the shader's results.
        transfers.push(Transfer::new(name, name, &gpu.name, account, sink_is_right));
    }
    transfers.push(Transfer::new(name, name, &sink, written, write_is_right));
    Ok(transfers)
}

/// The second process, and the socket to it. Dropping this value kills the process.
struct Worker {
    channel: Channel,
    child: Child,
}

impl Worker {
    fn start() -> Result<Worker, Failure> {
        let (channel, theirs) = Channel::pair()?;
        // The socket becomes the worker's standard input, the one descriptor with a fixed
        // number.
        let child = Command::new(std::env::current_exe()?)
            .arg("demo-worker")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Worker { channel, child })
    }

    fn ask(
        &mut self,
        request: &Request,
        file: Option<std::os::fd::BorrowedFd<'_>>,
    ) -> Result<(), Failure> {
        let message = serde_json::to_vec(request)?;
        let sent = self.channel.send_message(&message, file.as_slice());
        sent.map_err(|error| self.explain(error))
    }

    fn hand_over(&mut self, range: &BufferRange) -> Result<(), Failure> {
        let sent = self.channel.send_buffer(range);
        sent.map_err(|error| self.explain(error))
    }

    fn transfer(
        &mut self,
        request: &Request,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Result<Account, Failure> {
        self.ask(request, Some(file))?;
        let received = self.channel.receive_message(MAX_MESSAGE);
        let (message, _) = received.map_err(|error| self.explain(error))?;
        match serde_json::from_slice(&message)? {
            Response::Done(account) => Ok(account),
            Response::Failed(error) => Err(format!("the second process: {error}").into()),
        }
    }

    fn finish(mut self) -> Result<(), Failure> {
        self.ask(&Request::Finish, None)?;
        let status = self.child.wait()?;
        if !status.success() {
            return Err(format!("the second process {}", describe(status)).into());
        }
        Ok(())
    }

    /// Adds the exit status of the second process to the error, if the process has ended.
    fn explain(&mut self, error: ShareError) -> Failure {
        if error != ShareError::PeerGone {
            return error.into();
        }
        match self.child.wait() {
            Ok(status) => format!("the second process {}", describe(status)).into(),
            Err(wait) => format!("the second process has gone: {wait}").into(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Both calls fail only for a process that has ended and was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with status {code}"),
        (None, None) => "ended".into(),
    }
}

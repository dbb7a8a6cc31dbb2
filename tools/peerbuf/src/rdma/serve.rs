//! The end that shows a buffer.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use peerbuf::import::file::FileImporter;
use peerbuf::import::rdma::{Card, Registration};
use peerbuf::{Access, Buffer};
use sha2::{Digest, Sha256};

use super::place::{Place, checksum};
use super::wire::{self, Account, FileAccount, Hello, Request, Response};
use super::{DEPTH, card, receipt};
use crate::{Failure, say, size};

/// Arguments of `peerbuf rdma serve`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The card [default: the first]
    #[arg(long, value_name = "NAME")]
    card: Option<String>,

    /// Where clients connect to, by TCP
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,

    /// The buffer: `udmabuf`, `heap:NAME`, or `bar:DDDD:BB:DD.F:N`
    #[arg(long, value_name = "BUFFER", default_value = "udmabuf")]
    buffer: Place,

    /// How large it is
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = size::parse)]
    size: u64,

    /// An existing file, which gets what clients write, and from which the buffer is filled first
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// End after one client; its failure is the exit status
    #[arg(long)]
    once: bool,
}

/// How long a client may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    card: Card,
    buffer: Buffer,
    file: Option<FileImporter>,
}

/// Serves one client after the other.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let server = Server {
        card: card(arguments.card.as_deref())?,
        buffer: arguments.buffer.make(arguments.size)?,
        file: arguments
            .file
            .as_ref()
            .map(FileImporter::open)
            .transpose()?,
    };
    if let Some(file) = &server.file
        && file.size()? > 0
    {
        file.attach(&server.buffer.whole())?.read(0)?;
    }
    let listener = TcpListener::bind(arguments.listen)
        .map_err(|error| format!("listening at {}: {error}", arguments.listen))?;
    say::answer(format_args!(
        "{}, {}, at {}",
        server.buffer,
        size::show(server.buffer.size()),
        listener.local_addr()?
    ))?;
    loop {
        let (stream, client) = listener.accept()?;
        let served = server.serve(stream);
        if let Err(error) = &served {
            say::remark(format_args!("{client}: {error}"));
        }
        if arguments.once {
            served?;
            return Ok(ExitCode::SUCCESS);
        }
    }
}

impl Server {
    /// Serves one client to its end. The buffer is registered for it alone: when it is gone, so is
    /// its key.
    fn serve(&self, mut stream: TcpStream) -> Result<(), Failure> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let hello: Hello = wire::receive(&mut stream)?.ok_or("it closed the connection")?;
        let (peer, _, _) = hello.open()?;
        let whole = self.buffer.whole();
        let registration = self.card.register(&whole, Some(Access::ReadWrite))?;
        let end = self.card.endpoint(DEPTH)?;
        let ours = Hello::new(
            &end.address(),
            Some(&registration.remote()?),
            receipt(&registration),
        );
        // All that is done on this end is to be there: the client writes and reads.
        let _connection = end.connect(&peer)?;
        wire::send(&mut stream, &ours)?;
        while let Some(request) = wire::receive(&mut stream)? {
            let answer = match request {
                Request::End => return Ok(()),
                Request::Written { at, length } => self.written(&registration, at, length),
                Request::Read { at, length } => prepare(&registration, at, length),
            };
            let (answer, failed) = match answer {
                Ok(account) => (Response::Done(account), None),
                Err(error) => (Response::Refused(error.to_string()), Some(error)),
            };
            wire::send(&mut stream, &answer)?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Err("it closed the connection before the end".into())
    }

    /// The client has written the beginning of the buffer; those bytes belong at `at` of the file.
    fn written(
        &self,
        registration: &Registration,
        at: u64,
        length: u64,
    ) -> Result<Account, Failure> {
        registration.check()?;
        let range = registration.range()?.slice(0, length)?;
        let copied = registration.deliver(0, length)?;
        let mut account = Account {
            checksum: checksum(&range, &mut Sha256::new())?,
            copied,
            file: None,
        };
        if let Some(file) = &self.file {
            let receipt = file.attach(&range)?.write(at)?;
            file.sync()?;
            account.file = Some(FileAccount {
                path: receipt.plan.path.as_str().into(),
                host_bytes: receipt.host_bytes,
            });
        }
        Ok(account)
    }
}

/// The client is about to read.
fn prepare(registration: &Registration, at: u64, length: u64) -> Result<Account, Failure> {
    registration.check()?;
    let range = registration.range()?.slice(at, length)?;
    Ok(Account {
        copied: registration.refresh(at, length)?,
        checksum: checksum(&range, &mut Sha256::new())?,
        file: None,
    })
}

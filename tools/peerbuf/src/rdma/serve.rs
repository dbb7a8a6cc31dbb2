//! The server, which exposes a buffer.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use peerbuf::Access;
use peerbuf::error::TransferError;
use peerbuf::import::file::FileImporter;
use peerbuf_rdma::{Address, Card, Connection, RdmaError, Registration, Rung};
use sha2::{Digest, Sha256};

use super::lent::{Every, Lent, PATIENCE};
use super::place::{Place, checksum};
use super::wire::{self, Account, FileAccount, Hello, Request, Response, Shown};
use super::{DEPTH, Which, receipt};
use crate::accepting::Accepting;
use crate::{Failure, say, size};

/// Arguments of `peerbuf rdma serve`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    which: Which,

    /// The TCP address to listen on
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,

    /// The buffer: `udmabuf`, `heap:NAME`, or `bar:DDDD:BB:DD.F:N`
    #[arg(long, value_name = "BUFFER", default_value = "udmabuf")]
    buffer: Place,

    /// The buffer's size
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = size::parse)]
    size: u64,

    /// An existing file that initializes the buffer and receives the bytes that clients write
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Move the buffer at random intervals of about MS milliseconds: a buffer in a BAR to system memory and
    /// back, any other buffer to new memory
    #[arg(long, value_name = "MS")]
    move_every: Option<Every>,

    /// Exit after one client, with status 1 if it failed
    #[arg(long)]
    once: bool,
}

struct Server {
    card: Card,
    lent: Lent,
    file: Option<FileImporter>,
}

/// Serves one client after the other.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let card = arguments.which.open()?;
    let server = Server {
        lent: Lent::new(
            &card,
            &arguments.buffer,
            arguments.size,
            arguments.move_every,
            Some(Access::ReadWrite),
        )?,
        card,
        file: arguments.file.as_ref().map(|path| open(path)).transpose()?,
    };
    // A buffer that no card takes is told now, not to the first client.
    let range = server.lent.registration()?.range()?;
    if let Some(file) = &server.file
        && file.size()? > 0
    {
        file.attach(&range)?.read(0)?;
    }
    drop(range);
    let listener = TcpListener::bind(arguments.listen)
        .map_err(|error| format!("listening at {}: {error}", arguments.listen))?;
    say::answer(format_args!(
        "{}, {}, at {}",
        server.lent.what,
        size::show(server.lent.size),
        listener.local_addr()?
    ))?;
    let mut accepting = Accepting::default();
    loop {
        std::thread::sleep(accepting.pause().unwrap_or_default());
        let Some((stream, client)) = accepting.take(listener.accept()) else {
            continue;
        };
        let served = server.serve(stream);
        if let Err(error) = &served {
            say::remark(format_args!("{client}: {error}"));
        }
        if arguments.once {
            served?;
            server.lent.end()?;
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Opens a file for reading and writing, because clients may do both. A read-only file serves
/// clients that read.
fn open(path: &Path) -> Result<FileImporter, TransferError> {
    FileImporter::open_for(path, Access::ReadWrite)
        .or_else(|refused| FileImporter::open(path).map_err(|_| refused))
}

/// One client's use of the buffer.
struct Served {
    /// First field: dropping the connection stops the card before the registration goes.
    connection: Option<Connection>,
    /// The registration while the client uses it. Its key is useless without the connection.
    shown: Option<Registration>,
    moves: u64,
}

impl Server {
    /// Serves one client to its end.
    fn serve(&self, mut stream: TcpStream) -> Result<(), Failure> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let hello: Hello = wire::receive(&mut stream)?.ok_or("it closed the connection")?;
        hello.open()?;
        wire::send(&mut stream, &Hello::new(self.lent.size))?;
        let mut served = Served {
            connection: None,
            shown: None,
            moves: self.lent.moves(),
        };
        while let Some(request) = wire::receive(&mut stream)? {
            let answer = match request {
                Request::End => return Ok(()),
                Request::Begin { connect } => self.begin(&mut served, connect),
                Request::Written { at, length } => self.written(&mut served, at, length),
                Request::Read { at, length } => self.prepare(&served, at, length),
            };
            let (answer, failed) = match answer {
                Ok(answer) => (answer, None),
                Err(error) => (Response::Refused(error.to_string()), Some(error)),
            };
            wire::send(&mut stream, &answer)?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Err("it closed the connection before the end".into())
    }

    fn begin(&self, served: &mut Served, connect: Option<[u8; 32]>) -> Result<Response, Failure> {
        let mut ours = None;
        if let Some(theirs) = connect {
            // The old connection goes first: without it the client's key is useless.
            served.connection = None;
            served.shown = None;
            let theirs = Address::from_bytes(&theirs)?;
            let end = self.card.endpoint(DEPTH)?;
            ours = Some(end.address());
            served.connection = Some(end.connect(&theirs)?);
        }
        served.shown = None;
        let connection = served.connection.as_ref();
        let connection = connection.ok_or("malformed: it has not connected")?;
        let registration = self.lent.registration()?;
        // All earlier work of this end must be complete, because the client writes and reads.
        connection.shows(&registration);
        let shown = Shown::new(
            ours.as_ref(),
            &registration.remote()?,
            receipt(&registration),
        );
        served.shown = Some(registration);
        Ok(Response::Ready(shown))
    }

    /// Handles a client's write to the start of the buffer. The bytes belong at `at` in the
    /// file.
    fn written(&self, served: &mut Served, at: u64, length: u64) -> Result<Response, Failure> {
        let shown = served.shown.take().ok_or("malformed: it has not begun")?;
        let copied = match shown.deliver(0, length) {
            Ok(copied) => copied,
            // The arrived bytes were in the buffer, and moved with it.
            Err(RdmaError::Stale { .. }) if shown.rung() != Rung::Staged => 0,
            Err(RdmaError::Stale { .. }) => return Ok(Response::Again),
            Err(error) => return Err(error.into()),
        };
        drop(shown);
        let range = self.lent.registration()?.range()?.slice(0, length)?;
        let mut account = Account {
            checksum: checksum(&range, &mut Sha256::new())?,
            copied,
            moves: self.lent.moves() - served.moves,
            file: None,
        };
        if let Some(file) = &self.file {
            let receipt = file.attach(&range)?.write(at)?;
            drop(range);
            file.sync()?;
            account.file = Some(FileAccount {
                path: receipt.plan.path.as_str().into(),
                host_bytes: receipt.host_bytes,
            });
        }
        Ok(Response::Done(account))
    }

    /// Prepares the buffer for a client's read.
    fn prepare(&self, served: &Served, at: u64, length: u64) -> Result<Response, Failure> {
        let shown = served.shown.as_ref().ok_or("malformed: it has not begun")?;
        let prepared = || -> Result<Account, RdmaError> {
            let range = shown.range()?.slice(at, length)?;
            Ok(Account {
                copied: shown.refresh(at, length)?,
                checksum: checksum(&range, &mut Sha256::new())?,
                moves: self.lent.moves() - served.moves,
                file: None,
            })
        };
        match prepared() {
            Ok(account) => Ok(Response::Done(account)),
            Err(RdmaError::Stale { .. }) => Ok(Response::Again),
            Err(error) => Err(error.into()),
        }
    }
}

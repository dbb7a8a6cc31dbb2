//! The client: it writes into the peer's buffer, or reads from it.

use std::fs::File;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use peerbuf::import::file::FileImporter;
use peerbuf::{Access, BufferRange, Deadline};
use peerbuf_rdma::{Address, Card, Link, RdmaError, Remote, Span, Status};

use super::lent::{Every, Lent, PATIENCE};
use super::place::{Place, checksum};
use super::report::Tally;
use super::wire::{self, Account, Hello, Receipt, Request, Response};
use super::{DEPTH, Which, receipt};
use crate::progress::Progress;
use crate::{Failure, say, size, table};

/// Both ends, as a client sees them.
#[derive(clap::Args)]
pub struct Ends {
    #[command(flatten)]
    which: Which,

    /// The address on which the server listens
    #[arg(long, value_name = "HOST:PORT")]
    pub connect: String,

    /// Retry for S seconds while no server listens there
    #[arg(long, value_name = "S", default_value = "0")]
    wait: u64,

    /// The local buffer: `udmabuf`, `heap:NAME`, or `bar:DDDD:BB:DD.F:N`
    #[arg(long, value_name = "BUFFER", default_value = "udmabuf")]
    buffer: Place,

    /// The buffer's size
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = size::parse)]
    size: u64,
}

/// Arguments of `peerbuf rdma put` and `get`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    ends: Ends,

    /// Number of bytes to copy [put: the whole file; get: the whole buffer]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: Option<u64>,

    /// Move the local buffer at random intervals of about MS milliseconds: a buffer in a BAR to system memory
    /// and back, any other buffer to new memory
    #[arg(long, value_name = "MS")]
    move_every: Option<Every>,

    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// The file
    file: PathBuf,
}

/// Maximum number of attempts of a transfer.
const TRIES: u32 = 100;

/// Connects to the peer, which may not be listening yet.
fn reach(ends: &Ends) -> Result<TcpStream, Failure> {
    let deadline = Deadline::after(Duration::from_secs(ends.wait));
    loop {
        match TcpStream::connect(&ends.connect) {
            Ok(stream) => return Ok(stream),
            Err(error) if deadline.is_over() => {
                return Err(format!("{}: {error}", ends.connect).into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// The peer.
pub struct There {
    pub stream: TcpStream,
    card: Card,
    /// Maximum number of requests in flight on a connection.
    pub depth: u32,
    /// The size of the peer's buffer in bytes.
    pub size: u64,
    pub receipt: Receipt,
    /// Number of connections that replaced one whose work was cut off.
    retries: u32,
}

/// The local buffer.
pub struct Here {
    pub lent: Lent,
    receipt: Receipt,
}

impl Here {
    /// The start of the buffer. The caller holds it briefly, because the buffer does not move
    /// meanwhile.
    fn range(&mut self, length: u64) -> Result<BufferRange, Failure> {
        let registration = self.lent.registration()?;
        self.receipt.follow(receipt(&registration));
        Ok(registration.range()?.slice(0, length)?)
    }
}

/// Connects to the peer and makes the local buffer, which moves at the interval `every`.
pub fn begin(ends: &Ends, every: Option<Every>) -> Result<(Here, There), Failure> {
    let mut stream = reach(ends)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let card = ends.which.open()?;
    let lent = Lent::new(&card, &ends.buffer, ends.size, every, None)?;
    wire::send(&mut stream, &Hello::new(lent.size))?;
    let theirs: Hello = wire::receive(&mut stream)?.ok_or(
        "the server closed the connection; see the output of `peerbuf rdma serve` there for the reason",
    )?;
    let there = There {
        size: theirs.open()?,
        stream,
        card,
        depth: DEPTH,
        receipt: Receipt::default(),
        retries: 0,
    };
    let receipt = receipt(&lent.registration()?);
    Ok((Here { lent, receipt }, there))
}

impl There {
    fn ask(&mut self, request: &Request) -> Result<Response, Failure> {
        wire::send(&mut self.stream, request)?;
        match wire::receive(&mut self.stream)? {
            Some(Response::Refused(why)) => {
                Err(format!("the server: {}", wire::plain(&why)?).into())
            }
            Some(answer) => Ok(answer),
            None => Err("the server closed the connection".into()),
        }
    }

    /// Sends a request whose work is either done or has to be repeated (`None`).
    pub fn account(&mut self, request: &Request) -> Result<Option<Account>, Failure> {
        match self.ask(request)? {
            Response::Done(account) => {
                if let Some(file) = &account.file {
                    wire::plain(&file.path)?;
                }
                Ok(Some(account))
            }
            Response::Again => Ok(None),
            other => Err(format!("malformed: {other:?} for an answer").into()),
        }
    }

    /// Asks for the peer's present buffer; `connect` makes a new connection.
    fn show(&mut self, connect: Option<&Address>) -> Result<(Option<Address>, Remote), Failure> {
        let connect = connect.map(Address::to_bytes);
        match self.ask(&Request::Begin { connect })? {
            Response::Ready(shown) => {
                let (address, remote, receipt) = shown.open()?;
                self.receipt.follow(receipt);
                Ok((address, remote))
            }
            other => Err(format!("malformed: {other:?} for a beginning").into()),
        }
    }

    /// Connects to the peer's present buffer.
    pub fn connect(&mut self) -> Result<Link, Failure> {
        let end = self.card.endpoint(self.depth)?;
        let (theirs, remote) = self.show(Some(&end.address()))?;
        let theirs = theirs.ok_or("malformed: the server has not connected")?;
        Ok(Link {
            connection: end.connect(&theirs)?,
            remote,
            limit: PATIENCE,
        })
    }

    /// Replaces a connection whose work was cut off. Other errors are returned.
    fn again(&mut self, why: RdmaError) -> Result<Link, Failure> {
        let moved = match &why {
            RdmaError::Work(error) => {
                error.cut_off || matches!(error.status, Status::REMOTE_ACCESS | Status::UNANSWERED)
            }
            RdmaError::Stopped { .. } => true,
            _ => false,
        };
        self.retries += 1;
        if !moved || self.retries > TRIES {
            return Err(why.into());
        }
        // If the peer has gone, the card's error is the reason.
        self.connect()
            .map_err(|error| format!("{why}; nor over another connection: {error}").into())
    }

    /// Begins a bufferful over the existing connection.
    pub fn ready(&mut self, link: &mut Link) -> Result<(), Failure> {
        link.remote = self.show(None)?.1;
        Ok(())
    }

    /// Asks the peer to prepare this many bytes of its buffer for reading.
    pub fn prepare(&mut self, link: &mut Link, at: u64, length: u64) -> Result<Account, Failure> {
        for _ in 0..TRIES {
            if let Some(account) = self.account(&Request::Read { at, length })? {
                return Ok(account);
            }
            self.retries += 1;
            *link = self.connect()?;
        }
        Err("the server's buffer moves too often to be read".into())
    }
}

/// Writes one bufferful to the peer and its file. Returns the peer's account and the bytes
/// copied here.
fn write(
    here: &Here,
    there: &mut There,
    link: &mut Link,
    at: u64,
    length: u64,
) -> Result<(Account, u64), Failure> {
    let span = Span {
        offset: 0,
        at: 0,
        length,
    };
    let mut copied = 0;
    loop {
        there.ready(link)?;
        let follower = here.lent.follower();
        copied += follower
            .write(link, span, |why| there.again(why))?
            .host_bytes;
        if let Some(account) = there.account(&Request::Written { at, length })? {
            return Ok((account, copied));
        }
        there.retries += 1;
        if there.retries > TRIES {
            return Err("the server's buffer moves too often to be written".into());
        }
        *link = there.connect()?;
    }
}

/// Reads one bufferful from the peer. Returns the peer's account and the bytes copied here.
fn read(
    here: &Here,
    there: &mut There,
    link: &mut Link,
    at: u64,
    length: u64,
) -> Result<(Account, u64), Failure> {
    let span = Span {
        offset: 0,
        at,
        length,
    };
    there.ready(link)?;
    let account = there.prepare(link, at, length)?;
    let done = here.lent.follower().read(link, span, |why| {
        let mut link = there.again(why)?;
        there.prepare(&mut link, at, length)?;
        Ok::<Link, Failure>(link)
    })?;
    Ok((account, done.host_bytes))
}

/// `peerbuf rdma put`
pub fn put(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let file = FileImporter::open(&arguments.file)?;
    let held = file.size()?;
    let length = arguments.length.unwrap_or(held);
    if length > held {
        return Err(format!("{} has {held} bytes", arguments.file.display()).into());
    }
    let (mut here, mut there) = begin(&arguments.ends, arguments.move_every)?;
    let _progress = Progress::start(format!(
        "{} -> {}",
        arguments.file.display(),
        arguments.ends.connect
    ));
    let mut tally = Tally::new();
    let mut link = there.connect()?;
    let mut at = 0;
    while at < length {
        let now = here.lent.size.min(there.size).min(length - at);
        let range = here.range(now)?;
        let receipt = file.attach(&range)?.read(at)?;
        if receipt.bytes != now {
            return Err(format!("{} became shorter", arguments.file.display()).into());
        }
        drop(range);
        let ours = checksum(&here.range(now)?, tally.sum())?;
        let (account, copied) = write(&here, &mut there, &mut link, at, now)?;
        tally.add(now, ours, account, copied);
        tally.file(&receipt);
        at += now;
    }
    end(here, there, link, tally, arguments)
}

/// `peerbuf rdma get`
pub fn get(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (mut here, mut there) = begin(&arguments.ends, arguments.move_every)?;
    let length = arguments.length.unwrap_or(there.size);
    if length > there.size {
        return Err(format!("the server's buffer has only {} bytes", there.size).into());
    }
    // The file may not exist yet.
    File::create(&arguments.file)
        .map_err(|error| format!("{}: {error}", arguments.file.display()))?;
    let file = FileImporter::open_for(&arguments.file, Access::Write)?;
    let _progress = Progress::start(format!(
        "{} -> {}",
        arguments.ends.connect,
        arguments.file.display()
    ));
    let mut tally = Tally::new();
    let mut link = there.connect()?;
    let mut at = 0;
    while at < length {
        let now = here.lent.size.min(there.size).min(length - at);
        let (account, copied) = read(&here, &mut there, &mut link, at, now)?;
        let ours = checksum(&here.range(now)?, tally.sum())?;
        let receipt = file.attach(&here.range(now)?)?.write(at)?;
        tally.add(now, ours, account, copied);
        tally.file(&receipt);
        at += now;
    }
    file.sync()?;
    end(here, there, link, tally, arguments)
}

fn end(
    here: Here,
    mut there: There,
    link: Link,
    tally: Tally,
    arguments: &Arguments,
) -> Result<ExitCode, Failure> {
    drop(link);
    wire::send(&mut there.stream, &Request::End)?;
    let moves = here.lent.moves();
    here.lent.end()?;
    let summary = tally.end(here.receipt, there.receipt, moves, there.retries);
    if arguments.json {
        say::answer(serde_json::to_string(&summary)?)?;
    } else {
        let file = arguments.file.display().to_string();
        say::answer(summary.table(&file, table::width()).trim_end())?;
    }
    if !summary.verified {
        return Err("the checksums of the two ends differ".into());
    }
    Ok(ExitCode::SUCCESS)
}

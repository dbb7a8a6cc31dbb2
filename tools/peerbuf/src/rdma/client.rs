//! The end that writes into, or reads out of, the other's buffer.

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

/// How often a transfer is begun anew before it is given up.
const TRIES: u32 = 100;

/// Connects to the other end, which may not be there yet.
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

/// The other end.
pub struct There {
    pub stream: TcpStream,
    card: Card,
    /// How many requests a connection has in flight, at most.
    pub depth: u32,
    /// How large its buffer is.
    pub size: u64,
    pub receipt: Receipt,
    /// How often a connection took the place of one whose work was cut off.
    retries: u32,
}

/// This end's buffer.
pub struct Here {
    pub lent: Lent,
    receipt: Receipt,
}

impl Here {
    /// The beginning of the buffer, for the shortest time: it does not move meanwhile.
    fn range(&mut self, length: u64) -> Result<BufferRange, Failure> {
        let registration = self.lent.registration()?;
        self.receipt.follow(receipt(&registration));
        Ok(registration.range()?.slice(0, length)?)
    }
}

/// Reaches the other end and makes this end's buffer, which moves as often.
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

    /// Asks for something that is done, or to be begun again.
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

    /// The other end's buffer as it is now, over a connection that there is.
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

    /// A connection, to the buffer as it is now.
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

    /// A new connection in place of one whose work was cut off; for nothing else.
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
        // Where the other end has gone, what the card said is the reason.
        self.connect()
            .map_err(|error| format!("{why}; nor over another connection: {error}").into())
    }

    /// Begins a bufferful over the connection that there is.
    pub fn ready(&mut self, link: &mut Link) -> Result<(), Failure> {
        link.remote = self.show(None)?.1;
        Ok(())
    }

    /// Has so many bytes of the buffer made ready to be read.
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

/// One bufferful to the other end, and into its file: what it says of it, and the bytes copied here.
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

/// One bufferful of the other end: what it says of it, and the bytes copied here.
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
    // Made here: there may be none.
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

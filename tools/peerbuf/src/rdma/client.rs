//! The end that writes into, or reads out of, the other's buffer.

use std::fs::File;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peerbuf::Buffer;
use peerbuf::import::file::FileImporter;
use peerbuf::import::rdma::{Connection, Registration, Remote};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::place::{Place, checksum};
use super::wire::{self, Account, FileAccount, Hello, Receipt, Request, Response};
use super::{DEPTH, card, receipt};
use crate::progress::Progress;
use crate::{Failure, say, size};

/// Arguments of `peerbuf rdma put` and `get`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The card [default: the first]
    #[arg(long, value_name = "NAME")]
    card: Option<String>,

    /// Where the other machine listens
    #[arg(long, value_name = "HOST:PORT")]
    connect: String,

    /// Try again for S seconds while nobody listens there
    #[arg(long, value_name = "S", default_value = "0")]
    wait: u64,

    /// This end's buffer: `udmabuf`, `heap:NAME`, or `bar:DDDD:BB:DD.F:N`
    #[arg(long, value_name = "BUFFER", default_value = "udmabuf")]
    buffer: Place,

    /// How large it is [default: as the other end's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// How many bytes to move [put: all of the file; get: all of the buffer]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: Option<u64>,

    /// One JSON object instead of the summary
    #[arg(long)]
    json: bool,

    /// The file
    file: PathBuf,
}

/// How long the other end and the card may take for one bufferful.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connects to the other end, which may not be there yet.
fn reach(arguments: &Arguments) -> Result<TcpStream, Failure> {
    let deadline = Instant::now() + Duration::from_secs(arguments.wait);
    loop {
        match TcpStream::connect(&arguments.connect) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(format!("{}: {error}", arguments.connect).into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// What was done, with the fields of `--json`.
#[derive(Serialize)]
struct Summary {
    bytes: u64,
    /// Of all bytes, as they were in this end's buffer.
    sha256: String,
    /// Each bufferful had the same checksum in both buffers.
    verified: bool,
    seconds: f64,
    here: Receipt,
    there: Receipt,
    /// Bytes that the processor copied between the buffer and the card's memory.
    copied_here: u64,
    copied_there: u64,
    file_here: FileAccount,
    /// Of what the other end wrote to its file.
    file_there: Option<FileAccount>,
}

/// The connections to the other end.
struct Session {
    stream: TcpStream,
    connection: Connection,
    registration: Registration,
    remote: Remote,
    buffer: Buffer,
    there: Receipt,
}

impl Session {
    fn begin(arguments: &Arguments) -> Result<Session, Failure> {
        let mut stream = reach(arguments)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let card = card(arguments.card.as_deref())?;
        let buffer = arguments.buffer.make(arguments.size.unwrap_or(8 << 20))?;
        let registration = card.register(&buffer.whole(), None)?;
        let end = card.endpoint(DEPTH)?;
        let hello = Hello::new(&end.address(), None, receipt(&registration));
        wire::send(&mut stream, &hello)?;
        let theirs: Hello = wire::receive(&mut stream)?.ok_or(
            "the other end closed the connection; the reason is in what `peerbuf rdma serve` says there",
        )?;
        let (peer, remote, there) = theirs.open()?;
        Ok(Session {
            connection: end.connect(&peer)?,
            remote: remote.ok_or("malformed: the other end shows no buffer")?,
            stream,
            registration,
            buffer,
            there,
        })
    }

    fn ask(&mut self, request: &Request) -> Result<Account, Failure> {
        wire::send(&mut self.stream, request)?;
        match wire::receive(&mut self.stream)? {
            Some(Response::Done(account)) => {
                if let Some(file) = &account.file {
                    wire::plain(&file.path)?;
                }
                Ok(account)
            }
            Some(Response::Refused(why)) => {
                Err(format!("the other end: {}", wire::plain(&why)?).into())
            }
            None => Err("the other end closed the connection".into()),
        }
    }

    /// The most bytes of one round.
    fn bufferful(&self) -> u64 {
        self.buffer.size().min(self.remote.len())
    }

    /// Cuts a transfer of the first `length` bytes of this end's buffer, and of the other's from `at`
    /// on, into requests of a size that every card likes, and waits for all. Returns the bytes that
    /// the processor copied.
    fn transfer(&mut self, at: u64, length: u64, write: bool) -> Result<u64, Failure> {
        const REQUEST: u64 = 1 << 20;
        let (mut posted, mut copied) = (0, 0);
        while posted < length || self.connection.in_flight() > 0 {
            if posted < length && self.connection.in_flight() < DEPTH as usize {
                let now = (length - posted).min(REQUEST);
                let piece = self.registration.slice(posted, now)?;
                let remote = self.remote.slice(at + posted, now)?;
                if write {
                    self.connection.write(&piece, &remote, None)?;
                } else {
                    self.connection.read(&piece, &remote)?;
                }
                posted += now;
                continue;
            }
            let done = self.connection.wait(PATIENCE)?;
            copied += done.host_bytes;
            done.result?;
        }
        Ok(copied)
    }
}

/// What both directions count.
struct Tally {
    summary: Summary,
    sum: Sha256,
    began: Instant,
}

impl Tally {
    fn new(session: &Session) -> Tally {
        let summary = Summary {
            bytes: 0,
            sha256: String::new(),
            verified: true,
            seconds: 0.0,
            here: receipt(&session.registration),
            there: session.there.clone(),
            copied_here: 0,
            copied_there: 0,
            file_here: FileAccount {
                path: String::new(),
                host_bytes: 0,
            },
            file_there: None,
        };
        Tally {
            summary,
            sum: Sha256::new(),
            began: Instant::now(),
        }
    }

    /// Adds one bufferful: its checksum on this end, and what the other end says of it.
    fn add(&mut self, length: u64, ours: [u8; 32], theirs: Account, copied: u64) {
        let summary = &mut self.summary;
        summary.bytes += length;
        summary.verified &= ours == theirs.checksum;
        summary.copied_here += copied;
        summary.copied_there += theirs.copied;
        if let Some(file) = theirs.file {
            let host_bytes = summary.file_there.take().map_or(0, |f| f.host_bytes);
            summary.file_there = Some(FileAccount {
                host_bytes: host_bytes + file.host_bytes,
                ..file
            });
        }
    }

    fn end(mut self, arguments: &Arguments) -> Result<ExitCode, Failure> {
        let sum: [u8; 32] = self.sum.finalize().into();
        self.summary.sha256 = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        self.summary.seconds = self.began.elapsed().as_secs_f64();
        let summary = self.summary;
        if arguments.json {
            say::answer(serde_json::to_string(&summary)?)?;
        } else {
            tell(&summary, arguments)?;
        }
        if !summary.verified {
            return Err("the checksums of the two ends differ".into());
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn tell(summary: &Summary, arguments: &Arguments) -> Result<(), Failure> {
    say::answer(format_args!(
        "{} bytes in {:.2} s, checksums {}",
        summary.bytes,
        summary.seconds,
        if summary.verified { "agree" } else { "DIFFER" },
    ))?;
    let file = |account: &FileAccount, name: &str| {
        format!(
            "  {name}: {}, {} bytes through system memory",
            account.path, account.host_bytes
        )
    };
    for (end, receipt, copied) in [
        ("here", &summary.here, summary.copied_here),
        ("there", &summary.there, summary.copied_there),
    ] {
        say::answer(format_args!(
            "{end}: {} with {}: {} ({}), {copied} bytes copied",
            receipt.buffer, receipt.card, receipt.registration, receipt.path,
        ))?;
        for attempt in &receipt.attempts {
            say::answer(format_args!("  not {attempt}"))?;
        }
        match (end, &summary.file_there) {
            ("here", _) => {
                let name = arguments.file.display().to_string();
                say::answer(file(&summary.file_here, &name))?;
            }
            (_, Some(account)) => say::answer(file(account, "its file"))?,
            _ => {}
        }
    }
    Ok(())
}

/// `peerbuf rdma put`
pub fn put(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let file = FileImporter::open(&arguments.file)?;
    let held = file.size()?;
    let length = arguments.length.unwrap_or(held);
    if length > held {
        return Err(format!("{} has {held} bytes", arguments.file.display()).into());
    }
    let mut session = Session::begin(arguments)?;
    let _progress = Progress::start(format!(
        "{} -> {}",
        arguments.file.display(),
        arguments.connect
    ));
    let mut tally = Tally::new(&session);
    let mut at = 0;
    while at < length {
        let now = session.bufferful().min(length - at);
        let range = session.buffer.range(0, now)?;
        let read = file.attach(&range)?.read(at)?;
        if read.bytes != now {
            return Err(format!("{} became shorter", arguments.file.display()).into());
        }
        tally.summary.file_here.path = read.plan.path.as_str().into();
        tally.summary.file_here.host_bytes += read.host_bytes;
        let ours = checksum(&range, &mut tally.sum)?;
        let copied = session.transfer(0, now, true)?;
        let account = session.ask(&Request::Written { at, length: now })?;
        tally.add(now, ours, account, copied);
        at += now;
    }
    wire::send(&mut session.stream, &Request::End)?;
    tally.end(arguments)
}

/// `peerbuf rdma get`
pub fn get(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mut session = Session::begin(arguments)?;
    let length = arguments.length.unwrap_or(session.remote.len());
    if length > session.remote.len() {
        return Err(format!("the other end's buffer has {} bytes", session.remote.len()).into());
    }
    // Made here: there may be none.
    File::create(&arguments.file)
        .map_err(|error| format!("{}: {error}", arguments.file.display()))?;
    let file = FileImporter::open(&arguments.file)?;
    let _progress = Progress::start(format!(
        "{} -> {}",
        arguments.connect,
        arguments.file.display()
    ));
    let mut tally = Tally::new(&session);
    let mut at = 0;
    while at < length {
        let now = session.bufferful().min(length - at);
        let account = session.ask(&Request::Read { at, length: now })?;
        let copied = session.transfer(at, now, false)?;
        let range = session.buffer.range(0, now)?;
        let ours = checksum(&range, &mut tally.sum)?;
        let written = file.attach(&range)?.write(at)?;
        tally.summary.file_here.path = written.plan.path.as_str().into();
        tally.summary.file_here.host_bytes += written.host_bytes;
        tally.add(now, ours, account, copied);
        at += now;
    }
    file.sync()?;
    wire::send(&mut session.stream, &Request::End)?;
    tally.end(arguments)
}

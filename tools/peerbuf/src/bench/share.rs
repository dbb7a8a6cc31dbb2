//! What handing over costs. The floor of each figure is a bare loop over a socket of the same kind,
//! that moves the same descriptors in messages of the same size and does nothing else.
//!
//! Both ends are threads of this process: what is measured is the library and the kernel, not the
//! start of processes.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peerbuf::export::memfd;
use peerbuf::share::{BufferId, Channel, Copied, MAX_DESCRIPTORS, Publisher, Subscriber};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;

use crate::{Failure, say};

/// Arguments of `peerbuf bench share`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Number of measurements per figure; the median is printed
    #[arg(long, value_name = "N", default_value = "11", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// The figures as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    hand_over: Vec<HandOver>,
    memory: Memory,
    moves: Vec<Move>,
}

#[derive(Serialize)]
struct HandOver {
    descriptors_per_message: usize,
    per_second: f64,
    bare_per_second: f64,
    /// The median of what each round came to, beside its own floor.
    ratio: f64,
}

/// Bytes for each buffer.
#[derive(Serialize)]
struct Memory {
    publisher: u64,
    subscriber: u64,
}

#[derive(Serialize)]
struct Move {
    subscribers: usize,
    microseconds: f64,
    bare_microseconds: f64,
}

/// An offer of one buffer has so many bytes, and a message so many more.
const RECORD: usize = 240;
const HEADER: usize = 24;
/// Buffers that are published for the figures.
const BUFFERS: usize = 64 * MAX_DESCRIPTORS;

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    raise_descriptor_limit()?;
    let rounds = arguments.rounds;
    // First, while nothing that was freed can be used again.
    let memory = memory()?;
    let mut hand_over = Vec::new();
    for batch in [MAX_DESCRIPTORS, 1] {
        let (per_second, bare_per_second, ratio) = beside(
            rounds,
            || published_per_second(batch),
            || bare_per_second(batch),
        )?;
        hand_over.push(HandOver {
            descriptors_per_message: batch,
            per_second,
            bare_per_second,
            ratio,
        });
    }
    let mut moves = Vec::new();
    for subscribers in [1, 2, 4, 8, 16, 32, 64] {
        let (microseconds, bare_microseconds, _) = beside(
            rounds,
            || move_microseconds(subscribers),
            || bare_move_microseconds(subscribers),
        )?;
        moves.push(Move {
            subscribers,
            microseconds,
            bare_microseconds,
        });
    }
    let report = Report {
        hand_over,
        memory,
        moves,
    };
    if arguments.json {
        say::answer(serde_json::to_string(&report)?)?;
    } else {
        say::answer(text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The medians of a figure, of its floor, and of their ratio in each round. Taken in turn, so that both
/// meet the same machine.
fn beside(
    rounds: u32,
    figure: impl Fn() -> Result<f64, Failure>,
    floor: impl Fn() -> Result<f64, Failure>,
) -> Result<(f64, f64, f64), Failure> {
    let mut figures = Vec::new();
    let mut floors = Vec::new();
    let mut ratios = Vec::new();
    for _ in 0..rounds {
        let (figure, floor) = (figure()?, floor()?);
        figures.push(figure);
        floors.push(floor);
        ratios.push(figure / floor);
    }
    let median = |mut figures: Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    Ok((median(figures), median(floors), median(ratios)))
}

fn text(report: &Report) -> String {
    let mut lines = vec!["descriptors handed over per second".to_owned()];
    for row in &report.hand_over {
        lines.push(format!(
            "  {:>3} a message   {:>9.0}   bare sendmsg {:>9.0}   {:.2} of it",
            row.descriptors_per_message, row.per_second, row.bare_per_second, row.ratio
        ));
    }
    lines.push(format!(
        "memory for each buffer: {} bytes in the publisher, {} in a subscriber",
        report.memory.publisher, report.memory.subscriber
    ));
    lines.push("a move of 4096 bytes, with so many idle subscribers".to_owned());
    for row in &report.moves {
        lines.push(format!(
            "  {:>3} subscribers {:>9.0} us   bare messages {:>9.0} us",
            row.subscribers, row.microseconds, row.bare_microseconds
        ));
    }
    lines.join("\n")
}

/// Every buffer is a descriptor in the subscriber, which is in this process.
fn raise_descriptor_limit() -> Result<(), Failure> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// A publisher of many names for one piece of memory.
fn publisher(buffers: usize) -> Result<(Publisher, Vec<BufferId>), Failure> {
    let memory = memfd::export("bench", 4096)?;
    let mut publisher = Publisher::new()?;
    let mut ids = Vec::new();
    for number in 0..buffers {
        let memory = memory.clone();
        let backing = Copied::new(move |_| Ok(memory.clone()))?;
        ids.push(publisher.publish(&format!("buffer {number}"), backing)?);
    }
    Ok((publisher, ids))
}

/// From a subscriber's first word until it has accepted everything.
fn published_per_second(batch: usize) -> Result<f64, Failure> {
    let (publisher, ids) = publisher(BUFFERS)?;
    let mut publisher = publisher.with_batches_of(batch);
    let (ours, theirs) = Channel::pair()?;
    publisher.add(ours)?;
    let begun = Instant::now();
    let subscriber = Subscriber::new(theirs)?;
    while publisher.unaccepted() > 0 || publisher.accepted(ids[BUFFERS - 1]) == 0 {
        publisher.serve_once()?;
    }
    let time = begun.elapsed();
    drop(subscriber);
    Ok(BUFFERS as f64 / time.as_secs_f64())
}

fn sockets() -> Result<(OwnedFd, OwnedFd), Failure> {
    let flags = SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok(pair)
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Failure> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// The length of the message, and its descriptors behind those in `descriptors`.
fn receive(
    socket: &OwnedFd,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, Failure> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    Ok(received.bytes)
}

fn bare_per_second(batch: usize) -> Result<f64, Failure> {
    let memory = memfd::export("bench", 4096)?;
    let memory = memory.host_memory().ok_or("a memfd has memory")?;
    let descriptors = vec![memory; batch];
    let message = vec![7; HEADER + batch * RECORD];
    let length = message.len();
    let (ours, theirs) = sockets()?;
    let begun = Instant::now();
    let receiver = std::thread::spawn(move || -> Result<Vec<OwnedFd>, String> {
        let mut descriptors = Vec::new();
        let mut bytes = vec![0; length];
        while descriptors.len() < BUFFERS {
            let received = receive(&theirs, &mut bytes, &mut descriptors);
            received.map_err(|error| error.to_string())?;
        }
        Ok(descriptors)
    });
    for _ in 0..BUFFERS / batch {
        send(&ours, &message, &descriptors)?;
    }
    let received = receiver.join().map_err(|_| "the receiver panicked")??;
    let time = begun.elapsed();
    drop(received);
    Ok(BUFFERS as f64 / time.as_secs_f64())
}

/// Resident memory of this process in bytes.
fn resident() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).ok_or("statm")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

fn memory() -> Result<Memory, Failure> {
    let before = resident()?;
    let (mut publisher, _ids) = publisher(BUFFERS)?;
    let published = resident()?.saturating_sub(before) / (BUFFERS) as u64;
    drop(publisher);
    publisher = self::publisher(BUFFERS)?.0;
    let (ours, theirs) = Channel::pair()?;
    publisher.add(ours)?;
    let before = resident()?;
    let subscriber = Subscriber::new(theirs)?;
    while subscriber.names().len() < BUFFERS {
        publisher.serve_for(Duration::from_millis(1))?;
    }
    let subscribed = resident()?.saturating_sub(before) / BUFFERS as u64;
    Ok(Memory {
        publisher: published,
        subscriber: subscribed,
    })
}

/// Moves in each round.
const MOVES: u32 = 20;

fn move_microseconds(count: usize) -> Result<f64, Failure> {
    let mut publisher = Publisher::new()?;
    let mut subscribers = Vec::new();
    for _ in 0..count {
        let (ours, theirs) = Channel::pair()?;
        publisher.add(ours)?;
        subscribers.push(Subscriber::new(theirs)?);
    }
    let id = publisher.publish("b", Copied::new(|_| memfd::export("b", 4096))?)?;
    while publisher.accepted(id) < count {
        publisher.serve_for(Duration::from_millis(1))?;
    }
    let begun = Instant::now();
    for _ in 0..MOVES {
        let moved = publisher.migrate(id, Duration::from_secs(10))?;
        if moved.released != count {
            return Err("a subscriber was lost".into());
        }
    }
    while publisher.accepted(id) < count {
        publisher.serve_once()?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(MOVES))
}

/// What a move cannot do without: a word to each and its answer, and a descriptor to each and its
/// answer.
fn bare_move_microseconds(count: usize) -> Result<f64, Failure> {
    let memory = memfd::export("bench", 4096)?;
    let memory = memory.host_memory().ok_or("a memfd has memory")?;
    let mut ours = Vec::new();
    let mut threads = Vec::new();
    for _ in 0..count {
        let (one, other) = sockets()?;
        ours.push(one);
        threads.push(std::thread::spawn(move || -> Result<(), String> {
            let mut bytes = [0; HEADER + RECORD];
            loop {
                let mut descriptors = Vec::new();
                let received = receive(&other, &mut bytes, &mut descriptors);
                if received.map_err(|error| error.to_string())? == 0 {
                    return Ok(());
                }
                send(&other, &bytes[..48], &[]).map_err(|error| error.to_string())?;
            }
        }));
    }
    let begun = Instant::now();
    let mut bytes = [0; HEADER + RECORD];
    for _ in 0..MOVES {
        let rounds: [(&[u8], &[BorrowedFd<'_>]); 2] =
            [(&[7; 48], &[]), (&[7; HEADER + RECORD], &[memory.as_fd()])];
        for (message, descriptors) in rounds {
            for socket in &ours {
                send(socket, message, descriptors)?;
            }
            for socket in &ours {
                receive(socket, &mut bytes, &mut Vec::new())?;
            }
        }
    }
    let time = begun.elapsed();
    drop(ours);
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(time.as_secs_f64() * 1e6 / f64::from(MOVES))
}

//! `peerbuf copy`: bytes from one place to another, by the best path there is, with a receipt.

pub mod place;

use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use peerbuf::buffer::BufferRange;
use peerbuf::export::memfd;
use peerbuf::import::file::FileImporter;
use peerbuf::transfer::{self, Piece, Watch};
use serde::Serialize;
use sha2::{Digest, Sha256};

use self::place::{End, Place, first};
use crate::{Failure, say, size};

/// Arguments of `peerbuf copy`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Where the bytes come from
    source: Place,

    /// Where they go
    sink: Place,

    /// How many bytes; without it all that the source has
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// How many requests are in flight
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    queue: Option<u32>,

    /// Read both again after the copy, and compare
    #[arg(long)]
    check: bool,

    /// Give the receipt as a JSON object
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
A place is
  PATH                   a file or block device; a file is made, and cut to what was copied
  bar:BDF[/BAR][@OFFSET] memory in a BAR of a device that peerbuf.ko has
  cmb:BDF                memory that a device's own driver lends, such as an NVMe disk's
  udmabuf:  memfd:       system memory, with a dma-buf over it or without
  heap:NAME              system memory of a dma-heap
  drm:NODE               a buffer of a graphics driver
  cuda:N  ze:N           memory of a GPU, by CUDA or Level Zero
  fd:N                   a descriptor that the command was started with: a dma-buf, a file, a pipe
  -                      standard input or output
Memory that the command allocates (udmabuf:, memfd:, heap:, drm:, cuda:, ze:) is freed when it ends: such a copy
measures the path. Memory in a BAR keeps the bytes.

  peerbuf copy model.safetensors bar:0000:03:00.0/2
  peerbuf copy bar:0000:03:00.0/2@1M frame.raw --size 8M --check
  peerbuf copy /dev/nvme0n1 udmabuf: --size 1G --queue 128
  zstd -dc image.zst | peerbuf copy - /dev/nvme1n1

The exit status is 0 if every byte was written, and with --check found there again.";

/// What was done.
#[derive(Debug, Serialize)]
struct Receipt {
    source: String,
    sink: String,
    bytes: u64,
    seconds: f64,
    /// Of the sink's bytes, read again, and the source's; `null` if nobody asked.
    checked: Option<bool>,
    legs: Vec<Leg>,
}

/// One step of the way: more than one where no path leads from the source to the sink.
#[derive(Debug, Serialize)]
pub struct Leg {
    from: String,
    to: String,
    path: &'static str,
    reasons: Vec<Reason>,
    bytes: u64,
    host_bytes: u64,
    copied: u64,
    requests: u64,
    queue: String,
    /// How often the buffer moved meanwhile.
    moves: u32,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Reason {
    path: &'static str,
    code: &'static str,
    evidence: String,
}

impl Leg {
    /// Of what a transfer did.
    pub fn new(from: &str, to: &str, receipt: &transfer::Receipt) -> Leg {
        let reasons = receipt.plan.reasons.iter().map(|reason| Reason {
            path: reason.path.as_str(),
            code: reason.code.as_str(),
            evidence: reason.evidence.clone(),
        });
        Leg {
            from: from.into(),
            to: to.into(),
            path: receipt.plan.path.as_str(),
            reasons: reasons.collect(),
            bytes: receipt.bytes,
            host_bytes: receipt.host_bytes,
            copied: receipt.copied,
            requests: receipt.requests,
            queue: receipt.queue.to_string(),
            moves: receipt.moves,
        }
    }

    /// In words.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} to {}: {}, {} bytes through system memory, {} copied by the processor, {} requests by {}",
            self.from, self.to, self.path, self.host_bytes, self.copied, self.requests, self.queue
        );
        if self.moves > 0 {
            text += &format!("\n  the buffer moved {} times", self.moves);
        }
        for reason in &self.reasons {
            text += &format!(
                "\n  not {} ({}): {}",
                reason.path, reason.code, reason.evidence
            );
        }
        text
    }

    /// The same step again, of further bytes. A path that changed on the way is a step of its own.
    fn add(legs: &mut Vec<Leg>, more: Leg) {
        let same = |leg: &&mut Leg| {
            (&leg.from, &leg.to, leg.path) == (&more.from, &more.to, more.path)
                && (leg.queue == more.queue || more.requests < 2)
        };
        match legs.iter_mut().find(same) {
            Some(leg) => {
                leg.bytes += more.bytes;
                leg.host_bytes += more.host_bytes;
                leg.copied += more.copied;
                leg.requests += more.requests;
                leg.moves += more.moves;
            }
            None => legs.push(more),
        }
    }
}

/// Copies.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let Arguments { source, sink, .. } = arguments;
    let to_stream = *sink == Place::Stream;
    let mut from = source.source(arguments.size)?.with_depth(arguments.queue);
    let length = match (arguments.size, from.size()?) {
        (Some(asked), Some(has)) if asked > has => {
            return Err(format!("{source} has {has} bytes, and not {asked}").into());
        }
        (asked, has) => asked.or(has),
    };
    let mut to = sink.sink(length)?.with_depth(arguments.queue);
    if arguments.check && matches!(to, End::Stream(_)) {
        return Err(
            format!("{sink} cannot be read again, so --check has nothing to look at").into(),
        );
    }
    let bar = Bar::start(length);
    let begun = Instant::now();
    let mut passed = arguments.check.then(Sha256::new);
    let names = (source.to_string(), sink.to_string());
    let (bytes, legs) = carry(&mut from, &mut to, length, &names, bar.watch(), &mut passed)?;
    if let End::File(file) = &to {
        file.sync()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    drop(bar);
    if let (Place::Path(path), End::File(_)) = (sink, &to)
        && path.is_file()
    {
        std::fs::File::options()
            .write(true)
            .open(path)?
            .set_len(bytes)?;
    }
    let checked = match passed {
        None => None,
        Some(passed) => {
            let sum = match &from {
                End::Stream(_) => passed.finalize(),
                _ => checksum(&from, source, bytes)?,
            };
            Some(sum == checksum(&to, sink, bytes)?)
        }
    };
    let receipt = Receipt {
        source: names.0,
        sink: names.1,
        bytes,
        seconds,
        checked,
        legs,
    };
    let text = match arguments.json {
        true => serde_json::to_string(&receipt)?,
        false => receipt.text(sink.is_fleeting()),
    };
    match to_stream {
        true => say::remark(text),
        false => say::answer(text)?,
    }
    if checked == Some(false) {
        return Err(format!("{sink} does not have the bytes of {source}").into());
    }
    if arguments.size.is_some_and(|asked| bytes < asked) {
        return Err(format!("{source} ended after {bytes} bytes").into());
    }
    Ok(ExitCode::SUCCESS)
}

/// How much memory bytes pass that go from one file or stream to another.
const HOP: u64 = 16 << 20;

fn carry(
    from: &mut End,
    to: &mut End,
    length: Option<u64>,
    (source, sink): &(String, String),
    watch: &Watch,
    passed: &mut Option<Sha256>,
) -> Result<(u64, Vec<Leg>), Failure> {
    let receipt = match (&*from, &*to, length) {
        (End::File(file), End::Buffer(buffer), Some(length)) => {
            let range = first(buffer, length)?;
            Some(file.attach(&range)?.watched_by(watch).read(0)?)
        }
        (End::Buffer(buffer), End::File(file), Some(length)) => {
            let range = first(buffer, length)?;
            Some(file.attach(&range)?.watched_by(watch).write(0)?)
        }
        (End::Buffer(one), End::Buffer(other), Some(length)) => Some(transfer::copy_watched(
            &first(one, length)?,
            &first(other, length)?,
            watch,
        )?),
        _ => None,
    };
    if let Some(receipt) = receipt {
        return Ok((receipt.bytes, vec![Leg::new(source, sink, &receipt)]));
    }
    let hop = memfd::export("memory", HOP)?;
    let (mut done, mut legs) = (0, Vec::new());
    let silent = Watch::default();
    loop {
        let wanted = length.map_or(HOP, |length| HOP.min(length - done));
        if wanted == 0 {
            break;
        }
        let range = first(&hop, wanted)?;
        let read = match from {
            End::File(file) => {
                let receipt = file.attach(&range)?.watched_by(&silent).read(done)?;
                Leg::add(&mut legs, Leg::new(source, "memory", &receipt));
                receipt.bytes
            }
            End::Buffer(buffer) => {
                let receipt = transfer::copy(&buffer.range(done, wanted)?, &range)?;
                Leg::add(&mut legs, Leg::new(source, "memory", &receipt));
                receipt.bytes
            }
            End::Stream(stream) => {
                let mut bytes = vec![0; wanted as usize];
                let read = stream
                    .fill(&mut bytes)
                    .map_err(|error| format!("{source}: {error}"))?;
                range.write_bytes(&bytes[..read])?;
                read as u64
            }
        };
        if read == 0 {
            break;
        }
        let range = first(&hop, read)?;
        if let Some(passed) = passed {
            passed.update(range.to_vec()?);
        }
        match to {
            End::File(file) => {
                let receipt = file.attach(&range)?.watched_by(watch).write(done)?;
                Leg::add(&mut legs, Leg::new("memory", sink, &receipt));
            }
            End::Buffer(buffer) => {
                let receipt = transfer::copy_watched(&range, &buffer.range(done, read)?, watch)?;
                Leg::add(&mut legs, Leg::new("memory", sink, &receipt));
            }
            End::Stream(stream) => {
                let put = stream.put(&range.to_vec()?);
                put.map_err(|error| format!("{sink}, after {done} bytes: {error}"))?;
            }
        }
        done += read;
    }
    Ok((done, legs))
}

/// The checksum of the first bytes, as they are there now.
fn checksum(
    end: &End,
    place: &Place,
    length: u64,
) -> Result<sha2::digest::Output<Sha256>, Failure> {
    let mut sum = Sha256::new();
    let again;
    let file = match (end, place) {
        // What was opened for writing cannot be read.
        (End::File(_), Place::Path(path)) => {
            again = FileImporter::open(path)?;
            Some(&again)
        }
        (End::File(file), _) => Some(&**file),
        _ => None,
    };
    let hop = memfd::export("memory", HOP)?;
    let mut done = 0;
    while done < length {
        let step = HOP.min(length - done);
        let range: BufferRange = match (end, file) {
            (End::Buffer(buffer), _) => buffer.range(done, step)?,
            (_, Some(file)) => {
                let range = first(&hop, step)?;
                let piece = Piece {
                    file_offset: done,
                    offset: 0,
                    length: step,
                };
                file.attach(&range)?.read_many(&[piece])?;
                range
            }
            _ => return Err(format!("{place} cannot be read again").into()),
        };
        sum.update(range.to_vec()?);
        done += step;
    }
    Ok(sum.finalize())
}

impl Receipt {
    fn text(&self, fleeting: bool) -> String {
        let rate = self.bytes as f64 / self.seconds.max(1e-9) / 1e6;
        let mut text = format!(
            "{} from {} to {} in {:.3} s, {rate:.0} MB/s",
            size::show(self.bytes),
            self.source,
            self.sink,
            self.seconds
        );
        for leg in &self.legs {
            text += "\n";
            text += &leg.text();
        }
        match self.checked {
            Some(true) => text += "\nchecked: every byte is there",
            Some(false) => text += "\nchecked: the bytes differ",
            None => {}
        }
        if fleeting {
            text += "\nthe memory is free again";
        }
        text
    }
}

/// A bar with the rate, on standard error where that is a terminal. Gone when dropped.
pub struct Bar {
    watch: Watch,
    done: Option<std::sync::mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Bar {
    /// Shows a transfer of so many bytes.
    pub fn start(length: Option<u64>) -> Bar {
        let watch = Watch::default();
        let seen = watch.clone();
        let (done, ended) = channel();
        let thread = std::thread::spawn(move || {
            let bar = match length {
                Some(length) => ProgressBar::new(length),
                None => ProgressBar::no_length(),
            };
            let template = "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            while ended.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
                bar.set_position(seen.bytes());
            }
            bar.finish_and_clear();
        });
        Bar {
            watch,
            done: Some(done),
            thread: Some(thread),
        }
    }

    /// What the transfer is to be watched by.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.done.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

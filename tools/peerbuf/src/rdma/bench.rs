//! Throughput of writes to the peer's buffer and of reads from it: requests of one length, a
//! given number in flight, from the first post to the last completion.

use std::process::ExitCode;
use std::time::Instant;

use peerbuf::{Access, BufferRange};
use peerbuf_rdma::{Link, RdmaError, Registration};
use rand::Rng;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::client::{Ends, begin};
use super::place::checksum;
use super::receipt;
use super::wire::{self, Receipt, Request};
use crate::progress::Progress;
use crate::table::{self, Table};
use crate::{Failure, say, size};

/// Arguments of `peerbuf rdma bench`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    ends: Ends,

    /// Lengths of the requests
    #[arg(long, value_name = "SIZE,SIZE", value_delimiter = ',', default_value = "64K,256K,1M,4M", value_parser = size::parse)]
    requests: Vec<u64>,

    /// Maximum number of requests in flight
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=4096))]
    depth: u32,

    /// Number of bytes per figure, in whole requests
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = size::parse)]
    bytes: u64,

    /// Number of measurements per figure; the median is printed
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// The measurements, with the fields of `--json`.
#[derive(Serialize)]
struct Report {
    here: Receipt,
    there: Receipt,
    depth: u32,
    /// True if both buffers had the same bytes after each row's last write and read.
    verified: bool,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    /// Length of a request in bytes.
    bytes: u64,
    /// Number of requests for each figure.
    requests: u64,
    write_mib_per_second: f64,
    read_mib_per_second: f64,
}

#[derive(Clone, Copy)]
enum Direction {
    Write,
    Read,
}

/// Requests of one length in sequence through the buffers, from the start to the end and again.
#[derive(Clone, Copy)]
struct Flow {
    direction: Direction,
    length: u64,
    count: u64,
    /// Number of requests that fit into both buffers.
    places: u64,
}

impl Flow {
    /// Runs all requests and returns the throughput in MiB per second.
    fn run(self, link: &mut Link, registration: &Registration) -> Result<f64, RdmaError> {
        let connection = &mut link.connection;
        let begun = Instant::now();
        let (mut posted, mut done) = (0, 0);
        while done < self.count {
            while posted < self.count && connection.in_flight() < connection.depth() {
                let at = posted % self.places * self.length;
                let piece = registration.slice(at, self.length)?;
                let remote = link.remote.slice(at, self.length)?;
                match self.direction {
                    Direction::Write => connection.write(&piece, &remote, None)?,
                    Direction::Read => connection.read(&piece, &remote)?,
                };
                posted += 1;
            }
            connection.wait(link.limit)?.result?;
            done += 1;
        }
        let bytes = (self.count * self.length) as f64;
        Ok(bytes / f64::from(1 << 20) / begun.elapsed().as_secs_f64())
    }

    /// The median of this many runs.
    fn median(
        self,
        link: &mut Link,
        registration: &Registration,
        rounds: u32,
    ) -> Result<f64, RdmaError> {
        let mut figures = Vec::new();
        for _ in 0..rounds {
            figures.push(self.run(link, registration)?);
        }
        figures.sort_by(f64::total_cmp);
        Ok(figures[figures.len() / 2])
    }

    /// Number of bytes of the buffers that the flow has covered.
    fn covered(self) -> u64 {
        self.places.min(self.count) * self.length
    }
}

/// Fills a range with random bytes.
fn fill(range: &BufferRange) -> Result<(), Failure> {
    let mut mapping = range.map(Access::Write)?;
    let mut cpu = mapping.begin_cpu_access(Access::Write)?;
    let mut chunk = vec![0; range.len().min(1 << 20) as usize];
    let mut at = 0;
    while at < range.len() {
        let chunk = &mut chunk[..(range.len() - at).min(1 << 20) as usize];
        rand::rng().fill_bytes(chunk);
        cpu.write_at(at, chunk)?;
        at += chunk.len() as u64;
    }
    Ok(cpu.end()?)
}

/// `peerbuf rdma bench`
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (here, mut there) = begin(&arguments.ends, None)?;
    there.depth = arguments.depth;
    let room = here.lent.size.min(there.size);
    if let Some(wrong) = arguments
        .requests
        .iter()
        .find(|length| !(1..=room).contains(length))
    {
        let (wrong, room) = (size::show(*wrong), size::show(room));
        return Err(format!("requests of {wrong} and buffers of {room} (--size)").into());
    }
    let _progress = Progress::start(format!("measuring {}", arguments.ends.connect));
    let mut link = there.connect()?;
    let registration = here.lent.registration()?;
    let mut report = Report {
        here: receipt(&registration),
        there: Receipt::default(),
        depth: arguments.depth,
        verified: true,
        rows: Vec::new(),
    };
    for length in &arguments.requests {
        let mut flow = Flow {
            direction: Direction::Write,
            length: *length,
            count: arguments.bytes.div_ceil(*length).max(1),
            places: room / length,
        };
        let range = registration.range()?.slice(0, flow.covered())?;
        let sum = || checksum(&range, &mut Sha256::new());

        there.ready(&mut link)?;
        fill(&range)?;
        let write = flow.median(&mut link, &registration, arguments.rounds)?;
        let written = Request::Written {
            at: 0,
            length: range.len(),
        };
        let account = there.account(&written)?.ok_or(MOVED)?;
        report.verified &= account.checksum == sum()?;

        flow.direction = Direction::Read;
        there.ready(&mut link)?;
        let account = there.prepare(&mut link, 0, range.len())?;
        fill(&range)?;
        let read = flow.median(&mut link, &registration, arguments.rounds)?;
        report.verified &= account.checksum == sum()?;

        report.rows.push(Row {
            bytes: *length,
            requests: flow.count,
            write_mib_per_second: write,
            read_mib_per_second: read,
        });
    }
    drop(link);
    drop(registration);
    wire::send(&mut there.stream, &Request::End)?;
    here.lent.end()?;
    report.there = there.receipt;
    if arguments.json {
        say::answer(serde_json::to_string(&report)?)?;
    } else {
        say::answer(text(&report))?;
    }
    if !report.verified {
        return Err("the bytes of the two ends differ".into());
    }
    Ok(ExitCode::SUCCESS)
}

const MOVED: &str = "the server's buffer moved: it was started with --move-every";

fn text(report: &Report) -> String {
    let width = table::width();
    let mut rows = Table::new(["request", "in flight", "write, MiB/s", "read, MiB/s"]);
    for row in &report.rows {
        rows.row([
            size::show(row.bytes),
            row.requests.min(report.depth.into()).to_string(),
            format!("{:.2}", row.write_mib_per_second),
            format!("{:.2}", row.read_mib_per_second),
        ]);
    }
    let mut text = rows.show(width) + "\n";
    for (end, receipt) in [("here", &report.here), ("there", &report.there)] {
        let Receipt {
            card,
            buffer,
            registration,
            path,
            ..
        } = receipt;
        let end = format!("{end}: {buffer} and {card}, {registration}, {path}");
        text += &table::paragraph(&end, width);
    }
    let sums = if report.verified { "agree" } else { "DIFFER" };
    text + &format!("the bytes of both ends {sums}")
}

//! `peerbuf export`: part of a BAR, for a command or for other processes.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use peerbuf::Access;
use peerbuf::buffer::Buffer;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::provider;
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::{Channel, Listener};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;

use crate::accepting::Accepting;
use crate::copy::place::Gpu;
use crate::{Failure, say, size};

/// Arguments of `peerbuf export`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// The device's PCI address; `peerbuf info` lists them
    #[arg(value_name = "DDDD:BB:DD.F", required_unless_present = "gpu")]
    device: Option<PciAddress>,

    /// The index of the BAR; the device must be bound to peerbuf.ko
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=5))]
    #[arg(required_unless_present_any = ["provider", "gpu"])]
    bar: Option<u8>,

    /// Export peer-to-peer memory that the device's own driver publishes, such as an NVMe disk's controller
    /// memory buffer
    #[arg(long, conflicts_with_all = ["bar", "offset"])]
    provider: bool,

    /// Allocate memory of a GPU: cuda:0 by CUDA, ze:0 by Level Zero
    #[arg(long, value_name = "RUNTIME:N", conflicts_with_all = ["device", "bar", "offset", "provider", "read_only"])]
    gpu: Option<Gpu>,

    /// The offset in the BAR in bytes, a multiple of the page size; `any` takes free space
    #[arg(long, value_name = "OFFSET", default_value = "any", value_parser = parse_offset)]
    offset: Offset,

    /// The length in bytes, a multiple of the page size
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: u64,

    /// Allow reading only
    #[arg(long)]
    read_only: bool,

    /// Give the buffer to every process of this user or root that connects to this socket
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    socket: Option<PathBuf>,

    /// Describe the exported buffer as a JSON object
    #[arg(long)]
    json: bool,

    /// Run this command with the buffer, and free the buffer after it
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

const AFTER_HELP: &str = "\
COMMAND inherits the dma-buf as the descriptor $PEERBUF_FD, of $PEERBUF_LENGTH bytes, and its exit status
becomes that of `peerbuf export`. Without COMMAND the range stays allocated until Ctrl-C.

  peerbuf export 0000:03:00.0 --bar 2 --length 16M -- ./consumer
  peerbuf export 0000:03:00.0 --bar 2 --length 16M --offset 1M --socket /run/buffer
  peerbuf export 0000:04:00.0 --provider --length 1M -- ./consumer
  peerbuf export --gpu cuda:0 --length 64M -- ./consumer";

#[derive(Debug, Clone, Copy)]
struct Offset(Option<u64>);

fn parse_offset(text: &str) -> Result<Offset, String> {
    match text {
        "any" => Ok(Offset(None)),
        text => Ok(Offset(Some(size::parse(text)?))),
    }
}

#[derive(Serialize)]
struct Exported {
    buffer: String,
    length: u64,
    writable: bool,
    socket: Option<PathBuf>,
}

/// Exports the buffer and holds it.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let access = if arguments.read_only {
        Access::Read
    } else {
        Access::ReadWrite
    };
    let buffer = match (arguments.gpu, arguments.device) {
        (Some(gpu), _) => gpu.memory(arguments.length)?,
        (None, Some(device)) => of_device(arguments, device, access)?,
        (None, None) => return Err("which device?".into()),
    };
    if let Some((program, rest)) = arguments.command.split_first() {
        if arguments.json {
            announce(arguments, &buffer)?;
        }
        return run_command(program, rest, &buffer);
    }
    // The signals are blocked before the export is visible, so that no Ctrl-C leaves the socket
    // behind.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let listener = arguments.socket.clone().map(Listener::bind).transpose()?;
    announce(arguments, &buffer)?;
    serve(listener.as_ref(), &signals, &buffer)?;
    Ok(ExitCode::SUCCESS)
}

/// Exports memory of a BAR, or memory that a driver lends.
fn of_device(arguments: &Arguments, device: PciAddress, access: Access) -> Result<Buffer, Failure> {
    let (device, bar) = match arguments.bar {
        Some(bar) => (Device::open(device)?, bar),
        None => {
            let device = provider::open(device)?;
            let bar = device.query()?.exportable().map_or(0, |bar| bar.index);
            (device, bar)
        }
    };
    Ok(device.export(Request {
        bar,
        offset: arguments.offset.0,
        length: arguments.length,
        access,
    })?)
}

fn announce(arguments: &Arguments, buffer: &Buffer) -> Result<(), Failure> {
    if arguments.json {
        let exported = Exported {
            buffer: buffer.name().into(),
            length: buffer.size(),
            writable: buffer.is_writable(),
            socket: arguments.socket.clone(),
        };
        say::answer(serde_json::to_string(&exported)?)?;
    } else {
        let size = size::show(buffer.size());
        say::answer(format_args!("exported {}, {size}", buffer.name()))?;
        match &arguments.socket {
            Some(socket) => say::answer(format_args!(
                "for those who connect to {}, until Ctrl-C",
                socket.display()
            ))?,
            None => say::answer("held until Ctrl-C")?,
        }
    }
    Ok(())
}

fn run_command(program: &str, rest: &[String], buffer: &Buffer) -> Result<ExitCode, Failure> {
    let dmabuf = buffer.dmabuf().ok_or("the buffer has no dma-buf")?;
    // This copy survives exec, unlike the original.
    let inherited = rustix::io::dup(dmabuf)?;
    let status = Command::new(program)
        .args(rest)
        .env("PEERBUF_FD", inherited.as_raw_fd().to_string())
        .env("PEERBUF_LENGTH", buffer.size().to_string())
        .status()
        .map_err(|error| format!("{program}: {error}"))?;
    // The shell's convention: 128 plus the signal's number.
    let code = status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    Ok(ExitCode::from(code as u8))
}

/// Serves the buffer to every process that connects and may have it, until a signal arrives. No
/// behaviour of a client and no shortage stops the service for the others.
fn serve(listener: Option<&Listener>, signals: impl AsFd, buffer: &Buffer) -> Result<(), Failure> {
    let mut accepting = Accepting::default();
    loop {
        let pause = accepting.pause();
        let listening = listener.filter(|_| pause.is_none());
        let mut waiting = vec![PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        waiting.extend(listening.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let timeout = pause.and_then(|pause| Timespec::try_from(pause).ok());
        match rustix::event::poll(&mut waiting, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !waiting[0].revents().is_empty() {
            return Ok(());
        }
        let came = waiting.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let Some(listener) = listening.filter(|_| came) else {
            continue;
        };
        if let Some(channel) = accepting.take(listener.accept())
            && let Err(why) = give(&channel, buffer)
        {
            say::remark(why);
        }
    }
}

/// Gives the buffer to a process of this user or of root.
fn give(channel: &Channel, buffer: &Buffer) -> Result<(), String> {
    let peer = channel.peer().map_err(|error| error.to_string())?;
    let ours = rustix::process::geteuid().as_raw();
    if peer.uid != ours && peer.uid != 0 {
        return Err(format!(
            "{peer} was refused: only processes of this user or root may have the buffer"
        ));
    }
    let sent = channel.send_buffer(&buffer.whole());
    sent.map_err(|error| format!("{peer}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;
    use std::process::{Child, Stdio};
    use std::time::Duration;

    use peerbuf::Deadline;
    use peerbuf::export::memfd;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    /// Time limit for every expected event.
    const LONG: Duration = Duration::from_secs(20);

    /// A process that is killed at the end of the test.
    struct Process(Child);

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Starts this program again as [`serving_process`], through `prefix`.
    fn start(prefix: &[&str], role: &str, socket: &Path) -> Process {
        let exe = std::env::current_exe().unwrap();
        let exe = exe.to_str().unwrap();
        let test = "export::tests::serving_process";
        let arguments = [exe, test, "--exact", "--ignored", "--nocapture"];
        let mut words = prefix.iter().copied().chain(arguments);
        let child = Command::new(words.next().unwrap())
            .args(words)
            .env("PEERBUF_TEST_ROLE", role)
            .env("PEERBUF_TEST_SOCKET", socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Process(child.unwrap())
    }

    #[test]
    #[ignore = "the other process of the tests in this file, which start it"]
    fn serving_process() {
        let socket = std::env::var("PEERBUF_TEST_SOCKET").expect("a socket");
        let role = std::env::var("PEERBUF_TEST_ROLE").expect("a role");
        let buffer = memfd::export("exported", 4096).unwrap();
        let (never, _held) = std::io::pipe().unwrap();
        let listener = Listener::bind(socket).unwrap();
        if role == "short" {
            // The limit leaves no descriptor for a client until the first client has waited for
            // a while.
            let before = getrlimit(Resource::Nofile);
            let next = rustix::io::dup(&never).unwrap().as_raw_fd() as u64;
            let current = Some(next);
            setrlimit(Resource::Nofile, Rlimit { current, ..before }).unwrap();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(400));
                setrlimit(Resource::Nofile, before).unwrap();
            });
        }
        serve(Some(&listener), &never, &buffer).unwrap();
    }

    fn connect(socket: &Path) -> Channel {
        let deadline = Deadline::after(LONG);
        loop {
            match Channel::connect(socket) {
                Ok(channel) => return channel,
                Err(error) => assert!(!deadline.is_over(), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn all_get_the_buffer(mut process: Process, socket: &Path) {
        for _ in 0..3 {
            // One client leaves at once, and one stays.
            drop(connect(socket));
            let buffer = connect(socket).receive_buffer_within(LONG).unwrap();
            assert_eq!(buffer.buffer().name(), "exported");
        }
        assert_eq!(process.0.try_wait().unwrap(), None, "the server has ended");
    }

    fn socket_path(name: &str) -> PathBuf {
        let directory = std::env::temp_dir();
        directory.join(format!("peerbuf-export-{name}-{}", std::process::id()))
    }

    #[test]
    fn processes_of_another_pid_namespace_get_the_buffer() {
        let ways = [
            &["unshare", "--pid", "--fork", "--kill-child"][..],
            &[
                "unshare",
                "--user",
                "--map-root-user",
                "--pid",
                "--fork",
                "--kill-child",
            ],
        ];
        let works = |way: &&&[&str]| {
            let mut command = Command::new(way[0]);
            let done = command.args(&way[1..]).arg("true").output();
            done.is_ok_and(|done| done.status.success())
        };
        let Some(way) = ways.iter().find(works) else {
            // Not by a macro, because the test harness captures its output.
            let words = "not tested: processes_of_another_pid_namespace_get_the_buffer: no \
                         `unshare --pid` here, not even with `--user`\n";
            std::io::stderr().write_all(words.as_bytes()).unwrap();
            return;
        };
        let socket = socket_path("namespace");
        all_get_the_buffer(start(way, "plain", &socket), &socket);
        let _ = std::fs::remove_file(socket);
    }

    #[test]
    fn a_server_that_runs_out_of_descriptors_serves_again() {
        let socket = socket_path("short");
        all_get_the_buffer(start(&[], "short", &socket), &socket);
        let _ = std::fs::remove_file(socket);
    }
}

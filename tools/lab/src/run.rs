//! Runs one guest: prepares its files, starts it, connects the command's streams, and judges how it ended.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, net::UnixListener, net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{Cache, Entry, RunDir},
    events,
    guest::{self, Machine},
    kernel::Kernel,
    klog::{self, Complaint},
    progress::{Step, note},
    rxe,
    sandbox::{self, Mount},
    terminal::Raw,
    tree::Tree,
};

/// The contents of /opt/peerbuf/init in the guest.
const INIT: [(&str, &str); 4] = [
    ("init", include_str!("../carried/init/init")),
    ("functions", include_str!("../carried/init/functions")),
    ("suite", include_str!("../carried/init/suite")),
    ("two-machines", include_str!("../carried/init/two-machines")),
];

/// Time limit from the start to the command, and from the command's end to the guest's: ten times a boot on
/// two idle cores. As for all limits, time during which the host does not run the guest does not count.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The default limit for a command, so that a hang ends.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// Everything needed to start a guest. Holding it keeps the cache entries.
pub struct Ground {
    /// The cache for the run's directory.
    pub cache: Cache,
    /// The guest's root, and QEMU.
    pub tree: Tree,
    /// The kernel to boot.
    pub kernel: Kernel,
    /// The NVMe disk's image.
    pub disk: Entry,
    /// A layer with additional packages.
    pub layer: Option<Entry>,
    /// The soft-RoCE module to load instead of the kernel's.
    pub rxe: Option<Entry>,
}

/// The command to run, and its machine.
#[derive(Clone)]
pub struct Job {
    /// The machine.
    pub machine: Machine,
    /// The command and its arguments; empty for a shell.
    pub command: Vec<OsString>,
    /// The directory shared at `/mnt/share`.
    pub share: Option<PathBuf>,
    /// Programs for `/opt/peerbuf/bin`.
    pub programs: Vec<PathBuf>,
    /// peerbuf.ko and peerbuf_probe.ko, to be loaded before the command; empty for none.
    pub modules: Vec<PathBuf>,
    /// A directory whose files appear in `/opt/peerbuf/fixtures`.
    pub fixtures: Option<PathBuf>,
    /// The command's time limit.
    pub timeout: Option<Duration>,
    /// The deadline, set from `timeout` at the command's start; other threads may move it.
    pub deadline: Deadline,
    /// Time limit from the start to the command, and from the command's end to the guest's.
    pub boot_limit: Duration,
    /// The maximum number of starts, if QEMU crashes before the command begins.
    pub starts: u32,
    /// The directory with the socket that connects a pair of guests.
    pub wire: Option<PathBuf>,
}

/// A person's command as the guest is to run it, and the program of the host that is copied into the guest for it: one
/// that is named by a relative path with a slash, such as `./my-test`.
///
/// # Errors If the host has no such program.
pub fn brought(mut command: Vec<OsString>) -> Result<(Vec<OsString>, Option<PathBuf>)> {
    let Some(first) = command.first_mut() else {
        return Ok((command, None));
    };
    let path = PathBuf::from(&*first);
    if path.is_absolute() || path.components().count() == 1 {
        return Ok((command, None));
    }
    let Some(name) = path.file_name().filter(|_| path.is_file()) else {
        bail!(
            "{}: this host has no such program; one of the guest is named by an absolute path, or without a slash",
            path.display()
        );
    };
    *first = Path::new("/opt/peerbuf/bin").join(name).into();
    Ok((command, Some(path)))
}

/// The deadline of a command.
#[derive(Debug, Clone, Default)]
pub struct Deadline(Arc<Mutex<Limit>>);

#[derive(Debug, Default)]
struct Limit {
    /// The end of the time, and its length.
    over: Option<(Instant, Duration)>,
    /// The guest's CPU time on the host.
    ran: Duration,
    /// The reason why the caller gave the command up, if it has.
    vain: Option<String>,
}

impl Deadline {
    /// Sets the deadline to `limit` from now.
    pub fn set(&self, limit: Option<Duration>) {
        if let Ok(mut deadline) = self.0.lock() {
            deadline.over = limit.map(|limit| (Instant::now() + limit, limit));
        }
    }

    /// Restarts the same limit from now.
    pub fn again(&self) {
        if let Ok(mut deadline) = self.0.lock() {
            deadline.over = deadline
                .over
                .map(|(_, limit)| (Instant::now() + limit, limit));
        }
    }

    /// Extends the deadline by the time during which the guest was runnable but the host did not run it.
    fn put_off(&self, waited: Duration, ran: Duration) {
        if let Ok(mut deadline) = self.0.lock() {
            deadline.over = deadline.over.map(|(at, limit)| (at + waited, limit));
            deadline.ran = ran;
        }
    }

    /// The guest's CPU time on the host, summed over its threads: the cost of its commands, independent of
    /// the host's load.
    pub fn ran(&self) -> Duration {
        self.0.lock().map_or(Duration::ZERO, |limit| limit.ran)
    }

    /// Gives the command up: its end is no longer awaited.
    pub fn give_up(&self, why: String) {
        if let Ok(mut deadline) = self.0.lock() {
            deadline.vain = Some(why);
        }
    }

    /// How the command ended, if its time is over or it was given up.
    fn missed(&self) -> Option<Ending> {
        let deadline = self.0.lock().ok()?;
        if let Some(why) = &deadline.vain {
            return Some(Ending::Died(why.clone()));
        }
        let (at, limit) = deadline.over?;
        (Instant::now() >= at).then_some(Ending::TimedOut(limit))
    }
}

impl Default for Job {
    fn default() -> Self {
        Self {
            machine: Machine::default(),
            command: Vec::new(),
            share: None,
            programs: Vec::new(),
            modules: Vec::new(),
            fixtures: None,
            timeout: Some(DEFAULT_TIMEOUT),
            deadline: Deadline::default(),
            boot_limit: BOOT_LIMIT,
            starts: 3,
            wire: None,
        }
    }
}

/// The host side of the command's streams.
pub struct Streams {
    /// Standard input, read as far as the command reads it.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Standard output.
    pub stdout: Box<dyn Write + Send>,
    /// Standard error.
    pub stderr: Box<dyn Write + Send>,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The command exited with this status.
    Exit(i32),
    /// The command exceeded its time limit, and the guest was ended.
    TimedOut(Duration),
    /// The guest died, or never reached the command; the reason.
    Died(String),
    /// QEMU crashed, for reasons independent of the guest's programs; its last output.
    Crashed(String),
}

/// The results of a run.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The kernel's unannounced complaints.
    pub complaints: Vec<Complaint>,
    /// The complete kernel console.
    pub console: String,
}

impl Outcome {
    /// The exit status of `cargo lab run`: the command's; 124 after a timeout; 125 if the guest died or its
    /// kernel complained.
    pub fn status(&self) -> i32 {
        match &self.ending {
            Ending::Exit(_) if !self.complaints.is_empty() => 125,
            Ending::Exit(status) => *status,
            Ending::TimedOut(_) => 124,
            Ending::Died(_) | Ending::Crashed(_) => 125,
        }
    }

    /// The report to print after the command's output; empty after a good run.
    pub fn report(&self) -> String {
        let mut text = self.report_of_ending();
        if !self.complaints.is_empty() {
            let status = match self.ending {
                Ending::Exit(n) => format!(" (the command itself ended with {n})"),
                _ => String::new(),
            };
            text += &format!(
                "peerbuf-lab: the guest's kernel complained, and nobody had announced it{status}:\n"
            );
            for complaint in &self.complaints {
                text += &complaint.to_string();
            }
        }
        text
    }
}

impl Outcome {
    /// The report on how the guest ended; empty after a good run.
    pub fn report_of_ending(&self) -> String {
        match &self.ending {
            Ending::Exit(_) => String::new(),
            Ending::TimedOut(limit) => format!(
                "peerbuf-lab: the command did not end within {} s (--timeout); the guest was ended\n",
                limit.as_secs()
            ),
            Ending::Died(why) | Ending::Crashed(why) => format!(
                "peerbuf-lab: {why}; the last lines of its console:\n{}",
                sandbox::tail(&self.console.replace('\r', ""), 50)
            ),
        }
    }
}

/// The error that QEMU crashed before the guest booted, with its message.
#[derive(Debug)]
struct CrashedAtOnce(String);

impl std::fmt::Display for CrashedAtOnce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CrashedAtOnce {}

/// How QEMU crashed, as text; `None` if it did not. `run` is the run's directory.
fn crash(status: ExitStatus, when: &str, run: &Path) -> Option<String> {
    let signal = status.signal()?;
    let said = read_lossy(&run.join("qemu"));
    let last = said.lines().last().unwrap_or("it said nothing");
    let memory = match signal {
        9 => " (killed, perhaps since the host ran out of memory)",
        _ => "",
    };
    Some(format!(
        "QEMU itself crashed (signal {signal}) {when}{memory}: {last}"
    ))
}

/// A started guest with its connections.
struct Guest {
    child: Child,
    dir: RunDir,
    ports: Vec<(&'static str, UnixStream)>,
    /// Connections that must stay open until the guest ends: when one closes, QEMU drops data that it has not
    /// read yet. The end of the stream itself arrives after the data.
    kept: Vec<UnixStream>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The phrase for a guest that ended before its command began.
const BEFORE: &str = "before the command began";

/// Starts a guest and waits until its command begins or it ends. If QEMU crashes meanwhile, it is started
/// again: in QEMU 10 the translator occasionally crashes (`iotlb_to_section`) when one CPU moves a BAR while
/// another reads.
fn boot(ground: &Ground, job: &Job) -> Result<(Guest, Receiver<Event>, Option<Ending>)> {
    let mut starts = 1;
    loop {
        let mut guest = match start(ground, job) {
            Err(error) if error.is::<CrashedAtOnce>() && starts < job.starts => {
                note(format_args!("{error}; starting the guest again"));
                starts += 1;
                continue;
            }
            guest => guest?,
        };
        let told = listen(guest.take_port("control")?);
        let deadline = Deadline::default();
        deadline.set(Some(job.boot_limit));
        let instead = match next_event(&told, &deadline, guest.child.id()) {
            Ok(Some(Event::Start)) => None,
            Ok(_) => Some(guest.ended(BEFORE)),
            Err(_) => Some(Ending::Died(format!(
                "the guest did not come to the command within {} s",
                job.boot_limit.as_secs()
            ))),
        };
        match &instead {
            Some(Ending::Crashed(why)) if starts < job.starts => {
                note(format_args!("{why}; starting the guest again"));
                starts += 1;
            }
            _ => return Ok((guest, told, instead)),
        }
    }
}

/// Runs `job` to its end.
///
/// # Errors If the guest could not be started. A guest that dies is an outcome, not an error.
pub fn run(ground: &Ground, job: &Job, streams: Streams) -> Result<Outcome> {
    let step = Step::start_on_terminal("starting a guest");
    let (mut guest, told, instead) = boot(ground, job)?;
    if job.machine.events {
        let (port, monitor) = (
            guest.take_port(guest::EVENTS)?,
            guest.take_port(guest::MONITOR)?,
        );
        events::serve(job.machine.clone(), port, monitor)?;
    }
    let mut outputs = Vec::new();
    let mut stdin = None;
    if job.machine.shell {
        let terminal = guest.take_port("terminal")?;
        let back = terminal.try_clone()?;
        outputs.push(carry_out(terminal, streams.stdout));
        stdin = streams.stdin.map(|from| (from, back));
    } else {
        outputs.push(carry_out(guest.take_port("stdout")?, streams.stdout));
        outputs.push(carry_out(guest.take_port("stderr")?, streams.stderr));
        let port = guest.take_port("stdin")?;
        match streams.stdin {
            Some(from) => stdin = Some((from, port)),
            None => {
                port.shutdown(Shutdown::Write)?;
                guest.kept.push(port);
            }
        }
    }

    let mut complaints = Vec::new();
    let mut ending = match instead {
        None => {
            step.done();
            let _raw = job.machine.shell.then(Raw::enter);
            if let Some((from, to)) = stdin {
                guest.kept.push(to.try_clone()?);
                carry_in(from, to);
            }
            job.deadline.set(job.timeout);
            match next_event(&told, &job.deadline, guest.child.id()) {
                Ok(Some(Event::Exit(status))) => Ending::Exit(status),
                Ok(_) => guest.ended("before the command did"),
                Err(ending) => ending,
            }
        }
        Some(ending) => ending,
    };
    if let Ending::Exit(status) = ending {
        let deadline = Deadline::default();
        deadline.set(Some(job.boot_limit));
        let next = || next_event(&told, &deadline, guest.child.id());
        match (next(), next()) {
            // A log without the record at which judging begins would pass as clean.
            (Ok(Some(Event::Leaks(leaks))), Ok(Some(Event::Log(raw))))
                if raw.contains(klog::BEGIN) =>
            {
                let log = klog::messages(&raw);
                complaints = klog::complaints(&log);
                complaints.extend(klog::leaks(&leaks, &log));
            }
            _ => {
                ending = Ending::Died(format!(
                    "the command ended with {status}, and then its guest's kernel log could not be read"
                ));
            }
        }
    }
    // Its end closes the connections, which ends the threads.
    guest.child.kill()?;
    guest.child.wait()?;
    for output in outputs {
        let _ = output.join();
    }
    let mut console = read_lossy(&guest.dir.path().join("console"));
    if console.is_empty() && matches!(ending, Ending::Died(_) | Ending::Crashed(_)) {
        console = read_lossy(&guest.dir.path().join("qemu"));
    }
    Ok(Outcome {
        ending,
        complaints,
        console,
    })
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// The next event, or how the command ended if it is late or was given up; `None` if the guest ended.
fn next_event(
    events: &Receiver<Event>,
    deadline: &Deadline,
    guest: u32,
) -> Result<Option<Event>, Ending> {
    let mut usage = Usage::of(guest);
    loop {
        match events.recv_timeout(Duration::from_millis(100)) {
            Ok(event) => return Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => {
                let now = Usage::of(guest);
                deadline.put_off(now.waited_since(&usage), now.ran());
                usage = now;
                if let Some(ending) = deadline.missed() {
                    return Err(ending);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

/// The nanoseconds that each thread of a process has run, and has waited while runnable.
struct Usage(HashMap<OsString, (u64, u64)>);

impl Usage {
    /// Reads them for a process; empty if the host does not tell.
    fn of(process: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{process}/task"));
        let mut usage = HashMap::new();
        for thread in threads.into_iter().flatten().flatten() {
            let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            let mut figures = text.split_whitespace().map(str::parse);
            if let (Some(Ok(ran)), Some(Ok(waited))) = (figures.next(), figures.next()) {
                usage.insert(thread.file_name(), (ran, waited));
            }
        }
        Self(usage)
    }

    fn ran(&self) -> Duration {
        Duration::from_nanos(self.0.values().map(|(ran, _)| ran).sum())
    }

    /// The longest wait of a thread since `before`.
    fn waited_since(&self, before: &Self) -> Duration {
        let since = self.0.iter().map(|(thread, (_, waited))| {
            let (_, earlier) = before.0.get(thread).copied().unwrap_or_default();
            waited.saturating_sub(earlier)
        });
        Duration::from_nanos(since.max().unwrap_or_default())
    }
}

/// Messages of the guest's init on the control port.
enum Event {
    Start,
    Exit(i32),
    Leaks(String),
    Log(String),
}

fn listen(port: UnixStream) -> Receiver<Event> {
    let (tell, told) = channel();
    thread::spawn(move || {
        // The message that is being received line by line.
        let mut long: Option<Event> = None;
        let mut reader = BufReader::new(port);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line).into_owned();
            line.clear();
            let event = match (&mut long, text.trim_end()) {
                (None, "start") => Event::Start,
                (None, "leaks") => {
                    long = Some(Event::Leaks(String::new()));
                    continue;
                }
                (None, "klog") => {
                    long = Some(Event::Log(String::new()));
                    continue;
                }
                (Some(event), end) => {
                    if end != "end" {
                        if let Event::Leaks(all) | Event::Log(all) = event {
                            all.push_str(&text);
                        }
                        continue;
                    }
                    match long.take() {
                        Some(event) => event,
                        None => continue,
                    }
                }
                (None, other) => match other.strip_prefix("exit ").map(str::parse) {
                    Some(Ok(status)) => Event::Exit(status),
                    // The status never arrived from the guest's init: treated as a dead guest.
                    Some(Err(_)) => return,
                    None => continue,
                },
            };
            if tell.send(event).is_err() {
                return;
            }
        }
    });
    told
}

fn carry_out(mut from: UnixStream, mut to: Box<dyn Write + Send>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let mut open = true;
        // Keeps reading after the output is no longer needed, so that the guest does not block.
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            open = open && to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_ok();
        }
    })
}

/// The thread is not joined: a read from a terminal cannot be interrupted.
fn carry_in(mut from: Box<dyn Read + Send>, mut to: UnixStream) {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 14];
        loop {
            match from.read(&mut buffer) {
                Ok(n @ 1..) if to.write_all(&buffer[..n]).is_ok() => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

impl Guest {
    /// The reason why a guest ended whose connections have closed.
    fn ended(&mut self, when: &str) -> Ending {
        // The connections close slightly before the process ends.
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait() {
                match crash(status, when, self.dir.path()) {
                    Some(why) => return Ending::Crashed(why),
                    None => break,
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ending::Died(format!("the guest ended {when}"))
    }

    fn take_port(&mut self, name: &str) -> Result<UnixStream> {
        match self.ports.iter().position(|(n, _)| *n == name) {
            Some(at) => Ok(self.ports.swap_remove(at).1),
            None => bail!("the guest has no port {name}"),
        }
    }
}

fn start(ground: &Ground, job: &Job) -> Result<Guest> {
    let dir = ground.cache.run_dir()?;
    let path = dir.path().to_owned();
    stage(ground, job, &path.join("opt")).context("staging what the guest needs")?;
    guest::make_scratch(&path)?;
    let mut waiting = Vec::new();
    for name in job.machine.port_names() {
        waiting.push((name, listener(&path, name)?));
    }

    let tree = ground.tree.root();
    let mut qemu = ground
        .tree
        .sandbox("/usr/bin/qemu-system-x86_64")
        .args(job.machine.arguments())
        .env("TMPDIR", guest::RUN)
        .mount(Mount::Tmpfs { at: "/run".into() });
    qemu = match &ground.layer {
        None => qemu.bind(&tree, guest::GUEST_ROOT),
        Some(layer) => qemu.mount(Mount::Overlay {
            lower: vec![layer.path().join("upper"), tree],
            upper: None,
            at: guest::GUEST_ROOT.into(),
        }),
    };
    let in_guest = |at: &str| format!("{}{at}", guest::GUEST_ROOT);
    qemu = qemu
        .bind_read_only(
            ground.kernel.dir().join("lib/modules"),
            in_guest("/usr/lib/modules"),
        )
        .bind_read_only(path.join("opt"), in_guest("/opt/peerbuf"))
        .bind_read_only(ground.kernel.dir(), guest::KERNEL)
        .bind_read_only(ground.kernel.initramfs_dir(), guest::INITRAMFS)
        .bind_read_only(ground.disk.path(), guest::DISK)
        .bind(&path, guest::RUN);
    if let Some(share) = &job.share {
        qemu = qemu.bind(share, guest::SHARE);
    }
    if let Some(wire) = &job.wire {
        qemu = qemu.bind(wire, guest::WIRE);
    }
    let said = fs::File::create(path.join("qemu"))?;
    let child = qemu
        .command()?
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said)
        .spawn()
        .context("starting QEMU")?;
    let mut guest = Guest {
        child,
        dir,
        ports: Vec::new(),
        kept: Vec::new(),
    };

    let deadline = Instant::now() + Duration::from_secs(60);
    while let Some((name, listener)) = waiting.pop() {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                guest.ports.push((name, stream));
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let ended = guest.child.try_wait()?;
                if let Some(why) = ended.and_then(|status| crash(status, BEFORE, &path)) {
                    return Err(CrashedAtOnce(why).into());
                }
                if ended.is_some() || Instant::now() > deadline {
                    let said = read_lossy(&path.join("qemu"));
                    bail!(
                        "QEMU did not start a guest; it said:\n{}",
                        sandbox::tail(&said, 30)
                    );
                }
                waiting.push((name, listener));
                thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(guest)
}

/// A socket in the run's directory, whose path may exceed the maximum length of a socket address.
fn listener(dir: &Path, name: &str) -> Result<UnixListener> {
    let handle = fs::File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
    let listener = UnixListener::bind(path).with_context(|| format!("making the socket {name}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Fills the directory that the guest sees as `/opt/peerbuf`.
fn stage(ground: &Ground, job: &Job, opt: &Path) -> Result<()> {
    for dir in ["bin", "fixtures", "init", "modules", "run"] {
        fs::create_dir_all(opt.join(dir))?;
    }
    for (name, text) in INIT {
        fs::write(opt.join("init").join(name), text)?;
    }
    for program in &job.programs {
        copy_into(program, &opt.join("bin"))?;
    }
    for module in &job.modules {
        copy_into(module, &opt.join("modules"))?;
    }
    if let Some(rxe) = &ground.rxe {
        copy_into(&rxe.path().join(rxe::MODULE), &opt.join("modules"))?;
    }
    if let Some(fixtures) = &job.fixtures {
        for file in fs::read_dir(fixtures)? {
            copy_into(&file?.path(), &opt.join("fixtures"))?;
        }
    }
    let yes = |on: bool| if on { "1" } else { "" };
    let settings = format!(
        "PEERBUF_LAB_TOPOLOGY={}\nSHARE={}\nMODULE={}\nRXE={}\nEND={}\nSHELL_WANTED={}\n",
        job.machine.topology.name(),
        yes(job.share.is_some()),
        yes(!job.modules.is_empty()),
        yes(ground.rxe.is_some()),
        job.machine.end.map_or("", guest::End::name),
        yes(job.machine.shell),
    );
    fs::write(opt.join("run/settings"), settings)?;
    fs::write(
        opt.join("run/command"),
        command_script(&job.command, job.machine.shell),
    )?;
    Ok(())
}

fn copy_into(file: &Path, dir: &Path) -> Result<()> {
    let name = file
        .file_name()
        .with_context(|| format!("{} is no file", file.display()))?;
    fs::copy(file, dir.join(name)).with_context(|| format!("copying {}", file.display()))?;
    Ok(())
}

fn command_script(command: &[OsString], shell: bool) -> Vec<u8> {
    if shell && command.is_empty() {
        let size = terminal_size().map_or(String::new(), |(rows, cols)| {
            format!("stty rows {rows} cols {cols}\n")
        });
        let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
        let term: String = term
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || "-_.+".contains(*c))
            .collect();
        return format!("export TERM={term}\n{size}exec bash\n").into_bytes();
    }
    let mut script = b"exec".to_vec();
    for word in command {
        script.extend_from_slice(b" '");
        for byte in word.as_bytes() {
            match byte {
                b'\'' => script.extend_from_slice(b"'\\''"),
                other => script.push(*other),
            }
        }
        script.push(b'\'');
    }
    script.push(b'\n');
    script
}

fn terminal_size() -> Option<(String, String)> {
    let output = std::process::Command::new("stty")
        .arg("size")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (rows, cols) = text.trim().split_once(' ')?;
    Some((rows.into(), cols.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_words_reach_the_guest_as_they_are() {
        let words = ["sh", "-c", "echo 'a b' \"$HOME\" \\ \n x"].map(OsString::from);
        let script = String::from_utf8(command_script(&words, false)).unwrap();
        assert_eq!(
            script,
            "exec 'sh' '-c' 'echo '\\''a b'\\'' \"$HOME\" \\ \n x'\n"
        );
    }

    #[test]
    fn a_program_of_the_host_is_told_by_its_relative_path() {
        let brought = |word: &str| brought(vec![word.into(), "./x".into()]);
        for of_guest in ["true", "/bin/true"] {
            let (command, program) = brought(of_guest).unwrap();
            assert_eq!((command[0].to_str(), program), (Some(of_guest), None));
        }
        // Tests run in the package's directory.
        let (command, program) = brought("./Cargo.toml").unwrap();
        assert_eq!(command, ["/opt/peerbuf/bin/Cargo.toml", "./x"]);
        assert_eq!(program, Some("./Cargo.toml".into()));
        for missing in ["./no-such-program", "../lab"] {
            let why = brought(missing).unwrap_err().to_string();
            assert!(why.starts_with(missing), "{why}");
        }
    }

    fn outcome(ending: Ending) -> Outcome {
        Outcome {
            ending,
            complaints: vec![],
            console: "one\r\ntwo\r\n".into(),
        }
    }

    #[test]
    fn the_status_is_the_commands_own_unless_the_guest_was_in_trouble() {
        assert_eq!(outcome(Ending::Exit(7)).status(), 7);
        assert_eq!(outcome(Ending::Exit(7)).report(), "");
        assert_eq!(
            outcome(Ending::TimedOut(Duration::from_secs(3))).status(),
            124
        );
        assert_eq!(outcome(Ending::Died("it died".into())).status(), 125);
        let mut complained = outcome(Ending::Exit(0));
        complained.complaints.push(Complaint {
            lines: vec!["BUG: x".into()],
            program: None,
            test: None,
        });
        assert_eq!(complained.status(), 125);
        assert!(complained.report().contains("BUG: x"));
    }

    #[test]
    fn time_that_the_host_gives_to_others_does_not_count() {
        let deadline = Deadline::default();
        deadline.set(Some(Duration::ZERO));
        assert!(deadline.missed().is_some());
        deadline.put_off(Duration::from_secs(60), Duration::from_secs(7));
        assert_eq!(deadline.missed(), None);
        assert_eq!(deadline.ran(), Duration::from_secs(7));

        let usage = |waited: &[(&str, u64)]| {
            Usage(waited.iter().map(|(t, w)| (t.into(), (1, *w))).collect())
        };
        let (before, now) = (
            usage(&[("a", 5), ("b", 7)]),
            usage(&[("a", 9), ("b", 8), ("new", 3)]),
        );
        assert_eq!(now.waited_since(&before), Duration::from_nanos(4));
        assert_eq!(before.waited_since(&now), Duration::ZERO);
        assert_eq!(now.ran(), Duration::from_nanos(3));
        let own = Usage::of(std::process::id());
        assert!(own.ran() > Duration::ZERO);
        assert!(Usage::of(u32::MAX).0.is_empty());
    }

    #[test]
    fn a_dead_guests_report_ends_with_its_console() {
        let report = outcome(Ending::Died("the guest died".into())).report();
        assert!(report.ends_with("    one\n    two\n"), "{report}");
    }
}

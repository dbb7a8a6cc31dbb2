//! A thread that makes random calls.
//!
//! The calls and their bytes depend only on the seed: a call names a descriptor by its place in a table that
//! the threads of a process share. The table's contents depend on how the threads are scheduled.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use bytemuck::{Pod, Zeroable};
use peerbuf_uapi::{self as abi, probe};

use super::calls::{self, CALLS, Counts};
use super::random::Random;
use crate::disk::SCRATCH;
use crate::node::{PAGE, SYNC_END, SYNC_WRITE, address, sync};

/// A table of descriptors; -1 for an empty place. The thread that takes a descriptor out closes
/// it. Each descriptor is therefore closed once, while other threads may still use the number.
pub struct Slots<const N: usize>([AtomicI32; N]);

impl<const N: usize> Slots<N> {
    fn new() -> Self {
        Self([const { AtomicI32::new(-1) }; N])
    }

    /// One of the descriptors. An empty place is rare, because the kernel would refuse most
    /// calls at once.
    fn get(&self, random: &mut Random) -> i32 {
        let tries: Vec<usize> = (0..6).map(|_| random.below(N as u64) as usize).collect();
        let found = tries.iter().map(|&at| self.0[at].load(Ordering::Relaxed));
        found.max_by_key(|&fd| fd >= 0).unwrap_or(-1)
    }
}

/// The data shared by the threads of a process.
pub struct Shared {
    nodes: Slots<4>,
    providers: Slots<1>,
    importers: Slots<1>,
    buffers: Slots<12>,
    attachments: Slots<12>,
    events: Slots<2>,
    fences: Slots<2>,
    /// Both ends of a nonblocking pipe.
    pipe: [i32; 2],
    disk: File,
    /// PCI addresses of cards.
    cards: Vec<String>,
    /// PCI addresses of devices that may or may not be importers.
    devices: Vec<String>,
    arena: Arena,
}

impl Shared {
    /// Opens the files that every process needs.
    pub fn new(cards: Vec<String>, devices: Vec<String>) -> io::Result<Self> {
        let mut pipe = [0; 2];
        // SAFETY: There is room for two descriptors.
        if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            nodes: Slots::new(),
            providers: Slots::new(),
            importers: Slots::new(),
            buffers: Slots::new(),
            attachments: Slots::new(),
            events: Slots::new(),
            fences: Slots::new(),
            pipe,
            disk: crate::disk::open_direct(SCRATCH)?,
            cards,
            devices,
            arena: Arena::new()?,
        })
    }
}

/// The maximum size of a mapping in bytes.
const PLACE: usize = 64 * PAGE as usize;
const PLACES: usize = 16;

/// Address space for mappings. All of it stays reserved, so that nothing else is mapped at an address that
/// another thread still uses after an unmap.
struct Arena(*mut u8);

// SAFETY: A mere address, which only the kernel dereferences.
unsafe impl Send for Arena {}
// SAFETY: A mere address, which only the kernel dereferences.
unsafe impl Sync for Arena {}

impl Arena {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: A new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PLACE * PLACES,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        match base {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            base => Ok(Self(base.cast())),
        }
    }

    fn place(&self, random: &mut Random) -> *mut c_void {
        let place = random.below(PLACES as u64) as usize;
        self.0.wrapping_add(place * PLACE).cast()
    }
}

/// The maximum size of an argument: a struct, or an array of ranges.
const ROOM: usize = 2 * PAGE as usize;

/// A worker's memory for an argument. Nothing is mapped after its end.
struct Room(*mut u8);

impl Room {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: A new mapping at an address that the kernel chooses; its last page is unmapped again.
        unsafe {
            let base = libc::mmap(ptr::null_mut(), ROOM + PAGE as usize, prot, flags, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let base: *mut u8 = base.cast();
            libc::mprotect(base.add(ROOM).cast(), PAGE as usize, libc::PROT_NONE);
            Ok(Self(base))
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: The memory is mapped, and used only by this worker.
        unsafe { std::slice::from_raw_parts_mut(self.0, ROOM) }
    }

    /// Copies bytes to the start, followed by zeros. Returns the address.
    fn put(&mut self, bytes: &[u8]) -> usize {
        let room = self.bytes();
        room[..bytes.len()].copy_from_slice(bytes);
        room[bytes.len()..].fill(0);
        room.as_ptr().addr()
    }
}

/// A thread's state.
pub struct Worker<'a> {
    shared: &'a Shared,
    counts: &'a Counts,
    random: Random,
    argument: Room,
    array: Room,
    buffer: Vec<u8>,
    /// The last argument sent, for the report of a failure.
    sent: String,
}

/// Numbers at which code tends to fail.
const ODD: [u64; 16] = [
    0,
    1,
    2,
    3,
    7,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    64 * PAGE,
    (1 << 26) - PAGE,
    1 << 26,
    u32::MAX as u64,
    1 << 31,
    1 << 40,
    1 << 63,
    u64::MAX,
];

/// The longest timeout in a call. Longer ones would only reduce the number of calls; timeouts beyond the
/// allowed maximum are sent unchanged.
const PATIENCE_MS: u32 = 20;

fn short(ms: u32) -> u32 {
    if ms > probe::MAX_MS {
        ms
    } else {
        ms % PATIENCE_MS
    }
}

/// An address that the kernel may or must not write to: in this worker's room, which begins at `room`, across
/// its end, or unmapped. Other addresses could damage the process.
fn near(address: u64, room: u64) -> u64 {
    match address {
        PAGE..0x8000_0000_0000 => room + address % (ROOM as u64 + PAGE / 2),
        _ => address,
    }
}

/// Limits a length: a longer one would use up the guest's memory. Lengths beyond any machine's
/// memory stay.
fn modest(length: u64) -> u64 {
    match length {
        0x10_0001..0x10_0000_0000 => length % (64 * PAGE),
        _ => length,
    }
}

impl<'a> Worker<'a> {
    /// A worker whose calls depend on `seed`.
    pub fn new(shared: &'a Shared, counts: &'a Counts, seed: u64) -> io::Result<Self> {
        Ok(Self {
            shared,
            counts,
            random: Random::new(seed),
            argument: Room::new()?,
            array: Room::new()?,
            buffer: vec![0; 4096],
            sent: String::new(),
        })
    }

    /// Makes a call. A result that is not allowed ends the process.
    pub fn step(&mut self) {
        match self.random.below(100) {
            0 => self.query(),
            1 => self.open_provider(),
            2..15 => self.export(),
            15..22 => self.move_buffer(),
            22..25 => self.revoke(),
            25..30 => self.restore(),
            30..32 => self.watch(),
            32..35 => self.ask_buffer(),
            35..45 => self.attach(),
            45..50 => self.map(),
            50..62 => self.import_step(),
            62..65 => self.fence(),
            65..67 => self.import_query(),
            67..73 => self.dma_buf(),
            73..75 => self.no_ioctl(),
            75..78 => self.open(),
            78..84 => self.close(),
            84..89 => self.mmap(),
            89 => self.munmap(),
            90..94 => self.touch(),
            94..96 => self.direct(),
            96..98 => self.look(),
            _ => self.fdinfo(),
        }
    }

    fn answered(&mut self, call: usize, answer: i64) -> Option<i32> {
        let errno = match answer {
            -1 => io::Error::last_os_error().raw_os_error().unwrap_or(0),
            _ => 0,
        };
        self.counts.add(call, errno);
        let about = &CALLS[call];
        if !about.may_answer(errno) {
            eprintln!(
                "{} answered {:?}, which it must not. Sent: {}",
                about.name,
                peerbuf::Errno(errno),
                self.sent
            );
            // SAFETY: Ends the process at once; its open files are part of the test.
            unsafe { libc::_exit(super::WRONG_ANSWER) };
        }
        (errno == 0).then_some(answer as i32)
    }

    /// Sends an ioctl with an address.
    fn send(&mut self, call: usize, fd: i32, address: usize) -> Option<i32> {
        let number = CALLS[call].number;
        // SAFETY: The kernel checks each address; those it may write to are in this worker's own memory.
        let answer = unsafe { libc::ioctl(fd, libc::c_ulong::from(number), address) };
        self.answered(call, i64::from(answer))
    }

    /// Sends a struct, sometimes a malformed one. `tame` sets its fields last.
    fn send_struct<T: Pod>(
        &mut self,
        call: usize,
        fd: i32,
        request: T,
        tame: impl Fn(&mut T),
    ) -> Option<T> {
        let mut request = request;
        if self.random.once_in(6) {
            for _ in 0..=self.random.below(2) {
                self.mutate(bytemuck::bytes_of_mut(&mut request));
            }
            tame(&mut request);
        }
        let mut address = self.argument.put(bytemuck::bytes_of(&request));
        if self.random.once_in(40) {
            // The struct of a later version, with or without nonzero bytes at the end, or a shorter one.
            let at = size_of::<T>() + self.random.below(64) as usize;
            let longer = match self.random.once_in(4) {
                true => self.random.below(size_of::<T>() as u64) as u32,
                false => size_of::<T>() as u32 + self.random.below(128) as u32,
            };
            let room = self.argument.bytes();
            room[..4].copy_from_slice(&longer.to_ne_bytes());
            room[at] = (self.random.below(2)) as u8;
        }
        if self.random.once_in(60) {
            let end = self.argument.bytes().as_ptr().addr() + ROOM;
            let across = end - self.random.below(size_of::<T>() as u64) as usize;
            address = self
                .random
                .of(&[0, 1, across, 0xffff_8880_0000_0000, usize::MAX]);
        }
        let bytes = bytemuck::bytes_of(&request);
        self.sent = format!("fd {fd} at {address:#x}: {bytes:02x?}");
        let _ = self.send(call, fd, address)?;
        Some(bytemuck::pod_read_unaligned(
            &self.argument.bytes()[..size_of::<T>()],
        ))
    }

    fn mutate(&mut self, bytes: &mut [u8]) {
        let at = self.random.below(bytes.len() as u64 / 4) as usize * 4;
        if self.random.once_in(2) {
            let bit = self.random.below(32) as usize;
            bytes[at + bit / 8] ^= 1 << (bit % 8);
            return;
        }
        let odd = match self.random.once_in(4) {
            true => self.random.next(),
            false => self.random.of(&ODD),
        };
        let width = if at + 8 <= bytes.len() && self.random.once_in(2) {
            8
        } else {
            4
        };
        bytes[at..at + width].copy_from_slice(&odd.to_ne_bytes()[..width]);
    }

    /// Puts a descriptor into a table, and closes the previous one.
    fn keep<const N: usize>(&mut self, slots: &Slots<N>, fd: i32) {
        let place = self.random.below(N as u64) as usize;
        let old = slots.0[place].swap(fd, Ordering::Relaxed);
        self.close_fd(old);
    }

    fn close_fd(&mut self, fd: i32) {
        if fd >= 0 {
            // SAFETY: The descriptor came out of a table, so no one else closes it.
            let answer = unsafe { libc::close(fd) };
            self.answered(calls::CLOSE, i64::from(answer));
        }
    }

    fn query(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let request = abi::Query {
            size: size_of::<abi::Query>() as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::QUERY, node, request, |_| ());
    }

    fn open_provider(&mut self) {
        let providers = self.shared.providers.get(&mut self.random);
        let request = abi::ProviderOpen {
            size: size_of::<abi::ProviderOpen>() as u32,
            fd_flags: self.fd_flags(),
            address: address(self.device()),
            ..Zeroable::zeroed()
        };
        let made = self.send_struct(calls::PROVIDER_OPEN, providers, request, |_| ());
        if let Some(made) = made {
            self.keep(&self.shared.nodes, made.fd);
        }
    }

    fn device(&mut self) -> &'a str {
        let devices = &self.shared.devices;
        &devices[self.random.below(devices.len() as u64) as usize]
    }

    fn pages(&mut self) -> u64 {
        let most = self.random.of(&[1, 4, 64, 64]);
        1 + self.random.below(most)
    }

    fn fd_flags(&mut self) -> u32 {
        let flags = [libc::O_RDWR, libc::O_RDWR, libc::O_RDONLY];
        (self.random.of(&flags) | libc::O_CLOEXEC) as u32
    }

    fn export_flags(&mut self) -> u32 {
        let may_move = u32::from(self.random.once_in(2)) * abi::EXPORT_MAY_MOVE;
        let devices_read = u32::from(self.random.once_in(8)) * abi::EXPORT_DEVICES_READ;
        let uncached = u32::from(self.random.once_in(2)) * abi::EXPORT_UNCACHED;
        may_move | devices_read | uncached
    }

    fn export(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        // Mostly one range, as most callers have.
        let most = self.random.of(&[1, 1, 6]);
        let count = 1 + self.random.below(most) as usize;
        let bar = self.random.of(&[2, 2, 2, 2, 0, 1]);
        let mut ranges = [abi::Range::zeroed(); 8];
        for range in &mut ranges[..count] {
            let flags = self
                .random
                .of(&[0, abi::RANGE_ANY_OFFSET, abi::RANGE_SYSTEM]);
            *range = abi::Range {
                offset: if flags == 0 {
                    self.random.below(512) * PAGE
                } else {
                    0
                },
                length: self.pages() * PAGE,
                bar: match flags {
                    abi::RANGE_SYSTEM => 0,
                    _ if self.random.once_in(40) => 2,
                    _ => bar,
                },
                flags,
            };
        }
        if self.random.once_in(6) {
            let one = self.random.below(count as u64) as usize;
            self.mutate(bytemuck::bytes_of_mut(&mut ranges[one]));
            ranges[one].length = modest(ranges[one].length);
        }
        let request = abi::Export {
            size: size_of::<abi::Export>() as u32,
            flags: self.export_flags(),
            fd_flags: self.fd_flags(),
            ranges: self.array.put(bytemuck::bytes_of(&ranges)) as u64,
            nr_ranges: count as u32,
            range_size: size_of::<abi::Range>() as u32,
            ..Zeroable::zeroed()
        };
        let array = request.ranges;
        let made = self.send_struct(calls::EXPORT, node, request, |request| {
            request.ranges = near(request.ranges, array);
        });
        if let Some(made) = made {
            self.keep(&self.shared.buffers, made.fd);
        }
    }

    fn move_buffer(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let whole = self.random.once_in(2);
        let request = abi::Move {
            size: size_of::<abi::Move>() as u32,
            fd: self.shared.buffers.get(&mut self.random),
            placement: self
                .random
                .of(&[abi::PLACEMENT_DEVICE, abi::PLACEMENT_SYSTEM]),
            offset: if whole {
                0
            } else {
                self.random.below(8) * PAGE
            },
            length: if whole { 0 } else { self.pages() * PAGE },
            timeout_ms: self.random.below(u64::from(PATIENCE_MS)) as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::MOVE, node, request, |request| {
            request.timeout_ms %= PATIENCE_MS;
        });
    }

    fn revoke(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let request = abi::Revoke {
            size: size_of::<abi::Revoke>() as u32,
            flags: u32::from(self.random.once_in(8)) * abi::REVOKE_PERMANENT,
            fd: self.shared.buffers.get(&mut self.random),
            timeout_ms: self.random.below(u64::from(PATIENCE_MS)) as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::REVOKE, node, request, |request| {
            request.timeout_ms %= PATIENCE_MS;
        });
    }

    fn restore(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let request = abi::Restore {
            size: size_of::<abi::Restore>() as u32,
            fd: self.shared.buffers.get(&mut self.random),
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::RESTORE, node, request, |_| ());
    }

    fn watch(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let request = abi::Watch {
            size: size_of::<abi::Watch>() as u32,
            fd: self.shared.buffers.get(&mut self.random),
            eventfd: self.shared.events.get(&mut self.random),
            events: 1 + self.random.below(abi::EVENT_FLAGS),
            ..Zeroable::zeroed()
        };
        let end = abi::Watch {
            events: 0,
            ..request
        };
        let done = match self.random.once_in(3) {
            true => self.send_struct(calls::UNWATCH, node, end, |_| ()),
            false => self.send_struct(calls::WATCH, node, request, |_| ()),
        };
        if done.is_some() && self.random.once_in(2) {
            self.send_struct(calls::UNWATCH, node, end, |_| ());
        }
    }

    fn ask_buffer(&mut self) {
        let node = self.shared.nodes.get(&mut self.random);
        let array = self.array.put(&[]) as u64;
        let request = abi::BufferQuery {
            size: size_of::<abi::BufferQuery>() as u32,
            fd: self.shared.buffers.get(&mut self.random),
            attachments: array,
            pieces: array + PAGE,
            nr_attachments: self.random.below(64) as u32,
            attachment_size: self.random.of(&[96, 96, 96, 104, 64]),
            nr_pieces: self.random.below(64) as u32,
            piece_size: self.random.of(&[24, 24, 24, 32]),
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::BUFFER, node, request, |request| {
            request.attachments = near(request.attachments, array);
            request.pieces = near(request.pieces, array);
        });
    }

    fn attach(&mut self) {
        let importer = self.shared.importers.get(&mut self.random);
        let flags = self
            .random
            .of(&[0, probe::DYNAMIC, probe::PEER, probe::FLAGS, probe::FLAGS]);
        let on_invalidate = match flags & probe::DYNAMIC {
            0 => 0,
            _ => self.random.below(3) as u32,
        };
        let holds = on_invalidate == probe::ON_INVALIDATE_HOLD;
        let request = probe::Attach {
            size: size_of::<probe::Attach>() as u32,
            flags,
            dmabuf: self.shared.buffers.get(&mut self.random),
            fd_flags: libc::O_CLOEXEC as u32,
            on_invalidate,
            hold_ms: if holds {
                self.random.below(20) as u32
            } else {
                0
            },
            detach_ms: self.random.of(&[0, 0, 0, 3, 15]),
            address: address(self.device()),
            ..Zeroable::zeroed()
        };
        let made = self.send_struct(calls::ATTACH, importer, request, |request| {
            request.hold_ms = short(request.hold_ms);
            request.detach_ms = short(request.detach_ms);
        });
        if let Some(made) = made {
            self.keep(&self.shared.attachments, made.fd);
        }
    }

    fn map(&mut self) {
        let attachment = self.shared.attachments.get(&mut self.random);
        let request = probe::Map {
            size: size_of::<probe::Map>() as u32,
            direction: self.random.below(3) as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::MAP, attachment, request, |_| ());
    }

    fn import_step(&mut self) {
        let attachment = self.shared.attachments.get(&mut self.random);
        let call = self.random.of(&[
            calls::UNMAP,
            calls::UNMAP,
            calls::PIN,
            calls::UNPIN,
            calls::UNPIN,
            calls::SIGNAL,
            calls::VMAP,
            calls::VUNMAP,
            calls::VUNMAP,
            calls::DETACH,
        ]);
        let request = probe::Step {
            size: size_of::<probe::Step>() as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(call, attachment, request, |_| ());
    }

    fn fence(&mut self) {
        let attachment = self.shared.attachments.get(&mut self.random);
        let request = probe::Fence {
            size: size_of::<probe::Fence>() as u32,
            flags: 0,
            usage: self.random.below(4) as u32,
            timeout_ms: 1 + self.random.below(u64::from(PATIENCE_MS)) as u32,
        };
        let made = self.send_struct(calls::FENCE, attachment, request, |request| {
            request.timeout_ms = short(request.timeout_ms);
        });
        // Most fences signal by timeout before a call signals them.
        if made.is_some() && self.random.once_in(4) {
            let step = probe::Step {
                size: size_of::<probe::Step>() as u32,
                ..Zeroable::zeroed()
            };
            self.send_struct(calls::SIGNAL, attachment, step, |_| ());
        }
    }

    fn import_query(&mut self) {
        let attachment = self.shared.attachments.get(&mut self.random);
        let request = probe::Query {
            size: size_of::<probe::Query>() as u32,
            ..Zeroable::zeroed()
        };
        self.send_struct(calls::IMPORT_QUERY, attachment, request, |_| ());
    }

    /// The ioctls of the dma-buf core.
    fn dma_buf(&mut self) {
        let fd = self.shared.buffers.get(&mut self.random);
        match self.random.below(6) {
            0..3 => {
                let flags = (1 + self.random.below(3)) | self.random.of(&[0, 4]);
                self.send_struct(calls::SYNC, fd, flags, |_| ());
            }
            3 => {
                let length = 4 * self.random.below(20) as usize;
                let name = vec![b'n'; length];
                let address = self.argument.put(&name);
                self.send(calls::SET_NAME, fd, address);
            }
            4 => {
                let request = [1 + self.random.below(3) as u32, u32::MAX];
                let made = self.send_struct(calls::EXPORT_SYNC_FILE, fd, request, |_| ());
                if let Some([_, made]) = made {
                    self.keep(&self.shared.fences, made as i32);
                }
            }
            _ => {
                let fence = self.shared.fences.get(&mut self.random);
                let request = [1 + self.random.below(3) as u32, fence as u32];
                self.send_struct(calls::IMPORT_SYNC_FILE, fd, request, |_| ());
            }
        }
    }

    /// An ioctl number that no driver has, or that belongs to another file.
    fn no_ioctl(&mut self) {
        let fd = match self.random.below(4) {
            0 => self.shared.nodes.get(&mut self.random),
            1 => self.shared.importers.get(&mut self.random),
            2 => self.shared.attachments.get(&mut self.random),
            _ => self.shared.buffers.get(&mut self.random),
        };
        let number = 0xbb00 | self.random.below(256) as u32;
        // Existing numbers have their own calls with checks.
        if CALLS.iter().any(|call| call.number == number) {
            return;
        }
        let address = self.argument.put(&[]);
        self.sent = format!("fd {fd}, number {number:#x}");
        // SAFETY: The address is in this worker's own memory.
        let answer = unsafe { libc::ioctl(fd, libc::c_ulong::from(number), address) };
        self.answered(calls::NO_IOCTL, i64::from(answer));
    }

    fn open_path(&mut self, path: &str, flags: i32) -> Option<i32> {
        let path = std::ffi::CString::new(path).expect("a path without NUL");
        self.sent = format!("{path:?}");
        // SAFETY: The path is a C string.
        let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
        self.answered(calls::OPEN, i64::from(fd))
    }

    fn open(&mut self) {
        match self.random.below(8) {
            0..4 => {
                let cards = &self.shared.cards;
                let card = &cards[self.random.below(cards.len() as u64) as usize];
                let flags = self
                    .random
                    .of(&[libc::O_RDWR, libc::O_RDWR, libc::O_RDONLY]);
                if let Some(fd) = self.open_path(&format!("/dev/peerbuf/{card}"), flags) {
                    self.keep(&self.shared.nodes, fd);
                }
            }
            4 => {
                if let Some(fd) = self.open_path("/dev/peerbuf/importer", libc::O_RDWR) {
                    self.keep(&self.shared.importers, fd);
                }
            }
            5 => {
                if let Some(fd) = self.open_path("/dev/peerbuf/provider", libc::O_RDWR) {
                    self.keep(&self.shared.providers, fd);
                }
            }
            6 => {
                // SAFETY: The call takes only numbers.
                let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
                if let Some(fd) = self.answered(calls::OPEN, i64::from(fd)) {
                    self.keep(&self.shared.events, fd);
                }
            }
            _ => {
                // A buffer of another exporter.
                let size = self.pages() * PAGE;
                if let Ok(buffer) = peerbuf::export::udmabuf::export("fuzz", size)
                    && let Some(dmabuf) = buffer.dmabuf()
                    && let Ok(fd) = dmabuf.try_clone()
                {
                    let fd: std::os::fd::OwnedFd = fd.into();
                    // Two threads that begin the first access at the same time make udmabuf of Linux 7.3 leak
                    // a scatter list; a first access here prevents that.
                    for flags in [SYNC_WRITE, SYNC_WRITE | SYNC_END] {
                        let _ = sync(&fd, flags);
                    }
                    self.keep(
                        &self.shared.buffers,
                        std::os::fd::IntoRawFd::into_raw_fd(fd),
                    );
                }
            }
        }
    }

    fn close(&mut self) {
        let shared = self.shared;
        fn taken<const N: usize>(slots: &Slots<N>, random: &mut Random) -> i32 {
            let place = random.below(N as u64) as usize;
            slots.0[place].swap(-1, Ordering::Relaxed)
        }
        let random = &mut self.random;
        let fd = match random.below(12) {
            0 => taken(&shared.nodes, random),
            1 => taken(&shared.events, random),
            2 => taken(&shared.fences, random),
            3..8 => taken(&shared.buffers, random),
            _ => taken(&shared.attachments, random),
        };
        self.close_fd(fd);
    }

    fn mmap(&mut self) {
        let fd = self.shared.buffers.get(&mut self.random);
        let at = self.shared.arena.place(&mut self.random);
        let length = self.random.of(&[1, 1, 1, 4, 64]) * PAGE as usize;
        let prot = self.random.of(&[
            libc::PROT_READ,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::PROT_READ | libc::PROT_WRITE,
        ]);
        let sharing = self.random.of(&[
            libc::MAP_SHARED,
            libc::MAP_SHARED,
            libc::MAP_SHARED,
            libc::MAP_PRIVATE,
        ]);
        let offset = self.random.of(&[0, 0, 0, 0, 0, 0, 1, 1 << 30]) * PAGE as i64;
        self.sent = format!("fd {fd}, {length} bytes from {offset}, {prot}, {sharing}");
        // SAFETY: The addresses are in the arena, and only system calls use them.
        let answer = unsafe { libc::mmap(at, length, prot, sharing | libc::MAP_FIXED, fd, offset) };
        self.answered(calls::MMAP, answer.addr() as i64);
    }

    fn munmap(&mut self) {
        let at = self.shared.arena.place(&mut self.random);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: The addresses are in the arena, and stay reserved.
        let answer = unsafe { libc::mmap(at, PLACE, libc::PROT_NONE, flags, -1, 0) };
        self.answered(calls::MUNMAP, answer.addr() as i64);
    }

    /// Makes the kernel read or write a mapping: a revoke would kill a process that accesses it directly.
    fn touch(&mut self) {
        let at = self.shared.arena.place(&mut self.random);
        let page = self.random.of(&[0, 0, 1, 63]) * PAGE as usize;
        let at = at.wrapping_byte_add(page);
        let length = 1 + self.random.below(4096) as usize;
        let read = self.random.once_in(2);
        self.sent = format!("{at:?}, {length} bytes");
        // SAFETY: The addresses are in the arena.
        let answer = unsafe {
            if read {
                libc::write(self.shared.pipe[1], at, length)
            } else {
                // Bytes to read, unless another thread takes them first.
                libc::write(self.shared.pipe[1], self.buffer.as_ptr().cast(), length);
                libc::read(self.shared.pipe[0], at, length)
            }
        };
        self.answered(calls::TOUCH, answer as i64);
        if read {
            // Empties the pipe again.
            // SAFETY: The buffer has room for `length` bytes.
            unsafe { libc::read(self.shared.pipe[0], self.buffer.as_mut_ptr().cast(), length) };
        }
    }

    /// Direct I/O between a mapping and the scratch disk.
    fn direct(&mut self) {
        let at = self.shared.arena.place(&mut self.random);
        let length = self.random.of(&[1, 1, 1, 4, 64]) * PAGE as usize;
        let offset = self.random.below(1024) as i64 * PAGE as i64;
        let disk = self.shared.disk.as_raw_fd();
        self.sent = format!("{at:?}, {length} bytes");
        // SAFETY: The addresses are in the arena, and no one needs the scratch disk's contents.
        let (call, answer) = unsafe {
            if self.random.once_in(2) {
                (calls::READ_DISK, libc::pread(disk, at, length, offset))
            } else {
                (calls::WRITE_DISK, libc::pwrite(disk, at, length, offset))
            }
        };
        self.answered(call, answer as i64);
    }

    fn look(&mut self) {
        let fd = self.shared.buffers.get(&mut self.random);
        self.sent = format!("fd {fd}");
        if self.random.once_in(2) {
            // SAFETY: The call takes only numbers.
            let answer = unsafe { libc::lseek(fd, 0, self.random.of(&[libc::SEEK_END, 0])) };
            self.answered(calls::SEEK, answer);
        } else {
            let mut asked = libc::pollfd {
                fd,
                events: libc::POLLIN | libc::POLLOUT,
                revents: 0,
            };
            // SAFETY: The argument is one `pollfd`, as the count says.
            let answer = unsafe { libc::poll(&raw mut asked, 1, 0) };
            self.answered(calls::POLL, i64::from(answer));
        }
    }

    fn fdinfo(&mut self) {
        let fd = match self.random.once_in(2) {
            true => self.shared.nodes.get(&mut self.random),
            false => self.shared.buffers.get(&mut self.random),
        };
        let path = format!("/proc/self/fdinfo/{fd}");
        self.sent = path.clone();
        let errno = match std::fs::read(path) {
            Ok(_) => 0,
            Err(e) => e.raw_os_error().unwrap_or(0),
        };
        // SAFETY: The pointer is to this thread's own errno.
        unsafe { *libc::__errno_location() = errno };
        self.answered(calls::FDINFO, if errno == 0 { 0 } else { -1 });
    }
}

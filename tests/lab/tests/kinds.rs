//! Each kind of exporter and importer by itself. Runs in the guest.

use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use peerbuf::buffer::{FenceState, Kind};
use peerbuf::device::drm::Card;
use peerbuf::device::v4l2::VideoDevice;
use peerbuf::error::{BufferError, ExportError, ImportError, ShareError};
use peerbuf::export::{drm, heap, memfd, udmabuf};
use peerbuf::import::drm::DrmImporter;
use peerbuf::import::{iommufd, v4l2};
use peerbuf::plan::{Path, ReasonCode};
use peerbuf::share::{Channel, Copied, Grant, Peer, Publisher, Subscriber};
use peerbuf::{Access, Buffer, DmaBuf};
use peerbuf_lab_suite::bytes::{get, put};
use peerbuf_lab_suite::clock::Stopwatch;
use peerbuf_lab_suite::modules;
use peerbuf_lab_suite::node::ioctl;
use rustix::fs::{FallocateFlags, fallocate};

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

/// The same bytes through the dma-buf alone, as a device sees them.
fn by_dmabuf(buffer: &Buffer) -> Buffer {
    let dmabuf = buffer.dmabuf().unwrap().try_clone().unwrap();
    Buffer::from_dmabuf(dmabuf, buffer.provenance().clone())
}

#[test]
fn a_list_of_pieces_is_one_buffer_over_the_same_bytes() {
    let (one, two) = (
        memfd::export("one", MIB).unwrap(),
        memfd::export("two", MIB).unwrap(),
    );
    let pieces = [
        one.range(8192, 4096).unwrap(),
        two.range(0, 65536).unwrap(),
        one.range(0, 4096).unwrap(),
    ];
    let list = udmabuf::export_list("list", &pieces).unwrap();
    assert_eq!(list.size(), 4096 + 65536 + 4096);
    assert_eq!(list.provenance().kind, Kind::Udmabuf);
    let bytes = random(list.size());
    put(&list.whole(), &bytes);
    let found: Vec<u8> = pieces.iter().flat_map(get).collect();
    assert!(found == bytes);
    let again = random(65536);
    put(&pieces[1], &again);
    assert!(get(&list.range(4096, 65536).unwrap()) == again);

    let off_a_page = udmabuf::export_list("list", &[one.range(1, 4096).unwrap()]);
    assert!(matches!(
        off_a_page,
        Err(ExportError::Unsuitable { value: 1, .. })
    ));
    let no_memfd = udmabuf::export_list("list", &[list.whole()]);
    assert!(no_memfd.unwrap_err().to_string().contains("memfd"));
    let too_many = vec![one.range(0, 4096).unwrap(); 1025];
    let error = udmabuf::export_list("list", &too_many)
        .unwrap_err()
        .to_string();
    assert!(error.contains("1024 pieces"), "{error}");
}

#[test]
fn huge_pages_are_used_when_there_are_some() {
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let count = |file| {
        std::fs::read_to_string(file)
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    let pages = udmabuf::HugePages::TwoMebibytes;
    // Another program of this guest may have left some pages.
    std::fs::write(pool, "0").unwrap();
    let error = udmabuf::export_huge("huge", 4 * MIB, pages).unwrap_err();
    assert!(error.to_string().contains("ENOMEM"), "{error}");
    let off = udmabuf::export_huge("huge", MIB, pages).unwrap_err();
    assert!(matches!(off, ExportError::Unsuitable { .. }), "{off}");

    std::fs::write(pool, "4").unwrap();
    let buffer = udmabuf::export_huge("huge", 4 * MIB, pages).unwrap();
    assert_eq!(count(free), count(pool) - 2);
    let bytes = random(3 * MIB + 4096);
    let range = buffer.range(4096 + 17, bytes.len() as u64).unwrap();
    put(&range, &bytes);
    assert!(get(&range) == bytes);
    let seen = by_dmabuf(&buffer)
        .range(4096 + 17, bytes.len() as u64)
        .unwrap();
    assert!(get(&seen) == bytes);
    drop((buffer, range, seen));
    assert_eq!(count(free), count(pool));
    std::fs::write(pool, "0").unwrap();
}

#[test]
fn a_heap_gives_buffers_with_their_names() {
    let heaps = heap::probe().unwrap();
    let system = heaps.iter().find(|heap| heap.name() == "system").unwrap();
    let buffer = system.export("frames", MIB).unwrap();
    let info = buffer.dmabuf().unwrap().info().unwrap();
    assert_eq!(
        (info.exporter.as_str(), info.name.as_str()),
        ("system", "frames")
    );
    assert!(get(&buffer.whole()).iter().all(|&byte| byte == 0));
    let bytes = random(MIB);
    put(&buffer.whole(), &bytes);
    assert!(get(&buffer.whole()) == bytes);
    assert!(matches!(
        system.export("x", 100),
        Err(ExportError::Unsuitable { .. })
    ));
    let error = heap::Heap::open("nonsense").unwrap_err().to_string();
    assert!(error.contains("/dev/dma_heap/nonsense: ENOENT"), "{error}");
}

#[test]
fn a_graphics_driver_makes_and_takes_buffers() {
    let card = modules::vgem();
    assert_eq!(card.device(), None);
    let buffer = drm::export(&card, "surface", MIB).unwrap();
    assert_eq!(buffer.dmabuf().unwrap().exporter(), "drm");
    let bytes = random(MIB);
    put(&buffer.whole(), &bytes);
    let own = DrmImporter::new(&card).attach(&buffer.whole()).unwrap();
    let mut mapping = own.map(Access::Read).unwrap();
    let cpu = mapping.begin_cpu_access(Access::Read).unwrap();
    assert_eq!(cpu.read::<[u8; 32]>(0).unwrap(), bytes[..32]);

    let other = udmabuf::export("memory", MIB).unwrap();
    put(&other.whole(), &bytes);
    let range = other.range(8192, 4096).unwrap();
    let attached = DrmImporter::new(&card).attach(&range).unwrap();
    assert_eq!(attached.plan().path, Path::SharedHostMemory);
    assert_ne!(attached.handle(), own.handle());
    let mut mapping = attached.map(Access::ReadWrite).unwrap();
    let mut cpu = mapping.begin_cpu_access(Access::ReadWrite).unwrap();
    assert_eq!(cpu.read::<[u8; 32]>(0).unwrap(), bytes[8192..8224]);
    cpu.write(0, &[7u8; 32]).unwrap();
    cpu.end().unwrap();
    assert_eq!(get(&range)[..32], [7; 32]);

    let memory = memfd::export("memory", MIB).unwrap();
    let refused = DrmImporter::new(&card).attach(&memory.whole());
    let code = ReasonCode::NoDmaBuf;
    assert!(matches!(refused, Err(ImportError::Impossible { code: c, .. }) if c == code));
}

#[test]
fn a_buffer_attached_twice_keeps_its_handle_until_the_second_lets_go() {
    let card = modules::vgem();
    let buffer = udmabuf::export("memory", MIB).unwrap();
    let importer = DrmImporter::new(&card);
    let one = importer.attach(&buffer.whole()).unwrap();
    let two = importer.attach(&buffer.whole()).unwrap();
    assert_eq!(one.handle(), two.handle());
    let handle = one.handle();
    drop(one);
    two.map(Access::Read).unwrap();
    assert!(drm::export_handle(&card, handle, "again").is_ok());
    drop(two);
    let error = drm::export_handle(&card, handle, "again")
        .unwrap_err()
        .to_string();
    assert!(error.contains("ENOENT"), "{error}");
}

#[test]
fn a_node_that_is_no_graphics_device_says_so() {
    let error = Card::open("/dev/null").unwrap_err().to_string();
    assert!(error.contains("not the node of a DRM driver"), "{error}");
    let error = VideoDevice::open("/dev/null").unwrap_err().to_string();
    assert!(error.contains("not a video device"), "{error}");
    let error = iommufd::probe().map_or_else(|error| error.to_string(), |()| String::new());
    assert!(
        error.is_empty() || error.contains("CONFIG_IOMMUFD"),
        "{error}"
    );
}

/// The kernel gives every descriptor of a graphics buffer the access of the first export, whatever later ones ask for
/// (`drm_gem_prime_handle_to_dmabuf`). So ours is read-only here, and says so.
#[test]
fn a_graphics_buffer_that_was_first_exported_for_reading_is_read_only_from_then_on() {
    let card = modules::vgem();
    // DRM_IOCTL_MODE_CREATE_DUMB: height, width, bits, flags, handle, pitch, size.
    let mut dumb = [1u32, 1024, 32, 0, 0, 0, 0, 0];
    ioctl(card.as_fd(), 0xc020_64b2, (&raw mut dumb).addr()).unwrap();
    let handle = NonZeroU32::new(dumb[4]).unwrap();
    // DRM_IOCTL_PRIME_HANDLE_TO_FD: handle, flags (O_CLOEXEC without O_RDWR), descriptor.
    let mut theirs = [handle.get(), 0o2_000_000, 0];
    ioctl(card.as_fd(), 0xc00c_642d, (&raw mut theirs).addr()).unwrap();
    let ours = drm::export_handle(&card, handle, "first for reading").unwrap();
    assert!(!ours.is_writable());
    let refused = ours.whole().map(Access::Write);
    assert!(matches!(refused, Err(BufferError::Access { .. })));
}

/// The udmabuf keeps the old page; the memfd gets a new one. No seal but F_SEAL_WRITE forbids it.
#[test]
fn a_hole_punched_in_the_memfd_behind_a_udmabuf_parts_the_two() {
    let buffer = udmabuf::export("memory", MIB).unwrap();
    put(&buffer.whole(), &vec![1; MIB as usize]);
    let memory = buffer.host_memory().unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(memory, punch, 0, 65536).unwrap();
    let hole = buffer.range(0, 65536).unwrap();
    put(&hole, &vec![2; 65536]);
    let seen_by_devices = get(&by_dmabuf(&buffer).range(0, 65536).unwrap());
    assert!(seen_by_devices == [1; 65536]);
    assert!(get(&hole) == [2; 65536]);
}

/// A fence on a buffer, made by vgem, like the fence of a GPU's work
/// (include/uapi/drm/vgem_drm.h).
struct Work<'c> {
    card: &'c Card,
    fence: u32,
}

const fn vgem_ioctl(direction: u32, number: u32, size: usize) -> u32 {
    (direction << 30) | ((size as u32) << 16) | ((b'd' as u32) << 8) | (0x40 + number)
}

impl<'c> Work<'c> {
    fn begin(card: &'c Card, handle: u32, writes: bool) -> Work<'c> {
        let mut argument = [handle, writes.into(), 0, 0];
        let address = (&raw mut argument).addr();
        ioctl(card.as_fd(), vgem_ioctl(3, 1, 16), address).expect("VGEM_FENCE_ATTACH");
        let fence = argument[2];
        Work { card, fence }
    }

    fn end(self) {
        let argument = [self.fence, 0];
        let address = (&raw const argument).addr();
        ioctl(self.card.as_fd(), vgem_ioctl(1, 2, 8), address).expect("VGEM_FENCE_SIGNAL");
    }
}

#[test]
fn waiting_for_a_device_ends_when_it_is_done_or_at_the_limit() {
    let card = modules::vgem();
    let buffer = udmabuf::export("memory", 4096).unwrap();
    let attached = DrmImporter::new(&card).attach(&buffer.whole()).unwrap();
    let dmabuf = buffer.dmabuf().unwrap();
    let short = Duration::from_millis(50);
    let timed_out = |result| matches!(result, Err(BufferError::TimedOut { .. }));

    // A device that reads stops writers, but no readers.
    let work = Work::begin(&card, attached.handle().into(), false);
    dmabuf.wait(Access::Read, SECOND).unwrap();
    let begun = Instant::now();
    assert!(timed_out(dmabuf.wait(Access::Write, short)));
    assert!(begun.elapsed() >= short);
    work.end();
    dmabuf.wait(Access::Write, SECOND).unwrap();

    // A device that writes stops both. A descriptor exports its fence, and can be waited for.
    let work = Work::begin(&card, attached.handle().into(), true);
    let fences = dmabuf.export_sync_file(Access::Read).unwrap();
    assert_eq!(fences.state().unwrap(), FenceState::Pending);
    assert!(timed_out(fences.wait(short)));
    assert!(timed_out(dmabuf.wait(Access::Read, short)));
    // The fence, imported into another buffer, stops the users of that buffer.
    let other = udmabuf::export("other", 4096).unwrap();
    let other = other.dmabuf().unwrap();
    other.import_sync_file(&fences, Access::Write).unwrap();
    assert!(timed_out(other.wait(Access::Read, short)));
    work.end();
    fences.wait(SECOND).unwrap();
    assert_eq!(fences.state().unwrap(), FenceState::Done);
    dmabuf.wait(Access::Write, SECOND).unwrap();
    other.wait(Access::Write, SECOND).unwrap();
}

/// Serves until `done` returns true.
fn serve(publisher: &mut Publisher, mut done: impl FnMut(&Publisher) -> bool) {
    let begun = Stopwatch::start();
    while !done(publisher) {
        assert!(begun.elapsed() < 20 * SECOND, "it never happened");
        publisher.serve_for(Duration::from_millis(1)).unwrap();
    }
}

#[test]
fn a_published_buffer_stays_where_it_is_and_is_withheld_while_a_device_works_on_it() {
    let limit = Duration::from_millis(100);
    let busy = |error: ShareError| match error {
        ShareError::DeviceBusy { name, limit: told } => {
            assert_eq!((name.as_str(), told), ("frames", limit));
        }
        other => panic!("{other}"),
    };
    let card = modules::vgem();
    let mut publisher = Publisher::new().unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).unwrap();
    let subscriber = Subscriber::new(theirs).unwrap();
    let backing = Copied::new(|_| udmabuf::export("memory", MIB)).unwrap();
    let id = publisher.publish("frames", backing).unwrap();
    serve(&mut publisher, |publisher| publisher.accepted(id) == 1);

    // The subscriber returns the lease at once. The device's work goes on.
    let bytes = random(MIB);
    let lease = subscriber.buffer("frames").unwrap();
    put(&lease.whole(), &bytes);
    let attached = DrmImporter::new(&card).attach(&lease.whole()).unwrap();
    let work = Work::begin(&card, attached.handle().into(), false);
    drop((attached, lease));
    let begun = Instant::now();
    busy(publisher.migrate(id, limit).unwrap_err());
    assert!((limit..5 * SECOND).contains(&begun.elapsed()));
    assert_eq!(publisher.generation(id), Some(1));
    // The subscriber has returned the buffer and stays connected, and nobody gets the buffer.
    publisher.serve_for(limit).unwrap();
    assert_eq!(
        (publisher.holders(id), publisher.subscribers().count()),
        (0, 1)
    );
    let nobody = subscriber.buffer_within("frames", limit);
    assert!(
        matches!(nobody, Err(ShareError::TimedOut { .. })),
        "{nobody:?}"
    );

    work.end();
    assert_eq!(publisher.migrate(id, SECOND).unwrap().generation, 2);
    serve(&mut publisher, |publisher| publisher.accepted(id) == 1);
    let lease = subscriber.buffer("frames").unwrap();
    assert_eq!(lease.generation(), 2);
    assert!(get(&lease.whole()) == bytes);

    // A withdrawal waits for the device, too, also after the subscriber has gone.
    let attached = DrmImporter::new(&card).attach(&lease.whole()).unwrap();
    let work = Work::begin(&card, attached.handle().into(), true);
    drop((attached, lease, subscriber));
    busy(publisher.withdraw(id, limit).unwrap_err());
    assert!(publisher.buffer(id).is_some());
    work.end();
    publisher.withdraw(id, SECOND).unwrap();
    assert!(publisher.buffer(id).is_none());
}

#[test]
fn the_processors_access_begins_when_the_device_is_done() {
    let card = modules::vgem();
    let buffer = udmabuf::export("memory", 4096).unwrap();
    let attached = DrmImporter::new(&card).attach(&buffer.whole()).unwrap();
    let work = Work::begin(&card, attached.handle().into(), true);
    let pause = Duration::from_millis(100);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(pause);
            work.end();
        });
        let mut mapping = buffer.whole().map(Access::Read).unwrap();
        mapping.begin_cpu_access(Access::Read).unwrap();
        assert!(begun.elapsed() >= pause);
    });
}

const WIDTH: u32 = 320;
const HEIGHT: u32 = 180;

/// vivid's capture device, which draws only the 100 % colour bar.
fn camera() -> VideoDevice {
    let mut camera = VideoDevice::open(modules::vivid_node()).unwrap();
    let format = camera.set_format(WIDTH, HEIGHT, *b"RGB3").unwrap();
    assert_eq!(
        (format.width, format.height, &format.fourcc),
        (WIDTH, HEIGHT, b"RGB3")
    );
    let base = 0x00f0_0000 | 0xf000;
    camera.set_control(base, 1).unwrap(); // the test pattern
    camera.set_control(base + 1, 2).unwrap(); // no text over it
    camera
}

/// True if the bytes are a picture of the colour bar: eight bars, from white to black.
fn check_bars(picture: &[u8], bytes_per_line: usize) {
    let line = &picture[..bytes_per_line];
    for other in picture.chunks(bytes_per_line).take(HEIGHT as usize) {
        assert!(other == line, "the lines differ");
    }
    let bars = [
        [255, 255, 255],
        [255, 255, 0],
        [0, 255, 255],
        [0, 255, 0],
        [255, 0, 255],
        [255, 0, 0],
        [0, 0, 255],
        [0, 0, 0],
    ];
    for (bar, colour) in bars.iter().enumerate() {
        // The middle of each bar, because a bar may be a pixel wider or narrower.
        let x = (bar * 2 + 1) * WIDTH as usize / 16;
        assert_eq!(&line[x * 3..x * 3 + 3], colour, "bar {bar}");
    }
}

#[test]
fn a_camera_captures_straight_into_a_udmabuf() {
    let camera = camera();
    let format = camera.format().unwrap();
    let size = u64::from(format.size).next_multiple_of(4096);
    let buffers = [
        udmabuf::export("one", size).unwrap(),
        udmabuf::export("two", size).unwrap(),
    ];
    for buffer in &buffers {
        put(&buffer.whole(), &vec![0xaa; size as usize]);
    }
    let ranges = buffers.each_ref().map(Buffer::whole);
    let capture = v4l2::attach(&camera, &ranges).unwrap();
    assert_eq!(capture.plan(0).unwrap().path, Path::SharedHostMemory);
    capture.give(0).unwrap();
    capture.give(1).unwrap();
    capture.start().unwrap();
    for sequence in 0..4 {
        let picture = capture.next(5 * SECOND).unwrap();
        assert!(picture.sequence >= sequence);
        assert_eq!(picture.bytes, format.size);
        let bytes = get(&ranges[picture.index]);
        check_bars(
            &bytes[..format.size as usize],
            format.bytes_per_line as usize,
        );
        assert!(
            bytes[format.size as usize..]
                .iter()
                .all(|&byte| byte == 0xaa)
        );
        capture.give(picture.index).unwrap();
    }
    capture.stop().unwrap();
    let error = capture.next(Duration::from_millis(50)).unwrap_err();
    assert!(error.to_string().contains("VIDIOC_DQBUF"), "{error}");
    // The device has one queue, and a second queue would take the buffers of the first.
    let error = v4l2::attach(&camera, &ranges).unwrap_err();
    assert!(error.to_string().contains("EBUSY"), "{error}");
    drop(capture);
    assert!(v4l2::attach(&camera, &ranges).is_ok());
}

/// A descriptor of another library, which a program that is executed would inherit.
fn imported(buffer: &Buffer) -> Buffer {
    let dmabuf = buffer.dmabuf().unwrap().as_fd();
    let fd = rustix::io::dup(dmabuf).unwrap();
    let imported = Buffer::import(fd).unwrap();
    let flags = rustix::io::fcntl_getfd(imported.dmabuf().unwrap()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    imported
}

#[test]
fn of_a_foreign_buffer_is_known_what_the_kernel_says() {
    let card = modules::vgem();
    let heap = heap::Heap::open("system").unwrap();
    let camera = camera();
    let capture = peerbuf::export::v4l2::export(&camera, 1).unwrap();
    let cases = [
        (udmabuf::export("weights", MIB).unwrap(), Kind::Udmabuf),
        (heap.export("frames", MIB).unwrap(), Kind::Heap),
        (capture.buffers()[0].clone(), Kind::V4l2),
        (drm::export(&card, "surface", MIB).unwrap(), Kind::Other),
    ];
    for (buffer, kind) in cases {
        let foreign = imported(&buffer);
        assert_eq!(foreign.provenance().kind, kind, "{foreign}");
        assert_eq!(foreign.provenance().device, None, "{foreign}");
        assert_eq!(foreign.size(), buffer.size());
        let exporter = foreign.dmabuf().unwrap().exporter();
        let inode = foreign.dmabuf().unwrap().identity().inode();
        match buffer.dmabuf().unwrap().info().unwrap().name.as_str() {
            "" => assert_eq!(foreign.name(), format!("dma-buf {inode} of {exporter}")),
            name => assert_eq!(foreign.name(), name),
        }
        let bytes = random(4096);
        put(&foreign.range(4096, 4096).unwrap(), &bytes);
        assert!(
            get(&buffer.range(4096, 4096).unwrap()) == bytes,
            "{foreign}"
        );
    }
}

#[test]
fn a_cameras_own_memory_is_a_buffer_like_any_other() {
    let camera = camera();
    let format = camera.format().unwrap();
    let capture = peerbuf::export::v4l2::export(&camera, 2).unwrap();
    let picture = capture.one(5 * SECOND).unwrap();
    let buffers = capture.buffers().to_vec();
    let bytes = get(&buffers[picture.index].whole());
    check_bars(
        &bytes[..format.size as usize],
        format.bytes_per_line as usize,
    );
    assert_eq!(buffers[0].provenance().kind, Kind::V4l2);
    // The buffers outlive the capture and the device.
    drop(capture);
    drop(camera);
    assert!(get(&buffers[picture.index].whole()) == bytes);
}

#[test]
fn a_camera_says_which_buffers_it_cannot_use() {
    let camera = camera();
    let size = u64::from(camera.format().unwrap().size).next_multiple_of(4096);
    let good = udmabuf::export("memory", size + 4096).unwrap();
    let memory = memfd::export("memory", size).unwrap();
    let cases = [
        (good.range(4096, size).unwrap(), ReasonCode::NotWhole),
        (good.range(0, 4096).unwrap(), ReasonCode::TooSmall),
        (memory.whole(), ReasonCode::NoDmaBuf),
    ];
    for (range, expected) in cases {
        match v4l2::attach(&camera, &[range]) {
            Err(ImportError::Impossible { code, .. }) => assert_eq!(code, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn no_descriptor_is_left_behind() {
    let card = modules::vgem();
    let camera = camera();
    let size = u64::from(camera.format().unwrap().size).next_multiple_of(4096);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for _ in 0..3 {
        let buffer = udmabuf::export("memory", size).unwrap();
        let attached = DrmImporter::new(&card).attach(&buffer.whole()).unwrap();
        attached.map(Access::Read).unwrap();
        v4l2::attach(&camera, &[buffer.whole()])
            .unwrap()
            .one(5 * SECOND)
            .unwrap();
        peerbuf::export::v4l2::export(&camera, 1)
            .unwrap()
            .one(5 * SECOND)
            .unwrap();
        let surface = drm::export(&card, "surface", MIB).unwrap();
        assert!(DmaBuf::from_fd(surface.dmabuf().unwrap().try_clone().unwrap().into()).is_ok());
        heap::probe().unwrap()[0].export("frames", 4096).unwrap();
    }
    assert_eq!(open(), before);
    assert!(card.as_fd().as_raw_fd() >= 0);
}

#[test]
fn a_range_of_a_graphics_buffer_maps_its_own_bytes_and_not_the_first_ones() {
    let card = modules::vgem();
    let buffer = drm::export(&card, "surface", 65536).unwrap();
    let bytes = random(65536);
    put(&buffer.whole(), &bytes);
    let attached = DrmImporter::new(&card);
    for (offset, length) in [(0, 4096), (4096, 8192), (12345, 100), (61440, 4096)] {
        let range = buffer.range(offset, length).unwrap();
        let expected = &bytes[offset as usize..][..length as usize];
        assert!(get(&range) == expected, "{length} bytes at {offset}");
        // The driver's mapping has the same bytes.
        let attachment = attached.attach(&range).unwrap();
        let mut mapping = attachment.map(Access::Read).unwrap();
        let mut seen = vec![0; length as usize];
        let cpu = mapping.begin_cpu_access(Access::Read).unwrap();
        cpu.read_at(0, &mut seen).unwrap();
        assert!(seen == expected, "{length} bytes at {offset} by the driver");
    }
}

/// The documentation of [`Grant::ReadOnly`] is true: the descriptor refuses writes, the same user opens the file
/// again for writing through `/proc`, and `/dev/udmabuf`, which checks seals and not modes, makes a writable
/// dma-buf of the memfd.
#[test]
fn memory_that_is_lent_for_reading_is_written_through_udmabuf_and_proc_alone() {
    use rustix::fs::{FallocateFlags, SealFlags};
    use rustix::io::Errno;
    let (ours, theirs) = Channel::pair().unwrap();
    let policy = |_: &Peer, _: &str, _: &Buffer| Grant::ReadOnly;
    let mut publisher = Publisher::new().unwrap().with_policy(policy);
    publisher.add(ours).unwrap();
    let memory = Copied::new(|_| memfd::export("shown", MIB)).unwrap();
    let id = publisher.publish("shown", memory).unwrap();
    let subscriber = Subscriber::new(theirs).unwrap();
    let shown = loop {
        publisher.serve_for(Duration::from_millis(5)).unwrap();
        match subscriber.buffer_within("shown", Duration::ZERO) {
            Ok(lease) => break lease,
            Err(ShareError::TimedOut { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    };
    let fd = shown.host_memory().unwrap();
    let refused = shown.whole().map(Access::ReadWrite).unwrap_err();
    assert!(matches!(refused, BufferError::Access { .. }), "{refused}");
    assert_eq!(rustix::io::pwrite(fd, &[1], 0), Err(Errno::BADF));
    assert_eq!(rustix::fs::ftruncate(fd, 2 * MIB), Err(Errno::INVAL));
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(fd, hole, 0, 4096), Err(Errno::BADF));
    let seal = SealFlags::WRITE;
    assert_eq!(rustix::fs::fcntl_add_seals(fd, seal), Err(Errno::PERM));
    let published = |publisher: &Publisher| get(&publisher.buffer(id).unwrap().whole());
    assert!(published(&publisher).iter().all(|byte| *byte == 0));
    // If a later kernel refuses one of these, the documentation of `peerbuf::share` must say so.
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let opened = std::fs::File::options().write(true).open(link).unwrap();
    opened.write_all_at(&[5; 4096], 4096).unwrap();
    assert_eq!(published(&publisher)[4096..8192], [5; 4096]);
    let again = udmabuf::export_list("written", &[shown.whole()]).unwrap();
    put(&again.range(0, 4096).unwrap(), &[7; 4096]);
    assert_eq!(published(&publisher)[..4096], [7; 4096]);
}

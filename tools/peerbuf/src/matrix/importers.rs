//! The columns: everything on this machine that uses buffers, and how its bytes are checked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use peerbuf::device::drm::{Card, cards};
use peerbuf::device::edu::{self, CHUNK, Edu};
use peerbuf::device::v4l2::{self as video, VideoDevice};
use peerbuf::error::{
    BufferError, ImportError, ProbeError, SystemError, TransferError, Unavailable,
};
use peerbuf::import::drm::DrmImporter;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::import::iommufd::{self, AddressSpace};
use peerbuf::import::probe::{self, Options, Probe, Route};
use peerbuf::import::vfio::VfioImporter;
use peerbuf::import::{cpu, v4l2};
use peerbuf::plan::topology::{PciAddress, Sysfs};
use peerbuf::plan::{Plan, ReasonCode};
use peerbuf::{Access, Buffer};

use super::Missing;

/// Lets the importer use a buffer.
type Meet = dyn FnMut(&Buffer) -> Result<Met, Refusal>;

/// The columns of one kind.
type Found = Result<Vec<Importer>, Unavailable>;

/// One column.
pub struct Importer {
    pub name: String,
    pub meet: Box<Meet>,
}

/// The two go together.
pub struct Met {
    pub plan: Plan,
    /// Whether the bytes were right; `None` when none could be moved.
    pub bytes: Option<bool>,
}

/// They do not, or something else is wrong.
pub enum Refusal {
    Impossible(ReasonCode, String),
    Failed(String),
}

impl From<ImportError> for Refusal {
    fn from(error: ImportError) -> Refusal {
        match error {
            ImportError::Impossible { code, evidence, .. } => Refusal::Impossible(code, evidence),
            other => Refusal::Failed(other.to_string()),
        }
    }
}

macro_rules! fails {
    ($($error:ty),*) => {$(
        impl From<$error> for Refusal {
            fn from(error: $error) -> Refusal {
                Refusal::Failed(error.to_string())
            }
        }
    )*};
}

fails!(BufferError, SystemError, TransferError, std::io::Error);

/// All that there are. Files are made in `directory`.
pub fn all(directory: &Path, missing: &mut Vec<Missing>) -> Vec<Importer> {
    let mut columns = vec![
        Importer {
            name: "CPU".into(),
            meet: Box::new(processor),
        },
        {
            let directory = directory.to_owned();
            Importer {
                name: "file".into(),
                meet: Box::new(move |buffer| file(buffer, &directory)),
            }
        },
    ];
    let kinds: [fn() -> Found; 5] = [
        graphics,
        || {
            open_vivid()?;
            Ok(vec![Importer {
                name: "V4L2 vivid".into(),
                meet: Box::new(camera),
            }])
        },
        || {
            let mut edu = Edu::open(edu::probe()?)?;
            Ok(vec![Importer {
                name: "VFIO edu".into(),
                meet: Box::new(move |buffer| driven(buffer, &mut edu)),
            }])
        },
        disk_driver,
        || {
            iommufd::probe()?;
            Ok(vec![Importer {
                name: "iommufd".into(),
                meet: Box::new(address_space),
            }])
        },
    ];
    for kind in kinds {
        match kind() {
            Ok(found) => columns.extend(found),
            Err(error) => missing.push(error.into()),
        }
    }
    columns
}

fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

fn processor(buffer: &Buffer) -> Result<Met, Refusal> {
    let bytes = random(buffer.size());
    let mut attachment = cpu::attach(&buffer.whole(), Access::ReadWrite)?;
    let mut access = attachment.mapping().begin_cpu_access(Access::Write)?;
    access.write_at(0, &bytes)?;
    access.end()?;
    Ok(Met {
        plan: attachment.plan(),
        bytes: Some(buffer.whole().to_vec()? == bytes),
    })
}

/// From a file into the buffer, and from the buffer into another file.
fn file(buffer: &Buffer, directory: &Path) -> Result<Met, Refusal> {
    let range = buffer.whole();
    let (first, second) = (unnamed_file(directory)?, unnamed_file(directory)?);
    let bytes = random(range.len());
    first.write_all_at(&bytes, 0)?;
    first.sync_data()?;
    let (reader, writer) = (open(&first)?, open(&second)?);
    let read = reader.attach(&range)?.read(0)?;
    let mut right = range.to_vec()? == bytes;

    let bytes = random(range.len());
    range.write_bytes(&bytes)?;
    let written = writer.attach(&range)?.write(0)?;
    writer.sync()?;
    let mut found = vec![0; bytes.len()];
    second.read_exact_at(&mut found, 0)?;
    right &= found == bytes;
    // The worse of the two, which is the same almost everywhere.
    let plan = if written.plan.path < read.plan.path {
        written.plan
    } else {
        read.plan
    };
    Ok(Met {
        plan,
        bytes: Some(right),
    })
}

fn graphics() -> Found {
    let mut columns = Vec::new();
    for node in cards()? {
        let card = Card::open(node)?;
        let importer = DrmImporter::new(&card);
        columns.push(Importer {
            name: format!("DRM {}", card.driver()),
            meet: Box::new(move |buffer| surface(buffer, &importer)),
        });
    }
    Ok(columns)
}

/// Both ways through the GEM handle.
fn surface(buffer: &Buffer, importer: &DrmImporter) -> Result<Met, Refusal> {
    let bytes = random(buffer.size());
    buffer.whole().write_bytes(&bytes)?;
    let attachment = importer.attach(&buffer.whole())?;
    let mut mapping = attachment.map(Access::ReadWrite)?;
    let mut access = mapping.begin_cpu_access(Access::ReadWrite)?;
    let mut found = vec![0; bytes.len()];
    access.read_at(0, &mut found)?;
    let mut right = found == bytes;
    let bytes = random(buffer.size());
    access.write_at(0, &bytes)?;
    access.end()?;
    right &= buffer.whole().to_vec()? == bytes;
    Ok(Met {
        plan: attachment.plan(),
        bytes: Some(right),
    })
}

/// vivid's controls (drivers/media/test-drivers/vivid/vivid-ctrls.c): the test pattern, of which 1
/// is the colour bar, and the text over it, of which 2 is none.
const VIVID_CONTROLS: [(u32, i32); 2] = [(0x00f0_f000, 1), (0x00f0_f001, 2)];

/// vivid's capture device, set to a picture that is always the same.
pub fn open_vivid() -> Result<VideoDevice, Unavailable> {
    let found: Vec<PathBuf> = video::devices()?;
    let mut devices = found.iter().filter_map(|node| VideoDevice::open(node).ok());
    let missing = |cause| Unavailable {
        what: "V4L2",
        cause,
        remedy: "`modprobe vivid`: of other devices it is not known what they see".into(),
    };
    let mut device = devices
        .find(|device| device.driver() == "vivid")
        .ok_or_else(|| {
            missing(SystemError {
                call: "open",
                object: "a capture device of vivid".into(),
                errno: peerbuf::Errno::NODEV,
            })
        })?;
    device.set_format(320, 180, *b"RGB3").map_err(missing)?;
    for (control, value) in VIVID_CONTROLS {
        device.set_control(control, value).map_err(missing)?;
    }
    Ok(device)
}

/// The device captures into the buffer what it also captures into memory of its own.
fn camera(buffer: &Buffer) -> Result<Met, Refusal> {
    const LIMIT: Duration = Duration::from_secs(5);
    const FILL: u8 = 0xaa;
    let mut device = open_vivid().map_err(|error| Refusal::Failed(error.to_string()))?;
    let size = device.format()?.size as usize;
    let whole = buffer.whole();
    whole.write_bytes(&vec![FILL; whole.len() as usize])?;
    let plan = {
        let ranges = [whole.clone()];
        let attachment = v4l2::attach(&mut device, &ranges)?;
        attachment.one(LIMIT)?;
        attachment.plan(0)
    };
    let found = whole.to_vec()?;
    let own = peerbuf::export::v4l2::export(&mut device, 2);
    let own = own.map_err(|error| Refusal::Failed(error.to_string()))?;
    let picture = own.one(LIMIT)?;
    let expected = own.buffers()[picture.index].whole().to_vec()?;
    let right = found[..size] == expected[..size]
        && found[size..].iter().all(|&byte| byte == FILL)
        // A picture of one colour would prove little.
        && expected[..size].windows(3).any(|pixel| pixel[0] != pixel[2]);
    Ok(Met {
        plan: plan.ok_or_else(|| Refusal::Failed("there is no plan".into()))?,
        bytes: Some(right),
    })
}

/// The device reads from one place of the buffer and writes to another.
fn driven(buffer: &Buffer, edu: &mut Edu) -> Result<Met, Refusal> {
    let range = buffer.range(0, 4 * CHUNK)?;
    let bytes = random(CHUNK);
    range.write_bytes(&vec![0; range.len() as usize])?;
    range.write_bytes(&bytes)?;
    let attachment = VfioImporter::new(edu.device()).attach(&range, 1 << 20)?;
    edu.copy(attachment.iova(), attachment.iova() + 2 * CHUNK)?;
    let found = range.to_vec()?;
    let part = |number: usize| &found[number * CHUNK as usize..][..CHUNK as usize];
    let untouched = |number| part(number).iter().all(|&byte| byte == 0);
    let right = part(0) == bytes && untouched(1) && part(2) == bytes && untouched(3);
    Ok(Met {
        plan: attachment.plan(),
        bytes: Some(right),
    })
}

/// peerbuf.ko's importer, as the driver of the first NVMe disk.
fn disk_driver() -> Found {
    let nodev = |object: &str, remedy: &str| Unavailable {
        what: "peerbuf.ko's importer",
        cause: SystemError {
            call: "open",
            object: object.into(),
            errno: peerbuf::Errno::NODEV,
        },
        remedy: remedy.into(),
    };
    let probe = Probe::open().map_err(|error| match error {
        ProbeError::Unavailable { cause, remedy } => Unavailable {
            what: "peerbuf.ko's importer",
            cause,
            remedy: remedy.into(),
        },
        other => nodev(probe::NODE, &other.to_string()),
    })?;
    let disks = Sysfs::default().block_devices();
    let disk = disks.iter().find(|disk| disk.name.starts_with("nvme"));
    let function = disk.and_then(|disk| disk.functions.first().copied());
    let function = function.ok_or_else(|| {
        let remedy = "it asks on behalf of an NVMe disk, and there is none";
        nodev("an NVMe disk", remedy)
    })?;
    Ok(vec![Importer {
        name: "probe as NVMe driver".into(),
        meet: Box::new(move |buffer| asked(buffer, &probe, function)),
    }])
}

/// What the kernel would give the driver; no byte moves.
fn asked(buffer: &Buffer, probe: &Probe, device: PciAddress) -> Result<Met, Refusal> {
    let Some(dmabuf) = buffer.dmabuf() else {
        let evidence = "it is memory alone, without a dma-buf over it".into();
        return Err(Refusal::Impossible(ReasonCode::NoDmaBuf, evidence));
    };
    let refused =
        |error: ProbeError| Refusal::Impossible(ReasonCode::KernelRefused, error.to_string());
    let attachment = probe
        .attach(dmabuf, device, Options::default())
        .map_err(refused)?;
    let mapping = attachment
        .map(probe::Direction::Bidirectional)
        .map_err(refused)?;
    let path = match mapping.route() {
        Route::BusAddress | Route::HostBridge => peerbuf::plan::Path::PeerToPeer,
        Route::System => peerbuf::plan::Path::SharedHostMemory,
        _ => return Err(Refusal::Failed(format!("{mapping:?}"))),
    };
    let reasons = Vec::new();
    let plan = Plan { path, reasons };
    Ok(Met { plan, bytes: None })
}

/// Without a device in it, an address space moves no bytes.
fn address_space(buffer: &Buffer) -> Result<Met, Refusal> {
    let attachment = AddressSpace::open()?.attach(&buffer.whole(), 1 << 20)?;
    Ok(Met {
        plan: attachment.plan(),
        bytes: None,
    })
}

fn open(file: &File) -> Result<FileImporter, Refusal> {
    Ok(FileImporter::from_fd(file.try_clone()?.into(), "a file")?)
}

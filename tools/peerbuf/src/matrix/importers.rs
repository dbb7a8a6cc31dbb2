//! The columns: every importer on this machine, and the check of its bytes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peerbuf::Buffer;
use peerbuf::buffer::BufferRange;
use peerbuf::device::drm::{Card, cards};
use peerbuf::device::edu::{self, CHUNK, Edu};
use peerbuf::device::v4l2::{self as video, VideoDevice};
use peerbuf::device::vulkan::Device;
use peerbuf::error::{BufferError, ImportError, ProbeError, SystemError, Unavailable};
use peerbuf::export::memfd;
use peerbuf::import::cpu::Processor;
use peerbuf::import::drm::DrmImporter;
use peerbuf::import::file::Scratch;
use peerbuf::import::gpu::{self, GpuImporter, Runtime};
use peerbuf::import::iommufd::AddressSpace;
use peerbuf::import::probe::{self, OnBehalf, Options, Probe};
use peerbuf::import::vfio::{self, VfioImporter};
use peerbuf::import::vulkan::VulkanImporter;
use peerbuf::import::{Attached, Importer, v4l2};
use peerbuf::plan::topology::Sysfs;
use peerbuf::plan::{Plan, ReasonCode};

use super::Missing;

/// The columns of one kind.
type Found = Result<Vec<Column>, Unavailable>;

/// One column.
pub struct Column {
    pub name: String,
    by: By,
}

/// How the test exchanges bytes with an importer.
enum By {
    /// By reads and writes of at most this many bytes.
    Importer(Box<dyn Importer>, u64),
    /// A device that writes its own pictures, not given bytes.
    Camera,
}

impl Column {
    fn new(name: impl Into<String>, importer: impl Importer + 'static) -> Column {
        Column {
            name: name.into(),
            by: By::Importer(Box::new(importer), u64::MAX),
        }
    }

    /// Lets the importer use a buffer.
    pub fn meet(&self, buffer: &Buffer) -> Result<Met, Refusal> {
        match &self.by {
            By::Importer(importer, longest) => exchange(&**importer, *longest, buffer),
            By::Camera => camera(buffer),
        }
    }
}

/// The importer can use the buffer.
pub struct Met {
    pub plan: Plan,
    /// True if the bytes were correct; `None` if no bytes could be moved.
    pub bytes: Option<bool>,
}

/// The importer cannot use the buffer, or failed.
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

fails!(BufferError, SystemError);

/// All importers. Temporary files are made in `directory`.
pub fn all(directory: &Path, missing: &mut Vec<Missing>) -> Vec<Column> {
    let mut columns = vec![
        Column::new("CPU", Processor),
        Column::new("file", Scratch::new(directory)),
    ];
    let kinds: [fn() -> Found; 7] = [
        graphics,
        gpus,
        vulkan,
        || {
            open_vivid()?;
            Ok(vec![Column {
                name: "V4L2 vivid".into(),
                by: By::Camera,
            }])
        },
        || {
            let edu = Mutex::new(Edu::open(edu::probe()?)?);
            let own = memfd::export("the other side", CHUNK);
            let own = own.map_err(|error| lacking("VFIO", "memory", &error.to_string()))?;
            let importer = Box::new(Driven {
                edu: Arc::new(edu),
                own: own.whole(),
            });
            Ok(vec![Column {
                name: "VFIO edu".into(),
                by: By::Importer(importer, CHUNK),
            }])
        },
        disk_driver,
        || {
            let space = AddressSpace::open().map_err(|error| match error {
                ImportError::Unavailable(error) => error,
                other => lacking("iommufd", "/dev/iommu", &other.to_string()),
            })?;
            Ok(vec![Column::new("iommufd", space)])
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

/// Writes bytes into the buffer, reads them back, and checks that no other bytes changed.
fn exchange(importer: &dyn Importer, longest: u64, buffer: &Buffer) -> Result<Met, Refusal> {
    let length = buffer.size().min(longest);
    let (range, rest) = (
        buffer.range(0, length)?,
        buffer.range(length, buffer.size() - length)?,
    );
    let mut attached = importer.attach(&range)?;
    rest.write_bytes(&vec![0; rest.len() as usize])?;
    let bytes = random(length);
    let Some(written) = attached.write(&bytes)? else {
        return Ok(Met {
            plan: attached.plan(),
            bytes: None,
        });
    };
    let mut right = range.to_vec()? == bytes;
    right &= rest.to_vec()?.iter().all(|&byte| byte == 0);

    let bytes = random(length);
    range.write_bytes(&bytes)?;
    let mut found = vec![0; bytes.len()];
    let read = attached.read(&mut found)?;
    right &= found == bytes;
    // The worse of the two paths. They are almost always the same.
    let plan = match read {
        Some(read) if read.path < written.path => read,
        _ => written,
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
        let name = format!("DRM {}", card.driver());
        columns.push(Column::new(name, DrmImporter::new(&card)));
    }
    Ok(columns)
}

/// The GPU runtimes that have a device.
pub fn runtimes() -> Result<Vec<Runtime>, Unavailable> {
    let (mut found, mut lacking, mut libraries) = (Vec::new(), Vec::new(), Vec::new());
    for (runtime, devices) in gpu::probe() {
        match devices {
            Ok(0) => lacking.push(format!("{runtime}: it has no device")),
            Ok(_) => found.push(runtime),
            Err(why) => lacking.push(format!("{runtime}: {why}")),
        }
        libraries.push(runtime.library());
    }
    if found.is_empty() {
        let cause = SystemError::new("dlopen", libraries.join(", "), peerbuf::Errno::NOENT);
        let remedy = format!("a GPU's driver brings its runtime ({})", lacking.join("; "));
        return Err(Unavailable::new("GPU runtimes", cause, remedy));
    }
    Ok(found)
}

/// The first device of each runtime.
fn gpus() -> Found {
    let open = |runtime| {
        let importer = GpuImporter::open(runtime, 0)
            .map_err(|error| lacking("GPU runtimes", runtime.library(), &error.to_string()))?;
        Ok(Column::new(importer.name(), importer))
    };
    runtimes()?.into_iter().map(open).collect()
}

fn vulkan() -> Found {
    let devices = Device::all()?;
    let importers = devices.iter().map(VulkanImporter::new);
    Ok(importers
        .map(|importer| Column::new(importer.name(), importer))
        .collect())
}

/// vivid's controls (drivers/media/test-drivers/vivid/vivid-ctrls.c): the test pattern (1 is
/// the colour bar) and the text over it (2 is none).
const VIVID_CONTROLS: [(u32, i32); 2] = [(0x00f0_f000, 1), (0x00f0_f001, 2)];

/// vivid's capture device, set to a constant picture.
pub fn open_vivid() -> Result<VideoDevice, Unavailable> {
    let found: Vec<PathBuf> = video::devices()?;
    let mut devices = found.iter().filter_map(|node| VideoDevice::open(node).ok());
    let missing = |cause| {
        let remedy = "`modprobe vivid`: of other devices it is not known what they see";
        Unavailable::new("V4L2", cause, remedy)
    };
    let mut device = devices
        .find(|device| device.driver() == "vivid")
        .ok_or_else(|| {
            let object = "a capture device of vivid";
            missing(SystemError::new("open", object, peerbuf::Errno::NODEV))
        })?;
    device.set_format(320, 180, *b"RGB3").map_err(missing)?;
    for (control, value) in VIVID_CONTROLS {
        device.set_control(control, value).map_err(missing)?;
    }
    Ok(device)
}

/// Captures the same picture into the buffer and into the device's own memory, and compares
/// them.
fn camera(buffer: &Buffer) -> Result<Met, Refusal> {
    const LIMIT: Duration = Duration::from_secs(5);
    const FILL: u8 = 0xaa;
    let device = open_vivid().map_err(|error| Refusal::Failed(error.to_string()))?;
    let size = device.format()?.size as usize;
    let whole = buffer.whole();
    whole.write_bytes(&vec![FILL; whole.len() as usize])?;
    let plan = {
        let ranges = [whole.clone()];
        let attachment = v4l2::attach(&device, &ranges)?;
        attachment.one(LIMIT)?;
        attachment.plan(0)
    };
    let found = whole.to_vec()?;
    let own = peerbuf::export::v4l2::export(&device, 2);
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

/// An edu device, which copies between the range and memory of this process.
struct Driven {
    edu: Arc<Mutex<Edu>>,
    own: BufferRange,
}

impl Importer for Driven {
    fn name(&self) -> String {
        "edu".into()
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        let edu = self.edu.lock().unwrap_or_else(PoisonError::into_inner);
        let importer = VfioImporter::new(edu.device());
        Ok(Box::new(Driving {
            edu: Arc::clone(&self.edu),
            range: importer.attach(range, 1 << 20)?,
            memory: importer.attach(&self.own, 2 << 20)?,
            own: self.own.clone(),
        }))
    }
}

struct Driving {
    edu: Arc<Mutex<Edu>>,
    range: vfio::Attachment,
    memory: vfio::Attachment,
    own: BufferRange,
}

impl Driving {
    fn copy(&self, from: u64, to: u64) -> Result<Option<Plan>, ImportError> {
        let mut edu = self.edu.lock().unwrap_or_else(PoisonError::into_inner);
        edu.copy(from, to)?;
        Ok(Some(self.plan()))
    }
}

/// The device copies whole chunks; the range is one chunk.
impl Attached for Driving {
    fn plan(&self) -> Plan {
        self.range.plan()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        self.own.write_bytes(bytes)?;
        self.copy(self.memory.iova(), self.range.iova())
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        let plan = self.copy(self.range.iova(), self.memory.iova())?;
        self.own.read_bytes(into)?;
        Ok(plan)
    }
}

fn lacking(what: &'static str, object: &str, remedy: &str) -> Unavailable {
    let cause = SystemError::new("open", object, peerbuf::Errno::NODEV);
    Unavailable::new(what, cause, remedy)
}

const ASKED: &str = "peerbuf_probe.ko";

/// Asks the kernel for the mapping that the driver of the first NVMe disk would get.
fn disk_driver() -> Found {
    let probe = Probe::open().map_err(|error| match error {
        ProbeError::Unavailable { cause, remedy } => Unavailable::new(ASKED, cause, remedy),
        other => lacking(ASKED, probe::NODE, &other.to_string()),
    })?;
    let disks = Sysfs::default().block_devices();
    let disk = disks.iter().find(|disk| disk.name.starts_with("nvme"));
    let function = disk.and_then(|disk| disk.functions.first().copied());
    let function = function.ok_or_else(|| {
        let remedy = "it asks on behalf of an NVMe disk, and there is none";
        lacking(ASKED, "an NVMe disk", remedy)
    })?;
    let driver = OnBehalf::new(probe, function, Options::default());
    Ok(vec![Column::new("probe as NVMe driver", driver)])
}

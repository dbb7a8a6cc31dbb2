//! QEMU's `edu` device, driven through VFIO: the smallest device with a DMA engine.
//!
//! The device proves by DMA that an attachment of [`import::vfio`](crate::import::vfio) works,
//! on any machine that can run a virtual machine. One command copies up to 4096 bytes between
//! the device's own buffer and an address below 256 MiB (QEMU, docs/specs/edu.rst).

use std::time::{Duration, Instant};

use super::vfio::{Registers, VfioDevice, devices};
use crate::errno::Errno;
use crate::error::{BufferError, SystemError, Unavailable};
use crate::topology::{PciAddress, Sysfs};

/// The device's PCI vendor and device id.
pub const ID: (u16, u16) = (0x1234, 0x11e8);
/// Maximum number of bytes of one DMA command.
pub const CHUNK: u64 = 4096;
/// The end of the addresses that the device reaches.
pub const REACH: u64 = 1 << 28;

const BUFFER: u64 = 0x40000;
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const START: u64 = 1;
const FROM_DEVICE: u64 = 2;

/// The first such device bound to `vfio-pci`.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn probe() -> Result<PciAddress, Unavailable> {
    let sysfs = Sysfs::default();
    let found = devices()?
        .into_iter()
        .find(|&device| sysfs.pci_id(device) == Some(ID));
    found.ok_or_else(|| Unavailable {
        what: "VFIO",
        cause: SystemError::new("open", "a device with a known DMA engine", Errno::NODEV),
        remedy: "bind QEMU's `edu` device (1234:11e8) to vfio-pci".into(),
    })
}

/// The device, ready for DMA.
#[derive(Debug)]
pub struct Edu {
    device: VfioDevice,
    registers: Registers,
}

impl Edu {
    /// Opens the device and enables its DMA.
    ///
    /// # Errors
    /// [`Unavailable`], with the obstacle.
    pub fn open(address: PciAddress) -> Result<Edu, Unavailable> {
        let unavailable = |cause| Unavailable {
            what: "VFIO",
            cause,
            remedy: "see the error".into(),
        };
        let device = VfioDevice::open(address)?;
        if Sysfs::default().pci_id(address) != Some(ID) {
            let call = "looking at the device's ids";
            return Err(unavailable(SystemError::new(
                call,
                address.to_string(),
                Errno::NODEV,
            )));
        }
        device.enable().map_err(unavailable)?;
        let registers = device.registers(0).map_err(unavailable)?;
        Ok(Edu { device, registers })
    }

    /// The device, for attaching buffers.
    pub fn device(&self) -> &VfioDevice {
        &self.device
    }

    /// Makes the device read [`CHUNK`] bytes at one I/O virtual address and write them to
    /// another.
    ///
    /// Success does not prove that the bytes arrived: the device gets no error for an unmapped address.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`] for an address beyond [`REACH`], [`BufferError::TimedOut`].
    pub fn copy(&mut self, from: u64, to: u64) -> Result<(), BufferError> {
        self.dma(from, BUFFER, 0)?;
        self.dma(BUFFER, to, FROM_DEVICE)
    }

    fn dma(&mut self, source: u64, target: u64, direction: u64) -> Result<(), BufferError> {
        // QEMU aborts the whole machine for an address outside of the device's own buffer. An
        // address above the device's address lines reaches other memory.
        let memory = if direction == 0 { source } else { target };
        if memory.checked_add(CHUNK).is_none_or(|end| end > REACH) {
            return Err(BufferError::OutOfRange {
                object: "what an edu device reaches".into(),
                offset: memory,
                length: CHUNK,
                size: REACH,
            });
        }
        self.registers.write(SOURCE, source)?;
        self.registers.write(TARGET, target)?;
        self.registers.write(COUNT, CHUNK)?;
        self.registers.write(COMMAND, START | direction)?;
        let (begun, limit) = (Instant::now(), Duration::from_secs(10));
        while self.registers.read::<u64>(COMMAND)? & START != 0 {
            if begun.elapsed() > limit {
                let object = "an edu device's DMA".into();
                return Err(BufferError::TimedOut { object, limit });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

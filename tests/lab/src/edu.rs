//! QEMU's `edu` device, driven through VFIO: the smallest device with a DMA engine. It copies up
//! to 4096 bytes between a buffer of its own and an address below 256 MiB (QEMU's
//! docs/specs/edu.rst).

use std::time::{Duration, Instant};

use peerbuf::device::vfio::{Registers, VfioDevice};

use crate::modules;

/// How much it copies at once.
pub const CHUNK: u64 = 4096;

const BUFFER: u64 = 0x40000;
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const START: u64 = 1;
const FROM_DEVICE: u64 = 2;

/// The device, ready for DMA.
pub struct Edu {
    /// The open device.
    pub device: VfioDevice,
    registers: Registers,
}

impl Edu {
    /// Gives the device to vfio-pci and opens it.
    pub fn open() -> Edu {
        modules::load("vfio-pci");
        let bdf = modules::find_pci(0x1234, 0x11e8);
        modules::rebind(&bdf, "vfio-pci");
        let device = VfioDevice::open(bdf.parse().unwrap()).unwrap();
        device.enable().unwrap();
        let registers = device.registers(0).unwrap();
        Edu { device, registers }
    }

    /// Has the device read [`CHUNK`] bytes at an address of its own and write them to another.
    pub fn copy(&mut self, from: u64, to: u64) {
        self.dma(from, BUFFER, 0);
        self.dma(BUFFER, to, FROM_DEVICE);
    }

    fn dma(&mut self, source: u64, target: u64, direction: u64) {
        // Outside of its buffer and its address lines QEMU would give up the whole machine.
        let memory = if direction == 0 { source } else { target };
        assert!(memory + CHUNK <= 1 << 28);
        for (register, value) in [
            (SOURCE, source),
            (TARGET, target),
            (COUNT, CHUNK),
            (COMMAND, START | direction),
        ] {
            self.registers.write(register, value).unwrap();
        }
        let begun = Instant::now();
        while self.registers.read::<u64>(COMMAND).unwrap() & START != 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "no end of DMA");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

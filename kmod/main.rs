// SPDX-License-Identifier: GPL-2.0

//! peerbuf.ko: a dma-buf exporter for PCI BARs.
//!
//! A peer device can do DMA to a BAR only through a driver that exports the BAR as a dma-buf
//! (<https://docs.kernel.org/driver-api/dma-buf.html>), and few drivers do. This driver exports regions of
//! the BARs of any PCI device, and memory of a P2PDMA provider that another driver owns
//! (<https://docs.kernel.org/driver-api/pci/p2pdma.html>). The test importer is a separate module,
//! `probe.rs`.
//!
//! The driver has an empty id table. An administrator binds a device to it as to `vfio-pci`:
//!
//! ```sh
//! echo peerbuf > /sys/bus/pci/devices/$BDF/driver_override
//! echo $BDF > /sys/bus/pci/drivers_probe
//! ```
//!
//! # Modules
//!
//! A module uses only modules on the lines below its own:
//!
//! ```text
//! main       PCI driver, module init
//! provider   exports P2PDMA memory of other drivers
//! node       the device's misc device and its ioctls
//! watch      eventfds, queries, debugfs
//! reset      revokes around PCI resets and errors, restores after them
//! devices    list of all devices
//! binding    all exports of a device: export, revoke, removal
//! exporter   the dma-buf operations (`struct dma_buf_ops`), page faults
//! revoke     revoke and restore of one buffer
//! moves      copies a buffer's bytes between its BAR and system memory
//! buffer     the object behind a dma-buf; its state, under the reservation lock
//! mapping    scatter tables for importers (`struct sg_table`)
//! device     a PCI device's BARs and the list of its exports
//! bar        one BAR                          pieces    placement of a buffer's bytes
//! pages      struct pages of a BAR            pool      chunks of a provider's pool
//! peers      cache of peer-to-peer routes     region    allocator of one BAR
//! system     system pages                     fences    snapshot of a reservation object
//! counters   statistics                       watchers  eventfds of one buffer
//! wait       time limits                      abi       ioctl numbers and structs
//! common     PCI lookup, dma-buf references   misc      misc devices, ioctl arguments
//! ffi        what `kernel::bindings` lacks    compat    differences between kernel versions
//! ```
//!
//! Read `buffer.rs` first, then `exporter.rs` and `moves.rs`.
//!
//! # Lock order
//!
//! Outermost first. The driver core holds the device lock (`device_lock`) around probe and unbind, outside
//! all of these:
//!
//! 1. `misc_mtx` of the misc core, held while a node is opened or deregistered; the list in `devices.rs`;
//! 2. `Device::state`: the BARs' regions, the list of exports, the device's presence;
//! 3. `mmap_lock` of a process;
//! 4. the reservation lock of a dma-buf (`dma_resv`): guards all of `buffer::State`;
//! 5. the importers' own locks, taken in their callbacks; `i_mmap_rwsem`, taken to zap CPU mappings.
//!
//! - The module holds none of these locks while it waits for importers to unmap or for direct I/O to end, nor
//!   while a revoke waits for fences.
//! - A move waits for fences with the reservation lock held, as the kernel's own exporters do.
//! - The module holds neither of the first two locks while it waits for a reservation lock that another task
//!   holds: a slow buffer delays no other buffer.
//!
//! # Lifetimes
//!
//! An open file keeps the module loaded and the memory of `Device` allocated, but not the device bound. A
//! dma-buf uses its device's resources only with the reservation lock held and while it is not revoked.
//! Removal revokes every dma-buf of the device before it returns.

use kernel::{debugfs, device::Core, new_mutex, pci, prelude::*, sync::Mutex};

mod abi;
mod bar;
mod binding;
mod buffer;
mod common;
mod compat;
mod counters;
mod device;
mod devices;
mod exporter;
mod fences;
mod ffi;
mod mapping;
mod misc;
mod moves;
mod node;
mod pages;
mod peers;
mod pieces;
mod pool;
mod provider;
mod region;
mod reset;
mod revoke;
mod system;
mod wait;
mod watch;
mod watchers;

use binding::Binding;
use devices::Listed;
use node::Node;
use provider::Providers;

/// Resources of a bound device, dropped in this order.
struct Owned {
    /// First: no one can open the node any more.
    _node: Node,
    /// Second: resets no longer find the device. (None can run here: the driver core holds the device lock.)
    _listed: Listed,
    /// Last: revokes all exports and waits for importers and direct I/O.
    _device: Binding,
}

impl Owned {
    /// Binds a device in its probe.
    fn of(pdev: &pci::Device<Core<'_>>) -> Result<Self> {
        let device = Binding::new(pdev)?;
        let listed = Listed::new(device.device())?;
        reset::hear_of(device.device());
        let node = node::register(device.device())?;
        dev_info!(pdev, "/dev/peerbuf/{}\n", device.device().name());
        Ok(Self {
            _node: node,
            _listed: listed,
            _device: device,
        })
    }
}

/// Driver data of a bound device.
///
/// `unbind` drops `Owned`, because it waits for importers, and they need the device to have its driver, its
/// power and its IOMMU group. The driver core drops `Bound` only after `remove`, when `struct pci_dev` has no
/// driver any more. By then `owned` is `None`, unless the probe failed after it made `Owned`.
#[pin_data]
struct Bound {
    #[pin]
    owned: Mutex<Option<Owned>>,
}

struct Driver;

compat::pci_device_table!(
    ID_TABLE,
    <Driver as pci::Driver>::IdInfo,
    // The PCI adapter of Linux 7.2 indexes this table with 0 for a device bound by `driver_override`, so the
    // table needs an entry. This entry matches no device: a class has 24 bits, and the entry tests bit 24.
    [(pci::DeviceId::from_class(1 << 24, 1 << 24), ())]
);

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = Bound;

    const ID_TABLE: pci::IdTable<Self::IdInfo> = &ID_TABLE;

    fn probe<'bound>(
        pdev: &'bound pci::Device<Core<'_>>,
        _info: compat::IdInfo<'bound, Self::IdInfo>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        let owned = Owned::of(pdev);
        try_pin_init!(Bound {
            owned <- new_mutex!(Some(owned?)),
        })
    }

    fn unbind<'bound>(_pdev: &'bound pci::Device<Core<'_>>, this: Pin<&Self::Data<'bound>>) {
        // Drops the guard before `owned`: removal must not run under this lock.
        let owned = this.owned.lock().take();
        drop(owned);
    }
}

/// The module. Unloading drops its fields in this order.
#[pin_data]
struct Loaded {
    #[pin]
    _buffers: debugfs::File<()>,
    #[pin]
    _driver: kernel::driver::Registration<pci::Adapter<Driver>>,
    /// After the driver: no device is bound any more, and the list has only providers.
    _providers: Providers,
}

impl kernel::InPlaceModule for Loaded {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // SAFETY: `init` runs once, and everything that uses the list is registered below.
        unsafe { devices::init() };
        let debug = debugfs::Dir::new(c"peerbuf");
        try_pin_init!(Self {
            _buffers <- debug.read_callback_file(c"buffers", (), &watch::print_all),
            _providers: Providers::register()?,
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
        })
    }
}

module! {
    type: Loaded,
    name: "peerbuf",
    authors: ["The peerbuf authors"],
    description: "Exports regions of PCI BARs as dma-bufs",
    license: "GPL",
    imports_ns: ["DMA_BUF"],
    params: {
        device_vmap: u8 {
            default: 0,
            description: "1: the kernel may map device memory (vmap), and so keep a device from going away",
        },
    },
}

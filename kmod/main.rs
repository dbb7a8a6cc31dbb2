// SPDX-License-Identifier: GPL-2.0

//! peerbuf.ko: exports regions of PCI BARs as dma-bufs. (The importer to probe with is another module, see
//! `probe.rs`.)
//!
//! The driver has no ids of its own and takes a device the way `vfio-pci` does, when an
//! administrator says so:
//!
//! ```sh
//! echo peerbuf > /sys/bus/pci/devices/$BDF/driver_override
//! echo $BDF > /sys/bus/pci/drivers_probe
//! ```
//!
//! # Rooms
//!
//! Each uses those below it, and none above it:
//!
//! ```text
//! main         the driver and the module
//! provider     memory that another driver lends to peers
//! node         a device's node and ioctls
//! watch, reset                    what can be seen of a buffer; resets
//! devices      all devices
//! binding      a device's exports: made, and revoked when the device goes away or is reset
//! exporter     the dma-buf operations
//! revoke       access taken away and given again
//! moves        bytes between BAR and system memory
//! buffer       the object behind a dma-buf, and its lock
//! mapping, device                 the scatter tables that importers get; BARs, and who has what of them
//! bar, pieces  one BAR; where a buffer's bytes are
//! pages, pool, peers, region      a BAR's struct pages; another driver's pool; routes; who has which bytes
//! system, fences, counters, watchers, wait
//! misc, common, abi, ffi, compat  nodes; PCI devices and dma-bufs; the interface; what `bindings` lacks;
//!                                 what differs between kernels
//! ```
//!
//! To begin reading: `buffer.rs`, then `exporter.rs`, then `moves.rs`.
//!
//! # Locks, outermost first
//!
//! The driver core holds the PCI device's lock around probe and removal. All of the below come after it.
//!
//! 1. `misc_mtx` of the misc core: opening a node, and unregistering it; the list of `devices.rs`;
//! 2. `Device::state`: the BARs' regions, the list of exports, whether the device is live;
//! 3. `mmap_lock` of a process;
//! 4. the reservation lock of a dma-buf: all of `buffer::State`;
//! 5. the importers' own locks, taken in their callbacks; `i_mmap_rwsem`, when zapping.
//!
//! None of these is held while unmapping or direct I/O is waited for, nor while a revoke waits for fences.
//! A move waits for them with the reservation lock held, as the kernel's own exporters do. None of the first
//! two is held while somebody else's reservation lock is waited for: one slow buffer stops no other.
//!
//! # Lifetimes
//!
//! A file descriptor keeps the module and the memory of `Device`, never the binding: what a
//! dma-buf refers to in the device is used only under its reservation lock while it is not
//! revoked, and removal revokes all before it returns.

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

/// What a bound device owns, dropped in this order.
struct Owned {
    /// First: nobody new comes in by the node.
    _node: Node,
    /// Nor by a reset, which cannot happen meanwhile anyway.
    _listed: Listed,
    /// Then the device takes away what was given out, and waits until it is.
    _device: Binding,
}

impl Owned {
    /// Takes a device that is being probed.
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

/// The driver's data of a bound device.
///
/// What it owns goes in `unbind`, when the device still has its driver, its power and its place in an
/// IOMMU group: peers are waited for there. The driver core drops these data later, when `remove` has
/// returned and `struct pci_dev` says that the device has no driver. They still own something then only
/// where the probe has failed after they were made.
#[pin_data]
struct Bound {
    #[pin]
    owned: Mutex<Option<Owned>>,
}

struct Driver;

compat::pci_device_table!(
    ID_TABLE,
    <Driver as pci::Driver>::IdInfo,
    // A device taken by `driver_override` reaches the PCI adapter of Linux 7.2 with index 0 into this
    // table, so the table needs one entry. This one matches nothing: a class has 24 bits, and the
    // entry asks for a 25th.
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
        // The lock is let go before what it guards is dropped.
        let owned = this.owned.lock().take();
        drop(owned);
    }
}

/// The module: its fields are dropped in this order when it is unloaded.
#[pin_data]
struct Loaded {
    #[pin]
    _buffers: debugfs::File<()>,
    _providers: Providers,
    #[pin]
    _driver: kernel::driver::Registration<pci::Adapter<Driver>>,
}

impl kernel::InPlaceModule for Loaded {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // SAFETY: A module is initialised once, and all else of it is registered below.
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

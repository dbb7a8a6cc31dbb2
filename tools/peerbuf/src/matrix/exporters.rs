//! The rows: every exporter on this machine.

use std::rc::Rc;

use peerbuf::device::drm::Card;
use peerbuf::device::edu;
use peerbuf::device::v4l2::VideoDevice;
use peerbuf::device::vfio::VfioDevice;
use peerbuf::device::vulkan::Device;
use peerbuf::error::{ExportError, Unavailable};
use peerbuf::export::{
    drm, gpu, heap, memfd, peerbuf as module, provider, udmabuf, v4l2, vfio, vulkan,
};
use peerbuf::import::vulkan::VulkanImporter;
use peerbuf::plan::topology::Sysfs;
use peerbuf::{Access, Buffer};

use super::Missing;
use super::importers::{open_vivid, runtimes};
use crate::Failure;

/// One row.
pub struct Exporter {
    pub name: String,
    pub make: Box<dyn Fn() -> Result<Buffer, Failure>>,
}

impl Exporter {
    fn new(
        name: impl Into<String>,
        make: impl Fn() -> Result<Buffer, Failure> + 'static,
    ) -> Exporter {
        Exporter {
            name: name.into(),
            make: Box::new(make),
        }
    }
}

/// The rows of one kind.
type Found = Result<Vec<Exporter>, Unavailable>;

/// All exporters, for buffers of `size` bytes.
pub fn all(size: u64, missing: &mut Vec<Missing>) -> Vec<Exporter> {
    let kinds: [fn(u64) -> Found; 10] = [
        bars,
        providers,
        vfio_bars,
        udmabufs,
        heaps,
        graphics,
        gpus,
        vulkans,
        video,
        |size| {
            Ok(vec![Exporter::new("memfd", move || {
                Ok(memfd::export("memfd", size)?)
            })])
        },
    ];
    let mut rows = Vec::new();
    for kind in kinds {
        match kind(size) {
            Ok(found) => rows.extend(found),
            Err(error) => missing.push(error.into()),
        }
    }
    rows
}

/// Of peerbuf.ko's BARs, one that files can reach, and one that they cannot.
fn bars(size: u64) -> Found {
    let nodes = module::probe()?;
    let mut rows = Vec::new();
    for pages in [true, false] {
        let found = nodes.iter().find_map(|node| {
            let device = module::Device::open_node(node).ok()?;
            let bars = device.query().ok()?.bars;
            let suits = |bar: &module::BarInfo| {
                bar.exportable && bar.prefetchable && bar.pages == pages && bar.largest_free >= size
            };
            let bar = bars.into_iter().filter(suits).max_by_key(|bar| bar.size)?;
            Some((device, bar.index))
        });
        let Some((device, bar)) = found else { continue };
        let device = Rc::new(device);
        let kinds = if pages {
            &[
                ("peerbuf.ko BAR", false),
                ("peerbuf.ko BAR, may move", true),
            ][..]
        } else {
            &[("peerbuf.ko BAR without pages", false)]
        };
        for &(name, may_move) in kinds {
            let device = Rc::clone(&device);
            rows.push(Exporter::new(name, move || {
                let offset = None;
                let length = size;
                Ok(device.export_ranges(&module::RangesRequest {
                    bar,
                    ranges: vec![module::RangeRequest::Bar { offset, length }],
                    may_move,
                    devices_read: false,
                    uncached: false,
                    access: Access::ReadWrite,
                })?)
            }));
        }
    }
    Ok(rows)
}

/// Memory of the first provider.
fn providers(size: u64) -> Found {
    let mut rows = Vec::new();
    if let Some(&address) = provider::probe()?.first() {
        for (name, may_move) in [("provider's memory", false), ("provider's, may move", true)] {
            rows.push(Exporter::new(name, move || {
                // Opened again, because the driver may have been rebound.
                let device = provider::open(address)?;
                let bar = device.query()?.exportable().map_or(0, |bar| bar.index);
                let offset = None;
                let length = size;
                Ok(device.export_ranges(&module::RangesRequest {
                    bar,
                    ranges: vec![module::RangeRequest::Bar { offset, length }],
                    may_move,
                    devices_read: false,
                    uncached: false,
                    access: Access::ReadWrite,
                })?)
            }));
        }
    }
    Ok(rows)
}

/// A prefetchable BAR of the devices of vfio-pci, except the device that only does DMA.
fn vfio_bars(size: u64) -> Found {
    let sysfs = Sysfs::default();
    let mut refused = None;
    for address in vfio::probe()? {
        if sysfs.pci_id(address) == Some(edu::ID) {
            continue;
        }
        let device = match VfioDevice::open(address) {
            Ok(device) => device,
            Err(error) => {
                refused = Some(error);
                continue;
            }
        };
        let of = |bar| device.bar_size(bar).unwrap_or(0);
        let Some(bar) = (0..6)
            .max_by_key(|&bar| of(bar))
            .filter(|&bar| of(bar) >= size)
        else {
            continue;
        };
        let request = vfio::Request {
            bar,
            offset: 0,
            length: size,
            access: Access::ReadWrite,
        };
        // A kernel may have vfio-pci without the export of dma-bufs.
        if let Err(ExportError::Unavailable(error)) = vfio::export(&device, request) {
            return Err(error);
        }
        return Ok(vec![Exporter::new("vfio-pci BAR", move || {
            Ok(vfio::export(&device, request)?)
        })]);
    }
    refused.map_or(Ok(Vec::new()), Err)
}

fn udmabufs(size: u64) -> Found {
    udmabuf::probe()?;
    let mut rows = vec![
        Exporter::new("udmabuf", move || Ok(udmabuf::export("udmabuf", size)?)),
        Exporter::new("udmabuf of pieces", move || {
            // The pieces are in reverse order, so that no two are neighbours by chance.
            let memory = memfd::export("pieces", size)?;
            let half = (size / 2).next_multiple_of(rustix::param::page_size() as u64);
            let pieces = [memory.range(half, size - half)?, memory.range(0, half)?];
            Ok(udmabuf::export_list("udmabuf of pieces", &pieces)?)
        }),
    ];
    let pages = udmabuf::HugePages::TwoMebibytes;
    let huge = size.next_multiple_of(pages.size());
    let make = move || udmabuf::export_huge("udmabuf of huge pages", huge, pages);
    if make().is_ok() {
        rows.push(Exporter::new("udmabuf of huge pages", move || Ok(make()?)));
    }
    Ok(rows)
}

fn heaps(size: u64) -> Found {
    let rows = heap::probe()?.into_iter().map(|heap| {
        let name = format!("dma-heap {}", heap.name());
        Exporter::new(name.clone(), move || Ok(heap.export(&name, size)?))
    });
    Ok(rows.collect())
}

fn graphics(size: u64) -> Found {
    let mut rows = Vec::new();
    for node in drm::probe()? {
        let card = Card::open(node)?;
        let name = format!("DRM {}", card.driver());
        // Some drivers have no dumb buffers.
        if matches!(
            drm::export(&card, &name, size),
            Err(ExportError::System { .. })
        ) {
            continue;
        }
        rows.push(Exporter::new(name.clone(), move || {
            Ok(drm::export(&card, &name, size)?)
        }));
    }
    Ok(rows)
}

/// Memory that the first device of each runtime allocates, of those that export.
fn gpus(size: u64) -> Found {
    let mut rows = Vec::new();
    for runtime in runtimes()? {
        if gpu::allocate(runtime, 0, size).is_err() {
            continue;
        }
        rows.push(Exporter::new(format!("{runtime} 0"), move || {
            // The buffer keeps the memory.
            let exported = gpu::allocate(runtime, 0, size)?;
            Ok(exported.range.buffer().clone())
        }));
    }
    Ok(rows)
}

/// Memory of the Vulkan drivers that can export.
fn vulkans(size: u64) -> Found {
    let mut rows = Vec::new();
    for device in Device::all()? {
        let name = VulkanImporter::new(&device).name();
        if vulkan::export(&device, &name, size).is_err() {
            continue;
        }
        rows.push(Exporter::new(name.clone(), move || {
            // The dma-buf keeps the bytes alive.
            Ok(vulkan::export(&device, &name, size)?.buffer().clone())
        }));
    }
    Ok(rows)
}

/// Picture buffers of a video device.
fn video(_: u64) -> Found {
    open_vivid()?;
    let make = || {
        let camera: VideoDevice = open_vivid()?;
        let capture = v4l2::export(&camera, 2)?;
        let buffer = capture.buffers().first().cloned();
        buffer.ok_or_else(|| Failure::from("the video device made no buffer"))
    };
    Ok(vec![Exporter::new("V4L2 vivid", make)])
}

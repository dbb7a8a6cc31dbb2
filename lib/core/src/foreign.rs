//! dma-bufs made by another library: what the kernel tells about them.
//!
//! The kernel names the exporter (`fdinfo`), but neither the device nor the placement. The exporter's name is
//! usually that of its module, and sysfs lists the devices that a module's drivers are bound to. If there is
//! exactly one such device, the buffer is its; otherwise the device stays unknown.

use std::os::fd::OwnedFd;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::buffer::{Buffer, Kind, Provenance};
use crate::dmabuf::{DmaBuf, Info};
use crate::error::{BufferError, SystemError};
use crate::topology::Sysfs;

/// Exporters whose buffers are always in system memory, and their kinds.
const IN_SYSTEM_MEMORY: [(&str, Kind); 4] = [
    ("udmabuf", Kind::Udmabuf),
    ("system", Kind::Heap),
    ("videobuf2_dma_sg", Kind::V4l2),
    ("videobuf2_vmalloc", Kind::V4l2),
];

/// The exporter of vfio-pci, a library module that several drivers use.
const VFIO: &str = "vfio_pci_core";

/// Exporters whose memory belongs to devices of other drivers: graphics drivers use the name of the module
/// they share, and peerbuf.ko exports memory of other drivers' providers.
const NOT_THE_DRIVER: [&str; 2] = ["drm", "peerbuf"];

impl Buffer {
    /// Takes a dma-buf that another library or program made, such as CUDA, ROCm or Vulkan.
    ///
    /// Size, exporter, kind and device are those that the kernel reports ([`DmaBuf::info`], sysfs). Anything
    /// else stays unknown: the kind is then [`Kind::Other`], the device `None`, and paths are proved for this
    /// buffer alone. A caller who knows more uses [`Buffer::from_dmabuf`].
    ///
    /// Some libraries return the descriptor of a whole allocation and an offset in it: pass that offset to
    /// [`Buffer::range`]. This function sets the descriptor's close-on-exec flag.
    ///
    /// ```no_run
    /// use std::os::fd::OwnedFd;
    /// use peerbuf_core::Buffer;
    ///
    /// fn second_page(theirs: OwnedFd) -> Result<Vec<u8>, peerbuf_core::error::BufferError> {
    ///     let buffer = Buffer::import(theirs)?;
    ///     println!("{buffer}: {:?}", buffer.provenance());
    ///     buffer.range(4096, 4096)?.to_vec()
    /// }
    /// ```
    ///
    /// # Errors
    /// [`BufferError::NotADmaBuf`], or the failed call. The descriptor is then closed.
    pub fn import(fd: OwnedFd) -> Result<Buffer, BufferError> {
        let dmabuf = DmaBuf::from_fd(fd)?;
        let flags = fcntl_getfd(&dmabuf).and_then(|flags| {
            let missing = !flags.contains(FdFlags::CLOEXEC);
            match missing {
                true => fcntl_setfd(&dmabuf, flags | FdFlags::CLOEXEC),
                false => Ok(()),
            }
        });
        flags.map_err(|errno| SystemError::new("fcntl(F_SETFD)", "a dma-buf", errno))?;
        // Without procfs the exporter is unknown.
        let info = dmabuf.info().unwrap_or_default();
        let inode = dmabuf.identity().inode();
        let provenance = provenance(&info, inode, &Sysfs::default());
        // A device's buffers need not all have the same memory, so a proof for another buffer says nothing
        // about this one.
        Ok(Buffer::from_dmabuf(dmabuf, provenance).without_voucher())
    }
}

fn provenance(info: &Info, inode: u64, sysfs: &Sysfs) -> Provenance {
    let Info { exporter, name, .. } = info;
    let known = IN_SYSTEM_MEMORY
        .iter()
        .find(|(module, _)| module == exporter);
    let mut devices = match (known, exporter.as_str()) {
        (Some(_), _) => Vec::new(),
        (None, VFIO) => sysfs.functions_of_users(VFIO),
        (None, module) if NOT_THE_DRIVER.contains(&module) => Vec::new(),
        (None, module) => sysfs.functions_of_module(module),
    };
    let device = match devices.len() {
        1 => devices.pop(),
        _ => None,
    };
    let kind = match (known, exporter.as_str(), device) {
        (Some((_, kind)), _, _) => *kind,
        (None, VFIO, Some(_)) => Kind::Vfio,
        _ => Kind::Other,
    };
    let name = match (name.as_str(), exporter.as_str()) {
        ("", "") => format!("dma-buf {inode}"),
        ("", exporter) => format!("dma-buf {inode} of {exporter}"),
        (name, _) => name.to_owned(),
    };
    Provenance {
        kind,
        device,
        bar: None,
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::tests::Tree;

    fn of(exporter: &str, sysfs: &Sysfs) -> (Kind, Option<String>) {
        let info = Info {
            exporter: exporter.into(),
            ..Info::default()
        };
        let found = provenance(&info, 7, sysfs);
        assert!(found.kind.allows_device(found.device.is_some()));
        (found.kind, found.device.map(|device| device.to_string()))
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_device_is_named_only_where_the_kernel_leaves_no_choice() {
        let tree = Tree::new("foreign");
        let sysfs = Sysfs::at(&tree.0);
        let bind = |module: &str, driver: &str, device: &str| {
            let at = tree.device(&format!("pci0000:00/{device}"));
            tree.link(&format!("bus/pci/drivers/{driver}/{device}"), &at);
            let driver_at = tree.0.join("bus/pci/drivers").join(driver);
            let link = format!("module/{module}/drivers/pci:{driver}");
            if !tree.0.join(&link).exists() {
                tree.link(&link, &driver_at);
            }
        };
        let one = |device: &str| (Kind::Other, Some(device.to_owned()));
        bind("nvidia", "nvidia", "0000:41:00.0");
        assert_eq!(of("nvidia", &sysfs), one("0000:41:00.0"));
        bind("nvidia", "nvidia", "0000:42:00.0");
        assert_eq!(of("nvidia", &sysfs), (Kind::Other, None), "which of two?");

        // The exporter is in the library module; a driver that uses it is bound to the device.
        bind("vfio_pci", "vfio-pci", "0000:05:00.0");
        let users = tree.0.join("module/vfio_pci");
        tree.link("module/vfio_pci_core/holders/vfio_pci", &users);
        let vfio = (Kind::Vfio, Some("0000:05:00.0".to_owned()));
        assert_eq!(of("vfio_pci_core", &sysfs), vfio);
        bind("mlx5_vfio_pci", "mlx5-vfio-pci", "0000:06:00.0");
        let users = tree.0.join("module/mlx5_vfio_pci");
        tree.link("module/vfio_pci_core/holders/mlx5_vfio_pci", &users);
        assert_eq!(of("vfio_pci_core", &sysfs), (Kind::Other, None));

        bind("peerbuf", "peerbuf", "0000:07:00.0");
        bind("drm", "drm", "0000:08:00.0");
        bind("udmabuf", "udmabuf", "0000:09:00.0");
        assert_eq!(of("peerbuf", &sysfs), (Kind::Other, None), "lends others'");
        assert_eq!(of("drm", &sysfs), (Kind::Other, None), "any driver's");
        assert_eq!(of("udmabuf", &sysfs), (Kind::Udmabuf, None));
        assert_eq!(of("system", &sysfs), (Kind::Heap, None));
        for unknown in ["", "amdgpu", "../nvidia", ".", "/"] {
            assert_eq!(of(unknown, &sysfs), (Kind::Other, None), "{unknown:?}");
        }
    }

    #[test]
    fn a_buffer_is_called_by_its_own_name_or_its_exporters() {
        let sysfs = Sysfs::at("/nonexistent");
        let called = |exporter: &str, name: &str| {
            let info = Info {
                exporter: exporter.into(),
                name: name.into(),
                references: 1,
            };
            provenance(&info, 7, &sysfs).name
        };
        assert_eq!(called("nvidia", "weights"), "weights");
        assert_eq!(called("nvidia", ""), "dma-buf 7 of nvidia");
        assert_eq!(called("", ""), "dma-buf 7");
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn what_is_no_dma_buf_is_not_imported() {
        let (pipe, _) = std::io::pipe().unwrap();
        let refused = Buffer::import(pipe.into());
        assert!(matches!(refused, Err(BufferError::NotADmaBuf { .. })));
    }
}

//! Whether a registered buffer is unchanged: not given back, not revoked, not moved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::rung::Rung;
use peerbuf::buffer::{Buffer, Kind};
use peerbuf::export::peerbuf::{Device, State, Watch};

/// How a registration detects that its buffer has changed.
pub(crate) struct Standing {
    /// For buffers of peerbuf.ko: the device to query, the watch, and the registered generation.
    module: Option<(Device, Watch, u64)>,
    /// For a lent buffer: the registered generation.
    lease: Option<u64>,
    /// Stale once, stale forever.
    stale: AtomicBool,
}

impl Standing {
    /// To be called before the registration, so that no change is missed.
    pub(crate) fn of(buffer: &Buffer) -> Standing {
        let provenance = buffer.provenance();
        let module = match (provenance.kind, provenance.device, buffer.dmabuf()) {
            (Kind::Bar, Some(device), Some(dmabuf)) => (|| {
                let device = Device::open(device).ok()?;
                let watch = device.watch(dmabuf).ok()?;
                let generation = device.status(dmabuf).ok()?.generation;
                Some((device, watch, generation))
            })(),
            _ => None,
        };
        Standing {
            module,
            lease: buffer.lease().map(|lease| lease.generation),
            stale: AtomicBool::new(false),
        }
    }

    pub(crate) fn generation(&self) -> Option<u64> {
        let module = self.module.as_ref().map(|(_, _, generation)| *generation);
        self.lease.or(module)
    }

    /// The reason why it is stale; `None` if it is not.
    pub(crate) fn staleness(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.stale.load(Ordering::Relaxed) {
            return Some("an earlier check found it stale".into());
        }
        let why = self.look(buffer, rung);
        if why.is_some() {
            self.stale.store(true, Ordering::Relaxed);
        }
        why
    }

    fn look(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.lease.is_some() && !buffer.lease().is_some_and(|lease| lease.current) {
            return Some("the publisher no longer lends the buffer".into());
        }
        let (device, watch, registered) = self.module.as_ref()?;
        // Without an event nothing has changed; the check costs one system call.
        if watch.wait(Duration::ZERO).is_ok_and(|events| events == 0) {
            return None;
        }
        let status = match device.status(buffer.dmabuf()?) {
            Ok(status) => status,
            Err(error) => return Some(error.to_string()),
        };
        match status.state {
            State::Live => {}
            State::Revoked => return Some("the buffer is revoked".into()),
            _ if status.reasons.gone => return Some("the buffer's device is gone".into()),
            _ => return Some("the buffer is permanently revoked".into()),
        }
        // A staged registration copies through the buffer's own mapping, which follows moves.
        (rung.is_dma_buf() && status.generation != *registered).then(|| {
            format!(
                "the buffer has moved to generation {}; generation {registered} was registered",
                status.generation
            )
        })
    }
}

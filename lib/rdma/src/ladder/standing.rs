//! Whether a registered buffer is still what was registered: neither taken back, nor revoked, nor
//! moved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::rung::Rung;
use peerbuf::buffer::{Buffer, Kind};
use peerbuf::export::peerbuf::{Device, State, Watch};

/// How a registration knows that its buffer is not what it was.
pub(crate) struct Standing {
    /// Of the module's buffers: who to ask, who tells, and the generation that was registered.
    module: Option<(Device, Watch, u64)>,
    /// Of one that is lent: which generation was.
    lease: Option<u64>,
    /// Found stale before, which does not change any more.
    stale: AtomicBool,
}

impl Standing {
    /// To be called before the card is given the buffer, so that no change goes by unseen.
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

    /// Why it is stale; `None` while it is not.
    pub(crate) fn staleness(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.stale.load(Ordering::Relaxed) {
            return Some("it was found to be so before".into());
        }
        let why = self.look(buffer, rung);
        if why.is_some() {
            self.stale.store(true, Ordering::Relaxed);
        }
        why
    }

    fn look(&self, buffer: &Buffer, rung: Rung) -> Option<String> {
        if self.lease.is_some() && !buffer.lease().is_some_and(|lease| lease.current) {
            return Some("the publisher does not lend it any more".into());
        }
        let (device, watch, registered) = self.module.as_ref()?;
        // Without an event nothing has happened, which takes one system call to see.
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
            _ => return Some("the buffer's device is gone".into()),
        }
        // Copies go by the buffer's own mapping, which follows it when it moves.
        (rung.is_dma_buf() && status.generation != *registered).then(|| {
            format!(
                "the buffer is at generation {}, and {registered} was registered",
                status.generation
            )
        })
    }
}

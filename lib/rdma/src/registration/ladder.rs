//! Tries the rungs, best first, until one registers the buffer. Attributes each failure to the layer that
//! refused, and plans the path of the bytes on the rung that worked.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};

use super::{Held, Inner, Registration};
use crate::error::RdmaError;
use crate::ladder::{self, Climbed, Staging, climb, registrable, shared_memory};
use crate::rung::{Attempt, Layer, Rung};
use crate::sys::domain::Domain;
use crate::sys::verbs::{self, DmaBufRequest, Region};
use peerbuf::Errno;
use peerbuf::buffer::{Access, Buffer, BufferRange};
use peerbuf::error::{ImportError, SystemError};
use peerbuf::import::{Attached, Importer};
use peerbuf::plan::{Path, Plan, Reason, ReasonCode};
use peerbuf_core::limits::on_pinning;

impl Domain {
    /// Registers a range by the best rung that works. `remote` is the access allowed to the peer; `None`
    /// means local work only. Local work may always read it, and write it if the buffer is writable.
    ///
    /// # Errors [`RdmaError::Buffer`] for remote writes to a read-only buffer, [`RdmaError::Empty`] for an
    /// empty range, and [`RdmaError::NotRegistered`] with the failure of each rung.
    #[doc(alias = "ibv_reg_mr")]
    #[doc(alias = "ibv_reg_dmabuf_mr")]
    #[doc(alias = "UVERBS_METHOD_REG_DMABUF_MR")]
    pub fn register(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
    ) -> Result<Registration, RdmaError> {
        self.register_by(range, remote, &Rung::ALL)
    }

    /// As [`Domain::register`], by these rungs only, in this order.
    ///
    /// # Errors
    /// As [`Domain::register`].
    pub fn register_by(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
        rungs: &[Rung],
    ) -> Result<Registration, RdmaError> {
        self.here()?;
        let buffer = range.buffer();
        registrable(range, remote)?;
        let mut access = 0;
        if buffer.is_writable() {
            access |= verbs::LOCAL_WRITE;
        }
        if remote.is_some_and(Access::writes) {
            access |= verbs::REMOTE_WRITE;
        }
        if remote.is_some_and(Access::reads) {
            access |= verbs::REMOTE_READ;
        }
        let Climbed {
            region: (region, staging),
            rung,
            attempts,
            standing,
        } = climb(self, range, access, rungs)?;
        let inner = Inner {
            lines: Mutex::default(),
            wanted: AtomicBool::new(false),
            name: buffer.name().to_owned(),
            offset: range.offset(),
            length: range.len(),
            writable: buffer.is_writable(),
            domain: self.clone(),
            remote,
            keys: region.keys(),
            rung,
            // A registered buffer does not move, so the plan stays valid.
            plan: plan(buffer, self, rung, &attempts),
            attempts,
            standing,
            held: RwLock::new(Some(Arc::new(Held {
                region,
                staging: staging.map(Mutex::new),
                range: range.clone(),
            }))),
        };
        Ok(Registration {
            inner: Arc::new(inner),
        })
    }
}

impl ladder::Domain for Domain {
    /// `IBV_ACCESS_*`
    type Access = u32;
    type Region = (Region, Option<Staging>);

    fn name(&self) -> String {
        Domain::name(self).to_owned()
    }

    fn name_the_layers(attempts: &mut [Attempt], taken: Option<Rung>) {
        name_the_layer(attempts, taken);
    }

    fn try_rung(
        &self,
        range: &BufferRange,
        access: u32,
        rung: Rung,
    ) -> Result<(Region, Option<Staging>), Attempt> {
        let buffer = range.buffer();
        let domain = self.verbs();
        let refused = |call, layer: fn(Errno) -> Layer, code| {
            move |errno| Attempt {
                rung,
                layer: layer(errno),
                code,
                errno: Some(errno),
                evidence: SystemError::new(call, buffer.name(), errno).to_string(),
            }
        };
        match rung {
            Rung::DmaBufByLibrary | Rung::DmaBufByKernel => {
                let Some(dmabuf) = buffer.dmabuf() else {
                    let evidence = "the buffer is host memory without a dma-buf";
                    return Err(Attempt::lacking(rung, ReasonCode::NoDmaBuf, evidence));
                };
                let request = DmaBufRequest {
                    dmabuf: dmabuf.as_fd(),
                    offset: range.offset(),
                    length: range.len(),
                    iova: range.offset(),
                    access,
                };
                let code = match buffer.provenance().kind.is_device_memory() {
                    true => ReasonCode::ImporterNotPeer,
                    false => ReasonCode::AttachRefused,
                };
                // An exporter that does not support the driver also answers 'not supported'. The same request
                // without a dma-buf tells the two apart: it reaches no exporter.
                let nobodys = DmaBufRequest {
                    dmabuf: domain.uverbs(),
                    ..request
                };
                let by_exporter = |attempt: Attempt, again: Option<Errno>| match attempt.errno {
                    Some(Errno::OPNOTSUPP) if again.is_some_and(|e| e != Errno::OPNOTSUPP) => {
                        let layer = Layer::Exporter;
                        Attempt { layer, ..attempt }
                    }
                    _ => attempt,
                };
                if rung == Rung::DmaBufByKernel {
                    let call = "ioctl(UVERBS_METHOD_REG_DMABUF_MR)";
                    let region = Region::by_kernel(domain, &request);
                    let region = region.map_err(refused(call, layer_in_kernel, code));
                    let region = region.map_err(|attempt| {
                        by_exporter(attempt, Region::by_kernel(domain, &nobodys).err())
                    });
                    return Ok((region?, None));
                }
                let Some(region) = Region::by_library(domain, &request) else {
                    let evidence = "libibverbs has no ibv_reg_dmabuf_mr (rdma-core 34 has)";
                    let layer = Layer::Library;
                    return Err(Attempt {
                        layer,
                        ..Attempt::lacking(rung, code, evidence)
                    });
                };
                let call = "ibv_reg_dmabuf_mr";
                let region = region.map_err(refused(call, layer_by_library, code));
                let region = region.map_err(|attempt| {
                    let again = Region::by_library(domain, &nobodys);
                    by_exporter(attempt, again.and_then(Result::err))
                });
                Ok((region?, None))
            }
            Rung::SharedMemory => {
                let mapping = shared_memory(range)?;
                let window = mapping.map().window(0, range.len() as usize);
                let region = Region::of_pages(domain, window, range.offset(), access);
                let code = ReasonCode::NotPinnable;
                let region = region.map_err(refused("ibv_reg_mr", |_| Layer::Memory, code));
                let region = region.map_err(with_limit)?;
                Ok((region, None))
            }
            Rung::Staged => {
                let staging = Staging::of(range)?;
                let region = Region::of_pages(domain, staging.window(), range.offset(), access);
                let code = ReasonCode::NotPinnable;
                let region = region.map_err(refused("ibv_reg_mr", |_| Layer::Memory, code));
                let region = region.map_err(with_limit)?;
                Ok((region, Some(staging)))
            }
        }
    }
}

/// Registers for the peer to read, and to write if the buffer is writable. No byte moves before work is
/// posted.
impl Importer for Domain {
    fn name(&self) -> String {
        Domain::name(self).to_owned()
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        let remote = range.buffer().allowed();
        match self.register(range, Some(remote)) {
            Ok(registration) => Ok(Box::new(registration)),
            Err(RdmaError::Buffer(error)) => Err(error.into()),
            Err(RdmaError::System(error)) => Err(error.into()),
            Err(other) => Err(ImportError::Impossible {
                importer: Domain::name(self).to_owned(),
                buffer: range.buffer().name().to_owned(),
                code: ReasonCode::AttachRefused,
                evidence: other.to_string(),
            }),
        }
    }
}

impl Attached for Registration {
    fn plan(&self) -> Plan {
        Registration::plan(self).clone()
    }

    fn write(&mut self, _: &[u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }

    fn read(&mut self, _: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }
}

/// Adds to `ENOMEM` the name of the limit behind it.
fn with_limit(mut attempt: Attempt) -> Attempt {
    attempt.evidence += &attempt.errno.map(on_pinning).unwrap_or_default();
    attempt
}

fn layer_by_library(errno: Errno) -> Layer {
    match errno {
        Errno::OPNOTSUPP => Layer::Library,
        other => layer_in_kernel(other),
    }
}

fn layer_in_kernel(errno: Errno) -> Layer {
    match errno {
        // uverbs's answers for a driver without the method. (The caller has excluded the exporter.)
        Errno::PROTONOSUPPORT | Errno::OPNOTSUPP => Layer::Driver,
        // A kernel or a node without such methods.
        Errno::NOTTY | Errno::ACCES | Errno::BADF => Layer::Uverbs,
        Errno::NOMEM => Layer::Driver,
        // An exporter that does not support the driver, or no longer does.
        _ => Layer::Exporter,
    }
}

/// 'Not supported' from the library comes either from its driver for the card or from the kernel, with the
/// same number. The kernel's own answer to the next rung tells them apart.
fn name_the_layer(attempts: &mut [Attempt], taken: Option<Rung>) {
    let by_kernel = attempts
        .iter()
        .find(|attempt| attempt.rung == Rung::DmaBufByKernel)
        .map(|attempt| attempt.layer);
    if taken == Some(Rung::DmaBufByKernel) {
        return;
    }
    for attempt in attempts {
        if attempt.rung == Rung::DmaBufByLibrary
            && attempt.errno == Some(Errno::OPNOTSUPP)
            && by_kernel == Some(Layer::Driver)
        {
            attempt.layer = Layer::Driver;
        }
    }
}

fn plan(buffer: &Buffer, card: &Domain, rung: Rung, attempts: &[Attempt]) -> Plan {
    if rung == Rung::Staged {
        let failed = attempts.iter().map(|attempt| {
            let path = match attempt.rung {
                Rung::SharedMemory | Rung::Staged => Path::SharedHostMemory,
                _ if buffer.provenance().kind.is_host_memory() => Path::SharedHostMemory,
                _ => Path::PeerToPeer,
            };
            Reason::new(path, attempt.code, attempt.to_string())
        });
        return Plan::new(Path::StagedCopy, failed.collect());
    }
    let plan = Plan::in_place(buffer);
    if plan.path != Path::PeerToPeer || !card.is_software() {
        return plan;
    }
    let software = format!(
        "{} is software: the processor carries the bytes between the buffer and its packets",
        card.name()
    );
    let host = "the bytes are in device memory";
    let reasons = vec![
        Reason::new(Path::PeerToPeer, ReasonCode::NotADevice, software),
        Reason::new(Path::SharedHostMemory, ReasonCode::NotHostMemory, host),
    ];
    Plan::new(Path::StagedCopy, reasons)
}

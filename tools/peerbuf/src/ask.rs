//! Asks the kernel (peerbuf_probe.ko) about two devices: exports memory of one device and
//! attaches it on behalf of the other, as that device's driver would. No DMA is started.

use peerbuf::error::{ExportError, ProbeError};
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::provider;
use peerbuf::import::probe::{Direction, Options, Probe, Route};
use peerbuf::plan::topology::PciAddress;
use peerbuf::{Access, Buffer, Errno};
use peerbuf_topo::rules::Map;

/// The kernel's answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel mapped the memory peer-to-peer, by this route.
    Yes(Map),
    /// The kernel refused, with this error.
    No(String),
    /// The kernel refused because no path exists between the two, with this error.
    NoWay(String),
    /// The kernel was not asked, for this reason.
    NotAsked(String),
}

/// At least one page on every machine.
const LENGTH: u64 = 64 << 10;

/// Whether the driver of `client` would get the memory of `provider`.
pub fn kernel(client: PciAddress, provider: PciAddress) -> Answer {
    let probe = match Probe::open() {
        Ok(probe) => probe,
        Err(ProbeError::Unavailable { cause, remedy }) => {
            return Answer::NotAsked(format!("{cause}: {remedy}"));
        }
        Err(error) => return Answer::NotAsked(error.to_string()),
    };
    let buffer = match lend(provider, LENGTH) {
        Ok(buffer) => buffer,
        Err(why) => return Answer::NotAsked(why),
    };
    let Some(dmabuf) = buffer.dmabuf() else {
        return Answer::NotAsked(format!("{provider} exported no dma-buf"));
    };
    let mapped = probe
        .attach(dmabuf, client, Options::default())
        .and_then(|attachment| attachment.map(Direction::Bidirectional));
    match mapped {
        Ok(mapping) => match mapping.route() {
            Route::BusAddress => Answer::Yes(Map::BusAddress),
            Route::HostBridge => Answer::Yes(Map::HostBridge),
            Route::System => Answer::No("the exporter moved the bytes to system memory".into()),
            // A mixture of routes, or addresses that lead to no known memory.
            other => Answer::No(format!(
                "the exporter mapped it in an unexpected way: {other:?}"
            )),
        },
        Err(ProbeError::System { cause, .. }) if cause.errno == Errno::UNATCH => {
            Answer::NotAsked(format!("{client} has no driver that does DMA"))
        }
        Err(error) if error.errno() == Some(Errno::REMOTEIO) => Answer::NoWay(error.to_string()),
        Err(error) => Answer::No(error.to_string()),
    }
}

/// Exports memory of a device that is bound to peerbuf.ko, or whose own driver lends memory: as
/// much as is available in one piece, and at most `most` bytes.
pub fn lend(device: PciAddress, most: u64) -> Result<Buffer, String> {
    let (opened, share) = match Device::open(device) {
        Ok(opened) => (opened, 1),
        Err(error) => {
            let lender = provider::open(device).map_err(|lender| {
                format!("{device} provides no memory to peers, neither through peerbuf.ko ({error}) nor by its own driver ({lender})")
            })?;
            // Other users in the kernel need the pool, too.
            (lender, 2)
        }
    };
    let info = opened.query().map_err(|error| error.to_string())?;
    let bar = info
        .exportable()
        .ok_or_else(|| format!("no BAR of {device} can be exported"))?;
    let page = u64::from(info.page_size.max(1));
    let mut length = most.min(bar.largest_free / share).max(page) / page * page;
    loop {
        let request = Request {
            bar: bar.index,
            offset: None,
            length,
            access: Access::ReadWrite,
        };
        match opened.export(request) {
            Ok(buffer) => return Ok(buffer),
            // The free bytes of a driver's pool may be in several pieces.
            Err(ExportError::System { cause, .. })
                if cause.errno == Errno::NOSPC && length > page =>
            {
                length = (length / 2).max(page) / page * page;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

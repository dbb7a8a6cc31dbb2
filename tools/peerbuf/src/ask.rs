//! Asks the kernel (peerbuf_probe.ko) about two devices: exports some memory of the one and attaches it on behalf of the
//! other, as its driver would. No DMA is started.

use peerbuf::Access;
use peerbuf::error::ProbeError;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::provider;
use peerbuf::import::probe::{Direction, Options, Probe, Route};
use peerbuf::plan::topology::PciAddress;

/// What the kernel said.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It gave addresses of peer memory, by this route.
    Yes(&'static str),
    /// It refused, with this error.
    No(String),
    /// It was not asked.
    NotAsked(String),
}

/// As much as one page of any machine's.
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
    let buffer = match export(provider) {
        Ok(buffer) => buffer,
        Err(why) => return Answer::NotAsked(why),
    };
    let Some(dmabuf) = buffer.dmabuf() else {
        return Answer::NotAsked(format!("{provider} gave no dma-buf"));
    };
    let mapped = probe
        .attach(dmabuf, client, Options::default())
        .and_then(|attachment| attachment.map(Direction::Bidirectional));
    match mapped {
        Ok(mapping) => match mapping.route() {
            Route::BusAddress => Answer::Yes("bus address"),
            Route::HostBridge => Answer::Yes("through host bridge"),
            Route::System => Answer::No("it moved the bytes to system memory".into()),
            // Some of this and some of that, or addresses that lead nowhere known.
            other => Answer::No(format!("it gave addresses of another kind: {other:?}")),
        },
        Err(ProbeError::System { cause, .. }) if cause.errno == peerbuf::Errno::UNATCH => {
            Answer::NotAsked(format!("{client} has no driver that does DMA"))
        }
        Err(error) => Answer::No(error.to_string()),
    }
}

/// Some memory of a device that peerbuf.ko has, or whose own driver lends it.
fn export(device: PciAddress) -> Result<peerbuf::Buffer, String> {
    let opened = match Device::open(device) {
        Ok(opened) => opened,
        Err(error) => provider::open(device).map_err(|lender| {
            format!("{device} lends no memory: neither through peerbuf.ko ({error}) nor by its own driver ({lender})")
        })?,
    };
    let info = opened.query().map_err(|error| error.to_string())?;
    let bar = info
        .exportable()
        .ok_or_else(|| format!("no BAR of {device} can be exported"))?;
    let request = Request {
        bar: bar.index,
        offset: None,
        length: LENGTH,
        access: Access::ReadWrite,
    };
    opened.export(request).map_err(|error| error.to_string())
}

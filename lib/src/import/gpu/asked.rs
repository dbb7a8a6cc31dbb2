//! Where importers find the bytes of a GPU's memory, by the addresses that the kernel gives them.

use super::super::probe::{OnBehalf, Options, Probe, Route};
use crate::error::ProbeError;
use crate::export::gpu::{Exported, Mapping, Place, Seen};
use crate::topology::PciAddress;

impl Exported {
    /// Asks the kernel, by peerbuf_probe.ko, where the driver of a PCI device would find the bytes: of each descriptor
    /// once. The answers are in the receipt from then on.
    ///
    /// A driver that exports and has put the bytes into system memory is found out so ([`Place::System`]).
    ///
    /// # Errors
    /// [`ProbeError::Unavailable`] where the module is not there. That the kernel refuses the importer is
    /// an answer.
    pub fn ask(&mut self, device: PciAddress) -> Result<&[Seen], ProbeError> {
        let first = self.receipt.mapping;
        let descriptors = [
            (first, Some(&self.range)),
            (Mapping::Driver, self.other.as_ref()),
        ];
        let begin = self.receipt.seen.len();
        for (mapping, range) in descriptors {
            let Some(range) = range else { continue };
            let driver = OnBehalf::new(Probe::open()?, device, Options::default());
            let place = match driver.map(range.buffer()) {
                Ok((_, mapped)) => Ok(match mapped.route() {
                    Route::System => Place::System,
                    Route::BusAddress | Route::HostBridge => Place::Bar(mapped.provider),
                    Route::Mixed | Route::Unknown => Place::Unknown,
                }),
                Err(error) => Err(error.to_string()),
            };
            self.receipt.seen.push(Seen {
                by: device,
                mapping,
                place,
            });
        }
        Ok(&self.receipt.seen[begin..])
    }
}

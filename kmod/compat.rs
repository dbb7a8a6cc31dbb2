// SPDX-License-Identifier: GPL-2.0

//! What differs between the kernels that the modules are written for, in Rust. Kbuild has the list of
//! kernels, and says `since_7_3` for those from 7.3 on; for C see `compat.h`.

/// What `pci::Driver::probe` is told of the id that matched: since 7.3 nothing where the device was
/// taken by `driver_override`.
#[cfg(not(since_7_3))]
pub(crate) type IdInfo<'bound, T> = &'bound T;
/// As above.
#[cfg(since_7_3)]
pub(crate) type IdInfo<'bound, T> = Option<&'bound T>;

/// `kernel::pci_device_table!`, which up to 7.2 had a name for the module's table, too.
#[cfg(not(since_7_3))]
macro_rules! pci_device_table {
    ($table:ident, $($rest:tt)*) => {
        kernel::pci_device_table!($table, MODULE_ID_TABLE, $($rest)*);
    };
}
#[cfg(since_7_3)]
macro_rules! pci_device_table {
    ($($rest:tt)*) => {
        kernel::pci_device_table!($($rest)*);
    };
}
pub(crate) use pci_device_table;

/// The value of a module's parameter, which 7.2 gives by reference.
#[cfg(not(since_7_3))]
pub(crate) fn parameter(value: &u8) -> u8 {
    *value
}
#[cfg(since_7_3)]
pub(crate) fn parameter(value: u8) -> u8 {
    value
}

/// `THIS_MODULE` of C, which 7.3 made part of the module's type.
#[cfg(not(since_7_3))]
pub(crate) use crate::THIS_MODULE;
#[cfg(since_7_3)]
pub(crate) const THIS_MODULE: kernel::ThisModule =
    <crate::LocalModule as kernel::ModuleMetadata>::THIS_MODULE;

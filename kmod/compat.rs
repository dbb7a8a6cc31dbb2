// SPDX-License-Identifier: GPL-2.0

//! Differences between the supported kernel versions, on the Rust side; `compat.h` has the C side. Kbuild
//! lists the versions and sets `since_7_3` from 7.3 on.

/// The type of `pci::Driver::probe`'s id argument. Since 7.3 it is `None` for a device bound by
/// `driver_override`.
#[cfg(not(since_7_3))]
pub(crate) type IdInfo<'bound, T> = &'bound T;
/// Type of the id argument since 7.3.
#[cfg(since_7_3)]
pub(crate) type IdInfo<'bound, T> = Option<&'bound T>;

/// `kernel::pci_device_table!`, which takes an additional name for the module's table up to 7.2.
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

/// The value of a module parameter, which 7.2 passes by reference.
#[cfg(not(since_7_3))]
pub(crate) fn parameter(value: &u8) -> u8 {
    *value
}
#[cfg(since_7_3)]
pub(crate) fn parameter(value: u8) -> u8 {
    value
}

/// `THIS_MODULE` in C; since 7.3 it is part of the module's type.
#[cfg(not(since_7_3))]
pub(crate) use crate::THIS_MODULE;
#[cfg(since_7_3)]
pub(crate) const THIS_MODULE: kernel::ThisModule =
    <crate::LocalModule as kernel::ModuleMetadata>::THIS_MODULE;

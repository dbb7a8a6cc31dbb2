//! PCI addresses, under libFuzzer.
#![cfg_attr(fuzzing, no_main)]

peerbuf_fuzz::program!(address);

//! Another machine's card and memory, under libFuzzer.
#![cfg_attr(fuzzing, no_main)]

peerbuf_fuzz::program!(remote);

//! Messages between publishers and subscribers, under libFuzzer.
#![cfg_attr(fuzzing, no_main)]

peerbuf_fuzz::program!(message);

//! What procfs says of a dma-buf, under libFuzzer.
#![cfg_attr(fuzzing, no_main)]

peerbuf_fuzz::program!(fdinfo);

//! Importers: what uses buffers. One file per kind, with the same verbs in each: `open` takes
//! what is to use buffers, `attach` brings the two together, and the attachment plans, proves
//! and moves bytes.

pub mod file;

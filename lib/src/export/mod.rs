//! Exporters: where buffers come from. One file per kind, with the same verbs in each: `probe`
//! tries what the exporter needs and says what is missing, `export` makes a buffer.

pub mod memfd;
pub mod peerbuf;
pub mod udmabuf;

//! What can be moved to another thread and used from several. It compiles, or it does not.

use peerbuf_core::error::{BufferError, SystemError};
use peerbuf_core::{
    Buffer, BufferRange, CpuAccess, Deadline, DmaBuf, LazyMapping, Mapping, Stage, SyncFile,
};

fn any_thread<T: Send + Sync>() {}

#[test]
fn all_of_it_goes_to_any_thread() {
    any_thread::<Buffer>();
    any_thread::<BufferError>();
    any_thread::<BufferRange>();
    any_thread::<CpuAccess<'static>>();
    any_thread::<Deadline>();
    any_thread::<DmaBuf>();
    any_thread::<LazyMapping>();
    any_thread::<Mapping>();
    any_thread::<Box<dyn Stage>>();
    any_thread::<SyncFile>();
    any_thread::<SystemError>();
}

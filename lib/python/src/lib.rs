//! peerbuf for Python. `peerbuf.pyi` is its documentation.
//!
//! Objects that hold something are closed by `with`, or by `close()`; every method of a closed one raises. A
//! call that may wait lets other threads of Python run, and ends when a signal's handler raises.

mod buffer;
mod failure;
mod file;
mod held;
mod publisher;
mod rdma;
mod share;

use pyo3::prelude::*;

/// The module.
#[pymodule]
fn peerbuf(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", module.py().get_type::<failure::Error>())?;
    module.add_class::<buffer::Buffer>()?;
    module.add_class::<buffer::Mapping>()?;
    module.add_class::<file::File>()?;
    module.add_class::<share::Channel>()?;
    module.add_class::<share::Listener>()?;
    module.add_class::<share::Subscriber>()?;
    module.add_class::<publisher::Publisher>()?;
    module.add_class::<rdma::Domain>()?;
    module.add_class::<rdma::Registration>()?;
    module.add_function(wrap_pyfunction!(buffer::memfd, module)?)?;
    module.add_function(wrap_pyfunction!(buffer::udmabuf, module)?)?;
    module.add_function(wrap_pyfunction!(buffer::heap, module)?)?;
    module.add_function(wrap_pyfunction!(buffer::bar, module)?)?;
    module.add_function(wrap_pyfunction!(buffer::import_fd, module)?)
}

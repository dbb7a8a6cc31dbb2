//! Buffers for RDMA cards, in a protection domain that the program has.

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffer::Buffer;
use crate::failure::{access as access_of, raise, work};
use crate::file::report;
use crate::held::Held;

/// The program's protection domain.
#[pyclass(frozen, module = "peerbuf")]
pub struct Domain(Held<peerbuf_rdma::Domain>);

#[pymethods]
impl Domain {
    #[new]
    fn new(pd: usize) -> PyResult<Domain> {
        let pd: *mut c_void = ptr::with_exposed_provenance_mut(pd);
        // SAFETY: the caller's word, as with every address that ctypes takes.
        let domain = unsafe { peerbuf_rdma::Domain::from_raw(pd) };
        Ok(Domain(Held::new(domain.map_err(raise)?)))
    }

    #[pyo3(signature = (buffer, offset=0, length=None, remote=None))]
    fn register(
        &self,
        py: Python<'_>,
        buffer: &Buffer,
        offset: u64,
        length: Option<u64>,
        remote: Option<&str>,
    ) -> PyResult<Registration> {
        let remote = remote.map(access_of).transpose()?;
        let (domain, range) = (self.0.get(py)?, buffer.owner(py)?.range(offset, length)?);
        let registered = work(py, || domain.register(&range, remote))?;
        Ok(Registration(Held::new(registered)))
    }

    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) {
        self.0.close(py);
    }
}

/// A range of a buffer that a card may use.
#[pyclass(frozen, module = "peerbuf")]
pub struct Registration(Held<peerbuf_rdma::Registration>);

impl Registration {
    /// Raises for one whose buffer is not what was registered any more.
    fn registered(&self, py: Python<'_>) -> PyResult<peerbuf_rdma::Registration> {
        let registered = self.0.get(py)?;
        registered.check().map_err(raise)?;
        Ok(registered)
    }
}

#[pymethods]
impl Registration {
    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.registered(py)?.offset())
    }

    #[getter]
    fn length(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.registered(py)?.len())
    }

    #[getter]
    fn lkey(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.registered(py)?.lkey())
    }

    #[getter]
    fn rkey(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.registered(py)?.rkey())
    }

    #[getter]
    fn rung(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.registered(py)?.rung().as_str())
    }

    #[getter]
    fn mr(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        let mr = self.registered(py)?.as_raw();
        Ok(mr.map(|mr: NonNull<c_void>| mr.as_ptr().expose_provenance()))
    }

    fn plan<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        report(py, self.registered(py)?.plan(), 0, 0)
    }

    fn refresh(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<u64> {
        let registered = self.0.get(py)?;
        work(py, || registered.refresh(offset, length))
    }

    fn deliver(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<u64> {
        let registered = self.0.get(py)?;
        work(py, || registered.deliver(offset, length))
    }

    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) {
        self.0.close(py);
    }
}

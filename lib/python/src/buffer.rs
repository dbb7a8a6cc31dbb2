//! Buffers: where they come from, and the processor's access to them.

use std::ffi::c_int;
use std::os::fd::{AsFd, IntoRawFd};

use library::buffer::{BufferRange, Mapping as Map};
use library::export::peerbuf::{Device, Request};
use library::export::{heap as heaps, memfd as memfds, udmabuf as udmabufs};
use library::plan::topology::PciAddress;
use library::share::Lease;
use library::{Access, Buffer as Memory};
use peerbuf_c::failure::Failure;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::failure::{access as access_of, descriptor, raise, seconds, work};
use crate::held::{Held, open};

/// Whose memory it is.
#[derive(Clone)]
pub enum Owner {
    Own(Memory),
    Lent(Lease),
}

impl Owner {
    pub fn memory(&self) -> &Memory {
        match self {
            Owner::Own(memory) => memory,
            Owner::Lent(lease) => lease,
        }
    }

    /// `length` bytes, or all that follow.
    pub fn range(&self, offset: u64, length: Option<u64>) -> PyResult<BufferRange> {
        let memory = self.memory();
        let length = length.unwrap_or_else(|| memory.size().saturating_sub(offset));
        memory.range(offset, length).map_err(raise)
    }
}

#[pyclass(frozen, module = "peerbuf")]
pub struct Buffer(Held<Owner>);

impl Buffer {
    pub fn own(memory: Memory) -> Buffer {
        Buffer(Held::new(Owner::Own(memory)))
    }

    pub fn lent(lease: Lease) -> Buffer {
        Buffer(Held::new(Owner::Lent(lease)))
    }

    pub fn owner(&self, py: Python<'_>) -> PyResult<Owner> {
        self.0.get(py)
    }

    /// Takes the memory, and leaves a closed buffer. One that is lent is another process's, and stays.
    pub fn take(&self, py: Python<'_>) -> PyResult<Memory> {
        let mut held = self.0.lock(py);
        match open(&held)? {
            Owner::Own(memory) => {
                let memory = memory.clone();
                *held = None;
                Ok(memory)
            }
            Owner::Lent(_) => Err(lent()),
        }
    }
}

/// Only its publisher may hand over what is lent.
pub fn lent() -> PyErr {
    PyValueError::new_err("the buffer is borrowed, and cannot be handed on")
}

#[pymethods]
impl Buffer {
    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.owner(py)?.memory().size())
    }

    #[getter]
    fn name(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.owner(py)?.memory().name().to_owned())
    }

    #[getter]
    fn kind(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.owner(py)?.memory().provenance().kind;
        Ok(format!("{kind:?}").to_lowercase())
    }

    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let device = self.owner(py)?.memory().provenance().device;
        Ok(device.map(|device| device.to_string()))
    }

    #[getter]
    fn writable(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(match self.owner(py)? {
            Owner::Own(memory) => memory.is_writable(),
            Owner::Lent(lease) => lease.is_writable(),
        })
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(match self.owner(py)? {
            Owner::Own(_) => None,
            Owner::Lent(lease) => Some(lease.generation()),
        })
    }

    fn dmabuf(&self, py: Python<'_>) -> PyResult<Option<c_int>> {
        let owner = self.owner(py)?;
        let fd = owner.memory().dmabuf().map(|dmabuf| dmabuf.as_fd());
        let again = fd.map(|fd| fd.try_clone_to_owned()).transpose()?;
        Ok(again.map(IntoRawFd::into_raw_fd))
    }

    fn memfd(&self, py: Python<'_>) -> PyResult<Option<c_int>> {
        let owner = self.owner(py)?;
        let fd = owner.memory().host_memory();
        let again = fd.map(|fd| fd.try_clone_to_owned()).transpose()?;
        Ok(again.map(IntoRawFd::into_raw_fd))
    }

    fn for_engine(&self, py: Python<'_>, engine: &str) -> PyResult<String> {
        let owner = self.owner(py)?;
        let handle = owner.memory().for_engine(engine);
        handle.map(|it| it.to_string()).map_err(raise)
    }

    #[pyo3(signature = (access="r", offset=0, length=None))]
    fn map(
        &self,
        py: Python<'_>,
        access: &str,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Mapping> {
        let access = access_of(access)?;
        let owner = self.owner(py)?;
        let map = owner.range(offset, length)?.map(access).map_err(raise)?;
        Ok(Mapping(Held::new(Mapped {
            map,
            access,
            begun: false,
            views: 0,
            _owner: owner,
        })))
    }

    #[pyo3(signature = (timeout=0.0))]
    fn wanted_back(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let Owner::Lent(lease) = self.owner(py)? else {
            return Err(PyValueError::new_err("the buffer is not borrowed"));
        };
        let limit = seconds(timeout)?;
        Ok(py.detach(move || lease.wait_until_wanted(limit).is_some()))
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

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.owner(py) {
            Ok(owner) => {
                let memory = owner.memory();
                format!("<peerbuf.Buffer {memory}, {} bytes>", memory.size())
            }
            Err(_) => "<peerbuf.Buffer, closed>".to_owned(),
        }
    }
}

struct Mapped {
    map: Map,
    access: Access,
    begun: bool,
    /// Views of the bytes that Python has (`memoryview`, arrays).
    views: usize,
    /// Keeps a borrowed buffer.
    _owner: Owner,
}

impl Mapped {
    fn end(&mut self) -> PyResult<()> {
        if !std::mem::take(&mut self.begun) {
            return Ok(());
        }
        // Which bytes were written nobody told. The last one will do: all are on one bus.
        let last = self.map.len().checked_sub(1).map(|last| last as usize);
        let last = last.filter(|_| self.access.writes());
        self.map.end_unguarded(self.access, last).map_err(raise)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Nobody to tell.
        let _ = self.end();
    }
}

#[pyclass(frozen, module = "peerbuf")]
pub struct Mapping(Held<Mapped>);

#[pymethods]
impl Mapping {
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(open(&self.0.lock(py))?.map.len() as usize)
    }

    fn __enter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<Self>> {
        let this = slf.get();
        // Waits for devices.
        let begun = work(py, || {
            let mut state = this.0.lock_detached();
            let Some(state) = state.as_mut().filter(|state| !state.begun) else {
                return Ok(false);
            };
            state.map.begin_unguarded(state.access)?;
            state.begun = true;
            Ok::<_, Failure>(true)
        });
        match begun? {
            true => Ok(slf),
            false => Err(PyValueError::new_err(
                "it is closed, or in use by another `with`",
            )),
        }
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut state = self.0.lock(py);
        if let Some(mapped) = state.as_mut() {
            mapped.end()?;
            if mapped.views > 0 {
                let message = "a memoryview or an array still uses the bytes";
                return Err(PyBufferError::new_err(message));
            }
        }
        *state = None;
        Ok(())
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let mut state = slf.get().0.lock(slf.py());
        let Some(state) = state.as_mut().filter(|state| state.begun) else {
            let message = "the bytes are used within `with`, which begins the access";
            return Err(PyBufferError::new_err(message));
        };
        let read_only = c_int::from(!state.access.writes());
        let length = state.map.len() as ffi::Py_ssize_t;
        let bytes = state.map.as_ptr().cast();
        // SAFETY: Python's own view; the bytes are mapped until it is released, by `views`.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), bytes, length, read_only, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        state.views += 1;
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, py: Python<'_>, _view: *mut ffi::Py_buffer) {
        if let Some(state) = self.0.lock(py).as_mut() {
            state.views -= 1;
        }
    }
}

#[pyfunction]
pub fn memfd(py: Python<'_>, name: &str, length: u64) -> PyResult<Buffer> {
    work(py, || memfds::export(name, length)).map(Buffer::own)
}

#[pyfunction]
pub fn udmabuf(py: Python<'_>, name: &str, length: u64) -> PyResult<Buffer> {
    work(py, || udmabufs::export(name, length)).map(Buffer::own)
}

#[pyfunction]
pub fn heap(py: Python<'_>, heap: &str, name: &str, length: u64) -> PyResult<Buffer> {
    let export = || -> Result<_, Failure> { Ok(heaps::Heap::open(heap)?.export(name, length)?) };
    work(py, export).map(Buffer::own)
}

#[pyfunction]
#[pyo3(signature = (device, bar, length, offset=None, access="rw"))]
pub fn bar(
    py: Python<'_>,
    device: &str,
    bar: u8,
    length: u64,
    offset: Option<u64>,
    access: &str,
) -> PyResult<Buffer> {
    let request = Request {
        bar,
        offset,
        length,
        access: access_of(access)?,
    };
    let address = match device.starts_with('/') {
        true => None,
        false => {
            let address = device.parse::<PciAddress>();
            Some(address.map_err(|error| PyValueError::new_err(error.to_string()))?)
        }
    };
    let export = || {
        let device = match address {
            Some(address) => Device::open(address)?,
            None => Device::open_node(device)?,
        };
        device.export(request)
    };
    work(py, export).map(Buffer::own)
}

#[pyfunction]
pub fn import_fd(py: Python<'_>, fd: &Bound<'_, PyAny>) -> PyResult<Buffer> {
    let fd = descriptor(fd)?;
    work(py, || peerbuf_c::buffer::import(fd)).map(Buffer::own)
}

//! Buffers for other processes, and from them.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;

use library::share;
use pyo3::prelude::*;

use crate::buffer::{Buffer, Owner, lent};
use crate::failure::{descriptor, limit, patiently, raise, work};
use crate::held::Held;

/// One end of a connection that buffers travel over.
#[pyclass(frozen, module = "peerbuf")]
pub struct Channel(Held<Arc<share::Channel>>);

impl Channel {
    fn of(channel: share::Channel) -> Channel {
        Channel(Held::new(channel.into()))
    }

    /// The channel, which leaves a closed one. `None` while another thread uses it.
    pub fn take(&self, py: Python<'_>) -> PyResult<Option<share::Channel>> {
        let channel = self.0.get(py)?;
        *self.0.lock(py) = None;
        Ok(Arc::into_inner(channel))
    }
}

#[pymethods]
impl Channel {
    #[new]
    fn new(socket: &Bound<'_, PyAny>) -> PyResult<Channel> {
        let socket = descriptor(socket)?;
        share::Channel::from_fd(socket)
            .map(Channel::of)
            .map_err(raise)
    }

    #[staticmethod]
    fn pair() -> PyResult<(Channel, Channel)> {
        let (one, other) = share::Channel::pair().map_err(raise)?;
        Ok((Channel::of(one), Channel::of(other)))
    }

    #[staticmethod]
    fn connect(py: Python<'_>, path: PathBuf) -> PyResult<Channel> {
        work(py, || share::Channel::connect(path)).map(Channel::of)
    }

    #[getter]
    fn peer(&self, py: Python<'_>) -> PyResult<(Option<i32>, u32, u32)> {
        let peer = self.0.get(py)?.peer().map_err(raise)?;
        Ok((peer.pid, peer.uid, peer.gid))
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<c_int> {
        Ok(self.0.get(py)?.as_fd().as_raw_fd())
    }

    #[pyo3(signature = (buffer, offset=0, length=None))]
    fn send(
        &self,
        py: Python<'_>,
        buffer: &Buffer,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<()> {
        let owner = buffer.owner(py)?;
        if matches!(owner, Owner::Lent(_)) {
            return Err(lent());
        }
        let (channel, range) = (self.0.get(py)?, owner.range(offset, length)?);
        work(py, || channel.send_buffer(&range))
    }

    #[pyo3(signature = (timeout=None))]
    fn receive(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<(Buffer, u64, u64)> {
        let channel = self.0.get(py)?;
        let wait = |limit| channel.receive_buffer_within(limit);
        let range = patiently(py, limit(timeout)?, wait)?;
        let buffer = Buffer::own(range.buffer().clone());
        Ok((buffer, range.offset(), range.len()))
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

/// A place in the filesystem where other processes connect.
#[pyclass(frozen, module = "peerbuf")]
pub struct Listener(Held<Arc<share::Listener>>);

#[pymethods]
impl Listener {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Listener> {
        let listener = work(py, || share::Listener::bind(path))?;
        Ok(Listener(Held::new(listener.into())))
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<c_int> {
        Ok(self.0.get(py)?.as_fd().as_raw_fd())
    }

    fn accept(&self, py: Python<'_>) -> PyResult<Channel> {
        let listener = self.0.get(py)?;
        work(py, || listener.accept()).map(Channel::of)
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

/// A connection to a publisher.
#[pyclass(frozen, module = "peerbuf")]
pub struct Subscriber(Held<Arc<share::Subscriber>>);

#[pymethods]
impl Subscriber {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Subscriber> {
        let subscriber = work(py, || share::Subscriber::connect(path))?;
        Ok(Subscriber(Held::new(subscriber.into())))
    }

    #[staticmethod]
    fn from_descriptor(py: Python<'_>, socket: &Bound<'_, PyAny>) -> PyResult<Subscriber> {
        let socket = descriptor(socket)?;
        let connect = || share::Subscriber::new(share::Channel::from_fd(socket)?);
        Ok(Subscriber(Held::new(work(py, connect)?.into())))
    }

    #[pyo3(signature = (name, timeout=None))]
    fn borrow(&self, py: Python<'_>, name: &str, timeout: Option<f64>) -> PyResult<Buffer> {
        let subscriber = self.0.get(py)?;
        let wait = |limit| subscriber.buffer_within(name, limit);
        patiently(py, limit(timeout)?, wait).map(Buffer::lent)
    }

    fn names(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        Ok(self.0.get(py)?.names())
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

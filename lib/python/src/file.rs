//! Files and block devices, and what a transfer did.

use std::path::PathBuf;

use library::import::file::FileImporter;
use library::plan::{Direction, Plan};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::buffer::Buffer;
use crate::failure::{access as access_of, descriptor, raise, work};
use crate::held::Held;

/// What a transfer did, or would do, in the same words as the C library's JSON.
pub fn report<'py>(
    py: Python<'py>,
    plan: &Plan,
    bytes: u64,
    host_bytes: u64,
) -> PyResult<Bound<'py, PyDict>> {
    let reasons = PyList::empty(py);
    for reason in &plan.reasons {
        let entry = PyDict::new(py);
        entry.set_item("path", reason.path.as_str())?;
        entry.set_item("code", reason.code.as_str())?;
        entry.set_item("evidence", &reason.evidence)?;
        reasons.append(entry)?;
    }
    let report = PyDict::new(py);
    report.set_item("path", plan.path.as_str())?;
    report.set_item("bytes", bytes)?;
    report.set_item("host_bytes", host_bytes)?;
    report.set_item("reasons", reasons)?;
    Ok(report)
}

#[pyclass(frozen, module = "peerbuf")]
pub struct File(Held<FileImporter>);

#[pymethods]
impl File {
    #[new]
    #[pyo3(signature = (path, access="r"))]
    fn new(py: Python<'_>, path: PathBuf, access: &str) -> PyResult<File> {
        let access = access_of(access)?;
        let importer = work(py, || FileImporter::open_for(path, access))?;
        Ok(File(Held::new(importer)))
    }

    #[staticmethod]
    #[pyo3(signature = (fd, name="a file"))]
    fn from_descriptor(py: Python<'_>, fd: &Bound<'_, PyAny>, name: &str) -> PyResult<File> {
        let fd = descriptor(fd)?;
        let importer = work(py, || FileImporter::from_fd(fd, name))?;
        Ok(File(Held::new(importer)))
    }

    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<u64> {
        self.0.get(py)?.size().map_err(raise)
    }

    #[pyo3(signature = (buffer, file_offset=0, offset=0, length=None))]
    fn read_into<'py>(
        &self,
        py: Python<'py>,
        buffer: &Buffer,
        file_offset: u64,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (file, range) = (self.0.get(py)?, buffer.owner(py)?.range(offset, length)?);
        let receipt = work(py, || file.attach(&range)?.read(file_offset))?;
        report(py, &receipt.plan, receipt.bytes, receipt.host_bytes)
    }

    #[pyo3(signature = (buffer, file_offset=0, offset=0, length=None))]
    fn write_from<'py>(
        &self,
        py: Python<'py>,
        buffer: &Buffer,
        file_offset: u64,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (file, range) = (self.0.get(py)?, buffer.owner(py)?.range(offset, length)?);
        let receipt = work(py, || file.attach(&range)?.write(file_offset))?;
        report(py, &receipt.plan, receipt.bytes, receipt.host_bytes)
    }

    #[pyo3(signature = (buffer, into, file_offset=0, offset=0, length=None))]
    fn plan<'py>(
        &self,
        py: Python<'py>,
        buffer: &Buffer,
        into: &str,
        file_offset: u64,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let direction = match into {
            "buffer" => Direction::DiskToBuffer,
            "file" => Direction::BufferToDisk,
            _ => return Err(PyValueError::new_err("into is 'buffer' or 'file'")),
        };
        let (file, range) = (self.0.get(py)?, buffer.owner(py)?.range(offset, length)?);
        let plan = work(py, || file.attach(&range)?.plan(direction, file_offset))?;
        report(py, &plan, 0, 0)
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let file = self.0.get(py)?;
        work(py, || file.sync())
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

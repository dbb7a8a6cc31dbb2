//! What an object of Python's holds until it is closed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

pub struct Held<T>(Mutex<Option<T>>);

impl<T> Held<T> {
    pub fn new(value: T) -> Held<T> {
        Held(Mutex::new(Some(value)))
    }

    /// Lets other threads of Python run while one of them has it.
    pub fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Option<T>> {
        let guard = self.0.lock_py_attached(py);
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// In a thread that Python's others do not wait for.
    pub fn lock_detached(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it. Some wait for a thread of their own.
    pub fn close(&self, py: Python<'_>)
    where
        T: Send,
    {
        py.detach(|| {
            let value = self.lock_detached().take();
            drop(value);
        });
    }
}

impl<T: Clone> Held<T> {
    /// A handle of one's own, with which no other thread has to wait.
    pub fn get(&self, py: Python<'_>) -> PyResult<T> {
        open(&self.lock(py)).cloned()
    }
}

pub fn open<T>(value: &Option<T>) -> PyResult<&T> {
    value
        .as_ref()
        .ok_or_else(|| PyValueError::new_err("it is closed"))
}

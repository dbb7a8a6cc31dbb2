//! Buffers that are lent to other processes, and move.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use library::Buffer as Memory;
use library::error::ExportError;
use library::share::{self, BufferId, Copied, Event, SubscriberId};
use peerbuf_c::failure::Failure;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffer::Buffer;
use crate::failure::{limit, raise, seconds, work};
use crate::held::Held;
use crate::share::Channel;

/// The memory of the next generation, until the publisher takes it.
type Next = Arc<Mutex<Option<Memory>>>;

struct Published {
    id: BufferId,
    size: u64,
    next: Next,
}

struct Publishing {
    publisher: share::Publisher,
    buffers: BTreeMap<String, Published>,
}

impl Publishing {
    fn names(&self, ids: &[BufferId]) -> Vec<String> {
        let named = self.buffers.iter();
        let held = named.filter(|(_, published)| ids.contains(&published.id));
        held.map(|(name, _)| name.clone()).collect()
    }

    /// What it was, who it was about, which buffers, and why.
    fn told(&self, event: Event) -> Told {
        let of = |event, subscriber: SubscriberId| Told {
            event,
            subscriber: Some(subscriber.to_string()),
            ..Told::default()
        };
        match event {
            Event::Joined { subscriber, peer } => Told {
                peer: Some((peer.pid, peer.uid, peer.gid)),
                ..of("joined", subscriber)
            },
            Event::Left { subscriber, held } => Told {
                buffers: self.names(&held),
                ..of("left", subscriber)
            },
            Event::CutOff {
                subscriber,
                held,
                why,
            } => Told {
                buffers: self.names(&held),
                why: Some(why.to_string()),
                ..of("cut-off", subscriber)
            },
            Event::NotOffered {
                subscriber,
                buffer,
                why,
            } => Told {
                buffers: self.names(&[buffer]),
                why: Some(why),
                ..of("not-offered", subscriber)
            },
            Event::NotAccepted { why } => Told {
                event: "not-accepted",
                why: Some(why.to_string()),
                ..Told::default()
            },
            other => Told {
                event: "other",
                why: Some(format!("{other:?}")),
                ..Told::default()
            },
        }
    }
}

#[derive(Default)]
struct Told {
    event: &'static str,
    subscriber: Option<String>,
    peer: Option<(Option<i32>, u32, u32)>,
    buffers: Vec<String>,
    why: Option<String>,
}

impl Told {
    fn into_dict(self, py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("event", self.event)?;
        dict.set_item("subscriber", self.subscriber)?;
        dict.set_item("peer", self.peer)?;
        dict.set_item("buffers", self.buffers)?;
        dict.set_item("why", self.why)?;
        Ok(dict)
    }
}

#[pyclass(frozen, module = "peerbuf")]
pub struct Publisher(Held<Publishing>);

impl Publisher {
    /// Works with it while other threads of Python run; those that want the publisher, too, wait.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        with: impl FnOnce(&mut Publishing) -> Result<T, Failure> + Send,
    ) -> PyResult<T> {
        let done = work(py, || {
            let mut held = self.0.lock_detached();
            held.as_mut().map(with).transpose()
        });
        done?.ok_or_else(|| PyValueError::new_err("it is closed"))
    }

    /// A buffer's number, its size, and where its next generation is put.
    fn find(&self, py: Python<'_>, name: &str) -> PyResult<(BufferId, u64, Next)> {
        let found = self.with(py, |publishing| {
            let published = publishing.buffers.get(name);
            Ok(published.map(|known| (known.id, known.size, known.next.clone())))
        });
        found?.ok_or_else(|| PyKeyError::new_err(format!("no buffer is published as {name}")))
    }
}

#[pymethods]
impl Publisher {
    #[new]
    #[pyo3(signature = (path=None))]
    fn new(py: Python<'_>, path: Option<PathBuf>) -> PyResult<Publisher> {
        let publisher = work(py, || match path {
            Some(path) => share::Publisher::bind(path),
            None => share::Publisher::new(),
        })?;
        Ok(Publisher(Held::new(Publishing {
            publisher,
            buffers: BTreeMap::new(),
        })))
    }

    fn add(&self, py: Python<'_>, channel: &Channel) -> PyResult<()> {
        let channel = channel.take(py)?;
        let channel = channel.ok_or_else(|| PyValueError::new_err("the channel is in use"))?;
        self.with(py, |publishing| Ok(publishing.publisher.add(channel)?))?;
        Ok(())
    }

    fn publish(&self, py: Python<'_>, name: &str, buffer: &Buffer) -> PyResult<()> {
        let memory = buffer.take(py)?;
        let size = memory.size();
        let next: Next = Arc::new(Mutex::new(Some(memory)));
        let source = next.clone();
        let take = move |_: &share::Order| {
            let mut next = source.lock().unwrap_or_else(PoisonError::into_inner);
            // `migrate` puts one there before it asks for a generation.
            next.take().ok_or_else(|| ExportError::Unsuitable {
                what: "the number of buffers for the next generation",
                value: 0,
                must: "1".to_owned(),
            })
        };
        let backing = Copied::new(take).map_err(raise)?;
        self.with(py, |publishing| {
            let id = publishing.publisher.publish(name, backing)?;
            let published = Published { id, size, next };
            publishing.buffers.insert(name.to_owned(), published);
            Ok(())
        })
    }

    fn migrate(
        &self,
        py: Python<'_>,
        name: &str,
        buffer: &Buffer,
        timeout: f64,
    ) -> PyResult<(u64, usize, usize)> {
        let limit = seconds(timeout)?;
        let (id, size, next) = self.find(py, name)?;
        let offered = buffer.owner(py)?.memory().size();
        if offered != size {
            let message = format!("{name} has {size} bytes, and the buffer {offered}");
            return Err(PyValueError::new_err(message));
        }
        let memory = buffer.take(py)?;
        let moved = self.with(py, |publishing| {
            let put = |memory| *next.lock().unwrap_or_else(PoisonError::into_inner) = memory;
            put(Some(memory));
            let moved = publishing.publisher.migrate(id, limit);
            put(None);
            Ok(moved?)
        })?;
        Ok((moved.generation, moved.released, moved.lost.len()))
    }

    fn withdraw(&self, py: Python<'_>, name: &str, timeout: f64) -> PyResult<()> {
        let limit = seconds(timeout)?;
        let (id, ..) = self.find(py, name)?;
        self.with(py, |publishing| {
            publishing.publisher.withdraw(id, limit)?;
            publishing.buffers.remove(name);
            Ok(())
        })
    }

    #[pyo3(signature = (timeout=None))]
    fn next_event<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        // In pieces, so that other threads have the publisher in between, and signals are handled.
        const PIECE: Duration = Duration::from_millis(50);
        let limit = limit(timeout)?;
        let begun = Instant::now();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
            let piece = left.map_or(PIECE, |left| left.min(PIECE));
            let told = self.with(py, |publishing| {
                let event = publishing.publisher.next_event(Some(piece))?;
                Ok(event.map(|event| publishing.told(event)))
            })?;
            py.check_signals()?;
            match told {
                Some(told) => return told.into_dict(py).map(Some),
                None if left == Some(piece) => return Ok(None),
                None => {}
            }
        }
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

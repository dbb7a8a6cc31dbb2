//! The ways to submit a transfer's requests to the kernel.

use std::fmt;

use crate::error::SystemError;

/// The way to submit requests to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Queue {
    /// One system call after another, because no requests could run concurrently.
    #[default]
    Calls,
    /// Many requests at a time, by io_uring.
    IoUring,
    /// Several requests at a time, by threads that make one system call each.
    Threads {
        /// The reason why io_uring was not used.
        why: SystemError,
    },
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Queue::Calls => f.write_str("system calls"),
            Queue::IoUring => f.write_str("io_uring"),
            Queue::Threads { why } => write!(f, "threads ({why})"),
        }
    }
}

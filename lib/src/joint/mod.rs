//! Plans for several importers at once: for example, one buffer that a disk fills, a GPU draws
//! and the CPU reads.
//!
//! Each sink has its own path to the buffer's bytes. If all sinks take the same path, all use
//! the same bytes. Otherwise the plan is split: the sinks on the best path keep it, and the
//! bytes are copied for each of the others, on each use.

mod kept;

use std::fmt;

use crate::buffer::BufferRange;
use crate::error::ImportError;
use crate::import::Importer;
use crate::import::file::FileImporter;
use crate::plan::{Direction, Path, Plan, Reason};

pub use kept::{KeptPlan, PlanGuard};

/// A user of a buffer that can plan its path: every [`Importer`], and a file with a direction
/// ([`FileImporter::in_direction`]).
pub trait Sink {
    /// Display name.
    fn name(&self) -> String;

    /// The path that the sink would take.
    ///
    /// # Errors
    /// Failures that do not depend on the path. A sink that cannot use the buffer returns
    /// [`ImportError::Impossible`].
    fn plan(&self, source: &BufferRange) -> Result<Plan, ImportError>;
}

impl<T: Importer + ?Sized> Sink for T {
    fn name(&self) -> String {
        Importer::name(self)
    }

    fn plan(&self, source: &BufferRange) -> Result<Plan, ImportError> {
        Ok(self.attach(source)?.plan())
    }
}

/// A file or disk, and the direction of its transfers.
#[derive(Debug, Clone)]
pub struct Directed {
    file: FileImporter,
    direction: Direction,
}

impl FileImporter {
    /// This file as a sink of a joint plan ([`plan`]).
    /// [`Attachment::plan`](crate::import::file::Attachment::plan) describes the proof of its
    /// path.
    pub fn in_direction(&self, direction: Direction) -> Directed {
        Directed {
            file: self.clone(),
            direction,
        }
    }
}

impl Sink for Directed {
    fn name(&self) -> String {
        format!("{} ({})", self.file.name(), self.direction)
    }

    fn plan(&self, source: &BufferRange) -> Result<Plan, ImportError> {
        Ok(self.file.attach(source)?.plan(self.direction, 0)?)
    }
}

/// One sink's part in a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Part {
    /// The sink's name.
    pub sink: String,
    /// The sink's path, and the reasons against better ones.
    pub plan: Plan,
}

/// The paths of several sinks to one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct JointPlan {
    /// The weakest path of all sinks. [`Path::StagedCopy`] without sinks.
    pub path: Path,
    /// The sinks, in the order of the call.
    pub parts: Vec<Part>,
    /// The costs, if the sinks take different paths.
    pub split: Option<Split>,
}

/// The costs of different paths.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Split {
    /// The best path that at least one sink takes.
    pub best: Path,
    /// Number of sinks on the best path. The others take worse paths.
    pub on_best: usize,
    /// Number of sinks that need copies of the bytes.
    pub copies: usize,
    /// Number of bytes that the CPU copies for one use of the range by every sink.
    pub copied: u64,
}

/// Chooses the path of each sink to the source, and their common path.
///
/// A sink that cannot use the buffer itself gets a staged copy, with the reason.
///
/// ```
/// use peerbuf::export::memfd;
/// use peerbuf::import::cpu::Processor;
/// use peerbuf::joint;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let buffer = memfd::export("frames", 4096)?;
/// let joint = joint::plan(&buffer.whole(), &[&Processor])?;
/// println!("{joint}");
/// assert!(joint.split.is_none());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`Sink::plan`] of any sink, except [`ImportError::Impossible`].
pub fn plan(source: &BufferRange, sinks: &[&dyn Sink]) -> Result<JointPlan, ImportError> {
    let mut parts = Vec::with_capacity(sinks.len());
    for sink in sinks {
        let plan = match sink.plan(source) {
            Ok(plan) => plan,
            Err(ImportError::Impossible { code, evidence, .. }) => Plan {
                path: Path::StagedCopy,
                reasons: [Path::PeerToPeer, Path::SharedHostMemory]
                    .map(|path| Reason::new(path, code, evidence.clone()))
                    .into(),
            },
            Err(error) => return Err(error),
        };
        let sink = sink.name();
        parts.push(Part { sink, plan });
    }
    let paths = || parts.iter().map(|part| part.plan.path);
    let path = paths().min().unwrap_or(Path::StagedCopy);
    let best = paths().max().unwrap_or(path);
    let copies = paths().filter(|path| *path == Path::StagedCopy).count();
    let split = (best != path).then(|| Split {
        best,
        on_best: paths().filter(|path| *path == best).count(),
        copies,
        copied: source.len().saturating_mul(copies as u64),
    });
    Ok(JointPlan { path, parts, split })
}

impl fmt::Display for JointPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "all: {}", self.path)?;
        if let Some(split) = &self.split {
            write!(
                f,
                "; {} of {} take {}, and {} bytes are copied for {} others each time",
                split.on_best,
                self.parts.len(),
                split.best,
                split.copied,
                split.copies
            )?;
        }
        for part in &self.parts {
            write!(f, "\n{}: {}", part.sink, part.plan)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::memfd;
    use crate::plan::ReasonCode;

    /// A sink with a given path; `None` refuses the buffer.
    struct Given(Option<Path>);

    impl Sink for Given {
        fn name(&self) -> String {
            "given".into()
        }

        fn plan(&self, source: &BufferRange) -> Result<Plan, ImportError> {
            let path = self.0.ok_or_else(|| ImportError::Impossible {
                importer: self.name(),
                buffer: source.buffer().name().into(),
                code: ReasonCode::NoDmaBuf,
                evidence: "no dma-buf".into(),
            })?;
            Ok(Plan::new(path, Vec::new()))
        }
    }

    fn joint(paths: &[Option<Path>]) -> JointPlan {
        let buffer = memfd::export("joint", 8192).unwrap();
        let sinks: Vec<Given> = paths.iter().copied().map(Given).collect();
        let sinks: Vec<&dyn Sink> = sinks.iter().map(|sink| sink as &dyn Sink).collect();
        plan(&buffer.whole(), &sinks).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn the_weakest_decides_and_a_split_says_what_it_costs() {
        use Path::{PeerToPeer, SharedHostMemory, StagedCopy};
        let one = joint(&[Some(PeerToPeer), Some(PeerToPeer)]);
        assert_eq!((one.path, one.split), (PeerToPeer, None));
        let staged = joint(&[Some(StagedCopy), Some(StagedCopy)]);
        assert_eq!((staged.path, staged.split), (StagedCopy, None));
        let mixed = joint(&[Some(PeerToPeer), Some(StagedCopy), Some(PeerToPeer), None]);
        assert_eq!(mixed.path, StagedCopy);
        let split = Split {
            best: PeerToPeer,
            on_best: 2,
            copies: 2,
            copied: 16384,
        };
        assert_eq!(mixed.split, Some(split));
        assert!(
            mixed
                .to_string()
                .contains("16384 bytes are copied for 2 others")
        );
        // Neither path copies, and yet the sinks take different paths.
        let host = joint(&[Some(PeerToPeer), Some(SharedHostMemory)]);
        assert_eq!(host.path, SharedHostMemory);
        assert_eq!(host.split.unwrap().copied, 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_sink_that_cannot_use_the_buffer_has_its_reason_against_each_better_path() {
        let joint = joint(&[None]);
        let [part] = &joint.parts[..] else {
            panic!("{joint:?}");
        };
        let against: Vec<Path> = part.plan.reasons.iter().map(|reason| reason.path).collect();
        assert_eq!(against, [Path::PeerToPeer, Path::SharedHostMemory]);
        for reason in &part.plan.reasons {
            assert_eq!(reason.code, ReasonCode::NoDmaBuf);
            assert!(!reason.evidence.is_empty() && !reason.code.remedy().is_empty());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn no_sinks_have_no_path_in_common() {
        let none = joint(&[]);
        assert_eq!(
            (none.path, none.parts.len(), none.split),
            (Path::StagedCopy, 0, None)
        );
    }
}

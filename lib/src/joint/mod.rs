//! Plans for several importers at once: one buffer that a disk fills, a graphics card draws and the processor reads.
//!
//! Each sink has a path of its own to the buffer's bytes. If all take the same path, all use the same bytes. If
//! not, the weakest decides how far that is so: the plan is split, those on the best path stay on it, and the bytes
//! are copied for each of the others, each time that it uses them.

mod kept;

use std::fmt;

use crate::buffer::BufferRange;
use crate::error::ImportError;
use crate::import::Importer;
use crate::import::file::FileImporter;
use crate::plan::{Direction, Path, Plan, Reason};

pub use kept::KeptPlan;

/// Whatever can say how it would get at a buffer's bytes: every [`Importer`], and a file with a direction
/// ([`FileImporter::in_direction`]).
pub trait Sink {
    /// Its name, for people.
    fn name(&self) -> String;

    /// The path that it would take.
    ///
    /// # Errors
    /// What has nothing to do with a path. That a sink cannot use the buffer is
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

/// A file or disk, and which way bytes go between it and the buffer.
#[derive(Debug, Clone)]
pub struct Directed {
    file: FileImporter,
    direction: Direction,
}

impl FileImporter {
    /// This file as a sink of a plan for several ([`plan`]). Its path is proved as
    /// [`Attachment::plan`](crate::import::file::Attachment::plan) says.
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
    /// Its path, and why not a better one.
    pub plan: Plan,
}

/// How several sinks get at one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct JointPlan {
    /// The path that every sink can take: the weakest of all. [`Path::StagedCopy`] without sinks.
    pub path: Path,
    /// The sinks, in the order in which they were given.
    pub parts: Vec<Part>,
    /// Where they do not all take the same path: what that costs.
    pub split: Option<Split>,
}

/// What it costs that sinks take different paths.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Split {
    /// The best path that some take.
    pub best: Path,
    /// How many sinks take it. The others take worse ones.
    pub on_best: usize,
    /// How many sinks have the bytes copied for them.
    pub copies: usize,
    /// How many bytes the processor copies each time that all sinks have used the range once.
    pub copied: u64,
}

/// Chooses the path of each sink to the source, and says what they have in common.
///
/// A sink that cannot use the buffer itself gets a staged copy, with its reason.
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
/// As [`Sink::plan`] of any of them, but for [`ImportError::Impossible`].
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

    /// A sink whose path is given; `None` for one that takes no such buffer.
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
        // Both are without a copy, and yet not the same bytes' path.
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

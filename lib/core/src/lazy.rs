//! [`LazyMapping`]: a range that is mapped at the first use of its addresses.

use crate::access::Access;
use crate::buffer::BufferRange;
use crate::error::BufferError;
use crate::mapping::Mapping;

/// A range for copies that is mapped only when something needs its addresses.
///
/// Copies go through the buffer's [`Stage`](crate::Stage) if it has one, otherwise through the mapping. Each
/// copy first waits for the buffer's fences, like a CPU access to a mapping.
#[derive(Debug)]
pub struct LazyMapping {
    range: BufferRange,
    mapping: Option<Mapping>,
}

impl LazyMapping {
    /// Wraps a range, without mapping it.
    ///
    /// # Errors [`BufferError::Inherited`] for a buffer that was lent to a process from which this one was
    /// forked.
    pub fn new(range: &BufferRange) -> Result<LazyMapping, BufferError> {
        range.usable(Access::Read)?;
        Ok(LazyMapping {
            range: range.clone(),
            mapping: None,
        })
    }

    /// The range.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.range.len()
    }

    /// True if the range is empty.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The mapping, with all access that the buffer allows; made at the first call.
    ///
    /// # Errors
    /// As [`BufferRange::map`].
    pub fn mapping(&mut self) -> Result<&mut Mapping, BufferError> {
        let mapping = match self.mapping.take() {
            Some(mapping) => mapping,
            None => self.range.map(self.range.buffer().allowed())?,
        };
        Ok(self.mapping.insert(mapping))
    }

    /// Checks that the bytes can be copied: that there is a stage, or that the range can be mapped, which it
    /// then is.
    ///
    /// # Errors
    /// As [`BufferRange::map`].
    pub fn reach(&mut self) -> Result<(), BufferError> {
        match self.range.buffer().stage() {
            Some(_) => Ok(()),
            None => self.mapping().map(drop),
        }
    }

    /// Copies bytes from `offset` out of the range.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`]; [`BufferError::Stage`], or as [`BufferRange::map`] and
    /// [`Mapping::begin_cpu_access`].
    pub fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), BufferError> {
        let part = self.range.slice(offset, into.len() as u64)?;
        if let Some(copied) = part.download(into) {
            return copied;
        }
        let cpu = self.mapping()?.begin_cpu_access(Access::Read)?;
        cpu.read_at(offset, into)?;
        cpu.end()
    }

    /// Copies bytes to `offset` in the range. On return devices see them.
    ///
    /// # Errors
    /// As [`LazyMapping::read_at`], and [`BufferError::Access`].
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), BufferError> {
        let part = self.range.slice(offset, from.len() as u64)?;
        if let Some(copied) = part.upload(from) {
            return copied;
        }
        let mut cpu = self.mapping()?.begin_cpu_access(Access::Write)?;
        cpu.write_at(offset, from)?;
        cpu.end()
    }
}

#[cfg(test)]
#[cfg_attr(miri, allow(unused_imports))]
mod tests {
    use std::error::Error;
    use std::sync::Mutex;

    use super::*;
    use crate::{Stage, memfd};

    /// Memory apart from the buffer, so that a test can tell which of the two was copied.
    struct Beside(Mutex<Vec<u8>>);

    impl Stage for Beside {
        fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
            if from.contains(&0xff) {
                return Err("error 700".into());
            }
            self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        }

        fn download(
            &self,
            offset: u64,
            into: &mut [u8],
        ) -> Result<(), Box<dyn Error + Send + Sync>> {
            into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
            Ok(())
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn copies_go_by_the_stage_and_map_nothing() {
        let plain = memfd::buffer("test", 4096).unwrap();
        let staged = plain.clone().with_stage(Beside(Mutex::new(vec![1; 4096])));
        let range = staged.range(100, 50).unwrap();
        assert_eq!(range.to_vec().unwrap(), [1; 50]);
        let mut lazy = LazyMapping::new(&range).unwrap();
        lazy.reach().unwrap();
        lazy.write_at(10, &[2; 5]).unwrap();
        let mut back = [0; 50];
        lazy.read_at(0, &mut back).unwrap();
        assert_eq!(back[9..16], [1, 2, 2, 2, 2, 2, 1]);
        assert!(lazy.mapping.is_none(), "mapped");
        assert!(
            plain
                .whole()
                .to_vec()
                .unwrap()
                .iter()
                .all(|&byte| byte == 0)
        );
        // Bytes outside the range never reach the stage, and an error of the stage names the buffer.
        assert!(matches!(
            lazy.write_at(46, &[2; 5]),
            Err(BufferError::OutOfRange { .. })
        ));
        let mut long = [0; 51];
        assert!(matches!(
            range.read_bytes(&mut long),
            Err(BufferError::OutOfRange { .. })
        ));
        let failed = lazy.write_at(0, &[0xff]).unwrap_err().to_string();
        assert!(
            failed.contains("test") && failed.contains("error 700"),
            "{failed}"
        );
        // The mapping is still available for users of addresses.
        assert_eq!(lazy.mapping().unwrap().len(), 50);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn without_a_stage_the_range_is_mapped_when_bytes_are_asked_for() {
        let buffer = memfd::buffer("test", 4096).unwrap();
        let mut lazy = LazyMapping::new(&buffer.whole()).unwrap();
        assert!(lazy.mapping.is_none());
        lazy.write_at(7, b"here").unwrap();
        assert!(lazy.mapping.is_some());
        assert_eq!(buffer.range(7, 4).unwrap().to_vec().unwrap(), b"here");
    }
}

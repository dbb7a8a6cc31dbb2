//! The calls that `export::gpu` and `import::gpu` make to each runtime, and their conclusions from
//! the answers. Each runtime's library is a stand-in, without a GPU and without the vendor's
//! software.

#[path = "../common/mod.rs"]
mod common;
mod cuda;
mod hsa;
mod import;
mod level_zero;
#[allow(dead_code)]
#[path = "../standin/mod.rs"]
mod standin;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::LazyLock;

use peerbuf::error::ExportError;
use peerbuf::export::gpu::{self, Descriptors, Runtime};

use common::not_run;
use standin::{CUDA, HSA, Held, LEVEL_ZERO, Source, StandIn};

/// The variable with the compile options of a child's stand-in.
const CHILD: &str = "PEERBUF_TEST_STANDIN";

/// The stand-ins, in the order of [`Runtime::ALL`]. All are loaded, so a pointer's owner has to
/// be found.
static STANDINS: LazyLock<Result<[StandIn; 3], String>> = LazyLock::new(|| {
    let load = |source: &Source| source.load(&[]);
    Ok([load(&CUDA)?, load(&HSA)?, load(&LEVEL_ZERO)?])
});

/// Holds a stand-in for one test. Without a C compiler the test reports that it did not run.
fn hold(which: usize, test: &str) -> Option<Held> {
    match &*STANDINS {
        Ok(standins) => Some(standins[which].hold()),
        Err(why) => {
            not_run(test, why);
            None
        }
    }
}

fn export(pointer: u64, length: u64) -> Result<Descriptors, ExportError> {
    // SAFETY: the tests drop everything that they make before they free the memory.
    unsafe { gpu::descriptors_of(pointer, length) }
}

fn refusal(pointer: u64, length: u64) -> String {
    let said = export(pointer, length).unwrap_err().to_string();
    assert!(!said.contains('\n'), "{said}");
    said
}

fn page() -> u64 {
    rustix::param::page_size() as u64
}

/// The stand-in's name of a descriptor: the name of the memfd or udmabuf.
fn name(fd: impl AsFd) -> String {
    let number = fd.as_fd().as_raw_fd();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
    info + &link.display().to_string()
}

fn size(fd: impl AsFd) -> u64 {
    rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0)).unwrap()
}

/// The bytes of a memfd. Only the lab reads a udmabuf.
fn read(fd: BorrowedFd<'_>, offset: u64, length: usize) -> Option<Vec<u8>> {
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs an ignored test in a separate process, with another stand-in.
fn in_a_child(test: &str, role: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env(CHILD, role)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains("1 passed"), "{said}");
}

/// In such a process: its role, and its stand-in.
fn other(source: &Source) -> (String, Held) {
    let role = std::env::var(CHILD).expect("a role");
    let standin = Box::leak(Box::new(source.load(&[&role]).unwrap()));
    (role, standin.hold())
}

#[test]
fn a_machine_without_the_libraries_says_so_in_one_line() {
    // Other tests count descriptors, and starting a child opens some.
    let _alone = STANDINS.as_ref().ok().map(|standins| standins[0].hold());
    in_a_child("without_libraries", "");
}

#[test]
#[ignore = "the other process of a test, which starts it"]
fn without_libraries() {
    let error = export(0x1000, 1).unwrap_err();
    let ExportError::NotGpuMemory { pointer, asked } = &error else {
        panic!("{error}");
    };
    assert_eq!((*pointer, asked.len()), (0x1000, Runtime::ALL.len()));
    assert!(!error.to_string().contains('\n'), "{error}");
    for (line, (runtime, found)) in asked.iter().zip(gpu::probe()) {
        assert!(line.contains(runtime.library()), "{line}");
        // A machine with the real library gives another answer.
        if let Err(why) = found {
            assert!(line.contains(&why), "{line}: {why}");
        }
    }
}

#[test]
fn the_runtimes_that_can_be_used_are_listed_with_their_devices() {
    let Some(level_zero) = hold(
        2,
        "the_runtimes_that_can_be_used_are_listed_with_their_devices",
    ) else {
        return;
    };
    let counts: Vec<_> = gpu::probe();
    let expected = Runtime::ALL.map(|runtime| (runtime, Ok(2)));
    assert_eq!(counts, expected);
    level_zero.set("initialised", 0);
    level_zero.set("init", 0x7000_0001);
    let (runtime, found) = &gpu::probe()[2];
    let said = format!("{runtime}: {}", found.as_ref().unwrap_err());
    assert_eq!(
        said,
        "Level Zero: zeInit: ZE_RESULT_ERROR_DEVICE_LOST (1879048193)"
    );
}

//! Descriptors are closed on every error. The only test of its process, so that it can count
//! descriptors.

use std::os::fd::{AsFd, BorrowedFd};

use peerbuf::export::memfd;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::share::Channel;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_are_closed_on_success_and_on_every_error() {
    let buffer = memfd::export("weights", 1 << 20).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    ours.send_buffer(&buffer.whole()).unwrap();
    let (offer, fds) = theirs.receive_message(4096).unwrap();
    let memory = fds[0].as_fd();
    let socket = ours.as_fd();
    let directory = std::env::temp_dir();

    let before = open_descriptors();
    let refused = |message: &[u8], descriptors: &[BorrowedFd<'_>]| {
        ours.send_message(message, descriptors).unwrap();
        theirs.receive_buffer().unwrap_err();
        assert_eq!(
            open_descriptors(),
            before,
            "after {} descriptors",
            descriptors.len()
        );
    };
    for _ in 0..50 {
        ours.send_buffer(&buffer.range(4096, 8192).unwrap())
            .unwrap();
        drop(theirs.receive_buffer().unwrap());
        // A message that is no offer, one that is too long, and too few, too many, wrong and
        // misordered descriptors.
        refused(b"nonsense", &[memory; 16]);
        refused(&[&offer[..], &[0]].concat(), &[memory]);
        refused(&offer, &[]);
        refused(&offer, &[memory, memory, memory]);
        refused(&offer, &[socket]);

        let file = unnamed_file(&directory).unwrap();
        std::io::Write::write_all(&mut &file, &[1; 10_000]).unwrap();
        let file = FileImporter::from_fd(file.into(), "a file").unwrap();
        file.attach(&buffer.whole()).unwrap().read(0).unwrap();
        FileImporter::open("/dev/null").unwrap_err();
    }
    assert_eq!(open_descriptors(), before);
}

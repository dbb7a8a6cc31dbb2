//! Reads a file into a dma-buf that another program made, and sends it on with RDMA of its own.
//!
//! `stranger FILE CARD SOCKET`, with the dma-buf as standard input. At the socket somebody tells where to.
//! `queue.rs` has what every program on verbs has; peerbuf is in this file alone.

mod queue;

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use peerbuf::Buffer;
use peerbuf::import::file::FileImporter;
use peerbuf_rdma::Domain;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, file, card, socket] = arguments.as_slice() else {
        return Err("stranger FILE CARD SOCKET <a dma-buf".into());
    };
    // What the stranger has: a descriptor, and a protection domain with a queue pair.
    let theirs = std::io::stdin().as_fd().try_clone_to_owned()?;
    let (domain, mut queue) = queue::open(card, &mut UnixStream::connect(socket)?)?;

    let buffer = Buffer::import(theirs)?;
    let read = FileImporter::open(file)?.attach(&buffer.whole())?.read(0)?;
    // SAFETY: the domain is live, and is dropped after the region, which was declared later.
    let region = unsafe { Domain::from_raw(domain.pd().as_ptr().cast()) }?
        .register(&buffer.range(0, read.bytes)?, None)?;
    region.refresh(0, read.bytes)?;
    let all = region.sge(0, read.bytes.try_into()?)?;
    queue.send(all.address, all.length, all.lkey)?;

    println!(
        "{buffer}: {} bytes, read by {}, sent by {}",
        read.bytes,
        read.plan.path,
        region.rung()
    );
    Ok(())
}

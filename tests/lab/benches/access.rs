//! What a CPU-access guard of the crate costs beside the two ioctls that it makes, in instructions.
//! `cargo lab bench access`; the table is docs/access-bench.md.

use std::os::fd::AsFd;

use peerbuf::export::{memfd, peerbuf as module, udmabuf};
use peerbuf::{Access, Buffer};
use peerbuf_lab_suite::cost::{counted, median};
use peerbuf_lab_suite::node::{Node, ioctl};

/// `DMA_BUF_IOCTL_SYNC` (include/uapi/linux/dma-buf.h).
const SYNC: u32 = (1 << 30) | (8 << 16) | (0x62 << 8);
const READ: u64 = 1;
const WRITE: u64 = 2;
const END: u64 = 4;

fn bare(buffer: &Buffer, access: u64) -> u64 {
    let Some(dmabuf) = buffer.dmabuf() else {
        return 0;
    };
    let fd = dmabuf.as_fd();
    median(|| {
        let (cost, ()) = counted(|| {
            for flags in [access, access | END] {
                ioctl(fd, SYNC, (&raw const flags).addr()).unwrap();
            }
        });
        cost
    })
}

fn guard(buffer: &Buffer, access: Access, bytes: usize) -> u64 {
    let mut mapping = buffer.whole().map(Access::ReadWrite).unwrap();
    let mut copy = vec![7; bytes];
    median(|| {
        let (cost, ()) = counted(|| {
            let mut cpu = mapping.begin_cpu_access(access).unwrap();
            if bytes > 0 && access.writes() {
                cpu.write_at(0, &copy).unwrap();
            } else if bytes > 0 {
                cpu.read_at(0, &mut copy).unwrap();
            }
            cpu.end().unwrap();
        });
        cost
    })
}

fn main() {
    let card = module::Device::open(Node::largest().bdf.parse().unwrap()).unwrap();
    let request = module::Request {
        bar: 2,
        offset: None,
        length: 1 << 20,
        access: Access::ReadWrite,
    };
    let buffers = [
        ("udmabuf", udmabuf::export("udmabuf", 1 << 20).unwrap()),
        ("BAR", card.export(request).unwrap()),
        ("memfd", memfd::export("memfd", 1 << 20).unwrap()),
    ];
    println!(
        "| buffer, access | two bare ioctls | guard | ratio | guard and 8 bytes | and 4096 bytes |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, buffer) in &buffers {
        for (how, access, flags) in [
            ("read", Access::Read, READ),
            ("write", Access::Write, WRITE),
        ] {
            let (floor, cost) = (bare(buffer, flags), guard(buffer, access, 0));
            let ratio = if floor == 0 {
                "-".to_owned()
            } else {
                format!("{:.2}", cost as f64 / floor as f64)
            };
            let (some, page) = (guard(buffer, access, 8), guard(buffer, access, 4096));
            println!("| {name}, {how} | {floor} | {cost} | {ratio} | {some} | {page} |");
        }
    }
}

//! Vulkan's memory in two processes: the first allocates it, the second writes into it, and a compute shader of the
//! first works on what came.
use peerbuf::device::vulkan::{Affine, Device, Formula, Words};
use peerbuf::{export::vulkan, share::Channel};
use std::os::fd::{AsFd, OwnedFd};
use std::{error::Error, process::Command, process::Stdio, time::Duration};

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1) {
        None => allocate(),
        Some(_) => write(),
    }
}
fn allocate() -> Result<(), Box<dyn Error>> {
    let device = &Device::all()?[0];
    let memory = &vulkan::export(device, "message", 4096)?;
    let (ours, theirs) = Channel::pair()?;
    let mut second = Command::new(std::env::current_exe()?);
    second
        .arg("second")
        .stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut second = second.spawn()?;
    ours.send_buffer(&memory.buffer().range(0, 4096)?)?;
    second.wait()?;
    let (words, limit) = (Words { memory, offset: 0 }, Duration::from_secs(60));
    let work = Affine::new(device)?.run(words, words, 1024, Formula::COMPLEMENT, limit)?;
    work.wait(limit)?;
    let bytes = memory.buffer().range(0, 5)?.to_vec()?;
    let back: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
    println!("{}: {}", device.name(), String::from_utf8(back)?);
    Ok(())
}
fn write() -> Result<(), Box<dyn Error>> {
    let channel = Channel::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    Ok(channel
        .receive_buffer()?
        .slice(0, 5)?
        .write_bytes(b"hello")?)
}

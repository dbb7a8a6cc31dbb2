//! Two processes count in a buffer that a third lends them and moves meanwhile: from the BAR of the
//! first card of peerbuf.ko to system memory and back; without a card from memfd to memfd.
use peerbuf::export::{memfd, peerbuf as module};
use peerbuf::share::{Backing, Copied, Movable, Publisher, Subscriber};
use std::{error::Error, process::Command, time::Duration};

fn main() -> Result<(), Box<dyn Error>> {
    match &std::env::args().collect::<Vec<_>>()[..] {
        [_, socket, place] => count(socket, place.parse()?),
        [program, ..] => lend(program, &format!("/tmp/counters-{}", std::process::id())),
        [] => Ok(()),
    }
}
fn lend(program: &str, socket: &str) -> Result<(), Box<dyn Error>> {
    let backing: Box<dyn Backing> = match module::probe() {
        Ok(cards) => Box::new(Movable::of(&cards[0], 2, 4096)?),
        Err(_) => Box::new(Copied::new(|_| memfd::export("counters", 4096))?),
    };
    let mut publisher = Publisher::bind(socket)?;
    let id = publisher.publish("counters", backing)?;
    for place in ["0", "8"] {
        Command::new(program).args([socket, place]).spawn()?;
    }
    for _ in 0..10 {
        publisher.serve_for(Duration::from_millis(200))?;
        let moved = publisher.migrate(id, Duration::from_secs(1))?;
        println!("generation {}: {}", moved.generation, moved.placement);
    }
    Ok(()) // the end of the publisher ends the others
}
fn count(socket: &str, place: u64) -> Result<(), Box<dyn Error>> {
    let subscriber = Subscriber::connect(socket)?;
    while let Ok(lease) = subscriber.buffer("counters") {
        let mut mapping = lease.range(place, 8)?.map(peerbuf::Access::ReadWrite)?;
        let mut cpu = mapping.begin_cpu_access(peerbuf::Access::ReadWrite)?;
        cpu.write(0, &(cpu.read::<u64>(0)? + 1))?;
    }
    Ok(())
}

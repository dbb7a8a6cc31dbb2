//! Async publishing (`peerbuf::share::tokio`): the same guarantees, and no task waits for
//! another task's wait. Also async files (`peerbuf::import::file::tokio`).

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use peerbuf::Buffer;
use peerbuf::error::ShareError;
use peerbuf::export::memfd;
use peerbuf::import::file::tokio::PIECE;
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::share::tokio::{Publisher, Subscriber};
use peerbuf::share::{Backing, BufferId, Channel, Copied, CutOff, Event, Lease};
use tokio::time::{sleep, timeout};

const SIZE: u64 = 64 << 10;
/// Time limit for expected events.
const LONG: Duration = Duration::from_secs(20);
/// Waiting time for events that must not happen.
const SHORT: Duration = Duration::from_millis(50);

fn memory() -> impl Backing + 'static {
    Copied::new(|order| memfd::export(&format!("generation {}", order.generation), SIZE)).unwrap()
}

fn put(buffer: &Buffer, word: u64) {
    let range = buffer.range(0, 8).unwrap();
    range.write_bytes(&word.to_ne_bytes()).unwrap();
}

fn get(buffer: &Buffer) -> u64 {
    let mut word = [0; 8];
    buffer.range(0, 8).unwrap().read_bytes(&mut word).unwrap();
    u64::from_ne_bytes(word)
}

async fn publish() -> (Publisher, BufferId) {
    let publisher = Publisher::serve(peerbuf::share::Publisher::new().unwrap()).unwrap();
    let id = publisher.publish("b", memory()).await.unwrap();
    (publisher, id)
}

async fn subscribe(publisher: &Publisher) -> Subscriber {
    let (ours, theirs) = Channel::pair().unwrap();
    publisher.add(ours).await.unwrap();
    Subscriber::new(theirs).unwrap()
}

async fn lease(subscriber: &Subscriber) -> Lease {
    let lease = timeout(LONG, subscriber.buffer("b")).await;
    lease.expect("it was offered").unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn a_move_waits_for_tasks_and_keeps_their_bytes() {
    let (publisher, id) = publish().await;
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let subscriber = subscribe(&publisher).await;
        tasks.push(tokio::spawn(async move {
            for expected in 1..=5 {
                let held = lease(&subscriber).await;
                assert_eq!(held.generation(), expected);
                if expected == 5 {
                    return;
                }
                held.wanted().await.expect("the publisher is there");
                // A short piece of work, during which other tasks run.
                sleep(Duration::from_millis(1)).await;
                put(&held, get(&held).max(expected));
                drop(held);
            }
        }));
    }
    for generation in 2..=5 {
        // Every task has its lease by then, or gets the notice while it asks for one.
        while publisher.with(move |p| p.accepted(id)).await.unwrap() < 8 {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_millis(20)).await;
        let moved = publisher.migrate(id, LONG).await.unwrap();
        assert_eq!(moved.generation, generation);
        assert_eq!((moved.released, moved.lost.len()), (8, 0));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let word = publisher.with(move |p| get(p.buffer(id).unwrap())).await;
    assert_eq!(word.unwrap(), 4);
}

/// The publisher cuts off a subscriber that does not return the buffer. Meanwhile the runtime's
/// only thread does other work.
#[tokio::test(flavor = "current_thread")]
async fn a_move_keeps_no_other_task_waiting() {
    let (publisher, id) = publish().await;
    let stuck = subscribe(&publisher).await;
    let held = lease(&stuck).await;
    put(&held, 7);
    let limit = Duration::from_millis(200);
    let begun = Instant::now();
    let ticks = async {
        let mut ticks = 0;
        while begun.elapsed() < limit {
            sleep(Duration::from_millis(5)).await;
            ticks += 1;
        }
        ticks
    };
    let (moved, ticks) = tokio::join!(publisher.migrate(id, limit), ticks);
    let moved = moved.unwrap();
    assert_eq!(moved.lost.len(), 1);
    assert!(moved.isolated);
    assert!(ticks >= 5, "{ticks} ticks in {limit:?}");
    assert!(held.wanted().await.is_some());
    put(&held, 8);
    let word = publisher.with(move |p| get(p.buffer(id).unwrap())).await;
    assert_eq!(word.unwrap(), 7, "a late write reached the new generation");
    let error = timeout(LONG, stuck.buffer("b")).await.unwrap();
    assert!(matches!(error, Err(ShareError::CutOff { .. })), "{error:?}");
    let joined = publisher.next_event().await.unwrap();
    assert!(matches!(joined, Event::Joined { .. }), "{joined:?}");
    let cut_off = publisher.next_event().await.unwrap();
    let Event::CutOff { why, held, .. } = cut_off else {
        panic!("{cut_off:?}");
    };
    assert!(matches!(why, CutOff::Late { .. }), "{why}");
    assert_eq!(held, [id]);
}

#[tokio::test(flavor = "current_thread")]
async fn dropped_futures_lose_nothing() {
    let (publisher, id) = publish().await;
    let subscriber = subscribe(&publisher).await;
    // No buffer has this name: the wait ends with the future and delays nobody.
    assert!(timeout(SHORT, subscriber.buffer("other")).await.is_err());
    let held = lease(&subscriber).await;
    assert!(timeout(SHORT, held.wanted()).await.is_err());
    // The migration goes on after its caller dropped the future.
    let asked = publisher.migrate(id, LONG);
    assert!(timeout(SHORT, asked).await.is_err());
    assert!(held.wanted_back().is_some());
    drop(held);
    let generation = publisher.with(move |p| p.generation(id)).await;
    assert_eq!(generation.unwrap(), Some(2));
    assert_eq!(lease(&subscriber).await.generation(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_use_one_publisher() {
    let (publisher, first) = publish().await;
    let publisher = std::sync::Arc::new(publisher);
    let mut tasks = Vec::new();
    for number in 0..16 {
        let publisher = publisher.clone();
        tasks.push(tokio::spawn(async move {
            let name = format!("buffer {number}");
            let id = publisher.publish(&name, memory()).await.unwrap();
            for generation in 2..6 {
                let moved = publisher.migrate(id, LONG).await.unwrap();
                assert_eq!(moved.generation, generation);
            }
            publisher.withdraw(id, LONG).await.unwrap();
            let gone = publisher.migrate(id, LONG).await;
            assert!(matches!(gone, Err(ShareError::Unknown { .. })), "{gone:?}");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let moved = publisher.migrate_all(&[first, first], LONG).await.unwrap();
    assert!(moved[0].is_ok());
    assert!(matches!(moved[1], Err(ShareError::StillInUse { .. })));
}

#[tokio::test(flavor = "current_thread")]
async fn a_publisher_is_given_back_or_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let blocking = peerbuf::share::Publisher::bind(&path).unwrap();
    let publisher = Publisher::serve(blocking).unwrap();
    let id = publisher.publish("b", memory()).await.unwrap();
    let subscriber = Subscriber::connect(&path).await.unwrap();
    let held = lease(&subscriber).await;
    let mut blocking = publisher.stop().await.unwrap();
    assert_eq!(
        (blocking.generation(id), blocking.holders(id)),
        (Some(1), 1)
    );
    drop(held);
    assert_eq!(blocking.migrate(id, LONG).unwrap().released, 1);

    let publisher = Publisher::serve(blocking).unwrap();
    let held = lease(&subscriber).await;
    assert_eq!(held.generation(), 2);
    drop(publisher);
    let wanted = timeout(LONG, held.wanted()).await;
    assert_eq!(wanted.expect("the publisher has gone"), None);
    let gone = subscriber.buffer("b").await;
    assert!(matches!(gone, Err(ShareError::PeerGone)), "{gone:?}");
    // The buffer has no publisher any more, and is still memory.
    put(&held, 1);
    assert_eq!(get(&held), 1);
}

/// A file of `length` bytes that encode their place, and its importer.
fn a_file(length: u64) -> (std::fs::File, FileImporter, Vec<u8>) {
    let directory = std::env::current_exe().unwrap();
    let file = unnamed_file(directory.parent().unwrap()).unwrap();
    let bytes: Vec<u8> = (0..length).map(|at| (at / 4096 * 7 + at) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    let again = file.try_clone().unwrap();
    let importer = FileImporter::from_fd(again.into(), "the file").unwrap();
    (file, importer, bytes)
}

#[tokio::test]
async fn a_file_is_read_and_written_while_others_go_on() {
    let (file, importer, bytes) = a_file(PIECE + 5000);
    let buffer = memfd::export("memory", 2 * PIECE).unwrap();
    let range = buffer.whole();
    let receipt = importer.read_into(&range, 0).await.unwrap();
    assert_eq!(
        (receipt.bytes, receipt.host_bytes),
        (PIECE + 5000, PIECE + 5000)
    );
    let all = range.to_vec().unwrap();
    assert!(all[..bytes.len()] == bytes && all[bytes.len()..].iter().all(|&byte| byte == 0));

    let part = buffer.range(1, PIECE + 10).unwrap();
    let receipt = importer.write_from(&part, 4096).await.unwrap();
    assert_eq!(receipt.bytes, PIECE + 10);
    let mut found = vec![0; part.len() as usize];
    file.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == bytes[1..][..found.len()]);
    // An empty read succeeds, and an error is returned.
    let nothing = buffer.range(0, 0).unwrap();
    assert_eq!(importer.read_into(&nothing, 0).await.unwrap().bytes, 0);
    let closed = FileImporter::open("/proc/self/exe").unwrap();
    assert!(closed.write_from(&part, 0).await.is_err());
}

#[test]
fn a_transfer_whose_future_is_dropped_begins_no_other_piece() {
    let (_file, importer, bytes) = a_file(2 * PIECE);
    let buffer = memfd::export("memory", 2 * PIECE).unwrap();
    let range = buffer.whole();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        tokio::select! {
            biased;
            _ = importer.read_into(&range, 0) => panic!("done at once"),
            () = async {} => {}
        }
    });
    // Waits for the piece that has begun, if any.
    drop(runtime);
    let all = range.to_vec().unwrap();
    let (first, second) = all.split_at(PIECE as usize);
    assert!(first == &bytes[..PIECE as usize] || first.iter().all(|&byte| byte == 0));
    assert!(second.iter().all(|&byte| byte == 0), "another was begun");
    assert_eq!(importer.size().unwrap(), 2 * PIECE);
}

//! Changes a guest's hardware at the request of its tests, through QEMU's monitor.
//!
//! The guest writes a line to its port `peerbuf.events` and reads one: `TOKEN REQUEST`, answered by `TOKEN ok
//! [ANSWER]` or `TOKEN error WHY`. The guest chooses the token, which distinguishes the answer from late
//! answers to earlier requests. The requests:
//!
//! ```text
//! unplug ID       asks the guest's kernel to release the device, which may take time
//! gone ID         whether it was released: 'yes' or 'no'
//! plug ID         plugs a released device in again, with empty memory
//! plug nvme1      plugs a second disk into the slot of the released bar1
//! link ID up|down sets the network card's link
//! slow ID RATE    limits the disk's reads and writes to RATE bytes a second; 0 means no limit
//! ```
//!
//! ID must be in [`UNPLUGGABLE`], [`LINKS`] or [`DISKS`].

use std::{
    collections::{HashMap, HashSet},
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};

use crate::guest::{self, Machine};

/// Devices that can be unplugged.
const UNPLUGGABLE: &[&str] = &["bar0", "bar1", "nvme0", guest::SECOND_DISK];
/// Network cards.
const LINKS: &[&str] = &["net0"];

/// Disks with an adjustable speed.
const DISKS: &[&str] = &[guest::SCRATCH];

/// QEMU answers at once; an unplug is reported later.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Answers the guest's requests until the guest ends.
///
/// # Errors If a connection cannot be duplicated.
pub fn serve(machine: Machine, port: UnixStream, monitor: UnixStream) -> Result<()> {
    let mut answers = port.try_clone()?;
    let mut monitor = Monitor::new(monitor)?;
    thread::spawn(move || {
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            let (token, request) = line.split_once(' ').unwrap_or((&line, ""));
            let answer = match answer(&machine, &mut monitor, request) {
                Ok(said) => format!("{token} ok {said}"),
                Err(why) => format!("{token} error {}", format!("{why:#}").replace('\n', " ")),
            };
            if writeln!(answers, "{}", answer.trim_end()).is_err() {
                break;
            }
        }
    });
    Ok(())
}

fn answer(machine: &Machine, monitor: &mut Monitor, request: &str) -> Result<String> {
    let known = |list: &[&str], id: &str| {
        if list.contains(&id) {
            Ok(())
        } else {
            Err(anyhow!(
                "{request:?} can be asked of {} only",
                list.join(", ")
            ))
        }
    };
    match request.split_whitespace().collect::<Vec<_>>()[..] {
        ["unplug", id] => {
            known(UNPLUGGABLE, id)?;
            monitor.execute("device_del", json!({ "id": id }))?;
            Ok(String::new())
        }
        ["gone", id] => {
            known(UNPLUGGABLE, id)?;
            Ok(if monitor.is_gone(id) { "yes" } else { "no" }.into())
        }
        ["plug", id @ guest::SECOND_DISK] => {
            if !monitor.is_gone("bar1") {
                bail!("{id} takes the slot of bar1, which has not gone");
            }
            monitor.execute(
                "device_add",
                json!({ "driver": "nvme", "id": id, "serial": id, "drive": "second", "bus": machine.slots()[2] }),
            )?;
            monitor.forget(id);
            Ok(String::new())
        }
        ["plug", id] => {
            let Some((slot, mib)) = machine.pluggable(id) else {
                bail!("plug {id}: this device cannot be plugged in again");
            };
            if !monitor.is_gone(id) {
                bail!(
                    "plug {id}: it is still plugged in; unplug it first and wait until it is gone"
                );
            }
            // QEMU allows one device per memory backend, and frees a backend's name late. So the card gets a
            // new, empty backend with another name.
            let old = monitor.memory(id);
            monitor.plugged += 1;
            let memory = format!("{id}-{}", monitor.plugged);
            monitor.execute("object-del", json!({ "id": old }))?;
            let bytes = u64::from(mib) << 20;
            monitor.execute(
                "object-add",
                json!({ "qom-type": "memory-backend-ram", "id": memory, "size": bytes, "reserve": false }),
            )?;
            monitor.memories.insert(id.to_owned(), memory.clone());
            monitor.execute(
                "device_add",
                json!({ "driver": "ivshmem-plain", "id": id, "memdev": memory, "bus": slot }),
            )?;
            monitor.forget(id);
            Ok(String::new())
        }
        ["link", id, state @ ("up" | "down")] => {
            known(LINKS, id)?;
            monitor.execute("set_link", json!({ "name": id, "up": state == "up" }))?;
            Ok(String::new())
        }
        ["slow", id, rate] => {
            known(DISKS, id)?;
            let rate: u64 = rate.parse().map_err(|_| {
                anyhow!("{request:?}: a rate is a number of bytes a second, 0 for no limit")
            })?;
            // Requests above the limit wait in the disk's queue: the guest has already submitted them.
            monitor.execute(
                "block_set_io_throttle",
                json!({ "id": id, "bps": 0, "bps_rd": rate, "bps_wr": rate,
                        "iops": 0, "iops_rd": 0, "iops_wr": 0 }),
            )?;
            Ok(String::new())
        }
        _ => bail!(
            "unknown request {request:?}: unplug ID, gone ID, plug ID, link ID up|down, slow ID RATE"
        ),
    }
}

/// QEMU's monitor protocol (QMP): one JSON object per line.
struct Monitor {
    to: UnixStream,
    answers: Receiver<Value>,
    gone: Arc<Mutex<HashSet<String>>>,
    /// The number of devices plugged in so far.
    plugged: u32,
    /// The memory backends of those devices, by device.
    memories: HashMap<String, String>,
}

impl Monitor {
    fn new(stream: UnixStream) -> Result<Self> {
        let to = stream.try_clone()?;
        let gone = Arc::new(Mutex::new(HashSet::new()));
        let (tell, answers) = channel();
        let seen = Arc::clone(&gone);
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let Ok(said) = serde_json::from_str::<Value>(&line) else {
                    continue;
                };
                if said["event"] == "DEVICE_DELETED" {
                    if let Some(id) = said["data"]["device"].as_str() {
                        let mut gone = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        gone.insert(id.to_owned());
                    }
                } else if (said.get("return").is_some() || said.get("error").is_some())
                    && tell.send(said).is_err()
                {
                    break;
                }
            }
        });
        let mut monitor = Self {
            to,
            answers,
            gone,
            plugged: 0,
            memories: HashMap::new(),
        };
        writeln!(monitor.to, "{}", json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<()> {
        // Drops the greeting, and answers that came too late for their request.
        while self.answers.try_recv().is_ok() {}
        let id = format!("{command}-{arguments}");
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        writeln!(self.to, "{request}")?;
        loop {
            let said = self.answers.recv_timeout(ANSWER_LIMIT).map_err(|_| {
                anyhow!(
                    "QEMU's monitor did not answer {command} within {} s",
                    ANSWER_LIMIT.as_secs()
                )
            })?;
            if said["id"] != id.as_str() {
                continue;
            }
            return match said["error"]["desc"].as_str() {
                Some(why) => Err(anyhow!("{command}: {why}")),
                None => Ok(()),
            };
        }
    }

    /// The memory backend of a device's BAR.
    fn memory(&self, id: &str) -> String {
        self.memories.get(id).map_or(id, String::as_str).to_owned()
    }

    fn is_gone(&self, id: &str) -> bool {
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        gone.contains(id)
    }

    fn forget(&self, id: &str) {
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        gone.remove(id);
    }
}

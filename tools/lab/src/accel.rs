//! Whether guests may run with the host's virtualisation.
//!
//! A `/dev/kvm` that opens proves nothing: there are hosts where it opens and a guest dies without
//! a byte of output. So a guest is tried once, and what came of it is remembered for this kernel,
//! this kind of processor and this boot of the host.

use std::{fs, time::Duration};

use crate::{
    guest::{Accelerator, Machine, Topology},
    run::{self, Ending, Ground, Job, Streams},
};

/// Several times what a guest takes where virtualisation works.
const TRIAL: Duration = Duration::from_secs(8);

/// Tries the host's virtualisation for each kind of processor at the same time, so that the first guests
/// need not wait for it.
pub fn try_all(ground: &Ground) {
    std::thread::scope(|scope| {
        for topology in [Topology::HostBridge, Topology::Switch] {
            scope.spawn(move || {
                let machine = Machine {
                    topology,
                    ..Machine::default()
                };
                choose(ground, &machine)
            });
        }
    });
}

/// KVM where a guest with this machine's processor was seen to boot with it, and else emulation.
pub fn choose(ground: &Ground, machine: &Machine) -> Accelerator {
    if fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Accelerator::Emulation;
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let kernel = ground
        .kernel
        .dir()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let key = format!("{} {kernel} {}", boot.trim(), machine.topology.cpu());
    let memory = ground.cache.dir().join("locks/kvm-verdicts");
    let known = fs::read_to_string(&memory).unwrap_or_default();
    let verdict = known
        .lines()
        .rev()
        .find_map(|line| line.strip_suffix(&key).map(str::trim));
    let works = match verdict {
        Some(verdict) => verdict == "works",
        None => {
            let works = tried(ground, machine);
            let line = format!("{} {key}\n", if works { "works" } else { "fails" });
            // Only a memory: without it, it is tried again.
            let _ = fs::File::options()
                .create(true)
                .append(true)
                .open(&memory)
                .and_then(|mut f| {
                    use std::io::Write;
                    f.write_all(line.as_bytes())
                });
            works
        }
    };
    if works {
        Accelerator::Kvm
    } else {
        Accelerator::Emulation
    }
}

fn tried(ground: &Ground, machine: &Machine) -> bool {
    let job = Job {
        machine: Machine {
            accelerator: Accelerator::Kvm,
            share: false,
            shell: false,
            ..machine.clone()
        },
        command: vec!["true".into()],
        boot_limit: TRIAL,
        starts: 1,
        timeout: Some(TRIAL),
        ..Job::default()
    };
    let nowhere = || Box::new(std::io::sink());
    let streams = Streams {
        stdin: None,
        stdout: nowhere(),
        stderr: nowhere(),
    };
    run::run(ground, &job, streams).is_ok_and(|outcome| outcome.ending == Ending::Exit(0))
}

//! Whether guests can use the host's virtualisation (KVM).
//!
//! An accessible `/dev/kvm` proves nothing: on some hosts it opens, but a guest dies without output. So the
//! lab boots one guest as a trial, and remembers the result for this kernel, this CPU model of the guest and
//! this boot of the host.

use std::{fs, time::Duration};

use crate::{
    guest::{Accelerator, Machine, Topology},
    run::{self, Ending, Ground, Job, Streams},
};

/// Several times the duration of the trial on a host where KVM works.
const TRIAL: Duration = Duration::from_secs(8);

/// Tries KVM for each CPU model at the same time, so that the first guests need not wait for it.
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

/// KVM if a trial guest with this machine's CPU model booted with it; otherwise emulation.
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
            // Only a cache: without it the trial is repeated.
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

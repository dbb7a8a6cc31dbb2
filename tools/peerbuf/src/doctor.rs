//! `peerbuf doctor`: what works on this machine, what does not, why, and what to do about it.

use std::process::ExitCode;

use peerbuf::engine::{BY_POINTER, VERBS};
use peerbuf::import::file::{FileImporter, unnamed_file};
use peerbuf::plan::topology::LayerKind;
use peerbuf_topo::machine::{Function, Index, Kind};
use peerbuf_topo::reasons::{self, Effect, Remedy, Verdict, label};
use peerbuf_topo::{Code, Rules};
use serde::Serialize;
use serde_json::{Value, json};

use crate::table::{self, Table};
use crate::topo::{self, Source, of_disk};
use crate::why::{Way, proof_json};
use crate::{Failure, info, places, say};

/// Arguments of `peerbuf doctor`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Maximum number of rows in the table of pairs. JSON has all pairs.
const MOST: usize = 24;
/// Maximum number of devices whose pairs are examined. For more devices, use `why`.
const MOST_DEVICES: usize = 64;

#[derive(Serialize)]
struct Mount {
    at: String,
    filesystem: String,
    disk: String,
    /// The layers between the filesystem and its disks, from the top.
    layers: Vec<String>,
    /// The verdict for a transfer between a file on this mount and a peer's memory.
    verdict: String,
    good: bool,
}

/// A problem and its remedies.
#[derive(Serialize)]
struct Finding {
    what: String,
    remedies: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let live = arguments.source.is_live();
    // A container without /sys still supports everything that needs no device.
    let machine = match arguments.source.read() {
        Ok(machine) => machine,
        Err(error) if live => {
            say::remark(format_args!("peerbuf: {error}"));
            peerbuf_topo::Machine::empty(peerbuf_topo::machine::Format::Sysfs)
        }
        Err(error) => return Err(error),
    };
    let rules = Rules::new(&machine, arguments.source.kernel);
    let ways = ways(&rules, live && arguments.source.kernel.is_none());
    let mounts = match live {
        true => mounts(places::mounts()),
        false => Vec::new(),
    };
    let info = live.then(info::collect);
    let findings = findings(&rules, &ways, &mounts, info.as_ref());
    let code = match findings.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    };
    if arguments.json {
        let pairs: Vec<Value> = ways.iter().map(|way| pair(&rules, way)).collect();
        say::answer(json!({
            "read_from": machine.format,
            "kernel": rules.kernel().map(|kernel| kernel.to_string()),
            "virtual": machine.is_virtual,
            "findings": findings,
            "mounts": mounts,
            "pairs": pairs,
            "info": info,
        }))?;
        return Ok(code);
    }
    let width = table::width();
    let is_unknown = |way: &Way| {
        let reasons = &way.argument.reasons;
        !way.is_proved()
            && reasons
                .iter()
                .any(|reason| reason.code == Code::FactsUnknown)
    };
    let headline = match (findings.is_empty(), ways.is_empty()) {
        (true, true) => "nothing is in the way",
        (true, false) if ways.iter().any(is_unknown) => {
            "nothing that is known is in the way of a pair of devices; facts that could be are unknown (facts-unknown)"
        }
        (true, false) => {
            "nothing is in the way: each pair of devices works by the best way that there is"
        }
        (false, _) => "in the way, most useful first",
    };
    let mut text = table::paragraph(headline, width);
    for (number, finding) in findings.iter().enumerate() {
        text += &table::labelled(&format!("{:>3}.", number + 1), &finding.what, width);
        for remedy in &finding.remedies {
            text += &table::labelled("     -", remedy, width);
        }
    }
    if !ways.is_empty() {
        text += &format!("\n{}\n", pairs_table(&rules, &ways).show(width));
        if ways.len() > MOST {
            text += &format!("and {} more: --json\n", ways.len() - MOST);
        }
        text += "`peerbuf why A B` has the whole argument of each\n";
        let all = machine.devices_that_matter().len();
        if all > MOST_DEVICES {
            text += &format!("only the first {MOST_DEVICES} of {all} devices were looked at\n");
        }
    }
    if !mounts.is_empty() {
        let mut table = Table::new(["mounted at", "filesystem", "on", "files and peers' memory"]);
        for mount in &mounts {
            // The top layer is the device itself.
            let own = mount
                .disk
                .lines()
                .skip(usize::from(!mount.layers.is_empty()));
            let on: Vec<&str> = mount.layers.iter().map(String::as_str).chain(own).collect();
            let on = on.join("\n");
            table.row([&mount.at, &mount.filesystem, &on, &mount.verdict].map(String::as_str));
        }
        text += &format!("\n{}\n", table.show(width));
    }
    text += &format!("\n{}", table::paragraph(&topo::about(&rules), width));
    if let Some(info) = &info {
        text += &format!("\n{}", info::show(info, width));
        let engines = format!(
            "a buffer's handle for engines: {} take the address of a mapping of its memfd, {VERBS} takes the dma-buf",
            BY_POINTER.join(", ")
        );
        text += &format!("\n{}", table::paragraph(&engines, width));
    }
    say::answer(text.trim_end())?;
    Ok(code)
}

/// Each pair of a device that can do DMA and a device that can lend memory.
fn ways(rules: &Rules<'_>, ask: bool) -> Vec<Way> {
    let machine = rules.machine();
    let mut devices = machine.devices_that_matter();
    devices.truncate(MOST_DEVICES);
    let lends = |index: &&Index| {
        let function = machine.function(**index);
        let by_driver = function.lends.is_some();
        by_driver || !matches!(function.kind(), Kind::Nvme | Kind::Nic | Kind::Disk)
    };
    let mut ways = Vec::new();
    for provider in devices.iter().filter(lends) {
        for client in devices.iter().filter(|client| *client != provider) {
            let way = Way::of(rules, *client, *provider, ask);
            if !way.is_unable() {
                ways.push(way);
            }
        }
    }
    // Problems first, and disks first among them.
    ways.sort_by_key(|way| {
        let verdict = match way.verdict() {
            Verdict::No => 0,
            Verdict::Unknown => 1,
            Verdict::Yes => 2,
        };
        (
            verdict,
            machine.function(way.argument.client).kind() != Kind::Nvme,
        )
    });
    ways
}

fn both<'m>(rules: &Rules<'m>, way: &Way) -> (&'m Function, &'m Function) {
    let machine = rules.machine();
    (
        machine.function(way.argument.client),
        machine.function(way.argument.provider),
    )
}

/// The codes of the problems. Proved bytes settle what was in doubt.
fn codes(way: &Way) -> Vec<&str> {
    let failed = way.failed().and_then(|seen| seen.code.as_deref());
    let matters = way.argument.reasons.iter().filter(|reason| {
        let in_doubt = reason.effect == Effect::MayBlock || reason.code == Code::IommuInGuest;
        (reason.effect < Effect::Warns || in_doubt) && !(in_doubt && way.is_proved())
    });
    let predicted = matters.map(|reason| reason.code.as_str());
    failed.into_iter().chain(predicted).collect()
}

fn pair(rules: &Rules<'_>, way: &Way) -> Value {
    let (client, provider) = both(rules, way);
    json!({
        "client": client.address.to_string(),
        "provider": provider.address.to_string(),
        "verdict": way.verdict().name(),
        "predicted": way.argument.verdict.name(),
        "kernel": way.answer_text(),
        "bytes": proof_json(way.proof.as_ref()),
        "near": way.argument.route.near.map(|near| near.word()),
        "codes": codes(way),
    })
}

fn pairs_table(rules: &Rules<'_>, ways: &[Way]) -> Table {
    // An empty column would take the room of others.
    let tried = ways.iter().any(|way| way.proof.is_some());
    let headings = [
        "device",
        "uses memory of",
        "",
        "predicted",
        "kernel",
        "bytes",
        "why",
    ];
    let seen = |at: &usize| tried || headings[*at] != "bytes";
    let mut table = Table::new((0..headings.len()).filter(seen).map(|at| headings[at]));
    for way in ways.iter().take(MOST) {
        let (client, provider) = both(rules, way);
        let near = way.argument.route.near.map_or("?", |near| near.word());
        let bytes = match &way.proof {
            None => "",
            Some(proof) if proof.is_whole() => "arrived",
            Some(proof) => match proof.failed().map(|seen| seen.code.as_deref()) {
                Some(Some("proof-failed")) => "lost",
                Some(_) => "refused",
                None => "one way",
            },
        };
        let row = [
            label(client),
            label(provider),
            near.to_owned(),
            way.argument.verdict.name().to_owned(),
            way.answer_word().to_owned(),
            bytes.to_owned(),
            codes(way).join("\n"),
        ];
        table.row((0..row.len()).filter(seen).map(|at| row[at].clone()));
    }
    table
}

/// Each filesystem that holds files, and whether its files support direct I/O.
fn mounts(all: Vec<places::Mount>) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = Vec::new();
    for mount in all.into_iter().filter(|mount| !mount.is_pseudo()) {
        // The later of two mounts on one directory hides the earlier one.
        mounts.retain(|earlier| earlier.at != mount.at.display().to_string());
        // btrfs, overlays, memory and networks have device numbers that no block device has. They are not tried: a
        // network's server may not answer.
        let Some(disk) = mount.disk else {
            mounts.push(Mount {
                at: mount.at.display().to_string(),
                verdict: format!("{} is on no block device: staged copies", mount.kind),
                filesystem: mount.kind,
                disk: String::new(),
                layers: Vec::new(),
                good: false,
            });
            continue;
        };
        // What is between: the disk itself has its own column.
        let layers: Vec<String> = mount
            .layers
            .iter()
            .filter(|layer| !matches!(layer.kind, LayerKind::Disk | LayerKind::Partition))
            .map(|layer| format!("{} ({})", layer.name, layer.kind.name()))
            .collect();
        let below: Vec<String> = reasons::of_stack(&mount.layers)
            .into_iter()
            .map(|reason| reason.evidence)
            .collect();
        let direct = unnamed_file(&mount.at)
            .ok()
            .and_then(|file| FileImporter::from_fd(file.into(), "").ok())
            .map(|file| file.alignment().is_some());
        let told: Vec<String> = of_disk(&disk)
            .iter()
            .map(|reason| format!("{}: {}", reason.code, reason.evidence))
            .collect();
        let (verdict, good) = match (told.as_slice(), disk.functions.is_empty(), direct) {
            ([_, ..], ..) => (told.join("\n"), false),
            ([], true, _) => ("on no PCI device: staged copies".to_owned(), false),
            ([], false, Some(false)) => ("no O_DIRECT: staged copies".to_owned(), false),
            ([], false, _) if !disk.name.starts_with("nvme") => (
                "only NVMe disks take peers' memory: staged copies".to_owned(),
                false,
            ),
            ([], false, None) => (
                "as the disk's pairs above; not writable here, so O_DIRECT is untried".to_owned(),
                true,
            ),
            ([], false, Some(true)) => ("O_DIRECT; as the disk's pairs above".to_owned(), true),
        };
        let (verdict, good) = match below.is_empty() {
            true => (verdict, good),
            false => (below.join("\n"), false),
        };
        let functions: Vec<String> = disk.functions.iter().map(ToString::to_string).collect();
        mounts.push(Mount {
            at: mount.at.display().to_string(),
            filesystem: mount.kind,
            disk: [disk.name]
                .into_iter()
                .chain(functions)
                .collect::<Vec<_>>()
                .join("\n"),
            layers,
            verdict,
            good,
        });
    }
    mounts
}

fn texts(remedies: &[Remedy]) -> Vec<String> {
    let mut texts = Vec::new();
    for remedy in remedies {
        texts.push(remedy.what.clone());
        texts.extend(remedy.commands.iter().cloned());
    }
    texts
}

fn findings(
    rules: &Rules<'_>,
    ways: &[Way],
    mounts: &[Mount],
    info: Option<&info::Info>,
) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    // The kernel allows these pairs and the bytes did not arrive, so these findings come first.
    let surprising = |way: &&Way| way.argument.verdict != Verdict::No;
    for way in ways.iter().filter(surprising) {
        let Some(seen) = way.failed() else {
            continue;
        };
        let (client, provider) = both(rules, way);
        let mut remedies = texts(&way.argument.remedies);
        remedies.push(format!(
            "then `peerbuf prove {} {}` again",
            client.address, provider.address
        ));
        findings.push(Finding {
            what: format!(
                "{} with memory of {}: {}, {}: {}",
                label(client),
                label(provider),
                seen.code.as_deref().unwrap_or_default(),
                seen.age(),
                seen.evidence
            ),
            remedies,
        });
    }
    let proved = findings.len();
    // One finding for each kind of reason, with the pairs that it affects.
    for code in Code::ALL {
        let stops = |way: &&Way| codes(way).contains(&code.as_str());
        let stopped: Vec<&Way> = ways.iter().filter(stops).collect();
        let Some(first) = stopped.first() else {
            continue;
        };
        let evidence = first
            .argument
            .reasons
            .iter()
            .find(|reason| reason.code == code);
        let (client, provider) = both(rules, first);
        let others = match stopped.len() - 1 {
            0 => String::new(),
            others => format!(" (and {others} more)"),
        };
        findings.push(Finding {
            what: format!(
                "{} with memory of {}{others}: {code}: {}",
                label(client),
                label(provider),
                evidence.map_or("", |reason| &reason.evidence)
            ),
            remedies: texts(&first.argument.remedies),
        });
    }
    let lying = |finding: &Finding| finding.what.contains(Code::IommuInGuest.as_str());
    // Pairs that lose bytes come before pairs that are refused.
    findings[proved..].sort_by_key(|finding| !lying(finding));
    for missing in info.into_iter().flat_map(info::Info::missing) {
        findings.push(Finding {
            what: missing.0.to_owned(),
            remedies: Some(missing.1.to_owned())
                .filter(|remedy| !remedy.is_empty())
                .into_iter()
                .collect(),
        });
    }
    if !mounts.is_empty() && mounts.iter().all(|mount| !mount.good) {
        findings.push(Finding {
            what: "no mounted filesystem can be read into peers' memory; see the table of mounts"
                .into(),
            remedies: vec!["keep the files on ext4 or XFS directly on an NVMe disk".into()],
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerbuf::plan::topology::Sysfs;
    use std::os::unix::fs::symlink;

    #[test]
    fn each_mount_that_holds_files_is_listed_whatever_it_is_on() {
        let root = std::env::temp_dir().join(format!("peerbuf-mounts-{}", std::process::id()));
        let block = root.join("dev/block");
        std::fs::create_dir_all(&block).unwrap();
        for (number, device) in [
            ("259:1", "pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1"),
            ("253:0", "virtual/block/dm-0"),
        ] {
            let device = root.join("devices").join(device);
            std::fs::create_dir_all(&device).unwrap();
            symlink(device, block.join(number)).unwrap();
        }
        // A volume on an encrypted disk.
        for (name, uuid) in [("dm-0", "LVM-1"), ("dm-1", "CRYPT-LUKS2-1")] {
            let device = root.join("devices/virtual/block").join(name);
            std::fs::create_dir_all(device.join("dm")).unwrap();
            std::fs::create_dir_all(device.join("slaves")).unwrap();
            std::fs::write(device.join("dm/uuid"), uuid).unwrap();
        }
        let slave = root.join("devices/virtual/block/dm-0/slaves/dm-1");
        symlink(root.join("devices/virtual/block/dm-1"), slave).unwrap();
        let mountinfo = "\
            20 1 259:1 / /nowhere/a rw - ext4 /dev/nvme0n1 rw\n\
            21 20 0:5 / /proc rw - proc proc rw\n\
            22 20 259:1 /b /nowhere/b rw - ext4 /dev/nvme0n1 rw\n\
            23 20 0:40 / /nowhere/home rw - btrfs /dev/nvme1n1 rw\n\
            24 20 0:41 / /nowhere/net rw - nfs4 server:/x rw\n\
            25 20 0:42 / /nowhere/run rw - tmpfs tmpfs rw\n\
            26 20 253:0 / /nowhere/mapped rw - xfs /dev/mapper/x rw\n\
            27 20 0:43 / /nowhere/run rw - overlay overlay rw\n";
        let mounts = mounts(places::mounts_in(mountinfo.as_bytes(), &Sysfs::at(&root)));
        let reasons = reasons::of_stack(&Sysfs::at(&root).stack(253, 0));
        std::fs::remove_dir_all(&root).unwrap();
        let codes: Vec<_> = reasons
            .iter()
            .map(|reason| (reason.code, reason.effect))
            .collect();
        assert_eq!(
            codes,
            [
                (Code::BlockLayer, Effect::MayBlock),
                (Code::BlockLayer, Effect::Blocks)
            ]
        );
        let rows: Vec<(&str, &str, bool)> = mounts
            .iter()
            .map(|mount| (mount.at.as_str(), mount.filesystem.as_str(), mount.good))
            .collect();
        assert_eq!(
            rows,
            [
                ("/nowhere/a", "ext4", true),
                ("/nowhere/b", "ext4", true),
                ("/nowhere/home", "btrfs", false),
                ("/nowhere/net", "nfs4", false),
                ("/nowhere/mapped", "xfs", false),
                ("/nowhere/run", "overlay", false),
            ]
        );
        assert!(mounts[2].verdict.contains("no block device"));
        assert_eq!(mounts[4].layers, ["dm-0 (LVM)", "dm-1 (dm-crypt)"]);
        assert!(mounts[4].verdict.contains("dm-1 (dm-crypt) encrypts"));
    }
}

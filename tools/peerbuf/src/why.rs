//! `peerbuf why`: the whole argument about two devices, in both directions.

use std::process::ExitCode;

use peerbuf_topo::machine::{Driver, Function, Index, Machine};
use peerbuf_topo::reasons::{Argument, Effect, Reason, Remedy, Verdict, label};
use peerbuf_topo::rules::{Map, Rule};
use peerbuf_topo::{Code, Rules, argue};
use serde_json::{Value, json};

use crate::ask::{self, Answer};
use crate::proofs::{self, FOLDERS, Proof, Seen};
use crate::topo::{self, NotFound, Source, Target};
use crate::{Failure, say, table};

/// Arguments of `peerbuf why`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// A device: an address (0000:41:00.0), a name (nvme0n1, mlx5_0, rxe0), a node (/dev/dri/renderD128), a file on
    /// it, or a dma-buf of it (/proc/PID/fd/N)
    a: String,
    /// The other device
    b: String,
    #[command(flatten)]
    source: Source,
    /// Predict only, and do not ask the kernel
    #[arg(long)]
    no_ask: bool,
    /// One JSON object for each pair of functions instead of text
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
  peerbuf why /mnt/data/model.gguf 0000:03:00.0
  peerbuf why mlx5_0 /dev/dri/renderD128
  peerbuf why --from customer.json --kernel 6.12 nvme0n1 0000:41:00.0";

/// One device's use of the other device's memory: the prediction, the kernel's answer, and the
/// proof.
pub struct Way {
    pub argument: Argument,
    pub answer: Answer,
    pub proof: Option<Proof>,
}

impl Way {
    /// Predicts, and asks the kernel unless the devices themselves rule the use out.
    pub fn of(rules: &Rules<'_>, client: Index, provider: Index, ask: bool) -> Way {
        let mut argument = argue(rules, client, provider);
        let at = |index| rules.machine().function(index).address;
        let answer = match (ask, unable(&argument)) {
            (false, _) => Answer::NotAsked("only predicted".into()),
            (true, true) => Answer::NotAsked("the devices cannot".into()),
            (true, false) => ask::kernel(at(client), at(provider)),
        };
        let (reason, remedy) = kept_answer(rules, &argument, &answer).unzip();
        argument.reasons.extend(reason);
        argument.reasons.sort_by_key(|reason| reason.effect);
        argument.remedies.extend(remedy);
        let proof = ask.then(|| FOLDERS.find(rules.machine(), client, provider));
        Way {
            argument,
            answer,
            proof: proof.flatten(),
        }
    }

    /// The verdict: from the proof if there is one, else the kernel's answer, else the
    /// prediction.
    pub fn verdict(&self) -> Verdict {
        match self.answer {
            _ if unable(&self.argument) => Verdict::No,
            _ if self.failed().is_some() => Verdict::No,
            _ if self.is_proved() => Verdict::Yes,
            Answer::Yes(_) => Verdict::Yes,
            Answer::No(_) | Answer::NoWay(_) => Verdict::No,
            Answer::NotAsked(_) => self.argument.verdict,
        }
    }

    /// True if bytes arrived in both directions.
    pub fn is_proved(&self) -> bool {
        self.proof.as_ref().is_some_and(Proof::is_whole)
    }

    /// The result of the direction in which bytes did not arrive.
    pub fn failed(&self) -> Option<&Seen> {
        self.proof.as_ref().and_then(Proof::failed)
    }

    /// True if the devices themselves rule the use out, whatever is between them.
    pub fn is_unable(&self) -> bool {
        unable(&self.argument)
    }

    /// The kernel's answer.
    pub fn answer_text(&self) -> String {
        match &self.answer {
            Answer::Yes(map) => format!("yes, {}", map.name()),
            Answer::No(why) | Answer::NoWay(why) => format!("no: {why}"),
            Answer::NotAsked(why) => format!("not asked: {why}"),
        }
    }

    /// The kernel's answer in one or two words.
    pub fn answer_word(&self) -> &'static str {
        match self.answer {
            Answer::Yes(_) => "yes",
            Answer::No(_) | Answer::NoWay(_) => "no",
            Answer::NotAsked(_) => "not asked",
        }
    }

    /// True if the use works, by the shortest route.
    pub fn is_as_good_as_it_gets(&self) -> bool {
        let slowed = self
            .argument
            .reasons
            .iter()
            .any(|reason| reason.effect == Effect::Slows);
        self.verdict() == Verdict::Yes && !slowed
    }
}

/// True if the devices themselves rule the use out, whatever is between them.
fn unable(argument: &Argument) -> bool {
    let lacks = |reason: &Reason| {
        reason.effect == Effect::Blocks && matches!(reason.code, Code::NoDmaEngine | Code::NoMemory)
    };
    argument.reasons.iter().any(lacks)
}

/// The kernel computes its answer once and keeps it. If the present settings predict another
/// answer, the settings have changed since.
fn kept_answer(
    rules: &Rules<'_>,
    argument: &Argument,
    answer: &Answer,
) -> Option<(Reason, Remedy)> {
    // Bounced DMA has no path through a host bridge: peerbuf.ko refuses it, as predicted.
    let bounced =
        |reason: &Reason| reason.code == Code::SwiotlbForced && reason.effect == Effect::Blocks;
    let said = match answer {
        Answer::Yes(map) => *map,
        Answer::NoWay(_) if argument.reasons.iter().any(bounced) => return None,
        Answer::NoWay(_) => Map::NotSupported,
        Answer::No(_) | Answer::NotAsked(_) => return None,
    };
    let now = argument.route.possible.known().filter(|map| *map != said)?;
    let effect = match (said, now) {
        (Map::NotSupported, _) => Effect::Blocks,
        (Map::HostBridge, Map::BusAddress) => Effect::Slows,
        _ => Effect::Warns,
    };
    let provider = rules.machine().function(argument.provider);
    let evidence = format!(
        "the kernel answers '{}', and by the present settings it would be '{}': it keeps its first answer, and \
         a setting was changed since",
        said.name(),
        now.name()
    );
    let what = "bind the driver of the memory's device anew, so that the kernel works it out again";
    let mut remedy = Remedy::new(what, []);
    if let Some(Driver::Bound(driver)) = &provider.driver {
        let at = provider.address;
        let command = |what| format!("echo {at} > /sys/bus/pci/drivers/{driver}/{what}");
        remedy.commands = ["unbind", "bind"].map(command).into();
    }
    let reason = Reason::new(Code::VerdictCached, effect, evidence);
    Some((reason, remedy))
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let machine = arguments.source.read()?;
    let find = |text| arguments.source.find(&machine, text);
    let (a, b) = match (find(&arguments.a), find(&arguments.b)) {
        (Ok(a), Ok(b)) => (a, b),
        (Err(NotFound(error)), _) | (_, Err(NotFound(error))) => {
            say::remark(format_args!("peerbuf: {error}"));
            return Ok(ExitCode::from(2));
        }
    };
    let rules = Rules::new(&machine, arguments.source.kernel);
    let ask = arguments.source.is_live() && !arguments.no_ask && arguments.source.kernel.is_none();
    let width = table::width();
    let mounts: Vec<&str> = [&a, &b]
        .iter()
        .filter_map(|target| target.mount.as_deref())
        .collect();
    let layers: Vec<&Reason> = a.reasons.iter().chain(&b.reasons).collect();
    let mut good = layers.iter().all(|reason| reason.effect > Effect::MayBlock);
    let mut texts = Vec::new();
    if a.functions.is_empty() || b.functions.is_empty() {
        texts.push(off_the_bus(arguments, &[&a, &b], width));
        good = false;
    }
    for one in &a.functions {
        for other in &b.functions {
            let ways = [
                Way::of(&rules, *one, *other, ask),
                Way::of(&rules, *other, *one, ask),
            ];
            good &= ways.iter().any(Way::is_as_good_as_it_gets);
            texts.push(match arguments.json {
                true => to_json(&machine, &ways, &layers, &mounts).to_string(),
                false => show(&rules, &ways, &layers, &mounts, width),
            });
        }
    }
    let between = if arguments.json { "\n" } else { "\n\n" };
    say::answer(texts.join(between))?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The report for a file or device without a PCI function.
fn off_the_bus(arguments: &Arguments, targets: &[&Target], width: usize) -> String {
    let reasons = targets.iter().flat_map(|target| &target.reasons);
    if arguments.json {
        let reasons: Vec<Value> = reasons.map(reason_json).collect();
        return json!({ "a": arguments.a, "b": arguments.b, "verdict": "no", "reasons": reasons })
            .to_string();
    }
    let mut text = table::paragraph(
        &format!(
            "{} and {} cannot be peers: the processor carries their bytes",
            arguments.a, arguments.b
        ),
        width,
    );
    for target in targets {
        if let Some(mount) = &target.mount {
            text += &table::labelled("mount: ", mount, width);
        }
    }
    for reason in reasons {
        text += &reason_text(reason, "", width);
    }
    text.trim_end().to_owned()
}

fn show(
    rules: &Rules<'_>,
    ways: &[Way; 2],
    layers: &[&Reason],
    mounts: &[&str],
    width: usize,
) -> String {
    let machine = rules.machine();
    let [forth, back] = ways;
    let (a, b) = (
        machine.function(forth.argument.client),
        machine.function(forth.argument.provider),
    );
    let mut text = table::paragraph(&path(rules, &forth.argument), width);
    let route = &forth.argument.route;
    let mut about = Vec::new();
    about.extend(
        route
            .near
            .map(|near| format!("{} in nvidia-smi's words", near.word())),
    );
    about.extend(
        route
            .distance
            .map(|distance| format!("distance {distance}")),
    );
    about.push(match rules.kernel() {
        Some(kernel) => format!("rules of Linux {kernel}"),
        None => "kernel unknown".into(),
    });
    if machine.is_virtual == Some(true) {
        about.push("virtual machine".into());
    }
    text += &table::paragraph(&about.join(", "), width);
    for line in topo::lacks(machine) {
        text += &table::paragraph(&line, width);
    }
    for mount in mounts {
        text += &table::labelled("mount: ", mount, width);
    }
    for (way, client, provider) in [(forth, a, b), (back, b, a)] {
        let said = (way.answer == forth.answer && !std::ptr::eq(way, forth)).then_some("as above");
        text += &heading(way, client, provider, said, width);
    }
    text += "why\n";
    for layer in layers {
        text += &reason_text(layer, "", width);
    }
    for (reason, in_both) in merged(ways) {
        let which = match in_both {
            [true, true] => String::new(),
            [true, false] => format!(" (to use {})", b.address),
            _ => format!(" (to use {})", a.address),
        };
        text += &reason_text(reason, &which, width);
    }
    let remedies = remedies(ways);
    if !remedies.is_empty() {
        text += "what would change it\n";
    }
    for remedy in remedies {
        text += &table::labelled("    -", &remedy.what, width);
        for command in &remedy.commands {
            text += &table::labelled("      ", command, width);
        }
    }
    text.trim_end().to_owned()
}

/// Each reason once, with whether it belongs to the first way and to the second.
fn merged(ways: &[Way; 2]) -> Vec<(&Reason, [bool; 2])> {
    // For devices that rule the use out, only their reasons count.
    let matters = |way: &Way, reason: &Reason| {
        reason.effect == Effect::Blocks || !way.is_unable() || ways.iter().all(Way::is_unable)
    };
    let mut all: Vec<&Reason> = Vec::new();
    for way in ways {
        for reason in &way.argument.reasons {
            if matters(way, reason) && !all.contains(&reason) {
                all.push(reason);
            }
        }
    }
    all.sort_by_key(|reason| reason.effect);
    let of = |reason: &&Reason| {
        [&ways[0], &ways[1]]
            .map(|way| matters(way, reason) && way.argument.reasons.contains(reason))
    };
    all.iter().map(|reason| (*reason, of(reason))).collect()
}

fn remedies(ways: &[Way; 2]) -> Vec<&Remedy> {
    let mut all: Vec<&Remedy> = Vec::new();
    for remedy in ways.iter().flat_map(|way| &way.argument.remedies) {
        if !all.contains(&remedy) {
            all.push(remedy);
        }
    }
    all
}

pub fn heading(
    way: &Way,
    client: &Function,
    provider: &Function,
    said: Option<&str>,
    width: usize,
) -> String {
    let verdict = way.verdict();
    let caution = way
        .argument
        .reasons
        .iter()
        .any(|reason| reason.code == Code::IommuInGuest);
    let verdict = match verdict {
        Verdict::No if way.failed().is_some() => "no, bytes were tried",
        Verdict::Yes if way.is_proved() => "yes, proved",
        Verdict::Yes if caution => "the kernel allows it, and bytes may be lost",
        other => other.name(),
    };
    let title = format!(
        "{} uses memory of {}: {verdict}",
        label(client),
        label(provider)
    );
    let rule = rule_text(way.argument.route.rule);
    let predicted = match way.argument.route.possible.known() {
        Some(map) => format!("{} ({rule})", map.name()),
        None => {
            let possible = Map::ALL
                .into_iter()
                .filter(|map| way.argument.route.possible.has(*map));
            let names: Vec<&str> = possible.map(Map::name).collect();
            format!("{} ({rule})", names.join(" or "))
        }
    };
    let kernel = match said {
        Some(said) => format!("{}: {said}", way.answer_word()),
        None => way.answer_text(),
    };
    let mut text = table::paragraph(&title, width);
    // The path between devices that rule the use out is irrelevant.
    if way.is_unable() {
        return text;
    }
    let mut grades = vec![("predicted", predicted), ("kernel", kernel)];
    match &way.proof {
        Some(proof) => grades.extend(bytes_texts(way, proof).map(|text| ("bytes", text))),
        None if way.verdict() == Verdict::No => grades.push(("bytes", "not tried".into())),
        None => {
            let command = format!("peerbuf prove {} {}", client.address, provider.address);
            grades.push(("bytes", format!("not proved here; `{command}` moves some")));
        }
    }
    for (grade, what) in grades {
        text += &table::labelled(&format!("    {grade:<9}"), &what, width);
    }
    text
}

/// The result of the proof in each direction, with its age. Two equal failures show one
/// evidence.
fn bytes_texts(way: &Way, proof: &Proof) -> [String; 2] {
    let [into, out_of] = [proofs::Way::In, proofs::Way::Out].map(|way| proof.seen(way));
    let alike = matches!((into, out_of), (Some(a), Some(b)) if !a.arrived && a.code == b.code);
    let text = |what: &str, seen: Option<&Seen>, is_short: bool| match seen {
        None => format!("{what}: not tried"),
        Some(seen) if seen.arrived => format!("{what}: arrived, {}", seen.age()),
        Some(seen) => {
            let code = seen.code.as_deref().unwrap_or_default();
            let refused = matches!(way.answer, Answer::No(_) | Answer::NoWay(_));
            let evidence = match is_short {
                true => "likewise",
                false if refused && code == "kernel-refused" => "direct I/O is refused as well",
                false => &seen.evidence,
            };
            format!("{what}: {code}, {}: {evidence}", seen.age())
        }
    };
    [
        text("into the memory", into, false),
        text("out of it", out_of, alike),
    ]
}

/// The proof, for programs.
pub fn proof_json(proof: Option<&Proof>) -> Value {
    let one = |way| {
        proof.and_then(|proof| proof.seen(way)).map(|seen| {
            json!({
                "arrived": seen.arrived,
                "code": seen.code,
                "evidence": seen.evidence,
                "age_seconds": seen.age_seconds(),
            })
        })
    };
    json!({ "into": one(proofs::Way::In), "out_of": one(proofs::Way::Out) })
}

/// The rule behind a prediction, in a few words.
fn rule_text(rule: Rule) -> &'static str {
    match rule {
        Rule::SameFunction => "the same function",
        Rule::CommonBridge => "a common bridge, and nothing redirects",
        Rule::CommonBridgeAcsUnknown => "a common bridge; ACS could not be read",
        Rule::Processor => "the processor is AMD's, of family 17h or later",
        Rule::Listed => "the host bridge is on the kernel's list",
        Rule::NotListed => "the host bridge is not on the kernel's list",
        Rule::ListedForItselfOnly => "the list allows each host bridge for itself",
        Rule::Unnamed => "nothing names the host bridge",
        Rule::HostUnknown => "a fact about the host bridge is missing",
        Rule::TreeUnknown => "bridges are missing from the tree",
        Rule::KernelTooOld => "the kernel has no such mappings",
    }
}

/// `0000:03:00.0 (nvme0n1) - 0000:00:10.0 - pci0000:00 - 0000:00:11.0 - 0000:04:00.0`
fn path(rules: &Rules<'_>, argument: &Argument) -> String {
    let machine = rules.machine();
    let up = |from: Index| -> Vec<Index> {
        let stop = argument.route.common;
        machine
            .upwards(from)
            .take_while(|index| Some(*index) != stop)
            .filter(|index| !machine.function(*index).is_placeholder())
            .collect()
    };
    let (client, provider) = (up(argument.client), up(argument.provider));
    let name = |index: &Index| {
        let function = machine.function(*index);
        match *index == argument.client || *index == argument.provider {
            true => label(function),
            false => function.address.to_string(),
        }
    };
    let mut parts: Vec<String> = client.iter().map(name).collect();
    match argument.route.common {
        Some(common) => parts.push(name(&common)),
        None => {
            let hosts = [argument.client, argument.provider].map(|at| machine.function(at).host);
            let host = |number: u32| machine.hosts[number as usize].name.clone();
            parts.push(host(hosts[0]));
            if hosts[0] != hosts[1] {
                parts.push(host(hosts[1]));
            }
        }
    }
    parts.extend(provider.iter().rev().map(name));
    parts.join(" - ")
}

fn reason_text(reason: &Reason, which: &str, width: usize) -> String {
    let text = format!("{}{which}: {}", reason.code, reason.evidence);
    table::labelled(&format!("    {:<9}", reason.effect.name()), &text, width)
}

fn reason_json(reason: &Reason) -> Value {
    json!({
        "code": reason.code.as_str(),
        "effect": reason.effect.name(),
        "evidence": reason.evidence,
    })
}

fn to_json(machine: &Machine, ways: &[Way; 2], layers: &[&Reason], mounts: &[&str]) -> Value {
    let way = |way: &Way| {
        let route = &way.argument.route;
        let possible = Map::ALL.into_iter().filter(|map| route.possible.has(*map));
        let reasons = layers.iter().copied().chain(&way.argument.reasons);
        let kernel = match &way.answer {
            Answer::Yes(map) => json!({ "allowed": true, "route": map.name() }),
            Answer::No(why) | Answer::NoWay(why) => json!({ "allowed": false, "error": why }),
            Answer::NotAsked(why) => json!({ "not_asked": why }),
        };
        json!({
            "client": machine.function(way.argument.client).address.to_string(),
            "provider": machine.function(way.argument.provider).address.to_string(),
            "verdict": way.verdict().name(),
            "predicted": way.argument.verdict.name(),
            "map_types": possible.map(Map::name).collect::<Vec<_>>(),
            "rule": rule_text(route.rule),
            "near": route.near.map(|near| near.word()),
            "distance": route.distance,
            "kernel": kernel,
            "bytes": proof_json(way.proof.as_ref()),
            "reasons": reasons.map(reason_json).collect::<Vec<_>>(),
            "remedies": way.argument.remedies.iter()
                .map(|remedy| json!({ "what": remedy.what, "commands": remedy.commands }))
                .collect::<Vec<_>>(),
        })
    };
    json!({
        "ways": ways.iter().map(way).collect::<Vec<_>>(),
        "unknown": topo::lacks(machine),
        "mounts": mounts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerbuf_topo::machine::{Acs, Format, Kernel};

    #[test]
    fn an_answer_that_the_present_settings_do_not_give_is_an_old_one() {
        let function = |text: &str| Function::at(text.parse().unwrap());
        let mut machine = Machine::empty(Format::Sysfs);
        machine.kernel = Kernel::parse("7.3");
        let host = json!({ "name": "pci0000:00", "complete": true, "certain": true });
        machine.hosts = vec![serde_json::from_value(host).unwrap()];
        machine.functions = vec![
            function("0000:01:00.0"),
            function("0000:02:00.0"),
            function("0000:03:00.0"),
        ];
        for (at, below) in machine.functions.iter_mut().enumerate() {
            below.acs = Some(Acs::Absent);
            (below.parent, below.depth) = (Some(Index(0)).filter(|_| at > 0), u16::from(at > 0));
        }
        machine.functions[2].driver = Some(Driver::Bound("peerbuf".into()));
        let rules = Rules::new(&machine, None);
        let argument = argue(&rules, Index(1), Index(2));
        assert_eq!(argument.route.possible.known(), Some(Map::BusAddress));
        let said = |answer| kept_answer(&rules, &argument, &answer);
        assert_eq!(said(Answer::Yes(Map::BusAddress)), None);
        assert_eq!(said(Answer::No("no memory".into())), None);
        assert_eq!(said(Answer::NotAsked(String::new())), None);
        for (answer, effect) in [
            (Answer::Yes(Map::HostBridge), Effect::Slows),
            (Answer::NoWay("EREMOTEIO".into()), Effect::Blocks),
        ] {
            let (reason, remedy) = said(answer).unwrap();
            assert_eq!((reason.code, reason.effect), (Code::VerdictCached, effect));
            assert!(
                reason.evidence.contains("'bus address'"),
                "{}",
                reason.evidence
            );
            assert_eq!(
                remedy.commands[1],
                "echo 0000:03:00.0 > /sys/bus/pci/drivers/peerbuf/bind"
            );
        }
    }
}

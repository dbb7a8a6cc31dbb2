//! `peerbuf why`: the whole argument about two devices, each way.

use std::process::ExitCode;

use peerbuf_topo::machine::{Function, Index, Machine};
use peerbuf_topo::reasons::{Argument, Effect, Reason, Remedy, Verdict, label};
use peerbuf_topo::rules::{Map, Rule};
use peerbuf_topo::{Rules, argue};
use serde_json::{Value, json};

use crate::ask::{self, Answer};
use crate::topo::{NotFound, Source, Target};
use crate::{Failure, say, table};

/// Arguments of `peerbuf why`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A device: by address (0000:41:00.0), name (nvme0n1, mlx5_0), node (/dev/dri/renderD128) or a file on it
    a: String,
    /// Another
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

/// One device's use of the other's memory: what is predicted, and what the kernel said.
pub struct Way {
    pub argument: Argument,
    pub answer: Answer,
}

impl Way {
    /// Predicts, and asks where the prediction is not about what the devices lack.
    pub fn of(rules: &Rules<'_>, client: Index, provider: Index, ask: bool) -> Way {
        let argument = argue(rules, client, provider);
        let at = |index| rules.machine().function(index).address;
        let answer = match (ask, unable(&argument)) {
            (false, _) => Answer::NotAsked("only predicted".into()),
            (true, true) => Answer::NotAsked("the devices cannot".into()),
            (true, false) => ask::kernel(at(client), at(provider)),
        };
        Way { argument, answer }
    }

    /// The kernel's answer where there is one, else the prediction.
    pub fn verdict(&self) -> Verdict {
        match self.answer {
            _ if unable(&self.argument) => Verdict::No,
            Answer::Yes(_) => Verdict::Yes,
            Answer::No(_) => Verdict::No,
            Answer::NotAsked(_) => self.argument.verdict,
        }
    }

    /// The devices themselves rule it out, whatever is between them.
    pub fn is_unable(&self) -> bool {
        unable(&self.argument)
    }

    /// What the kernel said.
    pub fn answer_text(&self) -> String {
        match &self.answer {
            Answer::Yes(route) => format!("yes, {route}"),
            Answer::No(why) => format!("no: {why}"),
            Answer::NotAsked(why) => format!("not asked: {why}"),
        }
    }

    /// The same in a word or two.
    pub fn answer_word(&self) -> &'static str {
        match self.answer {
            Answer::Yes(_) => "yes",
            Answer::No(_) => "no",
            Answer::NotAsked(_) => "not asked",
        }
    }

    /// It works, and by the shortest way that there is.
    pub fn is_as_good_as_it_gets(&self) -> bool {
        let slowed = self
            .argument
            .reasons
            .iter()
            .any(|reason| reason.effect == Effect::Slows);
        self.verdict() == Verdict::Yes && !slowed
    }
}

/// Whether the devices themselves rule it out, whatever is between them.
fn unable(argument: &Argument) -> bool {
    use peerbuf_topo::Code;
    let lacks = |reason: &Reason| {
        reason.effect == Effect::Blocks && matches!(reason.code, Code::NoDmaEngine | Code::NoMemory)
    };
    argument.reasons.iter().any(lacks)
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
                true => to_json(&machine, &ways, &layers).to_string(),
                false => show(&rules, &ways, &layers, width),
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

/// Something that no PCI function carries.
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
    for reason in reasons {
        text += &reason_text(reason, "", width);
    }
    text.trim_end().to_owned()
}

fn show(rules: &Rules<'_>, ways: &[Way; 2], layers: &[&Reason], width: usize) -> String {
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

/// Each reason once, with whether it is one of the first way's and of the second's.
fn merged(ways: &[Way; 2]) -> Vec<(&Reason, [bool; 2])> {
    let mut all: Vec<&Reason> = Vec::new();
    for reason in ways.iter().flat_map(|way| &way.argument.reasons) {
        if !all.contains(&reason) {
            all.push(reason);
        }
    }
    all.sort_by_key(|reason| reason.effect);
    let of =
        |reason: &&Reason| [0, 1].map(|way: usize| ways[way].argument.reasons.contains(reason));
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

fn heading(
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
        .any(|reason| reason.code == peerbuf_topo::Code::IommuInGuest);
    let verdict = match verdict {
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
    let bytes = match way.verdict() {
        Verdict::No => "not tried",
        _ => {
            "not proved here; `peerbuf demo --dir DIRECTORY-ON-THE-DISK` moves some, and checks each"
        }
    };
    let mut text = table::paragraph(&title, width);
    for (grade, what) in [
        ("predicted", predicted.as_str()),
        ("kernel", &kernel),
        ("bytes", bytes),
    ] {
        text += &table::labelled(&format!("    {grade:<9}"), what, width);
    }
    text
}

/// The rule that a prediction stands on, in a few words.
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

fn to_json(machine: &Machine, ways: &[Way; 2], layers: &[&Reason]) -> Value {
    let way = |way: &Way| {
        let route = &way.argument.route;
        let possible = Map::ALL.into_iter().filter(|map| route.possible.has(*map));
        let reasons = layers.iter().copied().chain(&way.argument.reasons);
        let kernel = match &way.answer {
            Answer::Yes(route) => json!({ "allowed": true, "route": route }),
            Answer::No(why) => json!({ "allowed": false, "error": why }),
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
            "reasons": reasons.map(reason_json).collect::<Vec<_>>(),
            "remedies": way.argument.remedies.iter()
                .map(|remedy| json!({ "what": remedy.what, "commands": remedy.commands }))
                .collect::<Vec<_>>(),
        })
    };
    json!({ "ways": ways.iter().map(way).collect::<Vec<_>>() })
}

//! What the published crates bring along from outside: every dependency compiles with the oldest Rust that
//! they promise to work with, comes from the registry, and has a licence under which the whole can be passed on.
//!
//! Cargo chooses such versions (resolver 3), and says nothing where it finds none. `cargo deny` knows the licences,
//! and takes longer to compile than everything else that CI does before its first test.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::Command;

use serde_json::Value;

/// Licences (SPDX) that go together with MIT or Apache-2.0.
const LICENCES: [&str; 5] = ["Apache-2.0", "ISC", "MIT", "Unicode-3.0", "Zlib"];

#[test]
fn every_dependency_works_with_the_oldest_rust_that_is_promised() {
    let promised = env!("CARGO_PKG_RUST_VERSION");
    let wrong = wrong(|package| {
        let needed = package["rust_version"].as_str()?;
        (version(needed) > version(promised)).then(|| format!("needs Rust {needed}"))
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_dependency_may_be_passed_on_and_comes_from_the_registry() {
    let wrong = wrong(|package| {
        let licence = text(package, "license");
        let source = package["source"].as_str();
        if !may_be_passed_on(licence) {
            return Some(format!("has the licence {licence:?}"));
        }
        let elsewhere = source.filter(|source| !source.starts_with("registry+"));
        elsewhere.map(|source| format!("comes from {source}"))
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_licence_is_understood_as_spdx_has_it() {
    for (licence, expected) in [
        ("MIT", true),
        ("GPL-2.0-only", false),
        ("", false),
        ("MIT/Apache-2.0", true),
        ("Unlicense OR MIT", true),
        ("MIT AND GPL-3.0-only", false),
        ("(MIT OR GPL-3.0-only) AND Unicode-3.0", true),
        ("(GPL-2.0-only WITH Linux-syscall-note) OR MIT", true),
        ("GPL-2.0-only WITH Linux-syscall-note OR MPL-2.0", false),
        ("MIT AND (GPL-2.0-only OR BSD-4-Clause)", false),
    ] {
        assert_eq!(may_be_passed_on(licence), expected, "{licence}");
    }
}

/// What is wrong with a dependency of the published crates, if something is, for each of them.
fn wrong(what: impl Fn(&Value) -> Option<String>) -> Vec<String> {
    let metadata = metadata();
    let packages: BTreeMap<&str, &Value> = list(&metadata, "packages")
        .map(|package| (text(package, "id"), package))
        .collect();
    let nodes: BTreeMap<&str, &Value> = list(&metadata["resolve"], "nodes")
        .map(|node| (text(node, "id"), node))
        .collect();
    let ours = list(&metadata, "workspace_members").filter_map(Value::as_str);
    let published = ours.filter(|id| packages[id]["publish"].is_null());
    let mut next: VecDeque<&str> = published.collect();
    assert!(next.len() >= 5, "{next:?}");

    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    while let Some(id) = next.pop_front() {
        if !seen.insert(id) {
            continue;
        }
        let package = packages[id];
        wrong.extend(what(package).map(|what| format!("{} {what}", text(package, "name"))));
        let needs = list(nodes[id], "deps");
        let compiled = |of: &&Value| list(of, "dep_kinds").any(|kind| kind["kind"] != "dev");
        next.extend(needs.filter(compiled).map(|of| text(of, "pkg")));
    }
    assert!(seen.len() > 20, "{seen:?}");
    wrong
}

/// Whether one of the alternatives has only licences that are known. A slash is an old `OR`; an exception (`WITH`)
/// allows more, never less.
fn may_be_passed_on(licence: &str) -> bool {
    let spaced = licence.replace('(', " ( ").replace(')', " ) ");
    let spaced = spaced.replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let is_good = any_of(&mut words);
    is_good && words.next().is_none()
}

type Words<'w> = std::iter::Peekable<std::str::SplitWhitespace<'w>>;

fn any_of(words: &mut Words) -> bool {
    let mut good = all_of(words);
    while words.next_if_eq(&"OR").is_some() {
        good |= all_of(words);
    }
    good
}

fn all_of(words: &mut Words) -> bool {
    let mut good = one(words);
    while words.next_if_eq(&"AND").is_some() {
        good &= one(words);
    }
    good
}

fn one(words: &mut Words) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let good = any_of(words);
        return words.next_if_eq(&")").is_some() && good;
    }
    let good = words.next().is_some_and(|name| LICENCES.contains(&name));
    if words.next_if_eq(&"WITH").is_some() {
        words.next();
    }
    good
}

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--all-features"])
        .args(["--offline", "--filter-platform", &target])
        .current_dir(super::workspace())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo metadata: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list<'v>(value: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> {
    value[key].as_array().into_iter().flatten()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

/// `1.89` is older than `1.90.1`.
fn version(text: &str) -> Vec<u64> {
    text.split('.')
        .filter_map(|part| part.parse().ok())
        .collect()
}

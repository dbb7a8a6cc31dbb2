//! Compiles the examples of the READMEs and of `docs/`. They are not the crates' own documentation tests: the
//! repository's pages are outside of every crate, and a published crate must not name files outside of it.

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Repository;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/disks.md")]
pub struct Disks;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/engines.md")]
pub struct Engines;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/gpu.md")]
pub struct Gpu;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/sharing.md")]
pub struct Sharing;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/README.md")]
pub struct Peerbuf;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/core/README.md")]
pub struct Core;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/rdma/README.md")]
pub struct Rdma;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/topo/README.md")]
pub struct Topo;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use peerbuf::plan::ReasonCode;
    use peerbuf_topo::Code;

    /// The text of tests below a directory: files of tests, and the module of tests at a file's end.
    fn tests_below(directory: &Path, into: &mut String) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    tests_below(&path, into);
                }
                continue;
            }
            let Some(name) = path.to_str().filter(|name| name.ends_with(".rs")) else {
                continue;
            };
            let text = std::fs::read_to_string(&path).unwrap();
            let whole = name.contains("/tests/") || name.ends_with("/tests.rs");
            let start = match whole {
                true => Some(0),
                false => text.find("mod tests {"),
            };
            into.push_str(&text[start.unwrap_or(text.len())..]);
        }
    }

    #[test]
    fn each_reason_occurs_in_a_test() {
        let mut tests = String::new();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        // Without this file, whose names are of all codes.
        for part in ["lib", "tools", "tests/lab"] {
            tests_below(&root.join(part), &mut tests);
        }
        let occurs = |variant: &str, name: &str| {
            let variant = format!("Code::{variant}");
            let is_whole = |(at, _): (usize, &str)| {
                let after = tests[at + variant.len()..].chars().next();
                !after.is_some_and(char::is_alphanumeric)
            };
            tests.match_indices(&variant).any(is_whole) || tests.contains(&format!("\"{name}\""))
        };
        let plans = ReasonCode::ALL.map(|code| (format!("{code:?}"), code.as_str()));
        // The other codes of the topology are given by its own test, `each_code_is_given_by_some_machine`.
        let files = [Code::BlockLayer, Code::NotPci];
        let files = files.map(|code| (format!("{code:?}"), code.as_str()));
        let missing: Vec<&str> = plans
            .into_iter()
            .chain(files)
            .filter(|(variant, name)| !occurs(variant, name))
            .map(|(_, name)| name)
            .collect();
        assert!(missing.is_empty(), "no test has {missing:?}");
    }

    #[test]
    fn each_reason_has_a_page_that_says_how_to_see_it_and_what_changes_it() {
        let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reasons");
        let index = std::fs::read_to_string(pages.join("README.md")).unwrap();
        let plans = BTreeSet::from(ReasonCode::ALL.map(ReasonCode::as_str));
        let topology = BTreeSet::from(Code::ALL.map(Code::as_str));
        let counts = (plans.len(), topology.len());
        assert_eq!(counts, (ReasonCode::ALL.len(), Code::ALL.len()));
        // Both mean the same by it.
        let shared: Vec<&&str> = plans.intersection(&topology).collect();
        assert_eq!(shared, [&"block-layer", &"several-disks"]);
        let names = plans.union(&topology);
        for name in names {
            let page = pages.join(format!("{name}.md"));
            let text = std::fs::read_to_string(&page).unwrap_or_default();
            assert!(
                text.starts_with(&format!("# {name}\n")),
                "{}",
                page.display()
            );
            for part in ["## See it by hand", "## What changes it"] {
                assert!(text.contains(part), "{name}: no {part:?}");
            }
            assert!(
                index.contains(&format!("({name}.md)")),
                "{name} is not in the index"
            );
        }
    }
}

//! Compiles the examples of the READMEs and of `docs/`. They are not the crates' own documentation tests: the
//! repository's pages are outside of every crate, and a published crate must not name files outside of it.

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Repository;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/disks.md")]
pub struct Disks;

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

    #[test]
    fn each_reason_has_a_page_that_says_how_to_see_it_and_what_changes_it() {
        let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reasons");
        let index = std::fs::read_to_string(pages.join("README.md")).unwrap();
        let plans = ReasonCode::ALL.map(ReasonCode::as_str);
        let names: BTreeSet<&str> = Code::ALL
            .map(Code::as_str)
            .into_iter()
            .chain(plans)
            .collect();
        assert_eq!(names.len(), Code::ALL.len() + ReasonCode::ALL.len());
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

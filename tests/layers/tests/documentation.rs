//! Links in README.md and docs/ lead somewhere, and each page is in the index.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Parser, Tag};

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.ancestors().nth(2).unwrap().to_owned()
}

fn pages(directory: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            pages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.insert(path.canonicalize().unwrap());
        }
    }
}

/// The files that a page links to, beside the words of each link.
fn links(page: &Path) -> Vec<String> {
    let text = fs::read_to_string(page).unwrap();
    let parser = Parser::new_ext(&text, pulldown_cmark::Options::ENABLE_TABLES);
    let links = parser.filter_map(|event| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
            Some(dest_url.into_string())
        }
        _ => None,
    });
    let local = |link: &String| !link.contains("://") && !link.starts_with('#');
    links.filter(local).collect()
}

fn target(page: &Path, link: &str) -> PathBuf {
    let path = link.split('#').next().unwrap();
    page.parent().unwrap().join(path)
}

#[test]
fn each_link_of_the_documentation_leads_to_a_file() {
    let mut all = BTreeSet::new();
    pages(&root().join("docs"), &mut all);
    for crate_directory in ["", "lib", "lib/core", "lib/rdma", "findings"] {
        all.insert(root().join(crate_directory).join("README.md"));
    }
    let mut checked = 0;
    for page in &all {
        for link in links(page) {
            let target = target(page, &link);
            assert!(target.exists(), "{}: no file {link}", page.display());
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} links were found");
}

#[test]
fn each_page_can_be_reached_from_the_readme() {
    let mut all = BTreeSet::new();
    pages(&root().join("docs"), &mut all);
    let mut reached = BTreeSet::new();
    let mut waiting = vec![root().join("README.md").canonicalize().unwrap()];
    while let Some(page) = waiting.pop() {
        for link in links(&page) {
            let Ok(target) = target(&page, &link).canonicalize() else {
                continue;
            };
            if all.contains(&target) && reached.insert(target.clone()) {
                waiting.push(target);
            }
        }
    }
    let unreached: Vec<_> = all.difference(&reached).collect();
    assert!(
        unreached.is_empty(),
        "no way from the README: {unreached:?}"
    );
}

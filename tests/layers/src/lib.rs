//! Dependencies point one way: no module of a crate, and no crate of the workspace, is part of a
//! circle. Where one is, the test prints the circle, and which names make it.
//!
//! A module depends on another if its code names something that is defined there: in a `use`, in a
//! path, or in a macro's arguments. A name that was re-exported counts for the module that defines it.
//! At each level of the tree, the modules and what their parent itself defines must have an order.
//!
//! Not counted: tests (`#[cfg(test)]`), documentation, and a module's `pub use` of what its own
//! children define, which gives that its address.

#![cfg(test)]

mod outside;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Ident, TokenStream, TokenTree};

/// The crates that others build on, the lowest first: each may depend on those before it only.
const LAYERS: [(&str, &str); 6] = [
    ("peerbuf-uapi", "uapi"),
    ("peerbuf-core", "lib/core"),
    ("peerbuf-topo", "lib/topo"),
    ("peerbuf", "lib"),
    ("peerbuf-rdma", "lib/rdma"),
    ("peerbuf-c", "lib/c"),
];

#[test]
fn no_module_depends_on_one_that_depends_on_it() {
    let mut circles = String::new();
    for (name, folder) in LAYERS {
        let sources = sources_below(&workspace().join(folder).join("src"));
        for circle in Crate::read(name, sources).circles() {
            circles += &circle;
        }
    }
    assert!(circles.is_empty(), "\n{circles}");
}

/// The same of the two kernel modules, whose roots lie in one folder.
#[test]
fn no_room_of_a_kernel_module_depends_on_one_that_depends_on_it() {
    let mut circles = String::new();
    for root in ["main.rs", "probe.rs"] {
        let mut sources = sources_below(&workspace().join("kmod"));
        let text = sources.remove(Path::new(root)).unwrap();
        sources.insert("lib.rs".into(), text);
        // What `module!` makes in the root is the kernel's.
        for name in ["THIS_MODULE", "LocalModule", "module_parameters"] {
            for text in sources.values_mut() {
                *text = text.replace(&format!("crate::{name}"), &format!("kernel::{name}"));
            }
        }
        for circle in Crate::read(root, sources).circles() {
            circles += &circle;
        }
    }
    assert!(circles.is_empty(), "\n{circles}");
}

#[test]
fn a_crate_depends_only_on_those_below_it() {
    let mut wrong = Vec::new();
    let mut below = BTreeSet::new();
    for (name, folder) in LAYERS {
        let manifest = workspace().join(folder).join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest).unwrap();
        let table: toml::Table = text.parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let dependencies = table.get(section).and_then(|section| section.as_table());
            for dependency in dependencies.into_iter().flat_map(|table| table.keys()) {
                // Its own features, for its tests.
                let itself = dependency == name && section == "dev-dependencies";
                let ours = dependency.starts_with("peerbuf");
                if ours && !itself && !below.contains(dependency.as_str()) {
                    wrong.push(format!("{name}: {dependency} in [{section}]"));
                }
            }
        }
        below.insert(name);
    }
    assert!(wrong.is_empty(), "not below: {wrong:#?}");
}

/// A program that reads files into dma-bufs compiles no graphics bindings.
#[test]
fn peerbuf_without_features_needs_these_crates_only() {
    let manifest = workspace().join("lib/Cargo.toml");
    let table: toml::Table = std::fs::read_to_string(manifest).unwrap().parse().unwrap();
    let dependencies = table["dependencies"].as_table().unwrap();
    let is_optional = |value: &toml::Value| {
        let optional = value.get("optional").and_then(toml::Value::as_bool);
        optional == Some(true)
    };
    let needed: Vec<&str> = dependencies
        .iter()
        .filter(|(_, value)| !is_optional(value))
        .map(|(name, _)| name.as_str())
        .collect();
    let expected = [
        "arc-swap",
        "bytemuck",
        "nix",
        "peerbuf-core",
        "rand",
        "rustix",
        "thiserror",
    ];
    assert_eq!(needed, expected);
}

fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Each file's path from `root`, and its text.
fn sources_below(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut sources = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                sources.insert(path.strip_prefix(root).unwrap().to_path_buf(), text);
            }
        }
    }
    sources
}

/// A module's place: the names from the crate's root on.
type Place = Vec<String>;

/// A path as it is written, from `crate`, `self`, `super` or a name on.
type Written = Vec<String>;

#[derive(Default)]
struct Module {
    file: PathBuf,
    /// Names that it defines.
    items: BTreeSet<String>,
    children: BTreeSet<String>,
    /// What it has by `use`: the name here, and the path.
    imports: BTreeMap<String, Written>,
    globs: Vec<Written>,
    named: Vec<Named>,
}

struct Named {
    path: Written,
    line: usize,
    by_use: bool,
    /// By `pub use`.
    re_exported: bool,
}

struct Crate {
    name: String,
    sources: BTreeMap<PathBuf, String>,
    modules: BTreeMap<Place, Module>,
}

/// One module names what another defines.
struct Edge {
    from: Place,
    to: Place,
    why: String,
}

impl Crate {
    fn read(name: &str, sources: BTreeMap<PathBuf, String>) -> Crate {
        let mut this = Crate {
            name: name.into(),
            sources,
            modules: BTreeMap::new(),
        };
        this.read_file(&Place::new(), Path::new("lib.rs"), Path::new(""));
        this
    }

    /// `folder` is where the files of its children are.
    fn read_file(&mut self, place: &Place, file: &Path, folder: &Path) {
        let text = self.sources.get(file);
        let text = text.unwrap_or_else(|| panic!("{}: {} is missing", self.name, file.display()));
        let tokens: TokenStream = text.parse().unwrap();
        let module = Module {
            file: file.to_path_buf(),
            ..Module::default()
        };
        self.modules.insert(place.clone(), module);
        let mut scan = Scan {
            of: self,
            place: place.clone(),
            folder: folder.to_path_buf(),
            inline: Vec::new(),
        };
        scan.items(tokens, true);
    }

    /// The module that defines what is written as this in `scope`; `None` if it is no module of this
    /// crate.
    fn resolve(&self, scope: &Place, path: &[String], depth: u32) -> Option<Place> {
        let module = self.modules.get(scope)?;
        let Some((first, rest)) = path.split_first() else {
            return Some(scope.clone());
        };
        if depth > 16 {
            return None;
        }
        match first.as_str() {
            "crate" => return self.resolve(&Place::new(), rest, depth + 1),
            "self" => return self.resolve(scope, rest, depth + 1),
            "super" => {
                let (_, parent) = scope.split_last()?;
                return self.resolve(&parent.to_vec(), rest, depth + 1);
            }
            _ => {}
        }
        if module.children.contains(first) {
            let mut child = scope.clone();
            child.push(first.clone());
            return self.resolve(&child, rest, depth + 1);
        }
        if module.items.contains(first) {
            return Some(scope.clone());
        }
        if let Some(import) = module.imports.get(first) {
            let path: Written = import.iter().chain(rest).cloned().collect();
            // `use name::...`, where there is no module `name` here, is another crate's.
            return (path[0] != *first).then(|| self.resolve(scope, &path, depth + 1))?;
        }
        // Another crate's globs lead nowhere here, by many ways.
        let ours = |glob: &&Written| {
            ["crate", "self", "super"].contains(&glob[0].as_str())
                || module.children.contains(&glob[0])
                || module.imports.contains_key(&glob[0])
        };
        module.globs.iter().filter(ours).find_map(|glob| {
            let target = self.resolve(scope, glob, depth + 1)?;
            (target != *scope).then(|| self.resolve(&target, path, depth + 1))?
        })
    }

    /// The innermost module that a path goes through; `None` if it goes through none.
    fn innermost(&self, scope: &Place, path: &[String]) -> Option<Place> {
        let through = (1..path.len()).rev().map(|length| &path[..length]);
        through
            .filter_map(|path| self.resolve(scope, path, 0))
            .next()
    }

    fn edges(&self) -> Vec<Edge> {
        let mut edges = Vec::new();
        for (from, module) in &self.modules {
            for named in &module.named {
                // The `use` that brings the name is listed itself.
                if !named.by_use && module.imports.contains_key(&named.path[0]) {
                    continue;
                }
                let to = self.resolve(from, &named.path, 0);
                // What a macro defines, or another crate: the module that it is said to be in.
                let to = to.or_else(|| self.innermost(from, &named.path));
                let Some(to) = to else { continue };
                let address_of_a_child = named.re_exported && to.starts_with(from);
                if to != *from && !address_of_a_child {
                    let file = module.file.display();
                    let path = named.path.join("::");
                    let why = format!("{file}:{}: {path}", named.line);
                    let from = from.clone();
                    edges.push(Edge { from, to, why });
                }
            }
        }
        edges
    }

    /// Each circle, as text: its modules, and the names that make it.
    fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut found = Vec::new();
        for (parent, module) in &self.modules {
            if module.children.is_empty() {
                continue;
            }
            // What is in the parent itself stands beside its children.
            let side = |place: &Place| {
                let below = place.strip_prefix(parent.as_slice())?;
                Some(below.first().map_or("(itself)", String::as_str).to_owned())
            };
            let mut graph: BTreeMap<String, BTreeMap<String, Vec<&str>>> = BTreeMap::new();
            for edge in &edges {
                if let (Some(from), Some(to)) = (side(&edge.from), side(&edge.to))
                    && from != to
                {
                    let why = graph.entry(from).or_default().entry(to).or_default();
                    why.push(&edge.why);
                }
            }
            if let Some(circle) = shortest_circle(&graph) {
                let mut place = vec![self.name.clone()];
                place.extend(parent.iter().cloned());
                let mut text = format!("a circle in {}:\n", place.join("::"));
                for (from, to) in circle.iter().zip(circle.iter().cycle().skip(1)) {
                    let _ = writeln!(text, "  {from} depends on {to}");
                    for why in &graph[from][to] {
                        let _ = writeln!(text, "    {why}");
                    }
                }
                found.push(text);
            }
        }
        found
    }
}

fn shortest_circle(graph: &BTreeMap<String, BTreeMap<String, Vec<&str>>>) -> Option<Vec<String>> {
    let circle_from = |start: &String| {
        let mut ways = VecDeque::from([vec![start.clone()]]);
        let mut seen = BTreeSet::new();
        while let Some(way) = ways.pop_front() {
            for next in graph.get(way.last()?).into_iter().flat_map(BTreeMap::keys) {
                if next == start {
                    return Some(way);
                }
                if seen.insert(next.clone()) {
                    ways.push_back([way.as_slice(), std::slice::from_ref(next)].concat());
                }
            }
        }
        None
    };
    graph.keys().filter_map(circle_from).min_by_key(Vec::len)
}

/// Reads one file's tokens.
struct Scan<'c> {
    of: &'c mut Crate,
    place: Place,
    folder: PathBuf,
    /// The modules in braces that the tokens are in. They are parts of their file.
    inline: Vec<String>,
}

impl Scan<'_> {
    fn module(&mut self) -> &mut Module {
        self.of.modules.get_mut(&self.place).unwrap()
    }

    /// `outermost`: these are items of the file, and not parts of one.
    fn items(&mut self, tokens: TokenStream, outermost: bool) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            at = self.step(&tokens, at, outermost);
        }
    }

    /// Reads what begins at `at`, and returns where the next begins.
    fn step(&mut self, tokens: &[TokenTree], at: usize, outermost: bool) -> usize {
        let word = |at: usize| word_at(tokens, at);
        match &tokens[at] {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                let bang = usize::from(is_punct(tokens, at + 1, '!'));
                match tokens.get(at + 1 + bang) {
                    Some(TokenTree::Group(group)) if is_for_tests(group.stream()) => {
                        after_item(tokens, at + 2 + bang)
                    }
                    Some(TokenTree::Group(_)) => at + 2 + bang,
                    _ => at + 1,
                }
            }
            TokenTree::Group(group) => {
                self.items(group.stream(), false);
                at + 1
            }
            TokenTree::Ident(ident) if ident == "mod" && word(at + 1).is_some() => {
                let name = word(at + 1).unwrap_or_default();
                match tokens.get(at + 2) {
                    Some(TokenTree::Group(group)) => {
                        self.inline.push(name);
                        self.items(group.stream(), false);
                        self.inline.pop();
                    }
                    _ => self.child(&name),
                }
                at + 3
            }
            TokenTree::Ident(ident) if ident == "use" => {
                let end = (at..tokens.len()).find(|&at| is_punct(tokens, at, ';'));
                let end = end.unwrap_or(tokens.len());
                let public = is_public(tokens, at);
                let tree: TokenStream = tokens[at + 1..end].iter().cloned().collect();
                self.import(tree, &Written::new(), public);
                end + 1
            }
            TokenTree::Ident(ident) => {
                const DEFINES: [&str; 8] = [
                    "struct", "enum", "union", "trait", "type", "fn", "const", "static",
                ];
                if outermost
                    && DEFINES.iter().any(|keyword| ident == keyword)
                    && let Some(name) = word(at + 1)
                {
                    self.module().items.insert(name);
                }
                self.path(ident, tokens, at)
            }
            _ => at + 1,
        }
    }

    fn child(&mut self, name: &str) {
        self.module().children.insert(name.to_owned());
        let mut place = self.place.clone();
        place.push(name.to_owned());
        let folder = self.folder.join(name);
        let flat = self.folder.join(format!("{name}.rs"));
        let file = match self.of.sources.contains_key(&flat) {
            true => flat,
            false => folder.join("mod.rs"),
        };
        self.of.read_file(&place, &file, &folder);
    }

    /// Reads a path that begins with `first`, if it is one.
    fn path(&mut self, first: &Ident, tokens: &[TokenTree], at: usize) -> usize {
        let mut path = vec![first.to_string()];
        let mut next = at + 1;
        while is_punct(tokens, next, ':')
            && is_punct(tokens, next + 1, ':')
            && let Some(name) = word_at(tokens, next + 2)
        {
            path.push(name);
            next += 3;
        }
        let after_colons =
            at >= 2 && is_punct(tokens, at - 1, ':') && is_punct(tokens, at - 2, ':');
        if path.len() > 1 && !after_colons {
            let line = first.span().start().line;
            self.name(Named {
                path,
                line,
                by_use: false,
                re_exported: false,
            });
        }
        next
    }

    fn import(&mut self, tree: TokenStream, before: &Written, public: bool) {
        let tokens: Vec<TokenTree> = tree.into_iter().collect();
        for part in tokens.split(|token| matches!(token, TokenTree::Punct(p) if p.as_char() == ','))
        {
            let mut path = before.clone();
            let mut at = 0;
            let mut alias = None;
            let mut is_tree = false;
            while let Some(token) = part.get(at) {
                match token {
                    TokenTree::Ident(ident) if ident == "as" => {
                        alias = word_at(part, at + 1);
                        at += 1;
                    }
                    TokenTree::Ident(ident) => path.push(ident.to_string()),
                    TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                        is_tree = true;
                        self.import(group.stream(), &path, public);
                    }
                    TokenTree::Punct(punct) if punct.as_char() == '*' => {
                        is_tree = true;
                        let path = self.written_outside(path.clone());
                        self.module().globs.push(path);
                    }
                    _ => {}
                }
                at += 1;
            }
            if is_tree || part.is_empty() {
                continue;
            }
            // `use a::b::{self, c}`
            if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
                path.pop();
            }
            self.name(Named {
                path: path.clone(),
                line: part[0].span().start().line,
                by_use: true,
                re_exported: public,
            });
            if self.inline.is_empty()
                && let Some(name) = alias.or_else(|| path.last().cloned())
            {
                self.module().imports.insert(name, path);
            }
        }
    }

    fn name(&mut self, mut named: Named) {
        named.path = self.written_outside(named.path);
        self.module().named.push(named);
    }

    /// A path as it would be written outside of the modules in braces.
    fn written_outside(&self, mut path: Written) -> Written {
        let mut inside = self.inline.len();
        while inside > 0 && path.first().is_some_and(|first| first == "super") {
            path.remove(0);
            inside -= 1;
        }
        if path.is_empty() || (inside < self.inline.len() && path[0] != "super") {
            path.insert(0, "self".to_owned());
        }
        path
    }
}

fn word_at(tokens: &[TokenTree], at: usize) -> Option<String> {
    match tokens.get(at)? {
        TokenTree::Ident(ident) => Some(ident.to_string()),
        _ => None,
    }
}

fn is_punct(tokens: &[TokenTree], at: usize, wanted: char) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

/// Whether `pub`, or `pub(...)`, stands before `at`.
fn is_public(tokens: &[TokenTree], at: usize) -> bool {
    let parentheses = |token: &TokenTree| matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis);
    let before = match at.checked_sub(1).and_then(|before| tokens.get(before)) {
        Some(token) if parentheses(token) => at.checked_sub(2),
        _ => at.checked_sub(1),
    };
    before
        .and_then(|before| word_at(tokens, before))
        .is_some_and(|word| word == "pub")
}

/// Whether an attribute is `test`, or `cfg` of something that only tests have.
fn is_for_tests(attribute: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = attribute.into_iter().collect();
    match (word_at(&tokens, 0).as_deref(), tokens.get(1)) {
        (Some("test"), _) => true,
        (Some("cfg"), Some(TokenTree::Group(group))) => {
            let condition = group.stream().to_string();
            let words = condition.split(|c: char| !c.is_alphanumeric());
            let mut words = words.filter(|word| !word.is_empty());
            words
                .clone()
                .any(|word| word == "test" || word == "doctest")
                && words.all(|word| word != "not" && word != "any")
        }
        _ => false,
    }
}

/// Where what follows the item, field or value that begins at `at` begins.
fn after_item(tokens: &[TokenTree], mut at: usize) -> usize {
    const ITEMS: [&str; 14] = [
        "pub",
        "fn",
        "mod",
        "use",
        "impl",
        "struct",
        "enum",
        "const",
        "static",
        "type",
        "trait",
        "unsafe",
        "extern",
        "macro_rules",
    ];
    while is_punct(tokens, at, '#') {
        at += 2;
    }
    let is_item = word_at(tokens, at).is_some_and(|word| ITEMS.contains(&word.as_str()));
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token {
            TokenTree::Punct(punct) if punct.as_char() == ';' => break,
            TokenTree::Punct(punct) if punct.as_char() == ',' && !is_item => break,
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => break,
            _ => {}
        }
    }
    at
}

/// The test's own: crates of these files, each with its circles.
mod itself {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let sources = files
            .iter()
            .map(|(path, text)| (path.into(), (*text).to_owned()));
        Crate::read("sample", sources.collect()).circles()
    }

    #[test]
    fn a_circle_is_found_and_its_names_are_told() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b; mod c; pub use a::One;"),
            (
                "a.rs",
                "use crate::{\n  b::{Two, Other as O},\n  c,\n};\npub struct One;",
            ),
            ("b.rs", "pub struct Two; pub struct Other; use std::fmt;"),
            ("c/mod.rs", "pub fn of() { let _ = vec![super::One]; }"),
        ]);
        let expected = "a circle in sample:\n  a depends on c\n    a.rs:3: crate::c\n  \
                        c depends on a\n    c/mod.rs:1: super::One\n";
        assert_eq!(found, [expected]);
    }

    #[test]
    fn a_circle_through_children_is_found_where_they_part() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "pub mod one; pub mod two;"),
            ("a/one.rs", "use crate::b::three::Three;"),
            ("a/two.rs", "pub struct Two;"),
            ("b.rs", "pub mod three; pub mod four;"),
            ("b/three.rs", "pub struct Three;"),
            (
                "b/four.rs",
                "fn f() -> crate::a::two::Two { crate::a::two::Two }",
            ),
        ]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("a depends on b"), "{}", found[0]);
    }

    #[test]
    fn a_parents_own_items_stand_beside_its_children() {
        let below = (
            "a/one.rs",
            "make!(one); mod raw { type Same = super::super::Own; }",
        );
        let files = |parent| [("lib.rs", "mod a;"), ("a.rs", parent), below];
        let address = "mod one; pub use one::one; pub struct Own;";
        assert_eq!(circles(&files(address)), [""; 0]);
        let circle = circles(&files("mod one; pub struct Own; fn f() { one::one() }"));
        assert!(circle[0].contains("(itself) depends on one"), "{circle:?}");
    }

    #[test]
    fn tests_and_documentation_do_not_count() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                "use crate::b::Two; pub struct One { #[cfg(test)] b: crate::b::Two, c: u8 }",
            ),
            (
                "b.rs",
                "//! Unlike [`crate::a::One`].\n pub struct Two; #[cfg(test)] mod tests { use crate::a::One; }",
            ),
        ]);
        assert_eq!(found, [""; 0]);
    }
}

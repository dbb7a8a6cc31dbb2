//! Lists the sources that the program carries for a lab without a checkout (`src/carried.rs`): `kmod/`, `uapi/` and what
//! guests have for programs with RDMA, without what a build in place leaves there.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Endings of sources; a name without a dot is one, too.
const SOURCES: [&str; 5] = ["rs", "c", "h", "py", "toml"];

fn main() {
    let carried = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("carried");
    let mut files = Vec::new();
    for part in ["kmod", "preload", "python", "uapi"] {
        find(&carried.join(part), &mut files);
    }
    files.sort();
    let mut list = String::from("&[\n");
    for file in &files {
        let name = file.strip_prefix(&carried).unwrap();
        list += &format!(
            "    ({:?}, include_bytes!({:?})),\n",
            name.display().to_string(),
            file.display().to_string()
        );
    }
    list += "]\n";
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    fs::write(out.join("carried.rs"), list).unwrap();
}

/// The sources below `dir`. A file that comes or goes changes its directory, at which cargo looks.
fn find(dir: &Path, files: &mut Vec<PathBuf>) {
    println!("cargo::rerun-if-changed={}", dir.display());
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        let ending = name.split_once('.').map(|(_, ending)| ending);
        if path.is_dir() {
            find(&path, files);
        } else if ending.is_none_or(|ending| SOURCES.contains(&ending)) {
            files.push(path);
        }
    }
}

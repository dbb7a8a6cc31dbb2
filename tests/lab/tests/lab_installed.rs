//! The lab as others have it: packaged, installed from the package, and called in an empty directory. Runs on the host.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

static INSTALLED: LazyLock<PathBuf> = LazyLock::new(installed);

fn checkout() -> PathBuf {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR"));
    suite.ancestors().nth(2).unwrap().to_owned()
}

fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| checkout().join("target"))
}

/// The standard output and error of a command that must succeed.
fn said(command: &mut Command) -> [String; 2] {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text[0],
        text[1]
    );
    text
}

/// `peerbuf-lab`, compiled from the archive that `cargo package` makes and installed.
fn installed() -> PathBuf {
    let cargo = || Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    // Unpacked at the same place each time, so that only what changed is compiled.
    let work = target().join("lab/installed");
    let package = [
        "package",
        "--quiet",
        "--allow-dirty",
        "--no-verify",
        "-p",
        "peerbuf-lab",
    ];
    said(
        cargo()
            .current_dir(checkout())
            .args(package)
            .arg("--target-dir")
            .arg(&work),
    );
    let name = format!("peerbuf-lab-{}", env!("CARGO_PKG_VERSION"));
    let archive = work.join("package").join(format!("{name}.crate"));
    let sources = work.join("sources");
    let _ = std::fs::remove_dir_all(&sources);
    std::fs::create_dir_all(&sources).unwrap();
    said(
        Command::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&sources),
    );
    // Unpacked inside of the checkout's workspace, of which it is no member.
    let manifest = sources.join(&name).join("Cargo.toml");
    let mut manifest = std::fs::File::options()
        .append(true)
        .open(manifest)
        .unwrap();
    manifest.write_all(b"\n[workspace]\n").unwrap();
    said(
        cargo()
            .args([
                "install",
                "--quiet",
                "--locked",
                "--debug",
                "--force",
                "--no-track",
            ])
            .arg("--path")
            .arg(sources.join(name))
            .arg("--root")
            .arg(&work)
            .arg("--target-dir")
            .arg(&work)
            .env_remove("CARGO_MANIFEST_DIR"),
    );
    work.join("bin/peerbuf-lab")
}

/// A directory with nothing of the checkout in it or around it, in which the lab is called.
struct Elsewhere {
    lab: PathBuf,
    directory: tempfile::TempDir,
}

impl Elsewhere {
    fn new() -> Self {
        Self {
            lab: INSTALLED.clone(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn lab(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.lab);
        command
            .args(args)
            .current_dir(self.directory.path())
            .env_remove("CARGO_MANIFEST_DIR");
        command
    }

    fn put(&self, name: &str, text: &str) {
        let file = self.directory.path().join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Puts the script that docs/test-bed.md has under this name.
    fn put_from_page(&self, name: &str) {
        let page = std::fs::read_to_string(checkout().join("docs/test-bed.md")).unwrap();
        let begin = format!("```sh\n#!/bin/sh\n# {name}: ");
        let script = page.split(&begin).nth(1).unwrap();
        let script = script.split("```").next().unwrap();
        self.put(name, &format!("#!/bin/sh\n# {script}"));
    }
}

/// The output of a command whose registrations, by `dma_buf_memory.so`, are at least two, and all of them of dma-bufs.
fn all_in_dma_bufs(command: &mut Command) -> String {
    let [out, error] = said(command);
    let count = |what| error.matches(what).count();
    let registered = count(": ibv_reg_dmabuf_mr: registered\n");
    assert!(
        registered >= 2 && registered == count("dma_buf_memory: "),
        "{out}{error}"
    );
    out
}

/// docs/test-bed.md has these commands.
#[test]
fn the_installed_lab_runs_a_program_of_mine_and_perftest_on_dma_bufs_in_an_empty_directory() {
    let elsewhere = Elsewhere::new();
    elsewhere.put(
        "my-test",
        "#!/bin/sh\nls /dev/peerbuf && uname -r && echo \"$@\"\n",
    );
    let [out, _] = said(&mut elsewhere.lab(&[
        "run",
        "--topology",
        "switch",
        "--",
        "./my-test",
        "an argument",
    ]));
    let lines: Vec<_> = out.lines().collect();
    assert!(
        lines.contains(&"0000:04:00.0") && lines.contains(&"importer"),
        "{out}"
    );
    assert_eq!(lines.last(), Some(&"an argument"), "{out}");

    elsewhere.put_from_page("perftest-on-dma-bufs");
    let perftest = |rdma| {
        elsewhere.lab(&[
            "run",
            "--rdma",
            rdma,
            "--with",
            "perftest",
            "--",
            "./perftest-on-dma-bufs",
        ])
    };
    let out = all_in_dma_bufs(&mut perftest("dmabuf"));
    assert!(out.contains("RDMA_Write BW Test"), "{out}");

    // The kernel's own soft-RoCE takes no dma-bufs, and nothing hides that.
    let output = perftest("stock").stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{error}");
    assert!(
        error.contains("ibv_reg_dmabuf_mr: Operation not supported"),
        "{error}"
    );
}

#[test]
fn the_installed_lab_runs_libfabric_on_dma_bufs_and_rdma_cores_tests_of_them() {
    let elsewhere = Elsewhere::new();
    elsewhere.put_from_page("pingpong-on-dma-bufs");
    let lab = |with, command: &[&str]| {
        let options = ["run", "--rdma", "dmabuf", "--with", with, "--"];
        elsewhere.lab(&[&options, command].concat())
    };
    let out = all_in_dma_bufs(&mut lab("libfabric-bin", &["./pingpong-on-dma-bufs"]));
    assert!(out.contains("bytes"), "{out}");

    let tests = [
        "env",
        "LD_PRELOAD=/opt/peerbuf/fixtures/reg_dmabuf_mr.so",
        "python3",
        "/opt/peerbuf/fixtures/rdma_core.py",
        "udmabuf",
        "no-atomics",
    ];
    let [out, error] = said(&mut lab("python3-pyverbs", &tests));
    assert_eq!(out.matches(": passed\n").count(), 10, "{out}{error}");
}

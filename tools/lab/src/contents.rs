//! Describes each kind of cache entry: what it is, which commands need it, and how much space its making
//! takes.
//!
//! The kind is the prefix of the entry's name. The texts are no ingredients of the hash, so changing one
//! remakes no entry.

/// A kind of entry.
#[derive(Debug)]
pub struct Kind {
    /// The prefix of the name, before the kernel's release or the hash.
    name: &'static str,
    /// The description; `{}` stands for the kernel's release, a version or the packages.
    what: &'static str,
    /// The commands that need it; `{}` as in `what`.
    why: &'static str,
    /// Peak bytes on disk while it is made, as measured; for `--with`, whose packages vary, a small value.
    pub takes: u64,
}

const MB: u64 = 1_000_000;

/// All kinds that the lab makes, and cargo-fuzz, which `tests/fuzz/run` puts there. A name that is a prefix
/// of another comes after it.
const KINDS: &[Kind] = &[
    Kind {
        name: "tree",
        what: "the distribution tree: root of every guest, home of the compilers and of QEMU",
        why: "every command that boots or builds",
        takes: 1_800 * MB,
    },
    Kind {
        name: "with",
        what: "a layer over the tree with further packages: {}",
        why: "guests with these packages in --with, some of `cargo lab test`",
        takes: 50 * MB,
    },
    Kind {
        name: "versions",
        what: "the list of the kernels that the distribution offers",
        why: "every command that boots or builds",
        takes: 0,
    },
    Kind {
        name: "kernel",
        what: "kernel {}: its image and modules",
        why: "guests with --kernel {}; the newest that the module supports is 'stock'",
        takes: 400 * MB,
    },
    Kind {
        name: "initramfs",
        what: "the initramfs that boots kernel {}",
        why: "guests with this kernel",
        takes: 25 * MB,
    },
    Kind {
        name: "linux",
        what: "source of kernel {}: archive, and a tree for building modules",
        why: "peerbuf.ko and other modules on this kernel; the debug kernel is made of it",
        takes: 2_200 * MB,
    },
    Kind {
        name: "modules",
        what: "peerbuf.ko and peerbuf_probe.ko for kernel {}, of the sources that an installed lab carries",
        why: "guests of a lab without a checkout",
        takes: 30 * MB,
    },
    Kind {
        name: "fixtures",
        what: "libraries to preload into programs with RDMA, and rdma-core's tests, for guests of an installed lab",
        why: "guests of a lab without a checkout",
        takes: MB,
    },
    Kind {
        name: "debug",
        what: "the debug kernel, built from the source of {}, with a tree for modules",
        why: "--kernel debug, `cargo lab fuzz`, `cargo lab test --kernel debug`",
        takes: 2_500 * MB,
    },
    Kind {
        name: "disk",
        what: "the image of the guests' NVMe disk, an ext4 file system",
        why: "every command that boots",
        takes: 30 * MB,
    },
    Kind {
        name: "rxe",
        what: "soft-RoCE that imports dma-bufs, for kernel {}",
        why: "guests with --rdma dmabuf, as in `cargo lab demo` and `cargo lab test`",
        takes: MB,
    },
    Kind {
        name: "selftests",
        what: "the kernel's tests of udmabuf and dma-buf heaps, from {}",
        why: "`cargo lab test`",
        takes: 2 * MB,
    },
    Kind {
        name: "rdma-core-tests",
        what: "rdma-core's own Python tests",
        why: "`cargo lab test`",
        takes: MB,
    },
    Kind {
        name: "cargo-fuzz",
        what: "cargo-fuzz {}",
        why: "tests/fuzz/run, which CI runs",
        takes: 0,
    },
];

/// The kind of an entry, and the rest of its name: a kernel's release or a version.
pub fn kind(entry: &str) -> Option<(&'static Kind, &str)> {
    KINDS.iter().find_map(|kind| {
        let rest = entry.strip_prefix(kind.name)?.strip_prefix('-')?;
        // `RELEASE-HASH`, or the hash alone. The entry of `tests/fuzz/run` has a version and no hash.
        let detail = match rest.rsplit_once('-') {
            Some((detail, hash)) if is_hash(hash) => detail,
            None if is_hash(rest) => "",
            _ => rest,
        };
        Some((kind, detail))
    })
}

fn is_hash(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Kind {
    /// The description of an entry of this kind, and the commands that need it.
    pub fn about(&self, detail: &str) -> (String, String) {
        let fill = |text: &str| text.replace("{}", detail);
        (fill(self.what), fill(self.why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_the_kind_and_the_release() {
        let told = |name: &'static str| kind(name).map(|(kind, detail)| (kind.name, detail));
        assert_eq!(told("tree-30270296fa72"), Some(("tree", "")));
        assert_eq!(
            told("kernel-7.2.12+deb13-amd64-50b496ea14af"),
            Some(("kernel", "7.2.12+deb13-amd64"))
        );
        assert_eq!(
            told("rdma-core-tests-0619b7c45d6e"),
            Some(("rdma-core-tests", ""))
        );
        assert_eq!(told("cargo-fuzz-0.13.2"), Some(("cargo-fuzz", "0.13.2")));
        assert_eq!(told("treehouse-30270296fa72"), None);
        assert_eq!(told("lost+found"), None);
        let (kind, detail) = kind("linux-7.3.4+deb13-amd64-89dff704dad4").unwrap();
        assert!(kind.about(detail).0.contains("kernel 7.3.4+deb13-amd64:"));
    }

    #[test]
    fn every_recipe_of_the_lab_is_described() {
        let sources = [
            include_str!("carried.rs"),
            include_str!("disk.rs"),
            include_str!("kernel.rs"),
            include_str!("rdma_core.rs"),
            include_str!("rxe.rs"),
            include_str!("selftests.rs"),
            include_str!("tree.rs"),
        ];
        let mut seen = 0;
        for call in sources
            .iter()
            .flat_map(|text| text.split("Recipe::new(").skip(1))
        {
            let name = call.split('"').nth(1).unwrap();
            let name = name.split("-{").next().unwrap();
            assert!(
                KINDS.iter().any(|kind| kind.name == name),
                "contents.rs does not describe entries of the kind {name:?}"
            );
            seen += 1;
        }
        assert!(seen >= 10, "only {seen} recipes were found");
    }
}

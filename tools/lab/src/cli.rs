//! The command line of `cargo lab`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    guest::{Iommu, Machine, Topology},
    kernel,
};

/// A machine with a stock kernel and emulated devices, made out of distribution packages and
/// QEMU, and what can be done in it.
///
/// Nothing is set up by hand: the first call makes what is missing (a few minutes) and keeps it in
/// $PEERBUF_LAB_CACHE, or peerbuf-lab below $XDG_CACHE_HOME or ~/.cache.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs `peerbuf demo` in each of the four topologies, then a transfer between two machines by RDMA,
    /// and prints what each found
    Demo {
        /// The kernel to boot
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Builds everything, boots guests, runs the lab's suite in them and reports each test
    Test {
        /// Only tests whose name, or whose run's name, contains this
        filter: Option<String>,
        /// The kernel to boot
        #[command(flatten)]
        kernel: KernelArgs,
        /// Time budget in minutes for the tests that do not require this kernel, least recently passed first;
        /// tests that tests/lab/Cargo.toml assigns to this kernel always run
        #[arg(long, value_name = "MINUTES")]
        within: Option<u64>,
    },
    /// Runs a program of tests/lab/benches and prints what it prints
    ///
    /// Most benches run in a guest whose clock counts instructions, so the host's load does not change the
    /// figures. `rdma` runs in two joined guests and measures elapsed time.
    Bench {
        /// The program, tests/lab/benches/NAME.rs
        name: String,
        /// The kernel to boot
        #[command(flatten)]
        kernel: KernelArgs,
        /// The program's arguments
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<OsString>,
    },
    /// Calls peerbuf.ko's interface at random in a guest, with tests/lab/src/bin/fuzz.rs
    Fuzz {
        /// Duration in minutes, counted from when the guest runs
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
        minutes: u64,
        /// The kernel to boot; 'debug' detects the most errors
        #[arg(long, value_name = "stock|debug|VERSION", default_value = kernel::DEBUG)]
        kernel: String,
        /// The program's further arguments, such as a seed
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<OsString>,
    },
    /// Applies each mutation of tests/lab/mutants.toml to peerbuf.ko, one at a time, and checks that the
    /// suite detects it
    Mutants {
        /// Only mutations whose name or test contains this
        filter: Option<String>,
    },
    /// Runs CMD in a guest; its output and exit status are CMD's own
    ///
    /// A program of this host that is named by a relative path with a slash, such as ./my-test, is copied into the guest.
    /// Exit status 124: CMD was still running after --timeout. 125: the guest died, or its kernel
    /// complained (a WARN, a BUG, a lockdep report ...) and the test had not announced it by
    /// writing `peerbuf-lab: expect: TEXT` to /dev/kmsg.
    Run {
        /// The guest
        #[command(flatten)]
        guest: GuestArgs,
        /// The command and its arguments, not a line for a shell
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Runs CMD in two guests that are joined by a network; their lines of output begin with
    /// 'first: ' and 'second: ', and the exit status is the higher one's
    ///
    /// The environment of CMD names its guest ($PEERBUF_LAB_END), the guest's address
    /// ($PEERBUF_LAB_ADDRESS) and the other guest's address ($PEERBUF_LAB_PEER). Each guest has soft-RoCE
    /// (rxe0) on that network, which is not connected to any other. When one guest dies or times out, the
    /// other is ended, too.
    Pair {
        /// Both guests
        #[command(flatten)]
        guest: GuestArgs,
        /// The command and its arguments, not a line for a shell
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// An interactive shell in a guest
    Shell {
        /// The guest
        #[command(flatten)]
        guest: GuestArgs,
    },
    /// Builds peerbuf.ko and peerbuf_probe.ko for the chosen kernel and prints their paths
    Kmod {
        /// The kernel to build for
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Builds any other out-of-tree module, in place, with the lab's kernel tree and tool chain
    Kbuild {
        /// The module's directory; it has a Kbuild or Makefile
        dir: PathBuf,
        /// The kernel to build for
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Runs CMD in the distribution tree on this host, as root of a namespace: no guest, and so no kernel and no devices
    /// of the lab's, at full speed. What it writes outside of /mnt/share is thrown away
    Tree {
        /// Shows DIR at /mnt/share, writable
        #[arg(long, value_name = "DIR")]
        share: Option<PathBuf>,
        /// Further distribution packages
        #[arg(long, value_name = "PKG,PKG", value_delimiter = ',')]
        with: Vec<String>,
        /// Shows the tree for building this kernel's modules at /lab/linux, read-only
        #[arg(long, value_name = "stock|debug|VERSION")]
        kernel: Option<String>,
        /// The command and its arguments, not a line for a shell
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Builds everything that is installed into DIR: Debian packages of the command, of the library for C and of the
    /// modules (by dkms), and the wheel for Python
    ///
    /// Exit status 77: the Debian packages are there, and this machine lacks what the wheel needs.
    Package {
        /// Where the packages go
        #[arg(value_name = "DIR")]
        out: PathBuf,
        /// Programs as for development, which are compiled faster and run slower
        #[arg(long)]
        dev: bool,
    },
    /// Lists the cache: each entry's size, its contents, the commands that need it, its last use, and whether
    /// its files are complete
    Cache,
    /// Removes all entries of the cache, or the named ones, except those that a running command uses
    Clean {
        /// Removes only entries whose names begin with ENTRY; `cargo lab cache` lists the names
        #[arg(value_name = "ENTRY")]
        entries: Vec<String>,
    },
}

/// Which kernel.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    /// The kernel package's version, such as 7.2.12+deb13; a series, such as 7.2, for its newest;
    /// 'stock' for the newest that peerbuf.ko supports; or 'debug' for the source of stock with
    /// lockdep, KASAN, kmemleak and fault injection
    #[arg(long, value_name = "stock|debug|VERSION", default_value = kernel::STOCK)]
    pub kernel: String,
}

/// Which machine, and what is in it.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// PCI topology of the devices
    #[arg(long, value_enum, default_value = "switch")]
    pub topology: Topology,
    /// Adds a translating IOMMU, Intel's unless another is named; so vfio-pci works too
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "intel")]
    pub iommu: Option<Iommu>,
    /// The kernel to boot
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Makes the guest's clock count instructions, so that the host's load does not change measured times
    #[arg(long)]
    pub icount: bool,
    /// Mounts DIR in the guest at /mnt/share, writable
    #[arg(long, value_name = "DIR")]
    pub share: Option<PathBuf>,
    /// Further distribution packages in the guest
    #[arg(long, value_name = "PKG,PKG", value_delimiter = ',')]
    pub with: Vec<String>,
    /// Ends the guest when CMD has run for S seconds, with exit status 124 [default: 600; shell: none]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// Neither builds nor loads peerbuf's modules and tools
    #[arg(long)]
    pub bare: bool,
    /// Main memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..))]
    pub memory: u32,
    /// Processors of the guest; two guests of one processor each run at full speed on a host with two cores
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub processors: u32,
    /// Size of the largest BAR, a power of two such as 8G; memory that is not touched costs nothing
    /// [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub bar_size: Option<u32>,
    /// Soft-RoCE on the guest's network card: the kernel's own module, which cannot register dma-bufs, or
    /// the same source with the lab's patches, which can
    #[arg(long, value_enum, default_value = "stock")]
    pub rdma: Rdma,
    /// Gives the guest a port for device events (unplug, plug, link state, disk speed), as the suite's tests use
    #[arg(long)]
    pub events: bool,
    /// A further word for the kernel's command line, such as swiotlb=force; may be repeated
    #[arg(long, value_name = "WORD", value_parser = boot_word)]
    pub boot: Vec<String>,
    /// Builds the program of lib/examples/stranger, which uses RDMA through the crate sideway, and installs
    /// it in the guest
    #[arg(long)]
    pub stranger: bool,
}

/// Which soft-RoCE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Rdma {
    /// The kernel's.
    #[default]
    Stock,
    /// With registrations of dma-bufs.
    Dmabuf,
}

impl GuestArgs {
    /// As if no option but the kernel had been given.
    pub fn plain(kernel: &KernelArgs) -> Self {
        Self {
            topology: Topology::Switch,
            iommu: None,
            kernel: kernel.clone(),
            icount: false,
            share: None,
            with: Vec::new(),
            timeout: None,
            bare: false,
            memory: Machine::default().memory_mib,
            processors: Machine::default().processors,
            bar_size: None,
            rdma: Rdma::Stock,
            events: false,
            boot: Vec::new(),
            stranger: false,
        }
    }
}

/// Parses a word of the kernel's command line.
fn boot_word(text: &str) -> Result<String, String> {
    match text.is_empty() || text.contains(char::is_whitespace) {
        true => Err("one word of the kernel's command line, without spaces".into()),
        false => Ok(text.to_owned()),
    }
}

/// Parses a size such as 64M or 8G, in MiB.
fn mebibytes(text: &str) -> Result<u32, String> {
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    let unit = match unit {
        "M" => Some(1),
        "G" => Some(1024),
        _ => None,
    };
    let number: Option<u32> = number.parse().ok();
    let size = number.zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    match size {
        Some(mib) if mib.is_power_of_two() && (2..=64 << 10).contains(&mib) => Ok(mib),
        _ => Err("a BAR's size is a power of two from 2M to 64G, with its unit M or G".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(line: &str) -> Result<(GuestArgs, Vec<OsString>), clap::Error> {
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Run { guest, command } => Ok((guest, command)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn run_takes_every_option_and_leaves_the_command_alone() {
        let line = "lab run --topology host-bridge --iommu --kernel 7.2.12+deb13 --icount --share d \
                    --with a,b --timeout 9 --rdma dmabuf --boot a --boot b=c -- prog --topology x -- y";
        let (args, command) = guest(line).unwrap();
        assert_eq!(args.topology, Topology::HostBridge);
        assert_eq!(args.iommu, Some(Iommu::Intel));
        assert!(args.icount && !args.bare);
        assert_eq!(args.kernel.kernel, "7.2.12+deb13");
        assert_eq!(args.with, ["a", "b"]);
        assert_eq!(args.timeout, Some(9));
        assert_eq!(args.rdma, Rdma::Dmabuf);
        assert_eq!(args.boot, ["a", "b=c"]);
        assert_eq!(command, ["prog", "--topology", "x", "--", "y"]);
    }

    #[test]
    fn an_iommu_may_be_named_and_the_kernel_be_told_something() {
        let (args, _) = guest("lab run --iommu=virtio --boot iommu=pt -- x").unwrap();
        assert_eq!(args.iommu, Some(Iommu::Virtio));
        assert_eq!(args.boot, ["iommu=pt"]);
        assert!(guest("lab run --iommu=via -- x").is_err());
    }

    #[test]
    fn a_bars_size_has_a_unit_and_is_a_power_of_two() {
        let size =
            |text: &str| guest(&format!("lab run --bar-size {text} -- x")).map(|g| g.0.bar_size);
        assert_eq!(size("8G").unwrap(), Some(8192));
        assert_eq!(size("128M").unwrap(), Some(128));
        for wrong in ["8", "3G", "1M", "G", "99999999G", "8g"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn run_is_switch_on_the_stock_kernel_when_nothing_is_said() {
        let (args, _) = guest("lab run -- true").unwrap();
        assert_eq!(args.topology, Topology::Switch);
        assert_eq!(args.kernel.kernel, "stock");
        assert_eq!((args.timeout, args.share), (None, None));
        assert_eq!(args.rdma, Rdma::Stock);
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            "lab run",
            "lab run --topology ring -- x",
            "lab run --rdma iwarp -- x",
            "lab run --timeout 0 -- x",
            "lab run --boot= -- x",
            "lab kbuild",
            "lab run x",
        ] {
            assert_eq!(
                Cli::try_parse_from(line.split(' '))
                    .unwrap_err()
                    .exit_code(),
                2,
                "{line}"
            );
        }
    }
}

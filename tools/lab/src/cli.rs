//! The command line of `cargo lab`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::guest::{Machine, Topology};

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
    /// Runs `peerbuf demo` in each of the four topologies and prints the four tables
    Demo {
        /// The kernel to boot
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Builds everything, boots, runs the lab's suite and reports each test
    Test {
        /// Only tests whose name, or whose run's name, contains this
        filter: Option<String>,
        /// The kernel to boot
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Runs CMD in a guest; its output and exit status are CMD's own
    ///
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
    /// An interactive shell in a guest
    Shell {
        /// The guest
        #[command(flatten)]
        guest: GuestArgs,
    },
    /// Builds peerbuf.ko for the chosen kernel and prints its path
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
    /// Says what the cache holds and how big it is, and empties it
    Clean,
}

/// Which kernel.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    /// The kernel package's version, such as 7.2.12+deb13, or 'stock' for the newest there is
    #[arg(long, value_name = "stock|VERSION", default_value = "stock")]
    pub kernel: String,
}

/// Which machine, and what is in it.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// How the devices hang together
    #[arg(long, value_enum, default_value = "switch")]
    pub topology: Topology,
    /// Adds a translating IOMMU (host-bridge and refused only), so that vfio-pci works too
    #[arg(long)]
    pub iommu: bool,
    /// The kernel to boot
    #[command(flatten)]
    pub kernel: KernelArgs,
    /// Makes the guest's clock count instructions: the same figures on any load of the host
    #[arg(long)]
    pub icount: bool,
    /// Shows DIR in the guest at /mnt/share, writable
    #[arg(long, value_name = "DIR")]
    pub share: Option<PathBuf>,
    /// Further distribution packages in the guest
    #[arg(long, value_name = "PKG,PKG", value_delimiter = ',')]
    pub with: Vec<String>,
    /// Ends the guest when CMD has run for S seconds, with exit status 124 [default: 600; shell: none]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// Neither builds nor loads peerbuf.ko and peerbuf's tools
    #[arg(long)]
    pub bare: bool,
    /// Main memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..))]
    pub memory: u32,
}

impl GuestArgs {
    /// As if no option but the kernel had been given.
    pub fn plain(kernel: &KernelArgs) -> Self {
        Self {
            topology: Topology::Switch,
            iommu: false,
            kernel: kernel.clone(),
            icount: false,
            share: None,
            with: Vec::new(),
            timeout: None,
            bare: false,
            memory: Machine::default().memory_mib,
        }
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
                    --with a,b --timeout 9 -- prog --topology x -- y";
        let (args, command) = guest(line).unwrap();
        assert_eq!(args.topology, Topology::HostBridge);
        assert!(args.iommu && args.icount && !args.bare);
        assert_eq!(args.kernel.kernel, "7.2.12+deb13");
        assert_eq!(args.with, ["a", "b"]);
        assert_eq!(args.timeout, Some(9));
        assert_eq!(command, ["prog", "--topology", "x", "--", "y"]);
    }

    #[test]
    fn run_is_switch_on_the_stock_kernel_when_nothing_is_said() {
        let (args, _) = guest("lab run -- true").unwrap();
        assert_eq!(args.topology, Topology::Switch);
        assert_eq!(args.kernel.kernel, "stock");
        assert_eq!((args.timeout, args.share), (None, None));
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            "lab run",
            "lab run --topology ring -- x",
            "lab run --timeout 0 -- x",
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

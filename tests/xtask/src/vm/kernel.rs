//! The guests' kernels: Debian 12's, on Debian 13 too. The quick VMs' vsock device loses, without a word, writes of more than
//! 32 KiB by a guest with a newer kernel (6.12), which splits such a packet over several descriptors.
//!
//! It is fetched with package lists of its own, so that the machine's apt neither decides which kernel this is nor learns of
//! another suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::folder;
use crate::debian::{self, own_entry};
use crate::failure::{Failure, Result, Tried};
use crate::{place, run, say};

const SUITE: &str = "bookworm";

/// What makes vsock work in a VM, each behind what it needs. The last one is loaded on demand only: it lets a process in the
/// guest dial the guest itself.
pub(super) const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    LOOPBACK_MODULE,
];
pub(super) const LOOPBACK_MODULE: &str = "vsock_loopback";

/// What a VM with a root disk needs beside them. The cloud kernel has ext4 in itself.
const DISK_MODULES: [&str; 6] = ["virtio_blk", "crc16", "crc32c_generic", "mbcache", "jbd2", "ext4"];
const CLOUD_DISK_MODULES: [&str; 1] = ["virtio_blk"];

/// What an Incus VM needs beside them: its ports to QEMU, and the two ways by which Incus hands it folders of the host, one of
/// them with `incus-agent` in it.
pub(super) const INCUS_MODULES: [&str; 8] =
    ["virtio_console", "fuse", "virtiofs", "netfs", "fscache", "9pnet", "9pnet_virtio", "9p"];

/// One of the suite's kernels.
pub(super) struct Flavour {
    /// The package that depends on its present version.
    meta_package: &'static str,
    /// Where it is kept.
    folder: &'static str,
    /// What is taken of its modules, beside [`MODULES`].
    modules: &'static [&'static str],
    /// What is loaded of them where there is a root disk.
    pub(super) disk_modules: &'static [&'static str],
}

impl Flavour {
    fn all_modules(&self) -> impl Iterator<Item = &'static str> {
        MODULES.iter().chain(self.modules).chain(self.disk_modules).copied()
    }
}

/// The quick VMs', which is the smaller one.
pub(super) const CLOUD: Flavour = Flavour {
    meta_package: "linux-image-cloud-amd64",
    folder: "kernel",
    modules: &[],
    disk_modules: &CLOUD_DISK_MODULES,
};

/// The Incus VMs', which has 9p.
pub(super) const GENERIC: Flavour = Flavour {
    meta_package: "linux-image-amd64",
    folder: "kernel-generic",
    modules: &INCUS_MODULES,
    disk_modules: &DISK_MODULES,
};

/// A kernel that was unpacked.
pub(super) struct Kernel {
    /// What QEMU boots.
    pub(super) image: PathBuf,
    /// The folder of [`MODULES`], and of the flavour's own.
    pub(super) modules: PathBuf,
}

/// The kernel that is kept, or else the present one of the suite.
pub(super) fn provide(flavour: &Flavour) -> Result<Kernel> {
    let kept = folder().join(flavour.folder);
    let kernel = Kernel { image: kept.join("vmlinuz"), modules: kept.join("modules") };
    if kernel.image.exists() {
        if flavour.all_modules().all(|name| kernel.modules.join(format!("{name}.ko")).exists()) {
            return Ok(kernel);
        }
        // From before one of them was needed.
        fs::remove_dir_all(&kept).tried(format!("remove {}", kept.display()))?;
    }
    say::step(&format!("Fetch {} of Debian's {SUITE}", flavour.meta_package));
    let scratch = folder().join(format!("kernel-{}", std::process::id()));
    for name in ["lists/partial", "cache", "unpacked", "kept/modules"] {
        let path = scratch.join(name);
        fs::create_dir_all(&path).tried(format!("make {}", path.display()))?;
    }
    let package = fetch(&scratch, flavour.meta_package)?;
    unpack(&scratch, &package, flavour)?;
    // Renamed into place when it is whole; another task may have been faster.
    if let Err(error) = fs::rename(scratch.join("kept"), &kept)
        && !kernel.image.exists()
    {
        return Err(error).tried(format!("make {}", kept.display()));
    }
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
    Ok(kernel)
}

/// Downloads the package that the suite's meta package depends on.
fn fetch(scratch: &Path, meta_package: &str) -> Result<PathBuf> {
    let entry = own_entry(&debian::codename()?, SUITE)?.ok_or_else(|| {
        Failure::step("no entry of Debian's main in apt's sources, from which a kernel could be fetched")
    })?;
    let sources = scratch.join(format!("kernel.{}", entry.extension));
    fs::write(&sources, entry.text).tried(format!("write {}", sources.display()))?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        let path = |name: &str| scratch.join(name).display().to_string();
        command.args(["-q", "-o", &format!("Dir::Etc::SourceList={}", sources.display())]);
        command.args(["-o", "Dir::Etc::SourceParts=/dev/null", "-o", "APT::Sandbox::User=root"]);
        command.args(["-o", &format!("Dir::State::Lists={}", path("lists"))]);
        command.args(["-o", &format!("Dir::Cache={}", path("cache")), "-o", "Acquire::Languages=none"]);
        command.current_dir(scratch);
        command
    };
    let log = place::own().join("kernel.log");
    run::logged(apt("apt-get").arg("update"), &log)?;
    let depends = run::captured(apt("apt-cache").args(["depends", meta_package]))?;
    let name = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let name = name.ok_or_else(|| Failure::step(format!("{meta_package} of {SUITE} names no kernel: {depends}")))?;
    run::logged(apt("apt-get").args(["download", &format!("linux-image-{name}")]), &log)?;
    let entries = fs::read_dir(scratch).tried(format!("read {}", scratch.display()))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Failure::step(format!("apt-get download has left no package in {}", scratch.display())))
}

/// Takes the kernel and the few modules out of its package, and leaves the other hundred megabytes in it.
fn unpack(scratch: &Path, package: &Path, flavour: &Flavour) -> Result<()> {
    let modules: Vec<String> = flavour.all_modules().map(|name| format!("*/{name}.ko")).collect();
    let mut command = Command::new("sh");
    command.args(["-c", "deb=$1; shift; dpkg-deb --fsys-tarfile \"$deb\" | tar -xf - --wildcards \"$@\"", "unpack"]);
    command.arg(package).arg("./boot/vmlinuz-*").args(modules).current_dir(scratch.join("unpacked"));
    run::captured(&mut command)?;
    let take = "mv boot/vmlinuz-* ../kept/vmlinuz && find lib -name '*.ko' -exec mv {} ../kept/modules/ ';'";
    run::captured(Command::new("sh").args(["-c", take]).current_dir(scratch.join("unpacked"))).map(drop)
}

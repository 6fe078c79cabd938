//! The guests' kernels: Debian 12's, on Debian 13 too. The quick VMs' vsock device loses, without a word, writes of more than
//! 32 KiB by a guest with a newer kernel (6.12), which splits such a packet over several descriptors.
//!
//! It is fetched with package lists of its own, so that the machine's apt neither decides which kernel this is nor learns of
//! another suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kept;
use crate::debian::{self, own_entry};
use crate::failure::{Failure, Result, Tried};
use crate::{place, run};

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
    /// What it is kept as.
    piece: &'static str,
    /// What is taken of its modules, beside [`MODULES`].
    modules: &'static [&'static str],
    /// What is taken for a VM with a root disk.
    disk_modules: &'static [&'static str],
}

impl Flavour {
    fn all_modules(&self) -> impl Iterator<Item = &'static str> {
        MODULES.iter().chain(self.modules).chain(self.disk_modules).copied()
    }
}

/// The quick VMs', which is the smaller one.
pub(super) const CLOUD: Flavour = Flavour {
    meta_package: "linux-image-cloud-amd64",
    piece: "kernel-cloud",
    modules: &[],
    disk_modules: &CLOUD_DISK_MODULES,
};

/// The Incus VMs', which has 9p.
pub(super) const GENERIC: Flavour = Flavour {
    meta_package: "linux-image-amd64",
    piece: "kernel-generic",
    modules: &INCUS_MODULES,
    disk_modules: &DISK_MODULES,
};

/// A kernel that was unpacked.
pub(super) struct Kernel {
    /// What QEMU boots.
    pub(super) image: PathBuf,
    /// The folder of [`MODULES`], and of the flavour's own.
    pub(super) modules: PathBuf,
    /// Which of them a VM with a root disk loads beside [`MODULES`], each behind what it needs.
    pub(super) disk_modules: &'static [&'static str],
}

/// The kernel that is kept, or else the present one of the suite.
pub(super) fn provide(flavour: &Flavour) -> Result<Kernel> {
    let modules: Vec<&str> = flavour.all_modules().collect();
    let step = format!("Fetch {} of Debian's {SUITE}", flavour.meta_package);
    let kept = kept(flavour.piece, &(SUITE, flavour.meta_package, &modules), &step, |scratch, whole| {
        for path in [scratch.join("lists/partial"), scratch.join("cache"), whole.join("modules")] {
            fs::create_dir_all(&path).tried(format!("make {}", path.display()))?;
        }
        unpack(scratch, &fetch(scratch, flavour.meta_package)?, &modules, whole)
    })?;
    let (image, modules) = (kept.join("vmlinuz"), kept.join("modules"));
    Ok(Kernel { image, modules, disk_modules: flavour.disk_modules })
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
fn unpack(scratch: &Path, package: &Path, modules: &[&str], whole: &Path) -> Result<()> {
    let unpacked = scratch.join("unpacked");
    fs::create_dir_all(&unpacked).tried(format!("make {}", unpacked.display()))?;
    let mut command = Command::new("sh");
    command.args(["-c", "deb=$1; shift; dpkg-deb --fsys-tarfile \"$deb\" | tar -xf - --wildcards \"$@\"", "unpack"]);
    command.arg(package).arg("./boot/vmlinuz-*").args(modules.iter().map(|name| format!("*/{name}.ko")));
    run::captured(command.current_dir(&unpacked))?;
    let take = "mv boot/vmlinuz-* \"$1\"/vmlinuz && find lib -name '*.ko' -exec mv {} \"$1\"/modules/ ';'";
    run::captured(Command::new("sh").args(["-c", take, "take"]).arg(whole).current_dir(&unpacked)).map(drop)
}

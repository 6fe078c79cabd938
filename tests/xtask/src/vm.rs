//! Prepares what the VM rig boots: a stock Debian kernel and a small userland with the real agent, and beside QEMU a vsock
//! device that needs nothing of the machine's kernel.
//!
//! ```text
//!   pika-cloud's driver ──UNIX socket──► vhost-device-vsock ──vhost-user──► QEMU (TCG) ──AF_VSOCK──► pika-guest serve
//! ```
//!
//! No `/dev/kvm`, no `vhost_vsock`: the VMs run wherever the tests do, and `AF_VSOCK` is opened in them only.
//! Each piece is kept under `target/xtask/vm` and made again where what it is made of has changed:
//!
//! | piece | made of | takes |
//! |---|---|---|
//! | `device-<version>/` | the crate of that version | about a minute |
//! | `kernel-cloud-<digest>/` | Debian 12's cloud kernel, and of its modules those that are needed | seconds |
//! | `initramfs-<digest>.gz` | kernel modules, busybox, agent, the tests' own vsock peer | under a second |

pub(crate) mod full;
mod initramfs;
mod kernel;

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cargo::{self, cargo};
use crate::failure::{Result, Tried as _};
use crate::{debian, place, run, say};

/// The version that the rig was tried with.
const DEVICE_VERSION: &str = "0.3.0";

/// Why there are no VMs on other machines.
const UNFIT: &str = "the VM rig boots an x86_64 kernel with this machine's own agent, and this is no x86_64 machine";

/// Provides all of them, with this agent in the guest. Gives the environment in which the tests find them; QEMU itself is in
/// `PATH`.
pub(crate) fn provide(busybox: &Path, agent: &Path) -> Result<Vec<(&'static str, OsString)>> {
    if place::ARCH != "x86_64" {
        say::step(&format!("No quick VMs: {UNFIT}"));
        return Ok(vec![("PIKA_TEST_VM_SKIP", UNFIT.into())]);
    }
    debian::provide_qemu()?;
    debian::provide_mke2fs()?;
    let device = device()?;
    let guest = guest(busybox, agent, &kernel::CLOUD)?;
    Ok(vec![
        ("PIKA_TEST_VM_DEVICE", device.into()),
        ("PIKA_TEST_VM_KERNEL", guest.kernel.image.into()),
        ("PIKA_TEST_VM_INITRAMFS", guest.initramfs.into()),
    ])
}

/// What a VM boots.
struct Guest {
    kernel: kernel::Kernel,
    initramfs: PathBuf,
}

/// Provides it, with this agent and of that kernel.
fn guest(busybox: &Path, agent: &Path, flavour: &kernel::Flavour) -> Result<Guest> {
    let kernel = kernel::provide(flavour)?;
    let peer = cargo::vsock_peer()?;
    let initramfs = initramfs::provide(&initramfs::Inputs { busybox, agent, peer: &peer, kernel: &kernel })?;
    Ok(Guest { kernel, initramfs })
}

/// Where the pieces are kept.
fn folder() -> PathBuf {
    place::own().join("vm")
}

/// The folder of a piece that is kept for this recipe, or else made: `make` gets a folder to work in and one for the piece, which
/// has its name once it is whole. Another task may have been faster.
fn kept(piece: &str, recipe: &impl Hash, step: &str, make: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
    let mut digest = DefaultHasher::new();
    recipe.hash(&mut digest);
    let name = format!("{piece}-{:016x}", digest.finish());
    remove_old(&format!("{piece}-"), &name);
    remove_old("scratch-", "");
    let kept = folder().join(name);
    if kept.exists() {
        return Ok(kept);
    }
    say::step(step);
    let scratch = folder().join(format!("scratch-{}-{piece}", std::process::id()));
    let whole = scratch.join("whole");
    fs::create_dir_all(&whole).tried(format!("make {}", whole.display()))?;
    let outcome = make(&scratch, &whole).and_then(|()| match fs::rename(&whole, &kept) {
        Err(error) if !kept.exists() => Err(error).tried(format!("make {}", kept.display())),
        _ => Ok(()),
    });
    let removed = fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()));
    outcome.and(removed).map(|()| kept)
}

/// A piece that no task has made for so long is removed, where there is a newer one.
const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// Removes what was made of other inputs. What a task beside this one still boots from is young.
fn remove_old(prefix: &str, present: &str) {
    for entry in fs::read_dir(folder()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|at| at.elapsed().ok());
        if name.starts_with(prefix) && name != present && age > Some(KEPT_FOR) {
            let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
        }
    }
}

/// The vsock device. It comes as source only.
fn device() -> Result<PathBuf> {
    let root = folder().join(format!("device-{DEVICE_VERSION}"));
    let program = root.join("bin/vhost-device-vsock");
    if program.exists() {
        return Ok(program);
    }
    say::step(&format!("Build vhost-device-vsock {DEVICE_VERSION}"));
    let mut install = cargo(&["install", "--locked", "--version", DEVICE_VERSION, "vhost-device-vsock", "--root"]);
    // Built in a folder of its own, that is gone afterwards: nothing of it is of use to this workspace.
    install.arg(&root).env_remove("CARGO_TARGET_DIR");
    run::logged(&mut install, &place::own().join("vhost-device-vsock.log"))?;
    Ok(program)
}

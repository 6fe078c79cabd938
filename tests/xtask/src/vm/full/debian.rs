//! An image of a stock Debian for Incus VMs: a root disk with systemd and incus-agent, as such images have them. pika-cloud's own
//! agent is not in it.
//!
//! The initramfs loads what its disk and its agents need, and goes on to its systemd. There is no udev, so that nothing waits for
//! devices that nobody announces: the console's login is left out, and incus-agent is started by the script that the other
//! VMs have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::kept;
use super::inner::{START_INCUS_AGENT, pack_metadata};
use crate::failure::{Result, Tried};
use crate::{debian_image, image, run};

/// Room for what is baked into it.
const DISK_SIZE: &str = "900M";

const SCRIPT: &str = "/usr/local/sbin/start-incus-agent";

const UNIT: &str = "\
[Unit]
Description=Incus's agent

[Service]
Type=notify
ExecStart=/usr/local/sbin/start-incus-agent
Restart=on-failure

[Install]
WantedBy=multi-user.target
";

/// The folder of `debian-metadata.tar.gz` and `debian.qcow2`.
pub(super) fn provide() -> Result<PathBuf> {
    debian_image::provide()?;
    let archive = debian_image::with_systemd();
    // The recipe is this file.
    let recipe = (&archive, START_INCUS_AGENT, include_str!("debian.rs"));
    kept("debian", &recipe, "Make the image of a Debian for VMs", |scratch, whole| make(&archive, scratch, whole))
}

fn make(archive: &Path, scratch: &Path, whole: &Path) -> Result<()> {
    run::captured(Command::new("tar").arg("-C").arg(scratch).args(["--numeric-owner", "-xf"]).arg(archive))?;
    let root = scratch.join("rootfs");
    image::write(&root.join(&SCRIPT[1..]), 0o755, &format!("#!/bin/sh\n{START_INCUS_AGENT}"))?;
    let units = root.join("etc/systemd/system");
    image::write(&units.join("incus-agent.service"), 0o644, UNIT)?;
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants).tried(format!("make {}", wants.display()))?;
    for (target, link) in [
        ("../incus-agent.service", wants.join("incus-agent.service")),
        ("/dev/null", units.join("serial-getty@ttyS0.service")),
    ] {
        symlink(target, &link).tried(format!("make {}", link.display()))?;
    }
    let raw = scratch.join("root.img");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-d"]).arg(&root);
    run::captured(make.arg(&raw).arg(DISK_SIZE))?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(whole.join("debian.qcow2"));
    run::captured(&mut convert)?;
    pack_metadata(scratch, "a Debian in a VM, for the tests of pika-cloud", &whole.join("debian-metadata.tar.gz"))
}

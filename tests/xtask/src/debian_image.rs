//! Makes the image of a stock Debian 12 with systemd, for the tests of what an init does with the agent. The agent is not in it.
//!
//! ```text
//!   mmdebstrap ──► root ──► debian-<digest of the recipe>.tar.gz, kept under target/xtask
//!                                     └── a test that needs it has it imported into the lab's Incus, as `debian-plain`
//! ```
//!
//! The first time takes half a minute; it is made again where this recipe changes.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{self, own_entry};
use crate::failure::{Failure, Result, Tried};
use crate::{image, place, run, say};

const SUITE: &str = "bookworm";
/// Beside Debian's minimum. With dbus no unit of systemd's own is left failed.
const PACKAGES: [&str; 2] = ["systemd-sysv", "dbus"];
/// What nobody reads in a test.
const LEFT_OUT: [&str; 4] = ["doc", "man", "locale", "info"];
/// What is written over Debian's own.
const FILES: [(&str, &str); 3] =
    [("etc/hostname", "debian\n"), ("etc/hosts", "127.0.0.1 localhost\n"), ("etc/machine-id", "")];

/// The image of this recipe, where it was made.
pub(crate) fn kept() -> Option<PathBuf> {
    Some(place::own().join(name())).filter(|path| path.exists())
}

/// The image that is kept, or else a new one.
pub(crate) fn provide() -> Result<PathBuf> {
    if let Some(kept) = kept() {
        return Ok(kept);
    }
    debian::provide_mmdebstrap()?;
    say::step("Make the image of a stock Debian (half a minute)");
    let scratch = place::own().join(format!("debian-{}", std::process::id()));
    fs::create_dir_all(&scratch).tried(format!("make {}", scratch.display()))?;
    let made = make(&scratch);
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
    made
}

fn name() -> String {
    let mut recipe = DefaultHasher::new();
    (SUITE, PACKAGES, LEFT_OUT, FILES).hash(&mut recipe);
    format!("debian-{:016x}.tar.gz", recipe.finish())
}

fn make(scratch: &Path) -> Result<PathBuf> {
    let root = scratch.join("rootfs");
    bootstrap(scratch, &root)?;
    for (file, text) in FILES {
        image::write(&root.join(file), 0o644, text)?;
    }
    image::write(&scratch.join("metadata.yaml"), 0o644, &image::metadata("Debian 12 for the tests of pika-cloud"))?;
    let packed = image::pack(scratch, "packed.tar.gz")?;
    // Renamed into place when it is whole.
    let kept = place::own().join(name());
    fs::rename(&packed, &kept).tried(format!("make {}", kept.display()))?;
    Ok(kept)
}

fn bootstrap(scratch: &Path, root: &Path) -> Result<()> {
    let entry = own_entry(&debian::codename()?, SUITE)?.ok_or_else(|| {
        Failure::step("no entry of Debian's main in apt's sources, from which a Debian could be installed")
    })?;
    let sources = scratch.join(format!("debian.{}", entry.extension));
    fs::write(&sources, entry.text).tried(format!("write {}", sources.display()))?;
    let mut command = Command::new("mmdebstrap");
    command.arg("--variant=minbase").arg(format!("--include={}", PACKAGES.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for part in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
    }
    command.arg(SUITE).arg(root).arg(&sources);
    run::logged(&mut command, &place::own().join("debian-image.log"))
}

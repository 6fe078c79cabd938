//! Makes images of a stock Debian 12, with systemd and with `OpenRC`, for the tests of what an init does with the agent. The agent is
//! not in them.
//!
//! ```text
//!   mmdebstrap ──► root ──► debian-<digest of the recipe>.tar.gz, kept under target/xtask
//!                                     └── a test that needs it has it imported into the lab's Incus
//! ```
//!
//! The first time takes half a minute each; they are made again where a recipe changes.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{self, own_entry};
use crate::failure::{Failure, Result, Tried};
use crate::{image, place, run, say};

const SUITE: &str = "bookworm";
/// What makes each, beside Debian's minimum, and where the tests find it.
struct Recipe {
    init: &'static str,
    packages: [&'static str; 2],
    variable: &'static str,
}
/// With dbus no unit of systemd's own is left failed.
const SYSTEMD: Recipe =
    Recipe { init: "systemd", packages: ["systemd-sysv", "dbus"], variable: "PIKA_TEST_DEBIAN_IMAGE" };
const OPENRC: Recipe =
    Recipe { init: "openrc", packages: ["sysvinit-core", "openrc"], variable: "PIKA_TEST_OPENRC_IMAGE" };
const RECIPES: [Recipe; 2] = [SYSTEMD, OPENRC];
/// What nobody reads in a test.
const LEFT_OUT: [&str; 4] = ["doc", "man", "locale", "info"];
/// What is written over Debian's own.
const FILES: [(&str, &str); 3] =
    [("etc/hostname", "debian\n"), ("etc/hosts", "127.0.0.1 localhost\n"), ("etc/machine-id", "")];

/// The images that were made, in the environment in which the tests find them.
pub(crate) fn kept() -> impl Iterator<Item = (&'static str, PathBuf)> {
    RECIPES.iter().map(|recipe| (recipe.variable, recipe.path())).filter(|(_, path)| path.exists())
}

/// The one with systemd.
pub(crate) fn with_systemd() -> PathBuf {
    SYSTEMD.path()
}

/// Makes what is not kept yet.
pub(crate) fn provide() -> Result<()> {
    for recipe in RECIPES.iter().filter(|recipe| !recipe.path().exists()) {
        debian::provide_mmdebstrap()?;
        say::step(&format!("Make the image of a stock Debian with {} (half a minute)", recipe.init));
        let scratch = place::own().join(format!("debian-{}-{}", recipe.init, std::process::id()));
        fs::create_dir_all(&scratch).tried(format!("make {}", scratch.display()))?;
        let made = recipe.make(&scratch);
        fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
        made?;
    }
    Ok(())
}

impl Recipe {
    /// Where it is kept.
    fn path(&self) -> PathBuf {
        let mut recipe = DefaultHasher::new();
        (SUITE, self.packages, LEFT_OUT, FILES).hash(&mut recipe);
        place::own().join(format!("debian-{:016x}.tar.gz", recipe.finish()))
    }

    fn make(&self, scratch: &Path) -> Result<()> {
        let root = scratch.join("rootfs");
        self.bootstrap(scratch, &root)?;
        for (file, text) in FILES {
            image::write(&root.join(file), 0o644, text)?;
        }
        image::write(&scratch.join("metadata.yaml"), 0o644, &image::metadata("Debian 12 for the tests of pika-cloud"))?;
        let packed = image::pack(scratch, "packed.tar.gz")?;
        // Renamed into place when it is whole.
        fs::rename(&packed, self.path()).tried(format!("make {}", self.path().display()))
    }

    fn bootstrap(&self, scratch: &Path, root: &Path) -> Result<()> {
        let entry = own_entry(&debian::codename()?, SUITE)?.ok_or_else(|| {
            Failure::step("no entry of Debian's main in apt's sources, from which a Debian could be installed")
        })?;
        let sources = scratch.join(format!("debian.{}", entry.extension));
        fs::write(&sources, entry.text).tried(format!("write {}", sources.display()))?;
        let mut command = Command::new("mmdebstrap");
        command.arg("--variant=minbase").arg(format!("--include={}", self.packages.join(",")));
        command.arg("--aptopt=APT::Install-Recommends \"false\"");
        for part in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
        }
        command.arg(SUITE).arg(root).arg(&sources);
        run::logged(&mut command, &place::own().join("debian-image.log"))
    }
}

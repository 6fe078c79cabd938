//! Stock Debians 12: with systemd, brought to the private Incus when the first test needs it, and with `OpenRC`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::incus::Incus;

/// The alias of a stock Debian with systemd, which the private Incus has from now on. There is no agent in it.
pub fn debian_image() -> &'static str {
    imported("debian-plain", WITH_SYSTEMD)
}

/// The same with `OpenRC`.
pub fn openrc_image() -> &'static str {
    imported("debian-openrc-plain", WITH_OPENRC)
}

fn imported(alias: &'static str, variable: &str) -> &'static str {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    if Incus.get(&format!("/1.0/images/aliases/{alias}")).is_none() {
        let image = archive(variable).display().to_string();
        let output = Incus.client(&["image", "import", &image, "--alias", alias]).output();
        let output = output.expect("the incus command runs");
        assert!(output.status.success(), "import {image}: {}", String::from_utf8_lossy(&output.stderr));
    }
    alias
}

/// Names the file of the one with systemd.
pub(crate) const WITH_SYSTEMD: &str = "PIKA_TEST_DEBIAN_IMAGE";
/// Names the file of the one with `OpenRC`.
pub(crate) const WITH_OPENRC: &str = "PIKA_TEST_OPENRC_IMAGE";

/// The file that one is in.
pub(crate) fn archive(variable: &str) -> PathBuf {
    let image = std::env::var_os(variable).map(PathBuf::from);
    image.unwrap_or_else(|| panic!("{variable} names the file of a Debian image, as `cargo xtask test` does"))
}

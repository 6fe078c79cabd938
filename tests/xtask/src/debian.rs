//! Installs from Debian what is missing: Incus, a static busybox for the image, and QEMU for the VMs of the tests.
//!
//! Debian 13 has Incus in its own suite, Debian 12 in `bookworm-backports`. That suite is added from the machine's own
//! Debian entry, so that its mirror goes on being used and no host name is written down here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::{Failure, Result, Tried};
use crate::sources::{Entry, derive_deb822, derive_list};
use crate::{elf, incus, place, run, say};

const BACKPORTS: &str = "bookworm-backports";
const SOURCES: &str = "/etc/apt/sources.list.d";
const BUSYBOX: &str = "/bin/busybox";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Sees to it that there is an `incusd` and a static busybox; the path of the latter is given back.
pub(crate) fn provide() -> Result<PathBuf> {
    say::step("Look for Incus and busybox");
    if has_apt() {
        finish_interrupted()?;
    }
    let mut missing = Vec::new();
    if incus::find_daemon().is_none() {
        missing.push("incus-base");
    }
    if !incus::has_client() {
        missing.push("incus-client");
    }
    if !Path::new(BUSYBOX).exists() {
        missing.push("busybox-static");
    }
    if !missing.is_empty() {
        install(&missing)?;
    }
    if incus::find_daemon().is_none() {
        return Err(Failure::step("incus-base is installed, but has brought no incusd to a place that is known here"));
    }
    static_busybox()
}

/// Sees to it that there is a QEMU for the VMs of the tests, the one that Debian has for its Incus.
pub(crate) fn provide_qemu() -> Result<()> {
    if Path::new(QEMU).exists() {
        return Ok(());
    }
    if has_apt() {
        finish_interrupted()?;
    }
    install(&["qemu-system-x86"])
}

/// Sees to it that there is what makes a Debian in a folder.
pub(crate) fn provide_mmdebstrap() -> Result<()> {
    provide_tools(&[("/usr/bin/mmdebstrap", "mmdebstrap")])
}

/// Sees to it that there is what makes a root disk of a folder.
pub(crate) fn provide_mke2fs() -> Result<()> {
    provide_tools(&[("/usr/sbin/mke2fs", "e2fsprogs")])
}

/// Sees to it that there is what the outer guest of the Incus VMs is made with.
pub(crate) fn provide_vm_tools() -> Result<()> {
    provide_qemu()?;
    provide_mmdebstrap()?;
    provide_mke2fs()?;
    provide_tools(&[("/usr/bin/qemu-img", "qemu-utils")])
}

/// Sees to it that there is what the NixOS module is checked with.
pub(crate) fn provide_nix() -> Result<()> {
    provide_tools(&[("/usr/bin/nix", "nix-bin"), ("/usr/bin/systemd-analyze", "systemd")])
}

/// Installs the packages of those programs that are not there.
fn provide_tools(tools: &[(&str, &'static str)]) -> Result<()> {
    let missing: Vec<&str> =
        tools.iter().filter(|(path, _)| !Path::new(path).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if has_apt() {
        finish_interrupted()?;
    }
    install(&missing)
}

/// Sees to it that there is a static busybox.
pub(crate) fn provide_busybox() -> Result<PathBuf> {
    if !Path::new(BUSYBOX).exists() {
        install(&["busybox-static"])?;
    }
    static_busybox()
}

fn install(packages: &[&str]) -> Result<()> {
    if !has_apt() {
        return Err(Failure::step(format!(
            "{} missing, and this machine has no apt-get to install it with: install it otherwise (Incus 6.0 or newer, a \
             static busybox at {BUSYBOX}; for the tests QEMU 7.2 or newer at {QEMU}; for the NixOS module's checks Nix \
             2.8 or newer and systemd 252 or newer in /usr/bin), then run this again",
            packages.join(", ")
        )));
    }
    say::step("Fetch Debian's package lists");
    update()?;
    let is_backported = |package: &&str| package.starts_with("incus") || package.starts_with("qemu");
    let mut suite = Vec::new();
    if packages.iter().any(is_backported) && codename()? == "bookworm" {
        if !has_candidate("incus-base")? {
            add_backports()?;
            update()?;
        }
        suite = vec!["-t", BACKPORTS];
    }
    say::step(&format!("Install {} from Debian", packages.join(", ")));
    let mut command = locked("apt-get");
    command
        .args(["install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"])
        .args(suite)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    apt("install", &mut command)
}

fn has_apt() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

/// An earlier installation that was interrupted may still be at work, or have left packages half done.
fn finish_interrupted() -> Result<()> {
    let half_done = run::captured(locked("dpkg").arg("--audit"))?;
    if !["incus", "qemu"].iter().any(|name| half_done.contains(name)) {
        return Ok(());
    }
    say::step("Finish an interrupted installation");
    apt("configure", locked("dpkg").args(["--configure", "-a"]))
}

fn update() -> Result<()> {
    apt("update", locked("apt-get").args(["update", "-q"]))
}

/// One apt of ours at a time: apt itself gives up where another one has its lists locked. An apt that does not let itself
/// be interrupted, since it is unpacking, keeps the lock until it has finished.
fn locked(program: &str) -> Command {
    let mut command = Command::new("flock");
    command.args(["-w", "900", "/etc/apt", program]);
    command
}

fn apt(name: &str, command: &mut Command) -> Result<()> {
    run::logged(command, &place::own().join(format!("apt-{name}-{}.log", std::process::id())))
}

/// The name of the Debian that this is.
pub(crate) fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").tried("read /etc/os-release")?;
    Ok(text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or_default()
        .trim_matches('"')
        .into())
}

fn has_candidate(package: &str) -> Result<bool> {
    let policy = run::captured(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"))?;
    Ok(policy.lines().any(|line| line.trim().starts_with("Candidate:") && !line.contains("(none)")))
}

fn add_backports() -> Result<()> {
    let folder = Path::new(SOURCES);
    let entry = own_entry("bookworm", BACKPORTS)?.ok_or_else(|| {
        Failure::step(format!(
            "no entry for bookworm main in /etc/apt/sources.list or {}: add {BACKPORTS} by hand, then run this again",
            folder.display()
        ))
    })?;
    let path = folder.join(format!("debian-backports.{}", entry.extension));
    say::step(&format!("Add Debian's suite {BACKPORTS} in {}", path.display()));
    // Renamed into place, so that an interruption leaves no half entry that breaks apt; apt reads no other extension.
    let half = folder.join(format!("debian-backports.{}.new", std::process::id()));
    fs::write(&half, entry.text).tried(format!("write {}", half.display()))?;
    fs::rename(&half, &path).tried(format!("write {}", path.display()))
}

/// The machine's own Debian entry of this suite, changed to the wanted one.
pub(crate) fn own_entry(suite: &str, wanted: &str) -> Result<Option<Entry>> {
    let folder = Path::new(SOURCES);
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    for entry in fs::read_dir(folder).tried(format!("read {}", folder.display()))? {
        paths.push(entry.tried(format!("read {}", folder.display()))?.path());
    }
    paths.sort();
    Ok(paths.iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        match path.extension()?.to_str()? {
            "list" => derive_list(&text, suite, wanted),
            "sources" => derive_deb822(&text, suite, wanted),
            _ => None,
        }
    }))
}

/// The machine's busybox where that is static; else Debian's static one, unpacked under `target`. (Installed, it would
/// take the place of the dynamic one.)
fn static_busybox() -> Result<PathBuf> {
    let installed = PathBuf::from(BUSYBOX);
    if elf::is_static(&installed)? {
        return Ok(installed);
    }
    let kept = place::own().join("busybox-static");
    if kept.exists() {
        return Ok(kept);
    }
    say::step("Fetch Debian's busybox-static, since this machine's busybox is dynamic");
    let scratch = place::own().join(format!("busybox-{}", std::process::id()));
    fs::create_dir_all(&scratch).tried(format!("make {}", scratch.display()))?;
    let script = "apt-get download -q -o APT::Sandbox::User=root busybox-static && dpkg-deb -x busybox-static_*.deb .";
    apt("busybox", locked("sh").args(["-c", script]).current_dir(&scratch))?;
    let unpacked = ["bin/busybox", "usr/bin/busybox"].map(|path| scratch.join(path));
    let found = unpacked.iter().find(|path| path.is_file());
    let found = found.ok_or_else(|| Failure::step("busybox-static has no bin/busybox"))?;
    fs::rename(found, &kept).tried(format!("move {}", found.display()))?;
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
    Ok(kept)
}

//! Variants of the test images.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::debian;
use crate::incus::Incus;
use crate::lab::{self, Lab};

/// An image of a test's own; dropping it deletes it.
#[derive(Debug)]
pub struct Image {
    /// Its alias.
    pub alias: String,
}

/// Where the agent's files for inits are.
const INIT_FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-agent/init");

impl Image {
    /// The test image with another program for its agent.
    pub fn with_agent(program: &str) -> Self {
        Self::of_lab(lab::IMAGE, |root| write_program(&root.join("usr/bin/pika-guest"), program))
    }

    /// The test image without an agent, its root changed.
    pub fn bare(change: impl FnOnce(&Path)) -> Self {
        Self::of_lab(lab::BARE_IMAGE, change)
    }

    /// The same, with another program for its shell. What boots it has busybox's own.
    pub fn with_shell(program: &str) -> Self {
        Self::bare(|root| {
            let init = root.join("sbin/init");
            let text = fs::read_to_string(&init).expect("the image has a first process");
            write_program(&init, &text.replacen("#!/bin/sh", "#!/bin/busybox sh", 1));
            fs::remove_file(root.join("bin/sh")).expect("the image has a shell");
            write_program(&root.join("bin/sh"), program);
        })
    }

    /// Sets a property of it.
    #[must_use]
    pub fn with_property(self, key: &str, value: &str) -> Self {
        run(&mut Incus.client(&["image", "set-property", &self.alias, key, value]));
        self
    }

    /// The test image with busybox's init, which runs the agent.
    pub fn with_busybox_init() -> Self {
        Self::of_lab(lab::IMAGE, |root| {
            fs::remove_file(root.join("sbin/init")).expect("the first process can be replaced");
            std::os::unix::fs::symlink("/bin/busybox", root.join("sbin/init")).expect("busybox can be linked to");
            put(&init_file("busybox/inittab"), &root.join("etc/inittab"), 0o644);
            // Never one of an older build, that may not know a container when it is in one.
            put(&Lab::get().agent, &root.join("usr/bin/pika-guest"), 0o755);
        })
    }

    /// A stock Debian with the agent, under systemd. All tests of a program that run at one time have the same.
    pub fn debian_with_agent() -> Arc<Self> {
        static SHARED: Mutex<Weak<Image>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = shared.upgrade() {
            return image;
        }
        let image = Arc::new(Self::of_archive(&debian::archive(debian::WITH_SYSTEMD), bake_for_systemd));
        *shared = Arc::downgrade(&image);
        image
    }

    /// A stock Debian with the agent, under `OpenRC`.
    pub fn openrc_with_agent() -> Self {
        Self::of_archive(&debian::archive(debian::WITH_OPENRC), bake_for_openrc)
    }

    /// An image that the lab has, changed.
    fn of_lab(alias: &str, change: impl FnOnce(&Path)) -> Self {
        let scratch = tempfile::tempdir().expect("a folder for the image");
        let exported = scratch.path().join("exported").display().to_string();
        run(&mut Incus.client(&["image", "export", alias, &exported]));
        Self::of_archive(Path::new(&format!("{exported}.tar.gz")), change)
    }

    /// An image in a file, changed.
    fn of_archive(archive: &Path, change: impl FnOnce(&Path)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let alias = format!("pika-test-{}-{count}", std::process::id());
        let scratch = tempfile::tempdir().expect("a folder for the image");
        let tree = scratch.path().join("tree");
        fs::create_dir(&tree).expect("a folder for the tree");
        unpack(archive, &tree);
        change(&tree.join("rootfs"));
        // The alias makes an image of its own even where two tests bring the same.
        fs::write(tree.join("rootfs/etc/image-name"), &alias).expect("the tree can be written");
        let packed = scratch.path().join("packed.tar").display().to_string();
        let mut tar = Command::new("tar");
        run(tar.arg("-C").arg(&tree).args(["--numeric-owner", "-cf", &packed, "metadata.yaml", "rootfs"]));
        run(&mut Incus.client(&["image", "import", &packed, "--alias", &alias]));
        Self { alias }
    }
}

fn write_program(path: &Path, program: &str) {
    fs::write(path, program).expect("the image's tree can be written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("the program can be made executable");
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = Incus.client(&["image", "delete", &self.alias]).output();
    }
}

/// A user who may report, and one who may not.
const USERS: &str = "groupadd --system pika-cloud && useradd --create-home --groups pika-cloud ci && useradd app";

/// The root disk of a stock Debian with the agent, under systemd: an ext4 file system in `folder`, for a VM.
pub fn debian_disk_with_agent(folder: &Path) -> PathBuf {
    let (tree, disk) = (folder.join("tree"), folder.join("root.img"));
    fs::create_dir(&tree).expect("a folder for the tree");
    unpack(&debian::archive(debian::WITH_SYSTEMD), &tree);
    let root = tree.join("rootfs");
    bake_for_systemd(&root);
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg("1G"));
    fs::remove_dir_all(&tree).expect("the tree can be removed");
    disk
}

fn unpack(archive: &Path, tree: &Path) {
    run(Command::new("tar").arg("-C").arg(tree).args(["--numeric-owner", "-xf"]).arg(archive));
}

/// Puts the agent and its units into a Debian.
fn bake_for_systemd(root: &Path) {
    put(&lab::agent(), &root.join("usr/bin/pika-guest"), 0o755);
    for unit in ["pika-guest.service", "pika-guest-supervise.socket", "pika-guest-supervise@.service"] {
        put(&init_file(&format!("systemd/{unit}")), &root.join("etc/systemd/system").join(unit), 0o644);
    }
    put(&init_file("systemd/pika-cloud.tmpfiles"), &root.join("usr/lib/tmpfiles.d/pika-cloud.conf"), 0o644);
    run_in(root, &format!("{USERS} && systemctl --quiet enable pika-guest.service pika-guest-supervise.socket"));
}

/// Puts the agent and its script into a Debian.
fn bake_for_openrc(root: &Path) {
    put(&Lab::get().agent, &root.join("usr/bin/pika-guest"), 0o755);
    put(&init_file("openrc/pika-guest"), &root.join("etc/init.d/pika-guest"), 0o755);
    run_in(root, &format!("{USERS} && rc-update add pika-guest default"));
}

fn run_in(root: &Path, script: &str) {
    let mut command = Command::new("chroot");
    run(command.arg(root).args(["/bin/sh", "-ec", script]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"));
}

fn init_file(name: &str) -> PathBuf {
    Path::new(INIT_FILES).join(name)
}

fn put(from: &Path, to: &Path, mode: u32) {
    fs::copy(from, to).unwrap_or_else(|error| panic!("copy {} to {}: {error}", from.display(), to.display()));
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).expect("the mode can be set");
}

fn run(command: &mut Command) {
    let output = command.output().expect("the command runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
}

//! Variants of the test image.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::incus::Incus;
use crate::lab;

/// An image of a test's own; dropping it deletes it.
#[derive(Debug)]
pub struct Image {
    /// Its alias.
    pub alias: String,
}

impl Image {
    /// The test image with another program for its agent.
    pub fn with_agent(program: &str) -> Self {
        Self::changed(lab::IMAGE, |root| {
            let agent = root.join("usr/bin/pika-guest");
            fs::write(&agent, program).expect("the agent can be replaced");
            fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("the agent can be made executable");
        })
    }

    /// The test image without the agent, with busybox's own init for its first process.
    pub fn with_busybox_init() -> Self {
        Self::changed(lab::BARE_IMAGE, |root| {
            let init = root.join("sbin/init");
            fs::remove_file(&init).and_then(|()| symlink("/bin/busybox", &init)).expect("the init can be replaced");
            // The last line has no newline, as many have not.
            let inittab = "::sysinit:/bin/hostname -F /etc/hostname\n::ctrlaltdel:/sbin/reboot";
            fs::write(root.join("etc/inittab"), inittab).expect("the tree can be written");
        })
    }

    /// Another image with a changed root.
    pub fn changed(base: &str, change: impl FnOnce(&Path)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let alias = format!("pika-test-{}-{count}", std::process::id());
        let scratch = tempfile::tempdir().expect("a folder for the image");
        let folder = scratch.path();
        let run = |command: &mut Command| {
            let output = command.output().expect("the command runs");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command:?}: {errors}");
        };
        let exported = folder.join("exported").display().to_string();
        run(&mut Incus.client(&["image", "export", base, &exported]));
        let archive = format!("{exported}.tar.gz");
        let tree = folder.join("tree");
        fs::create_dir(&tree).expect("a folder for the tree");
        run(Command::new("tar").arg("-C").arg(&tree).args(["--numeric-owner", "-xf"]).arg(&archive));
        change(&tree.join("rootfs"));
        // The alias makes an image of its own even where two tests change the same.
        fs::write(tree.join("rootfs/etc/image-name"), &alias).expect("the tree can be written");
        let packed = folder.join("packed.tar.gz").display().to_string();
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&tree).args(["--numeric-owner", "-I", "gzip -1", "-cf", &packed, "metadata.yaml", "rootfs"]);
        run(&mut tar);
        run(&mut Incus.client(&["image", "import", &packed, "--alias", &alias]));
        Self { alias }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = Incus.client(&["image", "delete", &self.alias]).output();
    }
}

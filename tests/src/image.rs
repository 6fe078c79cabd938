//! Variants of the test image.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
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
        Self::changed(lab::IMAGE, |root| write_program(&root.join("usr/bin/pika-guest"), program))
    }

    /// The test image without an agent, its root changed.
    pub fn bare(change: impl FnOnce(&Path)) -> Self {
        Self::changed(lab::BARE_IMAGE, change)
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

    fn changed(from: &str, change: impl FnOnce(&Path)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let alias = format!("pika-test-{}-{count}", std::process::id());
        let scratch = tempfile::tempdir().expect("a folder for the image");
        let folder = scratch.path();
        let exported = folder.join("exported").display().to_string();
        run(&mut Incus.client(&["image", "export", from, &exported]));
        let archive = format!("{exported}.tar.gz");
        let tree = folder.join("tree");
        fs::create_dir(&tree).expect("a folder for the tree");
        run(Command::new("tar").arg("-C").arg(&tree).args(["--numeric-owner", "-xf"]).arg(&archive));
        change(&tree.join("rootfs"));
        // The alias makes an image of its own even where two tests bring the same change.
        fs::write(tree.join("rootfs/etc/image-name"), &alias).expect("the tree can be written");
        let packed = folder.join("packed.tar.gz").display().to_string();
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&tree).args(["--numeric-owner", "-I", "gzip -1", "-cf", &packed, "metadata.yaml", "rootfs"]);
        run(&mut tar);
        run(&mut Incus.client(&["image", "import", &packed, "--alias", &alias]));
        Self { alias }
    }
}

fn run(command: &mut Command) {
    let output = command.output().expect("the command runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
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

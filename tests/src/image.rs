//! Variants of the test image.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
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
        run(&mut Incus.client(&["image", "export", lab::IMAGE, &exported]));
        let archive = format!("{exported}.tar.gz");
        let tree = folder.join("tree");
        fs::create_dir(&tree).expect("a folder for the tree");
        run(Command::new("tar").arg("-C").arg(&tree).args(["--numeric-owner", "-xf"]).arg(&archive));
        let agent = tree.join("rootfs/usr/bin/pika-guest");
        fs::write(&agent, program).expect("the agent can be replaced");
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("the agent can be made executable");
        // The alias makes an image of its own even where two tests bring the same program.
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

//! Finds Incus's programs, starts a daemon of our own and talks to it by the `incus` command.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result, Tried};
use crate::lab::Lab;
use crate::{place, run, say};

/// A daemon answers after about 5 s; a slow disk may take much longer for its first database.
const READY_WITHIN: Duration = Duration::from_secs(90);

/// The daemon's program, and the folder of the libraries that only it uses.
pub(crate) struct Daemon {
    program: PathBuf,
    libraries: PathBuf,
}

/// Looks where Debian, and where the Incus project's own packages, put it.
pub(crate) fn find_daemon() -> Option<Daemon> {
    let debian = format!("/usr/lib/{}-linux-gnu/incus", place::ARCH);
    [("/usr/libexec/incus/incusd", debian.as_str()), ("/opt/incus/bin/incusd", "/opt/incus/lib")]
        .into_iter()
        .map(|(program, libraries)| Daemon { program: program.into(), libraries: libraries.into() })
        .find(|daemon| daemon.program.exists())
}

/// Whether the `incus` command is there.
pub(crate) fn has_client() -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join("incus").exists()))
}

impl Daemon {
    /// Starts the daemon on the lab's own folder.
    pub(crate) fn start(&self, lab: &Lab) -> Result<Child> {
        let log = lab.log();
        let output = File::create(&log).tried(format!("write {}", log.display()))?;
        let errors = output.try_clone().tried(format!("write {}", log.display()))?;
        let mut command = self.command(lab);
        // Only root gets at its socket.
        command.args(["--group", "root"]).stdin(Stdio::null()).stdout(output).stderr(errors);
        command.spawn().tried(format!("start {}", self.program.display()))
    }

    /// Waits until it answers; `ended` tells early that nobody waits any more.
    pub(crate) fn wait_ready(&self, child: &mut Child, lab: &Lab, ended: impl Fn() -> bool) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < READY_WITHIN && !ended() {
            if let Some(status) = child.try_wait().tried("wait for incusd")? {
                return Err(self.not_ready(lab, &format!("ended ({status})")));
            }
            let mut asked = self.command(lab);
            asked.args(["waitready", "--timeout=1"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if lab.socket().exists() && asked.status().is_ok_and(|status| status.success()) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(self.not_ready(lab, &format!("did not answer within {} s", READY_WITHIN.as_secs())))
    }

    fn not_ready(&self, lab: &Lab, how: &str) -> Failure {
        let log = run::tail(&lab.log());
        Failure::step(format!("{} {how}. The end of its log:\n{log}", self.program.display()))
    }

    fn command(&self, lab: &Lab) -> Command {
        let mut command = Command::new(&self.program);
        command.env("LD_LIBRARY_PATH", &self.libraries).env("INCUS_DIR", lab.incus_dir());
        command
    }
}

/// The `incus` command for this lab's daemon; the user's own settings of it are left alone.
pub(crate) fn client(lab: &Lab, args: &[&str]) -> Command {
    let mut command = Command::new("incus");
    command.args(args).env("INCUS_DIR", lab.incus_dir()).env("INCUS_CONF", lab.client_dir());
    lab.mark(&mut command);
    command
}

/// A pool, and a profile whose instances get their root disk from it.
pub(crate) fn set_up(lab: &Lab) -> Result<()> {
    say::step("Make the storage pool and the profile");
    run::captured(&mut client(lab, &["storage", "create", "default", "dir"]))?;
    let device = ["profile", "device", "add", "default", "root", "disk", "path=/", "pool=default"];
    run::captured(&mut client(lab, &device)).map(drop)
}

/// Imports an image under one or more names.
pub(crate) fn import(lab: &Lab, image: &Path, aliases: &[&str]) -> Result<()> {
    let image = image.display().to_string();
    let mut args = vec!["image", "import", &image];
    args.extend(aliases.iter().flat_map(|alias| ["--alias", alias]));
    run::captured(&mut client(lab, &args)).map(drop)
}

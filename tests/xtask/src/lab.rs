//! A lab: a folder with a private Incus daemon in it, kept by a guard process for as long as the task lives.
//!
//! ```text
//!  cargo xtask demo ──stdin (a pipe, kept open)────> guard (own session) ──> incusd ──> instances
//!        │          <──stdout: "ready", or what is wrong    │
//!        └── cargo, pika-cloud, tests                     └── at the pipe's end: ends all of them, unmounts, removes
//! ```
//!
//! The task starts the guard, and the guard the daemon. However the task ends, by itself, by a signal, by `kill -9`,
//! the kernel closes its end of the pipe; that is what the guard waits for. Should the guard itself be killed, the
//! next task finds the folder without a living guard and clears it.
//!
//! The folder, `/var/lib/pika-xtask/<run>/`, lies where only root writes, not on a tmpfs (those may be `noexec`), and
//! its path is short, since a UNIX socket's has at most 107 bytes:
//!
//! | entry | what |
//! |---|---|
//! | `incus/` | the daemon's `INCUS_DIR`, with `unix.socket` |
//! | `client/` | settings of the `incus` command |
//! | `incusd.log` | what the daemon said |
//! | `image/` | the images, while they are made |
//! | `guard` | process id and start time of the guard |

use std::fs::{self, DirBuilder};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::failure::{Failure, Result, Tried};
use crate::{guard, say, signals, teardown};

/// Folder of all labs of this machine.
pub(crate) const LABS: &str = "/var/lib/pika-xtask";
/// In the environment of all that a task runs for a lab: the lab's folder. It tells whose a process is.
pub(crate) const MARK: &str = "PIKA_XTASK_LAB";

/// Where one lab's things lie. Owns nothing: see [`Kept`].
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    dir: PathBuf,
}

impl Lab {
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Makes the folder of a new lab.
    fn create() -> Result<Self> {
        // Below, the daemon lets its containers' users pass; what is secret in it, it closes itself.
        let passable = |recursive| {
            let mut builder = DirBuilder::new();
            builder.recursive(recursive).mode(0o711);
            builder
        };
        loop {
            passable(true).create(LABS).tried(format!("make {LABS}"))?;
            let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
            let dir = Path::new(LABS).join(format!("{:x}-{:03x}", std::process::id(), nanos >> 10 & 0xfff));
            match passable(false).create(&dir) {
                Ok(()) => return Ok(Self { dir }),
                // Taken, or another task has just removed the emptied folder of all labs.
                Err(error)
                    if matches!(error.kind(), std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotFound) => {}
                Err(error) => return Err(error).tried(format!("make {}", dir.display())),
            }
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The last part of the folder's name.
    pub(crate) fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(crate) fn incus_dir(&self) -> PathBuf {
        self.dir.join("incus")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("incus/unix.socket")
    }

    pub(crate) fn client_dir(&self) -> PathBuf {
        self.dir.join("client")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("incusd.log")
    }

    pub(crate) fn guard_file(&self) -> PathBuf {
        self.dir.join("guard")
    }

    /// Marks a command as this lab's, so that it is ended with it.
    pub(crate) fn mark<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env(MARK, &self.dir)
    }
}

/// A lab with its guard. Dropping it takes the lab down and waits for that.
pub(crate) struct Kept {
    lab: Lab,
    guard: Child,
    /// Closing it is the word for the guard to take the lab down.
    hold: Option<ChildStdin>,
}

impl Kept {
    /// Makes a lab, has its daemon started and waits until that answers.
    pub(crate) fn start() -> Result<Self> {
        teardown::sweep();
        let lab = Lab::create()?;
        say::step(&format!("Start a private Incus in {}", lab.incus_dir().display()));
        // `setsid` takes the guard out of reach of the terminal's signals. The program is named by its link in /proc,
        // since a build may replace the file meanwhile.
        let own_program = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
        let mut command = Command::new("setsid");
        command.arg(own_program).arg("__guard").arg(lab.dir()).arg(say::started_millis().to_string());
        let guard = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut guard = guard.tried("start the guard of the private Incus by `setsid`")?;
        let hold = guard.stdin.take();
        let (tell, said) = channel();
        if let Some(stdout) = guard.stdout.take() {
            std::thread::spawn(move || {
                let mut word = Vec::new();
                let _ = BufReader::new(stdout).read_until(0, &mut word);
                let word = String::from_utf8_lossy(&word).trim_end_matches('\0').to_owned();
                let _ = tell.send(word);
            });
        }
        // From here on an early return takes the lab down.
        let kept = Self { lab, guard, hold };
        wait_ready(&said)?;
        Ok(kept)
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Takes the lab down without a word, so that what was said last stays last.
    pub(crate) fn end_silently(mut self) {
        // A guard that cannot be told so says its line, which does no harm.
        let _ = self.hold.as_mut().map(|hold| hold.write_all(guard::SILENTLY));
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.hold.take());
        let _ = self.guard.wait();
        if self.lab.dir().exists() {
            // The guard itself was killed.
            teardown::take_down(&self.lab, false);
        }
    }
}

/// Waits for the guard's word that the daemon answers.
fn wait_ready(said: &Receiver<String>) -> Result<()> {
    loop {
        if let Some(number) = signals::pending() {
            return Err(Failure::Interrupted(number));
        }
        match said.recv_timeout(Duration::from_millis(20)) {
            Ok(word) if word == "ready" => return Ok(()),
            Ok(word) if !word.is_empty() => return Err(Failure::step(word)),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::step("the guard of the private Incus ended before the daemon was up"));
            }
        }
    }
}

/// Says how to become root, if this is not root.
pub(crate) fn must_be_root() -> Result<()> {
    let process = fs::metadata("/proc/self").tried("read /proc/self")?;
    if std::os::unix::fs::MetadataExt::uid(&process) == 0 {
        return Ok(());
    }
    Err(Failure::step(
        "this needs root, since it starts a private Incus and containers: \
         sudo -E env \"PATH=$PATH\" cargo xtask COMMAND (or become root first)",
    ))
}

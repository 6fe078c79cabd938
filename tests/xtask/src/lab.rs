//! A lab: a folder with a private Incus daemon in it, kept by a guard process for as long as the task lives.
//!
//! ```text
//!  cargo xtask demo ──stdin, kept open──────────────> guard (own session) ──> incusd ──> instances
//!        │          <──stdout, "ready DIR" or why not──   │
//!        └── cargo, pika-cloud, tests                     └── at stdin's end: ends all of them, unmounts, removes
//! ```
//!
//! The task starts the guard; the guard makes the folder and starts the daemon. However the task ends, by itself, by a
//! signal, by `kill -9`, the kernel closes its end of the pipe; that is what the guard waits for. Should the guard
//! itself be killed, its task takes the lab down instead, or else the next task does, which finds a folder without a
//! living guard.
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
    pub(crate) fn create() -> Result<Self> {
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
    guard: Guard,
}

impl Kept {
    /// Has a guard make a lab and start its daemon, and waits until that answers.
    pub(crate) fn start() -> Result<Self> {
        teardown::sweep();
        let (guard, said) = Guard::start()?;
        let lab = wait_ready(&said)?;
        Ok(Self { lab, guard })
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Takes the lab down without a word, so that what was said last stays last.
    pub(crate) fn end_silently(mut self) {
        // A guard that cannot be told so says its line, which does no harm.
        let _ = self.guard.hold.as_mut().map(|hold| hold.write_all(guard::SILENTLY));
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.guard.end();
        if self.lab.dir().exists() {
            // The guard itself was killed.
            teardown::take_down(&self.lab, false);
        }
    }
}

/// The guard process, as its task sees it. Dropping it waits for its work.
struct Guard {
    process: Child,
    /// Closing it is the word for the guard to take the lab down.
    hold: Option<ChildStdin>,
}

impl Guard {
    /// Starts it; what it says of the daemon comes through the channel.
    fn start() -> Result<(Self, Receiver<String>)> {
        // `setsid` takes the guard out of reach of the terminal's signals. The program is named by its link in /proc,
        // since a build may replace the file meanwhile.
        let own_program = format!("/proc/{}/exe", std::process::id());
        let mut command = Command::new("setsid");
        command.args([&own_program, "__guard", &say::started_millis().to_string()]);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = process.tried("start the guard of the private Incus by `setsid`")?;
        let (hold, stdout) = (process.stdin.take(), process.stdout.take());
        let (tell, said) = channel();
        std::thread::spawn(move || {
            let mut word = Vec::new();
            let _ = stdout.map(|stdout| BufReader::new(stdout).read_until(0, &mut word));
            let _ = tell.send(String::from_utf8_lossy(&word).trim_end_matches('\0').to_owned());
        });
        Ok((Self { process, hold }, said))
    }

    fn end(&mut self) {
        drop(self.hold.take());
        let _ = self.process.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for the guard's word that the daemon answers.
fn wait_ready(said: &Receiver<String>) -> Result<Lab> {
    loop {
        if let Some(number) = signals::pending() {
            return Err(Failure::Interrupted(number));
        }
        match said.recv_timeout(Duration::from_millis(20)) {
            Ok(word) if word.is_empty() => break,
            Ok(word) => {
                let dir = word.strip_prefix(guard::READY).map(Path::new);
                return dir.map(Lab::at).ok_or(Failure::Step(word));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // A Ctrl-C before it had its own session ends the guard as well.
    let unexplained = || Failure::step("the guard of the private Incus ended before the daemon was up");
    Err(signals::pending().map_or_else(unexplained, Failure::Interrupted))
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

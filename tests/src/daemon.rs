//! A daemon of a test's own, to be killed and started again. Instances with images run on the lab's; this one has none.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::incus::call;
use crate::wait::{LIMIT, until};

/// An Incus of one test. Dropping it ends it.
#[derive(Debug)]
pub struct Daemon {
    folder: TempDir,
    child: Child,
}

impl Daemon {
    /// Starts one, and waits until it answers.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("pika-incus-").tempdir().expect("a folder for the daemon");
        let child = spawn(folder.path());
        let daemon = Self { folder, child };
        daemon.wait_ready();
        daemon
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("unix.socket")
    }

    /// Kills it with `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("our daemon can be killed");
        self.child.wait().expect("our daemon can be waited for");
    }

    /// Starts it again.
    pub fn start_again(&mut self) {
        self.child = spawn(self.folder.path());
        self.wait_ready();
    }

    /// The status code and the envelope that a call is answered with.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        call(&self.socket(), method, path, body)
    }

    fn wait_ready(&self) {
        until("a daemon of our own answers", LIMIT, || {
            std::os::unix::net::UnixStream::connect(self.socket()).ok()?;
            (self.call("GET", "/1.0/instances", None).0 == 200).then_some(())
        });
    }
}

fn spawn(folder: &Path) -> Child {
    let libraries = format!("/usr/lib/{}-linux-gnu/incus", std::env::consts::ARCH);
    let programs = [("/usr/libexec/incus/incusd", libraries.as_str()), ("/opt/incus/bin/incusd", "/opt/incus/lib")];
    let (program, libraries) =
        programs.into_iter().find(|(program, _)| Path::new(program).exists()).expect("the lab's Incus is installed");
    let mut command = Command::new(program);
    command.args(["--group", "root"]).env("LD_LIBRARY_PATH", libraries).env("INCUS_DIR", folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("incusd starts")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It unmounts what it mounted when it is asked to end.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let began = std::time::Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && began.elapsed() < std::time::Duration::from_secs(15) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

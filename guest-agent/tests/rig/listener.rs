//! A listener that runs in a guest, and its peers.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pika_cloud_common::wire::Role;
use rustix::process::{Pid, Signal};

use super::{Guest, SOON, Stream};

/// A listener that runs.
pub struct Serve {
    pub child: Child,
    pub path: PathBuf,
    pub lines: Receiver<String>,
}

impl Serve {
    pub fn command(guest: &Guest, path: &Path, args: &[&str]) -> Command {
        let mut command = guest.command(&["serve", "--unix"]);
        command.arg(path).args(args).stderr(Stdio::piped()).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    pub fn spawn(mut command: Command, path: &Path) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, path: path.to_owned(), lines }
    }

    /// One that listens on a UNIX socket only.
    pub fn new(guest: &Guest) -> Self {
        let path = guest.dir.path().join("agent.sock");
        let serve = Self::spawn(Self::command(guest, &path, &["--no-vsock"]), &path);
        serve.find("listens on");
        serve
    }

    /// The next line that holds `what`, which must come.
    pub fn find(&self, what: &str) -> String {
        let mut passed = Vec::new();
        loop {
            match self.lines.recv_timeout(SOON) {
                Ok(line) if line.contains(what) => return line,
                Ok(line) => passed.push(line),
                Err(error) => panic!("{error}: never said: {what}; but {passed:?}"),
            }
        }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    pub fn dial(&self) -> Stream {
        Stream::over(self.connect())
    }

    pub fn session(&self, role: Role) -> Stream {
        let mut stream = self.dial();
        stream.hello(role, 1, None, true);
        stream.find_hello();
        stream
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// The processes of its sessions.
    pub fn sessions(&self) -> Vec<Pid> {
        let parent = format!("PPid:\t{}", self.child.id());
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        pids.filter(|pid| status_of(*pid).lines().any(|line| line == parent)).collect()
    }

    pub fn descriptors(&self) -> Vec<String> {
        descriptors_of(self.pid())
    }

    /// A number of its `/proc/PID/status`.
    pub fn number(&self, name: &str) -> u64 {
        let status = status_of(self.pid());
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn status_of(pid: Pid) -> String {
    std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap_or_default()
}

/// What a process has open, sorted.
pub fn descriptors_of(pid: Pid) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).unwrap().flatten();
    let mut all: Vec<_> = entries
        .filter_map(|entry| Some((entry.file_name(), std::fs::read_link(entry.path()).ok()?)))
        .map(|(name, to)| format!("{} {}", name.display(), to.display()))
        .collect();
    all.sort();
    all
}

/// What a peer hears until the end, which must come.
pub fn hear(mut socket: UnixStream, patience: Duration) -> String {
    socket.set_read_timeout(Some(patience)).unwrap();
    let mut heard = Vec::new();
    match socket.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error}: {}", String::from_utf8_lossy(&heard)),
    }
    String::from_utf8(heard).unwrap()
}

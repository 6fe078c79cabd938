//! The daemon of the private Incus, killed and started again.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::host::processes;
use crate::incus::Incus;
use crate::lab::Lab;
use crate::wait::{eventually, until};

/// The daemon of this run. Dropping it starts it again where it is down, so that whatever comes next finds it, and who
/// made it, too: it takes down every daemon of that folder, whoever started it.
#[derive(Debug)]
pub struct LabDaemon {
    pid: u32,
    program: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    /// The one that was started here, to be reaped.
    child: Option<Child>,
}

impl LabDaemon {
    /// Finds it. One test at a time may.
    pub fn find() -> Self {
        let lab = Lab::get();
        let mine = format!("INCUS_DIR={}", lab.incus_dir.display());
        let found = processes().into_iter().find_map(|pid| {
            let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let (args, environment) = (strings(pid, "cmdline"), strings(pid, "environ"));
            // Its helpers are the same program, and have a verb for their first argument.
            let is_daemon = program.file_name()? == "incusd" && args.get(1)?.starts_with("--");
            (is_daemon && environment.contains(&mine)).then_some((pid, program, args, environment))
        });
        let (pid, program, args, environment) = found.expect("the daemon of the private Incus runs");
        let pair = |entry: String| entry.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let environment = environment.into_iter().filter_map(pair).collect();
        Self { pid, program, args, environment, child: None }
    }

    /// Kills it with SIGKILL, and waits until it is gone. Instances run on.
    pub fn kill(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::KILL).expect("the daemon can be killed");
        if let Some(mut child) = self.child.take() {
            child.wait().expect("a child can be waited for");
        }
        // Its last thread may be a little behind its first.
        let answers = || UnixStream::connect(&Lab::get().socket).is_ok();
        eventually("the daemon is gone", || !is_alive(self.pid) && !answers());
    }

    /// Starts it as it was started before, without waiting until it answers.
    pub fn start(&mut self) {
        let log = Lab::get().incus_dir.with_file_name("incusd.log");
        let log = File::options().append(true).open(&log).expect("the daemon's log can be written");
        let errors = log.try_clone().expect("the daemon's log can be written");
        let mut command = Command::new(&self.program);
        command.args(&self.args[1..]).env_clear().envs(self.environment.clone());
        // Not in the group that a Ctrl-C on a terminal reaches.
        command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
        let child = command.spawn().expect("the daemon can be started");
        self.pid = child.id();
        self.child = Some(child);
    }

    /// Waits until it answers.
    pub fn wait_ready(&self) {
        until("the daemon answers", Duration::from_secs(90), || {
            let asked = Incus.client(&["list", "--format=csv"]).output().expect("the incus command runs");
            asked.status.success().then_some(())
        });
    }

    /// Kills it and starts it again.
    pub fn restart(&mut self) {
        self.kill();
        self.start();
        self.wait_ready();
    }
}

impl Drop for LabDaemon {
    fn drop(&mut self) {
        if !is_alive(self.pid) {
            self.start();
            self.wait_ready();
        }
    }
}

fn strings(pid: u32, name: &str) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let text = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
    bytes.split(|&byte| byte == 0).filter(|part| !part.is_empty()).map(text).collect()
}

/// Whether it runs; one that nobody has reaped yet does not.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    !matches!(state, None | Some("Z" | "X"))
}

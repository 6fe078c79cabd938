//! Starts a workload: in a session of its own, with one pipe for both outputs, as the right user.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use pika_cloud_common::paths;
use rustix::fd::OwnedFd;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use super::{memory, search_path, signals};
use crate::ledger::{Folder, Ledger, own_caps};
use crate::users::{self, User};

/// Used where neither the request nor our own environment says.
const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin:/run/wrappers/bin";
/// Users that a request without root runs as: the first that the image has.
const UNPRIVILEGED: [&str; 2] = ["ci", "nobody"];

/// What to run.
#[derive(Clone, Debug)]
pub enum What {
    /// A program and its arguments, in our own environment and as our own user.
    Program(Vec<OsString>),
    /// A line for `/bin/sh -c`, in an environment made anew.
    Shell {
        /// The line.
        command: String,
        /// As root; else as an unprivileged user.
        as_root: bool,
        /// The environment that was asked for.
        env: BTreeMap<String, String>,
        /// The working folder; `/` where absent.
        cwd: Option<String>,
    },
}

/// A workload could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program or the folder is not there, or may not be used.
    #[error("cannot run `{program}`{within}: {source}")]
    Exec {
        /// What was to be run.
        program: String,
        /// In which folder, where that was asked for.
        within: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// We may not become that user.
    #[error("the request asks for root, and pika-guest runs as user {0}: start the agent as root")]
    NotRoot(u32),
    /// The image has no such user.
    #[error("the image has neither a user `ci` nor `nobody` in /etc/passwd: add one, or set run_as_root")]
    NoUser,
}

impl SpawnError {
    /// The exit code that a shell would give.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Exec { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

/// A workload that runs.
#[derive(Debug)]
pub(super) struct Spawned {
    /// Its main process, the leader of its session and process group.
    pub(super) child: Child,
    /// Where its output comes.
    pub(super) output: OwnedFd,
}

/// Starts `what`.
pub(super) fn spawn(ledger: &Ledger, what: &What) -> Result<Spawned, SpawnError> {
    let (mut command, user, within) = prepare(ledger.folder(), what)?;
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| SpawnError::Exec { program: program.clone(), within: within.clone(), source };
    let (output, input) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
    // Ours alone: the workload's end keeps blocking, as programs expect of their output.
    rustix::fs::fcntl_setfl(&output, rustix::fs::OFlags::NONBLOCK).map_err(|errno| failed(errno.into()))?;
    let second = input.try_clone().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(Stdio::from(input)).stderr(Stdio::from(second));
    let identity = user.map(|user| (user.uid, user.gid, groups_of(&user)));
    // SAFETY: between fork and exec only async-signal-safe system calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            // While we are still ourselves: after a change of user the kernel lets nobody write there until exec.
            memory::volunteer();
            if let Some((uid, gid, groups)) = &identity {
                become_user(*uid, *gid, groups)?;
            }
            rustix::process::umask(Mode::from_raw_mode(0o022));
            signals::unblock_all();
            Ok(())
        });
    }
    let child = command.spawn().map_err(failed)?;
    Ok(Spawned { child, output })
}

fn become_user(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<(), Errno> {
    set_thread_groups(groups)?;
    set_thread_gid(gid)?;
    set_thread_uid(uid)
}

fn groups_of(user: &User) -> Vec<Gid> {
    let mut groups = vec![user.gid];
    groups.extend(users::contract_group().filter(|group| *group != user.gid));
    groups
}

/// The command, the user that it is to become, and for messages the folder.
fn prepare(root: &Folder, what: &What) -> Result<(Command, Option<User>, String), SpawnError> {
    match what {
        What::Program(line) => {
            let (program, args) = line.split_first().map_or((OsStr::new(""), &[][..]), |(p, a)| (p.as_os_str(), a));
            let mut command = Command::new(program);
            command.args(args).env(paths::ROOT_ENV, root.path());
            if let Some(path) = std::env::var_os("PATH") {
                command.env("PATH", search_path::with_agent(&path));
            }
            Ok((command, None, String::new()))
        }
        What::Shell { command: line, as_root, env, cwd } => {
            let (user, change) = user_for(*as_root)?;
            if change {
                open_to(root, &user);
            }
            let folder = cwd.as_deref().unwrap_or("/");
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(line).current_dir(folder).env_clear();
            let asked = env.get("PATH").map(OsString::from);
            let path = asked.or_else(|| std::env::var_os("PATH").filter(|path| !path.as_bytes().is_empty()));
            for name in ["LANG"].into_iter().chain(own_caps::ENVIRONMENT) {
                command.envs(std::env::var_os(name).map(|value| (name, value)));
            }
            command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
            command.env("SHELL", "/bin/sh").env("PWD", folder);
            command.envs(env).env(paths::ROOT_ENV, root.path());
            command.env("PATH", search_path::with_agent(path.as_deref().unwrap_or(DEFAULT_PATH.as_ref())));
            let within = cwd.as_ref().map_or_else(String::new, |cwd| format!(" in the folder {cwd} (bootstrap.cwd)"));
            Ok((command, change.then_some(user), within))
        }
    }
}

/// Whom the workload runs as, and whether that is a change.
fn user_for(as_root: bool) -> Result<(User, bool), SpawnError> {
    let own = rustix::process::geteuid();
    if own.is_root() && !as_root {
        let user = UNPRIVILEGED.iter().find_map(|name| users::by_name(name)).ok_or(SpawnError::NoUser)?;
        return Ok((user, true));
    }
    if as_root && !own.is_root() {
        return Err(SpawnError::NotRoot(own.as_raw()));
    }
    let unnamed = || User {
        name: if own.is_root() { "root".to_owned() } else { own.as_raw().to_string() },
        uid: own,
        gid: rustix::process::getegid(),
        home: if own.is_root() { "/root".to_owned() } else { "/".to_owned() },
        shell: String::new(),
    };
    Ok((users::by_uid(own).unwrap_or_else(unnamed), false))
}

/// Lets an unprivileged workload leave artifacts and report. Where the image has the contract's group, that group may
/// do so already; else the files are given the user's own group, and `artifacts/` the user.
fn open_to(root: &Folder, user: &User) {
    let give = |folder: &Folder, owner: Option<Uid>| {
        // The mode again, since a change of the group may clear the bit that hands it down. Best effort: a workload that
        // cannot report fails with a message of its own.
        let _ = rustix::fs::fchown(folder, owner, Some(user.gid));
        let _ = rustix::fs::fchmod(folder, Mode::from_raw_mode(0o2775));
    };
    if users::contract_group().is_some() {
        return;
    }
    give(root, None);
    for name in [paths::EVENTS, paths::EVENTS_SEQ, paths::EVENTS_STREAM, paths::STATUS, paths::RESULT] {
        if let Ok(Some((fd, _))) = root.open_file(name, rustix::fs::OFlags::RDONLY) {
            let _ = rustix::fs::fchown(&fd, None, Some(user.gid));
        }
    }
    if let Ok(folder) = root.child_or_create(paths::ARTIFACTS_DIR) {
        give(&folder, Some(user.uid));
    }
}

//! The guard process of a lab: see [`crate::lab`] for the picture.
//!
//! It runs in a session of its own and notes signals instead of dying of them, so that only the end of its task
//! counts. Its standard input is the pipe that the task holds: closed, whether by the task or by its death, it means
//! that the task has ended. All that may come before that is [`SILENTLY`].

use std::fs;
use std::io::{Read, Write};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::{Failure, Result, Tried};
use crate::lab::Lab;
use crate::{incus, processes, say, signals, teardown};

/// The task's wish that its end be the last that is read.
pub(crate) const SILENTLY: &[u8] = b"silently";

/// What the guard says when the daemon answers, before the lab's folder.
pub(crate) const READY: &str = "ready ";

/// Makes a lab, starts its daemon, tells the task how that went, waits for the task's end and takes the lab down.
pub(crate) fn main(started_millis: &str) {
    say::start(started_millis.parse().ok());
    signals::install();
    let task_ended = Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let task_ended = Arc::clone(&task_ended);
        move || {
            let mut wish = Vec::new();
            let _ = std::io::stdin().read_to_end(&mut wish);
            task_ended.store(true, Ordering::SeqCst);
            wish == SILENTLY
        }
    });
    let lab = match Lab::create() {
        Ok(lab) => lab,
        Err(failure) => return tell(&failure.text().unwrap_or_default()),
    };
    let (daemon, word) = match bring_up(&lab, || task_ended.load(Ordering::SeqCst)) {
        Ok(daemon) => (Some(daemon), format!("{READY}{}", lab.dir().display())),
        Err((daemon, failure)) => (daemon, failure.text().unwrap_or_default()),
    };
    tell(&word);
    let silently = watch.join().unwrap_or_default();
    teardown::take_down(&lab, silently);
    if let Some(mut daemon) = daemon {
        let _ = daemon.wait();
    }
}

/// Says what the task waits for, closed by a NUL: [`READY`] and the folder, or what went wrong. A task that is gone hears nothing, which is no failure.
fn tell(word: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(word.as_bytes()).and_then(|()| out.write_all(b"\0")).and_then(|()| out.flush());
}

fn bring_up(lab: &Lab, ended: impl Fn() -> bool) -> std::result::Result<Child, (Option<Child>, Failure)> {
    say::step(&format!("Start a private Incus in {}", lab.incus_dir().display()));
    let start = || -> Result<_> {
        let guard_file = lab.guard_file();
        let identity = processes::identity(std::process::id());
        let identity = identity.ok_or_else(|| Failure::step("cannot read this process's start time in /proc"))?;
        fs::write(&guard_file, identity).tried(format!("write {}", guard_file.display()))?;
        let found = incus::find_daemon().ok_or_else(|| Failure::step("there is no incusd"))?;
        let child = found.start(lab)?;
        Ok((found, child))
    };
    let (found, mut child) = start().map_err(|failure| (None, failure))?;
    match found.wait_ready(&mut child, lab, ended) {
        Ok(()) => Ok(child),
        Err(failure) => Err((Some(child), failure)),
    }
}

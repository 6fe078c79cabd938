//! Runs programs: their output shown, kept in a log, or captured; and ends them in order when the task is interrupted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result, Tried};
use crate::signals;

/// A terminal's Ctrl-C reaches the program as well; where only the task was signalled, it is passed on after this.
const HEARD_BY_ITSELF: Duration = Duration::from_secs(3);
/// Patience with a program that was asked to end: `pika-cloud` stops, collects and destroys in this time.
const GRACE: Duration = Duration::from_secs(30);
/// How much of a log is shown when its program failed.
const TAIL_LINES: usize = 30;

/// How a command line reads in messages.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs it with the task's own input and output; its code is given back.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    let child = command.spawn().tried(format!("run `{}`", line(command)))?;
    wait(child)
}

/// Runs it with the task's own input and output; it has to succeed.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if status.success() { Ok(()) } else { Err(Failure::step(format!("`{}` failed ({status})", line(command)))) }
}

/// Runs it with its output in `log`, which is kept, and its end shown, only if it fails.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).tried(format!("make {}", folder.display()))?;
    }
    let out = File::create(log).tried(format!("write {}", log.display()))?;
    let err = out.try_clone().tried(format!("write {}", log.display()))?;
    let status = status(command.stdin(Stdio::null()).stdout(out).stderr(err))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::step(format!("`{}` failed ({status}). The end of {}:\n{}", line(command), log.display(), tail(log))))
}

/// Runs it quietly, it has to succeed; what it wrote on standard output is given back.
pub(crate) fn captured(command: &mut Command) -> Result<String> {
    let tried = format!("run `{}`", line(command));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().tried(tried)?;
    let (out, err) = (read_aside(child.stdout.take()), read_aside(child.stderr.take()));
    let status = wait(child)?;
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if status.success() {
        return Ok(out);
    }
    Err(Failure::step(format!("`{}` failed ({status}): {}", line(command), err.trim())))
}

/// Reads to the end beside the wait, so that no pipe fills up.
fn read_aside(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Sends a signal to one process. The shell's own `kill` serves, since the standard library has none.
pub(crate) fn signal(pid: u32, name: &str) {
    // A process that is gone already is what was wanted.
    let _ = Command::new("sh")
        .args(["-c", "kill -s \"$1\" \"$2\"", "kill", name, &pid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Waits for the child, or, when the task is interrupted, ends it.
fn wait(mut child: Child) -> Result<ExitStatus> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().tried("wait for a program")? {
            // A program that ended because the same Ctrl-C reached it has not failed.
            return signals::pending().map_or(Ok(status), |number| Err(Failure::Interrupted(number)));
        }
        if let Some(number) = signals::pending() {
            end(&mut child, number);
            return Err(Failure::Interrupted(number));
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Asks the child to end, and makes it end.
fn end(child: &mut Child, number: i32) {
    let asked = Instant::now();
    let mut passed_on = false;
    while matches!(child.try_wait(), Ok(None)) {
        let wait_first = if number == signals::SIGINT { HEARD_BY_ITSELF } else { Duration::ZERO };
        if !passed_on && asked.elapsed() >= wait_first {
            signal(child.id(), "TERM");
            passed_on = true;
        }
        if signals::count() > 1 || asked.elapsed() > GRACE {
            let _ = child.kill();
        }
        sleep(Duration::from_millis(10));
    }
}

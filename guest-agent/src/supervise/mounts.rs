//! Waits until what a workload needs is mounted.
//!
//! A container has its mounts before it runs. Into a virtual machine Incus's own agent brings them some seconds after the boot,
//! and ours may have been asked for the workload by then. What is not there in time fails the run before it began: a job that
//! finds an empty folder where its sources should be would fail later, and say something else.

use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::signals::Signals;
use crate::watch::timespec;

/// How long a mount may take: longer than a slow boot of what mounts it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const PACE: Duration = Duration::from_millis(100);

/// The workload cannot begin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MountError {
    /// It is not mounted.
    #[error(
        "`{0}` is not mounted: in a virtual machine incus-agent does that, so it must be in the image, and run (is \
         incus-agent.service up?)"
    )]
    Missing(String),
    /// Its end was asked for meanwhile.
    #[error("ended before it began, while `{0}` was not mounted")]
    Ended(String),
}

/// Waits until all of `folders` are mounted, at most until `time_is_up`.
pub(super) fn wait_for(folders: &[String], signals: &Signals, time_is_up: Option<Instant>) -> Result<(), MountError> {
    let patience = Instant::now() + PATIENCE;
    let deadline = time_is_up.map_or(patience, |time_is_up| patience.min(time_is_up));
    loop {
        // Read once a look, and only where there is something to look for.
        let Some(missing) = first_missing(folders, || fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
        else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(MountError::Missing(missing.to_owned()));
        }
        let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], Some(&timespec(PACE)));
        if signals.next().is_some() {
            return Err(MountError::Ended(missing.to_owned()));
        }
    }
}

fn first_missing(folders: &[String], read: impl FnOnce() -> String) -> Option<&str> {
    if folders.is_empty() {
        return None;
    }
    let mountinfo = read();
    let mounted: Vec<String> = mountinfo.lines().filter_map(mount_point).collect();
    folders.iter().find(|folder| !mounted.contains(folder)).map(String::as_str)
}

/// The fifth field of a line, in which the kernel writes blanks and backslashes as octal numbers.
fn mount_point(line: &str) -> Option<String> {
    let field = line.split(' ').nth(4)?;
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    Some(escapes.iter().fold(field.to_owned(), |text, (escape, plain)| text.replace(escape, plain)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "36 35 98:0 / / rw,noatime shared:1 - ext4 /dev/sda rw\n\
        40 36 0:40 / /work\\040space ro - 9p incus_pika-mount-0 ro\n41 36 0:41 / /data rw - virtiofs x rw\n";

    fn missing(folders: &[&str]) -> Option<String> {
        let folders: Vec<String> = folders.iter().map(|folder| (*folder).to_owned()).collect();
        first_missing(&folders, || MOUNTINFO.to_owned()).map(str::to_owned)
    }

    #[test]
    fn mounts_are_told_from_folders() {
        assert_eq!(missing(&["/", "/work space", "/data"]), None);
        assert_eq!(missing(&["/data", "/data/below"]).as_deref(), Some("/data/below"));
        assert_eq!(missing(&["/dat"]).as_deref(), Some("/dat"), "by the whole path");
    }

    #[test]
    fn where_nothing_is_waited_for_nothing_is_read() {
        assert_eq!(first_missing(&[], || panic!("read")), None);
    }
}

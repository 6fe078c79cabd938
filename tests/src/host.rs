//! Looking at this machine: files and processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The clock that the journal's `mono` is of.
pub fn monotonic() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).expect("that clock counts up from 0")
}

/// A text file; panics with its name where it cannot be read.
pub fn read_text(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Everything below a folder that is no folder, links not followed, sorted.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        // A folder may go while it is looked at.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(_) => found.push(entry.path()),
                Err(_) => {}
            }
        }
    }
    found.sort();
    found
}

/// Files below a folder that hold `needle`; what cannot be read is passed over.
pub fn count_in_files(folder: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let holds = |path: &PathBuf| {
        let regular = fs::symlink_metadata(path).is_ok_and(|data| data.is_file() && data.len() < 64 << 20);
        regular && fs::read(path).is_ok_and(|bytes| contains(&bytes, needle))
    };
    files_below(folder).into_iter().filter(holds).collect()
}

pub(crate) fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// Every process of this machine that can be seen, containers' included.
pub fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc can be read").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Command lines of this machine, their arguments separated by spaces, that hold `needle`.
pub fn command_lines_with(needle: &str) -> Vec<(u32, String)> {
    let line = |pid: &u32| {
        let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((*pid, String::from_utf8_lossy(&bytes).replace('\0', " ")))
    };
    processes().iter().filter_map(line).filter(|(_, line)| line.contains(needle)).collect()
}

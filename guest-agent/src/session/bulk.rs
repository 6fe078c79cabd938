//! Sends logs, a chunk at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pika_cloud_common::limits::{MAX_CHUNK_BYTES, MAX_COUNT, MAX_LOG_FILES};
use pika_cloud_common::wire::{GuestMessage, LogChunk, Notice};
use rustix::fs::{self, AtFlags, FileType, OFlags, SeekFrom};

use crate::ledger::{Folder, read_at};

/// A name longer than this is left out.
const MAX_NAME_BYTES: usize = 255;

/// The logs of a stream, and how far they were sent.
#[derive(Debug)]
pub struct LogTail {
    logs: Option<Folder>,
    sent: BTreeMap<String, u64>,
    /// The file to begin with next time, so that a noisy one does not hold up the others.
    turn: usize,
    /// Logs that are shorter than what was sent of them.
    cut: BTreeSet<String>,
    /// When the folder was last read: its time of change.
    listed: Option<(i64, u64)>,
}

impl LogTail {
    /// Goes on behind `sent`.
    pub fn new(logs: Option<Folder>, sent: BTreeMap<String, u64>) -> Self {
        let sent = sent.into_iter().filter(|(name, _)| is_log_name(name)).take(MAX_LOG_FILES).collect();
        Self { logs, sent, turn: 0, cut: BTreeSet::new(), listed: None }
    }

    /// The folder has come to be.
    pub fn attach(&mut self, logs: Folder) {
        self.logs = Some(logs);
    }

    /// The next byte of a log that was not sent yet.
    pub fn sent(&self, file: &str) -> u64 {
        self.sent.get(file).copied().unwrap_or(0)
    }

    /// Appends one chunk to `out`, where there is one; says whether.
    pub fn send(&mut self, out: &mut Vec<u8>) -> bool {
        self.list();
        let Some(logs) = &self.logs else { return false };
        let names: Vec<String> = self.sent.keys().cloned().collect();
        for step in 0..names.len() {
            let at = (self.turn + step) % names.len();
            let name = &names[at];
            let from = self.sent.get(name).copied().unwrap_or(0);
            let size = size_of_regular(logs, name).filter(|&size| size <= MAX_COUNT).unwrap_or(from);
            if size < from {
                // Cut by the workload. Offsets stay: what it writes below is lost, and said once.
                if self.cut.insert(name.clone()) {
                    GuestMessage::Notice(Notice::LogGap { file: name.clone(), from: size, to: from }).write(out);
                }
                continue;
            }
            if size == from {
                continue;
            }
            self.cut.remove(name);
            if let Some(to) = send_chunk(logs, name, from..size, out) {
                self.sent.insert(name.clone(), to);
                self.turn = at + 1;
                return true;
            }
        }
        false
    }

    /// Takes note of files that are new.
    fn list(&mut self) {
        let Some(logs) = &self.logs else { return };
        let Ok(stat) = fs::fstat(logs) else { return };
        let changed = (stat.st_mtime, stat.st_mtime_nsec);
        if self.listed == Some(changed) {
            return;
        }
        self.listed = Some(changed);
        let Ok(entries) = fs::Dir::read_from(logs) else { return };
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().to_str() else { continue };
            if self.sent.len() >= MAX_LOG_FILES {
                return;
            }
            if is_log_name(name) && !self.sent.contains_key(name) {
                self.sent.insert(name.to_owned(), 0);
            }
        }
    }
}

fn is_log_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && !name.starts_with('.')
        && !name.contains('/')
        && !name.chars().any(char::is_control)
}

/// Appends a chunk of what lies in `range`; gives the next byte. A hole is left out, and said.
fn send_chunk(logs: &Folder, name: &str, range: Range<u64>, out: &mut Vec<u8>) -> Option<u64> {
    let from = range.start;
    let (fd, _) = logs.open_file(name, OFlags::RDONLY).ok()??;
    let data = fs::seek(&fd, SeekFrom::Data(from)).unwrap_or(from).min(range.end);
    if data > from {
        let gap = Notice::LogGap { file: name.to_owned(), from, to: data };
        GuestMessage::Notice(gap).write(out);
        return Some(data);
    }
    let mut chunk = vec![0; usize::try_from(range.end - from).unwrap_or(MAX_CHUNK_BYTES).min(MAX_CHUNK_BYTES)];
    let read = read_at(&fd, &mut chunk, from).ok().filter(|&read| read > 0)?;
    GuestMessage::Log(LogChunk { file: name.to_owned(), offset: from, len: read as u64 }).write(out);
    out.extend_from_slice(&chunk[..read]);
    Some(from + read as u64)
}

fn size_of_regular(folder: &Folder, name: &str) -> Option<u64> {
    let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then(|| u64::try_from(stat.st_size).unwrap_or(0))
}

//! Sends artifacts, a chunk at a time.
//!
//! ```text
//!   walk ── folder ──► entry {folder}
//!        ── file ────► entry {offset 0} chunk, entry {offset n} chunk, … entry {…, digest} last chunk
//!        ── odd, lost ► notice {skipped}, the first hundred; the rest is counted
//!        ── end, or the limit of files ──► notice {archive_done}, with the first thing that was lost
//! ```
//!
//! A file that shrinks meanwhile ends early, with the digest of what was sent; one that grows is cut at the size that it
//! had when it was opened.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::glob::{GlobError, Globs};
use pika_cloud_common::limits::{MAX_CHUNK_BYTES, MAX_COUNT};
use pika_cloud_common::wire::{Archive, ArchiveLimits, Entry, GuestMessage, Notice};
use rustix::fd::OwnedFd;
use rustix::fs::Stat;
use sha2::{Digest as _, Sha256};

use super::walk::{Step, Walk};
use crate::ledger::read_at;

/// Notices of entries that are left out; more are counted.
const MAX_SKIP_NOTICES: u64 = 100;

/// Of the path of what is missing.
const MAX_TOLD_PATH_CHARS: usize = 160;
/// The bits of a mode that are sent.
const PERMISSIONS: u32 = 0o7777;

/// An archive that is being sent.
#[derive(Debug)]
pub struct Archiver {
    walk: Option<Walk>,
    limits: ArchiveLimits,
    sending: Option<Sending>,
    files: u64,
    bytes: u64,
    skipped: u64,
    /// Files that do not fit: they count as those that do, so that a walk through all that there is takes no more time than
    /// what was asked for.
    unfit: u64,
    /// The first thing that was asked for and is not in it, and why.
    problem: Option<String>,
}

#[derive(Debug)]
struct Sending {
    fd: OwnedFd,
    entry: Entry,
    hasher: Sha256,
}

impl Archiver {
    /// Of what is below `root`; of nothing where there is none.
    pub fn new(root: Option<OwnedFd>, asked: &Archive) -> Result<Self, GlobError> {
        let globs = Globs::parse(asked.globs.iter().map(String::as_str))?;
        let walk = root.map(|root| Walk::new(root, globs, asked.after.as_deref()));
        let limits = asked.limits;
        Ok(Self { walk, limits, sending: None, files: 0, bytes: 0, skipped: 0, unfit: 0, problem: None })
    }

    /// Appends a piece to `out`; says whether there is more.
    pub fn send(&mut self, out: &mut Vec<u8>) -> bool {
        if let Some(sending) = self.sending.take() {
            self.send_chunk(sending, out);
            return true;
        }
        let step = self.walk.as_mut().map_or(Step::End, Walk::step);
        match step {
            Step::More => true,
            Step::End => self.end(out),
            Step::Odd(path, reason) => {
                self.skip(path, reason, out);
                true
            }
            Step::Lost(path, reason) => {
                self.lose(path, reason, out);
                true
            }
            Step::Folder(path, stat) => self.send_folder(path, stat, out),
            Step::File(path, fd, stat) => self.begin_file(path, fd, stat, out),
        }
    }

    fn send_folder(&mut self, path: String, stat: Stat, out: &mut Vec<u8>) -> bool {
        if self.is_full() {
            return self.stop(out);
        }
        self.files += 1;
        let entry =
            Entry { path, folder: true, mode: stat.st_mode & PERMISSIONS, size: 0, offset: 0, len: 0, digest: None };
        GuestMessage::Entry(entry).write(out);
        true
    }

    fn begin_file(&mut self, path: String, fd: OwnedFd, stat: Stat, out: &mut Vec<u8>) -> bool {
        if self.is_full() {
            return self.stop(out);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size > MAX_COUNT || size > self.limits.max_bytes.saturating_sub(self.bytes) {
            // One that is smaller may fit.
            self.unfit += 1;
            self.lose(path, &format!("it does not fit limits.artifact_bytes ({})", self.limits.max_bytes), out);
            return true;
        }
        self.files += 1;
        let entry =
            Entry { path, folder: false, mode: stat.st_mode & PERMISSIONS, size, offset: 0, len: 0, digest: None };
        self.send_chunk(Sending { fd, entry, hasher: Sha256::new() }, out);
        true
    }

    fn send_chunk(&mut self, mut sending: Sending, out: &mut Vec<u8>) {
        let mut problem = None;
        let entry = &mut sending.entry;
        let left = usize::try_from(entry.size - entry.offset).unwrap_or(MAX_CHUNK_BYTES).min(MAX_CHUNK_BYTES);
        let mut chunk = vec![0; left];
        // What cannot be read counts as the end of the file, and is told.
        let read = read_at(&sending.fd, &mut chunk, entry.offset).unwrap_or_else(|errno| {
            problem = Some(format!("it cannot be read to its end: {errno}"));
            0
        });
        sending.hasher.update(&chunk[..read]);
        entry.len = read as u64;
        let ended = read < left || entry.offset + entry.len == entry.size;
        if ended {
            entry.digest = Some(Digest(sending.hasher.finalize_reset().into()));
        }
        GuestMessage::Entry(entry.clone()).write(out);
        out.extend_from_slice(&chunk[..read]);
        self.bytes += entry.len;
        entry.offset += entry.len;
        if let Some(problem) = problem {
            self.lose(entry.path.clone(), &problem, out);
        } else if !ended {
            self.sending = Some(sending);
        }
    }

    fn lose(&mut self, path: String, reason: &str, out: &mut Vec<u8>) {
        if self.problem.is_none() {
            // What is told is short, and the reason is not to be cut off.
            let end = path.char_indices().nth(MAX_TOLD_PATH_CHARS).map(|(end, _)| end);
            let told = end.map_or_else(|| path.clone(), |end| format!("{}…", &path[..end]));
            self.problem = Some(format!("`{told}`: {reason}"));
        }
        self.skip(path, reason, out);
    }

    fn is_full(&self) -> bool {
        self.files + self.unfit >= self.limits.max_files
    }

    fn skip(&mut self, path: String, reason: &str, out: &mut Vec<u8>) {
        self.skipped += 1;
        if self.skipped <= MAX_SKIP_NOTICES {
            GuestMessage::Notice(Notice::Skipped { path, reason: reason.to_owned() }).write(out);
        }
    }

    /// No more files.
    fn stop(&mut self, out: &mut Vec<u8>) -> bool {
        let more = format!("there are more than limits.artifact_files ({})", self.limits.max_files);
        self.problem = Some(match self.problem.take() {
            Some(first) => format!("{first}; and {more}"),
            None => more,
        });
        self.end(out)
    }

    fn end(&mut self, out: &mut Vec<u8>) -> bool {
        let (files, bytes, skipped, problem) = (self.files, self.bytes, self.skipped, self.problem.take());
        let truncated = problem.is_some();
        GuestMessage::Notice(Notice::ArchiveDone { files, bytes, skipped, truncated, problem }).write(out);
        false
    }
}

//! Walks below `artifacts/` in the bytewise order of the paths' components, a bounded step at a time.
//!
//! ```text
//!   levels:  artifacts/ ── a/ ── b/          each: its descriptor, its names (sorted), how far it is
//!                                └ next name: regular file ──► Found    folder ──► Found, one level more
//!                                             link, device, socket, FIFO ──► Odd
//!                                             what cannot be had, or is beyond a bound ──► Lost
//! ```
//!
//! Nothing is opened by a path: each component is looked at and opened from the descriptor of its folder, and no link is
//! followed. Bounded are the depth, the names of a folder, and the names held at once.

use std::mem::MaybeUninit;

use pika_cloud_common::glob::{Globs, Places};
use pika_cloud_common::limits::{MAX_ARCHIVE_DEPTH, MAX_ARCHIVE_FOLDER_ENTRIES, MAX_ARCHIVE_PATH_BYTES};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

/// Bytes of names that are held at once, over all levels.
const MAX_HELD_BYTES: usize = 32 * 1024 * 1024;
/// What one step reads of a folder: about a thousand names.
const LIST_BYTES: usize = 32 * 1024;
/// Names that one step looks at.
const STEP_NAMES: usize = 256;

/// Why something is left out that its folder named a moment before.
const GONE: &str = "it is gone, or was replaced";

/// What a step of a walk came to.
#[derive(Debug)]
pub enum Step {
    /// A regular file that matches, open, as it was when it was opened.
    File(String, OwnedFd, Stat),
    /// A folder that matches.
    Folder(String, Stat),
    /// Something that matches and can be no artifact.
    Odd(String, &'static str),
    /// Something that matches, or may hold what does, and cannot be had.
    Lost(String, &'static str),
    /// Go on.
    More,
    /// That was all.
    End,
}

/// A walk below one folder.
#[derive(Debug)]
pub struct Walk {
    globs: Globs,
    levels: Vec<Level>,
    path: String,
    held: usize,
}

#[derive(Debug)]
struct Level {
    folder: OwnedFd,
    names: Names,
    /// Names are still to be read.
    listing: bool,
    places: Places,
    /// What the path is cut to when this level is left.
    path_len: usize,
    /// The rest of the path behind which the walk goes on, while it leads through this folder.
    after: Vec<String>,
}

#[derive(Debug, Default)]
struct Names {
    bytes: Vec<u8>,
    /// Where each begins and ends; sorted once all are there, the next one last.
    spans: Vec<(u32, u32)>,
}

impl Walk {
    /// Of what is below `root` and matches `globs`, behind the path `after`.
    pub fn new(root: OwnedFd, globs: Globs, after: Option<&str>) -> Self {
        let places = globs.start();
        let after = after.map_or_else(Vec::new, |path| path.split('/').map(str::to_owned).collect());
        let mut walk = Self { globs, levels: Vec::new(), path: String::new(), held: 0 };
        walk.descend(root, places, after);
        walk
    }

    fn descend(&mut self, folder: OwnedFd, places: Places, after: Vec<String>) {
        let path_len = self.path.len();
        self.levels.push(Level { folder, names: Names::default(), listing: true, places, path_len, after });
    }

    /// Goes on, for a bounded while.
    pub fn step(&mut self) -> Step {
        for _ in 0..STEP_NAMES {
            let Some(level) = self.levels.last_mut() else { return Step::End };
            self.path.truncate(level.path_len);
            if level.listing {
                return self.list();
            }
            let Some(name) = level.names.pop() else {
                let level = self.levels.pop();
                self.held -= level.map_or(0, |level| level.names.bytes.len());
                continue;
            };
            match self.look(&name) {
                Step::More => {}
                found => return found,
            }
        }
        Step::More
    }

    /// Reads one piece of the last level's folder.
    fn list(&mut self) -> Step {
        let Some(level) = self.levels.last_mut() else { return Step::End };
        let mut problem = None;
        let mut buffer = vec![MaybeUninit::uninit(); LIST_BYTES];
        let mut entries = RawDir::new(level.folder.as_fd(), &mut buffer);
        loop {
            match entries.next() {
                // A folder that was removed meanwhile has no names.
                None | Some(Err(Errno::NOENT)) => {
                    level.listing = false;
                    break;
                }
                Some(Err(Errno::INTR)) => {}
                Some(Err(_)) => {
                    problem = Some("it cannot be listed");
                    level.listing = false;
                    break;
                }
                Some(Ok(entry)) => {
                    let name = entry.file_name().to_bytes();
                    if name == b"." || name == b".." {
                        continue;
                    }
                    if level.names.spans.len() >= MAX_ARCHIVE_FOLDER_ENTRIES || self.held + name.len() > MAX_HELD_BYTES
                    {
                        problem = Some("it holds more names than the agent looks at");
                        level.listing = false;
                        break;
                    }
                    self.held += name.len();
                    level.names.push(name);
                }
            }
            if entries.is_buffer_empty() {
                break;
            }
        }
        if !level.listing {
            level.names.sort();
        }
        let shown = || if self.path.is_empty() { ".".to_owned() } else { self.path.clone() };
        problem.map_or(Step::More, |problem| Step::Lost(shown(), problem))
    }

    /// Looks at one name of the last level.
    fn look(&mut self, name: &[u8]) -> Step {
        let Some(level) = self.levels.last() else { return Step::End };
        let (wanted, after) = match level.after.split_first() {
            Some((first, _)) if name < first.as_bytes() => return Step::More,
            Some((first, rest)) if name == first.as_bytes() => (false, rest.to_vec()),
            _ => (true, Vec::new()),
        };
        let text = std::str::from_utf8(name).ok().filter(|text| !text.chars().any(char::is_control));
        let shown = text.map_or_else(|| String::from_utf8_lossy(name), Into::into);
        let places = self.globs.enter(&level.places, &shown);
        let matched = wanted && self.globs.is_match(&places);
        let below = self.globs.may_match_below(&places);
        if !matched && !below {
            return Step::More;
        }
        if !self.path.is_empty() {
            self.path.push('/');
        }
        self.path.push_str(&shown);
        let odd = |walk: &Self, reason| if matched { Step::Odd(walk.path.clone(), reason) } else { Step::More };
        let lost = |walk: &Self, reason| Step::Lost(walk.path.clone(), reason);
        let stat = match fs::statat(&level.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return odd(self, GONE),
            Err(_) => return lost(self, "it cannot be looked at"),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_wanted = kind == FileType::Directory || kind == FileType::RegularFile && matched;
        if is_wanted && text.is_none() {
            return lost(self, "its name is not UTF-8, or has control characters");
        }
        if is_wanted && self.path.len() > MAX_ARCHIVE_PATH_BYTES {
            return lost(self, "its path is too long");
        }
        match kind {
            FileType::Directory => self.look_at_folder(name, (places, below), after, matched, stat),
            FileType::RegularFile if matched => {
                // Looked at first, since opening a device can do things; opened so that a FIFO that took its place
                // since does not block.
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                let opened = fs::openat(&level.folder, name, flags, Mode::empty()).and_then(|fd| {
                    let stat = fs::fstat(&fd)?;
                    Ok((fd, stat))
                });
                match opened {
                    Ok((fd, stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                        Step::File(self.path.clone(), fd, stat)
                    }
                    Ok(_) | Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => odd(self, GONE),
                    Err(_) => lost(self, "it cannot be opened"),
                }
            }
            FileType::RegularFile => Step::More,
            FileType::Symlink => odd(self, "it is a symbolic link"),
            _ => odd(self, "it is no regular file"),
        }
    }

    fn look_at_folder(
        &mut self,
        name: &[u8],
        (places, below): (Places, bool),
        after: Vec<String>,
        matched: bool,
        stat: Stat,
    ) -> Step {
        let found = |walk: &Self| if matched { Step::Folder(walk.path.clone(), stat) } else { Step::More };
        if !below {
            return found(self);
        }
        if self.levels.len() >= MAX_ARCHIVE_DEPTH {
            return Step::Lost(self.path.clone(), "it lies too deep");
        }
        let Some(level) = self.levels.last() else { return Step::End };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(&level.folder, name, flags, Mode::empty()) {
            Ok(folder) => {
                let found = found(self);
                self.descend(folder, places, after);
                found
            }
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) if matched => Step::Odd(self.path.clone(), GONE),
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Step::More,
            Err(_) => Step::Lost(self.path.clone(), "it cannot be opened"),
        }
    }
}

impl Names {
    fn push(&mut self, name: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(name);
        // Far below 4 GiB, see MAX_HELD_BYTES.
        let place = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        self.spans.push((place(start), place(self.bytes.len())));
    }

    fn sort(&mut self) {
        let bytes = &self.bytes;
        self.spans.sort_unstable_by(|a, b| span(bytes, *b).cmp(span(bytes, *a)));
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        self.spans.pop().map(|at| span(&self.bytes, at).to_vec())
    }
}

fn span(bytes: &[u8], (from, to): (u32, u32)) -> &[u8] {
    &bytes[from as usize..to as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workload's own children may still be at work when its outputs are collected.
    #[test]
    fn a_folder_that_vanishes_is_no_loss() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a")).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(root.path(), flags, Mode::empty()).unwrap();
        let mut walk = Walk::new(fd, Globs::parse(["**"].into_iter()).unwrap(), None);
        let mut steps = 0;
        loop {
            match walk.step() {
                Step::Folder(path, _) => {
                    assert_eq!(path, "a");
                    // It is open by now, and not listed yet.
                    std::fs::remove_dir(root.path().join("a")).unwrap();
                }
                Step::More => {}
                Step::End => break,
                other => panic!("{other:?}"),
            }
            steps += 1;
        }
        assert!(steps > 2 && !root.path().join("a").exists());
    }
}

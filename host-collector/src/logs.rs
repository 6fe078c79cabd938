//! A guest's log files on the host: appended live, synced with the journal record that speaks of them.
//!
//! After a crash the journal says how long each file is durably; what lies beyond is cut, and asked for again. A file that
//! is shorter was cut by somebody here: that is said in it, and never filled with zeros.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pika_cloud_common::limits::MAX_LOG_FILES;

use crate::journal::{LogMark, View};

/// The log files of one incarnation.
#[derive(Debug)]
pub(crate) struct LogFiles {
    folder: PathBuf,
    /// Bytes of all files together that are kept (Invariant 5).
    limit: u64,
    kept: u64,
    files: BTreeMap<String, LogFile>,
    dirty: BTreeSet<String>,
    /// Whether files were left out, since there were too many names (Invariant 5).
    too_many: bool,
}

#[derive(Debug, Default)]
struct LogFile {
    /// Open from its first bytes until the commit that has them: no descriptor stays for a file that is quiet.
    file: Option<Arc<File>>,
    mark: LogMark,
    /// Whether it says that it goes on beyond the limit.
    says_full: bool,
}

impl LogFile {
    fn opened(&mut self, folder: &Path, name: &str) -> io::Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(open(&folder.join(name))?);
        File::open(folder)?.sync_all()?;
        Ok(Arc::clone(self.file.insert(file)))
    }
}

/// What changed, for one commit.
pub(crate) struct Dirty {
    /// How far each file is that changed: one of an earlier stream has no place in the present one.
    pub(crate) marks: BTreeMap<String, LogMark>,
    /// Those that changed: to be synced before the marks are.
    pub(crate) files: Vec<Arc<File>>,
}

impl LogFiles {
    /// Goes on where the journal says that they durably are.
    pub(crate) fn open(folder: &Path, limit: u64, view: &View) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        File::open(folder)?.sync_all()?;
        let mut logs = Self {
            folder: folder.to_owned(),
            limit,
            kept: 0,
            files: BTreeMap::new(),
            dirty: BTreeSet::new(),
            too_many: false,
        };
        logs.remove_unknown(view)?;
        // Of an earlier stream the cursor knows no more, and its bytes stay all the same.
        for (name, length) in &view.log_lengths {
            let guest = view.cursor.as_ref().and_then(|cursor| cursor.logs.get(name)).copied().unwrap_or(0);
            logs.recover(name, LogMark { guest, host: *length })?;
        }
        let is_full = logs.kept > limit;
        logs.files.values_mut().for_each(|log| log.says_full = is_full);
        Ok(logs)
    }

    /// Removes files that no record speaks of: an earlier collector died before it could write down what is in them, so that
    /// it is asked for again.
    fn remove_unknown(&self, view: &View) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let is_known = entry.file_name().to_str().is_some_and(|name| view.log_lengths.contains_key(name));
            if !is_known && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Cuts off what is beyond the mark.
    fn recover(&mut self, name: &str, mut mark: LogMark) -> io::Result<()> {
        let path = self.folder.join(name);
        let found = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if found > mark.host {
            OpenOptions::new().write(true).open(&path)?.set_len(mark.host)?;
        }
        if found < mark.host {
            let file = open(&path)?;
            mark.host = found + write(&file, format!("[{} bytes were removed here]\n", mark.host - found).as_bytes())?;
            self.dirty.insert(name.to_owned());
        }
        self.kept += mark.host;
        self.files.insert(name.to_owned(), LogFile { file: None, mark, says_full: false });
        Ok(())
    }

    /// Counts bytes up to `end` of the guest's file as taken, and keeps none of them.
    pub(crate) fn skip(&mut self, name: &str, end: u64) {
        if self.has_place_for(name) {
            self.files.entry(name.to_owned()).or_default().mark.guest = end;
            self.dirty.insert(name.to_owned());
        }
    }

    /// Whether the file is known, or one more may be.
    fn has_place_for(&mut self, name: &str) -> bool {
        let has_place = self.files.len() < MAX_LOG_FILES || self.files.contains_key(name);
        self.too_many |= !has_place;
        has_place
    }

    /// Whether log files were left out.
    pub(crate) fn left_some_out(&self) -> bool {
        self.too_many
    }

    /// Whether no more bytes are kept, so that only how far the guest is has to be written down.
    pub(crate) fn is_full(&self) -> bool {
        self.kept >= self.limit
    }

    /// Takes bytes that stand at `offset` of the guest's file. What is beyond the limit is counted as taken, and not kept.
    pub(crate) fn append(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.has_place_for(name) {
            return Ok(());
        }
        let room = usize::try_from(self.limit.saturating_sub(self.kept)).unwrap_or(usize::MAX);
        let end = offset + bytes.len() as u64;
        let Self { folder, files, .. } = self;
        let log = files.entry(name.to_owned()).or_default();
        let mut kept = 0;
        if room > 0 || !log.says_full {
            let file = log.opened(folder, name)?;
            if offset > log.mark.guest && room > 0 {
                let missing = offset - log.mark.guest;
                kept += write(&file, format!("[{missing} bytes are missing here]\n").as_bytes())?;
            }
            kept += write(&file, &bytes[..bytes.len().min(room)])?;
            if bytes.len() > room && !log.says_full {
                log.says_full = true;
                kept += write(&file, b"\n[the log goes on beyond limits.log_bytes]\n")?;
            }
        }
        log.mark = LogMark { guest: end, host: log.mark.host + kept };
        self.kept += kept;
        self.dirty.insert(name.to_owned());
        Ok(())
    }

    /// Where they are.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there are bytes that no commit has taken.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Bytes on the host, all files together.
    pub(crate) fn bytes(&self) -> u64 {
        self.kept
    }

    /// What changed since this was last asked.
    pub(crate) fn take_dirty(&mut self) -> Option<Dirty> {
        if self.dirty.is_empty() {
            return None;
        }
        let changed = std::mem::take(&mut self.dirty);
        let files = changed.iter().filter_map(|name| self.files.get_mut(name)?.file.take()).collect();
        let marks = changed.into_iter().filter_map(|name| Some((name.clone(), self.files.get(&name)?.mark))).collect();
        Some(Dirty { marks, files })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn write(mut file: &File, bytes: &[u8]) -> io::Result<u64> {
    file.write_all(bytes)?;
    Ok(bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pika_cloud_common::digest::Digest;
    use pika_cloud_common::wire::Cursor;
    use tempfile::TempDir;

    use super::*;

    /// What a journal says of one file.
    fn view(name: &str, mark: LogMark) -> View {
        let logs = BTreeMap::from([(name.to_owned(), mark.guest)]);
        let cursor = Cursor { stream_id: "s".into(), seq: 0, digest: Digest::EMPTY_STREAM, logs };
        let mut view = View::default();
        (view.cursor, view.log_lengths) = (Some(cursor), BTreeMap::from([(name.to_owned(), mark.host)]));
        view
    }

    fn text(folder: &TempDir, name: &str) -> String {
        fs::read_to_string(folder.path().join(name)).unwrap()
    }

    fn marks(logs: &mut LogFiles) -> Vec<(String, u64, u64)> {
        let dirty = logs.take_dirty().map(|dirty| dirty.marks).unwrap_or_default();
        dirty.into_iter().map(|(name, mark)| (name, mark.guest, mark.host)).collect()
    }

    #[test]
    fn bytes_are_appended_and_marked() {
        let folder = TempDir::new().unwrap();
        let mut logs = LogFiles::open(folder.path(), 1000, &View::default()).unwrap();
        assert!(logs.take_dirty().is_none());
        logs.append("a.log", 0, b"one\n").unwrap();
        logs.append("b.log", 0, b"x").unwrap();
        logs.append("a.log", 4, b"two\n").unwrap();
        assert!(logs.is_dirty());
        let dirty = logs.take_dirty().unwrap();
        assert_eq!(dirty.files.len(), 2);
        assert_eq!(dirty.marks["a.log"], LogMark { guest: 8, host: 8 });
        assert_eq!((text(&folder, "a.log").as_str(), logs.bytes()), ("one\ntwo\n", 9));
        logs.append("b.log", 1, b"y").unwrap();
        assert_eq!(marks(&mut logs), [("b.log".to_owned(), 2, 2)], "only what changed");
        assert!(!logs.is_dirty());
    }

    #[test]
    fn what_a_crash_left_beyond_the_mark_is_cut() {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("a.log"), "durable, not durable").unwrap();
        let mut logs = LogFiles::open(folder.path(), 1000, &view("a.log", LogMark { guest: 7, host: 7 })).unwrap();
        assert_eq!((text(&folder, "a.log").as_str(), logs.bytes()), ("durable", 7));
        logs.append("a.log", 7, b"!").unwrap();
        assert_eq!(text(&folder, "a.log"), "durable!");
        assert_eq!(marks(&mut logs), [("a.log".to_owned(), 8, 8)]);
    }

    #[test]
    fn a_file_that_was_cut_or_removed_here_says_so() {
        for left in [Some("dur"), None] {
            let folder = TempDir::new().unwrap();
            if let Some(left) = left {
                fs::write(folder.path().join("a.log"), left).unwrap();
            }
            let mut logs = LogFiles::open(folder.path(), 1000, &view("a.log", LogMark { guest: 9, host: 7 })).unwrap();
            logs.append("a.log", 9, b"more").unwrap();
            let left = left.unwrap_or_default();
            let wanted = format!("{left}[{} bytes were removed here]\nmore", 7 - left.len());
            assert_eq!(text(&folder, "a.log"), wanted);
            assert_eq!(marks(&mut logs), [("a.log".to_owned(), 13, wanted.len() as u64)]);
        }
    }

    /// A guest that booted again begins its logs anew; what came before stays, and its length counts after a crash.
    #[test]
    fn a_new_stream_goes_on_in_the_same_file() {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("a.log"), "first boot\nlost").unwrap();
        let mut known = view("a.log", LogMark { guest: 11, host: 11 });
        if let Some(cursor) = &mut known.cursor {
            cursor.logs.clear();
        }
        let mut logs = LogFiles::open(folder.path(), 1000, &known).unwrap();
        logs.append("a.log", 0, b"second boot\n").unwrap();
        assert_eq!(text(&folder, "a.log"), "first boot\nsecond boot\n");
        assert_eq!(marks(&mut logs), [("a.log".to_owned(), 12, 23)]);
    }

    #[test]
    fn bytes_that_are_missing_are_told_where_they_are() {
        let folder = TempDir::new().unwrap();
        let mut logs = LogFiles::open(folder.path(), 1000, &View::default()).unwrap();
        logs.append("a.log", 0, b"one\n").unwrap();
        logs.append("a.log", 104, b"two\n").unwrap();
        assert_eq!(text(&folder, "a.log"), "one\n[100 bytes are missing here]\ntwo\n");
        assert_eq!(marks(&mut logs), [("a.log".to_owned(), 108, 37)]);
    }

    /// Invariant 5.
    #[test]
    fn all_files_together_stay_within_the_limit() {
        let folder = TempDir::new().unwrap();
        let mut logs = LogFiles::open(folder.path(), 10, &View::default()).unwrap();
        logs.append("a.log", 0, b"0123456789").unwrap();
        assert_eq!(text(&folder, "a.log"), "0123456789", "what fits is not said to go on");
        let full = "\n[the log goes on beyond limits.log_bytes]\n";
        for round in 0..100 {
            logs.append("a.log", 10 + 3 * round, b"abc").unwrap();
            logs.append("b.log", 3 * round, b"abc").unwrap();
        }
        assert_eq!(text(&folder, "a.log"), format!("0123456789{full}"));
        assert_eq!(text(&folder, "b.log"), full);
        let marks = marks(&mut logs);
        assert_eq!((marks[0].1, marks[1].1), (310, 300), "the guest may forget them");
        let mut again = LogFiles::open(folder.path(), 10, &view("a.log", LogMark { guest: 310, host: 53 })).unwrap();
        again.append("a.log", 310, b"abc").unwrap();
        assert_eq!(text(&folder, "a.log"), format!("0123456789{full}"), "said once");
        let mut cut = LogFiles::open(&folder.path().join("cut"), 4, &View::default()).unwrap();
        cut.append("a.log", 0, b"0123456789").unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("cut/a.log")).unwrap(), format!("0123{full}"));
    }

    #[test]
    fn what_is_not_wanted_makes_no_file() {
        let folder = TempDir::new().unwrap();
        let mut logs = LogFiles::open(folder.path(), 10, &View::default()).unwrap();
        logs.skip("a.log", 500);
        assert_eq!(marks(&mut logs), [("a.log".to_owned(), 500, 0)]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

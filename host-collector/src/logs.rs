//! A guest's log files on the host: appended live, synced with the journal record that speaks of them.
//!
//! After a crash the journal says how long each file is durably; what lies beyond is cut, and asked for again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
}

#[derive(Debug)]
struct LogFile {
    /// Opened at the first write: at most as many descriptors as there are files being written.
    file: Option<Arc<File>>,
    mark: LogMark,
}

/// What changed, for one commit.
pub(crate) struct Dirty {
    /// How far every file is.
    pub(crate) marks: BTreeMap<String, LogMark>,
    /// Those that changed: to be synced before the marks are.
    pub(crate) files: Vec<Arc<File>>,
}

impl LogFiles {
    /// Goes on where the journal says that they durably are.
    pub(crate) fn open(folder: &Path, limit: u64, view: &View) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        File::open(folder)?.sync_all()?;
        let mut files = BTreeMap::new();
        for (name, guest) in view.cursor.iter().flat_map(|cursor| &cursor.logs) {
            let mark = LogMark { guest: *guest, host: view.log_lengths.get(name).copied().unwrap_or(0) };
            let file = open(&folder.join(name))?;
            file.set_len(mark.host)?;
            files.insert(name.clone(), LogFile { file: Some(Arc::new(file)), mark });
        }
        let kept = files.values().map(|file| file.mark.host).sum();
        Ok(Self { folder: folder.to_owned(), limit, kept, files, dirty: BTreeSet::new() })
    }

    /// Counts bytes up to `end` of the guest's file as taken, and keeps none of them.
    pub(crate) fn skip(&mut self, name: &str, end: u64) {
        let log = self.files.entry(name.to_owned()).or_insert_with(|| LogFile { file: None, mark: LogMark::default() });
        log.mark.guest = end;
        self.dirty.insert(name.to_owned());
    }

    /// Takes bytes that stand at `offset` of the guest's file. What is beyond the limit is counted as taken, and not kept.
    pub(crate) fn append(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.files.contains_key(name) {
            self.files.insert(name.to_owned(), LogFile { file: None, mark: LogMark::default() });
        }
        let Some(log) = self.files.get_mut(name) else { return Ok(()) };
        let file = if let Some(file) = &log.file {
            Arc::clone(file)
        } else {
            let file = Arc::new(open(&self.folder.join(name))?);
            File::open(&self.folder)?.sync_all()?;
            Arc::clone(log.file.insert(file))
        };
        let room = usize::try_from(self.limit.saturating_sub(self.kept)).unwrap_or(usize::MAX);
        let mut kept = 0;
        if offset > log.mark.guest && room > 0 {
            kept += write(&file, format!("[{} bytes are missing here]\n", offset - log.mark.guest).as_bytes())?;
        }
        kept += write(&file, &bytes[..bytes.len().min(room)])?;
        if kept > 0 && bytes.len() >= room {
            kept += write(&file, b"\n[the log goes on beyond limits.log_bytes]\n")?;
        }
        log.mark = LogMark { guest: offset + bytes.len() as u64, host: log.mark.host + kept };
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

    /// How far every file is, and those files that changed since this was last asked.
    pub(crate) fn take_dirty(&mut self) -> Option<Dirty> {
        if self.dirty.is_empty() {
            return None;
        }
        let changed = std::mem::take(&mut self.dirty);
        let files = changed.iter().filter_map(|name| self.files.get(name)?.file.clone()).collect();
        Some(Dirty { marks: self.files.iter().map(|(name, log)| (name.clone(), log.mark)).collect(), files })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn write(mut file: &File, bytes: &[u8]) -> io::Result<u64> {
    file.write_all(bytes)?;
    Ok(bytes.len() as u64)
}

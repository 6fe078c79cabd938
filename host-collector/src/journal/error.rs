//! Why a journal cannot be opened, read or written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::VERSION;

/// A journal cannot be opened or written.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file system refused.
    #[error("{}: {doing}: {source}{}", path.display(), way_out(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel says.
        source: Arc<io::Error>,
    },
    /// Another release wrote it.
    #[error(
        "{}: the journal has version {found}, this build reads {VERSION}: use the release that wrote it, or another --state-dir",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that it names.
        found: u32,
    },
    /// Another runtime's, in this one's folder.
    #[error(
        "{}: the journal is of runtime `{found}`, and its folder is of `{wanted}`: give the folder its own name back",
        path.display()
    )]
    OtherRuntime {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose folder it is in.
        wanted: String,
    },
    /// The line that all others rest on is damaged, or the file before it is gone, and there is more than a crash at the very
    /// beginning leaves.
    #[error(
        "{}: this file's first line is damaged, or the journal's file before it is missing, so nothing in it can be relied \
         on: check the disk, then bring the journal's files back from a backup, or move the runtime's folder away",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A whole line whose content does not fit its place.
    #[error(
        "{}: line {line} is intact and yet no record of this journal: it was edited, or is of a newer release",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Counts from 1.
        line: u64,
    },
    /// What was to be written is not durable, here or in a new segment: nothing more is taken.
    #[error(
        "{}: {source}: the journal cannot be written, so that nothing more is acknowledged or destroyed: free some space on \
         that disk, or mend it, then run the same command again",
        path.display()
    )]
    Degraded {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: Arc<io::Error>,
    },
}

impl JournalError {
    /// The file system refused what was being done.
    pub(super) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source: Arc::new(source) }
    }
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space there, then run the same command again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ": name a writable folder with --state-dir"
        }
        _ => "",
    }
}

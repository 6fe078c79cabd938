//! Writing a guest's artifacts to the host: regular files and folders below one folder, whatever the guest sends.
//!
//! They are gathered in `artifacts.partial/`, and take the name `artifacts/` only when the archive is over: a reader
//! never sees half of a file under its own name. Beside them lies `artifacts.sha256` in the form that `sha256sum -c` reads.
//! No name is resolved through a link or out of the folder (`openat2` with `BENEATH` and `NO_SYMLINKS`), no link is ever
//! made, an existing file is never opened again, and every count is bounded by the spec: entries and bytes as they were
//! asked for, and beside them as many folders that were not named and are needed for what was.
//!
//! What ends with another digest than it was announced with, or does not end, is removed. Nothing is opened by a path from
//! the root: a path below `artifacts/` may be as long as the kernel takes by itself.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{ArchiveLimits, Entry};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use sha2::{Digest as _, Sha256};

use crate::state_dir::{is_our_temporary, temporaries_beside, temporary_beside};

/// The archive cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArtifactError {
    /// The host's file system refused.
    #[error("{path}: {doing}: {source}{}", way_out(source))]
    Io {
        /// Below `artifacts/`.
        path: String,
        /// What was tried.
        doing: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// The guest sent what is no archive.
    #[error("{path}: {problem}")]
    Guest {
        /// Below `artifacts/`.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn way_out(error: &io::Error) -> &'static str {
    if is_full(error) { ": free some space in the state dir" } else { "" }
}

/// Below this an earlier try is removed before the next one begins.
const TIGHT_BYTES: u64 = 16 * 1024 * 1024;
const TIGHT_FILES: u64 = 1024;

/// Whether there is hardly room for anything more.
fn is_tight(folder: &Path) -> bool {
    // Some file systems have no fixed number of files, and say 0 of 0.
    rustix::fs::statvfs(folder).is_ok_and(|found| {
        found.f_bavail.saturating_mul(found.f_frsize) < TIGHT_BYTES
            || (found.f_files > 0 && found.f_favail < TIGHT_FILES)
    })
}

/// Where a tree is gathered.
const PARTIAL: &str = "artifacts.partial";

/// The digests of its files.
const LIST: &str = "artifacts.sha256";

/// The paths of one archive in all, which bounds `artifacts.sha256` for those who hold it in memory (Invariant 5). Entries whose
/// paths are beyond that are left out, and that is told.
const MAX_PATHS_BYTES: usize = 256 * 1024 * 1024;

/// A tree of artifacts that is being received.
#[derive(Debug)]
pub(crate) struct ArtifactTree {
    partial: PathBuf,
    folder: OwnedFd,
    limits: ArchiveLimits,
    current: Option<CurrentFile>,
    manifest: Manifest,
    /// Files and folders that the guest named.
    entries: u64,
    /// Bytes of their paths.
    path_bytes: usize,
    /// Folders that were made.
    folders: u64,
    /// Bytes that came.
    received: u64,
    /// Files that ended well, and their bytes.
    files: u64,
    bytes: u64,
}

#[derive(Debug)]
struct CurrentFile {
    path: String,
    file: File,
    hasher: Sha256,
    offset: u64,
    /// Bytes of the chunk that are still to come.
    chunk_left: u64,
    digest: Option<Digest>,
}

impl ArtifactTree {
    /// Begins anew in `<folder>/artifacts.partial/`. An earlier try is out of the way at once. It is still on the disk, where
    /// there is room for both: removing what a guest filled may take a while, and is for [`ArtifactTree::remove_abandoned`].
    ///
    /// # Errors
    /// Where it cannot be made.
    pub(crate) fn begin(folder: &Path, limits: ArchiveLimits) -> Result<Self, ArtifactError> {
        let partial = folder.join(PARTIAL);
        match fs::rename(&partial, temporary_beside(&partial)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ArtifactError::Io {
                    path: PARTIAL.to_owned(),
                    doing: "putting an earlier try aside",
                    source,
                });
            }
            _ => {}
        }
        // It may be the earlier try that takes up the room.
        if is_tight(folder) {
            Self::remove_abandoned(folder);
        }
        match Self::make(folder, partial.clone(), limits) {
            // A quota, for one, is not seen before.
            Err(ArtifactError::Io { source, .. }) if is_full(&source) => {
                Self::remove_abandoned(folder);
                Self::make(folder, partial, limits)
            }
            made => made,
        }
    }

    fn make(folder: &Path, partial: PathBuf, limits: ArchiveLimits) -> Result<Self, ArtifactError> {
        let io = |doing| move |source: io::Error| ArtifactError::Io { path: PARTIAL.to_owned(), doing, source };
        fs::create_dir_all(&partial).map_err(io("making the folder"))?;
        let manifest = Manifest::begin(folder.join(LIST)).map_err(io("beginning artifacts.sha256"))?;
        let folder =
            rustix::fs::open(&partial, FOLDER, Mode::empty()).map_err(|e| io("opening the folder")(e.into()))?;
        Ok(Self {
            partial,
            folder,
            limits,
            current: None,
            manifest,
            entries: 0,
            path_bytes: 0,
            folders: 0,
            received: 0,
            files: 0,
            bytes: 0,
        })
    }

    /// Removes the tries that were put aside, this process's and those of one that died meanwhile. Best effort: what stays
    /// goes with the next try, or with the folder. The caller's process holds the runtime's lock: a list of another one is dead.
    pub(crate) fn remove_abandoned(folder: &Path) {
        for aside in temporaries_beside(&folder.join(PARTIAL)) {
            let _ = fs::remove_dir_all(aside);
        }
        for list in temporaries_beside(&folder.join(LIST)).filter(|list| !is_our_temporary(list)) {
            let _ = fs::remove_file(list);
        }
    }

    /// The folder in which it was begun.
    pub(crate) fn folder(&self) -> PathBuf {
        self.partial.parent().unwrap_or(Path::new("/")).to_owned()
    }

    /// Files that are whole.
    pub(crate) fn files(&self) -> u64 {
        self.files
    }

    /// Their bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A folder, a file, or a file's next chunk. Its path was checked to be of plain components.
    ///
    /// # Errors
    /// Where it does not fit what came before it, is beyond the limits, or the host refuses.
    pub(crate) fn entry(&mut self, entry: &Entry) -> Result<(), ArtifactError> {
        let wrong = |problem| Err(ArtifactError::Guest { path: entry.path.clone(), problem });
        if self.received.saturating_add(entry.len) > self.limits.max_bytes {
            return wrong("the archive is larger than was asked for");
        }
        let goes_on = match &self.current {
            Some(current) if current.path == entry.path && !entry.folder => true,
            Some(_) => return wrong("the file before it has not ended"),
            None => false,
        };
        if !goes_on {
            self.entries += 1;
            if self.entries > self.limits.max_files {
                return wrong("the archive has more files than were asked for");
            }
            self.path_bytes += entry.path.len();
            if self.path_bytes > MAX_PATHS_BYTES {
                return wrong(
                    "the archive's paths are longer than 256 MiB in all: ask for fewer by narrower artifact_globs",
                );
            }
        }
        if entry.folder {
            return self.make_folders(&entry.path);
        }
        if !goes_on {
            self.current = Some(self.create(entry)?);
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        if entry.offset != current.offset {
            return wrong("a chunk leaves a hole");
        }
        current.chunk_left = entry.len;
        current.digest = entry.digest;
        self.end_chunk()
    }

    /// The next bytes of the entry's chunk.
    ///
    /// # Errors
    /// Where the host cannot write them, or they do not have the digest that was announced.
    pub(crate) fn bytes_of_entry(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let Some(current) = &mut self.current else {
            return Err(ArtifactError::Guest { path: String::new(), problem: "bytes of no file" });
        };
        current.file.write_all(bytes).map_err(|source| ArtifactError::Io {
            path: current.path.clone(),
            doing: "writing",
            source,
        })?;
        current.hasher.update(bytes);
        current.offset += bytes.len() as u64;
        current.chunk_left = current.chunk_left.saturating_sub(bytes.len() as u64);
        self.received += bytes.len() as u64;
        self.end_chunk()
    }

    /// Ends the file where its last chunk is whole.
    fn end_chunk(&mut self) -> Result<(), ArtifactError> {
        let Some(current) = self.current.take_if(|current| current.chunk_left == 0 && current.digest.is_some()) else {
            return Ok(());
        };
        let found = Digest(current.hasher.finalize().into());
        if current.digest != Some(found) {
            self.remove(&current.path)?;
            return Err(ArtifactError::Guest { path: current.path, problem: "its bytes do not have its digest" });
        }
        self.files += 1;
        self.bytes += current.offset;
        self.manifest.add(&current.path, found).map_err(|source| ArtifactError::Io {
            path: "artifacts.sha256".to_owned(),
            doing: "writing",
            source,
        })
    }

    fn create(&mut self, entry: &Entry) -> Result<CurrentFile, ArtifactError> {
        if let Some((parent, _)) = entry.path.rsplit_once('/') {
            self.make_folders(parent)?;
        }
        // What the guest calls executable stays so for the owner; nothing else of its mode counts here.
        let mode = if entry.mode & 0o100 == 0 { 0o600 } else { 0o700 };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match self.open_beneath(&entry.path, flags, Mode::from_raw_mode(mode)) {
            Err(ArtifactError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                return Err(ArtifactError::Guest { path: entry.path.clone(), problem: "it comes twice" });
            }
            file => file?,
        };
        Ok(CurrentFile {
            path: entry.path.clone(),
            file: File::from(file),
            hasher: Sha256::new(),
            offset: 0,
            chunk_left: 0,
            digest: None,
        })
    }

    /// Makes a folder with its parents.
    fn make_folders(&mut self, path: &str) -> Result<(), ArtifactError> {
        // Mostly it is there: the guest sends a folder's files one after another.
        if self.open_beneath(path, FOLDER, Mode::empty()).is_ok() {
            return Ok(());
        }
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            self.make_folder(&path[..end])?;
        }
        Ok(())
    }

    fn make_folder(&mut self, path: &str) -> Result<(), ArtifactError> {
        let wrong = |problem| Err(ArtifactError::Guest { path: path.to_owned(), problem });
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = self.open_beneath(parent, FOLDER, Mode::empty())?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                self.folders += 1;
                if self.folders > self.limits.max_files.saturating_mul(2) {
                    return wrong("the archive has more folders than were asked for");
                }
                Ok(())
            }
            Err(rustix::io::Errno::EXIST) => match self.open_beneath(path, FOLDER, Mode::empty()) {
                Err(ArtifactError::Io { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => {
                    wrong("it is a file and a folder")
                }
                folder => folder.map(drop),
            },
            Err(error) => {
                Err(ArtifactError::Io { path: path.to_owned(), doing: "making the folder", source: error.into() })
            }
        }
    }

    fn remove(&self, path: &str) -> Result<(), ArtifactError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = self.open_beneath(parent, FOLDER, Mode::empty())?;
        rustix::fs::unlinkat(&parent, name, AtFlags::empty()).map_err(|error| ArtifactError::Io {
            path: path.to_owned(),
            doing: "removing an unfinished file",
            source: error.into(),
        })
    }

    fn open_beneath(&self, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, ArtifactError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.folder, path, flags, mode, resolve).map_err(|error| ArtifactError::Io {
            path: path.to_owned(),
            doing: "opening",
            source: error.into(),
        })
    }

    /// The file whose end has not come.
    pub(crate) fn unended(&self) -> Option<&str> {
        self.current.as_ref().map(|current| current.path.as_str())
    }

    /// Gives the tree its name, in place of an earlier one, durably. A file that has not ended is left out.
    ///
    /// # Errors
    /// Where the host refuses.
    pub(crate) fn finish(mut self) -> Result<(), ArtifactError> {
        let io = |doing| move |source: io::Error| ArtifactError::Io { path: "artifacts".to_owned(), doing, source };
        if let Some(current) = &self.current {
            self.remove(&current.path)?;
        }
        let folder = self.folder();
        let artifacts = folder.join("artifacts");
        match fs::remove_dir_all(&artifacts) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("removing an earlier tree")(error)),
            _ => {}
        }
        // One sync for the whole tree: a sync for each file would make a guest with many small ones wait for the disk.
        if self.entries > 0 {
            File::open(&self.partial).and_then(|folder| Ok(rustix::fs::syncfs(folder)?)).map_err(io("syncing"))?;
        }
        fs::rename(&self.partial, &artifacts).map_err(io("naming the folder"))?;
        self.manifest.finish().and_then(|()| File::open(folder)?.sync_all()).map_err(io("writing artifacts.sha256"))
    }
}

/// The list of digests. It goes to the disk as it grows, since a guest may have a million names of 4 KB (Invariant 5), and takes
/// the place of an earlier one when it is whole.
#[derive(Debug)]
struct Manifest {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl Manifest {
    fn begin(path: PathBuf) -> io::Result<Self> {
        let temporary = temporary_beside(&path);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        Ok(Self { path, temporary, file: BufWriter::new(file) })
    }

    fn add(&mut self, path: &str, digest: Digest) -> io::Result<()> {
        // sha256sum's own escape: a backslash before the line says that backslashes in it are doubled.
        let escape = if path.contains('\\') { "\\" } else { "" };
        let path = path.replace('\\', "\\\\");
        writeln!(self.file, "{escape}{digest}  artifacts/{path}")
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_data()?;
        fs::rename(&self.temporary, &self.path)
    }
}

impl Drop for Manifest {
    fn drop(&mut self) {
        // After the rename there is nothing of that name.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// How a folder is opened to work below it.
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

#[cfg(test)]
mod tests;

//! Writing a guest's artifacts to the host: regular files and folders below one folder, whatever the guest sends.
//!
//! They are gathered in `artifacts.partial/`, and take the name `artifacts/` only when the archive is over: a reader
//! never sees half of a file under its own name. Beside them lies `artifacts.sha256` in the form that `sha256sum -c` reads.
//! No name is resolved through a link or out of the folder (`openat2` with `BENEATH` and `NO_SYMLINKS`), no link is ever
//! made, an existing file is never opened again, and every count is bounded by the spec.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{ArchiveLimits, Entry};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use sha2::{Digest as _, Sha256};

/// The archive cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArtifactError {
    /// The host's file system refused.
    #[error("{path}: {doing}: {source}")]
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

/// A tree of artifacts that is being received.
#[derive(Debug)]
pub(crate) struct ArtifactTree {
    partial: PathBuf,
    folder: OwnedFd,
    limits: ArchiveLimits,
    current: Option<CurrentFile>,
    manifest: String,
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
    /// Begins anew in `<folder>/artifacts.partial/`.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub(crate) fn begin(folder: &Path, limits: ArchiveLimits) -> Result<Self, ArtifactError> {
        let partial = folder.join("artifacts.partial");
        let io =
            |doing| move |source: io::Error| ArtifactError::Io { path: "artifacts.partial".to_owned(), doing, source };
        match fs::remove_dir_all(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("removing an earlier try")(error)),
            _ => {}
        }
        fs::create_dir_all(&partial).map_err(io("making the folder"))?;
        let folder = rustix::fs::open(&partial, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| io("opening the folder")(e.into()))?;
        Ok(Self { partial, folder, limits, current: None, manifest: String::new(), files: 0, bytes: 0 })
    }

    /// Files and folders received.
    pub(crate) fn files(&self) -> u64 {
        self.files
    }

    /// Bytes received.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A folder, a file, or a file's next chunk. Its path was checked to be of plain components.
    ///
    /// # Errors
    /// Where it does not fit what came before it, is beyond the limits, or the host refuses.
    pub(crate) fn entry(&mut self, entry: &Entry) -> Result<(), ArtifactError> {
        let wrong = |problem| Err(ArtifactError::Guest { path: entry.path.clone(), problem });
        if self.bytes.saturating_add(entry.len) > self.limits.max_bytes {
            return wrong("the archive is larger than was asked for");
        }
        let goes_on = self.current.as_ref().is_some_and(|current| current.path == entry.path);
        if self.current.is_some() && !goes_on {
            return wrong("a file begins before the last one has ended");
        }
        if !goes_on {
            self.files += 1;
            if self.files > self.limits.max_files {
                return wrong("the archive has more files than were asked for");
            }
        }
        if entry.folder {
            return if goes_on { wrong("a file became a folder") } else { self.make_folders(&entry.path) };
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
        self.bytes += bytes.len() as u64;
        self.end_chunk()
    }

    /// Ends the file where its last chunk is whole.
    fn end_chunk(&mut self) -> Result<(), ArtifactError> {
        let Some(current) = self.current.take_if(|current| current.chunk_left == 0 && current.digest.is_some()) else {
            return Ok(());
        };
        let found = Digest(current.hasher.finalize().into());
        if current.digest != Some(found) {
            return Err(ArtifactError::Guest { path: current.path, problem: "its bytes do not have its digest" });
        }
        current.file.sync_data().map_err(|source| ArtifactError::Io {
            path: current.path.clone(),
            doing: "syncing",
            source,
        })?;
        // sha256sum's own escape: a backslash before the line says that backslashes in it are doubled.
        let escape = if current.path.contains('\\') { "\\" } else { "" };
        let path = current.path.replace('\\', "\\\\");
        // Writing to a String cannot fail.
        let _ = writeln!(self.manifest, "{escape}{found}  artifacts/{path}");
        Ok(())
    }

    fn create(&self, entry: &Entry) -> Result<CurrentFile, ArtifactError> {
        if let Some((parent, _)) = entry.path.rsplit_once('/') {
            self.make_folders(parent)?;
        }
        // What the guest calls executable stays so for the owner; nothing else of its mode counts here.
        let mode = if entry.mode & 0o100 == 0 { 0o600 } else { 0o700 };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = self.open_beneath(&entry.path, flags, Mode::from_raw_mode(mode))?;
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
    fn make_folders(&self, path: &str) -> Result<(), ArtifactError> {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            let (parent, name) = path[..end].rsplit_once('/').unwrap_or((".", &path[..end]));
            let parent =
                self.open_beneath(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => {
                    let source = error.into();
                    return Err(ArtifactError::Io { path: path[..end].to_owned(), doing: "making the folder", source });
                }
            }
        }
        Ok(())
    }

    fn open_beneath(&self, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, ArtifactError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.folder, path, flags, mode, resolve).map_err(|error| ArtifactError::Io {
            path: path.to_owned(),
            doing: "opening",
            source: error.into(),
        })
    }

    /// Gives the tree its name, in place of an earlier one, durably. A file that has not ended is left out.
    ///
    /// # Errors
    /// Where the host refuses.
    pub(crate) fn finish(self) -> Result<(), ArtifactError> {
        let io = |doing| move |source: io::Error| ArtifactError::Io { path: "artifacts".to_owned(), doing, source };
        if let Some(current) = &self.current {
            fs::remove_file(self.partial.join(&current.path)).map_err(io("removing an unfinished file"))?;
        }
        let folder = self.partial.parent().unwrap_or(Path::new("/"));
        let artifacts = folder.join("artifacts");
        match fs::remove_dir_all(&artifacts) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("removing an earlier tree")(error)),
            _ => {}
        }
        sync_folders(&self.partial).map_err(io("syncing"))?;
        fs::rename(&self.partial, &artifacts).map_err(io("naming the folder"))?;
        let manifest = folder.join("artifacts.sha256");
        crate::state_dir::replace(&manifest, self.manifest.as_bytes())
            .and_then(|()| crate::state_dir::sync_folder(folder))
            .map_err(|error| io("writing artifacts.sha256")(io::Error::other(error)))
    }
}

/// Makes the names in a tree of folders durable.
fn sync_folders(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    File::open(folder)?.sync_all()
}

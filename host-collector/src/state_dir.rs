//! Where the collector keeps what it knows.
//!
//! ```text
//! <state_dir>/id                       who owns the instances made from here
//! <state_dir>/<runtime_id>/lock        held by the one collector that drives the runtime
//!                         /spec.json   the spec, secrets redacted
//!                         /journal.jsonl
//!                         /cancel      asks whoever drives it to end it
//!                         /<incarnation>/events.jsonl, status.json, result.json, verdict.json   derived from the journal
//!                                       /logs/, artifacts/, artifacts.sha256                    the guest's outputs
//! ```
//!
//! All of it is for its owner's eyes only: folders are 0700, files 0600.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use fs2::FileExt as _;
use pika_cloud_common::RuntimeSpec;

/// Below this much free space nothing new is begun: a verdict must always find room.
const MIN_FREE_BYTES: u64 = 16 * 1024 * 1024;

/// The state dir cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// The file system refused.
    #[error("{}: {doing}: {source}{}", path.display(), way_out(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// Too little space for a run.
    #[error(
        "{}: only {free} bytes are free, a run needs at least {MIN_FREE_BYTES}: free some, or name another folder with \
         --state-dir",
        path.display()
    )]
    Full {
        /// The state dir.
        path: PathBuf,
        /// What is free.
        free: u64,
    },
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory => {
            ": name a writable folder with --state-dir"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space there, or name another folder with --state-dir"
        }
        _ => "",
    }
}

fn fail(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> StateDirError {
    let path = path.to_owned();
    move |source| StateDirError::Io { path, doing, source }
}

/// A collector's state dir.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    owner: String,
}

impl StateDir {
    /// Opens the folder, or makes it, and checks that a run would find room.
    ///
    /// # Errors
    /// Where it cannot be made, read or written, or is full.
    pub(crate) fn open(path: &Path) -> Result<Self, StateDirError> {
        make_folder(path)?;
        let stat = rustix::fs::statvfs(path).map_err(|e| fail(path, "reading its free space")(e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < MIN_FREE_BYTES {
            return Err(StateDirError::Full { path: path.to_owned(), free });
        }
        let owner = owner_id(path)?;
        Ok(Self { path: path.to_owned(), owner })
    }

    /// The id that instances made from here are marked with.
    pub(crate) fn owner(&self) -> &str {
        &self.owner
    }

    /// The folder of a runtime, whether it exists or not.
    pub(crate) fn runtime(&self, runtime_id: &str) -> RuntimeFolder {
        RuntimeFolder { path: self.path.join(runtime_id) }
    }

    /// Every runtime that has a folder here, by name.
    ///
    /// # Errors
    /// Where the folder cannot be read.
    pub(crate) fn runtimes(&self) -> Result<Vec<String>, StateDirError> {
        let entries = fs::read_dir(&self.path).map_err(fail(&self.path, "listing runtimes"))?;
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("spec.json").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }
}

/// Reads the owner's id, or makes one. Two that make one at once agree on whose rename won.
fn owner_id(folder: &Path) -> Result<String, StateDirError> {
    let path = folder.join("id");
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(&path, "reading the owner's id")(error)),
    }
    let id = random_hex().map_err(fail(&path, "drawing a random id"))?;
    let temporary = folder.join(format!("id.{id}"));
    write_new(&temporary, id.as_bytes())?;
    // A link fails where another collector was first, and replaces nothing.
    let linked = fs::hard_link(&temporary, &path);
    fs::remove_file(&temporary).map_err(fail(&temporary, "removing a temporary file"))?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(fail(&path, "writing the owner's id")(error)),
        _ => {
            sync_folder(folder)?;
            let id = fs::read_to_string(&path).map_err(fail(&path, "reading the owner's id"))?;
            Ok(id.trim().to_owned())
        }
    }
}

/// 128 random bits.
fn random_hex() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// The folder of one runtime.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeFolder {
    path: PathBuf,
}

impl RuntimeFolder {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a run was ever begun in it.
    pub(crate) fn exists(&self) -> bool {
        self.spec_path().exists()
    }

    /// Makes it, durably, with its parent: Incus is asked for nothing before that.
    pub(crate) fn make(&self) -> Result<(), StateDirError> {
        make_folder(&self.path)?;
        sync_folder(&self.path)?;
        self.path.parent().map_or(Ok(()), sync_folder)
    }

    /// Takes the lock, or says who has it (Invariant 6).
    pub(crate) fn lock(&self) -> Result<Result<RuntimeLock, Option<u32>>, StateDirError> {
        let path = self.path.join("lock");
        let doing = "locking the runtime";
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail(&path, doing))?;
        match file.try_lock_exclusive() {
            Ok(()) => {
                file.set_len(0).map_err(fail(&path, doing))?;
                file.write_all(std::process::id().to_string().as_bytes()).map_err(fail(&path, doing))?;
                Ok(Ok(RuntimeLock { _file: file }))
            }
            Err(error) if error.raw_os_error() == fs2::lock_contended_error().raw_os_error() => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                Ok(Err(holder.trim().parse().ok()))
            }
            Err(error) => Err(fail(&path, doing)(error)),
        }
    }

    fn spec_path(&self) -> PathBuf {
        self.path.join("spec.json")
    }

    /// The spec that the runtime was last run with, its secrets redacted.
    pub(crate) fn read_spec(&self) -> Option<RuntimeSpec> {
        serde_json::from_slice(&fs::read(self.spec_path()).ok()?).ok()
    }

    /// Writes the spec, its secrets redacted.
    pub(crate) fn write_spec(&self, spec: &RuntimeSpec) -> Result<(), StateDirError> {
        let text = serde_json::to_vec_pretty(&spec.redacted())
            .map_err(|e| fail(&self.spec_path(), "writing the spec")(e.into()))?;
        replace(&self.spec_path(), &text)
    }

    fn cancel_path(&self) -> PathBuf {
        self.path.join("cancel")
    }

    /// Asks whoever drives the runtime to end it.
    pub(crate) fn request_cancel(&self) -> Result<(), StateDirError> {
        replace(&self.cancel_path(), b"")
    }

    /// Whether somebody asked for its end.
    pub(crate) fn cancel_requested(&self) -> bool {
        self.cancel_path().exists()
    }

    /// Forgets an earlier request for its end.
    pub(crate) fn clear_cancel(&self) {
        let _ = fs::remove_file(self.cancel_path());
    }

    /// The folder of an incarnation's outputs.
    pub(crate) fn incarnation(&self, incarnation: u32) -> PathBuf {
        self.path.join(incarnation.to_string())
    }
}

/// Held while a collector drives a runtime; the kernel lets it go however the collector ends.
#[derive(Debug)]
pub(crate) struct RuntimeLock {
    _file: File,
}

/// Makes a folder that only its owner can read, with its parents.
pub(crate) fn make_folder(path: &Path) -> Result<(), StateDirError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail(path, "making the folder"))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), StateDirError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(fail(path, "syncing the folder"))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), StateDirError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(fail(path, "making the file"))?;
    file.write_all(bytes).map_err(fail(path, "writing the file"))?;
    file.sync_data().map_err(fail(path, "syncing the file"))
}

/// Replaces a file's content; a reader finds the old or the new, never a part.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StateDirError> {
    let temporary = path.with_extension("new");
    write_new(&temporary, bytes)?;
    fs::rename(&temporary, path).map_err(fail(path, "replacing the file"))
}

//! What a bake writes down before it asks Incus for anything, so that whoever comes after its death finds what it left.
//!
//! ```text
//!   <state_dir>/.bakes/<bake>/lock         held for as long as the bake lives; the kernel lets it go however that ends
//!                            /record.json  replaced as a whole: a reader finds the old or the new
//! ```
//!
//! | written | before |
//! |---|---|
//! | the folder, the lock, the record | the builder is created |
//! | `publishing` | an image is asked for |
//! | `operation` | that is waited for |
//! | `replaced` | the alias is moved away from that image |
//! | nothing: the folder goes | all that it names is gone, or has an alias |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::incus::{builder_name, is_bake_id};
use crate::state_dir::{RuntimeFolder, RuntimeLock, StateDir, StateDirError, replace, sync_folder};

/// How often another id is drawn where a reconciliation is just looking at the new folder.
const TRIES: u32 = 5;

/// A bake, as far as it came.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Record {
    /// Its id.
    pub(crate) bake: String,
    /// Of image and builder.
    pub(crate) project: String,
    /// The alias that it is for.
    pub(crate) to: String,
    /// Whether an image was, or was about to be, asked for.
    #[serde(default)]
    pub(crate) publishing: bool,
    /// The path of the operation that makes it, once Incus named one.
    #[serde(default)]
    pub(crate) operation: Option<String>,
    /// Images whose place it took, or was about to take: they are ours.
    #[serde(default)]
    pub(crate) replaced: Vec<String>,
}

impl Record {
    /// The name of its builder.
    pub(crate) fn builder(&self) -> String {
        builder_name(&self.bake)
    }
}

/// A record under its lock.
#[derive(Debug)]
pub(crate) struct Held {
    folder: RuntimeFolder,
    record: Record,
    _lock: RuntimeLock,
}

fn bakes_path(state: &StateDir) -> PathBuf {
    state.path().join(".bakes")
}

fn record_path(folder: &RuntimeFolder) -> PathBuf {
    folder.path().join("record.json")
}

fn read(folder: &RuntimeFolder) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(record_path(folder)).ok()?).ok()?;
    // The folder's name is what it is found by.
    (folder.path().file_name()? == record.bake.as_str()).then_some(record)
}

/// Every bake that is written down, by its id, whether it lives or not.
pub(crate) fn list(state: &StateDir) -> Vec<String> {
    let entries = fs::read_dir(bakes_path(state)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_written = |name: &String| is_bake_id(name) && bakes_path(state).join(name).join("record.json").exists();
    let mut names: Vec<String> = names.filter(is_written).collect();
    names.sort_unstable();
    names
}

/// What is written of a bake, and whether it lives; `None` where that cannot be read.
pub(crate) fn look(state: &StateDir, bake: &str) -> Option<(Record, bool)> {
    let folder = RuntimeFolder::new(&bakes_path(state), bake);
    // It is only looked: to try the lock would be to hold it.
    Some((read(&folder)?, folder.driver().is_some()))
}

/// Whether somebody is at a bake, whatever is written of it.
pub(crate) fn lives(state: &StateDir, bake: &str) -> bool {
    RuntimeFolder::new(&bakes_path(state), bake).driver().is_some()
}

impl Held {
    /// Writes a new bake down, durably, and holds it.
    pub(crate) fn begin(state: &StateDir, project: &str, to: &str) -> Result<Self, StateDirError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let bake = state.random_id()?;
            let folder = RuntimeFolder::new(&bakes_path(state), &bake);
            folder.make_for_lock()?;
            sync_folder(state.path())?;
            let record = Record {
                bake,
                project: project.to_owned(),
                to: to.to_owned(),
                publishing: false,
                operation: None,
                replaced: Vec::new(),
            };
            match folder.lock()? {
                Err(_) if tries < TRIES => {}
                Err(_) => return Err(busy(folder.path())),
                Ok(lock) => {
                    let held = Self { folder, record, _lock: lock };
                    held.write()?;
                    return Ok(held);
                }
            }
        }
    }

    /// Takes up what a dead bake wrote down; `None` where it lives, or is gone.
    pub(crate) fn take(state: &StateDir, bake: &str) -> Result<Option<Self>, StateDirError> {
        let folder = RuntimeFolder::new(&bakes_path(state), bake);
        if !record_path(&folder).exists() {
            return Ok(None);
        }
        let lock = match folder.lock() {
            Ok(Ok(lock)) => lock,
            Ok(Err(_)) => return Ok(None),
            Err(StateDirError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Under the lock: it may have been another's until now.
        Ok(read(&folder).map(|record| Self { folder, record, _lock: lock }))
    }

    /// As far as it came.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// That an image is asked for, or by which operation it is made.
    pub(crate) fn publishing(&mut self, operation: Option<String>) -> Result<(), StateDirError> {
        self.record.publishing = true;
        self.record.operation = operation;
        self.write()
    }

    /// That an image of ours loses its place.
    pub(crate) fn replaces(&mut self, fingerprint: &str) -> Result<(), StateDirError> {
        if !self.record.replaced.iter().any(|known| known == fingerprint) {
            self.record.replaced.push(fingerprint.to_owned());
        }
        self.write()
    }

    fn write(&self) -> Result<(), StateDirError> {
        // A record is serializable.
        let text = serde_json::to_vec(&self.record).unwrap_or_default();
        replace(&record_path(&self.folder), &text)?;
        sync_folder(self.folder.path())
    }

    /// Nothing of it is left: the folder goes.
    pub(crate) fn forget(self) -> Result<(), StateDirError> {
        match fs::remove_dir_all(self.folder.path()) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                let path = self.folder.path().to_owned();
                Err(StateDirError::Io { path, doing: "removing the record of a bake", source })
            }
            _ => Ok(()),
        }
    }
}

fn busy(path: &Path) -> StateDirError {
    let source = io::Error::from(io::ErrorKind::ResourceBusy);
    StateDirError::Io { path: path.to_owned(), doing: "locking the record of a bake", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bake_is_held_while_it_lives_and_found_when_it_died() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let mut held = Held::begin(&state, "default", "ci").unwrap();
        let bake = held.record().bake.clone();
        assert_eq!(list(&state), std::slice::from_ref(&bake));
        assert!(Held::take(&state, &bake).unwrap().is_none(), "it lives");
        held.publishing(None).unwrap();
        held.publishing(Some("/1.0/operations/x".to_owned())).unwrap();
        held.replaces("f00").unwrap();
        held.replaces("f00").unwrap();
        drop(held);
        let found = Held::take(&state, &bake).unwrap().unwrap();
        let Record { publishing, operation, replaced, .. } = found.record().clone();
        assert_eq!(
            (publishing, operation.as_deref(), replaced),
            (true, Some("/1.0/operations/x"), vec!["f00".to_owned()])
        );
        found.forget().unwrap();
        assert!(list(&state).is_empty() && Held::take(&state, &bake).unwrap().is_none());
        assert_eq!(state.runtimes().unwrap(), Vec::<String>::new(), "no bake is taken for a runtime");
    }

    #[test]
    fn what_is_no_record_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let held = Held::begin(&state, "default", "ci").unwrap();
        let bake = held.record().bake.clone();
        drop(held);
        let path = folder.path().join(".bakes").join(&bake).join("record.json");
        fs::write(&path, "{").unwrap();
        assert!(Held::take(&state, &bake).unwrap().is_none());
        // One that names another bake than its folder does.
        fs::write(&path, r#"{"bake":"0123456789abcdef0123456789abcdef","project":"p","to":"t"}"#).unwrap();
        assert!(Held::take(&state, &bake).unwrap().is_none());
        for name in ["x", "..", "0123"] {
            fs::create_dir_all(folder.path().join(".bakes/x")).unwrap();
            assert!(!list(&state).contains(&name.to_owned()));
        }
        assert!(path.exists());
    }
}

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
//! | `published`, and the image among [those of the state dir](super::images) | the image gets a name |
//! | `swapping` | Incus is asked to move the alias |
//! | `replaced` | the alias is moved away from that image |
//! | `swapped` | anything is removed |
//! | nothing: the folder goes | all that it names is gone, or has an alias |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::images::OwnImages;
use crate::incus::{Image, builder_name, is_bake_id};
use crate::state_dir::{RuntimeFolder, RuntimeLock, StateDir, StateDirError, replace, sync_folder};

/// How often another id is drawn where a reconciliation is just looking at the new folder.
const TRIES: u32 = 5;

/// A bake, as far as it came.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
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
    /// The fingerprint of its image, once Incus said it.
    #[serde(default)]
    pub(crate) published: Option<String>,
    /// Whether Incus was, or was about to be, asked to point the alias to it: that may still come.
    #[serde(default)]
    pub(crate) swapping: bool,
    /// Whether its image had the alias, at some time: from then on it is what a later bake replaces, and not what this one left.
    #[serde(default)]
    pub(crate) swapped: bool,
    /// Images whose place it took, or was about to take: they are ours.
    #[serde(default)]
    pub(crate) replaced: Vec<String>,
    /// Images of which it was last seen that somebody needs them.
    #[serde(default)]
    pub(crate) kept: Vec<String>,
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

/// The images that were published from a state dir.
pub(super) fn own_images(state: &StateDir) -> OwnImages {
    OwnImages::beside(&bakes_path(state))
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

/// Every bake that was begun and not forgotten, by its id, whether it lives or not.
pub(crate) fn list(state: &StateDir) -> Vec<String> {
    let entries = fs::read_dir(bakes_path(state)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_bake_id(name)).collect();
    names.sort_unstable();
    names
}

/// What is written of a bake, if anything is that can be read, and whether it lives.
pub(crate) fn look(state: &StateDir, bake: &str) -> (Option<Record>, bool) {
    let folder = RuntimeFolder::new(&bakes_path(state), bake);
    // It is only looked: to try the lock would be to hold it.
    (read(&folder), folder.driver().is_some())
}

/// What [`Held::take`] found.
#[derive(Debug)]
pub(crate) enum Taken {
    /// It is dead, and ours to tidy.
    Held(Held),
    /// Somebody is at it.
    Lives,
    /// There is none, or it had died before it had written anything, and so before it had asked Incus for anything.
    Gone,
    /// What is written there was not written by this program.
    Unreadable(PathBuf),
}

impl Held {
    /// Writes a new bake down, durably, and holds it.
    pub(crate) fn begin(state: &StateDir, project: &str, to: &str) -> Result<Self, StateDirError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::begin_as(state, &state.random_id()?, project, to)? {
                Some(held) => return Ok(held),
                None if tries < TRIES => {}
                None => return Err(busy(&bakes_path(state))),
            }
        }
    }

    /// By that id. `None` where a reconciliation took the new folder for a dead one's, before it was locked.
    pub(super) fn begin_as(
        state: &StateDir,
        bake: &str,
        project: &str,
        to: &str,
    ) -> Result<Option<Self>, StateDirError> {
        let folder = RuntimeFolder::new(&bakes_path(state), bake);
        folder.make_for_lock()?;
        sync_folder(state.path())?;
        let begun = || -> Result<Option<Self>, StateDirError> {
            let Ok(lock) = folder.lock()? else { return Ok(None) };
            let record =
                Record { bake: bake.to_owned(), project: project.to_owned(), to: to.to_owned(), ..Record::default() };
            let held = Self { folder, record, _lock: lock };
            held.write()?;
            Ok(Some(held))
        };
        match begun() {
            Err(error) if is_absent(&error) => Ok(None),
            begun => begun,
        }
    }

    /// Takes up what a dead bake wrote down.
    pub(crate) fn take(state: &StateDir, bake: &str) -> Result<Taken, StateDirError> {
        let folder = RuntimeFolder::new(&bakes_path(state), bake);
        let lock = match folder.lock() {
            Ok(Ok(lock)) => lock,
            Ok(Err(_)) => return Ok(Taken::Lives),
            Err(error) if is_absent(&error) => return Ok(Taken::Gone),
            Err(error) => return Err(error),
        };
        // Under the lock: it may have been another's until now.
        match read(&folder) {
            Some(record) => Ok(Taken::Held(Self { folder, record, _lock: lock })),
            None if record_path(&folder).exists() => Ok(Taken::Unreadable(record_path(&folder))),
            None => remove(&folder).map(|()| Taken::Gone),
        }
    }

    /// As far as it came.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// How long ago anything was written of it: nothing, where the clock was set back.
    pub(crate) fn age(&self) -> Duration {
        let written = fs::metadata(record_path(&self.folder)).and_then(|data| data.modified()).ok();
        written.and_then(|written| written.elapsed().ok()).unwrap_or_default()
    }

    /// That an image is asked for, or by which operation it is made.
    pub(crate) fn publishing(&mut self, operation: Option<String>) -> Result<(), StateDirError> {
        self.record.publishing = true;
        self.record.operation = operation;
        self.write()
    }

    /// Which image was published.
    pub(crate) fn published(&mut self, image: &Image) -> Result<(), StateDirError> {
        self.images().add(image)?;
        self.record.published = Some(image.fingerprint.clone());
        self.write()
    }

    /// That the alias is about to be moved.
    pub(crate) fn swapping(&mut self) -> Result<(), StateDirError> {
        self.record.swapping = true;
        self.write()
    }

    /// Those of its state dir.
    pub(super) fn images(&self) -> OwnImages {
        OwnImages::beside(self.folder.path().parent().unwrap_or(self.folder.path()))
    }

    /// That an image of ours loses its place.
    pub(crate) fn replaces(&mut self, fingerprint: &str) -> Result<(), StateDirError> {
        if !self.record.replaced.iter().any(|known| known == fingerprint) {
            self.record.replaced.push(fingerprint.to_owned());
        }
        self.write()
    }

    /// That the alias points to its image. [`Held::age`] counts from here.
    pub(crate) fn swapped(&mut self) -> Result<(), StateDirError> {
        self.record.swapped = true;
        self.write()
    }

    /// Which images somebody needs; whether that is another answer than before. [`Held::age`] counts from a change on.
    pub(crate) fn keeps(&mut self, kept: Vec<String>) -> Result<bool, StateDirError> {
        let is_another = self.record.kept != kept;
        if is_another {
            self.record.kept = kept;
            self.write()?;
        }
        Ok(is_another)
    }

    fn write(&self) -> Result<(), StateDirError> {
        // A record is serializable.
        let text = serde_json::to_vec(&self.record).unwrap_or_default();
        replace(&record_path(&self.folder), &text)?;
        sync_folder(self.folder.path())
    }

    /// Nothing of it is left: the folder goes.
    pub(crate) fn forget(self) -> Result<(), StateDirError> {
        remove(&self.folder)
    }
}

fn remove(folder: &RuntimeFolder) -> Result<(), StateDirError> {
    match fs::remove_dir_all(folder.path()) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(StateDirError::Io { path: folder.path().to_owned(), doing: "removing the record of a bake", source })
        }
        _ => Ok(()),
    }
}

fn is_absent(error: &StateDirError) -> bool {
    matches!(error, StateDirError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

fn busy(path: &Path) -> StateDirError {
    let source = io::Error::from(io::ErrorKind::ResourceBusy);
    StateDirError::Io { path: path.to_owned(), doing: "locking the record of a bake", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun() -> (tempfile::TempDir, StateDir, Held) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let held = Held::begin(&state, "default", "ci").unwrap();
        (folder, state, held)
    }

    #[test]
    fn a_bake_is_held_while_it_lives_and_found_when_it_died() {
        let (_folder, state, mut held) = begun();
        let bake = held.record().bake.clone();
        assert_eq!(list(&state), std::slice::from_ref(&bake));
        assert!(matches!(Held::take(&state, &bake), Ok(Taken::Lives)));
        assert!(look(&state, &bake).1);
        held.publishing(None).unwrap();
        held.publishing(Some("/1.0/operations/x".to_owned())).unwrap();
        held.replaces("f00").unwrap();
        held.replaces("f00").unwrap();
        drop(held);
        assert!(!look(&state, &bake).1);
        let Ok(Taken::Held(found)) = Held::take(&state, &bake) else { panic!("it is dead") };
        let Record { publishing, operation, replaced, .. } = found.record().clone();
        let operation = operation.as_deref();
        assert_eq!((publishing, operation, replaced), (true, Some("/1.0/operations/x"), vec!["f00".to_owned()]));
        found.forget().unwrap();
        assert!(list(&state).is_empty() && matches!(Held::take(&state, &bake), Ok(Taken::Gone)));
        assert_eq!(state.runtimes().unwrap(), Vec::<String>::new(), "no bake is taken for a runtime");
    }

    #[test]
    fn one_that_died_before_it_wrote_anything_goes() {
        let (_folder, state, held) = begun();
        let bake = held.record().bake.clone();
        fs::remove_file(record_path(&held.folder)).unwrap();
        assert!(matches!(Held::take(&state, &bake), Ok(Taken::Lives)));
        drop(held);
        assert_eq!(list(&state), std::slice::from_ref(&bake));
        assert!(matches!(Held::take(&state, &bake), Ok(Taken::Gone)));
        assert!(list(&state).is_empty());
    }

    /// Its folder may be removed right before it is locked: another one is made.
    #[test]
    fn one_that_begins_is_not_lost_to_those_that_look() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for bake in list(&state) {
                        drop(Held::take(&state, &bake));
                    }
                }
            });
            for _ in 0..50 {
                if let Ok(held) = Held::begin(&state, "default", "ci") {
                    assert!(
                        look(&state, &held.record().bake).0.is_some(),
                        "it is written down for as long as it lives"
                    );
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn what_is_no_record_is_left_alone() {
        let (folder, state, held) = begun();
        let bake = held.record().bake.clone();
        drop(held);
        let path = folder.path().join(".bakes").join(&bake).join("record.json");
        // The second names another bake than its folder does.
        for text in ["{", r#"{"bake":"0123456789abcdef0123456789abcdef","project":"p","to":"t"}"#] {
            fs::write(&path, text).unwrap();
            assert!(matches!(Held::take(&state, &bake), Ok(Taken::Unreadable(found)) if found == path));
        }
        fs::create_dir_all(folder.path().join(".bakes/x")).unwrap();
        assert_eq!(list(&state), [bake]);
    }
}

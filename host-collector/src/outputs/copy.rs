//! Copying outputs to a folder of the user's, where other things may lie.
//!
//! Beside what is copied, [`LIST`] names it, a path a line. What an earlier copy listed is replaced, or removed where it is
//! no output any more. Everything else is the user's: where it is in the way, nothing is touched and the error names it;
//! where it is not, it stays. The list is written before anything is removed or copied, with the old names and the new
//! ones, so that the next copy replaces also what an interrupted one left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::Error;

/// What an earlier copy put there.
const LIST: &str = ".pika-cloud-outputs";

/// The first line of a list.
const LIST_HEAD: &str =
    "# pika-cloud put these here, and replaces them with the next outputs; everything else it leaves alone";

const FILES: [&str; 5] = ["events.jsonl", "status.json", "result.json", "verdict.json", "artifacts.sha256"];
const FOLDERS: [&str; 2] = ["logs", "artifacts"];

/// Copies an incarnation's outputs to a folder of the user's, in place of what an earlier copy left there.
///
/// # Errors
/// [`Error::OutputInTheWay`] before anything is touched; [`Error::Outputs`] where something cannot be read or written.
pub(crate) fn copy(outputs: &Path, target: &Path) -> Result<(), Error> {
    check_place(outputs, target)?;
    let wanted = wanted(outputs)?;
    let listed = read_list(target)?;
    for (path, is_folder) in &wanted {
        check_free(target, path, *is_folder, &listed)?;
    }
    fs::create_dir_all(target).map_err(fail(target))?;
    write_list(target, listed.iter().chain(wanted.keys()))?;
    // The deepest first.
    for path in listed.iter().rev() {
        remove(target, path)?;
    }
    for (path, is_folder) in &wanted {
        put(outputs, target, path, *is_folder)?;
    }
    write_list(target, wanted.keys())
}

fn fail(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Outputs { path, source }
}

/// A copy into what is copied would never end, and the originals are not the user's.
fn check_place(outputs: &Path, target: &Path) -> Result<(), Error> {
    let outputs = fs::canonicalize(outputs).map_err(fail(outputs))?;
    let absolute = std::path::absolute(target).map_err(fail(target))?;
    let nearest = absolute.ancestors().find_map(|folder| fs::canonicalize(folder).ok());
    if nearest.is_some_and(|folder| folder.starts_with(&outputs)) {
        return Err(Error::OutputInTheWay { path: target.to_owned() });
    }
    Ok(())
}

/// Every path that the target is to have, folders before what is in them, and whether it is a folder.
fn wanted(outputs: &Path) -> Result<BTreeMap<String, bool>, Error> {
    let mut wanted = BTreeMap::new();
    for name in FILES {
        if outputs.join(name).is_file() {
            wanted.insert(name.to_owned(), false);
        }
    }
    for name in FOLDERS {
        wanted.insert(name.to_owned(), true);
        list_tree(outputs, name, &mut wanted)?;
    }
    Ok(wanted)
}

/// Folders and regular files: there is nothing else in a tree of ours.
fn list_tree(outputs: &Path, folder: &str, wanted: &mut BTreeMap<String, bool>) -> Result<(), Error> {
    let path = outputs.join(folder);
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(fail(&path))?,
    };
    for entry in entries {
        let entry = entry.map_err(fail(&path))?;
        let kind = entry.file_type().map_err(fail(&path))?;
        // Names of guests are text, see the session.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let below = format!("{folder}/{name}");
        if kind.is_dir() {
            list_tree(outputs, &below, wanted)?;
        }
        if kind.is_dir() || kind.is_file() {
            wanted.insert(below, kind.is_dir());
        }
    }
    Ok(())
}

/// What an earlier copy listed; nothing where there was none.
fn read_list(target: &Path) -> Result<BTreeSet<String>, Error> {
    let path = target.join(LIST);
    match look(&path)? {
        None => return Ok(BTreeSet::new()),
        Some(metadata) if metadata.is_file() => {}
        Some(_) => return Err(Error::OutputInTheWay { path }),
    }
    let text = fs::read_to_string(&path).map_err(fail(&path))?;
    let mut lines = text.lines();
    if lines.next() != Some(LIST_HEAD) {
        return Err(Error::OutputInTheWay { path });
    }
    // A list that was tampered with names nothing outside of its folder.
    let is_plain =
        |line: &&str| !line.is_empty() && Path::new(line).components().all(|part| matches!(part, Component::Normal(_)));
    Ok(lines.filter(is_plain).map(str::to_owned).collect())
}

fn write_list<'a>(target: &Path, paths: impl Iterator<Item = &'a String>) -> Result<(), Error> {
    let paths: BTreeSet<&String> = paths.collect();
    let text = paths.into_iter().fold(format!("{LIST_HEAD}\n"), |text, path| text + path + "\n");
    let (path, temporary) = (target.join(LIST), crate::state_dir::temporary_beside(&target.join(LIST)));
    let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(fail(&path))
}

/// What is there, without following a link; `None` where nothing is.
fn look(path: &Path) -> Result<Option<Metadata>, Error> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(fail(path)(error)),
    }
}

/// That a path is free, or ours to remove. A folder of the user's that is empty may be used.
fn check_free(target: &Path, path: &str, is_folder: bool, listed: &BTreeSet<String>) -> Result<(), Error> {
    let full = target.join(path);
    let Some(found) = look(&full)? else { return Ok(()) };
    let is_ours = listed.contains(path);
    let usable = match found.is_dir() {
        true if is_folder => is_ours || is_empty(&full)?,
        true => is_ours && holds_only(target, path, listed)?,
        false => is_ours && found.is_file(),
    };
    if usable { Ok(()) } else { Err(Error::OutputInTheWay { path: full }) }
}

fn is_empty(folder: &Path) -> Result<bool, Error> {
    Ok(fs::read_dir(folder).map_err(fail(folder))?.next().is_none())
}

/// Whether there is nothing in a folder but what is listed.
fn holds_only(target: &Path, folder: &str, listed: &BTreeSet<String>) -> Result<bool, Error> {
    let path = target.join(folder);
    for entry in fs::read_dir(&path).map_err(fail(&path))? {
        let entry = entry.map_err(fail(&path))?;
        let kind = entry.file_type().map_err(fail(&path))?;
        let below = entry.file_name().into_string().map(|name| format!("{folder}/{name}")).unwrap_or_default();
        let is_ours = listed.contains(&below) && (kind.is_file() || kind.is_dir());
        if !is_ours || (kind.is_dir() && !holds_only(target, &below, listed)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes what an earlier copy put there. What became something else since is the user's, and a folder with anything of
/// the user's in it stays.
fn remove(target: &Path, path: &str) -> Result<(), Error> {
    let parents: Vec<PathBuf> = Path::new(path).ancestors().skip(1).map(|parent| target.join(parent)).collect();
    for parent in parents.iter().rev().skip(1) {
        if !look(parent)?.is_some_and(|found| found.is_dir()) {
            return Ok(());
        }
    }
    let path = target.join(path);
    let removed = match look(&path)? {
        Some(found) if found.is_dir() => fs::remove_dir(&path),
        Some(found) if found.is_file() => fs::remove_file(&path),
        _ => Ok(()),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => removed.map_err(fail(&path)),
    }
}

/// Copies one path. What vanished meanwhile was replaced by a collection that is under way.
fn put(outputs: &Path, target: &Path, path: &str, is_folder: bool) -> Result<(), Error> {
    let (from, to) = (outputs.join(path), target.join(path));
    let done = if is_folder { fs::create_dir(&to) } else { fs::copy(&from, &to).map(drop) };
    match done {
        Err(error) if is_folder && error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if !is_folder && error.kind() == io::ErrorKind::NotFound && !from.exists() => Ok(()),
        done => done.map_err(fail(&to)),
    }
}

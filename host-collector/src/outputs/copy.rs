//! Copying outputs to a folder of the user's, where other things may lie.
//!
//! Beside what is copied, [`LIST`] names it, a path a line. What an earlier copy listed is replaced, or removed where it is
//! no output any more. Everything else is the user's: where it is in the way, nothing is touched and the error names it;
//! where it is not, it stays. The list is written before anything is removed or copied, with the old names and the new
//! ones, so that the next copy replaces also what an interrupted one left.
//!
//! A guest's path may be as long as the kernel takes by itself, and longer with a folder before it: everything is opened from
//! one folder to the next ([`Tree`]), and no link is followed on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

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
    let outputs = Tree::open(outputs).map_err(fail(outputs))?;
    let wanted = wanted(&outputs)?;
    let listed = read_list(target)?;
    // What is not there is in nobody's way.
    if let Ok(target) = Tree::open(target) {
        for (path, is_folder) in &wanted {
            check_free(&target, path, *is_folder, &listed)?;
        }
    }
    fs::create_dir_all(target).map_err(fail(target))?;
    let tree = Tree::open(target).map_err(fail(target))?;
    write_list(target, listed.iter().chain(wanted.keys()))?;
    // The deepest first.
    for path in listed.iter().rev() {
        remove(&tree, path)?;
    }
    for (path, is_folder) in &wanted {
        put(&outputs, &tree, path, *is_folder)?;
    }
    write_list(target, wanted.keys())
}

/// A folder, and what is below it by relative paths of any length.
struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

/// How a folder is opened to work below it.
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Tree {
    fn open(path: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(path, FOLDER.difference(OFlags::NOFOLLOW), Mode::empty())?;
        Ok(Self { root, path: path.to_owned() })
    }

    /// Does something in the folder that holds `path`, by the name that it has there.
    fn within<T>(&self, path: &str, act: impl FnOnce(&OwnedFd, &str) -> rustix::io::Result<T>) -> io::Result<T> {
        let Some((folders, name)) = path.rsplit_once('/') else { return Ok(act(&self.root, path)?) };
        let mut at = None;
        for folder in folders.split('/') {
            at = Some(rustix::fs::openat(at.as_ref().unwrap_or(&self.root), folder, FOLDER, Mode::empty())?);
        }
        Ok(act(at.as_ref().unwrap_or(&self.root), name)?)
    }

    fn open_file(&self, path: &str, flags: OFlags, mode: Mode) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.within(path, |folder, name| rustix::fs::openat(folder, name, flags, mode)).map(File::from)
    }

    /// What is there, without following a link; `None` where nothing is.
    fn look(&self, path: &str) -> Result<Option<FileType>, Error> {
        match self.within(path, kind_of) {
            Ok(kind) => Ok(Some(kind)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(self.fail(path)(error)),
        }
    }

    /// The names in a folder, with what they are of. Those that are no text are empty here.
    fn entries(&self, path: &str) -> io::Result<Vec<(String, FileType)>> {
        let folder = self.open_file(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(folder.as_fd(), entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                known => known,
            };
            entries.push((entry.file_name().to_str().unwrap_or_default().to_owned(), kind));
        }
        Ok(entries)
    }

    fn fail(&self, path: &str) -> impl FnOnce(io::Error) -> Error + use<> {
        fail(&self.path.join(path))
    }
}

fn kind_of(folder: &OwnedFd, name: &str) -> rustix::io::Result<FileType> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

fn fail(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
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
fn wanted(outputs: &Tree) -> Result<BTreeMap<String, bool>, Error> {
    let mut wanted = BTreeMap::new();
    for name in FILES {
        if outputs.look(name)?.is_some_and(FileType::is_file) {
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
fn list_tree(outputs: &Tree, folder: &str, wanted: &mut BTreeMap<String, bool>) -> Result<(), Error> {
    let entries = match outputs.entries(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(outputs.fail(folder))?,
    };
    // Names of guests are text, see the session.
    for (name, kind) in entries.into_iter().filter(|(name, _)| !name.is_empty()) {
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
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(Error::OutputInTheWay { path }),
        Err(error) if is_gone(&error) => return Ok(BTreeSet::new()),
        Err(error) => return Err(fail(&path)(error)),
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

/// That a path is free, or ours to remove. A folder of the user's that is empty may be used.
fn check_free(target: &Tree, path: &str, is_folder: bool, listed: &BTreeSet<String>) -> Result<(), Error> {
    let Some(found) = target.look(path)? else { return Ok(()) };
    let is_ours = listed.contains(path);
    let usable = match found.is_dir() {
        true if is_folder => is_ours || target.entries(path).map_err(target.fail(path))?.is_empty(),
        true => is_ours && holds_only(target, path, listed)?,
        false => is_ours && found.is_file(),
    };
    if usable { Ok(()) } else { Err(Error::OutputInTheWay { path: target.path.join(path) }) }
}

/// Whether there is nothing in a folder but what is listed.
fn holds_only(target: &Tree, folder: &str, listed: &BTreeSet<String>) -> Result<bool, Error> {
    for (name, kind) in target.entries(folder).map_err(target.fail(folder))? {
        let below = format!("{folder}/{name}");
        let is_ours = listed.contains(&below) && (kind.is_file() || kind.is_dir());
        if !is_ours || (kind.is_dir() && !holds_only(target, &below, listed)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes what an earlier copy put there. What became something else since is the user's, and a folder with anything of
/// the user's in it stays.
fn remove(target: &Tree, path: &str) -> Result<(), Error> {
    let removed = target.within(path, |folder, name| match kind_of(folder, name)? {
        FileType::Directory => rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR),
        FileType::RegularFile => rustix::fs::unlinkat(folder, name, AtFlags::empty()),
        _ => Ok(()),
    });
    match removed {
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => removed.map_err(target.fail(path)),
    }
}

/// Whether there is nothing of that path; what lies behind a link is not of it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
}

/// Copies one path. What vanished meanwhile was replaced by a collection that is under way.
fn put(outputs: &Tree, target: &Tree, path: &str, is_folder: bool) -> Result<(), Error> {
    let done = if is_folder {
        match target.within(path, |folder, name| rustix::fs::mkdirat(folder, name, Mode::from_raw_mode(0o777))) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    } else {
        match outputs.open_file(path, OFlags::RDONLY, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            from => from.and_then(|from| copy_file(from, target, path)),
        }
    };
    done.map_err(target.fail(path))
}

fn copy_file(mut from: File, target: &Tree, path: &str) -> io::Result<()> {
    let permissions = from.metadata()?.permissions();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let mut to = target.open_file(path, flags, Mode::from_raw_mode(0o600))?;
    io::copy(&mut from, &mut to)?;
    to.set_permissions(permissions)
}

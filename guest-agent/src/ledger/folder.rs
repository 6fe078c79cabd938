//! Files of the contract, opened so that nothing in their place can mislead or block us.
//!
//! Every open is relative to a folder's descriptor, follows no link, does not wait (a FIFO would hold us for ever) and is
//! checked to be a regular file with no other name afterwards. Modes are set on the descriptor, so that no umask changes them; the folders
//! hand their group down to what is made in them (mode 2775).
//!
//! ```text
//!   replace(NAME):  .NAME.tmp made anew ── written ── (synced) ── renamed to NAME
//!                    └ killed here: the next replace removes it  └ killed here: the new content stands
//! ```
//!
//! Where a new temporary file finds no room, the reserve (`room.rs`) becomes it.
//!
//! Each file that is replaced belongs to one lock, so that its temporary file has one writer at a time.

use std::path::{Path, PathBuf};

use pika_cloud_common::paths;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::{self, Errno};

use super::error::LedgerError;
use super::format::{SESSION_LOCK, SUPERVISOR_LOCK};
use super::room;

/// Mode of the contract's files.
const FILE_MODE: Mode = Mode::from_raw_mode(0o664);
/// Mode of the files whose locks are the writers': to lock a file it is enough to open it, so that nobody else may.
const LOCK_MODE: Mode = Mode::from_raw_mode(0o660);
/// Mode of the contract's folders: what is made in them belongs to their group.
const FOLDER_MODE: Mode = Mode::from_raw_mode(0o2775);

/// A folder of the contract.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at `path`; `None` where nothing is there.
    pub fn open(path: &Path) -> Result<Option<Self>, LedgerError> {
        open_folder(fs::CWD, path, path)
    }

    /// Opens the folder at `path`, made with its parents where it is missing.
    pub fn open_or_create(path: &Path) -> Result<Self, LedgerError> {
        if let Some(folder) = Self::open(path)? {
            folder.finish_making()?;
            return Ok(folder);
        }
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                LedgerError::io("create", parent)(errno)
            })?;
        }
        create_folder(fs::CWD, path, path)
    }

    /// The folder `name` in this one; `None` where nothing is there.
    pub fn child(&self, name: &str) -> Result<Option<Self>, LedgerError> {
        open_folder(self.fd.as_fd(), Path::new(name), &self.path.join(name))
    }

    /// The folder `name` in this one, made where it is missing.
    pub fn child_or_create(&self, name: &str) -> Result<Self, LedgerError> {
        match self.child(name)? {
            Some(folder) => folder.finish_making().map(|()| folder),
            None => create_folder(self.fd.as_fd(), Path::new(name), &self.path.join(name)),
        }
    }

    /// Gives the folder what its maker may have died before: without it, nobody else could write.
    fn finish_making(&self) -> Result<(), LedgerError> {
        let stat = fs::fstat(&self.fd).map_err(LedgerError::io("look at", &self.path))?;
        if is_half_made(&stat, FOLDER_MODE) { self.make_common() } else { Ok(()) }
    }

    /// Group and mode, so that every writer of the contract may write.
    fn make_common(&self) -> Result<(), LedgerError> {
        // The group first: changing it may clear the bit that hands it down.
        if let Some(group) = crate::users::contract_group() {
            match fs::fchown(&self.fd, None, Some(group)) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(errno) => return Err(LedgerError::io("give the group to", &self.path)(errno)),
            }
        }
        fs::fchmod(&self.fd, FOLDER_MODE).map_err(LedgerError::io("set the mode of", &self.path))
    }

    /// Its descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Where the folder is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where `name` is, for messages.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens the regular file `name`; `None` where nothing is there.
    pub fn open_file(&self, name: &str, access: OFlags) -> Result<Option<(OwnedFd, Stat)>, LedgerError> {
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        match fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let stat = fs::fstat(&fd).map_err(LedgerError::io("look at", self.path_of(name)))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    // With another name it may be anybody's file, linked here to have us write to it.
                    FileType::RegularFile if stat.st_nlink > 1 => {
                        let (path, expected) = (self.path_of(name), "a regular file");
                        Err(LedgerError::Misplaced { path, found: "a file with other names", expected })
                    }
                    FileType::RegularFile => {
                        // Whoever made it may have died before it was anybody's to write.
                        if access.intersects(OFlags::WRONLY | OFlags::RDWR) && has_other_mode(name, &stat) {
                            fs::fchmod(&fd, mode_of(name))
                                .map_err(LedgerError::io("set the mode of", self.path_of(name)))?;
                        }
                        Ok(Some((fd, stat)))
                    }
                    found => Err(LedgerError::misplaced(&self.path_of(name), found, "a regular file")),
                }
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.explain("open", name, errno)),
        }
    }

    /// Opens the regular file `name`, made empty where it is missing.
    pub fn open_or_create_file(&self, name: &str, access: OFlags) -> Result<(OwnedFd, Stat), LedgerError> {
        loop {
            if let Some(found) = self.open_file(name, access)? {
                return Ok(found);
            }
            match self.create_file(name, access) {
                Ok(fd) => {
                    let stat = fs::fstat(&fd).map_err(LedgerError::io("look at", self.path_of(name)))?;
                    return Ok((fd, stat));
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(LedgerError::io("create", self.path_of(name))(errno)),
            }
        }
    }

    /// The whole of the file `name`, where it is not longer than `limit`; `None` where nothing is there.
    pub fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, LedgerError> {
        let Some((fd, stat)) = self.open_file(name, OFlags::RDONLY)? else { return Ok(None) };
        let size = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
        if size > limit {
            return Err(LedgerError::io("read", self.path_of(name))(Errno::FBIG));
        }
        let mut text = vec![0; size];
        let read = read_at(&fd, &mut text, 0).map_err(LedgerError::io("read", self.path_of(name)))?;
        text.truncate(read);
        Ok(Some(text))
    }

    /// Replaces the file `name` by `content`, at once for every reader; with `sync` also for a power failure.
    pub fn replace(&self, name: &str, content: &[u8], sync: bool) -> Result<(), LedgerError> {
        let tmp = format!(".{name}.tmp");
        let failed = |doing, errno| LedgerError::io(doing, self.path_of(name))(errno);
        let mut written = self.write_new(&tmp, content);
        let reserved = written.as_ref().is_err_and(|&errno| room::is_full(errno));
        if reserved {
            let _ = self.remove_file(&tmp);
            written = room::use_reserve(self, &tmp, content).map_err(|_| Errno::NOSPC);
        }
        let synced = written.and_then(|fd| if sync { fs::fdatasync(&fd) } else { Ok(()) });
        if let Err(errno) = synced {
            let _ = fs::unlinkat(&self.fd, &tmp, AtFlags::empty());
            if reserved {
                room::keep_reserve(self);
            }
            return Err(failed("write", errno));
        }
        fs::renameat(&self.fd, &tmp, &self.fd, name).map_err(|errno| self.explain("replace", name, errno))?;
        if reserved {
            // From what the old content gave back.
            room::keep_reserve(self);
        }
        if sync {
            fs::fsync(&self.fd).map_err(|errno| failed("sync the folder of", errno))?;
        }
        Ok(())
    }

    /// Makes the file `name` anew, with `content`.
    fn write_new(&self, name: &str, content: &[u8]) -> io::Result<OwnedFd> {
        let fd = match self.create_file(name, OFlags::WRONLY) {
            Err(Errno::EXIST) => {
                fs::unlinkat(&self.fd, name, AtFlags::empty())?;
                self.create_file(name, OFlags::WRONLY)
            }
            other => other,
        }?;
        write_all(&fd, content).map(|()| fd)
    }

    /// Fails where another folder, or none, is at its path since it was opened: it was removed, moved away, or mounted over.
    pub fn check_there(&self) -> Result<(), LedgerError> {
        let looking = || LedgerError::io("look at", &self.path);
        let own = fs::fstat(&self.fd).map_err(looking())?;
        match fs::statat(fs::CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) if (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino) => Ok(()),
            Ok(_) | Err(Errno::NOENT) => Err(LedgerError::Removed { path: self.path.clone() }),
            Err(errno) => Err(looking()(errno)),
        }
    }

    /// Removes the file `name` if it is there.
    pub fn remove_file(&self, name: &str) -> Result<(), LedgerError> {
        match fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.explain("remove", name, errno)),
        }
    }

    /// Makes the empty file `name`, which must not be there.
    pub(super) fn create_file(&self, name: &str, access: OFlags) -> io::Result<OwnedFd> {
        let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.fd, name, flags, mode_of(name))?;
        fs::fchmod(&fd, mode_of(name))?;
        Ok(fd)
    }

    /// Gives a better reason than `errno` where something odd stands at `name`.
    fn explain(&self, doing: &'static str, name: &str, errno: Errno) -> LedgerError {
        let path = self.path_of(name);
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => {
                LedgerError::misplaced(&path, FileType::from_raw_mode(stat.st_mode), "a regular file")
            }
            _ => LedgerError::io(doing, path)(errno),
        }
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether something of ours lacks what is given to it right after it is made.
fn is_half_made(stat: &Stat, mode: Mode) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & mode.as_raw_mode() != mode.as_raw_mode()
}

fn mode_of(name: &str) -> Mode {
    if matches!(name, paths::EVENTS_SEQ | SESSION_LOCK | SUPERVISOR_LOCK) { LOCK_MODE } else { FILE_MODE }
}

/// Whether a file of ours is open to fewer than it should be; or, if it is a lock, to more.
fn has_other_mode(name: &str, stat: &Stat) -> bool {
    let (mode, other) = (mode_of(name), Mode::RWXO.as_raw_mode());
    let is_ours = stat.st_uid == rustix::process::geteuid().as_raw();
    is_half_made(stat, mode) || is_ours && mode == LOCK_MODE && stat.st_mode & other != 0
}

fn open_folder(at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<Option<Folder>, LedgerError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match fs::openat(at, name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(Folder { fd, path: path.to_owned() })),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => match fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => {
                Err(LedgerError::misplaced(path, FileType::from_raw_mode(stat.st_mode), "a folder"))
            }
            _ => Err(LedgerError::io("open", path)(errno)),
        },
    }
}

fn create_folder(at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<Folder, LedgerError> {
    let made = match fs::mkdirat(at, name, FOLDER_MODE) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(errno) => return Err(LedgerError::io("create", path)(errno)),
    };
    let folder = open_folder(at, name, path)?.ok_or_else(|| LedgerError::io("create", path)(Errno::NOENT))?;
    if made {
        folder.make_common()?;
    }
    Ok(folder)
}

/// Fills `buffer` from `offset` on, as far as the file goes.
pub(crate) fn read_at(fd: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match io::pread(&fd, &mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(filled)
}

/// Writes all of `content` where the descriptor stands.
pub(crate) fn write_all(fd: impl AsFd, mut content: &[u8]) -> io::Result<()> {
    while !content.is_empty() {
        match io::write(&fd, content) {
            Ok(0) => return Err(Errno::NOSPC),
            Ok(n) => content = &content[n..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

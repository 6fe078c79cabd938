//! A UNIX socket at a path that others may have prepared for us.
//!
//! ```text
//!   /run ─► /run/x ─►   each folder is opened by its descriptor, follows no link, and is made (0755) where it is missing
//!               │
//!               ├─ NAME          nothing, or a socket that nobody listens on ── replaced
//!               │                a socket that answers: in use ── a link, a file, a folder: left alone, refused
//!               └─ .NAME.new     bound with mode 0660, given the group, listening ── renamed to NAME
//! ```
//!
//! A dial finds the old socket or the new one, never none in between. Killed before the rename, a `.NAME.new` stays behind, and
//! the next start removes it; killed later, a stale NAME, which the next start replaces. At the end NAME is removed if it is
//! still the socket that we made.
//!
//! A folder that everybody may write to without its sticky bit is refused: whoever likes could put another socket there.
//! Members of a group that may write to the folder can still do so; give the socket a folder of its own where that matters.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::{self, Errno};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::users;

/// Everybody who may dial: the owner and the group.
const SOCKET_MODE: Mode = Mode::from_raw_mode(0o660);

/// A socket cannot be made at a path.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// Something stands there that is not ours to replace.
    #[error("{path} is {found} and no socket: it is left as it is; remove it, or name another path")]
    Misplaced {
        /// Where.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Somebody answers there.
    #[error("another process listens on {path}: end it, or name another path")]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// Everybody could put another socket there.
    #[error("the folder of {path} may be written to by everybody: name a path in another, such as /run/pika-cloud")]
    Loose {
        /// Where.
        path: PathBuf,
    },
    /// A folder on the way is a link, or is none.
    #[error("{folder} is no folder, or a symbolic link, which is not followed: name the path without links")]
    NoFolder {
        /// Which.
        folder: PathBuf,
    },
    /// A call failed.
    #[error("cannot {doing} {path}: {errno}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        errno: Errno,
    },
}

/// A socket that listens, and its file.
#[derive(Debug)]
pub(super) struct UnixSocket {
    pub(super) fd: OwnedFd,
    folder: OwnedFd,
    name: OsString,
    /// Device and inode of the file.
    id: (u64, u64),
}

/// Who dialled, as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) pid: i32,
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) groups: Vec<Gid>,
}

impl UnixSocket {
    /// Listens at `path`.
    pub(super) fn listen_at(path: &Path, backlog: i32) -> Result<Self, UnixError> {
        let failed = |doing| move |errno| UnixError::Io { doing, path: path.to_owned(), errno };
        let name = path.file_name().ok_or_else(|| failed("listen on")(Errno::ISDIR))?.to_owned();
        let folder = open_folder(path.parent().unwrap_or(Path::new("")))?;
        let stat = fs::fstat(&folder).map_err(failed("look at the folder of"))?;
        if stat.st_mode & 0o1002 == 0o002 {
            return Err(UnixError::Loose { path: path.to_owned() });
        }
        check_place(&folder, &name, path)?;
        let new = [OsStr::new("."), &name, OsStr::new(".new")].join(OsStr::new(""));
        match fs::unlinkat(&folder, &new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("remove what is left beside")(errno)),
        }
        let (fd, id) = bind(&folder, &new, backlog).map_err(failed("listen on"))?;
        fs::renameat(&folder, &new, &folder, &name).map_err(failed("put a socket at"))?;
        Ok(Self { fd, folder, name, id })
    }

    /// Dials it, without waiting to be accepted.
    pub(super) fn dial(&self) -> io::Result<OwnedFd> {
        dial(&self.folder, &self.name)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let here = fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if here.is_ok_and(|stat| id_of(&stat) == self.id) {
            let _ = fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }
}

/// Opens `folder` without following a link anywhere, and makes what is missing of it.
fn open_folder(folder: &Path) -> Result<OwnedFd, UnixError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |errno| UnixError::Io { doing, path, errno }
    };
    let start = if folder.is_absolute() { "/" } else { "." };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = PathBuf::from(start);
    let mut fd = fs::open(start, flags, Mode::empty()).map_err(failed("open", &at))?;
    for part in folder.components() {
        let part = match part {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            Component::ParentDir => OsStr::new(".."),
            Component::Normal(part) => part,
        };
        at.push(part);
        if let Err(errno) = fs::mkdirat(&fd, part, Mode::from_raw_mode(0o755))
            && !matches!(errno, Errno::EXIST | Errno::ROFS | Errno::ACCESS | Errno::PERM)
        {
            return Err(failed("make", &at)(errno));
        }
        fd = match fs::openat(&fd, part, flags, Mode::empty()) {
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(UnixError::NoFolder { folder: at }),
            other => other.map_err(failed("open", &at))?,
        };
    }
    Ok(fd)
}

/// Whether `name` is free, or may be replaced.
fn check_place(folder: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), UnixError> {
    let stat = match fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(|errno| UnixError::Io { doing: "look at", path: path.to_owned(), errno })?,
    };
    let found = match FileType::from_raw_mode(stat.st_mode) {
        // Whoever made it: nobody listens, and whom it belonged to has no claim to a path that we were told to use.
        FileType::Socket if dial(folder, name).is_err_and(|errno| errno == Errno::CONNREFUSED) => return Ok(()),
        FileType::Socket => return Err(UnixError::InUse { path: path.to_owned() }),
        FileType::Symlink => "a symbolic link",
        FileType::Directory => "a folder",
        FileType::RegularFile => "a file",
        _ => "something else",
    };
    Err(UnixError::Misplaced { path: path.to_owned(), found })
}

/// Makes a socket that listens at `name`, which must be free.
fn bind(folder: &OwnedFd, name: &OsStr, backlog: i32) -> io::Result<(OwnedFd, (u64, u64))> {
    let fd = socket()?;
    // The file gets its mode when it is made, so that there is no moment with another. This process has one thread.
    let umask = rustix::process::umask(Mode::from_raw_mode(0o777 & !SOCKET_MODE.as_raw_mode()));
    let bound = rustix::net::bind(&fd, &address(folder, name)?);
    rustix::process::umask(umask);
    bound?;
    if let Some(group) = users::contract_group() {
        match fs::chownat(folder, name, None, Some(group), AtFlags::SYMLINK_NOFOLLOW) {
            // Not as root, nor a member: then it is ours alone to use.
            Ok(()) | Err(Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
    }
    rustix::net::listen(&fd, backlog)?;
    let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((fd, id_of(&stat)))
}

fn dial(folder: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let fd = socket()?;
    rustix::net::connect(&fd, &address(folder, name)?)?;
    Ok(fd)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Through the folder's descriptor: it is the folder that we looked at, whatever its path says by now.
fn address(folder: &OwnedFd, name: &OsStr) -> io::Result<SocketAddrUnix> {
    let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.as_bytes());
    SocketAddrUnix::new(path)
}

fn id_of(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Who is at the other end.
pub(super) fn credentials(fd: &OwnedFd) -> io::Result<Credentials> {
    // Not through rustix, whose process ids are never 0: the peer's is where it lives in another namespace.
    let mut peer = [libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX }];
    let count = option(fd, libc::SO_PEERCRED, &mut peer).map_err(|(errno, _)| errno)?;
    let [libc::ucred { pid, uid, gid }] = peer;
    if count != 1 || uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    Ok(Credentials { pid, uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups: peer_groups(fd)? })
}

/// The supplementary groups of who is at the other end.
fn peer_groups(fd: &OwnedFd) -> io::Result<Vec<Gid>> {
    // More than this nobody can have.
    const MOST: usize = 65_536;
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        match option(fd, libc::SO_PEERGROUPS, &mut groups) {
            Ok(count) => return Ok(groups.into_iter().take(count).map(Gid::from_raw).collect()),
            Err((Errno::RANGE, needed)) if needed > groups.len() && needed <= MOST => groups.resize(needed, 0),
            Err((errno, _)) => return Err(errno),
        }
    }
}

/// Types of which any bytes are a value.
trait Plain: Copy {}
impl Plain for libc::gid_t {}
impl Plain for libc::ucred {}

/// Reads a socket's option into `to`, and gives how many of them there are; with an error, how many there would be.
fn option<T: Plain>(fd: &OwnedFd, name: i32, to: &mut [T]) -> Result<usize, (Errno, usize)> {
    let mut bytes = libc::socklen_t::try_from(size_of_val(to)).map_err(|_| (Errno::RANGE, 0))?;
    // SAFETY: the kernel writes at most `bytes` bytes to `to`, which has as many and may hold any, and a length to `bytes`.
    let done =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, to.as_mut_ptr().cast(), &raw mut bytes) };
    let count = bytes as usize / size_of::<T>();
    if done == 0 {
        return Ok(count);
    }
    Err((Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO), count))
}

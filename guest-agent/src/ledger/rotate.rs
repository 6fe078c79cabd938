//! Begins streams, and moves the files of one that is over to `previous/<stream_id>/`.
//!
//! ```text
//!   1 stream file: retiring, synced
//!   2 events, status, result, request, acknowledgement, logs/, artifacts/   ── renamed ──►  previous/<stream_id>/
//!   3 stream file                                                          ── renamed ──►  previous/<stream_id>/
//!   4 stream file of the next stream, synced
//! ```
//!
//! Killed after 1 or within 2, the next writer finds `retiring` and goes on; after 3 it finds no stream and begins one.
//! All of it is done under the writers' lock. What is too old is removed later, without the lock.

use pika_cloud_common::{Event, paths};
use rustix::fs::{self, AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::error::LedgerError;
use super::folder::{Folder, read_at};
use super::format::{DROPPED, StreamFile};
use super::{room, system};

/// How many earlier streams are kept.
const KEPT_STREAMS: usize = 2;
/// Folders within folders that are removed with an old stream; what is deeper stays.
const MAX_REMOVE_DEPTH: usize = 256;

const STREAM_FILES: [&str; 8] = [
    paths::EVENTS,
    paths::STATUS,
    paths::RESULT,
    paths::REQUEST,
    paths::EVENTS_ACK,
    DROPPED,
    paths::LOGS_DIR,
    paths::ARTIFACTS_DIR,
];

/// The stream that the files hold, begun where there is none. One of another boot is moved aside.
pub(super) fn current_stream(folder: &Folder, boot_id: &str) -> Result<StreamFile, LedgerError> {
    match StreamFile::read(folder)? {
        Some(stream) if stream.boot_id == boot_id && !stream.retiring => Ok(stream),
        Some(stream) => begin_next(folder, stream, boot_id),
        None => match foreign_boot(folder)? {
            // Events that an older helper wrote in this boot are this stream's first.
            None => begin(folder, boot_id),
            Some(other) if other == boot_id => begin(folder, boot_id),
            Some(other) => begin_next(folder, StreamFile::new(system::random_id(), other), boot_id),
        },
    }
}

/// Moves `stream` aside and begins the next.
pub(super) fn begin_next(folder: &Folder, mut stream: StreamFile, boot_id: &str) -> Result<StreamFile, LedgerError> {
    if !is_stream_id(&stream.stream_id) {
        stream.stream_id = system::random_id();
    }
    if !stream.retiring {
        stream.retiring = true;
        stream.write(folder)?;
    }
    let previous = folder.child_or_create(paths::PREVIOUS_DIR)?;
    let place = previous.child_or_create(&stream.stream_id)?;
    for name in STREAM_FILES {
        match move_into(folder, &place, name) {
            // A folder that something is mounted on stays where it is.
            Err(LedgerError::Io { errno: Errno::BUSY | Errno::XDEV, .. }) if name == paths::ARTIFACTS_DIR => {}
            moved => moved?,
        }
    }
    move_into(folder, &place, paths::EVENTS_STREAM)?;
    begin(folder, boot_id)
}

fn move_into(folder: &Folder, place: &Folder, name: &str) -> Result<(), LedgerError> {
    match fs::renameat(folder, name, place, name) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(LedgerError::io("move aside", folder.path_of(name))(errno)),
    }
}

fn begin(folder: &Folder, boot_id: &str) -> Result<StreamFile, LedgerError> {
    folder.child_or_create(paths::LOGS_DIR)?;
    folder.child_or_create(paths::ARTIFACTS_DIR)?;
    // Before the stream's own file, so that a stream without this one has lost it.
    folder.open_or_create_file(paths::EVENTS, OFlags::RDWR)?;
    let stream = StreamFile::new(system::random_id(), boot_id.to_owned());
    stream.write(folder)?;
    room::keep_reserve(folder);
    Ok(stream)
}

/// The boot that the events of a file without a stream name in their first 64 KiB, if there are any.
fn foreign_boot(folder: &Folder) -> Result<Option<String>, LedgerError> {
    let Some((fd, _)) = folder.open_file(paths::EVENTS, OFlags::RDONLY)? else { return Ok(None) };
    let mut block = vec![0; 64 * 1024];
    let read = read_at(&fd, &mut block, 0).map_err(LedgerError::io("read", folder.path_of(paths::EVENTS)))?;
    let events = block[..read].split(|&byte| byte == b'\n').filter_map(|line| Event::decode(line).ok());
    Ok(events.filter_map(|event| event.boot_id).next_back())
}

/// Whether a cursor's or a file's stream id is one that we made; only then it may be part of a path.
fn is_stream_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Opens the files of an earlier stream, where they are kept.
pub fn open_previous(folder: &Folder, stream_id: &str) -> Result<Option<(Folder, StreamFile)>, LedgerError> {
    if !is_stream_id(stream_id) {
        return Ok(None);
    }
    let Some(previous) = folder.child(paths::PREVIOUS_DIR)? else { return Ok(None) };
    let Some(place) = previous.child(stream_id)? else { return Ok(None) };
    Ok(StreamFile::read(&place)?.map(|stream| (place, stream)))
}

/// Whether an earlier stream that is kept was begun for that request.
pub fn was_requested(folder: &Folder, request_id: &str) -> bool {
    let Ok(Some(previous)) = folder.child(paths::PREVIOUS_DIR) else { return false };
    let of = |name: &String| StreamFile::read(&previous.child(name).ok()??).ok()?;
    names_in(&previous).iter().filter_map(of).any(|stream| stream.request_id.as_deref() == Some(request_id))
}

/// Removes all but the newest earlier streams. Best effort: what cannot be removed now is tried again next time.
pub fn prune_previous(folder: &Folder) {
    let Ok(Some(previous)) = folder.child(paths::PREVIOUS_DIR) else { return };
    let mut streams: Vec<_> = names_in(&previous)
        .into_iter()
        .filter_map(|name| {
            let stat = fs::statat(&previous, name.as_str(), AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some(((stat.st_mtime, stat.st_mtime_nsec), name))
        })
        .collect();
    streams.sort();
    let too_many = streams.len().saturating_sub(KEPT_STREAMS);
    for (_, name) in streams.drain(..too_many) {
        remove_tree(&previous, &name, MAX_REMOVE_DEPTH);
    }
}

fn names_in(folder: &Folder) -> Vec<String> {
    let Ok(entries) = fs::Dir::read_from(folder) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned));
    names.filter(|name| name != "." && name != "..").collect()
}

/// Removes `name` and what is below it, without following a link.
fn remove_tree(folder: &Folder, name: &str, depth: usize) {
    if depth > 0
        && let Ok(Some(inner)) = folder.child(name)
    {
        if let Ok(entries) = fs::Dir::read_from(&inner) {
            for entry in entries.flatten() {
                let Ok(below) = entry.file_name().to_str() else {
                    let _ = fs::unlinkat(&inner, entry.file_name(), AtFlags::empty());
                    continue;
                };
                if below == "." || below == ".." {
                    continue;
                }
                if entry.file_type() == FileType::Directory {
                    remove_tree(&inner, below, depth - 1);
                } else {
                    let _ = fs::unlinkat(&inner, below, AtFlags::empty());
                }
            }
        }
        let _ = fs::unlinkat(folder, name, AtFlags::REMOVEDIR);
    } else {
        let _ = fs::unlinkat(folder, name, AtFlags::empty());
    }
}

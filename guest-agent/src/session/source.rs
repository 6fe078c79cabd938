//! Finds the stream that a session carries, and where in it to begin.
//!
//! ```text
//!   no cursor, or one of a stream that is gone ──► the current stream, from its first event
//!   cursor of the current stream ── digest holds ──► behind the cursor       (below first_seq: gap)
//!                                └─ it does not  ──► from the first event    (rewound)
//!   cursor of an earlier stream that is kept    ──► that one, to its end
//! ```

use std::collections::BTreeMap;

use pika_cloud_common::wire::{Cursor, GuestHello, HostHello, Notice, PROTOCOL, Role};
use pika_cloud_common::{SCHEMA_VERSION, paths};
use rustix::fs::OFlags;

use super::core::Opened;
use crate::ledger::scan::{self, Mark};
use crate::ledger::{self, AckFile, Folder, Ledger, LedgerError, OwnerFile, StreamFile, system};
use crate::supervise;

/// A stream that a session carries.
#[derive(Debug)]
pub struct Source {
    /// Where its files are.
    pub folder: Folder,
    /// Which it is.
    pub stream_id: String,
    /// Events behind this one are sent.
    pub after: u64,
    /// The next byte of each log.
    pub logs: BTreeMap<String, u64>,
    /// It is an earlier one.
    pub previous: bool,
}

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The files cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// An owner of a higher term was here.
    #[error("this owner's term is {given}, and one of term {seen} was here: it has taken over")]
    StaleTerm {
        /// The host's.
        given: u64,
        /// The highest so far.
        seen: u64,
    },
}

/// Finds the stream for `hello`; an owner's session is recorded as `session`.
pub fn open(ledger: &Ledger, hello: &HostHello, session: &str) -> Result<(Source, Opened), OpenError> {
    let owner = hello.role == Role::Owner;
    let guard = if owner { Some(ledger.lock_session()?) } else { None };
    if guard.is_some() {
        let seen = OwnerFile::read(ledger.folder()).unwrap_or_default().term;
        if hello.term < seen {
            return Err(OpenError::StaleTerm { given: hello.term, seen });
        }
    }
    let mut locked = ledger.lock()?;
    supervise::settle_lost(&mut locked)?;
    // The events are the truth: where there is no room for what follows from them, the host gets them all the same.
    locked.mend().or_else(|error| if error.is_full() { Ok(()) } else { Err(error) })?;
    let current = (locked.stream().clone(), locked.last().seq);
    drop(locked);
    let (source, opened) = choose(ledger, hello.after.as_ref(), current)?;
    if guard.is_some() {
        let stream_id = source.stream_id.clone();
        OwnerFile { term: hello.term, session: session.to_owned(), stream_id }.write(ledger.folder())?;
    }
    Ok((source, opened))
}

fn choose(
    ledger: &Ledger,
    cursor: Option<&Cursor>,
    (current, current_seq): (StreamFile, u64),
) -> Result<(Source, Opened), LedgerError> {
    let root = Folder::open_or_create(ledger.folder().path())?;
    let earlier = match cursor {
        Some(cursor) if cursor.stream_id != current.stream_id => ledger::open_previous(&root, &cursor.stream_id)?,
        _ => None,
    };
    let (folder, stream, previous) = match earlier {
        Some((folder, stream)) => (folder, stream, true),
        None => (root, current, false),
    };
    let cursor = cursor.filter(|cursor| cursor.stream_id == stream.stream_id);
    let last_seq = if previous { last_seq_of(&folder, &stream)? } else { current_seq };
    let place = find_place(&folder, &stream, cursor, last_seq)?;
    let acked_seq = AckFile::read(&folder, &stream.stream_id).seq;
    let hello = GuestHello {
        protocol: PROTOCOL,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        schema_version: SCHEMA_VERSION,
        stream_id: stream.stream_id.clone(),
        boot_id: stream.boot_id,
        machine_uuid: system::machine_uuid(),
        first_seq: stream.base.seq.saturating_add(1),
        first_digest: (stream.base.seq > 0).then_some(stream.base.digest),
        last_seq,
        request_id: stream.request_id,
    };
    let source = Source { folder, stream_id: stream.stream_id, after: place.after, logs: place.logs, previous };
    Ok((source, Opened { hello, notices: place.notices, previous, acked_seq }))
}

struct Place {
    after: u64,
    logs: BTreeMap<String, u64>,
    notices: Vec<Notice>,
}

/// The last event of an earlier stream.
fn last_seq_of(folder: &Folder, stream: &StreamFile) -> Result<u64, LedgerError> {
    let mark = mark_of(folder, stream, u64::MAX)?;
    Ok(mark.map_or(stream.base.seq, |mark| mark.seq))
}

/// Where the stream stood at `seq`.
fn mark_of(folder: &Folder, stream: &StreamFile, seq: u64) -> Result<Option<Mark>, LedgerError> {
    let reading = |errno| LedgerError::io("read", folder.path_of(paths::EVENTS))(errno);
    let Some((fd, stat)) = folder.open_file(paths::EVENTS, OFlags::RDONLY)? else { return Ok(None) };
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let len = scan::end_of_whole_lines(&fd, size).map_err(reading)?;
    scan::mark_at(&fd, len, stream.base.seq, stream.base.digest, seq).map(Some).map_err(reading)
}

fn find_place(
    folder: &Folder,
    stream: &StreamFile,
    cursor: Option<&Cursor>,
    last_seq: u64,
) -> Result<Place, LedgerError> {
    let base = &stream.base;
    let mut place = Place { after: base.seq, logs: BTreeMap::new(), notices: Vec::new() };
    let Some(cursor) = cursor else { return Ok(place) };
    let digest_at_cursor = match cursor.seq {
        seq if seq == base.seq => Some(base.digest),
        seq if seq > base.seq => mark_of(folder, stream, seq)?.filter(|mark| mark.seq == seq).map(|mark| mark.digest),
        _ => None,
    };
    if cursor.seq < base.seq {
        // What was trimmed can no longer be compared.
        place.notices.push(Notice::Gap { first_seq: base.seq.saturating_add(1) });
        place.logs.clone_from(&cursor.logs);
    } else if digest_at_cursor == Some(cursor.digest) {
        place.after = cursor.seq;
        place.logs.clone_from(&cursor.logs);
    } else {
        place.notices.push(Notice::Rewound { last_seq });
    }
    Ok(place)
}

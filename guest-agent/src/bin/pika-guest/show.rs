//! The verbs that write nothing.

use std::io::Write as _;
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::MAX_DOCUMENT_BYTES;
use pika_cloud_common::wire::PROTOCOL;
use pika_cloud_common::{SCHEMA_VERSION, Status, paths};
use pika_guest_agent::ledger::{Folder, Ledger, LedgerError, StreamFile};
use pika_guest_agent::session::{EventTail, Piece, Tailed};
use pika_guest_agent::watch::Watch;

use crate::args::{EventsArgs, StatusArgs, VersionArgs};
use crate::exit::Failure;

/// Shows `status.json`.
pub(crate) fn status(args: &StatusArgs) -> Result<u8, Failure> {
    let folder = existing_root()?;
    let Some(text) = folder.read(paths::STATUS, MAX_DOCUMENT_BYTES)? else {
        return Err(Failure::NoInput(format!("no state was reported yet in {}", folder.path().display())));
    };
    let status = Status::decode(&text)
        .map_err(|source| LedgerError::Document { path: folder.path_of(paths::STATUS), source })?;
    let shown = if args.json {
        text
    } else {
        let message = if status.message.is_empty() { "" } else { ": " };
        format!("{} since {}{message}{}\n", status.state, status.updated_at, status.message).into_bytes()
    };
    print(&shown).map(|()| 0)
}

/// Prints the events as their lines stand in the file.
pub(crate) fn events(args: &EventsArgs) -> Result<u8, Failure> {
    let folder = if args.follow { Folder::open_or_create(&Ledger::root_path())? } else { existing_root()? };
    let watch = args.follow.then(|| Watch::new(&folder));
    let stream_id = || StreamFile::read(&folder).ok().flatten().map(|stream| stream.stream_id);
    let mut current = stream_id();
    let mut tail = EventTail::new(args.after);
    let mut out = Vec::new();
    loop {
        let tailed = tail.read(&folder, |piece| {
            if let Piece::Event { line, .. } = piece {
                out.extend_from_slice(line);
                out.push(b'\n');
            }
        })?;
        if !out.is_empty() && print(&out).is_err() {
            // Whoever read it has seen enough.
            return Ok(0);
        }
        out.clear();
        match (tailed, &watch) {
            (Tailed::More, _) => {}
            (Tailed::Replaced, _) => {
                let now = stream_id();
                if now == current {
                    tail.reopen();
                } else {
                    tail.begin(0);
                }
                current = now;
            }
            (Tailed::AtEnd, Some(watch)) => watch.wait(Instant::now() + Duration::from_secs(3600)),
            (Tailed::AtEnd, None) => return Ok(0),
        }
    }
}

/// Says which agent this is; whoever has put it somewhere can compare the digest.
pub(crate) fn version(args: &VersionArgs) -> Result<u8, Failure> {
    let program = std::fs::read("/proc/self/exe");
    let program = program.map_err(|source| Failure::Stdio { doing: "cannot read /proc/self/exe", source })?;
    let (agent, digest) = (env!("CARGO_PKG_VERSION"), format!("sha256:{}", Digest::of(&program)));
    let shown = if args.json {
        let fields = serde_json::json!({
            "agent": agent, "protocol": PROTOCOL, "schema_version": SCHEMA_VERSION, "digest": digest,
        });
        format!("{fields}\n")
    } else {
        format!("pika-guest {agent}, protocol {PROTOCOL}, schema_version {SCHEMA_VERSION}, {digest}\n")
    };
    print(shown.as_bytes()).map(|()| 0)
}

fn existing_root() -> Result<Folder, Failure> {
    let path = Ledger::root_path();
    Folder::open(&path)?
        .ok_or_else(|| Failure::NoInput(format!("{} does not exist: nothing was reported yet", path.display())))
}

fn print(text: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text)
        .and_then(|()| out.flush())
        .map_err(|source| Failure::Stdio { doing: "cannot write to standard output", source })
}

//! What a crash, a disk and an editor can do to a journal, and what its followers see.

mod commits;
mod crashes;
mod disk;
mod edits;
mod faults;
mod followers;
mod memory;
mod views;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::{Evidence, Outcome};
use pika_cloud_common::{EventHead, SCHEMA_VERSION, Timestamp, Verdict};

use super::format::{self, Body, HostRecord, LogMark};
use super::{Durable, Follower, Fs, JournalError, Record, Records, Store, View};
use crate::clock::Now;

const RUNTIME: &str = "job-7";
const FILE_NAME: &str = "journal.jsonl";
const MIB: u64 = 1 << 20;

/// So many seconds after a boot, and after some day.
fn now(secs: u64) -> Now {
    Now { mono: Duration::from_micros(secs * 1_000_000 + 7), wall: Duration::from_secs(1_800_000_000 + secs) }
}

/// A runtime's records with the files under them.
struct Journal<F> {
    store: Store<F>,
    records: Records,
    secs: u64,
    /// All lines that were committed.
    lines: Vec<u8>,
}

impl<F: Fs> Journal<F> {
    fn open(fs: F) -> Result<Self, JournalError> {
        Self::bounded(fs, MIB)
    }

    fn bounded(fs: F, event_bytes: u64) -> Result<Self, JournalError> {
        let (mut store, view) = Store::open(fs, RUNTIME)?;
        store.settle()?;
        let records = Records::new(view, event_bytes, store.filled());
        Ok(Self { store, records, secs: 0, lines: Vec::new() })
    }

    fn view(&self) -> &View {
        self.records.view()
    }

    fn now(&mut self) -> Now {
        self.secs += 1;
        now(self.secs)
    }

    fn begin(&mut self) {
        let now = self.now();
        self.records.begin("v1:aa".to_owned(), 0, now);
    }

    fn host(&mut self, record: HostRecord) {
        let now = self.now();
        self.records.host(record, now);
    }

    /// As the driver does with what the session gives it.
    fn event(&mut self, line: &str) {
        let head = EventHead::decode(line.as_bytes()).unwrap();
        let cursor = self.view().cursor.clone();
        let (seq, before) = cursor.map_or((0, Digest::EMPTY_STREAM), |cursor| (cursor.seq, cursor.digest));
        if head.seq > seq + 1 {
            self.host(HostRecord::Missing { after_seq: seq, count: head.seq - seq - 1 });
        }
        let now = self.now();
        self.records.guest(now, &head, line.as_bytes(), before.chain(line.as_bytes()));
    }

    fn commit(&mut self) -> Result<Durable, JournalError> {
        self.commit_as(false)
    }

    fn commit_as(&mut self, last: bool) -> Result<Durable, JournalError> {
        let Some(commit) = self.records.take_commit(last) else { return Ok(self.store.durable()) };
        let durable = self.store.commit(&commit)?;
        self.lines.extend_from_slice(&commit.records);
        self.records.recycle(commit);
        Ok(durable)
    }
}

fn event(seq: u64, kind: &str, details: &str) -> String {
    format!(
        r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-31T12:00:00.000000Z","kind":"{kind}","message":"m{seq}"{details}}}"#
    )
}

fn stream(stream_id: &str, after_seq: u64, digest: Digest) -> HostRecord {
    let (stream_id, boot_id, agent) = (stream_id.to_owned(), "boot-1".to_owned(), "0.1.0".to_owned());
    HostRecord::Stream { stream_id, boot_id, agent, after_seq, digest }
}

fn logs(guest: u64, host: u64) -> HostRecord {
    HostRecord::Logs { logs: BTreeMap::from([("guest.log".to_owned(), LogMark { guest, host })]) }
}

fn finished() -> HostRecord {
    HostRecord::Finished { destroyed: true, restart_in_ms: None }
}

fn verdict(message: &str) -> HostRecord {
    HostRecord::Verdict {
        verdict: Box::new(Verdict {
            schema_version: SCHEMA_VERSION,
            runtime_id: RUNTIME.to_owned(),
            incarnation: 1,
            outcome: Outcome::Failed { exit_code: Some(3) },
            decided_at: Timestamp::from_unix(1, 2),
            message: message.to_owned(),
            evidence: Evidence::default(),
            extra: serde_json::Map::default(),
        }),
    }
}

/// A whole small life, committed in several steps; gives how far it is durable and the view after each.
fn small_life<F: Fs>(journal: &mut Journal<F>) -> Vec<(Durable, View)> {
    type Step<F> = dyn Fn(&mut Journal<F>);
    let steps: [&Step<F>; 5] = [
        &|journal| journal.begin(),
        &|journal| {
            journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
            journal.host(HostRecord::StartSent { request_id: "job-7.1".to_owned() });
        },
        &|journal| {
            journal.event(&event(1, "starting", ""));
            journal.event(&event(2, "starting", r#","details":{"progress":{"name":"compile €"}}"#));
            journal.host(logs(10, 10));
        },
        &|journal| journal.event(&event(3, "failed", r#","details":{"exit_code":3}"#)),
        &|journal| journal.host(verdict("it failed")),
    ];
    let mut synced = Vec::new();
    for step in steps {
        step(journal);
        let durable = journal.commit().unwrap();
        synced.push((durable, journal.view().clone()));
    }
    synced
}

fn bytes_of(folder: &Path) -> Vec<u8> {
    fs::read(folder.join(FILE_NAME)).unwrap()
}

fn put(folder: &Path, bytes: &[u8]) {
    fs::write(folder.join(FILE_NAME), bytes).unwrap();
}

/// The records among some lines.
fn records(bytes: &[u8]) -> Vec<Record> {
    let lines = bytes.split(|byte| *byte == b'\n');
    lines
        .filter(|line| !line.is_empty() && !line.starts_with(b"{\"journal\""))
        .map(|line| format::read(line).unwrap())
        .collect()
}

/// The view after each number of records.
fn prefix_views(bytes: &[u8]) -> Vec<View> {
    let mut view = View::default();
    let mut views = vec![view.clone()];
    for record in records(bytes) {
        view.apply(&record);
        views.push(view.clone());
    }
    views
}

fn follow_all(folder: &Path) -> Result<Vec<Record>, JournalError> {
    let mut follower = Follower::new(folder, None);
    let mut records = Vec::new();
    while let Some((record, _)) = follower.try_next()? {
        records.push(record);
    }
    Ok(records)
}

fn sealed(content: &str) -> Vec<u8> {
    format!("{content},\"crc\":\"{:08x}\"}}\n", crc32fast::hash(content.as_bytes())).into_bytes()
}

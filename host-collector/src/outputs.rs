//! What is derived from a journal: the verdict, and the files that a user reads.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use pika_cloud_common::limits::MAX_DOCUMENT_BYTES;
use pika_cloud_common::verdict::{Collection, Evidence, LastEvent, Outcome};
use pika_cloud_common::{RuntimeSpec, SCHEMA_VERSION, State, Verdict};
use serde_json::Value;

use crate::error::Error;
use crate::journal::{self, Body, Follower, HostRecord, View};
use crate::state_dir::is_stale_temporary;
use crate::words::deceives;

mod copy;

pub(crate) use copy::copy;

/// The verdict that a journal leads to, once its end is decided and collection is over.
pub(crate) fn verdict(spec: &RuntimeSpec, view: &View) -> Verdict {
    // The machine decides an end before it concludes; a journal without one is of a crash that cannot have been here.
    let (outcome, message, error, instance_status) = match &view.ended {
        Some(end) => (end.outcome.clone(), end.message.clone(), end.error.clone(), end.instance_status.clone()),
        None => (Outcome::Unreachable, "no end was recorded".to_owned(), None, None),
    };
    let decided_at = view.ended.as_ref().map(|end| end.at).unwrap_or_default().timestamp();
    let collection =
        view.collection.clone().map(|collection| Collection { error: collection.error.map(clip), ..collection });
    let last_event = view.last_event().map(quoted);
    let details = view.terminal.as_ref().and_then(|event| event.details.as_ref());
    let said = details.map(Said::of).unwrap_or_default();
    Verdict {
        schema_version: SCHEMA_VERSION,
        runtime_id: spec.identity.runtime_id.clone(),
        incarnation: view.incarnation,
        outcome,
        decided_at,
        message: clip(message),
        evidence: Evidence {
            signal: said.signal,
            oom_kill: said.oom_kill,
            full: said.full,
            last_event,
            instance_status: instance_status.map(clip),
            error: error.map(clip),
            console: view.console.clone(),
            collection,
            bad_lines: view.bad_lines,
            gaps: view.gaps,
            restarts: view.restarts,
        },
        extra: serde_json::Map::default(),
    }
}

/// What the details of a guest's terminal event give as evidence. What is not of the contract's form is none.
#[derive(Debug, Default, PartialEq)]
struct Said {
    signal: Option<i32>,
    oom_kill: Option<bool>,
    full: Vec<String>,
}

impl Said {
    /// A supervisor names three file systems, and short.
    const MAX_FULL: usize = 8;
    const MAX_FULL_BYTES: usize = 256;

    // Invariant 5: whatever the guest sends, this much of it is taken.
    fn of(details: &Value) -> Self {
        let names = details.get("full").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        let fits = |name: &&str| (1..=Self::MAX_FULL_BYTES).contains(&name.len()) && !name.chars().any(deceives);
        let names = names.filter(fits);
        Self {
            // Of a signal that exists.
            signal: details
                .get("signal")
                .and_then(Value::as_i64)
                .filter(|signal| (1..=64).contains(signal))
                .and_then(|signal| signal.try_into().ok()),
            oom_kill: details.get("oom_kill").and_then(Value::as_bool),
            full: names.take(Self::MAX_FULL).map(str::to_owned).collect(),
        }
    }
}

/// Removes what writers that died left of files that they were about to replace. The caller holds the runtime's lock. Best
/// effort: what stays is in nobody's way. Folders are [`ArtifactTree`](crate::artifacts::ArtifactTree)'s.
pub(crate) fn remove_stale(outputs: &Path) {
    for entry in fs::read_dir(outputs).into_iter().flatten().flatten() {
        let path = entry.path();
        if is_stale_temporary(&path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// A guest's words are quoted as far as records are, which leaves the verdict one that its readers take, and that finds room on
/// a full disk.
fn clip(mut text: String) -> String {
    journal::clip(&mut text);
    text
}

/// The last event, as it is quoted. A guest may call a kind of its own as it likes.
fn quoted(event: LastEvent) -> LastEvent {
    let kind = match event.kind {
        State::Unknown(name) => State::Unknown(clip(name)),
        known => known,
    };
    LastEvent { kind, message: clip(event.message), ..event }
}

/// Writes an incarnation's `events.jsonl`, `status.json`, `result.json` and `verdict.json` from the journal in `runtime`.
/// Several may do that at once; a reader finds whole files.
pub(crate) fn derive(runtime: &Path, outputs: &Path, incarnation: u32) -> Result<(), Error> {
    let fail = |source: io::Error| Error::Outputs { path: outputs.to_owned(), source };
    fs::create_dir_all(outputs).map_err(fail)?;
    let mut documents = [("status.json", None), ("result.json", None), ("verdict.json", None)];
    let mut events = Replacement::begin(outputs.join("events.jsonl")).map_err(fail)?;
    let mut journal = Follower::unsynced(runtime);
    loop {
        let next = journal.try_next()?;
        // What the oldest segments said is in the snapshot that took their place; the events in them are gone.
        if let Some(base) = journal.take_base().filter(|base| base.incarnation == incarnation) {
            let known = [base.status.and_then(pretty), base.result.and_then(pretty), base.verdict.and_then(pretty)];
            for ((_, document), known) in documents.iter_mut().zip(known) {
                *document = known.or_else(|| document.take());
            }
        }
        let Some((record, _)) = next else { break };
        if record.inc != incarnation {
            continue;
        }
        match record.body {
            Body::Guest(line) => {
                events.write(line.get().as_bytes()).and_then(|()| events.write(b"\n")).map_err(fail)?;
            }
            Body::Host(HostRecord::Status { status }) => documents[0].1 = pretty(&status),
            Body::Host(HostRecord::Result { result }) => documents[1].1 = pretty(&result),
            Body::Host(HostRecord::Verdict { verdict }) => documents[2].1 = pretty(&verdict),
            Body::Host(_) => {}
        }
    }
    events.finish().map_err(fail)?;
    for (name, text) in documents {
        if let Some(text) = text {
            let mut file = Replacement::begin(outputs.join(name)).map_err(fail)?;
            file.write(text.as_bytes()).and_then(|()| file.finish()).map_err(fail)?;
        }
    }
    Ok(())
}

/// A file that takes another's place when it is whole, and leaves nothing behind when it is not.
struct Replacement {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl Replacement {
    fn begin(path: PathBuf) -> io::Result<Self> {
        let temporary = crate::state_dir::temporary_beside(&path);
        let file = BufWriter::new(File::create(&temporary)?);
        Ok(Self { path, temporary, file })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        fs::rename(&self.temporary, &self.path)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // After the rename there is nothing of that name.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// A document for people to read, as long as its readers take it so: blanks alone make many megabytes of one that is nested
/// deep and wide, and that is written without them.
fn pretty(document: impl serde::Serialize) -> Option<String> {
    let mut text = AtMost(Vec::new());
    if serde_json::to_writer_pretty(&mut text, &document).is_err() {
        text.0 = serde_json::to_vec(&document).ok()?;
    }
    String::from_utf8(text.0).ok().map(|text| text + "\n")
}

/// Takes what fits in a document of the contract, with a newline behind it.
struct AtMost(Vec<u8>);

impl io::Write for AtMost {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() >= MAX_DOCUMENT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! What is derived from a journal: the verdict, and the files that a user reads.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use pika_cloud_common::verdict::{Evidence, Outcome};
use pika_cloud_common::{RuntimeSpec, SCHEMA_VERSION, Verdict};

use crate::error::Error;
use crate::journal::{Body, Follower, HostRecord, View};

/// The verdict that a journal leads to, once its end is decided and collection is over.
pub(crate) fn verdict(spec: &RuntimeSpec, view: &View) -> Verdict {
    // The machine decides an end before it concludes; a journal without one is of a crash that cannot have been here.
    let (outcome, message, error, instance_status) = match &view.ended {
        Some(end) => (end.outcome.clone(), end.message.clone(), end.error.clone(), end.instance_status.clone()),
        None => (Outcome::Unreachable, "no end was recorded".to_owned(), None, None),
    };
    let details = view.terminal.as_ref().and_then(|event| event.details.as_ref());
    let signal = details.and_then(|details| details.get("signal")?.as_i64()?.try_into().ok());
    Verdict {
        schema_version: SCHEMA_VERSION,
        runtime_id: spec.identity.runtime_id.clone(),
        incarnation: view.incarnation,
        outcome,
        decided_at: crate::clock::now(),
        message,
        evidence: Evidence {
            signal,
            last_event: view.last_event(),
            instance_status,
            error,
            collection: view.collection.clone(),
            bad_lines: view.bad_lines,
            gaps: view.gaps,
        },
        extra: serde_json::Map::default(),
    }
}

/// Writes an incarnation's `events.jsonl`, `status.json`, `result.json` and `verdict.json` from the journal in `runtime`.
pub(crate) fn derive(runtime: &Path, outputs: &Path, incarnation: u32) -> Result<(), Error> {
    let fail = |source: io::Error| Error::Outputs { path: outputs.to_owned(), source };
    fs::create_dir_all(outputs).map_err(fail)?;
    let events_path = outputs.join("events.jsonl.new");
    let mut events = BufWriter::new(File::create(&events_path).map_err(fail)?);
    let mut documents = [("status.json", None), ("result.json", None), ("verdict.json", None)];
    let mut journal = Follower::new(runtime, None);
    while let Some((record, _)) = journal.try_next()? {
        if record.inc != incarnation {
            continue;
        }
        match record.body {
            Body::Guest(line) => {
                events.write_all(line.get().as_bytes()).and_then(|()| events.write_all(b"\n")).map_err(fail)?;
            }
            Body::Host(HostRecord::Status { status }) => documents[0].1 = pretty(&status),
            Body::Host(HostRecord::Result { result }) => documents[1].1 = pretty(&result),
            Body::Host(HostRecord::Verdict { verdict }) => documents[2].1 = pretty(&verdict),
            Body::Host(_) | Body::Journal(_) => {}
        }
    }
    events.flush().map_err(fail)?;
    fs::rename(&events_path, outputs.join("events.jsonl")).map_err(fail)?;
    for (name, text) in documents {
        if let Some(text) = text {
            let temporary = outputs.join(format!("{name}.new"));
            fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, outputs.join(name))).map_err(fail)?;
        }
    }
    Ok(())
}

fn pretty(document: &impl serde::Serialize) -> Option<String> {
    serde_json::to_string_pretty(document).ok().map(|text| text + "\n")
}

/// Copies an incarnation's outputs to a folder of the user's, in place of what an earlier copy left there.
pub(crate) fn copy(outputs: &Path, target: &Path) -> Result<(), Error> {
    let fail = |source: io::Error| Error::Outputs { path: target.to_owned(), source };
    fs::create_dir_all(target).map_err(fail)?;
    for name in ["events.jsonl", "status.json", "result.json", "verdict.json", "artifacts.sha256"] {
        match fs::copy(outputs.join(name), target.join(name)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => remove(&target.join(name)).map_err(fail)?,
            Err(error) => return Err(fail(error)),
        }
    }
    for name in ["logs", "artifacts"] {
        remove(&target.join(name)).map_err(fail)?;
        fs::create_dir_all(target.join(name)).map_err(fail)?;
        copy_tree(&outputs.join(name), &target.join(name)).map_err(fail)?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Folders and regular files: there is nothing else in a tree of ours.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

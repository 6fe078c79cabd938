//! The documents and messages below `fixtures/`, and how each kind of them is read.
//!
//! A folder is a kind, named as its schema: every file in it is one line that re-encodes byte for byte.
//! `foreign/KIND` holds what others wrote, which re-encodes to the same JSON; `wrong/KIND` what is refused.

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use pika_cloud_common::wire::{GuestMessage, HostMessage};
use pika_cloud_common::{Event, GuestRequest, RunResult, RuntimeSpec, Status, Verdict};

pub const KINDS: [&str; 8] =
    ["event", "status", "result", "guest-request", "verdict", "runtime-spec", "session-host", "session-guest"];

pub struct Fixture {
    /// Below `fixtures/`, without its ending.
    pub name: String,
    /// Without the final newline.
    pub text: String,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The fixtures in a folder below `fixtures/`, sorted by name; at least one.
pub fn fixtures(folder: &str) -> Vec<Fixture> {
    let path = root().join("fixtures").join(folder);
    let mut found: Vec<Fixture> = fs::read_dir(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .map(|entry| {
            let path = entry.unwrap().path();
            assert_eq!(path.extension().unwrap(), "json", "{}", path.display());
            let text = fs::read_to_string(&path).unwrap();
            let text = text.strip_suffix('\n').unwrap_or_else(|| panic!("{}: no final newline", path.display()));
            let stem = path.file_stem().unwrap().to_str().unwrap();
            Fixture { name: format!("{folder}/{stem}"), text: text.to_owned() }
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!found.is_empty(), "no fixture in {}", path.display());
    found
}

/// Reads a document or message of that kind and writes it again; or says why it is refused.
pub fn reencode(kind: &str, text: &str) -> Result<String, String> {
    fn json<T: serde::Serialize, E: ToString>(read: Result<T, E>) -> Result<String, String> {
        read.map(|value| serde_json::to_string(&value).unwrap()).map_err(|error| error.to_string())
    }
    fn line<T: Debug, E: ToString>(read: Result<T, E>, write: impl Fn(&T, &mut Vec<u8>)) -> Result<String, String> {
        let message = read.map_err(|error| error.to_string())?;
        let mut out = b"before".to_vec();
        write(&message, &mut out);
        let out = String::from_utf8(out).unwrap();
        Ok(out.strip_prefix("before").unwrap().strip_suffix('\n').unwrap().to_owned())
    }
    let bytes = text.as_bytes();
    match kind {
        "event" => json(Event::decode(bytes)),
        "status" => json(Status::decode(bytes)),
        "result" => json(RunResult::decode(bytes)),
        "guest-request" => json(GuestRequest::decode(bytes)),
        "verdict" => json(Verdict::decode(bytes)),
        "runtime-spec" => json(RuntimeSpec::from_json(text)),
        "session-host" => line(HostMessage::decode(bytes), HostMessage::write),
        "session-guest" => line(GuestMessage::decode(bytes), GuestMessage::write),
        other => panic!("no kind {other}"),
    }
}

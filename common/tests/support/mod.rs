//! The documents and messages below `fixtures/`.
//!
//! A folder is a kind, named as its schema: every file in it is one line that re-encodes byte for byte.
//! `foreign/KIND` holds what others wrote, which re-encodes to the same JSON; `wrong/KIND` what is refused.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) const KINDS: [&str; 8] =
    ["event", "status", "result", "guest-request", "verdict", "runtime-spec", "session-host", "session-guest"];

pub(crate) struct Fixture {
    /// Below `fixtures/`, without its ending.
    pub(crate) name: String,
    /// Without the final newline.
    pub(crate) text: String,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The fixtures in a folder below `fixtures/`, sorted by name; at least one.
pub(crate) fn fixtures(folder: &str) -> Vec<Fixture> {
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

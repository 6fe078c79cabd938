//! The folder that `--output` names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::host::{files_below, read_text};

/// A folder of collected outputs.
#[derive(Debug)]
pub struct Outputs {
    folder: PathBuf,
}

/// SHA-256 as `sha256sum` writes it.
pub fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Outputs {
    /// Of a folder that may not be there yet.
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether there is such a thing in it.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// A file's bytes.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
    }

    /// A file's text.
    pub fn text(&self, name: &str) -> String {
        read_text(&self.path(name))
    }

    /// A document.
    pub fn json(&self, name: &str) -> Value {
        let text = self.text(name);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}: {text}"))
    }

    /// The verdict.
    pub fn verdict(&self) -> Value {
        self.json("verdict.json")
    }

    /// `events.jsonl`, decoded.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text("events.jsonl");
        text.lines().map(|line| serde_json::from_str(line).expect("an event is JSON")).collect()
    }

    /// The workload's output.
    pub fn log(&self) -> String {
        self.text("logs/guest.log")
    }

    /// Names of all artifacts below `artifacts/`, sorted.
    pub fn artifacts(&self) -> Vec<String> {
        let root = self.path("artifacts");
        let name = |path: PathBuf| path.strip_prefix(&root).map(|path| path.display().to_string());
        files_below(&root).into_iter().filter_map(|path| name(path).ok()).collect()
    }

    /// Has `sha256sum -c` look at the artifacts, and counts those that it found to be right.
    pub fn check_digests(&self) -> usize {
        let mut command = Command::new("sha256sum");
        let output = command.args(["--strict", "-c", "artifacts.sha256"]).current_dir(&self.folder).output();
        let output = output.expect("sha256sum runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "sha256sum: {said}{}", String::from_utf8_lossy(&output.stderr));
        said.lines().filter(|line| line.ends_with(": OK")).count()
    }
}

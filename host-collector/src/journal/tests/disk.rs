//! The disk behind a journal.

use std::os::unix::fs::MetadataExt as _;

use tempfile::TempDir;

use super::super::fs::segment_numbers;
use super::*;
use crate::journal::DiskFs;

#[test]
fn what_is_not_there_is_told_from_what_cannot_be_read() {
    let folder = TempDir::new().unwrap();
    let gone = DiskFs::new(&folder.path().join("gone"));
    assert!(gone.list().unwrap().is_empty());
    assert_eq!(gone.length(FILE_NAME).unwrap(), None);
    assert!(gone.device().is_err());
    fs::write(folder.path().join("file"), "").unwrap();
    let no_folder = DiskFs::new(&folder.path().join("file"));
    assert!(no_folder.list().is_err() && no_folder.length(FILE_NAME).is_err());
    let disk = DiskFs::new(folder.path());
    assert_eq!(disk.device().unwrap(), fs::metadata(folder.path()).unwrap().dev());
    assert_eq!((disk.list().unwrap(), disk.path(FILE_NAME)), (vec!["file".to_owned()], folder.path().join(FILE_NAME)));
}

/// The kernel tells of a page that it could not write to whoever had the file open then.
#[test]
fn what_was_appended_is_synced_through_the_same_descriptor() {
    let folder = TempDir::new().unwrap();
    let mut disk = DiskFs::new(folder.path());
    assert!(disk.sync("a").is_err(), "nothing is there to be synced");
    disk.append("a", b"x").unwrap();
    disk.sync_folder("a").unwrap();
    assert!(disk.sync("b").is_err() && disk.sync_folder("1/logs/b").is_err());
    fs::remove_file(folder.path().join("a")).unwrap();
    disk.sync("a").unwrap();
    assert!(disk.sync("a").is_err(), "once synced, it is let go of");
}

/// One name for each number.
#[test]
fn only_segments_are_read() {
    let names = ["journal.3.jsonl", FILE_NAME, "journal.12.jsonl", "journal.2.jsonl"];
    let others = ["journal.0.jsonl", "journal.1.jsonl", "journal.02.jsonl", "journal.+4.jsonl", "journal.5", "5.jsonl"];
    let names: Vec<String> = names.into_iter().chain(others).map(str::to_owned).collect();
    assert_eq!(segment_numbers(&names), [1, 2, 3, 12]);
}

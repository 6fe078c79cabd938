//! Every invariant of the README is named by code that holds it and by a test that can fail.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Rust files below a folder.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Which of `numbers` nothing in the files names as `Invariant N`.
fn unnamed(files: &[String], numbers: std::ops::RangeInclusive<u32>) -> Vec<u32> {
    let names = |text: &str, number: u32| {
        let name = format!("Invariant {number}");
        text.match_indices(&name).any(|(at, _)| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_digit()))
    };
    numbers.filter(|number| !files.iter().any(|text| names(text, *number))).collect()
}

#[test]
fn each_is_named_by_code_and_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (mut code, mut tests) = (Vec::new(), Vec::new());
    for folder in ["common", "guest-agent", "host-collector", "tests/tests"] {
        let mut files = Vec::new();
        sources(&root.join(folder), &mut files);
        for file in files.iter().filter(|file| !file.ends_with("tests/tests/invariants.rs")) {
            let text = fs::read_to_string(file).unwrap();
            if file.components().any(|part| part.as_os_str() == "tests") || file.ends_with("tests.rs") {
                tests.push(text);
            } else {
                let (before, behind) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
                code.push(before.to_owned());
                tests.push(behind.to_owned());
            }
        }
    }
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    assert!(
        readme.contains("\n9. ") && !readme.contains("\n10. "),
        "the README's list has another length than this test"
    );
    assert_eq!(unnamed(&code, 1..=9), Vec::<u32>::new(), "no code names these invariants");
    assert_eq!(unnamed(&tests, 1..=9), Vec::<u32>::new(), "no test names these invariants");
}

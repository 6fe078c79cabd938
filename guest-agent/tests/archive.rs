//! Artifacts: what is sent, in which order, and what is left out.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{Archive, ArchiveLimits, Entry, GuestMessage, HostMessage, Notice, Role};
use rig::{Guest, Said, Stream, misplace};

/// What an archive came to.
#[derive(Default)]
struct Archived {
    /// The paths in the order in which they came; folders end in `/`.
    order: Vec<String>,
    files: BTreeMap<String, (Vec<u8>, u32)>,
    skipped: Vec<(String, String)>,
    /// Files and folders, bytes, what was skipped, and whether anything is missing.
    done: Option<(u64, u64, u64, bool)>,
    problem: Option<String>,
    events: Vec<u64>,
}

fn ask(globs: &[&str], max_files: u64, max_bytes: u64, after: Option<&str>) -> HostMessage {
    HostMessage::Archive(Archive {
        globs: globs.iter().map(ToString::to_string).collect(),
        limits: ArchiveLimits { max_files, max_bytes },
        after: after.map(str::to_owned),
    })
}

fn session(guest: &Guest) -> Stream {
    let mut stream = guest.stream();
    stream.hello(Role::Observer, 0, None, true);
    stream.find_hello();
    stream
}

fn archive(guest: &Guest, globs: &[&str]) -> Archived {
    let mut stream = session(guest);
    stream.say(&ask(globs, 1_000_000, 1 << 40, None));
    collect(&mut stream)
}

/// Reads an archive to its end, and checks what must hold of any.
fn collect(stream: &mut Stream) -> Archived {
    let mut archived = Archived::default();
    let mut open: Option<Entry> = None;
    while archived.done.is_none() {
        let Said { message, bulk } = stream.next();
        match message {
            GuestMessage::Entry(entry) if entry.folder => {
                assert!(open.is_none() && entry.len == 0);
                archived.order.push(format!("{}/", entry.path));
            }
            GuestMessage::Entry(entry) => {
                match &open {
                    None => {
                        assert_eq!(entry.offset, 0);
                        archived.order.push(entry.path.clone());
                        archived.files.insert(entry.path.clone(), (Vec::new(), entry.mode));
                    }
                    Some(before) => {
                        assert_eq!(
                            (&before.path, before.size, before.offset + before.len),
                            (&entry.path, entry.size, entry.offset)
                        );
                    }
                }
                assert_eq!(bulk.len() as u64, entry.len);
                let bytes = &mut archived.files.get_mut(&entry.path).unwrap().0;
                bytes.extend_from_slice(&bulk);
                if let Some(digest) = entry.digest {
                    assert_eq!(digest, Digest::of(bytes));
                }
                open = entry.digest.is_none().then_some(entry);
            }
            GuestMessage::Event(_) => {
                let said = Said { message, bulk };
                archived.events.extend(said.event().map(|event| event.seq));
            }
            GuestMessage::Notice(Notice::Skipped { path, reason }) => archived.skipped.push((path, reason)),
            GuestMessage::Notice(Notice::ArchiveDone { files, bytes, skipped, truncated, problem }) => {
                assert!(open.is_none(), "a file was not ended");
                assert_eq!(truncated, problem.is_some());
                archived.problem = problem;
                archived.done = Some((files, bytes, skipped, truncated));
            }
            _ => {}
        }
    }
    archived
}

fn with_artifacts(files: &[&str]) -> Guest {
    let guest = Guest::new();
    guest.observe();
    for file in files {
        let path = guest.path("artifacts").join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("of {file}")).unwrap();
    }
    guest
}

#[test]
fn files_and_folders_in_order() {
    let guest = with_artifacts(&["a/x", "a.txt", "a/b/c", "z", "ä", "B"]);
    std::fs::create_dir(guest.path("artifacts/empty")).unwrap();
    std::fs::write(guest.path("artifacts/nothing"), "").unwrap();
    std::fs::set_permissions(guest.path("artifacts/z"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    let got = archive(&guest, &["**"]);
    assert_eq!(got.order, ["B", "a/", "a/b/", "a/b/c", "a/x", "a.txt", "empty/", "nothing", "z", "ä"]);
    assert_eq!(got.files["a/b/c"].0, b"of a/b/c");
    assert_eq!(got.files["nothing"].0, b"");
    assert_eq!(got.files["z"].1, 0o4751);
    let bytes: usize = got.files.values().map(|(bytes, _)| bytes.len()).sum();
    assert_eq!(got.done, Some((10, bytes as u64, 0, false)));
}

#[test]
fn globs_choose() {
    let guest = with_artifacts(&["report.xml", "a/report.xml", "a/b/report.xml", "a/log", "c/log"]);
    let order = |globs: &[&str]| archive(&guest, globs).order;
    assert_eq!(order(&["*.xml"]), ["report.xml"]);
    assert_eq!(order(&["**/*.xml"]), ["a/b/report.xml", "a/report.xml", "report.xml"]);
    assert_eq!(order(&["a/*"]), ["a/b/", "a/log", "a/report.xml"]);
    assert_eq!(order(&["?/log", "report.xml"]), ["a/log", "c/log", "report.xml"]);
    assert_eq!(order(&["nothing"]), [""; 0]);
    assert_eq!(order(&[]), [""; 0]);
    let mut stream = session(&guest);
    stream.say(&ask(&["../**"], 1, 1, None));
    let error = stream.find_error();
    assert_eq!(error["code"], "archive");
    assert!(error["message"].as_str().unwrap().contains("`../**` is no relative path"), "{error}");
    // That was no reason to end.
    stream.say(&ask(&["*.xml"], 10, 100, None));
    assert_eq!(collect(&mut stream).order, ["report.xml"]);
}

#[test]
fn it_goes_on_behind_a_path() {
    let guest = with_artifacts(&["a/b/c", "a/b/d", "a/x", "a.txt", "z"]);
    let all = archive(&guest, &["**"]).order;
    for (at, after) in all.iter().enumerate() {
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], 100, 1 << 20, Some(after.trim_end_matches('/'))));
        assert_eq!(collect(&mut stream).order, all[at + 1..], "after {after}");
    }
    for (after, first) in [("a/b/cc", "a/b/d"), ("a/", "a/b/"), ("a/b/c/gone", "a/b/d"), ("", "a/"), ("~", "")] {
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], 100, 1 << 20, Some(after)));
        assert_eq!(collect(&mut stream).order.first().map_or("", String::as_str), first, "after {after}");
    }
}

#[test]
fn what_is_no_file_is_left_out() {
    let guest = with_artifacts(&["a", "folder/b"]);
    let inside = guest.path("artifacts");
    misplace(&inside.join("fifo"), "fifo");
    misplace(&inside.join("link"), "link");
    misplace(&inside.join("socket"), "socket");
    std::os::unix::fs::symlink("/etc", inside.join("linked-folder")).unwrap();
    assert_eq!(archive(&guest, &["**"]).problem, None, "none of them can be an artifact");
    std::fs::write(inside.join(OsStr::from_bytes(b"not-\xff-utf8")), "x").unwrap();
    std::fs::write(inside.join("two\nlines"), "x").unwrap();
    let mut far = inside.clone();
    for _ in 0..100 {
        far.push("d");
    }
    std::fs::create_dir_all(&far).unwrap();
    let began = Instant::now();
    let got = archive(&guest, &["**"]);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(got.files.keys().collect::<Vec<_>>(), ["a", "folder/b"]);
    let reason = |path: &str| got.skipped.iter().find(|(at, _)| at == path).map_or("", |(_, reason)| reason);
    assert_eq!(reason("fifo"), "it is no regular file");
    assert_eq!(reason("socket"), "it is no regular file");
    assert_eq!(reason("link"), "it is a symbolic link");
    assert_eq!(reason("linked-folder"), "it is a symbolic link");
    assert!(reason("two\nlines").contains("control characters"));
    assert!(reason("not-\u{fffd}-utf8").contains("not UTF-8"));
    let done = got.done.unwrap();
    assert_eq!((done.2, done.3), (7, true), "{:?}", got.skipped);
    assert!(got.problem.is_some_and(|problem| problem.ends_with("`: it lies too deep")), "the first one");
    // What does not match is not worth a word.
    assert!(archive(&guest, &["a"]).skipped.is_empty());
}

#[test]
fn limits_end_it() {
    let guest = with_artifacts(&["a", "b", "c", "d"]);
    let limited = |files, bytes| {
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], files, bytes, None));
        let got = collect(&mut stream);
        (got.order.join(""), got.done.unwrap())
    };
    assert_eq!(limited(2, 100), ("ab".to_owned(), (2, 8, 0, true)));
    assert_eq!(limited(4, 16), ("abcd".to_owned(), (4, 16, 0, false)));
    assert_eq!(limited(4, 15), ("abc".to_owned(), (3, 12, 1, true)));
    assert_eq!(limited(0, 0), (String::new(), (0, 0, 0, true)));
    std::fs::write(guest.path("artifacts/b"), "a large one").unwrap();
    assert_eq!(limited(4, 13), ("acd".to_owned(), (3, 12, 1, true)), "one that does not fit is in nobody's way");
}

/// A job whose artifacts are not all sent is not one that has none.
#[test]
fn what_is_missing_is_told() {
    let problem = |spoil: &dyn Fn(&Path), files, bytes| {
        let guest = with_artifacts(&["a", "folder/b"]);
        spoil(&guest.path("artifacts"));
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], files, bytes, None));
        collect(&mut stream).problem.unwrap_or_default()
    };
    assert_eq!(problem(&|_| (), 9, 99), "");
    assert_eq!(problem(&|_| (), 2, 99), "there are more than limits.artifact_files (2)");
    assert_eq!(problem(&|_| (), 9, 3), "`a`: it does not fit limits.artifact_bytes (3)");
    let unreadable =
        |name: &'static [u8]| move |at: &Path| std::fs::write(at.join(OsStr::from_bytes(name)), "").unwrap();
    let reason = "its name is not UTF-8, or has control characters";
    assert_eq!(problem(&unreadable(b"b\xff"), 9, 99), format!("`b\u{fffd}`: {reason}"));
    assert_eq!(problem(&unreadable(b"folder/\t"), 9, 99), format!("`folder/\t`: {reason}"));
    let hidden = |at: &Path| std::fs::rename(at.join("folder"), at.join("fol\nder")).unwrap();
    assert_eq!(problem(&hidden, 9, 99), format!("`fol\nder`: {reason}"), "what is in it cannot be sent");
    let far = |at: &Path| {
        let folder = at.join("folder").join(vec!["ü".repeat(100); 10].join("/"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("\t"), "").unwrap();
    };
    let told = problem(&far, 99, 99);
    // A host keeps 300 characters.
    assert!(told.ends_with(&format!("ü…`: {reason}")) && told.chars().count() < 300, "{told}");
    // Those that do not fit are looked at, too.
    let both = "`a`: it does not fit limits.artifact_bytes (3); and there are more than limits.artifact_files (2)";
    assert_eq!(problem(&|_| (), 2, 3), both);
}

/// What is wrong with a folder out of which nothing is wanted is no loss.
#[test]
fn nothing_is_missing_where_nothing_is_asked_for() {
    let guest = with_artifacts(&["a"]);
    assert_eq!((archive(&guest, &[]).done, archive(&guest, &[]).problem), (Some((0, 0, 0, false)), None));
    std::fs::remove_dir_all(guest.path("artifacts")).unwrap();
    misplace(&guest.path("artifacts"), "link");
    assert_eq!(archive(&guest, &[]).done, Some((0, 0, 0, false)));
}

#[test]
fn a_file_of_many_chunks_and_an_event_between() {
    let guest = with_artifacts(&[]);
    let bytes: Vec<u8> = (0..20_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    std::fs::write(guest.path("artifacts/big"), &bytes).unwrap();
    let mut stream = session(&guest);
    stream.say(&ask(&["**"], 10, 1 << 30, None));
    stream.find("the first chunk", |said| matches!(&said.message, GuestMessage::Entry(_)).then_some(()));
    stream.say(&ask(&["**"], 10, 1 << 30, None));
    guest.ok(&["ready"]);
    let mut rest = Vec::new();
    let mut seen = (false, false);
    loop {
        let said = stream.next();
        match &said.message {
            GuestMessage::Event(_) => {
                seen.0 = true;
                assert!(rest.len() < 15_000_000, "the event waited for the file");
            }
            GuestMessage::Error(error) => {
                seen.1 = true;
                assert!(error.message.contains("is being sent already"));
            }
            GuestMessage::Entry(entry) => {
                rest.extend_from_slice(&said.bulk);
                if let Some(digest) = entry.digest {
                    assert_eq!(digest, Digest::of(&bytes));
                }
            }
            GuestMessage::Notice(Notice::ArchiveDone { .. }) => break,
            _ => {}
        }
    }
    assert_eq!(seen, (true, true));
    assert!(bytes.ends_with(&rest));
}

#[test]
fn a_file_that_changes_while_it_is_sent() {
    for grows in [false, true] {
        let guest = with_artifacts(&[]);
        let path = guest.path("artifacts/file");
        std::fs::write(&path, vec![7; 30_000_000]).unwrap();
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], 10, 1 << 30, None));
        let mut first = stream.find("the first chunk", |said| match &said.message {
            GuestMessage::Entry(entry) => Some((entry.clone(), said.bulk.clone())),
            _ => None,
        });
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(if grows { 60_000_000 } else { 1000 }).unwrap();
        let size = first.0.size;
        assert_eq!(size, 30_000_000);
        let mut bytes = std::mem::take(&mut first.1);
        let digest = loop {
            let said = stream.next();
            if let GuestMessage::Entry(entry) = &said.message {
                assert_eq!((entry.size, entry.offset), (size, bytes.len() as u64));
                bytes.extend_from_slice(&said.bulk);
                if let Some(digest) = entry.digest {
                    break digest;
                }
            }
        };
        assert_eq!(digest, Digest::of(&bytes));
        assert_eq!(bytes.len() == 30_000_000, grows, "{}", bytes.len());
    }
}

/// Invariant 5.
#[test]
fn a_folder_of_more_names_than_are_looked_at() {
    let guest = with_artifacts(&[]);
    let folder = guest.path("artifacts/many");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("0"), "").unwrap();
    for n in 1..=100_100 {
        std::fs::hard_link(folder.join((n / 10_000 * 10_000).to_string()), folder.join(n.to_string()))
            .unwrap_or_else(|_| std::fs::write(folder.join(n.to_string()), "").unwrap());
    }
    let mut stream = session(&guest);
    let pid = stream.id();
    let began = Instant::now();
    stream.say(&ask(&["*/1????"], 1_000_000, 1 << 30, None));
    guest.ok(&["ready"]);
    let got = collect(&mut stream);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(got.events, [1]);
    assert!(got.done.unwrap().3, "{:?}", got.done);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 40_000, "{peak} KiB");
}

#[test]
fn no_artifacts_at_all() {
    let guest = with_artifacts(&[]);
    std::fs::remove_dir(guest.path("artifacts")).unwrap();
    assert_eq!(archive(&guest, &["**"]).done, Some((0, 0, 0, false)));
    for kind in ["fifo", "link", "dangling"] {
        misplace(&guest.path("artifacts"), kind);
        let mut stream = session(&guest);
        stream.say(&ask(&["**"], 10, 10, None));
        let error = stream.find_error();
        assert_eq!(error["code"], "archive");
        assert!(error["message"].as_str().unwrap().contains("/artifacts is a"), "{error}");
    }
}

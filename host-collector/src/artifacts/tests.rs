//! Archives as agents send them, and as nobody should.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use pika_cloud_common::limits::{MAX_ARCHIVE_DEPTH, MAX_ARCHIVE_PATH_BYTES, MAX_CHUNK_BYTES};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const LIMITS: ArchiveLimits = ArchiveLimits { max_files: 1000, max_bytes: 10 << 20 };

fn begin(folder: &TempDir) -> ArtifactTree {
    ArtifactTree::begin(folder.path(), LIMITS).unwrap()
}

fn file(path: &str) -> Entry {
    Entry { path: path.to_owned(), folder: false, mode: 0o644, size: 0, offset: 0, len: 0, digest: None }
}

fn folder_entry(path: &str) -> Entry {
    Entry { folder: true, ..file(path) }
}

/// As the agent does: in chunks, the last one with the digest.
fn send(tree: &mut ArtifactTree, path: &str, bytes: &[u8]) -> Result<(), ArtifactError> {
    send_as(tree, &file(path), bytes)
}

fn send_as(tree: &mut ArtifactTree, entry: &Entry, bytes: &[u8]) -> Result<(), ArtifactError> {
    let mut offset = 0;
    loop {
        let chunk = &bytes[offset..bytes.len().min(offset + MAX_CHUNK_BYTES)];
        let is_last = offset + chunk.len() == bytes.len();
        tree.entry(&Entry {
            size: bytes.len() as u64,
            offset: offset as u64,
            len: chunk.len() as u64,
            digest: is_last.then(|| Digest::of(bytes)),
            ..entry.clone()
        })?;
        // A session gives raw bytes as they come.
        for piece in chunk.chunks(10_000) {
            tree.bytes_of_entry(piece)?;
        }
        offset += chunk.len();
        if is_last {
            return Ok(());
        }
    }
}

fn problem(result: Result<(), ArtifactError>) -> String {
    result.unwrap_err().to_string()
}

fn read(folder: &TempDir, path: &str) -> Vec<u8> {
    fs::read(folder.path().join(path)).unwrap()
}

/// Every path below a folder, sorted.
fn tree_of(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, out: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            out.push(path.clone());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &format!("{path}/"), out);
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, "", &mut out);
    out.sort_unstable();
    out
}

/// What people do with the list of digests.
fn sha256sum(folder: &TempDir) -> bool {
    let mut command = Command::new("sha256sum");
    command.args(["--check", "--strict", "--status", "artifacts.sha256"]).current_dir(folder.path());
    command.status().unwrap().success()
}

#[test]
fn a_tree_comes_as_it_was_sent() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    let big: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    tree.entry(&folder_entry("empty")).unwrap();
    tree.entry(&folder_entry("out")).unwrap();
    send(&mut tree, "out/big.bin", &big).unwrap();
    send(&mut tree, "out/deep/er/nothing", b"").unwrap();
    send_as(&mut tree, &Entry { mode: 0o6755, ..file("tool") }, b"#!/bin/sh\n").unwrap();
    assert!(!folder.path().join("artifacts").exists(), "not before it is whole");
    assert_eq!((tree.files(), tree.bytes()), (3, big.len() as u64 + 10));
    tree.finish().unwrap();
    assert_eq!(
        tree_of(folder.path()),
        [
            "artifacts",
            "artifacts.sha256",
            "artifacts/empty",
            "artifacts/out",
            "artifacts/out/big.bin",
            "artifacts/out/deep",
            "artifacts/out/deep/er",
            "artifacts/out/deep/er/nothing",
            "artifacts/tool",
        ]
    );
    assert_eq!(read(&folder, "artifacts/out/big.bin"), big);
    assert!(sha256sum(&folder));
    for (path, mode) in [("tool", 0o700), ("out/big.bin", 0o600), ("out", 0o700)] {
        let metadata = fs::metadata(folder.path().join("artifacts").join(path)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{path}");
    }
}

/// Invariant 5: a guest may name a million files by paths of 4 KB, and the host's memory is not for that.
#[test]
fn digests_go_to_the_disk_as_they_come() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    for number in 0..900 {
        send(&mut tree, &format!("{}{number}", "x".repeat(100)), b"").unwrap();
    }
    let lists = || {
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    let [list] = &lists()[..] else { panic!("{:?}", lists()) };
    assert!(!list.ends_with("artifacts.sha256"), "it is not whole");
    assert!(fs::metadata(list).unwrap().len() > 900 * 170 - 10_000);
    tree.finish().unwrap();
    assert_eq!(lists(), [folder.path().join("artifacts.sha256")]);
    assert!(sha256sum(&folder));
    drop(begin(&folder));
    assert_eq!(lists().len(), 1, "what is given up leaves nothing");
}

#[test]
fn strange_names_are_kept_and_sha256sum_reads_them() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    let long = "x".repeat(255);
    let deep = vec!["d"; MAX_ARCHIVE_DEPTH].join("/");
    let names = [
        "back\\slash",
        "\\",
        "\\n",
        "quo\"te'd",
        "ünïcode ☃",
        " blank ",
        "-rf",
        "*?[x]",
        "$(id)",
        "a  b",
        &long,
        &deep,
    ];
    for name in names {
        send(&mut tree, name, name.as_bytes()).unwrap();
    }
    tree.finish().unwrap();
    for name in names {
        assert_eq!(read(&folder, &format!("artifacts/{name}")), name.as_bytes());
    }
    assert!(sha256sum(&folder));
    fs::write(folder.path().join("artifacts/\\n"), "changed").unwrap();
    assert!(!sha256sum(&folder));
}

/// The longest paths that a session lets through are longer than what the kernel takes from the root.
#[test]
fn the_longest_paths_are_made_and_removed() {
    let folder = TempDir::new().unwrap();
    let mut path = vec!["y".repeat(80); MAX_ARCHIVE_DEPTH - 15].join("/");
    path.push('/');
    path.push_str(&"z".repeat(MAX_ARCHIVE_PATH_BYTES - 1 - path.len()));
    for _ in 0..2 {
        let mut tree = begin(&folder);
        send(&mut tree, &path, b"deep").unwrap();
        let chunk = Entry { len: 1, ..file(&format!("{}w", &path[..path.len() - 1])) };
        tree.entry(&chunk).unwrap();
        tree.bytes_of_entry(b"x").unwrap();
        tree.finish().unwrap();
        let manifest = String::from_utf8(read(&folder, "artifacts.sha256")).unwrap();
        assert_eq!(manifest, format!("{}  artifacts/{path}\n", Digest::of(b"deep")));
    }
}

#[test]
fn a_file_with_another_digest_is_removed() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    send(&mut tree, "good", b"good").unwrap();
    tree.entry(&Entry { len: 3, digest: Some(Digest::of(b"old")), ..file("a/bad") }).unwrap();
    let text = problem(tree.bytes_of_entry(b"new"));
    assert_eq!(text, "a/bad: its bytes do not have its digest");
    assert_eq!((tree.files(), tree.bytes()), (1, 4));
    assert!(tree.entry(&Entry { digest: Some(Digest::of(b"x")), ..file("empty") }).is_err());
    tree.finish().unwrap();
    assert_eq!(tree_of(&folder.path().join("artifacts")), ["a", "good"]);
    assert!(sha256sum(&folder));
}

#[test]
fn a_file_that_does_not_end_is_left_out() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    send(&mut tree, "a/whole", b"whole").unwrap();
    tree.entry(&Entry { size: 9, len: 5, ..file("a/half") }).unwrap();
    tree.bytes_of_entry(b"half").unwrap();
    assert_eq!((tree.files(), tree.bytes()), (1, 5));
    tree.finish().unwrap();
    assert_eq!(tree_of(&folder.path().join("artifacts")), ["a", "a/whole"]);
    assert!(sha256sum(&folder));
}

#[test]
fn entries_that_contradict_each_other_are_refused() {
    type Send = dyn Fn(&mut ArtifactTree) -> Result<(), ArtifactError>;
    let half = |tree: &mut ArtifactTree| {
        tree.entry(&Entry { size: 9, len: 5, ..file("a") })?;
        tree.bytes_of_entry(b"12345")
    };
    let cases: [(&str, &Send, &Send); 9] = [
        ("it comes twice", &|tree| send(tree, "a", b"1"), &|tree| send(tree, "a", b"2")),
        ("it comes twice", &|tree| tree.entry(&folder_entry("a")), &|tree| send(tree, "a", b"2")),
        ("it is a file and a folder", &|tree| send(tree, "a", b"1"), &|tree| tree.entry(&folder_entry("a"))),
        ("it is a file and a folder", &|tree| send(tree, "a", b"1"), &|tree| send(tree, "a/b", b"2")),
        ("it is a file and a folder", &|tree| send(tree, "a", b"1"), &|tree| tree.entry(&folder_entry("a/b/c"))),
        ("a chunk leaves a hole", &half, &|tree| tree.entry(&Entry { offset: 6, len: 3, ..file("a") })),
        ("a chunk leaves a hole", &|_| Ok(()), &|tree| tree.entry(&Entry { offset: 5, len: 3, ..file("a") })),
        ("the file before it has not ended", &half, &|tree| send(tree, "b", b"2")),
        ("the file before it has not ended", &half, &|tree| tree.entry(&folder_entry("a"))),
    ];
    for (wanted, first, second) in cases {
        let folder = TempDir::new().unwrap();
        let mut tree = begin(&folder);
        first(&mut tree).unwrap();
        let text = problem(second(&mut tree));
        assert!(text.ends_with(wanted), "{text}, not {wanted}");
        tree.finish().unwrap();
        assert!(!folder.path().join("artifacts.partial").exists());
        assert_eq!(
            fs::metadata(folder.path().join("artifacts.sha256")).unwrap().len() > 0,
            folder.path().join("artifacts/a").is_file()
        );
    }
    let folder = TempDir::new().unwrap();
    assert_eq!(problem(begin(&folder).bytes_of_entry(b"x")), ": bytes of no file");
}

/// Invariant 5.
#[test]
fn paths_have_a_limit_in_all() {
    let folder = TempDir::new().unwrap();
    let limits = ArchiveLimits { max_files: u64::MAX, ..LIMITS };
    let mut tree = ArtifactTree::begin(folder.path(), limits).unwrap();
    let long = vec!["x".repeat(255); 15].join("/");
    let entry = folder_entry(&long);
    let fitting = MAX_PATHS_BYTES / long.len();
    for _ in 0..fitting {
        tree.entry(&entry).unwrap();
    }
    assert!(problem(tree.entry(&entry)).contains("paths are longer than 256 MiB in all: ask for fewer"));
}

#[test]
fn an_earlier_try_is_out_of_the_way_and_removed_afterwards() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    send(&mut tree, "a/old", b"old").unwrap();
    drop(tree);
    let mut tree = begin(&folder);
    send(&mut tree, "a", b"new").unwrap();
    let names = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let aside = |path: &PathBuf| path.join("a/old").exists();
    assert_eq!(names().iter().filter(|path| aside(path)).count(), 1);
    ArtifactTree::remove_abandoned(folder.path());
    assert_eq!(names().iter().filter(|path| aside(path)).count(), 0);
    tree.finish().unwrap();
    assert_eq!(read(&folder, "artifacts/a"), b"new");
    assert_eq!(names().len(), 2, "artifacts and their list");
}

#[test]
fn what_a_process_that_died_left_is_removed_and_what_comes_is_not() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    send(&mut tree, "a/new", b"new").unwrap();
    fs::create_dir_all(folder.path().join(".artifacts.partial.4194305.7.new/a/b")).unwrap();
    fs::write(folder.path().join(".artifacts.sha256.4194305.7.new"), "").unwrap();
    ArtifactTree::remove_abandoned(folder.path());
    tree.finish().unwrap();
    assert_eq!(tree_of(folder.path()), ["artifacts", "artifacts.sha256", "artifacts/a", "artifacts/a/new"]);
}

/// What is in the way of the next try is what takes up its room: names on one file system, bytes on the other.
#[test]
fn an_earlier_try_that_filled_the_disk_makes_room_for_the_next() {
    for options in ["nr_inodes=1100", "size=20m"] {
        fills_the_disk_and_tries_again(options);
    }
}

fn fills_the_disk_and_tries_again(options: &str) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can mount a tmpfs");
        return;
    }
    let folder = TempDir::new().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder.path()).status();
    assert!(mounted.unwrap().success());
    let limits = ArchiveLimits { max_files: 5000, max_bytes: 1 << 30 };
    let piece = if options.starts_with("size") { vec![1; 1 << 20] } else { Vec::new() };
    let mut tree = ArtifactTree::begin(folder.path(), limits).unwrap();
    let full = (0..2000).find_map(|file| send(&mut tree, &file.to_string(), &piece).err()).unwrap();
    drop(tree);
    let again = ArtifactTree::begin(folder.path(), limits);
    let finished = again.and_then(|mut again| send(&mut again, "new", &piece).and_then(|()| again.finish()));
    let found = finished.map(|()| tree_of(folder.path()));
    assert!(Command::new("umount").arg("-l").arg(folder.path()).status().unwrap().success());
    assert!(full.to_string().contains("free some space in the state dir"), "{full}");
    assert_eq!(found.unwrap(), ["artifacts", "artifacts.sha256", "artifacts/new"]);
}

#[test]
fn the_same_folder_may_be_named_twice() {
    let folder = TempDir::new().unwrap();
    let mut tree = begin(&folder);
    send(&mut tree, "a/b/c", b"1").unwrap();
    tree.entry(&folder_entry("a")).unwrap();
    tree.entry(&folder_entry("a/b")).unwrap();
    tree.entry(&folder_entry("a")).unwrap();
    tree.finish().unwrap();
    assert_eq!(tree_of(&folder.path().join("artifacts")), ["a", "a/b", "a/b/c"]);
}

/// Invariant 5.
#[test]
fn no_archive_is_larger_than_was_asked_for() {
    let folder = TempDir::new().unwrap();
    let limits = ArchiveLimits { max_files: 3, max_bytes: 10 };
    let mut tree = ArtifactTree::begin(folder.path(), limits).unwrap();
    send(&mut tree, "a", b"0123456789").unwrap();
    assert!(problem(send(&mut tree, "b", b"x")).contains("larger than was asked for"));
    tree.entry(&folder_entry("c")).unwrap();
    send(&mut tree, "d", b"").unwrap();
    assert!(problem(send(&mut tree, "e", b"")).contains("more files than were asked for"));
    assert!(problem(tree.entry(&folder_entry("f"))).contains("more files than were asked for"));
    // Bytes of what did not end well count as well: they were on the disk.
    let mut tree = ArtifactTree::begin(folder.path(), limits).unwrap();
    tree.entry(&Entry { len: 9, digest: Some(Digest::EMPTY_STREAM), ..file("a") }).unwrap();
    assert!(tree.bytes_of_entry(b"012345678").is_err());
    assert!(problem(send(&mut tree, "b", b"xy")).contains("larger than was asked for"));
}

#[test]
fn folders_that_nobody_named_are_bounded_too() {
    let folder = TempDir::new().unwrap();
    let mut tree = ArtifactTree::begin(folder.path(), ArchiveLimits { max_files: 10, max_bytes: 10 }).unwrap();
    let deep = |n: usize| format!("{n}/{}", vec!["d"; MAX_ARCHIVE_DEPTH - 2].join("/"));
    let mut refused = 0;
    for n in 0..10 {
        refused += u32::from(send(&mut tree, &deep(n), b"").is_err());
    }
    assert_eq!(refused, 10);
    tree.finish().unwrap();
    assert!(tree_of(&folder.path().join("artifacts")).len() <= 2 * 10 + 10);
}

/// Somebody on the host who may write there plants links; the guest names them.
#[test]
fn no_link_is_followed() {
    let folder = TempDir::new().unwrap();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("kept"), "kept").unwrap();
    let mut tree = begin(&folder);
    let partial = folder.path().join("artifacts.partial");
    symlink(outside.path(), partial.join("out")).unwrap();
    symlink(outside.path().join("kept"), partial.join("kept")).unwrap();
    symlink("/proc/self/cwd", partial.join("magic")).unwrap();
    symlink(".", partial.join("loop")).unwrap();
    for path in ["out/x", "out/kept", "kept", "magic/x", "loop/x", "loop"] {
        assert!(send(&mut tree, path, b"x").is_err(), "{path}");
        assert!(tree.entry(&folder_entry(path)).is_err(), "{path}");
    }
    tree.finish().unwrap();
    assert_eq!(tree_of(outside.path()), ["kept"]);
    assert_eq!(fs::read(outside.path().join("kept")).unwrap(), b"kept");
    // And away with it all: only the links go.
    begin(&folder).finish().unwrap();
    assert_eq!(tree_of(outside.path()), ["kept"]);
}

/// A session lets none of these through; the kernel does not either.
#[test]
fn no_path_leaves_the_folder() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("inner")).unwrap();
    let mut tree = ArtifactTree::begin(&folder.path().join("inner"), LIMITS).unwrap();
    for path in ["../x", "a/../../x", "/tmp/x", "..", "/", ""] {
        assert!(send(&mut tree, path, b"x").is_err(), "{path}");
        let _ = tree.entry(&folder_entry(path));
    }
    tree.finish().unwrap();
    let found = tree_of(folder.path());
    assert!(found.iter().all(|path| path.starts_with("inner")), "{found:?}");
    assert!(!found.iter().any(|path| path.ends_with('x')), "{found:?}");
}

#[test]
fn an_earlier_tree_is_replaced_as_a_whole() {
    let folder = TempDir::new().unwrap();
    let mut first = begin(&folder);
    send(&mut first, "old/a", b"1").unwrap();
    send(&mut first, "both", b"1").unwrap();
    first.finish().unwrap();
    // A try that was given up leaves nothing of it in the next.
    let mut given_up = begin(&folder);
    send(&mut given_up, "given-up", b"1").unwrap();
    drop(given_up);
    assert_eq!(tree_of(&folder.path().join("artifacts")), ["both", "old", "old/a"]);
    let mut second = begin(&folder);
    send(&mut second, "both", b"2").unwrap();
    second.finish().unwrap();
    ArtifactTree::remove_abandoned(folder.path());
    assert_eq!(tree_of(folder.path()), ["artifacts", "artifacts.sha256", "artifacts/both"]);
    assert_eq!(read(&folder, "artifacts/both"), b"2");
    assert!(sha256sum(&folder));
}

#[test]
fn an_empty_archive_leaves_an_empty_folder() {
    let folder = TempDir::new().unwrap();
    begin(&folder).finish().unwrap();
    assert_eq!(tree_of(folder.path()), ["artifacts", "artifacts.sha256"]);
    assert!(read(&folder, "artifacts.sha256").is_empty());
}

fn any_entry() -> impl Strategy<Value = (Entry, usize)> {
    let path = prop::collection::vec("[ab]", 1..4).prop_map(|parts| parts.join("/"));
    (path, any::<bool>(), any::<u32>(), 0u64..4, 0usize..4, prop::option::of(0usize..4)).prop_map(
        |(path, folder, mode, offset, len, digest)| {
            let digest = digest.map(|len| Digest::of(&vec![b'x'; len]));
            let len = if folder { 0 } else { len };
            (Entry { path, folder, mode, size: 9, offset, len: len as u64, digest }, len)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever comes, what is left is what was counted, and every file of it has its digest.
    #[test]
    fn what_is_left_is_what_was_counted(entries in prop::collection::vec(any_entry(), 0..25)) {
        let folder = TempDir::new().unwrap();
        let mut tree = begin(&folder);
        for (entry, len) in entries {
            if tree.entry(&entry).is_ok() && len > 0 {
                let _ = tree.bytes_of_entry(&vec![b'x'; len]);
            }
        }
        let (files, bytes) = (tree.files(), tree.bytes());
        tree.finish().unwrap();
        let root = folder.path().join("artifacts");
        let found: Vec<_> = tree_of(&root).into_iter().filter(|path| root.join(path).is_file()).collect();
        let manifest = String::from_utf8(read(&folder, "artifacts.sha256")).unwrap();
        prop_assert_eq!(found.len() as u64, files);
        prop_assert_eq!(found.iter().map(|path| root.join(path).metadata().unwrap().len()).sum::<u64>(), bytes);
        prop_assert_eq!(manifest.lines().count() as u64, files);
        for path in found {
            let line = format!("{}  artifacts/{path}", Digest::of(&fs::read(root.join(&path)).unwrap()));
            prop_assert!(manifest.lines().any(|found| found == line), "{}", line);
        }
    }
}

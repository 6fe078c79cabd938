//! What a user finds, and what a user keeps.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::verdict::Collection;
use pika_cloud_common::wire::{ArchiveLimits, Entry};
use pika_cloud_common::{Event, EventHead, RunResult, State, Status};
use tempfile::TempDir;

use super::*;
use crate::artifacts::ArtifactTree;
use crate::clock::Now;
use crate::journal::{DiskFs, Records, Store};

const EVENT: &str = r#"{"schema_version":1,"seq":1,"timestamp":"2026-01-31T12:00:00Z","kind":"failed","message":"no","details":{"signal":9,"exit_code":137,"oom_kill":true,"full":["/run"]},"later":1e2}"#;

fn spec() -> RuntimeSpec {
    let mut spec = RuntimeSpec::default();
    spec.identity.runtime_id = "job-7".to_owned();
    spec
}

fn status(message: &str) -> HostRecord {
    let text = format!(
        r#"{{"schema_version":1,"state":"failed","updated_at":"2026-01-31T12:00:00Z","message":"{message}","x":7}}"#
    );
    HostRecord::Status { status: Box::new(Status::decode(text.as_bytes()).unwrap()) }
}

fn result() -> HostRecord {
    let text =
        r#"{"schema_version":1,"status":"failed","finished_at":"2026-01-31T12:00:00Z","message":"no","exit_code":137}"#;
    HostRecord::Result { result: Box::new(RunResult::decode(text.as_bytes()).unwrap()) }
}

/// A journal on the disk, as a driver writes it.
struct Journal {
    store: Store<DiskFs>,
    records: Records,
}

impl Journal {
    fn begin(&mut self, spec_hash: &str) {
        self.records.begin(spec_hash.to_owned(), 0, Now::default());
    }

    fn host(&mut self, record: HostRecord) {
        self.records.host(record, Now::default());
    }

    fn commit(&mut self) {
        let commit = self.records.take_commit(true).unwrap();
        self.store.commit(&commit).unwrap();
    }
}

/// An incarnation that ran to its verdict.
fn journal(folder: &Path) -> Journal {
    let (store, view) = Store::open(DiskFs::new(folder), "job-7").unwrap();
    let mut journal = Journal { records: Records::new(view, 1 << 20, store.filled()), store };
    journal.begin("v1:aa");
    journal.host(HostRecord::Stream {
        stream_id: "s".to_owned(),
        boot_id: "b".to_owned(),
        agent: "0.1.0".to_owned(),
        after_seq: 0,
        digest: Digest::EMPTY_STREAM,
    });
    let head = EventHead::decode(EVENT.as_bytes()).unwrap();
    journal.records.guest(Now::default(), &head, EVENT.as_bytes(), Digest::of(b"x"));
    journal.host(status("old"));
    journal.host(status("new"));
    journal.host(result());
    journal.host(HostRecord::BadLine { reason: "r".to_owned(), sample: "s".to_owned() });
    let outcome = Outcome::Failed { exit_code: Some(137) };
    let (message, error) = ("it failed".to_owned(), Some("because".to_owned()));
    journal.host(HostRecord::Ended { outcome, message, error, instance_status: Some("Running".to_owned()) });
    journal.host(HostRecord::Collected { collection: Collection { complete: true, ..Collection::default() } });
    let verdict = verdict(&spec(), journal.records.view());
    journal.host(HostRecord::Verdict { verdict: Box::new(verdict) });
    journal.host(HostRecord::Finished { destroyed: true, restart_in_ms: None });
    journal.commit();
    journal
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

// The verdict.

#[test]
fn a_verdict_has_its_evidence() {
    let folder = TempDir::new().unwrap();
    let journal = journal(folder.path());
    let verdict = journal.records.view().verdict.clone().unwrap();
    assert_eq!((verdict.runtime_id.as_str(), verdict.incarnation), ("job-7", 1));
    assert_eq!((verdict.outcome, verdict.message.as_str()), (Outcome::Failed { exit_code: Some(137) }, "it failed"));
    let evidence = verdict.evidence;
    let last = evidence.last_event.unwrap();
    assert_eq!((last.seq, last.kind, last.message.as_str()), (1, State::Failed, "no"));
    assert_eq!((evidence.signal, evidence.error.as_deref()), (Some(9), Some("because")));
    assert_eq!((evidence.oom_kill, evidence.full, evidence.restarts), (Some(true), vec!["/run".to_owned()], 0));
    assert_eq!((evidence.instance_status.as_deref(), evidence.bad_lines, evidence.gaps), (Some("Running"), 1, 0));
    assert!(evidence.collection.unwrap().complete);
}

/// Invariant 5: a guest's details are its own, and are taken only where they have the contract's form and size.
#[test]
fn evidence_from_a_hostile_guest_is_bounded() {
    let said = |details: &str| Said::of(&serde_json::from_str(details).unwrap());
    assert_eq!(
        said(r#"{"signal":11,"oom_kill":false,"full":["/run","/"],"exit_code":139}"#),
        Said { signal: Some(11), oom_kill: Some(false), full: vec!["/run".to_owned(), "/".to_owned()] }
    );
    for nothing in [
        "{}",
        "[]",
        "7",
        r#""full""#,
        r#"{"signal":"9","oom_kill":"true","full":"/run"}"#,
        r#"{"signal":0,"oom_kill":1,"full":{"/run":true}}"#,
        r#"{"signal":-9,"oom_kill":null,"full":[1,null,["/run"],{},"","\u001b[2J"]}"#,
        r#"{"signal":4294967305,"oom_kill":[true]}"#,
        r#"{"signal":9.5}"#,
    ] {
        assert_eq!(said(nothing), Said::default(), "{nothing}");
    }
    let long = vec!["x".repeat(257); 100_000];
    let short = (0..100_000).map(|n| format!("/{n}"));
    let full = Value::from(long.into_iter().chain(["y".repeat(256)]).chain(short).collect::<Vec<_>>());
    let taken = Said::of(&serde_json::json!({ "full": full })).full;
    assert_eq!((taken.len(), taken[0].len(), taken[1].as_str(), taken[7].as_str()), (8, 256, "/0", "/6"));
}

// What is derived from a journal.

/// Its readers take no more, and blanks are no reason for more.
#[test]
fn a_document_is_pretty_as_long_as_its_readers_take_it() {
    let nested = |width: usize| Value::from(vec![Value::from(vec![serde_json::json!([[[[[[[[7]]]]]]]]); 64]); width]);
    let document = |width| pretty(serde_json::json!({ "details": nested(width) })).unwrap();
    assert!(document(1).contains("\n  \"details\""));
    let compact = document(170);
    assert!(compact.ends_with("}\n") && compact.lines().count() == 1 && compact.len() <= MAX_DOCUMENT_BYTES);
    assert!(serde_json::to_string_pretty(&nested(170)).unwrap().len() > 4 * MAX_DOCUMENT_BYTES);
    // Blanks and brackets take six bytes of it, and the newline one.
    for (length, lines) in [(MAX_DOCUMENT_BYTES - 9, 3), (MAX_DOCUMENT_BYTES - 8, 1)] {
        let text = pretty(["x".repeat(length)]).unwrap();
        assert!(text.lines().count() == lines && text.len() <= MAX_DOCUMENT_BYTES, "{length}");
    }
}

#[test]
fn outputs_are_derived_from_the_journal() {
    let folder = TempDir::new().unwrap();
    let mut journal = journal(folder.path());
    let verdict = journal.records.view().verdict.clone().unwrap();
    journal.begin("v1:bb");
    journal.host(status("of the next incarnation"));
    journal.commit();
    let outputs = folder.path().join("1");
    for _ in 0..2 {
        derive(folder.path(), &outputs, 1).unwrap();
        assert_eq!(read(&outputs.join("events.jsonl")), format!("{EVENT}\n"), "every byte as the guest wrote it");
        Event::decode(read(&outputs.join("events.jsonl")).trim_end().as_bytes()).unwrap();
        let status = Status::decode(read(&outputs.join("status.json")).as_bytes()).unwrap();
        assert_eq!((status.message.as_str(), status.extra["x"].as_u64()), ("new", Some(7)));
        assert_eq!(RunResult::decode(read(&outputs.join("result.json")).as_bytes()).unwrap().exit_code, Some(137));
        assert_eq!(Verdict::decode(read(&outputs.join("verdict.json")).as_bytes()).unwrap(), verdict);
        assert_eq!(fs::read_dir(&outputs).unwrap().count(), 4, "and nothing else");
    }
    derive(folder.path(), &folder.path().join("2"), 2).unwrap();
    assert_eq!(read(&folder.path().join("2/events.jsonl")), "");
    assert!(read(&folder.path().join("2/status.json")).contains("of the next incarnation"));
    assert_eq!(fs::read_dir(folder.path().join("2")).unwrap().count(), 2);
}

/// A driver concludes while somebody asks for its outputs.
#[test]
fn several_may_derive_at_once() {
    let folder = TempDir::new().unwrap();
    drop(journal(folder.path()));
    let outputs = folder.path().join("1");
    derive(folder.path(), &outputs, 1).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..30).for_each(|_| derive(folder.path(), &outputs, 1).unwrap()));
        }
        for _ in 0..200 {
            assert_eq!(read(&outputs.join("events.jsonl")), format!("{EVENT}\n"));
            Verdict::decode(read(&outputs.join("verdict.json")).as_bytes()).unwrap();
        }
    });
    assert_eq!(fs::read_dir(&outputs).unwrap().count(), 4);
}

#[test]
fn what_cannot_be_written_is_named() {
    let folder = TempDir::new().unwrap();
    drop(journal(folder.path()));
    let blocked = folder.path().join("journal.jsonl/1");
    let error = derive(folder.path(), &blocked, 1).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{}: ", blocked.display())), "{error}");
}

// Copies for a user.

/// Outputs, beside them a folder of a user's.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: TempDir::new().unwrap() };
        place.write("outputs/events.jsonl", "{}\n");
        place.write("outputs/verdict.json", "verdict 1");
        place.write("outputs/artifacts.sha256", "digests");
        place.write("outputs/logs/guest.log", "log 1");
        place.write("outputs/artifacts/out/a.bin", "a 1");
        place.write("outputs/artifacts/tool", "tool");
        fs::create_dir(place.path("outputs/artifacts/empty")).unwrap();
        fs::set_permissions(place.path("outputs/artifacts/tool"), fs::Permissions::from_mode(0o700)).unwrap();
        place
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    fn copy(&self) -> Result<(), Error> {
        copy(&self.path("outputs"), &self.path("target"))
    }

    /// Every path below the target with its text, sorted; folders end with a slash.
    fn target(&self) -> Vec<(String, String)> {
        fn walk(folder: &Path, prefix: &str, out: &mut Vec<(String, String)>) {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
                if entry.file_type().unwrap().is_dir() {
                    out.push((format!("{name}/"), String::new()));
                    walk(&entry.path(), &format!("{name}/"), out);
                } else {
                    out.push((name, fs::read_to_string(entry.path()).unwrap_or_default()));
                }
            }
        }
        let mut out = Vec::new();
        walk(&self.path("target"), "", &mut out);
        out.retain(|(name, _)| name != ".pika-cloud-outputs");
        out.sort_unstable();
        out
    }

    fn names(&self) -> Vec<String> {
        self.target().into_iter().map(|(name, _)| name).collect()
    }

    /// That a copy is refused for that path, and changes nothing.
    fn is_refused(&self, path: &str) {
        let before = self.target();
        let error = self.copy().unwrap_err();
        assert!(matches!(&error, Error::OutputInTheWay { path: found } if *found == self.path(path)), "{error}");
        assert!(error.to_string().contains("--output"), "{error}");
        assert_eq!(self.target(), before);
    }
}

const ALL: [&str; 9] = [
    "artifacts.sha256",
    "artifacts/",
    "artifacts/empty/",
    "artifacts/out/",
    "artifacts/out/a.bin",
    "artifacts/tool",
    "events.jsonl",
    "logs/",
    "logs/guest.log",
];

#[test]
fn outputs_come_as_they_are() {
    let place = Place::new();
    place.copy().unwrap();
    let mut all = ALL.to_vec();
    all.push("verdict.json");
    assert_eq!(place.names(), all);
    assert_eq!(read(&place.path("target/artifacts/out/a.bin")), "a 1");
    let mode = fs::metadata(place.path("target/artifacts/tool")).unwrap().permissions().mode();
    assert_eq!(mode & 0o100, 0o100, "what can be run can be run");
}

#[test]
fn an_earlier_copy_is_replaced() {
    let place = Place::new();
    place.copy().unwrap();
    place.write("outputs/verdict.json", "verdict 2");
    place.write("outputs/result.json", "result 2");
    fs::remove_dir_all(place.path("outputs/artifacts/out")).unwrap();
    fs::remove_file(place.path("outputs/events.jsonl")).unwrap();
    place.write("outputs/artifacts/new/b", "b 2");
    for _ in 0..2 {
        place.copy().unwrap();
        assert_eq!(
            place.names(),
            [
                "artifacts.sha256",
                "artifacts/",
                "artifacts/empty/",
                "artifacts/new/",
                "artifacts/new/b",
                "artifacts/tool",
                "logs/",
                "logs/guest.log",
                "result.json",
                "verdict.json",
            ]
        );
        assert_eq!(read(&place.path("target/verdict.json")), "verdict 2");
    }
}

#[test]
fn files_become_folders_and_folders_files() {
    let place = Place::new();
    place.copy().unwrap();
    fs::remove_dir_all(place.path("outputs/artifacts")).unwrap();
    place.write("outputs/artifacts/out", "a file now");
    place.write("outputs/artifacts/tool/in", "a folder now");
    place.write("target/artifacts/out/deep/mine", "mine");
    place.is_refused("target/artifacts/out");
    fs::remove_dir_all(place.path("target/artifacts/out/deep")).unwrap();
    symlink("/", place.path("target/artifacts/out/link")).unwrap();
    place.is_refused("target/artifacts/out");
    fs::remove_file(place.path("target/artifacts/out/link")).unwrap();
    place.copy().unwrap();
    assert_eq!(read(&place.path("target/artifacts/out")), "a file now");
    assert_eq!(read(&place.path("target/artifacts/tool/in")), "a folder now");
}

/// `--output .` in a project of one's own.
#[test]
fn what_the_user_has_there_stays() {
    let place = Place::new();
    place.write("target/README.md", "mine");
    place.write("target/src/main.rs", "mine");
    place.write("target/.hidden", "mine");
    fs::create_dir(place.path("target/logs")).unwrap();
    for _ in 0..2 {
        place.copy().unwrap();
        for path in ["README.md", "src/main.rs", ".hidden"] {
            assert_eq!(read(&place.path("target").join(path)), "mine");
        }
        assert_eq!(read(&place.path("target/logs/guest.log")), "log 1", "an empty folder may be used");
        // What is put into a copy is as much the user's.
        place.write("target/artifacts/out/mine", "mine");
        place.write("target/logs/mine.log", "mine");
    }
    fs::remove_dir_all(place.path("outputs/artifacts/out")).unwrap();
    place.copy().unwrap();
    assert_eq!(read(&place.path("target/artifacts/out/mine")), "mine");
    assert!(!place.path("target/artifacts/out/a.bin").exists());
}

#[test]
fn what_is_in_the_way_is_told_and_not_touched() {
    for path in
        ["logs/app.log", "artifacts/build/lib.so", "verdict.json", "events.jsonl", "artifacts.sha256", "artifacts/tool"]
    {
        let place = Place::new();
        place.write(&format!("target/{path}"), "mine");
        let top = path.split('/').next().unwrap();
        place.is_refused(&format!("target/{top}"));
        assert_eq!(place.target().last().unwrap().1, "mine");
    }
    let place = Place::new();
    place.copy().unwrap();
    place.write("outputs/artifacts/mine", "a later job's");
    place.write("target/artifacts/mine", "mine");
    place.is_refused("target/artifacts/mine");
    let place = Place::new();
    place.write("target/logs", "a file");
    place.is_refused("target/logs");
    let place = Place::new();
    place.write("target/.pika-cloud-outputs", "mine");
    place.is_refused("target/.pika-cloud-outputs");
}

#[test]
fn no_link_is_followed_to_write_or_remove() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("guest.log"), "kept").unwrap();
    let kept = || assert_eq!(read(&outside.path().join("guest.log")), "kept");
    for name in ["logs", "artifacts"] {
        let place = Place::new();
        fs::create_dir(place.path("target")).unwrap();
        symlink(outside.path(), place.path("target").join(name)).unwrap();
        place.is_refused(&format!("target/{name}"));
    }
    let place = Place::new();
    fs::create_dir(place.path("target")).unwrap();
    symlink(outside.path().join("guest.log"), place.path("target/verdict.json")).unwrap();
    place.is_refused("target/verdict.json");
    // The link took the place of a folder of ours.
    let place = Place::new();
    place.copy().unwrap();
    fs::remove_dir_all(place.path("target/logs")).unwrap();
    symlink(outside.path(), place.path("target/logs")).unwrap();
    place.is_refused("target/logs");
    // And of one that is no output any more.
    let place = Place::new();
    place.write("outputs/artifacts/l/guest.log", "x");
    place.copy().unwrap();
    fs::remove_dir_all(place.path("outputs/artifacts/l")).unwrap();
    fs::remove_dir_all(place.path("target/artifacts/l")).unwrap();
    symlink(outside.path(), place.path("target/artifacts/l")).unwrap();
    place.copy().unwrap();
    kept();
    assert!(place.path("target/artifacts/l").is_symlink());
}

/// A list is a file in the user's hands.
#[test]
fn a_list_names_nothing_outside_of_its_folder() {
    let place = Place::new();
    place.copy().unwrap();
    place.write("mine", "kept");
    let list = place.path("target/.pika-cloud-outputs");
    let absolute = place.path("mine");
    let text = read(&list) + "../mine\n" + absolute.to_str().unwrap() + "\nartifacts/../../mine\n\n.\n..\n";
    fs::write(&list, text).unwrap();
    place.copy().unwrap();
    assert_eq!(read(&place.path("mine")), "kept");
    assert!(!read(&list).contains("mine"));
}

#[test]
fn an_interrupted_copy_is_replaced_by_the_next() {
    let place = Place::new();
    // As far as it is listed: folders that are in the way of files fail in the middle of the copy.
    place.copy().unwrap();
    let list = read(&place.path("target/.pika-cloud-outputs"));
    let place = Place::new();
    place.write("target/.pika-cloud-outputs", &list);
    place.write("target/artifacts/out/a.bin", "a ha");
    place.write("target/verdict.json", "");
    place.copy().unwrap();
    assert_eq!(read(&place.path("target/artifacts/out/a.bin")), "a 1");
    assert_eq!(read(&place.path("target/verdict.json")), "verdict 1");
}

/// A path may be as long as the kernel takes by itself: longer than that with a folder before it.
#[test]
fn the_longest_path_is_copied_and_removed() {
    let place = Place::new();
    let path = format!("{}{}", format!("{}/", "d".repeat(200)).repeat(20), "f".repeat(4095 - 20 * 201));
    let limits = ArchiveLimits { max_files: 10, max_bytes: 1000 };
    let mut artifacts = ArtifactTree::begin(&place.path("outputs"), limits).unwrap();
    let digest = Some(Digest::of(b""));
    artifacts.entry(&Entry { path, folder: false, mode: 0o644, size: 0, offset: 0, len: 0, digest }).unwrap();
    artifacts.finish().unwrap();
    let files = || {
        let mut command = std::process::Command::new("find");
        let found = command.arg(place.path("target/artifacts")).args(["-type", "f"]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().lines().count()
    };
    for _ in 0..2 {
        place.copy().unwrap();
        assert_eq!(files(), 1);
    }
    fs::remove_dir_all(place.path("outputs/artifacts")).unwrap();
    place.copy().unwrap();
    assert!(fs::read_dir(place.path("target/artifacts")).unwrap().next().is_none());
}

#[test]
fn a_target_may_be_a_link_and_need_not_exist() {
    let place = Place::new();
    fs::create_dir(place.path("real")).unwrap();
    symlink(place.path("real"), place.path("target")).unwrap();
    place.copy().unwrap();
    assert_eq!(read(&place.path("real/verdict.json")), "verdict 1");
    let place = Place::new();
    copy(&place.path("outputs"), &place.path("a/b/c")).unwrap();
    assert_eq!(read(&place.path("a/b/c/logs/guest.log")), "log 1");
    place.write("file", "");
    let error = copy(&place.path("outputs"), &place.path("file")).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{}: ", place.path("file").display())), "{error}");
}

#[test]
fn outputs_are_not_copied_into_themselves() {
    let place = Place::new();
    symlink(place.path("outputs"), place.path("link")).unwrap();
    for target in ["outputs", "outputs/logs", "outputs/artifacts/new/folder", "link/x", "outputs/../outputs/x"] {
        let error = copy(&place.path("outputs"), &place.path(target)).unwrap_err();
        assert!(matches!(error, Error::OutputInTheWay { .. }), "{target}: {error}");
    }
    assert!(!place.path("outputs/artifacts/new").exists());
    // Around them is fine.
    copy(&place.path("outputs"), place.folder.path()).unwrap();
    assert_eq!(read(&place.path("verdict.json")), "verdict 1");
}

/// A long life: the records that said it are in segments that were removed.
#[test]
fn documents_outlive_the_segments_that_said_them() {
    let folder = TempDir::new().unwrap();
    let (store, view) = Store::open(DiskFs::new(folder.path()), "job-7").unwrap();
    let mut journal = Journal { records: Records::new(view, 1, store.filled()), store };
    journal.begin("v1:aa");
    journal.host(status("ready"));
    journal.host(result());
    journal.commit();
    for _ in 0..160 {
        journal.host(HostRecord::StartRefused { message: "x".repeat(8000) });
        journal.commit();
    }
    let mut follower = Follower::new(folder.path(), None);
    assert!(follower.try_next().unwrap().unwrap().0.n > 3, "they are there still");
    let outputs = folder.path().join("1");
    derive(folder.path(), &outputs, 1).unwrap();
    assert!(read(&outputs.join("status.json")).contains("ready"));
    assert!(read(&outputs.join("result.json")).contains("137"));
    assert!(!outputs.join("verdict.json").exists());
    // They are of that incarnation alone.
    derive(folder.path(), &folder.path().join("2"), 2).unwrap();
    assert!(!folder.path().join("2/status.json").exists());
}

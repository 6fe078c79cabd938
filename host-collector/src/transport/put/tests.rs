use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::*;

/// What may be run, as an agent may.
const AGENT: &[u8] = b"exit 0";

/// The script, run here as it is run in a guest.
fn put(path: &Path, bytes: &[u8], size: usize) -> Output {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", SCRIPT, "pika-cloud"]).arg(path).arg(size.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // One that refuses the path reads nothing.
    let _ = child.stdin.take().unwrap().write_all(bytes);
    child.wait_with_output().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_was_sent_is_there_and_can_be_run_by_everybody() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a/b/pika-guest");
    let output = put(&path, AGENT, AGENT.len());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(&path).unwrap(), AGENT);
    for path in [&path, path.parent().unwrap(), &scratch.path().join("a")] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o755);
    }
    assert_eq!(names(path.parent().unwrap()), ["pika-guest"]);
}

/// The transfer was cut: what was there stays, and nothing beside it.
#[test]
fn a_part_of_it_replaces_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pika-guest");
    assert!(put(&path, AGENT, AGENT.len()).status.success());
    let output = put(&path, b"exi", 6);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("3 of 6 bytes came"), "{output:?}");
    assert_eq!((fs::read(&path).unwrap(), names(scratch.path())), (AGENT.to_vec(), vec!["pika-guest".to_owned()]));
    assert!(put(&path, b"exit 0 # newer", 14).status.success());
    assert_eq!(fs::read(&path).unwrap(), b"exit 0 # newer");
}

#[test]
fn what_an_earlier_put_left_that_was_killed_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    fs::write(scratch.path().join(".pika-guest.7"), "half").unwrap();
    assert!(put(&scratch.path().join("pika-guest"), AGENT, AGENT.len()).status.success());
    assert_eq!(names(scratch.path()), ["pika-guest"]);
}

/// Whatever lies at the path is replaced or refused, never opened: a FIFO would hang, a link lead elsewhere.
#[test]
fn what_lies_at_the_path_is_not_written_to() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::write(at("elsewhere"), "precious").unwrap();
    symlink(at("elsewhere"), at("link")).unwrap();
    symlink(at("nowhere"), at("broken")).unwrap();
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    for name in ["link", "broken", "fifo"] {
        let output = put(&at(name), AGENT, AGENT.len());
        assert!(output.status.success(), "{name}: {output:?}");
        assert!(fs::symlink_metadata(at(name)).unwrap().is_file(), "{name}");
        assert_eq!(fs::read(at(name)).unwrap(), AGENT, "{name}");
    }
    assert_eq!(fs::read(at("elsewhere")).unwrap(), b"precious");
    assert!(!at("nowhere").exists());
    fs::create_dir(at("folder")).unwrap();
    let output = put(&at("folder"), AGENT, AGENT.len());
    assert!(String::from_utf8_lossy(&output.stderr).contains("is a folder"), "{output:?}");
    symlink(scratch.path(), at("linked")).unwrap();
    let output = put(&at("linked").join("pika-guest"), AGENT, AGENT.len());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no folder that root alone"), "{output:?}");
    assert!(!at("pika-guest").exists());
    // A file where the folder should be.
    assert!(!put(&at("elsewhere/pika-guest"), AGENT, AGENT.len()).status.success());
}

/// Whoever may write to a folder on the way may put another agent there, which would run as root.
#[test]
fn nothing_is_put_where_others_can_change_it() {
    let scratch = tempfile::tempdir().unwrap();
    let parent = scratch.path().join("parent");
    let folder = parent.join("folder");
    fs::create_dir_all(&folder).unwrap();
    let set_mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    for path in [&folder, &parent] {
        for mode in [0o775, 0o757] {
            set_mode(path, mode);
            for place in [folder.join("pika-guest"), folder.join("new/pika-guest")] {
                let output = put(&place, AGENT, AGENT.len());
                let told = format!("{} is no folder that root alone can write to", path.display());
                assert!(String::from_utf8_lossy(&output.stderr).contains(&told), "{mode:o}: {output:?}");
            }
        }
        set_mode(path, 0o755);
    }
    symlink(&parent, scratch.path().join("linked")).unwrap();
    let output = put(&scratch.path().join("linked/folder/pika-guest"), AGENT, AGENT.len());
    assert!(String::from_utf8_lossy(&output.stderr).contains("linked is no folder"), "{output:?}");
    assert_eq!(names(&folder), [""; 0], "nothing was made there");
    set_mode(&parent, 0o1777);
    assert!(
        put(&folder.join("pika-guest"), AGENT, AGENT.len()).status.success(),
        "nobody moves what is root's from there"
    );
}

/// Where a file system forbids to run anything, or the kernel cannot: the next place is tried.
#[test]
fn what_does_not_run_is_not_left_there() {
    let scratch = tempfile::tempdir().unwrap();
    let output = put(&scratch.path().join("pika-guest"), b"exit 3", 6);
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not run there"), "{output:?}");
    assert_eq!(names(scratch.path()), [""; 0]);
}

#[test]
fn the_disk_that_is_full_is_told() {
    let output = put(Path::new("/dev/full/pika-guest"), AGENT, AGENT.len());
    assert!(!output.status.success() && !output.stderr.is_empty());
}

#[test]
fn an_agent_says_what_it_is() {
    let digest = Digest::of(b"agent");
    let text = format!(r#"{{"agent":"0.1.0","protocol":1,"schema_version":1,"digest":"sha256:{digest}","more":1}}"#);
    let version: AgentVersion = serde_json::from_str(&text).unwrap();
    assert_eq!((version.digest(), version.protocol, version.agent.as_str()), (Some(digest), 1, "0.1.0"));
    let version = AgentVersion { digest: digest.to_string(), ..version };
    assert_eq!(version.digest(), None);
}

/// Release and digest are shown to people, and the release becomes a property of an image: they are short, and say nothing to
/// anybody's terminal.
#[test]
fn an_agent_that_is_described_by_no_plain_text_is_none() {
    let parse = |agent: &str, digest: &str| {
        let text = serde_json::json!({ "agent": agent, "protocol": 1, "schema_version": 1, "digest": digest });
        serde_json::from_value::<AgentVersion>(text)
    };
    assert_eq!(parse(&"1".repeat(80), "sha256:0").unwrap().agent.len(), 80);
    for word in [&"1".repeat(81), "0.1\u{1b}[2J", "0.1\n", "0.1\u{202e}", "ä"] {
        assert!(parse(word, "sha256:0").is_err() && parse("0.1", word).is_err(), "{word:?}");
    }
}

#[test]
fn a_guests_words_are_shown_in_one_line_and_cut() {
    let said = |errors: &str| shown(&Ran { code: Some(1), output: b"out".to_vec(), errors: errors.to_owned() });
    assert_eq!(said(""), "out");
    assert_eq!(said("a\u{1b}[2J\nb"), "a [2J b");
    assert_eq!(said(&"x".repeat(5000)).len(), crate::words::MAX_SHOWN_CHARS);
}

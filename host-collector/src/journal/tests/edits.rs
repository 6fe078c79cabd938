//! What a record is, whose journal it is, of which version, and what somebody made of it.

use super::format::{Clocks, Stamp};
use super::memory::Memory;
use super::*;

fn stamp(n: u64) -> Stamp {
    Stamp { n, now: now(n), inc: 1 }
}

#[test]
fn records_read_back_as_they_were_written() {
    let mut journal = Journal::open(Memory::default()).unwrap();
    small_life(&mut journal);
    let mut again = Vec::new();
    for record in records(&journal.lines) {
        let now =
            Now { mono: Duration::from_micros(record.mono), wall: crate::clock::wall_of(record.at.as_str()).unwrap() };
        let stamp = Stamp { n: record.n, now, inc: record.inc };
        match &record.body {
            Body::Guest(line) => format::write_guest(stamp, &mut Clocks::default(), line.get().as_bytes(), &mut again),
            Body::Host(host) => format::write_host(stamp, host, &mut again),
        }
        let line = serde_json::to_string(&record).unwrap();
        assert!(String::from_utf8_lossy(&again).contains(line.strip_suffix('}').unwrap()), "{line}");
    }
    assert_eq!(again, journal.lines);
    assert!(records(&journal.lines).iter().map(|record| record.n).eq(0..8));
}

/// A writer of foreign images may end its lines with `\r\n`; the guest's digest is over all of the line.
#[test]
fn blanks_around_an_event_are_kept() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    let lines = [format!(" {}\t", event(1, "starting", "")), format!("{}\r", event(2, "ready", ""))];
    for line in &lines {
        journal.event(line);
    }
    journal.commit().unwrap();
    assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view());
    let kept = records(&journal.lines).into_iter().filter_map(|record| match record.body {
        Body::Guest(event) => Some(event.get().to_owned()),
        Body::Host(_) => None,
    });
    assert!(kept.eq(lines));
}

#[test]
fn an_event_that_looks_like_a_record_stays_an_event() {
    let mut line = Vec::new();
    let details = r#","details":{"guest":{"crc":"00000000"},"host":{"what":"finished","destroyed":true}}"#;
    let event = event(1, "ready", details);
    format::write_guest(stamp(4), &mut Clocks::default(), event.as_bytes(), &mut line);
    let record = format::read(line.strip_suffix(b"\n").unwrap()).unwrap();
    let Body::Guest(read) = record.body else { panic!("a guest record") };
    assert_eq!(read.get(), event);
}

#[test]
fn another_version_is_refused_by_both_names() {
    let newer = super::super::VERSION + 1;
    let newer_form =
        format!("{{\"journal\":{{\"version\":{newer},\"id\":\"job-7\"}},\"sum\":\"blake3:77\"}}\n").into_bytes();
    let older_form =
        sealed(r#"{"n":0,"at":"2026-01-31T12:00:00Z","inc":0,"journal":{"version":1,"runtime_id":"job-7"}"#);
    for (version, bytes) in [(newer, newer_form), (1, older_form)] {
        let folder = tempfile::TempDir::new().unwrap();
        put(folder.path(), &bytes);
        let opened = Store::open(crate::journal::DiskFs::new(folder.path()), RUNTIME);
        for error in [opened.unwrap_err(), follow_all(folder.path()).unwrap_err()] {
            assert!(matches!(error, JournalError::Version { found, .. } if found == version), "{error}");
            assert!(
                error.to_string().contains(&format!("version {version}, this build reads {}", newer - 1)),
                "{error}"
            );
        }
        assert_eq!(bytes_of(folder.path()), bytes, "nothing is touched");
    }
}

#[test]
fn the_journal_of_another_runtime_is_refused() {
    let disk = Memory::default();
    disk.put(FILE_NAME, &format::write_header("job-8", 1, 0, None));
    let error = Store::open(disk, RUNTIME).unwrap_err();
    assert!(matches!(&error, JournalError::OtherRuntime { found, .. } if found == "job-8"), "{error}");
}

/// Edited by somebody who knows how to mend the checksum: told with its line, and never cut off.
#[test]
fn lines_that_were_edited_are_told() {
    let folder = tempfile::TempDir::new().unwrap();
    let open = || Journal::open(crate::journal::DiskFs::new(folder.path()));
    small_life(&mut open().unwrap());
    let whole = bytes_of(folder.path());
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let head = r#"{"n":2,"at":"2026-01-31T12:00:00Z","mono":5,"inc":1"#;
    let unknown = sealed(&format!(r#"{head},"host":{{"what":"rebooted"}}"#));
    let twice = sealed(&format!(r#"{head},"guest":{{}},"host":{{"what":"finished","destroyed":true}}"#));
    let shifted = sealed(r#"{"guest":{"seq":1},"n":2,"at":"2026-01-31T12:00:00Z","mono":5,"inc":1"#);
    let not_last = sealed(&format!(r#"{head},"guest":{{"seq":1}},"more":1"#));
    let no_header = {
        let mut line = Vec::new();
        format::write_host(stamp(0), &finished(), &mut line);
        line
    };
    let misplaced = format::write_header(RUNTIME, 2, 0, None);
    let cases: [(u64, Vec<&[u8]>); 9] = [
        (4, [&lines[..3], &[&unknown]].concat()),
        (4, [&lines[..3], &[&twice]].concat()),
        (4, [&lines[..3], &[&shifted]].concat()),
        (4, [&lines[..3], &[&not_last]].concat()),
        (4, [&lines[..3], &lines[4..]].concat()),
        (4, [&lines[..3], &lines[..1]].concat()),
        (3, [&lines[..2], &lines[1..2]].concat()),
        (1, vec![&no_header]),
        (1, vec![&misplaced]),
    ];
    for (number, edited) in cases {
        let bytes = edited.concat();
        put(folder.path(), &bytes);
        for error in [open().err().unwrap(), follow_all(folder.path()).unwrap_err()] {
            assert!(matches!(error, JournalError::Foreign { line, .. } if line == number), "{number}: {error}");
        }
        assert_eq!(bytes_of(folder.path()), bytes, "nothing is touched");
    }
}

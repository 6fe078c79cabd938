//! The files under many writers, after crashes, and beside older helpers.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pika_cloud_common::{Event, State};
use rig::{Guest, binary, finish, misplace};
use serde_json::json;

const PROGRESS: &str = "{\"kind\":\"progress\",\"name\":\"w\"}\n";

#[test]
fn thirty_two_writers_of_a_thousand_events() {
    let guest = Guest::new();
    let writers: Vec<_> = (0..32)
        .map(|_| {
            let mut child = guest.command(&["emit"]).stdin(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            std::thread::spawn(move || {
                // In pieces, so that the writers take turns.
                for _ in 0..50 {
                    stdin.write_all(PROGRESS.repeat(20).as_bytes()).unwrap();
                }
                drop(stdin);
                assert_eq!(rig::wait(&mut child), 0);
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
    let events = guest.events();
    assert_eq!((events.len(), events[0].seq), (32_000, 1));
    assert_eq!(guest.read("events.jsonl.seq"), "32000");
}

#[test]
fn thirty_two_processes_of_one_event_each_time() {
    let guest = Guest::new();
    let script = "i=0; while [ $i -lt 25 ]; do \"$0\" progress w || exit 1; i=$((i+1)); done";
    let mut writers: Vec<_> = (0..32)
        .map(|_| {
            let mut shell = Command::new("/bin/sh");
            shell.arg("-c").arg(script).arg(binary()).env("PIKA_CLOUD_DIR", guest.root()).spawn().unwrap()
        })
        .collect();
    for writer in &mut writers {
        assert_eq!(rig::wait(writer), 0);
    }
    assert_eq!(guest.events().len(), 800);
}

/// Whoever made them may have died before they were anybody's to write.
#[test]
fn what_was_made_by_halves_is_finished() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let mode = |name: &str| std::fs::metadata(guest.root().join(name)).unwrap().mode() & 0o7777;
    let set = |name: &str, mode| {
        std::fs::set_permissions(guest.root().join(name), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    set("", 0o755);
    set("events.jsonl", 0o644);
    set("events.jsonl.seq", 0o644);
    guest.ok(&["ready"]);
    assert_eq!((mode(""), mode("events.jsonl"), mode("events.jsonl.seq")), (0o2775, 0o664, 0o660));
}

/// What a verb returned 0 for is there, whoever is killed meanwhile; nothing is torn, no number is missing or given twice,
/// and the documents agree.
#[test]
fn writers_killed_at_random() {
    let guest = Guest::new();
    let done = AtomicBool::new(false);
    let ids = AtomicU64::new(0);
    let returned = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for writer in 0..6u64 {
            let (guest, done, ids, returned) = (&guest, &done, &ids, &returned);
            scope.spawn(move || {
                let mut random = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(writer + 1);
                while !done.load(Ordering::Relaxed) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let id = ids.fetch_add(1, Ordering::Relaxed).to_string();
                    let verb = ["ready", "starting"][usize::try_from(random & 1).unwrap()];
                    let mut child = guest.command(&[verb, "--message", &id]).spawn().unwrap();
                    if !random.is_multiple_of(3) {
                        std::thread::sleep(Duration::from_micros(random % 4000));
                        child.kill().unwrap();
                    }
                    if child.wait().unwrap().success() {
                        returned.lock().unwrap().push(id);
                    }
                }
            });
        }
        let began = Instant::now();
        let enough = || returned.lock().unwrap().len() > 50 && began.elapsed() > Duration::from_secs(3);
        while !enough() && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Ordering::Relaxed);
    });
    // The next writer mends what the last one may have left.
    guest.ok(&["progress", "after"]);
    let events = guest.events();
    assert_eq!(events[0].seq, 1);
    let written: std::collections::BTreeSet<_> = events.iter().map(|event| event.message.clone()).collect();
    let returned = returned.into_inner().unwrap();
    assert!(returned.len() > 50, "{} verbs returned", returned.len());
    assert!(returned.len() < usize::try_from(ids.into_inner()).unwrap(), "none was killed");
    for id in returned {
        assert!(written.contains(&id), "event {id} is lost");
    }
    guest.assert_documents_agree();
}

/// Kills a terminal verb at every moment; whatever it left, one look makes the documents agree.
#[test]
fn a_terminal_verb_killed_at_any_moment() {
    for moment in 0..40u64 {
        let guest = Guest::new();
        guest.ok(&["ready"]);
        let mut child = guest.command(&["failed", "--exit-code", "9"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(moment * 60));
        child.kill().unwrap();
        child.wait().unwrap();
        // An observer's stream mends as a writer does.
        guest.observe();
        guest.assert_documents_agree();
    }
}

#[test]
fn a_torn_last_line_is_cut() {
    for torn in ["{\"schema_version\":1,\"se", "\0\0\0\0", &"x".repeat(300_000)] {
        let guest = Guest::new();
        guest.ok(&["starting"]);
        let mut file = std::fs::OpenOptions::new().append(true).open(guest.path("events.jsonl")).unwrap();
        file.write_all(torn.as_bytes()).unwrap();
        guest.ok(&["ready"]);
        assert_eq!(guest.kinds(), ["starting", "ready"]);
    }
    let guest = Guest::new();
    guest.ok(&["starting"]);
    std::fs::write(guest.path("events.jsonl"), "torn, and nothing before").unwrap();
    guest.ok(&["ready"]);
    assert_eq!(guest.events().len(), 1);
}

#[test]
fn the_file_is_the_truth_not_the_number() {
    for hint in ["", "1", "999", "garbage", "-3", "99999999999999999999999"] {
        let guest = Guest::new();
        guest.ok(&["starting"]);
        guest.ok(&["progress", "p"]);
        std::fs::write(guest.path("events.jsonl.seq"), hint).unwrap();
        guest.ok(&["ready"]);
        assert_eq!(guest.events().last().unwrap().seq, 3, "hint {hint}");
        assert_eq!(guest.read("events.jsonl.seq"), "3");
    }
    // The file is gone, and only then the number counts.
    let guest = Guest::new();
    guest.ok(&["starting"]);
    guest.ok(&["ready"]);
    std::fs::remove_file(guest.path("events.jsonl")).unwrap();
    guest.ok(&["progress", "p"]);
    assert_eq!(guest.events()[0].seq, 3);
}

#[test]
fn documents_that_a_dead_writer_left_behind_are_mended() {
    let mended_by: [&[&str]; 2] = [&["progress", "p"], &["events"]];
    for verb in mended_by {
        let guest = Guest::new();
        guest.ok(&["starting"]);
        let old = guest.read("status.json");
        guest.ok(&["ready"]);
        // As a writer leaves it that dies behind its append.
        std::fs::write(guest.path("status.json"), old).unwrap();
        std::fs::write(guest.path("events.jsonl.seq"), "1").unwrap();
        if verb == ["events"] {
            guest.observe();
        } else {
            guest.ok(verb);
        }
        assert_eq!(guest.status().state, State::Ready);
        guest.assert_documents_agree();
    }
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let old = guest.read("status.json");
    guest.ok(&["failed", "--exit-code", "2"]);
    std::fs::write(guest.path("status.json"), old).unwrap();
    std::fs::remove_file(guest.path("result.json")).unwrap();
    assert_eq!(guest.run(&["ready"]).code, 69);
    guest.assert_documents_agree();
    assert_eq!(guest.result().exit_code, Some(2));
}

/// What helpers in existing images do: the number under its lock, a line appended, the number written.
fn older_helper(guest: &Guest, kind: &str) -> u64 {
    let mut lock = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(guest.path("events.jsonl.seq"))
        .unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut text = String::new();
    lock.read_to_string(&mut text).unwrap();
    let seq = if text.is_empty() { 1 } else { text.parse::<u64>().expect("a plain decimal number") + 1 };
    let event = json!({
        "schema_version": 1, "seq": seq, "timestamp": "2026-01-01T00:00:00+02:00", "kind": kind, "message": "older"
    });
    let mut events = std::fs::OpenOptions::new().append(true).create(true).open(guest.path("events.jsonl")).unwrap();
    events.write_all(format!("{event}\n").as_bytes()).unwrap();
    lock.rewind().unwrap();
    lock.set_len(0).unwrap();
    lock.write_all(seq.to_string().as_bytes()).unwrap();
    seq
}

#[test]
fn older_helpers_write_beside_us() {
    let guest = Guest::new();
    std::fs::create_dir(guest.root()).unwrap();
    assert_eq!(older_helper(&guest, "starting"), 1);
    guest.ok(&["progress", "p"]);
    assert_eq!(older_helper(&guest, "ready"), 3);
    guest.ok(&["progress", "p"]);
    std::thread::scope(|scope| {
        scope.spawn(|| (0..200).for_each(|_| assert_ne!(older_helper(&guest, "ready"), 0)));
        for _ in 0..4 {
            scope.spawn(|| {
                assert_eq!(guest.run_with(&["emit"], PROGRESS.repeat(200).as_bytes()).code, 0);
                for _ in 0..5 {
                    guest.ok(&["progress", "p"]);
                }
            });
        }
    });
    assert_eq!(guest.events().len(), 4 + 200 + 4 * 205);
    assert_eq!(guest.events()[4].kind, State::Ready);
    guest.ok(&["completed"]);
    guest.assert_documents_agree();
}

#[test]
fn an_older_helpers_last_word_counts() {
    let guest = Guest::new();
    std::fs::create_dir(guest.root()).unwrap();
    older_helper(&guest, "completed");
    assert_eq!(guest.run(&["ready"]).code, 69);
    assert_eq!(guest.status().state, State::Completed);
    // One that goes on behind its own last word changes nothing any more.
    older_helper(&guest, "starting");
    assert_eq!(guest.run(&["ready"]).code, 69);
    assert_eq!(guest.status().state, State::Completed);
}

#[test]
fn files_of_another_boot_are_moved_aside() {
    let guest = Guest::new();
    let mut ids = Vec::new();
    for round in 0..4 {
        guest.ok(&["ready", "--message", &round.to_string()]);
        assert_eq!(guest.events().len(), 1, "round {round}");
        std::fs::write(guest.path("artifacts/file"), "x").unwrap();
        let mut stream: serde_json::Value = serde_json::from_str(&guest.read("events.jsonl.stream")).unwrap();
        ids.push(stream["stream_id"].as_str().unwrap().to_owned());
        stream["boot_id"] = json!("another boot");
        std::fs::write(guest.path("events.jsonl.stream"), stream.to_string()).unwrap();
    }
    guest.ok(&["starting"]);
    assert!(!guest.path("artifacts/file").exists());
    assert_eq!(guest.status().state, State::Starting);
    // What is too old goes when a session ends.
    guest.observe();
    let mut kept: Vec<_> = std::fs::read_dir(guest.path("previous"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    let mut newest = ids[2..].to_vec();
    newest.sort();
    assert_eq!(kept, newest);
    let old = format!("previous/{}", ids[3]);
    let event = Event::decode(guest.read(&format!("{old}/events.jsonl")).trim_end().as_bytes()).unwrap();
    assert_eq!(event.message, "3");
    assert!(guest.path(&old).join("artifacts/file").exists());
}

#[test]
fn a_move_aside_that_was_cut_short_is_finished() {
    let guest = Guest::new();
    guest.ok(&["failed"]);
    let mut stream: serde_json::Value = serde_json::from_str(&guest.read("events.jsonl.stream")).unwrap();
    let id = stream["stream_id"].as_str().unwrap().to_owned();
    stream["retiring"] = json!(true);
    std::fs::write(guest.path("events.jsonl.stream"), stream.to_string()).unwrap();
    std::fs::create_dir_all(guest.path(&format!("previous/{id}"))).unwrap();
    std::fs::rename(guest.path("events.jsonl"), guest.path(&format!("previous/{id}/events.jsonl"))).unwrap();
    guest.ok(&["ready"]);
    assert_eq!(guest.kinds(), ["ready"]);
    assert!(!guest.path("result.json").exists());
    for name in ["events.jsonl", "events.jsonl.stream", "result.json", "status.json"] {
        assert!(guest.path(&format!("previous/{id}/{name}")).exists(), "{name}");
    }
}

#[test]
fn numbers_that_jump_repeat_and_overflow() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let line = |seq: &str, kind: &str| {
        format!(
            "{{\"schema_version\":1,\"seq\":{seq},\"timestamp\":\"2026-01-01T00:00:00Z\",\"kind\":\"{kind}\",\"message\":\"\"}}\n"
        )
    };
    let append = |text: &str| {
        let mut file = std::fs::OpenOptions::new().append(true).open(guest.path("events.jsonl")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    append(&line("7", "ready"));
    append(&line("99999999999999999999999", "failed"));
    append("not an event\n");
    append(&line("2", "failed"));
    guest.ok(&["progress", "p"]);
    let last = guest.read("events.jsonl").lines().last().unwrap().to_owned();
    let last = Event::decode(last.as_bytes()).unwrap();
    assert_eq!((last.seq, last.kind), (8, State::Ready));
    assert_eq!(guest.status().state, State::Ready);
    append(&line("9007199254740991", "ready"));
    let refused = guest.run(&["completed"]);
    assert_eq!(refused.code, 69);
    assert!(refused.stderr.contains("highest seq"), "{}", refused.stderr);
}

/// A last word whose number was there already is no event to a reader, so it must be none to a writer.
#[test]
fn a_forged_last_word_with_a_repeated_number_ends_nothing() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    guest.ok(&["ready"]);
    let forged =
        r#"{"schema_version":1,"seq":2,"timestamp":"2026-01-01T00:00:00Z","kind":"failed","message":"forged"}"#;
    let mut file = std::fs::OpenOptions::new().append(true).open(guest.path("events.jsonl")).unwrap();
    writeln!(file, "{forged}").unwrap();
    guest.ok(&["progress", "on"]);
    guest.ok(&["completed"]);
}

#[test]
fn no_space_for_an_event() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    guest.ok(&["progress", "p"]);
    let before = guest.read("events.jsonl");
    // No file may grow beyond 2 KiB here, so that the append is cut short.
    let script = "trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\"";
    let full = |args: &[&str], input: &[u8]| {
        let mut shell = Command::new("/bin/bash");
        shell.args(["-c", script]).arg(binary()).args(args).env("PIKA_CLOUD_DIR", guest.root());
        finish(shell, input)
    };
    let long = "m".repeat(3000);
    let refused = full(&["ready", "--message", &long], b"");
    assert_eq!(refused.code, 74, "{}", refused.stderr);
    assert!(refused.stderr.contains("0 of 1 events were written"), "{}", refused.stderr);
    assert_eq!(guest.read("events.jsonl"), before);
    // Of a batch the whole lines that got in stay: a reader may have them.
    let refused = full(&["emit"], PROGRESS.repeat(20).as_bytes());
    assert_eq!(refused.code, 74, "{}", refused.stderr);
    let written = guest.events().len();
    assert!((3..22).contains(&written), "{written}");
    assert!(refused.stderr.contains(&format!("({} events before it are written)", written - 2)), "{}", refused.stderr);
    guest.ok(&["ready"]);
    assert_eq!(guest.events().len(), written + 1);
    guest.assert_documents_agree();
}

#[test]
fn a_lock_that_is_never_free() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let lock = std::fs::File::open(guest.path("events.jsonl.seq")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let began = Instant::now();
    let busy = guest.run(&["ready"]);
    assert_eq!(busy.code, 75);
    assert!(busy.stderr.contains("was locked by another writer for 10 s"), "{}", busy.stderr);
    assert!((10..14).contains(&began.elapsed().as_secs()));
}

#[test]
fn a_lock_file_that_is_replaced_meanwhile() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let lock = std::fs::File::open(guest.path("events.jsonl.seq")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut waiting = guest.command(&["ready"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    std::fs::remove_file(guest.path("events.jsonl.seq")).unwrap();
    assert_eq!(rig::wait(&mut waiting), 0);
    assert_eq!(guest.kinds(), ["starting", "ready"]);
}

/// Whoever replaces the lock file under its lock lets nobody in beside the next holder.
#[test]
fn a_lock_file_that_is_replaced_again_and_again() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let lock = std::fs::File::open(guest.path("events.jsonl.seq")).unwrap();
                rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
                if guest.path("events.jsonl.seq").metadata().unwrap().ino() == lock.metadata().unwrap().ino() {
                    std::fs::copy(guest.path("events.jsonl.seq"), guest.path("new")).unwrap();
                    std::fs::rename(guest.path("new"), guest.path("events.jsonl.seq")).unwrap();
                }
            }
        });
        let writers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut emit = guest.command(&["emit"]).stdin(Stdio::piped()).spawn().unwrap();
                    let mut stdin = emit.stdin.take().unwrap();
                    for _ in 0..1500 {
                        stdin.write_all(PROGRESS.as_bytes()).unwrap();
                        std::thread::sleep(Duration::from_micros(20));
                    }
                    drop(stdin);
                    assert_eq!(rig::wait(&mut emit), 0);
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(guest.events().len(), 6001);
}

/// At the cap progress is refused and counted, states are not; when there is room again the count is told.
#[test]
fn too_much_for_a_host_that_does_not_come() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let template =
        guest.read("events.jsonl").replace("\"message\":\"\"", &format!("\"message\":\"{}\"", "m".repeat(60_000)));
    let mut filled = String::new();
    for seq in 1..1200 {
        filled.push_str(&template.replacen("\"seq\":1,", &format!("\"seq\":{seq},"), 1));
    }
    std::fs::write(guest.path("events.jsonl"), &filled).unwrap();
    std::fs::write(guest.path("events.jsonl.seq"), "1199").unwrap();
    for _ in 0..2 {
        let refused = guest.run(&["progress", "p"]);
        assert_eq!(refused.code, 75);
        assert!(refused.stderr.contains("the event was dropped"), "{}", refused.stderr);
    }
    assert_eq!(guest.read("events.jsonl.dropped"), "2");
    let kept = filled.split_inclusive('\n').skip(400);
    std::fs::write(guest.path("events.jsonl"), kept.collect::<String>()).unwrap();
    guest.ok(&["ready"]);
    let events = guest.events();
    let notice = &events[events.len() - 2];
    assert_eq!((notice.kind.clone(), notice.seq), (State::Starting, 1200));
    assert_eq!(notice.details, Some(json!({"notice": {"dropped_events": 2}})));
    assert_eq!(events.last().unwrap().kind, State::Ready);
    assert!(!guest.path("events.jsonl.dropped").exists());
}

#[test]
fn an_agents_own_file_that_is_garbage() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    std::fs::write(guest.path("events.jsonl.stream"), "garbage").unwrap();
    let refused = guest.run(&["ready"]);
    assert_eq!(refused.code, 65);
    assert!(refused.stderr.contains("events.jsonl.stream is malformed"), "{}", refused.stderr);
    misplace(&guest.path("session.owner"), "fifo");
    misplace(&guest.path("events.jsonl.ack"), "fifo");
    std::fs::remove_file(guest.path("events.jsonl.stream")).unwrap();
    assert_eq!(guest.run(&["ready", "--wait-ack", "0"]).code, 75);
}

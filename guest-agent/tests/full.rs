//! A full file system under the contract's files, which are `/run` in most guests: the last words come out all the same.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::process::Command;

use pika_cloud_common::{Event, ResultStatus, State};
use rig::{Guest, Outcome, eventually, finish};
use serde_json::{Value, json};

/// A guest whose folder is a small file system of its own, unmounted at the end.
struct Small {
    guest: Guest,
}

impl Small {
    /// `None`, with the reason printed, where we may not mount one.
    fn new(options: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount a tmpfs");
            return None;
        }
        let guest = Guest::new();
        std::fs::create_dir(guest.root()).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(guest.root()).status();
        if !mounted.unwrap().success() {
            println!("skipped: no tmpfs can be mounted here");
            return None;
        }
        Some(Self { guest })
    }

    fn run(&self, script: &str) -> Outcome {
        let mut command = self.guest.command(&["run", "--", "/bin/sh", "-c", script]);
        let path = format!("{}:{}", rig::binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
        finish(std::mem::replace(command.env("PATH", path), Command::new("true")), b"")
    }

    /// The name under which evidence knows it.
    fn name(&self) -> Value {
        json!([self.guest.root().to_str().unwrap()])
    }

    fn failed(&self) -> Event {
        let last = self.guest.events().pop().unwrap();
        assert_eq!(last.kind, State::Failed);
        last
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.guest.root()).status();
    }
}

/// Until not a byte is left.
const FILL: &str = "cat /dev/zero >$PIKA_CLOUD_DIR/fill 2>/dev/null; echo x >>$PIKA_CLOUD_DIR/fill2";

/// The bytes of log that the events say are missing.
fn dropped(events: &[Event]) -> u64 {
    let notices =
        events.iter().filter_map(|event| event.details.as_ref()?.get("notice")?.get("dropped_log_bytes")?.as_u64());
    notices.sum()
}

/// Invariant 5, and the last words in spite of it.
#[test]
fn a_workload_that_fills_it_still_ends_as_it_did() {
    let Some(small) = Small::new("size=256k") else { return };
    let guest = &small.guest;
    assert_eq!(
        small.run(&format!("echo before; until [ -s $PIKA_CLOUD_DIR/logs/guest.log ]; do sleep 0.02; done; {FILL} 2>/dev/null; head -c 300000 /dev/zero | tr '\\0' x; exit 3")).code,
        3
    );
    let failed = small.failed();
    assert_eq!(failed.details, Some(json!({"exit_code": 3, "full": small.name()})));
    assert!(failed.message.starts_with("the workload exited with code 3; full at its end: /"), "{}", failed.message);
    let result = guest.result();
    assert_eq!((result.status, result.exit_code), (ResultStatus::Failed, Some(3)));
    guest.assert_documents_agree();
    // Every byte is there, or counted.
    let log = guest.read("logs/guest.log");
    assert!(log.starts_with("before\n"));
    assert_eq!(log.len() as u64 + dropped(&guest.events()), 300_007);
    assert!(log.len() < 300_007);
}

/// The agent's own files take and give back some blocks at any moment; that is no room.
#[test]
fn a_few_free_blocks_are_no_room() {
    for (blocks, is_full) in [("-32K", true), ("-256K", false)] {
        let Some(small) = Small::new("size=2m") else { return };
        assert_eq!(
            small.run(&format!("{FILL} 2>/dev/null; truncate -s {blocks} $PIKA_CLOUD_DIR/fill; exit 3")).code,
            3
        );
        let full = small.failed().details.unwrap().get("full").cloned();
        assert_eq!(full, is_full.then(|| small.name()), "{blocks}");
    }
}

#[test]
fn progress_is_refused_before_states_and_states_before_the_end() {
    let Some(small) = Small::new("size=320k") else { return };
    let guest = &small.guest;
    let script = format!(
        "pika-guest progress p || exit 40; {FILL} 2>/dev/null; \
         i=0; while pika-guest progress p; do i=$((i+1)); [ $i -lt 50 ] || exit 41; done; \
         pika-guest progress p; [ $? = 75 ] || exit 42; pika-guest ready || exit 43; \
         m=$(head -c 3000 /dev/zero | tr '\\0' m); \
         i=0; while pika-guest ready --message \"$m\"; do i=$((i+1)); [ $i -lt 40 ] || exit 44; done; \
         pika-guest ready --message \"$m\"; [ $? = 75 ] || exit 45; [ $i -ge 20 ] || exit 46; \
         pika-guest failed --exit-code 3 --message \"$m\" || exit 47; exit 3"
    );
    let outcome = small.run(&script);
    assert_eq!(outcome.code, 3, "{}", guest.read("logs/guest.log"));
    let failed = small.failed();
    assert_eq!((failed.message.len(), failed.exit_code()), (3000, Some(3)));
    let events = guest.events();
    let dropped =
        events.iter().filter_map(|event| event.details.as_ref()?.get("notice")?.get("dropped_events")?.as_u64());
    assert_eq!(dropped.sum::<u64>(), 2);
    guest.assert_documents_agree();
}

/// A host that dials only now, or again, must be heard and answered.
#[test]
fn a_session_on_a_full_file_system() {
    let Some(small) = Small::new("size=320k") else { return };
    let guest = &small.guest;
    let mut first = guest.owner();
    first.find_hello();
    first.start(
        "job.1",
        &format!("{FILL} 2>/dev/null; until [ -e $PIKA_CLOUD_DIR/artifacts/go ]; do sleep 0.05; done; exit 3"),
    );
    first.find_event("starting");
    eventually("it is full", || rustix::fs::statvfs(guest.root()).unwrap().f_bavail == 0);
    drop(first);
    let mut second = guest.owner();
    second.find_hello();
    second.find_event("starting");
    second.ack(1);
    // Without a byte in it.
    std::fs::File::create(guest.path("artifacts/go")).unwrap();
    let failed = second.find_event("failed");
    assert_eq!(failed.details, Some(json!({"exit_code": 3, "full": small.name()})));
    second.ack(failed.seq);
    second.release();
    eventually("the release is recorded", || guest.read("events.jsonl.ack").contains("released"));
    guest.assert_documents_agree();
}

/// A document too long for the reserve waits; the event does not, nor does the end.
#[test]
fn a_long_document_holds_up_nothing() {
    let Some(small) = Small::new("size=320k") else { return };
    let script = format!(
        "{FILL} 2>/dev/null; m=$(head -c 60000 /dev/zero | tr '\\0' m); \
         pika-guest ready --message \"$m\"; [ $? = 74 ] || exit 40; \
         head -c 300000 /dev/zero | tr '\\0' x; exit 3"
    );
    let began = std::time::Instant::now();
    assert_eq!(small.run(&script).code, 3, "{:?}", small.guest.events().len());
    assert!(began.elapsed() < rig::SOON);
    assert_eq!(small.failed().exit_code(), Some(3));
    small.guest.assert_documents_agree();
}

#[test]
fn without_a_name_left_the_end_comes_out() {
    let Some(small) = Small::new("size=4m,nr_inodes=40") else { return };
    let script = "i=0; while mkdir $PIKA_CLOUD_DIR/artifacts/$i; do i=$((i+1)); done 2>/dev/null; exit 3";
    assert_eq!(small.run(script).code, 3);
    assert_eq!(small.failed().details, Some(json!({"exit_code": 3, "full": small.name()})));
    // Once there are names again, whoever comes next brings the documents up to it.
    std::fs::remove_dir(small.guest.path("artifacts/0")).unwrap();
    std::fs::remove_dir(small.guest.path("artifacts/1")).unwrap();
    small.guest.observe();
    small.guest.assert_documents_agree();
}

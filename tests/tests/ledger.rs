//! The guest's ledger under many writers, in a real guest.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pika_cloud_tests::{Incus, LIMIT, Stage, until};
use serde_json::Value;
use std::collections::BTreeMap;

/// Invariant 1.
#[test]
fn thirty_two_writers_leave_no_hole() {
    let stage = Stage::new("writers");
    // 950 of each writer's thousand events through `emit`, the rest through single verbs.
    let command = r#"
        writer() {
            i=0; while [ $i -lt 950 ]; do i=$((i+1)); echo "{\"kind\":\"progress\",\"name\":\"w$1\",\"message\":\"$i\"}"; done | pika-guest emit || exit 1
            i=950; while [ $i -lt 1000 ]; do i=$((i+1)); pika-guest progress w$1 --message $i || exit 2; done
        }
        w=0; pids=; while [ $w -lt 32 ]; do writer $w & pids="$pids $!"; w=$((w+1)); done
        for pid in $pids; do wait $pid || exit 3; done
        pika-guest status"#;
    let spec = stage.spec(command);
    stage.run(&spec).expect(0);
    let journal = stage.journal(&spec);
    assert_eq!(journal.check_events(1), 32_000 + 2);
    let mut told: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for event in journal.events(1) {
        if let Some(name) = event["details"]["progress"]["name"].as_str() {
            told.entry(name.to_owned()).or_default().push(event["message"].as_str().unwrap().parse().unwrap());
        }
    }
    assert_eq!(told.len(), 32);
    for (name, numbers) in told {
        assert!(numbers.iter().copied().eq(1..=1000), "{name}: each once, in its own order");
    }
    assert_eq!(stage.outputs(&spec).verdict()["evidence"].get("bad_lines"), None, "none torn");
    stage.check_nothing_left(&spec);
}

/// Invariant 1: what a verb returned 0 for is there, whoever was killed beside it.
#[test]
fn writers_killed_at_random_tear_nothing() {
    let stage = Stage::new("torn-writers");
    // Each writer notes what its verb returned 0 for; a killer ends verbs at random.
    let command = r#"
        writer() {
            i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); pika-guest progress w$1 --message $i 2>/dev/null && echo $1:$i >> /tmp/acked.$1; done
        }
        w=0; pids=; while [ $w -lt 6 ]; do writer $w & pids="$pids $!"; w=$((w+1)); done
        n=0; while [ $n -lt 60 ]; do
            n=$((n+1)); set -- $(pidof pika-guest); [ $# -gt 0 ] || continue
            shift $(( ($(hexdump -n 2 -e '"%u"' /dev/urandom)) % $# )); tr '\0' ' ' < /proc/$1/cmdline 2>/dev/null | grep -q progress && kill -9 $1 2>/dev/null
            sleep 0.02
        done
        touch /tmp/stop; for pid in $pids; do wait $pid; done
        cat /tmp/acked.* > $PIKA_CLOUD_DIR/artifacts/acked"#;
    let spec = stage.spec(command);
    stage.run(&spec).expect(0);
    let journal = stage.journal(&spec);
    journal.check_events(1);
    let said: Vec<String> = journal
        .events(1)
        .iter()
        .filter_map(|event| {
            let name = event["details"]["progress"]["name"].as_str()?;
            Some(format!("{}:{}", &name[1..], event["message"].as_str()?))
        })
        .collect();
    let acked = stage.outputs(&spec).text("artifacts/acked");
    assert!(acked.lines().count() > 50, "the writers wrote: {}", acked.lines().count());
    for line in acked.lines() {
        assert_eq!(said.iter().filter(|said| *said == line).count(), 1, "{line} was acknowledged");
    }
    assert!(said.len() >= acked.lines().count());
    assert_eq!(stage.outputs(&spec).verdict()["evidence"].get("bad_lines"), None, "none torn");
    stage.check_nothing_left(&spec);
}

/// `status.json` agrees with the last state event, on both sides.
#[test]
fn the_status_is_that_of_the_last_state_event() {
    let stage = Stage::new("status");
    let spec = stage.spec(&format!("pika-guest ready --message 'now'; pika-guest progress more; {}", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_event(&spec, "progress", |event| event["details"].get("progress").is_some());
    let status: Value = serde_json::from_str(&Incus.exec_ok(&spec.instance, "pika-guest status --json")).unwrap();
    assert_eq!((&status["state"], &status["message"]), (&Value::from("ready"), &Value::from("now")));
    let inspected = until("inspect says ready", LIMIT, || {
        let text = stage.call(&["--json", "inspect", &spec.id]).expect(0).stdout;
        let inspected: Value = serde_json::from_str(&text).unwrap();
        (inspected["state"] == "ready").then_some(inspected)
    });
    assert_eq!(inspected["last_seq"], 3);
    // Invariant 1, seen from the guest: what is refused changes nothing.
    assert_eq!(Incus.exec(&spec.instance, "pika-guest ready --details '{'").status.code(), Some(65));
    stage.open_gate(&spec);
    running.finish().expect(0);
    assert_eq!(stage.journal(&spec).check_events(1), 4);
    stage.check_nothing_left(&spec);
}

/// A verb that waits for the host returns only when the host has it.
#[test]
fn a_verb_can_wait_for_the_host() {
    let stage = Stage::new("acked");
    let spec = stage.spec("pika-guest ready --wait-ack 20s && echo acknowledged");
    stage.run(&spec).expect(0);
    assert_eq!(stage.outputs(&spec).log(), "acknowledged\n");
    stage.check_nothing_left(&spec);
}

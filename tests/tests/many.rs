//! Many runtimes at once, and many who want the same one.

#![allow(
    clippy::format_collect,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and reads better than it runs fast"
)]

use pika_cloud_tests::{Incus, Signal, Spec, Stage, eventually};

#[test]
fn twenty_jobs_at_once_on_one_daemon() {
    let stage = Stage::new("twenty");
    let specs: Vec<Spec> = (0..20)
        .map(|i| {
            stage.spec(&format!(
                "pika-guest ready --message 'job {i}'
                n=0; while [ $n -lt 50 ]; do n=$((n+1)); echo {i}:$n; done
                echo {i} > $PIKA_CLOUD_DIR/artifacts/number; exit $(({i} % 3))"
            ))
        })
        .collect();
    let running: Vec<_> = specs.iter().map(|spec| stage.start(spec)).collect();
    for (i, (running, spec)) in running.into_iter().zip(&specs).enumerate() {
        let code = i32::try_from(i % 3).unwrap();
        running.finish().expect(code);
        let outputs = stage.outputs(spec);
        assert_eq!(outputs.log(), (1..=50).map(|n| format!("{i}:{n}\n")).collect::<String>());
        assert_eq!(outputs.text("artifacts/number"), format!("{i}\n"));
        assert_eq!(outputs.check_digests(), 1);
        assert_eq!(outputs.events()[1]["message"], format!("job {i}"));
        assert_eq!(outputs.verdict()["exit_code"], code);
        assert_eq!(stage.journal(spec).check_events(1), 3);
    }
    for spec in &specs {
        stage.check_nothing_left(spec);
    }
    let listed = stage.call(&["--json", "list"]).expect(0);
    let listed: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 20);
}

/// Invariant 6.
#[test]
fn of_two_runs_of_one_spec_one_drives_and_the_other_follows() {
    let stage = Stage::new("two");
    let command = format!(
        "echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; {}; echo end; exit 7",
        Stage::gate()
    );
    let spec = stage.spec(&command);
    let (one, other) = (stage.start(&spec), stage.start_with(&spec, &[]));
    stage.wait_ready(&spec);
    eventually("both show it", || one.said().contains("ready") && other.said().contains("ready"));
    stage.open_gate(&spec);
    let (one, other) = (one.finish().expect(7), other.finish().expect(7));
    assert_eq!(one.stdout, "end\n");
    assert_eq!(other.stdout, "end\n", "a follower prints the log, too");
    assert_eq!(stage.outputs(&spec).text("artifacts/starts"), "started\n");
    let journal = stage.journal(&spec);
    assert_eq!(journal.check_events(1), 3);
    assert_eq!((journal.host("requested").len(), journal.host("verdict").len()), (1, 1));
    stage.check_nothing_left(&spec);
}

/// Invariant 6: the one that follows takes over when the other dies.
#[test]
fn a_follower_takes_over_from_a_dead_driver() {
    let stage = Stage::new("heir");
    let command =
        format!("echo started >> $PIKA_CLOUD_DIR/artifacts/starts; pika-guest ready; {}; exit 7", Stage::gate());
    let spec = stage.spec(&command);
    let driver = stage.start(&spec);
    stage.wait_ready(&spec);
    let heir = stage.start(&spec);
    eventually("the heir follows", || heir.said().contains("ready"));
    driver.kill();
    stage.open_gate(&spec);
    heir.finish().expect(7);
    assert_eq!(stage.outputs(&spec).text("artifacts/starts"), "started\n");
    assert_eq!(stage.journal(&spec).check_events(1), 3);
    stage.check_nothing_left(&spec);
}

/// Whoever of them is interrupted, the job is.
#[test]
fn an_interrupted_follower_ends_the_job() {
    let stage = Stage::new("follower");
    let spec = stage.spec("pika-guest ready; while :; do sleep 0.1; done");
    let driver = stage.start(&spec);
    stage.wait_ready(&spec);
    let follower = stage.start(&spec);
    eventually("it follows", || follower.said().contains("ready"));
    follower.signal(Signal::INT);
    follower.finish().expect(130);
    driver.finish().expect(130);
    assert_eq!(stage.outputs(&spec).verdict()["verdict"], "cancelled");
    stage.check_nothing_left(&spec);
}

/// Invariant 4: two state dirs know nothing of each other.
#[test]
fn runtimes_of_another_state_dir_are_left_alone() {
    let (stage, other) = (Stage::new("ours"), Stage::new("theirs"));
    let spec = stage.spec(&format!("pika-guest ready; {}", Stage::gate()));
    let running = stage.start(&spec);
    stage.wait_ready(&spec);
    // The same names from another state dir.
    other.run(&spec).expect(125).saying(&[&spec.instance, "another state dir", "left alone"]);
    other.call(&["destroy", &spec.id]).expect(125).saying(&["no runtime"]);
    assert_eq!(Incus.instance(&spec.instance).unwrap()["status"], "Running");
    stage.open_gate(&spec);
    running.finish().expect(0);
    stage.check_nothing_left(&spec);
}

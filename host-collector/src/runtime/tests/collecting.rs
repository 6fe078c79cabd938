//! Outputs on every terminal path, within a budget of their own (Invariant 7).

use pika_cloud_common::limits::MAX_LOG_FILES;
use pika_cloud_common::spec::RetentionPolicy;
use pika_cloud_common::wire::{ErrorCode, SessionError};

use super::*;

/// Its outputs are being collected, in the session that it had.
fn collecting(spec: RuntimeSpec) -> Shell {
    let mut shell = Shell::live(spec);
    shell.event(1, "failed");
    assert!(shell.settled().contains(&"send archive **".to_owned()));
    assert_eq!(shell.core.phase(), Phase::Collecting);
    shell
}

fn budget() -> Duration {
    Duration::from_secs(spec().watchdogs.collect_secs)
}

fn problem(shell: &Shell) -> Option<String> {
    shell.core.view().collection.as_ref().expect("a collection").error.clone()
}

#[test]
fn an_open_session_brings_outputs_at_once() {
    let mut shell = collecting(spec());
    shell.says(&entry("out"));
    assert_eq!(shell.came.0, ["out"]);
    let asked = shell.notice(Notice::ArchiveDone { files: 1, bytes: 0, skipped: 2, truncated: false, problem: None });
    assert_eq!(asked, [format!("store within {:?}", budget())]);
    assert_eq!(shell.core.next_tick().map(|due| due > shell.now.mono), Some(true));
    shell.core.stored(Stored { files: 1, bytes: 7, problem: None }, shell.now);
    shell.settled();
    let collection = shell.core.view().collection.clone().unwrap();
    assert_eq!((collection.complete, collection.files, collection.bytes, collection.skipped), (true, 1, 7, 2));
    assert_eq!(shell.core.phase(), Phase::Destroying);
}

#[test]
fn entries_before_they_are_asked_for_are_nobodys() {
    let mut shell = Shell::live(spec());
    shell.says(&entry("early"));
    assert_eq!(shell.came.0, [""; 0]);
}

/// A guest that says that all was sent before anything was asked for would keep its workload, and its outputs to itself.
#[test]
fn an_archive_that_nobody_asked_for_ends_no_collection() {
    let mut shell = Shell::live(spec());
    shell.lose();
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.looked(Some(running()));
    shell.dialled();
    assert_eq!(shell.hello("s-1"), ["send TERM"]);
    shell.notice(Notice::ArchiveDone { files: 0, bytes: 0, skipped: 0, truncated: false, problem: None });
    let (code, message) = (ErrorCode::Archive, "no".to_owned());
    shell.says(&GuestMessage::Error(SessionError { code, message }));
    assert_eq!(shell.core.phase(), Phase::Collecting);
    let grace = Duration::from_secs(spec().watchdogs.stop_grace_secs);
    assert_eq!(shell.wait(grace)[..2], ["send ping", "send KILL"]);
}

/// Incus may answer anything for a while; the budget is what ends it.
#[test]
fn a_question_that_is_refused_is_asked_again() {
    let mut shell = Shell::live(spec());
    shell.event(1, "failed");
    shell.lose();
    shell.settled();
    let refused = CallFailure { transient: false, message: "no permission".to_owned() };
    shell.core.answer(shell.look, Answer::Looked(Err(refused)), shell.now);
    assert_eq!(shell.wait_next(), ["look pika-7 or search"]);
    shell.looked(Some(running()));
    shell.dialled();
    assert!(shell.hello("s-1").contains(&"send archive **".to_owned()));
}

/// Invariant 5, and no collection that is called whole.
#[test]
fn a_log_file_too_many_is_told() {
    let mut shell = Shell::live(spec());
    for count in 0..=MAX_LOG_FILES {
        let mut bytes = Vec::new();
        GuestMessage::Log(LogChunk { file: format!("{count}.log"), offset: 0, len: 1 }).write(&mut bytes);
        bytes.push(b'x');
        shell.read(&bytes);
        shell.settled();
    }
    shell.event(1, "completed");
    shell.settled();
    shell.collected();
    assert!(problem(&shell).unwrap().contains("log files"));
}

#[test]
fn without_a_session_one_is_opened() {
    let mut shell = Shell::live(spec());
    shell.event(1, "failed");
    assert_eq!(shell.lose(), ["hang up"]);
    assert_eq!(shell.committed(), ["look pika-7 or search", "commit ended !"]);
    shell.committed();
    assert_eq!(shell.looked(Some(running())), ["dial pika-7"]);
    assert_eq!(shell.dialled(), ["send hello after s-1 1"]);
    assert_eq!(shell.hello("s-1"), ["begin artifacts 1", "send archive **"]);
    assert_eq!(shell.collected().last().map(String::as_str), Some("commit collected verdict !"));
    assert_eq!(problem(&shell), None);
}

#[test]
fn an_instance_that_is_stopped_or_gone_brings_nothing() {
    for (seen, wanted) in
        [(Some(seen(InstanceState::Stopped)), "nothing to salvage from a stopped one"), (None, "the instance is gone")]
    {
        let mut shell = Shell::live(spec());
        shell.event(1, "failed");
        shell.lose();
        shell.settled();
        shell.looked(seen);
        shell.settled();
        assert!(problem(&shell).is_some_and(|problem| problem.contains(wanted)));
        assert_eq!(shell.core.phase(), Phase::Destroying);
    }
}

#[test]
fn a_session_that_is_lost_is_tried_again_a_few_times() {
    let mut shell = collecting(spec());
    let mut losses = 0;
    while shell.core.phase() == Phase::Collecting {
        let asked = shell.lose();
        losses += 1;
        if asked.iter().any(|asked| asked.starts_with("store")) {
            break;
        }
        assert_eq!(asked, ["hang up"]);
        assert_eq!(shell.wait_next(), ["look pika-7 or search"]);
        shell.looked(Some(running()));
        shell.dialled();
        assert_eq!(shell.hello("s-1")[..2], ["begin artifacts 1", "send archive **"]);
    }
    assert_eq!(losses, 8);
    shell.core.stored(Stored::default(), shell.now);
    assert_eq!(problem(&shell).as_deref(), Some("reset"));
}

#[test]
fn a_budget_that_is_over_is_the_end_of_it() {
    let mut shell = collecting(spec());
    shell.says(&entry("half"));
    let deadline = shell.now.mono + budget();
    while shell.core.phase() == Phase::Collecting {
        let asked = shell.wait_next();
        if asked.iter().any(|asked| asked.starts_with("store")) {
            // A little is left for the disk.
            assert_eq!(asked.last().map(String::as_str), Some("store within 5s"));
            break;
        }
        shell.says(&GuestMessage::Heartbeat(pika_cloud_common::wire::Heartbeat { seq: 1, uptime: 1 }));
    }
    assert_eq!(shell.now.mono, deadline);
    // What comes now is not of what is being stored.
    shell.says(&entry("late"));
    assert_eq!(shell.came.0, ["half"]);
    assert_eq!(
        shell.notice(Notice::ArchiveDone { files: 9, bytes: 9, skipped: 9, truncated: false, problem: None }),
        [""; 0]
    );
    shell.core.stored(Stored::default(), shell.now);
    assert!(problem(&shell).unwrap().contains("not done within collect_secs"));
}

/// It would throw away what is being stored.
#[test]
fn a_session_that_comes_too_late_is_not_asked() {
    let mut shell = collecting(spec());
    shell.lose();
    shell.wait_next();
    shell.looked(Some(running()));
    let stored = shell.wait(budget());
    assert_eq!(stored, ["store within 5s"]);
    assert_eq!(shell.dialled(), ["send hello after s-1 1"]);
    assert_eq!(shell.hello("s-1"), [""; 0]);
    shell.core.stored(Stored::default(), shell.now);
    assert!(shell.settled().contains(&"send release".to_owned()));
}

/// A look from before shows nothing that the session does not.
#[test]
fn an_answer_of_before_disturbs_no_collection() {
    let mut shell = Shell::live(spec());
    shell.core.woken(shell.now);
    shell.asked();
    shell.event(1, "failed");
    shell.settled();
    assert_eq!(shell.looked(Some(running())), [""; 0], "no second session");
    assert_eq!(shell.collected().last().map(String::as_str), Some("commit collected verdict !"));
}

#[test]
fn what_the_disk_refuses_is_told() {
    let mut shell = collecting(spec());
    shell.notice(Notice::ArchiveDone { files: 1, bytes: 1, skipped: 0, truncated: true, problem: None });
    shell.core.stored(Stored { problem: Some("no room".to_owned()), ..Stored::default() }, shell.now);
    assert_eq!(problem(&shell).as_deref(), Some("no room"));
    let mut truncated = collecting(spec());
    truncated.notice(Notice::ArchiveDone { files: 1, bytes: 1, skipped: 0, truncated: true, problem: None });
    truncated.core.stored(Stored::default(), truncated.now);
    assert_eq!(problem(&truncated).unwrap(), "artifacts are left out: the agent does not say which, or why");
    let mut told = collecting(spec());
    let why = Some("`a\tb`: its name has control characters".to_owned());
    told.notice(Notice::ArchiveDone { files: 1, bytes: 1, skipped: 1, truncated: true, problem: why });
    told.core.stored(Stored::default(), told.now);
    assert_eq!(problem(&told).unwrap(), "artifacts are left out: `a b`: its name has control characters");
}

/// Cancelled while no session is open: the workload is told as soon as one is, and gets its grace.
#[test]
fn a_workload_that_still_runs_is_stopped_before_its_outputs_are_collected() {
    let cancelled = || {
        let mut shell = Shell::live(spec());
        shell.lose();
        shell.core.command(Command::Cancel, shell.now);
        shell.settled();
        shell.looked(Some(running()));
        shell.dialled();
        assert_eq!(shell.hello("s-1"), ["send TERM"]);
        shell
    };
    let mut obeys = cancelled();
    assert_eq!(obeys.event(1, "failed"), ["begin artifacts 1", "send archive **", "commit failed !"]);
    obeys.committed();
    assert_eq!(obeys.collected().last().map(String::as_str), Some("commit collected verdict !"));
    // One that does not end.
    let mut ignores = cancelled();
    let told_at = ignores.now.mono;
    let mut asked = Vec::new();
    while asked.is_empty() || asked == ["send ping"] {
        ignores.says(&GuestMessage::Heartbeat(pika_cloud_common::wire::Heartbeat { seq: 0, uptime: 1 }));
        asked = ignores.wait_next();
    }
    assert!(asked.ends_with(&["send KILL", "begin artifacts 1", "send archive **"].map(str::to_owned)), "{asked:?}");
    assert_eq!(ignores.now.mono, told_at + Duration::from_secs(spec().watchdogs.stop_grace_secs));
    // Its grace goes on through a session that is lost.
    let mut lost = cancelled();
    lost.wait(Duration::from_secs(8));
    lost.lose();
    lost.wait(Duration::from_secs(5));
    lost.looked(Some(running()));
    lost.dialled();
    assert_eq!(lost.hello("s-1"), ["send KILL", "begin artifacts 1", "send archive **"]);
}

#[test]
fn a_workload_that_had_its_grace_is_killed() {
    let mut shell = Shell::live(spec());
    shell.core.command(Command::Cancel, shell.now);
    assert_eq!(shell.settled(), ["send TERM", "commit command ended !"]);
    let mut asked = Vec::new();
    while shell.core.phase() == Phase::Terminating {
        shell.says(&GuestMessage::Heartbeat(pika_cloud_common::wire::Heartbeat { seq: 0, uptime: 1 }));
        asked = shell.wait_next();
    }
    assert_eq!(asked, ["send KILL", "begin artifacts 1", "send archive **"]);
}

/// Where nothing is collected, an instance that is kept would go on with what was cancelled.
#[test]
fn a_workload_is_stopped_also_where_nothing_is_collected() {
    for (retention, is_stopped) in
        [(RetentionPolicy::KeepUntilStopped, true), (RetentionPolicy::DestroyOnCompletion, false)]
    {
        let mut nothing = spec();
        nothing.policies.output_collection.mode = OutputCollectionMode::None;
        nothing.policies.retention_policy = retention;
        let mut shell = Shell::live(nothing);
        shell.core.command(Command::Cancel, shell.now);
        shell.settled();
        let mut asked = Vec::new();
        while shell.core.phase() == Phase::Terminating {
            shell.says(&GuestMessage::Heartbeat(pika_cloud_common::wire::Heartbeat { seq: 0, uptime: 1 }));
            asked = shell.wait_next();
        }
        assert_eq!(asked.contains(&"send KILL".to_owned()), is_stopped);
        assert!(!asked.contains(&"begin artifacts 1".to_owned()));
        assert!(shell.core.view().verdict.is_some());
    }
}

/// The guest booted again: nothing of ours runs there.
#[test]
fn what_another_boot_runs_is_not_waited_for() {
    let mut shell = Shell::live(spec());
    shell.lose();
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.looked(Some(running()));
    shell.dialled();
    assert_eq!(shell.hello("s-2")[..2], ["begin artifacts 1", "send archive **"]);
    shell.collected();
    assert!(problem(&shell).unwrap().contains("the guest began anew"), "what the workload left may be lost");
}

/// A stream that the image left, or one that was begun before the workload was asked for, loses nothing.
#[test]
fn outputs_of_a_guest_that_was_asked_for_nothing_are_whole() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.core.answer(shell.console, Answer::Console(None), shell.now);
    shell.asked();
    shell.looked(Some(running()));
    shell.dialled();
    shell.hello("s-1");
    shell.collected();
    assert_eq!(problem(&shell), None);
}

/// Half of the budget is left for the outputs.
#[test]
fn a_long_grace_leaves_time_for_outputs() {
    let mut patient = spec();
    (patient.watchdogs.stop_grace_secs, patient.watchdogs.collect_secs) = (600, 20);
    let mut shell = Shell::live(patient);
    shell.lose();
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.looked(Some(running()));
    shell.dialled();
    assert_eq!(shell.hello("s-1"), ["send TERM"]);
    shell.says(&GuestMessage::Heartbeat(pika_cloud_common::wire::Heartbeat { seq: 0, uptime: 1 }));
    assert!(shell.wait(Duration::from_secs(10)).contains(&"send KILL".to_owned()));
}

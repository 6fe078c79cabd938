//! What comes at the wrong time: while something waits for the disk, of a session that is lost, or of another run.

use pika_cloud_common::verdict::{DeathCause, Outcome};

use super::*;

fn outcome(shell: &Shell) -> Option<Outcome> {
    shell.core.view().ended.as_ref().map(|ended| ended.outcome.clone())
}

/// Invariant 2: the guest's last word stands in the journal first.
#[test]
fn a_last_word_that_waits_for_the_disk_is_not_overtaken() {
    let mut shell = Shell::live(spec());
    shell.event(1, "completed");
    shell.core.woken(shell.now);
    shell.lose();
    shell.wait(Duration::from_secs(3600));
    shell.core.command(Command::Cancel, shell.now);
    assert_eq!((shell.core.phase(), outcome(&shell)), (Phase::Live, None));
    shell.committed();
    assert_eq!(shell.core.phase(), Phase::Collecting);
    assert_eq!(outcome(&shell), Some(Outcome::Completed { exit_code: None }));
    assert_eq!(shell.core.view().command, Some(Command::Cancel), "it was only put off");
}

/// Invariant 9: the next session may be with another boot of the guest.
#[test]
fn that_a_lost_session_opened_is_no_news() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.dialled();
    shell.hello("s-1");
    shell.lose();
    shell.redial();
    assert_eq!((shell.core.phase(), shell.core.view().start_sent.is_none()), (Phase::Dialing, true));
    shell.hello("s-2");
    shell.settled();
    assert_eq!((shell.core.phase(), outcome(&shell)), (Phase::Live, None));
}

#[test]
fn the_stream_of_another_request_is_not_this_incarnations() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.dialled();
    shell.read(&[hello_with("s-1", 1, Some("job-7.0")), event(1, "completed")].concat());
    shell.settled();
    assert_eq!(outcome(&shell), Some(Outcome::GuestDied { cause: DeathCause::Rebooted }));
}

/// All of it is here; asked for behind its cursor once more, the guest would end it again.
#[test]
fn behind_a_stream_that_is_over_the_next_one_is_asked_for() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    shell.committed();
    shell.says(&GuestMessage::End(pika_cloud_common::wire::EndReason::NewStream));
    while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
    shell.looked(Some(running()));
    shell.settled();
    assert_eq!(shell.dialled(), ["send hello"]);
    shell.hello("s-2");
    shell.settled();
    assert_eq!(outcome(&shell), Some(Outcome::GuestDied { cause: DeathCause::Rebooted }));
}

/// Invariant 9: a guest that was restored to what it was before our start would run its workload again.
#[test]
fn a_guest_that_was_rewound_is_not_asked_again() {
    let rewound = Notice::Rewound { last_seq: 0 };
    let ours = Some("job-7.1");
    for (last_seq, request_id, says_so) in [(0, None, true), (0, None, false), (0, ours, false), (2, None, false)] {
        let mut shell = Shell::live(spec());
        shell.event(1, "starting");
        shell.event(2, "ready");
        shell.settled();
        shell.lose();
        shell.redial();
        let mut said = hello_with("s-1", last_seq, request_id);
        if says_so {
            GuestMessage::Notice(rewound.clone()).write(&mut said);
        }
        shell.read(&said);
        let asked = shell.settled();
        assert!(!asked.iter().any(|asked| asked.starts_with("send start")), "{asked:?}");
        assert_eq!(outcome(&shell), Some(Outcome::GuestDied { cause: DeathCause::Rewound }), "{last_seq}");
    }
}

/// The same where only the guest's own word shows it, with its hello in one batch.
#[test]
fn a_start_does_not_outlive_the_end_of_its_batch() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    shell.settled();
    shell.lose();
    shell.redial();
    let mut said = hello_with("s-1", 1, Some("job-7.1"));
    GuestMessage::Notice(Notice::Rewound { last_seq: 0 }).write(&mut said);
    shell.read(&said);
    let asked = shell.settled();
    assert!(!asked.iter().any(|asked| asked.starts_with("send start")), "{asked:?}");
}

/// Invariant 2: what leads to a verdict, and what comes behind it, uses the room that is kept for those on a full disk.
#[test]
fn a_last_word_finds_room() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    assert!(!shell.commit.as_ref().unwrap().last);
    shell.event(2, "failed");
    let mut commits = 0;
    while !shell.committed().is_empty() {
        let Some(commit) = &shell.commit else { break };
        assert!(commit.last, "{}", tell_commit(commit));
        commits += 1;
    }
    assert_eq!(commits, 2, "its own, and that it is the end");
}

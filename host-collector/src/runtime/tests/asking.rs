//! What Incus is asked for, and when.

use pika_cloud_common::spec::{RestartPolicy, RetentionPolicy};

use super::*;

fn busy() -> CallFailure {
    CallFailure { transient: true, message: "busy".to_owned() }
}

#[test]
fn what_incus_is_asked_for_stands_in_the_journal_first() {
    let mut shell = Shell::new(spec());
    assert_eq!(shell.asked(), ["look pika-7", "commit requested"]);
    assert_eq!(shell.looked(None), [""; 0], "the disk is busy");
    assert_eq!(shell.committed(), ["commit state"]);
    assert_eq!(shell.committed(), ["create 1 1"]);
    assert_eq!(shell.changed(Answer::Created(Ok(()))), ["commit state instance_starting"]);
    assert_eq!(shell.committed(), ["start pika-7"]);
    assert_eq!(shell.changed(Answer::Started(Ok(()))), ["dial pika-7"]);
    assert_eq!(shell.dialled(), ["send hello"]);
    assert_eq!(shell.hello("s-1"), ["commit session stream"]);
    assert_eq!(shell.committed(), ["commit state start_sent"]);
    assert_eq!(shell.committed(), ["send start job-7.1"]);
}

/// Invariant 2: the verdict is durable before anything is destroyed, and the guest is let go before that.
#[test]
fn a_verdict_is_durable_before_anything_is_destroyed() {
    let mut shell = Shell::live(spec());
    assert_eq!(shell.event(1, "completed"), ["commit completed !"]);
    assert_eq!(shell.committed(), ["send ack 1", "begin artifacts 1", "send archive **", "commit ended !"]);
    shell.committed();
    assert_eq!(shell.collected()[1..], ["commit collected verdict !"]);
    assert_eq!(shell.committed(), ["derive 1", "send release", "farewell", "destroy pika-7 1"]);
    assert_eq!(shell.changed(Answer::Destroyed(Ok(Destroyed::Gone))), ["commit state finished !"]);
    assert!(!shell.core.is_settled());
    shell.committed();
    assert!(shell.core.is_settled());
    assert_eq!((shell.core.phase(), shell.core.next_tick()), (Phase::Done, None));
}

/// What is kept is let go as well, and that stands in the journal.
#[test]
fn a_guest_that_is_kept_is_released() {
    let mut kept = spec();
    kept.policies.retention_policy = RetentionPolicy::KeepUntilStopped;
    let mut shell = Shell::live(kept);
    shell.event(1, "completed");
    shell.settled();
    shell.collected();
    assert_eq!(shell.committed(), ["derive 1", "send release", "farewell", "commit kept !"]);
    shell.committed();
    shell.core.command(Command::Stop, shell.now);
    assert_eq!(shell.asked(), ["commit command !"]);
    assert_eq!(shell.committed(), ["destroy pika-7 1"]);
}

/// A create that is under way would make behind our back what is being destroyed.
#[test]
fn there_is_one_change_at_a_time() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    assert_eq!(shell.settled(), ["create 1 1"]);
    shell.core.command(Command::Cancel, shell.now);
    assert_eq!(shell.settled(), ["look pika-7 or search", "commit command ended !"]);
    assert!(!shell.looked(None).is_empty());
    let asked = shell.settled();
    assert_eq!(asked, ["derive 1"], "the create is under way");
    assert_eq!(shell.core.phase(), Phase::Destroying);
    assert_eq!(shell.changed(Answer::Created(Ok(()))), ["destroy pika-7 1"]);
}

/// Nobody heard of the create, so that what is gone may come.
#[test]
fn a_create_without_an_answer_is_destroyed_until_it_settled() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.looked(None);
    shell.settled();
    assert_eq!(shell.changed(Answer::Created(Err(busy()))), ["destroy pika-7 1"]);
    let (begin, mut tries) = (shell.now.mono, 0);
    while shell.changed(Answer::Destroyed(Ok(Destroyed::Gone))).is_empty() {
        tries += 1;
        assert_eq!(shell.wait_next(), ["destroy pika-7 1"]);
    }
    assert!(tries > 3 && shell.now.mono >= begin + Duration::from_secs(5), "{tries}");
}

/// What waits for the disk is not asked for any more, once the end is decided.
#[test]
fn nothing_is_made_behind_an_end() {
    let mut created = Shell::new(spec());
    created.settled();
    assert_eq!(created.looked(None), ["commit state"]);
    created.core.command(Command::Cancel, created.now);
    assert_eq!(created.settled(), ["look pika-7 or search", "commit command ended !"]);
    let mut started = Shell::new(spec());
    started.settled();
    started.looked(None);
    started.settled();
    assert_eq!(started.changed(Answer::Created(Ok(()))), ["commit state instance_starting"]);
    started.core.command(Command::Cancel, started.now);
    assert_eq!(started.settled(), ["console pika-7", "commit command ended !"]);
}

/// Invariants 5 and 6: a guest can make Incus tell much, and none of it hides another collector.
#[test]
fn a_flood_of_wake_ups_is_one_question_after_the_other() {
    let mut shell = Shell::live(spec());
    for _ in 0..1000 {
        shell.core.woken(shell.now);
    }
    assert_eq!(shell.asked(), ["look pika-7 or search"]);
    assert_eq!(shell.looked(Some(running())), ["look pika-7 or search"], "something happened since");
    assert_eq!(shell.looked(Some(running())), [""; 0]);
    shell.core.woken(shell.now);
    shell.core.woken(shell.now);
    shell.asked();
    shell.looked(Some(taken()));
    assert_eq!(shell.core.phase(), Phase::TakenOver);
}

#[test]
fn answers_that_nobody_waits_for_change_nothing() {
    let mut shell = Shell::live(spec());
    shell.core.woken(shell.now);
    assert_eq!(shell.asked(), ["look pika-7 or search"]);
    let stale = shell.look - 1;
    shell.core.answer(stale, Answer::Looked(Ok(None)), shell.now);
    shell.core.answer(shell.change, Answer::Started(Err(busy())), shell.now);
    shell.core.answer(999, Answer::Destroyed(Ok(Destroyed::Gone)), shell.now);
    assert_eq!((shell.asked(), shell.core.phase()), (vec![], Phase::Live));
    assert_eq!(shell.looked(None)[0], "hang up");
    // Nor do a dial that was hung up, and its like.
    let mut dialing = Shell::new(spec());
    dialing.settled();
    dialing.looked(None);
    dialing.settled();
    dialing.changed(Answer::Created(Ok(())));
    dialing.settled();
    dialing.changed(Answer::Started(Ok(())));
    assert!(dialing.core.waits_for_dial(dialing.dial));
    dialing.core.command(Command::Cancel, dialing.now);
    assert_eq!(dialing.asked(), ["hang up", "console pika-7", "commit command ended !"]);
    assert!(!dialing.core.waits_for_dial(dialing.dial));
    assert_eq!(dialing.dialled(), [""; 0]);
    assert!(!dialing.core.wants_read());
}

/// A person renamed it: its labels name it, and one that is made again has the spec's name.
#[test]
fn an_instance_is_followed_by_its_labels() {
    let renamed = |state| Some(Seen { name: "mine".to_owned(), ..seen(state) });
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(renamed(InstanceState::Stopped));
    assert_eq!(shell.settled(), ["start mine"]);
    assert_eq!(shell.changed(Answer::Started(Ok(()))), ["dial mine"]);
    shell.core.woken(shell.now);
    assert_eq!(shell.asked(), ["look mine or search"]);
    shell.looked(None);
    assert_eq!(shell.settled(), ["create 1 1"]);
    shell.changed(Answer::Created(Ok(())));
    assert_eq!(shell.settled(), ["start pika-7"]);
}

/// Invariants 4 and 6.
#[test]
fn what_is_not_ours_is_left_alone() {
    for (claim, is_taken) in [
        (None, false),
        (Some(Claim { runtime_id: "other".to_owned(), ..claim() }), false),
        (Some(Claim { owner: "other".to_owned(), ..claim() }), false),
        (Some(Claim { owner: "other".to_owned(), term: 2, ..claim() }), true),
    ] {
        let mut shell = Shell::new(spec());
        shell.settled();
        let asked = shell.looked(Some(Seen { claim: claim.clone(), ..running() }));
        let wanted = if is_taken { vec!["commit taken_over !"] } else { vec!["look pika-7", "commit ended !"] };
        assert_eq!(asked, wanted, "{claim:?}");
        assert_eq!(shell.core.phase() == Phase::TakenOver, is_taken, "{claim:?}");
    }
}

/// Our own term may have been raised by another process of this state dir.
#[test]
fn a_higher_term_of_ours_is_taken_up() {
    let mut shell = Shell::new(spec());
    shell.settled();
    let raised = Claim { term: 4, ..claim() };
    let stopped = Seen { claim: Some(raised), ..seen(InstanceState::Stopped) };
    assert_eq!(shell.looked(Some(stopped)), ["commit term state instance_starting"]);
    assert_eq!(shell.core.view().term, 4);
}

#[test]
fn a_take_over_stops_everything() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    shell.core.woken(shell.now);
    shell.asked();
    assert_eq!(shell.looked(Some(taken())), ["hang up"]);
    assert_eq!(shell.settled(), ["commit taken_over !"], "and no ack");
    shell.core.command(Command::Destroy, shell.now);
    shell.core.woken(shell.now);
    assert_eq!(shell.wait(Duration::from_secs(100_000)), [""; 0]);
    assert_eq!((shell.core.phase(), shell.core.next_tick()), (Phase::TakenOver, None));
    assert!(shell.core.view().verdict.is_none());
    // While outputs are looked for, too.
    let mut collecting = Shell::live(spec());
    collecting.core.command(Command::Cancel, collecting.now);
    collecting.event(1, "failed");
    collecting.settled();
    collecting.lose();
    collecting.wait_next();
    collecting.looked(Some(taken()));
    assert_eq!(collecting.core.phase(), Phase::TakenOver);
}

#[test]
fn an_incarnation_begins_with_nothing_of_the_last() {
    let mut again = spec();
    again.policies.restart_policy = RestartPolicy::Always;
    again.policies.max_restarts = 1;
    let mut shell = Shell::live(again);
    shell.log(0, b"one\n");
    shell.event(1, "failed");
    shell.settled();
    shell.collected();
    shell.settled();
    assert_eq!(shell.changed(Answer::Destroyed(Ok(Destroyed::Gone))), ["commit state finished !"]);
    shell.committed();
    assert_eq!(shell.core.phase(), Phase::Resting);
    assert_eq!(shell.wait_next(), ["look pika-7 or search", "commit requested"]);
    let view = shell.core.view();
    assert_eq!((view.incarnation, view.restarts), (2, 1));
    assert!(view.terminal.is_none() && view.cursor.is_none() && view.verdict.is_none());
    shell.committed();
    shell.start_up("s-2");
    assert_eq!(shell.core.view().start_sent.as_ref().map(|sent| sent.request_id.as_str()), Some("job-7.2"));
    shell.event(1, "ready");
    assert_eq!(shell.committed(), ["send ack 1"], "as of the first, and said again");
    shell.log(0, b"two\n");
    assert_eq!(shell.wait_next(), ["commit logs +4@0"], "a file of its own");
}

/// Words that the disk still has when the next incarnation begins are not heard in it.
#[test]
fn the_last_words_of_an_incarnation_are_its_own() {
    let mut again = spec();
    again.policies.restart_policy = RestartPolicy::Always;
    again.policies.retention_policy = RetentionPolicy::KeepUntilStopped;
    again.watchdogs.ready_secs = Some(1);
    let mut shell = Shell::live(again);
    shell.wait(Duration::from_secs(2));
    shell.settled();
    shell.wait_next();
    while shell.core.phase() == Phase::Terminating {
        shell.wait_next();
        shell.settled();
    }
    shell.collected();
    // The verdict is on its way to the disk.
    shell.event(1, "failed");
    shell.committed();
    assert_eq!(shell.core.phase(), Phase::Resting);
    while shell.core.phase() == Phase::Resting {
        shell.wait_next();
    }
    shell.settled();
    assert_eq!(shell.core.phase(), Phase::Looking);
    assert!(shell.core.view().ended.is_none());
}

/// Invariant 4: absent says nothing while a create is under way, whose answer asks again.
#[test]
fn what_is_being_made_is_not_taken_for_gone() {
    let mut kept = spec();
    kept.policies.retention_policy = RetentionPolicy::KeepUntilStopped;
    let mut shell = Shell::new(kept);
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.looked(None);
    shell.settled();
    assert_eq!(shell.core.phase(), Phase::Kept);
    shell.core.woken(shell.now);
    shell.asked();
    shell.looked(None);
    assert_eq!(shell.core.phase(), Phase::Kept);
    assert_eq!(shell.changed(Answer::Created(Ok(()))), ["look pika-7 or search"]);
    shell.looked(None);
    assert_eq!(shell.core.phase(), Phase::Done);
}

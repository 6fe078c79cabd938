//! What the guest says and is told, and what that waits for.

use pika_cloud_common::State;

use super::*;

/// Invariant 5: what a guest may say for ever costs no memory while the disk is busy.
#[test]
fn words_that_wait_for_the_disk_are_few() {
    let mut shell = Shell::live(spec());
    shell.event(1, "starting");
    assert!(shell.commit.is_some(), "the disk is busy");
    for _ in 0..1000 {
        shell.notice(Notice::Started { request_id: String::new() });
        shell.notice(Notice::Rewound { last_seq: 0 });
    }
    assert!(shell.core.next_commit.words() <= 2, "{}", shell.core.next_commit.words());
}

/// Invariant 1.
#[test]
fn an_acknowledgement_is_of_what_is_durable() {
    let mut shell = Shell::live(spec());
    assert_eq!(shell.event(1, "starting"), ["commit starting"]);
    assert_eq!(shell.event(2, "ready"), [""; 0], "the disk has one commit at a time");
    shell.event(3, "ready");
    assert_eq!(shell.committed(), ["send ack 1", "commit ready ready"]);
    assert_eq!(shell.committed(), [""; 0], "what comes close behind is summed up");
    assert_eq!(shell.core.view().state, Some(State::Ready));
    assert_eq!(shell.wait_next(), ["send ack 3"]);
    shell.event(4, "completed");
    assert_eq!(shell.committed()[0], "send ack 4", "for the last word its verb waits");
}

/// Invariant 1: the cursor of a hello is an acknowledgement too.
#[test]
fn a_hello_waits_for_what_it_acknowledges() {
    let mut shell = Shell::live(spec());
    shell.event(1, "starting");
    shell.event(2, "ready");
    shell.log(0, b"one\n");
    shell.lose();
    shell.wait_next();
    shell.looked(Some(running()));
    assert_eq!(shell.dialled(), [""; 0]);
    assert!(!shell.core.wants_read(), "there is no session yet");
    assert_eq!(shell.committed(), ["commit ready logs +4@0"]);
    assert_eq!(shell.committed(), ["send hello after s-1 2"]);
    // A stream that breaks before is lost like any other.
    shell.hello("s-1");
    shell.event(3, "ready");
    shell.lose();
    while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
    shell.looked(Some(running()));
    assert_eq!(shell.dialled(), [""; 0]);
    assert_eq!(shell.lose(), ["hang up"]);
    assert!(!shell.settled().iter().any(|asked| asked.starts_with("send")));
    assert_eq!(shell.core.phase(), Phase::Looking);
}

/// The machine hears of it at that time as well.
#[test]
fn an_end_rests_on_what_is_durable() {
    let mut shell = Shell::live(spec());
    shell.event(1, "failed");
    assert_eq!(shell.core.phase(), Phase::Live);
    shell.committed();
    assert_eq!(shell.core.phase(), Phase::Collecting);
}

/// Invariant 9.
#[test]
fn a_start_is_recorded_once_and_sent_once_a_session() {
    let mut shell = Shell::live(spec());
    shell.notice(Notice::Started { request_id: "job-7.1".to_owned() });
    assert_eq!(shell.settled(), [""; 0], "said before");
    assert_eq!(shell.lose(), ["hang up"]);
    shell.redial();
    assert_eq!(shell.hello("s-1"), ["send start job-7.1"], "it stands in the journal");
    assert_eq!(shell.notice(Notice::AlreadyStarted { request_id: "job-7.1".to_owned() }), [""; 0]);
    assert_eq!(shell.event(1, "ready"), ["commit ready"]);
    assert_eq!(shell.committed(), ["send ack 1"]);
}

/// The disk is slow, and the session is lost meanwhile.
#[test]
fn a_start_of_a_lost_session_is_not_sent_in_the_next() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.dialled();
    shell.hello("s-1");
    assert_eq!(shell.committed(), ["commit state start_sent"]);
    assert_eq!(shell.lose(), ["hang up"]);
    shell.wait_next();
    shell.looked(Some(running()));
    assert_eq!(shell.dialled(), [""; 0], "the disk is busy");
    assert_eq!(shell.committed(), ["send hello after s-1 0"]);
    assert_eq!(shell.hello("s-1"), ["send start job-7.1"]);
}

#[test]
fn a_workload_that_is_to_end_is_not_started() {
    let mut shell = Shell::new(spec());
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.dialled();
    shell.hello("s-1");
    assert_eq!(shell.committed(), ["commit state start_sent"]);
    shell.core.command(Command::Cancel, shell.now);
    assert_eq!(shell.settled(), ["send TERM", "commit command ended !"]);
}

/// A commit of one stream becomes durable in a session of the next.
#[test]
fn an_acknowledgement_is_of_the_stream_that_it_is_sent_to() {
    let mut shell = Shell::live(spec());
    for seq in 1..=5 {
        shell.event(seq, "starting");
    }
    assert!(shell.commit.is_some());
    shell.lose();
    shell.wait_next();
    shell.looked(Some(running()));
    assert_eq!(shell.dialled(), [""; 0]);
    assert_eq!(shell.settled().last().map(String::as_str), Some("send hello after s-1 5"));
    assert_eq!(shell.hello("s-2"), ["commit stream"]);
    let asked = shell.settled();
    assert!(!asked.iter().any(|asked| asked.starts_with("send ack")), "{asked:?}");
    // And one that has the same numbers is told as well.
    let mut same = Shell::new(spec());
    same.settled();
    same.start_up("s-1");
    same.core.link_lost(SessionLoss::NewStream, same.now);
    same.redial();
    same.hello("s-1");
    same.event(1, "starting");
    assert!(same.settled().contains(&"send ack 1".to_owned()));
}

/// What was acknowledged may be lost with the session.
#[test]
fn a_new_session_is_told_again_what_is_durable() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    assert_eq!(shell.committed(), ["send ack 1"]);
    shell.lose();
    shell.redial();
    assert_eq!(shell.hello("s-1"), ["send ack 1", "send start job-7.1"]);
}

#[test]
fn log_bytes_are_gathered_for_a_moment() {
    let mut shell = Shell::live(spec());
    let begin = shell.now.mono;
    for count in 0..10 {
        assert_eq!(shell.log(4 * count, b"line"), [""; 0]);
        assert_eq!(shell.wait(Duration::from_millis(4)), [""; 0]);
    }
    assert_eq!(shell.core.next_tick(), Some(begin + Duration::from_millis(50)));
    assert_eq!(shell.wait_next(), ["commit logs +40@0"], "the mark goes with the bytes");
    assert_eq!(shell.log(40, b"more"), [""; 0]);
    assert_eq!(shell.committed(), ["send ack 0 guest.log 40"]);
    assert_eq!(shell.wait_next(), ["commit logs +4@40"]);
    assert_eq!(shell.committed(), [""; 0]);
    assert_eq!(shell.wait_next(), ["send ack 0 guest.log 44"]);
    assert!(shell.core.is_settled());
}

/// Bytes that go along with an event count only once a mark says so.
#[test]
fn an_event_waits_for_no_log_bytes() {
    let mut shell = Shell::live(spec());
    shell.log(0, b"line");
    assert_eq!(shell.event(1, "ready"), ["commit ready +4@0"]);
    assert_eq!(shell.committed(), ["send ack 1"], "and not of the log");
    assert_eq!(shell.wait_next(), ["commit logs"]);
    shell.committed();
    assert_eq!(shell.wait_next(), ["send ack 1 guest.log 4"]);
}

#[test]
fn what_was_printed_last_goes_with_the_verdict() {
    let mut shell = Shell::live(spec());
    shell.event(1, "failed");
    shell.settled();
    shell.log(0, b"last words");
    let asked = shell.collected();
    assert_eq!(asked.last().map(String::as_str), Some("commit collected logs verdict +10@0 !"));
    let collection = shell.core.view().collection.clone().unwrap();
    assert_eq!((collection.log_bytes, shell.core.view().log_lengths["guest.log"]), (10, 10));
}

/// It came while the verdict went to the disk, and there is no later commit that it could wait for.
#[test]
fn what_is_printed_behind_the_verdict_goes_with_the_end() {
    let mut kept = spec();
    kept.policies.retention_policy = pika_cloud_common::spec::RetentionPolicy::KeepUntilStopped;
    let mut shell = Shell::live(kept);
    shell.event(1, "failed");
    shell.settled();
    shell.collected();
    shell.log(0, b"late");
    assert_eq!(shell.committed(), ["derive 1", "send release", "farewell", "commit kept logs +4@0 !"]);
}

/// Invariant 5: a guest that goes on beginning anew has lost its run, whatever it says of that.
#[test]
fn a_guest_has_so_many_streams_and_no_more() {
    let mut shell = Shell::live(spec());
    let ours = |stream: &str| {
        let text = String::from_utf8(hello(stream)).unwrap();
        text.replace(r#","boot_id""#, r#","request_id":"job-7.1","boot_id""#).into_bytes()
    };
    let mut streams = 1;
    while shell.core.view().ended.is_none() {
        streams += 1;
        assert!(streams < 100, "it may begin anew for ever");
        // One that is followed already is no further one.
        for _ in 0..3 {
            shell.lose();
            shell.redial();
            shell.read(&ours(&format!("s-{streams}")));
            shell.settled();
        }
    }
    assert_eq!(streams, 17);
    let mut anew = Shell::live(spec());
    anew.lose();
    anew.redial();
    anew.hello("s-2");
    anew.settled();
    assert!(anew.core.view().ended.is_some(), "the run was in the stream before");
}

/// Invariant 5: what waits for the disk is bounded, and no log is lost for that.
#[test]
fn a_guest_waits_for_the_disk() {
    let mut shell = Shell::live(spec());
    shell.event(1, "ready");
    let (mut offset, chunk) = (0, vec![b'x'; 64 * 1024]);
    while shell.core.wants_read() {
        shell.log(offset, &chunk);
        offset += chunk.len() as u64;
        assert!(shell.core.pending() <= 9 * 1024 * 1024);
    }
    assert!(shell.core.pending() >= 8 * 1024 * 1024);
    // Nothing is read, so that nobody is silent.
    for _ in 0..40 {
        shell.wait(Duration::from_secs(5));
    }
    assert_eq!(shell.core.phase(), Phase::Live);
    shell.wait(Duration::from_secs(1));
    shell.committed();
    assert!(shell.core.wants_read(), "what the disk has is not waited for");
}

//! From nothing to a session, and what Incus makes of it.

use std::collections::BTreeSet;

use pika_cloud_common::verdict::Watchdog;

use super::*;

/// Incus was asked to start the instance, and nothing was heard of it yet.
fn asked_to_start() -> Bench {
    Bench::from(plan(), &Start { start_asked: Some(Duration::ZERO), ..Start::default() })
}

// What there is already.

#[test]
fn what_exists_is_taken_over() {
    assert_eq!(asked_to_start().found(Found::Running), [Action::Dial]);
    let mut stopped = Bench::new(plan());
    assert_eq!(stopped.found(Found::Stopped), [record(State::Provisioning, "starting the instance"), Action::Start]);
    let mut changing = Bench::new(plan());
    assert_eq!(changing.found(Found::Changing("Starting".into())), []);
    assert!(is_about(changing.wait_next(), FIRST_RETRY));
    assert_eq!(changing.last, [Action::Look]);
}

#[test]
fn an_instance_that_never_settles_is_given_up() {
    let mut bench = Bench::new(plan());
    while bench.phase() == Phase::Looking {
        bench.found(Found::Changing("Freezing".into()));
        bench.wait_next();
        assert!(bench.now <= Duration::from_secs(1000) + BOOT);
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
}

/// Once the workload was asked for, an instance is never made or started again (Invariant 9).
#[test]
fn a_dead_instance_is_the_end() {
    let started = Start { booted: Some(Duration::ZERO), start_sent: Some(SECOND), ..Start::default() };
    for (found, cause) in [(Found::Absent, DeathCause::InstanceGone), (Found::Stopped, DeathCause::InstanceStopped)] {
        let mut bench = Bench::from(plan(), &started);
        bench.found(found.clone());
        bench.has_ended(&died(cause));
        let mut live = Bench::live(plan());
        live.lose(lost());
        live.wait_next();
        live.found(found);
        live.has_ended(&died(cause));
    }
}

/// What Incus cannot tell for a moment ends nothing; the guest, or a deadline, tells what became of it.
#[test]
fn an_error_of_the_instance_is_one_only_where_it_stays() {
    let mut live = Bench::live(plan());
    assert_eq!(live.found(Found::Error), [], "the guest is heard");
    assert_eq!(live.phase(), Phase::Live);
    live.lose(lost());
    live.wait_next();
    assert_eq!(live.found(Found::Error), []);
    live.wait_next();
    assert_eq!(live.found(Found::Running), [Action::Dial], "it was passing");
    live.lose(lost());
    let waited = wait_in_error(&mut live);
    live.has_ended(&died(DeathCause::InstanceError));
    assert!(waited <= SILENCE, "{waited:?}");
    assert_eq!(live.end().error.as_deref(), Some("reset"));
    let mut fresh = Bench::new(plan());
    assert_eq!(fresh.found(Found::Error), []);
    assert_eq!(wait_in_error(&mut fresh), BOOT);
    fresh.has_ended(&died(DeathCause::InstanceError));
}

/// Until it ends, with an instance of which Incus cannot tell.
fn wait_in_error(bench: &mut Bench) -> Duration {
    let begin = bench.now;
    while bench.phase() == Phase::Looking {
        bench.wait_next();
        if bench.last.contains(&Action::Look) {
            bench.found(Found::Error);
        }
    }
    bench.now - begin
}

#[test]
fn a_silence_says_what_was_tried() {
    let mut bench = Bench::live(plan());
    bench.lose(lost());
    while bench.phase() == Phase::Looking {
        bench.wait_next();
    }
    bench.has_ended(&Outcome::Unreachable);
    assert_eq!(bench.end().error.as_deref(), Some("reset"));
}

/// The host reads nothing while its disk has enough to do.
#[test]
fn a_guest_that_is_not_read_is_not_silent() {
    let mut bench = Bench::live(plan());
    bench.guest(Guest::Accepted);
    for _ in 0..20 {
        bench.now += 10 * SECOND;
        bench.machine.excuse_silence(bench.now);
        assert_eq!(bench.feed(Input::Tick), []);
    }
    bench.wait_while(Phase::Live);
    bench.has_ended(&Outcome::Unreachable);
}

/// The agent had answered, and then somebody deleted the instance before the workload was asked for: it is made again,
/// and has all of its time to boot.
#[test]
fn an_instance_that_is_made_again_boots_again() {
    let start = Start { booted: Some(Duration::ZERO), ..Start::default() };
    let mut bench = Bench::from(plan(), &start);
    bench.found(Found::Absent);
    bench.now += 5 * SILENCE;
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    assert_eq!(bench.wait(SECOND), []);
    assert_eq!(bench.phase(), Phase::Dialing);
    bench.guest(Guest::Opened { run_lost: false });
    assert!(bench.last.contains(&record(State::Booted, "the agent answered")));
}

#[test]
fn an_instance_that_stops_at_once_is_started_a_few_times_only() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    let mut starts = 0;
    while bench.phase() == Phase::Starting {
        starts += 1;
        bench.feed(Input::Started(Ok(())));
        bench.lose(lost());
        bench.wait_next();
        bench.found(Found::Stopped);
    }
    assert_eq!(starts, 3);
    bench.has_ended(&died(DeathCause::InstanceStopped));
}

/// An ephemeral instance deletes itself when it stops.
#[test]
fn an_instance_that_vanishes_at_once_is_made_a_few_times_only() {
    let mut bench = Bench::new(plan());
    let mut created = 0;
    bench.found(Found::Absent);
    while bench.phase() == Phase::Creating {
        created += 1;
        bench.feed(Input::Created(Ok(())));
        bench.feed(Input::Started(Ok(())));
        bench.lose(lost());
        bench.wait_next();
        bench.found(Found::Absent);
    }
    assert_eq!(created, 3);
    bench.has_ended(&died(DeathCause::InstanceGone));
}

// Incus fails.

#[test]
fn a_refusal_of_incus_is_the_end() {
    let mut looked = Bench::new(plan());
    looked.feed(Input::Looked(Err(refusal())));
    looked.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(looked.end().error.as_deref(), Some("not allowed"));
    let mut created = Bench::new(plan());
    created.found(Found::Absent);
    assert_eq!(created.feed(Input::Created(Err(refusal()))), [Action::Look], "what it made all the same is looked at");
    created.found(Found::Absent);
    created.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(created.end().error.as_deref(), Some("not allowed"));
    let mut started = Bench::new(plan());
    started.found(Found::Stopped);
    assert_eq!(started.feed(Input::Started(Err(refusal()))), [Action::Look], "what it made all the same is looked at");
    started.found(Found::Stopped);
    started.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(started.end().error.as_deref(), Some("not allowed"));
}

/// A workload that runs may be well, whatever Incus answers while it comes up again.
#[test]
fn a_question_that_is_refused_ends_no_workload() {
    let mut running = Bench::live(plan());
    running.lose(lost());
    for _ in 0..5 {
        running.wait_next();
        assert_eq!(running.last, [Action::Look]);
        assert_eq!(running.feed(Input::Looked(Err(refusal()))), []);
    }
    running.wait_next();
    assert_eq!(running.found(Found::Running), [Action::Dial]);
}

#[test]
fn a_create_that_another_collector_began_is_taken_over() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Absent);
    bench.feed(Input::Created(Err(CallFailure { transient: false, message: "already exists".into() })));
    bench.found(Found::Stopped);
    assert_eq!(bench.phase(), Phase::Starting);
}

/// What went well begins the patience with the next call anew.
#[test]
fn patience_is_for_what_fails_now() {
    let mut bench = Bench::new(plan());
    bench.feed(Input::Looked(Err(transient())));
    bench.wait(SILENCE - SECOND);
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.now += 2 * SECOND;
    assert_eq!(bench.feed(Input::Started(Err(transient()))), []);
    assert_eq!(bench.phase(), Phase::Looking);
    // The boot has all of its time as well, though another instance took of it before.
    let mut again = asked_to_start();
    again.found(Found::Running);
    again.lose(lost());
    again.wait(BOOT - SECOND);
    again.found(Found::Absent);
    again.feed(Input::Created(Ok(())));
    again.feed(Input::Started(Ok(())));
    assert_eq!(again.wait(2 * SECOND), []);
    assert_eq!(again.phase(), Phase::Dialing);
    // And a refusal that came to nothing is forgotten.
    let mut refused = Bench::new(plan());
    refused.found(Found::Absent);
    refused.feed(Input::Created(Err(refusal())));
    refused.found(Found::Stopped);
    refused.feed(Input::Started(Ok(())));
    refused.lose(lost());
    refused.wait_next();
    assert!(refused.found(Found::Absent).contains(&Action::Create));
}

/// Each by itself: looking goes well in between, and that must not begin the patience anew.
#[test]
fn what_fails_in_passing_is_tried_again_for_a_while() {
    let begin = Duration::from_secs(1000);
    let cases = [
        ("looking", vec![Input::Looked(Err(transient()))]),
        ("creating", vec![Input::Looked(Ok(Found::Absent)), Input::Created(Err(transient()))]),
        ("starting", vec![Input::Looked(Ok(Found::Stopped)), Input::Started(Err(transient()))]),
    ];
    for (what, answers) in cases {
        let mut bench = Bench::new(plan());
        let mut tries = 0;
        loop {
            for answer in &answers {
                bench.feed(answer.clone());
            }
            tries += 1;
            if bench.phase() != Phase::Looking {
                break;
            }
            let waited = bench.wait_next();
            assert!(waited >= FIRST_RETRY && waited <= LAST_RETRY + LAST_RETRY / 4, "{what}: {waited:?}");
            assert_eq!(bench.last, [Action::Look], "{what}");
            assert!(bench.now < begin + 2 * SILENCE, "{what} is tried for ever");
        }
        bench.has_ended(&Outcome::ProvisionFailed);
        assert!(bench.now >= begin + SILENCE, "{what} was given up after {:?}", bench.now - begin);
        assert!(tries < 50, "{what} was tried {tries} times");
    }
}

#[test]
fn destroying_is_tried_again_for_a_while() {
    let mut bench = Bench::live(plan());
    bench.guest(terminal(0));
    bench.feed(Input::Collected);
    bench.feed(Input::Concluded);
    let begin = bench.now;
    while bench.phase() == Phase::Destroying {
        bench.feed(Input::Destroyed(Err(transient())));
        if bench.phase() == Phase::Destroying {
            bench.wait_next();
            assert_eq!(bench.last, [Action::Destroy]);
        }
    }
    let waited = bench.now - begin;
    assert!((119..=123).contains(&waited.as_secs()), "{waited:?}");
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
    let mut refused = Bench::from(plan(), &Start { is_concluded: true, ..Start::default() });
    assert_eq!(refused.feed(Input::Destroyed(Err(refusal()))), []);
    assert_eq!(refused.phase(), Phase::Done);
}

/// To the moment.
#[test]
fn patience_lasts_for_its_time_and_no_longer() {
    for (waited, phase) in [(SILENCE - Duration::from_millis(1), Phase::Looking), (SILENCE, Phase::Collecting)] {
        let mut bench = Bench::new(plan());
        bench.feed(Input::Looked(Err(transient())));
        bench.now += waited;
        bench.feed(Input::Looked(Err(transient())));
        assert_eq!(bench.phase(), phase, "after {waited:?}");
    }
}

/// A thousand runtimes do not ask at once, and none of them keeps its place among them.
#[test]
fn tries_are_spread() {
    let waits = |random: u64| {
        let mut retry = Retry::new(random);
        // The longest delay stays what it is, so that only the random part differs.
        retry.delay = LAST_RETRY;
        std::array::from_fn::<Duration, 32, _>(|_| {
            retry.later(Duration::ZERO);
            retry.at.unwrap()
        })
    };
    let many: Vec<_> = (1..1000_u64).map(|runtime| waits(runtime.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    let distinct = |waits: &mut dyn Iterator<Item = Duration>| waits.collect::<BTreeSet<_>>().len();
    for nth in 0..32 {
        let differ = distinct(&mut many.iter().map(|waits| waits[nth]));
        assert!(differ > 200, "{differ} of 256 in the try {nth}");
    }
    for waits in many {
        let differ = distinct(&mut waits.into_iter());
        assert!(differ > 20, "{differ} of 32 in {waits:?}");
    }
}

/// The start of a collector that died may come to its end behind the back of the next one.
#[test]
fn a_start_that_is_refused_is_looked_at_before_it_is_believed() {
    for (found, expected) in [(Found::Running, Phase::Dialing), (Found::Stopped, Phase::Collecting)] {
        let mut bench = Bench::new(plan());
        bench.found(Found::Stopped);
        assert_eq!(bench.feed(Input::Started(Err(refusal()))), [Action::Look]);
        bench.found(found);
        assert_eq!(bench.phase(), expected);
    }
}

// What an earlier incarnation left.

#[test]
fn what_an_earlier_run_left_running_is_stopped_first() {
    let mut bench = Bench::new(plan());
    assert_eq!(bench.found(Found::Running), [Action::Halt]);
    assert_eq!(bench.phase(), Phase::Halting);
    assert_eq!(bench.feed(Input::Halted(Ok(()))), [Action::Look]);
    bench.found(Found::Stopped);
    assert_eq!(bench.phase(), Phase::Starting);
    bench.feed(Input::Started(Ok(())));
    assert_eq!(bench.found(Found::Running), [], "it is being dialled");
}

#[test]
fn stopping_what_was_left_is_tried_again_for_a_while() {
    let mut bench = Bench::new(plan());
    let begin = bench.now;
    while bench.phase() == Phase::Looking {
        bench.found(Found::Running);
        // Also where Incus refuses: it may be stopping by itself.
        bench.feed(Input::Halted(Err(refusal())));
        if bench.phase() == Phase::Looking {
            bench.wait_next();
            assert_eq!(bench.last, [Action::Look]);
        }
    }
    bench.has_ended(&Outcome::ProvisionFailed);
    assert!((60..=63).contains(&(bench.now - begin).as_secs()), "{:?}", bench.now - begin);
    assert_eq!(bench.feed(Input::Halted(Ok(()))), [], "nothing is begun behind an end");
}

#[test]
fn a_name_that_is_anothers_is_left_alone() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Foreign);
    bench.has_ended(&Outcome::ProvisionFailed);
    let mut refused = Bench::new(plan());
    refused.found(Found::Absent);
    refused.feed(Input::Created(Err(refusal())));
    refused.found(Found::Foreign);
    refused.has_ended(&Outcome::ProvisionFailed);
    assert_eq!(refused.end().error.as_deref(), Some("not allowed"));
    let mut replaced = asked_to_start();
    replaced.found(Found::Foreign);
    replaced.has_ended(&died(DeathCause::InstanceGone));
}

/// An old refusal is no evidence for what failed since.
#[test]
fn a_refusal_is_told_of_the_call_that_it_answered() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Stopped);
    bench.feed(Input::Started(Err(refusal())));
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Err(transient())));
    bench.wait_next();
    bench.found(Found::Stopped);
    assert_eq!(bench.phase(), Phase::Starting);
}

/// Somebody started it before we could.
#[test]
fn what_runs_without_our_doing_has_its_time_to_boot() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    bench.lose(lost());
    bench.wait_next();
    bench.found(Found::Absent);
    bench.feed(Input::Created(Err(transient())));
    bench.wait_next();
    assert_eq!(bench.found(Found::Running), [Action::Dial]);
    assert_eq!(bench.wait_while(Phase::Dialing), BOOT);
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
}

// Invariant 6.

#[test]
fn a_take_over_stops_everything_without_a_verdict() {
    use Phase::{Collecting, Dialing, Kept, Live, Looking, TakenOver, Terminating};

    let taken = || Found::TakenOver { owner: "other".into(), term: 7 };
    let benches = || {
        let mut dialing = asked_to_start();
        dialing.found(Found::Running);
        let mut terminating = Bench::live(plan());
        terminating.feed(Input::Command(Command::Cancel));
        let mut collecting = Bench::live(plan());
        collecting.guest(terminal(0));
        let keep = Plan { retention: RetentionPolicy::KeepUntilStopped, ..plan() };
        [Bench::new(plan()), dialing, Bench::live(plan()), terminating, collecting, Bench::concluded(keep, 0)]
    };
    let phases: Vec<_> = benches().iter().map(Bench::phase).collect();
    assert_eq!(phases, [Looking, Dialing, Live, Terminating, Collecting, Kept]);
    for mut bench in benches() {
        let from = bench.phase();
        bench.found(taken());
        assert_eq!(bench.last, [Action::HangUp, Action::Yield { owner: "other".into(), term: 7 }], "{from:?}");
        assert_eq!((bench.phase(), bench.machine.next_tick()), (TakenOver, None), "{from:?}");
        for input in [
            Input::Looked(Ok(Found::Running)),
            Input::Guest(terminal(0)),
            Input::Command(Command::Destroy),
            Input::Collected,
            Input::Concluded,
            Input::Destroyed(Ok(Destroyed::Gone)),
            Input::Woken,
        ] {
            assert_eq!(bench.feed(input), [], "{from:?}");
        }
        assert_eq!(bench.wait(10 * RUN), []);
    }
    let mut destroying = Bench::concluded(plan(), 0);
    let answer = Destroyed::TakenOver { owner: "other".into(), term: 7 };
    assert_eq!(
        destroying.feed(Input::Destroyed(Ok(answer))).last(),
        Some(&Action::Yield { owner: "other".into(), term: 7 })
    );
    assert_eq!(destroying.phase(), TakenOver);
}

// What Incus says by itself.

#[test]
fn a_wake_up_is_a_reason_to_look_and_no_more() {
    let mut waiting = Bench::new(plan());
    assert_eq!(waiting.feed(Input::Woken), [], "the answer is on its way");
    waiting.found(Found::Changing("Stopping".into()));
    assert_eq!(waiting.feed(Input::Woken), [Action::Look]);
    assert_eq!(waiting.feed(Input::Woken), [], "once");
    let mut live = Bench::live(plan());
    assert_eq!(live.feed(Input::Woken), [Action::Look]);
    for found in [Found::Running, Found::Changing("Frozen".into()), Found::Foreign] {
        assert_eq!(live.found(found), []);
    }
    assert_eq!(live.feed(Input::Looked(Err(refusal()))), [], "the session says that it lives");
    assert_eq!(live.found(Found::Stopped)[0], Action::HangUp);
    live.has_ended(&died(DeathCause::InstanceStopped));
    let mut dialing = asked_to_start();
    dialing.found(Found::Running);
    assert_eq!(dialing.feed(Input::Woken), [Action::Look]);
    dialing.found(Found::Absent);
    assert_eq!(dialing.phase(), Phase::Creating);
    for (from, mut bench) in [
        (Phase::Creating, dialing),
        (Phase::Terminating, {
            let mut bench = Bench::live(plan());
            bench.feed(Input::Command(Command::Cancel));
            bench
        }),
        (Phase::Collecting, live),
        (Phase::Destroying, Bench::concluded(plan(), 0)),
    ] {
        assert_eq!(bench.phase(), from);
        assert_eq!(bench.feed(Input::Woken), [], "{from:?}");
    }
}

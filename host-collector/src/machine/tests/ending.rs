//! After the verdict: keeping, destroying and beginning anew.

use super::*;

fn keeping(retention: RetentionPolicy) -> Plan {
    Plan { retention, ..plan() }
}

/// Where nothing is wanted of it, only a workload that would run on in what is kept is ended first.
#[test]
fn what_leaves_nothing_behind_is_concluded_at_once() {
    let nothing = |retention| Plan { collect: OutputCollectionMode::None, ..keeping(retention) };
    let cancelled = |retention, has_workload| {
        let plan = nothing(retention);
        let mut bench = if has_workload { Bench::live(plan) } else { Bench::new(plan) };
        bench.feed(Input::Command(Command::Cancel));
        if bench.phase() == Phase::Terminating {
            bench.wait_next();
        }
        bench.phase()
    };
    let (keep, destroy) = (RetentionPolicy::KeepUntilStopped, RetentionPolicy::DestroyOnCompletion);
    assert_eq!(cancelled(keep, true), Phase::Collecting);
    for (retention, has_workload) in [(keep, false), (destroy, true), (destroy, false)] {
        assert_eq!(cancelled(retention, has_workload), Phase::Concluding, "{retention:?} {has_workload}");
    }
    let mut by_itself = Bench::live(nothing(keep));
    by_itself.guest(terminal(0));
    assert_eq!(by_itself.phase(), Phase::Concluding);
}

#[test]
fn what_is_kept_until_stopped_is_kept_for_ever() {
    let mut bench = Bench::concluded(keeping(RetentionPolicy::KeepUntilStopped), 3);
    assert_eq!(bench.last, [Action::Keep(None)]);
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Kept, None));
    assert_eq!(bench.wait(1000 * RUN), []);
    assert_eq!(bench.feed(Input::Command(Command::Stop)), [Action::Command(Command::Stop), Action::Destroy]);
}

#[test]
fn what_is_kept_to_be_looked_at_is_kept_for_its_time() {
    let hour = Duration::from_secs(3600);
    let mut bench = Bench::concluded(keeping(RetentionPolicy::DebugKeep), 3);
    assert_eq!(bench.last, [Action::Keep(Some(hour))]);
    assert_eq!(bench.wait(hour - SECOND), []);
    assert_eq!(bench.wait_next(), SECOND);
    assert_eq!(bench.last, [Action::Destroy]);
    bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
}

#[test]
fn what_is_kept_may_be_gone_by_itself() {
    let mut bench = Bench::concluded(keeping(RetentionPolicy::KeepUntilStopped), 3);
    assert_eq!(bench.feed(Input::Woken), [Action::Look]);
    for found in [Found::Running, Found::Stopped, Found::Changing("Stopping".into()), Found::Foreign, Found::Error] {
        assert_eq!(bench.found(found), []);
    }
    assert_eq!(bench.feed(Input::Looked(Err(refusal()))), []);
    assert_eq!(bench.found(Found::Absent), [Action::Finish { destroyed: true, restart_in: None }]);
    assert_eq!(bench.phase(), Phase::Done);
}

/// Invariant 4: one that is made behind our back is kept as well, or is nobody's.
#[test]
fn what_is_kept_may_still_be_made() {
    let unheard = Start { create_unanswered: true, settled: Some(Settled::Kept(None)), ..Start::default() };
    let mut bench = Bench::from(keeping(RetentionPolicy::KeepUntilStopped), &unheard);
    assert_eq!(bench.last, [Action::Look], "the collector that asked for it died");
    let begin = bench.now;
    while bench.found(Found::Absent).is_empty() {
        bench.wait_next();
        assert_eq!(bench.last, [Action::Look]);
    }
    assert_eq!(bench.last, [Action::Finish { destroyed: true, restart_in: None }]);
    assert!(bench.now - begin >= 5 * SECOND && bench.now - begin <= 8 * SECOND);
    // The answer comes while it is kept.
    let mut bench = Bench::new(keeping(RetentionPolicy::KeepUntilStopped));
    bench.found(Found::Absent);
    bench.feed(Input::Command(Command::Cancel));
    bench.feed(Input::Collected);
    bench.feed(Input::Concluded);
    assert_eq!(bench.phase(), Phase::Kept);
    assert_eq!(bench.feed(Input::Created(Ok(()))), [Action::Look]);
    assert_eq!(bench.found(Found::Stopped), []);
    assert_eq!(bench.phase(), Phase::Kept);
}

#[test]
fn destroying_is_tried_again_for_a_while() {
    let mut bench = Bench::concluded(plan(), 0);
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
    assert_eq!(bench.last, [], "the journal says that it is not finished");
    assert_eq!((bench.phase(), bench.machine.next_tick()), (Phase::Done, None));
    let mut refused = Bench::concluded(plan(), 0);
    assert_eq!(refused.feed(Input::Destroyed(Err(refusal()))), []);
    assert_eq!(refused.phase(), Phase::Done);
}

/// Incus may still be creating what is not there yet.
#[test]
fn a_create_that_was_not_heard_of_is_waited_for() {
    let unheard = |after: fn(&mut Bench)| {
        let mut bench = Bench::new(plan());
        bench.found(Found::Absent);
        after(&mut bench);
        bench.feed(Input::Collected);
        bench.feed(Input::Concluded);
        let begin = bench.now;
        let mut tries = 1;
        while bench.phase() == Phase::Destroying {
            bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
            if bench.phase() == Phase::Destroying {
                bench.wait_next();
                assert_eq!(bench.last, [Action::Destroy]);
                tries += 1;
            }
        }
        assert_eq!(bench.last, [Action::Finish { destroyed: true, restart_in: None }]);
        (bench.now - begin, tries)
    };
    // It was given up while its end was still open, or cancelled before its answer came.
    let before: fn(&mut Bench) = |bench| {
        bench.feed(Input::Created(Err(transient())));
        bench.feed(Input::Command(Command::Cancel));
    };
    let behind: fn(&mut Bench) = |bench| {
        bench.feed(Input::Command(Command::Cancel));
        assert_eq!(bench.feed(Input::Created(Err(transient()))), []);
    };
    for after in [before, behind] {
        let (waited, tries) = unheard(after);
        assert!(waited >= 5 * SECOND && waited <= 8 * SECOND, "{waited:?}");
        assert!(tries > 3, "{tries}");
    }
    let heard: fn(&mut Bench) = |bench| {
        bench.feed(Input::Command(Command::Cancel));
        bench.feed(Input::Created(Err(refusal())));
    };
    assert_eq!(unheard(heard), (Duration::ZERO, 1));
    // The collector that asked for it died.
    let mut bench = Bench::from(plan(), &Start { create_unanswered: true, is_concluded: true, ..Start::default() });
    assert_eq!(bench.last, [Action::Destroy]);
    assert_eq!(bench.feed(Input::Destroyed(Ok(Destroyed::Gone))), []);
    bench.wait(5 * SECOND);
    bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    assert_eq!(bench.phase(), Phase::Done);
}

// Restarts.

fn restarting(restart: RestartPolicy) -> Plan {
    Plan { restart, ..plan() }
}

/// From a live workload over its end to what follows; gives the rest before the next incarnation.
fn end_with(bench: &mut Bench, exit_code: i32) -> Option<Duration> {
    bench.guest(terminal(exit_code));
    bench.feed(Input::Collected);
    bench.feed(Input::Concluded);
    if bench.phase() == Phase::Destroying {
        bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    }
    bench.last.iter().find_map(|action| if let Action::Finish { restart_in, .. } = action { *restart_in } else { None })
}

/// Out of a rest, to a live workload again.
fn go_on(bench: &mut Bench, restarts: u32) {
    assert_eq!(bench.last, [Action::Begin { restarts }, Action::Look]);
    assert_eq!((bench.phase(), bench.machine.restarts()), (Phase::Looking, restarts));
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    assert_eq!(bench.guest(Guest::Opened { run_lost: false }).last(), Some(&Action::StartWorkload), "a run of its own");
    bench.guest(Guest::Accepted);
}

#[test]
fn a_restart_comes_as_the_policy_says() {
    use RestartPolicy::{Always, Never, OnFailure};
    for (policy, exit_code, wanted) in [
        (Never, 0, false),
        (Never, 3, false),
        (OnFailure, 0, false),
        (OnFailure, 3, true),
        (Always, 0, true),
        (Always, 3, true),
    ] {
        let mut bench = Bench::live(restarting(policy));
        assert_eq!(end_with(&mut bench, exit_code).is_some(), wanted, "{policy:?} after {exit_code}");
        assert_eq!(bench.phase(), if wanted { Phase::Resting } else { Phase::Done });
    }
    // Any other end is a failure too.
    let mut refused = Bench::new(restarting(OnFailure));
    refused.feed(Input::Looked(Err(refusal())));
    refused.feed(Input::Collected);
    refused.feed(Input::Concluded);
    refused.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    assert_eq!(refused.phase(), Phase::Resting);
}

#[test]
fn rests_are_doubled_up_to_their_cap_and_counted() {
    let plan = Plan {
        max_restarts: 6,
        restart_backoff: SECOND,
        restart_backoff_cap: 10 * SECOND,
        ..restarting(RestartPolicy::Always)
    };
    let mut bench = Bench::live(plan);
    for (count, secs) in [1, 2, 4, 8, 10, 10].into_iter().enumerate() {
        assert_eq!(end_with(&mut bench, 0), Some(secs * SECOND));
        assert_eq!(bench.wait(secs * SECOND - Duration::from_millis(1)), []);
        assert_eq!(bench.wait_next(), Duration::from_millis(1));
        go_on(&mut bench, u32::try_from(count).unwrap() + 1);
    }
    assert_eq!(end_with(&mut bench, 0), None);
    assert_eq!((bench.phase(), bench.last.len()), (Phase::Done, 1));
}

/// One that lived for as long as the cap was a good one.
#[test]
fn the_count_begins_anew_behind_a_long_life() {
    let plan =
        Plan { max_restarts: 2, restart_backoff_cap: 30 * SECOND, run: None, ..restarting(RestartPolicy::Always) };
    let mut bench = Bench::live(plan);
    for lived in [29, 29, 30, 29, 29] {
        bench.guest(Guest::Accepted);
        bench.wait(lived * SECOND);
        let restarts = if lived == 30 { 0 } else { bench.machine.restarts() };
        let Some(rest) = end_with(&mut bench, 1) else {
            assert_eq!((lived, restarts), (29, 2), "the second in a row is the last");
            return;
        };
        assert_eq!(rest, (1 << restarts) * SECOND);
        bench.wait_next();
        go_on(&mut bench, restarts + 1);
    }
    panic!("it is begun anew for ever");
}

/// The time of the outputs and of the destruction is no life.
#[test]
fn a_life_lasts_to_its_end_and_no_longer() {
    let plan = Plan { restart_backoff_cap: 30 * SECOND, ..restarting(RestartPolicy::Always) };
    let mut bench = Bench::from(plan, &Start { restarts: 1, ..Start::default() });
    bench.found(Found::Stopped);
    bench.feed(Input::Started(Ok(())));
    // Nor is the time that it takes to boot.
    bench.wait(100 * SECOND);
    bench.guest(Guest::Opened { run_lost: false });
    bench.guest(terminal(1));
    bench.wait(100 * SECOND);
    bench.feed(Input::Collected);
    bench.feed(Input::Concluded);
    bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    assert_eq!(bench.last, [Action::Finish { destroyed: true, restart_in: Some(2 * SECOND) }]);
}

#[test]
fn an_instance_that_stays_is_stopped_and_started_again() {
    let plan = Plan { retention: RetentionPolicy::KeepUntilStopped, ..restarting(RestartPolicy::Always) };
    let mut bench = Bench::concluded(plan, 0);
    assert_eq!(bench.last, [Action::Finish { destroyed: false, restart_in: Some(SECOND) }]);
    assert_eq!(bench.wait_next(), SECOND);
    assert_eq!(bench.last, [Action::Begin { restarts: 1 }, Action::Look]);
    assert_eq!(bench.found(Found::Running), [Action::Halt]);
    bench.feed(Input::Halted(Ok(())));
    bench.found(Found::Stopped);
    assert_eq!(bench.phase(), Phase::Starting);
}

/// After the last restart the policy keeps it.
#[test]
fn what_is_restarted_no_more_is_kept() {
    let plan =
        Plan { retention: RetentionPolicy::KeepUntilStopped, max_restarts: 0, ..restarting(RestartPolicy::Always) };
    assert_eq!(Bench::concluded(plan, 0).last, [Action::Keep(None)]);
}

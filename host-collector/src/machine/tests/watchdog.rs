//! Deadlines: when each fires, what moves it, and who judges it while nobody listens.

use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::verdict::Watchdog;

use super::*;

/// What Invariant 3 allows for.
const LATE: Duration = SECOND;

// Watchdogs.

#[test]
fn an_agent_that_does_not_answer_is_given_up_at_its_deadline() {
    let mut bench = Bench::new(plan());
    bench.found(Found::Stopped);
    bench.feed(Input::Started(Ok(())));
    let begin = bench.now;
    while bench.phase() != Phase::Collecting {
        bench.lose(lost());
        bench.wait_next();
        if bench.last == [Action::Look] {
            bench.found(Found::Running);
        }
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
    assert_eq!(bench.now, begin + BOOT);
}

#[test]
fn silence_is_told_and_then_the_end() {
    let mut bench = Bench::live(plan());
    let begin = bench.now;
    bench.lose(lost());
    let mut unreachable_at = None;
    while bench.phase() != Phase::Collecting {
        bench.wait_next();
        if bench.last.contains(&record(State::Unreachable, "the guest is not heard")) {
            assert_eq!(unreachable_at.replace(bench.now - begin), None, "told once");
        }
        if bench.last.contains(&Action::Look) {
            bench.found(Found::Running);
            bench.lose(lost());
        }
    }
    bench.has_ended(&Outcome::Unreachable);
    assert_eq!((unreachable_at, bench.now - begin), (Some(PEER_TIMEOUT), SILENCE));
}

#[test]
fn a_guest_that_is_heard_again_is_back() {
    let mut bench = Bench::live(plan());
    bench.guest(Guest::Accepted);
    assert_eq!(bench.wait(PEER_TIMEOUT), [record(State::Unreachable, "the guest is not heard")]);
    assert_eq!(bench.wait(SECOND), []);
    assert_eq!(bench.feed(Input::Heard), [record(State::Booted, "the guest is heard again")]);
    assert_eq!(bench.feed(Input::Heard), []);
    bench.wait(SILENCE - SECOND);
    assert_eq!(bench.phase(), Phase::Live);
    bench.wait(SECOND);
    bench.has_ended(&Outcome::Unreachable);
    // What is heard while its outputs are collected changes no state any more.
    assert_eq!(bench.feed(Input::Heard), []);
}

#[test]
fn a_workload_that_the_guest_does_not_end_is_ended_from_here() {
    let mut bench = Bench::live(plan());
    let begin = bench.now;
    while bench.phase() == Phase::Live {
        bench.guest(Guest::Accepted);
        let due = bench.machine.next_tick().unwrap().min(bench.now + SECOND);
        bench.now = due;
        bench.feed(Input::Tick);
    }
    bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Run });
    assert_eq!(bench.now - begin, RUN + GRACE + Duration::from_secs(5));
    let mut endless = Bench::live(Plan { run: None, ..plan() });
    for _ in 0..10_000 {
        endless.guest(Guest::Accepted);
        endless.wait(SECOND);
    }
    assert_eq!(endless.phase(), Phase::Live);
}

/// The time without a collector counts; and yet what the guest said meanwhile is read first.
#[test]
fn a_deadline_goes_on_without_a_collector() {
    let at = |ago: Duration| {
        let start = started(ago);
        let mut bench = Bench::from(plan(), &start);
        let begin = bench.now;
        bench.found(Found::Running);
        bench.guest(Guest::Opened { run_lost: false });
        while bench.phase() == Phase::Live {
            bench.guest(Guest::Accepted);
            bench.now = bench.machine.next_tick().unwrap().min(bench.now + SECOND);
            bench.feed(Input::Tick);
        }
        bench.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Run });
        bench.now - begin
    };
    assert_eq!(at(Duration::from_secs(500)), RUN + GRACE - Duration::from_secs(495));
    assert_eq!(at(10 * RUN), Duration::from_millis(500), "as long as an open session takes to bring what was said");
    let late = started(10 * RUN);
    let mut bench = Bench::from(plan(), &late);
    assert_eq!(bench.feed(Input::Tick), []);
    bench.found(Found::Running);
    bench.guest(Guest::Opened { run_lost: false });
    bench.guest(terminal(0));
    bench.has_ended(&Outcome::Completed { exit_code: Some(0) });
}

/// Some time ago Incus was asked to start the instance, its agent answered, and the workload was asked for.
fn started(ago: Duration) -> Start {
    Start { start_asked: Some(ago), booted: Some(ago), start_sent: Some(ago), ..Start::default() }
}

/// Ready and progress: the workload may end by itself, and what it says then changes nothing any more.
fn is_asked_to_end(bench: &mut Bench, watchdog: Watchdog) {
    assert_eq!(bench.end().outcome, Outcome::TimedOut { watchdog });
    assert_eq!((bench.last.last(), bench.phase()), (Some(&Action::Terminate), Phase::Terminating));
    let mut by_itself = std::mem::replace(bench, Bench::new(plan()));
    assert_eq!(by_itself.guest(terminal(0)), [Action::Collect], "the first word stands");
    *bench = by_itself;
}

#[test]
fn a_workload_that_is_not_ready_in_time_is_asked_to_end() {
    let ready = Plan { ready: Some(20 * SECOND), ..plan() };
    let mut bench = Bench::live(ready.clone());
    bench.guest(Guest::State(State::Starting));
    assert_eq!(bench.wait_while(Phase::Live), 20 * SECOND);
    is_asked_to_end(&mut bench, Watchdog::Ready);
    let mut deaf = Bench::live(ready.clone());
    deaf.guest(Guest::Accepted);
    deaf.wait_while(Phase::Live);
    assert_eq!(deaf.wait_while(Phase::Terminating), GRACE + 2 * SECOND);
    assert_eq!(deaf.last, [Action::Collect]);
    let mut in_time = Bench::live(ready);
    in_time.guest(Guest::Accepted);
    in_time.wait(19 * SECOND);
    in_time.guest(Guest::State(State::Ready));
    in_time.wait(2 * SECOND);
    assert_eq!(in_time.phase(), Phase::Live);
}

#[test]
fn readiness_is_watched_from_the_boot_on_over_collectors() {
    let ready = Plan { ready: Some(20 * SECOND), ..plan() };
    let mut bench = Bench::from(ready.clone(), &started(15 * SECOND));
    bench.found(Found::Running);
    bench.guest(Guest::Opened { run_lost: false });
    bench.guest(Guest::Accepted);
    assert_eq!(bench.wait_while(Phase::Live), 5 * SECOND);
    is_asked_to_end(&mut bench, Watchdog::Ready);
    let mut was_ready = Bench::from(ready, &Start { is_ready: true, ..started(15 * SECOND) });
    was_ready.found(Found::Running);
    was_ready.guest(Guest::Opened { run_lost: false });
    was_ready.guest(Guest::Accepted);
    was_ready.wait(10 * SECOND);
    assert_eq!(was_ready.phase(), Phase::Live);
}

#[test]
fn progress_moves_its_deadline_up_to_a_cap() {
    let progress = Plan { progress: Some(10 * SECOND), progress_cap: Some(35 * SECOND), ..plan() };
    let mut stuck = Bench::live(progress.clone());
    stuck.guest(Guest::Accepted);
    assert_eq!(stuck.wait_while(Phase::Live), 10 * SECOND);
    assert_eq!(stuck.end().message, "the workload made no progress within progress_secs (10 s)");
    is_asked_to_end(&mut stuck, Watchdog::Progress);
    let mut busy = Bench::live(progress.clone());
    let begin = busy.now;
    while busy.phase() == Phase::Live {
        busy.guest(Guest::Progress);
        busy.guest(Guest::Accepted);
        let due = busy.machine.next_tick().unwrap().min(busy.now + 9 * SECOND);
        busy.now = due;
        busy.feed(Input::Tick);
    }
    assert_eq!(busy.now - begin, 35 * SECOND, "however much it makes");
    assert_eq!(busy.end().message, "the workload was not done within progress_cap_secs (35 s)");
    is_asked_to_end(&mut busy, Watchdog::Progress);
    let mut uncapped = Bench::live(Plan { progress_cap: None, ..progress });
    for _ in 0..100 {
        uncapped.guest(Guest::Progress);
        uncapped.guest(Guest::Accepted);
        uncapped.wait(9 * SECOND);
    }
    assert_eq!(uncapped.phase(), Phase::Collecting, "run_secs is watched beside it");
    assert_eq!(uncapped.machine.next_tick(), None);
}

#[test]
fn progress_is_watched_from_the_last_of_it_on_over_collectors() {
    let progress = Plan { progress: Some(10 * SECOND), progress_cap: Some(60 * SECOND), run: None, ..plan() };
    for (start, left) in [
        (Start { progress: Some(4 * SECOND), ..started(30 * SECOND) }, 6),
        (started(3 * SECOND), 7),
        (Start { progress: Some(SECOND), ..started(58 * SECOND) }, 2),
    ] {
        let mut bench = Bench::from(progress.clone(), &start);
        bench.found(Found::Running);
        bench.guest(Guest::Opened { run_lost: false });
        bench.guest(Guest::Accepted);
        assert_eq!(bench.wait_while(Phase::Live), left * SECOND, "{start:?}");
        is_asked_to_end(&mut bench, Watchdog::Progress);
    }
}

/// Invariant 3, while nobody listens: what was said in time has a chance to come, and no more than that.
#[test]
fn a_deadline_that_passes_without_a_session_waits_for_one_and_not_for_long() {
    let progress = Plan { progress: Some(10 * SECOND), ..plan() };
    let dialing = || {
        let mut bench = Bench::live(progress.clone());
        bench.guest(Guest::Accepted);
        bench.wait(10 * SECOND - Duration::from_millis(100));
        bench.lose(lost());
        bench.wait_next();
        bench.found(Found::Running);
        assert_eq!(bench.phase(), Phase::Dialing);
        (bench.now + Duration::from_millis(50), bench)
    };
    let (due, mut unheard) = dialing();
    unheard.wait_while(Phase::Dialing);
    unheard.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Progress });
    assert!(unheard.now > due && unheard.now <= due + LATE, "{:?}", unheard.now - due);
    // The session comes after the deadline, and brings what was said before it.
    let (_, mut heard) = dialing();
    heard.wait(Duration::from_millis(200));
    heard.guest(Guest::Opened { run_lost: false });
    assert_eq!(heard.wait(Duration::from_millis(100)), []);
    heard.guest(Guest::Progress);
    heard.guest(Guest::Accepted);
    heard.wait(9 * SECOND);
    assert_eq!(heard.phase(), Phase::Live);
    // It comes and brings nothing: it has its grace all the same.
    let (due, mut nothing) = dialing();
    nothing.wait(Duration::from_millis(200));
    nothing.guest(Guest::Opened { run_lost: false });
    nothing.wait_while(Phase::Live);
    assert!(nothing.now > due && nothing.now <= due + LATE, "{:?}", nothing.now - due);
    is_asked_to_end(&mut nothing, Watchdog::Progress);
}

/// Invariant 3, over a time without a collector.
#[test]
fn a_deadline_of_before_is_judged_as_soon_as_the_guest_was_heard() {
    let all = Plan { ready: Some(20 * SECOND), progress: Some(20 * SECOND), ..plan() };
    for (plan, watchdog) in [
        (Plan { progress: None, run: None, ..all.clone() }, Watchdog::Ready),
        (Plan { ready: None, run: None, ..all.clone() }, Watchdog::Progress),
        (Plan { ready: None, progress: None, ..all }, Watchdog::Run),
    ] {
        let mut unheard = Bench::from(plan.clone(), &started(2 * RUN));
        assert_eq!(unheard.wait_while(Phase::Looking), 5 * SECOND);
        unheard.has_ended(&Outcome::TimedOut { watchdog });
        let mut heard = Bench::from(plan.clone(), &started(2 * RUN));
        heard.found(Found::Running);
        heard.wait(SECOND);
        heard.guest(Guest::Opened { run_lost: false });
        assert_eq!(heard.wait_while(Phase::Live), Duration::from_millis(500), "{watchdog:?}");
        let mut over = Bench::from(plan, &started(2 * RUN));
        over.found(Found::Running);
        over.guest(Guest::Opened { run_lost: false });
        over.guest(terminal(0));
        over.has_ended(&Outcome::Completed { exit_code: Some(0) });
    }
}

#[test]
fn an_instance_that_booted_while_nobody_watched_is_heard_first() {
    let start = Start { start_asked: Some(2 * BOOT), ..Start::default() };
    let mut bench = Bench::from(plan(), &start);
    assert_eq!(bench.feed(Input::Tick), []);
    bench.found(Found::Running);
    assert_eq!(bench.wait(4 * SECOND), []);
    bench.guest(Guest::Opened { run_lost: false });
    assert_eq!(bench.phase(), Phase::Live);
    let mut unheard = Bench::from(plan(), &start);
    assert_eq!(unheard.wait_while(Phase::Looking), 5 * SECOND);
    unheard.has_ended(&Outcome::TimedOut { watchdog: Watchdog::Boot });
    let mut later = Bench::from(plan(), &Start { start_asked: Some(BOOT - 30 * SECOND), ..Start::default() });
    later.found(Found::Running);
    assert_eq!(later.wait_while(Phase::Dialing), 30 * SECOND);
}

/// The time begins with the boot that it is for.
#[test]
fn an_instance_that_is_made_again_has_all_of_its_time() {
    let ready = Plan { ready: Some(20 * SECOND), ..plan() };
    let start = Start { start_asked: Some(SECOND), booted: Some(SECOND), ..Start::default() };
    let mut bench = Bench::from(ready, &start);
    bench.found(Found::Absent);
    bench.feed(Input::Created(Ok(())));
    bench.feed(Input::Started(Ok(())));
    bench.wait(30 * SECOND);
    bench.guest(Guest::Opened { run_lost: false });
    bench.guest(Guest::Accepted);
    assert_eq!(bench.wait_while(Phase::Live), 20 * SECOND);
    is_asked_to_end(&mut bench, Watchdog::Ready);
}

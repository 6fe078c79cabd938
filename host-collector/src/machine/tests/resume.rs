//! Starting from a journal.

use super::*;

fn end(outcome: Outcome) -> EndDecision {
    EndDecision::new(outcome, "m")
}

fn ended() -> Start {
    Start { ended: Some(end(Outcome::Failed { exit_code: Some(3) })), ..Start::default() }
}

#[test]
fn a_new_collector_goes_on_where_the_last_one_stopped() {
    let failure_only = Plan { collect: OutputCollectionMode::FailureOnly, ..plan() };
    let keep = || Plan { retention: RetentionPolicy::KeepUntilStopped, ..plan() };
    let again = || Plan { restart: RestartPolicy::Always, ..plan() };
    let concluded = || Start { is_collected: true, is_concluded: true, ..ended() };
    let settled = |settled| Start { settled: Some(settled), ..concluded() };
    let gone = || Start { command: Some(Command::Stop), ..settled(Settled::Kept(None)) };
    let finish = |restart_in| Action::Finish { destroyed: false, restart_in };
    for (plan, start, actions, phase) in [
        (plan(), Start::default(), vec![Action::Look], Phase::Looking),
        (
            plan(),
            Start { ended: Some(end(Outcome::Cancelled)), ..Start::default() },
            vec![Action::Collect],
            Phase::Collecting,
        ),
        (failure_only, ended(), vec![Action::Collect], Phase::Collecting),
        (plan(), Start { is_collected: true, ..ended() }, vec![Action::Conclude], Phase::Concluding),
        (plan(), concluded(), vec![Action::Destroy], Phase::Destroying),
        (again(), concluded(), vec![Action::Destroy], Phase::Destroying),
        (keep(), concluded(), vec![Action::Keep(None)], Phase::Kept),
        (Plan { restart: RestartPolicy::Always, ..keep() }, concluded(), vec![finish(Some(SECOND))], Phase::Resting),
        // Somebody may have deleted it while nobody looked.
        (keep(), settled(Settled::Kept(None)), vec![Action::Look], Phase::Kept),
        (keep(), gone(), vec![Action::Destroy], Phase::Destroying),
        // The time that it was kept for passed while nobody looked.
        (keep(), settled(Settled::Kept(Some(Duration::ZERO))), vec![Action::Destroy], Phase::Destroying),
        (again(), settled(Settled::Resting(SECOND)), vec![], Phase::Resting),
        (
            again(),
            Start { command: Some(Command::Cancel), ..settled(Settled::Resting(SECOND)) },
            vec![Action::Destroy],
            Phase::Destroying,
        ),
        (plan(), settled(Settled::Finished), vec![], Phase::Done),
        (plan(), settled(Settled::TakenOver), vec![], Phase::TakenOver),
    ] {
        let bench = Bench::from(plan, &start);
        assert_eq!((&bench.last, bench.phase()), (&actions, phase), "{start:?}");
        assert_eq!(bench.machine.transition(), None);
    }
}

/// The collector died between the guest's last word, or a command, and what follows from it.
#[test]
fn what_was_on_its_way_is_taken_up() {
    let last_word = Some(end(Outcome::Failed { exit_code: Some(3) }));
    let said = Start { last_word, command: Some(Command::Cancel), ..Start::default() };
    Bench::from(plan(), &said).has_ended(&Outcome::Failed { exit_code: Some(3) });
    let wanted = Start { command: Some(Command::Cancel), ..Start::default() };
    Bench::from(plan(), &wanted).has_ended(&Outcome::Cancelled);
}

#[test]
fn what_is_left_of_a_time_is_what_is_waited_for() {
    let begun = |settled| Start { is_concluded: true, is_collected: true, settled: Some(settled), ..ended() };
    let keep = Plan { retention: RetentionPolicy::DebugKeep, ..plan() };
    let mut kept = Bench::from(keep, &begun(Settled::Kept(Some(5 * SECOND))));
    assert_eq!(kept.wait_next(), 5 * SECOND);
    assert_eq!(kept.last, [Action::Destroy]);
    let again = Plan { restart: RestartPolicy::Always, ..plan() };
    let start = Start { restarts: 2, lived: SECOND, ..begun(Settled::Resting(3 * SECOND)) };
    let mut resting = Bench::from(again.clone(), &start);
    assert_eq!(resting.wait_next(), 3 * SECOND);
    assert_eq!(resting.last, [Action::Begin { restarts: 3 }, Action::Look]);
    let mut good = Bench::from(again, &Start { lived: 60 * SECOND, ..start });
    good.wait_next();
    assert_eq!(good.last, [Action::Begin { restarts: 1 }, Action::Look], "its life counts over collectors");
}

/// A collector that takes up a life in its midst knows how long it was.
#[test]
fn a_life_counts_from_its_workloads_start() {
    let again = Plan { restart: RestartPolicy::Always, restart_backoff_cap: 30 * SECOND, ..plan() };
    for (start_sent, rest) in [(Some(20), 4), (Some(29), 1), (None, 4)] {
        let start_sent = start_sent.map(|secs| secs * SECOND);
        let start = Start { restarts: 2, start_sent, ..Start::default() };
        let mut bench = Bench::from(again.clone(), &start);
        bench.wait(SECOND);
        bench.guest(terminal(3));
        bench.feed(Input::Collected);
        bench.feed(Input::Concluded);
        bench.feed(Input::Destroyed(Ok(Destroyed::Gone)));
        assert_eq!(bench.last, [Action::Finish { destroyed: true, restart_in: Some(rest * SECOND) }]);
    }
}

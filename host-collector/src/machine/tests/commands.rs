//! What a person wants, at every point of a runtime's life.

use super::*;

use Phase::*;

/// Every phase in which a collector has something to do.
const PHASES: [Phase; 12] = [
    Looking,
    Creating,
    Starting,
    Halting,
    Dialing,
    Live,
    Terminating,
    Collecting,
    Concluding,
    Destroying,
    Kept,
    Resting,
];

/// A machine in that phase, whose workload failed where it ended.
fn at(phase: Phase, plan: Plan) -> Bench {
    let keep = Plan { retention: RetentionPolicy::KeepUntilStopped, ..plan.clone() };
    let mut bench = match phase {
        Live => Bench::live(plan),
        Kept => Bench::concluded(if plan.retention == RetentionPolicy::DestroyOnCompletion { keep } else { plan }, 3),
        Resting => Bench::concluded(Plan { restart: RestartPolicy::OnFailure, ..plan }, 3),
        Terminating => {
            let mut bench = Bench::live(Plan { ready: Some(SECOND), ..plan });
            bench.guest(Guest::Accepted);
            bench.wait(SECOND);
            bench
        }
        Collecting | Concluding | Destroying => {
            let mut bench = Bench::live(plan);
            bench.guest(terminal(3));
            bench
        }
        Looking | Creating | Starting | Halting | Dialing | Done | TakenOver => Bench::new(plan),
    };
    let answers = match phase {
        Creating => vec![Input::Looked(Ok(Found::Absent))],
        Starting => vec![Input::Looked(Ok(Found::Stopped))],
        Halting => vec![Input::Looked(Ok(Found::Running))],
        Dialing => vec![Input::Looked(Ok(Found::Stopped)), Input::Started(Ok(()))],
        Concluding => vec![Input::Collected],
        Destroying => vec![Input::Collected, Input::Concluded],
        Resting if bench.phase() == Destroying => vec![Input::Destroyed(Ok(Destroyed::Gone))],
        _ => vec![],
    };
    for answer in answers {
        bench.feed(answer);
    }
    bench
}

/// What a machine does for a command, up to where nothing more comes of it.
fn outcome(mut bench: Bench, command: Command) -> (Phase, Vec<Phase>) {
    let told = bench.feed(Input::Command(command)).first().cloned();
    assert_eq!(told, Some(Action::Command(command)), "it is written down before anything follows from it");
    let mut phases = vec![bench.phase()];
    while !matches!(bench.phase(), Done | Kept | Resting) {
        let next = match bench.phase() {
            Terminating => Input::Guest(terminal(143)),
            Collecting => Input::Collected,
            Concluding => Input::Concluded,
            Destroying => Input::Destroyed(Ok(Destroyed::Gone)),
            phase => panic!("{phase:?} after a command"),
        };
        bench.feed(next);
        phases.push(bench.phase());
    }
    (bench.phase(), phases)
}

/// Every phase, every command and every policy: where it ends, and on which way.
#[test]
fn a_command_works_in_every_phase() {
    use Command::{Cancel, Destroy, Stop};
    for retention in
        [RetentionPolicy::DestroyOnCompletion, RetentionPolicy::KeepUntilStopped, RetentionPolicy::DebugKeep]
    {
        for command in [Cancel, Stop, Destroy] {
            for phase in PHASES {
                if phase == Destroying && retention != RetentionPolicy::DestroyOnCompletion {
                    // It comes of a command there.
                    continue;
                }
                let bench = at(phase, Plan { retention, ..plan() });
                assert_eq!(bench.phase(), phase, "{retention:?}");
                // What `at` keeps is kept until it is stopped, where the policy would not keep it.
                let keeps = match retention {
                    RetentionPolicy::DestroyOnCompletion => phase == Kept && command == Cancel,
                    RetentionPolicy::KeepUntilStopped => command == Cancel,
                    RetentionPolicy::DebugKeep => command != Destroy,
                };
                let end = if keeps && phase != Destroying { Kept } else { Done };
                let (last, way) = outcome(bench, command);
                let end = if phase == Destroying { Done } else { end };
                assert_eq!(last, end, "{retention:?} {command:?} in {phase:?}: {way:?}");
                let first = match phase {
                    Looking | Creating | Starting | Halting | Dialing => Collecting,
                    Live | Terminating => Terminating,
                    Collecting | Concluding | Destroying => phase,
                    Kept | Resting if keeps => Kept,
                    _ => Destroying,
                };
                assert_eq!(way[0], first, "{retention:?} {command:?} in {phase:?}");
            }
        }
    }
}

#[test]
fn a_command_is_no_end_where_that_is_decided() {
    for phase in PHASES {
        let mut bench = at(phase, plan());
        bench.feed(Input::Command(Command::Cancel));
        let ended = bench.last.iter().filter(|action| matches!(action, Action::End(_))).count();
        assert_eq!(ended, usize::from(matches!(phase, Looking | Creating | Starting | Halting | Dialing | Live)));
        if ended > 0 {
            assert_eq!(bench.end().outcome, Outcome::Cancelled, "{phase:?}");
        }
    }
}

/// No restart comes after a command, wherever it came.
#[test]
fn a_command_ends_all_restarts() {
    for retention in [RetentionPolicy::DestroyOnCompletion, RetentionPolicy::KeepUntilStopped] {
        for phase in PHASES {
            if phase == Kept {
                continue;
            }
            let bench = at(phase, Plan { restart: RestartPolicy::Always, retention, ..plan() });
            if bench.phase() != phase {
                // With a restart to come, nothing is destroyed that stays.
                assert_eq!((bench.phase(), phase), (Resting, Destroying));
                continue;
            }
            let (last, way) = outcome(bench, Command::Cancel);
            assert_ne!(last, Resting, "{phase:?}: {way:?}");
        }
    }
}

#[test]
fn wishes_go_only_further() {
    let mut bench = Bench::live(plan());
    assert_eq!(bench.feed(Input::Command(Command::Stop))[0], Action::Command(Command::Stop));
    for less in [Command::Cancel, Command::Stop] {
        assert_eq!(bench.feed(Input::Command(less)), []);
    }
    assert_eq!(bench.feed(Input::Command(Command::Destroy)), [Action::Command(Command::Destroy)]);
    let mut done = Bench::concluded(plan(), 0);
    done.feed(Input::Destroyed(Ok(Destroyed::Gone)));
    assert_eq!(done.feed(Input::Command(Command::Destroy)), []);
}

#[test]
fn a_live_workload_is_asked_to_end_and_has_its_grace() {
    let mut bench = Bench::live(plan());
    bench.feed(Input::Command(Command::Cancel));
    assert_eq!(bench.end().outcome, Outcome::Cancelled);
    assert_eq!(bench.last.last(), Some(&Action::Terminate));
    assert_eq!(bench.feed(Input::Command(Command::Cancel)), [], "once is enough");
    assert_eq!(bench.guest(terminal(143)), [Action::Collect], "the first word stands");
    let mut deaf = Bench::live(plan());
    deaf.feed(Input::Command(Command::Cancel));
    assert_eq!(deaf.wait_next(), GRACE + 2 * SECOND);
    assert_eq!(deaf.last, [Action::Collect]);
    assert_eq!(deaf.machine.next_tick(), None, "a deadline that was met is none any more");
    let mut lost_meanwhile = Bench::live(plan());
    lost_meanwhile.feed(Input::Command(Command::Cancel));
    assert_eq!(lost_meanwhile.lose(lost()), []);
    lost_meanwhile.wait_next();
    assert_eq!(lost_meanwhile.last, [Action::Collect]);
}

/// Answers to what was under way start nothing behind an end.
#[test]
fn late_answers_begin_nothing() {
    for phase in [Looking, Creating, Starting, Halting, Dialing] {
        let mut bench = at(phase, plan());
        bench.feed(Input::Command(Command::Cancel));
        bench.has_ended(&Outcome::Cancelled);
        for input in [
            Input::Created(Ok(())),
            Input::Started(Ok(())),
            Input::Halted(Ok(())),
            Input::Looked(Ok(Found::Absent)),
            Input::Guest(Guest::Opened { run_lost: false }),
            Input::NoSession(lost()),
        ] {
            assert_eq!(bench.feed(input), [], "{phase:?}");
        }
    }
}

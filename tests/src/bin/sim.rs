//! The simulator: many seeds, each a world of its own; or one of them, step by step.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use pika_cloud_tests::sim::world::run;
use pika_host_collector::machine::{TRANSITIONS, Transition};

/// Simulates runtimes under faults, and checks the design's invariants after every step.
#[derive(Debug, Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Replays this one, step by step.
    #[arg(long)]
    seed: Option<u64>,
    /// How many run at once.
    #[arg(long)]
    threads: Option<usize>,
    /// Names every transition that was seen, too.
    #[arg(long)]
    transitions: bool,
    /// Goes on after a failure, and counts.
    #[arg(long)]
    all: bool,
}

/// So many seeds go through every way of the machine.
const FULL_RUN: u64 = 20_000;

/// What all threads know.
#[derive(Default)]
struct Shared {
    next: AtomicU64,
    failed: Mutex<Vec<(u64, String)>>,
    transitions: Mutex<BTreeSet<Transition>>,
    steps: AtomicU64,
    virtual_secs: AtomicU64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.seed {
        Some(seed) => replay(seed),
        None => many(&args),
    }
}

fn replay(seed: u64) -> ExitCode {
    let outcome = run(seed, true);
    for line in outcome.trace.lines() {
        println!("{line}");
    }
    println!("seed {seed}: {} steps, fingerprint {:016x}", outcome.trace.steps(), outcome.trace.fingerprint());
    match outcome.violation {
        Some(violation) => {
            println!("seed {seed}: {violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn many(args: &Args) -> ExitCode {
    let began = Instant::now();
    let shared = Shared::default();
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work(args, &shared));
        }
    });
    let Ok(mut failed) = shared.failed.into_inner() else { return ExitCode::FAILURE };
    let Ok(transitions) = shared.transitions.into_inner() else { return ExitCode::FAILURE };
    failed.sort();
    for (seed, violation) in failed.iter().take(20) {
        println!("seed {seed}: {violation}");
        println!("    replay it with: cargo xtask sim --seed {seed}");
    }
    let done = shared.next.load(Ordering::Relaxed).min(args.seeds);
    println!(
        "{done} seeds, {} steps, {} virtual hours in {:.1} s; {} failed",
        shared.steps.load(Ordering::Relaxed),
        shared.virtual_secs.load(Ordering::Relaxed) / 3600,
        began.elapsed().as_secs_f64(),
        failed.len()
    );
    let missing: Vec<_> = TRANSITIONS.iter().filter(|transition| !transitions.contains(transition)).collect();
    println!("{} of {} transitions of the machine", TRANSITIONS.len() - missing.len(), TRANSITIONS.len());
    for transition in &missing {
        println!("    missing: {:?} on {:?} to {:?}", transition.from, transition.on, transition.to);
    }
    for transition in transitions.iter().filter(|_| args.transitions) {
        println!("    seen: {:?} on {:?} to {:?}", transition.from, transition.on, transition.to);
    }
    let incomplete = args.seeds >= FULL_RUN && !missing.is_empty();
    if failed.is_empty() && !incomplete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Takes one seed after the other, until there is none or one failed.
fn work(args: &Args, shared: &Shared) {
    let mut transitions = BTreeSet::new();
    loop {
        let at = shared.next.fetch_add(1, Ordering::Relaxed);
        if at >= args.seeds {
            break;
        }
        let seed = args.first + at;
        let outcome = std::panic::catch_unwind(|| run(seed, false));
        let violation = match outcome {
            Ok(outcome) => {
                transitions.extend(outcome.transitions);
                shared.steps.fetch_add(outcome.trace.steps(), Ordering::Relaxed);
                shared.virtual_secs.fetch_add(outcome.took.as_secs(), Ordering::Relaxed);
                outcome.violation.map(|violation| violation.to_string())
            }
            Err(_) => Some("a panic, see above".to_owned()),
        };
        if let Some(violation) = violation {
            if let Ok(mut failed) = shared.failed.lock() {
                failed.push((seed, violation));
            }
            if !args.all {
                shared.next.store(args.seeds, Ordering::Relaxed);
            }
        }
    }
    if let Ok(mut all) = shared.transitions.lock() {
        all.extend(transitions);
    }
}

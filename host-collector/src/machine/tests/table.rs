//! The table of transitions, and what is written about it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::world::{Run, world};
use super::*;

/// The table as its document shows it.
fn document() -> String {
    let mut text = "| from | by | to |\n|---|---|---|\n".to_owned();
    let mut rest = TRANSITIONS;
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|other| (other.from, other.on) == (first.from, first.on)).count();
        let to: Vec<_> = rest[..same].iter().map(|transition| format!("`{:?}`", transition.to)).collect();
        writeln!(text, "| `{:?}` | `{:?}` | {} |", first.from, first.on, to.join(", ")).unwrap();
        rest = &rest[same..];
    }
    text
}

/// `PIKA_UPDATE=1` writes it anew.
#[test]
fn the_documented_table_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/transitions.md");
    if std::env::var_os("PIKA_UPDATE").is_some_and(|update| update == "1") {
        std::fs::write(path, document()).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap();
    assert!(found == document(), "machine/transitions.md is not of this table: PIKA_UPDATE=1 writes it anew");
}

#[test]
fn the_table_is_sorted_and_says_nothing_twice() {
    assert!(TRANSITIONS.is_sorted_by(|one, next| one < next));
}

/// The diagram in the module's docs is drawn by hand, and every arrow of it is in the table.
#[test]
fn every_phase_is_entered_and_left() {
    let from: BTreeSet<_> = TRANSITIONS.iter().map(|transition| transition.from).collect();
    let to: BTreeSet<_> = TRANSITIONS.iter().map(|transition| transition.to).collect();
    assert_eq!((from.len(), to.len()), (12, 14));
    for end in [Phase::Done, Phase::TakenOver] {
        assert!(!from.contains(&end));
    }
    let docs = include_str!("../mod.rs");
    for phase in to {
        let name = format!("{phase:?}");
        let drawn = docs.lines().take_while(|line| line.starts_with("//!")).any(|line| line.contains(&name));
        assert!(drawn, "{name} is not in the overview");
    }
}

/// Worlds from a fixed seed go through nearly all of it, and through nothing else; `PIKA_WORLDS=40000` of them through all.
#[test]
fn worlds_go_through_the_table() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let worlds = std::env::var("PIKA_WORLDS").ok().and_then(|count| count.parse().ok()).unwrap_or(3000_u32);
    let mut seen = BTreeSet::new();
    for _ in 0..worlds {
        let mut run = Run::new(world().new_tree(&mut runner).unwrap().current());
        run.run();
        seen.append(&mut run.seen);
    }
    let known: BTreeSet<_> = TRANSITIONS.iter().copied().collect();
    let unknown: Vec<_> = seen.difference(&known).collect();
    assert!(unknown.is_empty(), "not in the table: {unknown:#?}");
    let missed: Vec<_> = known.difference(&seen).collect();
    let may_miss = if worlds < 40_000 { known.len() / 10 } else { 0 };
    assert!(missed.len() <= may_miss, "{} of {} were not gone through: {missed:?}", missed.len(), known.len());
}

//! The simulator, as far as every change must pass it: 20,000 seeds and every transition of the machine.

use std::path::PathBuf;
use std::process::Command;

use pika_cloud_tests::sim::world::run;

/// Seeds that every change must pass.
const SEEDS: &str = "20000";

/// `cargo xtask test` builds it with optimization: without, the seeds take minutes.
fn simulator() -> Option<PathBuf> {
    std::env::var_os("PIKA_TEST_SIM").map(PathBuf::from)
}

#[test]
fn twenty_thousand_seeds_hold_every_invariant_and_go_every_way() {
    let simulator = simulator().expect("PIKA_TEST_SIM names the simulator: run `cargo xtask test`");
    let output = Command::new(&simulator).args(["--seeds", SEEDS]).output().expect("the simulator runs");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_seed_gives_the_same_run_byte_for_byte() {
    for seed in 0..40 {
        let (one, two) = (run(seed, true), run(seed, true));
        assert!(one.trace.lines() == two.trace.lines(), "seed {seed}");
        // Whether anybody reads it makes no difference to what happens.
        assert_eq!(one.trace.fingerprint(), run(seed, false).trace.fingerprint(), "seed {seed}");
    }
}

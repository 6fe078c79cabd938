//! Random moments that can be had again.

use std::time::Duration;

/// Numbers from a seed that is printed, so that a failure can be replayed with `PIKA_TEST_SEED`.
#[derive(Debug)]
pub struct Chance {
    state: u64,
}

impl Chance {
    /// From `PIKA_TEST_SEED`, or from a seed of its own; prints which.
    pub fn new(test: &str) -> Self {
        let given = std::env::var("PIKA_TEST_SEED").ok();
        let seed = given.map_or_else(
            || getrandom::u64().expect("random numbers can be had"),
            |seed| seed.parse().expect("PIKA_TEST_SEED is a number"),
        );
        println!("{test}: PIKA_TEST_SEED={seed}");
        Self { state: seed }
    }

    /// The next number (`SplitMix64`).
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Up to `most`, in microseconds.
    pub fn up_to(&mut self, most: Duration) -> Duration {
        let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(self.next_u64() % micros)
    }
}

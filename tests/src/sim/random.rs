//! The numbers that decide everything in a simulated run. An algorithm of our own, ten lines long, so that a seed gives the
//! same run on every machine and with every release of every library.

use std::time::Duration;

/// `SplitMix64`.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A generator of its own for one part of the world, so that a change there leaves the others' numbers as they are.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::new(self.number())
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`; 0 where `end` is.
    pub fn below(&mut self, end: u64) -> u64 {
        // The bias is far below what any run could tell.
        if end == 0 { 0 } else { self.number() % end }
    }

    /// An index below `len`.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// Both ends included.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// With `per_mille` out of a thousand.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < u64::from(per_mille)
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())]
    }

    /// Between two times, to the microsecond.
    pub fn time(&mut self, from: Duration, to: Duration) -> Duration {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX / 2);
        Duration::from_micros(self.between(micros(from), micros(to).max(micros(from))))
    }

    /// Between two times in milliseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        self.time(Duration::from_millis(from), Duration::from_millis(to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fixed for ever: a seed in a bug report must still show the bug next year.
    #[test]
    fn the_numbers_of_a_seed_never_change() {
        let mut random = Random::new(1);
        assert_eq!([random.number(), random.number()], [10_451_216_379_200_822_465, 13_757_245_211_066_428_519]);
        assert_eq!((random.between(3, 3), random.below(0)), (3, 0));
    }
}

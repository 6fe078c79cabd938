//! Medians and the like.

use std::time::Duration;

/// Measurements of one thing, in any order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Takes a time in.
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64());
    }

    /// The value below which `share` of them lie, in seconds; nearest rank.
    ///
    /// # Panics
    /// Where there are none: nothing was measured.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        assert!(!self.0.is_empty(), "nothing was measured");
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted[rank.clamp(1, sorted.len()) - 1]
    }

    /// The median, in seconds.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// Seconds to milliseconds.
pub(crate) fn millis(seconds: f64) -> f64 {
    seconds * 1e3
}

/// Seconds to microseconds.
pub(crate) fn micros(seconds: f64) -> f64 {
    seconds * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let samples = Samples((1..=100).rev().map(f64::from).collect());
        assert_eq!(samples.median().to_bits(), 50f64.to_bits());
        assert_eq!(samples.quantile(0.99).to_bits(), 99f64.to_bits());
        assert_eq!(Samples(vec![7.0]).quantile(0.99).to_bits(), 7f64.to_bits());
    }
}

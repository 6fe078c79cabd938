//! How long to wait before a call that failed is tried again. Pure.

use std::time::Duration;

/// The wait after the first failure, at most.
const FIRST: Duration = Duration::from_millis(200);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(15);

/// How long to wait after `attempt` failures in a row, counted from 0: twice as long each time up to 15 s, of which `random`
/// takes away up to a half, so that runtimes that failed together do not come back together.
pub fn backoff(attempt: u32, random: u64) -> Duration {
    let whole = FIRST.saturating_mul(2_u32.saturating_pow(attempt)).min(LONGEST);
    // The upper half of its bits is enough, and cannot overflow.
    let share = u32::try_from(random >> 32).unwrap_or(u32::MAX);
    let half = whole / 2;
    half + half.mul_f64(f64::from(share) / f64::from(u32::MAX))
}

/// Random bits for [`backoff`], where there is nothing to replay.
pub(crate) fn jitter() -> u64 {
    // Without randomness nothing spreads, and that is all.
    getrandom::u64().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_its_longest_and_spreads_over_the_upper_half() {
        let bounds = |attempt| (backoff(attempt, 0).as_millis(), backoff(attempt, u64::MAX).as_millis());
        assert_eq!(bounds(0), (100, 200));
        assert_eq!(bounds(1), (200, 400));
        assert_eq!(bounds(6), (6400, 12_800));
        for attempt in [7, 31, 32, 1000, u32::MAX] {
            assert_eq!(bounds(attempt), (7500, 15_000));
        }
        let middle = backoff(0, u64::MAX / 2).as_millis();
        assert!((149..=150).contains(&middle), "{middle}");
    }
}

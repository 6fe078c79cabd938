//! The host's two clocks: the monotonic one counts deadlines, wall time carries them over a boot.

use std::io;
use std::time::{Duration, SystemTime};

use pika_cloud_common::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// One look at both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_MONOTONIC`: since the host's boot, without what it slept.
    pub mono: Duration,
    /// Since 1970-01-01T00:00:00Z, as far as the host knows.
    pub wall: Duration,
}

/// The clocks of this host's present boot.
#[derive(Clone, Debug)]
pub struct HostClock {
    boot_id: String,
}

impl HostClock {
    /// Learns which boot this is.
    ///
    /// # Errors
    /// Where `/proc` does not say it.
    pub fn open() -> io::Result<Self> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self { boot_id: boot_id.trim().to_owned() })
    }

    /// The kernel's name of this boot.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Looks at both clocks.
    pub fn now(&self) -> Now {
        let mono = clock_gettime(ClockId::Monotonic);
        // The kernel counts from its boot, and gives less than a second of nanoseconds.
        let mono = Duration::new(mono.tv_sec.try_into().unwrap_or(0), mono.tv_nsec.try_into().unwrap_or(0));
        Now { mono, wall: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default() }
    }
}

/// Wall time as a record writes it, with microseconds.
pub fn timestamp(wall: Duration) -> Timestamp {
    Timestamp::from_unix(wall.as_secs(), wall.subsec_micros())
}

/// Wall time as a record of ours wrote it: `YYYY-MM-DDTHH:MM:SS.ffffffZ` and nothing else, since recovery reads millions.
pub(crate) fn wall_of(at: &str) -> Option<Duration> {
    let text: &[u8; 27] = at.as_bytes().try_into().ok()?;
    let number = |from: usize, len: usize| {
        text[from..from + len]
            .iter()
            .try_fold(0u64, |number, digit| digit.is_ascii_digit().then(|| number * 10 + u64::from(digit - b'0')))
    };
    let marks = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'.'), (26, b'Z')];
    if !marks.iter().all(|(at, mark)| text[*at] == *mark) {
        return None;
    }
    let days = days_before(number(0, 4)?, number(5, 2)?, number(8, 2)?)?;
    let secs = days * 86_400 + number(11, 2)? * 3600 + number(14, 2)? * 60 + number(17, 2)?;
    Some(Duration::from_secs(secs) + Duration::from_micros(number(20, 6)?))
}

/// Days from 1970-01-01 to a date (Howard Hinnant's `days_from_civil`).
fn days_before(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = year - u64::from(month <= 2 && year > 0);
    let (era, of_era) = (year / 400, year % 400);
    let month_from_march = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * month_from_march + 2) / 5 + day - 1;
    (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year).checked_sub(719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_time_reads_back_as_it_was_written() {
        // Leap days, ends of years and centuries, and some thousand others.
        let days = (0..200_000u64).step_by(37).chain([59, 60, 789, 790, 10_956, 10_957, 11_016, 47_540, 47_541]);
        for day in days {
            let wall = Duration::from_micros((day * 86_400 + 86_399 - day % 86_400) * 1_000_000 + day % 1_000_000);
            assert_eq!(wall_of(timestamp(wall).as_str()), Some(wall));
        }
    }

    #[test]
    fn only_our_own_form_of_wall_time_is_read() {
        for text in [
            "",
            "2026-01-31T12:00:00Z",
            "2026-01-31T12:00:00.000000+",
            "2026-13-31T12:00:00.000000Z",
            "2026-01-00T12:00:00.000000Z",
            "2026-01-31 12:00:00.000000Z",
            "2026-01-31T12:00:0x.000000Z",
            "1969-12-31T23:59:59.000000Z",
        ] {
            assert_eq!(wall_of(text), None, "{text}");
        }
    }

    #[test]
    fn the_clocks_go_on() {
        let clock = HostClock::open().unwrap();
        let (before, after) = (clock.now(), clock.now());
        assert!(before.mono <= after.mono && !after.mono.is_zero());
        assert_eq!(clock.boot_id().len(), 36);
    }
}

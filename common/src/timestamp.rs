//! RFC 3339 timestamps, kept as they were written.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// An RFC 3339 date and time. Our own are UTC with microseconds; foreign ones with an offset are kept as they stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Timestamp(
    #[cfg_attr(feature = "schema", schemars(extend("format" = "date-time", "pattern" = PATTERN)))] String,
);

/// What the schema asks of one; [`Timestamp::parse`] looks at the ranges too.
#[cfg(feature = "schema")]
const PATTERN: &str = r"^\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})$";

/// The text is not an RFC 3339 date and time, such as `2026-01-31T12:00:00.000000Z`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an RFC 3339 date and time (expected the form 2026-01-31T12:00:00.000000Z)")]
pub struct NotATimestamp(String);

impl Timestamp {
    /// Takes `text` if it has the form of RFC 3339. Whether the day exists in its month is not checked.
    pub fn parse(text: &str) -> Result<Self, NotATimestamp> {
        Self::check(text).map(|()| Self(text.to_owned()))
    }

    /// As [`Timestamp::parse`], without a copy.
    pub(crate) fn check(text: &str) -> Result<(), NotATimestamp> {
        if has_rfc3339_form(text.as_bytes()) { Ok(()) } else { Err(NotATimestamp(text.chars().take(64).collect())) }
    }

    /// From seconds and microseconds since 1970-01-01T00:00:00Z, as UTC with microseconds. What RFC 3339 cannot write
    /// becomes the nearest that it can: its years end with 9999.
    pub fn from_unix(secs: u64, micros: u32) -> Self {
        const LAST: u64 = 253_402_300_799;
        let (secs, micros) = if secs > LAST { (LAST, 999_999) } else { (secs, micros.min(999_999)) };
        let (days, of_day) = (secs / 86_400, secs % 86_400);
        let (year, month, day) = civil_from_days(days);
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        Self(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z"))
    }

    /// The text as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// `YYYY-MM-DDTHH:MM:SS[.fraction](Z|±HH:MM)`, with each number in its range.
fn has_rfc3339_form(text: &[u8]) -> bool {
    let number_from = |from: usize, len: usize, min: u32, max: u32| {
        text.get(from..from + len).is_some_and(|digits| {
            digits.iter().all(u8::is_ascii_digit)
                && (min..=max).contains(&digits.iter().fold(0u32, |n, d| n * 10 + u32::from(d - b'0')))
        })
    };
    let number = |from: usize, len: usize, max: u32| number_from(from, len, 0, max);
    let fixed = text.len() >= 20
        && number(0, 4, 9999)
        && text[4] == b'-'
        && number_from(5, 2, 1, 12)
        && text[7] == b'-'
        && number_from(8, 2, 1, 31)
        && matches!(text[10], b'T' | b't' | b' ')
        && number(11, 2, 23)
        && text[13] == b':'
        && number(14, 2, 59)
        && text[16] == b':'
        && number(17, 2, 60);
    if !fixed {
        return false;
    }
    let mut at = 19;
    if text[at] == b'.' {
        let digits = text[at + 1..].iter().take_while(|b| b.is_ascii_digit()).count();
        if digits == 0 {
            return false;
        }
        at += 1 + digits;
    }
    match &text[at..] {
        [b'Z' | b'z'] => true,
        [b'+' | b'-', rest @ ..] => {
            rest.len() == 5 && number(at + 1, 2, 23) && rest[2] == b':' && number(at + 4, 2, 59)
        }
        _ => false,
    }
}

/// Days since 1970-01-01 to a proleptic Gregorian date (Howard Hinnant's `civil_from_days`).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_are_utc_with_microseconds() {
        assert_eq!(Timestamp::from_unix(0, 0).as_str(), "1970-01-01T00:00:00.000000Z");
        assert_eq!(Timestamp::from_unix(951_782_400, 7).as_str(), "2000-02-29T00:00:00.000007Z");
        assert_eq!(Timestamp::from_unix(1_798_761_599, 999_999).as_str(), "2026-12-31T23:59:59.999999Z");
        assert_eq!(Timestamp::from_unix(253_402_300_799, 0).as_str(), "9999-12-31T23:59:59.000000Z");
        assert_eq!(Timestamp::from_unix(u64::MAX, u32::MAX).as_str(), "9999-12-31T23:59:59.999999Z");
        assert_eq!(Timestamp::from_unix(0, u32::MAX).as_str(), "1970-01-01T00:00:00.999999Z");
    }

    #[test]
    fn foreign_offsets_are_kept() {
        for text in ["2026-03-25T20:00:00Z", "2026-03-25t20:00:00.5+02:00", "2026-03-25 20:00:60.123456789-11:30"] {
            assert_eq!(Timestamp::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "yesterday",
            "2026-03-25",
            "2026-13-25T20:00:00Z",
            "2026-00-25T20:00:00Z",
            "2026-03-00T20:00:00Z",
            "2026-03-32T20:00:00Z",
            "2026-03-25T20:00:00",
            "2026-03-25T20:00:00.Z",
            "2026-03-25T20:00:00+2:00",
            "2026-03-25T20:00:00ZZ",
            "２026-03-25T20:00:00Z",
        ] {
            assert!(Timestamp::parse(text).is_err(), "{text}");
        }
    }
}

//! Reads the head of an event line of our own making in one short pass: guests and hosts move millions of them.
//!
//! ```text
//!   {"schema_version":1,"seq":17,"timestamp":"2026-01-31T12:00:00.000000Z","kind":"ready","message":"…","boot_id":"…","details":…}
//!   └──────── literal ───────┘  └─ digits in their places ─┘        └ plain text ┘                        └ plain JSON ┘
//! ```
//!
//! It says yes only to what [`EventHead::decode`] says yes to, and gives up at the first thing that is not plain: an escape,
//! a byte outside ASCII, a number with an exponent, a field in another place. What it gives up on is read the long way.

use std::borrow::Cow;

use super::EventHead;
use crate::document::SCHEMA_VERSION;

/// Deeper details are read the long way.
const MAX_DEPTH: u32 = 16;

/// The head of a plain line.
pub(super) fn head(line: &[u8]) -> Option<EventHead<'_>> {
    let mut at = Reader { rest: line };
    at.literal(b"{\"schema_version\":1,\"seq\":")?;
    let seq = at.seq()?;
    at.literal(b",\"timestamp\":\"")?;
    at.timestamp()?;
    at.literal(b"\",\"kind\":\"")?;
    let kind = at.text()?;
    at.literal(b",\"message\":\"")?;
    at.text()?;
    if at.literal(b",\"boot_id\":\"").is_some() {
        at.text()?;
    }
    let has_progress = at.literal(b",\"details\":").is_some() && at.details()?;
    if at.rest != b"}" {
        return None;
    }
    // Plain text is ASCII.
    let kind = std::str::from_utf8(kind).ok()?;
    Some(EventHead { schema_version: SCHEMA_VERSION, seq, kind: Cow::Borrowed(kind), has_progress })
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn literal(&mut self, text: &[u8]) -> Option<()> {
        self.rest = self.rest.strip_prefix(text)?;
        Some(())
    }

    /// At most 15 digits, so that the contract's bound holds.
    fn seq(&mut self) -> Option<u64> {
        let digits = self.digits();
        if digits.is_empty() || digits.len() > 15 || digits[0] == b'0' {
            return None;
        }
        Some(digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
    }

    fn digits(&mut self) -> &'a [u8] {
        let len = self.rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, rest) = self.rest.split_at(len);
        self.rest = rest;
        digits
    }

    /// UTC with microseconds, as we write it.
    fn timestamp(&mut self) -> Option<()> {
        const FORM: &[u8; 27] = b"9999-19-39T29:59:59.999999Z";
        let (text, rest) = self.rest.split_at_checked(FORM.len())?;
        let fits = |(byte, form): (&u8, &u8)| {
            if form.is_ascii_digit() { (b'0'..=*form).contains(byte) } else { byte == form }
        };
        // The tens are bounded by the form; months, days and hours have bounds of their own.
        let two = |at: usize| (text[at], text[at + 1]);
        let from_one = |at: usize, last| ((b'0', b'1')..=last).contains(&two(at));
        let bounded = from_one(5, (b'1', b'2')) && from_one(8, (b'3', b'1')) && two(11) <= (b'2', b'3');
        self.rest = rest;
        (text.iter().zip(FORM).all(fits) && bounded).then_some(())
    }

    /// Up to a closing quote that is passed over.
    fn text(&mut self) -> Option<&'a [u8]> {
        let len = self.rest.iter().position(|&byte| !is_plain(byte))?;
        let (text, rest) = self.rest.split_at(len);
        self.rest = rest.strip_prefix(b"\"")?;
        Some(text)
    }

    /// Gives whether they are an object with `progress` in it.
    fn details(&mut self) -> Option<bool> {
        if self.rest.first() != Some(&b'{') {
            return self.value(0).map(|()| false);
        }
        let mut has_progress = false;
        self.list(b"{", b"}", |reader| {
            has_progress |= reader.key()? == b"progress";
            reader.value(1)
        })?;
        Some(has_progress)
    }

    fn key(&mut self) -> Option<&'a [u8]> {
        self.literal(b"\"")?;
        let key = self.text()?;
        self.literal(b":")?;
        Some(key)
    }

    fn value(&mut self, depth: u32) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.rest.first()? {
            b'"' => {
                self.literal(b"\"")?;
                self.text().map(|_| ())
            }
            b'{' => self.list(b"{", b"}", |reader| {
                reader.key()?;
                reader.value(depth + 1)
            }),
            b'[' => self.list(b"[", b"]", |reader| reader.value(depth + 1)),
            b't' => self.literal(b"true"),
            b'f' => self.literal(b"false"),
            b'n' => self.literal(b"null"),
            _ => self.number(),
        }
    }

    fn list(&mut self, open: &[u8], close: &[u8], mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.literal(open)?;
        if self.literal(close).is_some() {
            return Some(());
        }
        loop {
            item(self)?;
            if self.literal(b",").is_none() {
                return self.literal(close);
            }
        }
    }

    /// An optional sign, digits, an optional fraction; short enough to be in every reader's range.
    fn number(&mut self) -> Option<()> {
        let _ = self.literal(b"-");
        let whole = self.digits();
        if whole.is_empty() || whole.len() > 15 || (whole.len() > 1 && whole[0] == b'0') {
            return None;
        }
        if self.literal(b".").is_some() && !(1..=20).contains(&self.digits().len()) {
            return None;
        }
        Some(())
    }
}

/// Stands for itself in a JSON string.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINE: &str = r#"{"schema_version":1,"seq":17,"timestamp":"2026-01-31T12:00:00.000000Z","kind":"ready","message":"hello","boot_id":"b","details":{"a":[1,-2.5,true,null,"x"],"b":{}}}"#;

    #[test]
    fn our_own_lines_are_plain() {
        let found = head(LINE.as_bytes()).unwrap();
        assert_eq!((found.seq, &*found.kind), (17, "ready"));
        assert!(head(&LINE.as_bytes()[..LINE.len() - 1]).is_none());
        assert!(head(LINE.replace("17", "0").as_bytes()).is_none());
        for wrong in ["2026-13-31", "2026-00-31", "2026-01-32", "2026-01-00"] {
            assert!(head(LINE.replace("2026-01-31", wrong).as_bytes()).is_none(), "{wrong}");
        }
        assert!(head(LINE.replace("T12", "T24").as_bytes()).is_none());
        assert!(head(LINE.replace("hello", "h\\u00e9").as_bytes()).is_none());
        assert!(head(LINE.replace("-2.5", "-").as_bytes()).is_none());
    }

    #[test]
    fn progress_is_a_member_of_details_and_nothing_deeper() {
        let with = |details: &str| {
            let line = LINE.replace(r#"{"a":[1,-2.5,true,null,"x"],"b":{}}"#, details);
            let (quick, long) = (head(line.as_bytes()).unwrap(), EventHead::decode_slowly(line.as_bytes()).unwrap());
            assert_eq!(quick.has_progress, long.has_progress, "{line}");
            quick.has_progress
        };
        assert!(with(r#"{"a":1,"progress":{"name":"x"}}"#));
        assert!(!with(r#"{"a":{"progress":1}}"#));
        assert!(!with(r#"["progress"]"#) && !with(r#""progress""#) && !with("null"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// All numbers of a date and time, those that are none as well.
        #[test]
        fn no_time_that_the_long_way_refuses(
            (month, day, hour) in (0..14u32, 0..33u32, 0..26u32),
            (minute, second) in (prop::sample::select(vec![0, 59, 60]), prop::sample::select(vec![0, 59, 60, 61])),
        ) {
            let time = format!("2026-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
            let text = LINE.replace("2026-01-31T12:00:00", &time);
            let is_plain = head(text.as_bytes()).is_some();
            let long = EventHead::decode_slowly(text.as_bytes());
            // A leap second is read the long way.
            prop_assert_eq!(is_plain, long.is_ok() && second < 60, "{}", text);
        }

        /// Whatever is changed in a line: where this says yes, the long way says the same.
        #[test]
        fn never_more_than_the_long_way(
            changes in prop::collection::vec((any::<prop::sample::Index>(), "[ -~]|\\PC|[\\x00-\\x1f]|[0-9eE.,:{}\\[\\]\"\\\\-]{1,3}"), 1..4),
        ) {
            let mut text = LINE.to_owned();
            for (index, with) in changes {
                let at = index.index(text.len());
                if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
                    text.replace_range(at..=at, &with);
                }
            }
            if let Some(quick) = head(text.as_bytes()) {
                let long = EventHead::decode_slowly(text.as_bytes());
                prop_assert!(long.is_ok(), "{text}");
                let long = long.unwrap();
                prop_assert_eq!((quick.seq, quick.kind, quick.schema_version), (long.seq, long.kind, long.schema_version));
                prop_assert_eq!(quick.has_progress, long.has_progress);
            }
        }
    }
}

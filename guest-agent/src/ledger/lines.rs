//! Cuts a growing file into lines, without holding more than one block of it.
//!
//! ```text
//!   block read at `offset`:   line\n line\n unfinis
//!                             └─ given out ─┘└ read again when there is more
//! ```
//!
//! A line longer than an event may be is never held: its beginning is kept as a sample, the rest is counted until its
//! newline comes, however long that takes.

use pika_cloud_common::EventHead;
use pika_cloud_common::limits::{BAD_LINE_SAMPLE_BYTES, MAX_EVENT_BYTES};

/// How much of a file is read at once; more than two of the longest lines.
pub const BLOCK_BYTES: usize = 256 * 1024;

/// Where in a file the next line begins.
#[derive(Clone, Debug, Default)]
pub struct LineCursor {
    /// The next byte to be read.
    pub offset: u64,
    long: Option<LongLine>,
}

#[derive(Clone, Debug)]
struct LongLine {
    start: u64,
    sample: Vec<u8>,
}

/// One line of the file.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// Whole, without its newline.
    Whole(&'a [u8]),
    /// Longer than an event may be.
    TooLong {
        /// Its length, without its newline.
        bytes: u64,
        /// Its beginning.
        sample: &'a [u8],
    },
}

impl LineCursor {
    /// From the beginning of a file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cuts `block`, which stands at [`LineCursor::offset`], and moves behind what was given out.
    pub fn cut(&mut self, block: &[u8], mut each: impl FnMut(u64, Line<'_>)) {
        let start_offset = self.offset;
        let mut at = 0;
        while let Some(found) = memchr::memchr(b'\n', &block[at..]) {
            let end = at + found;
            if let Some(long) = self.long.take() {
                let bytes = start_offset + end as u64 - long.start;
                each(long.start, Line::TooLong { bytes, sample: &long.sample });
            } else {
                let line = &block[at..end];
                let offset = start_offset + at as u64;
                if line.len() > MAX_EVENT_BYTES {
                    each(offset, Line::TooLong { bytes: line.len() as u64, sample: &line[..BAD_LINE_SAMPLE_BYTES] });
                } else {
                    each(offset, Line::Whole(line));
                }
            }
            at = end + 1;
        }
        let rest = &block[at..];
        if self.long.is_none() && rest.len() > MAX_EVENT_BYTES {
            let sample = rest[..BAD_LINE_SAMPLE_BYTES].to_vec();
            self.long = Some(LongLine { start: start_offset + at as u64, sample });
        }
        if self.long.is_some() {
            at = block.len();
        }
        self.offset = start_offset + at as u64;
    }
}

/// Why a line is left out.
#[derive(Debug)]
pub enum Unfit {
    /// Its event was trimmed already; nobody needs to hear of it.
    Trimmed,
    /// It is no event, for that reason.
    NoEvent(String),
}

/// The reader's rule: a line counts if it is an event whose `seq` is above the last one that counted. A jump is a gap, and
/// the host says so; a repeat is left out.
pub fn judge(line: &[u8], base_seq: u64, last_seq: u64) -> Result<EventHead<'_>, Unfit> {
    // A flood of what is plainly no object is not worth a parser's words.
    if !matches!(line.first(), Some(b'{' | b' ' | b'\t' | b'\r')) {
        return Err(Unfit::NoEvent("not a JSON object".to_owned()));
    }
    match EventHead::decode(line) {
        Ok(head) if head.seq > last_seq => Ok(head),
        Ok(head) if head.seq <= base_seq && head.seq > 0 => Err(Unfit::Trimmed),
        Ok(head) => Err(Unfit::NoEvent(format!("its seq is {}, and {last_seq} was there before", head.seq))),
        Err(error) => Err(Unfit::NoEvent(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut_in_blocks(file: &[u8], block: usize) -> Vec<(u64, u64, Vec<u8>)> {
        let mut cursor = LineCursor::new();
        let mut lines = Vec::new();
        let mut seen = 0;
        // A file that grows by `block` bytes between reads, read as far as it goes.
        while seen < file.len() {
            seen = (seen + block).min(file.len());
            loop {
                let from = usize::try_from(cursor.offset).unwrap();
                let to = (from + BLOCK_BYTES).min(seen);
                cursor.cut(&file[from..to], |offset, line| match line {
                    Line::Whole(line) => lines.push((offset, line.len() as u64, line.to_vec())),
                    Line::TooLong { bytes, sample } => lines.push((offset, bytes, sample.to_vec())),
                });
                if cursor.offset == from as u64 || to == seen {
                    break;
                }
            }
        }
        lines
    }

    proptest! {
        #[test]
        fn growth_does_not_matter(
            lens in prop::collection::vec(prop_oneof![0usize..300, 65_000usize..66_000, 300_000usize..300_010], 0..12),
            block in 1usize..400_000,
        ) {
            let block = block.max(lens.iter().sum::<usize>() / 200);
            let mut file = Vec::new();
            let mut expected = Vec::new();
            for (i, &len) in lens.iter().enumerate() {
                let byte = b'a' + u8::try_from(i).unwrap();
                let kept = if len > MAX_EVENT_BYTES { BAD_LINE_SAMPLE_BYTES } else { len };
                expected.push((file.len() as u64, len as u64, vec![byte; kept]));
                file.resize(file.len() + len, byte);
                file.push(b'\n');
            }
            prop_assert_eq!(cut_in_blocks(&file, block), expected);
        }
    }

    #[test]
    fn what_counts_as_an_event() {
        let line = br#"{"schema_version":1,"seq":7,"timestamp":"2026-01-01T00:00:00Z","kind":"ready","message":""}"#;
        assert_eq!(judge(line, 0, 6).unwrap().seq, 7);
        assert_eq!(judge(line, 0, 2).unwrap().seq, 7);
        assert!(matches!(judge(line, 0, 7), Err(Unfit::NoEvent(_))));
        assert!(matches!(judge(line, 7, 9), Err(Unfit::Trimmed)));
        assert!(matches!(judge(b"\0\0\0", 0, 0), Err(Unfit::NoEvent(_))));
    }
}

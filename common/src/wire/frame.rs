//! Cuts a byte stream into lines and the raw bytes between them. No I/O: the caller reads into [`Decoder::space`].
//!
//! ```text
//!   … }\n  {"log":{"file":"guest.log","offset":0,"len":6}}\n  hello\n  {"heartbeat":…}\n
//!          └────────────────── Line ───────────────────┘    └Bulk┘  └──── Line ───┘
//! ```
//!
//! The decoder does not know which lines announce raw bytes: its caller says so by [`Decoder::expect_bulk`] before it asks
//! for the next frame. Memory is bounded by one line and one read; a decoder that waits for small reads holds little.

use crate::limits::MAX_LINE_BYTES;

/// A piece of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A line without its newline.
    Line(&'a [u8]),
    /// Some of the raw bytes that were announced, in order; never empty.
    Bulk(&'a [u8]),
}

/// The stream is not of this protocol; nothing after this point can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No newline came within the limit.
    #[error("a line is longer than {MAX_LINE_BYTES} bytes: the peer does not speak the session protocol")]
    LineTooLong,
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// `buffer[start..end]` is read and not yet given out.
    start: usize,
    end: usize,
    /// How far behind `start` no newline is.
    scanned: usize,
    bulk_left: u64,
}

impl Decoder {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Room for at least `min` bytes, to be read into; follow it by [`Decoder::filled`]. Where all was given out, what earlier
    /// calls took beyond it is given back.
    pub fn space(&mut self, min: usize) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > 2 * min {
                self.buffer = Vec::new();
            }
        }
        if self.buffer.len() - self.end < min {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            if self.buffer.len() - self.end < min {
                self.buffer.resize(self.end + min, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// `n` bytes were read into [`Decoder::space`].
    ///
    /// # Panics
    /// Where `n` is more than there was space for: the caller's arithmetic is wrong.
    pub fn filled(&mut self, n: usize) {
        assert!(n <= self.buffer.len() - self.end, "more bytes were filled in than there was space for");
        self.end += n;
    }

    /// Takes bytes that the caller holds already.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.filled(bytes.len());
    }

    /// The line just given out is followed by `len` raw bytes.
    pub fn expect_bulk(&mut self, len: u64) {
        self.bulk_left = len;
        self.scanned = 0;
    }

    /// Raw bytes that are still to come.
    pub fn bulk_left(&self) -> u64 {
        self.bulk_left
    }

    /// The next frame; `None` until more bytes are filled in.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        if self.bulk_left > 0 {
            return Ok(self.next_bulk().map(Frame::Bulk));
        }
        let unread = &self.buffer[self.start..self.end];
        match memchr::memchr(b'\n', &unread[self.scanned..]) {
            Some(at) => {
                let len = self.scanned + at;
                self.scanned = 0;
                if len > MAX_LINE_BYTES {
                    return Err(FrameError::LineTooLong);
                }
                let line = self.start..self.start + len;
                self.start += len + 1;
                Ok(Some(Frame::Line(&self.buffer[line])))
            }
            None if unread.len() > MAX_LINE_BYTES => Err(FrameError::LineTooLong),
            None => {
                self.scanned = unread.len();
                Ok(None)
            }
        }
    }

    fn next_bulk(&mut self) -> Option<&[u8]> {
        let available = (self.end - self.start) as u64;
        let take = available.min(self.bulk_left);
        if take == 0 {
            return None;
        }
        self.bulk_left -= take;
        let from = self.start;
        // `take` is at most what the buffer holds.
        self.start += usize::try_from(take).expect("fits the buffer");
        Some(&self.buffer[from..self.start])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_without_end_is_refused() {
        let mut decoder = Decoder::new();
        decoder.feed(&vec![b'x'; MAX_LINE_BYTES]);
        assert_eq!(decoder.next_frame(), Ok(None));
        decoder.feed(b"x");
        assert_eq!(decoder.next_frame(), Err(FrameError::LineTooLong));
    }

    proptest! {
        /// Whatever the cuts, the same lines and the same raw bytes come out.
        #[test]
        fn cuts_do_not_matter(
            parts in prop::collection::vec(("[a-z]{0,20}", prop::collection::vec(any::<u8>(), 0..50)), 0..20),
            cuts in prop::collection::vec(1usize..17, 1..40),
        ) {
            let mut stream = Vec::new();
            for (line, bulk) in &parts {
                stream.extend_from_slice(line.as_bytes());
                stream.push(b'\n');
                stream.extend_from_slice(bulk);
            }
            let mut decoder = Decoder::new();
            let mut got: Vec<(String, Vec<u8>)> = Vec::new();
            let mut cuts = cuts.iter().cycle();
            let mut rest = &stream[..];
            loop {
                while let Some(frame) = decoder.next_frame().unwrap() {
                    match frame {
                        Frame::Line(line) => {
                            let line = String::from_utf8(line.to_vec()).unwrap();
                            let bulk = parts[got.len()].1.len() as u64;
                            got.push((line, Vec::new()));
                            decoder.expect_bulk(bulk);
                        }
                        Frame::Bulk(bytes) => got.last_mut().unwrap().1.extend_from_slice(bytes),
                    }
                }
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                decoder.feed(now);
                rest = later;
            }
            prop_assert_eq!(got, parts);
        }
    }
}

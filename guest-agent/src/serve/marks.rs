//! Where in `events.jsonl` the events that were sent end, so that an acknowledgement finds its place without a search.

use std::collections::VecDeque;

/// More are thinned out: a trim then waits for a later one.
const MAX_MARKS: usize = 1024;

/// Ends of events, in order: a `seq`, and the byte behind its line.
#[derive(Debug, Default)]
pub(super) struct Marks {
    ends: VecDeque<(u64, u64)>,
    /// The last one that is acknowledged.
    acked: Option<(u64, u64)>,
    /// Bytes that went from the file's front since it was opened: what is read until its end is its old self.
    cut: u64,
}

impl Marks {
    /// Everything up to `seq` ends at `end` at the latest.
    pub(super) fn add(&mut self, seq: u64, end: u64) {
        let end = end.saturating_sub(self.cut);
        match self.ends.back_mut() {
            Some(last) if last.0 == seq => last.1 = end,
            _ => self.ends.push_back((seq, end)),
        }
        if self.ends.len() > MAX_MARKS {
            let mut at = 0;
            self.ends.retain(|_| {
                at += 1;
                at % 2 == 1
            });
        }
    }

    /// So many bytes went from the file's front: from here on it is shorter than what is still read of it.
    pub(super) fn cut(&mut self, bytes: u64) {
        self.cut += bytes;
        for (_, end) in self.ends.iter_mut().chain(&mut self.acked) {
            *end = end.saturating_sub(bytes);
        }
    }

    /// The last one that is acknowledged by `seq`.
    pub(super) fn acked(&mut self, seq: u64) -> Option<(u64, u64)> {
        while let Some(first) = self.ends.front().copied().filter(|first| first.0 <= seq) {
            self.acked = Some(first);
            self.ends.pop_front();
        }
        self.acked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_below() {
        let mut marks = Marks::default();
        assert_eq!(marks.acked(9), None);
        for seq in 1..=5000 {
            marks.add(seq * 10, seq * 100);
        }
        marks.add(50_000, 500_001);
        assert_eq!(marks.acked(5), None);
        let (seq, end) = marks.acked(30_000).unwrap();
        assert!((29_000..=30_000).contains(&seq) && end == seq * 10);
        assert_eq!(marks.acked(60_000), Some((50_000, 500_001)));
        assert!(marks.ends.is_empty());
    }

    #[test]
    fn a_trim_moves_them_all() {
        let mut marks = Marks::default();
        marks.add(1, 100);
        marks.add(2, 200);
        assert_eq!(marks.acked(1), Some((1, 100)));
        marks.cut(100);
        // Read from the file that was open before the trim.
        marks.add(3, 300);
        assert_eq!(marks.acked(1), Some((1, 0)));
        assert_eq!(marks.acked(2), Some((2, 100)));
        assert_eq!(marks.acked(3), Some((3, 200)));
    }
}

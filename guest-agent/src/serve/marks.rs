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
}

impl Marks {
    /// Everything up to `seq` ends at `end` at the latest.
    pub(super) fn add(&mut self, seq: u64, end: u64) {
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
}

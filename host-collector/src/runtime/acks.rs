//! What the guest is told that is durable, and how often.
//!
//! A guest that sends and never reads makes acknowledgements pile up in front of it: in our own outbox, which is bounded, and
//! over vsock in the host's kernel, which has no bound of its own against a machine that promises room and takes nothing. So
//! they say only what is news, and sum up what comes close together: a log's name is repeated for bytes of that log alone. But
//! what is not acknowledged takes up the guest's memory, and is dropped at its caps, so that much of it is no small news.

use std::collections::BTreeMap;
use std::time::Duration;

use pika_cloud_common::wire::Ack;

/// How far apart acknowledgements are that say little: a verb that waits for its own (`--wait-ack`) may wait that long. What is
/// the end of something is told at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Bytes of events and logs of which one is told at once: far below a guest's lowest cap, 1 MiB, and far more than it takes.
const MANY_BYTES: u64 = 256 * 1024;

/// What a session's guest knows to be durable, and what it is still to be told.
#[derive(Debug)]
pub(super) struct Acks {
    /// All that was said in this session.
    said: Ack,
    /// All that is durable, of the stream of that name, where that is more.
    owed: Option<(String, Ack)>,
    /// Bytes of the journal and of logs that became durable since the last one.
    bytes: u64,
    /// When the next one may leave, where it says little.
    pause_until: Duration,
}

impl Acks {
    /// Of a session in which nothing was said yet: what was acknowledged in an earlier one may not have arrived there.
    pub(super) fn new() -> Self {
        Self { said: Ack { seq: 0, logs: BTreeMap::new() }, owed: None, bytes: 0, pause_until: Duration::ZERO }
    }

    /// So much is durable by now, with so many bytes that were not before.
    pub(super) fn owe(&mut self, stream_id: String, durable: Ack, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.owed = (durable != self.said).then_some((stream_id, durable));
    }

    /// What is to be said now in a session of that stream; numbers of another would make the guest forget what nobody has.
    pub(super) fn take_due(&mut self, stream_id: &str, at_once: bool, now: Duration) -> Option<Ack> {
        if !at_once && self.due().is_none_or(|due| now < due) {
            return None;
        }
        let (_, durable) = self.owed.take().filter(|(of, _)| of == stream_id)?;
        self.bytes = 0;
        self.pause_until = now + PAUSE;
        let is_news = |file: &String, mark: u64| self.said.logs.get(file) != Some(&mark);
        let logs = durable.logs.iter().filter(|&(file, &mark)| is_news(file, mark));
        let ack = Ack { seq: durable.seq, logs: logs.map(|(file, &mark)| (file.clone(), mark)).collect() };
        self.said = durable;
        Some(ack)
    }

    /// When something is due.
    pub(super) fn due(&self) -> Option<Duration> {
        let at_once = self.bytes >= MANY_BYTES;
        self.owed.is_some().then_some(if at_once { Duration::ZERO } else { self.pause_until })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(seq: u64, logs: &[(&str, u64)]) -> Ack {
        Ack { seq, logs: logs.iter().map(|&(file, mark)| (file.to_owned(), mark)).collect() }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn only_what_is_news_is_said() {
        let mut acks = Acks::new();
        acks.owe("s".to_owned(), ack(1, &[("a.log", 5), ("b.log", 7)]), 0);
        assert_eq!(acks.take_due("s", false, ms(0)), Some(ack(1, &[("a.log", 5), ("b.log", 7)])));
        acks.owe("s".to_owned(), ack(1, &[("a.log", 6), ("b.log", 7)]), 0);
        assert_eq!(acks.take_due("s", false, ms(200)), Some(ack(1, &[("a.log", 6)])));
        acks.owe("s".to_owned(), ack(2, &[("a.log", 6), ("b.log", 7)]), 0);
        assert_eq!(acks.take_due("s", false, ms(400)), Some(ack(2, &[])));
        acks.owe("s".to_owned(), ack(2, &[("a.log", 6), ("b.log", 7)]), 0);
        assert_eq!((acks.take_due("s", false, ms(600)), acks.due()), (None, None), "nothing is new");
    }

    /// Invariant 5, on both sides.
    #[test]
    fn however_often_something_comes_they_are_far_apart_and_the_last_one_is_not() {
        let mut acks = Acks::new();
        let mut said = 0;
        for milli in 0..1000 {
            acks.owe("s".to_owned(), ack(milli + 1, &[]), 0);
            said += acks.take_due("s", false, ms(milli)).map_or(0, |_| 1);
        }
        assert_eq!((said, acks.due()), (10, Some(ms(1000))));
        acks.owe("s".to_owned(), ack(1001, &[]), 0);
        assert_eq!(acks.take_due("s", true, ms(999)), Some(ack(1001, &[])));
        assert_eq!(acks.due(), None);
    }

    /// A guest whose cap is the lowest one would have to drop what it says meanwhile.
    #[test]
    fn much_that_is_new_is_told_at_once() {
        let mut acks = Acks::new();
        acks.owe("s".to_owned(), ack(1, &[]), 0);
        acks.take_due("s", false, ms(0)).unwrap();
        acks.owe("s".to_owned(), ack(2, &[("a.log", 1)]), MANY_BYTES - 1);
        assert_eq!(acks.take_due("s", false, ms(1)), None);
        acks.owe("s".to_owned(), ack(3, &[("a.log", 1)]), 1);
        assert_eq!(acks.take_due("s", false, ms(1)), Some(ack(3, &[("a.log", 1)])));
        // Where a guest says that it is far along, that is no byte.
        acks.owe("s".to_owned(), ack(3, &[("a.log", 1 << 40)]), 1);
        assert_eq!((acks.take_due("s", false, ms(2)), acks.due()), (None, Some(ms(101))));
    }

    #[test]
    fn what_is_owed_of_another_stream_is_not_said() {
        let mut acks = Acks::new();
        acks.owe("s".to_owned(), ack(1, &[]), 0);
        assert_eq!((acks.take_due("other", true, ms(0)), acks.due()), (None, None));
    }
}

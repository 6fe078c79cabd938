//! A model of the bytes between a host and a guest's agent.
//!
//! ```text
//!   host ──► to_guest ──► (delay, pieces) ──► session        a pipe: bytes in order, each with its time of arrival
//!   host ◄── to_host  ◄── (delay, pieces) ◄── session        cut: what is under way ends at any byte, and each end
//!                                                            learns of it at a time of its own, or never (half-open)
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use super::random::Random;

/// One direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the host.
    ToGuest,
    /// From the guest.
    ToHost,
}

/// What an end finds when it looks.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Nothing for now.
    Nothing,
    /// Bytes, never none.
    Bytes(Vec<u8>),
    /// No more will come.
    End,
}

#[derive(Debug)]
struct Pipe {
    queue: VecDeque<(Duration, Vec<u8>)>,
    held: usize,
    /// Nothing overtakes: the time of the last arrival.
    last: Duration,
    /// When the reader learns that no more comes.
    end: Option<Duration>,
    /// What is sent now goes nowhere.
    dead: bool,
}

impl Pipe {
    fn new() -> Self {
        Self { queue: VecDeque::new(), held: 0, last: Duration::ZERO, end: None, dead: false }
    }
}

/// How a link behaves.
#[derive(Clone, Copy, Debug)]
pub struct Nature {
    /// The least and the most time a piece takes.
    pub delay: (Duration, Duration),
    /// Bytes under way in one direction before its sender must wait.
    pub capacity: usize,
    /// Reads are cut at any byte.
    pub splits: bool,
}

/// A stream between one host and one session.
#[derive(Debug)]
pub struct Link {
    to_guest: Pipe,
    to_host: Pipe,
    nature: Nature,
    random: Random,
    cut: bool,
}

impl Link {
    /// One that holds.
    pub fn new(nature: Nature, random: Random) -> Self {
        Self { to_guest: Pipe::new(), to_host: Pipe::new(), nature, random, cut: false }
    }

    fn pipe(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::ToGuest => &mut self.to_guest,
            Way::ToHost => &mut self.to_host,
        }
    }

    /// Whether it was cut.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// How much may be sent now.
    pub fn room(&mut self, way: Way) -> usize {
        let capacity = self.nature.capacity;
        capacity.saturating_sub(self.pipe(way).held)
    }

    /// Sends; gives the time of arrival, where it arrives at all.
    pub fn send(&mut self, way: Way, bytes: &[u8], now: Duration) -> Option<Duration> {
        let delay = self.random.time(self.nature.delay.0, self.nature.delay.1);
        let pipe = self.pipe(way);
        if pipe.end.is_some() || bytes.is_empty() {
            return None;
        }
        pipe.held += bytes.len();
        if pipe.dead {
            return None;
        }
        pipe.last = pipe.last.max(now + delay);
        pipe.queue.push_back((pipe.last, bytes.to_vec()));
        Some(pipe.last)
    }

    /// The sender is done; gives the time when the reader learns it.
    pub fn close(&mut self, way: Way, now: Duration) -> Option<Duration> {
        let delay = self.nature.delay.0;
        let pipe = self.pipe(way);
        if pipe.dead || pipe.end.is_some() {
            return None;
        }
        pipe.last = pipe.last.max(now + delay);
        pipe.end = Some(pipe.last);
        pipe.end
    }

    /// Reads at most `max` bytes that have arrived by `now`.
    pub fn read(&mut self, way: Way, max: usize, now: Duration) -> Read {
        let splits = self.nature.splits && self.random.chance(300);
        let most = if splits { self.random.index(max.min(64)) + 1 } else { max };
        let pipe = self.pipe(way);
        let Some((at, bytes)) = pipe.queue.front_mut() else {
            return if pipe.end.is_some_and(|end| end <= now) { Read::End } else { Read::Nothing };
        };
        if *at > now {
            return Read::Nothing;
        }
        let taken = if bytes.len() <= most {
            pipe.queue.pop_front().map(|(_, bytes)| bytes).unwrap_or_default()
        } else {
            bytes.drain(..most).collect()
        };
        pipe.held -= taken.len();
        Read::Bytes(taken)
    }

    /// When the reader has something to find next.
    pub fn next(&mut self, way: Way) -> Option<Duration> {
        let pipe = self.pipe(way);
        pipe.queue.front().map(|(at, _)| *at).or(pipe.end)
    }

    /// Cuts it. Each end learns of it after its time, or never.
    pub fn cut(&mut self, now: Duration, guest_learns: Option<Duration>, host_learns: Option<Duration>) {
        self.cut = true;
        let Self { to_guest, to_host, random, .. } = self;
        for (pipe, learns) in [(to_guest, guest_learns), (to_host, host_learns)] {
            let whole = random.index(pipe.queue.len() + 1);
            let mut torn = pipe.queue.drain(whole..).next();
            if let Some((_, bytes)) = &mut torn {
                bytes.truncate(random.index(bytes.len()));
            }
            pipe.queue.extend(torn.filter(|(_, bytes)| !bytes.is_empty()));
            pipe.held = pipe.queue.iter().map(|(_, bytes)| bytes.len()).sum();
            pipe.dead = true;
            pipe.end = learns.map(|after| pipe.last.max(now + after));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(seed: u64) -> Link {
        let delay = (Duration::from_millis(1), Duration::from_millis(9));
        Link::new(Nature { delay, capacity: 1000, splits: true }, Random::new(seed))
    }

    fn drain(link: &mut Link, way: Way, now: Duration) -> (Vec<u8>, bool) {
        let mut all = Vec::new();
        loop {
            match link.read(way, 1000, now) {
                Read::Bytes(bytes) => all.extend(bytes),
                Read::Nothing => return (all, false),
                Read::End => return (all, true),
            }
        }
    }

    #[test]
    fn bytes_arrive_once_in_order_and_then_the_end() {
        for seed in 0..50 {
            let mut link = link(seed);
            for piece in [&b"one "[..], b"two ", b"three"] {
                link.send(Way::ToHost, piece, Duration::ZERO).unwrap();
            }
            let end = link.close(Way::ToHost, Duration::ZERO).unwrap();
            assert_eq!(drain(&mut link, Way::ToHost, Duration::ZERO), (Vec::new(), false));
            assert_eq!(drain(&mut link, Way::ToHost, end), (b"one two three".to_vec(), true));
            assert_eq!(link.room(Way::ToHost), 1000);
        }
    }

    #[test]
    fn a_cut_leaves_a_prefix_and_may_leave_an_end_that_believes() {
        let late = Duration::from_secs(9);
        let mut lengths = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut link = link(seed);
            link.send(Way::ToHost, b"abc", Duration::ZERO);
            link.send(Way::ToHost, b"def", Duration::ZERO);
            link.cut(Duration::ZERO, Some(Duration::ZERO), None);
            assert_eq!(link.send(Way::ToHost, b"more", Duration::ZERO), None);
            let (found, ended) = drain(&mut link, Way::ToHost, late);
            assert!(b"abcdef".starts_with(&found) && !ended);
            assert_eq!(drain(&mut link, Way::ToGuest, late), (Vec::new(), true));
            lengths.insert(found.len());
        }
        assert_eq!(lengths.len(), 7);
    }
}

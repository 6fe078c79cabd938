//! A model of one instance's inside: its files, what runs in it, and its agent's sessions.
//!
//! ```text
//!   Guest ─ Machine ─ files (ledger), run (workload and supervisor), boot
//!         │            └ truth: every event that was ever given a number, whatever became of the files
//!         └ sessions: the real core of the agent's session each, over bytes that the world moves
//!
//!   boot ──► up ── halt (power, kill) ──► down          freeze: nothing moves until it thaws
//!             └ snapshot … restore: files and run as they were, sessions gone
//! ```

pub mod ledger;
pub mod session;
pub mod workload;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use pika_guest_agent::session::core::Dirt;

use self::ledger::{Files, Line, Stream};
pub use self::session::{Manner, Session};
use self::workload::{Afterwards, Run, Script};
use super::random::Random;

/// What a stream has ever said.
#[derive(Debug, Default)]
pub struct Told {
    /// The lines by their number, from 1, as they stand now.
    pub lines: Vec<Rc<str>>,
    /// What stood there before the guest was rewound.
    pub unsaid: Vec<(u64, Rc<str>)>,
    /// The request that ran in it.
    pub request_id: Option<String>,
    /// Its files are gone.
    pub lost: bool,
    /// It was rewound.
    pub rewound: bool,
    /// What its log is made from, and how long it was at most.
    pub log: (u64, u64),
}

/// The guest's inside.
#[derive(Debug)]
pub struct Machine {
    /// What lies on its disk.
    pub files: Files,
    /// The supervisor, while it lives.
    pub run: Option<Run>,
    /// The kernel's `boot_id`.
    pub boot_id: String,
    /// When it booted.
    pub booted_at: Duration,
    /// What it runs.
    pub script: Script,
    /// Everything that was said, by `stream_id`.
    pub truth: BTreeMap<String, Told>,
    /// How often each request's workload was started (Invariant 9).
    pub starts: BTreeMap<String, u32>,
    /// Archives that were sent to their end: stream, last event and log bytes in front of them.
    pub archived: Vec<(String, u64, u64)>,
    /// How often what is acknowledged is given back.
    pub trims_per_mille: u32,
    /// Its name as a machine, if it is one.
    pub uuid: Option<String>,
    /// It wants to power off.
    pub powers_off: bool,
    pub(crate) random: Random,
    dirt: Dirt,
}

#[derive(Debug)]
struct Snapshot {
    files: Files,
    run: Option<Run>,
    starts: BTreeMap<String, u32>,
    boot_id: String,
    at: Duration,
}

/// One instance's inside.
#[derive(Debug)]
pub struct Guest {
    /// Its files and what runs.
    pub machine: Machine,
    /// Its agent's sessions.
    pub sessions: Vec<Session>,
    /// Whether it runs.
    pub up: bool,
    /// It stands still until then.
    pub frozen_until: Option<Duration>,
    boots: u32,
    snapshot: Option<Box<Snapshot>>,
}

impl Guest {
    /// One that was never started.
    pub fn new(script: Script, random: Random) -> Self {
        let machine = Machine {
            files: Files::default(),
            run: None,
            boot_id: String::new(),
            booted_at: Duration::ZERO,
            script,
            truth: BTreeMap::new(),
            starts: BTreeMap::new(),
            archived: Vec::new(),
            trims_per_mille: 100,
            uuid: None,
            powers_off: false,
            random,
            dirt: Dirt::default(),
        };
        Self { machine, sessions: Vec::new(), up: false, frozen_until: None, boots: 0, snapshot: None }
    }

    /// Starts it; `keeps` says whether its files outlived the boot.
    pub fn boot(&mut self, keeps: bool, now: Duration) {
        self.halt();
        if !keeps {
            self.machine.lose_files();
        }
        self.boots += 1;
        self.up = true;
        self.machine.booted_at = now;
        self.machine.boot_id = format!("boot-{}-{:08x}", self.boots, self.machine.random.below(1 << 32));
    }

    /// Another instance has its name now: nothing of the old one is left.
    pub fn scrap(&mut self) {
        self.halt();
        self.snapshot = None;
        self.machine.lose_files();
    }

    /// Everything in it ends at once.
    pub fn halt(&mut self) {
        self.up = false;
        self.frozen_until = None;
        self.sessions.clear();
        self.machine.run = None;
        self.machine.powers_off = false;
    }

    /// Its supervisor and workload are killed.
    pub fn kill_supervisor(&mut self, now: Duration) {
        self.machine.run = None;
        // A session that is open sees the process end.
        if !self.sessions.is_empty() {
            self.machine.settle(true, now);
        }
    }

    /// Remembers how it is.
    pub fn snapshot(&mut self, now: Duration) {
        let Machine { files, run, starts, boot_id, .. } = &self.machine;
        let (files, run, starts, boot_id) = (files.clone(), run.clone(), starts.clone(), boot_id.clone());
        self.snapshot = Some(Box::new(Snapshot { files, run, starts, boot_id, at: now }));
    }

    /// Goes back to what it remembers; says whether there was anything.
    pub fn restore(&mut self, now: Duration) -> bool {
        let Some(snapshot) = self.snapshot.take() else { return false };
        let Snapshot { files, mut run, starts, boot_id, at } = *snapshot;
        self.halt();
        if let Some(run) = &mut run {
            run.shift(now.saturating_sub(at));
        }
        let machine = &mut self.machine;
        (machine.files, machine.run, machine.starts, machine.boot_id) = (files, run, starts, boot_id);
        machine.rewind_truth();
        self.up = true;
        true
    }

    /// Whether it stands still.
    pub fn is_frozen(&self, now: Duration) -> bool {
        self.frozen_until.is_some_and(|until| now < until)
    }

    /// A session of that number.
    pub fn session(&mut self, id: u64) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// The agent takes a connection.
    pub fn accept(&mut self, id: u64, manner: Manner, now: Duration) {
        self.sessions.push(Session::new(id, manner, now));
    }

    /// Bytes came for a session; `None` where the host closed.
    pub fn feed(&mut self, id: u64, bytes: Option<&[u8]>, now: Duration) {
        let Self { machine, sessions, .. } = self;
        let Some(session) = sessions.iter_mut().find(|session| session.id == id) else { return };
        match bytes {
            Some(bytes) => session.feed(bytes, machine, now),
            None => session.host_closed(machine, now),
        }
        // A release is seen at once by a supervisor that waits for it.
        self.machine.tick(now);
        self.settle_down(now);
    }

    /// Some of a session's output was taken.
    pub fn wrote(&mut self, id: u64, now: Duration) {
        let Self { machine, sessions, .. } = self;
        if let Some(session) = sessions.iter_mut().find(|session| session.id == id) {
            session.wrote(machine, now);
            session.work(machine, now);
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Duration) {
        if !self.up || self.is_frozen(now) {
            return;
        }
        self.frozen_until = None;
        self.machine.tick(now);
        self.settle_down(now);
    }

    /// Every session looks at what changed, until nothing does.
    fn settle_down(&mut self, now: Duration) {
        let Self { machine, sessions, .. } = self;
        for _ in 0..4 {
            machine.note();
            let dirt = std::mem::take(&mut machine.dirt);
            for session in sessions.iter_mut() {
                session.look(dirt, machine, now);
                session.work(machine, now);
            }
            if !machine.dirt.any() {
                break;
            }
        }
        machine.note();
    }

    /// When time alone changes something.
    pub fn next_tick(&self) -> Option<Duration> {
        if !self.up {
            return None;
        }
        let run = self.machine.run.as_ref().and_then(Run::next_tick);
        let sessions = self.sessions.iter().filter(|session| !session.is_over()).map(Session::next_tick);
        let due = sessions.chain(run).min();
        match self.frozen_until {
            Some(thaw) => Some(due.map_or(thaw, |due| due.max(thaw))),
            None => due,
        }
    }
}

impl Machine {
    /// The stream of this boot.
    pub fn stream(&mut self) -> &mut Stream {
        if self.files.current.as_ref().is_some_and(|stream| stream.boot_id != self.boot_id) {
            self.note();
        }
        self.files.stream(&self.boot_id, &mut self.random)
    }

    /// Moves the stream aside and begins the next.
    pub fn begin_stream(&mut self) {
        self.note();
        self.files.begin(&self.boot_id, &mut self.random);
        self.changed();
    }

    /// The files changed.
    pub fn changed(&mut self) {
        self.dirt = Dirt::ALL;
    }

    /// A signal for the workload.
    pub fn signal(&mut self, number: i32, now: Duration) {
        if let Some(run) = &mut self.run {
            run.signal(number, self.script.obeys, now, &mut self.random);
        }
    }

    fn tick(&mut self, now: Duration) {
        let Some(run) = &mut self.run else { return };
        let Some((stream, _)) = self.files.find(&run.stream_id) else { return };
        let ticked = run.tick(&self.script, stream, now, &mut self.random);
        if ticked.began {
            let request_id = stream.request_id.clone().unwrap_or_default();
            *self.starts.entry(request_id).or_default() += 1;
        }
        if ticked.wrote {
            self.changed();
        }
        if ticked.gone {
            self.run = None;
        }
        self.powers_off |= match self.script.afterwards {
            Afterwards::Stay => false,
            Afterwards::PowerOff => ticked.gone,
            Afterwards::PowerOffAtOnce => ticked.ended,
        };
    }

    /// Takes down what was said since the last time.
    fn note(&mut self) {
        let Some(stream) = &self.files.current else { return };
        if !self.truth.contains_key(&stream.id) {
            self.truth.insert(stream.id.clone(), Told::default());
        }
        let Some(told) = self.truth.get_mut(&stream.id) else { return };
        told.log = (stream.key, told.log.1.max(stream.log));
        if stream.request_id.is_some() && told.request_id != stream.request_id {
            told.request_id.clone_from(&stream.request_id);
        }
        let noted = told.lines.len() as u64;
        if stream.last_seq > noted {
            let new = stream.lines[stream.place_behind(noted) - stream.trimmed..].iter();
            told.lines.extend(new.filter_map(|line| match line {
                Line::Event(event) => Some(Rc::clone(&event.text)),
                Line::Bad(_) => None,
            }));
        }
    }

    fn lose_files(&mut self) {
        self.note();
        self.truth.values_mut().for_each(|told| told.lost = true);
        self.files = Files::default();
    }

    /// What is in the files now is what counts; what was said beyond it was unsaid.
    fn rewind_truth(&mut self) {
        let Self { files, truth, .. } = self;
        for (id, told) in truth {
            match files.find(id) {
                None => told.lost = true,
                Some((stream, _)) => {
                    let kept = usize::try_from(stream.last_seq).unwrap_or(usize::MAX).min(told.lines.len());
                    told.rewound |= kept < told.lines.len();
                    let unsaid = told.lines.drain(kept..).enumerate();
                    told.unsaid.extend(unsaid.map(|(at, line)| ((kept + at + 1) as u64, line)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! What runs in a guest, and the supervisor around it, as `guest_agent::supervise` does it.
//!
//! ```text
//!   accepted ── a moment ──► Running ── its end, TERM, KILL, time is up ──► terminal event ──► Staying ── released, or
//!      │ killed                 │ killed                                     (lock free)          10 s ──► gone
//!      └ started by the next    └ `failed {supervisor_lost}` by whoever looks
//! ```

use std::time::Duration;

use pika_cloud_common::State;
use pika_cloud_common::limits::RELEASE_TIMEOUT;

use super::ledger::{Line, Stream, Words};
use crate::sim::random::Random;

/// One thing that a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Says `ready`.
    Ready,
    /// Says how far it is.
    Progress,
    /// Writes so many bytes of output.
    Output(u64),
    /// Writes a line that is no event where the events stand.
    BadLine,
    /// Leaves a file of so many bytes.
    Artifact(usize),
    /// Says its last word itself.
    LastWord(bool),
    /// Says progress so many times at once.
    Flood(u32),
    /// Ends with this code.
    Exit(i32),
    /// Is ended by this signal.
    Signalled(i32),
}

/// What a guest does when its workload has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It stays.
    Stay,
    /// It powers off once the supervisor has gone, which waits for the release.
    PowerOff,
    /// It powers off at once.
    PowerOffAtOnce,
}

/// What a workload does, each act so long after the one before. One that does not end runs for ever.
#[derive(Clone, Debug)]
pub struct Script {
    /// In order.
    pub acts: Vec<(Duration, Act)>,
    /// It ends at a TERM.
    pub obeys: bool,
    /// What comes behind it.
    pub afterwards: Afterwards,
}

/// Where a supervisor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Spawning,
    Running,
    Staying,
}

/// A supervisor that is alive.
#[derive(Clone, Debug)]
pub struct Run {
    /// The stream that it writes.
    pub stream_id: String,
    stage: Stage,
    at: usize,
    /// The next act.
    next_at: Option<Duration>,
    /// When it is sent TERM, or KILL.
    deadline: Option<Duration>,
    limit: Option<Duration>,
    grace: Duration,
    timed_out: bool,
    /// It will end by this signal, then.
    ending: Option<(Duration, i32)>,
}

/// What a tick of a supervisor came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticked {
    /// It changed files.
    pub wrote: bool,
    /// The workload itself was started.
    pub began: bool,
    /// The workload has ended.
    pub ended: bool,
    /// The supervisor is gone.
    pub gone: bool,
}

impl Run {
    /// One that was just spawned.
    pub fn new(stream_id: &str, timeout_secs: u64, grace_secs: u64, now: Duration, random: &mut Random) -> Self {
        Self {
            stream_id: stream_id.to_owned(),
            stage: Stage::Spawning,
            at: 0,
            next_at: Some(now + random.millis(1, 40)),
            deadline: None,
            limit: (timeout_secs > 0).then(|| Duration::from_secs(timeout_secs)),
            grace: Duration::from_secs(grace_secs),
            timed_out: false,
            ending: None,
        }
    }

    /// Whether it holds the supervisor's lock.
    pub fn holds_lock(&self) -> bool {
        self.stage != Stage::Staying
    }

    /// Moves its times, for a guest that stood still or was restored.
    pub fn shift(&mut self, by: Duration) {
        for at in [&mut self.next_at, &mut self.deadline].into_iter().flatten() {
            *at += by;
        }
        if let Some((at, _)) = &mut self.ending {
            *at += by;
        }
    }

    /// When it has something to do.
    pub fn next_tick(&self) -> Option<Duration> {
        [self.next_at, self.deadline, self.ending.map(|(at, _)| at)].into_iter().flatten().min()
    }

    /// A signal comes in.
    pub fn signal(&mut self, number: i32, obeys: bool, now: Duration, random: &mut Random) {
        let after = match number {
            9 => Duration::ZERO,
            _ if obeys => random.millis(1, 300),
            _ => return,
        };
        if self.stage == Stage::Running {
            let ending = (now + after, number);
            self.ending = Some(self.ending.map_or(ending, |earlier| earlier.min(ending)));
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, script: &Script, stream: &mut Stream, now: Duration, random: &mut Random) -> Ticked {
        let mut ticked = Ticked::default();
        if self.stage == Stage::Staying {
            ticked.gone = stream.released || self.deadline.is_some_and(|deadline| deadline <= now);
            return ticked;
        }
        while self.next_at.is_some_and(|at| at <= now) && self.stage != Stage::Staying {
            self.next_at = None;
            ticked.wrote = true;
            if self.stage == Stage::Spawning {
                self.begin(stream, now);
                ticked.began = true;
            } else {
                self.act(script.acts[self.at - 1].1, stream, now);
            }
            if self.stage == Stage::Running {
                self.next_at = script.acts.get(self.at).map(|(after, _)| now + *after);
                self.at += 1;
            }
        }
        if self.stage == Stage::Running {
            ticked.wrote |= self.hurry(script, stream, now, random);
        }
        ticked.ended = self.stage == Stage::Staying;
        ticked
    }

    fn begin(&mut self, stream: &mut Stream, now: Duration) {
        self.stage = Stage::Running;
        stream.supervised = true;
        stream.append(&Words { kind: State::Starting, message: "", details: "" }, now);
        self.deadline = self.limit.map(|limit| now + limit);
    }

    fn act(&mut self, act: Act, stream: &mut Stream, now: Duration) {
        let state = stream.state.clone().unwrap_or(State::Starting);
        match act {
            Act::Ready => drop(stream.append(&Words { kind: State::Ready, message: "ready", details: "" }, now)),
            Act::Progress => progress(stream, &state, now),
            Act::Flood(count) => (0..count).for_each(|_| progress(stream, &state, now)),
            Act::Output(bytes) => stream.log += bytes,
            Act::BadLine => stream.lines.push(Line::Bad("{\"seq\": no event".into())),
            Act::Artifact(size) => {
                let path = format!("out/file-{:03}", stream.artifacts.len());
                stream.artifacts.push(super::ledger::Artifact { path, size });
            }
            Act::LastWord(good) => {
                let kind = if good { State::Completed } else { State::Failed };
                stream.append(&Words { kind, message: "by itself", details: "" }, now);
            }
            Act::Exit(code) => self.end(stream, code, "", now),
            Act::Signalled(signal) => self.end(stream, 128 + signal, &format!(",\"signal\":{signal}"), now),
        }
    }

    /// Time limit and signals.
    fn hurry(&mut self, script: &Script, stream: &mut Stream, now: Duration, random: &mut Random) -> bool {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            if self.timed_out {
                self.signal(9, script.obeys, now, random);
                self.deadline = None;
            } else {
                self.timed_out = true;
                self.signal(15, script.obeys, now, random);
                self.deadline = Some(now + self.grace);
            }
        }
        let Some((at, signal)) = self.ending.filter(|(at, _)| *at <= now) else { return false };
        debug_assert!(at <= now);
        if self.timed_out {
            let secs = self.limit.unwrap_or_default().as_secs();
            let more = format!(",\"timed_out\":{{\"watchdog\":\"run\",\"secs\":{secs}}}");
            self.end(stream, 124, &more, now);
        } else {
            self.end(stream, 128 + signal, &format!(",\"signal\":{signal}"), now);
        }
        true
    }

    fn end(&mut self, stream: &mut Stream, code: i32, more: &str, now: Duration) {
        let kind = if code == 0 { State::Completed } else { State::Failed };
        let details = format!("{{\"exit_code\":{code}{more}}}");
        if stream.append(&Words { kind, message: "the workload ended", details: &details }, now).is_none() {
            // It said its last word itself; the code is recorded with it.
            stream.status_version += 1;
        }
        self.stage = Stage::Staying;
        (self.next_at, self.ending) = (None, None);
        self.deadline = Some(now + RELEASE_TIMEOUT);
    }
}

fn progress(stream: &mut Stream, state: &State, now: Duration) {
    let details = "{\"progress\":{\"name\":\"build\",\"fraction\":0.5}}";
    stream.append(&Words { kind: state.clone(), message: "on", details }, now);
}

/// Writes that a run was lost, where one is owed and nobody supervises it.
pub fn settle(stream: &mut Stream, run: Option<&Run>, owed: bool, now: Duration) -> bool {
    let held = run.is_some_and(|run| run.holds_lock() && run.stream_id == stream.id);
    if !owed || held || stream.terminal.is_some() {
        return false;
    }
    let message = "the supervisor of the workload ended without a word";
    stream.append(&Words { kind: State::Failed, message, details: "{\"supervisor_lost\":true}" }, now).is_some()
}

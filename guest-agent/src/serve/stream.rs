//! Moves bytes between the session's core, the files and the host. It decides nothing.
//!
//! ```text
//!            ┌──────────── poll: input, output, files changed, supervisor ended, signal, deadline ──────────┐
//!   lines ──►│ core ── actions ──► files, supervisor                                                        │
//!            │      ── work ─────► a block of events, a document, one chunk ──► output buffer ── write ─────┼──► host
//!            └──────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Everything is bounded: the input by one line, the output by its buffer (nothing more is read from the files while it is
//! full), a wait by the core's deadline. TERM, INT and HUP end the session with a word to the host.

use std::path::Path;
use std::time::{Duration, Instant};

use pika_cloud_common::wire::{Decoder, ErrorCode, Frame, SessionError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use rustix::io::Errno;

use super::boot;
use super::files::{Callers, Files};
use super::output::Output;
use crate::ledger::prune_previous;
use crate::session::core::{Action, Core, Ending, Input, Work};
use crate::supervise::signals::Signals;
use crate::watch::timespec;

/// How much of the host's words is read at once.
const READ_BYTES: usize = 64 * 1024;
/// How long the last words may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves one session with one of `callers` on standard input and output, about the files at `root`.
pub fn serve_stdio(root: &Path, callers: Callers) -> Ending {
    boot::settle(root);
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let mut session = Session {
        input: stdin.as_fd(),
        input_open: true,
        decoder: Decoder::new(),
        output: Output::new(stdout.as_fd()),
        core: Core::new(Instant::now()),
        files: Files::new(root, callers),
        // Without it they end us without a word.
        signals: Signals::of(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP]).ok(),
        supervisor: None,
        look_for_supervisor: true,
    };
    let ending = session.run();
    session.last_words();
    if let Some(ledger) = session.files.ledger() {
        prune_previous(ledger.folder());
    }
    ending
}

struct Session<'a> {
    input: BorrowedFd<'a>,
    input_open: bool,
    decoder: Decoder,
    output: Output<'a>,
    core: Core,
    files: Files,
    /// What asks us to end.
    signals: Option<Signals>,
    /// Readable when the supervisor has ended.
    supervisor: Option<OwnedFd>,
    /// One may have begun since the last look.
    look_for_supervisor: bool,
}

impl Session<'_> {
    fn run(&mut self) -> Ending {
        loop {
            self.work();
            if let Some(ending) = self.core.ending() {
                return ending;
            }
            match self.output.write() {
                Ok(true) => self.step(Input::Wrote),
                Ok(false) => {}
                Err(_) => return Ending::HostClosed,
            }
            if let Some(ending) = self.core.ending() {
                return ending;
            }
            self.wait();
        }
    }

    /// Does what the core wants for as long as the output has room.
    fn work(&mut self) {
        while self.output.has_room() {
            let Some(work) = self.core.next_work(Instant::now()) else { return };
            if work.is_bulk() && !self.output.is_empty() {
                return;
            }
            self.look_for_supervisor |= matches!(work, Work::Events | Work::Heartbeat);
            match self.files.perform(work, self.core.pending_ack(), self.output.buffer()) {
                Ok(done) => self.step(Input::Did(work, done)),
                Err(refusal) => self.step(Input::Refused(refusal)),
            }
        }
    }

    fn step(&mut self, input: Input<'_>) {
        let actions = self.core.step(input, Instant::now());
        for action in actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        let done = match action {
            Action::Say(message) => {
                message.write(self.output.buffer());
                Ok(None)
            }
            Action::Open(hello) => self.files.open(&hello).map(|opened| Some(Input::Opened(opened))),
            Action::Start(start) => self.files.start(&start).map(|message| {
                message.write(self.output.buffer());
                None
            }),
            Action::Signal(number) => self.files.signal(number).map(|()| None),
            Action::Archive(archive) => self.files.archive(&archive).map(|()| None),
            Action::Release => self.files.release().map(|()| None),
        };
        match done {
            Ok(None) => {}
            Ok(Some(input)) => self.step(input),
            Err(refusal) => self.step(Input::Refused(refusal)),
        }
    }

    /// Waits for something to happen, and takes note of it.
    fn wait(&mut self) {
        if self.supervisor.is_none() && std::mem::take(&mut self.look_for_supervisor) {
            self.supervisor = self.files.watch_supervisor();
        }
        let mut timeout = self.core.until_deadline(Instant::now());
        // Work that waits for room in the output must not wait for the clock.
        let busy = self.core.next_work(Instant::now()).is_some() && self.output.is_empty();
        if busy {
            timeout = Duration::ZERO;
        } else if let Some(interval) = self.files.interval() {
            timeout = timeout.min(interval);
        }
        let ready = self.poll(timeout);
        if ready.signals && self.signals.as_ref().is_some_and(|signals| signals.next().is_some()) {
            self.step(Input::Shutdown);
        }
        if ready.input {
            self.read_input();
        }
        if ready.supervisor {
            self.supervisor = None;
            if let Err(refusal) = self.files.settle_lost() {
                self.step(Input::Refused(refusal));
            }
        }
        if ready.files {
            let (dirt, owner) = self.files.changes();
            if owner && self.core.is_owner() && self.files.is_superseded() {
                self.step(Input::Superseded);
            }
            self.step(Input::Changed(dirt));
        }
        self.step(Input::Tick);
    }

    fn poll(&self, timeout: Duration) -> Ready {
        let never = PollFlags::empty();
        let input = PollFd::new(&self.input, if self.input_open { PollFlags::IN } else { never });
        let output_fd = self.output.fd();
        let output = PollFd::new(&output_fd, if self.output.is_empty() { never } else { PollFlags::OUT });
        let mut fds = vec![input, output];
        // What there may be beside them, and where in the list it stands.
        let files = self.files.watch_fd();
        let extra = [files, self.supervisor.as_ref().map(OwnedFd::as_fd), self.signals.as_ref().map(Signals::as_fd)];
        let places = extra.each_ref().map(|fd| {
            let fd = fd.as_ref()?;
            fds.push(PollFd::new(fd, PollFlags::IN));
            Some(fds.len() - 1)
        });
        if !matches!(poll(&mut fds, Some(&timespec(timeout))), Ok(_) | Err(Errno::INTR)) {
            // Cannot happen with descriptors that are open; never spin.
            std::thread::sleep(Duration::from_millis(10));
        }
        let at = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let [files, supervisor, signals] = places.map(|place| place.is_some_and(at));
        Ready { input: self.input_open && at(0), files: files || self.files.interval().is_some(), supervisor, signals }
    }

    fn read_input(&mut self) {
        match rustix::io::read(self.input, self.decoder.space(READ_BYTES)) {
            Ok(0) => {
                self.input_open = false;
                self.step(Input::HostClosed);
            }
            Ok(read) => {
                self.decoder.filled(read);
                self.read_lines();
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.input_open = false;
                self.step(Input::HostClosed);
            }
        }
    }

    fn read_lines(&mut self) {
        loop {
            let now = Instant::now();
            let actions = match self.decoder.next_frame() {
                Ok(None) => return,
                Ok(Some(Frame::Line(line))) => self.core.step(Input::Line(line), now),
                // Hosts send no raw bytes, and none were announced.
                Ok(Some(Frame::Bulk(_))) => Vec::new(),
                Err(error) => {
                    let refusal = SessionError { code: ErrorCode::BadMessage, message: error.to_string() };
                    self.core.step(Input::Refused(refusal), now)
                }
            };
            for action in actions {
                self.act(action);
            }
            if self.core.ending().is_some() {
                return;
            }
        }
    }

    /// Writes what is left, for a short while.
    fn last_words(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        while !self.output.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.output.write().is_err() {
                return;
            }
            if !self.output.is_empty() {
                let fd = self.output.fd();
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&timespec(left)));
            }
        }
    }
}

struct Ready {
    input: bool,
    files: bool,
    supervisor: bool,
    signals: bool,
}

/// Says why an action or a piece of work was refused.
pub(super) fn refusal(code: ErrorCode, error: &dyn std::error::Error) -> SessionError {
    SessionError { code, message: error.to_string() }
}

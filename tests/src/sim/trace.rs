//! What happened in a run, one line a step. The lines are made only where somebody reads them; what two runs of one seed
//! are compared by is made always.
//!
//! ```text
//!   step ──► fingerprint (every step folded into one number)
//!        └─► line "   12.345678 c0 act      send ack {seq 4}"     only while replaying
//! ```

use std::fmt;
use std::time::Duration;

/// The steps of one run.
#[derive(Debug, Default)]
pub struct Trace {
    lines: Option<Vec<String>>,
    fingerprint: u64,
    steps: u64,
    /// Where a line would show something that must stay secret.
    leaks: Vec<String>,
}

impl Trace {
    /// With lines, or without.
    pub fn new(with_lines: bool) -> Self {
        Self { lines: with_lines.then(Vec::new), fingerprint: 0xcbf2_9ce4_8422_2325, ..Self::default() }
    }

    /// Whether lines are wanted.
    pub fn is_on(&self) -> bool {
        self.lines.is_some()
    }

    /// A step: `what` tells one kind of step from another, `with` one of a kind from the next.
    pub fn step(&mut self, now: Duration, what: &'static str, with: u64) {
        self.steps += 1;
        self.fold(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        what.bytes().for_each(|byte| self.fold(u64::from(byte)));
        self.fold(with);
    }

    fn fold(&mut self, value: u64) {
        self.fingerprint = (self.fingerprint ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }

    /// A line, where lines are wanted. `who` is an actor's short name.
    pub fn line(&mut self, now: Duration, who: &dyn fmt::Display, text: fmt::Arguments<'_>) {
        if let Some(lines) = &mut self.lines {
            let line = format!("{:>4}.{:06} {who:<4} {text}", now.as_secs(), now.subsec_micros());
            if line.contains(super::plan::SECRET) {
                self.leaks.push(line.clone());
            }
            lines.push(line);
        }
    }

    /// The lines so far.
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }

    /// Lines with the secret in them.
    pub fn leaks(&self) -> &[String] {
        &self.leaks
    }

    /// All steps, in one number.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// How many there were.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

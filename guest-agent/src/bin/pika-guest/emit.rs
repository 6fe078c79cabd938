//! `emit`: many events, as JSON lines on standard input.
//!
//! ```text
//!   read (no lock) ── whole lines ── parse ── lock ── one append ── unlock ── read …
//! ```

use std::io::Read as _;

use pika_cloud_common::limits::MAX_EVENT_BYTES;
use pika_guest_agent::drafts;
use pika_guest_agent::ledger::{Draft, Ledger};

use crate::exit::Failure;

/// How much is read, and so written, at once.
const BLOCK_BYTES: usize = 64 * 1024;

pub(crate) fn emit() -> Result<u8, Failure> {
    let ledger = Ledger::open()?;
    let mut input = std::io::stdin();
    let mut block = Vec::new();
    let mut count = Count { line: 0, written: 0 };
    loop {
        let held = block.len();
        block.resize(held + BLOCK_BYTES, 0);
        let read = match input.read(&mut block[held..]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(source) => return Err(Failure::Stdio { doing: "cannot read standard input", source }),
            Ok(0) => {
                block.truncate(held);
                // A last line without its newline counts like any other.
                count.write(&ledger, &block)?;
                return Ok(0);
            }
            Ok(read) => read,
        };
        block.truncate(held + read);
        if let Some(end) = memchr::memrchr(b'\n', &block) {
            count.write(&ledger, &block[..end])?;
            block.drain(..=end);
        } else if block.len() > 2 * MAX_EVENT_BYTES {
            let source = Failure::Data(format!("longer than an event may be ({MAX_EVENT_BYTES} bytes)"));
            return Err(count.failed(count.line + 1, source));
        }
    }
}

struct Count {
    /// Lines that were looked at.
    line: u64,
    /// Events that were written.
    written: u64,
}

impl Count {
    /// Writes the events of whole lines, up to the first that is wrong or refused.
    fn write(&mut self, ledger: &Ledger, lines: &[u8]) -> Result<(), Failure> {
        let mut drafts: Vec<Draft> = Vec::new();
        let mut numbers = Vec::new();
        let mut wrong = None;
        for line in lines.split(|&byte| byte == b'\n') {
            self.line += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match drafts::parse_line(line) {
                Ok(draft) => {
                    drafts.push(draft);
                    numbers.push(self.line);
                }
                Err(error) => {
                    wrong = Some((self.line, Failure::from(error)));
                    break;
                }
            }
        }
        if !drafts.is_empty() {
            let appended = ledger.lock()?.append(&drafts)?;
            self.written += appended.count as u64;
            if let Some(refusal) = appended.refusal {
                return Err(self.failed(numbers[appended.count], refusal.into()));
            }
        }
        match wrong {
            Some((line, source)) => Err(self.failed(line, source)),
            None => Ok(()),
        }
    }

    fn failed(&self, line: u64, source: Failure) -> Failure {
        Failure::Line { line, written: self.written, source: Box::new(source) }
    }
}

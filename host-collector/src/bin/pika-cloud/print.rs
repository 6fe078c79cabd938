//! What a person sees. The workload's log goes to standard output, everything else to standard error.
//!
//! Messages and logs come from a guest: on a terminal nothing of theirs may move the cursor, set a title or hide text.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

/// Whether standard error is a terminal that wants colours.
pub(crate) fn is_fancy() -> bool {
    std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none()
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A line of pika-cloud's own. A reader that is gone must not end a job.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "pika-cloud: {}", plain(text));
}

/// An error.
pub(crate) fn error(text: &str) {
    let (on, off) = if is_fancy() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    let _ = writeln!(std::io::stderr(), "pika-cloud: {on}error{off}: {}", lines(text));
}

/// A phase that was entered: with elapsed time and colour on a terminal, a plain line elsewhere.
pub(crate) fn phase(elapsed: Duration, name: &str, message: &str) {
    let (name, message) = (plain(name), plain(message));
    let _ = if is_fancy() {
        let colour = match name.as_str() {
            "completed" => "32",
            "failed" | "timed_out" | "guest_died" | "unreachable" | "provision_failed" | "cancelled" => "31",
            _ => "36",
        };
        let secs = elapsed.as_secs_f64();
        writeln!(std::io::stderr(), "\x1b[2m{secs:7.1}s\x1b[0m \x1b[1;{colour}m{name:<12}\x1b[0m {message}")
    } else {
        let colon = if message.is_empty() { "" } else { ": " };
        writeln!(std::io::stderr(), "pika-cloud: {name}{colon}{message}")
    };
}

/// Bytes of the workload's log: as they are into a file or pipe, harmless on a terminal.
pub(crate) fn log(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = if out.is_terminal() {
        out.write_all(lines(&String::from_utf8_lossy(bytes)).as_bytes())
    } else {
        out.write_all(bytes)
    };
    let _ = out.flush();
}

/// A line of a document on standard output.
pub(crate) fn line(text: &str) {
    let mut out = std::io::stdout();
    let _ = if out.is_terminal() { writeln!(out, "{}", plain(text)) } else { writeln!(out, "{text}") };
}

/// Whether a character moves the cursor, or changes the order in which others are seen.
fn deceives(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text without control characters.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if deceives(c) { '\u{fffd}' } else { c }).collect()
}

/// Text of several lines without other control characters.
fn lines(text: &str) -> String {
    let shown = |c: char| c == '\n' || c == '\t' || !deceives(c);
    text.chars().filter(|c| *c != '\r').map(|c| if shown(c) { c } else { '\u{fffd}' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_guest_moves_the_cursor() {
        assert_eq!(plain("a\x1b[2Jb\nc\u{9b}d"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
        assert_eq!(plain("a\u{202e}b"), "a\u{fffd}b");
        assert_eq!(lines("a\r\n\tb\x07"), "a\n\tb\u{fffd}");
    }
}

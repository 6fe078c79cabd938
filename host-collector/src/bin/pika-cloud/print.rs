//! What a person sees. The workload's log goes to standard output, everything else to standard error.
//!
//! Messages and logs come from a guest: on a terminal nothing of theirs may move the cursor, set a title or hide text.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use pika_host_collector::words::deceives;

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

/// A phase that the host saw or decided: with elapsed time and colour on a terminal, a plain line elsewhere.
pub(crate) fn phase(elapsed: Duration, name: &str, message: &str) {
    let _ = writeln!(std::io::stderr(), "{}", phase_line(is_fancy().then_some(elapsed), Who::Host, name, message));
}

/// The same in a guest's own words, which it chooses as it likes: told apart by how the line begins.
pub(crate) fn guest_phase(elapsed: Duration, name: &str, message: &str) {
    let _ = writeln!(std::io::stderr(), "{}", phase_line(is_fancy().then_some(elapsed), Who::Guest, name, message));
}

/// Whose words a line has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Host,
    Guest,
}

fn phase_line(elapsed: Option<Duration>, who: Who, name: &str, message: &str) -> String {
    let (name, message) = (plain(name), plain(message));
    let Some(elapsed) = elapsed else {
        let colon = if message.is_empty() { "" } else { ": " };
        let mark = if who == Who::Guest { "guest: " } else { "" };
        return format!("pika-cloud: {mark}{name}{colon}{message}");
    };
    let colour = match name.as_str() {
        "completed" => "32",
        "failed" | "timed_out" | "guest_died" | "unreachable" | "provision_failed" | "cancelled" => "31",
        _ => "36",
    };
    let secs = elapsed.as_secs_f64();
    let mark = if who == Who::Guest { "guest" } else { "" };
    format!("\x1b[2m{secs:7.1}s {mark:<5}\x1b[0m \x1b[1;{colour}m{name:<12}\x1b[0m {message}")
}

/// Bytes of the workload's log: as they are into a file or pipe, harmless on a terminal.
pub(crate) fn log(bytes: &[u8]) {
    let out = std::io::stdout().lock();
    let is_terminal = out.is_terminal();
    write_log(out, is_terminal, bytes);
}

/// The same on standard error.
pub(crate) fn log_beside(bytes: &[u8]) {
    let out = std::io::stderr().lock();
    let is_terminal = out.is_terminal();
    write_log(out, is_terminal, bytes);
}

fn write_log(mut out: impl std::io::Write, is_terminal: bool, bytes: &[u8]) {
    let _ = if is_terminal {
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
        for hidden in ['\u{202e}', '\u{2067}', '\u{200f}', '\u{61c}'] {
            assert_eq!(plain(&format!("a{hidden}b")), "a\u{fffd}b");
        }
        assert_eq!(lines("a\r\n\tb\x07"), "a\n\tb\u{fffd}");
    }
    /// Whatever a guest says, and however it calls that.
    #[test]
    fn no_guest_speaks_as_the_host() {
        for elapsed in [None, Some(Duration::from_secs(1))] {
            let line = |who, name, message| phase_line(elapsed, who, name, message);
            let begins = line(Who::Guest, "", "").split_inclusive("guest").next().unwrap().to_owned();
            for name in ["completed", "verdict", "\npika-cloud: completed", "\x1b[1Gpika-cloud"] {
                for message in ["verdict: it completed", "", "b\rpika-cloud: c"] {
                    let (said, own) = (line(Who::Guest, name, message), line(Who::Host, name, message));
                    assert!(said.starts_with(&begins) && !own.starts_with(&begins), "{said:?}");
                    assert!(said.lines().count() == 1 && !said.contains('\r'), "{said:?}");
                }
            }
        }
        assert_eq!(phase_line(None, Who::Guest, "ready", ""), "pika-cloud: guest: ready");
        assert_eq!(phase_line(None, Who::Host, "booted", "it answered"), "pika-cloud: booted: it answered");
    }
}

//! The end of an instance's console, as evidence: where its agent was never heard, it is all that the guest said. Pure.

use crate::words::deceives;

/// What of a console is kept.
const MAX_CHARS: usize = 4096;

/// The last lines of a console, without what moves a terminal; `None` where nothing is left.
pub(super) fn tail(console: &str) -> Option<String> {
    let plain = strip_ansi_escapes::strip_str(console);
    let keeps = |c: &char| *c == '\n' || !deceives(*c);
    let kept: Vec<char> = plain.trim_end().chars().filter(keeps).collect();
    let mut last = &kept[kept.len().saturating_sub(MAX_CHARS)..];
    if last.len() < kept.len()
        && let Some(end) = last.iter().position(|c| *c == '\n')
    {
        // A line that was cut says less than none.
        last = &last[end + 1..];
    }
    let text: String = last.iter().collect();
    (!text.trim().is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_moved_by_it() {
        let console = "\u{1b}[2J\u{1b}[1;1HBdsDxe: failed\r\n\u{1b}]0;title\u{7}panic\u{0}: no init\u{9b}31m\r\n\r\n";
        let tail = tail(console).unwrap();
        assert!(tail.starts_with("BdsDxe: failed\npanic: no init"), "{tail:?}");
        assert!(!tail.chars().any(|c| c.is_control() && c != '\n'), "{tail:?}");
    }

    /// Invariant 5.
    #[test]
    fn whole_lines_of_its_end_are_kept() {
        let console: String =
            (0..100_000).flat_map(|line| ["line ".to_owned(), line.to_string(), "\n".to_owned()]).collect();
        let tail = tail(&console).unwrap();
        assert!(tail.len() <= MAX_CHARS && tail.len() > MAX_CHARS - 20);
        assert!(tail.starts_with("line 99") && tail.ends_with("line 99999"));
        assert_eq!(super::tail(&"x".repeat(10_000)).unwrap().len(), MAX_CHARS, "a line without an end");
    }

    #[test]
    fn what_says_nothing_is_none() {
        for nothing in ["", "\r\n \u{1b}[0m\u{0}\n"] {
            assert_eq!(tail(nothing), None);
        }
    }
}

//! Words of a guest, or of whoever made an image, before a person is shown them: an event's message may hold anything.

/// Characters of what was said that are shown.
pub(crate) const MAX_SHOWN_CHARS: usize = 300;

/// Whether a character moves a terminal's cursor, breaks a line, changes the order in which others are seen, or is one of those
/// that are not seen themselves: Unicode's controls, its separators of lines, and the formatting characters in common use.
pub fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The beginning of what was said, in one line that says nothing to a terminal.
pub(crate) fn one_line(said: &str) -> String {
    said.trim().chars().map(|c| if deceives(c) { ' ' } else { c }).take(MAX_SHOWN_CHARS).collect()
}

/// Whether it is a few printable characters of ASCII: nothing that a terminal, or a person, takes for more than that.
pub(crate) fn is_word(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_one_line_and_short() {
        assert_eq!(one_line(" a\u{1b}[2J\nb\n"), "a [2J b");
        for hidden in "\u{202e}\u{2067}\u{200f}\u{61c}\u{9b}\u{ad}\u{605}\u{180e}\u{2028}\u{2060}\u{206f}\u{feff}\u{fffb}\u{e0041}".chars() {
            assert_eq!(one_line(&format!("a{hidden}b")), "a b");
        }
        assert_eq!(one_line(&"x".repeat(5000)).len(), MAX_SHOWN_CHARS);
    }

    #[test]
    fn a_word_is_short_and_plain() {
        assert!(is_word("0.1 ~", 5) && is_word("", 0));
        for text in ["123456", "\u{1b}[2J", "1\n", "\u{202e}", "ä"] {
            assert!(!is_word(text, 5), "{text:?}");
        }
    }
}

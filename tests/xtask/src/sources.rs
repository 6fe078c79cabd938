//! Derives an apt entry for another suite from the machine's own Debian entry, so that its mirror and its keys go on
//! being used. Pure text in, text out; both of apt's formats.

/// An entry to write into `/etc/apt/sources.list.d`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// `sources` or `list`, which tells apt the format.
    pub(crate) extension: &'static str,
    /// What stands in the file.
    pub(crate) text: String,
}

/// Finds in a `.sources` file the stanza that serves `suite`, and gives it back for `wanted`, component `main`.
pub(crate) fn derive_deb822(file: &str, suite: &str, wanted: &str) -> Option<Entry> {
    stanzas(file).into_iter().find(|fields| serves(fields, suite)).map(|fields| {
        let lines = fields.iter().map(|field| match field.name.to_ascii_lowercase().as_str() {
            "types" => "Types: deb\n".to_owned(),
            "suites" => format!("Suites: {wanted}\n"),
            "components" => "Components: main\n".to_owned(),
            _ => field.text.clone(),
        });
        Entry { extension: "sources", text: lines.collect() }
    })
}

/// The same for a one-line-style file.
pub(crate) fn derive_list(file: &str, suite: &str, wanted: &str) -> Option<Entry> {
    file.lines().find_map(|line| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '[']))?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').map(|(options, rest)| (format!("[{options}] "), rest))?,
            None => (String::new(), rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, found) = (words.next()?, words.next()?);
        let serves_main = words.any(|component| component == "main");
        (found == suite && serves_main)
            .then(|| Entry { extension: "list", text: format!("deb {options}{uri} {wanted} main\n") })
    })
}

/// One field of a stanza with its continuation lines, as it stands in the file.
struct Field {
    name: String,
    value: String,
    text: String,
}

fn stanzas(file: &str) -> Vec<Vec<Field>> {
    let mut stanzas = vec![Vec::<Field>::new()];
    for line in file.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() {
            stanzas.push(Vec::new());
            continue;
        }
        let Some(stanza) = stanzas.last_mut() else { continue };
        if line.starts_with([' ', '\t']) {
            if let Some(field) = stanza.last_mut() {
                field.value.push_str(line);
                field.text.extend([line, "\n"]);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push(Field { name: name.trim().to_owned(), value: value.to_owned(), text: format!("{line}\n") });
        }
    }
    stanzas
}

fn serves(stanza: &[Field], suite: &str) -> bool {
    let has = |name: &str, word: &str| {
        stanza
            .iter()
            .filter(|field| field.name.eq_ignore_ascii_case(name))
            .any(|field| field.value.split_whitespace().any(|found| found == word))
    };
    has("Types", "deb") && has("Suites", suite) && has("Components", "main") && !has("Enabled", "no")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stanza_keeps_its_mirror_and_its_keys() {
        let file = "# comment\nTypes: deb deb-src\n# another\nURIs: https://mirror.invalid/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By:\n -----BEGIN\n .\n -----END\n\n\
            Types: deb\nURIs: https://mirror.invalid/security\nSuites: bookworm-security\nComponents: main\n";
        let entry = derive_deb822(file, "bookworm", "bookworm-backports").unwrap();
        assert_eq!(entry.extension, "sources");
        assert_eq!(
            entry.text,
            "Types: deb\nURIs: https://mirror.invalid/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By:\n -----BEGIN\n .\n -----END\n"
        );
    }

    #[test]
    fn a_stanza_that_is_off_or_of_another_suite_is_passed_over() {
        let off = "Types: deb\nEnabled: no\nURIs: https://a.invalid\nSuites: bookworm\nComponents: main\n";
        assert_eq!(derive_deb822(off, "bookworm", "x"), None);
        let other = "Types: deb\nURIs: https://a.invalid\nSuites: bookworm-security\nComponents: main\n";
        assert_eq!(derive_deb822(other, "bookworm", "x"), None);
        let source_only = "Types: deb-src\nURIs: https://a.invalid\nSuites: bookworm\nComponents: main\n";
        assert_eq!(derive_deb822(source_only, "bookworm", "x"), None);
    }

    #[test]
    fn a_line_keeps_its_options() {
        let file = "# deb https://no.invalid bookworm main\ndeb-src https://s.invalid bookworm main\n\
            deb https://sec.invalid bookworm-security main\n\
            deb [arch=amd64 signed-by=/k.gpg] https://mirror.invalid/debian bookworm main contrib # ours\n";
        let entry = derive_list(file, "bookworm", "bookworm-backports").unwrap();
        assert_eq!(entry.extension, "list");
        assert_eq!(
            entry.text,
            "deb [arch=amd64 signed-by=/k.gpg] https://mirror.invalid/debian bookworm-backports main\n"
        );
    }

    #[test]
    fn a_plain_line_will_do() {
        let entry = derive_list("deb http://m.invalid/debian bookworm main\n", "bookworm", "b").unwrap();
        assert_eq!(entry.text, "deb http://m.invalid/debian b main\n");
        assert_eq!(derive_list("deb http://m.invalid/x stable main\n", "bookworm", "b"), None);
    }
}

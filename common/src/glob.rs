//! Matches paths against globs, a component at a time while a walk goes down.
//!
//! `*` and `?` match within a component, `[a-z]` and `[!a-z]` one character of it, `**` as a whole component any number
//! of components (at the end of a glob at least one). A glob becomes a list of components, and a walk carries the set of
//! places in that list where it may stand: no pattern makes it try one thing again and again, and a folder below which
//! nothing can match is not entered.

use crate::limits::{MAX_GLOB_BYTES, MAX_GLOB_COMPONENTS, MAX_GLOBS};

/// A glob cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    /// More than can be matched at once.
    #[error("at most {MAX_GLOBS} globs can be matched at once, these are {0}")]
    TooMany(usize),
    /// Not relative, or with a component that names no file.
    #[error("the glob `{0}` is no relative path: leave out a leading `/`, `.`, `..` and empty components")]
    NotRelative(String),
    /// Too long, or of too many components.
    #[error("a glob has at most {MAX_GLOB_BYTES} bytes and {MAX_GLOB_COMPONENTS} components")]
    TooLong,
    /// A class that does not end.
    #[error("the glob `{0}` has a `[` without its `]`: a `[` itself is `[[]`")]
    OpenClass(String),
}

/// A set of globs.
#[derive(Clone, Debug)]
pub struct Globs {
    globs: Vec<Vec<Component>>,
}

/// Where in each glob a walk may stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places(Vec<u64>);

#[derive(Clone, Debug)]
enum Component {
    AnyNumber,
    Pattern(Vec<Token>),
}

#[derive(Clone, Debug)]
enum Token {
    Char(char),
    AnyChar,
    Star,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Globs {
    /// Reads them. Each is relative to the folder that is walked, in plain components.
    ///
    /// # Errors
    /// Where there are more than [`MAX_GLOBS`], or one is not relative, does not end, or is beyond its bounds.
    pub fn parse<'a>(globs: impl ExactSizeIterator<Item = &'a str>) -> Result<Self, GlobError> {
        if globs.len() > MAX_GLOBS {
            return Err(GlobError::TooMany(globs.len()));
        }
        Ok(Self { globs: globs.map(parse_glob).collect::<Result<_, _>>()? })
    }

    /// Where a walk begins.
    pub fn start(&self) -> Places {
        Places(self.globs.iter().map(|glob| closure(glob, 1)).collect())
    }

    /// Where it stands behind the component `name`.
    pub fn enter(&self, places: &Places, name: &str) -> Places {
        let step = |(glob, &set): (&Vec<Component>, &u64)| {
            let mut next = 0;
            for (at, component) in glob.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1) {
                match component {
                    Component::AnyNumber => next |= 1 << at | u64::from(at + 1 == glob.len()) << (at + 1),
                    Component::Pattern(tokens) if matches(tokens, name) => next |= 1 << (at + 1),
                    Component::Pattern(_) => {}
                }
            }
            closure(glob, next)
        };
        Places(self.globs.iter().zip(&places.0).map(step).collect())
    }

    /// Whether the path that led here matches.
    pub fn is_match(&self, places: &Places) -> bool {
        self.globs.iter().zip(&places.0).any(|(glob, set)| set >> glob.len() & 1 == 1)
    }

    /// Whether anything below can match.
    pub fn may_match_below(&self, places: &Places) -> bool {
        self.globs.iter().zip(&places.0).any(|(glob, set)| set & ((1 << glob.len()) - 1) != 0)
    }
}

/// `**` may stand for nothing, except at the end.
fn closure(glob: &[Component], mut set: u64) -> u64 {
    for (at, component) in glob.iter().enumerate() {
        if set >> at & 1 == 1 && matches!(component, Component::AnyNumber) && at + 1 < glob.len() {
            set |= 1 << (at + 1);
        }
    }
    set
}

fn parse_glob(glob: &str) -> Result<Vec<Component>, GlobError> {
    if glob.len() > MAX_GLOB_BYTES || glob.split('/').count() > MAX_GLOB_COMPONENTS {
        return Err(GlobError::TooLong);
    }
    let component = |part: &str| match part {
        "" | "." | ".." => Err(GlobError::NotRelative(glob.to_owned())),
        "**" => Ok(Component::AnyNumber),
        part => parse_pattern(part).map(Component::Pattern).ok_or_else(|| GlobError::OpenClass(glob.to_owned())),
    };
    glob.split('/').map(component).collect()
}

fn parse_pattern(part: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut chars = part.chars();
    while let Some(char) = chars.next() {
        tokens.push(match char {
            '*' if matches!(tokens.last(), Some(Token::Star)) => continue,
            '*' => Token::Star,
            '?' => Token::AnyChar,
            '[' => parse_class(&mut chars)?,
            other => Token::Char(other),
        });
    }
    Some(tokens)
}

/// What follows a `[`; a `]` in front stands for itself.
fn parse_class(chars: &mut std::str::Chars<'_>) -> Option<Token> {
    let mut rest = chars.clone();
    let negated = matches!(rest.clone().next(), Some('!' | '^'));
    if negated {
        rest.next();
    }
    let mut ranges = Vec::new();
    loop {
        let from = rest.next()?;
        if from == ']' && !ranges.is_empty() {
            break;
        }
        let mut ahead = rest.clone();
        let to = match (ahead.next(), ahead.next()) {
            (Some('-'), Some(to)) if to != ']' => {
                rest = ahead;
                to
            }
            _ => from,
        };
        ranges.push((from, to));
    }
    *chars = rest;
    Some(Token::Class { negated, ranges })
}

impl Token {
    fn takes(&self, char: char) -> bool {
        match self {
            Self::Char(own) => *own == char,
            Self::AnyChar => true,
            Self::Star => false,
            Self::Class { negated, ranges } => ranges.iter().any(|&(from, to)| (from..=to).contains(&char)) != *negated,
        }
    }
}

/// Whether `tokens` match all of `name`. After a mismatch only the last star is tried again, one character further: the
/// length of the name times that of the pattern at most.
fn matches(tokens: &[Token], name: &str) -> bool {
    let (mut token, mut rest) = (0, name);
    let mut retry: Option<(usize, &str)> = None;
    loop {
        if matches!(tokens.get(token), Some(Token::Star)) {
            token += 1;
            retry = Some((token, rest));
            continue;
        }
        let mut chars = rest.chars();
        match (tokens.get(token), chars.next()) {
            (None, None) => return true,
            (Some(own), Some(char)) if own.takes(char) => {
                token += 1;
                rest = chars.as_str();
                continue;
            }
            _ => {}
        }
        let Some((after_star, from)) = retry else { return false };
        let mut chars = from.chars();
        if chars.next().is_none() {
            return false;
        }
        (token, rest) = (after_star, chars.as_str());
        retry = Some((after_star, rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_match(glob: &str, path: &str) -> bool {
        let globs = Globs::parse([glob].into_iter()).unwrap();
        let mut places = globs.start();
        for name in path.split('/') {
            if !globs.may_match_below(&places) {
                return false;
            }
            places = globs.enter(&places, name);
        }
        globs.is_match(&places)
    }

    #[test]
    fn what_matches_what() {
        for (glob, path, expected) in [
            ("**", "a", true),
            ("**", "a/b/c", true),
            ("*", "a", true),
            ("*", "a/b", false),
            ("*.xml", "report.xml", true),
            ("*.xml", "a/report.xml", false),
            ("**/*.xml", "report.xml", true),
            ("**/*.xml", "a/b/report.xml", true),
            ("a/**", "a", false),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/b/b/c", true),
            ("a/**/c", "a/b/b/d", false),
            ("**/a/**/b", "x/a/y/b", true),
            ("a?c", "aüc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]x", "]x", true),
            ("[a-]x", "-x", true),
            ("*a*b*c*", "xxaxxbxxcxx", true),
            ("*a*b*c*", "xxaxxcxxbxx", false),
            ("a**b", "aXXb", true),
            ("", "a", false),
        ] {
            if !glob.is_empty() {
                assert_eq!(is_match(glob, path), expected, "{glob} {path}");
            }
        }
    }

    #[test]
    fn what_is_no_glob() {
        let error = |glob: &str| Globs::parse([glob].into_iter()).unwrap_err();
        for glob in ["", "/a", "a/", "a//b", "../a", "./a"] {
            assert_eq!(error(glob), GlobError::NotRelative(glob.to_owned()));
        }
        assert_eq!(error("[a"), GlobError::OpenClass("[a".to_owned()));
        assert_eq!(error(&"a/".repeat(64)), GlobError::TooLong);
    }

    #[test]
    fn no_pattern_takes_long() {
        let glob = format!("{}b", "*a".repeat(500));
        let path = "a".repeat(255);
        assert!(!is_match(&glob, &path));
        assert!(!is_match(&format!("{}b", "**/a/".repeat(30)), &"a/".repeat(64)));
    }

    /// The definition, word by word.
    fn by_definition(glob: &[&str], path: &[&str]) -> bool {
        match (glob, path) {
            ([], path) => path.is_empty(),
            (["**"], path) => !path.is_empty(),
            (["**", rest @ ..], path) => (0..=path.len()).any(|skip| by_definition(rest, &path[skip..])),
            ([_, ..], []) => false,
            ([first, glob @ ..], [name, path @ ..]) => {
                let (first, name): (Vec<_>, Vec<_>) = (first.chars().collect(), name.chars().collect());
                word(&first, &name) && by_definition(glob, path)
            }
        }
    }

    fn word(pattern: &[char], name: &[char]) -> bool {
        match (pattern, name) {
            ([], name) => name.is_empty(),
            (['*', rest @ ..], name) => (0..=name.len()).any(|skip| word(rest, &name[skip..])),
            (['?', rest @ ..], [_, name @ ..]) => word(rest, name),
            ([own, rest @ ..], [char, name @ ..]) => own == char && word(rest, name),
            (_, []) => false,
        }
    }

    proptest! {
        #[test]
        fn as_the_definition_says(
            glob in prop::collection::vec(prop_oneof![Just("**".to_owned()), "[ab*?]{1,4}"], 1..5),
            path in prop::collection::vec("[ab]{1,4}", 1..5),
        ) {
            let expected = by_definition(
                &glob.iter().map(String::as_str).collect::<Vec<_>>(),
                &path.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            prop_assert_eq!(is_match(&glob.join("/"), &path.join("/")), expected);
        }

        #[test]
        fn nothing_panics(glob in ".{0,40}", path in "[^/]{1,20}(/[^/]{1,20}){0,3}") {
            if Globs::parse([glob.as_str()].into_iter()).is_ok() {
                is_match(&glob, &path);
            }
        }
    }
}

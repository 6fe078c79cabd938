//! Reading a spec from JSON: every error at once.
//!
//! serde stops at the first value that does not fit, a user wants them all. So such a value is noted by its path and
//! taken out, or in a list replaced by a stand-in so that the others keep their index, and the rest is read again;
//! unknown fields are noted on the way. What is then missing or empty is told by validation, unless its path was told
//! already. Each turn takes something away or gives up, so it ends.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use super::strict::{self, Strict};
use super::types::RuntimeSpec;
use super::validate::{FieldError, member};

/// Values of a wrong type that are told at once; who has more of them did not mean to write a spec.
const MAX_MISFITS: usize = 200;

/// A spec cannot be used. Neither form quotes what stands in `bootstrap`.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON at all, or a field given twice.
    #[error("the spec is not JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    /// Fields that cannot be used, all of them.
    #[error("the spec has {} error{}:{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, lines(.0))]
    Invalid(Vec<FieldError>),
}

fn lines(errors: &[FieldError]) -> String {
    errors.iter().fold(String::new(), |text, error| text + "\n  " + &error.to_string())
}

impl RuntimeSpec {
    /// Reads and validates a spec.
    ///
    /// # Errors
    /// [`SpecError::NotJson`] with line and column, or [`SpecError::Invalid`] with every field that is wrong, unknown or
    /// not implemented yet.
    pub fn from_json(text: &str) -> Result<Self, SpecError> {
        let mut value = strict::parse(text).map_err(SpecError::NotJson)?;
        let mut misfits = Misfits::default();
        loop {
            let mut unknown = Vec::new();
            let ignored = &mut |path: serde_ignored::Path<'_>| unknown.push(ignored_path(&path));
            match serde_path_to_error::deserialize(serde_ignored::Deserializer::new(Strict(&value), ignored)) {
                Ok(spec) => {
                    let unknown = unknown.into_iter().map(|path| FieldError::new(path, UNKNOWN_FIELD));
                    return validated(spec, misfits.errors.into_iter().chain(unknown).collect());
                }
                Err(error) => {
                    if !misfits.take_out(&mut value, error.path(), &error.inner().to_string()) {
                        return Err(SpecError::Invalid(misfits.errors));
                    }
                }
            }
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] with every field that is wrong or not implemented yet.
    pub fn validate(&self) -> Result<(), SpecError> {
        match super::validate::validate(self) {
            errors if errors.is_empty() => Ok(()),
            errors => Err(SpecError::Invalid(errors)),
        }
    }
}

const UNKNOWN_FIELD: &str = "is not a field of a spec: remove it, or check its spelling";

/// Adds what validation finds, but for paths that were told already: their values are not the user's.
fn validated(spec: RuntimeSpec, mut errors: Vec<FieldError>) -> Result<RuntimeSpec, SpecError> {
    let told: Vec<String> = errors.iter().map(|error| error.path.clone()).collect();
    let told_already = |path: &str| {
        told.iter()
            .any(|t| path.strip_prefix(t.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '['])))
    };
    errors.extend(super::validate::validate(&spec).into_iter().filter(|error| !told_already(&error.path)));
    if errors.is_empty() { Ok(spec) } else { Err(SpecError::Invalid(errors)) }
}

/// Values of a wrong type.
#[derive(Default)]
struct Misfits {
    errors: Vec<FieldError>,
    /// How often the element of a list at that path was replaced.
    stand_ins: BTreeMap<String, usize>,
}

impl Misfits {
    /// Notes the value at `path` and takes it out; false where the rest cannot be read any more.
    fn take_out(&mut self, value: &mut Value, path: &serde_path_to_error::Path, problem: &str) -> bool {
        // What follows a segment that names no member, such as a variant, belongs to the value before it.
        let segments: Vec<&Segment> =
            path.iter().take_while(|s| matches!(s, Segment::Map { .. } | Segment::Seq { .. })).collect();
        let at = segments.iter().fold(String::new(), |at, segment| match segment {
            Segment::Map { key } => member(&at, key),
            other => format!("{at}{other}"),
        });
        let again = self.stand_ins.contains_key(&at);
        if !again {
            let named = if at.is_empty() { "the spec" } else { &at };
            self.errors.push(FieldError::new(named, problem));
        }
        if self.errors.len() == MAX_MISFITS {
            self.errors.push(FieldError::new("the spec", "has more errors: mend these first"));
            return false;
        }
        let Some((last, parents)) = segments.split_last() else { return false };
        let parent = parents.iter().try_fold(value, |at, segment| match segment {
            Segment::Map { key } => at.get_mut(key),
            Segment::Seq { index } => at.get_mut(index),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        match (last, parent) {
            (Segment::Map { key }, Some(Value::Object(members))) => members.shift_remove(key).is_some(),
            (Segment::Seq { index }, Some(Value::Array(items))) if *index < items.len() => {
                let turns = self.stand_ins.entry(at).or_default();
                *turns += 1;
                match turns {
                    1 => items[*index] = Value::Object(Map::new()),
                    2 => items[*index] = Value::String(String::new()),
                    _ => items.truncate(*index),
                }
                true
            }
            _ => false,
        }
    }
}

/// The path of a field that nothing reads.
fn ignored_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", ignored_path(parent)),
        Path::Map { parent, key } => member(&ignored_path(parent), key),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            ignored_path(parent)
        }
    }
}

//! Reading a spec from JSON: every error at once.
//!
//! serde stops at the first value of a wrong type, a user wants them all. So a value that does not fit is noted by its
//! path and taken out, and the rest is read again; unknown fields are noted on the way. What is then missing is told by
//! validation, unless its path was told already.

use serde_json::Value;
use serde_path_to_error::Segment;

use super::types::RuntimeSpec;
use super::validate::FieldError;

/// A spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON at all.
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
        let mut value: Value = serde_json::from_str(text).map_err(SpecError::NotJson)?;
        let mut errors = Vec::new();
        let spec = loop {
            let mut unknown = Vec::new();
            let ignored = &mut |path: serde_ignored::Path<'_>| unknown.push(path.to_string());
            match serde_path_to_error::deserialize(serde_ignored::Deserializer::new(&value, ignored)) {
                Ok(spec) => {
                    errors.extend(unknown.into_iter().map(|path| {
                        FieldError::new(
                            path.replace(".?", ""),
                            "is not a field of a spec: remove it, or check its spelling",
                        )
                    }));
                    break spec;
                }
                Err(error) => {
                    let problem = error.inner().to_string();
                    let path = error.path().clone();
                    errors.push(FieldError::new(path.to_string(), problem));
                    if !remove(&mut value, &path) {
                        return Err(SpecError::Invalid(errors));
                    }
                }
            }
        };
        validated(spec, errors)
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

/// Adds what validation finds, but for paths that were told already: their values are not the user's.
fn validated(spec: RuntimeSpec, mut errors: Vec<FieldError>) -> Result<RuntimeSpec, SpecError> {
    let told: Vec<String> = errors.iter().map(|error| error.path.clone()).collect();
    let told_already = |path: &str| {
        told.iter().any(|t| path == t || path.strip_prefix(t.as_str()).is_some_and(|rest| rest.starts_with(['.', '['])))
    };
    errors.extend(super::validate::validate(&spec).into_iter().filter(|error| !told_already(&error.path)));
    if errors.is_empty() { Ok(spec) } else { Err(SpecError::Invalid(errors)) }
}

/// Takes the value at `path` out; an element of a list becomes null's neighbour, so that the others keep their index.
fn remove(value: &mut Value, path: &serde_path_to_error::Path) -> bool {
    let segments: Vec<&Segment> = path.iter().collect();
    let Some((last, parents)) = segments.split_last() else { return false };
    let mut at = value;
    for segment in parents {
        let next = match segment {
            Segment::Map { key } => at.get_mut(key),
            Segment::Seq { index } => at.get_mut(index),
            Segment::Enum { .. } | Segment::Unknown => None,
        };
        match next {
            Some(inner) => at = inner,
            None => return false,
        }
    }
    match (last, at) {
        (Segment::Map { key }, Value::Object(members)) => members.shift_remove(key).is_some(),
        // Other elements keep their index if this one goes last; so the list is cut here and told as wrong from here.
        (Segment::Seq { index }, Value::Array(items)) if *index < items.len() => {
            items.truncate(*index);
            true
        }
        _ => false,
    }
}

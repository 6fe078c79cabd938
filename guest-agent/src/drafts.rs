//! What a verb or a line of `emit` asks for, as an event.
//!
//! The names `progress`, `notice` and `exit_code` in an event's details are the contract's. A user's details may not hold
//! the first two, which would turn a state into none; `exit_code` only where it says the same as the verb does.

use pika_cloud_common::State;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ledger::{Draft, What};

/// The details or the line cannot become an event.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// Not JSON.
    #[error("the details are not JSON ({0}): quote them for the shell, such as --details '{{\"key\":1}}'")]
    DetailsNotJson(serde_json::Error),
    /// The line is no JSON object of that form.
    #[error("not an event of the form {{\"kind\":…,\"message\":…,\"details\":…}}: {0}")]
    NotADraft(serde_json::Error),
    /// A name of the contract's own.
    #[error("`{0}` in the details is reserved: choose another name")]
    Reserved(&'static str),
    /// Two exit codes.
    #[error("the details say another `exit_code` than the verb: leave one of them out")]
    TwoExitCodes,
    /// Not a kind that a guest emits.
    #[error("`{0}` is no kind of event: use starting, ready, progress, failed or completed")]
    Kind(String),
    /// Progress needs one.
    #[error("progress needs a `name`")]
    NoName,
    /// Out of range.
    #[error("a fraction lies between 0 and 1, and this is {0}")]
    Fraction(f64),
    /// A member that belongs to another kind.
    #[error("`{member}` does not belong to `{kind}`")]
    Foreign {
        /// The member.
        member: &'static str,
        /// The kind.
        kind: String,
    },
}

/// Reads `--details`.
pub fn parse_details(text: &str) -> Result<Value, DraftError> {
    serde_json::from_str(text).map_err(DraftError::DetailsNotJson)
}

/// The runtime enters `state`.
pub fn state(
    state: State,
    message: String,
    details: Option<Value>,
    exit_code: Option<i32>,
) -> Result<Draft, DraftError> {
    let details = refuse_reserved(details)?;
    let details = match (exit_code, details) {
        (None, details) => details,
        (Some(code), details) => {
            let said = details.as_ref().and_then(|details| details.get("exit_code"));
            if said.is_some_and(|said| said.as_i64() != Some(i64::from(code))) {
                return Err(DraftError::TwoExitCodes);
            }
            Some(with_member("exit_code", json!(code), details))
        }
    };
    Ok(Draft { what: What::State(state), message, details })
}

/// The workload is that far.
pub fn progress(
    name: &str,
    fraction: Option<f64>,
    message: String,
    details: Option<Value>,
) -> Result<Draft, DraftError> {
    if name.is_empty() {
        return Err(DraftError::NoName);
    }
    if let Some(fraction) = fraction.filter(|fraction| !(0.0..=1.0).contains(fraction)) {
        return Err(DraftError::Fraction(fraction));
    }
    let mut progress = serde_json::Map::new();
    progress.insert("name".to_owned(), json!(name));
    if let Some(fraction) = fraction {
        progress.insert("fraction".to_owned(), json!(fraction));
    }
    let details = with_member("progress", Value::Object(progress), refuse_reserved(details)?);
    Ok(Draft { what: What::Progress, message, details: Some(details) })
}

/// A line of `emit`.
pub fn parse_line(line: &[u8]) -> Result<Draft, DraftError> {
    let asked: Asked = serde_json::from_slice(line).map_err(DraftError::NotADraft)?;
    let foreign = |member, given: bool| {
        if given { Err(DraftError::Foreign { member, kind: asked.kind.clone() }) } else { Ok(()) }
    };
    if asked.kind == "progress" {
        foreign("exit_code", asked.exit_code.is_some())?;
        return progress(asked.name.as_deref().unwrap_or_default(), asked.fraction, asked.message, asked.details);
    }
    foreign("name", asked.name.is_some())?;
    foreign("fraction", asked.fraction.is_some())?;
    let kind = State::from_name(&asked.kind);
    if !kind.is_guest_emitted() {
        return Err(DraftError::Kind(asked.kind));
    }
    foreign("exit_code", asked.exit_code.is_some() && !kind.is_terminal())?;
    state(kind, asked.message, asked.details, asked.exit_code)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    kind: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Option<Value>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    fraction: Option<f64>,
    #[serde(default)]
    exit_code: Option<i32>,
}

fn refuse_reserved(details: Option<Value>) -> Result<Option<Value>, DraftError> {
    for name in ["progress", "notice"] {
        if details.as_ref().is_some_and(|details| details.get(name).is_some()) {
            return Err(DraftError::Reserved(name));
        }
    }
    Ok(details)
}

/// `details` with one member more, in front: an object keeps its own, anything else stands under `value`.
pub fn with_member(name: &str, member: Value, details: Option<Value>) -> Value {
    let mut merged = serde_json::Map::new();
    merged.insert(name.to_owned(), member);
    match details {
        None | Some(Value::Null) => {}
        Some(Value::Object(members)) => merged.extend(members),
        Some(value) => {
            merged.insert("value".to_owned(), value);
        }
    }
    Value::Object(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(draft: Result<Draft, DraftError>) -> String {
        draft.unwrap().details.map_or_else(|| "-".to_owned(), |details| details.to_string())
    }

    #[test]
    fn the_users_details_are_kept_beside_ours() {
        let of = |given: Value| details(state(State::Failed, String::new(), Some(given), Some(3)));
        assert_eq!(of(json!({"a": 1})), r#"{"exit_code":3,"a":1}"#);
        assert_eq!(of(json!({"exit_code": 3, "a": 1})), r#"{"exit_code":3,"a":1}"#);
        assert_eq!(of(json!([1, 2])), r#"{"exit_code":3,"value":[1,2]}"#);
        assert_eq!(details(state(State::Ready, String::new(), None, None)), "-");
        assert_eq!(
            details(progress("build", Some(0.5), String::new(), Some(json!({"a": 1})))),
            r#"{"progress":{"name":"build","fraction":0.5},"a":1}"#
        );
    }

    #[test]
    fn the_contracts_names_are_refused() {
        let refused = |given| state(State::Ready, String::new(), Some(given), Some(1)).unwrap_err().to_string();
        assert!(refused(json!({"progress": 1})).starts_with("`progress` in the details is reserved"));
        assert!(refused(json!({"notice": 1})).starts_with("`notice` in the details is reserved"));
        assert!(refused(json!({"exit_code": 2})).contains("another `exit_code`"));
    }

    #[test]
    fn lines_of_emit() {
        let ok = |line: &str| parse_line(line.as_bytes()).unwrap();
        assert_eq!(ok(r#"{"kind":"ready","message":"m"}"#).what, What::State(State::Ready));
        assert_eq!(ok(r#"{"kind":"progress","name":"n","fraction":1}"#).what, What::Progress);
        let wrong = |line: &str| parse_line(line.as_bytes()).unwrap_err().to_string();
        assert!(wrong("[").starts_with("not an event of the form"));
        assert!(wrong(r#"{"kind":"ready","extra":1}"#).contains("unknown field `extra`"));
        assert!(wrong(r#"{"kind":"booted"}"#).contains("`booted` is no kind of event"));
        assert!(wrong(r#"{"kind":"progress"}"#).contains("needs a `name`"));
        assert!(wrong(r#"{"kind":"progress","name":"n","fraction":1.5}"#).contains("between 0 and 1"));
        assert!(wrong(r#"{"kind":"ready","exit_code":1}"#).contains("does not belong to `ready`"));
    }
}

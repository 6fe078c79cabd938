//! The spec's hash: whether an instance that exists was made for this very spec.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::policy::Policies;
use super::types::{Incus, Mount, OutputLimits, Paths, RuntimeSpec, Watchdogs};
use super::validate::member;
use crate::digest::Digest;

/// The hash of a spec with its version, such as `v1:5891b5b5…`.
///
/// It is over the fields that differ from their defaults, with sorted names and without values of
/// `bootstrap.env` and `bootstrap.secrets`: a new default changes no hash, and a hash tells no secret.
pub fn hash(spec: &RuntimeSpec) -> String {
    let mut text = String::new();
    write_sorted(&identifying(spec), &mut text);
    format!("v1:{}", Digest::of(text.as_bytes()))
}

/// Paths of the fields in which two specs differ, such as `resources.memory_mib`; empty where their hashes are the same.
/// Only a list of another length is named as a whole.
pub fn difference(a: &RuntimeSpec, b: &RuntimeSpec) -> Vec<String> {
    let mut paths = Vec::new();
    compare("", Some(&identifying(a)), Some(&identifying(b)), &mut paths);
    paths
}

/// The spec as JSON without the fields that hold their defaults, and with environment and secrets by their names only.
fn identifying(spec: &RuntimeSpec) -> Value {
    let mut spec = spec.clone();
    spec.bootstrap.env.values_mut().for_each(String::clear);
    spec.bootstrap.secrets.values_mut().for_each(|value| *value = Value::Null);
    let mut value = json(&spec);
    for (section, defaults) in [
        ("incus", json(&Incus::default())),
        ("paths", json(&Paths::default())),
        ("policies", json(&Policies::default())),
        ("watchdogs", json(&Watchdogs::default())),
        ("limits", json(&OutputLimits::default())),
    ] {
        if let Some(given) = value.get_mut(section) {
            leave_out(given, &defaults);
        }
    }
    let mount = json(&Mount::default());
    for given in value.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
        leave_out(given, &mount);
    }
    value
}

fn json(value: &impl serde::Serialize) -> Value {
    // All of a spec's maps have string keys.
    serde_json::to_value(value).expect("a spec is serializable")
}

/// Takes out of a section what is as in `defaults`. (Whole sections that hold nothing else are not serialized.)
fn leave_out(given: &mut Value, defaults: &Value) {
    let (Value::Object(given), Value::Object(defaults)) = (given, defaults) else { return };
    given.retain(|name, value| defaults.get(name) != Some(&*value));
    for (name, value) in given {
        if let Some(inner) = defaults.get(name) {
            leave_out(value, inner);
        }
    }
}

/// Compact JSON with the members of every object sorted by name.
fn write_sorted(value: &Value, out: &mut String) {
    match value {
        Value::Object(members) => {
            let mut names: Vec<&String> = members.keys().collect();
            names.sort_unstable();
            out.push('{');
            for (index, name) in names.into_iter().enumerate() {
                out.push_str(if index == 0 { "" } else { "," });
                out.push_str(&Value::String(name.clone()).to_string());
                out.push(':');
                write_sorted(&members[name], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { "," });
                write_sorted(item, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// Notes where two values differ; absent is another thing than null.
fn compare(at: &str, a: Option<&Value>, b: Option<&Value>, paths: &mut Vec<String>) {
    let nothing = Map::new();
    let (left, right) = match (a, b) {
        _ if a == b => return,
        (Some(Value::Object(left)), Some(Value::Object(right))) => (left, right),
        // A section that only one of them has: its fields are the difference.
        (Some(Value::Object(left)), None) if !left.is_empty() => (left, &nothing),
        (None, Some(Value::Object(right))) if !right.is_empty() => (&nothing, right),
        (Some(Value::Array(left)), Some(Value::Array(right))) if left.len() == right.len() => {
            for (index, (left, right)) in left.iter().zip(right).enumerate() {
                compare(&format!("{at}[{index}]"), Some(left), Some(right), paths);
            }
            return;
        }
        _ => return paths.push(at.to_owned()),
    };
    let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    for name in names {
        compare(&member(at, name), left.get(name), right.get(name), paths);
    }
}

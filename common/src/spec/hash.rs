//! The spec's hash: whether an instance that exists was made for this very spec.

use serde_json::Value;

use super::types::RuntimeSpec;
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

/// Paths of the fields in which two specs differ, such as `resources.memory_mib`.
pub fn difference(a: &RuntimeSpec, b: &RuntimeSpec) -> Vec<String> {
    let mut paths = Vec::new();
    compare("", &identifying(a), &identifying(b), &mut paths);
    paths
}

/// The spec as JSON, with environment and secrets by their names only.
fn identifying(spec: &RuntimeSpec) -> Value {
    let mut spec = spec.clone();
    spec.bootstrap.env.values_mut().for_each(String::clear);
    spec.bootstrap.secrets.values_mut().for_each(|value| *value = Value::Null);
    // The spec's maps have string keys only.
    serde_json::to_value(spec).expect("a spec is serializable")
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

fn compare(at: &str, a: &Value, b: &Value, paths: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(left), Value::Object(right)) => {
            let mut names: Vec<&String> = left.keys().chain(right.keys()).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                let inner = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                let null = Value::Null;
                compare(&inner, left.get(name).unwrap_or(&null), right.get(name).unwrap_or(&null), paths);
            }
        }
        _ if a == b => {}
        _ => paths.push(at.to_owned()),
    }
}

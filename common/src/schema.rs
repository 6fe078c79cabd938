//! JSON Schemas of every document and message, by file name. `common/schema/` holds them as generated.
//!
//! They describe what this version writes. Documents and messages may hold fields beyond that, a spec may not; names
//! that a newer version adds (of messages, notices, codes) are read as unknown, and stand in no schema.

use schemars::transform::transform_subschemas;
use schemars::{JsonSchema, Schema, schema_for};
use serde_json::Value;

/// Every schema with the name of its file.
pub fn all() -> Vec<(&'static str, Schema)> {
    fn of<T: JsonSchema>() -> Schema {
        let mut schema = schema_for!(T);
        for_readers(&mut schema);
        schema
    }
    vec![
        ("runtime-spec", of::<crate::spec::RuntimeSpec>()),
        ("event", of::<crate::event::Event>()),
        ("status", of::<crate::status::Status>()),
        ("result", of::<crate::result::RunResult>()),
        ("guest-request", of::<crate::request::GuestRequest>()),
        ("verdict", of::<crate::verdict::Verdict>()),
        ("session-host", of::<crate::wire::HostMessage>()),
        ("session-guest", of::<crate::wire::GuestMessage>()),
    ]
}

/// Makes of a generated schema one for people who don't read Rust: no links of rustdoc, no default for what is required.
fn for_readers(schema: &mut Schema) {
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = without_links(text);
    }
    let required: Vec<String> = match schema.get("required") {
        Some(Value::Array(names)) => names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    };
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        for name in required {
            if let Some(Value::Object(property)) = properties.get_mut(&name) {
                property.shift_remove("default");
            }
        }
    }
    transform_subschemas(&mut (for_readers as fn(&mut Schema)), schema);
}

/// Rustdoc's ``[`name`](path)`` and ``[`name`]`` as `` `name` ``.
fn without_links(text: &str) -> String {
    let mut parts = text.split("[`");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push('`');
        let (name, rest) = part.split_once("`]").unwrap_or((part, ""));
        plain.push_str(name);
        plain.push('`');
        let target = rest.strip_prefix('(').and_then(|target| target.split_once(')'));
        plain.push_str(target.map_or(rest, |(_, after)| after));
    }
    plain
}

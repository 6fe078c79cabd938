//! The schemas in `schema/` are those of the types, and say what the types say.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs;

use pika_cloud_common::schema;
use serde_json::Value;

use support::{KINDS, fixtures, root};

const UPDATE: &str = "PIKA_UPDATE";

fn files() -> Vec<(String, String)> {
    let pretty = |schema| serde_json::to_string_pretty(schema).unwrap() + "\n";
    schema::all().iter().map(|(name, schema)| (format!("{name}.json"), pretty(schema))).collect()
}

#[test]
fn schemas_on_disk_are_current() {
    let folder = root().join("schema");
    let update = std::env::var_os(UPDATE).is_some();
    let remedy = format!(
        "run `{UPDATE}=1 cargo test -p pika-cloud-common --all-features --test schemas` and commit common/schema"
    );
    if update {
        fs::create_dir_all(&folder).unwrap();
    }
    for (name, text) in files() {
        if update {
            fs::write(folder.join(&name), &text).unwrap();
        }
        let found = fs::read_to_string(folder.join(&name)).unwrap_or_default();
        assert!(found == text, "common/schema/{name} is not what the types say: {remedy}");
    }
    let names: BTreeSet<String> = files().into_iter().map(|(name, _)| name).collect();
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name), "common/schema/{name} belongs to no type: remove it");
    }
}

#[test]
fn every_kind_has_a_schema() {
    let names: BTreeSet<&str> = schema::all().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, KINDS.into_iter().collect());
}

#[test]
fn fixtures_fit_their_schemas_and_wrong_ones_do_not() {
    for (kind, schema) in schema::all() {
        let validator = jsonschema::draft202012::new(schema.as_value()).unwrap();
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let foreign = if kind.starts_with("session") || kind == "runtime-spec" {
            Vec::new()
        } else {
            fixtures(&format!("foreign/{kind}"))
        };
        for fixture in fixtures(kind).iter().chain(&foreign) {
            if let Err(error) = validator.validate(&json(&fixture.text)) {
                panic!("{}: {}: {error}", fixture.name, error.instance_path);
            }
        }
        for fixture in fixtures(&format!("wrong/{kind}")) {
            assert!(!validator.is_valid(&json(&fixture.text)), "{} fits the schema", fixture.name);
        }
    }
}

/// The metaschema itself, and what people read.
#[test]
fn schemas_are_sound_and_readable() {
    for (name, schema) in schema::all() {
        let valid = jsonschema::meta::validate(schema.as_value());
        assert!(valid.is_ok(), "{name}");
        drop(valid);
        let text = schema.as_value().to_string();
        for residue in ["[`", "crate::", "super::", "Self::"] {
            assert!(!text.contains(residue), "{name} holds `{residue}` of rustdoc");
        }
        let mut undescribed = Vec::new();
        describe(name, schema.as_value(), &mut undescribed);
        assert!(undescribed.is_empty(), "without description: {}", undescribed.join(", "));
    }
}

/// Collects properties that say nothing to their reader, but for the tags of variants and the bodies of messages.
fn describe(at: &str, value: &Value, undescribed: &mut Vec<String>) {
    if let Some(properties) = value.get("properties").and_then(Value::as_object) {
        for (name, property) in properties {
            let told = ["description", "const"].iter().any(|key| property.get(*key).is_some());
            let of_variant = value.get("additionalProperties") == Some(&Value::Bool(false)) && properties.len() == 1;
            if !told && !of_variant {
                undescribed.push(format!("{at}.{name}"));
            }
        }
    }
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(name, inner)| describe(&format!("{at}/{name}"), inner, undescribed));
        }
        Value::Array(items) => items.iter().for_each(|inner| describe(at, inner, undescribed)),
        _ => {}
    }
}

/// A document keeps what it does not know; a spec refuses it at every level.
#[test]
fn unknown_fields_are_as_the_readers_take_them() {
    for (kind, schema) in schema::all() {
        let text = schema.as_value().to_string();
        match kind {
            "runtime-spec" => {
                let objects = text.matches(r#""properties":"#).count();
                let closed = text.matches(r#""additionalProperties":false"#).count();
                assert_eq!(objects, closed, "an object of the spec takes unknown fields");
            }
            "event" | "status" | "result" | "guest-request" => {
                assert_eq!(schema.get("additionalProperties"), Some(&Value::Bool(true)), "{kind}");
            }
            _ => {}
        }
    }
}

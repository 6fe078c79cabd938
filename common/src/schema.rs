//! JSON Schemas of every document and message, by file name. `common/schema/` holds them as generated.

use schemars::{JsonSchema, Schema, schema_for};

/// Every schema with the name of its file.
pub fn all() -> Vec<(&'static str, Schema)> {
    fn of<T: JsonSchema>() -> Schema {
        schema_for!(T)
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

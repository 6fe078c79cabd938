//! The head of an event, read without copying the rest of its line.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::quick;
use crate::document::{self, DecodeError, SCHEMA_VERSION};
use crate::limits::MAX_EVENT_BYTES;
use crate::timestamp::Timestamp;

/// What a mover of events needs of a line, without copying it: everything else stays as it stands in the file.
#[derive(Debug)]
pub struct EventHead<'a> {
    /// As in [`Event`](super::Event).
    pub schema_version: u32,
    /// As in [`Event`](super::Event).
    pub seq: u64,
    /// The name of its kind.
    pub kind: Cow<'a, str>,
    /// Whether it tells of progress: its `details` have that member.
    pub has_progress: bool,
}

impl<'a> EventHead<'a> {
    /// Reads the head of a line, and checks the rest: it takes what [`Event::decode`](super::Event::decode) takes and
    /// nothing else, so that no line is moved that its reader refuses.
    pub fn decode(line: &'a [u8]) -> Result<Self, DecodeError> {
        let plain = if line.len() <= MAX_EVENT_BYTES { quick::head(line) } else { None };
        plain.map_or_else(|| Self::decode_slowly(line), Ok)
    }

    /// The same for a line in any form.
    pub(super) fn decode_slowly(line: &'a [u8]) -> Result<Self, DecodeError> {
        if line.len() <= MAX_EVENT_BYTES {
            match std::str::from_utf8(line).map(serde_json::from_str::<Self>) {
                Ok(Ok(head)) if head.schema_version == SCHEMA_VERSION => return Ok(head),
                _ => {}
            }
        }
        // Not one of ours: the slow way says why.
        document::decode("event", SCHEMA_VERSION, MAX_EVENT_BYTES, line)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for EventHead<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeadVisitor)
    }
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    SchemaVersion,
    Seq,
    Timestamp,
    Kind,
    Message,
    BootId,
    Details,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Seq(#[serde(deserialize_with = "crate::bounded::seq")] u64);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

struct HeadVisitor;

impl<'de> Visitor<'de> for HeadVisitor {
    type Value = EventHead<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<EventHead<'de>, A::Error> {
        let (mut version, mut seq, mut kind): (Option<u32>, Option<Seq>, Option<Text<'de>>) = (None, None, None);
        let (mut timestamp, mut message, mut boot_id, mut details) = (None, None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::SchemaVersion => once(&mut version, "schema_version", map.next_value()?)?,
                Field::Seq => once(&mut seq, "seq", map.next_value()?)?,
                Field::Kind => once(&mut kind, "kind", map.next_value()?)?,
                Field::Timestamp => {
                    let text: Text<'de> = map.next_value()?;
                    once(&mut timestamp, "timestamp", Timestamp::check(&text.0).map_err(de::Error::custom)?)?;
                }
                Field::Message => {
                    let _: Text<'de> = map.next_value()?;
                    once(&mut message, "message", ())?;
                }
                Field::BootId => {
                    let _: Option<Text<'de>> = map.next_value()?;
                    once(&mut boot_id, "boot_id", ())?;
                }
                Field::Details => once(&mut details, "details", map.next_value_seed(Sound)?)?,
                Field::Other => {
                    map.next_value_seed(Sound)?;
                }
            }
        }
        timestamp.ok_or_else(|| de::Error::missing_field("timestamp"))?;
        message.ok_or_else(|| de::Error::missing_field("message"))?;
        Ok(EventHead {
            schema_version: version.ok_or_else(|| de::Error::missing_field("schema_version"))?,
            seq: seq.ok_or_else(|| de::Error::missing_field("seq"))?.0,
            kind: kind.ok_or_else(|| de::Error::missing_field("kind"))?.0,
            has_progress: details.unwrap_or(false),
        })
    }
}

fn once<T, E: de::Error>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), E> {
    if slot.replace(value).is_some() { Err(de::Error::duplicate_field(name)) } else { Ok(()) }
}

/// Reads any JSON for its errors: nested too deep, a number out of range, half of a surrogate pair. Gives whether it is an
/// object with `progress` in it.
struct Sound;

impl<'de> DeserializeSeed<'de> for Sound {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Sound {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_str<E>(self, _: &str) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
        while seq.next_element_seed(Self)?.is_some() {}
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut has_progress = false;
        while let Some(Text(key)) = map.next_key()? {
            has_progress |= key == "progress";
            map.next_value_seed(Self)?;
        }
        Ok(has_progress)
    }
}

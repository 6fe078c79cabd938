//! What pika-cloud needs of Incus, and nothing more: typed requests and answers over its UNIX socket.
//!
//! ```text
//!   plan (pure: spec -> requests) ──► provision ──► instance, volume ──► operation ──► client ──► /1.0/… on the socket
//!   takeover ──► one conditional PATCH ───────────────────────────────────────────────────┤
//!   exec, events ──► websocket ───────────────────────────────────────────────────────────┘
//! ```
//!
//! Rules, each from a fault that others had. An operation has succeeded only when its own status says so: a wait
//! that answers `Running` is waited on again. A client's time-out is longer than the wait that it covers. Absence is told
//! from the status code 404 of the resource itself, never from a message, and never from an operation's 404. Events are
//! wake-ups: what happened is read.
//!
//! What is kept in a label is bounded, since each list of instances holds it: a spec of more than 32 KiB as JSON is left out.
//!
//! # Errors and what is done about them
//!
//! [`Error::class`] tells them apart; transient ones are tried again after [`backoff`]. All of these were seen on Incus 6.0.
//!
//! | answer | seen at | class |
//! |---|---|---|
//! | no connection, or a broken one | the daemon is down or restarts | transient; what was asked for may have been done |
//! | no answer in time | the daemon is stuck | the same |
//! | 503, 429 | the daemon starts, or sheds load | transient |
//! | 500 `Instance is busy running a … operation` | PATCH, start or create during another change | transient, though it is a 500 |
//! | 404 on the resource | GET, DELETE | not found |
//! | 404 on `/operations/…` | an operation that finished some seconds ago | transient: it says nothing of the resource, which is read |
//! | 404 or 500 from an operation's `wait` | an operation that failed, say over an absent volume | the operation is read, and its status counts: final |
//! | a wait that answers `Running` to its last second | a create on a slow pool, a stop of a stuck VM | transient: it may still come to its end |
//! | 412 | PATCH with `If-Match` | an answer of its own: [`Patched::Raced`] |
//! | 400 `Instance is running` | DELETE | final; the state is read again, and it is stopped first |
//! | 400 `The instance is already stopped`, 500 `… already running` | a second stop or start | final; the state that is read tells that all is well |
//! | 400 `The storage volume is still in use` | DELETE of a volume | final |
//! | 409 | create of a volume of that name | it is read whose it is |
//! | 500 `UNIQUE constraint failed` | create of an instance of that name | final; the labels that are read tell whose it is |
//! | 500 `Failed locating image …`, 404 `Failed creating instance from image: open …: no such file …` | create from an alias whose image was replaced and deleted meanwhile | transient: the alias points to another by now |
//! | 500 `Image not provided` | create from an alias that is gone | final |

mod backoff;
mod builder;
mod client;
mod error;
mod events;
mod image;
mod instance;
mod operation;
mod plan;
mod provision;
mod takeover;
mod volume;
mod websocket;

pub use backoff::backoff;
pub(crate) use backoff::jitter;
pub(crate) use builder::{BuilderLabels, builder_name, builder_request, is_bake_id};
pub use client::Client;
pub use client::{Server, ServerEnvironment};
pub use error::{Class, Error};
pub use events::{LifecycleEvents, Wakes};
pub(crate) use image::PUBLISH_LIMIT;
pub use instance::{Image, ImageAlias, InstanceState, InstanceView, Profile, VsockAddress};
pub(crate) use operation::{Publishing, Work};
pub(crate) use plan::is_marked;
pub use plan::{Labels, Ownership, VolumeLabels, create_request, label};
pub use provision::provision;
pub(crate) use provision::{root_disk, root_pool};
pub use takeover::{Holder, Patched};
pub use volume::VolumeView;
pub(crate) use volume::check_volume;
pub(crate) use websocket::WebSocketHalf;

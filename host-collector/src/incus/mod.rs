//! What pika-cloud needs of Incus, and nothing more: typed requests and answers over its UNIX socket.
//!
//! ```text
//!   plan (pure: spec -> request) ──► instance ──► operation ──► client ──► /1.0/… on the socket
//!                                        exec ──► websocket ──┘
//! ```
//!
//! Three rules, each from a fault that others had. An operation has succeeded only when its own status says so: a wait
//! that answers `Running` is waited on again. A client's time-out is longer than the wait that it covers. Absence is told
//! from the status code 404 of the resource itself, never from a message, and never from an operation's 404.

mod client;
mod error;
mod instance;
mod operation;
mod plan;
mod websocket;

pub use client::Client;
pub use client::{Server, ServerEnvironment};
pub use error::Error;
pub use instance::{Image, InstanceState, InstanceView, Profile};
pub use plan::{Labels, create_request, label};
pub(crate) use websocket::WebSocketHalf;

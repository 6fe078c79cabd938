//! The guest's end of a session: what to say next, and where it comes from.

pub mod bulk;
pub mod core;
pub mod source;
mod tail;

pub use tail::{EventTail, Piece, Tailed};

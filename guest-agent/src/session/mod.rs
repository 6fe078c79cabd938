//! The guest's end of a session: what to say next, and where it comes from.

pub mod archive;
pub mod bulk;
pub mod core;
pub mod source;
mod tail;
pub mod walk;

pub use tail::{EventTail, Piece, Tailed};

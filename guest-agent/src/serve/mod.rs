//! Serves a session over standard input and output.

mod files;
mod marks;
mod output;
mod stream;

pub use stream::serve_stdio;

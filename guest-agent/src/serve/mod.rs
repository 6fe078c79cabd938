//! Serves sessions: one on standard input and output, or many behind a listener.
//!
//! ```text
//!   Incus exec ──────────────────────────────► stream ──► session core, files
//!   vsock, UNIX socket ──► listener ── forks ───► stream
//!                          listen, vsock, unix    where it listens, and to whom
//!                          container              where it does not
//!                          sessions               the processes that it forked
//!                          notify, say            what systemd and people are told
//!                          boot                   whether the guest is up that far
//! ```

mod boot;
mod container;
mod files;
mod listen;
mod listener;
mod marks;
mod notify;
mod output;
mod say;
mod sessions;
mod stream;
mod unix;
mod vsock;

pub use files::Callers;
pub use listen::Place;
pub use listener::{ServeError, places, serve};
pub use sessions::{MAX_LOCAL_SESSIONS, MAX_SESSIONS};
pub use stream::serve_stdio;
pub use unix::UnixError;

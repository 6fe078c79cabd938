//! Byte streams to a guest's agent. The session runs over any of them and does not know which.

mod exec;
pub mod vsock;

pub(crate) use exec::dial_exec;
pub(crate) use vsock::dial_vsock;

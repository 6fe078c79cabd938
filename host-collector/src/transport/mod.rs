//! Byte streams to a guest's agent. The session runs over any of them and does not know which.

mod exec;
mod put;
pub mod vsock;

pub(crate) use exec::{Exec, Ran, RunError, dial_exec, run};
pub use put::PutError;
pub(crate) use put::{AgentVersion, agent_version, put_agent};
pub(crate) use vsock::dial_vsock;

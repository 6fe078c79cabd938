//! Byte streams to a guest's agent. The session runs over any of them and does not know which.

mod exec;
mod own;
mod put;
pub mod vsock;

pub(crate) use exec::{Exec, Ran, RunError, dial_exec, is_absent, run};
pub(crate) use own::{PUT_DIAL_TIMEOUT, dial_own};
pub use put::PutError;
pub(crate) use put::{AgentVersion, agent_version, put_agent, shown};
pub(crate) use vsock::dial_vsock;

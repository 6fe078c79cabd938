//! Byte streams to a guest's agent. The session runs over any of them and does not know which.

mod exec;

pub(crate) use exec::dial_exec;

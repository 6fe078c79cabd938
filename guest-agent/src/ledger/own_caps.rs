//! The caps that whoever made the image has set: below the contract's own, by two variables.
//!
//! They reach the verbs as they reach the workload: a supervisor hands its own on. Whoever says the environment of a command
//! (the host) may say others; more than the contract's is never held.

/// Bytes of events that may wait for the host, where that is less than the contract allows.
pub const EVENTS_ENV: &str = "PIKA_GUEST_MAX_EVENT_BYTES";
/// Bytes of logs that may wait for the host, where that is less than the contract allows.
pub const LOGS_ENV: &str = "PIKA_GUEST_MAX_LOG_BYTES";
/// Both.
pub const ENVIRONMENT: [&str; 2] = [EVENTS_ENV, LOGS_ENV];

/// The cap that the variable of this name sets, or the contract's.
pub fn lower(name: &str, contract: u64) -> u64 {
    read(name).ok().flatten().map_or(contract, |own| own.min(contract))
}

/// Whether both variables can be read; an error says which cannot, and why.
pub fn check() -> Result<(), String> {
    ENVIRONMENT.iter().try_for_each(|name| read(name).map(drop))
}

fn read(name: &str) -> Result<Option<u64>, String> {
    let Some(text) = std::env::var_os(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let text = text.to_string_lossy();
    text.parse()
        .map(Some)
        .map_err(|_| format!("{name}: `{text}` is not a number of bytes; correct it, or leave it out"))
}

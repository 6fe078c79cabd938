//! Where the contract's files lie in a guest.

/// The root of the contract. `PIKA_CLOUD_DIR` overrides it in tests.
pub const ROOT: &str = "/run/pika-cloud";

/// The environment variable that overrides [`ROOT`]; the supervisor sets it for every workload.
pub const ROOT_ENV: &str = "PIKA_CLOUD_DIR";

/// One JSON object a line, append-only.
pub const EVENTS: &str = "events.jsonl";
/// The writers' lock; holds the last `seq` for older helpers.
pub const EVENTS_SEQ: &str = "events.jsonl.seq";
/// Identity and base of the stream that `events.jsonl` holds.
pub const EVENTS_STREAM: &str = "events.jsonl.stream";
/// How far the owner has acknowledged.
pub const EVENTS_ACK: &str = "events.jsonl.ack";
/// The current state, replaced atomically.
pub const STATUS: &str = "status.json";
/// The terminal result, written once, replaced atomically.
pub const RESULT: &str = "result.json";
/// What the host asked the guest to run.
pub const REQUEST: &str = "guest-request.json";
/// Workload output.
pub const LOGS_DIR: &str = "logs";
/// The workload's stdout and stderr, inside [`LOGS_DIR`].
pub const GUEST_LOG: &str = "guest.log";
/// What the workload leaves to be collected.
pub const ARTIFACTS_DIR: &str = "artifacts";
/// Files of earlier streams, each in a folder named by its `stream_id`.
pub const PREVIOUS_DIR: &str = "previous";
/// The group that may write the contract's files, where the image has it.
pub const GROUP: &str = "pika-cloud";

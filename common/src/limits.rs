//! Every bound of the contract, and what happens when it is reached.

use std::time::Duration;

/// An event line, without its newline. A writer refuses a longer one; a reader counts it as a bad line.
pub const MAX_EVENT_BYTES: usize = 64 * 1024;

/// A line of the session protocol, without its newline. A longer one ends the session: the peer does not speak it.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// `status.json`, `result.json` and `guest-request.json`. A larger one is not read, and reported as such.
pub const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// The highest `seq`, and the highest count, offset or size that either side may name: what every JSON reader holds
/// exactly. A document or message with a higher one is malformed, so that arithmetic on a peer's numbers never overflows.
pub const MAX_COUNT: u64 = (1 << 53) - 1;

/// Raw bytes behind one `log` or `entry` header. Longer content goes in several: an event waits for one chunk at most.
/// A header that announces more is malformed and ends the session.
pub const MAX_CHUNK_BYTES: usize = 64 * 1024;

/// Events that the owner has not acknowledged. Beyond it progress events are refused and counted.
pub const MAX_UNACKED_EVENT_BYTES: u64 = 64 * 1024 * 1024;

/// Part of [`MAX_UNACKED_EVENT_BYTES`] that only state events may use, so that a flood of progress never costs a verdict.
pub const RESERVED_EVENT_BYTES: u64 = 1024 * 1024;

/// Log bytes that the owner has not acknowledged. Beyond it output is dropped and counted; the workload never blocks.
pub const MAX_UNACKED_LOG_BYTES: u64 = 256 * 1024 * 1024;

/// The workload's environment, names and values together. Below what Linux takes for a single string.
pub const MAX_ENV_BYTES: usize = 96 * 1024;

/// Command, environment and working folder as they stand in a `start` message, escapes and all: the rest of
/// [`MAX_LINE_BYTES`] is for what stands around them. A spec with more is refused.
pub const MAX_START_BYTES: usize = MAX_LINE_BYTES - 8 * 1024;

/// Log files of one incarnation. The agent sends no more, and the host takes no more: what is left out is said.
pub const MAX_LOG_FILES: usize = 64;

/// How often each side says that it lives.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Silence on a session after which its other end counts as dead: three heartbeats and a little more.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(16);

/// How long a writer waits for the ledger's lock before it gives up with "temporary failure".
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a supervisor waits for `release` after the terminal event, where an owner has been seen.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a bad line that a notice quotes.
pub const BAD_LINE_SAMPLE_BYTES: usize = 128;

/// Globs in one archive. A spec or an agent that is asked for more refuses them.
pub const MAX_GLOBS: usize = 256;

/// Bytes of a glob; likewise.
pub const MAX_GLOB_BYTES: usize = 1024;

/// Components of a glob, likewise: a set of places in one is the bits of one number.
pub const MAX_GLOB_COMPONENTS: usize = 63;

/// Names of one folder below `artifacts/` that the archive looks at. The rest is left out, and said.
pub const MAX_ARCHIVE_FOLDER_ENTRIES: usize = 100_000;

/// Folders within folders below `artifacts/`. Deeper ones are left out, and said.
pub const MAX_ARCHIVE_DEPTH: usize = 64;

/// A path below `artifacts/`, in bytes.
pub const MAX_ARCHIVE_PATH_BYTES: usize = 4096;

/// The port on which `pika-guest serve` listens on `AF_VSOCK`.
pub const VSOCK_PORT: u32 = 20555;

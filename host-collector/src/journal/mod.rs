//! The journal: what is known of one runtime, durably. Everything else in its folder is derived from it.
//!
//! # The bytes
//!
//! `<state_dir>/<runtime_id>/journal.jsonl` and, as it grows, `journal.2.jsonl`, `journal.3.jsonl`, ... are its segments. The
//! first line of each is its header: the format's version, whose journal it is, which segment, and the number of its first
//! record. With a `snapshot` it holds all that the records before it say; without one it goes on where the segment before it
//! counts up to: that one is read up to `next_n`, and no further.
//!
//! Every other line is a record. `n` counts them from 0 over all segments; `at` is wall time and `mono` the host's monotonic
//! clock in microseconds; `inc` is the incarnation; guest lines stand in it as they stood in the guest's file. `crc` is the
//! CRC-32 of all bytes of the line before `,"crc":`.
//!
//! ```text
//! {"journal":{"version":3,"runtime_id":"job-7","segment":1,"next_n":0},"crc":"9f1c0c52"}
//! {"n":0,"at":"…","mono":81000123,"inc":0,"host":{"what":"host_boot","boot_id":"…"},"crc":"…"}
//! {"n":1,"at":"…","mono":81000123,"inc":1,"host":{"what":"requested","spec_hash":"v1:…","restarts":0},"crc":"…"}
//! {"n":5,"at":"…","mono":93000456,"inc":1,"guest":{"schema_version":1,"seq":1,…},"crc":"…"}
//! ```
//!
//! # The order of writes
//!
//! What the host adds is read back before it is taken: no guest can have a record written that recovery refuses.
//!
//! Records are gathered in memory ([`Records`]). A commit of them goes to the disk in this order, each step durable before
//! the next: (1) log bytes that they speak of, and, where they begin a segment, its header and its name in the folder; (2) the
//! records. Invariant 1: only then are they published to followers and acknowledged to the guest. (3) Where they began a
//! segment, the oldest are removed while all together are larger than the spec's `limits.event_bytes`; the newest two stay.
//!
//! Room for [`RESERVE`] bytes is kept behind the end, so that a full disk loses no verdict: commits that lead to one may use
//! it, all others fail. It is given back when a runtime is finished.
//!
//! A write or sync that failed is never repeated on that file, since the kernel may have dropped the pages. What failed is
//! cut, and the commit goes to a segment of its own: header, records, sync, its name. Where that fails too, or a log cannot
//! be written, the journal is degraded: it takes nothing more, and says so each time.
//!
//! # After a crash
//!
//! Recovery begins with the newest segment whose header is whole and which has a snapshot, or is the first.
//!
//! | found | what it means | what recovery does |
//! |---|---|---|
//! | whole lines only | nothing was under way, or the last sync finished | goes on behind the last |
//! | a torn last line, zeros, a hole | a write was under way, nothing of it was acknowledged | cuts the segment at the last line whose CRC and number fit |
//! | a newest segment without a whole header | it was being made; its records were to follow | removes it |
//! | a segment that goes on before the end of the one before it | a commit failed there and was written here | reads the earlier one up to where this begins |
//! | no file, or no whole first line | the crash came before the first sync, so Incus was asked for nothing | begins anew |
//! | more segments than the bound allows | it came before the oldest were removed | the next rotation removes them |
//! | log bytes beyond their mark | it came between the log's sync and the records' | cut, and asked for again |
//! | intact lines behind one that is not | the disk damaged it, or a commit of several pages was half written | what is behind is kept as `journal.<segment>.damaged-at-<offset>`, told as a warning, and counts no more |
//! | a damaged first line with records behind it, or nothing that the oldest segment goes on from | no crash of ours leaves that: the disk does | an error, and nothing is touched |
//! | a first line of another version | another release wrote it | an error that names both versions |
//! | an intact line that is no record, or out of order | somebody edited it | an error that names the line |
//!
//! What was recovered may be of a collector that died between its write and its sync. So it is synced before it is acted on
//! or published, by the first commit, or for many journals at once ([`Writer::settle`]).
//!
//! # Time
//!
//! Every record carries both clocks, and a `host_boot` record stands where another boot of the host goes on. A [`Moment`] of
//! this boot is compared on the monotonic clock, one of another boot by wall time ([`View::ago`]).

mod commit;
mod error;
mod follow;
mod format;
mod fs;
mod records;
mod recover;
mod store;
mod view;

pub use commit::{Committer, Writer};
pub use error::JournalError;
pub use follow::{Follower, read_view};
pub use format::{Body, GuestLine, Header, HostRecord, LogMark, Record, VERSION};
pub use fs::{DiskFs, Fs};
pub(crate) use records::clip;
pub use records::{Commit, LogBytes, NewSegment, Records};
pub use store::{Durable, RESERVE, Store};
pub use view::{Ended, Finished, Kept, Moment, StartSent, TakenOver, View};

#[cfg(test)]
mod tests;

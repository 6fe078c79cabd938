//! A model of the machine that a collector runs on, and of the shell around each runtime's core.
//!
//! ```text
//!   Host ─ Clock (mono stands still while it sleeps, wall jumps), Disk, boot_id
//!     └ Collector, while its process lives ─ Driven ─ Core (real), Store (real) over the disk, artifacts
//!
//!   killed: what was performed stays performed, the rest of the effects is dropped, files are as they were written
//!   power cut: the same, and the disk keeps what it happens to keep
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::{RuntimeSpec, hash};
use pika_cloud_common::wire::Entry;
use pika_host_collector::clock::Now;
use pika_host_collector::incus::VsockAddress;
use pika_host_collector::journal::{Commit, JournalError, Records, Store, View};
use pika_host_collector::runtime::{CallId, Core, Outputs, Stored, Way};

use super::disk::{Disk, Folder, SharedDisk};
use super::random::Random;

/// When the worlds begin, by their wall clocks.
const BEGINNING: Duration = Duration::from_secs(1_780_000_000);

/// The id of the state dir.
pub const OWNER: &str = "owner-of-this-host";

/// The machine's clocks.
#[derive(Debug)]
pub struct Clock {
    /// The kernel's name of this boot.
    pub boot_id: String,
    boots: u32,
    booted_at: Duration,
    slept: Duration,
    offset_secs: i64,
    /// It sleeps until then.
    pub asleep_until: Option<Duration>,
}

impl Clock {
    fn new() -> Self {
        Self {
            boot_id: "host-boot-1".to_owned(),
            boots: 1,
            // It runs for a while already.
            booted_at: Duration::ZERO,
            slept: Duration::ZERO,
            offset_secs: 0,
            asleep_until: None,
        }
    }

    /// What its clocks say.
    pub fn read(&self, now: Duration) -> Now {
        let wall = (BEGINNING + now).saturating_add_signed_secs(self.offset_secs);
        Now { mono: now.saturating_sub(self.booted_at).saturating_sub(self.slept), wall }
    }

    /// When its monotonic clock will say `mono`, where it does not sleep before.
    pub fn when(&self, mono: Duration) -> Duration {
        mono.saturating_add(self.booted_at).saturating_add(self.slept)
    }

    /// Sets the wall clock.
    pub fn set(&mut self, by_secs: i64) {
        self.offset_secs += by_secs;
    }

    /// It wakes up after so long.
    pub fn sleep(&mut self, slept: Duration, until: Duration) {
        self.slept += slept;
        self.asleep_until = Some(until);
    }

    /// How long it slept since the beginning.
    pub fn slept(&self) -> Duration {
        self.slept
    }

    /// Another boot.
    pub fn boot(&mut self, now: Duration) {
        self.boots += 1;
        self.boot_id = format!("host-boot-{}", self.boots);
        (self.booted_at, self.slept, self.asleep_until) = (now, Duration::ZERO, None);
    }
}

/// Whole seconds added or taken.
trait SignedSecs {
    fn saturating_add_signed_secs(self, secs: i64) -> Self;
}

impl SignedSecs for Duration {
    fn saturating_add_signed_secs(self, secs: i64) -> Self {
        let by = Self::from_secs(secs.unsigned_abs());
        if secs < 0 { self.saturating_sub(by) } else { self + by }
    }
}

/// A dial that is under way.
#[derive(Clone, Debug)]
pub struct Dialing {
    /// To be answered with.
    pub id: CallId,
    /// By which way, and which agent.
    pub way: Way,
    /// The number that was read when it began.
    pub number: Option<VsockAddress>,
}

/// A place for artifacts, without files.
#[derive(Debug, Default)]
pub struct Artifacts {
    open: Option<(String, Vec<u8>)>,
    files: u64,
    bytes: u64,
    problem: Option<String>,
}

impl Outputs for Artifacts {
    fn entry(&mut self, entry: &Entry) {
        let goes_on =
            matches!(&self.open, Some((path, bytes)) if *path == entry.path && bytes.len() as u64 == entry.offset);
        if !goes_on {
            if entry.offset > 0 {
                self.problem = Some(format!("{}: it does not begin at its beginning", entry.path));
            }
            self.open = Some((entry.path.clone(), Vec::new()));
        }
        if let Some(digest) = entry.digest {
            self.end_after(digest, entry.len);
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if let Some((_, open)) = &mut self.open {
            open.extend_from_slice(bytes);
        }
    }
}

impl Artifacts {
    /// The digest is checked when all is there, at the end: here it is enough that the file is known to be ended.
    fn end_after(&mut self, _: Digest, len: u64) {
        self.files += 1;
        self.bytes += self.open.as_ref().map_or(0, |(_, bytes)| bytes.len() as u64) + len;
    }

    /// What is there.
    pub fn stored(&self) -> Stored {
        Stored { files: self.files, bytes: self.bytes, problem: self.problem.clone() }
    }
}

/// One runtime in a collector that lives.
#[derive(Debug)]
pub struct Driven {
    /// Tells it from the one before it: what that one asked for is answered to nobody.
    pub serial: u64,
    /// The real core.
    pub core: Core,
    /// The real journal.
    pub store: Store<Folder>,
    /// What is collected.
    pub artifacts: Artifacts,
    /// The stream to the agent.
    pub link: Option<usize>,
    /// The dial that is waited for.
    pub dialing: Option<Dialing>,
    /// What is being made durable.
    pub commit: Option<Commit>,
    /// The earliest tick that stands in the queue.
    pub tick_at: Option<Duration>,
    /// When it was opened.
    pub since: Duration,
}

/// The process.
#[derive(Debug)]
pub struct Collector {
    /// Tells one process from the next.
    pub generation: u64,
    /// The runtimes; `None` where the journal cannot be used for now.
    pub runtimes: Vec<Option<Box<Driven>>>,
    /// It is killed after so many more effects.
    pub kill_in: Option<u32>,
    /// When it is started again then.
    pub back_after: Duration,
}

/// The machine.
#[derive(Debug)]
pub struct Host {
    /// Its clocks.
    pub clock: Clock,
    /// Its disk.
    pub disk: SharedDisk,
    /// The collector, where one lives. A second one would find the runtime's lock taken.
    pub collector: Option<Collector>,
    generations: u64,
    opened: u64,
}

impl Host {
    /// One that was just installed, with a folder for each runtime.
    pub fn new(random: Random) -> Self {
        Self { clock: Clock::new(), disk: Disk::new(random), collector: None, generations: 0, opened: 0 }
    }

    /// A process without runtimes yet.
    pub fn start(&mut self) -> u64 {
        self.generations += 1;
        let generation = self.generations;
        self.collector =
            Some(Collector { generation, runtimes: Vec::new(), kill_in: None, back_after: Duration::ZERO });
        generation
    }

    /// The runtime in the collector that lives, if both are there.
    pub fn driven(&mut self, runtime: usize) -> Option<&mut Driven> {
        self.collector.as_mut()?.runtimes.get_mut(runtime)?.as_deref_mut()
    }

    /// What tells the runtime's present driver from an earlier one, if there is one now.
    pub fn serial(&self, runtime: usize) -> Option<u64> {
        self.collector.as_ref()?.runtimes.get(runtime)?.as_ref().map(|driven| driven.serial)
    }

    /// The runtime's core, if there is one now.
    pub fn core(&self, runtime: usize) -> Option<&Core> {
        self.collector.as_ref()?.runtimes.get(runtime)?.as_ref().map(|driven| &driven.core)
    }

    /// The runtime's stream, if there is one now.
    pub fn link(&self, runtime: usize) -> Option<usize> {
        self.collector.as_ref()?.runtimes.get(runtime)?.as_ref()?.link
    }

    /// Opens a journal and takes the runtime up, as the collector does it.
    pub fn open(&mut self, spec: &Arc<RuntimeSpec>, random: u64, now: Duration) -> Result<Opened, JournalError> {
        // A sync that fails while a journal is opened leaves nobody who knows it: the next one that opens it would be told
        // that all is well. No program can do better without writing all of it again, so disks here do not fail just then.
        let (writes, syncs) = self.disk.borrow_mut().spare();
        let opened = self.open_spared(spec, random, now);
        self.disk.borrow_mut().fail(writes, syncs);
        opened
    }

    fn open_spared(&mut self, spec: &Arc<RuntimeSpec>, random: u64, now: Duration) -> Result<Opened, JournalError> {
        let reading = self.clock.read(now);
        let folder = Folder::new(&self.disk, &spec.identity.runtime_id);
        folder.found();
        let (mut store, view) = Store::open(folder, &spec.identity.runtime_id)?;
        store.settle()?;
        let short = store.cut_logs(&view)?;
        let recovered = view.clone();
        let mut records = Records::new(view, spec.limits.event_bytes, store.filled());
        records.boot(&self.clock.boot_id, reading);
        if records.view().incarnation == 0 {
            records.begin(hash(spec), 0, reading);
        }
        let core = Core::open(Arc::clone(spec), OWNER.into(), records, &short, random, reading);
        self.opened += 1;
        let driven = Driven {
            serial: self.opened,
            core,
            store,
            artifacts: Artifacts::default(),
            link: None,
            dialing: None,
            commit: None,
            tick_at: None,
            since: now,
        };
        Ok(Opened { driven: Box::new(driven), recovered, short })
    }
}

/// A runtime that was taken up.
#[derive(Debug)]
pub struct Opened {
    /// It.
    pub driven: Box<Driven>,
    /// What its journal said.
    pub recovered: View,
    /// Logs that are shorter than it says.
    pub short: BTreeMap<String, u64>,
}

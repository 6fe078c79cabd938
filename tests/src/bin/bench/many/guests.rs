//! Guests that are nothing but their end of the session: each says hello, answers `start`, tells of its states, and lives
//! from heartbeat to heartbeat. What they said they say again from where a host's cursor is.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pika_cloud_common::wire::{GuestHello, GuestMessage, Heartbeat, HostHello, HostMessage, Notice, PROTOCOL};
use pika_cloud_common::{SCHEMA_VERSION, wire};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::mux::{self, Outgoing, lock};

/// How often each says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How often some of them do.
const TURN: Duration = Duration::from_millis(10);
/// The states that a guest goes through, by the number of their event.
const STATES: [&str; 2] = ["starting", "ready"];
const BOOT_ID: &str = "6f5ad1b6-6c1e-4bd4-8a0f-0d9b3b1c2a17";

/// All guests. They outlive collectors.
#[derive(Debug)]
pub(super) struct Guests {
    all: Mutex<Vec<Guest>>,
    progress: watch::Sender<Progress>,
}

/// What a collector brought them to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Guests in whose session `start` came: the collector has answered their hello.
    pub(super) started: usize,
    /// Guests whose last event was acknowledged.
    pub(super) acked: usize,
}

#[derive(Clone, Debug, Default)]
struct Guest {
    /// The last event.
    seq: u64,
    request_id: Option<String>,
    is_open: bool,
    is_started: bool,
    acked: u64,
}

/// One collector's connection to all guests.
pub(super) struct Connection {
    guests: Arc<Guests>,
    outgoing: Arc<Outgoing>,
    _tasks: JoinSet<anyhow::Result<()>>,
}

impl Guests {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { all: Mutex::new(vec![Guest::default(); count]), progress: watch::Sender::default() })
    }

    /// Serves a collector; the sessions of an earlier one are over.
    pub(super) fn serve(self: &Arc<Self>, socket: UnixStream) -> Connection {
        for guest in lock(&self.all).iter_mut() {
            (guest.is_open, guest.is_started) = (false, false);
        }
        self.progress.send_replace(Progress::default());
        let outgoing = Arc::new(Outgoing::default());
        let (reader, writer) = socket.into_split();
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let outgoing = Arc::clone(&outgoing);
            async move { outgoing.write_all(writer).await }
        });
        tasks.spawn({
            let (guests, outgoing) = (Arc::clone(self), Arc::clone(&outgoing));
            async move { mux::read_all(reader, |guest, bytes| guests.hear(guest, bytes, &outgoing)).await }
        });
        tasks.spawn({
            let (guests, outgoing) = (Arc::clone(self), Arc::clone(&outgoing));
            async move { guests.live(&outgoing).await }
        });
        Connection { guests: Arc::clone(self), outgoing, _tasks: tasks }
    }

    /// Some heartbeats at a time, so that each guest's come evenly and all are spread.
    async fn live(&self, outgoing: &Outgoing) -> anyhow::Result<()> {
        let mut turn = interval(TURN);
        turn.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut next, mut out) = (0, Vec::new());
        loop {
            turn.tick().await;
            let all = lock(&self.all);
            let each_turn = all.len().div_ceil((HEARTBEAT.as_millis() / TURN.as_millis()) as usize);
            for _ in 0..each_turn {
                let guest = &all[next];
                if guest.is_open {
                    out.clear();
                    GuestMessage::Heartbeat(Heartbeat { seq: guest.seq, uptime: 1 }).write(&mut out);
                    outgoing.send(u32::try_from(next)?, &out);
                }
                next = (next + 1) % all.len();
            }
        }
    }

    /// Takes whole lines of a host.
    fn hear(&self, number: u32, bytes: &[u8], outgoing: &Outgoing) {
        let mut all = lock(&self.all);
        let Some(guest) = all.get_mut(number as usize) else { return };
        let before = (guest.is_started, guest.is_all_acked());
        let mut out = Vec::new();
        for line in bytes.split(|byte| *byte == b'\n') {
            match HostMessage::decode(line) {
                Ok(HostMessage::Hello(hello)) => guest.greet(number, &hello, &mut out),
                Ok(HostMessage::Start(start)) => guest.start(start.request_id, &mut out),
                Ok(HostMessage::Ack(ack)) => guest.acked = ack.seq,
                _ => {}
            }
        }
        if !out.is_empty() {
            outgoing.send(number, &out);
        }
        let after = (guest.is_started, guest.is_all_acked());
        if before != after {
            self.progress.send_modify(|progress| {
                progress.started += usize::from(after.0 && !before.0);
                progress.acked = progress.acked + usize::from(after.1) - usize::from(before.1);
            });
        }
    }
}

impl Guest {
    fn is_all_acked(&self) -> bool {
        self.acked == self.seq && self.seq > 0
    }

    fn greet(&mut self, number: u32, hello: &HostHello, out: &mut Vec<u8>) {
        self.is_open = true;
        GuestMessage::Hello(GuestHello {
            protocol: PROTOCOL,
            agent: "0.1.0".to_owned(),
            schema_version: SCHEMA_VERSION,
            stream_id: format!("{number:032x}"),
            boot_id: BOOT_ID.to_owned(),
            machine_uuid: None,
            first_seq: 1,
            first_digest: None,
            last_seq: self.seq,
            request_id: self.request_id.clone(),
        })
        .write(out);
        let known = hello.after.as_ref().map_or(0, |cursor| cursor.seq);
        (known + 1..=self.seq).for_each(|seq| say(seq, out));
    }

    fn start(&mut self, request_id: String, out: &mut Vec<u8>) {
        self.is_started = true;
        if self.request_id.is_some() {
            return GuestMessage::Notice(Notice::AlreadyStarted { request_id }).write(out);
        }
        self.request_id = Some(request_id.clone());
        GuestMessage::Notice(Notice::Started { request_id }).write(out);
        self.next_state(out);
    }

    fn next_state(&mut self, out: &mut Vec<u8>) {
        self.seq += 1;
        say(self.seq, out);
    }
}

/// An event, and the document that follows from it.
fn say(seq: u64, out: &mut Vec<u8>) {
    let state = STATES[usize::try_from(seq - 1).map_or(STATES.len() - 1, |at| at.min(STATES.len() - 1))];
    let at = "2026-01-31T12:00:00.000000Z";
    let rest = format!("\"message\":\"as the workload says it\",\"boot_id\":\"{BOOT_ID}\"}}");
    let event = format!("{{\"schema_version\":1,\"seq\":{seq},\"timestamp\":\"{at}\",\"kind\":\"{state}\",{rest}");
    wire::write_event(event.as_bytes(), out);
    let mut status = String::new();
    // Writing to a String cannot fail.
    let _ =
        writeln!(status, "{{\"status\":{{\"schema_version\":1,\"state\":\"{state}\",\"updated_at\":\"{at}\",{rest}}}");
    out.extend_from_slice(status.as_bytes());
}

impl Connection {
    /// All guests enter their next state at once.
    pub(super) fn all_enter_next_state(&self) -> anyhow::Result<()> {
        let mut all = lock(&self.guests.all);
        // Those that have all acknowledged have not, any more.
        self.guests.progress.send_modify(|progress| progress.acked = 0);
        for (number, guest) in all.iter_mut().enumerate() {
            let mut out = Vec::new();
            guest.next_state(&mut out);
            self.outgoing.send(u32::try_from(number)?, &out);
        }
        Ok(())
    }

    /// Says something to the collector itself.
    pub(super) fn tell(&self, guest: u32) {
        self.outgoing.send(guest, b"");
    }

    /// Waits until a collector has come so far.
    pub(super) async fn reached(&self, is_reached: impl FnMut(&Progress) -> bool) -> anyhow::Result<()> {
        self.guests.progress.subscribe().wait_for(is_reached).await?;
        Ok(())
    }
}

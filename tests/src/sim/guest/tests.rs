use pika_cloud_common::wire::{Ack, Archive, ArchiveLimits, Cursor, Empty, HostMessage, Notice, Start};
use pika_cloud_common::{GuestRequest, State};
use pika_host_collector::session::{Received, Session as HostSession, SessionFault};

use super::workload::Act;
use super::*;

const STEP: Duration = Duration::from_millis(100);

fn script(acts: &[Act]) -> Script {
    Script { acts: acts.iter().map(|act| (STEP, *act)).collect(), obeys: true, afterwards: Afterwards::Stay }
}

fn start(request_id: &str) -> HostMessage {
    HostMessage::Start(Start {
        request_id: request_id.to_owned(),
        request: GuestRequest {
            schema_version: 2,
            command: "make".to_owned(),
            timeout_secs: 5,
            run_as_root: true,
            extra: serde_json::Map::default(),
        },
        env: BTreeMap::new(),
        cwd: None,
        mounts: Vec::new(),
        stop_grace_secs: 1,
    })
}

/// A host that takes all that comes, at once.
struct Host {
    session: HostSession,
    id: u64,
    events: Vec<u64>,
    log: Vec<u8>,
    notices: Vec<Notice>,
    files: u64,
    fault: Option<SessionFault>,
}

impl Host {
    fn dial(guest: &mut Guest, id: u64, term: u64, cursor: Option<Cursor>, now: Duration) -> Self {
        guest.accept(id, Manner::Honest, now);
        let (session, hello) = HostSession::open(term, cursor, None, now);
        let (events, log, notices) = (Vec::new(), Vec::new(), Vec::new());
        let host = Self { session, id, events, log, notices, files: 0, fault: None };
        host.send(guest, &hello, now);
        host
    }

    fn send(&self, guest: &mut Guest, message: &HostMessage, now: Duration) {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        guest.feed(self.id, Some(&bytes), now);
    }

    /// Lets time pass until `until`.
    fn run(&mut self, guest: &mut Guest, now: &mut Duration, until: Duration) {
        loop {
            while let Some(bytes) = guest.session(self.id).map(|session| std::mem::take(&mut session.output)) {
                if bytes.is_empty() {
                    break;
                }
                self.take(&bytes, *now);
                guest.wrote(self.id, *now);
            }
            match guest.next_tick().filter(|at| *at <= until) {
                Some(at) => *now = (*now).max(at),
                None => break,
            }
            guest.tick(*now);
        }
        *now = until;
    }

    fn take(&mut self, mut bytes: &[u8], now: Duration) {
        while !bytes.is_empty() && self.fault.is_none() {
            let space = self.session.space();
            let (piece, rest) = bytes.split_at(bytes.len().min(space.len()));
            space[..piece.len()].copy_from_slice(piece);
            self.session.filled(piece.len(), now);
            self.receive_all();
            bytes = rest;
        }
    }

    fn receive_all(&mut self) {
        loop {
            match self.session.receive() {
                Ok(None) => return,
                Ok(Some(Received::Event { head, .. })) => self.events.push(head.seq),
                Ok(Some(Received::Log { bytes, .. })) => self.log.extend_from_slice(bytes),
                Ok(Some(Received::Notice(notice))) => self.notices.push(notice),
                Ok(Some(Received::Entry(_))) => self.files += 1,
                Ok(Some(_)) => {}
                Err(fault) => {
                    self.fault = Some(fault);
                    return;
                }
            }
        }
    }
}

fn guest(acts: &[Act]) -> Guest {
    let mut guest = Guest::new(script(acts), Random::new(7));
    guest.boot(true, Duration::ZERO);
    guest
}

#[test]
fn a_job_is_followed_from_its_start_to_its_archive() {
    let acts = [Act::Ready, Act::Output(100_000), Act::BadLine, Act::Artifact(70_000), Act::Progress, Act::Exit(0)];
    let (mut guest, mut now) = (guest(&acts), Duration::ZERO);
    let mut host = Host::dial(&mut guest, 1, 1, None, now);
    host.send(&mut guest, &start("job.1"), now);
    host.run(&mut guest, &mut now, Duration::from_secs(2));
    assert_eq!(host.events, [1, 2, 3, 4]);
    let told = guest.machine.truth.values().next().unwrap();
    assert_eq!((told.lines.len(), told.log.1, told.request_id.as_deref()), (4, 100_000, Some("job.1")));
    let expected: Vec<u8> = (0..100_000).map(|at| ledger::byte_of(told.log.0, at)).collect();
    assert!(host.log == expected);
    let limits = ArchiveLimits { max_files: 10, max_bytes: 1 << 20 };
    let asked = HostMessage::Archive(Archive { globs: vec!["**".to_owned()], limits, after: None });
    host.send(&mut guest, &asked, now);
    host.send(&mut guest, &HostMessage::Release(Empty {}), now);
    host.run(&mut guest, &mut now, Duration::from_secs(3));
    // 70,000 bytes go in two chunks.
    assert_eq!(host.files, 2);
    assert!(matches!(host.notices.last(), Some(Notice::ArchiveDone { files: 1, bytes: 70_000, truncated: false, .. })));
    assert!(guest.machine.run.is_none() && host.fault.is_none());
    assert_eq!(guest.machine.starts["job.1"], 1);
}

#[test]
fn a_second_start_starts_nothing_and_a_new_session_goes_on_behind_its_cursor() {
    let (mut guest, mut now) = (guest(&[Act::Ready, Act::Progress, Act::Progress]), Duration::ZERO);
    let mut first = Host::dial(&mut guest, 1, 1, None, now);
    first.send(&mut guest, &start("job.1"), now);
    first.run(&mut guest, &mut now, Duration::from_millis(180));
    first.send(&mut guest, &HostMessage::Ack(Ack { seq: 2, logs: BTreeMap::new() }), now);
    let mut second = Host::dial(&mut guest, 2, 1, first.session.cursor().cloned(), now);
    second.send(&mut guest, &start("job.1"), now);
    second.run(&mut guest, &mut now, Duration::from_secs(1));
    assert_eq!((first.events, second.events), (vec![1, 2], vec![3, 4]));
    assert!(guest.session(1).unwrap().is_over(), "it was superseded");
    assert_eq!(guest.machine.starts["job.1"], 1);
}

#[test]
fn a_lower_term_is_refused() {
    let (mut guest, mut now) = (guest(&[]), Duration::ZERO);
    Host::dial(&mut guest, 1, 2, None, now).run(&mut guest, &mut now, STEP);
    let mut stale = Host::dial(&mut guest, 2, 1, None, now);
    stale.run(&mut guest, &mut now, STEP * 2);
    assert!(matches!(stale.fault, Some(SessionFault::Refused(_))));
}

#[test]
fn a_killed_supervisor_is_told_once() {
    let (mut guest, mut now) = (guest(&[Act::Ready]), Duration::ZERO);
    let mut host = Host::dial(&mut guest, 1, 1, None, now);
    host.send(&mut guest, &start("job.1"), now);
    host.run(&mut guest, &mut now, Duration::from_millis(500));
    guest.kill_supervisor(now);
    guest.tick(now);
    host.run(&mut guest, &mut now, Duration::from_secs(7));
    assert_eq!(host.events, [1, 2, 3]);
    assert!(matches!(guest.machine.stream().terminal, Some((State::Failed, None))));
}

#[test]
fn a_rewound_guest_says_so_and_its_truth_goes_back() {
    let (mut guest, mut now) = (guest(&[Act::Ready, Act::Progress, Act::Progress]), Duration::ZERO);
    let mut host = Host::dial(&mut guest, 1, 1, None, now);
    host.send(&mut guest, &start("job.1"), now);
    host.run(&mut guest, &mut now, Duration::from_millis(150));
    guest.snapshot(now);
    host.run(&mut guest, &mut now, Duration::from_secs(1));
    assert!(guest.restore(now));
    let mut again = Host::dial(&mut guest, 2, 1, host.session.cursor().cloned(), now);
    again.run(&mut guest, &mut now, Duration::from_secs(3));
    assert!(matches!(again.notices.first(), Some(Notice::Rewound { last_seq: 2 })));
    let told = guest.machine.truth.values().next().unwrap();
    assert_eq!((told.lines.len(), told.unsaid.len(), told.rewound), (4, 2, true));
}

#[test]
fn a_time_limit_and_a_signal_end_a_workload() {
    let (mut guest, mut now) = (guest(&[Act::Ready]), Duration::ZERO);
    let mut host = Host::dial(&mut guest, 1, 1, None, now);
    host.send(&mut guest, &start("job.1"), now);
    for _ in 0..7 {
        let until = now + Duration::from_secs(1);
        host.send(&mut guest, &HostMessage::Ping(Empty {}), now);
        host.run(&mut guest, &mut now, until);
    }
    assert_eq!(guest.machine.stream().terminal, Some((State::Failed, Some(124))));
    host.send(&mut guest, &start("job.2"), now);
    host.run(&mut guest, &mut now, Duration::from_millis(7500));
    guest.machine.signal(15, now);
    guest.tick(now);
    host.run(&mut guest, &mut now, Duration::from_secs(9));
    assert_eq!(guest.machine.stream().terminal, Some((State::Failed, Some(143))));
}

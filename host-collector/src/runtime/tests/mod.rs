//! A scripted shell around a core: what is asked of it, in which order, and what that waits for.

mod asking;
mod collecting;
mod late;
mod salvage;
mod saying;
mod vsock;

use std::collections::BTreeMap;
use std::sync::Arc;

use pika_cloud_common::wire::{Entry, GuestMessage, LogChunk, Notice, write_event};

use pika_cloud_common::spec::InstanceType;
use pika_cloud_common::wire::{HostMessage, Transport};

use super::*;
use crate::incus::InstanceState;
use crate::machine::{CallFailure, Destroyed};

const BEGIN: Duration = Duration::from_secs(5000);

fn spec() -> RuntimeSpec {
    let mut spec = RuntimeSpec::default();
    spec.identity.runtime_id = "job-7".to_owned();
    spec.identity.instance_name = "pika-7".to_owned();
    spec.incus.instance_type = InstanceType::Container;
    spec.policies.output_collection.artifact_globs = vec!["**".to_owned()];
    spec
}

/// What came of a collection.
#[derive(Debug, Default)]
struct Came(Vec<String>);

impl Outputs for Came {
    fn entry(&mut self, entry: &Entry) {
        self.0.push(entry.path.clone());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.push(String::from_utf8(bytes.to_vec()).unwrap());
    }
}

/// A core, the time, and what it asked for and has no answer to.
struct Shell {
    core: Core,
    now: Now,
    look: CallId,
    change: CallId,
    dial: CallId,
    console: CallId,
    commit: Option<Commit>,
    came: Came,
}

impl Shell {
    /// A runtime that was requested just now; its first commit is under way.
    fn new(spec: RuntimeSpec) -> Self {
        let now = Now { mono: BEGIN, wall: 1000 * BEGIN };
        let mut records = Records::new(View::default(), spec.limits.event_bytes, 0);
        records.begin("v1:aa".to_owned(), 0, now);
        let core = Core::open(Arc::new(spec), "me".into(), records, &BTreeMap::new(), 7, now);
        Self { core, now, look: 0, change: 0, dial: 0, console: 0, commit: None, came: Came::default() }
    }

    /// What is to be done, a word or two for each.
    fn asked(&mut self) -> Vec<String> {
        let mut asked = Vec::new();
        while let Some(effect) = self.core.next_effect() {
            asked.push(self.tell(effect));
        }
        asked
    }

    fn tell(&mut self, effect: Effect) -> String {
        match effect {
            Effect::Call(id, Call::Look { instance, search }) => {
                self.look = id;
                format!("look {instance}{}", if search { " or search" } else { "" })
            }
            Effect::Call(id, Call::Console { instance }) => {
                self.console = id;
                format!("console {instance}")
            }
            Effect::Call(id, call) => {
                self.change = id;
                match call {
                    Call::Create { incarnation, term } => format!("create {incarnation} {term}"),
                    Call::Start { instance, .. } => format!("start {instance}"),
                    Call::Halt { instance } => format!("halt {instance}"),
                    Call::Destroy { instance, term } => format!("destroy {instance} {term}"),
                    Call::Look { .. } | Call::Console { .. } => unreachable!("told apart above"),
                }
            }
            Effect::Dial { id, instance, way } => {
                self.dial = id;
                let way = match (way.transport, way.agent) {
                    (Transport::Vsock, _) => " over vsock",
                    (Transport::Exec, Agent::Image) => "",
                    (Transport::Exec, Agent::Placed) => " where ours lies",
                    (Transport::Exec, Agent::Put) => " with ours put in",
                };
                format!("dial {instance}{way}")
            }
            Effect::HangUp => "hang up".to_owned(),
            Effect::Farewell => "farewell".to_owned(),
            Effect::Send(message) => format!("send {}", tell_message(&message)),
            Effect::Commit(commit) => {
                assert!(self.commit.is_none(), "two commits at once");
                let text = format!("commit {}", tell_commit(&commit));
                self.commit = Some(commit);
                text
            }
            Effect::BeginArtifacts { incarnation, .. } => format!("begin artifacts {incarnation}"),
            Effect::StoreArtifacts { within } => format!("store within {within:?}"),
            Effect::Derive { incarnation } => format!("derive {incarnation}"),
            Effect::Prune { before } => format!("prune before {before}"),
        }
    }

    /// The commit under way is durable.
    fn committed(&mut self) -> Vec<String> {
        let commit = self.commit.take().expect("a commit is under way");
        self.core.committed(commit, self.now);
        self.asked()
    }

    /// The same, for as long as there is one.
    fn settled(&mut self) -> Vec<String> {
        let mut asked = self.asked();
        while self.commit.is_some() {
            asked.extend(self.committed());
        }
        asked
    }

    fn looked(&mut self, seen: Option<Seen>) -> Vec<String> {
        self.core.answer(self.look, Answer::Looked(Ok(seen)), self.now);
        self.asked()
    }

    fn changed(&mut self, answer: Answer) -> Vec<String> {
        self.core.answer(self.change, answer, self.now);
        self.asked()
    }

    fn dialled(&mut self) -> Vec<String> {
        self.core.dialled(self.dial, Ok(None), self.now);
        self.asked()
    }

    fn wait(&mut self, time: Duration) -> Vec<String> {
        self.now.mono += time;
        self.now.wall += time;
        self.core.tick(self.now);
        self.asked()
    }

    /// Waits for what is due next.
    fn wait_next(&mut self) -> Vec<String> {
        let due = self.core.next_tick().expect("a deadline");
        self.wait(due.saturating_sub(self.now.mono))
    }

    fn read(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut left = bytes;
        while !left.is_empty() {
            let space = self.core.space();
            assert!(!space.is_empty(), "there is no session to read into");
            let (piece, rest) = left.split_at(space.len().min(left.len()));
            space[..piece.len()].copy_from_slice(piece);
            self.core.read(piece.len(), self.now, &mut self.came);
            left = rest;
        }
        self.asked()
    }

    /// Of a guest that knows what it said in this stream, and what was asked of it there.
    fn hello(&mut self, stream: &str) -> Vec<String> {
        let view = self.core.view();
        let seq = view.cursor.as_ref().filter(|cursor| cursor.stream_id == stream).map_or(0, |cursor| cursor.seq);
        let sent = view.start_sent.as_ref().filter(|sent| view.accepted_at.is_some() && sent.stream_id == stream);
        let request_id = sent.map(|sent| sent.request_id.clone());
        self.read(&hello_with(stream, seq, request_id.as_deref()))
    }

    fn says(&mut self, message: &GuestMessage) -> Vec<String> {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        self.read(&bytes)
    }

    fn notice(&mut self, notice: Notice) -> Vec<String> {
        self.says(&GuestMessage::Notice(notice))
    }

    fn event(&mut self, seq: u64, kind: &str) -> Vec<String> {
        self.read(&event(seq, kind))
    }

    fn log(&mut self, offset: u64, bytes: &[u8]) -> Vec<String> {
        let mut message = Vec::new();
        let len = bytes.len() as u64;
        GuestMessage::Log(LogChunk { file: "guest.log".to_owned(), offset, len }).write(&mut message);
        message.extend_from_slice(bytes);
        self.read(&message)
    }

    /// The stream broke.
    fn lose(&mut self) -> Vec<String> {
        self.core.link_lost(SessionLoss::Lost("reset".to_owned()), self.now);
        self.asked()
    }

    /// From a lost session to the next one, which is not open yet.
    fn redial(&mut self) {
        self.asked();
        while !self.wait_next().iter().any(|asked| asked.starts_with("look")) {}
        self.looked(Some(running()));
        self.settled();
        self.dialled();
    }

    /// To a session in which the guest said that it started the workload.
    fn live(spec: RuntimeSpec) -> Self {
        let mut shell = Self::new(spec);
        shell.settled();
        shell.start_up("s-1");
        shell
    }

    fn start_up(&mut self, stream: &str) {
        self.looked(None);
        self.settled();
        self.changed(Answer::Created(Ok(())));
        self.settled();
        self.changed(Answer::Started(Ok(())));
        self.dialled();
        self.hello(stream);
        self.settled();
        let request_id = format!("job-7.{}", self.core.view().incarnation);
        self.notice(Notice::Started { request_id });
        self.settled();
        assert_eq!(self.core.phase(), Phase::Live);
    }

    /// The guest has sent all that it has, and that is stored.
    fn collected(&mut self) -> Vec<String> {
        let mut asked =
            self.notice(Notice::ArchiveDone { files: 0, bytes: 0, skipped: 0, truncated: false, problem: None });
        self.core.stored(Stored::default(), self.now);
        asked.extend(self.asked());
        asked
    }
}

fn tell_message(message: &HostMessage) -> String {
    match message {
        HostMessage::Hello(hello) if hello.machine.is_some() => {
            format!("hello to {}", hello.machine.unwrap_or_default())
        }
        HostMessage::Hello(hello) => match &hello.after {
            Some(cursor) => format!("hello after {} {}", cursor.stream_id, cursor.seq),
            None => "hello".to_owned(),
        },
        HostMessage::Ack(ack) => {
            let logs: Vec<_> = ack.logs.iter().map(|(file, mark)| format!(" {file} {mark}")).collect();
            format!("ack {}{}", ack.seq, logs.concat())
        }
        HostMessage::Start(start) if start.mounts.is_empty() => format!("start {}", start.request_id),
        HostMessage::Start(start) => format!("start {} behind {}", start.request_id, start.mounts.join(" ")),
        HostMessage::Signal(signal) => signal.name.clone(),
        HostMessage::Archive(archive) => format!("archive {}", archive.globs.join(" ")),
        HostMessage::Release(_) => "release".to_owned(),
        HostMessage::Ping(_) => "ping".to_owned(),
    }
}

/// What its records say and how many log bytes are with them.
fn tell_commit(commit: &Commit) -> String {
    let mut parts = Vec::new();
    for line in String::from_utf8(commit.records.clone()).unwrap().lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let what = record["host"]["what"].as_str().or(record["guest"]["kind"].as_str());
        parts.push(what.unwrap_or_else(|| panic!("{line}")).to_owned());
    }
    parts.extend(commit.logs.iter().map(|log| format!("+{}@{}", log.bytes.len(), log.offset)));
    parts.join(" ") + if commit.last { " !" } else { "" }
}

fn claim() -> Claim {
    Claim { runtime_id: "job-7".to_owned(), owner: "me".to_owned(), term: 1 }
}

fn seen(state: InstanceState) -> Seen {
    let (name, status) = ("pika-7".to_owned(), format!("{state:?}"));
    Seen { name, status, state, claim: Some(claim()), vsock: None, base_alias: None }
}

fn running() -> Seen {
    seen(InstanceState::Running)
}

fn taken() -> Seen {
    let claim = Claim { owner: "other".to_owned(), term: 2, ..claim() };
    Seen { claim: Some(claim), ..running() }
}

fn hello(stream: &str) -> Vec<u8> {
    hello_with(stream, 0, None)
}

fn hello_with(stream: &str, last_seq: u64, request_id: Option<&str>) -> Vec<u8> {
    let request_id = request_id.map(|id| format!(r#","request_id":"{id}""#)).unwrap_or_default();
    let text = format!(
        r#"{{"hello":{{"protocol":1,"agent":"0.1.0","schema_version":1,"stream_id":"{stream}","boot_id":"b","first_seq":1,"last_seq":{last_seq}{request_id}}}}}"#
    );
    (text + "\n").into_bytes()
}

fn event(seq: u64, kind: &str) -> Vec<u8> {
    let text = format!(
        r#"{{"schema_version":1,"seq":{seq},"timestamp":"2026-01-31T12:00:00.000000Z","kind":"{kind}","message":"m"}}"#
    );
    let mut out = Vec::new();
    write_event(text.as_bytes(), &mut out);
    out
}

fn entry(path: &str) -> GuestMessage {
    let path = path.to_owned();
    GuestMessage::Entry(Entry { path, folder: true, mode: 0o755, size: 0, offset: 0, len: 0, digest: None })
}

//! A guest in a folder of its own, and a host's end of a session with it. No wait in here is without an end, and nothing that
//! is started from here can have a vsock.
#![allow(dead_code, unreachable_pub, reason = "each test file is a crate and uses a part of it")]

pub mod listener;
mod no_vsock;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::wire::{
    Ack, Cursor, Decoder, Empty, Frame, GuestHello, GuestMessage, HostHello, HostMessage, Notice, PROTOCOL, Role,
    Signal, Start,
};
use pika_cloud_common::{Event, GuestRequest, RunResult, Status};

/// Long enough for a busy machine, short enough to notice.
pub const SOON: Duration = Duration::from_secs(10);

/// A guest in a folder of its own.
pub struct Guest {
    pub dir: tempfile::TempDir,
}

/// What a verb came to.
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Guest {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.command_of(binary(), args)
    }

    /// The same of another build of the agent.
    pub fn command_of(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).env("PIKA_CLOUD_DIR", self.root());
        no_vsock::forbid(&mut command);
        command
    }

    /// Runs a verb to its end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        self.run_with(args, b"")
    }

    /// Runs a verb to its end, with something on its standard input.
    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Outcome {
        finish(self.command(args), input)
    }

    /// Runs a verb that must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(outcome.code, 0, "{args:?}: {}", outcome.stderr);
        outcome.stdout
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The events, all of which must be whole and without a hole.
    pub fn events(&self) -> Vec<Event> {
        let text = self.read("events.jsonl");
        assert!(text.is_empty() || text.ends_with('\n'), "the last line is torn");
        let events: Vec<_> = text.lines().map(|line| Event::decode(line.as_bytes()).unwrap()).collect();
        for (event, seq) in events.iter().zip(events.first().map_or(1, |event| event.seq)..) {
            assert_eq!(event.seq, seq, "a hole or a repeat");
        }
        events
    }

    pub fn kinds(&self) -> Vec<String> {
        self.events().iter().map(|event| event.kind.to_string()).collect()
    }

    pub fn status(&self) -> Status {
        Status::decode(self.read("status.json").as_bytes()).unwrap()
    }

    pub fn result(&self) -> RunResult {
        RunResult::decode(self.read("result.json").as_bytes()).unwrap()
    }

    /// `status.json` and `result.json` say what the events say.
    pub fn assert_documents_agree(&self) {
        let events = self.events();
        let Some(last) = events.iter().rfind(|event| event.changes_state()) else { return };
        let status = self.status();
        assert_eq!((status.state, status.updated_at), (last.kind.clone(), last.timestamp.clone()));
        if last.kind.is_terminal() {
            let result = self.result();
            assert_eq!(result.finished_at, last.timestamp);
            assert_eq!(result.exit_code, last.exit_code());
        } else {
            assert!(!self.path("result.json").exists());
        }
    }

    pub fn stream(&self) -> Stream {
        Stream::spawn(self.command(&["stream"]))
    }

    /// An owner's session that follows from the beginning.
    pub fn owner(&self) -> Stream {
        let mut stream = self.stream();
        stream.hello(Role::Owner, 1, None, true);
        stream
    }

    /// Everything that an observer is sent who does not follow.
    pub fn observe(&self) -> Vec<Said> {
        let mut stream = self.stream();
        stream.hello(Role::Observer, 0, None, false);
        stream.rest()
    }

    /// Where a host is that has everything so far.
    pub fn cursor(&self, seq: u64) -> Cursor {
        let stream: serde_json::Value = serde_json::from_str(&self.read("events.jsonl.stream")).unwrap();
        let digest = self
            .read("events.jsonl")
            .lines()
            .take_while(|line| Event::decode(line.as_bytes()).unwrap().seq <= seq)
            .fold(Digest::EMPTY_STREAM, |digest, line| digest.chain(line.as_bytes()));
        let stream_id = stream["stream_id"].as_str().unwrap().to_owned();
        Cursor { stream_id, seq, digest, logs: std::collections::BTreeMap::new() }
    }
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_pika-guest"))
}

/// Runs a command to its end, which must come.
pub fn finish(mut command: Command, input: &[u8]) -> Outcome {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that does not read its input must not hold us up; that it is gone is no error here.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let mut outputs = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stderr = std::thread::spawn(move || {
        let mut text = String::new();
        outputs.1.read_to_string(&mut text).unwrap();
        text
    });
    let stdout = std::thread::spawn(move || {
        let mut text = Vec::new();
        outputs.0.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let code = wait(&mut child);
    writer.join().unwrap();
    Outcome { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// The exit code of a process that must end; 128 plus the signal where one ended it.
pub fn wait(child: &mut Child) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    let deadline = Instant::now() + 3 * SOON;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
        }
        if Instant::now() > deadline {
            let family = family(child.id());
            child.kill().unwrap();
            panic!("it hangs:\n{family}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process and all that came of it, a line each: what each does, and which signals wait for it, are blocked, ignored, caught.
fn family(pid: u32) -> String {
    let tasks = format!("/proc/{pid}/task/{pid}/children");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let shown = |line: &&str| ["Name:", "State:", "Sig", "ShdPnd:"].iter().any(|key| line.starts_with(key));
    let own: Vec<String> = status.lines().filter(shown).map(|line| line.replace('\t', " ")).collect();
    let waits_in = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    let children = std::fs::read_to_string(tasks).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok()).map(family).collect::<String>();
    format!("{pid} in {waits_in}: {}\n{children}", own.join(", "))
}

/// Waits until `done`, which must come.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a guest said: a message and the raw bytes behind it.
#[derive(Debug)]
pub struct Said {
    pub message: GuestMessage,
    pub bulk: Vec<u8>,
}

impl Said {
    pub fn event(&self) -> Option<Event> {
        match &self.message {
            GuestMessage::Event(line) => Some(Event::decode(line.get().as_bytes()).unwrap()),
            _ => None,
        }
    }

    pub fn notice(&self) -> Option<&Notice> {
        match &self.message {
            GuestMessage::Notice(notice) => Some(notice),
            _ => None,
        }
    }

    /// The message as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::to_value(&self.message).unwrap()
    }
}

/// A host's end of a session.
pub struct Stream {
    /// The guest's end, where it is not behind a listener.
    child: Option<Child>,
    input: Option<Input>,
    said: Receiver<Said>,
}

enum Input {
    Pipe(ChildStdin),
    Socket(UnixStream),
}

impl Stream {
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = Self::listen(child.stdout.take().unwrap());
        let input = child.stdin.take().map(Input::Pipe);
        Self { child: Some(child), input, said }
    }

    /// A session over a connection.
    pub fn over(socket: UnixStream) -> Self {
        let said = Self::listen(socket.try_clone().unwrap());
        Self { child: None, input: Some(Input::Socket(socket)), said }
    }

    fn listen(mut output: impl std::io::Read + Send + 'static) -> Receiver<Said> {
        let (sender, said) = channel();
        std::thread::spawn(move || {
            let mut decoder = Decoder::new();
            let mut pending: Option<Said> = None;
            loop {
                while let Some(frame) = decoder.next_frame().expect("a frame") {
                    match frame {
                        Frame::Line(line) => {
                            let message = GuestMessage::decode(line)
                                .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(line)));
                            let len = match &message {
                                GuestMessage::Log(chunk) => chunk.len,
                                GuestMessage::Entry(entry) => entry.len,
                                _ => 0,
                            };
                            let said = Said { message, bulk: Vec::new() };
                            if len == 0 {
                                if sender.send(said).is_err() {
                                    return;
                                }
                            } else {
                                decoder.expect_bulk(len);
                                pending = Some(said);
                            }
                        }
                        Frame::Bulk(bytes) => pending.as_mut().unwrap().bulk.extend_from_slice(bytes),
                    }
                    if decoder.bulk_left() == 0
                        && let Some(said) = pending.take()
                        && sender.send(said).is_err()
                    {
                        return;
                    }
                }
                match output.read(decoder.space(64 * 1024)) {
                    Ok(0) | Err(_) => return,
                    Ok(n) => decoder.filled(n),
                }
            }
        });
        said
    }

    /// The process at the guest's end.
    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("not behind a listener").id()
    }

    pub fn say(&mut self, message: &HostMessage) {
        let mut line = Vec::new();
        message.write(&mut line);
        self.say_raw(&line);
    }

    pub fn say_raw(&mut self, bytes: &[u8]) {
        // A guest that has ended is no error here: the test looks at what it said.
        let _ = match self.input.as_mut().unwrap() {
            Input::Pipe(pipe) => pipe.write_all(bytes),
            Input::Socket(socket) => socket.write_all(bytes),
        };
    }

    /// Opens the session; what the guest answers is still to be read.
    pub fn hello(&mut self, role: Role, term: u64, after: Option<Cursor>, follow: bool) {
        self.say(&HostMessage::Hello(HostHello { protocol: PROTOCOL, role, term, machine: None, after, follow }));
    }

    pub fn ack(&mut self, seq: u64) {
        self.say(&HostMessage::Ack(Ack { seq, logs: std::collections::BTreeMap::new() }));
    }

    pub fn start(&mut self, request_id: &str, command: &str) {
        self.say(&HostMessage::Start(start(request_id, command)));
    }

    pub fn signal(&mut self, name: &str) {
        self.say(&HostMessage::Signal(Signal { name: name.to_owned() }));
    }

    pub fn release(&mut self) {
        self.say(&HostMessage::Release(Empty {}));
    }

    /// Ends the host's side.
    pub fn close(&mut self) {
        if let Some(Input::Socket(socket)) = self.input.take() {
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// The next thing said, which must come.
    pub fn next(&mut self) -> Said {
        self.said.recv_timeout(SOON).expect("the guest said nothing more")
    }

    /// The next thing said of that kind; what comes before is passed over.
    pub fn find<T>(&mut self, what: &str, mut pick: impl FnMut(&Said) -> Option<T>) -> T {
        let mut passed = Vec::new();
        loop {
            match self.said.recv_timeout(SOON) {
                Ok(said) => match pick(&said) {
                    Some(found) => return found,
                    None => passed.push(said.json().to_string()),
                },
                Err(error) => panic!("{error}: never said: {what}; but:\n{}", passed.join("\n")),
            }
        }
    }

    pub fn find_hello(&mut self) -> GuestHello {
        self.find("hello", |said| match &said.message {
            GuestMessage::Hello(hello) => Some(hello.clone()),
            _ => None,
        })
    }

    pub fn find_event(&mut self, kind: &str) -> Event {
        self.find(kind, |said| said.event().filter(|event| event.kind.as_str() == kind))
    }

    pub fn find_error(&mut self) -> serde_json::Value {
        self.find("an error", |said| said.json().get("error").cloned())
    }

    pub fn find_notice(&mut self, what: &str) -> serde_json::Value {
        self.find(what, |said| said.json().get("notice").filter(|notice| notice["what"] == what).cloned())
    }

    /// Whether the guest says nothing for a while, heartbeats aside.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        match self.said.recv_timeout(time) {
            Ok(said) => matches!(said.message, GuestMessage::Heartbeat(_)),
            Err(error) => error == RecvTimeoutError::Timeout,
        }
    }

    /// Everything up to the end of the session, which must come.
    pub fn rest(&mut self) -> Vec<Said> {
        let mut rest = Vec::new();
        loop {
            match self.said.recv_timeout(SOON) {
                Ok(said) => rest.push(said),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the session does not end; last: {:?}", rest.last()),
            }
        }
        if let Some(child) = &mut self.child {
            wait(child);
        }
        rest
    }

    /// How the guest's process ended.
    pub fn code(&mut self) -> i32 {
        wait(self.child.as_mut().expect("not behind a listener"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(Input::Socket(socket)) = self.input.take() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A request that runs as whoever runs the test.
pub fn start(request_id: &str, command: &str) -> Start {
    Start {
        request_id: request_id.to_owned(),
        request: GuestRequest {
            schema_version: 2,
            command: command.to_owned(),
            timeout_secs: 60,
            run_as_root: rustix::process::geteuid().is_root(),
            extra: serde_json::Map::new(),
        },
        env: std::collections::BTreeMap::new(),
        cwd: None,
        mounts: Vec::new(),
        stop_grace_secs: 1,
    }
}

/// The events among what was said.
pub fn events_of(said: &[Said]) -> Vec<Event> {
    said.iter().filter_map(Said::event).collect()
}

/// The log among what was said, which must be without a hole.
pub fn log_of(said: &[Said]) -> String {
    let mut log = Vec::new();
    for said in said {
        if let GuestMessage::Log(chunk) = &said.message {
            assert_eq!(chunk.offset, log.len() as u64);
            log.extend_from_slice(&said.bulk);
        }
    }
    String::from_utf8(log).unwrap()
}

/// Puts something odd at `path`, whatever was there.
pub fn misplace(path: &Path, kind: &str) {
    let _ = std::fs::remove_file(path);
    let _ = std::fs::remove_dir_all(path);
    match kind {
        "fifo" => {
            let mode = rustix::fs::Mode::from_raw_mode(0o666);
            rustix::fs::mkfifoat(rustix::fs::CWD, path, mode).unwrap();
        }
        "folder" => std::fs::create_dir(path).unwrap(),
        "link" => std::os::unix::fs::symlink("/etc/passwd", path).unwrap(),
        "dangling" => std::os::unix::fs::symlink("/nonexistent/file", path).unwrap(),
        "socket" => drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
        "hardlink" => {
            let other = path.with_file_name("other-name");
            std::fs::write(&other, "").unwrap();
            std::fs::hard_link(other, path).unwrap();
        }
        other => panic!("{other}"),
    }
}

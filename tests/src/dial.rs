//! A session with an agent in a container, as its bytes go: of a host's end that a test plays.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use pika_cloud_common::wire::{Decoder, Frame};
use serde_json::{Value, json};

use crate::incus::Incus;
use crate::wait::LIMIT;

/// Between its own input and output and a UNIX socket. Debian's minimum has a perl.
const BRIDGE: &str = r#"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "$ARGV[0]: $!\n";
    if (fork() == 0) { my $b; while (sysread(STDIN, $b, 65536)) { syswrite($s, $b) } $s->shutdown(1); exit }
    my $b; while (sysread($s, $b, 65536)) { syswrite(STDOUT, $b) }"#;

/// A host's end. Dropping it ends the session.
#[derive(Debug)]
pub struct Dial {
    child: Child,
    input: Option<ChildStdin>,
    said: Receiver<Value>,
}

impl Dial {
    /// Through `pika-guest stream`, as Incus runs it.
    pub fn exec(instance: &str) -> Self {
        Self::run(instance, &["pika-guest", "stream"])
    }

    /// Over a UNIX socket in a container with perl, by that user.
    pub fn unix(instance: &str, user: &str, path: &str) -> Self {
        Self::run(instance, &["runuser", "-u", user, "--", "perl", "-e", BRIDGE, path])
    }

    fn run(instance: &str, command: &[&str]) -> Self {
        let args = [&["exec", instance, "--"], command].concat();
        let mut command = Incus.client(&args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("the incus command runs");
        let mut output = child.stdout.take().expect("its output is a pipe");
        let (sender, said) = channel();
        std::thread::spawn(move || {
            let mut decoder = Decoder::new();
            while let Ok(read @ 1..) = output.read(decoder.space(64 * 1024)) {
                decoder.filled(read);
                while let Some(frame) = decoder.next_frame().expect("what an agent says can be read") {
                    let message: Value = match frame {
                        Frame::Line(line) => serde_json::from_slice(line).expect("what an agent says is JSON"),
                        Frame::Bulk(bytes) => json!({ "bulk": String::from_utf8_lossy(bytes) }),
                    };
                    let len = [&message["log"]["len"], &message["entry"]["len"]].iter().find_map(|len| len.as_u64());
                    if let Some(len) = len.filter(|&len| len > 0) {
                        decoder.expect_bulk(len);
                    }
                    if sender.send(message).is_err() {
                        return;
                    }
                }
            }
        });
        let input = child.stdin.take();
        Self { child, input, said }
    }

    /// Opens the session, and gives the agent's hello.
    pub fn hello(&mut self, role: &str) -> Value {
        self.say(&json!({ "hello": { "protocol": 1, "role": role, "term": 1, "follow": true } }));
        self.find("a hello", |said| said.get("hello").cloned())
    }

    /// Says something. An agent that has ended is no error here: the test looks at what it said.
    pub fn say(&mut self, message: &Value) {
        let _ = self.input.as_mut().map(|input| input.write_all(format!("{message}\n").as_bytes()));
    }

    /// Asks for a workload, of root.
    pub fn start(&mut self, request_id: &str, command: &str) {
        let request = json!({ "schema_version": 2, "command": command, "timeout_secs": 0, "run_as_root": true });
        self.say(&json!({ "start": { "request_id": request_id, "request": request, "stop_grace_secs": 5 } }));
    }

    /// The next thing that is picked of what is said.
    pub fn find<T>(&self, what: &str, mut pick: impl FnMut(&Value) -> Option<T>) -> T {
        let (deadline, mut passed) = (Instant::now() + LIMIT, Vec::new());
        loop {
            match self.said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(said) => match pick(&said) {
                    Some(found) => return found,
                    None => passed.push(said.to_string()),
                },
                Err(error) => panic!("{error}: never said: {what}; but:\n{}", passed.join("\n")),
            }
        }
    }

    /// The next event of that kind.
    pub fn event(&self, kind: &str) -> Value {
        self.find(kind, |said| said.get("event").filter(|event| event["kind"] == kind).cloned())
    }

    /// The next notice of that.
    pub fn notice(&self, what: &str) -> Value {
        self.find(what, |said| said.get("notice").filter(|notice| notice["what"] == what).cloned())
    }

    /// The next error.
    pub fn error(&self) -> Value {
        self.find("an error", |said| said.get("error").cloned())
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The private Incus, asked directly: what it says is what pika-cloud is held against.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::lab::Lab;

/// The private Incus of this run.
#[derive(Clone, Copy, Debug)]
pub struct Incus;

impl Incus {
    /// The status code and the envelope that a call is answered with.
    pub fn call(self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        call(&Lab::get().socket, method, path, body)
    }

    /// What a path holds, or `None` where Incus says 404.
    pub fn get(self, path: &str) -> Option<Value> {
        let (code, mut envelope) = self.call("GET", path, None);
        match code {
            200 => Some(envelope["metadata"].take()),
            404 => None,
            _ => panic!("GET {path}: {code} {envelope}"),
        }
    }

    /// Changes something, waits for it, and gives Incus's complaint, if it has one.
    pub fn change(self, method: &str, path: &str, body: Option<&Value>) -> Result<(), String> {
        let (code, envelope) = self.call(method, path, body);
        match (code, envelope["operation"].as_str()) {
            (200..=299, Some(operation)) if !operation.is_empty() => {
                let (code, done) = self.call("GET", &format!("{operation}/wait?timeout=120"), None);
                let status = &done["metadata"]["status_code"];
                // An operation that is gone by now has ended; the resource tells how.
                if code == 404 || *status == 200 { Ok(()) } else { Err(done.to_string()) }
            }
            (200..=299, _) => Ok(()),
            _ => Err(envelope.to_string()),
        }
    }

    /// An instance of the default project.
    pub fn instance(self, name: &str) -> Option<Value> {
        self.get(&format!("/1.0/instances/{name}"))
    }

    /// Names of all instances of the default project.
    pub fn instances(self) -> Vec<String> {
        let paths = self.get("/1.0/instances").expect("instances can be listed");
        let paths = paths.as_array().cloned().unwrap_or_default();
        let name = |path: &Value| path.as_str()?.rsplit('/').next().map(str::to_owned);
        paths.iter().filter_map(name).collect()
    }

    /// Stops an instance at once.
    pub fn stop(self, name: &str) {
        let body = json!({ "action": "stop", "force": true, "timeout": 60 });
        self.change("PUT", &format!("/1.0/instances/{name}/state"), Some(&body)).expect("the instance stops");
    }

    /// Stops and deletes an instance; fine where there is none.
    pub fn delete(self, name: &str) {
        for _ in 0..3 {
            let Some(instance) = self.instance(name) else { return };
            if instance["status"] != "Stopped" {
                let body = json!({ "action": "stop", "force": true, "timeout": 60 });
                let _ = self.change("PUT", &format!("/1.0/instances/{name}/state"), Some(&body));
            }
            let _ = self.change("DELETE", &format!("/1.0/instances/{name}"), None);
        }
    }

    /// Runs a shell script in an instance, as root.
    pub fn exec(self, name: &str, script: &str) -> Output {
        self.client(&["exec", name, "--", "sh", "-c", script]).output().expect("the incus command runs")
    }

    /// As [`Incus::exec`], and gives its output; panics where it fails.
    pub fn exec_ok(self, name: &str, script: &str) -> String {
        let output = self.exec(name, script);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` in {name}: {} {errors}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The `incus` command for this Incus, without the user's own settings of it.
    pub fn client(self, args: &[&str]) -> Command {
        let lab = Lab::get();
        let mut command = Command::new("incus");
        command.args(args).env("INCUS_DIR", &lab.incus_dir).env("INCUS_SOCKET", &lab.socket);
        command.env("INCUS_CONF", lab.incus_dir.with_file_name("client"));
        command.stdin(Stdio::null());
        command
    }
}

/// The status code and the envelope that the daemon behind a socket answers with.
pub(crate) fn call(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut socket = UnixStream::connect(socket).expect("the private Incus answers");
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: incus\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).and_then(|()| socket.write_all(body.as_bytes())).expect("Incus takes a request");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("Incus answers");
    let answer = String::from_utf8_lossy(&answer);
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("HTTP's code");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    (code, serde_json::from_str(body).unwrap_or(Value::Null))
}

use std::sync::Mutex;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::incus::create_request;

fn spec() -> RuntimeSpec {
    let text = r#"{
        "identity": {"runtime_id": "job-7", "instance_name": "job-7"},
        "incus": {"image_alias": "ci", "instance_type": "container"},
        "entry_command": "make"
    }"#;
    RuntimeSpec::from_json(text).unwrap()
}

/// An Incus that has one instance with that config, and does whatever it is asked to.
struct Fake {
    backend: IncusBackend,
    asked: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

impl Fake {
    fn new(runtime_id: &str, owner: &str, incarnation: u32, raced: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut of = spec();
        of.identity.runtime_id = runtime_id.to_owned();
        let ownership = Ownership { owner: owner.to_owned(), term: 2, incarnation };
        let config = create_request(&of, &ownership, Duration::ZERO, None)["config"].clone();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (listener, heard) = (UnixListener::bind(&path).unwrap(), Arc::clone(&asked));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                answer(stream, &config, raced, &heard).await;
            }
        });
        let clock = Arc::new(HostClock::open().unwrap());
        let agent = AgentSource::find(None);
        let (client, spec, owner) = (Client::unix(path), Arc::new(spec()), "me".into());
        let backend = IncusBackend { client, spec, owner, clock, agent };
        Self { backend, asked, _folder: folder }
    }

    async fn call(&self, call: Call) -> Result<(), CallFailure> {
        match self.backend.call(call).await {
            Answer::Started(answer) | Answer::Halted(answer) => answer,
            answer => panic!("{answer:?}"),
        }
    }

    /// What it was asked to change.
    fn changes(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| !asked.starts_with("GET")).cloned().collect()
    }
}

async fn answer(mut stream: UnixStream, config: &Value, raced: bool, asked: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(&mut stream);
    let (mut first, mut length, mut matches) = (String::new(), 0, false);
    reader.read_line(&mut first).await.unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        match line.trim().split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(("if-match", value)) => matches = value == "v7",
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await.unwrap();
    let (method, path) = first.split_once(' ').unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let said = if method == "PATCH" { body["config"].to_string() } else { body["action"].to_string() };
    asked.lock().unwrap().push(format!("{method} {said}"));
    let (code, body) = if method == "PATCH" && (raced || !matches) {
        (412, json!({ "type": "error", "error": "changed", "error_code": 412 }))
    } else if method == "GET" && has_instance(path) {
        let name = path.split(['/', '?']).nth(3).unwrap();
        let instance = json!({ "name": name, "project": "default", "status": "Stopped", "config": config });
        (200, json!({ "type": "sync", "metadata": instance }))
    } else if method == "GET"
        && (path.starts_with("/1.0/instances/unborn?") || path.starts_with("/1.0/instances/gone?"))
    {
        (404, json!({ "type": "error", "error": "Instance not found", "error_code": 404 }))
    } else if method == "GET" && path.starts_with("/1.0/instances?recursion=1&project=default ") {
        (200, json!({ "type": "sync", "metadata": [] }))
    } else if method == "GET" && path.starts_with("/1.0/operations?recursion=1&project=default ") {
        (200, json!({ "type": "sync", "metadata": operations() }))
    } else {
        (200, json!({ "type": "sync", "metadata": {} }))
    };
    let body = body.to_string();
    let head = format!("HTTP/1.1 {code} x\r\netag: v7\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
}

fn has_instance(path: &str) -> bool {
    ["job-7", "starting"].iter().any(|name| path.starts_with(&format!("/1.0/instances/{name}?project=default ")))
}

/// As Incus answers, in a project of its own and in the default one.
fn operations() -> Value {
    let operation = |code: u16, description: &str, path: &str| {
        json!({ "id": "x", "class": "task", "description": description, "status_code": code,
                "resources": { "instances": [path] }, "metadata": null, "may_cancel": false, "err": "" })
    };
    json!({
        "running": [
            operation(103, "Creating instance", "/1.0/instances/unborn"),
            operation(103, "Deleting instance", "/1.0/instances/gone?project=default"),
            operation(103, "Starting instance", "/1.0/instances/starting?project=default"),
            json!({ "id": "y", "class": "token", "description": "x", "status_code": 103, "resources": null }),
        ],
        "success": [operation(200, "Creating instance", "/1.0/instances/gone?project=default")],
    })
}

/// Invariant 4: a create that nobody heard the answer of may take long.
#[tokio::test]
async fn an_instance_that_is_being_created_is_not_taken_for_gone() {
    let fake = Fake::new("job-7", "me", 1, false);
    let look = async |instance: &str, search| match fake
        .backend
        .call(Call::Look { instance: instance.to_owned(), search })
        .await
    {
        Answer::Looked(answer) => answer.unwrap(),
        answer => panic!("{answer:?}"),
    };
    let seen = look("unborn", true).await.unwrap();
    assert_eq!((seen.state, seen.status.as_str()), (InstanceState::Changing, "being created"));
    assert_eq!(seen.claim.unwrap().owner, "me");
    assert_eq!(look("unborn", false).await, None, "nothing was asked for yet");
    assert_eq!(look("gone", true).await, None);

    let destroy = async |instance: &str| match fake
        .backend
        .call(Call::Destroy { instance: instance.to_owned(), term: 1 })
        .await
    {
        Answer::Destroyed(answer) => answer,
        answer => panic!("{answer:?}"),
    };
    let failure = destroy("unborn").await.unwrap_err();
    assert!(failure.transient && failure.message.contains("still creating"), "{failure:?}");
    assert_eq!(destroy("gone").await.unwrap(), crate::machine::Destroyed::Gone);
}

/// A start may take long, too, and whoever asked for it may have died meanwhile.
#[tokio::test]
async fn an_instance_that_is_being_started_is_not_taken_for_stopped() {
    let fake = Fake::new("job-7", "me", 1, false);
    for (instance, state) in [("job-7", InstanceState::Stopped), ("starting", InstanceState::Changing)] {
        let call = Call::Look { instance: instance.to_owned(), search: false };
        let Answer::Looked(Ok(Some(seen))) = fake.backend.call(call).await else { panic!("{instance} is not seen") };
        assert_eq!((seen.name.as_str(), seen.state), (instance, state));
    }
}

fn start(incarnation: u32) -> Call {
    Call::Start { instance: "job-7".to_owned(), incarnation }
}

fn halt() -> Call {
    Call::Halt { instance: "job-7".to_owned() }
}

const SET_TO_3: &str = r#"PATCH {"user.pika-cloud.incarnation":"3"}"#;

#[tokio::test]
async fn a_kept_instance_says_which_incarnation_it_is_started_for() {
    let fake = Fake::new("job-7", "me", 1, false);
    fake.call(start(3)).await.unwrap();
    assert_eq!(fake.changes(), [SET_TO_3, r#"PUT "start""#]);
    // One that was made for it says so already.
    let fake = Fake::new("job-7", "me", 3, false);
    fake.call(start(3)).await.unwrap();
    assert_eq!(fake.changes(), [r#"PUT "start""#]);
}

#[tokio::test]
async fn one_that_was_changed_meanwhile_is_not_started_and_is_looked_at_again() {
    let fake = Fake::new("job-7", "me", 1, true);
    assert!(fake.call(start(3)).await.unwrap_err().transient);
    assert_eq!(fake.changes(), [SET_TO_3]);
}

/// Invariants 4 and 6.
#[tokio::test]
async fn what_is_not_ours_is_neither_started_nor_stopped() {
    for (runtime_id, owner, now) in [("job-7", "other", "owner `other` holds it"), ("job-8", "me", "runtime `job-8`")] {
        let fake = Fake::new(runtime_id, owner, 1, false);
        for call in [start(3), halt()] {
            let failure = fake.call(call).await.unwrap_err();
            assert!(!failure.transient && failure.message.contains(now), "{failure:?}");
        }
        assert!(fake.changes().is_empty(), "{:?}", fake.changes());
    }
    let fake = Fake::new("job-7", "me", 1, false);
    fake.call(halt()).await.unwrap();
    assert_eq!(fake.changes(), [r#"PUT "stop""#]);
}

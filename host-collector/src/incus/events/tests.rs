use futures_util::SinkExt as _;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};

use super::*;

fn event(action: &str, source: &str, more: &str) -> String {
    format!(
        r#"{{"type":"lifecycle","timestamp":"2026-11-23T05:20:44Z","metadata":{{"action":"{action}","source":"{source}"{more}}},
        "location":"none","project":"p"}}"#
    )
}

#[test]
fn an_event_names_its_instances() {
    let keys = |action: &str, source: &str, more: &str| {
        let keys = instances_of(event(action, source, more).as_bytes());
        keys.into_iter().map(|(project, name)| format!("{project}/{name}")).collect::<Vec<_>>()
    };
    assert_eq!(keys("instance-stopped", "/1.0/instances/c1", ""), ["p/c1"]);
    assert_eq!(keys("instance-started", "/1.0/instances/c1?project=p", ""), ["p/c1"]);
    assert_eq!(keys("instance-snapshot-created", "/1.0/instances/c1/snapshots/s", ""), ["p/c1"]);
    let renamed = r#","context":{"old_name":"c1"}"#;
    assert_eq!(keys("instance-renamed", "/1.0/instances/c9", renamed), ["p/c9", "p/c1"]);
    for other in [("project-created", "/1.0/projects/p1"), ("storage-volume-created", "/1.0/instances/x")] {
        assert!(keys(other.0, other.1, "").is_empty());
    }
    for broken in ["", "{}", "[]", "nonsense", r#"{"metadata":{"action":"instance-stopped"}}"#] {
        assert!(instances_of(broken.as_bytes()).is_empty(), "{broken}");
    }
}

/// A daemon that says what it is told to, and closes the connection at `None`.
async fn daemon(listener: UnixListener, mut told: mpsc::UnboundedReceiver<Option<String>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        while let Some(said) = told.recv().await.unwrap() {
            socket.send(Message::text(said)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn every_connection_wakes_all_and_an_event_wakes_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (tell, told) = mpsc::unbounded_channel();
    let serving = tokio::spawn(daemon(UnixListener::bind(&path).unwrap(), told));
    let events = Client::unix(&path).lifecycle_events();
    let mut mine = events.subscribe("p", "mine");
    let mut other = events.subscribe("p", "other");
    let mut elsewhere = events.subscribe("q", "mine");
    let all = async {
        for _ in 0..3 {
            mine.next().await;
            other.next().await;
            elsewhere.next().await;
            tell.send(Some("nonsense".to_owned())).unwrap();
            tell.send(Some(event("instance-stopped", "/1.0/instances/mine", ""))).unwrap();
            mine.next().await;
            assert!(!other.receiver.has_changed().unwrap() && !elsewhere.receiver.has_changed().unwrap());
            tell.send(None).unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all).await.unwrap();
    drop((mine, other));
    assert_eq!(events.shared.lock().len(), 1, "nobody waits for the others any more");
    drop(elsewhere);
    assert!(events.shared.lock().is_empty());
    serving.abort();
}

/// A daemon that tells of single projects only. Says what it was asked for.
async fn strict_daemon(listener: UnixListener, asked: mpsc::UnboundedSender<String>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let asked = asked.clone();
        #[expect(clippy::result_large_err, reason = "the library's own signature")]
        let allow = move |request: &Request, response: Response| {
            let query = request.uri().query().unwrap().to_owned();
            let is_refused = query.contains("all-projects");
            asked.send(query).unwrap();
            if !is_refused {
                return Ok(response);
            }
            let mut refusal = ErrorResponse::new(None);
            *refusal.status_mut() = hyper::StatusCode::FORBIDDEN;
            Err(refusal)
        };
        tokio::spawn(async move {
            let Ok(mut socket) = tokio_tungstenite::accept_hdr_async(stream, allow).await else { return };
            while socket.next().await.is_some() {}
        });
    }
}

#[tokio::test]
async fn whoever_may_not_hear_of_all_projects_hears_of_each() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (asked, mut was_asked) = mpsc::unbounded_channel();
    let serving = tokio::spawn(strict_daemon(UnixListener::bind(&path).unwrap(), asked));
    let events = Client::unix(&path).lifecycle_events();
    let all = async {
        let mut first = events.subscribe("p q", "mine");
        assert_eq!(was_asked.recv().await.unwrap(), "type=lifecycle&all-projects=true");
        assert_eq!(was_asked.recv().await.unwrap(), "type=lifecycle&project=p%20q");
        first.next().await;
        // One that comes later makes no noise elsewhere.
        let mut second = events.subscribe("z", "mine");
        assert_eq!(was_asked.recv().await.unwrap(), "type=lifecycle&project=z");
        second.next().await;
        assert!(!first.receiver.has_changed().unwrap());
    };
    tokio::time::timeout(Duration::from_secs(20), all).await.unwrap();
    serving.abort();
}

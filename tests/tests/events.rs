//! Wake-ups from a real daemon, over its death.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use pika_cloud_tests::Daemon;
use pika_host_collector::incus::{Client, Wakes};
use serde_json::json;

async fn woken(wakes: &mut Wakes, why: &str) {
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, wakes.next()).await.unwrap_or_else(|_| panic!("no wake: {why}"));
}

/// Until nothing comes any more.
async fn drain(wakes: &mut Wakes) {
    while tokio::time::timeout(Duration::from_millis(300), wakes.next()).await.is_ok() {}
}

#[tokio::test]
async fn a_restart_of_the_daemon_wakes_everybody_and_events_come_again() {
    let mut daemon = Daemon::start();
    let pool = json!({ "name": "default", "driver": "dir" });
    assert_eq!(daemon.call("POST", "/1.0/storage-pools", Some(&pool)).0, 201);
    let client = Client::unix(daemon.socket());
    let events = client.lifecycle_events();
    let (mut mine, mut other) = (events.subscribe("default", "mine"), events.subscribe("default", "other"));
    woken(&mut mine, "a connection").await;
    woken(&mut other, "a connection").await;

    let empty = json!({
        "name": "mine", "type": "container", "source": { "type": "none" },
        "devices": { "root": { "type": "disk", "path": "/", "pool": "default" } },
    });
    client.create_instance("default", &empty).await.unwrap();
    woken(&mut mine, "its instance was created").await;
    drain(&mut mine).await;
    let waked = tokio::time::timeout(Duration::from_millis(1), other.next()).await;
    assert!(waked.is_err(), "nothing happened to the other one");

    daemon.kill();
    daemon.start_again();
    woken(&mut mine, "a new connection").await;
    woken(&mut other, "a new connection").await;
    drain(&mut mine).await;
    let (instance, etag) = client.instance_with_etag("default", "mine").await.unwrap().unwrap();
    assert_eq!(instance.status, "Stopped");
    let config = [("user.colour".to_owned(), "blue".to_owned())].into();
    client.patch_instance("default", "mine", &etag, &config).await.unwrap();
    woken(&mut mine, "its config was changed").await;
}

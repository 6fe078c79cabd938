//! The agent behind real `AF_VSOCK`, in VMs that are up in seconds, followed by the library's own driver.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;
use std::time::{Duration, Instant};

use pika_cloud_common::digest::Digest;
use pika_cloud_common::limits::VSOCK_PORT;
use pika_cloud_tests::vm::{DialError, DrivenVm, GATE, PEER_PORT, Rig, Vm, VmOptions, Vsock, hang_up, spec};
use pika_cloud_tests::{debian_disk_with_agent, sha256};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// What a guest that is up does within milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a whole job may take on a machine that is busy.
const JOB: Duration = Duration::from_secs(360);

/// A line, without its newline.
async fn line(stream: &mut UnixStream) -> String {
    let read = async {
        let mut line = Vec::new();
        loop {
            match stream.read_u8().await.unwrap() {
                b'\n' => return String::from_utf8(line).unwrap(),
                byte => line.push(byte),
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("a line comes")
}

/// Dials until something listens.
async fn dial(vsock: &Vsock, port: u32) -> UnixStream {
    let began = Instant::now();
    loop {
        match vsock.dial(port, PATIENCE).await {
            Ok(stream) => return stream,
            Err(error) => assert!(began.elapsed() < JOB, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rig_carries_all_bytes_and_tells_refusals_apart() {
    let Some(rig) = Rig::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let mut vm = Vm::start(rig, folder.path(), &VmOptions::default()).unwrap();
    let early = vm.vsock().dial(PEER_PORT, PATIENCE).await;
    assert!(matches!(early, Err(DialError::NotUp)), "{early:?}");
    vm.wait_up();
    let mut echo = dial(&vm.vsock(), PEER_PORT).await;
    println!("the first reply after {:.1} s", began.elapsed().as_secs_f64());
    echo.write_all(b"echo\nthere and back\n").await.unwrap();
    assert_eq!(line(&mut echo).await, "there and back");
    let closed = vm.vsock().dial(1, PATIENCE).await;
    assert!(matches!(closed, Err(DialError::Closed)), "{closed:?}");

    // A device or a kernel that loses bytes does so in writes of more than a page, or more than 32 KiB.
    for chunk in [4096, 32 << 10, 64 << 10, 256 << 10] {
        let len = 4 << 20;
        let mut source = dial(&vm.vsock(), PEER_PORT).await;
        source.write_all(format!("send {len} {chunk}\n").as_bytes()).await.unwrap();
        let mut bytes = vec![0; len];
        tokio::time::timeout(PATIENCE, source.read_exact(&mut bytes)).await.expect("no byte is lost").unwrap();
        assert_eq!(line(&mut source).await, sha256(&bytes));
        let mut sink = dial(&vm.vsock(), PEER_PORT).await;
        sink.write_all(format!("take {len}\n").as_bytes()).await.unwrap();
        for part in bytes.chunks(chunk) {
            sink.write_all(part).await.unwrap();
        }
        assert_eq!(line(&mut sink).await, sha256(&bytes));
    }

    assert_eq!(vm.status(), "running");
    vm.pause();
    let paused = vm.vsock().dial(PEER_PORT, Duration::from_millis(500)).await;
    assert!(matches!(paused, Err(DialError::TimedOut)), "{paused:?}");
    echo.write_all(b"meanwhile\n").await.unwrap();
    vm.resume();
    assert_eq!(line(&mut echo).await, "meanwhile");

    vm.reboot().unwrap();
    assert!(echo.read_u8().await.is_err(), "no stream outlives its guest");
    vm.wait_up();
    drop(dial(&vm.vsock(), PEER_PORT).await);
    vm.kill();
    assert!(!vm.is_running());
}

/// An observer's hello to the machine of that uuid.
fn hello_to(uuid: &str, follow: bool) -> String {
    let machine = Digest::of(uuid.as_bytes());
    format!(
        "{}\n",
        json!({ "hello": { "protocol": 1, "role": "observer", "term": 1, "machine": machine, "follow": follow } })
    )
}

/// What is said to an observer's hello.
async fn greet(vsock: &Vsock, hello: &str) -> Value {
    let mut stream = dial(vsock, VSOCK_PORT).await;
    stream.write_all(hello.as_bytes()).await.unwrap();
    let said = line(&mut stream).await;
    hang_up(stream).await;
    serde_json::from_str(&said).unwrap()
}

#[test]
fn a_job_is_followed_and_all_it_leaves_is_collected() {
    let Some(rig) = Rig::get() else { return };
    let command = format!(
        "set -e
        cat /sys/class/dmi/id/product_uuid
        head -c 104857600 /dev/urandom > $PIKA_CLOUD_DIR/artifacts/blob
        sha256sum $PIKA_CLOUD_DIR/artifacts/blob | cut -d' ' -f1
        pika-guest progress blob --fraction 0.5
        pika-guest ready --message 'serving'
        {GATE}
        exit 3"
    );
    let options = VmOptions { uuid: "0b57eda0-5f7f-4a3b-9c6d-5d0f5a1c9e21".to_owned(), ..VmOptions::default() };
    let mut driven = DrivenVm::start(rig, &spec("job", &command), options.clone());
    driven.wait_ready();
    // An observer beside the owner. What it hears, the agent says of the machine that it runs on.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let greet = |hello: &str| runtime.block_on(greet(&driven.with_vm(|vm| vm.vsock()), hello));
    let said = greet(&hello_to(&options.uuid, false));
    assert_eq!(said["hello"]["machine_uuid"], *options.uuid, "{said}");
    // Whatever runs on the host can dial, and has the host's number: who does not know the machine is told nothing.
    let nameless = json!({ "hello": { "protocol": 1, "role": "owner", "term": 99, "follow": false } });
    for hello in [format!("{nameless}\n"), hello_to("0b57eda0-0000-0000-0000-000000000000", false)] {
        let said = greet(&hello);
        assert_eq!(said["error"]["code"], "another_machine", "{said}");
        assert!(!said.to_string().contains(&options.uuid), "{said}");
    }
    driven.open_gate();
    let journal = driven.finish(JOB);

    assert_eq!(journal.check_events(1), 4);
    let kinds: Vec<&Value> = journal.events(1).iter().map(|event| &event["kind"]).collect();
    assert_eq!(kinds, ["starting", "starting", "ready", "failed"]);
    let verdict = journal.verdict(1);
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&json!("failed"), &json!(3)), "{verdict}");
    assert_eq!(verdict["evidence"]["collection"]["complete"], true, "{verdict}");
    let outputs = driven.outputs();
    let log = outputs.log();
    let said: Vec<&str> = log.lines().collect();
    assert_eq!(said[0], options.uuid);
    let digest = Command::new("sha256sum").arg(outputs.path("artifacts/blob")).output().unwrap().stdout;
    assert_eq!(String::from_utf8_lossy(&digest).split(' ').next(), Some(said[1]), "100 MiB, byte for byte");
    assert_eq!(outputs.json("result.json")["exit_code"], 3);
    let came_by: Vec<_> = journal.records.iter().filter(|record| record["host"]["what"] == "session").collect();
    assert_eq!(came_by.len(), 1);
    assert_eq!(came_by[0]["host"]["transport"], "vsock");
}

#[test]
fn a_process_of_the_guest_is_no_host() {
    let Some(rig) = Rig::get() else { return };
    // CID 1 and its own are the guest itself; 2 is the host, where nothing listens.
    let command = "id -u; for cid in 1 3; do vsock-peer dial $cid 20555; done; vsock-peer dial 1 20600";
    let spec = with(spec("stranger", command), "/bootstrap/run_as_root", json!(false));
    let options = VmOptions { words: "pika_rig.loopback".to_owned(), ..VmOptions::default() };
    let mut driven = DrivenVm::start(rig, &spec, options);
    let journal = driven.finish(JOB);
    assert_eq!(journal.verdict(1)["verdict"], "completed");
    let log = driven.outputs().log();
    let lines: Vec<&str> = log.lines().collect();
    println!("{log}");
    // The last dial shows that the loopback carries: that peer waits for what it is asked.
    assert_eq!(lines[0], "1000", "unprivileged");
    assert_eq!(lines[lines.len() - 2..], ["connected", "silent"]);
    assert!(!log.contains("hello"), "the agent answers a stranger: {log}");
    let refused = log.lines().filter(|line| line.starts_with("refused") || line.starts_with("closed")).count();
    assert_eq!(refused, 2, "{log}");
}

/// A piece of shell: `agents` prints the process ids of all of the agent that talks to the host, its listener first.
const AGENTS: &str = r#"agents() {
    for name in pika-guest pika-session; do
        for process in /proc/[0-9]*; do
            set -- $(cat $process/cmdline 2> /dev/null | tr '\0' ' ')
            [ "${1##*/} $2" = "pika-guest serve" ] && grep -qx $name $process/comm && echo ${process#/proc/}
        done
    done
}"#;

/// The same spec with another value at a JSON pointer.
fn with(mut spec: Value, pointer: &str, value: Value) -> Value {
    *spec.pointer_mut(pointer).unwrap() = value;
    spec
}

/// Hangs up at once, in the middle of a line, after a hello, and after its answer.
async fn connect_and_disconnect(vsock: &Vsock, times: u32) {
    let hello = hello_to(&VmOptions::default().uuid, true);
    let hello = hello.as_bytes();
    for number in 0..times {
        // Beyond 16 sessions at once, the agent turns away who comes; that guest is slower to end them than we are to come.
        while !visit(vsock, [&hello[..0], &hello[..20], hello, hello][number as usize % 4], number % 4 == 3).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Whether a session took what was said, and answered it where that was waited for.
async fn visit(vsock: &Vsock, said: &[u8], waits: bool) -> bool {
    let mut stream = dial(vsock, VSOCK_PORT).await;
    let visit = async {
        stream.write_all(said).await?;
        if waits {
            let mut start = [0; 8];
            stream.read_exact(&mut start).await?;
            return Ok(start == *b"{\"hello\"");
        }
        Ok::<_, std::io::Error>(true)
    };
    let visited = tokio::time::timeout(PATIENCE, visit).await.expect("the agent answers").unwrap_or(false);
    hang_up(stream).await;
    visited
}

#[test]
fn a_thousand_connections_leave_nothing_in_the_guest() {
    let Some(rig) = Rig::get() else { return };
    // The owner's own session is one of what is counted, before and after.
    let command = format!(
        "{AGENTS}
        count() {{
            all=$(agents); set -- $all; serve=$1; fds=0
            for pid in $all; do fds=$((fds + $(ls /proc/$pid/fd | wc -l))); done
            echo $# $fds $(awk '/VmRSS/ {{ print $2 }}' /proc/$serve/status) $serve
        }}
        pika-guest ready
        {GATE}
        sleep 3; count; rm /tmp/gate
        pika-guest progress counted
        {GATE}
        sleep 3; count"
    );
    let mut driven = DrivenVm::start(rig, &spec("thousand", &command), VmOptions::default());
    driven.wait_ready();
    let vsock = driven.with_vm(|vm| vm.vsock());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // The first ones bring in whatever is needed once.
    runtime.block_on(connect_and_disconnect(&vsock, 100));
    driven.open_gate();
    driven.wait_record("the first count", |record| record["guest"]["details"]["progress"]["name"] == "counted");
    let began = Instant::now();
    runtime.block_on(connect_and_disconnect(&vsock, 1000));
    println!("a thousand connections in {:.1} s", began.elapsed().as_secs_f64());
    driven.open_gate();
    let journal = driven.finish(JOB);
    assert_eq!(journal.verdict(1)["verdict"], "completed");
    let log = driven.outputs().log();
    println!("processes, descriptors, KiB, serve:\n{log}");
    let counts: Vec<Vec<u64>> =
        log.lines().map(|line| line.split(' ').map(|number| number.parse().unwrap()).collect()).collect();
    assert_eq!(counts[0][..2], counts[1][..2], "processes and descriptors");
    assert_eq!(counts[0][3], counts[1][3], "the agent was not started again");
    assert!(counts[1][2] <= counts[0][2] + 64, "memory, in KiB: {counts:?}");
}

/// Invariant 1.
#[test]
fn every_event_arrives_once_though_the_agent_is_killed_ten_times() {
    let Some(rig) = Rig::get() else { return };
    // Whatever of the agent talks to the host is killed; what the job itself runs is not.
    let killer = r#"
        turn=0
        while [ $turn -lt 10 ]; do
            turn=$((turn + 1))
            awk -v turn=$turn 'BEGIN { for (i = 1; i <= 10000; i++)
                printf "{\"kind\":\"progress\",\"name\":\"n\",\"details\":{\"i\":%d}}\n", (turn - 1) * 10000 + i }' | pika-guest emit || exit 1
            all=$(agents)
            echo killing $(echo $all | wc -w)
            kill -9 $all 2> /dev/null
            while [ -z "$(agents)" ]; do sleep 0.1; done
        done"#;
    let command = format!("{AGENTS}{killer}");
    let mut driven = DrivenVm::start(rig, &spec("killed", &command), VmOptions::default());
    let journal = driven.finish(JOB);
    assert_eq!(journal.verdict(1)["verdict"], "completed", "{}", driven.outputs().log());
    assert_eq!(journal.check_events(1), 100_002);
    let events = journal.events(1);
    let numbers = events.iter().filter_map(|event| event["details"]["i"].as_u64());
    assert!(numbers.eq(1..=100_000), "what was said, in its order");
    let log = driven.outputs().log();
    println!("{log}");
    // The listener and the owner's session; where one was killed while the host was about to dial again, the listener only.
    assert_eq!(log.lines().filter(|line| line.starts_with("killing")).count(), 10);
    assert!(log.lines().any(|line| line == "killing 2"), "no session was killed: {log}");
}

#[test]
fn a_guest_that_was_paused_is_unreachable_and_comes_back() {
    let Some(rig) = Rig::get() else { return };
    // Unreachable after 16 s without a word (PEER_TIMEOUT), and lost after these.
    let spec = spec("paused", &format!("echo before; pika-guest ready; {GATE}; echo after"));
    let spec = with(spec, "/watchdogs/silence_secs", json!(90));
    let mut driven = DrivenVm::start(rig, &spec, VmOptions::default());
    driven.wait_ready();
    driven.with_vm(|vm| vm.pause());
    std::thread::sleep(Duration::from_secs(30));
    let is = |state: &'static str| move |record: &Value| record["host"]["state"] == state;
    driven.wait_record("unreachable", is("unreachable"));
    driven.with_vm(|vm| vm.resume());
    driven.wait_record("the way back", |record| record["host"]["message"] == "the guest is heard again");
    driven.open_gate();
    let journal = driven.finish(JOB);
    assert_eq!(journal.verdict(1)["verdict"], "completed");
    assert_eq!(driven.outputs().log(), "before\nafter\n");
    journal.check_events(1);
}

#[test]
fn a_guest_that_is_gone_has_died() {
    let Some(rig) = Rig::get() else { return };
    let end = |name: &str, act: fn(&mut Vm)| {
        let mut driven =
            DrivenVm::start(rig, &spec(name, "echo words; pika-guest ready; sleep 1000"), VmOptions::default());
        driven.wait_ready();
        driven.with_vm(act);
        let journal = driven.finish(JOB);
        let verdict = journal.verdict(1).clone();
        println!("{name}: {verdict}");
        assert_eq!(verdict["verdict"], "guest_died", "{verdict}");
        journal.check_events(1);
        verdict
    };
    end("qemu-killed", Vm::kill);
    let rebooted = end("rebooted", |vm| vm.reboot().unwrap());
    assert_eq!(rebooted["cause"], "rebooted", "{rebooted}");
}

/// The sandbox of its unit lets the agent listen on vsock and learn its machine's uuid, and no workload is in it.
#[test]
fn the_units_of_systemd_serve_in_a_machine() {
    let Some(rig) = Rig::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let command = "pika-guest ready; systemctl is-active pika-guest.service pika-guest-supervise.socket
        cat /proc/1/comm /proc/self/cgroup; stat -c '%a %G' /run/pika-cloud; touch /etc/written && echo written
        systemctl --no-legend --plain list-units --failed 'pika-*'; echo 1 > $PIKA_CLOUD_DIR/artifacts/one; exit 4";
    let spec = spec("systemd", command);
    let root = Some(debian_disk_with_agent(folder.path()));
    let mut driven = DrivenVm::start(rig, &spec, VmOptions { memory_mib: 512, root, ..VmOptions::default() });
    let journal = driven.finish(JOB);
    let verdict = journal.verdict(1);
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&"failed".into(), &4.into()), "{verdict}");
    let log = driven.outputs().log();
    assert!(log.starts_with("active\nactive\nsystemd\n"), "{log}");
    assert!(log.contains("pika-guest-supervise@") && !log.contains("/pika-guest.service"), "{log}");
    assert!(log.ends_with("2775 pika-cloud\nwritten\n"), "{log}");
    assert_eq!(driven.outputs().artifacts(), ["one"]);
    journal.check_events(1);
}

#[test]
fn a_guest_that_keeps_no_contract_is_told_so() {
    let Some(rig) = Rig::get() else { return };
    for (role, outcome) in [("garbage", "guest_died"), ("silent", "timed_out")] {
        let spec = with(spec(role, "true"), "/watchdogs/boot_secs", json!(30));
        let spec = with(spec, "/watchdogs/collect_secs", json!(5));
        let options = VmOptions { words: format!("pika_rig.plays={role}"), ..VmOptions::default() };
        let mut driven = DrivenVm::start(rig, &spec, options);
        // What follows is not for want of a guest.
        driven.wait_up();
        let journal = driven.finish(JOB);
        let verdict = journal.verdict(1);
        println!("{role}: {verdict}");
        assert_eq!(verdict["verdict"], outcome, "{verdict}");
        // What its console said is the evidence of a guest whose agent said nothing.
        let console = verdict["evidence"]["console"].as_str();
        assert!(console.is_some_and(|console| console.contains("pika-rig: up")), "{verdict}");
    }
}

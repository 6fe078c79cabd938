//! Sessions behind the listener, over its UNIX socket. Over vsock the tests at the top dial it in virtual machines; here the kernel
//! has none for what is started (`rig/no_vsock.rs`), which is one of the things that a listener must live with.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

use pika_cloud_common::wire::{HostMessage, Role};
use pika_guest_agent::serve::{MAX_LOCAL_SESSIONS, MAX_SESSIONS};
use rig::listener::{Serve, descriptors_of, hear, status_of};
use rig::{Guest, SOON, Stream, eventually, wait};
use rustix::process::{Pid, Signal};
use serde_json::json;

#[test]
fn an_owner_acknowledges_and_observers_follow() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let mut owner = serve.session(Role::Owner);
    let mut observers: Vec<_> = (0..3).map(|_| serve.session(Role::Observer)).collect();
    guest.ok(&["ready", "--message", "here"]);
    owner.find_event("ready");
    owner.ack(1);
    eventually("acknowledged", || guest.path("events.jsonl.ack").exists());
    for observer in &mut observers {
        assert_eq!(observer.find_event("ready").message, "here");
    }
    observers[0].ack(1);
    assert_eq!(observers[0].find_error()["code"], "not_owner");
    // A newer owner takes over; who follows stays.
    let mut newer = serve.session(Role::Owner);
    assert_eq!(owner.find_error()["code"], "superseded");
    owner.rest();
    guest.ok(&["progress", "half"]);
    newer.find("progress", rig::Said::event);
    observers[0].find("progress", rig::Said::event);
}

#[test]
fn a_job_over_the_listener() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let mut owner = serve.session(Role::Owner);
    owner.start("job-1", "echo out; exit 3");
    owner.find_notice("started");
    let failed = owner.find_event("failed");
    assert_eq!(failed.details, Some(json!({"exit_code": 3})));
    owner.release();
    owner.close();
    assert_eq!(guest.read("logs/guest.log"), "out\n");
}

#[test]
fn so_many_sessions_and_no_more() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let mut open: Vec<_> = (0..MAX_LOCAL_SESSIONS).map(|_| serve.session(Role::Observer)).collect();
    for _ in 0..3 {
        let heard = hear(serve.connect(), SOON);
        let line: serde_json::Value = serde_json::from_str(&heard).unwrap();
        assert_eq!(line["error"]["code"], "too_many_sessions");
    }
    serve.find("there are 8 sessions");
    // Those that are open are none the worse for it, and one that ends makes room.
    guest.ok(&["ready"]);
    for stream in &mut open {
        stream.find_event("ready");
    }
    drop(open.pop());
    eventually("room", || serve.sessions().len() < MAX_LOCAL_SESSIONS);
    serve.session(Role::Owner);
}

/// An init may ignore the end of its children, and hand that on.
#[test]
fn sessions_are_counted_under_any_init() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    // SAFETY: signal is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let serve = Serve::spawn(command, &path);
    serve.find("listens on");
    for _ in 0..2 * MAX_SESSIONS {
        drop(serve.session(Role::Observer));
        eventually("no sessions", || serve.sessions().is_empty());
    }
}

#[test]
fn garbage_and_silence_harm_nobody_else() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let began = Instant::now();
    let silent = serve.connect();
    let mut torn = serve.connect();
    torn.write_all(b"{\"hello\":{\"protocol\":1,").unwrap();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\xff\xfe\n", b"{}\n", &vec![b'x'; 300_000]] {
        let mut socket = serve.connect();
        // It may end before all of it was written.
        let _ = socket.write_all(garbage);
        let heard = hear(socket, SOON);
        assert!(heard.is_empty() || heard.contains("bad_message"), "{heard}");
    }
    let mut owner = serve.session(Role::Owner);
    guest.ok(&["ready"]);
    owner.find_event("ready");
    // Whoever says nothing is not waited for, as one whose machine was restored without us.
    assert_eq!((hear(silent, 2 * SOON), hear(torn, 2 * SOON)), (String::new(), String::new()));
    assert!(began.elapsed() > Duration::from_secs(15), "{:?}", began.elapsed());
    eventually("only one is left", || serve.sessions().len() <= 1);
}

#[test]
fn a_killed_listener_leaves_workloads_and_the_next_one_goes_on() {
    let guest = Guest::new();
    let mut serve = Serve::new(&guest);
    let mut owner = serve.session(Role::Owner);
    let gate = guest.dir.path().join("gate");
    let command = format!("echo one; while ! [ -e {} ]; do sleep 0.05; done; echo two", gate.display());
    owner.start("job-1", &command);
    owner.find_event("starting");
    let sessions = serve.sessions();
    serve.child.kill().unwrap();
    wait(&mut serve.child);
    // Its sessions end with it at once, so that nobody has some that nobody counts.
    let killed = Instant::now();
    assert_eq!(owner.rest().last().unwrap().json(), json!({"end": {"reason": "shutdown"}}));
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
    eventually("no sessions", || sessions.iter().all(|pid| status_of(*pid).is_empty()));
    assert!(serve.path.exists(), "it had no time to take it away");

    let serve = Serve::new(&guest);
    let mut owner = serve.dial();
    owner.hello(Role::Owner, 1, Some(guest.cursor(1)), true);
    assert_eq!(owner.find_hello().request_id.as_deref(), Some("job-1"));
    owner.start("job-1", &command);
    owner.find_notice("already_started");
    std::fs::write(gate, "").unwrap();
    assert_eq!(owner.find_event("completed").details, Some(json!({"exit_code": 0})));
    assert_eq!(guest.kinds(), ["starting", "completed"]);
    assert_eq!(guest.read("logs/guest.log"), "one\ntwo\n");
}

#[test]
fn a_session_that_is_killed_harms_no_other() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let victim = serve.session(Role::Observer);
    let pid = serve.sessions()[0];
    let mut owner = serve.session(Role::Owner);
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    serve.find("a session was ended by signal 9");
    drop(victim);
    guest.ok(&["ready"]);
    owner.find_event("ready");
    assert_eq!(serve.sessions().len(), 1);
}

#[test]
fn term_ends_sessions_and_no_workload() {
    let guest = Guest::new();
    let mut serve = Serve::new(&guest);
    let mut owner = serve.session(Role::Owner);
    owner.start("job-1", "sleep 1; echo lived");
    owner.find_event("starting");
    let mut silent = serve.connect();
    let began = Instant::now();
    serve.signal(Signal::TERM);
    assert_eq!(owner.rest().last().unwrap().json(), json!({"end": {"reason": "shutdown"}}));
    assert_eq!(wait(&mut serve.child), 0);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(!serve.path.exists());
    let mut rest = Vec::new();
    let _ = silent.read_to_end(&mut rest);
    eventually("the end of the workload", || guest.path("result.json").exists());
    assert_eq!((guest.result().exit_code, guest.read("logs/guest.log")), (Some(0), "lived\n".to_owned()));
}

#[test]
fn a_session_that_does_not_end_is_killed() {
    let guest = Guest::new();
    let mut serve = Serve::new(&guest);
    let _owner = serve.session(Role::Owner);
    let session = serve.sessions()[0];
    rustix::process::kill_process(session, Signal::STOP).unwrap();
    let began = Instant::now();
    serve.signal(Signal::TERM);
    serve.find("1 sessions did not end");
    assert_eq!(wait(&mut serve.child), 0);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(status_of(session), "");
}

#[test]
fn no_descriptor_goes_further_than_it_should() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    // An init that leaks one into us.
    let leaked = std::fs::File::open("/etc/passwd").unwrap();
    let number = leaked.as_raw_fd();
    // SAFETY: fcntl is async-signal-safe, and the number is open.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(number, libc::F_SETFD, 0);
            Ok(())
        });
    }
    let serve = Serve::spawn(command, &path);
    serve.find("listens on");
    assert!(serve.descriptors().iter().any(|descriptor| descriptor.ends_with("/etc/passwd")));
    let _other = serve.session(Role::Observer);
    let mut owner = serve.session(Role::Owner);
    owner.start("job-1", "ls -l /proc/$$/fd; tr '\\0' '\\n' < /proc/$PPID/environ; sleep 1");
    owner.find_event("starting");
    for session in serve.sessions() {
        let descriptors = descriptors_of(session);
        let sockets = descriptors.iter().filter(|descriptor| descriptor.contains("socket:")).count();
        assert_eq!(sockets, 2, "its connection, in and out: {descriptors:?}");
        assert!(!descriptors.iter().any(|descriptor| descriptor.ends_with("/etc/passwd")), "{descriptors:?}");
    }
    // The supervisor has no socket at all, and neither has the workload: null and the pipe of its output.
    let log = || std::fs::read_to_string(guest.path("logs/guest.log")).unwrap_or_default();
    eventually("the workload says what it has", || log().contains("PIKA_CLOUD_DIR"));
    let log = log();
    assert!(!log.contains("socket:") && !log.contains("passwd"), "{log}");
    assert!(log.contains("0 -> /dev/null") && log.contains("2 -> pipe:") && !log.contains("\n 3 ->"), "{log}");
    let supervisors = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let environ = std::fs::read(entry.path().join("environ")).ok()?;
        let ours = String::from_utf8_lossy(&environ).contains(guest.root().to_str().unwrap());
        let args = std::fs::read(entry.path().join("cmdline")).ok()?;
        (ours && args.starts_with(b"pika-guest\0supervise\0")).then_some(pid)
    });
    for supervisor in supervisors.collect::<Vec<_>>() {
        let descriptors = descriptors_of(supervisor);
        assert!(!descriptors.iter().any(|descriptor| descriptor.contains("socket:")), "{descriptors:?}");
    }
}

/// Whoever dials has that user's rights, and no more: a member of the group cannot have a workload started as root.
#[test]
fn a_session_has_the_rights_of_who_dialled() {
    const USER: u32 = 64_123;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can dial as somebody else");
        return;
    }
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    drop(serve.session(Role::Observer));
    eventually("no sessions", || serve.sessions().is_empty());
    // A group that may dial and write the files, as the contract's would.
    std::fs::set_permissions(guest.dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    for path in std::fs::read_dir(guest.root()).unwrap().flatten().map(|entry| entry.path()) {
        std::os::unix::fs::lchown(path, None, Some(USER)).unwrap();
    }
    std::os::unix::fs::chown(guest.root(), None, Some(USER)).unwrap();
    std::fs::set_permissions(guest.root(), std::fs::Permissions::from_mode(0o2775)).unwrap();
    std::os::unix::fs::chown(&serve.path, None, Some(USER)).unwrap();
    let path = serve.path.clone();
    let socket = std::thread::spawn(move || {
        // Of this thread alone, as the kernel has it.
        rustix::thread::set_thread_groups(&[rustix::fs::Gid::from_raw(USER)]).unwrap();
        rustix::thread::set_thread_gid(rustix::fs::Gid::from_raw(USER + 1)).unwrap();
        rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(USER)).unwrap();
        UnixStream::connect(path).unwrap()
    });
    let mut stream = Stream::over(socket.join().unwrap());
    stream.hello(Role::Owner, 1, None, true);
    stream.find_hello();
    let session = status_of(serve.sessions()[0]);
    let line = |name: &str| session.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert_eq!(line("Uid:"), format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}"));
    assert_eq!(line("Groups:").trim(), format!("Groups:\t{USER}"));
    assert!(line("CapEff:").ends_with("0000000000000000"));
    let mark = guest.dir.path().join("mark");
    let mut start = rig::start("job-1", &format!("touch {}", mark.display()));
    start.request.run_as_root = true;
    stream.say(&HostMessage::Start(start));
    let failed = stream.find_event("failed");
    assert!(failed.message.contains("the request asks for root"), "{}", failed.message);
    assert!(!mark.exists());
}

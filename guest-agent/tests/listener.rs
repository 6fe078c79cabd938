//! The listener itself: where it listens, what it costs, what it tells a service manager, what it does without what it needs.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pika_cloud_common::wire::Role;
use rig::listener::Serve;
use rig::{Guest, SOON, eventually, finish, wait};
use rustix::process::{Pid, Resource, Rlimit, Signal};

/// Descriptors and memory, behind a thousand peers of every kind.
#[test]
fn a_thousand_peers_leave_nothing_behind() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    let visit = |kind: usize| match kind % 3 {
        0 => drop(serve.connect()),
        1 => drop(serve.connect().write_all(b"nonsense\n")),
        _ => {
            let mut stream = serve.dial();
            stream.hello(Role::Observer, 0, None, false);
            stream.rest();
        }
    };
    let settle = || eventually("no sessions", || serve.sessions().is_empty());
    let visits = |count: usize| {
        for kind in 0..count {
            visit(kind);
            // So that none is turned away for want of room.
            if kind % 12 == 0 {
                settle();
            }
        }
        settle();
    };
    visits(48);
    // Its own memory to the page, and all that is resident but for parts of the program that come and go with use.
    let memory = || [serve.number("RssAnon"), serve.number("VmRSS")];
    // The allocator first uses up the heap that it has from the start (132 KiB), and then again what was given back.
    let first = memory()[0];
    visits(1000);
    assert!(memory()[0] <= first + 132, "{:?} KiB after {first}", memory());
    let (descriptors, before) = (serve.descriptors(), memory());
    visits(1000);
    assert_eq!(serve.descriptors(), descriptors);
    let grown = [0, 1].map(|at| memory()[at].saturating_sub(before[at]));
    assert!(grown[0] <= 16 && grown[1] <= 256, "{grown:?} KiB more than {before:?}");
}

/// With nothing to do it sleeps, in little memory.
#[test]
fn idle_it_costs_next_to_nothing() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    drop(serve.session(Role::Observer));
    eventually("no sessions", || serve.sessions().is_empty());
    // What makes it sound that sessions are forked, and go on in the child as they are.
    assert_eq!(serve.number("Threads"), 1);
    std::thread::sleep(Duration::from_millis(300));
    let (wakes, began) = (serve.number("voluntary_ctxt_switches"), Instant::now());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(serve.number("voluntary_ctxt_switches"), wakes, "it woke up within {:?}", began.elapsed());
    let own = serve.number("RssAnon");
    assert!(own <= 1024, "{own} KiB of its own");
}

/// The program that goes into images: all that it has in memory, its own code too.
#[test]
fn the_static_agent_idles_in_two_mebibytes() {
    let Some(agent) = std::env::var_os("PIKA_TEST_AGENT") else {
        println!("skipped: PIKA_TEST_AGENT names no static agent");
        return;
    };
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    // The same command, of another program.
    let ours = Serve::command(&guest, &path, &["--no-vsock"]);
    let mut command = guest.command_of(Path::new(&agent), &[]);
    command.args(ours.get_args()).stderr(Stdio::piped()).stdin(Stdio::null());
    let serve = Serve::spawn(command, &path);
    serve.find("listens on");
    drop(serve.session(Role::Observer));
    eventually("no sessions", || serve.sessions().is_empty());
    let resident = serve.number("VmRSS");
    println!("the idle listener has {resident} KiB resident");
    assert!(resident <= 2048, "{resident} KiB");
}

/// The next message to a service manager.
fn told(manager: &UnixDatagram) -> String {
    let mut text = [0; 1024];
    let length = manager.recv(&mut text).expect("a message");
    String::from_utf8_lossy(&text[..length]).into_owned()
}

#[test]
fn a_service_manager_is_told() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let manager = UnixDatagram::bind(guest.dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    command.env("NOTIFY_SOCKET", guest.dir.path().join("notify")).env("WATCHDOG_USEC", "400000");
    let mut serve = Serve::spawn(command, &path);
    let until = |what: &str| {
        for _ in 0..50 {
            let message = told(&manager);
            if message.contains(what) {
                return message;
            }
        }
        panic!("never told: {what}")
    };
    let ready = until("READY=1");
    assert!(ready.contains(&format!("STATUS=listens on {}; 0 sessions", path.display())), "{ready}");
    let began = Instant::now();
    for _ in 0..4 {
        until("WATCHDOG=1");
    }
    assert!(began.elapsed() < Duration::from_secs(3) && began.elapsed() > Duration::from_millis(500));
    let mut session = serve.session(Role::Owner);
    until("; 1 session\n");
    // Nobody else says such things in our name: neither the supervisor that a session starts nor its workload.
    session.start("job-1", "tr '\\0' '\\n' < /proc/$PPID/environ; env; echo whole");
    let log = || std::fs::read_to_string(guest.path("logs/guest.log")).unwrap_or_default();
    eventually("the workload says what it was given", || log().contains("whole"));
    assert!(log().contains("PIKA_CLOUD_DIR="), "{}", log());
    assert!(!log().contains("NOTIFY_SOCKET") && !log().contains("WATCHDOG_USEC"), "{}", log());
    drop(session);
    until("; 0 sessions");
    serve.signal(Signal::TERM);
    until("STOPPING=1");
    assert_eq!(wait(&mut serve.child), 0);
}

#[test]
fn a_service_manager_that_hangs_is_not_waited_for() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    // Nobody reads it: its queue is full after a few messages.
    let _manager = UnixDatagram::bind(guest.dir.path().join("notify")).unwrap();
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    command.env("NOTIFY_SOCKET", guest.dir.path().join("notify")).env("WATCHDOG_USEC", "2000");
    let serve = Serve::spawn(command, &path);
    serve.find("listens on");
    std::thread::sleep(Duration::from_millis(1500));
    serve.session(Role::Observer);
}

/// While a machine boots its manager may have no room for a word; this one it waits for.
#[test]
fn that_it_is_ready_is_said_again_where_it_was_not_heard() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let socket = guest.dir.path().join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    let others = UnixDatagram::unbound().unwrap();
    others.set_nonblocking(true).unwrap();
    while others.send_to(b"X=1\n", &socket).is_ok() {}
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    command.env("NOTIFY_SOCKET", &socket);
    let serve = Serve::spawn(command, &path);
    serve.find("listens on");
    serve.session(Role::Observer);
    manager.set_read_timeout(Some(SOON)).unwrap();
    while !told(&manager).contains("READY=1") {}
}

/// Nor is whoever should read what it says.
#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let (unread, log) = rustix::pipe::pipe().unwrap();
    let flags = rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&log, flags).unwrap();
    while rustix::io::write(&log, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&log, rustix::fs::OFlags::empty()).unwrap();
    let mut command = Serve::command(&guest, &path, &["--no-vsock"]);
    command.stderr(log);
    let serve = Serve { child: command.spawn().unwrap(), path, lines: std::sync::mpsc::channel().1 };
    eventually("it listens", || serve.path.exists());
    serve.session(Role::Observer);
    drop(unread);
    serve.session(Role::Observer);
    let mut serve = serve;
    serve.signal(Signal::TERM);
    assert_eq!(wait(&mut serve.child), 0);
}

/// A listener that cannot hear itself is not ready, and serves all the same.
#[test]
fn without_vsock_it_waits_and_serves_what_it_can() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let manager = UnixDatagram::bind(guest.dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut command = Serve::command(&guest, &path, &["--port", "7777"]);
    command.env("NOTIFY_SOCKET", guest.dir.path().join("notify")).env("PIKA_GUEST_PORT", "8888");
    let mut serve = Serve::spawn(command, &path);
    serve.find("cannot listen on vsock port 7777: the kernel has no vsock (yet)");
    serve.find(&format!("listens on {}", path.display()));
    serve.session(Role::Owner);
    std::thread::sleep(Duration::from_secs(1));
    serve.signal(Signal::TERM);
    assert_eq!(wait(&mut serve.child), 0);
    // Said once, however often it was tried.
    assert_eq!(serve.lines.iter().filter(|line| line.contains("cannot")).count(), 0);
    let mut messages = Vec::new();
    while !messages.last().is_some_and(|last: &String| last.contains("STOPPING=1")) {
        messages.push(told(&manager));
    }
    let all = messages.concat();
    assert!(!all.contains("READY=1") && all.contains("STATUS=waits for vsock port 7777"), "{all}");
    assert!(all.contains("EXTEND_TIMEOUT_USEC="), "{all}");
}

#[test]
fn the_port_comes_from_the_environment_where_no_option_names_one() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    // Where these tests run in a container themselves, that comes first.
    let first = std::fs::read_link("/proc/self/ns/pid").unwrap() == Path::new("pid:[4026531836]");
    let usual = if first { "vsock port 20555" } else { "does not listen on vsock" };
    for (named, says) in [("8888", "vsock port 8888"), ("", usual)] {
        let mut command = Serve::command(&guest, &path, &[]);
        command.env("PIKA_GUEST_PORT", named);
        Serve::spawn(command, &path).find(says);
    }
    let mut command = guest.command(&["serve"]);
    command.env("PIKA_GUEST_PORT", "none");
    let outcome = finish(command, b"");
    assert_eq!(outcome.code, 64);
    assert!(outcome.stderr.contains("PIKA_GUEST_PORT: `none` is not a vsock port"), "{}", outcome.stderr);
    for args in [&["serve", "--no-vsock"][..], &["serve", "--port", "0"], &["serve", "--port", "4294967295"]] {
        assert_eq!(guest.run(args).code, 64, "{args:?}");
    }
}

/// A container of one namespace: what shares its kernel with others has no vsock of its own.
#[test]
fn in_a_container_it_listens_on_vsock_only_where_a_port_is_named() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    let contain = |args: &[&str]| {
        let mut command = guest.command_of(Path::new("unshare"), &["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.arg(rig::binary()).arg("serve").args(args);
        command
    };
    if finish(contain(&["--help"]), b"").code != 0 {
        println!("skipped: this user may not make a namespace of process ids");
        return;
    }
    let nowhere = finish(contain(&[]), b"");
    assert_eq!(nowhere.code, 64, "{}", nowhere.stderr);
    for word in ["this is a container (a namespace of process ids of its own)", "`--unix PATH`", "`--port PORT`"] {
        assert!(nowhere.stderr.contains(word), "{}", nowhere.stderr);
    }
    let serve = |args: &[&str], named: Option<&str>| {
        let mut command = contain(args);
        command.arg("--unix").arg(&path).stderr(Stdio::piped()).stdin(Stdio::null());
        command.envs(named.map(|port| ("PIKA_GUEST_PORT", port)));
        Serve::spawn(command, &path)
    };
    let alone = serve(&[], None);
    alone.find("does not listen on vsock: this is a container");
    alone.find(&format!("listens on {}", path.display()));
    alone.session(Role::Observer);
    assert!(alone.lines.try_iter().next().is_none(), "it says that once, and nothing else");
    drop(alone);
    serve(&["--port", "7777"], None).find("cannot listen on vsock port 7777");
    serve(&[], Some("8888")).find("cannot listen on vsock port 8888");
}

#[test]
fn a_stale_socket_is_replaced_and_one_that_lives_is_not() {
    let guest = Guest::new();
    let path = guest.dir.path().join("agent.sock");
    drop(UnixListener::bind(&path).unwrap());
    drop(UnixListener::bind(guest.dir.path().join(".agent.sock.new")).unwrap());
    let stale = std::fs::metadata(&path).unwrap().ino();
    let serve = Serve::new(&guest);
    let meta = std::fs::metadata(&path).unwrap();
    assert!(meta.file_type().is_socket() && meta.ino() != stale);
    assert_eq!(meta.permissions().mode() & 0o7777, 0o660);
    assert!(!guest.dir.path().join(".agent.sock.new").exists());
    serve.session(Role::Observer);
    let second = finish(Serve::command(&guest, &path, &["--no-vsock"]), b"");
    assert_eq!((second.code, second.stderr.contains("another process listens on")), (75, true), "{}", second.stderr);
    serve.session(Role::Observer);
    // What another put there meanwhile is not ours to take away.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "theirs").unwrap();
    serve.signal(Signal::TERM);
    let mut serve = serve;
    assert_eq!(wait(&mut serve.child), 0);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let guest = Guest::new();
    let folder = guest.dir.path().canonicalize().unwrap();
    let target = folder.join("target");
    std::fs::write(&target, "precious").unwrap();
    let link = folder.join("link");
    let refused = |path: &Path, says: &str| {
        let outcome = finish(Serve::command(&guest, path, &["--no-vsock"]), b"");
        assert!(outcome.code == 73 && outcome.stderr.contains(says), "{}: {}", outcome.code, outcome.stderr);
    };
    std::os::unix::fs::symlink(&target, &link).unwrap();
    refused(&link, "is a symbolic link and no socket");
    refused(&target, "is a file and no socket");
    // One that dangles, and would have us make a socket wherever it points to.
    std::fs::remove_file(&target).unwrap();
    refused(&link, "is a symbolic link and no socket");
    assert!(!target.exists() && link.is_symlink());
    refused(&folder, "is a folder and no socket");
    // A link on the way there.
    std::fs::create_dir(folder.join("real")).unwrap();
    std::os::unix::fs::symlink(folder.join("real"), folder.join("way")).unwrap();
    refused(&folder.join("way/agent.sock"), "a symbolic link, which is not followed");
    assert_eq!(std::fs::read_dir(folder.join("real")).unwrap().count(), 0);
    // Where everybody may put another in its place.
    let open = folder.join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    refused(&open.join("agent.sock"), "may be written to by everybody");
    // A folder that is not there is made, and not for everybody.
    let deep = folder.join("a/b/agent.sock");
    let serve = Serve::spawn(Serve::command(&guest, &deep, &["--no-vsock"]), &deep);
    serve.find("listens on");
    serve.session(Role::Observer);
    assert_eq!(std::fs::metadata(folder.join("a/b")).unwrap().permissions().mode() & 0o022, 0);
}

/// Without descriptors it neither dies nor spins, and goes on when it has some again.
#[test]
fn out_of_descriptors() {
    let guest = Guest::new();
    let serve = Serve::new(&guest);
    drop(serve.session(Role::Observer));
    eventually("no sessions", || serve.sessions().is_empty());
    let limit = |most: u64| {
        let limit = Rlimit { current: Some(most), maximum: Some(4096) };
        rustix::process::prlimit(Some(serve.pid()), Resource::Nofile, limit).unwrap();
    };
    // The first number that is free is too high from now on.
    let used: Vec<u64> =
        serve.descriptors().iter().map(|line| line.split_once(' ').unwrap().0.parse().unwrap()).collect();
    limit((0..4096).find(|number| !used.contains(number)).unwrap());
    let mut waiting = serve.dial();
    waiting.hello(Role::Observer, 0, None, false);
    serve.find("cannot accept on");
    let (wakes, ticks) = (serve.number("voluntary_ctxt_switches"), cpu_ticks(serve.pid()));
    std::thread::sleep(Duration::from_secs(1));
    assert!(serve.number("voluntary_ctxt_switches") - wakes < 20);
    assert!(cpu_ticks(serve.pid()) - ticks < 10);
    limit(1024);
    serve.find("accepts on");
    waiting.find_hello();
}

/// What a process has used of the processor, in hundredths of a second.
fn cpu_ticks(pid: Pid) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

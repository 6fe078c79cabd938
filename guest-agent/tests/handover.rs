//! Starts that an init supervises: handed over over its socket, and what becomes of them when one side is slow, wrong or dead.
//!
//! The init is played here. Its supervisors are real, and know of the files only what is handed over to them.
#![allow(clippy::unwrap_used, reason = "what cannot be unwrapped fails the test")]

mod rig;

use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pika_cloud_common::wire::Role;
use rig::{Guest, SOON, Stream, eventually, misplace, start, wait};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;

/// An init that listens for starts.
struct Init {
    path: PathBuf,
    listener: UnixListener,
}

impl Init {
    fn new(guest: &Guest) -> Self {
        let path = guest.dir.path().join("supervise.sock");
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    /// A session that hands its starts to this init.
    fn owner(&self, guest: &Guest) -> Stream {
        owner_with(guest, &self.path)
    }

    fn accept(&self) -> UnixStream {
        self.listener.accept().unwrap().0
    }

    /// Starts a supervisor for the next connection, as an init does: with nothing but that.
    fn supervise(&self, guest: &Guest) -> Child {
        supervise(guest, self.accept())
    }
}

fn owner_with(guest: &Guest, socket: &Path) -> Stream {
    let mut command = guest.command(&["stream"]);
    command.env("PIKA_GUEST_SUPERVISE", socket);
    let mut owner = Stream::spawn(command);
    owner.hello(Role::Owner, 1, None, true);
    owner.find_hello();
    owner
}

fn supervise(guest: &Guest, connection: UnixStream) -> Child {
    let mut command = guest.command(&["supervise", "--socket"]);
    command.env_clear().current_dir("/");
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(connection))).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// What a supervisor that ran nothing says of it.
fn complaint(mut supervisor: Child) -> String {
    assert_eq!(wait(&mut supervisor), 76);
    let mut text = String::new();
    supervisor.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// A command that leaves a mark each time that it runs.
fn marking(guest: &Guest) -> (String, impl Fn() -> usize + use<>) {
    let mark = guest.dir.path().join("mark");
    let command = format!("echo x >> {}", mark.display());
    (command, move || std::fs::read_to_string(&mark).map_or(0, |text| text.lines().count()))
}

#[test]
fn a_job_of_a_supervisor_that_the_init_started() {
    let guest = Guest::new();
    let init = Init::new(&guest);
    let mut owner = init.owner(&guest);
    let mut request = start("job-1", "echo $WORD; echo $PIKA_CLOUD_DIR; pika-guest ready; exit 3");
    request.env.insert("WORD".to_owned(), "secret-word".to_owned());
    owner.say(&pika_cloud_common::wire::HostMessage::Start(request));
    let mut supervisor = init.supervise(&guest);
    owner.find_notice("started");
    owner.find_event("starting");
    owner.find_event("ready");
    assert_eq!(owner.find_event("failed").exit_code(), Some(3));
    assert_eq!(guest.read("logs/guest.log"), format!("secret-word\n{}\n", guest.root().display()));
    // It waits to be released; that the workload failed is no failure of its own.
    owner.release();
    assert_eq!(wait(&mut supervisor), 0);
    guest.assert_documents_agree();
    // Another one, of a message that no socket takes in one piece.
    let mut request = start("job-2", "echo ${#WORD}");
    request.env.insert("WORD".to_owned(), "x".repeat(120_000));
    request.request.extra.insert("more".to_owned(), json!("y".repeat(100_000)));
    owner.rest();
    let mut owner = init.owner(&guest);
    owner.say(&pika_cloud_common::wire::HostMessage::Start(request));
    let mut supervisor = init.supervise(&guest);
    owner.find_notice("started");
    // That was another stream's session.
    owner.rest();
    let mut owner = init.owner(&guest);
    owner.find_event("completed");
    assert_eq!(guest.read("logs/guest.log"), "120000\n");
    owner.release();
    assert_eq!(wait(&mut supervisor), 0);
}

/// Invariant 9: the run is lost with its supervisor, whoever started that.
#[test]
fn a_supervisor_that_is_killed_is_seen_though_it_is_nobodys_child() {
    let guest = Guest::new();
    let init = Init::new(&guest);
    let mut owner = init.owner(&guest);
    owner.start("job-1", "echo up; exec sleep 5");
    let mut supervisor = init.supervise(&guest);
    owner.find_event("starting");
    eventually("its workload runs", || std::fs::read(guest.path("logs/guest.log")).is_ok_and(|log| !log.is_empty()));
    let began = Instant::now();
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    assert_eq!(owner.find_event("failed").details, Some(json!({"supervisor_lost": true})));
    assert!(began.elapsed() < Duration::from_secs(2));
    owner.start("job-1", "true");
    owner.find_notice("already_started");
}

/// Nothing is spawned in place of a supervisor that the init does not bring.
#[test]
fn an_init_that_does_not_do_fails_the_run() {
    let says = |what: &str, kind: &str| {
        let guest = Guest::new();
        let path = guest.dir.path().join("supervise.sock");
        let mut owner = owner_with(&guest, &path);
        let (command, runs) = marking(&guest);
        match kind {
            "nothing" => {}
            "silent end" => {
                let listener = UnixListener::bind(&path).unwrap();
                std::thread::spawn(move || listener.accept());
            }
            kind => misplace(&path, kind),
        }
        owner.start("job-1", &command);
        owner.find_notice("started");
        let failed = owner.find_event("failed");
        assert_eq!(failed.exit_code(), Some(126));
        for word in [what, "the supervisor could not be started", "systemctl status pika-guest-supervise.socket"] {
            assert!(failed.message.contains(word), "{word}: {}", failed.message);
        }
        owner.start("job-1", &command);
        owner.find_notice("already_started");
        assert_eq!((guest.kinds(), runs()), (vec!["failed".to_owned()], 0));
        guest.assert_documents_agree();
    };
    says("the other end ended without a word", "silent end");
    says("there is no /", "nothing");
    for kind in ["fifo", "folder", "link", "hardlink"] {
        says("is no socket, and root's socket belongs there", kind);
    }
    says("cannot connect to", "socket");
}

/// What an init may send that is no supervisor's answer.
#[test]
fn an_answer_that_is_none_fails_the_run() {
    for (answer, says) in [
        (&b"no such file\n"[..], "the supervisor says: no such file"),
        (b"take", "ended without a word"),
        (&vec![b'x'; 100_000], "longer than 4096 bytes"),
    ] {
        let guest = Guest::new();
        let init = Init::new(&guest);
        let mut owner = init.owner(&guest);
        owner.start("job-1", "true");
        let mut connection = init.accept();
        await_order(&connection);
        // It may have heard enough before all of that is written.
        let _ = connection.write_all(answer);
        drop(connection);
        let failed = owner.find_event("failed");
        assert!(failed.message.contains(says), "{}", failed.message);
    }
}

/// Invariant 9: whoever answers too late finds nobody who says `go`, and runs nothing.
#[test]
fn an_init_that_answers_too_late_runs_nothing() {
    let guest = Guest::new();
    let init = Init::new(&guest);
    let mut owner = init.owner(&guest);
    let (command, runs) = marking(&guest);
    let began = Instant::now();
    owner.start("job-1", &command);
    let connection = init.accept();
    // Other writers are not held up meanwhile.
    guest.ok(&["progress", "boot"]);
    // Longer than is otherwise waited for anything here.
    std::thread::sleep(Duration::from_secs(5));
    let failed = owner.find_event("failed");
    assert!(failed.message.contains("did not answer within 10 s"), "{}", failed.message);
    assert!((9.0..13.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    assert!(complaint(supervise(&guest, connection)).contains("ended without a word"));
    assert_eq!((guest.kinds(), runs()), (vec!["starting".to_owned(), "failed".to_owned()], 0));
}

/// Invariant 9: at each point at which the stream that accepted a start can die before `go`, it is started by the next that
/// asks, and once.
#[test]
fn a_stream_that_dies_while_it_hands_over_leaves_a_start_that_can_be_made_again() {
    let die = |owner: &mut Stream| {
        let pid = rustix::process::Pid::from_raw(i32::try_from(owner.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        owner.code();
    };
    // Before the supervisor exists, and after it has said `taken`.
    for taken in [false, true] {
        let guest = Guest::new();
        let init = Init::new(&guest);
        let mut owner = init.owner(&guest);
        let (command, runs) = marking(&guest);
        owner.start("job-1", &command);
        let mut connection = init.accept();
        await_order(&connection);
        if taken {
            stop(&owner);
            // It has not read that, and will not.
            connection.write_all(b"taken\n").unwrap();
        }
        die(&mut owner);
        // On its way to a supervisor the lock is held, so that nobody starts another.
        let mut next = init.owner(&guest);
        next.start("job-1", &command);
        next.find_notice("already_started");
        next.start("job-2", &command);
        assert_eq!(next.find_error()["code"], "busy");
        if taken {
            drop(connection);
        } else {
            assert!(complaint(supervise(&guest, connection)).contains("ended without a word"));
        }
        let mut next = init.owner(&guest);
        next.start("job-1", &command);
        let mut supervisor = init.supervise(&guest);
        next.find_notice("started");
        next.find_event("completed");
        assert_eq!((runs(), guest.kinds().len()), (1, 2));
        next.release();
        assert_eq!(wait(&mut supervisor), 0);
    }
}

/// Waits until the start has been sent, and the lock with it.
fn await_order(connection: &UnixStream) {
    let mut byte = [0];
    rustix::net::recv(connection, &mut byte[..], rustix::net::RecvFlags::PEEK).unwrap();
}

/// Stops a stream, so that it does nothing more.
fn stop(owner: &Stream) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(owner.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
}

/// What is handed over by who is no agent, or by one of another release.
#[test]
fn a_supervisor_takes_a_start_with_the_lock_and_nothing_else() {
    let guest = Guest::new();
    guest.ok(&["starting"]);
    let lock = std::fs::File::create(guest.path("supervisor.lock")).unwrap();
    let other = std::fs::File::create(guest.dir.path().join("other")).unwrap();
    let order = |version: u32| {
        let order = json!({ "version": version, "root": guest.root(), "start": start("job-1", "true") });
        format!("{order}\n").into_bytes()
    };
    let refused = |message: &[u8], with: Option<BorrowedFd<'_>>, says: &str| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let supervisor = supervise(&guest, theirs);
        let _ = send(&ours, message, with);
        let mut answer = String::new();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        ours.set_read_timeout(Some(SOON)).unwrap();
        // Where it had not read all that was sent, the end of it is an error.
        let _ = (&ours).read_to_string(&mut answer);
        let said = supervisor.wait_with_output().unwrap();
        let said = String::from_utf8(said.stderr).unwrap();
        assert!(said.contains(says), "{said}");
        assert!(message.is_empty() || answer.is_empty() || answer.contains(says), "{answer}");
        assert_eq!(guest.kinds(), ["starting"]);
    };
    refused(&order(1), None, "without the supervisor's lock");
    refused(&order(1), Some(other.as_fd()), "cannot take over");
    refused(&order(2), Some(lock.as_fd()), "of different releases");
    refused(b"{}\n", Some(lock.as_fd()), "no start");
    refused(b"\n", Some(lock.as_fd()), "no start");
    refused(b"", None, "ended without a word");
    refused(&order(1)[..40], Some(lock.as_fd()), "ended without a word");
    refused(&vec![b'x'; 1 << 20], Some(lock.as_fd()), "longer than");
    // Another holds it.
    let held = std::fs::File::open(guest.path("supervisor.lock")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    refused(&order(1), Some(lock.as_fd()), "cannot take over");
}

fn send(to: &UnixStream, bytes: &[u8], with: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if with.is_some() {
        control.push(SendAncillaryMessage::ScmRights(with.as_slice()));
    }
    let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    (&*to).write_all(&bytes[sent..])
}

/// A user's session could only start something in the sandbox of who serves it.
#[test]
fn a_start_of_who_may_not_use_the_socket_is_refused_before_it_is_accepted() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can have a socket that another user may not use");
        return;
    }
    let guest = Guest::new();
    let init = Init::new(&guest);
    std::fs::create_dir(guest.root()).unwrap();
    for path in [guest.dir.path(), &guest.root()] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    let mut command = guest.command(&["stream"]);
    command.env("PIKA_GUEST_SUPERVISE", &init.path).uid(65534).gid(65534);
    let mut owner = Stream::spawn(command);
    owner.hello(Role::Owner, 1, None, true);
    owner.find_hello();
    let mut request = start("job-1", "true");
    request.request.run_as_root = false;
    owner.say(&pika_cloud_common::wire::HostMessage::Start(request));
    let error = owner.find_error();
    assert_eq!(error["code"], "bad_request");
    assert!(error["message"].as_str().unwrap().contains("only root may ask them"), "{error}");
    assert!(!guest.read("events.jsonl.stream").contains("job-1"));
}

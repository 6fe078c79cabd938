//! Machines that are dialled over vsock: by a number that may be another's, and by another way where that does not work.

use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::{AgentPolicy, Mount};

use super::*;
use crate::incus::VsockAddress;

const OURS: &str = "7d0a1f3c-0000-4000-8000-00000000000a";

fn machine() -> RuntimeSpec {
    let mut spec = spec();
    spec.incus.instance_type = InstanceType::VirtualMachine;
    spec
}

fn address(cid: u32) -> VsockAddress {
    VsockAddress { cid, machine_uuid: OURS.to_owned() }
}

fn at(cid: u32) -> Seen {
    Seen { vsock: Some(address(cid)), ..running() }
}

/// Its instance was started, and is dialled.
fn dialling() -> Shell {
    dialling_for(machine())
}

fn dialling_for(spec: RuntimeSpec) -> Shell {
    let mut shell = Shell::new(spec);
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    assert_eq!(shell.changed(Answer::Started(Ok(()))), ["dial pika-7 over vsock"]);
    shell
}

fn connected(shell: &mut Shell, cid: u32) -> Vec<String> {
    shell.core.dialled(shell.dial, Ok(Some(address(cid))), shell.now);
    shell.settled()
}

fn refused(shell: &mut Shell, loss: SessionLoss) -> Vec<String> {
    shell.core.dialled(shell.dial, Err(loss), shell.now);
    shell.settled()
}

/// The hello of a machine.
fn hello_of(uuid: Option<&str>) -> Vec<u8> {
    let hello = String::from_utf8(hello("s-1")).unwrap();
    let named = uuid.map(|uuid| format!(r#","machine_uuid":"{uuid}"}}}}"#));
    hello.replace("}}\n", &(named.unwrap_or_else(|| "}}".to_owned()) + "\n")).into_bytes()
}

/// Invariant 8: secrets are sent in `start`, and that only to our machine.
#[test]
fn a_machine_is_ours_once_it_says_so_and_incus_does() {
    let mut shell = dialling();
    assert_eq!(connected(&mut shell, 7), [format!("send hello to {}", Digest::of(OURS.as_bytes()))]);
    let mut words = hello_of(Some(&OURS.to_ascii_uppercase()));
    words.extend(event(1, "starting"));
    assert_eq!(shell.read(&words), ["look pika-7"], "nothing is taken and nothing is said before Incus answered");
    assert!(!shell.core.wants_read());
    assert_eq!((shell.core.phase(), shell.core.view().booted_at), (Phase::Dialing, None));
    shell.looked(Some(at(7)));
    let asked = shell.settled();
    assert!(asked.contains(&"send start job-7.1".to_owned()), "{asked:?}");
    assert!(asked.contains(&"send ack 1".to_owned()), "what came behind the hello is taken, too: {asked:?}");
    assert_eq!((shell.core.phase(), shell.core.view().transport), (Phase::Live, Some(Transport::Vsock)));
    assert!(shell.core.wants_read());
}

/// A machine that is dialled again is told what is durable only once it is known to be ours.
#[test]
fn an_acknowledgement_waits_for_whose_machine_it_is() {
    let mut shell = dialling();
    connected(&mut shell, 7);
    shell.read(&hello_of(Some(OURS)));
    shell.looked(Some(at(7)));
    shell.settled();
    shell.event(1, "starting");
    shell.settled();
    shell.lose();
    while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
    shell.looked(Some(at(7)));
    shell.settled();
    connected(&mut shell, 7);
    let hello = String::from_utf8(hello_of(Some(OURS))).unwrap().replace(r#""last_seq":0"#, r#""last_seq":1"#);
    assert_eq!(shell.read(hello.as_bytes()), ["look pika-7"]);
    assert!(shell.core.next_tick().is_some_and(|due| due > shell.now.mono), "nothing is due before Incus answers");
    assert_eq!(shell.wait(Duration::from_millis(1)), [""; 0]);
    let mut asked = shell.looked(Some(at(7)));
    asked.extend(shell.settled());
    asked.extend(shell.wait(Duration::ZERO));
    assert!(asked.contains(&"send ack 1".to_owned()), "{asked:?}");
}

/// incus-agent brings mounts into a machine that runs already, so that the workload is to wait for them.
#[test]
fn a_workload_in_a_machine_is_told_its_mounts() {
    let mount = |guest_path: &str| Mount { guest_path: guest_path.to_owned(), ..Mount::default() };
    let mut spec = machine();
    spec.mounts = vec![mount("/workspace"), mount("/data")];
    let mut shell = dialling_for(spec);
    connected(&mut shell, 7);
    shell.read(&hello_of(Some(OURS)));
    shell.looked(Some(at(7)));
    let asked = shell.settled();
    assert!(asked.contains(&"send start job-7.1 behind /workspace /data".to_owned()), "{asked:?}");
}

#[test]
fn another_machine_is_told_nothing() {
    for stranger in [Some("00000000-0000-4000-8000-000000000000"), Some(""), None] {
        let mut shell = dialling();
        connected(&mut shell, 7);
        assert_eq!(shell.read(&hello_of(stranger)), ["hang up"], "{stranger:?}");
        assert_eq!((shell.core.phase(), shell.core.view().streams), (Phase::Looking, 0));
    }
}

/// The number was given to another machine while it was dialled, or ours is not there any more.
#[test]
fn a_number_that_moved_on_is_nobodys() {
    let paused = Seen { state: InstanceState::Changing, ..at(7) };
    let another = VsockAddress { machine_uuid: "other".to_owned(), ..address(7) };
    let elsewhere = Seen { vsock: Some(another), ..running() };
    let foreign = Seen { claim: None, ..at(7) };
    for seen in [Some(at(8)), Some(running()), Some(paused), Some(elsewhere), Some(foreign), None] {
        let mut shell = dialling();
        connected(&mut shell, 7);
        shell.read(&hello_of(Some(OURS)));
        assert_eq!(shell.looked(seen.clone()), ["hang up"], "{seen:?}");
        assert_eq!((shell.core.phase(), shell.core.view().streams), (Phase::Looking, 0));
    }
}

/// A runtime that ends in between says nothing to whoever that is, either.
#[test]
fn a_command_that_comes_in_between_hangs_up() {
    let mut shell = dialling();
    connected(&mut shell, 7);
    shell.read(&hello_of(Some(OURS)));
    shell.core.command(Command::Cancel, shell.now);
    let asked = shell.settled();
    assert!(asked.contains(&"hang up".to_owned()) && !asked.iter().any(|asked| asked.starts_with("send")), "{asked:?}");
    // The answer that nobody waits for any more.
    assert_eq!(shell.looked(Some(at(7))), [""; 0]);
}

#[test]
fn exec_is_tried_where_vsock_does_not_work() {
    let mut shell = dialling();
    let cannot = || SessionLoss::NoTransport("no /dev/vsock".to_owned());
    assert_eq!(refused(&mut shell, cannot()), ["dial pika-7"], "at once");
    shell.core.dialled(shell.dial, Ok(None), shell.now);
    shell.settled();
    assert_eq!(shell.hello("s-1"), ["commit session stream"]);
    shell.settled();
    assert_eq!((shell.core.phase(), shell.core.view().transport), (Phase::Live, Some(Transport::Exec)));
    // And back.
    shell.lose();
    shell.settled();
    while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
    assert!(shell.looked(Some(at(7))).contains(&"dial pika-7 over vsock".to_owned()));
}

/// An agent that does not listen may be run by exec; one that exec does not find may still come to listen.
#[test]
fn ways_that_bring_no_session_take_turns() {
    let mut spec = machine();
    spec.incus.agent = AgentPolicy::Baked;
    let mut shell = dialling_for(spec);
    let mut ways = Vec::new();
    for _ in 0..8 {
        let by_exec = ways.last().is_some_and(|way| way == "dial pika-7");
        let loss = if by_exec { SessionLoss::NoAgent } else { SessionLoss::Lost };
        refused(&mut shell, loss("nobody listens".to_owned()));
        while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
        ways.extend(shell.looked(Some(at(7))).into_iter().filter(|asked| asked.starts_with("dial")));
    }
    let exec: Vec<_> = ways.iter().map(|way| way == "dial pika-7").collect();
    assert_eq!(exec, [false, false, true, false, false, false, true, false]);
}

/// What a guest said on its console is all that there is of one whose agent was never heard.
#[test]
fn a_boot_without_an_agent_has_the_console_as_evidence() {
    let mut shell = dialling();
    refused(&mut shell, SessionLoss::Lost("no agent listens".to_owned()));
    let boot = Duration::from_secs(machine().watchdogs.boot_secs);
    let mut asked = shell.wait(boot);
    asked.extend(shell.settled());
    assert!(asked.contains(&"console pika-7".to_owned()), "{asked:?}");
    shell.core.answer(shell.console, Answer::Console(Some("\u{1b}[0mkernel panic\r\n".to_owned())), shell.now);
    assert!(shell.settled().contains(&"look pika-7 or search".to_owned()), "collection goes on");
    shell.looked(Some(seen(InstanceState::Stopped)));
    shell.settled();
    let evidence = shell.core.view().verdict.clone().unwrap().evidence;
    assert_eq!(evidence.console.as_deref(), Some("kernel panic"));
    assert_eq!(evidence.error.as_deref(), Some("no agent listens"));
}

/// Also where nothing else is to be collected.
#[test]
fn evidence_is_no_output() {
    let mut spec = machine();
    spec.policies.output_collection.mode = OutputCollectionMode::None;
    let mut shell = Shell::new(spec);
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    shell.changed(Answer::Started(Ok(())));
    shell.core.command(Command::Cancel, shell.now);
    assert!(shell.settled().contains(&"console pika-7".to_owned()));
    shell.core.answer(shell.console, Answer::Console(None), shell.now);
    shell.settled();
    assert_eq!(shell.core.phase(), Phase::Destroying);
    assert_eq!(shell.core.view().verdict.clone().unwrap().evidence.console, None);
}

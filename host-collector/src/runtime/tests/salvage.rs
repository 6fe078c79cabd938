//! Guests without an agent, and those that lose theirs: the host's own takes its place, and nothing else changes.

use pika_cloud_common::spec::AgentPolicy;
use pika_cloud_common::verdict::Outcome;
use pika_cloud_common::wire::AgentOrigin;

use super::*;

const OURS: &str = "dial pika-7 where ours lies";
const PUT: &str = "dial pika-7 with ours put in";

fn of(policy: AgentPolicy) -> RuntimeSpec {
    let mut spec = spec();
    spec.incus.agent = policy;
    spec
}

fn none() -> SessionLoss {
    SessionLoss::NoAgent("exec ended with 127".to_owned())
}

/// Its instance was started, and its agent dialled.
fn dialling(policy: AgentPolicy) -> (Shell, Vec<String>) {
    let mut shell = Shell::new(of(policy));
    shell.settled();
    shell.looked(None);
    shell.settled();
    shell.changed(Answer::Created(Ok(())));
    shell.settled();
    let asked = shell.changed(Answer::Started(Ok(())));
    (shell, asked)
}

/// There is a stream, and no agent at its other end.
fn absent(shell: &mut Shell) -> Vec<String> {
    shell.dialled();
    shell.settled();
    shell.core.link_lost(none(), shell.now);
    let mut asked = shell.settled();
    asked.retain(|asked| asked != "hang up");
    asked
}

fn origin(shell: &Shell) -> Option<AgentOrigin> {
    shell.core.view().agent_origin
}

#[test]
fn an_image_without_an_agent_runs_with_ours() {
    let (mut shell, asked) = dialling(AgentPolicy::Auto);
    assert_eq!(asked, ["dial pika-7"]);
    assert_eq!(absent(&mut shell), [OURS]);
    assert_eq!(absent(&mut shell), [PUT]);
    assert_eq!(shell.core.phase(), Phase::Dialing, "the machine hears of nothing");
    shell.dialled();
    assert_eq!(shell.hello("s-1"), ["commit session stream"]);
    shell.settled();
    assert_eq!((shell.core.phase(), origin(&shell)), (Phase::Live, Some(AgentOrigin::Host)));
}

#[test]
fn what_is_injected_asks_for_nothing_of_the_images() {
    let (mut shell, asked) = dialling(AgentPolicy::Inject);
    assert_eq!(asked, [OURS]);
    assert_eq!(absent(&mut shell), [PUT]);
}

#[test]
fn a_baked_image_without_an_agent_is_told_with_the_way_out() {
    let (mut shell, _) = dialling(AgentPolicy::Baked);
    absent(&mut shell);
    let ended = shell.core.view().ended.clone().unwrap();
    assert_eq!(ended.outcome, Outcome::ProvisionFailed);
    let error = ended.error.unwrap();
    assert!(error.contains("127") && error.contains("pika-cloud bake") && error.contains("`auto`"), "{error}");
}

/// Both are told: what the image lacks, and why the host cannot help.
#[test]
fn a_host_without_an_agent_says_so() {
    let (mut shell, _) = dialling(AgentPolicy::Auto);
    absent(&mut shell);
    absent(&mut shell);
    let nowhere = SessionLoss::NoAgent("the host has no pika-guest of its own".to_owned());
    shell.core.dialled(shell.dial, Err(nowhere), shell.now);
    shell.settled();
    let ended = shell.core.view().ended.clone().unwrap();
    assert_eq!(ended.outcome, Outcome::ProvisionFailed);
    assert_eq!(ended.error.as_deref(), Some("exec ended with 127; and the host has no pika-guest of its own"));
}

/// The guest holds up the put until its time is over.
#[test]
fn a_boot_that_takes_too_long_for_ours_says_what_the_image_lacks() {
    let (mut shell, _) = dialling(AgentPolicy::Auto);
    absent(&mut shell);
    absent(&mut shell);
    shell.wait(Duration::from_secs(spec().watchdogs.boot_secs));
    shell.settled();
    let error = shell.core.view().ended.clone().unwrap().error.unwrap();
    assert!(error.starts_with("exec ended with 127; and the host's own has not answered"), "{error}");
}

/// Whatever the spec says: the workload goes on, is not started again, and what it said since is heard.
#[test]
fn an_agent_that_vanishes_in_mid_run_is_replaced() {
    for policy in [AgentPolicy::Auto, AgentPolicy::Baked] {
        let mut shell = Shell::live(of(policy));
        shell.core.link_lost(SessionLoss::Died("killed".to_owned()), shell.now);
        shell.settled();
        while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
        assert!(shell.looked(Some(running())).contains(&"dial pika-7".to_owned()));
        assert_eq!(absent(&mut shell), [OURS]);
        assert_eq!(absent(&mut shell), [PUT]);
        shell.dialled();
        shell.hello("s-1");
        shell.settled();
        assert_eq!((shell.core.phase(), origin(&shell)), (Phase::Live, Some(AgentOrigin::Host)));
        shell.event(1, "completed");
        shell.settled();
        let ended = shell.core.view().ended.clone().unwrap();
        assert_eq!(ended.outcome, Outcome::Completed { exit_code: None });
    }
}

/// Invariant 7: also where the agent vanishes before its outputs are here.
#[test]
fn outputs_are_salvaged() {
    let mut shell = Shell::live(of(AgentPolicy::Baked));
    shell.event(1, "completed");
    shell.settled();
    assert_eq!(shell.core.phase(), Phase::Collecting);
    shell.core.link_lost(SessionLoss::Died("killed".to_owned()), shell.now);
    shell.settled();
    while !shell.wait_next().iter().any(|asked| asked.starts_with("look")) {}
    assert_eq!(shell.looked(Some(running())), ["dial pika-7"]);
    assert_eq!(absent(&mut shell), [OURS]);
    assert_eq!(absent(&mut shell), [PUT]);
    shell.dialled();
    assert!(shell.hello("s-1").contains(&"send archive **".to_owned()));
}

/// What an agent of another release is to be replaced by, and how, with the base that the image itself names.
#[test]
fn an_agent_that_does_not_fit_is_told_with_the_command_that_mends_it() {
    for (base, wanted) in [
        (Some("debian/12"), "pika-cloud bake --from debian/12 --to agent"),
        (None, "pika-cloud bake --from BASE --to agent"),
        (Some("x; rm -rf /"), "pika-cloud bake --from BASE --to agent"),
    ] {
        let mut spec = of(AgentPolicy::Auto);
        "agent".clone_into(&mut spec.incus.image_alias);
        let mut shell = Shell::new(spec);
        shell.settled();
        shell.looked(None);
        shell.settled();
        shell.changed(Answer::Created(Ok(())));
        shell.settled();
        shell.changed(Answer::Started(Ok(())));
        shell.dialled();
        shell.settled();
        let hello = String::from_utf8(hello("s-1")).unwrap().replace(r#""protocol":1"#, r#""protocol":0"#);
        assert_eq!(shell.read(hello.as_bytes()), ["hang up", "look pika-7"]);
        shell.looked(Some(Seen { base_alias: base.map(str::to_owned), ..running() }));
        shell.settled();
        let ended = shell.core.view().ended.clone().unwrap();
        let error = ended.error.unwrap();
        for word in ["protocol 0", "speaks 1", wanted] {
            assert!(error.contains(word), "`{word}` is not in {error}");
        }
        assert_eq!(ended.outcome, Outcome::ProvisionFailed);
    }
}

/// The question was still under way when somebody ended it all.
#[test]
fn nobody_waits_for_what_an_image_was_baked_from() {
    let (mut shell, _) = dialling(AgentPolicy::Auto);
    shell.dialled();
    shell.settled();
    let hello = String::from_utf8(hello("s-1")).unwrap().replace(r#""protocol":1"#, r#""protocol":2"#);
    shell.read(hello.as_bytes());
    let asked = shell.look;
    shell.core.command(Command::Cancel, shell.now);
    shell.settled();
    shell.core.answer(asked, Answer::Looked(Ok(Some(running()))), shell.now);
    shell.settled();
    assert_eq!(shell.core.view().ended.clone().unwrap().outcome, Outcome::Cancelled);
}

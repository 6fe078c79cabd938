//! Jobs in Incus's own VMs: a real vhost-vsock, a real incus-agent, and what operators do to VMs. Runs in the guest that `cargo
//! xtask test --vm full` boots; each VM there takes half a minute at best, so that each does as much as it can.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::Duration;

use pika_cloud_tests::{Incus, IncusVms, Running, Signal, Spec, Stage, VmJob, VmKind, eventually};
use serde_json::json;

/// The way that the sessions of a runtime came.
fn transports(stage: &Stage, spec: &Spec) -> Vec<String> {
    let journal = stage.journal(spec);
    journal.host("session").iter().filter_map(|session| Some(session["transport"].as_str()?.to_owned())).collect()
}

/// Says who it is, over and over, until it is ended.
fn endless(token: &str) -> String {
    format!("pika-guest ready; while :; do echo {token}; sleep 1; done")
}

/// That a log consists of `token`s and nothing else, and is no empty one.
fn check_tokens(log: &str, token: &str) {
    let strangers: Vec<&str> = log.lines().filter(|line| *line != token).collect();
    assert!(strangers.is_empty(), "in the log of {token} there is {strangers:?}");
    assert!(log.contains(token), "{token} has a log");
}

/// Starts both, one after the other, and waits until both are ready.
fn start_both<'a>(vms: IncusVms, stage: &'a Stage, specs: &'a [Spec; 2]) -> [VmJob<'a>; 2] {
    specs.each_ref().map(|spec| {
        let mut job = vms.start(stage, spec);
        job.wait_ready(1);
        job
    })
}

#[test]
fn a_job_in_a_vm_without_incus_agent_is_live_and_whole() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("bare");
    let command = "echo first; pika-guest ready --message 'up'; sleep 8; echo \"$WORD\" | sha256sum
        mkdir -p $PIKA_CLOUD_DIR/artifacts/deep; head -c 3000000 /dev/urandom > $PIKA_CLOUD_DIR/artifacts/deep/blob
        sha256sum < $PIKA_CLOUD_DIR/artifacts/deep/blob > $PIKA_CLOUD_DIR/artifacts/sum
        cat /sys/class/dmi/id/product_uuid > $PIKA_CLOUD_DIR/artifacts/uuid; echo last; exit 3";
    let spec = vms.spec(&stage, VmKind::Bare, command).with("bootstrap.env.WORD", "of-no-process").as_root();
    let mut job = vms.start(&stage, &spec);
    job.wait("its log is printed", |running| running.printed().iter().any(|line| line.text == "first\n"));
    assert!(!job.running.printed().iter().any(|line| line.text == "last\n"), "it still runs");
    let uuid = Incus.instance(&spec.instance).unwrap()["config"]["volatile.uuid"].clone();
    assert!(!Incus.exec(&spec.instance, "true").status.success(), "there is no incus-agent in it");
    let done = job.finish().expect(3);

    let outputs = stage.outputs(&spec);
    assert_eq!(done.stdout, outputs.log());
    assert!(outputs.log().starts_with("first\n") && outputs.log().ends_with("last\n"));
    assert_eq!(outputs.artifacts(), ["deep/blob", "sum", "uuid"]);
    assert_eq!(outputs.check_digests(), 3);
    assert_eq!(uuid, outputs.text("artifacts/uuid").trim());
    let verdict = outputs.verdict();
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&"failed".into(), &3.into()));
    assert_eq!(verdict["evidence"]["collection"]["complete"], true);
    stage.journal(&spec).check_events(1);
    assert_eq!(transports(&stage, &spec), ["vsock"]);
    stage.check_nothing_left(&spec);
}

#[test]
fn a_job_in_a_vm_with_incus_agent_goes_on_when_its_collector_is_killed() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("agent");
    let command = "pika-guest ready; i=0; while [ ! -e /tmp/gate ]; do echo $i; i=$((i+1)); sleep 1; done
        echo done; until grep -q done $PIKA_CLOUD_DIR/logs/guest.log; do sleep 1; done; cp $PIKA_CLOUD_DIR/logs/guest.log $PIKA_CLOUD_DIR/artifacts/seen";
    let spec = vms.spec(&stage, VmKind::WithIncusAgent, command);
    let mut job = vms.start(&stage, &spec);
    job.wait_ready(1);
    job.running.kill();
    let mut job = vms.start(&stage, &spec);
    job.wait("incus-agent answers", |_| Incus.exec(&spec.instance, "touch /tmp/gate").status.success());
    job.finish().expect(0);
    let outputs = stage.outputs(&spec);
    assert!(outputs.log().ends_with("done\n"));
    assert_eq!(outputs.text("artifacts/seen"), outputs.log(), "the log is whole");
    let numbers: Vec<usize> = outputs.log().lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>(), "each line once");
    stage.journal(&spec).check_events(1);
    assert_eq!(transports(&stage, &spec), ["vsock"], "vsock comes before exec");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_vm_that_nobody_listens_in_is_reached_by_exec() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("deaf");
    let spec = vms.spec(&stage, VmKind::Deaf, "pika-guest ready; echo heard; echo 1 > $PIKA_CLOUD_DIR/artifacts/one");
    vms.start(&stage, &spec).finish().expect(0);
    assert_eq!(stage.outputs(&spec).log(), "heard\n");
    assert_eq!(stage.outputs(&spec).artifacts(), ["one"]);
    assert_eq!(transports(&stage, &spec), ["exec"]);
    stage.check_nothing_left(&spec);
}

/// Its units serve over vsock in the VM of the baked image; the base had no agent at all.
#[test]
fn a_stock_debian_is_baked_and_serves() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("debian");
    let image = stage.alias("baked");
    let mut bake =
        stage.bake_command(vms.import_debian(), &image.alias, &["--profile", "default", "--profile", "debian"]);
    let baked = Running::start(&mut bake).finish_within(Duration::from_secs(1200));
    println!("{}baked after {:.0} s", baked.stderr, baked.took.as_secs_f64());
    baked.expect(0).saying(&["started by systemd"]);
    stage.check_baked(1);
    let command =
        "pika-guest ready; i=0; until systemctl is-active --quiet pika-guest.service || [ $i = 60 ]; do sleep 1; i=$((i+1)); done
        systemctl is-active pika-guest.service pika-guest-supervise.socket
        systemctl is-active --quiet pika-guest.service || {
            systemctl --no-pager --full status pika-guest.service; systemctl --no-pager list-jobs
            journalctl --no-pager -b -n 200 -o short-monotonic; }
        cat /etc/machine-id
        systemctl --no-legend --plain list-units --failed 'pika-*'; echo 1 > $PIKA_CLOUD_DIR/artifacts/one";
    let spec = vms.spec(&stage, VmKind::Debian, command).with("incus.image_alias", image.alias.as_str());
    let spec = spec.with("incus.agent", "baked").with("resources.memory_mib", 384).as_root();
    vms.start(&stage, &spec).finish().expect(0);
    let log = stage.outputs(&spec).log();
    // The machine id, and no unit that failed.
    let machine_id = log.strip_prefix("active\nactive\n").map(str::trim_end).unwrap_or_default();
    assert!(machine_id.len() == 32 && machine_id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{log}");
    assert_eq!(stage.outputs(&spec).artifacts(), ["one"]);
    assert_eq!(transports(&stage, &spec), ["vsock"]);
    stage.check_nothing_left(&spec);
}

/// The image has an agent that is not asked: the host's own goes in through incus-agent.
#[test]
fn a_vm_gets_the_hosts_own_agent_by_exec() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("inject");
    let spec = vms.spec(&stage, VmKind::WithIncusAgent, "pika-guest ready; echo 1 > $PIKA_CLOUD_DIR/artifacts/one");
    let spec = spec.with("incus.agent", "inject");
    vms.start(&stage, &spec).finish().expect(0);
    assert_eq!(stage.outputs(&spec).artifacts(), ["one"]);
    assert_eq!(transports(&stage, &spec), ["exec"]);
    assert_eq!(stage.journal(&spec).host("session")[0]["agent"], "host");
    stage.check_nothing_left(&spec);
}

/// incus-agent mounts them when it is up, and pika-cloud's own agent answers before.
#[test]
fn folders_and_volumes_are_there_before_the_job_begins() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("mounts");
    let (snapshot, volume) = (stage.more("snapshot"), format!("data-{}", std::process::id()));
    fs::create_dir(&snapshot).unwrap();
    fs::write(snapshot.join("hello"), "from the host\n").unwrap();
    let mounts = json!([
        { "kind": "read_only_snapshot", "guest_path": "/snapshot", "source": snapshot },
        { "kind": "persistent_volume", "guest_path": "/data", "source": volume, "mode": "read_write" },
    ]);
    let command =
        "i=0; until [ $(grep -cE ' /(snapshot|data) ' /proc/mounts) = 2 ] || [ $i = 100 ]; do sleep 1; i=$((i+1)); done
        echo waited $i; cat /snapshot/hello && echo kept > /data/word";
    let spec = vms.spec(&stage, VmKind::WithIncusAgent, command).with("mounts", mounts).as_root();
    vms.start(&stage, &spec).finish().expect(0);
    assert_eq!(stage.outputs(&spec).log(), "waited 0\nfrom the host\n");
    let kept = format!("/var/lib/incus/storage-pools/default/custom/default_{volume}/word");
    assert_eq!(fs::read_to_string(kept).unwrap(), "kept\n");
    stage.check_nothing_left(&spec);
}

/// Without incus-agent nobody mounts them: the job does not begin, and says which one it waited for.
#[test]
fn a_mount_that_nobody_brings_is_named() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("unmounted");
    let snapshot = stage.more("snapshot");
    fs::create_dir(&snapshot).unwrap();
    let mounts = json!([{ "kind": "read_only_snapshot", "guest_path": "/snapshot", "source": snapshot }]);
    let spec = vms.spec(&stage, VmKind::Bare, "echo begun").with("mounts", mounts).as_root();
    let done = vms.start(&stage, &spec).finish().expect(126);
    assert!(done.stderr.contains("`/snapshot` is not mounted"), "{}", done.stderr);
    assert!(!stage.outputs(&spec).log().contains("begun"), "{}", stage.outputs(&spec).log());
    stage.check_nothing_left(&spec);
}

/// Incus gives a context id to another VM as soon as the one that had it is stopped. Here each of two gets the other's.
#[test]
fn vms_that_come_back_with_each_others_context_id_are_told_apart() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("swapped");
    let tokens = ["anna", "bert"];
    // Their rests are long enough to change them, and end one after the other.
    let specs = [("anna", 60), ("bert", 90)].map(|(token, rest)| {
        let spec = vms.spec(&stage, VmKind::Bare, &endless(token)).with("policies.restart_policy", "always");
        let spec = spec.with("policies.restart_backoff_secs", rest);
        spec.with("policies.retention_policy", "keep_until_stopped")
    });
    let mut jobs = start_both(vms, &stage, &specs);
    let cids = specs.each_ref().map(|spec| vms.cid(spec));
    assert_ne!(cids[0], cids[1]);
    for spec in &specs {
        Incus.stop(&spec.instance);
    }
    for (spec, cid) in specs.iter().zip([cids[1], cids[0]]) {
        vms.set_cid(spec, cid);
    }
    for job in &mut jobs {
        job.wait_ready(2);
    }
    assert_eq!(specs.each_ref().map(|spec| vms.cid(spec)), [cids[1], cids[0]]);
    for ((token, spec), job) in tokens.iter().zip(&specs).zip(jobs) {
        stage.call(&["destroy", &spec.id]).expect(0);
        job.finish().expect(130);
        let journal = stage.journal(spec);
        assert_eq!(journal.verdict(1)["verdict"], "guest_died");
        assert_eq!(journal.verdict(2)["verdict"], "cancelled");
        for incarnation in [1, 2] {
            journal.check_events(incarnation.into());
            check_tokens(&stage.incarnation(spec, incarnation).log(), token);
        }
        stage.check_nothing_left(spec);
    }
}

#[test]
fn a_paused_vm_is_unreachable_until_it_is_resumed() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("paused");
    let command = "pika-guest ready; echo before; sleep 30; echo after";
    let spec = vms.spec(&stage, VmKind::Bare, command).with("watchdogs.silence_secs", 20);
    let mut job = vms.start(&stage, &spec);
    job.wait_ready(1);
    vms.act(&spec, "freeze");
    job.wait_record("unreachable", |record| record["host"]["state"] == "unreachable");
    vms.act(&spec, "unfreeze");
    job.finish().expect(0);
    assert_eq!(stage.outputs(&spec).log(), "before\nafter\n");
    stage.journal(&spec).check_events(1);
    stage.check_nothing_left(&spec);
}

#[test]
fn vms_that_are_restarted_or_deleted_under_their_job_have_died() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("under");
    let specs = ["restarted", "deleted"].map(|token| vms.spec(&stage, VmKind::Bare, &endless(token)));
    let jobs = start_both(vms, &stage, &specs);
    vms.delete(&specs[1]);
    vms.act(&specs[0], "restart");
    for (spec, job) in specs.iter().zip(jobs) {
        job.finish().expect(126);
        let verdict = stage.journal(spec).verdict(1).clone();
        println!("{verdict}");
        assert_eq!(verdict["verdict"], "guest_died");
        stage.journal(spec).check_events(1);
        stage.check_nothing_left(spec);
    }
}

#[test]
fn an_interrupted_job_leaves_no_vm() {
    let Some(vms) = IncusVms::get() else { return };
    let stage = Stage::new("interrupted");
    let spec = vms.spec(&stage, VmKind::Bare, &endless("word"));
    let mut job = vms.start(&stage, &spec);
    job.wait_ready(1);
    eventually("it has a log", || {
        std::thread::sleep(Duration::from_millis(500));
        !job.running.printed().is_empty()
    });
    job.running.signal(Signal::INT);
    job.finish().expect(130);
    assert_eq!(stage.outputs(&spec).verdict()["verdict"], "cancelled");
    check_tokens(&stage.outputs(&spec).log(), "word");
    stage.check_nothing_left(&spec);
}

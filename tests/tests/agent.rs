//! Whose agent runs a job: the image's, or the host's own, put into a stock image or in place of one that is no more.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use pika_cloud_tests::{BARE_IMAGE, Chance, Finished, Image, Incus, Lab, Running, Spec, Stage, eventually};
use serde_json::Value;

/// What a job leaves by which all of it can be seen.
const WHOLE_JOB: &str = r"pika-guest ready --message up && pika-guest progress half --fraction 0.5
    echo to the log
    echo outputs > $PIKA_CLOUD_DIR/artifacts/file
    id -un
    exit 5";

/// Where the host's own agent is put first.
const PLACE: &str = "/var/lib/pika-cloud-agent";

/// Whose agents the sessions of a runtime were with, as the journal says.
fn origins(stage: &Stage, spec: &Spec) -> Vec<String> {
    let journal = stage.journal(spec);
    journal.host("session").iter().map(|session| session["agent"].as_str().unwrap().to_owned()).collect()
}

/// Everything of [`WHOLE_JOB`] is here.
fn check_whole(stage: &Stage, spec: &Spec) {
    let outputs = stage.outputs(spec);
    let kinds: Vec<Value> = outputs.events().iter().map(|event| event["kind"].clone()).collect();
    assert_eq!(kinds, ["starting", "ready", "ready", "failed"]);
    assert_eq!(outputs.log(), "to the log\nci\n");
    assert_eq!(outputs.text("artifacts/file"), "outputs\n");
    let verdict = outputs.verdict();
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&"failed".into(), &5.into()));
    assert_eq!(stage.journal(spec).check_events(1), 4);
    stage.check_nothing_left(spec);
}

/// Nothing of pika-cloud's is in the image: log, artifacts, exit code and verbs all the same.
#[test]
fn a_stock_image_runs_a_whole_job() {
    let stage = Stage::new("stock");
    for policy in ["auto", "inject"] {
        let spec = stage.spec(WHOLE_JOB).with("incus.image_alias", BARE_IMAGE).with("incus.agent", policy);
        stage.run(&spec).expect(5);
        assert_eq!(origins(&stage, &spec), ["host"]);
        check_whole(&stage, &spec);
    }
}

/// What the image has is neither used nor touched.
#[test]
fn an_injected_agent_leaves_the_images_alone() {
    let stage = Stage::new("beside");
    let image = Image::with_agent("#!/bin/sh\necho never > /tmp/was-run\n");
    let command = "cat /usr/bin/pika-guest; test ! -e /tmp/was-run";
    let spec = stage.spec(command).with("incus.image_alias", &*image.alias).with("incus.agent", "inject");
    stage.run(&spec).expect(0);
    assert_eq!(stage.outputs(&spec).log(), "#!/bin/sh\necho never > /tmp/was-run\n");
    assert_eq!(origins(&stage, &spec), ["host"]);
}

/// A place of root's own, from which everybody may run it: a workload can neither replace nor remove it.
#[test]
fn no_workload_controls_what_was_put_in() {
    let stage = Stage::new("place");
    let command = format!(
        "for d in {PLACE} {PLACE}/*; do stat -c '%u %a' $d; done; stat -c '%u %a' {PLACE}/*/pika-guest
         touch {PLACE}/x; mv {PLACE} /tmp/y; echo > $(ls {PLACE}/*/pika-guest); rm -f {PLACE}/*/pika-guest
         ls -A {PLACE}/*; pika-guest version --json"
    );
    let spec = stage.spec(&command).with("incus.image_alias", BARE_IMAGE);
    stage.run(&spec).expect(0);
    let log = stage.outputs(&spec).log();
    assert!(log.starts_with("0 755\n0 755\n0 755\n"), "{log}");
    let digest = pika_cloud_tests::sha256(&fs::read(&Lab::get().agent).unwrap());
    assert!(log.contains("\npika-guest\n") && log.contains(&format!("sha256:{digest}")), "{log}");
}

/// An agent is sent once; what comes after that, also of another collector, is an exec.
#[test]
fn what_lies_there_is_not_sent_again() {
    let stage = Stage::new("once");
    let end = "while [ ! -e /tmp/end ]; do sleep 0.05; done";
    let command = format!("pika-guest ready; {}; pika-guest progress again; {end}", Stage::gate());
    let spec = stage.spec(&command).with("incus.image_alias", BARE_IMAGE);
    let run = stage.start(&spec);
    stage.wait_ready(&spec);
    let look = || Incus.exec_ok(&spec.instance, &format!("stat -c '%i %Y' {PLACE}/*/*; ls -A {PLACE}/* | wc -l"));
    let placed = look();
    assert!(placed.ends_with("\n1\n"), "{placed}");
    run.kill();
    let run = stage.start(&spec);
    stage.open_gate(&spec);
    // It comes in a session of the next collector.
    stage.wait_event(&spec, "progress", |event| event["details"]["progress"]["name"] == "again");
    assert_eq!(look(), placed, "it is the same file");
    Incus.exec_ok(&spec.instance, "touch /tmp/end");
    run.finish().expect(0);
    assert_eq!(origins(&stage, &spec), ["host"], "one agent all the time");
}

/// A host that is upgraded in place has no agent of its own for a moment: a job that runs is not ended by that.
#[test]
fn a_job_outlives_a_moment_without_the_hosts_own_agent() {
    let stage = Stage::new("upgraded");
    let agent = stage.more("own-agent");
    let start = |spec: &Spec| {
        let mut command = stage.run_command(spec, &[]);
        command.env_remove("PIKA_GUEST_AGENT").arg("--agent").arg(&agent);
        Running::start(&mut command)
    };
    for policy in ["auto", "inject"] {
        fs::copy(&Lab::get().agent, &agent).unwrap();
        let spec = gated(&stage).with("incus.image_alias", BARE_IMAGE).with("incus.agent", policy);
        let run = start(&spec);
        stage.wait_ready(&spec);
        run.kill();
        fs::remove_file(&agent).unwrap();
        let run = start(&spec);
        stage.open_gate(&spec);
        // Many dials.
        std::thread::sleep(Duration::from_secs(6));
        fs::copy(&Lab::get().agent, &agent).unwrap();
        run.finish().expect(7);
        assert_eq!(stage.outputs(&spec).verdict()["verdict"], "failed");
        assert_eq!(stage.journal(&spec).check_events(1), 3);
        stage.check_nothing_left(&spec);
    }
}

/// An image's agent is deleted and everything of it but the supervisor killed, in the midst of a job: whatever the spec says,
/// the job is not touched, and nothing that it says is lost or told twice.
#[test]
fn a_job_whose_agent_vanishes_is_salvaged() {
    let stage = Stage::new("vanish");
    for policy in ["auto", "baked"] {
        let spec = gated(&stage).with("incus.agent", policy);
        let run = stage.start(&spec);
        stage.wait_ready(&spec);
        lose_agent(&spec);
        stage.wait_record(&spec, "a session of the host's own agent", |record| record["host"]["agent"] == "host");
        stage.open_gate(&spec);
        run.finish().expect(7);
        check_salvaged(&stage, &spec);
    }
}

/// The same where no collector lived while it happened.
#[test]
fn a_job_whose_agent_vanished_meanwhile_is_salvaged() {
    let stage = Stage::new("meanwhile");
    let spec = gated(&stage).with("incus.agent", "baked");
    let run = stage.start(&spec);
    stage.wait_ready(&spec);
    run.kill();
    lose_agent(&spec);
    stage.open_gate(&spec);
    stage.start(&spec).finish().expect(7);
    check_salvaged(&stage, &spec);
}

/// Also what only the outputs are left of.
#[test]
fn outputs_of_a_job_whose_agent_vanished_are_salvaged() {
    let stage = Stage::new("leftover");
    let spec = gated(&stage).with("watchdogs.run_secs", 600);
    let run = stage.start(&spec);
    stage.wait_ready(&spec);
    lose_agent(&spec);
    stage.wait_record(&spec, "a session of the host's own agent", |record| record["host"]["agent"] == "host");
    stage.call(&["cancel", &spec.id]).expect(0);
    run.finish().expect(130);
    let outputs = stage.outputs(&spec);
    assert_eq!(
        (outputs.verdict()["verdict"].as_str(), outputs.text("artifacts/first")),
        (Some("cancelled"), "1\n".into())
    );
    assert_eq!(outputs.verdict()["evidence"]["collection"]["complete"], true);
}

/// An agent that is there, and dies whenever it is asked.
#[test]
fn an_agent_that_only_crashes_is_replaced() {
    let stage = Stage::new("crashes");
    let image = Image::with_agent("#!/bin/sh\nkill -SEGV $$\n");
    let spec = stage.spec("exit 3").with("incus.image_alias", &*image.alias);
    stage.run(&spec).expect(3);
    assert_eq!(origins(&stage, &spec), ["host"]);
}

/// There is nobody to put an agent into.
#[test]
fn an_instance_that_is_stopped_in_mid_job_has_nothing_to_salvage() {
    let stage = Stage::new("stopped");
    let spec = gated(&stage);
    let run = stage.start(&spec);
    stage.wait_ready(&spec);
    Incus.stop(&spec.instance);
    run.finish().expect(126);
    let verdict = stage.outputs(&spec).verdict();
    assert_eq!((&verdict["verdict"], &verdict["cause"]), (&"guest_died".into(), &"instance_stopped".into()));
    assert!(verdict["message"].as_str().unwrap().contains("nothing to salvage from a stopped one"), "{verdict}");
    let problem = verdict["evidence"]["collection"]["error"].as_str().unwrap();
    assert!(problem.contains("nothing to salvage"), "{verdict}");
    stage.check_nothing_left(&spec);
}

/// A job that says something, and goes on once its gate is open.
fn gated(stage: &Stage) -> Spec {
    let command = format!(
        "echo 1 > $PIKA_CLOUD_DIR/artifacts/first; echo one; pika-guest ready; {}
         echo two; echo 2 > $PIKA_CLOUD_DIR/artifacts/second; exit 7",
        Stage::gate()
    );
    stage.spec(&command)
}

/// What an upgrade that went wrong, or a person, may do. The supervisor of the job is none of it.
fn lose_agent(spec: &Spec) {
    Incus.exec_ok(
        &spec.instance,
        "rm /usr/bin/pika-guest
         for p in /proc/[0-9]*; do
            case \"$(tr '\\0' ' ' < $p/cmdline)\" in 'pika-guest stream '*) kill -9 ${p#/proc/} ;; esac
         done",
    );
}

fn check_salvaged(stage: &Stage, spec: &Spec) {
    let outputs = stage.outputs(spec);
    assert_eq!(outputs.log(), "one\ntwo\n");
    assert_eq!(outputs.artifacts(), ["first", "second"]);
    let verdict = outputs.verdict();
    assert_eq!((&verdict["verdict"], &verdict["exit_code"]), (&"failed".into(), &7.into()));
    let journal = stage.journal(spec);
    assert_eq!((journal.check_events(1), journal.host("accepted").len()), (3, 1));
    assert_eq!(origins(stage, spec), ["image", "host"]);
    stage.check_nothing_left(spec);
}

/// `run` of a stock image by a host whose own agent is `agent`.
fn run_with(stage: &Stage, spec: &Spec, agent: &str) -> Finished {
    Running::start(stage.run_command(spec, &[]).env_remove("PIKA_GUEST_AGENT").args(["--agent", agent])).finish()
}

/// Both are told, what the image lacks and why the host cannot help, with the way out.
#[test]
fn a_host_without_a_usable_agent_says_so() {
    let stage = Stage::new("unusable");
    let aarch64 = stage.more("aarch64").display().to_string();
    let mut bytes = fs::read(&Lab::get().agent).unwrap();
    bytes[18..20].copy_from_slice(&183_u16.to_le_bytes());
    fs::write(&aarch64, bytes).unwrap();
    for (agent, problem) in [
        (aarch64.as_str(), "is for aarch64, and the instance is x86_64"),
        ("/bin/ls", "linked dynamically"),
        ("/nonexistent/agent", "has no pika-guest of its own"),
        ("/etc/passwd", "no Linux program"),
    ] {
        let spec = stage.spec("true").with("incus.image_alias", BARE_IMAGE);
        run_with(&stage, &spec, agent).expect(125);
        let verdict = stage.outputs(&spec).verdict();
        assert_eq!(verdict["verdict"], "provision_failed");
        let error = verdict["evidence"]["error"].as_str().unwrap();
        for word in ["127", agent, problem, "--agent"] {
            assert!(error.contains(word), "`{word}` is not in {error}");
        }
        stage.check_nothing_left(&spec);
        // Where it is asked for, nothing is made before that is known.
        let spec = stage.spec("true").with("incus.image_alias", BARE_IMAGE).with("incus.agent", "inject");
        run_with(&stage, &spec, agent).expect(125).saying(&["incus.agent is `inject`", agent, problem]);
        assert!(!stage.has_instance(&spec) && !stage.runtime(&spec).exists());
    }
}

#[test]
fn an_agent_of_the_previous_protocol_is_told_with_the_bake_that_mends_it() {
    let stage = Stage::new("previous");
    let hello = r#"{"hello":{"protocol":0,"agent":"0.0.9","schema_version":1,"stream_id":"s","boot_id":"b","first_seq":1,"last_seq":0}}"#;
    let program = format!("#!/bin/sh\nread hello\necho '{hello}'\nsleep 30\n");
    for base in [Some("debian/12"), None] {
        let image = Image::with_agent(&program);
        let image = match base {
            Some(base) => image.with_property("pika-cloud.base-alias", base),
            None => image,
        };
        let spec = stage.spec("true").with("incus.image_alias", &*image.alias);
        stage.run(&spec).expect(125);
        let verdict = stage.outputs(&spec).verdict();
        assert_eq!(verdict["verdict"], "provision_failed");
        let error = verdict["evidence"]["error"].as_str().unwrap();
        let bake = format!("pika-cloud bake --from {} --to {}", base.unwrap_or("BASE"), image.alias);
        for word in ["0.0.9", "protocol 0", "speaks 1", &bake] {
            assert!(error.contains(word), "`{word}` is not in {error}");
        }
        // What such an image cannot do by itself, ours can.
        let spec = stage.spec("exit 4").with("incus.image_alias", &*image.alias).with("incus.agent", "inject");
        stage.run(&spec).expect(4);
    }
}

/// The first place is not what it should be, in every way: another one does, and nothing there is opened.
#[test]
fn a_place_that_is_taken_is_left_and_another_one_used() {
    let stage = Stage::new("taken");
    let digest = &pika_cloud_tests::sha256(&fs::read(&Lab::get().agent).unwrap())[..16];
    let commands: [(&str, String); 6] = [
        ("a FIFO for the agent", format!("mkdir -p $P/{digest}; mkfifo $P/{digest}/pika-guest")),
        ("a folder for the agent", format!("mkdir -p $P/{digest}/pika-guest")),
        (
            "a link to elsewhere",
            format!("mkdir -p $P/{digest}; echo precious > $P/x; ln -s ../x $P/{digest}/pika-guest"),
        ),
        ("a FIFO for the folder", format!("mkdir -p $P; mkfifo $P/{digest}")),
        ("a link for the folder", format!("mkdir -p $P/other; ln -s other $P/{digest}")),
        ("a folder of another's", format!("mkdir -p $P/{digest}; chown 1000 $P/{digest}")),
    ];
    for (what, command) in commands {
        let image = Image::bare(|root| {
            let status =
                std::process::Command::new("sh").args(["-c", &command]).env("P", root.join(&PLACE[1..])).status();
            assert!(status.unwrap().success(), "{what}");
        });
        let shown = format!("cat {PLACE}/x; exit 9");
        let spec = stage.spec(&shown).with("incus.image_alias", &*image.alias);
        stage.run(&spec).expect(9);
        let log = stage.outputs(&spec).log();
        assert!(what != "a link to elsewhere" || log.contains("precious"), "{what}: {log}");
        stage.check_nothing_left(&spec);
    }
}

/// Where a user of the image could write, a user may have put what is looked for: it would run as root.
#[test]
fn what_a_user_may_have_put_there_is_not_run() {
    let stage = Stage::new("planted");
    let digest = &pika_cloud_tests::sha256(&fs::read(&Lab::get().agent).unwrap())[..16];
    let program = "#!/bin/sh\nid -u > /tmp/was-run\nexit 127\n";
    for (what, change) in [
        ("the file is a user's", format!("chown 1000 $P/{digest}/pika-guest")),
        ("others may write to the file", format!("chmod 757 $P/{digest}/pika-guest")),
        ("the folder is a user's", format!("chown 1000 $P/{digest}")),
        ("the folder of all agents is a user's", "chown 1000 $P".to_owned()),
        ("the folder of all agents is a group's", "chgrp 1000 $P && chmod 775 $P".to_owned()),
        ("the folder of the system's is everybody's", "chmod 777 $P/..".to_owned()),
        ("the folder of all agents is a link", "mv $P $P.moved && ln -s $(basename $P).moved $P".to_owned()),
    ] {
        let image = Image::bare(|root| {
            for place in [PLACE, "/opt/pika-cloud-agent"] {
                let place = root.join(&place[1..]);
                let folder = place.join(digest);
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join("pika-guest"), program).unwrap();
                fs::set_permissions(folder.join("pika-guest"), fs::Permissions::from_mode(0o755)).unwrap();
                let status = std::process::Command::new("sh").args(["-c", &change]).env("P", &place).status();
                assert!(status.unwrap().success(), "{what}");
            }
        });
        let spec =
            stage.spec("cat /tmp/was-run 2> /dev/null || echo nobody; exit 9").with("incus.image_alias", &*image.alias);
        stage.run(&spec).expect(9);
        assert_eq!(stage.outputs(&spec).log(), "nobody\n", "{what}: it was run, by the user of that id");
        assert_eq!(origins(&stage, &spec), ["host"]);
        stage.check_nothing_left(&spec);
    }
}

/// A first process that mounts what a test wants, and then does what it does.
fn mounting(mounts: &str) -> Image {
    Image::bare(|root| {
        let init = root.join("sbin/init");
        let text = fs::read_to_string(&init).unwrap();
        fs::write(&init, text.replacen("#!/bin/sh\n", &format!("#!/bin/sh\nmkdir -p /opt /var/lib\n{mounts}\n"), 1))
            .unwrap();
    })
}

#[test]
fn a_disk_that_is_full_and_one_that_forbids_to_run_are_passed_over() {
    let stage = Stage::new("full");
    let full = "mount -t tmpfs -o size=64k,mode=755 none /var/lib";
    let image = mounting(&format!("{full}; mount -t tmpfs -o noexec,mode=755 none /opt"));
    let spec =
        stage.spec("ls -d /run/pika-cloud-agent/*/pika-guest && pika-guest ready; find /var/lib /opt -type f; exit 2");
    let spec = spec.with("incus.image_alias", &*image.alias);
    stage.run(&spec).expect(2);
    let log = stage.outputs(&spec).log();
    assert!(log.starts_with("/run/pika-cloud-agent/") && log.lines().count() == 1, "nothing is left elsewhere: {log}");
    stage.check_nothing_left(&spec);
}

#[test]
fn a_guest_with_no_room_for_it_is_told() {
    let stage = Stage::new("noroom");
    let mount = |place: &str| format!("mount -t tmpfs -o size=64k,mode=755 none {place}");
    let image = mounting(&["/var/lib", "/opt", "/run"].map(mount).join("\n"));
    let spec = stage.spec("true").with("incus.image_alias", &*image.alias);
    stage.run(&spec).expect(125);
    let verdict = stage.outputs(&spec).verdict();
    assert_eq!(verdict["verdict"], "provision_failed");
    let error = verdict["evidence"]["error"].as_str().unwrap();
    for word in ["127", "No space left on device", PLACE] {
        assert!(error.contains(word), "`{word}` is not in {error}");
    }
    stage.check_nothing_left(&spec);
}

/// A shell of the guest's own: it says what it likes, or nothing, for as long as it likes.
#[test]
fn a_shell_that_hangs_floods_or_lies_costs_its_own_runtime_only() {
    let stage = Stage::new("shells");
    let unless_run =
        |rest: &str| format!("#!/bin/busybox sh\ncase \"$2\" in *'for place'*) exit 127 ;; esac\n{rest}\n");
    let hangs = unless_run("exec /bin/busybox sleep 600");
    let floods = unless_run("exec /bin/busybox yes");
    let lies = unless_run("exec /bin/busybox cat");
    let lies = lies.replace("cat", "head -c 1000 > /dev/null");
    let swaps = unless_run(
        r#"/bin/busybox sh "$@"
        printf '#!/bin/busybox sh\necho {\"agent\":\"0.1.0\",\"protocol\":1,\"schema_version\":1,\"digest\":\"sha256:00\"}\n' > "$4""#,
    );
    let gone = "#!/bin/none\n".to_owned();
    for (shell, boot_secs, verdict, words) in [
        (hangs, 8, "timed_out", "127"),
        (floods, 60, "provision_failed", "bytes of output"),
        (lies, 60, "provision_failed", "does not run"),
        (swaps, 60, "provision_failed", "is not the pika-guest that was put there"),
        (gone, 60, "provision_failed", "no /bin/sh"),
    ] {
        let image = Image::with_shell(&shell);
        let spec = stage.spec("true").with("incus.image_alias", &*image.alias);
        let spec = spec.with("watchdogs.boot_secs", boot_secs).with("watchdogs.collect_secs", 3);
        let run = stage.run(&spec);
        assert!(run.took < Duration::from_secs(30), "{:?}", run.took);
        assert!(run.peak_kib < 80 * 1024, "Invariant 5: {} KiB", run.peak_kib);
        let found = stage.outputs(&spec).verdict();
        assert_eq!(found["verdict"], verdict, "{found}");
        assert!(found.to_string().contains(words), "`{words}` is not in {found}");
        stage.check_nothing_left(&spec);
    }
}

/// Killed at any moment, the puts in the midst of them included, the same command goes on.
#[test]
fn a_collector_that_is_killed_while_it_puts_the_agent_in_goes_on() {
    let stage = Stage::new("midput");
    let mut chance = Chance::new("midput");
    for _ in 0..3 {
        let spec = stage.spec(WHOLE_JOB).with("incus.image_alias", BARE_IMAGE).with("incus.agent", "inject");
        for _ in 0..4 {
            let run = stage.start(&spec);
            std::thread::sleep(Duration::from_millis(60) + chance.up_to(Duration::from_millis(800)));
            run.kill();
        }
        stage.run(&spec).expect(5);
        check_whole(&stage, &spec);
    }
}

/// A put that is cut in its midst leaves nothing that could be run, and the next one nothing of it.
#[test]
fn a_put_that_is_cut_leaves_no_agent_behind() {
    let stage = Stage::new("cutput");
    // Time enough to be killed in.
    let image = Image::bare(|root| {
        let cat = root.join("bin/cat");
        fs::remove_file(&cat).unwrap();
        fs::write(&cat, "#!/bin/sh\nsleep 1\nexec /bin/busybox cat \"$@\"\n").unwrap();
        fs::set_permissions(&cat, fs::Permissions::from_mode(0o755)).unwrap();
    });
    let spec = stage.spec(WHOLE_JOB).with("incus.image_alias", &*image.alias).with("incus.agent", "inject");
    let digest = &pika_cloud_tests::sha256(&fs::read(&Lab::get().agent).unwrap())[..16];
    let root = Lab::get().incus_dir.join(format!("storage-pools/default/containers/{}/rootfs", spec.instance));
    let folder = root.join(&PLACE[1..]).join(digest);
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let mut cut = String::new();
    for _ in 0..3 {
        let run = stage.start(&spec);
        eventually("a put is under way", || {
            let name = names().into_iter().find(|name| name.starts_with(".pika-guest.") && *name != cut);
            name.is_some_and(|name| {
                cut = name;
                true
            })
        });
        run.kill();
        // What goes on in the guest is over by then.
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(names(), [cut.as_str()], "a part of it, under no name that anyone runs");
    }
    let run = stage.start(&spec);
    eventually("it is put in whole", || names() == ["pika-guest"]);
    run.finish().expect(5);
    check_whole(&stage, &spec);
}

/// A stock Debian with systemd, as it comes.
#[test]
fn a_stock_debian_runs_a_whole_job() {
    let stage = Stage::new("stock-debian");
    // It has a user of its own for workloads: nobody.
    for policy in ["auto", "inject"] {
        let spec = stage.spec(&WHOLE_JOB.replace("id -un", "cat /proc/1/comm"));
        let spec = spec.with("incus.image_alias", pika_cloud_tests::debian_image()).with("incus.agent", policy);
        stage.run(&spec).expect(5);
        assert_eq!(
            (stage.outputs(&spec).log().as_str(), origins(&stage, &spec)),
            ("to the log\nsystemd\n", vec!["host".to_owned()])
        );
        assert_eq!(stage.outputs(&spec).text("artifacts/file"), "outputs\n");
        stage.check_nothing_left(&spec);
    }
}

#[test]
fn inspect_and_doctor_tell_whose_agent_it_is() {
    let stage = Stage::new("told");
    let spec = stage.spec("true").with("incus.image_alias", BARE_IMAGE);
    stage.run(&spec).expect(0);
    let inspected = stage.call(&["inspect", &spec.id]).expect(0).stdout;
    assert!(inspected.contains("agent_origin     host"), "{inspected}");
    let agent = Lab::get().agent.display().to_string();
    let found = stage.call(&["doctor"]).expect(0).stdout;
    assert!(
        found.contains(&format!("ok       {agent} is put into guests without an agent: pika-guest 0.1.0")),
        "{found}"
    );
    let missing: PathBuf = stage.more("nothing");
    let found = stage.call(&["doctor", "--agent", &missing.display().to_string()]).expect(1).stdout;
    assert!(found.contains("missing  guests without an agent get none") && found.contains("mend it: "), "{found}");

    // Where none was asked for, images that were baked do without.
    let alone = stage.more("pika-cloud");
    fs::copy(&Lab::get().cloud, &alone).unwrap();
    let own = stage.cloud(&["doctor"]);
    let mut command = std::process::Command::new(&alone);
    command.args(own.get_args()).env_remove("PIKA_GUEST_AGENT");
    let found = Running::start(&mut command).finish().expect(0).stdout;
    assert!(found.contains("absent   only guests that were baked with an agent"), "{found}");
}

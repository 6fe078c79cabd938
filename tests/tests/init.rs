//! The agent under the inits of images: what its units promise, on a stock Debian 12 with systemd and under busybox's init.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use pika_cloud_tests::{Dial, Image, Incus, LIMIT, Running, Spec, Stage, eventually, until};
use serde_json::json;

const SERVE: &str = "/run/pika-guest/serve.sock";

/// A container of its own, that lives as long as the stage.
struct Guest {
    name: String,
    _image: Arc<Image>,
}

impl Guest {
    /// A Debian that has booted.
    fn debian(stage: &Stage) -> Self {
        let guest = Self::launch(stage, Image::debian_with_agent());
        guest.wait_booted();
        guest
    }

    fn launch(stage: &Stage, image: Arc<Image>) -> Self {
        let name = stage.spec("").instance;
        let output = Incus.client(&["launch", &image.alias, &name]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { name, _image: image }
    }

    fn wait_booted(&self) {
        eventually("systemd has booted", || {
            let state = Incus.exec(&self.name, "systemctl is-system-running --wait");
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            assert_ne!(
                state,
                "degraded",
                "{}",
                self.sh("systemctl --failed --no-pager; journalctl --no-pager --lines 50")
            );
            state == "running"
        });
    }

    /// Of an init without systemd: waits until the agent listens.
    fn wait_listening(&self) {
        // Bound under another name, and renamed.
        let script = format!("[ -S {SERVE} ] && grep -q serve.sock /proc/net/unix");
        eventually("the agent listens", || Incus.exec(&self.name, &script).status.success());
    }

    /// The processes of the listener, whose parent is `parent`.
    fn listeners(&self, parent: &str) -> String {
        let script = "for p in /proc/[0-9]*; do
            parent=$(sed -n 's/^PPid:.//p' $p/status) name=$(tr '\\0' ' ' < /proc/$parent/cmdline)
            case \"$(tr '\\0' ' ' < $p/cmdline) < $name\" in '/usr/bin/pika-guest serve '*'< PARENT'*) echo ${p#/proc/} ;; esac
        done 2>/dev/null; true";
        self.sh(&script.replace("PARENT", parent))
    }

    /// Kills the listener, and waits until its init has started another.
    fn kill_listener(&self, parent: &str) {
        let first = self.listeners(parent);
        self.sh(&format!("kill -9 {first}"));
        until("another one", LIMIT, || Some(self.listeners(parent)).filter(|now| !now.is_empty() && *now != first));
        self.wait_listening();
    }

    /// What a script says, which must succeed.
    fn sh(&self, script: &str) -> String {
        Incus.exec_ok(&self.name, script).trim().to_owned()
    }

    /// A property of the listener's unit.
    fn property(&self, name: &str) -> String {
        self.sh(&format!("systemctl show --property {name} --value pika-guest"))
    }

    /// Ends the listener somehow, and waits until another one listens.
    fn end_listener(&self, command: &str) {
        let before = self.property("MainPID");
        self.sh(&format!("systemctl {command} pika-guest"));
        // Once it is active, it has heard itself.
        eventually("another one listens", || {
            self.property("MainPID") != before && self.property("ActiveState") == "active"
        });
    }
}

/// A spec of a job in a Debian.
fn job(stage: &Stage, image: &Image, command: &str) -> Spec {
    stage.spec(command).with("incus.image_alias", image.alias.as_str()).as_root()
}

#[test]
fn systemd_runs_the_listener_in_a_sandbox() {
    let stage = Stage::new("sandbox");
    let guest = Guest::debian(&stage);
    assert_eq!(guest.sh("systemctl is-active pika-guest pika-guest-supervise.socket"), "active\nactive");
    assert_eq!(guest.sh("systemctl --failed --no-legend"), "");
    let said = guest.sh("journalctl --unit pika-guest --no-pager");
    assert!(said.contains("does not listen on vsock: this is a container (/run/systemd/container)"), "{said}");
    // A /proc of its own, and the boot id of all the same.
    let pid = guest.property("MainPID");
    let ids = guest.sh(&format!("cat /proc/{pid}/root/proc/sys/kernel/random/boot_id /proc/sys/kernel/random/boot_id"));
    let (inside, outside) = ids.split_once('\n').unwrap();
    assert_eq!(inside, outside);
    assert_eq!(
        guest.sh("stat -c '%a %G' /run/pika-cloud /run/pika-cloud/artifacts"),
        "2775 pika-cloud\n2775 pika-cloud"
    );

    let exposure = guest.sh("systemd-analyze security pika-guest --no-pager | tail -n 1");
    println!("{exposure} (systemd's estimate; this kernel may lack what it counts on, such as AppArmor or cgroup v2)");
    let figure: f64 = exposure.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!(figure <= 2.0, "{exposure}");

    // It says that it lives, and systemd hears it: again and again, each time before it would be killed for its silence.
    guest.sh("mkdir -p /etc/systemd/system/pika-guest.service.d && cd /etc/systemd/system/pika-guest.service.d \
        && printf '[Service]\nWatchdogSec=2\n' > watchdog.conf && systemctl daemon-reload && systemctl restart pika-guest");
    let heard = || guest.property("WatchdogTimestampMonotonic").parse::<u64>().unwrap();
    let (first, pid) = (heard(), guest.property("MainPID"));
    eventually("it is heard for twice as long", || heard() >= first + 4_000_000);
    assert_eq!((guest.property("NRestarts"), guest.property("MainPID")), ("0".to_owned(), pid));
}

/// Whoever dials has of it what the files would give, and the workload of a unit reports without any rights.
#[test]
fn users_report_and_look_and_start_nothing() {
    let stage = Stage::new("users");
    let guest = Guest::debian(&stage);
    let mut observer = Dial::unix(&guest.name, "ci", SERVE);
    observer.hello("observer");
    let service = "systemd-run --quiet --wait --collect --property User=app --property SupplementaryGroups=pika-cloud";
    guest.sh(&format!("{service} pika-guest ready --message 'serves'"));
    assert_eq!(observer.event("ready")["message"], "serves");
    let pid = guest.property("MainPID");
    // Not from who owns its files in /proc: after a change of user those are root's, so that the user cannot look into it.
    let uids = guest.sh(&format!(
        "grep -l 'PPid:.{pid}$' /proc/[0-9]*/status | xargs sed -n 's/^[UG]id:.//p' | tr '\\t' '\\n' | sort -u"
    ));
    let ci = guest.sh("(id -u ci; id -g ci) | sort -u");
    assert_eq!(uids, ci, "a session has the rights of who dialled");
    // Who is no member cannot dial, nor report.
    let nobody = Incus.exec(&guest.name, "runuser -u app -- pika-guest ready");
    assert_eq!(nobody.status.code(), Some(77), "{}", String::from_utf8_lossy(&nobody.stderr));

    let mut owner = Dial::unix(&guest.name, "ci", SERVE);
    owner.hello("owner");
    owner.start("job-1", "true");
    let error = owner.error();
    assert_eq!(error["code"], "bad_request");
    assert!(error["message"].as_str().unwrap().contains("only root may ask them"), "{error}");
}

/// Says where it runs and what it may, leaves a file of another user, sends more events than are kept once a host has them, and stays.
const OF_ALL_SORTS: &str = r#"
    pika-guest ready; readlink /proc/self/ns/mnt; cat /proc/self/cgroup; grep NoNewPrivs /proc/self/status
    touch /var/tmp/mine /usr/mine && echo writes
    cd $PIKA_CLOUD_DIR/artifacts; mkdir -m 700 deep; echo kept > deep/file; chmod 600 deep/file; chown -R app deep
    text=$(head -c 60000 /dev/zero | tr '\0' x); i=0
    while [ $i -lt 90 ]; do
        echo "{\"kind\":\"progress\",\"name\":\"step\",\"message\":\"$text\"}"; i=$((i+1))
    done | pika-guest emit
    sleep 1000"#;

/// What a host starts over the listener: supervised outside of its sandbox, collected and trimmed inside of it.
#[test]
fn a_start_over_the_listener_runs_in_a_unit_of_its_own() {
    let stage = Stage::new("unit");
    let guest = Guest::debian(&stage);
    let mut owner = Dial::unix(&guest.name, "root", SERVE);
    owner.hello("owner");
    owner.start("job-1", OF_ALL_SORTS);
    owner.notice("started");
    let last = (0..=90).fold(0, |_, _| owner.event("ready")["seq"].as_u64().unwrap());
    let log = guest.sh("cat /run/pika-cloud/logs/guest.log");
    let pid = guest.property("MainPID");
    let sandbox = guest.sh(&format!("readlink /proc/{pid}/ns/mnt"));
    let own = guest.sh("readlink /proc/1/ns/mnt");
    assert!(log.contains(&own) && !log.contains(&sandbox) && own != sandbox, "{log}, {sandbox}, {own}");
    assert!(log.contains("/pika-guest-supervise@") && !log.contains("pika-guest.service"), "{log}");
    assert!(log.contains("\nwrites") && log.contains("NoNewPrivs:\t0"), "{log}");

    owner.say(&json!({ "archive": { "globs": ["**"], "limits": { "max_files": 10, "max_bytes": 1000 } } }));
    let entry = owner.find("a file", |said| said.get("entry").filter(|entry| entry["path"] == "deep/file").cloned());
    assert_eq!(entry["size"], 5);
    owner.notice("archive_done");
    // What is acknowledged is cut from the file.
    owner.say(&json!({ "ack": { "seq": last } }));
    let bytes = || guest.sh("wc -c < /run/pika-cloud/events.jsonl").parse::<u64>().ok();
    eventually("the file is trimmed", || bytes().is_some_and(|bytes| bytes < 5_000_000));

    // It outlives session and listener, and is found again.
    drop(owner);
    for end in ["restart", "kill --signal KILL"] {
        guest.end_listener(end);
        let mut owner = Dial::unix(&guest.name, "root", SERVE);
        assert_eq!(owner.hello("owner")["request_id"], "job-1");
        owner.start("job-1", "true");
        owner.notice("already_started");
    }
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    owner.say(&json!({ "signal": { "name": "TERM" } }));
    let failed = owner.event("failed");
    assert_eq!(failed["details"]["exit_code"], 143, "{failed}");
    owner.say(&json!({ "release": {} }));
    eventually("its unit is gone", || {
        guest.sh("systemctl list-units --all --no-legend 'pika-guest-supervise@*' | wc -l") == "0"
    });
    assert_eq!(guest.sh("systemctl --failed --no-legend"), "");
}

/// As a shutdown does it: TERM, the workload's own grace, a last word; and nothing of the workload is left.
#[test]
fn the_end_of_a_workloads_unit_is_written_down() {
    let stage = Stage::new("stop");
    let guest = Guest::debian(&stage);
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    // What it leaves is no part of its process group.
    owner.start("job-1", "trap 'echo asked' TERM; setsid sleep 1111 & pika-guest ready; while :; do sleep 0.1; done");
    owner.event("ready");
    owner.say(&json!({ "release": {} }));
    let stopping = guest.sh("date +%s; systemctl stop 'pika-guest-supervise@*'; date +%s");
    let (began, ended) = stopping.split_once('\n').unwrap();
    let took = ended.parse::<u64>().unwrap() - began.parse::<u64>().unwrap();
    assert!((5..20).contains(&took), "its grace of 5 s, and not much more: {took} s");
    let failed = owner.event("failed");
    assert_eq!(failed["details"]["exit_code"], 137, "{failed}");
    assert!(guest.sh("cat /run/pika-cloud/logs/guest.log").contains("asked"));
    let left = "grep -lxz '[s]leep' /proc/[0-9]*/cmdline | wc -l";
    assert_eq!(guest.sh(left), "0");
}

/// Waits until a job says that it is ready; where that does not come, tells all that there is to know.
fn wait_ready(stage: &Stage, spec: &Spec, running: &mut Running) {
    let is_ready = || stage.journal(spec).records.iter().any(|record| record["guest"]["kind"] == "ready");
    let began = Instant::now();
    while !is_ready() {
        if began.elapsed() > LIMIT || !running.is_running() {
            let look = "cat /run/pika-cloud/*.json*; ls -la /run /run/pika-*; systemctl list-jobs; journalctl --no-pager --lines 100";
            let guest = Incus.exec(&spec.instance, look);
            panic!(
                "{}\n{}\n{}",
                running.said(),
                stage.journal(spec).lines.join("\n"),
                String::from_utf8_lossy(&guest.stdout)
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The whole of it, by exec, as a host does it with a container.
#[test]
fn a_job_goes_on_whatever_becomes_of_the_listener() {
    let stage = Stage::new("job");
    let image = Image::debian_with_agent();
    let command = "echo began; pika-guest ready; cat /proc/self/cgroup > $PIKA_CLOUD_DIR/artifacts/cgroup
        while [ ! -e /tmp/gate ]; do pika-guest progress step; sleep 0.1; done; echo ended; exit 7";
    let spec = job(&stage, &image, command);
    let mut running = stage.start(&spec);
    wait_ready(&stage, &spec, &mut running);
    for command in [
        "stop pika-guest",
        "start pika-guest",
        "restart pika-guest",
        "kill --signal KILL pika-guest",
        "stop pika-guest-supervise.socket",
        "start pika-guest-supervise.socket",
        "daemon-reload",
        "daemon-reexec",
    ] {
        Incus.exec_ok(&spec.instance, &format!("systemctl {command}"));
        let seen = stage.journal(&spec).records.len();
        eventually(&format!("it goes on after {command}"), || stage.journal(&spec).records.len() > seen + 2);
    }
    stage.open_gate(&spec);
    running.finish().expect(7);
    let outputs = stage.outputs(&spec);
    assert_eq!(outputs.log(), "began\nended\n");
    // Though the host asked as soon as there was anybody to ask.
    let cgroup = outputs.text("artifacts/cgroup");
    assert!(cgroup.contains("/pika-guest-supervise@") && !cgroup.contains("pika-guest.service"), "{cgroup}");
    stage.journal(&spec).check_events(1);
    stage.check_nothing_left(&spec);
}

/// The units say where a workload's supervisor is to be had, so that one that cannot be had fails the run, and says whom to ask.
#[test]
fn a_supervisor_that_cannot_start_fails_the_run() {
    let stage = Stage::new("broken");
    let guest = Guest::debian(&stage);
    let unit = "/etc/systemd/system/pika-guest-supervise@.service.d";
    guest.sh(&format!("mkdir {unit} && printf '[Service]\nExecStart=\nExecStart=/nowhere\n' > {unit}/broken.conf && systemctl daemon-reload"));
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    owner.start("job-1", "touch /ran");
    let failed = owner.event("failed");
    assert_eq!(failed["details"]["exit_code"], 126);
    let message = failed["message"].as_str().unwrap();
    assert!(message.contains("the other end ended without a word; see `systemctl status"), "{message}");
    // Without the socket, the sandboxed listener starts nothing either.
    guest.sh("systemctl stop pika-guest-supervise.socket && test ! -e /run/pika-guest/supervise.sock");
    let mut owner = Dial::unix(&guest.name, "root", SERVE);
    owner.hello("owner");
    owner.start("job-2", "touch /ran");
    owner.notice("started");
    let mut owner = Dial::unix(&guest.name, "root", SERVE);
    owner.hello("owner");
    let message = owner.event("failed")["message"].as_str().unwrap().to_owned();
    assert!(message.contains("there is no /run/pika-guest/supervise.sock"), "{message}");
    guest.sh("test ! -e /ran");
}

/// A host may be faster than the boot: what it starts does not stand behind the rest of that.
#[test]
fn a_start_does_not_wait_for_a_slow_boot() {
    const SLOW: &str = "[Unit]\nDefaultDependencies=no\nAfter=sockets.target\nBefore=basic.target\n
        [Service]\nType=oneshot\nExecStart=/bin/sh -c 'until [ -e /go ]; do sleep 0.1; done'\n
        [Install]\nWantedBy=basic.target\n";
    let stage = Stage::new("slow");
    let guest = Guest::debian(&stage);
    let unit = "/etc/systemd/system/slow.service";
    guest.sh(&format!("printf '%s' \"{SLOW}\" > {unit} && systemctl --quiet enable slow"));
    let output = Incus.client(&["restart", "--force", &guest.name]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    owner.start("job-1", "cat /proc/self/cgroup; exec sleep 1000");
    owner.event("starting");
    eventually("it runs in its unit", || {
        guest.sh("cat /run/pika-cloud/logs/guest.log").contains("/pika-guest-supervise@")
    });
    assert_ne!(Incus.exec(&guest.name, "systemctl is-system-running").stdout, b"running\n");
    guest.sh("touch /go");
    guest.wait_booted();
    assert_eq!(guest.sh("systemctl is-active pika-guest"), "active");
}

/// A host may be faster than the init itself, which mounts its `/run` over whatever was there.
#[test]
fn a_session_before_systemd_is_about_the_files_that_stay() {
    const LATE: &str = "#!/bin/sh\nsleep 3\nexec /usr/lib/systemd/systemd.real \\\"\\$@\\\"\n";
    let stage = Stage::new("early");
    let guest = Guest::debian(&stage);
    let script =
        format!("cd /usr/lib/systemd && mv systemd systemd.real && printf \"{LATE}\" > systemd && chmod 755 systemd");
    guest.sh(&script);
    let output = Incus.client(&["restart", "--force", &guest.name]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut owner = Dial::exec(&guest.name);
    guest.sh("test ! -e /run/systemd");
    owner.hello("owner");
    owner.start("job-1", "until [ -e /run/systemd/system ]; do sleep 0.1; done; pika-guest ready; sleep 1000");
    owner.event("ready");
    assert!(guest.sh("cat /run/pika-cloud/events.jsonl").contains("ready"));
}

/// A machine that is shut down asks its workloads to end, and waits for that.
#[test]
fn a_shutdown_reaches_the_workload() {
    let stage = Stage::new("shutdown");
    let guest = Guest::debian(&stage);
    let mut owner = Dial::unix(&guest.name, "root", SERVE);
    owner.hello("owner");
    owner.start("job-1", "trap 'sleep 1; pika-guest progress saved; cp $PIKA_CLOUD_DIR/events.jsonl /var/tmp/; exit 0' TERM; pika-guest ready; while :; do sleep 0.1; done");
    owner.event("ready");
    let output = Incus.client(&["stop", &guest.name, "--timeout", "60"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Incus.client(&["start", &guest.name]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    guest.wait_booted();
    assert!(guest.sh("cat /var/tmp/events.jsonl").contains("saved"));
}

/// The listener is the last to go, so that a host hears how its workload ended, and does not have to guess.
#[test]
fn a_shutdown_is_heard_to_the_workloads_end() {
    let stage = Stage::new("heard");
    let guest = Guest::debian(&stage);
    let mut owner = Dial::unix(&guest.name, "root", SERVE);
    owner.hello("owner");
    owner.start("job-1", "trap 'sleep 2; exit 7' TERM; pika-guest ready; while :; do sleep 0.1; done");
    owner.event("ready");
    let mut observer = Dial::unix(&guest.name, "ci", SERVE);
    observer.hello("observer");
    observer.event("ready");
    guest.sh("systemctl poweroff");
    let failed = observer.event("failed");
    assert_eq!(failed["details"]["exit_code"], 7, "{failed}");
    // Nothing of it holds up the end of the machine.
    eventually("it is off", || Incus.instance(&guest.name).unwrap()["status"] == "Stopped");
}

/// What any init that is none of systemd has of it: folders, reports, another listener for one that was killed, and workloads that
/// outlive it.
fn check_listener(guest: &Guest, parent: &str) {
    guest.wait_listening();
    let folders = guest.sh("stat -c '%a %G' /run/pika-cloud /run/pika-cloud/artifacts");
    assert_eq!(folders, "2775 pika-cloud\n2775 pika-cloud");
    guest.sh("su ci -s /bin/sh -c 'pika-guest ready'");
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    owner.event("ready");
    owner.start("job-1", "while :; do pika-guest progress step; sleep 0.2; done");
    owner.event("starting");
    drop(owner);
    guest.kill_listener(parent);
    let mut owner = Dial::exec(&guest.name);
    assert_eq!(owner.hello("owner")["request_id"], "job-1");
    for _ in 0..20 {
        owner.event("starting");
    }
}

/// Under an init of a few kilobytes.
#[test]
fn busybox_runs_the_listener() {
    let stage = Stage::new("busybox");
    let guest = Guest::launch(&stage, Arc::new(Image::with_busybox_init()));
    check_listener(&guest, "init");
}

#[test]
fn openrc_runs_the_listener() {
    let stage = Stage::new("openrc");
    let guest = Guest::launch(&stage, Arc::new(Image::openrc_with_agent()));
    check_listener(&guest, "supervise-daemon");
    let said = guest.sh("cat /var/log/pika-guest.log");
    assert!(said.contains("does not listen on vsock: this is a container"), "{said}");
    // Its stop is not the workload's.
    guest.sh("rc-service pika-guest stop");
    assert_eq!(guest.listeners("supervise-daemon"), "");
    let mut owner = Dial::exec(&guest.name);
    owner.hello("owner");
    for _ in 0..20 {
        owner.event("starting");
    }
    guest.sh("rc-service pika-guest start");
    guest.wait_listening();
}

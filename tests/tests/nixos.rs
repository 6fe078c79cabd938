//! The units that the NixOS module makes, on a real systemd: Debian's, with the agent in `/usr/bin`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, and reads better than it runs fast")]

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use pika_cloud_tests::{Dial, Incus, Lab, debian_image, eventually, until};
use serde_json::{Value, json};

/// Where the golden units have the agent.
const PACKAGE: &str = "/nix/store/00000000000000000000000000000000-pika-guest";
/// What scripts of NixOS run under.
const BASH: &str = "/nix/store/00000000000000000000000000000000-bash/bin/bash";
/// What NixOS searches for programs.
const NIXOS_PATH: &str = "/run/wrappers/bin:/run/current-system/sw/bin";

/// A container with the module's units; it is deleted in the end.
struct Guest(&'static str);

impl Guest {
    /// Starts one with the agent's own units and, beside those, workloads.
    fn start(name: &'static str, config: &[&str], workloads: &[&str]) -> Self {
        Incus.delete(name);
        let guest = Self(name);
        client(&[&["launch", debian_image(), name], config].concat());
        client(&["file", "push", &Lab::get().agent.display().to_string(), &at(name, "usr/bin/"), "--mode=0755"]);
        let own = ["pika-guest.service", "pika-guest-supervise.socket", "pika-guest-supervise@.service"];
        for unit in own {
            guest.put("plain", unit, &format!("etc/systemd/system/{unit}"));
        }
        for unit in workloads {
            guest.put("full", unit, &format!("etc/systemd/system/{unit}"));
        }
        guest.put("plain", "10-pika-cloud.tmpfiles", "etc/tmpfiles.d/10-pika-cloud.conf");
        guest.put("plain", "pika-workload", "usr/bin/pika-workload");
        guest.sh("chmod 755 /usr/bin/pika-workload");
        guest.sh("systemctl is-system-running --wait >/dev/null; groupadd --system pika-cloud
             useradd --create-home --groups pika-cloud ci && useradd --system agent
             systemd-tmpfiles --create && systemctl daemon-reload
             systemctl start pika-guest-supervise.socket pika-guest.service");
        guest
    }

    /// Puts a golden file at a place, with programs where a Debian has them.
    fn put(&self, case: &str, name: &str, place: &str) {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nixos-module/tests/golden").join(case).join(name);
        let text = fs::read_to_string(&golden).unwrap_or_else(|error| panic!("{}: {error}", golden.display()));
        let text = text.replace(PACKAGE, "/usr").replace(NIXOS_PATH, "/usr/sbin:/usr/bin:/sbin:/bin");
        // A container shares the kernel of this machine, whose vsock is not the tests'.
        assert!(!text.contains("--port"), "{name} would listen on vsock wherever it runs");
        let text = text.replace("PATH=/usr/bin\"", "PATH=/usr/bin:/bin\"").replace(BASH, "/bin/bash");
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        client(&["file", "push", &file.path().display().to_string(), &at(self.0, place), "--mode=0644"]);
    }

    fn sh(&self, script: &str) -> String {
        Incus.exec_ok(self.0, script).trim().to_owned()
    }

    /// A property of a unit.
    fn shows(&self, unit: &str, property: &str) -> String {
        self.sh(&format!("systemctl show --property {property} --value {unit}"))
    }

    fn events(&self) -> Vec<Value> {
        let text = self.sh("pika-guest events");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn kinds(&self) -> Vec<String> {
        self.events().iter().map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs something that ends later.
    fn spawn(&self, args: &[&str]) -> Child {
        Incus.client(&[&["exec", self.0, "--"], args].concat()).spawn().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        Incus.delete(self.0);
    }
}

fn at(name: &str, place: &str) -> String {
    format!("{name}/{place}")
}

fn client(args: &[&str]) {
    let output = Incus.client(args).output().unwrap();
    assert!(output.status.success(), "incus {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn workloads_report_and_outlive_the_agent() {
    let guest = Guest::start("nixos-units", &[], &["pika-workload-steady.service", "pika-workload-talker.service"]);
    guest.sh("systemctl start pika-workload-steady pika-workload-talker");
    eventually("the unprivileged workload has left an artifact", || {
        Incus.exec(guest.0, "test -s /run/pika-cloud/artifacts/made").status.success()
    });
    let events = guest.events();
    // Progress repeats the state that it is said in.
    let (progress, states): (Vec<_>, Vec<_>) =
        events.iter().partition(|event| event["details"]["progress"].is_object());
    let ready: Vec<_> =
        states.into_iter().filter(|event| event["kind"] == "ready").map(|event| &event["message"]).collect();
    assert_eq!(ready, ["steady has started"]);
    assert_eq!(progress.len(), 1, "{events:?}");
    assert_eq!(progress[0]["details"]["progress"]["name"], "warm-up");

    let pids = || ["pika-workload-steady", "pika-workload-talker"].map(|unit| guest.shows(unit, "MainPID"));
    let (before, agent) = (pids(), guest.shows("pika-guest", "MainPID"));
    guest.sh("systemctl kill --signal KILL pika-guest && systemctl stop pika-guest && systemctl start pika-guest");
    assert_ne!(guest.shows("pika-guest", "MainPID"), agent);
    assert_eq!(pids(), before);
    assert_eq!(guest.sh("systemctl is-active pika-guest-supervise.socket"), "active");
    assert_eq!(guest.sh("systemctl --failed --no-legend"), "");
}

/// How a host's command has a unit's `ready` count: it starts the unit, lives as long, and ends as that does.
#[test]
fn a_command_starts_a_unit_and_ends_as_it_does() {
    let guest = Guest::start("nixos-command", &[], &["pika-workload-agent.service"]);
    let mut command = guest.spawn(&["pika-guest", "run", "--", "pika-workload", "agent"]);
    eventually("it is ready", || guest.sh("pika-guest status || true").starts_with("ready"));
    assert_eq!(guest.kinds(), ["starting", "ready"]);
    assert_eq!(guest.events()[1]["message"], "agent has started");
    guest.sh("systemctl stop pika-workload-agent");
    let status = until("the command ends", Duration::from_secs(30), || command.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert_eq!(guest.kinds(), ["starting", "ready", "completed"]);
    // What it printed went through two rounds of quoting.
    let printed = guest.sh("journalctl --unit pika-workload-agent --output cat --no-pager");
    assert!(printed.contains("100% of /var/lib/agent"), "{printed}");

    for (name, program, code) in [("fails", "exit 3", 3), ("dies", "kill -KILL $$$$", 137), ("is-well", "exit 0", 0)] {
        let unit = format!("/run/systemd/system/pika-workload-{name}.service");
        guest.sh(&format!("printf '[Service]\nType=exec\nExecStart=/bin/sh -c \"{program}\"\n' > {unit}"));
        assert_eq!(Incus.exec(guest.0, &format!("pika-workload {name}")).status.code(), Some(code), "{name}");
    }
    assert_eq!(Incus.exec(guest.0, "pika-workload nobody-knows").status.code(), Some(5));
    assert_eq!(Incus.exec(guest.0, "pika-workload").status.code(), Some(64));
}

/// Whenever it is asked to end, its unit is gone when it is.
#[test]
fn a_command_that_is_asked_to_end_stops_its_unit() {
    let guest = Guest::start("nixos-asked", &[], &["pika-workload-agent.service"]);
    for millis in [0, 1, 3, 5, 10, 20, 30, 50, 100, 300] {
        let asked = format!(
            "pika-workload agent & sleep 0.{millis:03}; kill $!; wait $!; systemctl is-active pika-workload-agent || true"
        );
        // Ended before it was ready, it counts as failed.
        let state = guest.sh(&asked);
        assert!(["inactive", "failed"].contains(&state.as_str()), "asked after {millis} ms: {state}");
    }
}

/// Outputs are collected after the terminal event: it comes after the unit's last word, not while that still runs.
#[test]
fn a_command_of_the_host_ends_after_its_unit() {
    let guest = Guest::start("nixos-cancel", &[], &[]);
    let program = "trap 'sleep 2; echo saved > /var/tmp/saved; exit 7' TERM; while :; do sleep 0.1; done";
    let unit = "/run/systemd/system/pika-workload-agent.service";
    guest.sh(&format!("cat > {unit} << 'EOF'\n[Service]\nType=exec\nExecStart=/bin/sh -c \"{program}\"\nEOF"));
    let mut owner = Dial::exec(guest.0);
    owner.hello("owner");
    owner.start("job-1", "exec pika-workload agent");
    eventually("the unit runs", || guest.shows("pika-workload-agent", "ActiveState") == "active");
    owner.say(&json!({ "signal": { "name": "TERM" } }));
    let failed = owner.event("failed");
    assert_eq!(guest.sh("cat /var/tmp/saved"), "saved");
    assert_eq!(failed["details"]["exit_code"], 7, "{failed}");
}

/// In a privileged container the sandbox has another `/proc`, and in it the boot's id must be the container's.
#[test]
fn the_sandbox_knows_the_containers_boot() {
    for (name, config) in [("nixos-plain", [].as_slice()), ("nixos-privileged", &["-c", "security.privileged=true"])] {
        let guest = Guest::start(name, config, &[]);
        let id = "/proc/sys/kernel/random/boot_id";
        let script = format!("cat {id} /proc/$(systemctl show --property MainPID --value pika-guest)/root{id}");
        let ids = guest.sh(&script);
        let (outside, inside) = ids.split_once('\n').unwrap();
        assert_eq!(outside, inside, "{name}");
        let own = fs::read_to_string(id).unwrap();
        assert_ne!(inside, own.trim(), "{name}: a container has a boot of its own");
    }
}

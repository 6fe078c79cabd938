//! Images with the agent in them, made of images without.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pika_cloud_tests::{
    BARE_IMAGE, Image, Incus, LIMIT, Lab, Running, Stage, debian_image, eventually, image_of, images, openrc_image,
    until,
};
use serde_json::{Value, json};

fn script(stage: &Stage, text: &str) -> String {
    let path = stage.more("provision.sh");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn a_baked_image_runs_a_job_and_says_what_is_in_it() {
    let stage = Stage::new("baked");
    let image = stage.alias("ci");
    let source = stage.more("tool");
    fs::write(&source, "#!/bin/sh\necho a tool\n").unwrap();
    fs::set_permissions(&source, PermissionsExt::from_mode(0o700)).unwrap();
    // More than one message takes, and no text.
    let big: Vec<u8> = (0..3_000_000u32).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
    fs::write(stage.more("big"), &big).unwrap();
    let provision = script(&stage, "read line && exit 9\necho out; echo err >&2; id -u; tool; echo made >/etc/made\n");
    let files = [
        format!("{}:/usr/local/bin/tool", source.display()),
        format!("{}:/opt/a/big:0640", stage.more("big").display()),
    ];
    let base = image_of(BARE_IMAGE).unwrap();
    let baked =
        stage.bake(BARE_IMAGE, &image.alias, &["--file", &files[0], "--file", &files[1], "--provision", &provision]);
    assert_eq!(baked.expect(0).saying(&["publishing", "completed"]).stdout, "out\nerr\n0\na tool\n");
    stage.check_baked(1);

    let found = image_of(&image.alias).unwrap();
    let property = |name: &str| found.properties.get(name).cloned().unwrap_or_default();
    assert_eq!(property("description"), base.properties["description"], "the base's own are kept");
    assert_eq!(property("pika-cloud.base-fingerprint"), base.fingerprint);
    assert_eq!(property("pika-cloud.base-alias"), BARE_IMAGE);
    let digest = pika_cloud_tests::sha256(&fs::read(&Lab::get().agent).unwrap());
    assert_eq!(property("pika-cloud.agent-digest"), format!("sha256:{digest}"));
    for (name, value) in [("agent-version", env!("CARGO_PKG_VERSION")), ("protocol", "1"), ("schema-version", "1")] {
        assert_eq!(property(&format!("pika-cloud.{name}")), value, "{name}");
    }
    assert_eq!(image_of(BARE_IMAGE), Some(base), "the base is as it was");

    let command = "pika-guest ready; cat /etc/made; grep -c pika-cloud /etc/group; stat -c '%a %u' /usr/local/bin/tool /opt/a/big; \
                   sha256sum </opt/a/big; ls /run; exit 3";
    let spec = stage.baked_spec(&image, command).as_root();
    stage.run(&spec).expect(3);
    let log = stage.outputs(&spec).log();
    let sum = pika_cloud_tests::sha256(&big);
    assert!(log.starts_with(&format!("made\n1\n755 0\n640 0\n{sum}  -\n")), "{log}");
    assert!(!log.contains("pika-bake"), "the script is no part of the image: {log}");
    stage.check_nothing_left(&spec);
}

/// What is replaced goes, so that bakes do not pile up; what is foreign, or used, does not.
#[test]
fn a_rebake_replaces_an_image_of_ours_that_nothing_uses() {
    let stage = Stage::new("rebake");
    let image = stage.alias("ci");
    let fingerprint = || image_of(&image.alias).unwrap().fingerprint;
    let is_there = |fingerprint: &str| images().iter().any(|image| image.fingerprint == fingerprint);
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
    let first = fingerprint();
    let document = stage.bake(BARE_IMAGE, &image.alias, &["--json"]).expect(0).stdout;
    let document: Value = serde_json::from_str(&document).unwrap();
    assert_eq!((document["fingerprint"].as_str().unwrap(), &document["deleted"][0]), (&*fingerprint(), &json!(first)));
    assert!(!is_there(&first));
    stage.check_baked(1);

    // With another alias it stays for as long as it has that.
    let (second, other) = (fingerprint(), stage.alias("other"));
    let body = json!({ "name": other.alias, "target": second });
    Incus.change("POST", "/1.0/images/aliases", Some(&body)).unwrap();
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0).saying(&["kept image", "another alias", &other.alias]);
    stage.call(&["reconcile"]).expect(0);
    assert_eq!(image_of(&other.alias).unwrap().fingerprint, second);
    Incus.change("DELETE", &format!("/1.0/images/aliases/{}", other.alias), None).unwrap();
    stage.call(&["reconcile"]).expect(0);
    assert!(!is_there(&second));
    stage.check_baked(1);

    // An instance that was made from it keeps it for as long as it is there.
    let (third, spec) = (fingerprint(), stage.spec("true"));
    let body = json!({ "name": spec.instance, "source": { "type": "image", "alias": image.alias } });
    Incus.change("POST", "/1.0/instances", Some(&body)).unwrap();
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0).saying(&["kept image", &spec.instance]);
    assert!(is_there(&third));
    stage.call(&["reconcile"]).expect(0);
    assert!(is_there(&third));
    Incus.delete(&spec.instance);
    stage.call(&["reconcile"]).expect(0);
    assert!(!is_there(&third));
    stage.check_baked(1);

    // One of another state dir, and one that nobody baked, are not ours to delete.
    let (fourth, elsewhere) = (fingerprint(), Stage::new("rebake-elsewhere"));
    elsewhere.bake(BARE_IMAGE, &image.alias, &[]).expect(0).saying(&["had before is", "not baked from this state dir"]);
    assert!(is_there(&fourth));
    let foreign = Image::bare(|_| {});
    let foreign_fingerprint = image_of(&foreign.alias).unwrap().fingerprint;
    stage.bake(BARE_IMAGE, &foreign.alias, &[]).expect(0);
    assert!(is_there(&foreign_fingerprint));
    for left in [fourth, foreign_fingerprint] {
        Incus.change("DELETE", &format!("/1.0/images/{left}"), None).unwrap();
    }
}

#[test]
fn an_alias_points_somewhere_at_every_moment() {
    let stage = Stage::new("swap");
    let image = stage.alias("ci");
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
    let (over, looks) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let path = format!("/1.0/images/aliases/{}", image.alias);
                let alias = Incus.get(&path).expect("the alias is there");
                assert!(alias["target"].as_str().is_some_and(|target| !target.is_empty()));
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("{} looks during three bakes", looks.load(Ordering::Relaxed));
    stage.check_baked(1);
}

/// What Incus makes of the image that is being replaced comes to be: that image goes when nothing needs it any more.
#[test]
fn instances_that_are_made_meanwhile_come_to_be() {
    let stage = Stage::new("creates");
    let image = stage.alias("ci");
    stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
    let over = AtomicBool::new(false);
    let creates = |spec: pika_cloud_tests::Spec| {
        let mut made = 0;
        while !over.load(Ordering::Relaxed) {
            let body = json!({ "name": spec.instance, "source": { "type": "image", "alias": image.alias } });
            let created = Incus.change("POST", "/1.0/instances", Some(&body));
            created.unwrap_or_else(|problem| panic!("after {made} others: {problem}"));
            Incus.delete(&spec.instance);
            made += 1;
        }
        made
    };
    let creates = &creates;
    let made = std::thread::scope(|scope| {
        let creators: Vec<_> =
            (0..2).map(|_| stage.spec("true")).map(|spec| scope.spawn(move || creates(spec))).collect();
        for _ in 0..3 {
            stage.bake(BARE_IMAGE, &image.alias, &[]).expect(0);
        }
        over.store(true, Ordering::Relaxed);
        creators.into_iter().map(|creator| creator.join().unwrap()).sum::<u32>()
    });
    println!("{made} instances were made during three bakes");
    stage.call(&["reconcile"]).expect(0);
    stage.check_baked(1);
}

/// busybox's own init for the first process. The last line of its table has no newline, as many have not.
fn busybox_init(root: &Path) {
    let init = root.join("sbin/init");
    fs::remove_file(&init).and_then(|()| symlink("/bin/busybox", &init)).unwrap();
    fs::write(root.join("etc/inittab"), "::sysinit:/bin/hostname -F /etc/hostname\n::ctrlaltdel:/sbin/reboot").unwrap();
}

#[test]
fn the_init_of_busybox_serves() {
    let stage = Stage::new("busybox");
    let (base, image) = (Image::bare(busybox_init), stage.alias("ci"));
    let silent = script(&stage, "sed -i /pika-guest/d /etc/inittab");
    let refused = stage.bake(&base.alias, &image.alias, &["--provision", &silent]).expect(125);
    refused.saying(&["no longer starts pika-guest"]);
    stage.bake(&base.alias, &image.alias, &[]).expect(0).saying(&["busybox's init"]);
    let spec =
        stage.baked_spec(&image, "pika-guest ready; exit 4").with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(4);
    let serves = "pidof pika-guest && test -S /run/pika-guest/serve.sock";
    eventually("the agent serves", || Incus.exec(&spec.instance, serves).status.success());
    // Its init starts it again.
    let before = Incus.exec_ok(&spec.instance, "pidof pika-guest");
    Incus.exec_ok(&spec.instance, "kill -9 $(pidof pika-guest)");
    let again = format!("{serves} && pidof pika-guest | grep -vx {}", before.trim());
    eventually("the agent serves again", || Incus.exec(&spec.instance, &again).status.success());
    assert_eq!(Incus.exec_ok(&spec.instance, "grep -c . /etc/inittab").trim(), "4", "two of the image's, two of ours");
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);
}

/// Its first process is sysvinit's.
#[test]
fn a_debian_with_openrc_serves() {
    let stage = Stage::new("openrc");
    let image = stage.alias("rc");
    let silent = script(&stage, "rc-update del pika-guest default");
    let refused = stage.bake(openrc_image(), &image.alias, &["--provision", &silent]).expect(125);
    refused.saying(&["no longer in the runlevel"]);
    stage.bake(openrc_image(), &image.alias, &[]).expect(0).saying(&["OpenRC"]);
    let spec = stage.baked_spec(&image, "pika-guest ready; exit 4");
    let spec = spec.as_root().with("policies.retention_policy", "keep_until_stopped");
    stage.run(&spec).expect(4);
    let said = |command: &str| Incus.exec_ok(&spec.instance, command).trim().to_owned();
    eventually("the agent serves", || {
        Incus
            .exec(&spec.instance, "test -S /run/pika-guest/serve.sock && rc-service pika-guest status")
            .status
            .success()
    });
    assert_eq!(said("stat -c '%a %G' /run/pika-cloud"), "2775 pika-cloud");
    assert!(said("rc-update show default").contains("pika-guest"));
    stage.call(&["destroy", &spec.id]).expect(0);
    stage.check_nothing_left(&spec);
    stage.check_baked(1);
}

/// A unit of an unprivileged user, which is a member of the group.
const APP: &str = "[Service]\nType=oneshot\nUser=app\nSupplementaryGroups=pika-cloud\n\
                   ExecStart=/usr/bin/pika-guest ready --message from-app\n";

#[test]
fn a_debian_with_systemd_serves_and_its_services_report() {
    let stage = Stage::new("debian");
    let image = stage.alias("deb");
    fs::write(stage.more("app.service"), APP).unwrap();
    let file = format!("{}:/etc/systemd/system/app.service", stage.more("app.service").display());
    for (harm, told) in [
        ("systemctl disable pika-guest-supervise.socket", "no longer enabled"),
        ("echo '# more' >>/etc/systemd/system/pika-guest.service", "pika-guest.service is not as it was"),
    ] {
        let harm = script(&stage, harm);
        stage.bake(debian_image(), &image.alias, &["--provision", &harm]).expect(125).saying(&[told]);
    }
    let provision = script(&stage, "set -e\nuseradd --system app\ntest -z \"$(systemctl --failed --no-legend)\"\n");
    let began = std::time::Instant::now();
    stage
        .bake(debian_image(), &image.alias, &["--file", &file, "--provision", &provision])
        .expect(0)
        .saying(&["systemd"]);
    println!("a Debian was baked in {:.1} s", began.elapsed().as_secs_f64());
    let spec = stage
        .baked_spec(&image, &format!("until systemctl start app; do sleep 0.1; done; {}", Stage::gate()))
        .as_root();
    let running = stage.start(&spec);
    stage.wait_event(&spec, "ready from an unprivileged service", |event| {
        event["kind"] == "ready" && event["message"] == "from-app"
    });
    stage.call(&["ensure", stage.write(&spec).to_str().unwrap()]).expect(0).saying(&["running already"]);
    let shown = stage.call(&["inspect", &spec.id]).expect(0).stdout;
    assert!(shown.contains("ready"), "{shown}");
    let said = |command: &str| Incus.exec_ok(&spec.instance, command).trim().to_owned();
    eventually("systemd is done", || {
        Incus.exec(&spec.instance, "systemctl is-system-running | grep -x running").status.success()
    });
    assert_eq!(said("systemctl is-active pika-guest.service pika-guest-supervise.socket"), "active\nactive");
    assert_eq!(said("systemctl --failed --no-legend"), "");
    assert_eq!(said("stat -c '%a %G' /run/pika-cloud"), "2775 pika-cloud");
    // This machine has no AppArmor, and cgroups of the first version.
    println!("{}", said("systemd-analyze security --no-pager pika-guest | tail -n 1"));
    let machine_id = said("cat /etc/machine-id");
    assert_eq!(machine_id.len(), 32, "{machine_id}");
    let other = stage.spec("cat /etc/machine-id").with("incus.image_alias", image.alias.as_str());
    stage.run(&other).expect(0);
    assert_ne!(stage.outputs(&other).log().trim(), machine_id, "two instances of one image");
    stage.open_gate(&spec);
    running.finish().expect(0);
    stage.check_nothing_left(&spec);
    stage.check_baked(1);
}

#[test]
fn what_cannot_be_baked_leaves_nothing() {
    let stage = Stage::new("refused");
    let image = stage.alias("ci");
    let bake = |from: &str, to: &str, more: &[&str]| stage.bake(from, to, more).expect(125);
    let more = |name: &str| stage.more(name).display().to_string();
    fs::write(stage.more("file"), "x").unwrap();
    bake(BARE_IMAGE, BARE_IMAGE, &[]).saying(&["--from and --to", "incus image alias create"]);
    bake("absent", &image.alias, &[]).saying(&["image `absent` does not exist", "incus image copy"]);
    bake(BARE_IMAGE, &image.alias, &["--profile", "absent"]).saying(&["profile `absent`", "--profile"]);
    bake(BARE_IMAGE, &image.alias, &["--project", "absent"]).saying(&["project `absent`"]);
    bake(BARE_IMAGE, &image.alias, &["--file", &format!("{}:/etc/x", more("absent"))])
        .saying(&["--file", "cannot be read"]);
    bake(BARE_IMAGE, &image.alias, &["--file", &format!("{}:/run/x", more("file"))])
        .saying(&["/run", "not part of an image"]);
    bake(BARE_IMAGE, &image.alias, &["--file", &format!("{}:/usr/bin/pika-guest", more("file"))])
        .saying(&["pika-guest's own"]);
    bake(BARE_IMAGE, &image.alias, &["--file", "nonsense"]).saying(&["SRC:DEST"]);
    bake(BARE_IMAGE, &image.alias, &["--provision", &more("absent")]).saying(&["--provision", "absent"]);
    let other = Running::start(
        stage.cloud(&["bake", "--from", BARE_IMAGE, "--to", &image.alias, "--agent", "/bin/ls"]).env_remove("X"),
    );
    other.finish().expect(125).saying(&["/bin/ls", "dynamically"]);
    assert!(!stage.state().join(".bakes").exists(), "nothing was begun");

    // These fail in the builder.
    bake(BARE_IMAGE, &image.alias, &["--file", &format!("{}:/etc", more("file"))]).saying(&["/etc is a folder"]);
    let fails = script(&stage, "echo about to fail; exit 42");
    let failed = bake(BARE_IMAGE, &image.alias, &["--provision", &fails]).saying(&["exit code 42", "provision.sh"]);
    assert_eq!(failed.stdout, "about to fail\n");
    let late = script(&stage, "exec >/dev/null 2>&1; sleep 1000");
    bake(BARE_IMAGE, &image.alias, &["--provision", &late, "--timeout", "2"])
        .saying(&["not done after 2 s", "--timeout"]);
    let quiet = script(&stage, "exec >/dev/null 2>&1; sleep 3; exit 7");
    bake(BARE_IMAGE, &image.alias, &["--provision", &quiet]).saying(&["exit code 7"]);
    for (harm, told) in [
        ("cp /bin/busybox /usr/bin/pika-guest", "/usr/bin/pika-guest does not run"),
        ("rm /usr/bin/pika-guest", "/usr/bin/pika-guest does not run"),
        ("chmod 0700 /usr/bin/pika-guest", "other permissions"),
        ("sed -i /pika-cloud/d /etc/group", "the group pika-cloud is gone"),
        ("echo >>/usr/bin/pika-guest", "is another program"),
    ] {
        let harm = script(&stage, harm);
        let refused = bake(BARE_IMAGE, &image.alias, &["--provision", &harm]);
        refused.saying(&["changed what was put in for pika-guest", told]);
    }
    let stops = script(&stage, "kill -PWR 1; sleep 1000");
    bake(BARE_IMAGE, &image.alias, &["--provision", &stops]).saying(&["provision.sh"]);
    let without_shell = Image::bare(|root| {
        let init = fs::read_to_string(root.join("sbin/init")).unwrap();
        fs::write(root.join("sbin/init"), init.replacen("#!/bin/sh", "#!/bin/busybox sh", 1)).unwrap();
        fs::remove_file(root.join("bin/sh")).unwrap();
    });
    bake(&without_shell.alias, &image.alias, &[]).saying(&["no /bin/sh", &without_shell.alias]);
    let ends = Image::bare(|root| fs::write(root.join("sbin/init"), "#!/bin/sh\nexit 0\n").unwrap());
    bake(&ends.alias, &image.alias, &[]).saying(&["it stopped by itself", &ends.alias]);
    assert_eq!(image_of(&image.alias), None);
    stage.check_baked(0);
}

/// Incus tells them in each answer about an instance, of which there may be many.
#[test]
fn an_image_with_too_many_properties_is_refused() {
    let stage = Stage::new("properties");
    let much = Image::bare(|_| {}).with_property("os", &"x".repeat(70_000));
    let words = [much.alias.as_str(), "bytes of properties, and no more than 65536", "incus image edit"];
    stage.bake(&much.alias, &stage.alias("ci").alias, &[]).expect(125).saying(&words);
    let spec = stage.baked_spec(&much, "true");
    stage.call(&["run", stage.write(&spec).to_str().unwrap()]).expect(125).saying(&words);
    assert!(!stage.has_instance(&spec), "nothing was touched");
    stage.check_baked(0);
}

/// Whoever bakes may keep it.
#[test]
fn what_a_script_prints_has_an_end() {
    const SHOWN: usize = 64 * 1024 * 1024;
    let stage = Stage::new("chatty");
    for (printed, end) in [(SHOWN, ""), (SHOWN + 1, "\n[more than 64 MiB: the rest of the output is left out]\n")] {
        let chatty = script(&stage, &format!("head -c {printed} /dev/zero | tr '\\0' x; exit 42"));
        let failed = stage.bake(BARE_IMAGE, &stage.alias("ci").alias, &["--provision", &chatty]).expect(125);
        let (shown, rest) = failed.stdout.split_at(SHOWN);
        assert!(shown.bytes().all(|byte| byte == b'x'));
        assert_eq!(rest, end);
        assert!(failed.stderr.contains("exit code 42"), "{}", failed.stderr);
    }
}

/// What a profile tells cloud-init is for instances: of an image it would be for whoever has that.
#[test]
fn what_profiles_tell_cloud_init_is_kept_out_of_an_image() {
    // Incus takes nothing but a map for some of them.
    const SECRET: &str = "secret: 1";
    let stage = Stage::new("profile");
    let image = stage.alias("ci");
    let profile = format!("{}-profile", image.alias);
    let keys = ["cloud-init.user-data", "cloud-init.vendor-data", "cloud-init.network-config", "user.user-data"];
    let config: serde_json::Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), json!(SECRET))).collect();
    Incus.change("POST", "/1.0/profiles", Some(&json!({ "name": profile, "config": config }))).unwrap();
    let waits = script(&stage, "while [ ! -e /tmp/gate ]; do sleep 0.1; done");
    let more = ["--profile", "default", "--profile", &profile, "--provision", &waits];
    let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &more));
    let builder = until("the builder is there", LIMIT, || {
        let mut builders = stage.state().join("id").exists().then(|| stage.builders())?;
        builders.pop().filter(|builder| Incus.exec(builder, "test -e /run/pika-bake/provision").status.success())
    });
    let view = Incus.instance(&builder).unwrap();
    assert!(view["profiles"].as_array().unwrap().contains(&json!(profile)), "{view}");
    for (key, value) in view["expanded_config"].as_object().unwrap() {
        assert_ne!(value, SECRET, "{key}");
    }
    Incus.exec_ok(&builder, "touch /tmp/gate");
    baking.finish().expect(0);
    Incus.change("DELETE", &format!("/1.0/profiles/{profile}"), None).unwrap();
    stage.check_baked(1);
}

/// A builder is no runtime, and another state dir's is not ours.
#[test]
fn another_state_dirs_builder_is_reported_and_left_alone() {
    let (stage, elsewhere) = (Stage::new("theirs"), Stage::new("theirs-elsewhere"));
    let image = elsewhere.alias("ci");
    let waits = script(&elsewhere, "while [ ! -e /tmp/gate ]; do sleep 0.1; done");
    let baking = Running::start(&mut elsewhere.bake_command(BARE_IMAGE, &image.alias, &["--provision", &waits]));
    let builder = until("the script runs", LIMIT, || {
        let builder =
            elsewhere.state().join("id").exists().then(|| elsewhere.builders()).and_then(|mut all| all.pop())?;
        Incus.exec(&builder, "test -e /run/pika-bake/provision").status.success().then_some(builder)
    });
    let before = Incus.instance(&builder).unwrap()["config"].clone();
    let report = stage.call(&["reconcile"]).expect(0).stdout;
    let line = report.lines().find(|line| line.contains(&builder)).unwrap_or_else(|| panic!("{report}"));
    assert!(line.starts_with("report") && line.contains(&elsewhere.owner()) && !line.contains("expired"), "{line}");
    // Its own state dir knows that it lives.
    let own = elsewhere.call(&["reconcile"]).expect(0).stdout;
    assert!(!own.contains(&builder), "{own}");
    let expired = json!({ "config": { "user.pika-cloud.expires-at": "2020-01-01T00:00:00Z" } });
    Incus.change("PATCH", &format!("/1.0/instances/{builder}"), Some(&expired)).unwrap();
    let report = stage.call(&["reconcile", "--take-over-expired"]).expect(0).stdout;
    assert!(report.lines().any(|line| line.contains(&builder) && line.contains("expired")), "{report}");
    assert_eq!(Incus.instance(&builder).unwrap()["config"]["volatile.uuid"], before["volatile.uuid"]);
    Incus.exec_ok(&builder, "touch /tmp/gate");
    baking.finish_within(Duration::from_secs(60)).expect(0);
    elsewhere.check_baked(1);
}

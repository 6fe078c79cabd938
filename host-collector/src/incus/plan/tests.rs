use super::*;

const NOW: Duration = Duration::from_secs(1_800_000_000);

fn spec() -> RuntimeSpec {
    let text = r#"{
        "identity": {"runtime_id": "job-7", "instance_name": "job-7"},
        "incus": {"image_alias": "ci", "instance_type": "container"},
        "resources": {"vcpu_count": 2, "memory_mib": 512, "root_disk_gib": 8},
        "mounts": [
            {"kind": "read_only_snapshot", "guest_path": "/workspace", "source": "/srv/snap"},
            {"kind": "persistent_volume", "guest_path": "/data", "source": "data", "mode": "read_write"},
            {"kind": "persistent_volume", "guest_path": "/base", "source": "fast/base"}
        ],
        "entry_command": "make",
        "bootstrap": {"env": {"TOKEN": "geheim"}},
        "labels": {"team": "core"}
    }"#;
    RuntimeSpec::from_json(text).unwrap()
}

fn ownership() -> Ownership {
    Ownership { owner: "owner-1".to_owned(), term: 3, incarnation: 2 }
}

fn request(spec: &RuntimeSpec) -> Value {
    let root = [("type", "disk"), ("path", "/"), ("pool", "slow")];
    let root = root.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    create_request(spec, &ownership(), NOW, Some(&root))
}

fn created(spec: &RuntimeSpec) -> BTreeMap<String, String> {
    serde_json::from_value(request(spec)["config"].clone()).unwrap()
}

#[test]
fn labels_limits_and_mounts_are_in_the_creating_call() {
    let request = request(&spec());
    let config = created(&spec());
    let labels = Labels::read(&config).unwrap();
    assert_eq!((labels.runtime_id.as_str(), labels.owner.as_str()), ("job-7", "owner-1"));
    assert_eq!((labels.term, labels.incarnation), (3, 2));
    assert_eq!(labels.retention, RetentionPolicy::DestroyOnCompletion);
    assert_eq!(labels.spec_hash, hash(&spec()));
    assert_eq!(config["limits.cpu"], "2");
    assert_eq!(config["limits.memory"], "512MiB");
    assert_eq!(config["user.pika-cloud.label.team"], "core");
    assert_eq!(request["devices"]["root"]["size"], "8GiB");
    assert_eq!(request["devices"]["root"]["pool"], "slow");
    let device = |index: u32| request["devices"][format!("pika-mount-{index}")].clone();
    assert_eq!(device(0), json!({"type": "disk", "path": "/workspace", "source": "/srv/snap", "readonly": "true"}));
    let data = json!({"type": "disk", "path": "/data", "pool": "slow", "source": "data", "readonly": "false"});
    assert_eq!(device(1), data);
    let base = json!({"type": "disk", "path": "/base", "pool": "fast", "source": "base", "readonly": "true"});
    assert_eq!(device(2), base);
    assert_eq!(request["type"], "container");
}

#[test]
fn a_volume_is_marked_by_the_call_that_makes_it() {
    let request = volume_request(&spec(), &ownership(), "data");
    assert_eq!((&request["name"], &request["content_type"]), (&json!("data"), &json!("filesystem")));
    let config: BTreeMap<String, String> = serde_json::from_value(request["config"].clone()).unwrap();
    let labels = VolumeLabels::read(&config).unwrap();
    assert_eq!(labels, VolumeLabels { runtime_id: "job-7".into(), owner: "owner-1".into(), term: 3 });
    for name in ["runtime-id", "owner", "term", "spec-hash"] {
        let mut config = config.clone();
        config.remove(&label(name));
        assert_eq!(VolumeLabels::read(&config), None, "without {name}");
    }
}

/// Invariant 8: the environment reaches the guest through the session only.
#[test]
fn no_secret_is_in_a_creating_call() {
    let mut spec = spec();
    spec.bootstrap.secrets.insert("KEY".to_owned(), "geheim".into());
    let text = request(&spec).to_string();
    assert!(text.contains("TOKEN") && text.contains("KEY") && !text.contains("geheim"), "{text}");
    assert!(!volume_request(&spec, &ownership(), "data").to_string().contains("geheim"));
}

#[test]
fn the_spec_can_be_read_back_without_its_secrets() {
    let mut labels = Labels::read(&created(&spec())).unwrap();
    assert_eq!(labels.read_spec("default").unwrap(), spec().redacted());
    assert_eq!(labels.read_spec("other"), None, "it is for another project");
    labels.spec = labels.spec.map(|spec| spec.replace("make", "rm"));
    assert_eq!(labels.read_spec("default"), None, "another command has another hash");
}

#[test]
fn a_label_is_no_path_and_no_spec_that_could_not_be_run() {
    let config = created(&spec());
    let with = |name: &str, value: &str| {
        let mut config = config.clone();
        config.insert(label(name), value.to_owned());
        config
    };
    for (name, value) in
        [("runtime-id", "../.."), ("runtime-id", "a/b"), ("runtime-id", ".."), ("owner", "../x"), ("owner", "a b")]
    {
        assert_eq!(Labels::read(&with(name, value)), None, "{name} is {value}");
        assert_eq!(VolumeLabels::read(&with(name, value)), None, "{name} is {value}");
    }
    for incarnation in ["0", "4000000000"] {
        assert_eq!(Labels::read(&with("incarnation", incarnation)), None);
    }
    let mut endless = spec();
    endless.watchdogs.boot_secs = u64::MAX;
    let labels = Labels::read(&created(&endless)).unwrap();
    assert_eq!(labels.read_spec("default"), None, "its arithmetic would overflow");
}

#[test]
fn a_spec_that_is_too_long_for_a_label_is_left_out_and_all_else_stays() {
    let mut spec = spec();
    spec.entry_command = Some("x".repeat(MAX_SPEC_LABEL_BYTES));
    let config = created(&spec);
    let labels = Labels::read(&config).unwrap();
    assert_eq!((labels.read_spec("default"), labels.spec), (None, None));
    assert!(config.values().map(String::len).sum::<usize>() < 1000, "what a list of instances grows by");
}

/// Invariant 4.
#[test]
fn an_instance_without_all_labels_is_not_ours() {
    let mut spec = spec();
    spec.watchdogs.run_secs = Some(60);
    let config = created(&spec);
    assert!(Labels::read(&config).unwrap().expires_at.is_some());
    for name in ["runtime-id", "spec-hash", "owner", "term", "incarnation", "retention"] {
        let mut without = config.clone();
        without.remove(&label(name));
        assert_eq!(Labels::read(&without), None, "without {name}");
        without.insert(label(name), String::new());
        assert_eq!(Labels::read(&without), None, "with an empty {name}");
    }
    for (name, value) in [("term", "-1"), ("incarnation", "x"), ("retention", "for_ever"), ("expires-at", "soon")] {
        let mut other = config.clone();
        other.insert(label(name), value.to_owned());
        assert_eq!(Labels::read(&other), None, "{name} is {value}");
    }
    let mut more = config.clone();
    more.insert(label("colour"), "blue".to_owned());
    assert_eq!(Labels::read(&more), Labels::read(&config), "labels of other names are left alone");
    assert!(!is_marked(&BTreeMap::from([("user.other".to_owned(), "x".to_owned())])));
    assert!(is_marked(&BTreeMap::from([(label("owner"), "x".to_owned())])));
}

#[test]
fn only_a_bounded_run_expires_and_beyond_all_its_deadlines() {
    let mut spec = spec();
    let expiry = |spec: &RuntimeSpec| created(spec).get(&label("expires-at")).cloned();
    assert_eq!(expiry(&spec), None, "it may run for ever");
    spec.watchdogs.run_secs = Some(1000);
    spec.watchdogs.ready_secs = Some(30);
    // 120 to boot, three times, 10 of grace, 120 to collect, and the margin.
    let secs = 3 * 120 + 30 + 1000 + 10 + 120 + 600;
    assert_eq!(expiry(&spec).unwrap(), rfc3339(NOW + Duration::from_secs(secs)));
    let labels = Labels::read(&created(&spec)).unwrap();
    assert!(!labels.is_expired(NOW + Duration::from_secs(secs - 1)));
    assert!(labels.is_expired(NOW + Duration::from_secs(secs)));
    spec.policies.retention_policy = RetentionPolicy::DebugKeep;
    spec.policies.debug_keep_secs = 7;
    assert_eq!(expiry(&spec).unwrap(), rfc3339(NOW + Duration::from_secs(secs + 7)));
    spec.policies.restart_policy = RestartPolicy::OnFailure;
    assert_eq!(expiry(&spec), None, "it may be restarted for ever");
    spec.policies.restart_policy = RestartPolicy::Never;
    spec.policies.retention_policy = RetentionPolicy::KeepUntilStopped;
    assert_eq!(expiry(&spec), None, "it is kept");
}

#[test]
fn a_machine_has_the_firmware_of_its_spec() {
    let mut machine = spec();
    machine.incus.instance_type = InstanceType::VirtualMachine;
    assert_eq!(request(&machine)["type"], "virtual-machine");
    assert_eq!(created(&machine).get("security.secureboot"), None, "the profile says it");
    (machine.incus.secureboot, machine.incus.csm) = (Some(false), Some(true));
    let config = created(&machine);
    assert_eq!((config["security.secureboot"].as_str(), config["security.csm"].as_str()), ("false", "true"));
    assert!(machine.validate().is_ok());
}

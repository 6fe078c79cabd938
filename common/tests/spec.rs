//! A spec: every error at once, each with its path and a way out; its hash; what stays secret in it.

#![allow(clippy::unwrap_used, missing_docs)]
#![allow(clippy::too_many_lines, reason = "a table of every field is long")]

use std::collections::BTreeMap;

use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::digest::Digest;
use pika_cloud_common::spec::{FieldError, Mount, REDACTED, SpecError, difference, hash};
use proptest::prelude::*;
use serde_json::{Value, json};

fn minimal() -> Value {
    json!({
        "identity": { "runtime_id": "job-7", "instance_name": "ci-job-7" },
        "incus": { "image_alias": "ci", "instance_type": "container" },
        "entry_command": "true",
    })
}

/// `minimal` with the value at each JSON pointer replaced or added.
fn with(changes: &[(&str, Value)]) -> Value {
    let mut spec = minimal();
    for (pointer, value) in changes {
        let mut at = &mut spec;
        for name in pointer.trim_start_matches('/').split('/') {
            at = at.as_object_mut().unwrap().entry(name).or_insert_with(|| json!({}));
        }
        *at = value.clone();
    }
    spec
}

fn read(spec: &Value) -> RuntimeSpec {
    RuntimeSpec::from_json(&spec.to_string()).unwrap_or_else(|error| panic!("{error}"))
}

fn errors(spec: &Value) -> Vec<FieldError> {
    match RuntimeSpec::from_json(&spec.to_string()) {
        Err(SpecError::Invalid(errors)) => errors,
        other => panic!("{other:?}"),
    }
}

fn lines(spec: &Value) -> Vec<String> {
    errors(spec).iter().map(ToString::to_string).collect()
}

#[track_caller]
fn assert_lines(spec: &Value, expected: &[&str]) {
    let lines = lines(spec);
    assert!(lines == expected, "got\n{}\nexpected\n{}", lines.join("\n"), expected.join("\n"));
}

#[test]
fn every_type_wrong_at_once() {
    let spec = json!({
        "identity": { "runtime_id": 5, "instance_name": ["a"] },
        "incus": {
            "project": null, "profile": true, "extra_profiles": ["a", 5, "b", null, {}], "image_alias": {},
            "instance_type": "vm", "agent": "none", "target": 1.5,
        },
        "resources": { "vcpu_count": "two", "memory_mib": -1, "root_disk_gib": 1.5 },
        "mounts": [
            "/src",
            { "kind": "snapshot", "guest_path": 1, "source": [], "mode": "rw", "required": "yes" },
            { "kind": "read_only_snapshot", "guest_path": "/run/x", "source": "/a", "mode": { "read_only": null } },
            null,
        ],
        "paths": {
            "state_dir": 1, "events_path": 1, "status_path": 1, "result_path": 1, "guest_request_path": 1,
            "logs_dir": 1, "guest_log_path": 1, "artifacts_dir": 1,
        },
        "policies": {
            "restart_policy": "sometimes", "max_restarts": 4_294_967_296u64, "restart_backoff_secs": 0.5,
            "restart_backoff_cap_secs": "1", "retention_policy": 1, "debug_keep_secs": -1,
            "output_collection": { "mode": true, "include_logs": "yes", "include_result": 1, "artifact_globs": "**" },
        },
        "entry_command": ["true"],
        "bootstrap": {
            "env": { "A": 5, "B": "fine", "C": null }, "cwd": 1, "run_as_root": "no", "user": 0, "files": [],
            "secrets": "hunter2",
        },
        "watchdogs": {
            "boot_secs": "1", "ready_secs": "1", "silence_secs": "1", "progress_secs": "1", "progress_cap_secs": "1",
            "run_secs": "1", "stop_grace_secs": "1", "collect_secs": "1",
        },
        "limits": { "artifact_bytes": "1", "artifact_files": "1", "log_bytes": "1", "event_bytes": 1e300, "incarnations": "1" },
        "devices": {}, "labels": { "a": 1, "a.b": 2, "c": "fine" }, "metadata": [],
    });
    let number = "must be a whole number from 0";
    let mut expected: Vec<String> = [
        "identity.runtime_id: is a number, must be a string",
        "identity.instance_name: is a list, must be a string",
        "incus.project: is null, must be a string",
        "incus.profile: is true or false, must be a string",
        "incus.extra_profiles[1]: is a number, must be a string",
        "incus.extra_profiles[3]: is null, must be a string",
        "incus.extra_profiles[4]: is an object, must be a string",
        "incus.image_alias: is an object, must be a string",
        r#"incus.instance_type: is "vm", must be one of "virtual_machine", "container""#,
        r#"incus.agent: is "none", must be one of "auto", "baked", "inject""#,
        "incus.target: is a number with a fraction or too large, must be a string",
        "resources.vcpu_count: is a string, must be a whole number from 0 to 4294967295",
        "resources.memory_mib: is -1, must be a whole number from 0",
        "resources.root_disk_gib: is a number with a fraction or too large, must be a whole number from 0",
        "mounts[0]: is a string, must be an object",
        r#"mounts[1].kind: is "snapshot", must be one of "persistent_volume", "read_only_snapshot", "artifact_output", "cache""#,
        "mounts[1].guest_path: is a number, must be a string",
        "mounts[1].source: is a list, must be a string",
        r#"mounts[1].mode: is "rw", must be one of "read_only", "read_write""#,
        "mounts[1].required: is a string, must be true or false",
        r#"mounts[2].mode: is an object, must be one of "read_only", "read_write""#,
        "mounts[3]: is null, must be an object",
    ]
    .map(str::to_owned)
    .to_vec();
    for field in [
        "state_dir",
        "events_path",
        "status_path",
        "result_path",
        "guest_request_path",
        "logs_dir",
        "guest_log_path",
        "artifacts_dir",
    ] {
        expected.push(format!("paths.{field}: is a number, must be a string"));
    }
    expected.extend(
        [
            r#"policies.restart_policy: is "sometimes", must be one of "never", "on_failure", "always""#,
            "policies.max_restarts: is 4294967296, must be a whole number from 0 to 4294967295",
            "policies.restart_backoff_secs: is a number with a fraction or too large, must be a whole number from 0",
            "policies.restart_backoff_cap_secs: is a string, must be a whole number from 0",
            r#"policies.retention_policy: is a number, must be one of "destroy_on_completion", "keep_until_stopped", "debug_keep""#,
            "policies.debug_keep_secs: is -1, must be a whole number from 0",
            r#"policies.output_collection.mode: is true or false, must be one of "none", "failure_only", "always""#,
            "policies.output_collection.include_logs: is a string, must be true or false",
            "policies.output_collection.include_result: is a number, must be true or false",
            "policies.output_collection.artifact_globs: is a string, must be a list",
            "entry_command: is a list, must be a string",
            "bootstrap.env.A: is a number, must be a string",
            "bootstrap.env.C: is null, must be a string",
            "bootstrap.cwd: is a number, must be a string",
            "bootstrap.run_as_root: is a string, must be true or false",
            "bootstrap.user: is a number, must be a string",
            "bootstrap.files: is a list, must be an object",
            "bootstrap.secrets: is a string, must be an object",
        ]
        .map(str::to_owned),
    );
    for field in ["boot", "ready", "silence", "progress", "progress_cap", "run", "stop_grace", "collect"] {
        expected.push(format!("watchdogs.{field}_secs: is a string, {number}"));
    }
    for field in ["artifact_bytes", "artifact_files", "log_bytes"] {
        expected.push(format!("limits.{field}: is a string, {number}"));
    }
    expected.extend(
        [
            "limits.event_bytes: is a number with a fraction or too large, must be a whole number from 0",
            "limits.incarnations: is a string, must be a whole number from 0 to 4294967295",
            "devices: is an object, must be a list",
            "labels.a: is a number, must be a string",
            r#"labels["a.b"]: is a number, must be a string"#,
            "metadata: is a list, must be an object",
            // Found by validation, in what was not told above.
            "mounts[2].guest_path: must not be below /run: the guest mounts over it when it boots",
        ]
        .map(str::to_owned),
    );
    assert_lines(&spec, &expected.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn every_value_wrong_at_once() {
    let spec = json!({
        "identity": { "runtime_id": "../x", "instance_name": "7-" },
        "incus": {
            "project": "", "profile": "a\nb", "extra_profiles": ["ok", ""], "image_alias": "", "instance_type": "virtual_machine",
            "csm": true, "target": "member-2",
        },
        "resources": { "vcpu_count": 0, "memory_mib": 15, "root_disk_gib": 0 },
        "mounts": [
            { "kind": "persistent_volume", "guest_path": "src", "source": "a/../b", "mode": "read_write", "required": false },
            { "kind": "read_only_snapshot", "guest_path": "/run", "source": "/a/./b", "mode": "read_write" },
            { "kind": "artifact_output", "guest_path": "/", "source": "/a//b" },
            { "kind": "cache", "guest_path": "/proc/x", "source": "/a/" },
        ],
        "paths": {
            "state_dir": "/a", "events_path": "/a", "status_path": "/a", "result_path": "/a", "guest_request_path": "/a",
            "logs_dir": "/a", "guest_log_path": "/a", "artifacts_dir": "/a",
        },
        "policies": {
            "restart_policy": "always", "max_restarts": 0, "restart_backoff_secs": 0, "restart_backoff_cap_secs": 0,
            "retention_policy": "debug_keep", "debug_keep_secs": 0,
            "output_collection": { "artifact_globs": ["ok/**", "/etc/*", "../x", "", "[a"] },
        },
        "entry_command": "  ",
        "bootstrap": {
            "env": { "1A": "", "A-B": "", "C": "a\u{0}b", "PIKA_CLOUD_DIR": "/x", "": "" }, "cwd": "src", "user": "ci", "files": { "/a": "b" },
            "secrets": { "TOKEN": "hunter2" },
        },
        "watchdogs": {
            "boot_secs": 0, "ready_secs": 0, "silence_secs": 19, "progress_secs": 0, "progress_cap_secs": 0, "run_secs": 0,
            "stop_grace_secs": 1_000_000_000u64, "collect_secs": 0,
        },
        "limits": {
            "artifact_bytes": u64::MAX, "artifact_files": 1_000_001, "log_bytes": u64::MAX, "event_bytes": 1, "incarnations": 0,
        },
        "devices": [{ "port": 80 }],
        "labels": { "a b": "", "c": "x\u{1b}[0m" },
        "metadata": { "big": "x".repeat(70_000) },
    });
    let name = "must be a name of 1 to 256 bytes, without control characters";
    let plain = "must be plain: no `..`, no `.`, no doubled or final slash";
    let glob = "must be a pattern relative to artifacts/, without `..` and control characters";
    let variable = "a variable's name is A-Z a-z 0-9 _, first no digit";
    let secs = "must be 1 to 316224000";
    let expected = [
        "identity.runtime_id: must be 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or a digit, and not `id`",
        "identity.instance_name: must be 1 to 63 of A-Z a-z 0-9 -, first a letter, last no hyphen (Incus's rule)",
        &format!("incus.project: {name}"),
        &format!("incus.profile: {name}"),
        &format!("incus.image_alias: {name}"),
        &format!("incus.extra_profiles[1]: {name}"),
        "incus.csm: needs incus.secureboot to be false: a BIOS checks no signatures",
        "incus.target: is not implemented yet: remove it",
        "resources.vcpu_count: is 0, must be 1 to 1024",
        "resources.memory_mib: is 15, must be 16 to 16777216",
        "resources.root_disk_gib: is 0, must be 1 to 1048576",
        "mounts[0].required: is not implemented yet: an optional mount; remove the field, or the mount",
        "mounts[0].source: must be a volume's NAME or POOL/NAME, each 1 to 63 of A-Z a-z 0-9 . _ -, first a letter or a digit",
        "mounts[0].guest_path: must be an absolute path",
        r#"mounts[1].mode: must be "read_only" for a read_only_snapshot"#,
        &format!("mounts[1].source: {plain}"),
        "mounts[1].guest_path: must not be below /run: the guest mounts over it when it boots",
        "mounts[2].kind: is not implemented yet: only `read_only_snapshot` and `persistent_volume` are",
        &format!("mounts[2].source: {plain}"),
        "mounts[2].guest_path: must not be the guest's root",
        "mounts[3].kind: is not implemented yet: only `read_only_snapshot` and `persistent_volume` are",
        &format!("mounts[3].source: {plain}"),
        "mounts[3].guest_path: must not be below /proc: the guest mounts over it when it boots",
        "paths.state_dir: is not implemented yet: another place; leave it out or set it to /run/pika-cloud",
        "paths.events_path: is not implemented yet: another place; leave it out or set it to /run/pika-cloud/events.jsonl",
        "paths.status_path: is not implemented yet: another place; leave it out or set it to /run/pika-cloud/status.json",
        "paths.result_path: is not implemented yet: another place; leave it out or set it to /run/pika-cloud/result.json",
        "paths.guest_request_path: is not implemented yet: another place; leave it out or set it to \
         /run/pika-cloud/guest-request.json",
        "paths.logs_dir: is not implemented yet: another place; leave it out or set it to /run/pika-cloud/logs",
        "paths.guest_log_path: is not implemented yet: another place; leave it out or set it to \
         /run/pika-cloud/logs/guest.log",
        "paths.artifacts_dir: is not implemented yet: another place; leave it out or set it to /run/pika-cloud/artifacts",
        "policies.max_restarts: is 0, must be 1 to 1000000",
        &format!("policies.restart_backoff_secs: is 0, {secs}"),
        &format!("policies.restart_backoff_cap_secs: is 0, {secs}"),
        &format!("policies.debug_keep_secs: is 0, {secs}"),
        &format!("policies.output_collection.artifact_globs[1]: {glob}"),
        &format!("policies.output_collection.artifact_globs[2]: {glob}"),
        &format!("policies.output_collection.artifact_globs[3]: {glob}"),
        "policies.output_collection.artifact_globs[4]: the glob `[a` has a `[` without its `]`: a `[` itself is `[[]`",
        "entry_command: must be a command of 1 to 65536 bytes, without NUL",
        &format!(r#"bootstrap.env[""]: {variable}"#),
        &format!("bootstrap.env.1A: {variable}"),
        &format!("bootstrap.env.A-B: {variable}"),
        "bootstrap.env.C: must not hold NUL",
        "bootstrap.env.PIKA_CLOUD_DIR: is set by the guest's agent: remove it",
        "bootstrap.cwd: must be an absolute path",
        "bootstrap.user: is not implemented yet: use run_as_root",
        "bootstrap.files: is not implemented yet: use a read_only_snapshot mount",
        "bootstrap.secrets: is not implemented yet: remove it",
        "devices: is not implemented yet: remove it",
        &format!("watchdogs.boot_secs: is 0, {secs}"),
        "watchdogs.silence_secs: is 19, must be 20 to 316224000",
        "watchdogs.stop_grace_secs: is 1000000000, must be 0 to 316224000",
        &format!("watchdogs.collect_secs: is 0, {secs}"),
        &format!("watchdogs.run_secs: is 0, {secs}"),
        &format!("watchdogs.ready_secs: is 0, {secs}"),
        &format!("watchdogs.progress_secs: is 0, {secs}"),
        &format!("watchdogs.progress_cap_secs: is 0, {secs}"),
        "limits.artifact_bytes: is 18446744073709551615, must be 0 to 1125899906842624",
        "limits.artifact_files: is 1000001, must be 0 to 1000000",
        "limits.log_bytes: is 18446744073709551615, must be 0 to 1125899906842624",
        "limits.event_bytes: is 1, must be 1048576 to 1125899906842624",
        "limits.incarnations: is 0, must be 1 to 1000",
        r#"labels["a b"]: a label's name is 1 to 64 of A-Z a-z 0-9 . _ -"#,
        "labels.c: must be at most 1024 bytes, without control characters",
        "metadata: takes 70010 bytes as JSON, must be at most 65536",
    ];
    let mut sorted_got = lines(&spec);
    let mut sorted_expected: Vec<String> = expected.iter().map(|line| (*line).to_owned()).collect();
    // Overlaps of the root with everything are told too; they are looked at below.
    sorted_got.retain(|line| !line.contains("overlaps"));
    sorted_got.sort();
    sorted_expected.sort();
    assert!(sorted_got == sorted_expected, "got\n{}\nexpected\n{}", sorted_got.join("\n"), sorted_expected.join("\n"));
}

#[test]
fn a_bound_below_what_it_bounds_is_told_with_both_names() {
    assert_lines(
        &with(&[("policies", json!({ "restart_backoff_secs": 20, "restart_backoff_cap_secs": 19 }))]),
        &["policies.restart_backoff_cap_secs: is 19, must be at least policies.restart_backoff_secs, which is 20"],
    );
    assert_lines(
        &with(&[("policies/restart_backoff_secs", json!(301))]),
        &["policies.restart_backoff_cap_secs: is 300, must be at least policies.restart_backoff_secs, which is 301"],
    );
    assert_lines(
        &with(&[("watchdogs", json!({ "progress_secs": 20, "progress_cap_secs": 19 }))]),
        &["watchdogs.progress_cap_secs: is 19, must be at least watchdogs.progress_secs, which is 20"],
    );
    assert_lines(
        &with(&[("watchdogs/progress_cap_secs", json!(19))]),
        &["watchdogs.progress_cap_secs: bounds watchdogs.progress_secs: set that too"],
    );
    read(&with(&[
        ("policies", json!({ "restart_backoff_secs": 20, "restart_backoff_cap_secs": 20 })),
        ("watchdogs", json!({ "progress_secs": 20, "progress_cap_secs": 20, "ready_secs": 1 })),
    ]));
    read(&with(&[("watchdogs/progress_secs", json!(1))]));
}

#[test]
fn unknown_fields_are_errors_at_every_level() {
    let spec = json!({
        "entrycommand": "true",
        "identity": { "runtime_id": "a", "instance_name": "b", "x": 1 },
        "incus": { "image_alias": "ci", "instance_type": "container", "x": 1 },
        "resources": { "x": 1 },
        "mounts": [{ "kind": "read_only_snapshot", "guest_path": "/a", "source": "/b", "x.?y": 1 }],
        "paths": { "x": 1 },
        "policies": { "x": 1, "output_collection": { "x": 1 } },
        "entry_command": "true",
        "bootstrap": { "x": 1 },
        "watchdogs": { "x": 1 },
        "limits": { "x": 1 },
        "metadata": { "x": { "y": 1 } },
    });
    let text = "is not a field of a spec: remove it, or check its spelling";
    let expected: Vec<String> = [
        "entrycommand",
        "identity.x",
        "incus.x",
        "resources.x",
        r#"mounts[0]["x.?y"]"#,
        "paths.x",
        "policies.x",
        "policies.output_collection.x",
        "bootstrap.x",
        "watchdogs.x",
        "limits.x",
    ]
    .iter()
    .map(|path| format!("{path}: {text}"))
    .collect();
    assert_lines(&spec, &expected.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_misspelt_field_does_not_hide_the_one_that_was_meant() {
    assert_lines(
        &with(&[("incus", json!({ "image": "ci", "instance_type": "container" }))]),
        &[
            "incus.image: is not a field of a spec: remove it, or check its spelling",
            "incus.image_alias: must be a name of 1 to 256 bytes, without control characters",
        ],
    );
}

#[test]
fn sections_of_another_kind_are_named() {
    for section in ["identity", "incus", "resources", "paths", "policies", "bootstrap", "watchdogs", "limits"] {
        for (value, kind) in
            [(json!([]), "a list"), (json!("x"), "a string"), (json!(null), "null"), (json!(5), "a number")]
        {
            let line = format!("{section}: is {kind}, must be an object");
            assert_lines(&with(&[(section, value)]), &[&line]);
        }
    }
    assert_lines(
        &with(&[("policies/output_collection", json!([]))]),
        &["policies.output_collection: is a list, must be an object"],
    );
    for (value, kind) in [(json!([]), "a list"), (json!("x"), "a string"), (json!(null), "null")] {
        assert_lines(&value, &[&format!("the spec: is {kind}, must be an object")]);
    }
    assert_lines(
        &json!({}),
        &[
            "identity.runtime_id: must be 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or a digit, and not `id`",
            "identity.instance_name: must be 1 to 63 of A-Z a-z 0-9 -, first a letter, last no hyphen (Incus's rule)",
            "incus.image_alias: must be a name of 1 to 256 bytes, without control characters",
            "entry_command: is missing: images that start their own workload are not implemented yet",
        ],
    );
}

#[test]
fn what_is_not_json_is_told_with_line_and_column() {
    let message = |text: &str| match RuntimeSpec::from_json(text) {
        Err(error @ SpecError::NotJson(_)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(message("{\n  \"identity\": {,\n}"), "the spec is not JSON: key must be a string at line 2 column 16");
    assert_eq!(message(""), "the spec is not JSON: EOF while parsing a value at line 1 column 0");
    assert_eq!(message("identity: x"), "the spec is not JSON: expected value at line 1 column 1");
    assert_eq!(message("{} {}"), "the spec is not JSON: trailing characters at line 1 column 4");
    assert_eq!(
        message("{\n  \"policies\": {},\n  \"policies\": {}\n}"),
        "the spec is not JSON: the field \"policies\" is given twice at line 3 column 12"
    );
    let deep = format!("{{\"metadata\": {{\"a\": {}{}}}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(message(&deep).contains("recursion limit"), "{}", message(&deep));
}

#[test]
fn many_misfits_are_cut_short() {
    let spec = with(&[("mounts", Value::from(vec![1; 100_000]))]);
    let errors = errors(&spec);
    assert_eq!(errors.len(), 201);
    assert_eq!(errors[199].path, "mounts[199]");
    assert_eq!(errors[200].to_string(), "the spec: has more errors: mend these first");
}

#[test]
fn paths_are_compared_by_component() {
    let mounts = |paths: &[&str]| {
        let mounts: Vec<Value> = paths
            .iter()
            .map(|path| json!({ "kind": "read_only_snapshot", "guest_path": path, "source": "/srv/a" }))
            .collect();
        with(&[("mounts", Value::from(mounts))])
    };
    read(&mounts(&["/runner", "/devel", "/system", "/process", "/var/runs", "/src", "/src2", "/opt/a", "/opt/b"]));
    for below in ["/run", "/run/x", "/dev/shm", "/sys", "/proc/1", "/var/run/x"] {
        let reserved =
            ["/run", "/dev", "/sys", "/proc", "/var/run"].iter().find(|folder| below.starts_with(**folder)).unwrap();
        let line =
            format!("mounts[1].guest_path: must not be below {reserved}: the guest mounts over it when it boots");
        assert_lines(&mounts(&["/src", below]), &[&line]);
    }
    assert_lines(&mounts(&["/a/b", "/a/b/c"]), &["mounts[1].guest_path: overlaps the mount at /a/b"]);
    assert_lines(&mounts(&["/a/b/c", "/a/b"]), &["mounts[1].guest_path: overlaps the mount at /a/b/c"]);
    assert_lines(&mounts(&["/a", "/a"]), &["mounts[1].guest_path: overlaps the mount at /a"]);
    let many: Vec<String> = (0..129).map(|n| format!("/m/{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_lines(&mounts(&many), &["mounts: are 129, must be at most 128"]);
    read(&mounts(&many[1..]));
}

#[test]
fn a_volume_is_named_with_or_without_its_pool_and_one_at_most_is_written() {
    let mounts = |mounts: &[(&str, &str)]| {
        let mounts: Vec<Value> = mounts
            .iter()
            .enumerate()
            .map(|(n, (source, mode))| {
                json!({ "kind": "persistent_volume", "guest_path": format!("/m/{n}"), "source": source, "mode": mode })
            })
            .collect();
        with(&[("mounts", Value::from(mounts))])
    };
    let spec = read(&mounts(&[("data", "read_write"), ("fast/data.2", "read_only"), ("slow/data.2", "read_only")]));
    let names: Vec<_> = spec.mounts.iter().filter_map(Mount::volume).map(|v| (v.pool, v.name)).collect();
    assert_eq!(names, [(None, "data"), (Some("fast"), "data.2"), (Some("slow"), "data.2")]);
    let rule = "must be a volume's NAME or POOL/NAME, each 1 to 63 of A-Z a-z 0-9 . _ -, first a letter or a digit";
    for source in ["", "/", "a/", "/a", "a/b/c", "..", "a b", "-a", "a?b", "a\n", &"a".repeat(64)] {
        assert_lines(&mounts(&[(source, "read_only")]), &[&format!("mounts[0].source: {rule}")]);
    }
    let twice = mounts(&[("a", "read_write"), ("a", "read_only"), ("b", "read_write"), ("c", "read_write")]);
    let one = "must be \"read_only\": mounts[0] is the one volume that is written";
    assert_lines(
        &twice,
        &[
            "mounts[1].source: names the volume of another mount again",
            &format!("mounts[2].mode: {one}"),
            &format!("mounts[3].mode: {one}"),
        ],
    );
}

/// A spec that is taken fits into one `start` message, escapes and all.
#[test]
fn what_is_valid_fits_a_message() {
    use pika_cloud_common::limits::MAX_LINE_BYTES;
    use pika_cloud_common::wire::{HostMessage, Start};
    let start_len = |spec: &RuntimeSpec| {
        let request = pika_cloud_common::GuestRequest {
            schema_version: 2,
            command: spec.entry_command.clone().unwrap(),
            timeout_secs: u64::MAX,
            run_as_root: false,
            extra: serde_json::Map::new(),
        };
        let (env, cwd) = (spec.bootstrap.env.clone(), spec.bootstrap.cwd.clone());
        let (request_id, mounts) = ("a".repeat(80), vec![]);
        let start = Start { request_id, request, env, cwd, mounts, stop_grace_secs: u64::MAX };
        let mut line = Vec::new();
        HostMessage::Start(start).write(&mut line);
        line.len() - 1
    };
    let spec = |character: &str, env: usize, command: usize| {
        with(&[("bootstrap/env/A", json!(character.repeat(env))), ("entry_command", json!(character.repeat(command)))])
    };
    assert!(start_len(&read(&spec("x", 96 * 1024 - 1, 65_536))) <= MAX_LINE_BYTES);
    assert_lines(&spec("x", 96 * 1024, 1), &["bootstrap.env: is 98305 bytes long, must be at most 98304"]);
    let mut largest = 0;
    for size in (0..65_536).step_by(1024) {
        let spec = spec("\u{1}", size, size + 1);
        match RuntimeSpec::from_json(&spec.to_string()) {
            Ok(spec) => largest = start_len(&spec),
            Err(error) => assert!(error.to_string().contains("put what is long into a read_only_snapshot"), "{error}"),
        }
    }
    assert!((MAX_LINE_BYTES - 25_000..=MAX_LINE_BYTES).contains(&largest), "{largest}");
}

/// Invariant 8.
#[test]
fn no_error_and_no_debug_form_quotes_a_secret() {
    const SECRET: &str = "hunter2";
    let number = 20_261_123;
    let shapes = [
        json!({ "env": { "A": SECRET, "1": SECRET, "B": [SECRET], "C": { "x": SECRET }, "D": number, "E": format!("\0{SECRET}") } }),
        json!({ "env": SECRET }),
        json!({ "env": [SECRET] }),
        json!({ "env": number }),
        json!({ "secrets": { "A": SECRET, "B": { "value": SECRET } } }),
        json!({ "secrets": SECRET }),
        json!({ "secrets": [SECRET, number] }),
        json!({ "files": { "/a": SECRET } }),
        json!({ "environment": { "A": SECRET } }),
        json!(SECRET),
        json!([SECRET]),
        json!({ "cwd": [SECRET], "run_as_root": SECRET, "user": [SECRET] }),
    ];
    for shape in shapes {
        let text = with(&[("bootstrap", shape.clone())]).to_string();
        let error = RuntimeSpec::from_json(&text).unwrap_err();
        for shown in [error.to_string(), format!("{error:?}")] {
            assert!(!shown.contains(SECRET) && !shown.contains(&number.to_string()), "{shape}: {shown}");
        }
    }
    let mut spec = read(&with(&[("bootstrap", json!({ "env": { "A": SECRET }, "cwd": "/src" }))]));
    spec.bootstrap.secrets.insert("B".to_owned(), json!({ "value": SECRET }));
    spec.bootstrap.files.insert("/c".to_owned(), json!(SECRET));
    for shown in [format!("{spec:?}"), format!("{:#?}", spec.bootstrap)] {
        assert!(
            !shown.contains(SECRET) && shown.contains("\"A\"") && shown.contains("\"B\"") && shown.contains("/src"),
            "{shown}"
        );
    }
}

/// Invariant 8.
#[test]
fn the_redacted_form_holds_names_only() {
    let mut spec = read(&with(&[("bootstrap", json!({ "env": { "A": "hunter2", "B": "" }, "cwd": "/src" }))]));
    let redacted = spec.redacted();
    assert_eq!(
        redacted.bootstrap.env,
        BTreeMap::from([("A".to_owned(), REDACTED.to_owned()), ("B".to_owned(), REDACTED.to_owned())])
    );
    assert_eq!(redacted.bootstrap.cwd, spec.bootstrap.cwd);
    assert_eq!(read(&serde_json::to_value(&redacted).unwrap()), redacted, "a journal's spec can be read");
    spec.bootstrap.secrets.insert("C".to_owned(), json!({ "value": ["hunter2"] }));
    let redacted = spec.redacted();
    assert!(!serde_json::to_string(&redacted).unwrap().contains("hunter2"));
    assert_eq!(redacted.bootstrap.secrets["C"], REDACTED);
    assert_eq!(hash(&redacted), hash(&spec));
    assert_eq!(difference(&redacted, &spec), Vec::<String>::new());
    assert_eq!(redacted.redacted(), redacted);
}

#[test]
fn the_hash_is_pinned() {
    assert_eq!(hash(&read(&minimal())), "v1:ba7631800d07ddb9c907f539134776e448e49c59b9b98d3f434f7724fc23ab45");
    let ci_job = include_str!("../fixtures/runtime-spec/ci_job.json");
    assert_eq!(
        hash(&RuntimeSpec::from_json(ci_job).unwrap()),
        "v1:81ce74731c746e6b9f079e23d306ad3f46f242cfada480c751983811a1558186"
    );
}

/// So a new default, which is given nowhere, changes no hash.
#[test]
fn the_hash_is_over_given_fields_only() {
    let spec = with(&[
        ("watchdogs/run_secs", json!(5)),
        ("policies/output_collection/mode", json!("none")),
        ("limits/log_bytes", json!(9)),
        ("mounts", json!([{ "guest_path": "/a", "source": "/b" }])),
    ]);
    let given = r#"{"entry_command":"true","identity":{"instance_name":"ci-job-7","runtime_id":"job-7"},"incus":{"image_alias":"ci","instance_type":"container"},"limits":{"log_bytes":9},"mounts":[{"guest_path":"/a","source":"/b"}],"policies":{"output_collection":{"mode":"none"}},"watchdogs":{"run_secs":5}}"#;
    assert_eq!(hash(&read(&spec)), format!("v1:{}", Digest::of(given.as_bytes())));
}

#[test]
fn the_hash_knows_neither_order_nor_explicit_defaults() {
    let spec = read(&minimal());
    let other_order = r#"{"entry_command":"true","incus":{"instance_type":"container","image_alias":"ci"},
        "identity":{"instance_name":"ci-job-7","runtime_id":"job-7"}}"#;
    assert_eq!(hash(&RuntimeSpec::from_json(other_order).unwrap()), hash(&spec));

    let explicit = with(&[
        ("incus/project", json!("default")),
        ("incus/profile", json!("default")),
        ("incus/extra_profiles", json!([])),
        ("incus/agent", json!("auto")),
        ("incus/target", json!(null)),
        ("resources", json!({ "vcpu_count": null })),
        ("mounts", json!([])),
        ("paths", json!({ "state_dir": "/run/pika-cloud" })),
        (
            "policies",
            json!({ "restart_policy": "never", "max_restarts": 10, "debug_keep_secs": 3600, "output_collection": { "mode": "always", "artifact_globs": ["**"] } }),
        ),
        ("bootstrap", json!({ "env": {}, "run_as_root": false })),
        ("watchdogs", json!({ "boot_secs": 120, "run_secs": null })),
        ("limits", json!({ "artifact_files": 10_000 })),
        ("metadata", json!({})),
    ]);
    assert_eq!(hash(&read(&explicit)), hash(&spec));

    // A default beside a given field is no given field: a new default would change no hash.
    for (given, with_default) in [
        (json!({ "run_secs": 5 }), json!({ "run_secs": 5, "boot_secs": 120, "collect_secs": 120 })),
        (
            json!({ "boot_secs": 5, "progress_secs": null }),
            json!({ "boot_secs": 5, "silence_secs": 60, "stop_grace_secs": 10 }),
        ),
    ] {
        let hash = |watchdogs: &Value| hash(&read(&with(&[("watchdogs", watchdogs.clone())])));
        assert_eq!(hash(&given), hash(&with_default));
    }
    let mount = |more: Value| {
        let mut mount = json!({ "kind": "read_only_snapshot", "guest_path": "/a", "source": "/b" });
        mount.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        hash(&read(&with(&[("mounts", json!([mount]))])))
    };
    assert_eq!(mount(json!({})), mount(json!({ "mode": "read_only", "required": true })));
}

#[test]
fn each_field_changes_the_hash_and_is_named_as_the_difference() {
    let base = with(&[
        ("bootstrap/env", json!({ "A": "1" })),
        ("mounts", json!([{ "kind": "read_only_snapshot", "guest_path": "/a", "source": "/b" }])),
    ]);
    let spec = read(&base);
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/identity/runtime_id", json!("job-8"), "identity.runtime_id"),
        ("/identity/instance_name", json!("ci-job-8"), "identity.instance_name"),
        ("/incus/project", json!("p"), "incus.project"),
        ("/incus/profile", json!("p"), "incus.profile"),
        ("/incus/extra_profiles", json!(["p"]), "incus.extra_profiles"),
        ("/incus/image_alias", json!("p"), "incus.image_alias"),
        ("/resources/vcpu_count", json!(2), "resources.vcpu_count"),
        ("/resources/memory_mib", json!(512), "resources.memory_mib"),
        ("/resources/root_disk_gib", json!(5), "resources.root_disk_gib"),
        ("/mounts/0/guest_path", json!("/c"), "mounts[0].guest_path"),
        ("/mounts/0/source", json!("/c"), "mounts[0].source"),
        ("/mounts", json!([]), "mounts"),
        ("/policies/restart_policy", json!("on_failure"), "policies.restart_policy"),
        ("/policies/max_restarts", json!(3), "policies.max_restarts"),
        ("/policies/restart_backoff_secs", json!(3), "policies.restart_backoff_secs"),
        ("/policies/restart_backoff_cap_secs", json!(3), "policies.restart_backoff_cap_secs"),
        ("/policies/debug_keep_secs", json!(3), "policies.debug_keep_secs"),
        ("/policies/retention_policy", json!("keep_until_stopped"), "policies.retention_policy"),
        ("/policies/output_collection/mode", json!("none"), "policies.output_collection.mode"),
        ("/policies/output_collection/include_logs", json!(false), "policies.output_collection.include_logs"),
        ("/policies/output_collection/include_result", json!(false), "policies.output_collection.include_result"),
        ("/policies/output_collection/artifact_globs", json!([]), "policies.output_collection.artifact_globs"),
        ("/entry_command", json!("false"), "entry_command"),
        ("/bootstrap/env/B", json!("1"), "bootstrap.env.B"),
        ("/bootstrap/cwd", json!("/src"), "bootstrap.cwd"),
        ("/bootstrap/run_as_root", json!(true), "bootstrap.run_as_root"),
        ("/watchdogs/boot_secs", json!(5), "watchdogs.boot_secs"),
        ("/watchdogs/silence_secs", json!(25), "watchdogs.silence_secs"),
        ("/watchdogs/ready_secs", json!(5), "watchdogs.ready_secs"),
        ("/watchdogs/progress_secs", json!(5), "watchdogs.progress_secs"),
        ("/watchdogs/run_secs", json!(5), "watchdogs.run_secs"),
        ("/watchdogs/stop_grace_secs", json!(5), "watchdogs.stop_grace_secs"),
        ("/watchdogs/collect_secs", json!(5), "watchdogs.collect_secs"),
        ("/limits/artifact_bytes", json!(5), "limits.artifact_bytes"),
        ("/limits/artifact_files", json!(5), "limits.artifact_files"),
        ("/limits/log_bytes", json!(5), "limits.log_bytes"),
        ("/limits/incarnations", json!(5), "limits.incarnations"),
        ("/limits/event_bytes", json!(1 << 21), "limits.event_bytes"),
        ("/labels/a.b", json!("c"), r#"labels["a.b"]"#),
        ("/metadata/a", json!(null), "metadata.a"),
        ("/metadata/a", json!({}), "metadata.a"),
        ("/metadata/a", json!({ "b": [1] }), "metadata.a.b"),
    ];
    let mut hashes = vec![hash(&spec)];
    for (pointer, value, path) in cases {
        let mut changed = base.clone();
        let mut at = &mut changed;
        for name in pointer.trim_start_matches('/').split('/') {
            at = match at {
                Value::Array(items) => &mut items[name.parse::<usize>().unwrap()],
                other => other.as_object_mut().unwrap().entry(name).or_insert_with(|| json!({})),
            };
        }
        *at = value;
        let changed = read(&changed);
        assert_eq!(difference(&spec, &changed), [path]);
        assert_eq!(difference(&changed, &spec), [path]);
        assert!(!hashes.contains(&hash(&changed)), "{path}");
        hashes.push(hash(&changed));
    }
    let mut other_value = spec.clone();
    other_value.bootstrap.env.insert("A".to_owned(), "2".to_owned());
    assert_eq!(hash(&other_value), hash(&spec), "values of the environment are no part of it");
    assert_eq!(difference(&other_value, &spec), Vec::<String>::new());
}

const FIELDS: &[&str] = &[
    "identity",
    "runtime_id",
    "instance_name",
    "incus",
    "project",
    "extra_profiles",
    "image_alias",
    "instance_type",
    "container",
    "agent",
    "target",
    "resources",
    "vcpu_count",
    "mounts",
    "kind",
    "guest_path",
    "source",
    "mode",
    "required",
    "paths",
    "state_dir",
    "policies",
    "restart_policy",
    "max_restarts",
    "restart_backoff_secs",
    "restart_backoff_cap_secs",
    "output_collection",
    "artifact_globs",
    "entry_command",
    "bootstrap",
    "env",
    "secrets",
    "files",
    "cwd",
    "watchdogs",
    "boot_secs",
    "progress_secs",
    "progress_cap_secs",
    "limits",
    "log_bytes",
    "devices",
    "labels",
    "metadata",
    "never",
    "read_only",
    "x",
    "",
];

/// JSON made of the words of a spec.
fn like_a_spec() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(FIELDS.to_vec()).prop_map(Value::from),
        Just(Value::from("")),
        Just(json!({})),
        Just(json!([])),
    ];
    leaf.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(prop::sample::select(FIELDS.to_vec()), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())),
        ]
    })
}

/// A valid spec, one place of which holds something else.
fn nearly_valid() -> impl Strategy<Value = Value> {
    let pointers = vec![
        "identity",
        "incus",
        "incus/extra_profiles",
        "incus/instance_type",
        "incus/agent",
        "incus/target",
        "resources",
        "resources/vcpu_count",
        "mounts",
        "paths",
        "policies",
        "policies/output_collection",
        "policies/output_collection/artifact_globs",
        "bootstrap",
        "bootstrap/env",
        "bootstrap/secrets",
        "watchdogs",
        "limits",
        "devices",
        "labels",
        "metadata",
        "metadata/a",
    ];
    (prop::sample::select(pointers), like_a_spec()).prop_map(|(pointer, value)| with(&[(pointer, value)]))
}

fn check_any(spec: &Value) {
    match RuntimeSpec::from_json(&spec.to_string()) {
        Ok(read_spec) => {
            read_spec.validate().unwrap();
            let again = serde_json::to_value(&read_spec).unwrap();
            let again = read(&again);
            assert_eq!(again, read_spec);
            assert_eq!(hash(&again), hash(&read_spec));
            assert!(difference(&again, &read_spec).is_empty());
        }
        Err(SpecError::Invalid(errors)) => {
            assert!(!errors.is_empty());
            let mut lines: Vec<String> =
                errors.iter().map(|error| format!("{}: {}", error.path, error.problem)).collect();
            assert!(errors.iter().all(|error| !error.path.is_empty() && !error.problem.is_empty()), "{lines:?}");
            lines.sort();
            let all = lines.len();
            lines.dedup();
            assert_eq!(lines.len(), all, "told twice: {lines:?}");
        }
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_json_is_read_or_refused(spec in like_a_spec()) {
        check_any(&spec);
    }

    #[test]
    fn any_change_is_read_or_refused(spec in nearly_valid()) {
        check_any(&spec);
    }

    #[test]
    fn hash_and_difference_agree(a in nearly_valid(), b in nearly_valid()) {
        let parsed = [a, b].map(|spec| RuntimeSpec::from_json(&spec.to_string()));
        if let [Ok(a), Ok(b)] = parsed {
            prop_assert_eq!(hash(&a) == hash(&b), difference(&a, &b).is_empty());
        }
    }
}

/// The state dir keeps its owner's id beside the runtimes' folders, in a file of that name.
#[test]
fn a_runtime_is_not_called_as_the_state_dirs_own_file() {
    let named = |name: &str| with(&[("identity/runtime_id", json!(name))]);
    assert_lines(
        &named("id"),
        &["identity.runtime_id: must be 1 to 64 of A-Z a-z 0-9 . _ -, first a letter or a digit, and not `id`"],
    );
    for name in ["id2", "ID", "i", "id."] {
        read(&named(name));
    }
}

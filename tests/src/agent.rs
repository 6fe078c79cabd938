//! Shell scripts that play the agent, to send a host what no real one sends.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::output::sha256;
use crate::spec::Spec;
use crate::stage::Stage;

/// Reads the host's hello and answers it; what follows is what the part is about.
pub const HELLO: &str = r#"read -r hello; echo '{"hello":{"protocol":1,"agent":"0.1.0","schema_version":1,"stream_id":"evil","boot_id":"b","first_seq":1,"last_seq":1}}'"#;

/// The last word of an archive.
pub const DONE: &str = r#"echo '{"notice":{"what":"archive_done","files":1,"bytes":4,"skipped":0,"truncated":false}}'"#;

/// Gives a spec `script` for its agent: it is found before the image's own. Takes the spec's mounts for it.
#[must_use]
pub fn played_by(stage: &Stage, spec: Spec, script: &str) -> Spec {
    let folder = stage.more(&format!("agent-of-{}", spec.id));
    fs::create_dir(&folder).expect("the stage's folder can be written");
    let program = folder.join("pika-guest");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("the agent can be written");
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("the agent can be made executable");
    let mounts = json!([{ "kind": "read_only_snapshot", "guest_path": "/usr/local/sbin", "source": folder }]);
    spec.with("mounts", mounts)
}

/// An agent that runs nothing, says that all is well, and sends `entries` for an archive.
pub fn archivist(entries: &str) -> String {
    format!(
        r#"{HELLO}
        while read -r line; do case "$line" in
            *'"start"'*)
                id=${{line#*'"request_id":"'}}; id=${{id%%'"'*}}
                echo "{{\"notice\":{{\"what\":\"started\",\"request_id\":\"$id\"}}}}"
                echo '{{"event":{{"schema_version":1,"seq":1,"timestamp":"2026-01-01T00:00:00Z","kind":"completed","message":"lies"}}}}' ;;
            *'"archive"'*)
                {entries}
                ;;
        esac; done"#
    )
}

/// A file of an archive, as an [`archivist`] sends it.
pub fn entry(path: &str, text: &str) -> String {
    let digest = sha256(text.as_bytes());
    let len = text.len();
    format!(
        "printf '%s\\n%s' '{{\"entry\":{{\"path\":\"{path}\",\"mode\":511,\"size\":{len},\"offset\":0,\"len\":{len},\"digest\":\"{digest}\"}}}}' '{text}'\n"
    )
}

/// Files of an archive that never ends, as an [`archivist`] sends them.
pub const ENDLESS: &str = r#"i=0; while :; do i=$((i+1)); echo "{\"entry\":{\"path\":\"f$i\",\"mode\":420,\"size\":0,\"offset\":0,\"len\":0,\"digest\":\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"}}"; sleep 0.05; done"#;

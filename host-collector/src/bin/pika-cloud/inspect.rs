//! `inspect`, `list` and `schema`.

use std::process::ExitCode;

use pika_cloud_common::State;
use pika_host_collector::Cloud;
use pika_host_collector::journal::View;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::print;

/// `pika-cloud inspect`.
pub(crate) async fn inspect(cloud: &Cloud, id: &str, json: bool) -> Result<ExitCode, Failure> {
    let found = cloud.inspect(id).await?;
    let view = &found.view;
    let document = json!({
        "runtime_id": found.runtime_id,
        "incarnation": view.incarnation,
        "state": state(view),
        "instance": found.spec.identity.instance_name,
        "instance_status": found.instance_status,
        "transport": view.transport,
        "agent": view.agent,
        "agent_origin": view.agent_origin,
        "stream_id": view.cursor.as_ref().map(|cursor| &cursor.stream_id),
        "last_seq": view.cursor.as_ref().map(|cursor| cursor.seq),
        "last_event": view.last_event(),
        "verdict": view.verdict,
        "standing": standing(view),
        "restarts": view.restarts,
        "driven_by": found.driven_by,
        "outputs": found.outputs,
        "spec": found.spec,
    });
    if json {
        print::line(&document.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in document.as_object().into_iter().flatten() {
        match value {
            Value::Null if name == "driven_by" && !view.is_settled() => {
                print::line(&format!(
                    "{name:<16} nobody on this machine: `pika-cloud run SPEC` or `pika-cloud reconcile` goes on with it"
                ));
            }
            Value::Null => {}
            Value::String(text) => print::line(&format!("{name:<16} {}", print::plain(text))),
            Value::Object(_) => print::line(&format!("{name:<16} {}", print::plain(&value.to_string()))),
            other => print::line(&format!("{name:<16} {other}")),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `pika-cloud list`.
pub(crate) fn list(cloud: &Cloud, json: bool) -> Result<ExitCode, Failure> {
    let runtimes = cloud.list()?;
    if json {
        let rows: Vec<Value> = runtimes.iter().map(|(id, view)| row(id, view)).collect();
        print::line(&Value::Array(rows).to_string());
        return Ok(ExitCode::SUCCESS);
    }
    print::line(&format!("{:<32} {:>3}  {:<13} {:<10} {}", "RUNTIME", "INC", "STATE", "STANDING", "VERDICT"));
    for (id, view) in &runtimes {
        let verdict = view.verdict.as_ref().map_or("-", |verdict| verdict.outcome.name());
        let (state, standing) = (state(view), standing(view));
        print::line(&format!(
            "{id:<32} {:>3}  {:<13} {standing:<10} {verdict}",
            view.incarnation,
            print::plain(&state)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn row(id: &str, view: &View) -> Value {
    json!({
        "runtime_id": id,
        "incarnation": view.incarnation,
        "state": state(view),
        "verdict": view.verdict.as_ref().map(|verdict| verdict.outcome.name()),
        "standing": standing(view),
    })
}

/// Whether anything is still to come of it by itself.
fn standing(view: &View) -> &'static str {
    match view {
        View { taken_over: Some(_), .. } => "taken_over",
        View { finished: Some(finished), .. } if finished.restart_in_ms.is_some() => "restarting",
        View { finished: Some(_), .. } => "finished",
        View { kept: Some(_), .. } => "kept",
        _ => "open",
    }
}

fn state(view: &View) -> String {
    view.state.as_ref().map_or_else(|| "-".to_owned(), |state: &State| state.as_str().to_owned())
}

/// `pika-cloud schema`.
pub(crate) fn schema(name: Option<&str>) -> Result<ExitCode, Failure> {
    let all = pika_cloud_common::schema::all();
    let Some(name) = name else {
        for (name, _) in &all {
            print::line(name);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Some((_, schema)) = all.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        return Err(Failure::Other(format!("there is no schema `{name}`; there are: {}", known.join(", "))));
    };
    print::line(&serde_json::to_string_pretty(schema).map_err(|error| Failure::Other(error.to_string()))?);
    Ok(ExitCode::SUCCESS)
}

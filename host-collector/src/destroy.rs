//! Destroying an instance, and only one of ours.

use crate::driver::failure;
use crate::incus::{Client, Error, InstanceState, Labels};
use crate::machine::CallFailure;

/// Invariant 4: stops and deletes the instance of a runtime. One that is gone already is fine; one that is not ours is not touched.
pub(crate) async fn destroy(
    client: &Client,
    project: &str,
    name: &str,
    runtime_id: &str,
    owner: &str,
) -> Result<(), CallFailure> {
    let Some(instance) = client.instance(project, name).await.map_err(|e| failure(&e))? else { return Ok(()) };
    // Incus ignores conditions on state changes and deletes, so the labels are read right before them.
    match Labels::read(&instance.config) {
        Some(labels) if labels.runtime_id == runtime_id && labels.owner == owner => {}
        _ => {
            let message =
                format!("instance `{name}` is not of runtime `{runtime_id}` and this state dir: it is left alone");
            return Err(CallFailure { transient: false, message });
        }
    }
    if instance.state() != InstanceState::Stopped {
        match client.stop_instance(project, name).await {
            // Whether it stopped by itself meanwhile shows at the delete, which refuses a running one.
            Err(Error::Refused { .. } | Error::OperationFailed { .. } | Error::OperationLost { .. }) | Ok(()) => {}
            Err(error) => return Err(failure(&error)),
        }
    }
    match client.delete_instance(project, name).await {
        Ok(()) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        // The outcome is read from the resource, by the next try.
        Err(error) => Err(CallFailure { transient: true, message: error.to_string() }),
    }
}

//! Whether a verdict is right: what the truth of guest, Incus and operators admits.

use pika_cloud_common::verdict::{DeathCause, Outcome, Watchdog};
use serde_json::Value;

use super::fold::Life;
use super::{Facts, Violation};

/// Invariant 2: the end of an incarnation is one that what happened admits.
pub(in crate::sim) fn check(life: &Life, facts: &Facts) -> Result<(), Violation> {
    let Some(outcome) = &life.ended else { return Ok(()) };
    let word = life.terminal.as_deref().map(last_word);
    // A guest that was rewound may say its last word right behind that.
    let is_rewound = facts.rewound && *outcome == Outcome::GuestDied { cause: DeathCause::Rewound };
    if life.word_came_first && !life.commanded_first && !is_rewound && word.as_ref() != Some(outcome) {
        let text = format!("the guest's last word, {word:?}, was in the journal first, and the verdict is {outcome:?}");
        return Err(Violation::of(2, text));
    }
    let first_word = word.as_ref().filter(|_| life.word_came_first);
    let admitted = first_word == Some(outcome)
        || match outcome {
            Outcome::Completed { .. }
            | Outcome::Failed { .. }
            | Outcome::TimedOut { watchdog: Watchdog::Silence | Watchdog::Collect } => false,
            // Whether its time had come is invariant 3's.
            Outcome::TimedOut { .. } => true,
            Outcome::Unreachable => {
                facts.silenced || facts.rude || facts.incus_failed || facts.vanished() || facts.agentless
            }
            Outcome::ProvisionFailed => {
                facts.incus_failed || facts.unfit || facts.vanished() || facts.silenced || facts.agentless
            }
            Outcome::Cancelled => facts.commanded,
            Outcome::GuestDied { cause } => match cause {
                DeathCause::InstanceStopped => facts.stopped || facts.errored,
                DeathCause::InstanceError => facts.errored,
                DeathCause::InstanceGone => facts.deleted || facts.renamed,
                DeathCause::Rebooted => {
                    facts.rebooted || facts.stopped || facts.errored || facts.deleted || facts.rewound
                }
                DeathCause::SupervisorLost => false,
                DeathCause::ContractBroken => {
                    facts.rude || facts.silenced || facts.taken_over || facts.rewound || facts.agentless
                }
                DeathCause::Rewound => facts.rewound,
            },
        };
    if admitted {
        return Ok(());
    }
    Err(Violation::of(2, format!("nothing that happened admits the verdict {outcome:?}: {facts:?}")))
}

/// What the guest's last word makes of its incarnation, read here by itself.
fn last_word(line: &str) -> Outcome {
    let event: Value = serde_json::from_str(line).unwrap_or_default();
    let details = &event["details"];
    let exit_code = details["exit_code"].as_i64().and_then(|code| i32::try_from(code).ok());
    if event["kind"] == "completed" {
        Outcome::Completed { exit_code }
    } else if details.get("supervisor_lost").is_some() {
        Outcome::GuestDied { cause: DeathCause::SupervisorLost }
    } else if details.get("timed_out").is_some() {
        Outcome::TimedOut { watchdog: Watchdog::Run }
    } else {
        Outcome::Failed { exit_code }
    }
}

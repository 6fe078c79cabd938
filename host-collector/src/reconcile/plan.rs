//! What is to be done about what was found. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pika_cloud_common::spec::RetentionPolicy;

use super::ReconcileOptions;
use crate::incus::{Holder, Labels, VolumeLabels};

/// An instance by its place in Incus.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InstanceName {
    /// Its project.
    pub project: String,
    /// Its name there.
    pub name: String,
}

/// A custom volume by its place in Incus.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeName {
    /// Its project.
    pub project: String,
    /// Its storage pool.
    pub pool: String,
    /// Its name there.
    pub name: String,
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "instance {}/{}", self.project, self.name)
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}/{} ({})", self.pool, self.name, self.project)
    }
}

/// A runtime that has a folder in the state dir.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalRuntime {
    pub(super) runtime_id: String,
    /// The instance that its spec names.
    pub(super) instance: InstanceName,
    /// Of its journal.
    pub(super) incarnation: u32,
    /// The highest term of which its journal knows that it was not another collector's. An instance that goes on with what is in
    /// the journal, and is another's or was taken back, has a higher one.
    pub(super) term: u64,
    pub(super) standing: Standing,
}

impl LocalRuntime {
    /// Whether an instance is none of those that its journal speaks of, but of another runtime of the same name: one was ended
    /// and another begun, here or elsewhere, and each counts its incarnations and terms anew. `us` is this state dir's owner.
    pub(super) fn is_of_another_life(&self, labels: &Labels, us: &str) -> bool {
        // Taken over, it has a higher term than any that was ours before.
        let is_older = if labels.owner == us { labels.term < self.term } else { labels.term <= self.term };
        let is_told = labels.incarnation <= self.incarnation;
        is_told && (is_older || matches!(self.standing, Standing::Finished { destroyed: true }))
    }
}

/// How a runtime of the state dir stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// A collector drives it.
    Driven,
    /// Nothing was asked of Incus for it.
    NotBegun,
    /// There is more to do.
    Unfinished {
        /// Whether a workload is still to be started, in this incarnation or the next one, and needs values that only its
        /// spec had.
        needs_spec: bool,
    },
    /// Its last incarnation is over.
    Finished {
        /// Whether its instance was destroyed then.
        destroyed: bool,
    },
    /// Its last incarnation is over, and its journal says that its instance is kept, still.
    Kept,
    /// Its journal or spec cannot be read.
    Unreadable(String),
}

/// An instance with labels of ours.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    pub(super) instance: InstanceName,
    /// `None` where they are not complete.
    pub(super) labels: Option<Labels>,
}

/// A volume with all labels of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenVolume {
    pub(super) volume: VolumeName,
    pub(super) labels: VolumeLabels,
    pub(super) in_use: bool,
}

/// What is to be done about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take a runtime up where its collector left it, and drive it to its end.
    Adopt {
        /// Which.
        runtime_id: String,
    },
    /// End a runtime that can neither go on nor stay.
    Cancel {
        /// Which.
        runtime_id: String,
        /// For a person.
        why: String,
    },
    /// Stop and delete an instance.
    End {
        /// Which.
        instance: InstanceName,
        /// Whose it is.
        runtime_id: String,
        /// The term that it was seen with.
        term: u64,
        /// For a person.
        why: String,
    },
    /// Make an instance ours, with a journal here; it is planned anew then.
    TakeOver {
        /// Which.
        instance: InstanceName,
        /// Whose it is.
        runtime_id: String,
        /// Who holds it; ourselves, where an earlier take-over was cut short.
        from: Holder,
    },
    /// Make a volume ours.
    TakeOverVolume {
        /// Which.
        volume: VolumeName,
        /// Whose it is.
        runtime_id: String,
        /// Who holds it.
        from: Holder,
    },
    /// Remove what a bake left that is over: its builder, an image without an alias, the one that its alias had before.
    Tidy {
        /// Which.
        bake: String,
        /// The alias that it was for; `None` where it had died before that was written.
        to: Option<String>,
    },
    /// Stop and delete a builder of ours of which nothing is written down.
    EndBuilder {
        /// Which.
        instance: InstanceName,
        /// The bake that made it.
        bake: String,
    },
    /// Delete a volume of ours that nothing uses and no runtime here knows.
    DeleteVolume {
        /// Which.
        volume: VolumeName,
        /// Whose it was.
        runtime_id: String,
    },
    /// Leave an instance alone whose take-over was asked for by its runtime's name.
    Refuse {
        /// Which.
        instance: InstanceName,
        /// For a person.
        why: String,
    },
    /// Leave something alone, and say so.
    Report {
        /// What it is.
        what: String,
        /// For a person.
        why: String,
    },
}

impl Step {
    /// What it is about.
    pub fn name(&self) -> String {
        match self {
            Self::Adopt { runtime_id } | Self::Cancel { runtime_id, .. } => format!("runtime {runtime_id}"),
            Self::End { instance, .. } | Self::TakeOver { instance, .. } | Self::Refuse { instance, .. } => {
                instance.to_string()
            }
            Self::TakeOverVolume { volume, .. } | Self::DeleteVolume { volume, .. } => volume.to_string(),
            Self::Tidy { bake, to: Some(to) } => format!("bake {bake} of {to}"),
            Self::Tidy { bake, to: None } => format!("bake {bake}"),
            Self::EndBuilder { instance, .. } => instance.to_string(),
            Self::Report { what, .. } => what.clone(),
        }
    }

    /// What is done, as one word.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Adopt { .. } => "adopt",
            Self::Cancel { .. } => "cancel",
            Self::End { .. } | Self::EndBuilder { .. } => "end",
            Self::Tidy { .. } => "tidy",
            Self::TakeOver { .. } | Self::TakeOverVolume { .. } => "take_over",
            Self::DeleteVolume { .. } => "delete",
            Self::Refuse { .. } => "refuse",
            Self::Report { .. } => "report",
        }
    }

    /// Why, for a person.
    pub fn why(&self) -> String {
        match self {
            Self::Adopt { .. } => "its journal is not finished, and nobody drives it".to_owned(),
            Self::Cancel { why, .. } | Self::End { why, .. } | Self::Refuse { why, .. } | Self::Report { why, .. } => {
                why.clone()
            }
            Self::TakeOver { runtime_id, from, .. } | Self::TakeOverVolume { runtime_id, from, .. } => {
                format!("of runtime {runtime_id}, from owner {} with term {}", from.owner, from.term)
            }
            Self::Tidy { .. } => "it is over, and what it made may be left".to_owned(),
            Self::EndBuilder { bake, .. } => format!("ours, of a bake {bake} that is not known here any more"),
            Self::DeleteVolume { runtime_id, .. } => {
                format!("of runtime {runtime_id}, which is not known here; nothing uses it")
            }
        }
    }
}

/// Plans what is to be done, in the order of what was found. `now` is wall time since the UNIX epoch.
pub(super) fn plan(
    local: &[LocalRuntime],
    instances: &[Seen],
    volumes: &[SeenVolume],
    owner: &str,
    now: Duration,
    options: &ReconcileOptions,
) -> Vec<Step> {
    let planner = Planner {
        local: local.iter().map(|runtime| (runtime.runtime_id.as_str(), runtime)).collect(),
        instances,
        owner,
        now,
        options,
    };
    let mut steps: Vec<Step> = local.iter().filter_map(|runtime| planner.runtime(runtime)).collect();
    steps.extend(instances.iter().filter_map(|seen| planner.instance(seen)));
    let taken: BTreeMap<String, Holder> = steps
        .iter()
        .filter_map(|step| match step {
            Step::TakeOver { runtime_id, from, .. } => Some((runtime_id.clone(), from.clone())),
            _ => None,
        })
        .collect();
    steps.extend(volumes.iter().filter_map(|seen| planner.volume(seen, volumes, &taken)));
    steps
}

struct Planner<'a> {
    local: BTreeMap<&'a str, &'a LocalRuntime>,
    instances: &'a [Seen],
    owner: &'a str,
    now: Duration,
    options: &'a ReconcileOptions,
}

impl Planner<'_> {
    /// A runtime of the state dir that has more to do.
    fn runtime(&self, runtime: &LocalRuntime) -> Option<Step> {
        let id = &runtime.runtime_id;
        let report = |why: String| Some(Step::Report { what: format!("runtime {id}"), why });
        let needs_spec = match &runtime.standing {
            Standing::Unreadable(problem) => return report(problem.clone()),
            Standing::Driven | Standing::NotBegun | Standing::Finished { .. } | Standing::Kept => return None,
            Standing::Unfinished { needs_spec } => *needs_spec,
        };
        let labels = self.labels_at(&runtime.instance);
        if labels.is_some_and(|labels| labels.owner != self.owner) {
            // Invariant 6: somebody took it over. The instance itself is reported.
            return None;
        }
        match (needs_spec, labels.is_some_and(|labels| labels.is_expired(self.now))) {
            (false, _) => Some(Step::Adopt { runtime_id: id.clone() }),
            (true, true) => {
                let why = "it expired, and what its workload needs was in its spec only".to_owned();
                Some(Step::Cancel { runtime_id: id.clone(), why })
            }
            (true, false) => report(
                "its workload is still to be started, and needs values of bootstrap.env that only its spec has: run it with \
                 that spec, or destroy it"
                    .to_owned(),
            ),
        }
    }

    fn labels_at(&self, instance: &InstanceName) -> Option<&Labels> {
        self.instances.iter().find(|seen| seen.instance == *instance)?.labels.as_ref()
    }

    fn instance(&self, seen: &Seen) -> Option<Step> {
        let report = |why: String| Some(Step::Report { what: seen.instance.to_string(), why });
        let Some(labels) = &seen.labels else {
            return report("it has some of pika-cloud's labels, and not all: it is left alone".to_owned());
        };
        if labels.owner == self.owner {
            return self.own_instance(seen, labels);
        }
        let expired = labels.is_expired(self.now);
        let named = self.options.take_over.contains(&labels.runtime_id);
        let wanted = named || (expired && self.options.take_over_expired);
        if !wanted {
            let state = if expired { " and expired" } else { "" };
            return report(format!(
                "runtime {} of owner {}, term {}{state}: it is left alone; --take-over {} takes it over",
                labels.runtime_id, labels.owner, labels.term, labels.runtime_id
            ));
        }
        match self.take_over_problem(seen, labels) {
            Some(why) if named => return Some(Step::Refuse { instance: seen.instance.clone(), why }),
            Some(why) => return report(why),
            None => {}
        }
        Some(Step::TakeOver {
            instance: seen.instance.clone(),
            runtime_id: labels.runtime_id.clone(),
            from: Holder { owner: labels.owner.clone(), term: labels.term },
        })
    }

    /// Why an instance of another owner cannot be taken over here.
    fn take_over_problem(&self, seen: &Seen, labels: &Labels) -> Option<String> {
        let id = &labels.runtime_id;
        if labels.spec.is_none() && !labels.is_expired(self.now) {
            let problem = "it cannot be taken over: its spec is too long for its labels. End it from the state dir that made \
                           it; once it expired, whoever takes it over ends it";
            return Some(problem.to_owned());
        }
        if labels.spec.is_some() && labels.read_spec(&seen.instance.project).is_none() {
            return Some("it cannot be taken over: the spec in its labels is of another project, or cannot be used by this release".to_owned());
        }
        let same_id = |other: &&Seen| other.labels.as_ref().is_some_and(|labels| labels.runtime_id == *id);
        if self.instances.iter().filter(same_id).count() > 1 {
            return Some(format!("it cannot be taken over: there are several instances of a runtime {id}"));
        }
        match self.local.get(id.as_str()) {
            Some(local) if matches!(local.standing, Standing::Driven | Standing::Unreadable(_)) => {
                Some(format!("it cannot be taken over: runtime {id} of this state dir is driven, or cannot be read"))
            }
            Some(local) if local.instance != seen.instance && local.incarnation > 0 => {
                Some(format!("it cannot be taken over: this state dir has a runtime {id} with another instance"))
            }
            Some(local) if local.is_of_another_life(labels, self.owner) => Some(format!(
                "it cannot be taken over: this state dir had an earlier runtime {id} of its own, whose journal says nothing of this \
                 one. Take it over from another state dir (--state-dir), or move the folder {id} out of this one"
            )),
            _ => None,
        }
    }

    fn own_instance(&self, seen: &Seen, labels: &Labels) -> Option<Step> {
        let end = |why: &str| {
            Some(Step::End {
                instance: seen.instance.clone(),
                runtime_id: labels.runtime_id.clone(),
                term: labels.term,
                why: why.to_owned(),
            })
        };
        let report = |why: &str| Some(Step::Report { what: seen.instance.to_string(), why: why.to_owned() });
        let take_again = || {
            Some(Step::TakeOver {
                instance: seen.instance.clone(),
                runtime_id: labels.runtime_id.clone(),
                from: Holder { owner: labels.owner.clone(), term: labels.term },
            })
        };
        let expired = labels.is_expired(self.now);
        let goes = labels.retention == RetentionPolicy::DestroyOnCompletion;
        let Some(local) = self.local.get(labels.runtime_id.as_str()) else {
            return match (labels.term > 1, goes, expired) {
                (true, ..) if labels.read_spec(&seen.instance.project).is_some() => take_again(),
                (_, true, _) => end("ours, without a journal here, and to be destroyed on completion"),
                (_, _, true) => end("ours, without a journal here, and expired"),
                _ => report("ours, without a journal here, and kept by its policy"),
            };
        };
        let its_own = local.instance == seen.instance;
        if labels.term > local.term && matches!(local.standing, Standing::NotBegun | Standing::Finished { .. }) {
            // It was taken over, and not with what the journal says. A collector died before it had written that down.
            return match labels.read_spec(&seen.instance.project) {
                Some(_) if its_own && !local.is_of_another_life(labels, self.owner) => take_again(),
                _ if expired => end("ours, taken over, and expired"),
                _ => report("ours, taken over with a term that the journal of its runtime does not know"),
            };
        }
        match &local.standing {
            // Its collector knows.
            Standing::Driven => None,
            Standing::Unreadable(_) => report("the journal of its runtime cannot be read: it is left alone"),
            // The runtime itself is taken up, and its instance with it. One that is kept goes when its journal says so: the label
            // was written before anything ran.
            Standing::Unfinished { .. } | Standing::Kept if its_own => None,
            Standing::Finished { destroyed: true } if its_own => {
                end("ours, and its journal says that it was destroyed")
            }
            Standing::Finished { .. } | Standing::Kept if goes => end("ours, and its runtime is finished"),
            Standing::Finished { .. } | Standing::Kept | Standing::Unfinished { .. } if expired => {
                end("ours, and it expired")
            }
            Standing::Finished { .. } if its_own => None,
            Standing::Unfinished { .. } if goes && labels.incarnation < local.incarnation => {
                end("ours, and left behind by an earlier incarnation")
            }
            Standing::NotBegun if goes || expired => end("ours, and its runtime was never begun here"),
            Standing::NotBegun | Standing::Unfinished { .. } | Standing::Kept | Standing::Finished { .. } => {
                report("ours, but not the instance that its runtime has now: destroy it yourself if it is not needed")
            }
        }
    }

    fn volume(&self, seen: &SeenVolume, all: &[SeenVolume], taken: &BTreeMap<String, Holder>) -> Option<Step> {
        let labels = &seen.labels;
        let id = &labels.runtime_id;
        if labels.owner != self.owner {
            return self.foreign_volume(seen, all, taken);
        }
        if seen.in_use || self.local.contains_key(id.as_str()) || self.has_instance(id) {
            return None;
        }
        Some(if self.options.delete_orphan_volumes {
            Step::DeleteVolume { volume: seen.volume.clone(), runtime_id: id.clone() }
        } else {
            let why = format!(
                "an orphan of runtime {id}: no runtime here knows it, and nothing uses it; --delete-orphan-volumes deletes it"
            );
            Step::Report { what: seen.volume.to_string(), why }
        })
    }

    /// Whether an instance of that runtime is there, whosever.
    fn has_instance(&self, runtime_id: &str) -> bool {
        self.instances.iter().any(|seen| seen.labels.as_ref().is_some_and(|labels| labels.runtime_id == runtime_id))
    }

    /// A volume follows its runtime: with its instance, after it where a take-over was cut short, or by itself.
    fn foreign_volume(&self, seen: &SeenVolume, all: &[SeenVolume], taken: &BTreeMap<String, Holder>) -> Option<Step> {
        let labels = &seen.labels;
        let id = &labels.runtime_id;
        let with_instance = taken.get(id).is_some_and(|from| from.owner == labels.owner || from.owner == self.owner);
        let holders: BTreeSet<&str> = all
            .iter()
            .filter(|other| other.labels.runtime_id == *id && other.labels.owner != self.owner)
            .map(|other| other.labels.owner.as_str())
            .collect();
        let ours = self
            .instances
            .iter()
            .filter_map(|seen| seen.labels.as_ref())
            .any(|l| l.runtime_id == *id && l.owner == self.owner);
        let by_name = self.options.take_over.contains(id) && holders.len() == 1 && (ours || !self.has_instance(id));
        (with_instance || by_name).then(|| Step::TakeOverVolume {
            volume: seen.volume.clone(),
            runtime_id: id.clone(),
            from: Holder { owner: labels.owner.clone(), term: labels.term },
        })
    }
}

#[cfg(test)]
mod tests;

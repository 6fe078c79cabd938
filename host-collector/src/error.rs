//! What can go wrong at the public surface.

use std::path::PathBuf;

use pika_cloud_common::Verdict;
use pika_cloud_common::spec::SpecError;

use crate::bake::StaleImage;
use crate::journal::JournalError;
use crate::state_dir::StateDirError;

/// A call of [`Cloud`](crate::Cloud) failed. A runtime's bad end is not an error but its verdict.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec cannot be used. Nothing was touched.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Incus failed.
    #[error(transparent)]
    Incus(#[from] crate::incus::Error),
    /// What the spec names is not there. Nothing was touched.
    #[error("{what} `{name}` does not exist{}: {way_out}", if project.is_empty() { String::new() } else { format!(" in project `{project}`") })]
    Missing {
        /// Project, profile, image or pool.
        what: &'static str,
        /// Its name.
        name: String,
        /// Where it was looked for.
        project: String,
        /// What to do about it.
        way_out: String,
    },
    /// The image is of another kind than the spec's instance.
    #[error(
        "image `{alias}` is for a {found}, and the spec's incus.instance_type is {wanted}: name another image, or change the type"
    )]
    ImageKind {
        /// The image's alias.
        alias: String,
        /// Its kind.
        found: String,
        /// What the spec asks for.
        wanted: &'static str,
    },
    /// The image's properties would make every answer of Incus about an instance of it too long.
    #[error(
        "image `{alias}` has {bytes} bytes of properties, and no more than {} are taken: name another image, or remove some \
         (incus image edit {alias} --project {project})",
        crate::incus::Image::MAX_PROPERTY_BYTES
    )]
    ImageProperties {
        /// The image's alias.
        alias: String,
        /// Its project.
        project: String,
        /// All of them.
        bytes: usize,
    },
    /// The agent in the image and this host do not understand each other. Nothing was touched.
    #[error("{_0}: bake it anew ({})", _0.mend())]
    ImageAgent(Box<StaleImage>),
    /// The spec wants the host's own agent, and the host has none for its image. Nothing was touched.
    #[error("incus.agent is `inject`: {0}")]
    OwnAgent(#[from] crate::agent_binary::AgentError),
    /// A source of a mount is not on this host. Nothing was touched.
    #[error("mounts[{index}].source: {} is no folder on this host: make it, or correct the path", path.display())]
    MountSource {
        /// Which mount.
        index: usize,
        /// Its source.
        path: PathBuf,
    },
    /// An instance of that name exists and is not this runtime's. It is left alone.
    #[error(
        "instance `{instance}` in project `{project}` exists and {whose}: it is left alone; choose another identity.instance_name, or delete it yourself"
    )]
    NotOurs {
        /// Its name.
        instance: String,
        /// Its project.
        project: String,
        /// Whose it seems to be.
        whose: String,
    },
    /// An instance of ours could not be destroyed.
    #[error(
        "instance `{instance}` could not be destroyed: {message}; its verdict, if it has one, stands in the journal; try `pika-cloud destroy` again"
    )]
    NotDestroyed {
        /// Its name.
        instance: String,
        /// What Incus answered.
        message: String,
        /// The runtime's verdict, where it has one.
        verdict: Option<Box<Verdict>>,
    },
    /// The runtime exists with another spec.
    #[error("runtime `{runtime_id}` exists with another spec, which differs in: {}; end it (pika-cloud destroy {runtime_id}) and run the new one with --again, or choose another identity.runtime_id", fields.join(", "))]
    SpecDiffers {
        /// The runtime.
        runtime_id: String,
        /// Paths of the fields that differ.
        fields: Vec<String>,
    },
    /// The workload is still to be started, and the environment that it needs is not kept on disk.
    #[error(
        "runtime `{runtime_id}`: its workload is still to be started, and what bootstrap.env holds is not kept: run the spec again (pika-cloud run SPEC)"
    )]
    SpecNeeded {
        /// The runtime.
        runtime_id: String,
    },
    /// Another collector took the runtime over: nothing more is done to it from here.
    #[error(
        "runtime `{runtime_id}`: the collector `{owner}` took it over under term {term}: ask there, or take it back with pika-cloud reconcile --take-over {runtime_id}"
    )]
    TakenOver {
        /// The runtime.
        runtime_id: String,
        /// The id of the other collector's state dir.
        owner: String,
        /// Its term.
        term: u64,
    },
    /// There is no such runtime in the state dir.
    #[error("there is no runtime `{runtime_id}` in this state dir: `pika-cloud list` shows those that are")]
    Unknown {
        /// What was asked for.
        runtime_id: String,
    },
    /// The state dir cannot be used.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// An output cannot be written.
    #[error("{}: {source}: check that the folder is writable and its disk not full", path.display())]
    Outputs {
        /// The file or folder.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// Something of the user's lies where an output would go, or the folder is pika-cloud's own. Nothing was touched.
    #[error("{}: is in the way of the outputs, and was not put there as one: nothing was touched; move it away, or name another folder with --output", path.display())]
    OutputInTheWay {
        /// What is in the way.
        path: PathBuf,
    },
    /// What was waited for did not come in time.
    #[error("runtime `{runtime_id}`: not {wanted} within {} s; the guest goes on", after.as_secs())]
    WaitTimedOut {
        /// The runtime.
        runtime_id: String,
        /// What was waited for.
        wanted: &'static str,
        /// How long.
        after: std::time::Duration,
    },
    /// A fault of pika-cloud itself.
    #[error("pika-cloud failed: {0}: run the same command again, it goes on from the journal; and please report it")]
    Panicked(String),
}

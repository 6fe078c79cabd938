//! What can go wrong while an image is baked.

use std::path::PathBuf;
use std::time::Duration;

use crate::agent_binary::AgentError;
use crate::incus;
use crate::state_dir::StateDirError;
use crate::transport::PutError;

/// An image was not baked. The alias that it was to have points to where it pointed before, unless Incus gave no answer to the one
/// call that moves it; what was made meanwhile is removed again, or named by [`BakeError::Left`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BakeError {
    /// No alias can have that name.
    #[error("`{alias}` is no name of an image: --from and --to take an alias, as `incus image list` shows them")]
    Alias {
        /// What was given.
        alias: String,
    },
    /// The base would be lost.
    #[error(
        "--from and --to are both `{alias}`: the next bake would begin with what this one made; name the base and the baked \
         image differently (--to {alias}-baked), or give the base another alias first (incus image alias create BASE FINGERPRINT)"
    )]
    SameAlias {
        /// The alias.
        alias: String,
    },
    /// A file cannot be put into the image.
    #[error("--file {file}: {problem}")]
    File {
        /// As it was given.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// The provisioning script cannot be read.
    #[error("--provision {}: {problem}: name a shell script on this host", path.display())]
    Script {
        /// The script.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is nothing to begin with, or nothing to make it in.
    #[error("{what} `{name}` does not exist{}: {way_out}", if project.is_empty() { String::new() } else { format!(" in project `{project}`") })]
    Missing {
        /// Project, profile or image.
        what: &'static str,
        /// Its name.
        name: String,
        /// Where it was looked for.
        project: String,
        /// What to do about it.
        way_out: String,
    },
    /// The alias is in use for something that cannot be replaced by this.
    #[error(
        "`{alias}` names an image for a {found}, and `{from}` is for a {kind}: specs that name `{alias}` would fail; choose \
         another --to, or remove that alias first (incus image alias delete {alias})"
    )]
    OtherKind {
        /// The alias.
        alias: String,
        /// The kind of its image.
        found: String,
        /// The base.
        from: String,
        /// The kind of the base.
        kind: String,
    },
    /// The base's properties would make every answer of Incus about an instance of it too long.
    #[error(
        "`{from}` has {bytes} bytes of properties, and no more than {} are taken: name another base, or remove some \
         (incus image edit {from} --project {project})",
        crate::incus::Image::MAX_PROPERTY_BYTES
    )]
    Properties {
        /// The base.
        from: String,
        /// Its project.
        project: String,
        /// All of them.
        bytes: usize,
    },
    /// This Incus runs no virtual machines.
    #[error(
        "`{from}` is an image for virtual machines, and this Incus runs none: install QEMU and load vhost_vsock on the host, and \
         start Incus anew (`incus info` names its drivers); or bake an image for containers"
    )]
    NoMachines {
        /// The base.
        from: String,
    },
    /// The host has no agent for it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Incus failed.
    #[error("{doing}: {source}")]
    Incus {
        /// What was tried.
        doing: String,
        /// What Incus answered.
        source: incus::Error,
    },
    /// The state dir cannot be used.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// Nothing can be run in the builder of a virtual machine.
    #[error(
        "nothing can be run in the virtual machine that was made from `{from}`, {} s after its start ({problem}): its image needs \
         incus-agent, which the images of the remote `images:` have", after.as_secs()
    )]
    NoIncusAgent {
        /// The base.
        from: String,
        /// What Incus answered last.
        problem: String,
        /// How long was waited.
        after: Duration,
    },
    /// The builder does not come up.
    #[error(
        "nothing can be run in the container that was made from `{from}`, {} s after its start ({problem}): `incus launch {from}` \
         and `incus console --show-log` tell more", after.as_secs()
    )]
    NotReady {
        /// The base.
        from: String,
        /// What Incus answered last.
        problem: String,
        /// How long was waited.
        after: Duration,
    },
    /// Nothing can be put into it.
    #[error("the image `{from}` has no /bin/sh, so that nothing can be put into it: begin with another one")]
    NoShell {
        /// The base.
        from: String,
    },
    /// Its files are made elsewhere.
    #[error(
        "the image `{from}` is a NixOS, whose files come from its configuration: add the project's NixOS module there instead"
    )]
    NixOs {
        /// The base.
        from: String,
    },
    /// Nothing would start the agent.
    #[error(
        "the virtual machine that was made from `{from}` has none of systemd, OpenRC and busybox's init (its first process is \
         {init}), so that nothing would start pika-guest: begin with an image that has one"
    )]
    NoInit {
        /// The base.
        from: String,
        /// What runs as its first process.
        init: String,
    },
    /// The agent could not be put in.
    #[error(transparent)]
    Put(#[from] PutError),
    /// What the host has to put in is of another release than the host.
    #[error(
        "the host's own pika-guest at {} ({agent}) speaks protocol {protocol} with schema version {schema_version}, and this \
         pika-cloud another: install both of one release, or name the right one with --agent PATH", path.display()
    )]
    OtherContract {
        /// The host's own agent.
        path: PathBuf,
        /// Its release.
        agent: String,
        /// The session protocol that it speaks.
        protocol: u32,
        /// The version of the documents that it writes.
        schema_version: u32,
    },
    /// Something failed in the builder.
    #[error("{doing} in the builder failed: {problem}")]
    Builder {
        /// What was tried.
        doing: String,
        /// What it said.
        problem: String,
    },
    /// The provisioning script failed.
    #[error("the provisioning script {} ended with exit code {code}: nothing is baked", script.display())]
    Provision {
        /// The script.
        script: PathBuf,
        /// Its exit code.
        code: i64,
    },
    /// Nobody knows how it ended: the builder stopped, say.
    #[error("the provisioning script {} was cut short, its exit code is not known: nothing is baked", script.display())]
    ProvisionCut {
        /// The script.
        script: PathBuf,
    },
    /// It takes too long.
    #[error("the provisioning script {} was not done after {} s: nothing is baked; give it more with --timeout SECS", script.display(), after.as_secs())]
    ProvisionTimedOut {
        /// The script.
        script: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// Its own files or script did something to the agent.
    #[error(
        "the files or the provisioning script changed what was put in for pika-guest: {problem}: nothing is baked; leave its files \
         as they are, what a unit of it is to do beside, a drop-in says"
    )]
    AgentChanged {
        /// What is no longer as it was.
        problem: String,
    },
    /// It was published, and is not there.
    #[error("the image was published, and Incus has none of this bake: was it deleted? Bake again")]
    Vanished,
    /// Nobody knows which image was published.
    #[error(
        "Incus does not know any more which image it published, and {count} without an alias say that they are of this bake: \
         whoever made the others (`incus image list` shows them) should delete them; bake again"
    )]
    Unclear {
        /// How many say so.
        count: usize,
    },
    /// The alias was changed again and again meanwhile.
    #[error("the alias `{alias}` was changed by others each time that it was to be moved: bake again")]
    AliasRaced {
        /// The alias.
        alias: String,
    },
    /// It was ended on request.
    #[error("interrupted: nothing is baked")]
    Interrupted,
    /// It failed, and what was made for it could not be removed.
    #[error(
        "{why}; what was made for it is still there ({left}): `pika-cloud reconcile`, or the next bake, of the same state dir removes it"
    )]
    Left {
        /// Why nothing was baked.
        #[source]
        why: Box<BakeError>,
        /// What is left, and why.
        left: String,
    },
}

impl BakeError {
    /// Whether the same order may succeed a little later: Incus is starting, stopping or busy, a connection broke, or others were at
    /// the same alias or image. An Incus that is not there at all looks the same.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Incus { source, .. } | Self::Put(PutError::Incus { source, .. }) => source.is_transient(),
            Self::Put(PutError::NotRunning { code, .. } | PutError::NotStored { code, .. }) => code.is_none(),
            Self::Vanished | Self::AliasRaced { .. } | Self::ProvisionCut { .. } => true,
            Self::Left { why, .. } => why.is_transient(),
            _ => false,
        }
    }

    /// Whether it was ended on request, and nothing else went wrong but maybe the removing.
    pub fn is_interrupted(&self) -> bool {
        match self {
            Self::Interrupted => true,
            Self::Left { why, .. } => why.is_interrupted(),
            _ => false,
        }
    }

    /// An answer of Incus to something that was tried.
    pub(super) fn incus(doing: &'static str) -> impl FnOnce(incus::Error) -> Self {
        move |source| Self::Incus { doing: doing.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        let incus = |code: u16| {
            let source = incus::Error::Refused { request: "GET /1.0".to_owned(), code, message: String::new() };
            BakeError::Incus { doing: "looking".to_owned(), source }
        };
        let left = |why: BakeError| BakeError::Left { why: Box::new(why), left: "its builder".to_owned() };
        for passing in [incus(503), BakeError::Vanished, left(incus(503))] {
            assert!(passing.is_transient() && !passing.is_interrupted(), "{passing}");
        }
        for lasting in [incus(400), BakeError::NoShell { from: "base".to_owned() }, left(BakeError::Interrupted)] {
            assert!(!lasting.is_transient(), "{lasting}");
        }
        assert!(left(BakeError::Interrupted).is_interrupted());
    }
}

//! The steps of a bake, one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pika_cloud_common::SCHEMA_VERSION;
use pika_cloud_common::wire::PROTOCOL;
use tokio::fs::File;
use tokio::sync::watch;

use super::command::is_plain;
use super::error::BakeError;
use super::guest::{Builder, FILE_LIMIT, NotUp, Provisioned, STEP_LIMIT};
use super::install::{AGENT_PATH, CHECK_AGENT, MAKE_GROUP, SCRIPT_PATH, SETTLE_SYSTEMD};
use super::probe::{self, Init, PROBE, Probed};
use super::record::{self, Held, Taken};
use super::swap::swap;
use super::tidy::{Tidied, TidyError, short, tidy};
use super::{
    Bake, BakeProgress, Baked, PROPERTY_AGENT_DIGEST, PROPERTY_AGENT_VERSION, PROPERTY_BAKE, PROPERTY_BASE_ALIAS,
    PROPERTY_BASE_FINGERPRINT, PROPERTY_OWNER, PROPERTY_PROTOCOL, PROPERTY_SCHEMA_VERSION, claimed, digest_text,
};
use crate::agent_binary::AgentBinary;
use crate::cloud::{Cloud, wished};
use crate::incus::{BuilderLabels, Client, Error, Image, InstanceState, PUBLISH_LIMIT, builder_request};
use crate::transport::{AgentVersion, PutError, agent_version, put_agent};
use crate::words::one_line;

/// How long a builder may take to come up.
const CONTAINER_UP: Duration = Duration::from_secs(60);
/// A virtual machine boots a kernel first, maybe without the help of the host's processor.
const MACHINE_UP: Duration = Duration::from_secs(600);

/// How long a builder may take to shut down, before it is stopped.
const SHUT_DOWN: Duration = Duration::from_secs(60);
/// One whose init may not know Incus's signal.
const SHUT_DOWN_UNSURE: Duration = Duration::from_secs(10);

/// What a bake takes beside what is counted in [`longest`], at most.
const EXPIRY_MARGIN: Duration = Duration::from_secs(3600);

/// How long is waited for what Incus still does, once a bake is over.
const TIDY_LIMIT: Duration = Duration::from_secs(300);

/// What is told on the way.
type Tell<'a> = &'a mut (dyn FnMut(BakeProgress<'_>) + Send);

impl Cloud {
    /// Makes an image with the agent in it of one without, and points an alias to it. See the [module](crate::bake) for what is
    /// in it, and for what is left after a crash.
    ///
    /// The alias is moved last. Whatever fails before, and `cancel` turning true, leave it as it was, and nothing else behind:
    /// this returns only when that is so, or says what is left ([`BakeError::Left`], [`Baked::left`]). That takes seconds; up to
    /// five minutes where Incus is still making or publishing something, and ten where it hardly answers. Dropping the future
    /// leaves at once, and is as good as a crash. Once the alias is being moved, `cancel` is no longer looked at;
    /// [`BakeProgress::Baked`] says that it was moved.
    ///
    /// The image that the alias had before is deleted, if it was baked from this state dir and nothing else needs it. Files and
    /// script are read when their turn comes, and not held by the image: whoever may bake anew keeps the order.
    ///
    /// Several bakes at once do not disturb each other. Of two of one alias, the one that moves it last has it, and deletes what
    /// the other made.
    ///
    /// # Errors
    /// Where the order cannot be carried out, the provisioning script fails, Incus does, or it was cancelled
    /// ([`BakeError::is_interrupted`]).
    pub async fn bake(
        &self,
        order: &Bake,
        tell: Tell<'_>,
        mut cancel: watch::Receiver<bool>,
    ) -> Result<Baked, BakeError> {
        order.check()?;
        let prepare = async {
            // First: what it looks up after that is still there when the builder is made.
            self.tidy_dead_bakes().await;
            let (base, from_profiles) = self.base(order).await?;
            let agent = self.agent().fetch(&base.architecture).await?;
            Ok::<_, BakeError>((base, from_profiles, agent))
        };
        let (base, from_profiles, agent) = tokio::select! {
            biased;
            () = wished(&mut cancel) => return Err(BakeError::Interrupted),
            prepared = prepare => prepared?,
        };
        let mut held = Held::begin(self.state(), &order.project, &order.to)?;
        tell(BakeProgress::Step(&format!("{} from {} ({})", order.to, order.from, short(&base.fingerprint))));
        let baking = Baking {
            cloud: self,
            order,
            base: &base,
            from_profiles: &from_profiles,
            agent: &agent,
            bake: held.record().bake.clone(),
        };
        let made = tokio::select! {
            biased;
            () = wished(&mut cancel) => Err(BakeError::Interrupted),
            made = baking.make(&mut held, tell) => made,
        };
        // Not interrupted: nobody would know where the alias points to.
        let baked = match made {
            Ok(made) => {
                tell(BakeProgress::Step(&format!("pointing {} to {}", order.to, short(&made.fingerprint))));
                let swapped = swap(self.incus(), &mut held, &made.fingerprint).await;
                if swapped.is_ok() {
                    tell(BakeProgress::Baked(&made.fingerprint));
                }
                swapped.map(|foreign| Baked { foreign, ..made })
            }
            Err(error) => Err(error),
        };
        tell(BakeProgress::Step("removing the builder, and what is replaced"));
        let tidying = tidy(self.incus(), self.state().owner(), held, TIDY_LIMIT);
        // Calls have limits of their own, whose sum is too long. Given up, it is as good as a crash.
        let tidied = tokio::time::timeout(TIDY_LIMIT * 2, tidying).await;
        conclude(baked, tidied.unwrap_or(Ok(Tidied { unfinished: Some("Incus takes too long"), ..Tidied::default() })))
    }

    /// What dead bakes left goes with the next one, as far as that needs no waiting. What fails is found again.
    async fn tidy_dead_bakes(&self) {
        for bake in record::list(self.state()) {
            let Ok(Taken::Held(held)) = Held::take(self.state(), &bake) else { continue };
            if let Err(error) = tidy(self.incus(), self.state().owner(), held, Duration::ZERO).await {
                tracing::warn!("what an earlier bake left is still there: {error}");
            }
        }
    }

    /// Looks everything up that the order names, before anything is made. Gives the base, and the keys that the profiles set.
    async fn base(&self, order: &Bake) -> Result<(Image, BTreeSet<String>), BakeError> {
        let client = self.incus();
        let looking = || BakeError::incus("looking at what Incus has");
        let server = client.server().await.map_err(looking())?;
        let project = &order.project;
        if !client.has_project(project).await.map_err(looking())? {
            let way_out = format!("make it (incus project create {project}), or name another one with --project");
            return Err(missing("project", project, "", way_out));
        }
        let mut from_profiles = BTreeSet::new();
        for name in &order.profiles {
            let Some(profile) = client.profile(project, name).await.map_err(looking())? else {
                let way_out = "name another one with --profile; `incus profile list` shows those that are".to_owned();
                return Err(missing("profile", name, project, way_out));
            };
            from_profiles.extend(profile.config.into_keys());
        }
        let Some(base) = client.image(project, &order.from).await.map_err(looking())? else {
            return Err(missing("image", &order.from, project, way_to_base(&order.from)));
        };
        if base.kind == "virtual-machine" && !server.environment.driver.contains("qemu") {
            return Err(BakeError::NoMachines { from: order.from.clone() });
        }
        if let Some(bytes) = base.too_many_properties() {
            return Err(BakeError::Properties { from: order.from.clone(), project: project.to_owned(), bytes });
        }
        let earlier = client.image(project, &order.to).await.map_err(looking())?;
        match earlier.filter(|earlier| earlier.kind != base.kind) {
            Some(earlier) => Err(BakeError::OtherKind {
                alias: order.to.clone(),
                found: earlier.kind,
                from: order.from.clone(),
                kind: base.kind,
            }),
            None => Ok((base, from_profiles)),
        }
    }
}

/// How to come by an image of that alias, or by an alias of what is no name of one.
fn way_to_base(from: &str) -> String {
    let is_plain = is_plain(from);
    let is_fingerprint = (12..=64).contains(&from.len()) && from.bytes().all(|byte| byte.is_ascii_hexdigit());
    let how = match from.split_once(':') {
        Some((remote, _)) if is_plain && remote != "local" => {
            format!("it has to be an alias of this Incus: copy it (incus image copy {from} local: --alias NAME)")
        }
        None if is_fingerprint => {
            format!("where it is a fingerprint, give it an alias first (incus image alias create NAME {from})")
        }
        _ => {
            let name = if is_plain && !from.contains(':') { from } else { "NAME" };
            format!(
                "copy one (incus image copy images:debian/12 local: --alias {name}), or import one (incus image import FILE --alias \
                 {name})"
            )
        }
    };
    format!("{how}; `incus image list` shows those that are")
}

fn missing(what: &'static str, name: &str, project: &str, way_out: String) -> BakeError {
    BakeError::Missing { what, name: name.to_owned(), project: project.to_owned(), way_out }
}

/// What came of it, together with what is left of it.
fn conclude(baked: Result<Baked, BakeError>, tidied: Result<Tidied, TidyError>) -> Result<Baked, BakeError> {
    let (deleted, kept, left) = match tidied {
        Ok(Tidied { deleted, kept, unfinished }) => (deleted, kept, unfinished.map(str::to_owned)),
        Err(error) => (Vec::new(), Vec::new(), Some(error.to_string())),
    };
    match (baked, left) {
        (Ok(mut baked), left) => {
            baked.deleted = deleted;
            baked.kept = kept;
            baked.left = left;
            Ok(baked)
        }
        (Err(why), left) => {
            let left = kept.into_iter().chain(left).collect::<Vec<_>>().join("; ");
            Err(if left.is_empty() { why } else { BakeError::Left { why: Box::new(why), left } })
        }
    }
}

/// How long a bake may take at most.
fn longest(order: &Bake, is_machine: bool) -> Duration {
    let up = if is_machine { MACHINE_UP } else { CONTAINER_UP };
    let files = order.files.iter().fold(Duration::ZERO, |sum, _| sum.saturating_add(FILE_LIMIT));
    // The script comes over as a file does.
    [up, files, FILE_LIMIT, order.provision_limit, PUBLISH_LIMIT]
        .into_iter()
        .fold(EXPIRY_MARGIN, Duration::saturating_add)
}

/// A bake that goes on.
struct Baking<'a> {
    cloud: &'a Cloud,
    order: &'a Bake,
    base: &'a Image,
    /// Keys that the profiles set.
    from_profiles: &'a BTreeSet<String>,
    agent: &'a AgentBinary,
    bake: String,
}

impl Baking<'_> {
    fn client(&self) -> &Client {
        self.cloud.incus()
    }

    fn is_machine(&self) -> bool {
        self.base.kind == "virtual-machine"
    }

    /// Everything up to an image without a name.
    async fn make(&self, held: &mut Held, tell: Tell<'_>) -> Result<Baked, BakeError> {
        let name = held.record().builder();
        let builder = Builder { client: self.client(), project: &self.order.project, name: &name };
        tell(BakeProgress::Step(&format!("creating the builder {name}")));
        self.create(&name).await?;
        let init = self.up(&builder, tell).await?;
        tell(BakeProgress::Step(&format!("putting in pika-guest, started by {}", init.name())));
        let version = self.install(&builder, init).await?;
        self.provide(&builder, tell).await?;
        if !self.order.files.is_empty() || self.order.provision.is_some() {
            self.check_agent(&builder, init).await?;
        }
        tell(BakeProgress::Step("cleaning and stopping the builder"));
        builder.script("cleaning", init.clean()).await?;
        self.stop(&builder, init).await?;
        tell(BakeProgress::Step("publishing the image"));
        let fingerprint = self.publish(held, &name, &version).await?;
        Ok(Baked {
            bake: self.bake.clone(),
            fingerprint,
            base_fingerprint: self.base.fingerprint.clone(),
            init,
            agent_version: version.agent,
            agent_digest: digest_text(self.agent.digest),
            deleted: Vec::new(),
            foreign: None,
            kept: Vec::new(),
            left: None,
        })
    }

    async fn create(&self, name: &str) -> Result<(), BakeError> {
        let Bake { project, profiles, .. } = self.order;
        let labels = BuilderLabels {
            bake: self.bake.clone(),
            owner: self.cloud.state().owner().to_owned(),
            expires_at: self.cloud.clock().now().wall.saturating_add(longest(self.order, self.is_machine())),
        };
        let request = builder_request(&labels, profiles, self.from_profiles, self.base);
        let creating = self.client().create_instance(project, &request).await;
        creating.map_err(BakeError::incus("creating the builder"))?;
        let starting = self.client().start_instance(project, name).await;
        starting.map_err(BakeError::incus("starting the builder"))
    }

    /// Waits until it can be worked in, and learns its init.
    async fn up(&self, builder: &Builder<'_>, tell: Tell<'_>) -> Result<Init, BakeError> {
        let from = self.order.from.clone();
        let after = if self.is_machine() { MACHINE_UP } else { CONTAINER_UP };
        let output = builder.first(PROBE, after).await.map_err(|error| match error {
            NotUp::NoShell => BakeError::NoShell { from: from.clone() },
            NotUp::Late(problem) if self.is_machine() => BakeError::NoIncusAgent { from: from.clone(), problem, after },
            NotUp::Late(problem) => BakeError::NotReady { from: from.clone(), problem, after },
        })?;
        let Some(Probed { init, is_nixos, first }) = probe::read(&output) else {
            let problem = "it printed something else than what it was to print".to_owned();
            return Err(BakeError::Builder { doing: "looking for its init".to_owned(), problem });
        };
        match init {
            _ if is_nixos => return Err(BakeError::NixOs { from }),
            Init::None if self.is_machine() => return Err(BakeError::NoInit { from, init: first }),
            Init::Systemd => {
                tell(BakeProgress::Step("waiting for its units"));
                let state = builder.script("waiting for its units", SETTLE_SYSTEMD).await?;
                if state.trim_ascii() != b"running" {
                    let state = one_line(&String::from_utf8_lossy(&state));
                    tell(BakeProgress::Step(&format!("systemd says of the base that it is {state}; going on")));
                }
            }
            Init::OpenRc | Init::Busybox | Init::None => {}
        }
        Ok(init)
    }

    async fn install(&self, builder: &Builder<'_>, init: Init) -> Result<AgentVersion, BakeError> {
        let Builder { client, project, name } = *builder;
        let version = put_agent(client, project, name, self.agent, AGENT_PATH).await?;
        if (version.protocol, version.schema_version) != (PROTOCOL, SCHEMA_VERSION) {
            let AgentVersion { agent, protocol, schema_version, .. } = version;
            return Err(BakeError::OtherContract { path: self.agent.path.clone(), agent, protocol, schema_version });
        }
        builder.script("making the group pika-cloud", MAKE_GROUP).await?;
        for file in init.files() {
            builder.put_text(file).await?;
        }
        if let Some(script) = init.enable() {
            builder.script("enabling pika-guest", script).await?;
        }
        Ok(version)
    }

    /// What the order itself wants in it.
    async fn provide(&self, builder: &Builder<'_>, tell: Tell<'_>) -> Result<(), BakeError> {
        for file in &self.order.files {
            tell(BakeProgress::Step(&format!("putting in {}", file.dest)));
            let bad = |error: std::io::Error| BakeError::File { file: file.to_string(), problem: error.to_string() };
            let source = File::open(&file.source).await.map_err(bad)?;
            let size = source.metadata().await.map_err(bad)?.len();
            builder.put(&file.dest, source, size, file.mode()).await?;
        }
        let Some(path) = &self.order.provision else { return Ok(()) };
        tell(BakeProgress::Step(&format!("running {}", path.display())));
        let bad = |error: std::io::Error| BakeError::Script { path: path.clone(), problem: error.to_string() };
        let source = File::open(path).await.map_err(bad)?;
        let size = source.metadata().await.map_err(bad)?.len();
        builder.put(SCRIPT_PATH, source, size, 0o700).await?;
        let limit = self.order.provision_limit;
        let ended = builder.provision(SCRIPT_PATH, limit, |bytes| tell(BakeProgress::Output(bytes))).await;
        let script = path.clone();
        match ended.map_err(BakeError::incus("running the provisioning script"))? {
            Provisioned::Ended(0) => Ok(()),
            Provisioned::Ended(code) => Err(BakeError::Provision { script, code }),
            Provisioned::Cut => Err(BakeError::ProvisionCut { script }),
            Provisioned::TimedOut => Err(BakeError::ProvisionTimedOut { script, after: limit }),
        }
    }

    /// That the order's own files and script left the agent as it was put in: what the image's properties say of it must hold.
    async fn check_agent(&self, builder: &Builder<'_>, init: Init) -> Result<(), BakeError> {
        let Builder { client, project, name } = *builder;
        let changed = |problem: String| Err(BakeError::AgentChanged { problem });
        match agent_version(client, project, name, AGENT_PATH).await {
            Ok(version) if version.digest() == Some(self.agent.digest) => {}
            Ok(_) => return changed(format!("{AGENT_PATH} is another program")),
            // That says nothing of the program.
            Err(
                error @ (PutError::Incus { .. } | PutError::Unbounded { .. } | PutError::NotRunning { code: None, .. }),
            ) => return Err(error.into()),
            Err(error) => return changed(error.to_string()),
        }
        for file in init.lasting_files() {
            if !builder.has(file).await? {
                return changed(format!("{} is not as it was", file.path));
            }
        }
        for script in [CHECK_AGENT].into_iter().chain(init.check()) {
            let said = builder.script("looking whether pika-guest is as it was", script).await?;
            if let Some(problem) = String::from_utf8_lossy(&said).lines().next() {
                return changed(one_line(problem));
            }
        }
        Ok(())
    }

    /// Publishing refuses what runs. What does not end when it is asked to is stopped; all that is ours is on its disk.
    async fn stop(&self, builder: &Builder<'_>, init: Init) -> Result<(), BakeError> {
        let Builder { client, project, name } = *builder;
        let limit = if init == Init::Systemd || self.is_machine() { SHUT_DOWN } else { SHUT_DOWN_UNSURE };
        if init == Init::Busybox {
            // It does not know Incus's signal. exec ends with the instance, so that nothing is said of how.
            let asked = tokio::time::timeout(STEP_LIMIT, builder.script("asking it to stop", "sync; poweroff")).await;
            tracing::debug!("poweroff: {asked:?}");
        }
        if let Err(error) = client.shut_down_instance(project, name, limit).await {
            tracing::debug!("the builder does not shut down: {error}");
        }
        let fail = || BakeError::incus("stopping the builder");
        let view = client.instance(project, name).await.map_err(fail())?;
        if view.is_some_and(|view| view.state() != InstanceState::Stopped) {
            client.stop_instance(project, name).await.map_err(fail())?;
        }
        Ok(())
    }

    async fn publish(&self, held: &mut Held, name: &str, version: &AgentVersion) -> Result<String, BakeError> {
        let project = &self.order.project;
        let fail = || BakeError::incus("publishing the image");
        held.publishing(None)?;
        let operation = self.client().begin_publish(project, name, &self.properties(version)).await.map_err(fail())?;
        held.publishing(Some(operation.clone()))?;
        let said = match self.client().wait_published(&operation).await {
            Ok(said) => said,
            // It is read below whether there is an image.
            Err(Error::OperationLost { .. }) => None,
            Err(error) => return Err(fail()(error)),
        };
        let image = if let Some(fingerprint) = said {
            self.client().image_of(project, &fingerprint).await.map_err(fail())?
        } else {
            let images = self.client().images(project).await.map_err(fail())?;
            match claimed(&images, &self.bake, self.cloud.state().owner())[..] {
                [] => None,
                [image] => Some(image.clone()),
                ref several => return Err(BakeError::Unclear { count: several.len() }),
            }
        };
        let image = image.ok_or(BakeError::Vanished)?;
        held.published(&image)?;
        Ok(image.fingerprint)
    }

    /// The base's own, and ours.
    fn properties(&self, version: &AgentVersion) -> BTreeMap<String, String> {
        let mut all = self.base.properties.clone();
        all.extend(
            [
                (PROPERTY_AGENT_VERSION, version.agent.clone()),
                (PROPERTY_AGENT_DIGEST, digest_text(self.agent.digest)),
                (PROPERTY_PROTOCOL, version.protocol.to_string()),
                (PROPERTY_SCHEMA_VERSION, version.schema_version.to_string()),
                (PROPERTY_BASE_FINGERPRINT, self.base.fingerprint.clone()),
                (PROPERTY_BASE_ALIAS, self.order.from.clone()),
                (PROPERTY_BAKE, self.bake.clone()),
                (PROPERTY_OWNER, self.cloud.state().owner().to_owned()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_names_no_alias_is_told_how_to_come_by_one() {
        let names = |from: &str, words: &str| assert!(way_to_base(from).contains(words), "{}", way_to_base(from));
        names("debian", "images:debian/12 local: --alias debian)");
        names("images:alpine/3.20", "incus image copy images:alpine/3.20 local: --alias NAME");
        names("local:x", "incus image copy images:debian/12 local: --alias NAME");
        names("0123456789ab", "incus image alias create NAME 0123456789ab");
        names("x; id", "--alias NAME)");
    }

    /// What is left does not hide why there is no image.
    #[test]
    fn an_interrupted_bake_is_one_whatever_is_left_of_it() {
        let left = Ok(Tidied { unfinished: Some("Incus is still publishing"), ..Tidied::default() });
        let error = conclude(Err(BakeError::Interrupted), left).unwrap_err();
        assert!(error.is_interrupted() && error.to_string().contains("pika-cloud reconcile"), "{error}");
        assert!(!BakeError::Vanished.is_interrupted());
    }

    /// From then on others take its builder for one that nobody bakes in.
    #[test]
    fn a_bake_is_over_before_its_builder_expires() {
        let mut order = Bake::new("base", "ci");
        order.provision_limit = Duration::from_secs(7200);
        order.files = vec!["a:/b".parse().unwrap(); 3];
        let all = order.provision_limit + PUBLISH_LIMIT + FILE_LIMIT * 4;
        assert!(longest(&order, false) >= all + CONTAINER_UP);
        assert!(longest(&order, true) >= all + MACHINE_UP + SHUT_DOWN);
        order.provision_limit = Duration::MAX;
        assert_eq!(longest(&order, true), Duration::MAX, "it does not overflow");
    }
}

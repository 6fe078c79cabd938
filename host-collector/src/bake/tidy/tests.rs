use serde_json::{Value, json};

use super::super::fake::{Fake, Said};
use super::super::{PROPERTY_BAKE, PROPERTY_OWNER};
use super::*;
use crate::state_dir::StateDir;

fn record(publishing: bool, replaced: &[&str]) -> Record {
    Record {
        bake: "0123456789abcdef0123456789abcdef".to_owned(),
        project: "default".to_owned(),
        to: "ci".to_owned(),
        publishing,
        replaced: replaced.iter().map(|fingerprint| (*fingerprint).to_owned()).collect(),
        ..Record::default()
    }
}

fn nothing() -> Found {
    Found {
        builder: Builder::Absent,
        is_told: true,
        publishing: false,
        creating: false,
        is_recent: false,
        images: Vec::new(),
    }
}

/// Of ours, without a name, used by nobody.
fn image(fingerprint: &str, is_own: bool) -> Seen {
    let whose = if is_own { Whose::Own } else { Whose::Earlier };
    Seen { fingerprint: fingerprint.to_owned(), whose, aliases: Vec::new(), is_public: false, users: Vec::new() }
}

fn used(seen: Seen) -> Seen {
    Seen { users: vec!["job-7".to_owned()], ..seen }
}

fn delete(fingerprint: &str) -> Vec<Step> {
    vec![Step::DeleteImage(fingerprint.to_owned())]
}

#[test]
fn a_bake_that_left_nothing_is_over() {
    assert_eq!(plan(&record(true, &["old"]), &nothing()), []);
}

#[test]
fn a_builder_goes_and_one_that_comes_is_waited_for() {
    let builder = |builder| plan(&record(false, &[]), &Found { builder, ..nothing() });
    assert_eq!(builder(Builder::Ours), [Step::EndBuilder]);
    assert!(matches!(builder(Builder::Coming)[..], [Step::Wait(_)]));
}

/// What is absent may still come, and what is used not be seen.
#[test]
fn where_incus_does_not_say_what_it_does_no_image_goes() {
    let images = vec![image("new", true), image("old", false)];
    let found = Found { is_told: false, builder: Builder::Ours, images, ..nothing() };
    assert!(matches!(plan(&record(true, &["old"]), &found)[..], [Step::EndBuilder, Step::Wait(_)]));
    let found = Found { is_told: false, ..nothing() };
    assert!(matches!(plan(&record(false, &[]), &found)[..], [Step::Wait(_)]));
}

/// Publishing goes on in Incus after the bake that asked for it: its image may come late.
#[test]
fn an_image_that_may_still_come_is_waited_for() {
    let found = Found { publishing: true, builder: Builder::Ours, images: vec![image("new", true)], ..nothing() };
    let steps = plan(&record(true, &[]), &found);
    assert!(matches!(steps[..], [Step::EndBuilder, Step::Wait(_)]), "{steps:?}");
}

#[test]
fn an_image_without_a_name_was_published_and_not_swapped() {
    let found = |seen: Seen| Found { images: vec![seen], ..nothing() };
    assert_eq!(plan(&record(true, &[]), &found(image("new", true))), delete("new"));
    let named = Seen { aliases: vec!["ci".to_owned()], ..image("new", true) };
    assert_eq!(plan(&record(true, &[]), &found(named)), []);
    let kept = plan(&record(true, &[]), &found(used(image("new", true))));
    assert!(matches!(&kept[..], [Step::Keep { why, .. }] if why.contains("job-7")), "{kept:?}");
    let waits = plan(&record(true, &[]), &Found { creating: true, ..found(image("new", true)) });
    assert!(matches!(waits[..], [Step::Wait(_)]), "{waits:?}");
}

/// The call that was to give it the alias may still be on its way.
#[test]
fn an_image_that_was_about_to_get_the_alias_stays_for_a_moment() {
    let found = Found { is_recent: true, images: vec![image("new", true)], ..nothing() };
    assert_eq!(plan(&record(true, &[]), &found), delete("new"));
    let swapping = Record { swapping: true, ..record(true, &[]) };
    assert!(matches!(plan(&swapping, &found)[..], [Step::Wait(_)]));
    assert_eq!(plan(&swapping, &Found { is_recent: false, ..found }), delete("new"));
}

/// A bake that is over is remembered for as long as what it replaced is used; its own image is replaced meanwhile.
#[test]
fn an_image_that_had_the_alias_is_a_later_bakes_to_remove() {
    let record = Record { swapped: true, ..record(true, &["old"]) };
    let images = vec![used(image("old", false)), image("own", true)];
    let steps = plan(&record, &Found { images, ..nothing() });
    assert!(matches!(&steps[..], [Step::Keep { fingerprint, .. }] if fingerprint == "old"), "{steps:?}");
}

#[test]
fn a_replaced_image_goes_once_nothing_needs_it() {
    let old = || image("old", false);
    let plan = |change: Found, seen: Seen| plan(&record(true, &["old"]), &Found { images: vec![seen], ..change });
    assert_eq!(plan(nothing(), old()), delete("old"));
    assert!(matches!(plan(Found { creating: true, ..nothing() }, old())[..], [Step::Wait(_)]));
    assert!(matches!(plan(Found { is_recent: true, ..nothing() }, old())[..], [Step::Wait(_)]));
    let steps = plan(nothing(), used(old()));
    assert!(matches!(&steps[..], [Step::Keep { why, .. }] if why.contains("job-7")), "{steps:?}");
    let named = |name: &str| Seen { aliases: vec![name.to_owned()], ..old() };
    assert_eq!(plan(nothing(), named("ci")), [], "it never lost its place");
    let steps = plan(nothing(), named("stable"));
    assert!(matches!(&steps[..], [Step::Keep { why, .. }] if why.contains("stable")), "{steps:?}");
    let steps = plan(nothing(), Seen { is_public: true, ..old() });
    assert!(matches!(&steps[..], [Step::Keep { why, .. }] if why.contains("public")), "{steps:?}");
    // Invariant 4.
    assert_eq!(plan(nothing(), Seen { whose: Whose::Foreign, ..old() }), []);
    assert!(matches!(plan(nothing(), Seen { whose: Whose::Unclear, ..old() })[..], [Step::Keep { .. }]));
}

/// A state dir, and an Incus.
struct Rig {
    fake: Fake,
    state: StateDir,
    _folder: tempfile::TempDir,
}

/// What a [`Rig`]'s Incus has.
struct Has {
    images: Vec<Value>,
    instances: Vec<Value>,
    /// What it answers to a question for its operations.
    operations: (u16, Value),
    /// The fingerprint of what it published, while it knows.
    published: Option<&'static str>,
}

impl Default for Has {
    fn default() -> Self {
        Self { images: Vec::new(), instances: Vec::new(), operations: (200, json!({})), published: None }
    }
}

const OWNER: &str = "us";
const BAKE: &str = "0123456789abcdef0123456789abcdef";

/// As Incus shows one of a bake, or one that was published of an instance of that.
fn of_bake(fingerprint: &str, aliases: &[&str]) -> Value {
    let aliases: Vec<Value> = aliases.iter().map(|name| json!({ "name": name })).collect();
    json!({ "fingerprint": fingerprint, "project": "default", "aliases": aliases,
            "properties": { PROPERTY_BAKE: BAKE, PROPERTY_OWNER: OWNER } })
}

/// As Incus shows an instance that was made from an image.
fn made_from(fingerprint: &str, project: &str) -> Value {
    json!({ "name": "job-7", "project": project, "status": "Running", "config": { "volatile.base_image": fingerprint } })
}

fn view(fingerprint: &str) -> Image {
    serde_json::from_value(of_bake(fingerprint, &[])).unwrap()
}

impl Rig {
    fn new(mut has: Has) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        Self { fake: Fake::new(move |method, path, _| answer(&mut has, method, path)), state, _folder: folder }
    }

    /// A bake that died after it had asked for its image, long ago.
    fn died(&self, change: impl FnOnce(&mut Held)) -> Held {
        let mut held = Held::begin_as(&self.state, BAKE, "default", "ci").unwrap().unwrap();
        held.publishing(Some("/1.0/operations/x".to_owned())).unwrap();
        change(&mut held);
        let path = self.state.path().join(".bakes").join(BAKE).join("record.json");
        std::fs::File::open(path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        held
    }

    /// What was deleted, and what came of it.
    async fn tidy(&self, held: Held) -> (Vec<String>, Tidied) {
        let tidied = tidy(&self.fake.client, OWNER, held, Duration::from_secs(5)).await.unwrap();
        let deleted = |asked: String| Some(asked.strip_prefix("DELETE ")?.split(['/', '?']).nth(3)?.to_owned());
        (self.fake.asked().into_iter().filter_map(deleted).collect(), tidied)
    }
}

fn answer(has: &mut Has, method: &str, path: &str) -> Said {
    let name = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    match (method, path.split('?').next().unwrap()) {
        ("GET", "/1.0/operations") => Said::Answer(has.operations.0, has.operations.1.clone()),
        ("GET", "/1.0/operations/x") => match has.published {
            Some(fingerprint) => {
                Said::Answer(200, json!({ "id": "x", "status_code": 200, "metadata": { "fingerprint": fingerprint } }))
            }
            None => Said::Answer(404, json!({})),
        },
        ("GET", "/1.0/images") => Said::Answer(200, json!(has.images)),
        ("GET", "/1.0/instances") => Said::Answer(200, json!(has.instances)),
        ("GET", path) if path.starts_with("/1.0/instances/") => {
            match has.instances.iter().find(|instance| instance["name"] == name(path)) {
                Some(instance) => Said::Answer(200, instance.clone()),
                None => Said::Answer(404, json!({})),
            }
        }
        ("DELETE", path) => {
            has.images.retain(|image| image["fingerprint"] != name(path));
            has.instances.retain(|instance| instance["name"] != name(path));
            Said::Answer(200, json!({}))
        }
        other => panic!("{other:?}"),
    }
}

/// Whoever publishes an instance of an image has its properties in theirs.
#[tokio::test(start_paused = true)]
async fn only_the_image_that_was_published_is_its_own() {
    let images = || vec![of_bake("0e3", &[]), of_bake("de1", &[]), of_bake("de2", &["mine"])];
    let rig = Rig::new(Has { images: images(), ..Has::default() });
    let (deleted, tidied) = rig.tidy(rig.died(|held| held.published(&view("0e3")).unwrap())).await;
    assert_eq!((deleted, tidied.kept), (vec!["0e3".to_owned()], vec![]));
    assert!(super::super::record::list(&rig.state).is_empty());

    // It died before it had heard which one, and Incus still knows.
    let rig = Rig::new(Has { images: images(), published: Some("0e3"), ..Has::default() });
    assert_eq!(rig.tidy(rig.died(|_| {})).await.0, ["0e3"]);

    // Incus does not: one that says so is believed, and of several none.
    let rig = Rig::new(Has { images: vec![of_bake("0e3", &[]), of_bake("de2", &["mine"])], ..Has::default() });
    assert_eq!(rig.tidy(rig.died(|_| {})).await.0, ["0e3"]);
    let rig = Rig::new(Has { images: images(), ..Has::default() });
    let (deleted, tidied) = rig.tidy(rig.died(|_| {})).await;
    assert_eq!((deleted.len(), tidied.kept.len()), (0, 2), "{tidied:?}");
    assert_eq!(super::super::record::list(&rig.state), [BAKE], "it is looked at again");
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_used_from_another_project_stays() {
    let has = Has { images: vec![of_bake("0e3", &[])], instances: vec![made_from("0e3", "other")], ..Has::default() };
    let rig = Rig::new(has);
    let (deleted, tidied) = rig.tidy(rig.died(|held| held.published(&view("0e3")).unwrap())).await;
    assert!(deleted.is_empty() && tidied.kept[0].contains("job-7"), "{tidied:?}");

    let creating = json!({ "running": [{ "id": "y", "status_code": 103, "description": "Creating instance",
                                         "resources": { "instances": ["/1.0/instances/job-8?project=other"] } }] });
    let rig = Rig::new(Has { images: vec![of_bake("0e3", &[])], operations: (200, creating), ..Has::default() });
    let (deleted, tidied) = rig.tidy(rig.died(|held| held.published(&view("0e3")).unwrap())).await;
    assert!(deleted.is_empty() && tidied.unfinished.is_some(), "{tidied:?}");
    let asked = rig.fake.asked();
    assert!(asked.iter().any(|asked| asked.ends_with("/1.0/operations?recursion=1&all-projects=true")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn operations_that_cannot_be_read_are_not_taken_for_none() {
    for code in [403, 500] {
        let has = Has { images: vec![of_bake("0e3", &[])], operations: (code, json!({})), ..Has::default() };
        let rig = Rig::new(has);
        let (deleted, tidied) = rig.tidy(rig.died(|held| held.published(&view("0e3")).unwrap())).await;
        assert!(deleted.is_empty() && tidied.unfinished.is_some(), "{code}: {tidied:?}");
        assert_eq!(super::super::record::list(&rig.state), [BAKE]);
    }
}

/// Whoever read its last alias before that went may still be about to make an instance of it.
#[tokio::test(start_paused = true)]
async fn an_image_that_was_needed_until_just_now_stays_for_a_moment() {
    let rig = Rig::new(Has { images: vec![of_bake("01d", &["stable"])], ..Has::default() });
    let replaced = |held: &mut Held| {
        held.published(&view("0e3")).unwrap();
        held.images().add(&view("01d")).unwrap();
        held.replaces("01d").unwrap();
    };
    let (deleted, tidied) = rig.tidy(rig.died(replaced)).await;
    assert!(deleted.is_empty() && tidied.kept[0].contains("stable"), "{tidied:?}");

    let rig = Rig::new(Has { images: vec![of_bake("01d", &[])], ..Has::default() });
    let needed = |held: &mut Held| {
        replaced(held);
        held.keeps(vec!["01d".to_owned()]).unwrap();
    };
    let (deleted, tidied) = rig.tidy(rig.died(needed)).await;
    assert!(deleted.is_empty() && tidied.unfinished.is_some_and(|what| what.contains("alias")), "{tidied:?}");
    let rig = Rig::new(Has { images: vec![of_bake("01d", &[])], ..Has::default() });
    assert_eq!(rig.tidy(rig.died(replaced)).await.0, ["01d"]);
}

/// An alias may move between a look and what was concluded from it.
#[tokio::test(start_paused = true)]
async fn images_are_looked_at_right_before_each_deletion() {
    let labels = json!({ "user.pika-cloud.builder": BAKE, "user.pika-cloud.owner": OWNER,
                         "user.pika-cloud.expires-at": "2027-01-01T00:00:00Z" });
    let builder =
        json!({ "name": "pika-bake-0123456789ab", "project": "default", "status": "Stopped", "config": labels });
    let images = ["0e3", "01d", "01e"].map(|fingerprint| of_bake(fingerprint, &[])).to_vec();
    let rig = Rig::new(Has { images, instances: vec![builder], ..Has::default() });
    let held = rig.died(|held| {
        for fingerprint in ["01d", "01e"] {
            held.images().add(&view(fingerprint)).unwrap();
            held.replaces(fingerprint).unwrap();
        }
        held.published(&view("0e3")).unwrap();
    });
    let (deleted, tidied) = rig.tidy(held).await;
    assert_eq!(deleted, ["pika-bake-0123456789ab", "0e3", "01d", "01e"]);
    assert_eq!(tidied.deleted, ["0e3", "01d", "01e"]);
    let asked = rig.fake.asked();
    for pair in asked.windows(2).filter(|pair| pair[1].starts_with("DELETE /1.0/images/")) {
        assert!(pair[0].starts_with("GET /1.0/images?"), "{pair:?}");
    }
}

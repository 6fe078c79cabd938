use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::hash;

use super::*;

const NOW: Duration = Duration::from_secs(1_800_000_000);
const US: &str = "us";
const THEM: &str = "them";

fn at(name: &str) -> InstanceName {
    InstanceName { project: "default".to_owned(), name: name.to_owned() }
}

fn seen(name: &str, change: impl FnOnce(&mut Labels)) -> Seen {
    let spec = serde_json::json!({
        "identity": { "runtime_id": name, "instance_name": name },
        "incus": { "image_alias": "ci", "instance_type": "container" },
        "entry_command": "make",
    });
    let spec = RuntimeSpec::from_json(&spec.to_string()).unwrap();
    let mut labels = Labels {
        runtime_id: name.to_owned(),
        spec_hash: hash(&spec),
        owner: US.to_owned(),
        term: 1,
        incarnation: 1,
        retention: RetentionPolicy::DestroyOnCompletion,
        expires_at: None,
        spec: Some(serde_json::to_string(&spec).unwrap()),
    };
    change(&mut labels);
    Seen { instance: at(name), labels: Some(labels) }
}

fn theirs(name: &str, expired: bool) -> Seen {
    seen(name, |labels| {
        THEM.clone_into(&mut labels.owner);
        labels.expires_at = expired.then_some(NOW);
    })
}

fn kept(labels: &mut Labels) {
    labels.retention = RetentionPolicy::KeepUntilStopped;
}

fn expired(labels: &mut Labels) {
    (labels.retention, labels.expires_at) = (RetentionPolicy::DebugKeep, Some(NOW));
}

fn local(name: &str, standing: Standing) -> LocalRuntime {
    LocalRuntime { runtime_id: name.to_owned(), instance: at(name), incarnation: 2, term: 1, standing }
}

const UNFINISHED: Standing = Standing::Unfinished { needs_spec: false };
const NEEDS_SPEC: Standing = Standing::Unfinished { needs_spec: true };
const FINISHED: Standing = Standing::Finished { destroyed: false };
const DESTROYED: Standing = Standing::Finished { destroyed: true };

fn volume(name: &str, owner: &str, in_use: bool) -> SeenVolume {
    SeenVolume {
        volume: VolumeName { project: "default".into(), pool: "pool".into(), name: format!("{name}-data") },
        labels: VolumeLabels { runtime_id: name.to_owned(), owner: owner.to_owned(), term: 4 },
        in_use,
    }
}

/// The steps, as `verb what`.
fn steps(local: &[LocalRuntime], seen: &[Seen], volumes: &[SeenVolume], options: &ReconcileOptions) -> Vec<String> {
    let steps = plan(local, seen, volumes, US, NOW, options);
    steps.iter().map(|step| format!("{} {}", step.verb(), step.name())).collect()
}

fn plain(local: &[LocalRuntime], seen: &[Seen]) -> Vec<String> {
    steps(local, seen, &[], &ReconcileOptions::default())
}

fn naming(ids: &[&str]) -> ReconcileOptions {
    ReconcileOptions { take_over: ids.iter().map(|id| (*id).to_owned()).collect(), ..ReconcileOptions::default() }
}

#[test]
fn what_a_dead_collector_left_is_adopted_or_ended() {
    let nothing: [&str; 0] = [];
    let (end, report) = (["end instance default/a"], ["report instance default/a"]);
    let with = |standing: Standing, change: fn(&mut Labels)| plain(&[local("a", standing)], &[seen("a", change)]);
    assert_eq!(with(UNFINISHED, |_| {}), ["adopt runtime a"]);
    assert_eq!(with(UNFINISHED, expired), ["adopt runtime a"], "its own collector ends it best");
    assert_eq!(with(NEEDS_SPEC, |_| {}), ["report runtime a"]);
    assert_eq!(with(NEEDS_SPEC, expired), ["cancel runtime a"]);
    assert_eq!(with(Standing::Driven, expired), nothing);
    assert_eq!(with(DESTROYED, kept), end);
    assert_eq!(with(FINISHED, |_| {}), end);
    assert_eq!(with(FINISHED, expired), end);
    assert_eq!(with(Standing::Kept, expired), nothing, "its journal knows since when");
    assert_eq!(with(FINISHED, kept), nothing, "its policy keeps it");
    assert_eq!(with(Standing::NotBegun, |_| {}), end);
    assert_eq!(with(Standing::Unreadable(String::new()), |_| {}), ["report runtime a", report[0]]);
    // Created and never seen again, or gone: the journal alone counts.
    assert_eq!(plain(&[local("a", UNFINISHED)], &[]), ["adopt runtime a"]);
    assert_eq!(plain(&[local("a", Standing::NotBegun), local("b", FINISHED)], &[]), nothing);
    // Without a journal.
    assert_eq!(plain(&[], &[seen("a", |_| {})]), end);
    assert_eq!(plain(&[], &[seen("a", expired)]), end);
    assert_eq!(plain(&[], &[seen("a", kept)]), report);
    assert_eq!(plain(&[], &[seen("a", |l| l.retention = RetentionPolicy::DebugKeep)]), report);
}

#[test]
fn an_instance_that_its_runtime_has_left_behind_is_ended() {
    let other = |standing: Standing, change: fn(&mut Labels)| {
        let seen = seen("b", |labels| {
            "a".clone_into(&mut labels.runtime_id);
            change(labels);
        });
        plain(&[local("a", standing)], &[seen])
    };
    assert_eq!(other(UNFINISHED, |_| {}), ["adopt runtime a", "end instance default/b"]);
    assert_eq!(other(UNFINISHED, |l| l.incarnation = 2), ["adopt runtime a", "report instance default/b"]);
    assert_eq!(other(UNFINISHED, kept), ["adopt runtime a", "report instance default/b"]);
    assert_eq!(other(FINISHED, |_| {}), ["end instance default/b"]);
    assert_eq!(other(FINISHED, kept), ["report instance default/b"]);
    assert_eq!(other(Standing::Driven, |_| {}), [""; 0]);
}

#[test]
fn one_whose_spec_no_label_holds_is_taken_over_only_to_be_ended() {
    let without = |mut seen: Seen| {
        seen.labels.as_mut().unwrap().spec = None;
        seen
    };
    assert_eq!(steps(&[], &[without(theirs("a", false))], &[], &naming(&["a"])), ["refuse instance default/a"]);
    assert_eq!(steps(&[], &[without(theirs("a", true))], &[], &naming(&["a"])), ["take_over instance default/a"]);
    let taken = without(seen("a", |labels| (labels.term, labels.expires_at) = (2, Some(NOW))));
    assert_eq!(plain(&[], &[taken]), ["end instance default/a"]);
}

/// Invariants 4 and 6.
#[test]
fn what_another_owner_holds_is_left_alone_unless_it_is_named() {
    let options = ReconcileOptions::default();
    let all = [theirs("a", false), theirs("b", true), Seen { instance: at("c"), labels: None }];
    let reports = ["report instance default/a", "report instance default/b", "report instance default/c"];
    assert_eq!(steps(&[], &all, &[], &options), reports);
    let expired = ReconcileOptions { take_over_expired: true, ..options };
    assert_eq!(steps(&[], &all, &[], &expired), [reports[0], "take_over instance default/b", reports[2]]);
    assert_eq!(steps(&[], &all, &[], &naming(&["a", "c"])), ["take_over instance default/a", reports[1], reports[2]]);
    // Taken over from us: it is not driven any more.
    let from_us = [of_term(2, THEM)];
    assert_eq!(steps(&[local("a", UNFINISHED)], &from_us, &[], &ReconcileOptions::default()), reports[..1]);
    assert_eq!(steps(&[local("a", UNFINISHED)], &from_us, &[], &naming(&["a"])), ["take_over instance default/a"]);
}

/// Of an incarnation that [`local`] knows of.
fn of_term(term: u64, owner: &str) -> Seen {
    seen("a", |labels| (labels.term, labels.owner) = (term, owner.to_owned()))
}

/// Invariant 4: incarnations and terms of another life of that name are counted from 1, too.
#[test]
fn an_earlier_life_of_that_name_says_nothing_of_this_one() {
    let named = |standing: Standing, term: u64, seen: Seen| {
        let local = LocalRuntime { term, ..local("a", standing) };
        steps(&[local], &[seen], &[], &naming(&["a"])).pop().unwrap_or_default()
    };
    let (take, refuse) = ("take_over instance default/a", "refuse instance default/a");
    // What was destroyed here is not there any more, whatever its terms were.
    assert_eq!(named(DESTROYED, 1, of_term(1, THEM)), refuse);
    assert_eq!(named(DESTROYED, 1, of_term(9, THEM)), refuse);
    // Taken over from us it would have a higher term.
    for standing in [UNFINISHED, FINISHED, Standing::Kept] {
        assert_eq!(named(standing.clone(), 3, of_term(3, THEM)), refuse, "{standing:?}");
        assert_eq!(named(standing.clone(), 3, of_term(4, THEM)), take, "{standing:?}");
    }
    // A later incarnation has a place of its own in the journal, after whatever ended there.
    let later = seen("a", |labels| {
        (labels.owner, labels.incarnation) = (THEM.to_owned(), 3);
    });
    assert_eq!(named(DESTROYED, 1, later), take);
}

#[test]
fn a_take_over_that_would_mix_runtimes_is_refused() {
    let refused = |local: &[LocalRuntime], seen: &[Seen]| {
        let steps = steps(local, seen, &[], &naming(&["a"]));
        assert!(steps.iter().all(|step| step.starts_with("refuse")), "{steps:?}");
    };
    let elsewhere = Seen { instance: at("z"), ..theirs("a", false) };
    refused(&[], &[theirs("a", false), elsewhere.clone()]);
    refused(&[local("a", FINISHED)], &[elsewhere]);
    refused(&[local("a", Standing::Driven)], &[theirs("a", false)]);
    let mut unreadable = theirs("a", false);
    unreadable.labels.as_mut().unwrap().spec = Some("{}".to_owned());
    refused(&[], &[unreadable]);
}

#[test]
fn a_take_over_that_was_cut_short_is_gone_on_with() {
    let taken = seen("a", |labels| labels.term = 2);
    let steps = plan(&[], &[taken], &[], US, NOW, &ReconcileOptions::default());
    let [Step::TakeOver { from, .. }] = steps.as_slice() else { panic!("{steps:?}") };
    assert_eq!(*from, Holder { owner: US.to_owned(), term: 2 });
    // A runtime of that name is known here, and not what was taken.
    let taken = |term, incarnation| seen("a", |labels| (labels.term, labels.incarnation) = (term, incarnation));
    let local = |standing, incarnation| LocalRuntime { incarnation, ..local("a", standing) };
    for local in [local(DESTROYED, 1), local(FINISHED, 1), local(FINISHED, 2), local(Standing::NotBegun, 0)] {
        let steps = plain(std::slice::from_ref(&local), &[taken(2, 2)]);
        assert_eq!(steps, ["take_over instance default/a"], "{local:?}");
        let ended = plain(std::slice::from_ref(&local), &[taken(1, 2)]);
        assert_eq!(ended, ["end instance default/a"], "made here, {local:?}");
    }
    assert_eq!(
        plain(&[local(DESTROYED, 2)], &[taken(2, 2)]),
        ["report instance default/a"],
        "nobody knows what that is"
    );
}

#[test]
fn only_orphans_of_ours_are_deleted_and_only_where_that_is_wanted() {
    let delete = ReconcileOptions { delete_orphan_volumes: true, ..ReconcileOptions::default() };
    let volumes = [
        volume("gone", US, false),
        volume("known", US, false),
        volume("used", US, true),
        volume("there", US, false),
        volume("foreign", THEM, false),
    ];
    let (local, there) = ([local("known", DESTROYED)], [theirs("there", false)]);
    let there_is = "report instance default/there";
    let gone = "volume pool/gone-data (default)";
    let plan = |options: &ReconcileOptions| steps(&local, &there, &volumes, options);
    assert_eq!(plan(&ReconcileOptions::default()), [there_is.to_owned(), format!("report {gone}")]);
    assert_eq!(plan(&delete), [there_is.to_owned(), format!("delete {gone}")]);
}

#[test]
fn a_volume_follows_its_runtime() {
    let take = |seen: &[Seen], volumes: &[SeenVolume]| {
        let steps = steps(&[], seen, volumes, &naming(&["a"]));
        steps.into_iter().filter(|step| step.contains("volume")).collect::<Vec<_>>()
    };
    let taken = ["take_over volume pool/a-data (default)"];
    assert_eq!(take(&[theirs("a", false)], &[volume("a", THEM, true), volume("b", THEM, true)]), taken);
    assert_eq!(take(&[], &[volume("a", THEM, false)]), taken, "by itself");
    assert_eq!(take(&[seen("a", |l| l.term = 2)], &[volume("a", THEM, true)]), taken, "behind its instance");
    assert_eq!(take(&[theirs("a", false)], &[volume("a", "others", false)]), [""; 0], "of another holder");
    assert_eq!(take(&[], &[volume("a", THEM, false), volume("a", "others", false)]), [""; 0], "whose of the two?");
}

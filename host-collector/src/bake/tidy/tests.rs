use super::*;

fn record(publishing: bool, replaced: &[&str]) -> Record {
    Record {
        bake: "0123456789abcdef0123456789abcdef".to_owned(),
        project: "default".to_owned(),
        to: "ci".to_owned(),
        publishing,
        operation: None,
        swapped: false,
        replaced: replaced.iter().map(|fingerprint| (*fingerprint).to_owned()).collect(),
    }
}

fn nothing() -> Found {
    Found { builder: Builder::Absent, publishing: false, creating: false, images: Vec::new() }
}

/// Of ours, without a name, used by nobody.
fn image(fingerprint: &str, is_own: bool) -> Seen {
    Seen { fingerprint: fingerprint.to_owned(), is_own, is_ours: true, is_named: false, users: Vec::new() }
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

/// Publishing goes on in Incus after the bake that asked for it: its image may come late.
#[test]
fn an_image_that_may_still_come_is_waited_for() {
    let found = Found { publishing: true, builder: Builder::Ours, images: vec![image("new", true)], ..nothing() };
    let steps = plan(&record(true, &[]), &found);
    assert!(matches!(steps[..], [Step::EndBuilder, Step::Wait(_)]), "{steps:?}");
    let other = plan(&record(false, &[]), &Found { publishing: true, ..nothing() });
    assert_eq!(other, [], "others publish as well, and this one asked for no image");
}

#[test]
fn an_image_without_a_name_was_published_and_not_swapped() {
    let found = |seen: Seen| Found { images: vec![seen], ..nothing() };
    assert_eq!(plan(&record(true, &[]), &found(image("new", true))), delete("new"));
    let named = Seen { is_named: true, ..image("new", true) };
    assert_eq!(plan(&record(true, &[]), &found(named)), []);
}

/// A bake that is over is remembered for as long as what it replaced is used; its own image is replaced meanwhile.
#[test]
fn an_image_that_had_the_alias_is_a_later_bakes_to_remove() {
    let record = Record { swapped: true, ..record(true, &["old"]) };
    let images = vec![Seen { users: vec!["job-7".to_owned()], ..image("old", false) }, image("own", true)];
    let steps = plan(&record, &Found { images, ..nothing() });
    assert!(matches!(&steps[..], [Step::Keep { fingerprint, .. }] if fingerprint == "old"), "{steps:?}");
}

#[test]
fn a_replaced_image_goes_once_nothing_needs_it() {
    let plan = |creating: bool, seen: Seen| {
        plan(&record(true, &["old"]), &Found { creating, images: vec![seen], ..nothing() })
    };
    assert_eq!(plan(false, image("old", false)), delete("old"));
    assert!(matches!(plan(true, image("old", false))[..], [Step::Wait(_)]));
    let used = Seen { users: vec!["job-7".to_owned()], ..image("old", false) };
    let steps = plan(false, used);
    assert!(matches!(&steps[..], [Step::Keep { why, .. }] if why.contains("job-7")), "{steps:?}");
    // It never lost its place, or has another name.
    assert_eq!(plan(false, Seen { is_named: true, ..image("old", false) }), []);
    // Invariant 4.
    assert_eq!(plan(false, Seen { is_ours: false, ..image("old", false) }), []);
}

//! A bake that dies at any moment leaves the old image or the new one, and nothing else once it is reconciled.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pika_cloud_tests::{
    BARE_IMAGE, Chance, Image, Incus, LIMIT, Running, Signal, Stage, eventually, files_below, image_of, until,
};
use serde_json::json;

/// As long as the script takes, there is more than publishing to be cut in.
const SCRIPT: &str = "sleep 0.3\n";

/// One bake into `image`, and how long it took.
fn first(stage: &Stage, image: &Image, more: &[&str]) -> Duration {
    let began = Instant::now();
    stage.bake(BARE_IMAGE, &image.alias, more).expect(0);
    began.elapsed()
}

fn script(stage: &Stage) -> String {
    let path = stage.more("provision.sh");
    std::fs::write(&path, SCRIPT).unwrap();
    path.display().to_string()
}

/// Waits out what is left of a moment since `began`.
fn at(began: Instant, moment: Duration) {
    std::thread::sleep(moment.saturating_sub(began.elapsed()));
}

#[test]
fn a_bake_that_is_killed_leaves_nothing_that_reconcile_does_not_remove() {
    let stage = Stage::new("bake-kill");
    let (image, script, mut chance) = (stage.alias("ci"), script(&stage), Chance::new("bake-kill"));
    let more = ["--provision", &*script];
    first(&stage, &image, &more);
    // With what the second has to do beside. While the image of the first is only waited for, nothing new can be cut.
    let (began, baking) = (Instant::now(), Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &more)));
    eventually("the alias is moved", || baking.said().contains("removing the builder"));
    let took = began.elapsed() * 11 / 10;
    baking.finish().expect(0);
    println!("a bake takes {took:?}, and then waits");
    let (mut swapped, mut left) = (0, 0);
    for round in 0..10u32 {
        let before = image_of(&image.alias).expect("the alias is there").fingerprint;
        // Each tenth of its length has a moment.
        let moment = took * round / 10 + chance.up_to(took / 10);
        let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &more));
        at(Instant::now(), moment);
        let said = baking.said();
        baking.kill();
        left += usize::from(!stage.builders().is_empty());
        let after = image_of(&image.alias).expect("the alias is there").fingerprint;
        let is_baked = stage.baked().iter().any(|baked| baked.fingerprint == after);
        assert!(is_baked, "the alias points to an image of ours; it had said {said}");
        swapped += usize::from(after != before);
        stage.call(&["reconcile"]).expect(0);
        let now = image_of(&image.alias).expect("the alias is there").fingerprint;
        assert_eq!(now, after, "reconcile moves no alias");
        println!("killed after {moment:?}: {}", said.lines().last().unwrap_or("it had said nothing"));
        stage.check_baked(1);
    }
    println!("{left} of 10 left a builder, {swapped} had moved the alias");
    first(&stage, &image, &more);
    stage.check_baked(1);
}

/// What is in a bake's record from a step on, and whether the alias must still be the old image's where it is cut right then.
const MARKS: [(&str, bool); 5] = [
    (r#""publishing":false"#, true),
    (r#""publishing":true"#, true),
    ("/1.0/operations/", true),
    (r#""swapping":true"#, false),
    (r#""replaced":[""#, false),
];

#[test]
fn a_bake_that_is_killed_at_each_of_its_steps_leaves_nothing_that_reconcile_does_not_remove() {
    let stage = Stage::new("bake-marks");
    let image = stage.alias("ci");
    first(&stage, &image, &[]);
    for (mark, is_before) in MARKS {
        let before = image_of(&image.alias).expect("the alias is there").fingerprint;
        let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &[]));
        let deadline = Instant::now() + LIMIT;
        loop {
            let records =
                files_below(&stage.state().join(".bakes")).into_iter().filter(|path| path.ends_with("record.json"));
            let is_marked = |path: PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains(mark));
            if records.into_iter().any(is_marked) && !stage.builders().is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{mark} never came: {}", baking.said());
        }
        baking.kill();
        assert!(!is_before || !stage.builders().is_empty(), "it was cut at {mark}, and its builder is there");
        let after = image_of(&image.alias).expect("the alias is there").fingerprint;
        assert!(!is_before || after == before, "the alias was moved before {mark}");
        println!("killed at {mark}: {}", finished_code(after != before));
        stage.call(&["reconcile"]).expect(0);
        assert_eq!(image_of(&image.alias).expect("the alias is there").fingerprint, after, "reconcile moves no alias");
        stage.check_baked(1);
    }
}

/// The record of a bake, another than `earlier`, once Incus has named the operation that makes its image.
fn published(stage: &Stage, earlier: Option<&PathBuf>) -> PathBuf {
    let publishes = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        path.ends_with("record.json") && text.contains("/1.0/operations/") && earlier != Some(path)
    };
    until("it publishes", LIMIT, || files_below(&stage.state().join(".bakes")).into_iter().find(publishes))
}

/// Incus goes on with what a dead bake asked for.
#[test]
fn an_image_that_was_published_after_its_bake_had_died_is_removed() {
    let stage = Stage::new("bake-late");
    let image = stage.alias("ci");
    first(&stage, &image, &[]);
    let named = stage.baked();
    let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &[]));
    let earlier = published(&stage, None);
    baking.kill();
    let unnamed = || stage.baked().into_iter().find(|baked| baked.aliases.is_empty());
    eventually("the image is there", || unnamed().is_some());
    let planned = stage.call(&["reconcile", "--dry-run"]).expect(0).stdout;
    assert!(planned.starts_with("tidy ") && planned.contains(&image.alias) && planned.contains("planned"), "{planned}");
    assert!(unnamed().is_some() && !stage.builders().is_empty(), "a dry run removes nothing");
    // What has its bake's id, and was named by a person meanwhile, is wanted.
    let fingerprint = unnamed().expect("it is there").fingerprint;
    let kept = stage.alias("kept");
    let body = json!({ "name": kept.alias, "target": fingerprint });
    Incus.change("POST", "/1.0/images/aliases", Some(&body)).unwrap();
    let again = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &[]));
    published(&stage, Some(&earlier));
    again.kill();
    eventually("the image is there", || unnamed().is_some());
    stage.call(&["reconcile"]).expect(0);
    stage.check_baked(2);
    assert_eq!(image_of(&image.alias), named.first().cloned());
    assert_eq!(image_of(&kept.alias).expect("it is there").fingerprint, fingerprint);
}

/// Without a reconciliation in between.
#[test]
fn a_bake_goes_after_one_that_was_killed_and_removes_what_that_left() {
    let stage = Stage::new("bake-after");
    let (image, script, mut chance) = (stage.alias("ci"), script(&stage), Chance::new("bake-after"));
    let more = ["--provision", &*script];
    let took = first(&stage, &image, &more);
    for _ in 0..3 {
        let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &more));
        at(Instant::now(), chance.up_to(took));
        baking.kill();
    }
    first(&stage, &image, &more);
    // What Incus was still at, the next one need not have waited for.
    stage.call(&["reconcile"]).expect(0);
    stage.check_baked(1);
}

#[test]
fn an_interrupted_bake_tidies_by_itself() {
    let stage = Stage::new("bake-interrupt");
    let (image, script, mut chance) = (stage.alias("ci"), script(&stage), Chance::new("bake-interrupt"));
    let more = ["--provision", &*script];
    let took = first(&stage, &image, &more);
    for (round, signal) in [Signal::INT, Signal::TERM, Signal::HUP, Signal::INT, Signal::INT].into_iter().enumerate() {
        let before = image_of(&image.alias).expect("the alias is there").fingerprint;
        let moment = took * u32::try_from(round).unwrap() / 5 + chance.up_to(took / 5);
        let baking = Running::start(&mut stage.bake_command(BARE_IMAGE, &image.alias, &more));
        // Signals are heard from its first word on.
        eventually("it said something", || !baking.said().is_empty());
        at(Instant::now(), moment.saturating_sub(took / 10));
        baking.signal(signal);
        let finished = baking.finish();
        let after = image_of(&image.alias).expect("the alias is there").fingerprint;
        match finished.code {
            // It was done already, or the alias was moved.
            Some(0) => assert_ne!(after, before),
            Some(130) => {
                finished.saying(&["interrupted"]);
                assert_eq!(after, before, "it says that nothing is baked");
            }
            code => panic!("{code:?}: {}", finished.stderr),
        }
        println!("{signal:?} after {moment:?}: {:?}", finished_code(after != before));
        stage.check_baked(1);
    }
}

fn finished_code(is_new: bool) -> &'static str {
    if is_new { "the new image" } else { "the old image" }
}

//! Images that should be baked anew: who is told, and of what.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use pika_cloud_tests::{Image, Incus, Lab, Stage, image_of};
use serde_json::{Value, json};

#[test]
fn doctor_and_run_tell_images_that_should_be_baked_anew() {
    let stage = Stage::new("stale");
    let (base, image) = (Image::bare(|_| {}), stage.alias("ci"));
    stage.bake(&base.alias, &image.alias, &[]).expect(0);
    let agent = Lab::get().agent.display().to_string();
    let doctor = |code: i32, agent: &str| stage.call(&["doctor", "--agent", agent]).expect(code).stdout;
    let about = |text: &str| -> Vec<String> {
        text.lines().skip_while(|line| !line.contains(&image.alias)).take(2).map(str::to_owned).collect()
    };
    assert_eq!(about(&doctor(0, &agent)), Vec::<String>::new());

    // Its base moved on, and the host has another agent by now.
    let newer = Image::bare(|_| {});
    let target = image_of(&newer.alias).unwrap().fingerprint;
    let old_base = image_of(&base.alias).unwrap().fingerprint;
    let point = |target: &str| {
        let body = json!({ "target": target, "description": "" });
        Incus.change("PUT", &format!("/1.0/images/aliases/{}", base.alias), Some(&body)).unwrap();
    };
    point(&target);
    let other_agent = stage.more("pika-guest");
    let mut bytes = fs::read(&agent).unwrap();
    bytes.push(0);
    fs::write(&other_agent, bytes).unwrap();
    fs::set_permissions(&other_agent, PermissionsExt::from_mode(0o755)).unwrap();
    let said = doctor(0, other_agent.to_str().unwrap());
    let mend = format!("pika-cloud bake --from {} --to {}", base.alias, image.alias);
    assert!(about(&said)[0].starts_with("stale ") && about(&said)[1].contains(&mend), "{said}");
    assert!(said.contains("is another one than this host's own") && said.contains(&target[..12]), "{said}");
    let spec = stage.baked_spec(&image, "exit 3");
    stage.start_with(&spec, &["--agent", &agent]).finish().expect(3).saying(&["it was baked from", &mend]);
    point(&old_base);
    Incus.change("DELETE", &format!("/1.0/images/{target}"), None).unwrap();

    // One that this host cannot talk to.
    let fingerprint = image_of(&image.alias).unwrap().fingerprint;
    let body = json!({ "properties": { "pika-cloud.protocol": "0" } });
    Incus.change("PATCH", &format!("/1.0/images/{fingerprint}"), Some(&body)).unwrap();
    let said = doctor(1, &agent);
    assert!(about(&said)[0].starts_with("missing ") && about(&said)[0].contains("protocol 0"), "{said}");
    assert!(about(&said)[1].contains(&mend), "{said}");
    let spec = stage.baked_spec(&image, "true");
    for command in ["ensure", "run"] {
        let refused = stage.call(&[command, stage.write(&spec).to_str().unwrap()]).expect(125);
        refused.saying(&["protocol 0", "protocol 1", &mend]);
    }
    assert!(!stage.has_instance(&spec), "nothing was touched");
}

/// By whatever alias a spec names an image, and beside an agent of the host's that cannot be used.
#[test]
fn doctor_tells_a_stale_image_by_each_alias() {
    let stage = Stage::new("aliases");
    let (base, image, other) = (Image::bare(|_| {}), stage.alias("ci"), stage.alias("a-second"));
    stage.bake(&base.alias, &image.alias, &[]).expect(0);
    let body = json!({ "name": other.alias, "target": image_of(&image.alias).unwrap().fingerprint });
    Incus.change("POST", "/1.0/images/aliases", Some(&body)).unwrap();
    let newer = Image::bare(|_| {});
    let body = json!({ "target": image_of(&newer.alias).unwrap().fingerprint, "description": "" });
    Incus.change("PUT", &format!("/1.0/images/aliases/{}", base.alias), Some(&body)).unwrap();

    let broken = stage.more("broken");
    fs::write(&broken, "no program").unwrap();
    let said = stage.call(&["doctor", "--agent", broken.to_str().unwrap()]).expect(1).stdout;
    assert!(said.contains("cannot be compared with the host's own agent"), "{said}");
    let rows = stage.call(&["doctor", "--json"]).expect(0).stdout;
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for alias in [&image.alias, &other.alias] {
        assert!(said.contains(&format!("stale    image `{alias}`: it was baked from")), "{said}");
        let mend = format!("pika-cloud bake --from {} --to {alias},", base.alias);
        let is_told = |row: &Value| row["finding"] == "stale" && row["mend"].as_str().unwrap().starts_with(&mend);
        assert!(rows.iter().any(is_told), "{rows:?}");
    }
}

//! The NixOS module's units are those that other images have: the agent's init files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::place;

/// Settings by section and name; of one that is given several times, all words.
type Settings = BTreeMap<String, Vec<String>>;

/// What differs, on which unit, and why. Of `ExecStart` only the program's folder may.
const OWN: [(&str, &str, &str); 1] =
    [("pika-guest-supervise@.service", "Service.Environment", "NixOS has no programs where others have them")];

fn read(path: &str) -> String {
    let path = place::root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn init(name: &str) -> String {
    read(&format!("guest-agent/init/systemd/{name}"))
}

fn golden(name: &str) -> String {
    read(&format!("nixos-module/tests/golden/plain/{name}"))
}

fn settings(unit: &str) -> Settings {
    let mut found = Settings::new();
    let mut section = "";
    for line in unit.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else {
            let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("`{line}` is no setting"));
            let words = value.split_whitespace().map(|word| plain(name, word.trim_matches('"')));
            found.entry(format!("{section}.{name}")).or_default().extend(words);
        }
    }
    found
}

/// A word, as it may be written in more than one way.
fn plain(name: &str, word: &str) -> String {
    match word {
        "true" => "yes".to_owned(),
        "false" => "no".to_owned(),
        program if name == "ExecStart" && program.ends_with("/bin/pika-guest") => "pika-guest".to_owned(),
        _ => word.to_owned(),
    }
}

fn differences(name: &str, init: &str, nix: &str) -> Vec<String> {
    let (init, nix) = (settings(init), settings(nix));
    let is_own = |key: &str| OWN.iter().any(|(unit, own, _)| (*unit, *own) == (name, key));
    init.keys()
        .chain(nix.keys().filter(|key| !init.contains_key(*key)))
        .filter(|key| init.get(*key) != nix.get(*key) && !is_own(key))
        .map(|key| format!("{name}: {key}: init file {:?}, NixOS {:?}", init.get(key), nix.get(key)))
        .collect()
}

#[test]
fn units_are_the_same_as_in_other_images() {
    let units = ["pika-guest.service", "pika-guest-supervise@.service", "pika-guest-supervise.socket"];
    let all: Vec<String> = units.iter().flat_map(|name| differences(name, &init(name), &golden(name))).collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn every_unit_of_the_init_files_is_compared() {
    let folder = place::root().join("guest-agent/init/systemd");
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let other = if name == "pika-cloud.tmpfiles" { "10-pika-cloud.tmpfiles" } else { &name };
        let path = place::root().join("nixos-module/tests/golden/plain").join(other);
        assert!(Path::new(&path).exists(), "the NixOS module has nothing for {name}");
    }
}

#[test]
fn the_tree_is_the_same_as_in_other_images() {
    let rules = |text: &str| {
        let fields = |line: &str| line.split_whitespace().filter(|field| *field != "-").map(str::to_owned).collect();
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let mut rules: Vec<Vec<String>> = lines.map(fields).collect();
        rules.sort();
        rules
    };
    assert_eq!(rules(&init("pika-cloud.tmpfiles")), rules(&golden("10-pika-cloud.tmpfiles")));
}

#[test]
fn a_setting_that_differs_is_found() {
    let unit = "[Service]\nExecStart=/usr/bin/pika-guest serve\nProtectHome=yes\nReadWritePaths=/a /b\n";
    let same = "[Service]\nExecStart=\"/nix/store/x/bin/pika-guest\" \"serve\"\nProtectHome=true\nReadWritePaths=/a\nReadWritePaths=/b\n";
    assert_eq!(differences("pika-guest.service", unit, same), Vec::<String>::new());
    for other in
        [same.replace("serve", "stream"), same.replace("true", "false"), same.replace("ReadWritePaths=/b\n", "")]
    {
        assert_eq!(differences("pika-guest.service", unit, &other).len(), 1, "{other}");
    }
    assert_eq!(differences("pika-guest.service", "", "[Unit]\nA=b").len(), 1);
}

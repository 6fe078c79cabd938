//! The NixOS module's checks, for a machine that has no NixOS, no nixpkgs and no network to fetch it over.
//!
//! ```text
//!   nixfmt, deadnix ── the sources
//!   nix eval        ── nixos-module/tests ── units as text ──┬── golden files
//!                       │                                    ├── systemd-analyze verify
//!                       │                                    └── systemd-analyze security, of the agent's own
//!                       └── configurations that must be refused, each with the option's name
//! ```
//!
//! What it runs with is installed where it is missing: Debian's `nix-bin` and `systemd`, and from crates.io the two programs that
//! read Nix, which are kept under `target/xtask/nix`. Nix itself has its store and its state there too, and writes nothing else.

#[cfg(test)]
mod parity;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cargo::cargo;
use crate::failure::{Failure, Result, Tried};
use crate::{debian, place, run, say};

/// Programs that read Nix: crate, version, and the name of the program.
const TOOLS: [(&str, &str, &str); 2] = [("nixfmt_rs", "0.5.3", "nixfmt"), ("deadnix", "1.3.1", "deadnix")];
/// Set, the golden files are written anew.
const UPDATE: &str = "PIKA_UPDATE";
/// The most that systemd may think the agent's unit exposed, in tenths.
const MAX_EXPOSURE: &str = "20";
/// Where the evaluated units have their programs.
const STORE: &str = "/nix/store/";

/// Files by their names, such as `plain/pika-guest.service`.
type Files = BTreeMap<String, String>;

/// Runs them all.
pub(crate) fn check() -> Result<()> {
    debian::provide_nix()?;
    let [nixfmt, deadnix] = [tool(TOOLS[0])?, tool(TOOLS[1])?];
    let sources = sources()?;
    say::step(&format!("Check the format of {} Nix files, and that nothing in them is unused", sources.len()));
    run::shown(Command::new(nixfmt).arg("--check").args(&sources))?;
    run::shown(Command::new(deadnix).arg("--fail").args(&sources))?;
    say::step("Evaluate the NixOS module");
    let files = evaluated()?;
    compare(&files)?;
    check_refusals()?;
    check_units(&files)
}

fn module() -> PathBuf {
    place::root().join("nixos-module")
}

fn kept() -> PathBuf {
    place::own().join("nix")
}

/// A program that comes as source only.
fn tool((package, version, program): (&str, &str, &str)) -> Result<PathBuf> {
    let root = kept().join(format!("{package}-{version}"));
    let path = root.join("bin").join(program);
    if path.exists() {
        return Ok(path);
    }
    say::step(&format!("Build {package} {version}"));
    let mut install = cargo(&["install", "--locked", "--version", version, package, "--root"]);
    // Built in a folder of its own, that is gone afterwards: nothing of it is of use to this workspace.
    install.arg(&root).env_remove("CARGO_TARGET_DIR");
    run::logged(&mut install, &place::own().join(format!("{package}.log")))?;
    Ok(path)
}

/// All of the project's Nix.
fn sources() -> Result<Vec<PathBuf>> {
    let mut found = vec![place::root().join("flake.nix")];
    let mut folders = vec![module()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).tried(format!("read {}", folder.display()))? {
            let path = entry.tried(format!("read {}", folder.display()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension() == Some(OsStr::new("nix")) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Evaluates an attribute of the tests, which is a text.
fn eval(attribute: &str) -> Command {
    let mut command = Command::new("nix");
    command.args(["eval", "--raw", "--file"]).arg(module().join("tests")).arg(attribute);
    command.env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command");
    for (name, folder) in [
        ("HOME", "home"),
        ("NIX_STORE_DIR", "store"),
        ("NIX_STATE_DIR", "state"),
        ("NIX_LOCALSTATE_DIR", "local"),
        ("NIX_LOG_DIR", "log"),
    ] {
        command.env(name, kept().join(folder));
    }
    command
}

/// The units and whatever else the module makes of the tests' configurations.
fn evaluated() -> Result<Files> {
    Ok(files_in(&run::captured(&mut eval("accepted"))?))
}

/// Files that each follow a line with `==> ` and their name.
fn files_in(text: &str) -> Files {
    let mut files = Files::new();
    let mut name = String::new();
    for line in text.split_inclusive('\n') {
        if let Some(next) = line.strip_prefix("==> ") {
            next.trim_end().clone_into(&mut name);
            files.insert(name.clone(), String::new());
        } else if let Some(file) = files.get_mut(&name) {
            file.push_str(line);
        }
    }
    files
}

/// Holds what was evaluated against the golden files, or writes those anew.
fn compare(files: &Files) -> Result<()> {
    let folder = module().join("tests/golden");
    if std::env::var_os(UPDATE).is_some() {
        say::step(&format!("Write {} golden files to {}", files.len(), folder.display()));
        return write(files, &folder);
    }
    let golden = read(&folder)?;
    let names: Vec<&String> = files.keys().chain(golden.keys().filter(|name| !files.contains_key(*name))).collect();
    let different: Vec<String> = names
        .into_iter()
        .filter(|name| files.get(*name) != golden.get(*name))
        .map(|name| describe(name, golden.get(name), files.get(name)))
        .collect();
    if different.is_empty() {
        say::step(&format!("All {} files are as their golden ones", files.len()));
        return Ok(());
    }
    Err(Failure::step(format!(
        "the NixOS module makes other files than {} holds ({UPDATE}=1 writes those anew; then look at the change):\n{}",
        folder.display(),
        different.join("\n")
    )))
}

/// What is only in the one, and only in the other.
fn describe(name: &str, golden: Option<&String>, file: Option<&String>) -> String {
    let lines = |text: Option<&String>| text.map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    let (before, now) = (lines(golden).unwrap_or_default(), lines(file).unwrap_or_default());
    let gone = before.iter().filter(|line| !now.contains(line)).map(|line| format!("  - {line}"));
    let come = now.iter().filter(|line| !before.contains(line)).map(|line| format!("  + {line}"));
    let all: Vec<String> = std::iter::once(name.to_owned()).chain(gone).chain(come).collect();
    all.join("\n")
}

fn read(folder: &Path) -> Result<Files> {
    let mut files = Files::new();
    let tried = |path: &Path| format!("read {}", path.display());
    for case in fs::read_dir(folder).tried(tried(folder))? {
        let case = case.tried(tried(folder))?.path();
        for file in fs::read_dir(&case).tried(tried(&case))? {
            let path = file.tried(tried(&case))?.path();
            let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
            files.insert(name, fs::read_to_string(&path).tried(tried(&path))?);
        }
    }
    Ok(files)
}

/// Makes the folder anew.
fn write(files: &Files, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).tried(format!("remove {}", folder.display()))?;
    }
    for (name, text) in files {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).tried(format!("make {}", parent.display()))?;
        fs::write(&path, text).tried(format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Each configuration that must be refused is, and the error names what is wrong.
fn check_refusals() -> Result<()> {
    let refusals = run::captured(&mut eval("refusals"))?;
    for line in refusals.lines() {
        let (name, words) = line.split_once(' ').unwrap_or((line, ""));
        let mut command = eval(&format!("refused.{name}"));
        let output = command.stdin(Stdio::null()).output().tried(format!("run `{}`", run::line(&command)))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return Err(Failure::step(format!("the NixOS module takes the wrong configuration `{name}`")));
        }
        if !said.contains(words) {
            return Err(Failure::step(format!("the error for `{name}` does not say `{words}`:\n{said}")));
        }
    }
    say::step(&format!("All {} wrong configurations are refused by name", refusals.lines().count()));
    Ok(())
}

/// systemd itself reads every unit without a word, and finds the agent's hardly exposed.
fn check_units(files: &Files) -> Result<()> {
    let folder = kept().join("units");
    let program = folder.join("program");
    let units: Files = files
        .iter()
        .filter(|(name, _)| name.ends_with(".service") || name.ends_with(".socket"))
        .map(|(name, text)| (name.clone(), with_program(text, &program.display().to_string())))
        .collect();
    write(&units, &folder)?;
    fs::copy("/bin/true", &program).tried(format!("write {}", program.display()))?;
    for name in units.keys() {
        verify(&folder.join(name))?;
        if name.ends_with("/pika-guest.service") {
            check_exposure(&folder.join(name))?;
        }
    }
    say::step(&format!("systemd reads all {} units, and finds the agent's exposed by 2.0 at most", units.len()));
    Ok(())
}

/// The unit with a program that this machine has in the place of each of the store's.
fn with_program(unit: &str, program: &str) -> String {
    let word = |word: &str| if word.starts_with(STORE) && word.contains("/bin/") { program } else { word }.to_owned();
    unit.split('"').map(word).collect::<Vec<_>>().join("\"")
}

fn verify(unit: &Path) -> Result<()> {
    let folder = unit.parent().unwrap_or(unit);
    let mut command = Command::new("systemd-analyze");
    command
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(unit)
        .env("SYSTEMD_UNIT_PATH", format!("{}:", folder.display()));
    let output = command.stdin(Stdio::null()).output().tried(format!("run `{}`", run::line(&command)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let name = unit.file_name().unwrap_or_default().to_string_lossy();
    // Of the machine's own units it may say what it likes.
    let stem = name.split(['@', '.']).next().unwrap_or(&name);
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains(stem)).collect();
    if output.status.success() && about_it.is_empty() {
        return Ok(());
    }
    Err(Failure::step(format!("`{}` ({}): {}", run::line(&command), output.status, said.trim())))
}

fn check_exposure(unit: &Path) -> Result<()> {
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--no-pager", "--offline=true"]).arg(unit);
    let line = run::line(&command);
    command.arg(format!("--threshold={MAX_EXPOSURE}"));
    run::captured(&mut command).map(drop).map_err(|failure| {
        let reason = failure.text().unwrap_or_default();
        Failure::step(format!("the agent's unit is exposed by more than it may be; `{line}` says by what. {reason}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart() {
        let files = files_in("==> a/b\none\ntwo\n==> c\n==> d\nlast");
        let found: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert_eq!(found, [("a/b", "one\ntwo\n"), ("c", ""), ("d", "last")]);
    }

    #[test]
    fn programs_of_the_store_are_replaced_and_its_folders_are_not() {
        let unit = "Environment=\"PATH=/nix/store/0-x/bin\"\nExecStart=\"/nix/store/0-x/bin/y\" \"--z\"\n";
        assert_eq!(with_program(unit, "/t"), "Environment=\"PATH=/nix/store/0-x/bin\"\nExecStart=\"/t\" \"--z\"\n");
    }

    #[test]
    fn a_difference_is_shown_by_its_lines() {
        let (golden, file) = ("a=1\nb=2\n".to_owned(), "b=2\nc=3\n".to_owned());
        assert_eq!(describe("unit", Some(&golden), Some(&file)), "unit\n  - a=1\n  + c=3");
        assert_eq!(describe("unit", Some(&golden), None), "unit\n  - a=1\n  - b=2");
    }
}

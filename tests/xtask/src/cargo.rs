//! Builds: the static agent and the tests' own program for guests, the `pika-cloud` program, the empty program that the agent is measured against.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::failure::{Failure, Result, Tried};
use crate::{elf, place, run, say};

/// What the agent may weigh: it goes into every image.
const AGENT_LIMIT_BYTES: u64 = 1_835_008;
const STATIC: &str = "-C target-feature=+crt-static";

/// Which of Cargo's profiles a program is built with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// A `cargo` command in the workspace.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(place::root());
    command
}

/// Builds the agent.
pub(crate) fn agent() -> Result<PathBuf> {
    say::step("Build the static pika-guest");
    guest_program("pika-guest-agent", "pika-guest")
}

/// Builds what the tests have in a VM beside the agent.
pub(crate) fn vsock_peer() -> Result<PathBuf> {
    say::step("Build the static vsock-peer");
    guest_program("vsock-peer", "vsock-peer")
}

/// Builds a package's program for guests: static, and alone, so that no other package's features get into it.
fn guest_program(package: &str, program: &str) -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", place::ARCH);
    let args = ["build", "--profile", "agent", "--package", package, "--target", &target];
    run::shown(cargo(&args).env("RUSTFLAGS", STATIC))?;
    Ok(place::target().join(target).join("agent").join(program))
}

/// Builds the agent and holds it to what is promised of it: small and static.
pub(crate) fn checked_agent() -> Result<PathBuf> {
    let path = agent()?;
    let bytes = fs::metadata(&path).tried(format!("read {}", path.display()))?.len();
    if !elf::is_static(&path)? {
        return Err(Failure::step(format!("{} needs a loader: it must be static", path.display())));
    }
    if bytes > AGENT_LIMIT_BYTES {
        return Err(Failure::step(format!(
            "pika-guest has {bytes} bytes, {} more than the limit of {AGENT_LIMIT_BYTES} (1.75 MiB): look for a new \
             dependency, or for a feature that one brings in (`cargo tree -p pika-guest-agent -e features`)",
            bytes - AGENT_LIMIT_BYTES
        )));
    }
    say::step(&format!("pika-guest is static and has {bytes} bytes; the limit is {AGENT_LIMIT_BYTES} (1.75 MiB)"));
    Ok(path)
}

/// Builds the host's program.
pub(crate) fn cloud(profile: Profile) -> Result<PathBuf> {
    say::step("Build pika-cloud");
    let mut command = cargo(&["build", "--package", "pika-host-collector", "--bin", "pika-cloud"]);
    let folder = match profile {
        Profile::Dev => "debug",
        Profile::Release => {
            command.arg("--release");
            "release"
        }
    };
    run::shown(&mut command)?;
    Ok(place::target().join(folder).join("pika-cloud"))
}

/// Builds one of the end-to-end test programs, without running it.
pub(crate) fn test_program(name: &str) -> Result<PathBuf> {
    say::step(&format!("Build the tests of {name}"));
    let args = ["test", "--package", "pika-cloud-tests", "--test", name, "--no-run"];
    run::shown(&mut cargo(&args))?;
    // It is built by now, and this only asks for its path.
    let said = run::captured(cargo(&args).args(["--quiet", "--message-format=json"]))?;
    let named = format!("\"name\":\"{name}\"");
    let path = said.lines().filter(|line| line.contains(&named)).find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        rest.split_once('"').map(|(path, _)| PathBuf::from(path))
    });
    path.ok_or_else(|| Failure::step(format!("cargo does not say where it has put the test program {name}")))
}

/// Builds the simulator, for many seeds a second.
pub(crate) fn simulator() -> Result<PathBuf> {
    say::step("Build the simulator");
    run::shown(&mut cargo(&["build", "--release", "--package", "pika-cloud-tests", "--bin", "sim"]))?;
    Ok(place::target().join("release").join("sim"))
}

/// An empty `main`, built like the agent: the floor for what one verb may take.
pub(crate) fn empty_program() -> Result<PathBuf> {
    say::step("Build the empty program to compare with");
    let folder = place::own();
    fs::create_dir_all(&folder).tried(format!("make {}", folder.display()))?;
    let (source, program) = (folder.join("empty.rs"), folder.join("empty"));
    fs::write(&source, "fn main() {}\n").tried(format!("write {}", source.display()))?;
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.current_dir(place::root()).args(["--edition", "2024", "-C", "opt-level=z", "-C", "lto"]);
    command.args(["-C", "codegen-units=1", "-C", "panic=abort", "-C", "strip=symbols"]).args(STATIC.split(' '));
    run::shown(command.arg("-o").arg(&program).arg(&source))?;
    Ok(program)
}

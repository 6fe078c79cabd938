//! The tasks themselves.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use crate::cargo::{self, Profile, cargo};
use crate::failure::{Failure, Result, Tried};
use crate::lab::{self, Kept, Lab};
use crate::{debian, debian_image, image, incus, nix, place, run, say, signals, vm};

/// A lab that is ready: daemon, pool, images and programs.
struct Ready {
    kept: Kept,
    /// Agent and host's program, where they were built.
    programs: Option<(PathBuf, PathBuf)>,
    busybox: PathBuf,
}

impl Ready {
    /// Installs what is missing, starts the daemon, builds the programs and makes the images.
    fn set_up(programs: Option<Profile>) -> Result<Self> {
        lab::must_be_root()?;
        let busybox = debian::provide()?;
        let kept = Kept::start()?;
        incus::set_up(kept.lab())?;
        let programs = match programs {
            Some(profile) => Some((cargo::agent()?, cargo::cloud(profile)?)),
            None => None,
        };
        image::provide(kept.lab(), &busybox, programs.as_ref().map(|(agent, _)| agent.as_path()))?;
        Ok(Self { kept, programs, busybox })
    }

    fn lab(&self) -> &Lab {
        self.kept.lab()
    }

    /// How the end-to-end tests and the benchmarks find everything.
    fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let lab = self.lab();
        let mut all = vec![("PIKA_TEST_INCUS_SOCKET", lab.socket()), ("PIKA_TEST_INCUS_DIR", lab.incus_dir())];
        if let Some((agent, cloud)) = self.programs.clone() {
            all.extend([("PIKA_TEST_AGENT", agent), ("PIKA_TEST_CLOUD", cloud)]);
        }
        all.extend(debian_image::kept());
        all
    }

    /// A command of this lab.
    fn command(&self, mut command: Command) -> Command {
        self.lab().mark(&mut command);
        command.envs(self.environment());
        command
    }
}

/// Runs the example job in a private Incus and shows what it left.
pub(crate) fn demo() -> Result<()> {
    let ready = Ready::set_up(Some(Profile::Dev))?;
    let folder = place::target().join("demo").join(ready.lab().name());
    let (state, output) = (folder.join("state"), folder.join("output"));
    fs::create_dir_all(&state).tried(format!("make {}", state.display()))?;
    let Some((_, cloud)) = &ready.programs else { return Err(Failure::step("pika-cloud was not built")) };
    let mut command = Command::new(cloud);
    command.current_dir(place::root());
    command.arg("--incus").arg(format!("unix:{}", ready.lab().socket().display()));
    command.arg("--state-dir").arg(&state);
    command.args(["run", "host-collector/examples/ci-job.json", "--output"]).arg(&output);
    let mut command = ready.command(command);
    say::step(&format!("Run {}", run::line(&command)));
    let status = run::status(&mut command)?;
    say::step(&format!("pika-cloud ended ({status}); its outputs are in {}", output.display()));
    list_files(&output, &output)?;
    let left = run::captured(&mut incus::client(ready.lab(), &["list", "--all-projects", "--format=csv"]))?;
    if left.is_empty() {
        say::step("`incus list` of the private daemon is empty");
    } else {
        say::step(&format!("`incus list` of the private daemon still has:\n{}", left.trim_end()));
    }
    match status.code() {
        Some(0) if left.is_empty() => Ok(()),
        Some(0) => Err(Failure::step("pika-cloud left an instance behind")),
        code => Err(Failure::Exit(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))),
    }
}

/// Shows the files below `folder` with their sizes, as seen from `base`.
fn list_files(base: &Path, folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.tried(format!("read {}", folder.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let data = entry.metadata().tried(format!("read {}", entry.path().display()))?;
        let path = entry.path();
        if data.is_dir() {
            list_files(base, &path)?;
        } else {
            println!("{:>12} bytes  {}", data.len(), path.strip_prefix(base).unwrap_or(&path).display());
        }
    }
    Ok(())
}

/// What `cargo xtask test` was asked to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TestArgs {
    vm: Option<VmTests>,
    filter: Option<String>,
    passed_on: Vec<String>,
}

/// Tests in VMs, alone: they need no Incus of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum VmTests {
    /// Those in VMs that are up in seconds.
    Quick,
    /// Those in Incus's own VMs.
    Full,
}

impl TestArgs {
    /// `[--vm quick|full] [FILTER] [-- ARG...]`
    pub(crate) fn parse(args: &[&str]) -> Result<Self> {
        let passed_from = args.iter().position(|arg| *arg == "--").unwrap_or(args.len());
        let (before, after) = args.split_at(passed_from);
        let (vm, before) = match before {
            ["--vm", "quick", rest @ ..] => (Some(VmTests::Quick), rest),
            ["--vm", "full", rest @ ..] => (Some(VmTests::Full), rest),
            ["--vm", ..] => return Err(Failure::usage("`--vm` takes the kind of VMs to run tests in: quick or full")),
            _ => (None, before),
        };
        let filter = match before {
            [] => None,
            [filter] if !filter.starts_with('-') => Some((*filter).to_owned()),
            _ => {
                return Err(Failure::usage(format!(
                    "`cargo xtask test` takes --vm quick or full, one FILTER, and what is for the test programs after `--`: {}",
                    before.join(" ")
                )));
            }
        };
        Ok(Self { vm, filter, passed_on: after.iter().skip(1).map(|arg| (*arg).to_owned()).collect() })
    }

    /// Finishes a command of `cargo test`.
    fn pass_on(&self, command: &mut Command) {
        command.args(&self.filter).arg("--").args(&self.passed_on);
    }
}

/// Unit tests, then the end-to-end tests against a private Incus and in VMs.
pub(crate) fn test(args: &TestArgs) -> Result<()> {
    match args.vm {
        Some(VmTests::Quick) => return test_in_quick_vms(args),
        Some(VmTests::Full) => return test_in_incus_vms(args),
        None => {}
    }
    let ready = Ready::set_up(Some(Profile::Dev))?;
    if args.filter.is_none() {
        say::step("Run the unit tests");
        let mut unit = cargo(&["test", "--workspace", "--exclude", "pika-cloud-tests", "--no-fail-fast", "--"]);
        unit.args(&args.passed_on);
        run::shown(&mut ready.command(unit))?;
    }
    let simulator = cargo::simulator()?;
    let agent = ready.programs.as_ref().map(|(agent, _)| agent.clone()).unwrap_or_default();
    let vms = vm::provide(&ready.busybox, &agent)?;
    debian_image::provide()?;
    say::step("Run the end-to-end tests");
    // `--tests` leaves out the documentation's, of which that package has none, so that what is read last counts.
    let mut end_to_end = cargo(&["test", "--package", "pika-cloud-tests", "--tests", "--no-fail-fast"]);
    end_to_end.env("PIKA_TEST_SIM", &simulator).envs(vms);
    args.pass_on(&mut end_to_end);
    run::shown(&mut ready.command(end_to_end))?;
    ready.kept.end_silently();
    Ok(())
}

/// The tests in VMs that are up in seconds, without an Incus.
fn test_in_quick_vms(args: &TestArgs) -> Result<()> {
    lab::must_be_root()?;
    let agent = cargo::agent()?;
    let vms = vm::provide(&debian::provide_busybox()?, &agent)?;
    debian_image::provide()?;
    say::step("Run the tests in quick VMs");
    let mut tests = cargo(&["test", "--package", "pika-cloud-tests", "--test", "vm_quick"]);
    args.pass_on(tests.envs(vms).envs(debian_image::kept()).env("PIKA_TEST_AGENT", agent));
    run::shown(&mut tests)
}

/// The tests in Incus's own VMs, in guests that have an Incus.
fn test_in_incus_vms(args: &TestArgs) -> Result<()> {
    lab::must_be_root()?;
    let busybox = debian::provide_busybox()?;
    let (agent, cloud, tests) = (cargo::agent()?, cargo::cloud(Profile::Dev)?, cargo::test_program("vm_full")?);
    let programs = vm::full::Programs { agent: &agent, cloud: &cloud, tests: &tests };
    vm::full::test(&busybox, &programs, args.filter.as_deref(), &args.passed_on)
}

/// Simulates runtimes under faults; what follows is the simulator's own.
pub(crate) fn simulate(args: &[&str]) -> Result<()> {
    let mut simulator = Command::new(cargo::simulator()?);
    simulator.current_dir(place::root()).args(args);
    run::shown(&mut simulator)
}

/// Measures against the promised limits.
pub(crate) fn bench(json: bool) -> Result<()> {
    let ready = Ready::set_up(Some(Profile::Release))?;
    let empty = cargo::empty_program()?;
    let agent = ready.programs.as_ref().map(|(agent, _)| agent.clone()).unwrap_or_default();
    let vms = vm::provide(&ready.busybox, &agent)?;
    say::step("Run the benchmarks");
    let mut bench = cargo(&["run", "--quiet", "--release", "--package", "pika-cloud-tests", "--bin", "bench", "--"]);
    bench.args(json.then_some("--json")).env("PIKA_BENCH_EMPTY", empty).envs(vms);
    run::shown(&mut ready.command(bench))
}

/// Keeps a private Incus for a developer until Ctrl-C.
pub(crate) fn developer_incus(with_agent: bool) -> Result<()> {
    let ready = Ready::set_up(with_agent.then_some(Profile::Dev))?;
    if with_agent {
        debian_image::provide()?;
    }
    say::step("Ready. In another shell:");
    println!("export INCUS_DIR={}", ready.lab().incus_dir().display());
    for (name, value) in ready.environment() {
        println!("export {name}={}", value.display());
    }
    println!("export PIKA_CLOUD_STATE_DIR={}", ready.lab().dir().join("state").display());
    if let Some((agent, cloud)) = &ready.programs {
        println!("export PIKA_GUEST_AGENT={}", agent.display());
        if let Some(folder) = cloud.parent() {
            println!("export PATH={}:$PATH", folder.display());
        }
    }
    println!("# Then `incus list`, `pika-cloud doctor`, …; its instances have no network");
    say::step("Ctrl-C takes it down");
    while signals::pending().is_none() {
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// What a change must pass; the tests come last, so that their result is what one sees.
pub(crate) fn ci() -> Result<()> {
    say::step("Check the format");
    run::shown(&mut cargo(&["fmt", "--all", "--check"]))?;
    say::step("Run clippy");
    run::shown(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    say::step("Build the documentation");
    let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
    run::shown(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    cargo::checked_agent()?;
    nix::check()?;
    test(&TestArgs::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_and_passed_on_arguments_are_told_apart() {
        assert_eq!(TestArgs::parse(&[]).unwrap(), TestArgs::default());
        let both = TestArgs::parse(&["ci", "--", "--nocapture", "x"]).unwrap();
        assert_eq!(both.filter.as_deref(), Some("ci"));
        assert_eq!(both.passed_on, ["--nocapture", "x"]);
        let vm = TestArgs::parse(&["--vm", "quick", "hello"]).unwrap();
        assert_eq!((vm.vm, vm.filter.as_deref()), (Some(VmTests::Quick), Some("hello")));
        assert_eq!(TestArgs::parse(&["--vm", "full"]).unwrap().vm, Some(VmTests::Full));
        assert!(TestArgs::parse(&["--vm"]).is_err() && TestArgs::parse(&["--vm", "slow"]).is_err());
        assert!(TestArgs::parse(&["--nocapture"]).is_err());
        assert!(TestArgs::parse(&["a", "b"]).is_err());
    }
}

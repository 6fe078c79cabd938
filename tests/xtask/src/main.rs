//! The project's tasks, run as `cargo xtask CMD`.
//!
//! What needs a real Incus gets one of its own: [`lab`] starts a private daemon under `/var/lib/pika-xtask`, and
//! [`guard`], a second process, takes it down again whatever becomes of the first. Everything else here is a list of
//! commands, told one line a step.

mod cargo;
mod debian;
mod debian_image;
mod elf;
mod failure;
mod guard;
mod image;
mod incus;
mod lab;
mod nix;
mod place;
mod processes;
mod run;
mod say;
mod signals;
mod sources;
mod tasks;
mod teardown;
mod vm;

use std::process::ExitCode;

use failure::{Failure, Result};

const HELP: &str = "\
cargo xtask: the tasks of pika-cloud

Usage: cargo xtask COMMAND

Commands that need a real Incus (as root; each starts a private daemon and takes it down again):
  demo                   Run host-collector/examples/ci-job.json and show it live
  test [--vm quick|full] [FILTER] [-- ARG...]
                         Unit tests, then the end-to-end tests. With FILTER only the end-to-end tests
                         whose name contains it; with --vm quick only those in VMs that are up in
                         seconds, without Incus; with --vm full only those in Incus's own VMs, in guests
                         that have an Incus (minutes). ARGs go to the test binaries (--nocapture, ...)
  bench [--json]         Measure against the limits that the project promises
  incus [--bare]         Keep a private daemon with the test images until Ctrl-C, and print how to reach
                         it. --bare: without building pika-guest, only the image that has no agent
  ci                     What a change must pass: format, clippy, docs, the agent's size, `nix`, then `test`

Commands that need nothing:
  sim [--seeds N] [--seed S]
                         Simulate runtimes under faults and check every invariant of the design; a seed that
                         fails is printed, and --seed shows it step by step (sim --help has more)
  agent                  Build the static pika-guest, check its size and that it is static
  nix                    Check the NixOS module: format, every option, its units, what it must refuse. Debian's
                         nix-bin and systemd are installed where they are missing; PIKA_UPDATE=1 writes the
                         golden files anew

On Debian 12 or 13 Incus, and for `test` and `bench` QEMU, are installed by apt where there are none; this may add the suite bookworm-backports,
from the machine's own Debian source. An Incus that runs already is never touched. All commands can be run
again and again, and beside each other. Where things lie:
  target/<arch>-unknown-linux-gnu/agent/pika-guest   the agent
  target/demo/<run>/                                 what the demo collected
  target/xtask/                                      log of the last private daemon, logs of an apt that failed
  target/xtask/vm/                                   what the tests' VMs boot: kernel, initramfs, vsock device
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                say::error(&text);
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let ["__guard", started_millis] = args[..] {
        guard::main(started_millis);
        return Ok(());
    }
    say::start(None);
    signals::install();
    match args[..] {
        // It has a help of its own.
        ["sim", ref rest @ ..] => tasks::simulate(rest),
        [] | ["help" | "-h" | "--help", ..] | [_, "-h" | "--help"] => {
            print!("{HELP}");
            Ok(())
        }
        ["demo"] => tasks::demo(),
        ["test", ref rest @ ..] => tasks::test(&tasks::TestArgs::parse(rest)?),
        ["bench"] => tasks::bench(false),
        ["bench", "--json"] => tasks::bench(true),
        ["incus"] => tasks::developer_incus(true),
        ["incus", "--bare"] => tasks::developer_incus(false),
        ["ci"] => tasks::ci(),
        ["agent"] => cargo::checked_agent().map(|path| println!("{}", path.display())),
        ["nix"] => nix::check(),
        [..] => Err(Failure::usage(format!(
            "`cargo xtask {}` is not known here; `cargo xtask --help` lists the commands, and what they take",
            args.join(" ")
        ))),
    }
}

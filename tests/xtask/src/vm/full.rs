//! Real Incus VMs for the tests: Incus with its own vhost-vsock and its own incus-agent, in an outer guest whose emulated CPU can
//! virtualize. Slow, and like the real thing where the quick VMs are not.
//!
//! ```text
//!   cargo xtask test --vm full
//!     └─ QEMU (TCG, emulated AMD SVM): the outer guest, Debian 13 without a network
//!          ├─ incusd ── QEMU (KVM): VMs ── AF_VSOCK ──► pika-guest serve
//!          └─ vm_full, the test program ─► pika-cloud ─► incusd, vhost-vsock
//! ```
//!
//! Two of them share the tests. What a guest says comes through a virtio port, and is shown with its number; how its tests ended,
//! through a second one. For looking around in there, `socat -,raw,echo=0 UNIX:target/xtask/vm/run-<pid>/1/shell` gives a root
//! shell. QEMU ends with the task, however that ends. `AF_VSOCK` is opened in the outer guest and its VMs only.
//!
//! | piece, in `target/xtask/vm` | made of | takes |
//! |---|---|---|
//! | `outer-<digest>/` | a recipe of Debian packages | minutes |
//! | `kernel-generic/` | Debian 12's kernel; kept until it is removed | seconds |
//! | `inner-<digest>/` | that kernel, the quick VMs' userland, more kernel modules | seconds |
//! | `debian-<digest>/` | the image of a stock Debian that the tests have as well | seconds |
//! | `run-<pid>/` | all of it, and the programs under test; removed at the end | seconds |

mod debian;
mod guest;
mod inner;
mod outer;

use std::fs;
use std::path::Path;
use std::process::Command;

use self::guest::{Ended, OuterGuest, Pieces};
use super::{UNFIT, folder, kernel, remove_old};
use crate::debian::provide_vm_tools;
use crate::failure::{Failure, Result, Tried};
use crate::{place, run, say};

/// So many outer guests share the tests, one CPU and 3 GiB each.
const GUESTS: usize = 2;

/// What runs in the outer guest.
pub(crate) struct Programs<'a> {
    pub(crate) agent: &'a Path,
    pub(crate) cloud: &'a Path,
    /// The test program.
    pub(crate) tests: &'a Path,
}

/// Runs the test program with these arguments, its tests shared out to outer guests.
pub(crate) fn test(busybox: &Path, programs: &Programs<'_>, args: &[String]) -> Result<()> {
    if place::ARCH != "x86_64" {
        return Err(Failure::step(UNFIT));
    }
    provide_vm_tools()?;
    let guest = super::guest(busybox, programs.agent, &kernel::GENERIC)?;
    let outer = outer::provide()?;
    let images = [inner::provide(busybox, &guest)?, debian::provide()?];
    remove_old("run-", "");
    let scratch = folder().join(format!("run-{}", std::process::id()));
    let pieces = Pieces { programs, outer: &outer, images: &images };
    let shares = shares(&names(programs.tests, args)?);
    let run_share = |(index, args): (usize, &Vec<String>)| {
        let number = index + 1;
        run_one(&OuterGuest { number, pieces: &pieces, scratch: scratch.join(number.to_string()), args })
    };
    let done: Vec<Result<()>> = std::thread::scope(|scope| {
        let running: Vec<_> = shares.iter().enumerate().map(|share| scope.spawn(move || run_share(share))).collect();
        running.into_iter().map(|one| one.join().expect("an outer guest's thread does not panic")).collect()
    });
    fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()))?;
    done.into_iter().collect()
}

/// Names of the tests that the arguments choose.
fn names(tests: &Path, args: &[String]) -> Result<Vec<String>> {
    let listed = run::captured(Command::new(tests).args(args).args(["--list", "--format", "terse"]))?;
    let names: Vec<String> = listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
    if names.is_empty() {
        return Err(Failure::step(format!("no test in Incus VMs is called like `{}`", args.join(" "))));
    }
    Ok(names)
}

/// Shares tests out: those that stand together stay together. Gives what the test program is told in each guest.
fn shares(names: &[String]) -> Vec<Vec<String>> {
    let from = |guest: usize| guest * names.len() / GUESTS;
    let share = |guest: usize| &names[from(guest)..from(guest + 1)];
    let told = |names: &[String]| std::iter::once("--exact".to_owned()).chain(names.iter().cloned()).collect();
    (0..GUESTS).map(share).filter(|share| !share.is_empty()).map(told).collect()
}

/// Runs one, and once more where it is the guest itself that came to nothing: it stands on an emulation of SVM under which kernels
/// were seen to die. A test that failed has failed.
fn run_one(guest: &OuterGuest<'_>) -> Result<()> {
    let mut ended = guest.run()?;
    if let Ended::Died(how) = ended {
        say::step(&format!("{how}\nOnce more"));
        ended = guest.run()?;
    }
    match ended {
        Ended::Passed => Ok(()),
        Ended::Failed => Err(Failure::step(format!(
            "tests in Incus VMs failed; what Incus complained of is in {}",
            guest.log("console").display()
        ))),
        Ended::Died(how) => Err(Failure::step(how)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_is_in_one_share() {
        for count in 1..12 {
            let names: Vec<String> = (0..count).map(|number| format!("test_{number}")).collect();
            let shares = shares(&names);
            assert!(shares.len() <= GUESTS && shares.iter().all(|share| share[0] == "--exact" && share.len() > 1));
            assert_eq!(shares.iter().flat_map(|share| &share[1..]).cloned().collect::<Vec<_>>(), names);
        }
    }
}

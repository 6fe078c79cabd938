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
//! Two such guests share the tests. What one says comes through a virtio port, and is shown with its number; how its tests ended,
//! through a second one. For looking around in there, `socat -,raw,echo=0 UNIX:target/xtask/vm/run-<pid>/1/shell` gives a root
//! shell. QEMU ends with the task, however that ends. `AF_VSOCK` is opened in the outer guest and its VMs only.
//!
//! | piece, in `target/xtask/vm` | made of | takes |
//! |---|---|---|
//! | `outer-<digest>/` | a recipe of Debian packages | minutes |
//! | `kernel-generic-<digest>/` | Debian 12's kernel, and of its modules those that are needed | seconds |
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

use self::guest::{OuterGuest, Pieces};
use super::{UNFIT, folder, kernel, remove_old};
use crate::debian::provide_vm_tools;
use crate::failure::{Failure, Result, Tried};
use crate::{place, run, say};

/// So many outer guests share the tests, with one CPU and up to 4 GiB each: 3 of the guest, the rest its translated code.
const GUESTS: usize = 2;

/// What runs in the outer guest.
pub(crate) struct Programs<'a> {
    pub(crate) agent: &'a Path,
    pub(crate) cloud: &'a Path,
    /// The test program.
    pub(crate) tests: &'a Path,
}

/// Runs the tests whose name contains the filter, shared out to outer guests. What else the test program is told, it is told in each.
pub(crate) fn test(busybox: &Path, programs: &Programs<'_>, filter: Option<&str>, passed_on: &[String]) -> Result<()> {
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
    let shares = shares(&names(programs.tests, filter)?);
    let run_share = |(index, names): (usize, &[String])| {
        let number = index + 1;
        let args: Vec<String> = ["--exact"].map(str::to_owned).iter().chain(names).chain(passed_on).cloned().collect();
        OuterGuest { number, pieces: &pieces, scratch: scratch.join(number.to_string()), args: &args }.run()
    };
    let failures: Vec<Failure> = std::thread::scope(|scope| {
        let shares = shares.iter().map(Vec::as_slice).enumerate();
        let running: Vec<_> = shares.map(|share| scope.spawn(move || run_share(share))).collect();
        let ended = running.into_iter().map(|one| one.join().expect("an outer guest's thread does not panic"));
        ended.filter_map(Result::err).collect()
    });
    let removed = fs::remove_dir_all(&scratch).tried(format!("remove {}", scratch.display()));
    let mut failures = failures.into_iter();
    let first = failures.next();
    failures.filter_map(|failure| failure.text()).for_each(|text| say::error(&text));
    first.map_or(removed, Err)
}

/// Names of the tests that contain the filter, in their order.
fn names(tests: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let listed = run::captured(Command::new(tests).args(filter).args(["--list", "--format", "terse"]))?;
    let names: Vec<String> = listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
    if names.is_empty() {
        let filter = filter.unwrap_or_default();
        return Err(Failure::step(format!(
            "no test in Incus VMs has `{filter}` in its name: see tests/tests/vm_full.rs"
        )));
    }
    Ok(names)
}

/// Shares tests out evenly, in their order; a guest for which there is none is not booted.
fn shares(names: &[String]) -> Vec<Vec<String>> {
    let from = |guest: usize| guest * names.len() / GUESTS;
    let share = |guest: usize| names[from(guest)..from(guest + 1)].to_vec();
    (0..GUESTS).map(share).filter(|share| !share.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_is_in_one_share_and_shares_are_even() {
        for count in 1..12 {
            let names: Vec<String> = (0..count).map(|number| format!("test_{number}")).collect();
            let shares = shares(&names);
            assert_eq!(shares.len(), GUESTS.min(count));
            assert!(shares.iter().all(|share| share.len().abs_diff(shares[0].len()) <= 1), "{shares:?}");
            assert_eq!(shares.concat(), names);
        }
    }
}

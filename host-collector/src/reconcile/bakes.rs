//! What is to be done about bakes. Pure.

use std::time::Duration;

use super::plan::{InstanceName, Step};
use crate::incus::BuilderLabels;

/// An instance in which an image is, or was to be, baked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenBuilder {
    pub(super) instance: InstanceName,
    pub(super) labels: BuilderLabels,
}

/// A bake that the state dir has a record of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalBake {
    pub(super) bake: String,
    /// The alias that it is for, where that is written.
    pub(super) to: Option<String>,
    /// Whether somebody is at it.
    pub(super) lives: bool,
}

/// Plans what is to be done about bakes: those that are over are tidied, and no other state dir's is touched.
pub(super) fn plan_bakes(local: &[LocalBake], builders: &[SeenBuilder], owner: &str, now: Duration) -> Vec<Step> {
    let over = local.iter().filter(|bake| !bake.lives);
    let tidied = over.map(|bake| Step::Tidy { bake: bake.bake.clone(), to: bake.to.clone() });
    let builder = |seen: &SeenBuilder| {
        let BuilderLabels { bake, owner: whose, expires_at } = &seen.labels;
        match (whose == owner, local.iter().any(|local| local.bake == *bake)) {
            (true, true) => None,
            (true, false) => Some(Step::EndBuilder { instance: seen.instance.clone(), bake: bake.clone() }),
            (false, _) => {
                let state = if *expires_at <= now { ", and expired: nobody bakes in it any more" } else { "" };
                let what = seen.instance.to_string();
                let why = format!("a builder of bake {bake} of owner {whose}{state}: it is left alone");
                Some(Step::Report { what, why })
            }
        }
    };
    tidied.chain(builders.iter().filter_map(builder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);
    const US: &str = "us";
    const THEM: &str = "them";
    const BAKE: &str = "0123456789abcdef0123456789abcdef";

    fn builder(owner: &str, bake: &str, expires_at: Duration) -> SeenBuilder {
        let labels = BuilderLabels { bake: bake.to_owned(), owner: owner.to_owned(), expires_at };
        let instance = InstanceName { project: "default".to_owned(), name: "pika-bake-0123456789ab".to_owned() };
        SeenBuilder { instance, labels }
    }

    fn bake(lives: bool) -> LocalBake {
        LocalBake { bake: BAKE.to_owned(), to: Some("ci".to_owned()), lives }
    }

    /// Its record tells what to do, with its builder and with its images.
    #[test]
    fn a_bake_that_died_is_tidied_and_one_that_lives_is_not() {
        let ours = [builder(US, BAKE, NOW)];
        let tidy = Step::Tidy { bake: BAKE.to_owned(), to: Some("ci".to_owned()) };
        for builders in [&ours[..], &[]] {
            assert_eq!(plan_bakes(&[bake(false)], builders, US, NOW), std::slice::from_ref(&tidy));
            assert_eq!(plan_bakes(&[bake(true)], builders, US, NOW), []);
        }
    }

    #[test]
    fn a_builder_of_ours_that_nothing_is_known_of_is_ended() {
        let ours = builder(US, BAKE, NOW * 2);
        let end = Step::EndBuilder { instance: ours.instance.clone(), bake: BAKE.to_owned() };
        assert_eq!(plan_bakes(&[], &[ours], US, NOW), [end]);
    }

    /// Invariant 4.
    #[test]
    fn a_builder_of_another_state_dir_is_reported_and_no_more() {
        for (expires_at, expired) in [(NOW * 2, false), (NOW, true)] {
            for local in [vec![], vec![bake(false)]] {
                let steps = plan_bakes(&local, &[builder(THEM, BAKE, expires_at)], US, NOW);
                let [.., Step::Report { what, why }] = &steps[..] else { panic!("{steps:?}") };
                assert!(what.contains("pika-bake-0123456789ab") && why.contains(THEM), "{why}");
                assert_eq!(why.contains("expired"), expired, "{why}");
                assert!(!steps.iter().any(|step| matches!(step, Step::EndBuilder { .. })));
            }
        }
    }
}

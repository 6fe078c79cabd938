//! The one step of a bake that others see: the alias points to its image.
//!
//! ```text
//!   written: it is about to ─► alias read ─► its place written down, if that is ours ─► one conditional call ─► written: it did
//!                                  ▲                                                        │
//!                                  └── somebody else moved it, or nobody heard the answer ──┘
//! ```
//!
//! A call whose answer is lost may have been carried out: only the alias itself tells. Nothing interrupts this, as whoever
//! stopped it in between would not know where the alias points to.

use tokio::time::sleep;

use super::error::BakeError;
use super::record::Held;
use crate::incus::{Client, Patched, backoff, jitter};

/// How often the alias is read again after somebody changed it, or Incus gave no answer.
const SWAPS: u32 = 10;

/// Points the alias of a bake to its image. Gives the image whose place was taken, where that is not ours to delete.
pub(super) async fn swap(client: &Client, held: &mut Held, fingerprint: &str) -> Result<Option<String>, BakeError> {
    held.swapping()?;
    let (mut unanswered, mut foreign) = (None, None);
    for attempt in 0..SWAPS {
        match try_swap(client, held, fingerprint, &mut foreign).await {
            Ok(true) => {
                swapped(held);
                return Ok(foreign);
            }
            Ok(false) => {}
            Err(BakeError::Incus { doing, source }) if source.is_transient() => {
                unanswered = Some(BakeError::Incus { doing, source });
                sleep(backoff(attempt, jitter())).await;
            }
            Err(error) => return Err(error),
        }
    }
    let (project, to) = (&held.record().project, &held.record().to);
    match client.alias(project, to).await {
        Ok(Some(alias)) if alias.target == fingerprint => {
            swapped(held);
            Ok(foreign)
        }
        _ => Err(unanswered.unwrap_or(BakeError::AliasRaced { alias: to.clone() })),
    }
}

/// One conditional call. Whose place is taken was read, and written down, right before. `false` where the alias was changed
/// meanwhile. `foreign` becomes the image that has it, where that is not ours.
async fn try_swap(
    client: &Client,
    held: &mut Held,
    fingerprint: &str,
    foreign: &mut Option<String>,
) -> Result<bool, BakeError> {
    let (project, to) = (held.record().project.clone(), held.record().to.clone());
    let fail = || BakeError::incus("pointing the alias to the image");
    *foreign = None;
    let Some(alias) = client.alias(&project, &to).await.map_err(fail())? else {
        return client.make_alias(&project, &to, fingerprint).await.map_err(fail());
    };
    if alias.target == fingerprint {
        // By a call whose answer nobody heard.
        return Ok(true);
    }
    let before = client.image_of(&project, &alias.target).await.map_err(fail())?;
    let is_ours = before.as_ref().is_some_and(|before| held.images().has(before));
    *foreign = before.filter(|_| !is_ours).map(|before| before.fingerprint);
    if is_ours {
        held.replaces(&alias.target)?;
    }
    match client.move_alias(&project, &to, &alias, fingerprint).await {
        Ok(patched) => Ok(matches!(patched, Patched::Done)),
        // The alias went, or the image did.
        Err(error) if error.is_not_found() => match client.image_of(&project, fingerprint).await.map_err(fail())? {
            None => Err(BakeError::Vanished),
            Some(_) => Ok(false),
        },
        Err(error) => Err(fail()(error)),
    }
}

/// The alias is moved, whether that can be written down or not: whoever comes after sees it as well.
fn swapped(held: &mut Held) {
    if let Err(error) = held.swapped() {
        tracing::warn!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::super::fake::{Fake, Said};
    use super::*;
    use crate::incus::Image;
    use crate::state_dir::StateDir;

    fn image(fingerprint: &str) -> Image {
        Image { fingerprint: fingerprint.to_owned(), project: "default".to_owned(), ..Image::default() }
    }

    /// An alias `ci`, pointing to `0ld`, of an Incus that loses the first `lost` answers to calls that move it, which it
    /// carries out all the same where `carries_out`.
    fn incus(lost: u32, carries_out: bool) -> (Fake, Arc<Mutex<String>>) {
        let target = Arc::new(Mutex::new("01d".to_owned()));
        let (alias, mut lost) = (Arc::clone(&target), lost);
        let fake = Fake::new(move |method, path, body| {
            let mut alias = alias.lock().unwrap();
            match (method, path.split('?').next().unwrap()) {
                ("GET", "/1.0/images/aliases/ci") => Said::Answer(200, json!({ "name": "ci", "target": *alias })),
                ("GET", path) => {
                    let fingerprint = path.rsplit('/').next().unwrap();
                    Said::Answer(200, json!({ "fingerprint": fingerprint, "project": "default" }))
                }
                ("PUT", _) => {
                    let is_lost = lost > 0;
                    lost = lost.saturating_sub(1);
                    if !is_lost || carries_out {
                        *alias = body["target"].as_str().unwrap().to_owned();
                    }
                    if is_lost { Said::Nothing } else { Said::Answer(200, json!({})) }
                }
                other => panic!("{other:?}"),
            }
        });
        (fake, target)
    }

    fn held(state: &StateDir) -> Held {
        let mut held = Held::begin(state, "default", "ci").unwrap();
        held.images().add(&image("01d")).unwrap();
        held.published(&image("0e3")).unwrap();
        held
    }

    #[tokio::test(start_paused = true)]
    async fn a_swap_whose_answer_was_lost_is_one() {
        for (lost, carries_out) in [(0, true), (1, true), (1, false), (3, false)] {
            let folder = tempfile::tempdir().unwrap();
            let mut held = held(&StateDir::open(folder.path()).unwrap());
            let (fake, target) = incus(lost, carries_out);
            assert_eq!(swap(&fake.client, &mut held, "0e3").await.unwrap(), None, "it is ours");
            assert_eq!(*target.lock().unwrap(), "0e3", "{lost} {carries_out}");
            let puts = fake.asked().iter().filter(|asked| asked.starts_with("PUT")).count();
            assert_eq!(puts, if carries_out { 1 } else { lost as usize + 1 });
            let record = held.record();
            assert!(record.swapping && record.swapped && record.replaced == ["01d"], "{record:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_swap_that_is_never_answered_fails_with_why() {
        let folder = tempfile::tempdir().unwrap();
        let mut held = held(&StateDir::open(folder.path()).unwrap());
        let (fake, _) = incus(u32::MAX, false);
        let error = swap(&fake.client, &mut held, "0e3").await.unwrap_err();
        assert!(matches!(&error, BakeError::Incus { source, .. } if source.is_transient()), "{error}");
        assert!(held.record().swapping && !held.record().swapped);
    }

    /// An image that somebody published of an instance has the properties of that one's image, and is theirs.
    #[tokio::test]
    async fn an_image_that_was_not_published_from_here_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let mut held = Held::begin(&state, "default", "ci").unwrap();
        held.published(&image("0e3")).unwrap();
        let (fake, _) = incus(0, true);
        assert_eq!(swap(&fake.client, &mut held, "0e3").await.unwrap().as_deref(), Some("01d"));
        assert_eq!(held.record().replaced, Vec::<String>::new());
    }
}

//! Which images were published from a state dir: of all images, these alone are ever removed.
//!
//! ```text
//!   <state_dir>/.bakes/images/<fingerprint>   holds the image's project; there from before the image has a name until it is gone
//! ```
//!
//! An image's own properties do not tell: `incus publish` hands those of an instance's image on to the image that it makes, which is
//! its maker's, and whoever may make images may write what they like into theirs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::incus::Image;
use crate::state_dir::{StateDirError, make_folder, replace, sync_folder};

/// The images that were published from a state dir.
#[derive(Clone, Debug)]
pub(super) struct OwnImages {
    folder: PathBuf,
}

impl OwnImages {
    /// Beside the records in `bakes`.
    pub(super) fn beside(bakes: &Path) -> Self {
        Self { folder: bakes.join("images") }
    }

    /// Writes one down, durably.
    pub(super) fn add(&self, image: &Image) -> Result<(), StateDirError> {
        make_folder(&self.folder)?;
        self.folder.parent().map_or(Ok(()), sync_folder)?;
        replace(&self.path(&image.fingerprint), image.project.as_bytes())?;
        sync_folder(&self.folder)
    }

    /// Whether an image, in that very project, was published from here.
    pub(super) fn has(&self, image: &Image) -> bool {
        is_fingerprint(&image.fingerprint)
            && fs::read(self.path(&image.fingerprint)).is_ok_and(|project| project == image.project.as_bytes())
    }

    /// Forgets those of a project that are gone. `known` was listed before `images`, which are all of that project.
    pub(super) fn sweep(&self, known: &[String], images: &[Image]) {
        let Some(project) = images.first().map(|image| &image.project) else { return };
        let is_there = |fingerprint: &String| images.iter().any(|image| image.fingerprint == *fingerprint);
        for fingerprint in known.iter().filter(|fingerprint| !is_there(fingerprint)) {
            let gone = Image { fingerprint: fingerprint.clone(), project: project.clone(), ..Image::default() };
            if self.has(&gone) {
                self.forget(fingerprint);
            }
        }
    }

    /// Every fingerprint that is written down, of whatever project.
    pub(super) fn known(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_fingerprint(name)).collect()
    }

    fn forget(&self, fingerprint: &str) {
        match fs::remove_file(self.path(fingerprint)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // It names an image that is gone: that does no harm, and is tried again.
                tracing::debug!("{}: {error}", self.path(fingerprint).display());
            }
            _ => {}
        }
    }

    fn path(&self, fingerprint: &str) -> PathBuf {
        self.folder.join(fingerprint)
    }
}

/// As Incus writes them, and so the name of a file.
fn is_fingerprint(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(project: &str, fingerprint: &str) -> Image {
        Image { fingerprint: fingerprint.to_owned(), project: project.to_owned(), ..Image::default() }
    }

    #[test]
    fn what_was_published_is_known_until_it_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let own = OwnImages::beside(folder.path());
        let (first, second, other) = (image("default", "f00"), image("default", "f01"), image("p", "f02"));
        assert!(!own.has(&first) && own.known().is_empty());
        for image in [&first, &second, &other] {
            own.add(image).unwrap();
        }
        assert!(own.has(&first) && own.has(&second) && own.has(&other));
        assert!(!own.has(&image("p", "f00")), "a copy in another project");
        assert!(!own.has(&image("default", "../images/f00")));
        own.sweep(&own.known(), std::slice::from_ref(&second));
        assert!(!own.has(&first) && own.has(&second) && own.has(&other), "nothing is known of another project's");
        own.sweep(&own.known(), &[]);
        assert!(own.has(&second));
    }
}

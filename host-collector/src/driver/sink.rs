//! Where collected artifacts go on the host.

use std::future::Future;
use std::time::Duration;

use pika_cloud_common::wire::{ArchiveLimits, Entry};
use tokio::time::Instant;

use crate::artifacts::{ArtifactError, ArtifactTree};
use crate::runtime::{Outputs, Stored};
use crate::state_dir::RuntimeFolder;

/// The artifacts of one collection.
pub(super) struct Sink {
    folder: RuntimeFolder,
    tree: Option<ArtifactTree>,
    /// After the first failure what still comes is dropped.
    failed: Option<String>,
}

impl Sink {
    pub(super) fn new(folder: RuntimeFolder) -> Self {
        Self { folder, tree: None, failed: None }
    }

    /// Makes room; what an earlier try left is thrown away.
    pub(super) fn begin(&mut self, incarnation: u32, limits: ArchiveLimits) {
        (self.tree, self.failed) = (None, None);
        let folder = self.folder.incarnation(incarnation);
        match ArtifactTree::begin(&folder, limits) {
            Ok(tree) => self.tree = Some(tree),
            Err(error) => self.failed = Some(error.to_string()),
        }
        // Nothing waits for it yet. So there may be as many on the disk as tries that a guest broke in the meantime: few, since a
        // collection counts those, and each within the spec's limits.
        tokio::task::spawn_blocking(move || ArtifactTree::remove_abandoned(&folder));
    }

    fn with_tree(&mut self, act: impl FnOnce(&mut ArtifactTree) -> Result<(), ArtifactError>) {
        if self.failed.is_none()
            && let Some(tree) = &mut self.tree
            && let Err(error) = act(tree)
        {
            self.failed = Some(error.to_string());
        }
    }

    /// Makes durable what came.
    pub(super) fn store(&mut self, within: Duration) -> impl Future<Output = Stored> + Send + 'static {
        let (tree, failed) = (self.tree.take(), self.failed.take());
        async move {
            let deadline = Instant::now() + within;
            let Some(tree) = tree else { return Stored { problem: failed, ..Stored::default() } };
            let folder = tree.folder();
            let (files, bytes) = (tree.files(), tree.bytes());
            let unended = tree.unended().map(|path| format!("{path}: the guest did not send its end: it is left out"));
            let finish = tokio::task::spawn_blocking(move || tree.finish());
            let finished = match tokio::time::timeout_at(deadline, finish).await {
                Ok(Ok(finished)) => finished.err().map(|error| error.to_string()),
                Ok(Err(panic)) => Some(panic.to_string()),
                Err(_) => Some("the host's disk was not done within collect_secs".to_owned()),
            };
            // Nobody may come after this one who removes what is left of others; what came is there all the same.
            let tidy = tokio::task::spawn_blocking(move || ArtifactTree::remove_abandoned(&folder));
            let _ = tokio::time::timeout_at(deadline, tidy).await;
            Stored { files, bytes, problem: failed.or(unended).or(finished) }
        }
    }
}

impl Outputs for Sink {
    fn entry(&mut self, entry: &Entry) {
        self.with_tree(|tree| tree.entry(entry));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.with_tree(|tree| tree.bytes_of_entry(bytes));
    }
}

//! Looking at a runtime that another may be driving, again and again, and reading its journal only once.

use crate::error::Error;
use crate::journal::{Follower, View};
use crate::state_dir::RuntimeFolder;

/// What the journal of a runtime says, folded on with each look.
pub(super) struct Look {
    folder: RuntimeFolder,
    follower: Option<Follower>,
    view: View,
}

impl Look {
    pub(super) fn new(folder: RuntimeFolder) -> Self {
        Self { folder, follower: None, view: View::default() }
    }

    /// What it says now. It is another's to write, and not touched.
    pub(super) fn now(&mut self) -> Result<&View, Error> {
        let Self { folder, follower, view } = self;
        let reader = follower.get_or_insert_with(|| {
            *view = View::default();
            Follower::new(folder.path(), None)
        });
        while let Some((record, _)) = reader.try_next()? {
            if let Some(base) = reader.take_base() {
                *view = base;
            }
            view.apply(&record);
        }
        if view.is_settled() {
            // What comes of a later incarnation is for a new reader.
            *follower = None;
        }
        Ok(&self.view)
    }
}

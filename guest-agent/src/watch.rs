//! Wakes up when something changes in a folder of the contract.
//!
//! inotify says so at once. Where it cannot be had (too many watches, a file system without it), a look every
//! [`FALLBACK_INTERVAL`] does.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use crate::ledger::Folder;

/// How often to look where inotify cannot be had.
pub const FALLBACK_INTERVAL: Duration = Duration::from_millis(100);

/// Wakes up when something changes in the folders that it was given.
#[derive(Debug, Default)]
pub struct Watch {
    inotify: Option<OwnedFd>,
    /// A folder could not be watched.
    blind: bool,
}

impl Watch {
    /// Watches `folder`.
    pub fn new(folder: &Folder) -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok();
        let mut watch = Self { blind: inotify.is_none(), inotify };
        watch.add(folder);
        watch
    }

    /// Watches `folder` too.
    pub fn add(&mut self, folder: &Folder) {
        use std::os::fd::AsRawFd as _;
        let Some(inotify) = &self.inotify else { return };
        // By descriptor, so that it is the folder that we opened whatever its path says by now.
        let path = format!("/proc/self/fd/{}", folder.as_fd().as_raw_fd());
        let what = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        self.blind |= inotify::add_watch(inotify, path, what).is_err();
    }

    /// What to wait for, where there is something.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// The longest wait that misses nothing, where one must look by itself.
    pub fn interval(&self) -> Option<Duration> {
        self.blind.then_some(FALLBACK_INTERVAL)
    }

    /// Takes note of all changes so far: calls `each` with the name of each file that changed. Says whether names may be
    /// missing, so that one has to look at everything.
    pub fn drain(&self, mut each: impl FnMut(&[u8])) -> bool {
        let Some(inotify) = &self.inotify else { return true };
        let mut missing = self.blind;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    missing |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
                    each(event.file_name().map_or(&[][..], |name| name.to_bytes()));
                }
                Err(Errno::INTR) => {}
                Err(_) => return missing,
            }
        }
    }

    /// Waits for a change, at most until `deadline`.
    pub fn wait(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = self.interval().map_or(left, |interval| interval.min(left));
        match self.fd() {
            Some(fd) => {
                let mut fds = [PollFd::new(&fd, PollFlags::IN)];
                let _ = rustix::event::poll(&mut fds, Some(&timespec(left)));
                self.drain(|_| ());
            }
            None => std::thread::sleep(left),
        }
    }
}

/// `duration` as the kernel takes it.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

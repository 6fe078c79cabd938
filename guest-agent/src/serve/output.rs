//! What is on its way to the host: a bounded buffer in front of a descriptor that is never waited for.

use rustix::fd::BorrowedFd;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{self, Errno};

/// Beyond this nothing more is read from the files until some of it is written.
const HIGH_WATER: usize = 256 * 1024;
/// What a pipe is asked to hold, so that fewer turns move more.
const PIPE_BYTES: usize = 1024 * 1024;
/// What surely fits where a terminal's poll says that it can be written.
const CAUTIOUS_BYTES: usize = 4096;

/// Output to a descriptor.
#[derive(Debug)]
pub(super) struct Output<'a> {
    fd: BorrowedFd<'a>,
    buffer: Vec<u8>,
    written: usize,
    /// The flags to put back at the end.
    flags: Option<OFlags>,
}

impl<'a> Output<'a> {
    /// Pipes and sockets are set to not wait; on anything else writes are kept small.
    pub(super) fn new(fd: BorrowedFd<'a>) -> Self {
        let kind = fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let flags = match kind {
            Ok(FileType::Fifo | FileType::Socket) => fcntl_getfl(fd).ok(),
            _ => None,
        };
        let flags = flags.filter(|flags| fcntl_setfl(fd, *flags | OFlags::NONBLOCK).is_ok());
        // Best effort: a smaller pipe is as right, only slower.
        let _ = rustix::pipe::fcntl_setpipe_size(fd, PIPE_BYTES);
        Self { fd, buffer: Vec::new(), written: 0, flags }
    }

    /// What to wait for.
    pub(super) fn fd(&self) -> BorrowedFd<'a> {
        self.fd
    }

    /// To be appended to.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Whether all of it is written.
    pub(super) fn is_empty(&self) -> bool {
        self.written == self.buffer.len()
    }

    /// Whether more may be put into it.
    pub(super) fn has_room(&self) -> bool {
        self.buffer.len() - self.written < HIGH_WATER
    }

    /// Writes what can be written without waiting; says whether any was.
    pub(super) fn write(&mut self) -> io::Result<bool> {
        let mut any = false;
        while !self.is_empty() {
            let rest = &self.buffer[self.written..];
            let piece = if self.flags.is_some() { rest } else { &rest[..rest.len().min(CAUTIOUS_BYTES)] };
            match io::write(self.fd, piece) {
                Ok(n) => {
                    any = true;
                    self.written += n;
                    if self.flags.is_none() {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        if self.is_empty() {
            self.buffer.clear();
            self.written = 0;
        } else if self.written >= HIGH_WATER {
            self.buffer.drain(..self.written);
            self.written = 0;
        }
        Ok(any)
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        if let Some(flags) = self.flags {
            let _ = fcntl_setfl(self.fd, flags);
        }
    }
}

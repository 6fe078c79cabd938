//! Many streams on one socket: frames of a guest's number, a length, and so many bytes, the numbers as four bytes, the lowest
//! first. A process may have 20,000 open files, and the locks of 10,000 runtimes are half of them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::ensure;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

const HEAD_BYTES: usize = 8;
const READ_BYTES: usize = 256 * 1024;

/// What is to be written; everybody's.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    bytes: Mutex<Vec<u8>>,
    filled: Notify,
}

impl Outgoing {
    /// Queues bytes of, or for, a guest.
    pub(super) fn send(&self, guest: u32, payload: &[u8]) {
        let mut bytes = lock(&self.bytes);
        let length = u32::try_from(payload.len()).expect("messages are short");
        bytes.extend_from_slice(&guest.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(payload);
        drop(bytes);
        self.filled.notify_one();
    }

    /// Writes what is queued, for ever.
    pub(super) async fn write_all(&self, mut socket: OwnedWriteHalf) -> anyhow::Result<()> {
        loop {
            self.filled.notified().await;
            let bytes = std::mem::take(&mut *lock(&self.bytes));
            socket.write_all(&bytes).await?;
        }
    }
}

/// Reads frames until the other end closes.
pub(super) async fn read_all(mut socket: OwnedReadHalf, mut take: impl FnMut(u32, &[u8])) -> anyhow::Result<()> {
    let mut bytes = vec![0; READ_BYTES];
    let mut filled = 0;
    loop {
        let read = socket.read(&mut bytes[filled..]).await?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let mut at = 0;
        while let Some((guest, payload)) = frame(&bytes[at..filled]) {
            take(guest, payload);
            at += HEAD_BYTES + payload.len();
        }
        bytes.copy_within(at..filled, 0);
        filled -= at;
        ensure!(filled < bytes.len(), "a message that is longer than any");
    }
}

/// The first frame, where it is whole.
fn frame(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (guest, length) = (number(0)?, number(4)? as usize);
    Some((guest, bytes.get(HEAD_BYTES..HEAD_BYTES + length)?))
}

/// What a panic elsewhere left is of no use to anybody, and that is told there.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! A session that is open, with the transport under it.

use std::io;
use std::time::Duration;

use pika_cloud_common::wire::HostMessage;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::session::Session;
use crate::transport::{Diagnosis, Link, Reader, Writer};

/// Messages that may wait for a guest that does not read. They are few and small: pings, and acks that sum up.
const OUTBOX: usize = 64;

/// How long a hang-up waits for the last message to leave, and for the guest to end.
const FAREWELL: Duration = Duration::from_secs(1);

/// A session that is open.
pub(super) struct Live {
    pub(super) session: Session,
    pub(super) diagnosis: Diagnosis,
    reader: Reader,
    outbox: mpsc::Sender<Vec<u8>>,
    writer: JoinHandle<()>,
}

impl Live {
    pub(super) fn new(session: Session, link: Link) -> Self {
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let writer = tokio::spawn(write_all(link.writer, messages));
        Self { session, diagnosis: link.diagnosis, reader: link.reader, outbox, writer }
    }

    /// Queues a message. `false` where the guest has not read for so long that nothing more fits.
    pub(super) fn send(&self, message: &HostMessage) -> bool {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        self.outbox.try_send(bytes).is_ok()
    }

    /// Ends the session: what was queued leaves, the guest's input closes behind it, and the guest ends by itself. Only then
    /// is the transport dropped, which would kill an agent that is still writing down what it was told.
    pub(super) async fn hang_up(self) {
        let Self { outbox, mut writer, mut reader, diagnosis, .. } = self;
        drop(outbox);
        let farewell = async {
            let _ = (&mut writer).await;
            let mut rest = [0; 4096];
            while let Ok(1..) = reader.read(&mut rest).await {}
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            writer.abort();
        }
        drop(diagnosis);
    }
}

/// Reads into the session; never ready where there is none. Cancelling loses nothing.
pub(super) async fn read(live: Option<&mut Live>) -> io::Result<usize> {
    match live {
        Some(live) => live.reader.read(live.session.space()).await,
        None => std::future::pending().await,
    }
}

/// Writes what is queued, and closes the guest's input behind it.
async fn write_all(mut writer: Writer, mut messages: mpsc::Receiver<Vec<u8>>) {
    while let Some(message) = messages.recv().await {
        // A broken connection shows to the reader, which knows what to do about it.
        if writer.write_all(&message).await.is_err() || writer.flush().await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}

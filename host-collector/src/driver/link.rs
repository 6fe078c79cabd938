//! A stream that is open, with the transport under it. It has no task of its own: its driver reads and writes between two
//! waits, and what it holds while nothing is said is small.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pika_cloud_common::limits::MAX_LINE_BYTES;
use pika_cloud_common::wire::HostMessage;
use tokio::io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};

use super::backend::Link;
use crate::machine::SessionLoss;
use crate::runtime::Core;

/// Bytes that may wait for a guest that does not read: one message of any size, and some of those that are usual, which are
/// pings, and acks that sum up. Beyond it the guest counts as lost.
const MAX_OUTBOX_BYTES: usize = MAX_LINE_BYTES + 64 * 1024;

/// Written bytes that are kept before what waits is moved to the front.
const MAX_WRITTEN_BYTES: usize = 64 * 1024;

/// How long a hang-up waits for the last message to leave, and for the guest to end.
const FAREWELL: Duration = Duration::from_secs(1);

/// A stream that is open.
pub(super) struct Live {
    link: Link,
    /// What is to be written, from `written` on.
    outbox: Vec<u8>,
    written: usize,
    /// What was written may still be in the transport.
    unflushed: bool,
}

impl Live {
    pub(super) fn new(link: Link) -> Self {
        Self { link, outbox: Vec::new(), written: 0, unflushed: false }
    }

    /// The guest's side ended: why, as far as the transport knows.
    pub(super) async fn ended(self) -> SessionLoss {
        let loss = self.link.diagnosis.explain().await;
        self.hang_up().await;
        loss
    }

    /// Queues a message. `false` where the guest has not read for so long that nothing more fits.
    pub(super) fn send(&mut self, message: &HostMessage) -> bool {
        let fits = self.outbox.len() - self.written <= MAX_OUTBOX_BYTES;
        if self.written > MAX_WRITTEN_BYTES {
            // A guest that always leaves something unread frees nothing by reading the rest (Invariant 5).
            self.outbox.drain(..self.written);
            self.written = 0;
        }
        if fits {
            message.write(&mut self.outbox);
        }
        fits
    }

    /// Writes what is queued, as far as the transport takes it.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.outbox.len() {
            let bytes = &self.outbox[self.written..];
            let written = ready!(Pin::new(&mut self.link.writer).poll_write(cx, bytes))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
            self.unflushed = true;
        }
        (self.outbox, self.written) = (Vec::new(), 0);
        if self.unflushed {
            ready!(Pin::new(&mut self.link.writer).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Ends the session: what was queued leaves, the guest's input closes behind it, and the guest ends by itself. Only then
    /// is the transport dropped, which would kill an agent that is still writing down what it was told.
    pub(super) async fn hang_up(mut self) {
        let farewell = async {
            poll_fn(|cx| self.poll_send(cx)).await?;
            self.link.writer.shutdown().await?;
            let mut rest = [0; 1024];
            while self.link.reader.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        };
        // Where it does not go that way, the transport is dropped all the same.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

/// Writes what is queued, and reads into the session; never ready where there is none, or where enough waits for the disk.
/// Cancelling loses nothing.
pub(super) async fn read(mut live: Option<&mut Live>, core: &mut Core) -> io::Result<usize> {
    poll_fn(|cx| {
        let Some(live) = live.as_mut() else { return Poll::Pending };
        if let Poll::Ready(Err(_)) = live.poll_send(cx) {
            // A broken connection shows to the reader, which knows what to do about it.
            (live.outbox, live.written, live.unflushed) = (Vec::new(), 0, false);
        }
        if !core.wants_read() {
            return Poll::Pending;
        }
        let mut space = ReadBuf::new(core.space());
        ready!(Pin::new(&mut live.link.reader).poll_read(cx, &mut space))?;
        Poll::Ready(Ok(space.filled().len()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use pika_cloud_common::wire::{Ack, Empty};
    use tokio::io::DuplexStream;

    use super::super::backend::Explain;
    use super::*;

    struct Silent;

    impl Explain for Silent {
        fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
            Box::pin(std::future::ready(SessionLoss::Lost(String::new())))
        }
    }

    /// A stream that takes so many bytes before the guest reads.
    fn live(room: usize) -> (Live, DuplexStream) {
        let (ours, guest) = tokio::io::duplex(room);
        let (reader, writer) = tokio::io::split(ours);
        let (reader, writer, diagnosis) = (Box::new(reader), Box::new(writer), Box::new(Silent));
        (Live::new(Link { reader, writer, diagnosis, vsock: None }), guest)
    }

    fn ack(seq: u64) -> HostMessage {
        HostMessage::Ack(Ack { seq, logs: std::collections::BTreeMap::new() })
    }

    #[tokio::test]
    async fn what_was_said_leaves_before_the_guests_input_closes() {
        let (mut live, mut guest) = live(10);
        let mut wanted = Vec::new();
        for message in (1..=100).map(ack).chain([HostMessage::Release(Empty {})]) {
            assert!(live.send(&message));
            message.write(&mut wanted);
        }
        let heard = async {
            let mut heard = Vec::new();
            guest.read_to_end(&mut heard).await.unwrap();
            drop(guest);
            heard
        };
        let ((), heard) = tokio::join!(live.hang_up(), heard);
        assert_eq!(heard, wanted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_does_not_read_holds_up_nobody_for_long() {
        let (mut live, _guest) = live(10);
        let sent = (1..10_000).map(|seq| live.send(&ack(seq))).take_while(|fits| *fits).count();
        assert!(sent > 1000 && live.outbox.len() < MAX_OUTBOX_BYTES + MAX_LINE_BYTES, "Invariant 5");
        let began = tokio::time::Instant::now();
        live.hang_up().await;
        assert_eq!(began.elapsed(), FAREWELL);
    }

    /// Invariant 5.
    #[tokio::test]
    async fn a_guest_that_always_leaves_a_little_unread_costs_no_more() {
        let (mut live, mut guest) = live(4096);
        let mut read = vec![0; 4096];
        for seq in 1..20_000 {
            assert!(live.send(&ack(seq)));
            let _ = futures_util::poll!(std::pin::pin!(poll_fn(|cx| live.poll_send(cx))));
            if live.outbox.len() - live.written > 8192 {
                assert!(guest.read(&mut read).await.unwrap() > 0);
            }
        }
        assert!(live.outbox.len() - live.written > 0, "never all of it is read");
        assert!(live.outbox.capacity() < 4 * MAX_WRITTEN_BYTES, "{}", live.outbox.capacity());
    }

    #[tokio::test]
    async fn a_stream_that_said_all_holds_nothing() {
        let (mut live, _guest) = live(64 * 1024);
        (1..100).for_each(|seq| assert!(live.send(&ack(seq))));
        poll_fn(|cx| live.poll_send(cx)).await.unwrap();
        assert_eq!(live.outbox.capacity(), 0);
    }
}

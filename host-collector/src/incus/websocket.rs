//! One direction of an exec's standard streams, as bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures_util::{Sink as _, Stream as _};
use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};

use super::client::{CALL_TIMEOUT, Client};
use super::error::Error;

/// The largest message and frame that is read from Incus; it sends at most 64 KiB at once.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

/// A websocket whose binary messages are read, or written, as one stream of bytes. Incus gives standard input, output and
/// error a websocket each, so one of these carries one direction only.
pub(crate) struct WebSocketHalf {
    socket: WebSocketStream<UnixStream>,
    unread: Bytes,
    ended: bool,
}

impl Client {
    pub(crate) async fn websocket(&self, operation_id: &str, secret: &str) -> Result<WebSocketHalf, Error> {
        let path = format!("/1.0/operations/{operation_id}/websocket");
        let socket = self.open_websocket(&format!("{path}?secret={secret}"), &path).await?;
        Ok(WebSocketHalf { socket, unread: Bytes::new(), ended: false })
    }

    /// Opens a websocket. `shown` is its path as an error may show it, without its secret.
    pub(super) async fn open_websocket(&self, path: &str, shown: &str) -> Result<WebSocketStream<UnixStream>, Error> {
        let request = format!("GET {shown}");
        let open = async {
            let stream = self.connect().await?;
            let config = WebSocketConfig::default()
                .max_message_size(Some(MAX_MESSAGE_BYTES))
                .max_frame_size(Some(MAX_MESSAGE_BYTES));
            let url = format!("ws://incus{path}");
            let opened = tokio_tungstenite::client_async_with_config(url, stream, Some(config)).await;
            let (socket, _) = opened.map_err(|error| refused_or_broken(&request, error))?;
            Ok(socket)
        };
        let timed = tokio::time::timeout(CALL_TIMEOUT, open).await;
        timed.unwrap_or_else(|_| Err(Error::NoAnswer { request: request.clone(), after: CALL_TIMEOUT }))
    }
}

/// Only that this client may not is told apart: whoever opens one may do with less.
fn refused_or_broken(request: &str, error: tungstenite::Error) -> Error {
    let request = request.to_owned();
    match error {
        tungstenite::Error::Http(answer) if answer.status() == StatusCode::FORBIDDEN => {
            let message = answer.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
            Error::Refused { request, code: 403, message }
        }
        error => Error::Transport { request, source: Box::new(error) },
    }
}

impl AsyncRead for WebSocketHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut this.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => this.unread = bytes,
                // Incus ends a stream with an empty text message, and closes the socket behind it.
                Some(Ok(Message::Text(_) | Message::Close(_))) | None => this.ended = true,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let take = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread[..take]);
        this.unread.advance(take);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WebSocketHalf {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.socket).poll_ready(cx)).map_err(io::Error::other)?;
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        Pin::new(&mut this.socket).start_send(message).map_err(io::Error::other)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx).map_err(io::Error::other)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx).map_err(io::Error::other)
    }
}

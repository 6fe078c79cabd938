//! An Incus that answers what a test wants.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::incus::Client;

/// What it says to a call.
pub(super) enum Said {
    /// With that code, and metadata.
    Answer(u16, Value),
    /// It hangs up.
    Nothing,
}

/// An Incus, for as long as its test's runtime lives.
pub(super) struct Fake {
    pub(super) client: Client,
    asked: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

impl Fake {
    /// `answer` gets method, path with query, and body.
    pub(super) fn new(mut answer: impl FnMut(&str, &str, &Value) -> Said + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (listener, heard) = (UnixListener::bind(&path).unwrap(), Arc::clone(&asked));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (method, path, body) = read(&mut stream).await;
                heard.lock().unwrap().push(format!("{method} {path}"));
                if let Said::Answer(code, metadata) = answer(&method, &path, &body) {
                    write(&mut stream, code, &metadata).await;
                }
            }
        });
        Self { client: Client::unix(path), asked, _folder: folder }
    }

    /// Every method and path, in their order.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn read(stream: &mut UnixStream) -> (String, String, Value) {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).await.unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        match line.trim().split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await.unwrap();
    let mut words = first.split(' ').map(str::to_owned);
    let body = serde_json::from_slice(&body).unwrap_or_default();
    (words.next().unwrap(), words.next().unwrap(), body)
}

async fn write(stream: &mut UnixStream, code: u16, metadata: &Value) {
    let body = match code {
        200 => json!({ "type": "sync", "metadata": metadata }),
        code => json!({ "type": "error", "error": "no", "error_code": code }),
    };
    let body = body.to_string();
    let head = format!("HTTP/1.1 {code} x\r\netag: v7\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
}

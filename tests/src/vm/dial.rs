//! Streams to ports of a guest, through the device's UNIX socket.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// For a guest that is up.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to reach a guest's ports. Outlives its VM, and then reaches nothing.
#[derive(Clone, Debug)]
pub struct Vsock {
    pub(super) socket: PathBuf,
    pub(super) console: PathBuf,
}

/// No stream was opened.
#[derive(Debug)]
pub enum DialError {
    /// The VM has ended.
    NoDevice(io::Error),
    /// The guest has not loaded its vsock driver yet.
    NotUp,
    /// The guest is up, and nothing listens on that port.
    Closed,
    /// No answer: the VM is paused, or hangs.
    TimedOut,
}

impl std::fmt::Display for DialError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoDevice(error) => write!(f, "the VM has no vsock device: {error}"),
            Self::NotUp => f.write_str("the guest is not up yet"),
            Self::Closed => f.write_str("nothing listens on that port of the guest"),
            Self::TimedOut => f.write_str("the guest does not answer"),
        }
    }
}

impl Vsock {
    /// Opens a stream to a port.
    pub async fn dial(&self, port: u32, within: Duration) -> Result<UnixStream, DialError> {
        let this = self.clone();
        // One that comes too late is waited for all the same: the device breaks down over a host that hung up on it while its
        // guest had not answered.
        let dialled = tokio::spawn(async move { this.connect(port).await });
        match timeout(within, dialled).await {
            Ok(dialled) => dialled.expect("a dial does not panic"),
            Err(_) => Err(DialError::TimedOut),
        }
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, DialError> {
        // Never before the guest's driver is there: dialled while it comes up, the device was seen to lose the
        // thread that moves bytes, for good.
        if !self.is_up() {
            return Err(DialError::NotUp);
        }
        let mut stream = UnixStream::connect(&self.socket).await.map_err(DialError::NoDevice)?;
        // The device closes a connection that comes to nothing, and may do so before it is asked for anything.
        if stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.is_err() {
            return Err(DialError::Closed);
        }
        // Byte for byte: what follows the line is the guest's.
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') && line.len() < 32 {
            match stream.read_u8().await {
                Ok(byte) => line.push(byte),
                Err(_) => return Err(DialError::Closed),
            }
        }
        if line.starts_with(b"OK ") { Ok(stream) } else { Err(DialError::Closed) }
    }

    /// Sends a line to a port, and gives the line that comes back, for whoever has no tokio.
    pub(super) fn ask(&self, port: u32, line: &str) -> io::Result<String> {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
        // The device throws away what comes with the line that is for itself.
        for line in [&format!("CONNECT {port}"), line] {
            writer.write_all(format!("{line}\n").as_bytes())?;
            let mut said = String::new();
            if reader.read_line(&mut said)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !said.starts_with("OK ") {
                return Ok(said);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Whether the guest has loaded its vsock driver since it was last started.
    pub fn is_up(&self) -> bool {
        let console = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console).contains(UP)
    }
}

/// Closes a stream so that the guest notices. (Where bytes of the guest are unread at a close, the device forgets to say so.)
pub async fn hang_up(mut stream: UnixStream) {
    let farewell = async {
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // One that broke before, or does not end, is dropped all the same.
    let _ = timeout(PATIENCE, farewell).await;
}

/// What the guest's first process says on the console once its modules are loaded.
const UP: &str = "pika-rig: up";

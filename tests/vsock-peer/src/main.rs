//! A peer on `AF_VSOCK`, for the guests of the VM rig and for nowhere else: it refuses to run where the kernel's command line
//! does not say that this is one. (A machine's own vsock belongs to whoever runs the machine.)
//!
//! ```text
//! vsock-peer serve                  listens on port 20600; a line says what a connection is for:
//!                                     echo         every byte comes back
//!                                     send N CHUNK N bytes come, in writes of CHUNK, then a line with their SHA-256
//!                                     take N       N bytes go there, then a line with their SHA-256 comes
//!                                     clock        each line comes back as the guest's time, in microseconds since 1970
//!                                     into PATH    every byte goes to that file, for whoever reads it there
//!                                     gate         /tmp/gate is made, for which a workload may wait; `open` comes
//! vsock-peer play garbage|silent    listens on the agent's port, and keeps no contract
//! vsock-peer dial CID PORT          connects, says so, and says what comes within 5 s: `refused: WHY` or `connected`, then
//!                                   `closed`, `silent` or `heard N bytes`
//! ```

mod socket;

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use socket::{Listener, connect};

/// The agent's port.
const AGENT_PORT: u32 = 20555;
/// Ours.
const PORT: u32 = 20600;
/// The word on the kernel's command line of a guest of the rig.
const MARK: &str = "pika_rig";
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_CHUNK_BYTES: usize = 256 * 1024;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let words = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if !words.split_whitespace().any(|word| word == MARK) {
        eprintln!("vsock-peer: this is no guest of the VM rig: its kernel's command line lacks `{MARK}`");
        return ExitCode::from(77);
    }
    let done = match args[..] {
        ["serve"] => serve(PORT, |stream| {
            // A connection that breaks concerns its other end only.
            let _ = answer(stream);
        }),
        ["play", "garbage"] => serve(AGENT_PORT, play_garbage),
        ["play", "silent"] => serve(AGENT_PORT, play_silent),
        ["dial", cid, port] => match (cid.parse(), port.parse()) {
            (Ok(cid), Ok(port)) => {
                dial(cid, port);
                Ok(())
            }
            _ => Err(io::Error::other("CID and PORT are numbers")),
        },
        _ => Err(io::Error::other("wrong usage: see its source")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock-peer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: u32, handle: fn(File)) -> io::Result<()> {
    let listener = Listener::bind(port)?;
    loop {
        let stream = listener.accept()?;
        std::thread::spawn(move || handle(stream));
    }
}

/// What a line asks for.
fn answer(mut stream: File) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    match words[..] {
        ["echo"] => pass_on(reader, stream),
        ["clock"] => clock(reader, &mut stream),
        ["into", path] => pass_on(reader, File::options().write(true).open(path)?),
        ["send", len, chunk] => {
            let chunk = usize::try_from(number(chunk)?).unwrap_or(usize::MAX).clamp(1, MAX_CHUNK_BYTES);
            send(&mut stream, number(len)?, chunk)
        }
        ["take", len] => {
            let mut digest = Sha256::new();
            io::copy(&mut reader.take(number(len)?), &mut digest)?;
            writeln!(stream, "{}", hex(digest))
        }
        ["gate"] => {
            fs::write("/tmp/gate", "")?;
            writeln!(stream, "open")
        }
        _ => writeln!(stream, "not understood: {}", line.trim_end()),
    }
}

/// Byte for byte as it comes, so that what is measured is the way.
fn pass_on(mut reader: BufReader<File>, mut to: File) -> io::Result<()> {
    loop {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        to.write_all(bytes)?;
        let len = bytes.len();
        reader.consume(len);
    }
}

fn clock(reader: BufReader<File>, stream: &mut File) -> io::Result<()> {
    for line in reader.lines() {
        line?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(io::Error::other)?;
        // In one write.
        stream.write_all(format!("{}\n", now.as_micros()).as_bytes())?;
    }
    Ok(())
}

fn send(stream: &mut File, len: u64, chunk: usize) -> io::Result<()> {
    let mut digest = Sha256::new();
    // Any bytes will do that do not repeat with a chunk or a page.
    let mut state = len | 1;
    let mut bytes = vec![0; chunk];
    let mut left = len;
    while left > 0 {
        for word in bytes.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
        let now = &bytes[..usize::try_from(left).map_or(chunk, |left| left.min(chunk))];
        stream.write_all(now)?;
        digest.update(now);
        left -= now.len() as u64;
    }
    writeln!(stream, "{}", hex(digest))
}

fn hex(digest: Sha256) -> String {
    use std::fmt::Write as _;
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes that are no protocol, without an end.
fn play_garbage(mut stream: File) {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = [0; 4096];
    loop {
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[0];
        }
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Reads, and never says a word.
fn play_silent(mut stream: File) {
    let mut bytes = [0; 4096];
    while matches!(stream.read(&mut bytes), Ok(1..)) {}
}

fn dial(cid: u32, port: u32) {
    let mut stream = match connect(cid, port, PATIENCE) {
        Ok(stream) => stream,
        Err(error) => {
            println!("refused: {error}");
            return;
        }
    };
    println!("connected");
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes) {
        Ok(0) => println!("closed"),
        Ok(n) => println!("heard {n} bytes: {}", String::from_utf8_lossy(&bytes[..n]).trim_end()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => println!("silent"),
        Err(error) => println!("closed: {error}"),
    }
}

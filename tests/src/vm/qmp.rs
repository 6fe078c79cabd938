//! Just enough of QEMU's monitor protocol: one command a connection.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// QEMU answers at once, or hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// Has QEMU perform a command, and gives what it answered.
pub(super) fn execute(socket: &Path, command: &str) -> io::Result<Value> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    // Its greeting.
    next(&mut reader)?;
    ask(&mut reader, &mut writer, "qmp_capabilities")?;
    ask(&mut reader, &mut writer, command)
}

fn ask(reader: &mut BufReader<UnixStream>, writer: &mut UnixStream, command: &str) -> io::Result<Value> {
    writer.write_all(format!("{}\n", json!({ "execute": command })).as_bytes())?;
    loop {
        let mut said = next(reader)?;
        if said.get("error").is_some() {
            return Err(io::Error::other(format!("QEMU refuses `{command}`: {said}")));
        }
        if said.get("return").is_some() {
            return Ok(said["return"].take());
        }
        // Events come in between.
    }
}

fn next(reader: &mut BufReader<UnixStream>) -> io::Result<Value> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&line).map_err(io::Error::other)
}

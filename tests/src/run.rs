//! `pika-cloud` as a child process: what it prints and when, how much memory it takes, how it ends.

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};

/// A line that it printed.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it came, by this machine's clock, which containers share.
    pub at: SystemTime,
    /// The line.
    pub text: String,
}

/// A process that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    began: Instant,
    memory: Memory,
    stdout: Reading,
    stderr: Reading,
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
    /// The most memory that it held at once (`VmHWM`), in KiB.
    pub peak_kib: u64,
}

#[derive(Debug)]
struct Reading {
    lines: Arc<Mutex<Vec<Line>>>,
    thread: Option<JoinHandle<()>>,
}

impl Reading {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&lines);
        let thread = std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).into_owned();
                let line_of_text = Line { at: SystemTime::now(), text };
                shared.lock().unwrap_or_else(PoisonError::into_inner).push(line_of_text);
                line.clear();
            }
        });
        Self { lines, thread: Some(thread) }
    }

    fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn text(&self) -> String {
        self.lines().into_iter().map(|line| line.text).collect()
    }
}

impl Running {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Reading::of(child.stdout.take().expect("its output is a pipe"));
        let stderr = Reading::of(child.stderr.take().expect("its errors are a pipe"));
        Self { memory: Memory::of(child.id()), child, began: Instant::now(), stdout, stderr }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("our child can be signalled");
    }

    /// Kills it with `kill -9` and reaps it.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// What it has printed so far.
    pub fn printed(&self) -> Vec<Line> {
        self.stdout.lines()
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        self.stderr.text()
    }

    /// Waits for its end.
    pub fn finish(self) -> Finished {
        self.finish_within(Duration::from_secs(120))
    }

    /// Waits for its end, at most so long.
    pub fn finish_within(mut self, limit: Duration) -> Finished {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            let said = self.stderr.text();
            assert!(self.began.elapsed() < limit, "still running after {} s; it said: {said}", limit.as_secs());
            // What takes long is looked at the less: looking costs time as well, where a CPU is emulated.
            std::thread::sleep((self.began.elapsed() / 50).clamp(Duration::from_millis(5), Duration::from_secs(1)));
        };
        let took = self.memory.ended().unwrap_or_else(Instant::now) - self.began;
        for reading in [&mut self.stdout, &mut self.stderr] {
            let _ = reading.thread.take().map(JoinHandle::join);
        }
        Finished {
            code: status.code(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            took,
            peak_kib: self.memory.peak(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// The same, once its exit code was found to be `code`.
    #[expect(clippy::return_self_not_must_use, reason = "most often the code is all that counts")]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit code; it said:\n{}", self.stderr);
        self
    }

    /// The same, once it was found to have said all of `words`.
    #[expect(clippy::return_self_not_must_use, reason = "most often the words are all that counts")]
    pub fn saying(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in what it said:\n{}", self.stderr);
        }
        self
    }
}

/// Looks at a process's memory for as long as it runs.
#[derive(Debug)]
struct Memory {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    peak_kib: u64,
    /// When it was found to have ended.
    ended: Option<Instant>,
}

impl Memory {
    fn of(pid: u32) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        std::thread::spawn(move || {
            while let Some(kib) = peak_kib(pid) {
                let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
                seen.peak_kib = seen.peak_kib.max(kib);
                drop(seen);
                std::thread::sleep(Duration::from_millis(5));
            }
            shared.lock().unwrap_or_else(PoisonError::into_inner).ended = Some(Instant::now());
        });
        Self { seen }
    }

    fn peak(&self) -> u64 {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).peak_kib
    }

    fn ended(&self) -> Option<Instant> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).ended
    }
}

/// `VmHWM`: the kernel's own record of the peak, so that looking rarely misses nothing but the very end. A process that has
/// ended has none.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

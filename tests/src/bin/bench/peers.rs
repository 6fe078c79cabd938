//! What else moves lines from a file in memory to a file on the disk.
//!
//! | figure | what |
//! |---|---|
//! | `cat_dd_per_s` | `cat` into `dd` over a pipe, one fdatasync at the end: what pipe and disk can do, lines not looked at |
//! | `socat_per_s` | `socat` to `socat` over TCP on this machine: bytes only, nothing synced |
//! | `rsyslog_per_s` | rsyslog's file input, its TCP forwarding, a second rsyslog's TCP input and file output: lines, nothing synced |

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::process::{Child, Command};
use tokio::time::sleep;

/// Where rsyslog is, also for users whose `PATH` lacks it.
const RSYSLOGD: &str = "/usr/sbin/rsyslogd";
/// Longer than any of them takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something that moves lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    CatDd,
    Socat,
    Rsyslog,
}

impl Peer {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::CatDd, Self::Socat, Self::Rsyslog];

    /// Its figure's name.
    pub(crate) fn figure(self) -> &'static str {
        match self {
            Self::CatDd => "cat_dd_per_s",
            Self::Socat => "socat_per_s",
            Self::Rsyslog => "rsyslog_per_s",
        }
    }

    /// Whether it is on this machine.
    pub(crate) fn is_installed(self) -> bool {
        match self {
            Self::CatDd => true,
            Self::Socat => in_path("socat"),
            Self::Rsyslog => Path::new(RSYSLOGD).exists(),
        }
    }
}

/// Moves the lines of `source` into a new file on the disk; says how long it took.
pub(crate) async fn carry(peer: Peer, source: &Path, disk: &Path) -> anyhow::Result<Duration> {
    let folder = tempfile::tempdir_in(disk)?;
    let carried = match peer {
        Peer::CatDd => cat_dd(source, folder.path()).await,
        Peer::Socat => socat(source, folder.path()).await,
        Peer::Rsyslog => rsyslog(source, folder.path()).await,
    };
    let took = carried.with_context(|| format!("{peer:?}"))?;
    let (wanted, found) = (std::fs::metadata(source)?.len(), std::fs::metadata(target(folder.path()))?.len());
    ensure!(found == wanted, "{peer:?} wrote {found} bytes of {wanted}");
    Ok(took)
}

fn target(folder: &Path) -> PathBuf {
    folder.join("target.jsonl")
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

async fn cat_dd(source: &Path, folder: &Path) -> anyhow::Result<Duration> {
    let mut shell = quiet("sh");
    shell.args(["-c", r#"cat "$1" | dd of="$2" bs=64k iflag=fullblock conv=fdatasync"#, "sh"]);
    shell.arg(source).arg(target(folder));
    let began = Instant::now();
    succeed(&mut shell.spawn()?).await?;
    Ok(began.elapsed())
}

async fn socat(source: &Path, folder: &Path) -> anyhow::Result<Duration> {
    let port = free_port()?;
    let mut listener = quiet("socat");
    listener.arg("-u").arg(format!("TCP-LISTEN:{port},bind=127.0.0.1"));
    listener.arg(format!("OPEN:{},creat,trunc", target(folder).display()));
    let mut listener = listener.spawn()?;
    sleep(Duration::from_millis(200)).await;
    let mut sender = quiet("socat");
    sender.arg("-u").arg(format!("OPEN:{},rdonly", source.display())).arg(format!("TCP:127.0.0.1:{port}"));
    let began = Instant::now();
    succeed(&mut sender.spawn()?).await?;
    succeed(&mut listener).await?;
    Ok(began.elapsed())
}

async fn rsyslog(source: &Path, folder: &Path) -> anyhow::Result<Duration> {
    let port = free_port()?;
    let target = target(folder);
    let receiver = format!(
        "global(workDirectory=\"{}\")\nmodule(load=\"imtcp\")\ninput(type=\"imtcp\" port=\"{port}\" address=\"127.0.0.1\")\n\
         template(name=\"line\" type=\"string\" string=\"%rawmsg-after-pri%\\n\")\n\
         action(type=\"omfile\" file=\"{}\" template=\"line\" ioBufferSize=\"64k\")\n",
        folder.display(),
        target.display()
    );
    let sender = format!(
        "global(workDirectory=\"{}\")\nmodule(load=\"imfile\")\n\
         input(type=\"imfile\" file=\"{}\" tag=\"pika\" ruleset=\"on\")\n\
         template(name=\"line\" type=\"string\" string=\"%msg%\\n\")\n\
         ruleset(name=\"on\") {{ action(type=\"omfwd\" target=\"127.0.0.1\" port=\"{port}\" protocol=\"tcp\" template=\"line\") }}\n",
        folder.display(),
        source.display()
    );
    let _receiver = rsyslogd(folder, "receiver", &receiver)?;
    sleep(Duration::from_millis(500)).await;
    let wanted = std::fs::metadata(source)?.len();
    let began = Instant::now();
    let _sender = rsyslogd(folder, "sender", &sender)?;
    while std::fs::metadata(&target).map_or(0, |found| found.len()) < wanted {
        if began.elapsed() > PATIENCE {
            bail!("rsyslog does not finish");
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(began.elapsed())
}

fn rsyslogd(folder: &Path, name: &str, text: &str) -> anyhow::Result<Child> {
    let config = folder.join(format!("{name}.conf"));
    std::fs::write(&config, text)?;
    let mut command = quiet(RSYSLOGD);
    command.arg("-n").arg("-f").arg(&config).arg("-i").arg(folder.join(format!("{name}.pid")));
    Ok(command.spawn()?)
}

/// A command without terminal that ends with its handle.
fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}

async fn succeed(child: &mut Child) -> anyhow::Result<()> {
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.context("it does not end")??;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

/// A port of this machine that nobody listens on just now.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

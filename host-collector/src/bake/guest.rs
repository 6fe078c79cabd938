//! What is done in the builder, all of it by exec.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::{Instant, sleep, timeout_at};

use super::error::BakeError;
use super::install::GuestFile;
use crate::incus::{Client, Error, InstanceState};
use crate::transport::{Exec, Ran, RunError, is_absent, run, shown};

/// How long a step of ours in the builder may take.
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(120);

/// How long a file may take to come over.
pub(super) const FILE_LIMIT: Duration = Duration::from_secs(1800);

/// How long Incus may take to bring an exec about, in a builder that may be starting.
const TRY_LIMIT: Duration = Duration::from_secs(20);

/// Nobody waits for longer.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How much a script may print that is handed over; more is passed over.
const MAX_SHOWN_BYTES: usize = 64 * 1024 * 1024;

/// Said in place of the rest.
const CUT: &[u8] = b"\n[more than 64 MiB: the rest of the output is left out]\n";

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);

/// Puts standard input at `$1`, of `$2` bytes, with the mode `$3`; until it is whole it is for root alone.
const PUT: &str = r#"
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
fail() { echo "$1" >&2; exit 1; }
umask 022
folder=${1%/*}
mkdir -p "$folder/" || exit 1
if [ -d "$1" ]; then fail "$1 is a folder"; fi
new=$folder/.pika-bake.$$
trap 'rm -f "$new"' EXIT
umask 077
set -C
cat >"$new" || fail "$new could not be written"
size=$(wc -c <"$new")
[ "$size" -eq "$2" ] || fail "$size of $2 bytes came"
chmod "$3" "$new" && mv -f "$new" "$1" || exit 1
"#;

/// Prints mode, owner and content of the file `$1`.
const GET: &str = r#"
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
stat -c '%a %u' "$1" && exec cat "$1"
"#;

/// Runs the script at `$1`. It gets no input, and its two outputs are one.
const PROVISION: &str = r#"exec </dev/null 2>&1; exec /bin/sh "$1""#;

/// The instance in which an image is baked.
#[derive(Clone, Copy)]
pub(super) struct Builder<'a> {
    pub(super) client: &'a Client,
    pub(super) project: &'a str,
    pub(super) name: &'a str,
}

/// How a provisioning script ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Provisioned {
    Ended(i64),
    /// Nobody knows how.
    Cut,
    TimedOut,
}

impl Builder<'_> {
    async fn run(&self, command: &[&str], input: impl AsyncRead + Unpin, limit: Duration) -> Result<Ran, RunError> {
        run(self.client, (self.project, self.name), command, input, limit).await
    }

    /// Runs a script of ours, and gives what it printed.
    pub(super) async fn script(&self, doing: &str, script: &str) -> Result<Vec<u8>, BakeError> {
        let ran = self.run(&["/bin/sh", "-c", script], &[][..], STEP_LIMIT).await;
        succeeded(doing, ran).map(|ran| ran.output)
    }

    /// Puts a file of ours in.
    pub(super) async fn put_text(&self, file: &GuestFile) -> Result<(), BakeError> {
        self.put(file.path, file.text.as_bytes(), file.text.len() as u64, file.mode).await
    }

    /// Puts `size` bytes at a path: all of them, or nothing is changed there.
    pub(super) async fn put(
        &self,
        path: &str,
        from: impl AsyncRead + Unpin,
        size: u64,
        mode: u32,
    ) -> Result<(), BakeError> {
        let (size, mode) = (size.to_string(), format!("{mode:04o}"));
        let command = ["/bin/sh", "-c", PUT, "pika-cloud", path, &size, &mode];
        succeeded(&format!("putting {path}"), self.run(&command, from, FILE_LIMIT).await).map(drop)
    }

    /// Whether a file of ours is as it was put in.
    pub(super) async fn has(&self, file: &GuestFile) -> Result<bool, BakeError> {
        let command = ["/bin/sh", "-c", GET, "pika-cloud", file.path];
        match self.run(&command, &[][..], STEP_LIMIT).await {
            Ok(Ran { code: Some(0), output, .. }) => {
                Ok(output == format!("{:o} 0\n{}", file.mode, file.text).as_bytes())
            }
            // One that is gone.
            Ok(Ran { code: Some(1), .. }) | Err(RunError::TooMuch) => Ok(false),
            unknown => succeeded(&format!("reading {}", file.path), unknown).map(|_| false),
        }
    }

    /// Tries a script until something can be run at all, or nothing ever will. Gives what it printed.
    pub(super) async fn first(&self, script: &str, limit: Duration) -> Result<Vec<u8>, NotUp> {
        let deadline = Instant::now() + limit;
        loop {
            let problem = match self.run(&["/bin/sh", "-c", script], &[][..], TRY_LIMIT).await {
                Ok(Ran { code: Some(0), output, .. }) => return Ok(output),
                Ok(Ran { code: Some(code), .. }) if is_absent(code) => return Err(NotUp::NoShell),
                Ok(ran) => format!("exec ended with {}: {}", ran.code.unwrap_or(-1), shown(&ran)),
                Err(error) => error.to_string(),
            };
            match self.client.instance(self.project, self.name).await {
                Ok(Some(view)) if view.state() == InstanceState::Stopped => {
                    return Err(NotUp::Late("it stopped by itself".to_owned()));
                }
                _ if Instant::now() >= deadline => return Err(NotUp::Late(problem)),
                _ => sleep(PAUSE).await,
            }
        }
    }

    /// Runs a provisioning script that lies at `path`, and hands over what it prints, up to [`MAX_SHOWN_BYTES`].
    pub(super) async fn provision(
        &self,
        path: &str,
        limit: Duration,
        mut show: impl FnMut(&[u8]) + Send,
    ) -> Result<Provisioned, Error> {
        let deadline = deadline(limit);
        let command = ["/bin/sh", "-c", PROVISION, "pika-cloud", path];
        let Exec { input: _input, mut output, end } =
            Exec::start(self.client, self.project, self.name, &command).await?;
        let mut chunk = vec![0; 16 * 1024];
        let (mut left, mut is_cut) = (MAX_SHOWN_BYTES, false);
        loop {
            match timeout_at(deadline, output.read(&mut chunk)).await {
                Ok(Ok(0) | Err(_)) => break,
                Ok(Ok(_)) if is_cut => {}
                Ok(Ok(n)) => {
                    let shown = n.min(left);
                    if shown > 0 {
                        show(&chunk[..shown]);
                    }
                    left -= shown;
                    is_cut = shown < n;
                    if is_cut {
                        show(CUT);
                    }
                }
                Err(_) => return Ok(Provisioned::TimedOut),
            }
        }
        // It may have closed its output and go on.
        loop {
            match end.code().await {
                Some(code) => return Ok(Provisioned::Ended(code)),
                None if Instant::now() >= deadline => return Ok(Provisioned::TimedOut),
                None if !end.is_running().await => {
                    // It may have ended between the two.
                    return Ok(end.code().await.map_or(Provisioned::Cut, Provisioned::Ended));
                }
                None => {}
            }
        }
    }
}

/// What lies beyond the clock's end is as good as none.
fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit.min(FAR)
}

/// Nothing can be run in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotUp {
    NoShell,
    /// It never came to be; what was answered last.
    Late(String),
}

fn succeeded(doing: &str, ran: Result<Ran, RunError>) -> Result<Ran, BakeError> {
    let failed = |problem: String| BakeError::Builder { doing: doing.to_owned(), problem };
    match ran {
        Ok(ran) if ran.code == Some(0) => Ok(ran),
        Ok(Ran { code: Some(code), .. }) if is_absent(code) => {
            Err(failed(format!("exit code {code}: a program that it needs is not there")))
        }
        Ok(ran) => {
            let code = ran.code.map_or("without an exit code".to_owned(), |code| format!("exit code {code}"));
            Err(failed(format!("{code}: {}", shown(&ran))))
        }
        Err(RunError::Incus(source)) => Err(BakeError::Incus { doing: format!("{doing} in the builder"), source }),
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use super::PUT;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// An order may ask for no limit at all.
    #[test]
    fn no_limit_is_beyond_the_clock() {
        assert!(super::deadline(std::time::Duration::MAX) > tokio::time::Instant::now());
    }

    /// A key is not for everybody until the last of its bytes is there.
    #[test]
    fn what_arrives_is_for_root_alone_until_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (tools, to) = (folder.path().join("tools"), folder.path().join("etc/keys/key"));
        fs::create_dir(&tools).unwrap();
        // Looks at the file that it writes to.
        fs::write(tools.join("cat"), "#!/bin/sh\nstat -L -c %a /proc/$$/fd/1 >\"$SEEN\"\nexec /bin/cat\n").unwrap();
        fs::set_permissions(tools.join("cat"), PermissionsExt::from_mode(0o755)).unwrap();
        let seen = folder.path().join("seen");
        for (text, octal) in [("0600", 0o600), ("0644", 0o644), ("4755", 0o4755)] {
            let mut put = Command::new("/bin/sh")
                .args(["-c", PUT, "pika-cloud", to.to_str().unwrap(), "3", text])
                .env("PATH", format!("{}:/usr/bin:/bin", tools.display()))
                .env("SEEN", &seen)
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            put.stdin.take().unwrap().write_all(b"key").unwrap();
            assert!(put.wait().unwrap().success());
            assert_eq!((fs::read_to_string(&seen).unwrap().trim(), mode(&to)), ("600", octal));
            assert_eq!(fs::read(&to).unwrap(), b"key");
            assert_eq!(mode(to.parent().unwrap()), 0o755, "folders are for all");
        }
    }
}

//! The command line.

use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Reports a workload's lifecycle to the host that started it, runs the workload, and serves the host's session.
#[derive(Debug, Parser)]
#[command(
    name = "pika-guest",
    version,
    about = "Reports a workload's lifecycle to the host that started it.",
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const AFTER_HELP: &str = "\
The files are in /run/pika-cloud (or where PIKA_CLOUD_DIR says): events.jsonl, status.json, result.json, logs/guest.log,
and artifacts/ for whatever the host shall collect. Every verb writes them itself and returns when they hold.
PIKA_GUEST_MAX_EVENT_BYTES and PIKA_GUEST_MAX_LOG_BYTES lower what may wait for the host (64 and 256 MiB).

Examples:
  pika-guest starting --message 'migrating the database'
  pika-guest progress download --fraction 0.4 --details '{\"bytes\":1048576}'
  pika-guest ready
  pika-guest failed --exit-code 3 --message 'no space left' --wait-ack 10s
  printf '%s\\n' '{\"kind\":\"progress\",\"name\":\"build\"}' '{\"kind\":\"ready\"}' | pika-guest emit
  pika-guest run -- make test
  pika-guest events --follow --after 17

Exit codes (`run` ends with the workload's own: 128 + n for signal n, 124 for its time limit, 126 and 127 as in a shell):
  0   done          64  wrong usage        65  not the expected data (JSON, too long, a reserved name)
  66  nothing there 69  the runtime has ended already, no event may follow
  73  the folder cannot be made or written
  74  read or write failed                 75  not now: lock busy, cap reached, not acknowledged in time
  76  the peer does not speak the protocol 77  no permission";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// The workload is being started.
    Starting(Words),
    /// The workload is ready, whatever that means to it.
    Ready(Words),
    /// The workload ended without success; no event may follow.
    Failed(LastWords),
    /// The workload ended with success; no event may follow.
    Completed(LastWords),
    /// How far the workload is; changes no state.
    Progress(ProgressWords),
    /// Shows the current state.
    Status(StatusArgs),
    /// Prints the events, one JSON object a line.
    Events(EventsArgs),
    /// Writes many events: JSON lines on standard input, each {kind, message?, details?}.
    #[command(long_about = EMIT_HELP)]
    Emit,
    /// Runs a workload: output to logs/guest.log, its start and its end as events.
    Run(RunArgs),
    /// Serves a host's session on standard input and output.
    Stream(StreamArgs),
    /// Listens for hosts' sessions, over vsock and a UNIX socket; an init runs it.
    #[command(long_about = SERVE_HELP)]
    Serve(ServeArgs),
    /// Says which agent this is.
    Version(VersionArgs),
    /// Supervises what a session started; not for people.
    #[command(hide = true)]
    Supervise(SuperviseArgs),
}

const EMIT_HELP: &str = "\
Writes many events: JSON lines on standard input, each {kind, message?, details?}.

`kind` is starting, ready, failed, completed or progress. Progress takes `name` and `fraction` too, the last two of the
states `exit_code`. What is there is written in one go; no lock is held while waiting for more. The first line that is
wrong or refused ends it, with its number; what came before is written.";

#[derive(Debug, Args)]
pub(crate) struct Words {
    /// A text for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) message: String,
    /// Anything for programs, as JSON. `progress`, `notice` and `exit_code` in it are reserved.
    #[arg(long, value_name = "JSON")]
    pub(crate) details: Option<String>,
    /// Wait that long (10 or 10s) for the host to have the event, durably; else exit 75, and the event stays.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub(crate) wait_ack: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct LastWords {
    #[command(flatten)]
    pub(crate) words: Words,
    /// The workload's exit code.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) exit_code: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct ProgressWords {
    /// What it is that goes on.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) words: Words,
    /// How much of it is done, from 0 to 1.
    #[arg(long, value_name = "F", value_parser = fraction)]
    pub(crate) fraction: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print status.json as it stands.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Stay, and print what comes.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only events behind this one.
    #[arg(long, value_name = "SEQ", default_value_t = 0, hide_default_value = true)]
    pub(crate) after: u64,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Run what this file asks for (guest-request.json, version 2).
    #[arg(long, value_name = "FILE", conflicts_with = "command")]
    pub(crate) request: Option<std::path::PathBuf>,
    /// End the workload after that long (with TERM, then KILL) and exit 124.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,
    /// How long between TERM and KILL.
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "10")]
    pub(crate) stop_grace: Duration,
    /// How long to stay after the end for a host that follows to have everything.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub(crate) wait_release: Option<Duration>,
    /// The workload and its arguments.
    #[arg(last = true, required_unless_present = "request")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct StreamArgs {
    /// They are a connection over vsock, which whatever runs on the host may have opened: it has to name this machine.
    #[arg(long, hide = true)]
    pub(crate) vsock: bool,
}

const SERVE_HELP: &str = "\
Listens for hosts' sessions, over vsock and a UNIX socket; an init runs it.

It stays in the foreground, says what it has to say on standard error, and needs no particular init. Over vsock only the host
(CID 2) is served, and only sessions that name this machine by its DMI uuid. Over the UNIX socket (mode 0660, group pika-cloud where there is one) a session has the rights of the user
who dials. A vsock driver that comes late is waited for. A container has no vsock of its own: there it listens on the UNIX socket
alone, unless a port is named. TERM ends it and its sessions, and never a workload.

Where an init listens for what a host starts (/run/pika-guest/supervise.sock, or PIKA_GUEST_SUPERVISE), it supervises that in a
unit of its own; else the agent does.";

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The vsock port [default: `PIKA_GUEST_PORT`, else 20555, in a container none].
    #[arg(long, value_name = "PORT", value_parser = port)]
    pub(crate) port: Option<u32>,
    /// Listen on a UNIX socket at PATH, too. Its folder is made; no link in it is followed.
    #[arg(long, value_name = "PATH")]
    pub(crate) unix: Option<std::path::PathBuf>,
    /// Do not listen on vsock: for containers.
    #[arg(long, requires = "unix", conflicts_with = "port")]
    pub(crate) no_vsock: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SuperviseArgs {
    /// The descriptor that holds the supervisor's lock; what to run comes on standard input.
    #[arg(long, required_unless_present = "socket")]
    pub(crate) lock_fd: Option<i32>,
    /// Standard input is a connection, over which both come.
    #[arg(long, conflicts_with = "lock_fd")]
    pub(crate) socket: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// As JSON, with the digest (SHA-256) of this program.
    #[arg(long)]
    pub(crate) json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    let wrong = || format!("`{text}` is not a number of seconds (such as 10 or 10s)");
    let secs: f64 = number.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(secs).map_err(|_| wrong())
}

/// A vsock port; the highest number means "any" to the kernel.
pub(crate) fn port(text: &str) -> Result<u32, String> {
    let port = text.parse().ok().filter(|&port| port != 0 && port != u32::MAX);
    port.ok_or_else(|| format!("`{text}` is not a vsock port: 1 to {}", u32::MAX - 1))
}

fn fraction(text: &str) -> Result<f64, String> {
    let fraction: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&fraction) { Ok(fraction) } else { Err(format!("{text} is not between 0 and 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_with_and_without_unit() {
        assert_eq!(seconds("10"), Ok(Duration::from_secs(10)));
        assert_eq!(seconds("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "s", "-1", "inf", "nan", "1m", "1e99"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_that_can_be_listened_on() {
        assert_eq!((port("1"), port("4294967294")), (Ok(1), Ok(u32::MAX - 1)));
        for wrong in ["", "0", "-1", "4294967295", "4294967296", "any"] {
            assert!(port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn fractions_lie_between_0_and_1() {
        assert_eq!(fraction("0.25"), Ok(0.25));
        for wrong in ["1.01", "-0.1", "nan", "inf", "half"] {
            assert!(fraction(wrong).is_err(), "{wrong}");
        }
    }
}

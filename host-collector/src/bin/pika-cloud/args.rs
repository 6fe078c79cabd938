//! The command line.

use std::path::PathBuf;

use clap::{CommandFactory as _, Parser, Subcommand};
use pika_host_collector::Config;
use pika_host_collector::bake::BakeFile;

use crate::exit::Failure;

/// Incus's own default.
const DEFAULT_SOCKET: &str = "/var/lib/incus/unix.socket";

const EXIT_CODES: &str = "\
Exit codes of run and watch:
  the workload's own   it ended by itself
  124                  a watchdog ended it
  125                  pika-cloud failed: bad spec, no Incus, no image, not ours, collection failed
  126                  the guest died or was lost
  129                  detached by SIGHUP; the same command goes on
  130                  interrupted

The same `run` again goes on with a live job and answers the verdict of a finished one; `--again` runs it anew.";

/// Run workloads in Incus instances: start, watch, collect, destroy.
#[derive(Debug, Parser)]
#[command(name = "pika-cloud", version, after_help = EXIT_CODES, max_term_width = 110)]
pub(crate) struct Args {
    /// Where journals and outputs are kept [default: /var/lib/pika-cloud, or ~/.local/state/pika-cloud without root]
    #[arg(long, global = true, value_name = "DIR", env = "PIKA_CLOUD_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Incus's socket [default: `unix:$INCUS_SOCKET`, else `unix:$INCUS_DIR/unix.socket`, else `unix:/var/lib/incus/unix.socket`]
    #[arg(long, global = true, value_name = "unix:PATH", env = "PIKA_CLOUD_INCUS")]
    incus: Option<String>,

    /// The static pika-guest that is put into guests without one [default: `$PIKA_GUEST_AGENT`, else beside pika-cloud]
    #[arg(long, global = true, value_name = "PATH")]
    agent: Option<PathBuf>,

    /// Print JSON: journal records as JSON lines for run, ensure and watch, a document for inspect, list and bake, one a line for doctor and reconcile
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a spec to its end: create, start, follow, collect, conclude, destroy
    Run(Run),
    /// Make sure that a runtime exists and its workload was started, and return
    Ensure {
        /// The spec's file, or `-` for standard input
        spec: PathBuf,
        /// Start one that has ended anew; its earlier outputs are kept in the state dir
        #[arg(long)]
        again: bool,
    },
    /// Show what is known of a runtime
    Inspect {
        /// The runtime's name
        id: String,
    },
    /// List the runtimes of this state dir
    List,
    /// Follow a runtime until its end, without driving it
    Watch {
        /// The runtime's name
        id: String,
    },
    /// Print a runtime's log
    Logs {
        /// The runtime's name
        id: String,
        /// Go on as it grows, until the runtime's end
        #[arg(short, long)]
        follow: bool,
    },
    /// Copy a runtime's outputs, as far as they are on this host, to a folder
    Collect {
        /// The runtime's name
        id: String,
        /// Where to
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
    },
    /// End a runtime's workload, and bring its outputs here; its instance stays if its policy keeps it
    Cancel {
        /// The runtime's name
        id: String,
    },
    /// End a runtime's workload, and an instance that is kept until it is stopped
    Stop {
        /// The runtime's name
        id: String,
    },
    /// End a runtime, whatever it is doing, and destroy its instance
    Destroy {
        /// The runtime's name
        id: String,
    },
    /// Make an image with pika-guest in it of one without, and point an alias to it
    Bake(Bake),
    /// Adopt, end or report what a dead collector left in Incus; adopted runtimes are driven to their end
    Reconcile(Reconcile),
    /// Say what is missing on this host, and the command that mends it
    Doctor,
    /// Print the JSON Schema of a document, or the names of all
    Schema {
        /// Such as runtime-spec or verdict
        name: Option<String>,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// What `run` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// The spec's file, or `-` for standard input
    pub(crate) spec: PathBuf,
    /// Put events.jsonl, status.json, result.json, verdict.json, logs/ and artifacts/ there at the end
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Run a finished job anew; its earlier outputs are kept in the state dir
    #[arg(long)]
    pub(crate) again: bool,
}

/// What `bake` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Bake {
    /// The image to begin with, by its alias; it stays as it is
    #[arg(long, value_name = "ALIAS")]
    pub(crate) from: String,
    /// The alias that points to the baked image in the end; it may point to an earlier one now
    #[arg(long, value_name = "ALIAS")]
    pub(crate) to: String,
    /// Incus's project
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) project: String,
    /// A profile of the instance in which it is baked; may be repeated
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) profile: Vec<String>,
    /// Put a file of this host into the image, its mode in octal; may be repeated
    #[arg(long, value_name = "SRC:DEST[:MODE]")]
    pub(crate) file: Vec<BakeFile>,
    /// Run a shell script of this host in the image, as root, once the files are there
    #[arg(long, value_name = "SCRIPT")]
    pub(crate) provision: Option<PathBuf>,
    /// How long that script may take
    #[arg(long, value_name = "SECS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub(crate) timeout: u64,
}

/// What `reconcile` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Reconcile {
    /// Only say what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Take this runtime over from another state dir's collector, which must be gone; may be repeated
    #[arg(long, value_name = "RUNTIME_ID")]
    pub(crate) take_over: Vec<String>,
    /// Take everything over that expired
    #[arg(long)]
    pub(crate) take_over_expired: bool,
    /// Delete volumes of this state dir that nothing uses and no runtime in it knows, with all that is on them
    #[arg(long)]
    pub(crate) delete_orphan_volumes: bool,
}

impl Args {
    /// The socket, from the option or from the environment that Incus's own client reads.
    fn incus_socket(&self) -> Result<PathBuf, Failure> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        match &self.incus {
            Some(given) => match given.strip_prefix("unix:") {
                Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
                _ => Err(Failure::Other(format!(
                    "--incus {given}: must be unix: and an absolute path, such as unix:{DEFAULT_SOCKET}"
                ))),
            },
            None => Ok(variable("INCUS_SOCKET")
                .or_else(|| variable("INCUS_DIR").map(|dir| dir.join("unix.socket")))
                .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET))),
        }
    }

    /// Where everything is.
    pub(crate) fn config(&self) -> Result<Config, Failure> {
        Ok(Config { incus_socket: self.incus_socket()?, state_dir: self.state_dir()?, agent: self.agent.clone() })
    }

    /// The state dir.
    fn state_dir(&self) -> Result<PathBuf, Failure> {
        if let Some(given) = &self.state_dir {
            return std::path::absolute(given)
                .map_err(|error| Failure::Other(format!("--state-dir {}: {error}", given.display())));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/pika-cloud"));
        }
        let base = std::env::var_os("XDG_STATE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
        base.map(|base| base.join("pika-cloud"))
            .ok_or_else(|| Failure::Other("no state dir: $HOME is not set; name one with --state-dir DIR".to_owned()))
    }
}

/// Prints completions to standard output.
pub(crate) fn completions(shell: clap_complete::Shell) {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "pika-cloud", &mut text);
    crate::print::line(String::from_utf8_lossy(&text).trim_end());
}

//! `pika-cloud doctor`: what is missing on this host, and the command that mends it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use pika_host_collector::bake::StaleImage;
use pika_host_collector::incus::{self, Client};
use pika_host_collector::{AgentError, AgentSource, Cloud, Config, Origin};
use serde_json::json;

use crate::args::Args;
use crate::exit::Failure;
use crate::print;

/// How long the host's own agent may take to say its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// What one look found.
enum Finding {
    Good(String),
    Missing {
        what: String,
        mend: String,
    },
    /// It works, and could be better.
    Stale {
        what: String,
        mend: String,
    },
    /// What not every host needs.
    Absent {
        what: String,
        mend: String,
    },
}

/// Looks at everything, and fails where something is missing.
pub(crate) async fn doctor(args: &Args) -> Result<ExitCode, Failure> {
    let config = args.config()?;
    let mut findings = vec![state_dir_finding(&config)];
    let client = Client::unix(&config.incus_socket);
    match client.server().await {
        Ok(server) => {
            let version = &server.environment.server_version;
            findings.push(Finding::Good(format!("Incus {version} answers at {}", client.socket().display())));
            findings.extend(storage(&client).await);
            findings.push(machines(&server.environment.driver));
            findings.extend(images(&config).await);
            findings.push(own_agent(&config, &server.environment.kernel_architecture).await);
        }
        Err(error @ incus::Error::NoPermission { .. }) => findings.push(Finding::Missing {
            what: error.to_string(),
            mend: "usermod -aG incus-admin $USER, as root, and log in again".to_owned(),
        }),
        Err(error) => findings.push(Finding::Missing {
            what: error.to_string(),
            mend: "apt install incus && systemctl enable --now incus, as root; Debian 12 has it in bookworm-backports"
                .to_owned(),
        }),
    }
    let mut missing = 0;
    for finding in &findings {
        let (word, what, way_out) = match finding {
            Finding::Good(what) => ("ok", what, None),
            Finding::Missing { what, mend } => ("missing", what, Some(("mend it", mend))),
            Finding::Stale { what, mend } => ("stale", what, Some(("mend it", mend))),
            Finding::Absent { what, mend } => ("absent", what, Some(("to have it", mend))),
        };
        missing += usize::from(matches!(finding, Finding::Missing { .. }));
        if args.json {
            let mend = way_out.map(|(_, mend)| mend);
            print::line(&json!({ "finding": word, "what": what, "mend": mend }).to_string());
            continue;
        }
        print::line(&print::plain(&format!("{word:<8} {what}")));
        if let Some((introduction, mend)) = way_out {
            print::line(&print::plain(&format!("         {introduction}: {mend}")));
        }
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn state_dir_finding(config: &Config) -> Finding {
    let path = config.state_dir.display();
    match Cloud::connect(config) {
        Ok(_) => Finding::Good(format!("the state dir {path} can be written")),
        Err(error) => {
            Finding::Missing { what: error.to_string(), mend: "name a writable folder with --state-dir DIR".to_owned() }
        }
    }
}

/// Baked images whose agent cannot be talked to, or that a new bake would do good.
async fn images(config: &Config) -> Vec<Finding> {
    // Where the state dir cannot be used, that is said already.
    let Ok(cloud) = Cloud::connect(config) else { return Vec::new() };
    match cloud.stale_images().await {
        Err(error) => vec![Finding::Missing { what: error.to_string(), mend: "see Incus's log".to_owned() }],
        Ok(stale) => stale.agent_error.iter().map(not_compared).chain(stale.images.iter().map(image)).collect(),
    }
}

fn not_compared(error: &AgentError) -> Finding {
    let what = format!("baked images cannot be compared with the host's own agent: {error}");
    Finding::Missing { what, mend: "cargo xtask agent, and put what it builds in its place".to_owned() }
}

fn image(stale: &StaleImage) -> Finding {
    let whose = if stale.is_ours { "" } else { " (not baked from this state dir)" };
    let (what, mend) = (format!("{stale}{whose}"), stale.mend());
    if stale.is_error() { Finding::Missing { what, mend } } else { Finding::Stale { what, mend } }
}

/// Virtual machines are dialled over vsock, where Incus runs any.
fn machines(drivers: &str) -> Finding {
    if !drivers.contains("qemu") {
        return Finding::Good("containers only: this Incus has no driver for virtual machines (qemu)".to_owned());
    }
    if Path::new("/dev/vsock").exists() {
        return Finding::Good("virtual machines can be dialled over vsock".to_owned());
    }
    Finding::Missing {
        what: "virtual machines cannot be dialled over vsock: there is no /dev/vsock".to_owned(),
        mend: "modprobe vhost_vsock, as root, and `echo vhost_vsock > /etc/modules-load.d/vhost_vsock.conf`".to_owned(),
    }
}

/// The host's own agent, for guests without one. It is asked for its version where it runs here.
async fn own_agent(config: &Config, architecture: &str) -> Finding {
    let source = AgentSource::find(config.agent.as_deref());
    let agent = match source.load(architecture) {
        Ok(agent) => agent,
        // Images that were baked need none. One that was asked for is missed.
        Err(error @ AgentError::Absent { origin: Origin::Beside, .. }) => {
            let mend =
                "cargo xtask agent, and put what it builds beside pika-cloud, or name it with --agent PATH".to_owned();
            let what =
                format!("only guests that were baked with an agent can be run, and nothing can be baked: {error}");
            return Finding::Absent { what, mend };
        }
        Err(error) => {
            let mend =
                "cargo xtask agent, and name what it builds with --agent PATH, or put it beside pika-cloud; images \
                        that were baked with an agent run without it"
                    .to_owned();
            return Finding::Missing { what: format!("guests without an agent get none: {error}"), mend };
        }
    };
    let path = agent.path.display();
    if architecture != std::env::consts::ARCH {
        return Finding::Good(format!("{path} is put into guests without an agent ({architecture})"));
    }
    let asked = tokio::process::Command::new(&agent.path).arg("version").kill_on_drop(true).output();
    match tokio::time::timeout(VERSION_TIMEOUT, asked).await {
        Ok(Ok(said)) if said.status.success() => {
            let version = String::from_utf8_lossy(&said.stdout);
            let version = print::plain(version.lines().next().unwrap_or_default());
            Finding::Good(format!("{path} is put into guests without an agent: {version}"))
        }
        _ => Finding::Missing {
            what: format!(
                "{path} is to be put into guests without an agent, and does not run here: `{path} version` fails"
            ),
            mend: "name a static pika-guest (cargo xtask agent builds it) with --agent PATH".to_owned(),
        },
    }
}

async fn storage(client: &Client) -> Vec<Finding> {
    let mut findings = Vec::new();
    match client.storage_pools().await {
        Ok(pools) if !pools.is_empty() => findings.push(Finding::Good(format!("storage pools: {}", pools.join(", ")))),
        Ok(_) => findings.push(Finding::Missing {
            what: "Incus has no storage pool".to_owned(),
            mend: "incus storage create default dir".to_owned(),
        }),
        Err(error) => findings.push(Finding::Missing { what: error.to_string(), mend: "see Incus's log".to_owned() }),
    }
    let root =
        client.profile("default", "default").await.ok().flatten().and_then(|profile| profile.root_disk().cloned());
    findings.push(match root {
        Some(_) => Finding::Good("the profile `default` has a root disk".to_owned()),
        None => Finding::Missing {
            what: "the profile `default` has no root disk".to_owned(),
            mend: "incus profile device add default root disk path=/ pool=default".to_owned(),
        },
    });
    findings
}

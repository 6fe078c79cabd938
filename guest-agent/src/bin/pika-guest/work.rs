//! The verbs that stay: `run`, `stream`, `serve` and the supervisor of what a session started.

use pika_cloud_common::GuestRequest;
use pika_cloud_common::limits::{MAX_DOCUMENT_BYTES, RELEASE_TIMEOUT};
use pika_cloud_common::wire::ErrorCode;
use pika_guest_agent::ledger::{Folder, Ledger, LedgerError};
use pika_guest_agent::serve::{self, Callers, serve_stdio};
use pika_guest_agent::session::core::Ending;
use pika_guest_agent::supervise::{self, Job, What};

use crate::args::{self, RunArgs, ServeArgs, StreamArgs, SuperviseArgs};
use crate::exit::{EX_IOERR, EX_PROTOCOL, EX_TEMPFAIL, EX_UNAVAILABLE, Failure};

/// The vsock port, where no option names one.
const PORT_ENV: &str = "PIKA_GUEST_PORT";

/// Runs a workload and ends with its exit code.
pub(crate) fn run(args: RunArgs) -> Result<u8, Failure> {
    let mut job = match &args.request {
        None => Job {
            what: What::Program(args.command),
            timeout: None,
            stop_grace: args.stop_grace,
            mounts: Vec::new(),
            wait_release: RELEASE_TIMEOUT,
        },
        Some(path) => {
            let request = read_request(path)?;
            Job {
                timeout: (request.timeout_secs > 0).then(|| std::time::Duration::from_secs(request.timeout_secs)),
                what: What::Shell {
                    command: request.command,
                    as_root: request.run_as_root,
                    env: std::collections::BTreeMap::new(),
                    cwd: None,
                },
                stop_grace: args.stop_grace,
                mounts: Vec::new(),
                wait_release: RELEASE_TIMEOUT,
            }
        }
    };
    job.timeout = args.timeout.filter(|timeout| !timeout.is_zero()).or(job.timeout);
    job.wait_release = args.wait_release.unwrap_or(job.wait_release);
    let ledger = Ledger::open()?;
    let (mut locked, lock) = supervise::prepare_run(ledger.lock()?)?;
    let lock = lock.ok_or(LedgerError::Supervised)?;
    locked.update_stream(|stream| stream.supervised = true)?;
    drop(locked);
    Ok(exit_code(supervise::run_job(&ledger, lock.into_fd(), &job)?))
}

/// Listens for sessions until a signal ends it.
pub(crate) fn serve(args: ServeArgs) -> Result<u8, Failure> {
    let named = std::env::var_os(PORT_ENV).filter(|text| !text.is_empty() && !args.no_vsock);
    let named = named.map(|text| args::port(&text.to_string_lossy())).transpose();
    let named = named.map_err(|wrong| Failure::Environment(format!("{PORT_ENV}: {wrong}")))?;
    let places = serve::places(args.port.or(named), args.no_vsock, args.unix)?;
    serve::serve(places)?;
    Ok(0)
}

/// Supervises what a session started. Under an init, that is what its unit is for, however the workload ends.
pub(crate) fn supervise(args: &SuperviseArgs) -> Result<u8, Failure> {
    match args.lock_fd {
        Some(lock_fd) => Ok(exit_code(supervise::supervise_spawned(&Ledger::open()?, lock_fd)?)),
        None => Ok(supervise::supervise_handed_over().map(|()| 0)?),
    }
}

/// Serves a session.
pub(crate) fn stream(args: &StreamArgs) -> u8 {
    let callers = if args.vsock { Callers::Knowing } else { Callers::All };
    match serve_stdio(&Ledger::root_path(), callers) {
        Ending::Done | Ending::HostClosed | Ending::Shutdown => 0,
        Ending::PeerLost => EX_TEMPFAIL,
        Ending::Refused(ErrorCode::UnsupportedProtocol | ErrorCode::BadMessage) => EX_PROTOCOL,
        Ending::Refused(ErrorCode::Ledger) => EX_IOERR,
        Ending::Refused(_) => EX_UNAVAILABLE,
    }
}

fn read_request(path: &std::path::Path) -> Result<GuestRequest, Failure> {
    let wrong = |source| LedgerError::Document { path: path.to_owned(), source };
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| std::path::Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let text = match Folder::open(folder)? {
        Some(folder) => folder.read(name, MAX_DOCUMENT_BYTES)?,
        None => None,
    };
    let text = text.ok_or_else(|| Failure::NoInput(format!("{} does not exist", path.display())))?;
    Ok(GuestRequest::decode(&text).map_err(wrong)?)
}

/// Of a process: eight bits.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(u8::MAX)
}

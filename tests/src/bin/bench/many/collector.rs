//! The process that is measured: drivers, journals and consumers of the library, and as little else as can be. Its guests
//! are behind the socket that it has as standard input; what happens it tells by a word a line on standard output.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use anyhow::{Context as _, anyhow};
use pika_cloud_common::RuntimeSpec;
use pika_cloud_common::spec::hash;
use pika_host_collector::clock::HostClock;
use pika_host_collector::driver::{Backend, Driver, Explain, Link, Parts, RuntimeFolder, Until};
use pika_host_collector::incus::{Client, InstanceState, LifecycleEvents};
use pika_host_collector::journal::{Body, Committer, Durable, Follower, Records, Writer};
use pika_host_collector::machine::{Destroyed, SessionLoss};
use pika_host_collector::runtime::{Answer, Call, Claim, Seen, Way};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};

use super::mux::{self, Outgoing, lock};
use super::{COLLECTOR, DELIVERED, UP, name};

const OWNER: &str = "bench";

/// Drives `count` runtimes whose folders are in `state`, until its guests are gone.
pub(crate) fn run(state: &Path, count: usize) -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    // As `pika-cloud` has it.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(serve(state, count));
    runtime.shutdown_background();
    done
}

async fn serve(state: &Path, count: usize) -> anyhow::Result<()> {
    let socket = std::os::unix::net::UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    let (reader, writer) = UnixStream::from_std(socket)?.into_split();
    let line =
        Arc::new(Line { outgoing: Outgoing::default(), inboxes: (0..count).map(|_| Mutex::default()).collect() });
    let collector = Arc::new(Collector {
        state: state.to_owned(),
        line: Arc::clone(&line),
        committer: Committer::start()?,
        clock: Arc::new(HostClock::open()?),
        // Nobody listens there: it is the wake-ups' share of memory that counts here.
        lifecycle: Client::unix(state.join("no-socket")).lifecycle_events(),
        owner: OWNER.into(),
        waits_for: AtomicUsize::new(count),
    });
    let go = Arc::new(Notify::new());
    tokio::spawn({
        let (line, go) = (Arc::clone(&line), Arc::clone(&go));
        async move {
            let _ = mux::read_all(reader, |guest, bytes| line.take(guest, bytes, &go)).await;
            // Whoever measured is gone.
            std::process::exit(0);
        }
    });
    println!("{UP}");
    go.notified().await;
    for number in 0..u32::try_from(count)? {
        let collector = Arc::clone(&collector);
        tokio::spawn(async move { stop_at(collector.drive(number).await) });
    }
    line.outgoing.write_all(writer).await
}

/// What was measured without one of them would be another thing.
fn stop_at(driven: anyhow::Result<()>) {
    if let Err(error) = driven {
        eprintln!("bench: a runtime of the many: {error:#}");
        std::process::exit(1);
    }
}

struct Collector {
    state: PathBuf,
    line: Arc<Line>,
    committer: Committer,
    clock: Arc<HostClock>,
    lifecycle: LifecycleEvents,
    owner: Arc<str>,
    /// Consumers that have not got their `ready`.
    waits_for: AtomicUsize,
}

impl Collector {
    async fn drive(self: Arc<Self>, number: u32) -> anyhow::Result<()> {
        let (mut driver, folder, durable) = Box::pin(self.open(number)).await?;
        tokio::spawn(async move { stop_at(self.consume(&folder, durable).await) });
        Ok(driver.drive(Until::Done).await?)
    }

    /// Takes a runtime up as the library does, from its folder.
    async fn open(&self, number: u32) -> anyhow::Result<(Box<Driver<Local>>, PathBuf, watch::Receiver<Durable>)> {
        let name = name(number);
        let folder = RuntimeFolder::new(&self.state, &name);
        let spec = Arc::new(folder.read_spec().context("the runtime has no spec")?);
        let lock = folder.lock()?.map_err(|_| anyhow!("{name} is locked"))?;
        let (mut writer, view) = Writer::open(folder.path(), &name, self.committer.clone())?;
        writer.hold(lock);
        let filled = writer.store().map_or(0, |store| store.filled());
        let mut records = Records::new(view, spec.limits.event_bytes, filled);
        let runs = records.view().incarnation > 0;
        if !runs {
            let now = self.clock.now();
            records.boot(self.clock.boot_id(), now);
            records.begin(hash(&spec), 0, now);
            let commit = records.take_commit(false).context("nothing was begun")?;
            records.recycle(writer.commit(commit).await?);
        }
        let backend = Local {
            line: Arc::clone(&self.line),
            number,
            spec: Arc::clone(&spec),
            runs: Arc::new(AtomicBool::new(runs)),
        };
        let (durable, path) = (writer.durable(), folder.path().to_owned());
        let wakes = self.lifecycle.subscribe(&spec.incus.project, &spec.identity.instance_name);
        let driver = Driver::new(Parts {
            backend,
            spec,
            owner: Arc::clone(&self.owner),
            folder,
            writer,
            records,
            clock: Arc::clone(&self.clock),
            // Nobody wants anything of it.
            commands: mpsc::unbounded_channel().1,
            wakes,
            is_whole: true,
        })?;
        Ok((Box::new(driver), path, durable))
    }

    /// A consumer of one runtime, as a server has it.
    async fn consume(&self, folder: &Path, durable: watch::Receiver<Durable>) -> anyhow::Result<()> {
        let mut follower = Follower::new(folder, Some(durable));
        while let Some((record, _)) = follower.next().await? {
            if matches!(&record.body, Body::Guest(line) if line.get().contains("\"kind\":\"ready\""))
                && self.waits_for.fetch_sub(1, Ordering::Relaxed) == 1
            {
                println!("{DELIVERED}");
            }
        }
        Ok(())
    }
}

/// The socket, as its runtimes see it.
struct Line {
    outgoing: Outgoing,
    inboxes: Vec<Mutex<Inbox>>,
}

/// What came for a runtime and is not read.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    waker: Option<Waker>,
}

impl Line {
    fn take(&self, guest: u32, bytes: &[u8], go: &Notify) {
        if guest == COLLECTOR {
            return go.notify_one();
        }
        let Some(inbox) = self.inboxes.get(guest as usize) else { return };
        let waker = {
            let mut inbox = lock(inbox);
            inbox.bytes.extend_from_slice(bytes);
            inbox.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// One runtime's instance, which is there once it was started.
#[derive(Clone)]
struct Local {
    line: Arc<Line>,
    number: u32,
    spec: Arc<RuntimeSpec>,
    runs: Arc<AtomicBool>,
}

impl Local {
    fn look(&self) -> Option<Seen> {
        let claim = Claim { runtime_id: self.spec.identity.runtime_id.clone(), owner: OWNER.to_owned(), term: 1 };
        self.runs.load(Ordering::Relaxed).then(|| Seen {
            name: self.spec.identity.instance_name.clone(),
            status: "Running".to_owned(),
            state: InstanceState::Running,
            claim: Some(claim),
            vsock: None,
            base_alias: None,
        })
    }
}

impl Backend for Local {
    fn call(&self, call: Call) -> impl Future<Output = Answer> + Send + 'static {
        let answer = match call {
            Call::Look { .. } => Answer::Looked(Ok(self.look())),
            Call::Create { .. } => Answer::Created(Ok(())),
            Call::Start { .. } => {
                self.runs.store(true, Ordering::Relaxed);
                Answer::Started(Ok(()))
            }
            Call::Halt { .. } => Answer::Halted(Ok(())),
            Call::Console { .. } => Answer::Console(None),
            Call::Destroy { .. } => Answer::Destroyed(Ok(Destroyed::Gone)),
        };
        std::future::ready(answer)
    }

    fn dial(&self, _: String, _: Way) -> impl Future<Output = Result<Link, SessionLoss>> + Send + 'static {
        let end = || End { line: Arc::clone(&self.line), number: self.number };
        let (reader, writer, diagnosis) = (Box::new(end()), Box::new(end()), Box::new(Unknown));
        std::future::ready(Ok(Link { reader, writer, diagnosis, vsock: None }))
    }
}

/// A runtime's end of its stream.
struct End {
    line: Arc<Line>,
    number: u32,
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inbox = lock(&self.line.inboxes[self.number as usize]);
        if inbox.bytes.is_empty() {
            inbox.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let take = inbox.bytes.len().min(buf.remaining());
        buf.put_slice(&inbox.bytes[..take]);
        inbox.bytes = inbox.bytes.split_off(take);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.line.outgoing.send(self.number, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// No stream ends here before its process.
struct Unknown;

impl Explain for Unknown {
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
        Box::pin(std::future::ready(SessionLoss::Lost("the guest's end is gone".to_owned())))
    }
}

//! A runtime's instance, where that is a VM of this rig: what the library's driver asks of Incus, done with QEMU.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pika_cloud_common::limits::VSOCK_PORT;
use pika_cloud_common::wire::Transport;
use pika_host_collector::driver::{Backend, Explain, Link};
use pika_host_collector::incus::{InstanceState, VsockAddress};
use pika_host_collector::machine::{CallFailure, Destroyed, SessionLoss};
use pika_host_collector::runtime::{Answer, Call, Claim, Seen, Way};
use pika_host_collector::transport::vsock::{VsockError, connect_patiently};

use super::dial::DialError;
use super::machine::{Vm, VmOptions};
use super::rig::Rig;

/// A guest that is up answers in milliseconds.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// The one instance of a runtime. Clones are the same instance.
#[derive(Clone, Debug)]
pub struct VmBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rig: &'static Rig,
    folder: PathBuf,
    options: VmOptions,
    name: String,
    claim: Claim,
    instance: Mutex<Instance>,
}

/// What there is of the instance.
#[derive(Debug, Default)]
struct Instance {
    is_created: bool,
    vm: Option<Vm>,
}

impl VmBackend {
    /// An instance that does not exist yet; its sockets and logs will be in `folder`.
    pub fn new(rig: &'static Rig, folder: PathBuf, options: VmOptions, name: &str, owner: &str) -> Self {
        let claim = Claim { runtime_id: name.to_owned(), owner: owner.to_owned(), term: 1 };
        let instance = Mutex::default();
        Self { shared: Arc::new(Shared { rig, folder, options, name: name.to_owned(), claim, instance }) }
    }

    /// Does something with the VM, which has been started.
    pub fn with_vm<T>(&self, act: impl FnOnce(&mut Vm) -> T) -> T {
        act(self.instance().vm.as_mut().expect("the VM has been started"))
    }

    /// Whether there is a guest that can be dialled.
    pub fn is_up(&self) -> bool {
        self.instance().vm.as_ref().is_some_and(|vm| vm.vsock().is_up())
    }

    /// What the guest said on its console, where there is a VM.
    pub fn console(&self) -> Option<String> {
        self.instance().vm.as_ref().map(Vm::console)
    }

    /// The end of what guest and QEMU said, where there is a VM.
    pub fn last_words(&self) -> Option<String> {
        Some(self.instance().vm.as_ref()?.last_words())
    }

    fn instance(&self) -> MutexGuard<'_, Instance> {
        self.shared.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn perform(&self, call: &Call) -> Answer {
        let mut instance = self.instance();
        match call {
            Call::Look { .. } => Answer::Looked(Ok(self.look(&mut instance))),
            Call::Create { .. } => {
                instance.is_created = true;
                Answer::Created(Ok(()))
            }
            Call::Start { .. } => Answer::Started(self.start(&mut instance).map_err(|error| CallFailure {
                transient: false,
                message: format!("the VM cannot be started: {error}"),
            })),
            Call::Console { .. } => Answer::Console(instance.vm.as_ref().map(Vm::console)),
            Call::Halt { .. } => {
                instance.vm = None;
                Answer::Halted(Ok(()))
            }
            Call::Destroy { .. } => {
                *instance = Instance::default();
                Answer::Destroyed(Ok(Destroyed::Gone))
            }
        }
    }

    /// What Incus would say of it. That its time is stopped, nobody did who would have told Incus.
    fn look(&self, instance: &mut Instance) -> Option<Seen> {
        let runs = instance.vm.as_mut().is_some_and(Vm::is_running);
        let (status, state) =
            if runs { ("Running", InstanceState::Running) } else { ("Stopped", InstanceState::Stopped) };
        let claim = Some(self.shared.claim.clone());
        let vsock = instance.vm.as_ref().map(|_| self.address());
        let (name, status) = (self.shared.name.clone(), status.to_owned());
        instance.is_created.then_some(Seen { name, status, state, claim, vsock, base_alias: None })
    }

    fn address(&self) -> VsockAddress {
        let VmOptions { cid, uuid, .. } = &self.shared.options;
        VsockAddress { cid: *cid, machine_uuid: uuid.clone() }
    }

    fn start(&self, instance: &mut Instance) -> io::Result<()> {
        // What is left of an earlier one holds the sockets.
        instance.vm = None;
        instance.vm = Some(Vm::start(self.shared.rig, &self.shared.folder, &self.shared.options)?);
        Ok(())
    }
}

impl Backend for VmBackend {
    fn call(&self, call: Call) -> impl Future<Output = Answer> + Send + 'static {
        let this = self.clone();
        async move {
            let performed = tokio::task::spawn_blocking(move || this.perform(&call));
            performed.await.expect("a call on a VM does not panic")
        }
    }

    fn dial(&self, _: String, way: Way) -> impl Future<Output = Result<Link, SessionLoss>> + Send + 'static {
        let (vsock, address) = (self.instance().vm.as_ref().map(Vm::vsock), self.address());
        async move {
            if way.transport == Transport::Exec {
                return Err(SessionLoss::Lost("there is no agent of Incus in this VM".to_owned()));
            }
            let vsock = vsock.ok_or_else(|| SessionLoss::Lost("there is no VM".to_owned()))?;
            let dial = || async { vsock.dial(VSOCK_PORT, DIAL_LIMIT).await.map_err(|error| of_the_kernel(&error)) };
            let dialled = connect_patiently(dial).await;
            let (reader, writer) = dialled.map_err(|error| SessionLoss::Lost(error.to_string()))?.into_split();
            let (reader, writer, diagnosis) = (Box::new(reader), Box::new(writer), Box::new(Ended));
            Ok(Link { reader, writer, diagnosis, vsock: Some(address) })
        }
    }
}

/// What the kernel of a host with real vsock would say.
fn of_the_kernel(error: &DialError) -> VsockError {
    match error {
        DialError::NoDevice(_) => VsockError::NoMachine,
        DialError::NotUp | DialError::Closed => VsockError::NotListening,
        DialError::TimedOut => VsockError::NoAnswer,
    }
}

/// A stream over vsock ends without a word about why.
struct Ended;

impl Explain for Ended {
    fn explain(&self) -> Pin<Box<dyn Future<Output = SessionLoss> + Send + '_>> {
        Box::pin(std::future::ready(SessionLoss::Lost("the guest ended the vsock stream".to_owned())))
    }
}

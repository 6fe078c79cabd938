//! One VM: a QEMU process and its vsock device.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::children::Kept;
use super::dial::Vsock;
use super::qmp;
use super::rig::Rig;
use crate::wait::until;

/// Far beyond the 4 s that a boot takes alone on two cores.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// What of a console is shown.
const TAIL_LINES: usize = 40;

/// What a VM is.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// Its memory, of which three quarters are its `/run` at most. 96 MiB will do for the kernel and the agent.
    pub memory_mib: u32,
    /// Its CID, as the guest sees it.
    pub cid: u32,
    /// Its `product_uuid` in DMI.
    pub uuid: String,
    /// More words for its kernel's command line: `pika_rig.loopback`, `pika_rig.plays=ROLE`.
    pub words: String,
    /// A file system, whose first process takes the place of the rig's own. What is written there is thrown away.
    pub root: Option<PathBuf>,
}

impl Default for VmOptions {
    fn default() -> Self {
        let uuid = "6f5ad1b6-6c1e-4bd4-8a0f-0d9b3b1c2a17".to_owned();
        Self { memory_mib: 384, cid: 3, uuid, words: String::new(), root: None }
    }
}

/// A VM. Dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    rig: &'static Rig,
    folder: PathBuf,
    options: VmOptions,
    qemu: Kept,
    device: Kept,
}

impl Vm {
    /// Starts a VM whose sockets and logs are in `folder`, an existing one with a short path. One that was there before must
    /// have ended.
    pub fn start(rig: &'static Rig, folder: &Path, options: &VmOptions) -> io::Result<Self> {
        for name in [VHOST, VSOCK, QMP, CONSOLE] {
            match fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let vhost = folder.join(VHOST);
        let mut command = Command::new(&rig.device);
        let socket = folder.join(VSOCK);
        let vm = format!("guest-cid={},socket={},uds-path={}", options.cid, vhost.display(), socket.display());
        command.args(["--vm", &vm]);
        let mut device = Kept::spawn(logged(command, &folder.join("device.log"))?)?;
        until("the vsock device is there", Duration::from_secs(20), || {
            assert!(device.is_running(), "the vsock device has ended: see {}", folder.display());
            vhost.exists().then_some(())
        });
        let qemu = Kept::spawn(logged(qemu(rig, folder, options), &folder.join("qemu.log"))?)?;
        Ok(Self { rig, folder: folder.to_owned(), options: options.clone(), qemu, device })
    }

    /// Waits until the guest can be dialled.
    pub fn wait_up(&self) {
        until("the guest is up", BOOT_LIMIT, || self.vsock().is_up().then_some(()));
    }

    /// How its ports are reached.
    pub fn vsock(&self) -> Vsock {
        Vsock { socket: self.folder.join(VSOCK), console: self.folder.join(CONSOLE) }
    }

    /// Whether QEMU runs. It ends when its guest powers off, reboots or panics.
    pub fn is_running(&mut self) -> bool {
        self.qemu.is_running()
    }

    /// Stops its time, by stopping QEMU. (By the monitor it would be QEMU that goes on, and takes the device's queues away:
    /// bytes of the host that come then break the device for good.)
    pub fn pause(&self) {
        self.qemu.signal(Signal::STOP);
    }

    /// Lets its time go on.
    pub fn resume(&self) {
        self.qemu.signal(Signal::CONT);
    }

    /// Turns it off and on again. (A reset that keeps QEMU takes the device's queues away as well.)
    pub fn reboot(&mut self) -> io::Result<()> {
        self.kill();
        self.device.kill();
        *self = Self::start(self.rig, &self.folder, &self.options)?;
        Ok(())
    }

    /// What QEMU says of it, such as `running`.
    pub fn status(&self) -> String {
        let status = qmp::execute(&self.folder.join(QMP), "query-status");
        let status = status.unwrap_or_else(|error| panic!("QEMU's status: {error}\n{}", self.last_words()));
        status["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Kills QEMU with SIGKILL, as the kernel does where memory runs out.
    pub fn kill(&mut self) {
        self.qemu.kill();
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// What the guest said on its console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join(CONSOLE)).unwrap_or_default()).into_owned()
    }

    /// The end of what the guest and QEMU said.
    pub fn last_words(&self) -> String {
        let tail = |name: &str| {
            let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
        };
        [CONSOLE, "qemu.log", "device.log"].map(|name| format!("{name}:\n{}", tail(name))).join("\n")
    }
}

/// The device's socket for QEMU.
const VHOST: &str = "vhost.sock";
/// The device's socket for the host.
const VSOCK: &str = "vsock.sock";
/// QEMU's monitor.
const QMP: &str = "qmp.sock";
/// What the guest wrote to its serial port.
const CONSOLE: &str = "console.log";

fn qemu(rig: &Rig, folder: &Path, options: &VmOptions) -> Command {
    let memory = format!("memory-backend-memfd,id=mem,size={}M,share=on", options.memory_mib);
    let path = |name: &str| folder.join(name).display().to_string();
    let root = if options.root.is_some() { "pika_rig.root=/dev/vda" } else { "" };
    let words = format!("console=ttyS0 quiet panic=-1 pika_rig {root} {}", options.words);
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-machine", "q35,memory-backend=mem", "-cpu", "max", "-smp", "1"]);
    command.args(["-m", &format!("{}M", options.memory_mib), "-object", &memory, "-uuid", &options.uuid]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-serial", &format!("file:{}", path(CONSOLE))]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", path(QMP))]);
    // The device shares the guest's memory, through which all bytes go.
    command.args(["-chardev", &format!("socket,id=vsock,path={}", path(VHOST))]);
    command.args(["-device", "vhost-user-vsock-pci,chardev=vsock"]);
    if let Some(root) = &options.root {
        command.args(["-drive", &format!("if=none,id=root,file={},format=raw,snapshot=on", root.display())]);
        command.args(["-device", "virtio-blk-pci,drive=root"]);
    }
    command.arg("-kernel").arg(&rig.kernel).arg("-initrd").arg(&rig.initramfs).args(["-append", &words]);
    command
}

fn logged(mut command: Command, log: &Path) -> io::Result<Command> {
    let output = File::create(log)?;
    let errors = output.try_clone()?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    Ok(command)
}

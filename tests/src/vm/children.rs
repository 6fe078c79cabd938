//! Child processes that end with this process, however that ends.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

type Order = (Command, Sender<io::Result<Child>>);

/// A child process. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Kept(Child);

impl Kept {
    /// Starts it.
    pub(super) fn spawn(command: Command) -> io::Result<Self> {
        spawn(command).map(Self)
    }

    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(super) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("our child can be signalled");
    }

    /// Kills it, and waits until it is gone.
    pub(super) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a process that the kernel kills when this one ends. To the kernel a parent is a thread: one that lives as long as
/// the process starts them all, since those of tests and of runtimes come and go.
fn spawn(mut command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, received) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in received {
                // Who ordered waits for it.
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    // SAFETY: one system call, which is async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let (answer, answered) = channel();
    keeper.send((command, answer)).expect("the keeper lives as long as the process");
    answered.recv().expect("the keeper answers")
}

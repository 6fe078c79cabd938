//! Where the pieces of the rig are.

use std::path::PathBuf;
use std::sync::OnceLock;

/// What `cargo xtask test` has made for VMs, as its environment says.
#[derive(Debug)]
pub struct Rig {
    /// `vhost-device-vsock`.
    pub(super) device: PathBuf,
    /// The guest's kernel.
    pub(super) kernel: PathBuf,
    /// The guest's userland, with the agent.
    pub(super) initramfs: PathBuf,
}

impl Rig {
    /// The rig of this run. Without one the test fails; `None`, with the reason printed, where the machine is known to be
    /// unfit for one.
    pub fn get() -> Option<&'static Self> {
        static RIG: OnceLock<Result<Rig, String>> = OnceLock::new();
        let found = RIG.get_or_init(|| match std::env::var("PIKA_TEST_VM_SKIP") {
            Ok(reason) => Err(reason),
            Err(_) => Ok(Self {
                device: from_environment("PIKA_TEST_VM_DEVICE"),
                kernel: from_environment("PIKA_TEST_VM_KERNEL"),
                initramfs: from_environment("PIKA_TEST_VM_INITRAMFS"),
            }),
        });
        match found {
            Ok(rig) => Some(rig),
            Err(reason) => {
                eprintln!("skipped: {reason}");
                None
            }
        }
    }
}

fn from_environment(name: &str) -> PathBuf {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        panic!(
            "{name} is not set: tests in VMs need a kernel, an initramfs and a vsock device. Run `cargo xtask test --vm quick`"
        );
    };
    PathBuf::from(value)
}

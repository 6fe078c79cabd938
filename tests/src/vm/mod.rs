//! VMs for tests: a stock Debian kernel with the real agent under QEMU's TCG, and real `AF_VSOCK` between it and a device in
//! user space. Needs no `/dev/kvm`, no `vhost_vsock` and no network; about 4 s a boot.
//!
//! ```text
//!   test ─► DrivenVm ─► the library's driver, core and journal
//!             │            │ VmBackend: an instance is a QEMU process
//!             └──► Vm ◄────┘
//!                  ├─ vhost-device-vsock ◄─ UNIX socket: `CONNECT 20555`, `OK`, then bytes
//!                  └─ QEMU ── AF_VSOCK ──► pika-guest serve, started again however it ends; vsock-peer
//! ```
//!
//! `cargo xtask test` makes the pieces and names them in the environment (see [`Rig`]). `AF_VSOCK` is opened in the guest only.
//! QEMU and the device end with the [`Vm`], and with this process however it ends.
//!
//! Not like the real thing, since the device is not the kernel's:
//! - There is no half-close: a host that ends its writing ends the stream, and a guest that does so is not noticed.
//! - A guest is not told of a host that hangs up with bytes unread: see [`hang_up`]. The agent ends such a session after 16 s.
//! - A closed port and a guest that is not up yet look alike (the stream ends without an `OK`); the guest's console tells. The
//!   device is left alone until then: dialled while the guest's driver came up, it was seen to end its own worker, and to be deaf.
//! - QEMU cannot save such a VM's state: no snapshots here. It must not stop or reset it either while the host dials: see
//!   [`Vm::pause`] and [`Vm::reboot`].

mod backend;
mod children;
mod dial;
mod driven;
mod machine;
mod qmp;
mod rig;

pub use backend::VmBackend;
pub use dial::{DialError, Vsock, hang_up};
pub use driven::{DrivenVm, GATE, spec};
pub use machine::{Vm, VmOptions};
pub use rig::Rig;

/// The port on which `vsock-peer` echoes, sends and takes.
pub const PEER_PORT: u32 = 20600;

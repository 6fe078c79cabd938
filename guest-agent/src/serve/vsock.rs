//! The few words of `AF_VSOCK` that a guest needs. rustix knows the family and not its addresses, so those are here.
//!
//! ```text
//!   CID 2  the host, with all of its processes and containers: the only peer that is served, if it names this machine
//!   CID 1  this machine, where `vsock_loopback` is loaded: how the agent dials itself, and how a workload might try to
//!   else   this machine's own CID, or a machine that is nested in it
//! ```
//!
//! The kernel gives each connection its peer's CID from the transport that it came over, and nobody in the guest can have it
//! say 2: what comes over the loopback has CID 1 whatever it was bound to. A listener that is bound to any CID needs no driver:
//! it can be made before one is loaded, and outlives one that is taken away.

use rustix::fd::OwnedFd;
use rustix::io::{self, Errno};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType, bind, connect, getsockname, listen};

/// The host's CID, in every guest.
pub(super) const CID_HOST: u32 = libc::VMADDR_CID_HOST;
/// This machine's own, over the loopback.
pub(super) const CID_LOCAL: u32 = libc::VMADDR_CID_LOCAL;
/// "Some free port": no listener can have it.
pub(super) const PORT_ANY: u32 = libc::VMADDR_PORT_ANY;

/// Who has an end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) cid: u32,
    pub(super) port: u32,
}

impl Address {
    /// What the kernel said about a peer or about ourselves.
    pub(super) fn read(address: &SocketAddrAny) -> Option<Self> {
        let size = size_of::<libc::sockaddr_vm>();
        if address.address_family() != AddressFamily::VSOCK || (address.addr_len() as usize) < size {
            return None;
        }
        // SAFETY: the storage holds at least `size` bytes that the kernel wrote, and any bytes are a `sockaddr_vm`.
        let raw = unsafe { address.as_ptr().cast::<libc::sockaddr_vm>().read_unaligned() };
        Some(Self { cid: raw.svm_cid, port: raw.svm_port })
    }
}

// SAFETY: the pointer is to a whole `sockaddr_vm` on the stack, which lives until `f` has returned, and the length is its size.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        let raw = libc::sockaddr_vm {
            svm_family: AddressFamily::VSOCK.as_raw(),
            svm_reserved1: 0,
            svm_port: self.port,
            svm_cid: self.cid,
            svm_zero: [0; 4],
        };
        // Sixteen bytes.
        #[allow(clippy::cast_possible_truncation, reason = "see above")]
        let size = size_of_val(&raw) as SocketAddrLen;
        f((&raw const raw).cast(), size)
    }
}

/// A socket; unit tests get none, since the machine that they run on may be somebody's guest.
fn socket() -> io::Result<OwnedFd> {
    if cfg!(test) {
        return Err(Errno::AFNOSUPPORT);
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)
}

/// Listens on `port`.
pub(super) fn listen_on(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    bind(&fd, &Address { cid: libc::VMADDR_CID_ANY, port })?;
    listen(&fd, backlog)?;
    Ok(fd)
}

/// Dials our own `port` over the loopback, without waiting for the answer; gives the connection and its own port. `None`
/// where the kernel has no loopback: then a dial would go out to the host.
pub(super) fn dial_self(port: u32) -> io::Result<Option<(OwnedFd, u32)>> {
    let fd = socket()?;
    match bind(&fd, &Address { cid: CID_LOCAL, port: PORT_ANY }) {
        Err(Errno::ADDRNOTAVAIL) => return Ok(None),
        other => other?,
    }
    let own = Address::read(&getsockname(&fd)?).ok_or(Errno::AFNOSUPPORT)?;
    match connect(&fd, &Address { cid: CID_LOCAL, port }) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(Some((fd, own.port))),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_there_and_back() {
        for address in [Address { cid: CID_HOST, port: 20555 }, Address { cid: 2_795_226_010, port: u32::MAX - 1 }] {
            assert_eq!(Address::read(&address.as_any()), Some(address));
        }
    }

    #[test]
    fn an_address_of_another_family_is_none() {
        let unix = rustix::net::SocketAddrUnix::new("/a/path/that/is/long/enough/to/be/read").unwrap();
        assert_eq!(Address::read(&unix.as_any()), None);
    }

    #[test]
    fn unit_tests_open_no_vsock() {
        assert_eq!(listen_on(20555, 1).unwrap_err(), Errno::AFNOSUPPORT);
        assert_eq!(dial_self(20555).unwrap_err(), Errno::AFNOSUPPORT);
    }
}

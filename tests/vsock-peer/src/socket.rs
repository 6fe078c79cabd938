//! `AF_VSOCK` as the standard library would have it.

#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes and constants of the C library, which fit the types it wants"
)]

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use libc::{AF_VSOCK, SO_RCVTIMEO, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, VMADDR_CID_ANY, sockaddr_vm, socklen_t};

/// A socket that listens.
pub(crate) struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens for peers of any CID.
    pub(crate) fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(VMADDR_CID_ANY, port);
        // SAFETY: the address is a whole `sockaddr_vm`, whose size is given with it; both calls only read it.
        unsafe {
            check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), address_len()))?;
            check(libc::listen(socket.as_raw_fd(), 128))?;
        }
        Ok(Self { socket })
    }

    /// The next connection.
    pub(crate) fn accept(&self) -> io::Result<File> {
        // SAFETY: the kernel is asked for no address, and what it gives back is a descriptor of ours alone.
        unsafe {
            let accepted = libc::accept(self.socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
            Ok(File::from_raw_fd(check(accepted)?))
        }
    }
}

/// Connects; what is read from it later gives up after `patience`.
pub(crate) fn connect(cid: u32, port: u32, patience: Duration) -> io::Result<File> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: a `timeval` is plain numbers, for which zeroes are valid.
    let mut limit: libc::timeval = unsafe { zeroed() };
    limit.tv_sec = libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX);
    // SAFETY: the option's value and the address are whole, their sizes are given with them, and both are only read.
    unsafe {
        let len = size_of::<libc::timeval>() as socklen_t;
        check(libc::setsockopt(socket.as_raw_fd(), SOL_SOCKET, SO_RCVTIMEO, (&raw const limit).cast(), len))?;
        check(libc::connect(socket.as_raw_fd(), (&raw const address).cast(), address_len()))?;
    }
    Ok(File::from(socket))
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: it takes numbers only, and what it gives back is a descriptor of ours alone.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0))?)) }
}

fn address(cid: u32, port: u32) -> sockaddr_vm {
    // SAFETY: a `sockaddr_vm` is plain numbers, for which zeroes are valid.
    let mut address: sockaddr_vm = unsafe { zeroed() };
    address.svm_family = AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

const fn address_len() -> socklen_t {
    size_of::<sockaddr_vm>() as socklen_t
}

fn check(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

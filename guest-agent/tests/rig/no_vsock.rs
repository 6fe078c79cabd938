//! Keeps what the tests start from the machine's own vsock: for those processes, and all that they start, the kernel has none.
//!
//! The machine may be somebody's guest, and its port somebody's agent. A flag that a test has to remember is not enough, so the
//! kernel itself refuses: a seccomp filter on `socket(2)`. Where it cannot be set, nothing is started at all.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// Where in `seccomp_data` the call's number stands.
const NUMBER: u32 = 0;
/// And the lower half of its first argument.
const FIRST_ARGUMENT: u32 = if cfg!(target_endian = "little") { 16 } else { 20 };

/// `socket(AF_VSOCK, …)` fails as on a kernel without vsock.
pub(super) fn forbid(command: &mut Command) {
    let refuse = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EAFNOSUPPORT).unwrap();
    let filter = [
        step(LOAD, 0, 0, NUMBER),
        step(JUMP_IF_EQUAL, 0, 3, u32::try_from(libc::SYS_socket).unwrap()),
        step(LOAD, 0, 0, FIRST_ARGUMENT),
        step(JUMP_IF_EQUAL, 0, 1, u32::try_from(libc::AF_VSOCK).unwrap()),
        step(RETURN, 0, 0, refuse),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: prctl is async-signal-safe; nothing is allocated, and the filter lives as long as the closure.
    unsafe {
        command.pre_exec(move || {
            let length = u16::try_from(filter.len()).unwrap_or(0);
            let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
            let done = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0;
            if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
}

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

//! What the ledger asks the kernel for: the boot, the time, random numbers, memory.

use std::fs;
use std::io::Read as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pika_cloud_common::Timestamp;
use rustix::rand::{GetRandomFlags, getrandom};

/// This boot's id, as the kernel names it; `unknown` where it does not.
pub fn boot_id() -> String {
    let mut text = [0; 64];
    let read = fs::File::open("/proc/sys/kernel/random/boot_id").and_then(|mut file| file.read(&mut text));
    let text = std::str::from_utf8(&text[..read.unwrap_or(0)]).unwrap_or_default().trim_ascii();
    if text.is_empty() { "unknown".to_owned() } else { text.to_owned() }
}

/// The machine's DMI `product_uuid` in lower case, where it has one and we may read it.
pub fn machine_uuid() -> Option<String> {
    use std::os::unix::fs::OpenOptionsExt as _;
    // Whatever is mounted there is not waited for, and little of it is read.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open("/sys/class/dmi/id/product_uuid").ok()?;
    let mut text = Vec::new();
    file.take(64).read_to_end(&mut text).ok()?;
    parse_uuid(&text)
}

fn parse_uuid(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text.trim_ascii()).ok()?;
    let is_dash = |at: usize| matches!(at, 8 | 13 | 18 | 23);
    let fits = |(at, byte): (usize, u8)| if is_dash(at) { byte == b'-' } else { byte.is_ascii_hexdigit() };
    (text.len() == 36 && text.bytes().enumerate().all(fits)).then(|| text.to_ascii_lowercase())
}

/// Now, in UTC.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Timestamp::from_unix(since.as_secs(), since.subsec_micros())
}

/// Seconds since the guest booted.
pub fn uptime_secs() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

/// 128 random bits, in hexadecimal digits.
pub fn random_id() -> String {
    use std::fmt::Write as _;
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        // Without a random source the clock and the process id tell streams apart; nothing secret hangs on them.
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty()).unwrap_or_else(|_| {
            let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
            let mixed = nanos ^ (u128::from(std::process::id()) << 96);
            bytes = mixed.to_le_bytes();
            16
        });
    }
    bytes.iter().fold(String::with_capacity(32), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The memory limit of the control group that we run in, where one is set and readable.
pub fn memory_limit() -> Option<u64> {
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        // Version 1 says "no limit" with a number near the highest.
        .filter(|&limit: &u64| limit < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_and_nothing_else() {
        let uuid = "4c4c4544-0043-5a10-8053-b7c04f4e5631";
        assert_eq!(parse_uuid(format!("{}\n", uuid.to_uppercase()).as_bytes()).as_deref(), Some(uuid));
        let wrong = ["", "\n", &uuid[1..], &format!("{uuid}0"), &uuid.replace('-', "0"), &uuid.replacen('4', "g", 1)];
        for text in wrong {
            assert_eq!(parse_uuid(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_uuid(&[0xff; 36]), None);
    }
}

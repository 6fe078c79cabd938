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

/// The machine's DMI `product_uuid`, where it has one and we may read it.
pub fn machine_uuid() -> Option<String> {
    let text = fs::read_to_string("/sys/class/dmi/id/product_uuid").ok()?;
    let text = text.trim_ascii();
    (!text.is_empty() && text.len() <= 64).then(|| text.to_owned())
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

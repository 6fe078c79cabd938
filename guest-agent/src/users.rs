//! Users and groups, read from `/etc/passwd` and `/etc/group`: a static binary has no other look-up that can be relied on.

use std::fs;

use pika_cloud_common::paths::GROUP;
use rustix::fs::{Gid, Uid};

/// A line of `/etc/passwd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its number.
    pub uid: Uid,
    /// Its first group.
    pub gid: Gid,
    /// Its home folder.
    pub home: String,
    /// Its shell.
    pub shell: String,
}

/// The group that may write the contract's files, where the image has it.
pub fn contract_group() -> Option<Gid> {
    parse_group(&fs::read_to_string("/etc/group").ok()?, GROUP)
}

/// The user of that name.
pub fn by_name(name: &str) -> Option<User> {
    fs::read_to_string("/etc/passwd").ok()?.lines().filter_map(parse_user).find(|user| user.name == name)
}

/// The user of that number.
pub fn by_uid(uid: Uid) -> Option<User> {
    fs::read_to_string("/etc/passwd").ok()?.lines().filter_map(parse_user).find(|user| user.uid == uid)
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = parse_id(fields.nth(1)?)?;
    let gid = parse_id(fields.next()?)?;
    let home = fields.nth(1)?.to_owned();
    let shell = fields.next().unwrap_or_default().to_owned();
    Some(User { name, uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), home, shell })
}

fn parse_group(text: &str, name: &str) -> Option<Gid> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| parse_id(fields.nth(1)?)).flatten().map(Gid::from_raw)
    })
}

/// The highest number means "no change" to the kernel, so that it names no one.
fn parse_id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_passwd_and_group() {
        let user = parse_user("ci:x:1000:100:CI,,,:/home/ci:/bin/bash").unwrap();
        assert_eq!((user.name.as_str(), user.uid.as_raw(), user.gid.as_raw()), ("ci", 1000, 100));
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/ci", "/bin/bash"));
        for line in ["", "#", "+::::::", "ci:x:-1:100::/:", "ci:x:4294967295:100::/:", "ci:x:1000"] {
            assert_eq!(parse_user(line), None, "{line}");
        }
        let groups = "root:x:0:\npika-cloud-x:x:7:\npika-cloud:x:996:ci\n";
        assert_eq!(parse_group(groups, GROUP).map(Gid::as_raw), Some(996));
        assert_eq!(parse_group(groups, "wheel"), None);
    }
}

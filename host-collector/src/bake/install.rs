//! What an image with the agent has, by its init: files, and a script that makes the init start it. Pure.
//!
//! The files are the guest's crate's own, so that an image that was baked has the very units that the tests of the agent run.

use super::probe::Init;

/// Where the agent is in a baked image.
pub(super) const AGENT_PATH: &str = "/usr/bin/pika-guest";

/// Where the provisioning script lies while it runs, in a folder that is no part of the image.
pub(super) const SCRIPT_PATH: &str = "/run/pika-bake/provision";

/// A file of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GuestFile {
    pub(super) path: &'static str,
    pub(super) mode: u32,
    pub(super) text: &'static str,
}

macro_rules! asset {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-agent/init/", $path))
    };
}

/// In `/etc`, so that what somebody put there by hand is replaced, and not what hides ours.
const SYSTEMD: [GuestFile; 4] = [
    GuestFile {
        path: "/etc/systemd/system/pika-guest.service",
        mode: 0o644,
        text: asset!("systemd/pika-guest.service"),
    },
    GuestFile {
        path: "/etc/systemd/system/pika-guest-supervise.socket",
        mode: 0o644,
        text: asset!("systemd/pika-guest-supervise.socket"),
    },
    GuestFile {
        path: "/etc/systemd/system/pika-guest-supervise@.service",
        mode: 0o644,
        text: asset!("systemd/pika-guest-supervise@.service"),
    },
    GuestFile { path: "/etc/tmpfiles.d/pika-cloud.conf", mode: 0o644, text: asset!("systemd/pika-cloud.tmpfiles") },
];

const OPENRC: [GuestFile; 1] =
    [GuestFile { path: "/etc/init.d/pika-guest", mode: 0o755, text: asset!("openrc/pika-guest") }];

/// The lines that are added to an inittab, under a name of their own until they are there.
const BUSYBOX: [GuestFile; 1] =
    [GuestFile { path: "/etc/inittab.pika-guest", mode: 0o644, text: asset!("busybox/inittab") }];

/// Begins every script of ours.
macro_rules! script {
    ($text:literal) => {
        concat!("PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nset -eu\n", $text)
    };
}

/// Makes the group whose members may report. Not every image has a program for that.
pub(super) const MAKE_GROUP: &str = script!(
    r#"
has_group() { grep -q '^pika-cloud:' /etc/group; }
[ -f /etc/group ] || exit 0
has_group || groupadd --system pika-cloud 2>/dev/null || addgroup -S pika-cloud 2>/dev/null || true
has_group && exit 0
gid=999
while grep -q "^[^:]*:[^:]*:$gid:" /etc/group && [ $gid -gt 100 ]; do gid=$((gid - 1)); done
[ -z "$(tail -c 1 /etc/group)" ] || echo >>/etc/group
echo "pika-cloud:x:$gid:" >>/etc/group
"#
);

const ENABLE_SYSTEMD: &str = script!(
    r"
systemctl enable pika-guest.service pika-guest-supervise.socket
"
);

const ENABLE_OPENRC: &str = script!(
    r"
rc-update add pika-guest default
"
);

/// Lines of an earlier bake are replaced. busybox reads it at the next start.
const ENABLE_BUSYBOX: &str = script!(
    r#"
new=/etc/inittab.pika-new
grep -v pika-guest /etc/inittab >$new || true
[ -z "$(tail -c 1 $new)" ] || echo >>$new
cat /etc/inittab.pika-guest >>$new
chmod 0644 $new
rm /etc/inittab.pika-guest
mv $new /etc/inittab
"#
);

/// Waits until the units of an image have come up, as far as they do: a provisioning script may want a network.
pub(super) const SETTLE_SYSTEMD: &str = script!(
    r#"
left=240
while [ $left -gt 0 ]; do
    state=$(systemctl is-system-running 2>/dev/null) || true
    case $state in running|degraded|maintenance) break;; esac
    left=$((left - 1))
    sleep 0.25
done
echo "$state"
"#
);

/// Says, a line each, what of the agent is no longer as it was put in; nothing where all is. An image without `stat` is believed.
pub(super) const CHECK_AGENT: &str = script!(
    r#"
has=$(stat -c '%a %u' /usr/bin/pika-guest 2>/dev/null) || has='755 0'
[ "$has" = '755 0' ] || echo "/usr/bin/pika-guest has another owner or other permissions"
[ ! -f /etc/group ] || grep -q '^pika-cloud:' /etc/group || echo "the group pika-cloud is gone"
"#
);

/// These say why the agent would not be started any more.
const CHECK_SYSTEMD: &str = script!(
    r#"
for unit in pika-guest.service pika-guest-supervise.socket; do
    systemctl is-enabled --quiet $unit || echo "$unit is no longer enabled"
done
"#
);

const CHECK_OPENRC: &str = script!(
    r#"
rc-update show default | grep -q "^ *pika-guest " || echo "pika-guest is no longer in the runlevel default"
"#
);

const CHECK_BUSYBOX: &str = script!(
    r#"
grep -q '^::respawn:/usr/bin/pika-guest serve ' /etc/inittab || echo "/etc/inittab no longer starts pika-guest"
"#
);

/// What two instances of one image must not share, and what is ours and no part of the image. A seed is written by its service's
/// stop, so that comes first.
const CLEAN: &str = script!(
    r#"
rm -rf /run/pika-bake /run/pika-cloud /run/pika-guest
"#
);

const CLEAN_SYSTEMD: &str = script!(
    r#"
rm -rf /run/pika-bake
systemctl stop systemd-random-seed.service 2>/dev/null || true
rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then rm -f /var/lib/dbus/machine-id; fi
if [ -f /etc/machine-id ] && [ ! -L /etc/machine-id ]; then : >/etc/machine-id; fi
sync
"#
);

impl Init {
    /// What is put in.
    pub(super) fn files(self) -> &'static [GuestFile] {
        match self {
            Self::Systemd => &SYSTEMD,
            Self::OpenRc => &OPENRC,
            Self::Busybox => &BUSYBOX,
            Self::None => &[],
        }
    }

    /// Has it start the agent from the next start on.
    pub(super) fn enable(self) -> Option<&'static str> {
        match self {
            Self::Systemd => Some(ENABLE_SYSTEMD),
            Self::OpenRc => Some(ENABLE_OPENRC),
            Self::Busybox => Some(ENABLE_BUSYBOX),
            Self::None => None,
        }
    }

    /// What is put in and stays as it is.
    pub(super) fn lasting_files(self) -> &'static [GuestFile] {
        // Its lines are in the inittab by then.
        if self == Self::Busybox { &[] } else { self.files() }
    }

    /// Says what of that was undone since.
    pub(super) fn check(self) -> Option<&'static str> {
        match self {
            Self::Systemd => Some(CHECK_SYSTEMD),
            Self::OpenRc => Some(CHECK_OPENRC),
            Self::Busybox => Some(CHECK_BUSYBOX),
            Self::None => None,
        }
    }

    /// Every path of a file of ours in an image of whatever kind.
    pub(super) fn all_files() -> impl Iterator<Item = &'static str> {
        let by_init = [Self::Systemd, Self::OpenRc, Self::Busybox, Self::None].into_iter().flat_map(Self::files);
        by_init.map(|file| file.path).chain([AGENT_PATH])
    }

    /// Removes what must not be in the image.
    pub(super) fn clean(self) -> &'static str {
        match self {
            Self::Systemd => CLEAN_SYSTEMD,
            Self::OpenRc | Self::Busybox | Self::None => CLEAN,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    const ALL: [Init; 4] = [Init::Systemd, Init::OpenRc, Init::Busybox, Init::None];

    /// Runs a script in which `/etc` is a folder of the test.
    fn run(script: &str, etc: &std::path::Path) {
        let script = script.replace("/etc/", &format!("{}/", etc.display()));
        let ran = Command::new("/bin/sh").args(["-c", &script]).env("PATH", "/usr/bin:/bin").output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
    }

    #[test]
    fn every_init_that_is_known_starts_the_agent_that_is_put_in() {
        for init in ALL {
            let starts = init
                .files()
                .iter()
                .any(|file| file.text.lines().any(|line| !line.starts_with('#') && line.contains(AGENT_PATH)));
            assert_eq!((starts, init.enable().is_some()), (init != Init::None, init != Init::None), "{init:?}");
        }
    }

    #[test]
    fn every_script_is_one_for_sh() {
        let scripts = ALL.iter().flat_map(|init| init.enable().into_iter().chain(init.check()).chain([init.clean()]));
        for script in scripts.chain([MAKE_GROUP, SETTLE_SYSTEMD, CHECK_AGENT]) {
            let checked = Command::new("/bin/sh").args(["-n", "-c", script]).output().unwrap();
            assert!(checked.status.success(), "{script}: {checked:?}");
        }
    }

    /// One line, also where it is baked twice or the file ends without a newline.
    #[test]
    fn an_inittab_gets_one_line_and_keeps_its_others() {
        let folder = tempfile::tempdir().unwrap();
        let etc = folder.path();
        fs::write(
            etc.join("inittab"),
            "::sysinit:/etc/rc\n::respawn:/usr/bin/pika-guest old\n::ctrlaltdel:/sbin/reboot",
        )
        .unwrap();
        for _ in 0..2 {
            fs::write(etc.join("inittab.pika-guest"), BUSYBOX[0].text).unwrap();
            run(ENABLE_BUSYBOX, etc);
            let text = fs::read_to_string(etc.join("inittab")).unwrap();
            let ours: Vec<&str> = text.lines().filter(|line| line.contains("pika-guest")).collect();
            assert_eq!(ours, ["::respawn:/usr/bin/pika-guest serve --unix /run/pika-guest/serve.sock"], "{text}");
            assert!(text.contains("::sysinit:") && text.contains("::ctrlaltdel:/sbin/reboot\n"), "{text}");
        }
        assert_eq!(fs::read_dir(etc).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_group_is_made_where_no_program_makes_one() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("group");
        fs::write(&group, "root:x:0:\nother:x:999:").unwrap();
        // Neither program may be found here: they would change this machine's own groups.
        let script = MAKE_GROUP.replace("groupadd", "absent-a").replace("addgroup", "absent-b");
        for _ in 0..2 {
            run(&script, folder.path());
            assert_eq!(fs::read_to_string(&group).unwrap(), "root:x:0:\nother:x:999:\npika-cloud:x:998:\n");
        }
    }
}

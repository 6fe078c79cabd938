//! Which init an image has: a script asks in the builder, and what it printed is judged here. Pure.

use crate::words::deceives;

/// Prints what tells inits apart, as `key=value` lines. It runs in a guest: what comes back is believed no more than that the
/// image, which is the operator's own, is spoilt where it lies.
pub(super) const PROBE: &str = r#"
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
echo "exe=$(readlink /proc/1/exe)"
echo "argv0=$(tr '\0' '\n' </proc/1/cmdline | head -n 1)"
[ -d /run/systemd/system ] && echo systemd=1
[ -d /etc/init.d ] && command -v rc-update >/dev/null && command -v openrc-run >/dev/null && echo openrc=1
[ -f /etc/inittab ] && echo inittab=1
[ -e /etc/NIXOS ] && echo nixos=1
echo done=1
"#;

/// What starts the agent in instances of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Init {
    /// systemd, by units.
    Systemd,
    /// `OpenRC`, by a service script, whatever its first process is.
    OpenRc,
    /// The init of busybox, by a line of its inittab.
    Busybox,
    /// Nothing: each session has the agent run by Incus's exec. Enough for a container.
    None,
}

impl Init {
    /// For a person.
    pub fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::OpenRc => "OpenRC",
            Self::Busybox => "busybox's init",
            Self::None => "exec alone",
        }
    }
}

/// What the probe said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probed {
    pub(super) init: Init,
    pub(super) is_nixos: bool,
    /// The program of the first process, for a person.
    pub(super) first: String,
}

/// Reads what [`PROBE`] printed; `None` where it was cut.
pub(super) fn read(output: &[u8]) -> Option<Probed> {
    let text = String::from_utf8_lossy(output);
    let get = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    get("done")?;
    let exe = get("exe").unwrap_or_default();
    let argv0 = base_name(get("argv0").unwrap_or_default());
    // busybox as a shell that runs a script for its first process is none of these.
    let is_busybox_init = base_name(exe).starts_with("busybox") && matches!(argv0, "init" | "linuxrc");
    // It may not have come to make its folder yet.
    let is_systemd = base_name(exe) == "systemd" || get("systemd").is_some();
    let init = if is_systemd {
        Init::Systemd
    } else if get("openrc").is_some() {
        Init::OpenRc
    } else if is_busybox_init && get("inittab").is_some() {
        Init::Busybox
    } else {
        Init::None
    };
    let first = if exe.is_empty() { argv0 } else { exe };
    let first = first.chars().filter(|&c| !deceives(c)).take(100).collect();
    Some(Probed { init, is_nixos: get("nixos").is_some(), first })
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(output: &str) -> Init {
        read(output.as_bytes()).unwrap().init
    }

    #[test]
    fn inits_are_told_apart() {
        for (init_is, output) in [
            (Init::Systemd, "exe=/usr/lib/systemd/systemd\nargv0=/sbin/init\nsystemd=1\ndone=1\n"),
            (Init::Systemd, "exe=/usr/lib/systemd/systemd\nargv0=/sbin/init\ndone=1\n"),
            // Debian with OpenRC installed beside systemd.
            (Init::Systemd, "exe=/usr/lib/systemd/systemd\nargv0=/sbin/init\nsystemd=1\nopenrc=1\ndone=1\n"),
            // Alpine: busybox's init starts OpenRC by its inittab.
            (Init::OpenRc, "exe=/bin/busybox\nargv0=/sbin/init\nopenrc=1\ninittab=1\ndone=1\n"),
            (Init::OpenRc, "exe=/sbin/openrc-init\nargv0=/sbin/init\nopenrc=1\ndone=1\n"),
            (Init::Busybox, "exe=/bin/busybox\nargv0=init\ninittab=1\ndone=1\n"),
            (Init::Busybox, "exe=/bin/busybox.static\nargv0=/linuxrc\ninittab=1\ndone=1\n"),
            // A shell script for its first process.
            (Init::None, "exe=/bin/busybox\nargv0=/bin/sh\ninittab=1\ndone=1\n"),
            (Init::None, "exe=/bin/busybox\nargv0=init\ndone=1\n"),
            (Init::None, "exe=/usr/sbin/init\nargv0=init\ninittab=1\ndone=1\n"),
            (Init::None, "exe=\nargv0=\ndone=1\n"),
        ] {
            assert_eq!(init(output), init_is, "{output}");
        }
    }

    #[test]
    fn what_was_cut_is_not_judged() {
        assert_eq!(read(b"exe=/usr/lib/systemd/systemd\nsystemd=1\n"), None);
        assert_eq!(read(b""), None);
    }

    #[test]
    fn a_nixos_is_told_and_the_first_process_is_shown_harmlessly() {
        let probed = read(b"exe=/x\x1b[2J\nargv0=y\nnixos=1\ndone=1\n").unwrap();
        assert_eq!((probed.is_nixos, probed.first.as_str()), (true, "/x[2J"));
    }

    #[test]
    fn the_script_is_one_for_sh() {
        let checked = std::process::Command::new("/bin/sh").args(["-c", PROBE]).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
        assert!(read(&checked.stdout).is_some(), "{checked:?}");
    }
}

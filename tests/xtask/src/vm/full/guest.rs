//! One outer guest: what it runs, and its QEMU.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, PipeReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Programs, outer};
use crate::failure::{Failure, Result, Tried};
use crate::{image, place, run, say};

/// Two VMs, Incus and the tests fit in.
const MEMORY: &str = "3G";

/// How long the tests in a guest may take: only a hang reaches it.
const TESTS_LIMIT_SECS: u32 = 3600;
/// When the whole guest is given up. Its own clock, by which the tests' limit is counted, may stand still.
const GUEST_LIMIT_SECS: u32 = TESTS_LIMIT_SECS + 300;

/// Interrupts the outer guest four times a second. Its CPU, as emulated, sometimes misses its own timer while it virtualizes, and then
/// sleeps until something else wakes it: it was seen to do so for 15 minutes.
const METRONOME: &str = "virtio-rng-pci,max-bytes=64,period=250";

/// A kernel that finds its disk without an initramfs, takes no time for what is not tested here, and ends QEMU where it panics.
const KERNEL_WORDS: &str = "root=/dev/nvme0n1 rw init=/usr/sbin/outer-init console=ttyS0 quiet panic=-1 mitigations=off \
                            apparmor=0 audit=0 pika_rig";

/// What the outer guest's first process runs. What is between `@` is filled in.
const RUN: &str = r#"
for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name") in
        pika.said) said=/dev/${port##*/} ;;
        pika.result) result=/dev/${port##*/} ;;
    esac
done
exec >"$said" 2>&1
step() { echo "[outer guest: $(cut -d. -f1 /proc/uptime) s] $*"; }
fail() {
    step "$*; the end of the daemon's log:"
    tail -n 20 /var/log/incusd.log
    exit 1
}
export PATH=/payload/bin:$PATH:/usr/libexec/incus LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/incus
mkdir -p /var/log/incus
# The metronome: what is read from there comes with an interrupt, and no faster than QEMU lets it.
modprobe virtio_rng || fail 'there is no virtio_rng'
(while :; do cat /dev/hwrng >/dev/null; sleep 1; done) &
# For whoever wants to look around.
(while :; do setsid sh -i; sleep 1; done) </dev/ttyS1 >/dev/ttyS1 2>&1 &
step 'Start Incus'
# It was seen to die in here, on the emulated CPU. As systemd does on a host, it is started again: VMs live on meanwhile.
died='^(fatal error|panic|runtime:|unexpected fault|SIG[A-Z]+:)'
(while :; do
    incusd --group root >>/var/log/incusd.log 2>&1
    step "Incus ended with $?: $(grep -E "$died" /var/log/incusd.log | tail -n 3)"
    sleep 1
done) &
incusd waitready --timeout=600 || fail 'Incus does not answer'
quietly() { "$@" >/tmp/quietly 2>&1 || { cat /tmp/quietly; fail "failed: $*"; }; }
quietly incus storage create default dir
boot() {
    words="console=ttyS0 quiet mitigations=off panic=-1 pika_rig $*"
    echo "-kernel /payload/vm/vmlinux -initrd /payload/vm/initramfs.gz -append \"$words\""
}
quietly incus profile device add default root disk path=/ pool=default
quietly incus profile set default "raw.qemu=$(boot)"
quietly incus profile create incus-agent
quietly incus profile set incus-agent "raw.qemu=$(boot pika_rig.incus_agent)"
quietly incus profile create deaf
quietly incus profile set deaf "raw.qemu=$(boot pika_rig.incus_agent pika_rig.deaf)"
quietly incus profile create debian
quietly incus profile set debian "raw.qemu=$(boot pika_rig.root=/dev/vda)" security.csm=true security.secureboot=false
quietly incus profile device add debian root disk path=/ pool=default io.bus=virtio-blk size=1GiB
# Nothing here is kept, nor has it far to go.
quietly incus config set images.compression_algorithm none
quietly incus image import /payload/vm/metadata.tar.gz /payload/vm/disk.qcow2 --alias pika-vm
unset LD_LIBRARY_PATH
export PIKA_TEST_INCUS_SOCKET=/var/lib/incus/unix.socket PIKA_TEST_INCUS_DIR=/var/lib/incus
export PIKA_TEST_AGENT=/payload/bin/pika-guest PIKA_TEST_CLOUD=/payload/bin/pika-cloud PIKA_TEST_VM_FULL=1
# One CPU has enough to do with one test at a time.
export RUST_TEST_THREADS=1
step 'Run the tests'
cd /payload
# What a test says is seen even where the guest does not live to its end.
timeout -k 10 @LIMIT@ bin/tests --nocapture @ARGS@
code=$?
step "The tests ended with $code"
grep -E "level=(warning|error)|$died" /var/log/incusd.log >/dev/ttyS0
echo $code >"$result"
sync
sleep 1
"#;

/// What outer guests are made of.
pub(super) struct Pieces<'a> {
    pub(super) programs: &'a Programs<'a>,
    pub(super) outer: &'a outer::Outer,
    /// Folders of what VMs inside boot.
    pub(super) images: &'a [PathBuf],
}

/// An outer guest, by its number.
pub(super) struct OuterGuest<'a> {
    pub(super) number: usize,
    pub(super) pieces: &'a Pieces<'a>,
    /// A folder of its own.
    pub(super) scratch: PathBuf,
    /// For the test program in it.
    pub(super) args: &'a [String],
}

impl OuterGuest<'_> {
    /// Boots it, shows what it says until it powers off, and fails where its tests did.
    pub(super) fn run(&self) -> Result<()> {
        fs::create_dir_all(&self.scratch).tried(format!("make {}", self.scratch.display()))?;
        let payload = self.payload()?;
        say::step(&format!("Boot outer guest {}", self.number));
        let (result, console, errors) = (self.scratch.join("result"), self.log("console"), self.log("qemu"));
        let log = File::create(&errors).tried(format!("write {}", errors.display()))?;
        let (said, saying) = std::io::pipe().tried("make a pipe")?;
        let number = self.number;
        let showing = std::thread::spawn(move || show(number, said));
        let mut qemu = self.qemu(&payload, &result);
        // Nothing is ever written there; but where it is closed, QEMU takes it that nobody listens either.
        let ended = run::status(qemu.stdin(Stdio::piped()).stdout(saying).stderr(log));
        // With it goes our end of the pipe.
        drop(qemu);
        let _ = showing.join();
        let ended = ended?;
        let said = fs::read_to_string(&result).unwrap_or_default();
        match said.trim().parse::<u8>() {
            Ok(0) => Ok(()),
            Ok(_) => Err(Failure::step(format!(
                "tests in outer guest {number} failed; what Incus complained of is in {}",
                console.display()
            ))),
            Err(_) => Err(Failure::step(format!(
                "outer guest {number} ended before its tests did (QEMU: {ended}; 137 is that it was given up after {GUEST_LIMIT_SECS} s). \
                 Its CPU is an emulation under which kernels were seen to die: run it again, with a FILTER for one test alone. The end \
                 of its console, {}:\n{}\nQEMU said:\n{}",
                console.display(),
                run::tail(&console),
                run::tail(&errors)
            ))),
        }
    }

    /// What is kept of what it, and its QEMU, said.
    fn log(&self, what: &str) -> PathBuf {
        place::own().join(format!("outer-{}-{what}.log", self.number))
    }

    fn qemu(&self, payload: &Path, result: &Path) -> Command {
        // `setpriv` has the kernel end each with the one before it, whatever that one ends of: not the task's own end alone is seen to.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "timeout", "--foreground", "--signal=KILL", &GUEST_LIMIT_SECS.to_string()]);
        qemu.args(["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=1024"]);
        // With two CPUs the guest was seen to break down, and one is as fast.
        qemu.args(["-machine", "q35", "-cpu", "max,la57=off", "-smp", "1", "-m", MEMORY]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-device", METRONOME]);
        qemu.arg("-kernel").arg(&self.pieces.outer.kernel).args(["-append", KERNEL_WORDS]);
        qemu.args(["-serial", &format!("file:{}", self.log("console").display()), "-device", "virtio-serial-pci"]);
        // Relative, since a socket's path must be short.
        qemu.current_dir(&self.scratch).args(["-serial", "unix:shell,server=on,wait=off"]);
        qemu.args(["-chardev", "stdio,id=said,signal=off", "-device", "virtserialport,chardev=said,name=pika.said"]);
        qemu.args(["-chardev", &format!("file,id=result,path={}", result.display())]);
        qemu.args(["-device", "virtserialport,chardev=result,name=pika.result"]);
        let throw_away = "format=raw,snapshot=on,cache=unsafe,discard=unmap";
        qemu.args(["-drive", &format!("if=none,id=root,file={},{throw_away}", self.pieces.outer.disk.display())]);
        qemu.args(["-device", "nvme,drive=root,serial=root"]);
        qemu.args(["-drive", &format!("if=none,id=payload,file={},format=raw,readonly=on", payload.display())]);
        qemu.args(["-device", "virtio-blk-pci,drive=payload"]);
        qemu
    }

    /// Packs what it runs.
    fn payload(&self) -> Result<PathBuf> {
        let (scratch, Pieces { programs, images, .. }) = (&self.scratch, self.pieces);
        let root = scratch.join("payload");
        let bin = root.join("bin");
        fs::create_dir_all(&bin).tried(format!("make {}", bin.display()))?;
        image::place_program(programs.agent, &bin.join("pika-guest"))?;
        for (from, to) in [(programs.cloud, "pika-cloud"), (programs.tests, "tests")] {
            // Without what only a debugger reads it is a tenth.
            run::captured(Command::new("strip").arg("-o").arg(bin.join(to)).arg(from))?;
        }
        let args: Vec<String> = self.args.iter().map(|arg| quoted(arg)).collect();
        image::write(
            &root.join("run"),
            0o755,
            &RUN.replace("@LIMIT@", &TESTS_LIMIT_SECS.to_string()).replace("@ARGS@", &args.join(" ")),
        )?;
        let packed = scratch.join("payload.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&packed).arg("-C").arg(&root).args(["run", "bin"]);
        // What the VMs inside boot comes into a folder of its own.
        tar.args(["--transform", "s,^\\.,vm,"]);
        for folder in *images {
            tar.arg("-C").arg(folder).arg(".");
        }
        run::captured(&mut tar)?;
        Ok(packed)
    }
}

/// As one word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Passes lines on, each with the number of the guest that says it.
fn show(number: usize, said: PipeReader) {
    let mut lines = BufReader::new(said);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let mut out = std::io::stdout().lock();
        let _ = write!(out, "{number}| ").and_then(|()| out.write_all(&line)).and_then(|()| out.flush());
        line.clear();
    }
}

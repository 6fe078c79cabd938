//! Where the collector keeps what it knows.
//!
//! ```text
//! <state_dir>/id                       who owns the instances made from here
//! <state_dir>/.commands/<runtime_id>   what is wanted of it, for whoever drives it
//! <state_dir>/.bakes/<bake>/           an image that is being baked, or what one that failed left
//! <state_dir>/<runtime_id>/lock        held by the one collector that drives the runtime
//!                         /spec.json   the spec, secrets redacted
//!                         /journal.jsonl
//!                         /<incarnation>/events.jsonl, status.json, result.json, verdict.json   derived from the journal
//!                                       /logs/, artifacts/, artifacts.sha256                    the guest's outputs
//! ```
//!
//! All of it is for its owner's eyes only: folders are 0700, files 0600.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fs2::FileExt as _;
use pika_cloud_common::{Command, RuntimeSpec};

/// Below this much free space nothing new is begun: a verdict must always find room.
const MIN_FREE_BYTES: u64 = 16 * 1024 * 1024;

/// The state dir cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateDirError {
    /// The file system refused.
    #[error("{}: {doing}: {source}{}", path.display(), way_out(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// Too little space for a run.
    #[error(
        "{}: only {free} bytes are free, a run needs at least {MIN_FREE_BYTES}: free some, or name another folder with \
         --state-dir",
        path.display()
    )]
    Full {
        /// The state dir.
        path: PathBuf,
        /// What is free.
        free: u64,
    },
    /// The file that names the owner is not as it was written.
    #[error(
        "{}: holds no owner's id, which instances made from here are marked with: bring the file back, or remove it to begin \
         with a new id that owns none of them",
        path.display()
    )]
    NoOwner {
        /// The file.
        path: PathBuf,
    },
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists => ": name a writable folder with --state-dir",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space there, or name another folder with --state-dir"
        }
        _ => "",
    }
}

fn fail(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> StateDirError {
    let path = path.to_owned();
    move |source| StateDirError::Io { path, doing, source }
}

/// A collector's state dir.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    owner: String,
}

impl StateDir {
    /// Opens the folder, or makes it.
    ///
    /// # Errors
    /// Where it cannot be made, read or written.
    pub(crate) fn open(path: &Path) -> Result<Self, StateDirError> {
        make_folder(path)?;
        let owner = owner_id(path)?;
        Ok(Self { path: path.to_owned(), owner })
    }

    /// The id that instances made from here are marked with.
    pub(crate) fn owner(&self) -> &str {
        &self.owner
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A name that nothing else has: 128 random bits.
    ///
    /// # Errors
    /// Where the kernel gives none.
    pub(crate) fn random_id(&self) -> Result<String, StateDirError> {
        random_hex().map_err(fail(&self.path, "drawing a random id"))
    }

    /// The folder of a runtime, whether it exists or not.
    pub(crate) fn runtime(&self, runtime_id: &str) -> RuntimeFolder {
        RuntimeFolder::new(&self.path, runtime_id)
    }

    fn commands_path(&self) -> PathBuf {
        self.path.join(".commands")
    }

    /// Tells whoever drives a runtime what is wanted of it. What was wanted before and goes further stands.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(crate) fn request(&self, runtime_id: &str, command: Command) -> Result<(), StateDirError> {
        let folder = self.commands_path();
        make_folder(&folder)?;
        let path = folder.join(runtime_id);
        if read_command(&path).is_none_or(|earlier| earlier < command) {
            replace(&path, command.as_str().as_bytes())?;
        }
        Ok(())
    }

    /// What is wanted of a runtime, if anything is; asked once.
    pub(crate) fn take_request(&self, runtime_id: &str) -> Option<Command> {
        let path = self.commands_path().join(runtime_id);
        // Taken away before it is read, so that what is asked for in between is there for the next time.
        let taken = temporary_beside(&path);
        fs::rename(&path, &taken).ok()?;
        let command = read_command(&taken);
        let _ = fs::remove_file(taken);
        command
    }

    /// The runtimes of which something is wanted.
    pub(crate) fn requests(&self) -> Vec<String> {
        let entries = fs::read_dir(self.commands_path()).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect()
    }

    /// Every runtime that has a folder here, by name.
    ///
    /// # Errors
    /// Where the folder cannot be read.
    pub(crate) fn runtimes(&self) -> Result<Vec<String>, StateDirError> {
        let entries = fs::read_dir(&self.path).map_err(fail(&self.path, "listing runtimes"))?;
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("spec.json").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }
}

fn read_command(path: &Path) -> Option<Command> {
    serde_json::from_value(serde_json::Value::from(fs::read_to_string(path).ok()?.trim())).ok()
}

/// That a new run would find room. What is there already is shown, collected and destroyed on a full disk, too.
fn check_room(path: &Path) -> Result<(), StateDirError> {
    let stat = rustix::fs::statvfs(path).map_err(|e| fail(path, "reading its free space")(e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < MIN_FREE_BYTES {
        return Err(StateDirError::Full { path: path.to_owned(), free });
    }
    Ok(())
}

/// Reads the owner's id, or makes one. Two that make one at once agree on whose link was first.
fn owner_id(folder: &Path) -> Result<String, StateDirError> {
    let path = folder.join("id");
    match fs::read_to_string(&path) {
        Ok(id) => return checked_id(&id, &path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(StateDirError::NoOwner { path }),
        Err(error) => return Err(fail(&path, "reading the owner's id")(error)),
    }
    let id = random_hex().map_err(fail(&path, "drawing a random id"))?;
    let temporary = folder.join(format!("id.{id}"));
    write_new(&temporary, id.as_bytes())?;
    // A link fails where another collector was first, and replaces nothing.
    let linked = fs::hard_link(&temporary, &path);
    fs::remove_file(&temporary).map_err(fail(&temporary, "removing a temporary file"))?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(fail(&path, "writing the owner's id")(error)),
        _ => {
            sync_folder(folder)?;
            let id = fs::read_to_string(&path).map_err(fail(&path, "reading the owner's id"))?;
            checked_id(&id, &path)
        }
    }
}

/// Whether `text` may be an owner's id.
pub(crate) fn is_owner_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// An empty one would own whatever has an empty label.
fn checked_id(text: &str, path: &Path) -> Result<String, StateDirError> {
    let id = text.trim();
    if is_owner_id(id) { Ok(id.to_owned()) } else { Err(StateDirError::NoOwner { path: path.to_owned() }) }
}

/// 128 random bits.
fn random_hex() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// The folder of one runtime.
#[derive(Clone, Debug)]
pub struct RuntimeFolder {
    path: PathBuf,
}

impl RuntimeFolder {
    /// The one in a state dir, whether it exists or not.
    pub fn new(state_dir: &Path, runtime_id: &str) -> Self {
        Self { path: state_dir.join(runtime_id) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a run was ever begun in it.
    pub(crate) fn exists(&self) -> bool {
        self.spec_path().exists()
    }

    /// Makes it, durably, with its parent: Incus is asked for nothing before that.
    ///
    /// # Errors
    /// Where it cannot be made, or where it is new and there is no room for a run.
    pub(crate) fn make(&self) -> Result<(), StateDirError> {
        if let Some(parent) = self.path.parent().filter(|_| !self.exists()) {
            check_room(parent)?;
        }
        self.make_for_lock()
    }

    /// As [`RuntimeFolder::make`], to keep others out while something is ended: that needs no room for a run.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub(crate) fn make_for_lock(&self) -> Result<(), StateDirError> {
        make_folder(&self.path)?;
        sync_folder(&self.path)?;
        self.path.parent().map_or(Ok(()), sync_folder)
    }

    /// Takes the lock, or says who has it (Invariant 6).
    ///
    /// # Errors
    /// Where its file cannot be made or written.
    pub fn lock(&self) -> Result<Result<RuntimeLock, Option<u32>>, StateDirError> {
        let path = self.path.join("lock");
        let doing = "locking the runtime";
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail(&path, doing))?;
        match file.try_lock_exclusive() {
            Ok(()) => {
                let holder = std::process::id().to_string();
                file.write_all(holder.as_bytes()).map_err(fail(&path, doing))?;
                // Not cut to nothing before: the disk would give the block back, and take it again, for each of thousands.
                file.set_len(holder.len() as u64).map_err(fail(&path, doing))?;
                Ok(Ok(RuntimeLock { _file: file }))
            }
            Err(error) if error.raw_os_error() == fs2::lock_contended_error().raw_os_error() => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                Ok(Err(holder.trim().parse().ok()))
            }
            Err(error) => Err(fail(&path, doing)(error)),
        }
    }

    /// The process that drives the runtime, as far as the kernel tells. It is only looked: to try the lock would be to hold it.
    pub(crate) fn driver(&self) -> Option<u32> {
        use std::os::unix::fs::MetadataExt as _;
        let inode = fs::metadata(self.path.join("lock")).ok()?.ino().to_string();
        // `1: FLOCK  ADVISORY  WRITE 4711 fd:01:1234567 0 EOF`
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let holder = |line: &str| -> Option<u32> {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let is_it = fields.get(1) == Some(&"FLOCK") && fields.get(5)?.rsplit(':').next() == Some(inode.as_str());
            if is_it { fields.get(4)?.parse().ok() } else { None }
        };
        locks.lines().find_map(holder)
    }

    fn spec_path(&self) -> PathBuf {
        self.path.join("spec.json")
    }

    /// The spec that the runtime was last run with, its secrets redacted.
    pub fn read_spec(&self) -> Option<RuntimeSpec> {
        serde_json::from_slice(&fs::read(self.spec_path()).ok()?).ok()
    }

    /// Writes the spec of a run that begins, its secrets redacted.
    ///
    /// # Errors
    /// Where it cannot be written, or there is no room for a run.
    pub(crate) fn write_spec(&self, spec: &RuntimeSpec) -> Result<(), StateDirError> {
        check_room(&self.path)?;
        let text = serde_json::to_vec_pretty(&spec.redacted())
            .map_err(|e| fail(&self.spec_path(), "writing the spec")(e.into()))?;
        replace(&self.spec_path(), &text)
    }

    /// Removes the outputs of incarnations with a lower number.
    ///
    /// # Errors
    /// Where one of them cannot be removed: others may be, and what is left can be tried again.
    pub(crate) fn prune(&self, before: u32) -> Result<(), StateDirError> {
        let mut left = Ok(());
        for entry in fs::read_dir(&self.path).map_err(fail(&self.path, "listing incarnations"))?.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            if number.is_some_and(|number| number < before && self.incarnation(number) == entry.path())
                && let Err(error) = fs::remove_dir_all(entry.path())
                && error.kind() != io::ErrorKind::NotFound
            {
                left = Err(fail(&entry.path(), "removing an old incarnation's outputs")(error));
            }
        }
        left
    }

    /// The folder of an incarnation's outputs.
    pub(crate) fn incarnation(&self, incarnation: u32) -> PathBuf {
        self.path.join(incarnation.to_string())
    }
}

/// Held while a collector drives a runtime; the kernel lets it go however the collector ends.
#[derive(Debug)]
pub struct RuntimeLock {
    _file: File,
}

/// Makes a folder that only its owner can read, with its parents.
pub(crate) fn make_folder(path: &Path) -> Result<(), StateDirError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail(path, "making the folder"))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), StateDirError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(fail(path, "syncing the folder"))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), StateDirError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(fail(path, "making the file"))?;
    file.write_all(bytes).map_err(fail(path, "writing the file"))?;
    file.sync_data().map_err(fail(path, "syncing the file"))
}

/// Replaces a file's content; a reader finds the old or the new, never a part. Several may do that at once.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StateDirError> {
    let temporary = temporary_beside(path);
    let replaced = write_new(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path).map_err(fail(path, "replacing the file")));
    if replaced.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// A name that nobody else uses, for what is to take another's place.
pub(crate) fn temporary_beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let (process, count) = (std::process::id(), FIRST_COUNT.saturating_add(COUNT.fetch_add(1, Ordering::Relaxed)));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{process}.{count}.new"))
}

/// Where this process begins to count: a collector in a container that is started again has the process number of the one
/// before it, and finds what that one left.
static FIRST_COUNT: LazyLock<u64> = LazyLock::new(|| {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(0)
});

/// The process and the count of such a name, `.NAME.PROCESS.COUNT.new`.
fn read_temporary(path: &Path) -> Option<(u32, u64)> {
    let mut parts = path.file_name()?.to_str()?.rsplit('.');
    let (Some("new"), Some(count), Some(process)) = (parts.next(), parts.next(), parts.next()) else { return None };
    Some((process.parse().ok()?, count.parse().ok()?))
}

/// Whether this process gave the name.
pub(crate) fn is_our_temporary(path: &Path) -> bool {
    read_temporary(path).is_some_and(|(process, count)| process == std::process::id() && count >= *FIRST_COUNT)
}

/// Whether whoever gave the name is gone, as far as can be seen here.
pub(crate) fn is_stale_temporary(path: &Path) -> bool {
    let Some((process, _)) = read_temporary(path) else { return false };
    let lives = || process != std::process::id() && Path::new("/proc").join(process.to_string()).exists();
    !is_our_temporary(path) && !lives()
}

/// What stands beside `path` under such a name.
pub(crate) fn temporaries_beside(path: &Path) -> impl Iterator<Item = PathBuf> {
    let prefix = format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let entries = path.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    entries.filter(move |entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Stdio;
    use std::sync::Barrier;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;

    fn spec() -> RuntimeSpec {
        let mut spec = RuntimeSpec::default();
        spec.identity.runtime_id = "job-7".to_owned();
        spec.bootstrap.env.insert("TOKEN".to_owned(), "geheim".to_owned());
        spec
    }

    #[test]
    fn two_that_open_it_agree_on_its_owner() {
        for _ in 0..20 {
            let folder = TempDir::new().unwrap();
            let path = folder.path().join("state");
            let barrier = Barrier::new(8);
            let open = || {
                barrier.wait();
                StateDir::open(&path).unwrap().owner().to_owned()
            };
            let owners: Vec<String> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(owners.iter().all(|owner| *owner == owners[0] && owner.len() == 32), "{owners:?}");
            assert_eq!(StateDir::open(&path).unwrap().owner(), owners[0]);
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "nothing else is left there");
        }
    }

    #[test]
    fn state_dirs_have_owners_of_their_own() {
        let folder = TempDir::new().unwrap();
        let open = |name: &str| StateDir::open(&folder.path().join(name)).unwrap().owner().to_owned();
        assert_ne!(open("a"), open("b"));
    }

    #[test]
    fn an_owner_that_cannot_be_read_is_not_guessed() {
        for text in [&b""[..], b"\n", b"a b", b"\xff\xfe", &[b'a'; 65]] {
            let folder = TempDir::new().unwrap();
            fs::write(folder.path().join("id"), text).unwrap();
            let error = StateDir::open(folder.path()).unwrap_err();
            assert!(matches!(error, StateDirError::NoOwner { .. }), "{error}");
            assert!(error.to_string().contains("/id: "), "{error}");
            assert_eq!(fs::read(folder.path().join("id")).unwrap(), text, "nothing is touched");
        }
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("id"), "mine\n").unwrap();
        assert_eq!(StateDir::open(folder.path()).unwrap().owner(), "mine");
    }

    #[test]
    fn only_its_owner_reads_it() {
        let folder = TempDir::new().unwrap();
        let state = StateDir::open(&folder.path().join("a/b")).unwrap();
        let runtime = state.runtime("job-7");
        runtime.make().unwrap();
        runtime.write_spec(&spec()).unwrap();
        state.request("job-7", Command::Cancel).unwrap();
        let _lock = runtime.lock().unwrap().unwrap();
        let mode = |path: &str| fs::metadata(folder.path().join(path)).unwrap().permissions().mode() & 0o777;
        for path in ["a", "a/b", "a/b/job-7"] {
            assert_eq!(mode(path), 0o700, "{path}");
        }
        for path in ["a/b/id", "a/b/job-7/spec.json", "a/b/job-7/lock", "a/b/.commands/job-7"] {
            assert_eq!(mode(path), 0o600, "{path}");
        }
    }

    /// Invariant 8.
    #[test]
    fn a_spec_is_kept_without_its_secrets() {
        let folder = TempDir::new().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let runtime = state.runtime("job-7");
        assert_eq!((runtime.exists(), runtime.read_spec()), (false, None));
        runtime.make().unwrap();
        assert_eq!(state.runtimes().unwrap(), Vec::<String>::new(), "no run was begun in it");
        runtime.write_spec(&spec()).unwrap();
        assert_eq!(runtime.read_spec(), Some(spec().redacted()));
        assert!(!fs::read_to_string(folder.path().join("job-7/spec.json")).unwrap().contains("geheim"));
        assert_eq!(state.runtimes().unwrap(), ["job-7"]);
    }

    #[test]
    fn who_drives_a_runtime_is_seen_and_not_disturbed() {
        let folder = TempDir::new().unwrap();
        let runtime = StateDir::open(folder.path()).unwrap().runtime("job-7");
        runtime.make().unwrap();
        assert_eq!(runtime.driver(), None);
        let lock = runtime.lock().unwrap().unwrap();
        assert_eq!(runtime.driver(), Some(std::process::id()));
        drop(lock);
        assert_eq!(runtime.driver(), None);
    }

    #[test]
    fn a_temporary_is_stale_once_nobody_is_going_to_use_it() {
        let own = temporary_beside(Path::new("/x/verdict.json"));
        assert!(is_our_temporary(&own) && !is_stale_temporary(&own));
        let is_stale = |name: &str| is_stale_temporary(&Path::new("/x").join(name));
        // A collector in a container that is started again.
        assert!(is_stale(&format!(".verdict.json.{}.7.new", std::process::id())));
        // No machine has a process of that number.
        assert!(is_stale(".verdict.json.4194305.7.new"));
        assert!(!is_stale(&format!(".verdict.json.1.{}.new", *FIRST_COUNT)), "somebody else's, who lives");
        for another in ["verdict.json", ".verdict.json.4194305.new", ".verdict.json.x.7.new", ".verdict.4194305.7.old"]
        {
            assert!(!is_stale(another), "{another}");
        }
    }

    #[test]
    fn what_is_wanted_goes_only_further() {
        let folder = TempDir::new().unwrap();
        let state = StateDir::open(&folder.path().join("state")).unwrap();
        assert_eq!(state.take_request("job-7"), None);
        state.request("job-7", Command::Stop).unwrap();
        state.request("job-7", Command::Cancel).unwrap();
        assert_eq!(state.requests(), ["job-7"]);
        assert_eq!(state.take_request("job-7"), Some(Command::Stop));
        assert_eq!((state.take_request("job-7"), state.requests().len()), (None, 0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| state.request("job-7", Command::Destroy).unwrap()));
            }
        });
        assert_eq!(state.take_request("job-7"), Some(Command::Destroy));
    }

    /// Invariant 6.
    #[test]
    fn one_collector_holds_a_runtime() {
        let folder = TempDir::new().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let (one, other) = (state.runtime("one"), state.runtime("other"));
        one.make().unwrap();
        other.make().unwrap();
        let lock = one.lock().unwrap().unwrap();
        assert_eq!(one.lock().unwrap().unwrap_err(), Some(std::process::id()));
        let _other = other.lock().unwrap().unwrap();
        drop(lock);
        let _again = one.lock().unwrap().unwrap();
    }

    /// The folder of the test below, in the process that it starts.
    const LOCK_FOLDER: &str = "PIKA_TEST_LOCK_FOLDER";

    #[test]
    fn lock_child() {
        let Some(folder) = std::env::var_os(LOCK_FOLDER) else { return };
        let runtime = RuntimeFolder { path: PathBuf::from(folder) };
        let _lock = runtime.lock().unwrap().unwrap();
        fs::write(runtime.path().join("locked"), "").unwrap();
        // Until it is killed, or the test that started it is gone.
        let _ = io::stdin().read(&mut [0]);
    }

    #[test]
    fn the_lock_of_a_process_goes_with_it() {
        let folder = TempDir::new().unwrap();
        let runtime = RuntimeFolder { path: folder.path().to_owned() };
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "state_dir::tests::lock_child", "--nocapture"])
            .env(LOCK_FOLDER, folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while !folder.path().join("locked").exists() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it had the lock");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(runtime.lock().unwrap().unwrap_err(), Some(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        let _lock = runtime.lock().unwrap().unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("lock")).unwrap(), std::process::id().to_string());
    }

    #[test]
    fn what_cannot_be_made_names_its_path_and_the_way_out() {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        // Not even root may make anything in the second.
        for path in [folder.path().join("file/state"), PathBuf::from("/sys/pika-cloud")] {
            let text = StateDir::open(&path).unwrap_err().to_string();
            assert!(text.starts_with(&format!("{}: making the folder: ", path.display())), "{text}");
            assert!(text.ends_with("name a writable folder with --state-dir"), "{text}");
        }
        let full = fail(Path::new("/var/lib/x"), "writing the file")(io::ErrorKind::StorageFull.into());
        assert!(
            full.to_string().ends_with(": free some space there, or name another folder with --state-dir"),
            "{full}"
        );
    }

    /// Invariant 5.
    #[test]
    fn outputs_of_old_incarnations_are_removed_and_nothing_else() {
        let folder = TempDir::new().unwrap();
        let runtime = RuntimeFolder { path: folder.path().join("job-7") };
        for name in ["1/logs", "2/artifacts/1", "03", "3", "10", "x1", "journal.1"] {
            make_folder(&runtime.path().join(name)).unwrap();
        }
        let elsewhere = folder.path().join("elsewhere/2");
        make_folder(&elsewhere).unwrap();
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), runtime.path().join("1/logs/link")).unwrap();
        runtime.prune(3).unwrap();
        runtime.prune(3).unwrap();
        let mut left: Vec<_> = fs::read_dir(runtime.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort_unstable();
        assert_eq!(left, ["03", "10", "3", "journal.1", "x1"]);
        assert!(elsewhere.exists());
    }

    /// The kernel's own file systems have no space to give.
    #[test]
    fn nothing_new_is_begun_on_a_full_disk() {
        let runtime = RuntimeFolder { path: PathBuf::from("/proc/job-7") };
        let error = runtime.make().unwrap_err();
        assert!(matches!(error, StateDirError::Full { free: 0, .. }), "{error}");
        assert!(error.to_string().starts_with("/proc: only 0 bytes are free"), "{error}");
        assert!(error.to_string().contains("--state-dir"), "{error}");
        let again = RuntimeFolder { path: PathBuf::from("/proc") };
        assert!(matches!(again.write_spec(&spec()), Err(StateDirError::Full { .. })));
    }

    #[test]
    fn a_reader_finds_the_old_or_the_new() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("file.json");
        replace(&path, &[0; 5000]).unwrap();
        std::thread::scope(|scope| {
            for byte in 1..5 {
                let path = &path;
                scope.spawn(move || (0..50).for_each(|_| replace(path, &[byte; 5000]).unwrap()));
            }
            for _ in 0..500 {
                let bytes = fs::read(&path).unwrap();
                assert!(bytes.len() == 5000 && bytes.iter().all(|byte| *byte == bytes[0]));
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

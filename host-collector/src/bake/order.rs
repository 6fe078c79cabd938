//! What is to be baked.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::error::BakeError;
use super::probe::Init;

/// How long a provisioning script may take unless it is said.
const PROVISION_LIMIT: Duration = Duration::from_secs(3600);

/// A larger script is none.
pub(super) const MAX_SCRIPT_BYTES: u64 = 1024 * 1024;

/// Where nothing of an image can lie: the guest's own kernel or init puts something over it.
const VOLATILE: [&str; 5] = ["/dev", "/proc", "/sys", "/run", "/tmp"];

/// What [`Cloud::bake`](crate::Cloud::bake) is to make of what.
#[derive(Clone, Debug)]
pub struct Bake {
    /// The alias of the image that it begins with; it stays as it is.
    pub from: String,
    /// The alias that points to the baked image in the end, whether there is one of that name or not.
    pub to: String,
    /// Incus's project of both, and of the builder.
    pub project: String,
    /// Profiles of the builder, in their order: its root disk, its network.
    pub profiles: Vec<String>,
    /// Files that are put into the image, in their order.
    pub files: Vec<BakeFile>,
    /// A script that is run in the builder, by `/bin/sh` as root, after the files are there.
    pub provision: Option<PathBuf>,
    /// How long that script may take.
    pub provision_limit: Duration,
}

impl Bake {
    /// Of one alias into another, in the project and with the profile `default`, without anything but the agent.
    pub fn new(from: impl Into<String>, to: impl Into<String>) -> Self {
        Self {
            from: from.into(),
            to: to.into(),
            project: "default".to_owned(),
            profiles: vec!["default".to_owned()],
            files: Vec::new(),
            provision: None,
            provision_limit: PROVISION_LIMIT,
        }
    }

    /// What can be said before anything is looked up.
    pub(super) fn check(&self) -> Result<(), BakeError> {
        for alias in [&self.from, &self.to] {
            if alias.is_empty() || alias.chars().any(char::is_control) {
                return Err(BakeError::Alias { alias: alias.clone() });
            }
        }
        if self.from == self.to {
            return Err(BakeError::SameAlias { alias: self.from.clone() });
        }
        self.files.iter().try_for_each(BakeFile::check)?;
        let Some(script) = &self.provision else { return Ok(()) };
        let problem = |problem: String| BakeError::Script { path: script.clone(), problem };
        let data = std::fs::metadata(script).map_err(|error| problem(error.to_string()))?;
        match (data.is_file(), data.len()) {
            (false, _) => Err(problem("it is no file".to_owned())),
            (true, bytes) if bytes > MAX_SCRIPT_BYTES => {
                Err(problem(format!("it has more than {MAX_SCRIPT_BYTES} bytes")))
            }
            (true, _) => Ok(()),
        }
    }
}

/// A file that is put into an image, as [`BakeFile::new`] or `str::parse` makes it. Written as `SRC:DEST` or `SRC:DEST:MODE`, the mode in octal.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BakeFile {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it will be in the image, from its root on. Folders are made.
    pub dest: String,
    /// Its permissions there, at most 0o7777; `None` for 0755 where the source may be executed by its owner, else 0644.
    pub mode: Option<u32>,
}

/// How a [`BakeFile`] is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a file is written SRC:DEST or SRC:DEST:MODE, such as tool:/usr/local/bin/tool:0755")]
pub struct NotABakeFile;

impl FromStr for BakeFile {
    type Err = NotABakeFile;

    fn from_str(text: &str) -> Result<Self, NotABakeFile> {
        let (rest, mode) = match text.rsplit_once(':') {
            // Of the two colons, the last is before a mode, or before the destination.
            Some((rest, last)) if !last.starts_with('/') => (rest, Some(octal(last).ok_or(NotABakeFile)?)),
            _ => (text, None),
        };
        let (source, dest) = rest.rsplit_once(':').ok_or(NotABakeFile)?;
        let is_whole = !source.is_empty() && dest.starts_with('/');
        is_whole.then(|| Self { source: source.into(), dest: dest.to_owned(), mode }).ok_or(NotABakeFile)
    }
}

fn octal(text: &str) -> Option<u32> {
    let is_octal = (1..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    if is_octal { u32::from_str_radix(text, 8).ok() } else { None }
}

impl fmt::Display for BakeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source.display(), self.dest)?;
        self.mode.map_or(Ok(()), |mode| write!(f, ":{mode:04o}"))
    }
}

impl BakeFile {
    /// From a path of the host to one of the image, with the permissions that its own suggest.
    pub fn new(source: impl Into<PathBuf>, dest: impl Into<String>) -> Self {
        Self { source: source.into(), dest: dest.into(), mode: None }
    }

    fn check(&self) -> Result<(), BakeError> {
        let bad = |problem: String| Err(BakeError::File { file: self.to_string(), problem });
        let parts: Vec<&str> = self.dest.split('/').skip(1).collect();
        if !self.dest.starts_with('/') || self.dest.ends_with('/') || self.dest.chars().any(char::is_control) {
            return bad("the destination must be a file's path from the root on, such as /etc/tool.conf".to_owned());
        }
        if parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
            return bad("the destination must not have `.`, `..` or empty parts".to_owned());
        }
        if let Some(folder) = VOLATILE.iter().find(|folder| parts.first() == folder.get(1..).as_ref()) {
            return bad(format!("what lies below {folder} is not part of an image: name another destination"));
        }
        // In most images `/bin` is `/usr/bin`. What comes there by other ways is found once it is there.
        if Init::all_files().any(|path| path == self.dest || path.strip_prefix("/usr") == Some(&self.dest)) {
            let problem = "that file is pika-guest's own: name another destination; what a unit of it is to do beside, a drop-in \
                           says";
            return bad(problem.to_owned());
        }
        if self.mode.is_some_and(|mode| mode > 0o7777) {
            return bad("the mode must be permissions alone, such as 0644".to_owned());
        }
        match std::fs::metadata(&self.source) {
            Ok(data) if data.is_file() => Ok(()),
            Ok(_) => {
                bad("the source is no file; for a folder, give a tar archive and unpack it with --provision".to_owned())
            }
            Err(error) => bad(format!("the source cannot be read: {error}")),
        }
    }

    /// Its permissions in the image.
    pub(super) fn mode(&self) -> u32 {
        use std::os::unix::fs::PermissionsExt as _;
        let is_program = || std::fs::metadata(&self.source).is_ok_and(|data| data.permissions().mode() & 0o100 != 0);
        self.mode.unwrap_or_else(|| if is_program() { 0o755 } else { 0o644 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_it_is_written() {
        let parsed =
            |text: &str| text.parse::<BakeFile>().map(|file| (file.source.display().to_string(), file.dest, file.mode));
        let file = |source: &str, dest: &str, mode| Ok((source.to_owned(), dest.to_owned(), mode));
        assert_eq!(parsed("tool:/usr/bin/tool"), file("tool", "/usr/bin/tool", None));
        assert_eq!(parsed("a:b:/etc/c:0600"), file("a:b", "/etc/c", Some(0o600)));
        assert_eq!(parsed("a:/etc/c:4755"), file("a", "/etc/c", Some(0o4755)));
        for wrong in ["", "a", "a:b", "a:/b:", "a:/b:9", "a:/b:77777", ":/b", "a:b:644", "a:/b:rwx"] {
            assert_eq!(parsed(wrong), Err(NotABakeFile), "{wrong}");
        }
        for text in ["a:/b", "a:/b:0644"] {
            assert_eq!(text.parse::<BakeFile>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_baked_is_told_before_anything_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::write(&source, "x").unwrap();
        let check = |change: &dyn Fn(&mut Bake)| {
            let mut order = Bake::new("base", "ci");
            change(&mut order);
            order.check().map_err(|error| error.to_string())
        };
        let file =
            |source: &std::path::Path, dest: &str| BakeFile { source: source.into(), dest: dest.into(), mode: None };
        assert_eq!(check(&|_| {}), Ok(()));
        assert_eq!(check(&|order| order.files.push(file(&source, "/etc/x"))), Ok(()));
        assert!(check(&|order| order.to = "base".into()).unwrap_err().contains("--to"));
        assert!(check(&|order| order.to = String::new()).is_err());
        for dest in [
            "etc/x",
            "/etc/",
            "/etc/../x",
            "/etc//x",
            "/run/x",
            "/tmp/x",
            "/proc/x",
            "/etc/a\nb",
            "/usr/bin/pika-guest",
        ] {
            assert!(
                check(&|order| order.files.push(file(&source, dest))).unwrap_err().contains("destination"),
                "{dest}"
            );
        }
        for dest in Init::all_files().chain(["/bin/pika-guest"]) {
            assert!(check(&|order| order.files.push(file(&source, dest))).unwrap_err().contains("pika-guest's own"));
        }
        for source in [folder.path().join("absent"), folder.path().to_owned()] {
            assert!(check(&|order| order.files.push(file(&source, "/etc/x"))).unwrap_err().contains("the source"));
            assert!(check(&|order| order.provision = Some(source.clone())).unwrap_err().contains("--provision"));
        }
        assert_eq!(check(&|order| order.files.push(file(&source, "/running"))), Ok(()));
        // As a file's own metadata have it.
        let with_type = BakeFile { mode: Some(0o100_644), ..file(&source, "/etc/x") };
        assert!(check(&|order| order.files.push(with_type.clone())).unwrap_err().contains("permissions"));
    }

    #[test]
    fn a_script_may_have_as_much_as_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        let order = Bake { provision: Some(script.clone()), ..Bake::new("base", "ci") };
        for (bytes, is_good) in [(MAX_SCRIPT_BYTES, true), (MAX_SCRIPT_BYTES + 1, false)] {
            std::fs::File::create(&script).unwrap().set_len(bytes).unwrap();
            assert_eq!(order.check().is_ok(), is_good, "{bytes}");
        }
    }

    #[test]
    fn a_program_stays_one() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::write(&source, "x").unwrap();
        let file = BakeFile { source: source.clone(), dest: "/x".into(), mode: None };
        assert_eq!(file.mode(), 0o644);
        std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(file.mode(), 0o755);
        assert_eq!(BakeFile { mode: Some(0o600), ..file }.mode(), 0o600);
    }
}

//! What the journal needs of a file system: one runtime's folder. Two have one, the disk and the simulator.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

/// One runtime's folder. Names are relative to it: `journal.jsonl`, `3/logs/guest.log`.
///
/// Nothing is durable before its `sync` and, where it is new, `sync_folder`.
pub trait Fs {
    /// The names of the files directly in the folder; none where there is no folder.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A file's length, where there is one.
    fn length(&self, name: &str) -> io::Result<Option<u64>>;
    /// Reads into `buf`, and says how much; less than its length at the end of the file only.
    fn read_at(&self, name: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Appends all of the bytes, or some of them and an error. Makes the file and the folders in its name.
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Cuts a file, and gives back what is reserved behind its end.
    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()>;
    /// Takes room up to that length without changing the file's. Fine where the file system cannot do that.
    fn reserve(&mut self, name: &str, up_to: u64) -> io::Result<()>;
    /// Makes a file's bytes and length durable.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Makes the names in the folder that holds `name` durable.
    fn sync_folder(&mut self, name: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// How messages call a file.
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

/// The disk's. It holds one descriptor from an append to the sync behind it, so that the kernel tells of every page that it
/// could not write meanwhile, and none otherwise.
#[derive(Debug)]
pub struct DiskFs {
    folder: PathBuf,
    appended: Option<(String, File)>,
    /// Syncs of readers that were asked for, and whether they fail.
    #[cfg(test)]
    pub(super) reader_syncs: (usize, bool),
}

/// No name is followed through a link.
const NO_LINKS: i32 = OFlags::NOFOLLOW.bits().cast_signed();

impl DiskFs {
    /// A runtime's folder, which need not be there yet.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            appended: None,
            #[cfg(test)]
            reader_syncs: (0, false),
        }
    }

    /// Which file system it is on: those of one number are synced together.
    ///
    /// # Errors
    /// Where the folder is not there.
    pub fn device(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.folder)?.dev())
    }

    /// The folder itself.
    pub(super) fn folder(&self) -> io::Result<File> {
        File::open(&self.folder)
    }

    /// Makes a file durable that another process writes, and gives up to where it is: the kernel tells of what it could not write
    /// from the time on at which the file was opened, and a writer that learns of it cuts what it wrote. Nothing is done
    /// where the file ends with `known`.
    pub(super) fn sync_for_reader(&mut self, name: &str, known: u64) -> io::Result<u64> {
        let file = OpenOptions::new().read(true).custom_flags(NO_LINKS).open(self.folder.join(name))?;
        let length = file.metadata()?.len();
        if length <= known {
            return Ok(length);
        }
        #[cfg(test)]
        {
            self.reader_syncs.0 += 1;
            if self.reader_syncs.1 {
                return Err(io::ErrorKind::Other.into());
            }
        }
        file.sync_data()?;
        Ok(file.metadata()?.len().min(length))
    }

    /// Lets go of what was appended and is not synced by itself.
    pub(super) fn close(&mut self) {
        self.appended = None;
    }

    fn writable(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().write(true).custom_flags(NO_LINKS).open(self.folder.join(name))
    }
}

impl Fs for DiskFs {
    fn list(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        entries
            .map(|entry| Ok(entry?.file_name()))
            .filter_map(|name| name.map(|n| n.into_string().ok()).transpose())
            .collect()
    }

    fn length(&self, name: &str) -> io::Result<Option<u64>> {
        match fs::symlink_metadata(self.folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            metadata => Ok(Some(metadata?.len())),
        }
    }

    fn read_at(&self, name: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = OpenOptions::new().read(true).custom_flags(NO_LINKS).open(self.folder.join(name))?;
        let mut read = 0;
        while read < buf.len() {
            match file.read_at(&mut buf[read..], offset + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.folder.join(name);
        let open = || OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(NO_LINKS).open(&path);
        let mut file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = path.parent().unwrap_or(&self.folder);
                DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
                open()
            }
            opened => opened,
        }?;
        let written = file.write_all(bytes);
        self.appended = Some((name.to_owned(), file));
        written
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        self.writable(name)?.set_len(length)
    }

    fn reserve(&mut self, name: &str, up_to: u64) -> io::Result<()> {
        match rustix::fs::fallocate(self.writable(name)?, FallocateFlags::KEEP_SIZE, 0, up_to) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            done => Ok(done?),
        }
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        match self.appended.take_if(|(appended, _)| appended == name) {
            Some((_, file)) => file.sync_data(),
            None => self.writable(name)?.sync_data(),
        }
    }

    fn sync_folder(&mut self, name: &str) -> io::Result<()> {
        let path = self.folder.join(name);
        File::open(path.parent().unwrap_or(&self.folder))?.sync_all()
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        fs::remove_file(self.folder.join(name))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The first segment's file in a runtime's folder.
pub(crate) const FIRST_SEGMENT: &str = "journal.jsonl";

/// A segment's file.
pub(super) fn segment_name(number: u64) -> String {
    if number == 1 { FIRST_SEGMENT.to_owned() } else { format!("journal.{number}.jsonl") }
}

/// The segments of a folder, the oldest first.
pub(super) fn segment_numbers(names: &[String]) -> Vec<u64> {
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort_unstable();
    numbers
}

fn segment_number(name: &str) -> Option<u64> {
    if name == FIRST_SEGMENT {
        return Some(1);
    }
    let number = name.strip_prefix("journal.")?.strip_suffix(".jsonl")?.parse().ok()?;
    // One name for each number: `journal.02.jsonl` is nobody's.
    (number > 1 && segment_name(number) == name).then_some(number)
}

//! A model of one machine's disk: what a program reads, and what is still there after the power was cut.
//!
//! ```text
//!            append ──► content (page cache) ── sync ──► durable (platter)
//!                          └ dirty: pieces that the platter lacks
//!   crash:   each dirty piece survives whole, torn at any byte, as zeros, or not at all
//!            each name whose folder was not synced since it was made may be gone, and what was removed may be back
//!   EIO at a sync:  the dirty pieces count as clean from then on, each on the platter or not: a later sync that
//!            succeeds says nothing about them
//!   ENOSPC:  a prefix of what was appended is taken; room that was reserved for a file stays that file's
//! ```
//!
//! A process that is killed leaves `content` as it is; only [`Disk::crash`] looks at what is durable.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use pika_host_collector::journal::Fs;

use super::random::Random;

/// What the platter lacks of a file.
#[derive(Clone, Debug)]
enum Dirt {
    /// These bytes, at this place.
    Bytes(usize, Vec<u8>),
    /// That it was cut to this length.
    Cut(usize),
}

#[derive(Clone, Debug, Default)]
struct File {
    content: Vec<u8>,
    durable: Vec<u8>,
    dirty: Vec<Dirt>,
    /// The name stands in a synced folder.
    linked: bool,
    /// Room up to here is this file's.
    reserved: usize,
}

/// A name that was taken out of a folder that was not synced since.
#[derive(Clone, Debug)]
struct Ghost {
    durable: Vec<u8>,
}

/// The disk of one machine.
#[derive(Debug)]
pub struct Disk {
    files: BTreeMap<String, File>,
    /// Folders and whether their own name is durable.
    folders: BTreeMap<String, bool>,
    ghosts: BTreeMap<String, Ghost>,
    random: Random,
    /// Bytes that are left; `None` where nobody counts.
    free: Option<usize>,
    /// Appends that fail from now on.
    failing_writes: u32,
    /// Syncs that fail from now on.
    failing_syncs: u32,
    /// How often anything was made durable.
    pub syncs: u64,
    /// The program that uses it is killed after so many more calls.
    dies_in: Option<u32>,
    dead: bool,
    /// A sync has failed, and whoever saw it has not dealt with it yet.
    told: bool,
}

/// A disk that several programs of one machine use.
pub type SharedDisk = Rc<RefCell<Disk>>;

fn eio() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn enospc() -> io::Error {
    io::Error::from_raw_os_error(28)
}

/// The folder of a name, with its slash; empty for the top.
fn folder_of(path: &str) -> &str {
    path.rfind('/').map_or("", |at| &path[..=at])
}

impl Disk {
    /// An empty one.
    pub fn new(random: Random) -> SharedDisk {
        Rc::new(RefCell::new(Self {
            files: BTreeMap::new(),
            folders: BTreeMap::new(),
            ghosts: BTreeMap::new(),
            random,
            free: None,
            failing_writes: 0,
            failing_syncs: 0,
            syncs: 0,
            dies_in: None,
            dead: false,
            told: false,
        }))
    }

    /// From now on `free` bytes are left beside what is reserved; `None` for no limit.
    pub fn limit(&mut self, free: Option<usize>) {
        self.free = free;
    }

    /// The next `writes` appends and the next `syncs` syncs fail with EIO.
    pub fn fail(&mut self, writes: u32, syncs: u32) {
        (self.failing_writes, self.failing_syncs) = (writes, syncs);
    }

    /// The program that uses it is killed after so many more of its calls: none of the later ones has any effect.
    pub fn die_in(&mut self, calls: u32) {
        self.dies_in = Some(calls);
    }

    /// Whether that has come.
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    /// Another program uses it.
    pub fn revive(&mut self) {
        (self.dies_in, self.dead) = (None, false);
    }

    /// Whoever saw a sync fail has dealt with it.
    pub fn dealt_with(&mut self) {
        self.told = false;
    }

    /// One who saw a sync fail is not killed before that is dealt with: nobody else will ever be told, so that no program
    /// could know what the disk lacks.
    fn live(&mut self) -> io::Result<()> {
        match &mut self.dies_in {
            _ if self.told => {}
            Some(0) => self.dead = true,
            Some(left) => *left -= 1,
            None => {}
        }
        if self.dead { Err(io::Error::other("the program was killed")) } else { Ok(()) }
    }

    /// Takes the failures that are still to come back for a while, and gives them.
    pub fn spare(&mut self) -> (u32, u32) {
        (std::mem::take(&mut self.failing_writes), std::mem::take(&mut self.failing_syncs))
    }

    /// Whether something fails by now, or is full.
    pub fn is_faulty(&self) -> bool {
        self.failing_writes > 0 || self.failing_syncs > 0 || self.free.is_some()
    }

    /// What a reader would find after the worst crash at this moment.
    pub fn durable(&self, path: &str) -> Option<&[u8]> {
        let file = self.files.get(path).filter(|file| file.linked)?;
        Some(&file.durable)
    }

    /// What a reader finds now.
    pub fn content(&self, path: &str) -> Option<&[u8]> {
        self.files.get(path).map(|file| file.content.as_slice())
    }

    /// The paths of all files below `prefix`.
    pub fn paths<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.files.range(prefix.to_owned()..).map(|(path, _)| path.as_str()).take_while(move |p| p.starts_with(prefix))
    }

    /// Bytes of all files below `prefix`.
    pub fn bytes(&self, prefix: &str) -> usize {
        self.paths(prefix).map(|path| self.files[path].content.len()).sum()
    }

    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.live()?;
        if self.failing_writes > 0 {
            self.failing_writes -= 1;
            return Err(eio());
        }
        self.make_folders(path);
        let file = self.files.entry(path.to_owned()).or_default();
        let at = file.content.len();
        let own = file.reserved.saturating_sub(at).min(bytes.len());
        let needed = bytes.len() - own;
        let room = self.free.unwrap_or(usize::MAX);
        let taken = if needed <= room { bytes.len() } else { own + room };
        if let Some(free) = &mut self.free {
            *free -= needed.min(room);
        }
        if taken > 0 {
            file.content.extend_from_slice(&bytes[..taken]);
            file.dirty.push(Dirt::Bytes(at, bytes[..taken].to_vec()));
        }
        if taken < bytes.len() { Err(enospc()) } else { Ok(()) }
    }

    fn make_folders(&mut self, path: &str) {
        let mut folder = folder_of(path);
        while !folder.is_empty() && !self.folders.contains_key(folder) {
            self.folders.insert(folder.to_owned(), false);
            folder = folder_of(&folder[..folder.len() - 1]);
        }
    }

    fn truncate(&mut self, path: &str, length: usize) -> io::Result<()> {
        self.live()?;
        // What the kernel knows of a file's length is cut whatever the disk says.
        let file = self.files.get_mut(path).ok_or(io::ErrorKind::NotFound)?;
        let given = file.content.len().max(file.reserved).saturating_sub(length);
        file.content.resize(length, 0);
        file.reserved = file.reserved.min(length);
        file.dirty.push(Dirt::Cut(length));
        if let Some(free) = &mut self.free {
            *free += given;
        }
        Ok(())
    }

    fn reserve(&mut self, path: &str, up_to: usize) -> io::Result<()> {
        self.live()?;
        self.make_folders(path);
        let file = self.files.entry(path.to_owned()).or_default();
        let more = up_to.saturating_sub(file.reserved.max(file.content.len()));
        if let Some(free) = &mut self.free {
            if *free < more {
                return Err(enospc());
            }
            *free -= more;
        }
        file.reserved = file.reserved.max(up_to);
        Ok(())
    }

    fn sync(&mut self, path: &str) -> io::Result<()> {
        self.live()?;
        let file = self.files.get_mut(path).ok_or(io::ErrorKind::NotFound)?;
        let dirty = std::mem::take(&mut file.dirty);
        if self.failing_syncs > 0 {
            self.failing_syncs -= 1;
            self.told = true;
            // The kernel tells once, and takes the pages for clean.
            for dirt in dirty {
                if self.random.chance(500) {
                    settle(&mut file.durable, &dirt, None);
                }
            }
            return Err(eio());
        }
        for dirt in &dirty {
            settle(&mut file.durable, dirt, None);
        }
        self.syncs += 1;
        Ok(())
    }

    fn sync_folder(&mut self, path: &str) -> io::Result<()> {
        self.live()?;
        let folder = folder_of(path).to_owned();
        if self.failing_syncs > 0 {
            self.failing_syncs -= 1;
            self.told = true;
            return Err(eio());
        }
        for (name, file) in self.files.range_mut(folder.clone()..) {
            if !name.starts_with(&folder) {
                break;
            }
            file.linked |= folder_of(name) == folder;
        }
        for (name, linked) in self.folders.range_mut(folder.clone()..) {
            if !name.starts_with(&folder) {
                break;
            }
            *linked |= folder_of(&name[..name.len() - 1]) == folder && *name != folder;
        }
        self.ghosts.retain(|name, _| folder_of(name) != folder);
        self.syncs += 1;
        Ok(())
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        self.live()?;
        let file = self.files.remove(path).ok_or(io::ErrorKind::NotFound)?;
        if let Some(free) = &mut self.free {
            *free += file.content.len().max(file.reserved);
        }
        if file.linked {
            self.ghosts.insert(path.to_owned(), Ghost { durable: file.durable });
        }
        Ok(())
    }

    /// The power is cut: what was not synced survives as it happens.
    pub fn crash(&mut self) {
        let Self { files, folders, ghosts, random, .. } = self;
        let mut gone: Vec<String> = Vec::new();
        for (name, linked) in folders.iter_mut() {
            let lost = !*linked && random.chance(500);
            if lost || gone.iter().any(|folder| name.starts_with(folder.as_str())) {
                gone.push(name.clone());
            }
            *linked = true;
        }
        folders.retain(|name, _| !gone.contains(name));
        files.retain(|name, file| {
            let lost = !file.linked && random.chance(500);
            !lost && !gone.iter().any(|folder| name.starts_with(folder.as_str()))
        });
        for (name, ghost) in std::mem::take(ghosts) {
            if !files.contains_key(&name) && random.chance(500) {
                files.insert(name, File { durable: ghost.durable, ..File::default() });
            }
        }
        for file in files.values_mut() {
            for dirt in std::mem::take(&mut file.dirty) {
                settle(&mut file.durable, &dirt, Some(random));
            }
            file.content.clone_from(&file.durable);
            file.linked = true;
            // Where the file system keeps unwritten extents, what was reserved stays reserved.
            file.reserved = file.reserved.max(file.content.len());
        }
    }
}

/// Puts a piece on the platter: whole, or as it happens.
fn settle(durable: &mut Vec<u8>, dirt: &Dirt, chance: Option<&mut Random>) {
    match dirt {
        Dirt::Cut(length) => {
            if chance.is_none_or(|random| random.chance(500)) {
                durable.truncate(*length);
            }
        }
        Dirt::Bytes(at, bytes) => {
            let fate = chance.map(|random| (random.below(4), random.index(bytes.len() + 1)));
            let (whole, zeros) = match fate {
                None | Some((0, _)) => (bytes.len(), 0),
                Some((1, torn)) => (torn, 0),
                Some((2, torn)) => (torn, bytes.len() - torn),
                _ => (0, 0),
            };
            if whole + zeros == 0 {
                return;
            }
            // What lies between was lost: a reader finds zeros there.
            if durable.len() < at + whole + zeros {
                durable.resize(at + whole + zeros, 0);
            }
            durable[*at..at + whole].copy_from_slice(&bytes[..whole]);
            durable[at + whole..at + whole + zeros].fill(0);
        }
    }
}

/// One folder of a disk, as the journal sees it.
#[derive(Clone, Debug)]
pub struct Folder {
    disk: SharedDisk,
    prefix: String,
}

impl Folder {
    /// The folder `name` at the top of `disk`.
    pub fn new(disk: &SharedDisk, name: &str) -> Self {
        Self { disk: Rc::clone(disk), prefix: format!("{name}/") }
    }

    /// The path on the disk of a name in it.
    pub fn path_of(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The folder itself is there, durably: what its maker promises before anything is written to it.
    pub fn found(&self) {
        self.disk.borrow_mut().folders.insert(self.prefix.clone(), true);
    }
}

impl Fs for Folder {
    fn list(&self) -> io::Result<Vec<String>> {
        let disk = self.disk.borrow();
        let names = disk.paths(&self.prefix).map(|path| &path[self.prefix.len()..]);
        Ok(names.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }

    fn length(&self, name: &str) -> io::Result<Option<u64>> {
        Ok(self.disk.borrow().content(&self.path_of(name)).map(|content| content.len() as u64))
    }

    fn read_at(&self, name: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let disk = self.disk.borrow();
        let content = disk.content(&self.path_of(name)).ok_or(io::ErrorKind::NotFound)?;
        let rest = usize::try_from(offset).ok().and_then(|offset| content.get(offset..)).unwrap_or_default();
        let read = rest.len().min(buf.len());
        buf[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.disk.borrow_mut().append(&self.path_of(name), bytes)
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        self.disk.borrow_mut().truncate(&self.path_of(name), usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn reserve(&mut self, name: &str, up_to: u64) -> io::Result<()> {
        self.disk.borrow_mut().reserve(&self.path_of(name), usize::try_from(up_to).unwrap_or(usize::MAX))
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.disk.borrow_mut().sync(&self.path_of(name))
    }

    fn sync_folder(&mut self, name: &str) -> io::Result<()> {
        self.disk.borrow_mut().sync_folder(&self.path_of(name))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.disk.borrow_mut().remove(&self.path_of(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(seed: u64) -> (SharedDisk, Folder) {
        let disk = Disk::new(Random::new(seed));
        let folder = Folder::new(&disk, "r");
        folder.found();
        (disk, folder)
    }

    fn read(folder: &Folder, name: &str) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(folder.length(name).unwrap()?).unwrap()];
        folder.read_at(name, 0, &mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn what_was_synced_outlives_every_crash() {
        for seed in 0..200 {
            let (disk, mut folder) = disk(seed);
            folder.append("j", b"durable").unwrap();
            folder.sync("j").unwrap();
            folder.sync_folder("j").unwrap();
            folder.append("j", b" lost?").unwrap();
            disk.borrow_mut().crash();
            assert!(read(&folder, "j").unwrap().starts_with(b"durable"), "seed {seed}");
        }
    }

    #[test]
    fn what_was_not_synced_meets_every_fate() {
        let mut fates = [false; 4];
        for seed in 0..200 {
            let (disk, mut folder) = disk(seed);
            folder.append("j", b"").unwrap();
            folder.sync_folder("j").unwrap();
            folder.append("j", b"abcdef").unwrap();
            disk.borrow_mut().crash();
            let found = read(&folder, "j").unwrap();
            fates[0] |= found == b"abcdef";
            fates[1] |= found.is_empty();
            fates[2] |= found.len() == 6 && found.ends_with(&[0]);
            fates[3] |= !found.is_empty() && found.len() < 6 && b"abcdef".starts_with(&found);
        }
        assert_eq!(fates, [true; 4]);
    }

    #[test]
    fn a_name_needs_every_folder_above_it_synced() {
        let survives = |syncs: &[&str]| {
            (0..100).all(|seed| {
                let (disk, mut folder) = disk(seed);
                folder.append("3/logs/guest.log", b"x").unwrap();
                folder.sync("3/logs/guest.log").unwrap();
                for name in syncs {
                    folder.sync_folder(name).unwrap();
                }
                disk.borrow_mut().crash();
                folder.length("3/logs/guest.log").unwrap() == Some(1)
            })
        };
        assert!(!survives(&[]));
        assert!(!survives(&["3/logs/guest.log"]));
        assert!(!survives(&["3/logs/guest.log", "3/logs"]));
        assert!(survives(&["3/logs/guest.log", "3/logs", "3"]));
    }

    #[test]
    fn a_sync_after_a_failed_one_tells_nothing_of_what_it_lost() {
        let lost = (0..100).any(|seed| {
            let (disk, mut folder) = disk(seed);
            folder.append("j", b"one").unwrap();
            folder.sync_folder("j").unwrap();
            disk.borrow_mut().fail(0, 1);
            folder.sync("j").unwrap_err();
            folder.append("j", b"two").unwrap();
            folder.sync("j").unwrap();
            disk.borrow_mut().crash();
            read(&folder, "j").unwrap() == b"\0\0\0two"
        });
        assert!(lost);
    }

    #[test]
    fn a_full_disk_keeps_the_room_that_was_reserved() {
        let (disk, mut folder) = disk(1);
        folder.reserve("j", 8).unwrap();
        disk.borrow_mut().limit(Some(2));
        assert_eq!(folder.append("k", b"xyz").unwrap_err().raw_os_error(), Some(28));
        assert_eq!(read(&folder, "k").unwrap(), b"xy");
        folder.append("j", b"12345678").unwrap();
        folder.append("j", b"9").unwrap_err();
    }

    #[test]
    fn a_removed_name_may_be_back() {
        let back = (0..100).any(|seed| {
            let (disk, mut folder) = disk(seed);
            folder.append("j", b"old").unwrap();
            folder.sync("j").unwrap();
            folder.sync_folder("j").unwrap();
            folder.remove("j").unwrap();
            disk.borrow_mut().crash();
            folder.length("j").unwrap() == Some(3)
        });
        assert!(back);
    }
}

//! A file system in memory that knows what of it is durable, and fails where it is told to.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::rc::Rc;

use super::*;

/// Clones share it, as a process and its successor share a disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory(pub(super) Rc<RefCell<Disk>>);

#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    /// What a crash leaves of each inode, by the name that it has now.
    synced: BTreeMap<String, Vec<u8>>,
    /// Names that a crash leaves.
    named: BTreeSet<String>,
    /// From where on the kernel dropped what it could not write.
    dropped: BTreeMap<String, usize>,
    pub(super) reserved: BTreeMap<String, u64>,
    pub(super) calls: Vec<String>,
    /// Bytes that were read.
    pub(super) read: usize,
    /// Calls that fail: how they begin, how often, and with what.
    pub(super) faults: Vec<(&'static str, u32, ErrorKind)>,
    /// Bytes that fit, all files together with what is reserved.
    pub(super) room: Option<u64>,
}

impl Memory {
    pub(super) fn fail(&self, call: &'static str, times: u32, kind: ErrorKind) {
        self.0.borrow_mut().faults.push((call, times, kind));
    }

    /// Power fails: what was not synced is gone, and so are names whose folder was not.
    pub(super) fn crash(&self) {
        let mut disk = self.0.borrow_mut();
        let kept = disk.named.iter().map(|name| (name.clone(), disk.synced.get(name).cloned().unwrap_or_default()));
        disk.files = kept.collect();
        disk.reserved.clear();
        disk.dropped.clear();
        disk.faults.clear();
    }

    pub(super) fn put(&self, name: &str, bytes: &[u8]) {
        self.0.borrow_mut().files.insert(name.to_owned(), bytes.to_vec());
    }

    pub(super) fn get(&self, name: &str) -> Vec<u8> {
        self.0.borrow().files.get(name).cloned().unwrap_or_default()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.0.borrow().files.keys().cloned().collect()
    }

    fn call(&self, call: &str) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        disk.calls.push(call.to_owned());
        for (start, times, kind) in &mut disk.faults {
            if *times > 0 && call.starts_with(*start) {
                *times -= 1;
                return Err((*kind).into());
            }
        }
        Ok(())
    }
}

impl Disk {
    /// What is left if a file takes so much.
    fn fits(&self, name: &str, wanted: u64) -> bool {
        let taken = |other: &String, length: u64| length.max(self.reserved.get(other).copied().unwrap_or(0));
        let others =
            self.files.iter().filter(|(other, _)| *other != name).map(|(other, b)| taken(other, b.len() as u64));
        self.room.is_none_or(|room| others.sum::<u64>() + taken(&name.to_owned(), wanted) <= room)
    }
}

impl Fs for Memory {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names().into_iter().filter(|name| !name.contains('/')).collect())
    }

    fn length(&self, name: &str) -> io::Result<Option<u64>> {
        Ok(self.0.borrow().files.get(name).map(|bytes| bytes.len() as u64))
    }

    fn read_at(&self, name: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut disk = self.0.borrow_mut();
        let bytes = disk.files.get(name).ok_or(ErrorKind::NotFound)?;
        let rest = bytes.get(usize::try_from(offset).unwrap()..).unwrap_or_default();
        let read = rest.len().min(buf.len());
        buf[..read].copy_from_slice(&rest[..read]);
        disk.read += read;
        Ok(read)
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let failed = self.call(&format!("append {name}"));
        let mut disk = self.0.borrow_mut();
        let length = disk.files.get(name).map_or(0, Vec::len);
        let full = !disk.fits(name, (length + bytes.len()) as u64);
        let written = if failed.is_err() || full { bytes.len() / 2 } else { bytes.len() };
        disk.files.entry(name.to_owned()).or_default().extend_from_slice(&bytes[..written]);
        failed?;
        if full { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        self.call(&format!("truncate {name}"))?;
        let mut disk = self.0.borrow_mut();
        disk.reserved.remove(name);
        disk.files.get_mut(name).ok_or(ErrorKind::NotFound)?.truncate(usize::try_from(length).unwrap());
        Ok(())
    }

    fn reserve(&mut self, name: &str, up_to: u64) -> io::Result<()> {
        self.call(&format!("reserve {name}"))?;
        let mut disk = self.0.borrow_mut();
        if !disk.fits(name, up_to) {
            return Err(ErrorKind::StorageFull.into());
        }
        disk.reserved.insert(name.to_owned(), up_to);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let failed = self.call(&format!("sync {name}"));
        let mut disk = self.0.borrow_mut();
        let durable = disk.synced.get(name).map_or(0, Vec::len);
        if failed.is_err() {
            // Told once, and then called clean.
            disk.dropped.entry(name.to_owned()).or_insert(durable);
            return failed;
        }
        let mut bytes = disk.files.get(name).cloned().ok_or(ErrorKind::NotFound)?;
        if let Some(from) = disk.dropped.get(name) {
            bytes.iter_mut().skip(*from).for_each(|byte| *byte = 0);
        }
        disk.synced.insert(name.to_owned(), bytes);
        Ok(())
    }

    fn sync_folder(&mut self, name: &str) -> io::Result<()> {
        self.call(&format!("sync_folder {name}"))?;
        let folder = |name: &str| name.rsplit_once('/').map(|(folder, _)| folder.to_owned());
        let mut disk = self.0.borrow_mut();
        let here: Vec<String> = disk.files.keys().filter(|other| folder(other) == folder(name)).cloned().collect();
        disk.named.retain(|other| folder(other) != folder(name));
        disk.named.extend(here);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.call(&format!("remove {name}"))?;
        self.0.borrow_mut().files.remove(name).map(|_| ()).ok_or_else(|| ErrorKind::NotFound.into())
    }
}

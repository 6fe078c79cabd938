//! Just enough of ELF to tell a static program from one that needs a loader.

use std::fs;
use std::path::Path;

use crate::failure::{Failure, Result, Tried};

const PT_INTERP: u32 = 3;

/// Whether the program at `path` runs without a loader and libraries.
pub(crate) fn is_static(path: &Path) -> Result<bool> {
    let bytes = fs::read(path).tried(format!("read {}", path.display()))?;
    segment_types(&bytes)
        .map(|types| !types.contains(&PT_INTERP))
        .ok_or_else(|| Failure::step(format!("{} is no 64-bit little-endian ELF program", path.display())))
}

/// Types of the program headers, or `None` where this is no such ELF file.
fn segment_types(bytes: &[u8]) -> Option<Vec<u32>> {
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let half = |at: usize| bytes.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let table = usize::try_from(u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?)).ok()?;
    let (entry_size, entries) = (half(54)?, half(56)?);
    (0..entries)
        .map(|index| {
            let at = table.checked_add(index * entry_size)?;
            Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_program_needs_a_loader() {
        let path = std::env::current_exe().unwrap();
        assert!(!is_static(&path).unwrap());
    }

    #[test]
    fn what_is_no_program_is_told_so() {
        assert_eq!(segment_types(b""), None);
        assert_eq!(segment_types(b"\x7fELF\x02\x01"), None);
        assert!(is_static(Path::new("/etc/passwd")).is_err());
    }
}

//! Just enough of ELF: whether a program needs nothing but the kernel, and which machine it is for.

/// Where a file's class, byte order, type, machine and entry stand, and what they mean (System V ABI).
const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const BIG_ENDIAN: u8 = 2;
const EXECUTABLE: u64 = 2;
const POSITION_INDEPENDENT: u64 = 3;
/// A program header that names the loader.
const INTERPRETER: u64 = 3;

/// Programs have some ten headers; more than this is none.
const MAX_HEADERS: u64 = 1024;

/// Why a file is no static program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// Something else, such as a script or an archive.
    #[error("it is no Linux program (ELF)")]
    NotElf,
    /// Cut, or damaged.
    #[error("it is damaged: its ELF headers are not whole")]
    Damaged,
    /// A library or an object file.
    #[error("it is no program, but an ELF file of another type")]
    NotProgram,
    /// It needs a loader, which the image may not have.
    #[error("it is linked dynamically, so that it runs only where its libraries are")]
    Dynamic,
    /// Of a machine that is not known here.
    #[error("it is for a machine that pika-cloud does not know (ELF machine {0})")]
    Machine(u64),
}

/// What of a program counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// Incus's name for what it runs on.
    pub(super) architecture: &'static str,
    needs_loader: bool,
    can_start: bool,
}

/// Reads numbers of one byte order from a file's bytes.
struct Fields<'a> {
    bytes: &'a [u8],
    is_64: bool,
    is_big: bool,
}

impl Fields<'_> {
    fn number(&self, at: u64, len: usize) -> Result<u64, ElfError> {
        let at = usize::try_from(at).map_err(|_| ElfError::Damaged)?;
        let field = at.checked_add(len).and_then(|end| self.bytes.get(at..end)).ok_or(ElfError::Damaged)?;
        let add = |number: u64, byte: &u8| (number << 8) | u64::from(*byte);
        Ok(if self.is_big { field.iter().fold(0, add) } else { field.iter().rev().fold(0, add) })
    }

    /// A field that stands in another place in files for 32 bits.
    fn at(&self, (in_64, len_64): (u64, usize), (in_32, len_32): (u64, usize)) -> Result<u64, ElfError> {
        if self.is_64 { self.number(in_64, len_64) } else { self.number(in_32, len_32) }
    }
}

impl Program {
    /// Reads the headers of a file.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, ElfError> {
        if !bytes.starts_with(MAGIC) {
            return Err(ElfError::NotElf);
        }
        let byte = |at: usize| bytes.get(at).copied().ok_or(ElfError::Damaged);
        let fields = Fields { bytes, is_64: byte(4)? == CLASS_64, is_big: byte(5)? == BIG_ENDIAN };
        let (kind, machine) = (fields.number(16, 2)?, fields.number(18, 2)?);
        let entry = fields.at((24, 8), (24, 4))?;
        let architecture = architecture(machine, fields.is_64, fields.is_big).ok_or(ElfError::Machine(machine))?;
        // A library has no entry.
        let can_start = matches!(kind, EXECUTABLE | POSITION_INDEPENDENT) && entry != 0;
        Ok(Self { architecture, needs_loader: needs_loader(&fields)?, can_start })
    }

    /// The same, if it is a program that needs nothing but the kernel.
    pub(super) fn check(self) -> Result<Self, ElfError> {
        match self {
            Self { can_start: false, .. } => Err(ElfError::NotProgram),
            Self { needs_loader: true, .. } => Err(ElfError::Dynamic),
            Self { .. } => Ok(self),
        }
    }
}

fn needs_loader(fields: &Fields<'_>) -> Result<bool, ElfError> {
    let table = fields.at((32, 8), (28, 4))?;
    let (size, count) = (fields.at((54, 2), (42, 2))?, fields.at((56, 2), (44, 2))?);
    if count > MAX_HEADERS {
        return Err(ElfError::Damaged);
    }
    for index in 0..count {
        let at = table.checked_add(index * size).ok_or(ElfError::Damaged)?;
        if fields.number(at, 4)? == INTERPRETER {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Incus's name for an ELF machine.
fn architecture(machine: u64, is_64: bool, is_big: bool) -> Option<&'static str> {
    Some(match (machine, is_64, is_big) {
        (3, false, false) => "i686",
        (62, true, false) => "x86_64",
        (40, false, false) => "armv7l",
        (183, true, false) => "aarch64",
        (243, true, false) => "riscv64",
        (21, true, false) => "ppc64le",
        (21, true, true) => "ppc64",
        (22, true, true) => "s390x",
        (258, true, false) => "loongarch64",
        _ => return None,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The head of a program for 64 bits, little-endian, with one header of `header` type.
    pub(in super::super) fn program(machine: u16, header: u32) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64, 0);
        bytes[16..18].copy_from_slice(&2_u16.to_le_bytes());
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[24..32].copy_from_slice(&0x40_1000_u64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes.extend(header.to_le_bytes());
        bytes.resize(64 + 56, 0);
        bytes
    }

    fn checked(bytes: &[u8]) -> Result<&'static str, ElfError> {
        Program::read(bytes).and_then(Program::check).map(|program| program.architecture)
    }

    #[test]
    fn machines_have_the_names_that_incus_gives_them() {
        assert_eq!(checked(&program(62, 1)), Ok("x86_64"));
        assert_eq!(checked(&program(183, 1)), Ok("aarch64"));
        assert_eq!(checked(&program(243, 1)), Ok("riscv64"));
        assert_eq!(checked(&program(0x1234, 1)), Err(ElfError::Machine(0x1234)));
    }

    #[test]
    fn what_needs_a_loader_is_told() {
        assert_eq!(checked(&program(62, 3)), Err(ElfError::Dynamic));
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(checked(&own), Err(ElfError::Dynamic));
    }

    #[test]
    fn what_is_no_program_is_told() {
        assert_eq!(checked(b"#!/bin/sh\n"), Err(ElfError::NotElf));
        assert_eq!(checked(b""), Err(ElfError::NotElf));
        let mut library = program(62, 1);
        library[24..32].fill(0);
        assert_eq!(checked(&library), Err(ElfError::NotProgram));
        let mut core = program(62, 1);
        core[16] = 4;
        assert_eq!(checked(&core), Err(ElfError::NotProgram));
    }

    /// It is a file of the operator's, but a cut one must not end the collector.
    #[test]
    fn any_cut_and_any_byte_is_survived() {
        let whole = program(62, 1);
        for cut in 4..68 {
            assert!(checked(&whole[..cut]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 2, 0x7F, 0xFF] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = checked(&bytes);
            }
        }
    }
}

//! Reading a journal from its beginning: up to the last record that holds, and no wrong one.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::error::JournalError;
use super::format::{self, Body, MAX_RECORD_BYTES, NoRecord, Record, VERSION};
use super::view::View;

/// What a crash before the first sync can leave is the first write or a part of it, and that is smaller.
const MAX_FIRST_WRITE: u64 = 4096;

/// Holds a journal's lines to their order: the header first, and then every number once.
#[derive(Debug, Default)]
pub(super) struct Sequence {
    next_n: u64,
}

impl Sequence {
    /// Reads the next line; `None` where its checksum does not fit.
    pub(super) fn next(&mut self, line: &[u8], path: &Path) -> Result<Option<Record>, JournalError> {
        if self.next_n == 0
            && let Some(found) = format::version_of(line).filter(|found| *found != VERSION)
        {
            return Err(JournalError::Version { path: path.to_owned(), found });
        }
        let foreign = || JournalError::Foreign { path: path.to_owned(), line: self.next_n + 1 };
        let record = match format::read(line) {
            Ok(record) => record,
            Err(NoRecord::Damaged) => return Ok(None),
            Err(NoRecord::Foreign) => return Err(foreign()),
        };
        let is_header = matches!(record.body, Body::Journal(_));
        if record.n != self.next_n || is_header != (record.n == 0) {
            return Err(foreign());
        }
        self.next_n += 1;
        Ok(Some(record))
    }
}

/// Reads a journal up to the last record that holds, and says how many bytes that is.
pub(super) fn recover(file: &mut File, path: &Path, runtime_id: &str) -> Result<(View, u64), JournalError> {
    let fail = || JournalError::io(path, "reading the journal");
    let length = file.metadata().map_err(fail())?.len();
    file.seek(SeekFrom::Start(0)).map_err(fail())?;
    let mut reader = BufReader::with_capacity(256 * 1024, file);
    let (mut view, mut sequence) = (View::default(), Sequence::default());
    let (mut valid, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_RECORD_BYTES as u64).read_until(b'\n', &mut line).map_err(fail())?;
        let whole = line.strip_suffix(b"\n");
        let Some(record) = whole.map_or(Ok(None), |line| sequence.next(line, path))? else {
            break;
        };
        check_owner(&record, path, runtime_id)?;
        view.apply(&record);
        valid += read as u64;
    }
    if valid == 0 && (length > MAX_FIRST_WRITE || has_record(&mut reader).map_err(fail())?) {
        return Err(JournalError::Damaged { path: path.to_owned() });
    }
    Ok((view, valid))
}

fn check_owner(record: &Record, path: &Path, runtime_id: &str) -> Result<(), JournalError> {
    match &record.body {
        Body::Journal(header) if header.runtime_id != runtime_id => Err(JournalError::OtherRuntime {
            path: path.to_owned(),
            found: header.runtime_id.clone(),
            wanted: runtime_id.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Whether any of the lines that are left is a record.
fn has_record(reader: &mut BufReader<&mut File>) -> std::io::Result<bool> {
    let mut rest = Vec::new();
    reader.take(MAX_FIRST_WRITE).read_to_end(&mut rest)?;
    Ok(rest.split(|byte| *byte == b'\n').any(|line| format::read(line).is_ok()))
}

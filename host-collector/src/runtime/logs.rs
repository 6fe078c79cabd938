//! A guest's log files: how far each is, and what of the incoming bytes is kept. Pure: the bytes go to the journal's next
//! commit, which appends and syncs them before the record that speaks of them.
//!
//! After a crash the journal says how long each file is durably; what lies beyond is cut by the next write to it, and was
//! asked for again. A file that is shorter was cut by somebody here: that is said in it, and never filled with zeros.

use std::collections::{BTreeMap, BTreeSet};

use pika_cloud_common::limits::MAX_LOG_FILES;

use crate::journal::{LogMark, Records, View};

/// The log files of one incarnation.
#[derive(Debug)]
pub(super) struct LogMarks {
    /// Bytes of all files together that are kept (Invariant 5).
    limit: u64,
    kept: u64,
    files: BTreeMap<String, LogFile>,
    dirty: BTreeSet<String>,
    /// Whether files were left out, since there were too many names (Invariant 5).
    too_many: bool,
}

#[derive(Debug, Default)]
struct LogFile {
    mark: LogMark,
    /// Whether it says that it goes on beyond the limit.
    says_full: bool,
}

impl LogFile {
    fn write(&mut self, records: &mut Records, name: &str, bytes: &[u8]) {
        records.log(name, bytes);
        self.mark.host += bytes.len() as u64;
    }
}

impl LogMarks {
    /// Goes on where the journal says that they durably are. `found` has the lengths of those that are shorter than that.
    pub(super) fn new(limit: u64, records: &mut Records, found: &BTreeMap<String, u64>) -> Self {
        let mut marks = Self { limit, kept: 0, files: BTreeMap::new(), dirty: BTreeSet::new(), too_many: false };
        let known = known(records.view());
        for (name, mark) in known {
            let mut log = LogFile { mark, says_full: false };
            if let Some(found) = found.get(&name).filter(|found| **found < mark.host) {
                log.mark.host = *found;
                records.log_found(&name, *found);
                log.write(records, &name, format!("[{} bytes were removed here]\n", mark.host - found).as_bytes());
                marks.dirty.insert(name.clone());
            }
            marks.kept += log.mark.host;
            marks.files.insert(name, log);
        }
        let is_full = marks.kept > limit;
        marks.files.values_mut().for_each(|log| log.says_full = is_full);
        marks
    }

    /// Counts bytes up to `end` of the guest's file as taken, and keeps none of them.
    pub(super) fn skip(&mut self, name: &str, end: u64) {
        if self.has_place_for(name) {
            self.files.entry(name.to_owned()).or_default().mark.guest = end;
            self.dirty.insert(name.to_owned());
        }
    }

    /// Whether the file is known, or one more may be.
    fn has_place_for(&mut self, name: &str) -> bool {
        let has_place = self.files.len() < MAX_LOG_FILES || self.files.contains_key(name);
        self.too_many |= !has_place;
        has_place
    }

    /// Whether log files were left out.
    pub(super) fn left_some_out(&self) -> bool {
        self.too_many
    }

    /// A file more than are taken was left out.
    pub(super) fn leave_out(&mut self) {
        self.too_many = true;
    }

    /// Whether a file goes on beyond the limit.
    pub(super) fn are_cut(&self) -> bool {
        self.files.values().any(|log| log.says_full)
    }

    /// Whether no more bytes are kept, so that only how far the guest is has to be written down.
    pub(super) fn is_full(&self) -> bool {
        self.kept >= self.limit
    }

    /// Takes bytes that stand at `offset` of the guest's file. What is beyond the limit is counted as taken, and not kept.
    pub(super) fn append(&mut self, records: &mut Records, name: &str, offset: u64, bytes: &[u8]) {
        if !self.has_place_for(name) {
            return;
        }
        let room = usize::try_from(self.limit.saturating_sub(self.kept)).unwrap_or(usize::MAX);
        let log = self.files.entry(name.to_owned()).or_default();
        let before = log.mark.host;
        if offset > log.mark.guest && room > 0 {
            let missing = offset - log.mark.guest;
            log.write(records, name, format!("[{missing} bytes are missing here]\n").as_bytes());
        }
        if room > 0 {
            log.write(records, name, &bytes[..bytes.len().min(room)]);
        }
        if bytes.len() > room && !log.says_full {
            log.says_full = true;
            log.write(records, name, b"\n[the log goes on beyond limits.log_bytes]\n");
        }
        log.mark.guest = offset + bytes.len() as u64;
        self.kept += log.mark.host - before;
        self.dirty.insert(name.to_owned());
    }

    /// Whether there are bytes that no commit has taken.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Bytes on the host, all files together.
    pub(super) fn bytes(&self) -> u64 {
        self.kept
    }

    /// How far each file is that changed since this was last asked: one of an earlier stream has no place in the present one.
    pub(super) fn take_dirty(&mut self) -> Option<BTreeMap<String, LogMark>> {
        let changed = std::mem::take(&mut self.dirty);
        let marks = changed.into_iter().filter_map(|name| Some((name.clone(), self.files.get(&name)?.mark)));
        Some(marks.collect()).filter(|marks: &BTreeMap<_, _>| !marks.is_empty())
    }
}

/// How far each file is. Of an earlier stream the cursor knows no more, and its bytes stay all the same.
fn known(view: &View) -> BTreeMap<String, LogMark> {
    let guest = |name| view.cursor.as_ref().and_then(|cursor| cursor.logs.get(name)).copied().unwrap_or(0);
    view.log_lengths.iter().map(|(name, host)| (name.clone(), LogMark { guest: guest(name), host: *host })).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pika_cloud_common::digest::Digest;
    use pika_cloud_common::wire::Cursor;

    use super::*;

    const FULL: &str = "\n[the log goes on beyond limits.log_bytes]\n";

    fn begun() -> View {
        let mut records = Records::new(View::default(), 1 << 20, 0);
        records.begin("v1:aa".to_owned(), 0, crate::clock::Now::default());
        records.view().clone()
    }

    /// What a journal says of one file.
    fn view(name: &str, mark: LogMark) -> View {
        let logs = BTreeMap::from([(name.to_owned(), mark.guest)]);
        let cursor = Cursor { stream_id: "s".into(), seq: 0, digest: Digest::EMPTY_STREAM, logs };
        let mut view = begun();
        (view.cursor, view.log_lengths) = (Some(cursor), BTreeMap::from([(name.to_owned(), mark.host)]));
        view
    }

    /// Log marks with their records, and the files that the commits make.
    struct Bench {
        marks: LogMarks,
        records: Records,
        files: BTreeMap<String, Vec<u8>>,
    }

    impl Bench {
        fn new(limit: u64) -> Self {
            Self::from(limit, begun(), &[])
        }

        /// Over files that lie there after a crash.
        fn from(limit: u64, view: View, files: &[(&str, &str)]) -> Self {
            let files: BTreeMap<_, _> =
                files.iter().map(|(name, text)| (format!("1/logs/{name}"), text.as_bytes().to_vec())).collect();
            let length = |name: &String| files.get(&format!("1/logs/{name}")).map_or(0, |file| file.len() as u64);
            let short: BTreeMap<_, _> = view
                .log_lengths
                .iter()
                .map(|(name, known)| (name.clone(), length(name), *known))
                .filter(|(_, found, known)| found < known)
                .map(|(name, found, _)| (name, found))
                .collect();
            let mut records = Records::new(view, 1 << 20, 0);
            Self { marks: LogMarks::new(limit, &mut records, &short), records, files }
        }

        fn append(&mut self, name: &str, offset: u64, bytes: &[u8]) {
            self.marks.append(&mut self.records, name, offset, bytes);
        }

        fn text(&mut self, name: &str) -> String {
            for log in self.records.take_commit(false).into_iter().flat_map(|commit| commit.logs) {
                let file = self.files.entry(log.name).or_default();
                let offset = usize::try_from(log.offset).unwrap();
                assert!(offset <= file.len(), "a hole of {} bytes", offset - file.len());
                file.truncate(offset);
                file.extend_from_slice(&log.bytes);
            }
            let file = self.files.get(&format!("1/logs/{name}")).cloned().unwrap_or_default();
            String::from_utf8(file).unwrap()
        }

        fn dirty(&mut self) -> Vec<(String, u64, u64)> {
            let dirty = self.marks.take_dirty().unwrap_or_default();
            dirty.into_iter().map(|(name, mark)| (name, mark.guest, mark.host)).collect()
        }
    }

    #[test]
    fn bytes_are_appended_and_marked() {
        let mut bench = Bench::new(1000);
        assert!(bench.marks.take_dirty().is_none());
        bench.append("a.log", 0, b"one\n");
        bench.append("b.log", 0, b"x");
        bench.append("a.log", 4, b"two\n");
        assert!(bench.marks.is_dirty());
        assert_eq!(bench.dirty(), [("a.log".to_owned(), 8, 8), ("b.log".to_owned(), 1, 1)]);
        assert_eq!((bench.text("a.log").as_str(), bench.marks.bytes()), ("one\ntwo\n", 9));
        bench.append("b.log", 1, b"y");
        assert_eq!(bench.dirty(), [("b.log".to_owned(), 2, 2)], "only what changed");
        assert!(!bench.marks.is_dirty());
    }

    #[test]
    fn what_a_crash_left_beyond_the_mark_is_cut() {
        let known = view("a.log", LogMark { guest: 7, host: 7 });
        let mut bench = Bench::from(1000, known, &[("a.log", "durable, not durable")]);
        assert_eq!(bench.marks.bytes(), 7);
        bench.append("a.log", 7, b"!");
        assert_eq!(bench.text("a.log"), "durable!");
        assert_eq!(bench.dirty(), [("a.log".to_owned(), 8, 8)]);
    }

    #[test]
    fn a_file_that_was_cut_or_removed_here_says_so() {
        for left in ["dur", ""] {
            let known = view("a.log", LogMark { guest: 9, host: 7 });
            let mut bench = Bench::from(1000, known, &[("a.log", left)]);
            bench.append("a.log", 9, b"more");
            let wanted = format!("{left}[{} bytes were removed here]\nmore", 7 - left.len());
            assert_eq!(bench.text("a.log"), wanted);
            assert_eq!(bench.dirty(), [("a.log".to_owned(), 13, wanted.len() as u64)]);
        }
    }

    /// A guest that booted again begins its logs anew; what came before stays, and its length counts after a crash.
    #[test]
    fn a_new_stream_goes_on_in_the_same_file() {
        let mut known = view("a.log", LogMark { guest: 11, host: 11 });
        if let Some(cursor) = &mut known.cursor {
            cursor.logs.clear();
        }
        let mut bench = Bench::from(1000, known, &[("a.log", "first boot\nlost")]);
        bench.append("a.log", 0, b"second boot\n");
        assert_eq!(bench.text("a.log"), "first boot\nsecond boot\n");
        assert_eq!(bench.dirty(), [("a.log".to_owned(), 12, 23)]);
    }

    #[test]
    fn bytes_that_are_missing_are_told_where_they_are() {
        let mut bench = Bench::new(1000);
        bench.append("a.log", 0, b"one\n");
        bench.append("a.log", 104, b"two\n");
        assert_eq!(bench.text("a.log"), "one\n[100 bytes are missing here]\ntwo\n");
        assert_eq!(bench.dirty(), [("a.log".to_owned(), 108, 37)]);
    }

    /// Invariant 5.
    #[test]
    fn all_files_together_stay_within_the_limit() {
        let mut bench = Bench::new(10);
        bench.append("a.log", 0, b"0123456789");
        assert_eq!(bench.text("a.log"), "0123456789", "what fits is not said to go on");
        assert!(!bench.marks.are_cut());
        for round in 0..100 {
            bench.append("a.log", 10 + 3 * round, b"abc");
            bench.append("b.log", 3 * round, b"abc");
        }
        assert_eq!(bench.text("a.log"), format!("0123456789{FULL}"));
        assert_eq!(bench.text("b.log"), FULL);
        let dirty = bench.dirty();
        assert_eq!((dirty[0].1, dirty[1].1), (310, 300), "the guest may forget them");
        let said = format!("0123456789{FULL}");
        let known = view("a.log", LogMark { guest: 310, host: said.len() as u64 });
        let mut again = Bench::from(10, known, &[("a.log", &said)]);
        again.append("a.log", 310, b"abc");
        assert_eq!(again.text("a.log"), said, "said once");
        assert!(bench.marks.are_cut() && again.marks.are_cut());
        let mut cut = Bench::new(4);
        cut.append("a.log", 0, b"0123456789");
        assert_eq!(cut.text("a.log"), format!("0123{FULL}"));
    }

    /// Invariant 5.
    #[test]
    fn there_are_only_so_many_files() {
        let mut bench = Bench::new(1 << 20);
        for count in 0..MAX_LOG_FILES + 5 {
            assert_eq!(bench.marks.left_some_out(), count > MAX_LOG_FILES);
            bench.append(&format!("{count}.log"), 0, b"x");
        }
        bench.append("0.log", 1, b"y");
        assert_eq!((bench.text("0.log").as_str(), bench.dirty().len()), ("xy", MAX_LOG_FILES));
    }

    #[test]
    fn what_is_not_wanted_makes_no_file() {
        let mut bench = Bench::new(10);
        bench.marks.skip("a.log", 500);
        assert_eq!(bench.dirty(), [("a.log".to_owned(), 500, 0)]);
        assert_eq!((bench.text("a.log").as_str(), bench.files.len()), ("", 0));
    }
}

//! Cuts, tails, holes and names that a crash leaves.

use super::memory::Memory;
use super::*;

/// A life over several segments: the disk, what was durable when, and all records.
fn long_life() -> (Memory, Vec<(Durable, u64)>, Vec<u8>) {
    let disk = Memory::default();
    let mut journal = Journal::bounded(disk.clone(), MIB).unwrap();
    journal.records.segment_bytes = 900;
    let mut synced = vec![(Durable::default(), 0)];
    for _ in 0..3 {
        for (durable, view) in small_life(&mut journal) {
            synced.push((durable, view.next_n));
        }
    }
    (disk, synced, journal.lines)
}

/// Invariant 1: every byte of a real journal as the point of a cut.
#[test]
fn every_cut_gives_a_valid_prefix_and_loses_nothing_that_was_synced() {
    let (disk, synced, lines) = long_life();
    let views = prefix_views(&lines);
    let numbers = super::super::fs::segment_numbers(&disk.names());
    assert!(numbers.len() >= 4, "{numbers:?}");
    let files: Vec<(u64, Vec<u8>)> =
        numbers.into_iter().map(|number| (number, disk.get(&super::super::fs::segment_name(number)))).collect();
    for (index, (segment, bytes)) in files.iter().enumerate() {
        for cut in 0..=bytes.len() {
            let disk = Memory::default();
            let left = files[..index].iter().map(|(number, bytes)| (*number, &bytes[..]));
            for (number, bytes) in left.chain([(*segment, &bytes[..cut])]) {
                disk.put(&super::super::fs::segment_name(number), bytes);
            }
            let mut journal = Journal::bounded(disk.clone(), MIB).unwrap();
            let known = usize::try_from(journal.view().next_n).unwrap();
            assert_eq!(journal.view(), &views[known], "segment {segment} cut at {cut}");
            let here = Durable { segment: *segment, length: cut as u64 };
            let (_, acknowledged) = synced.iter().rfind(|(durable, _)| *durable <= here).unwrap();
            assert!(known as u64 >= *acknowledged, "segment {segment} cut at {cut} lost what was synced");
            assert!(!disk.names().iter().any(|name| name.contains("damaged")));
            if cut % 7 == 0 {
                journal.host(finished());
                journal.commit().unwrap();
                disk.crash();
                assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view(), "after a cut at {cut}");
            }
        }
    }
}

#[test]
fn zeros_behind_the_last_sync_are_cut() {
    for zeros in [1, 100, 4096, 3 * format::MAX_RECORD_BYTES] {
        let disk = Memory::default();
        let synced = small_life(&mut Journal::open(disk.clone()).unwrap());
        let mut bytes = disk.get(FILE_NAME);
        bytes.resize(bytes.len() + zeros, 0);
        // The size may reach the disk before the data, and other data after a hole of it.
        bytes.extend_from_slice(b"}}\n{\"n\":");
        disk.put(FILE_NAME, &bytes);
        disk.0.borrow_mut().read = 0;
        let journal = Journal::open(disk.clone()).unwrap();
        // Once to find where the records end, for which no more is gathered than one may be long; once for what is behind.
        assert!(disk.0.borrow().read < 2 * bytes.len().min(format::MAX_RECORD_BYTES) + bytes.len() + 4096, "{zeros}");
        let (durable, view) = synced.last().unwrap();
        assert_eq!((journal.view(), journal.store.durable()), (view, *durable));
        assert_eq!((disk.get(FILE_NAME).len() as u64, disk.names().len()), (durable.length, 1));
        let room = disk.0.borrow().reserved[FILE_NAME];
        assert_eq!(room, durable.length + super::super::RESERVE, "a cut takes the room for a verdict again");
    }
}

/// A cut would give back the room that is kept for a verdict.
#[test]
fn what_is_whole_is_not_cut() {
    let disk = Memory::default();
    small_life(&mut Journal::open(disk.clone()).unwrap());
    disk.0.borrow_mut().calls.clear();
    Store::open(disk.clone(), RUNTIME).unwrap();
    assert!(disk.0.borrow().calls.is_empty(), "{:?}", disk.0.borrow().calls);
}

/// Lines stand across the borders of reads.
#[test]
fn a_journal_of_many_reads_is_recovered() {
    let disk = Memory::default();
    let mut journal = Journal::bounded(disk.clone(), 1 << 40).unwrap();
    journal.begin();
    journal.host(stream("s-1", 0, Digest::EMPTY_STREAM));
    for seq in 1..2000 {
        journal.event(&event(seq, "starting", &format!(r#","details":{{"x":"{}"}}"#, "x".repeat(700))));
    }
    journal.commit().unwrap();
    assert!(disk.get(FILE_NAME).len() as u64 > MIB);
    assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view());
}

/// Invariant 1: the hole is longer than any line.
#[test]
fn what_stands_behind_a_long_hole_is_kept() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    small_life(&mut journal);
    let bytes = disk.get(FILE_NAME);
    let half = bytes.len() - journal.lines.len()
        + journal.lines.split_inclusive(|byte| *byte == b'\n').take(3).map(<[u8]>::len).sum::<usize>();
    let hole = [&vec![0; 3 * format::MAX_RECORD_BYTES][..], b"\n", &bytes[half..]].concat();
    disk.put(FILE_NAME, &[&bytes[..half], &hole].concat());
    assert_eq!(Store::open(disk.clone(), RUNTIME).unwrap().1.next_n, 3);
    assert_eq!(disk.get(FILE_NAME), bytes[..half]);
    assert!(disk.get(&format!("journal.1.damaged-at-{half}")) == hole);
}

#[test]
fn a_crash_at_the_very_beginning_begins_anew() {
    for left in [&b""[..], b"{", b"\0\0\0\0", &[0; 4096], b"{\"journal\":{\"version\":2,\0\0\0\0\n", b"\n\n"] {
        let disk = Memory::default();
        disk.put(FILE_NAME, left);
        let mut journal = Journal::open(disk.clone()).unwrap();
        assert_eq!(journal.view(), &View::default(), "{left:?}");
        small_life(&mut journal);
        disk.crash();
        assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view(), "{left:?}");
    }
}

/// The disk writes pages in any order: the end of a segment may be there without its beginning, or its name not at all.
#[test]
fn a_segment_that_was_being_made_is_begun_again() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    small_life(&mut journal);
    let before = journal.view().clone();
    journal.records.segment_bytes = 1;
    journal.host(finished());
    let commit = journal.records.take_commit(false).unwrap();
    journal.store.prepare(&commit).unwrap();
    let header = disk.get("journal.2.jsonl");
    disk.crash();
    assert_eq!(disk.names(), [FILE_NAME], "its name was not synced");
    assert_eq!(Store::open(disk.clone(), RUNTIME).unwrap().1, before);
    for torn in [&header[..0], &header[..header.len() / 2], &[0; 300]] {
        disk.put("journal.2.jsonl", torn);
        let mut journal = Journal::open(disk.clone()).unwrap();
        assert_eq!((journal.view(), disk.names()), (&before, vec![FILE_NAME.to_owned()]));
        journal.records.segment_bytes = 1;
        journal.host(finished());
        assert_eq!(journal.commit().unwrap().segment, 2);
        disk.crash();
        assert_eq!(&Store::open(disk.clone(), RUNTIME).unwrap().1, journal.view());
        disk.0.borrow_mut().files.remove("journal.2.jsonl");
    }
    // The header is there and no record yet.
    disk.put("journal.2.jsonl", &header);
    let mut journal = Journal::open(disk.clone()).unwrap();
    assert_eq!((journal.view(), journal.store.durable().segment), (&before, 2));
    journal.host(finished());
    journal.commit().unwrap();
    disk.crash();
    assert_eq!(&Store::open(disk, RUNTIME).unwrap().1, journal.view());
}

/// What was recovered may never have been synced: it is, before anybody relies on it.
#[test]
fn what_is_recovered_is_synced() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    small_life(&mut journal);
    journal.host(finished());
    let commit = journal.records.take_commit(false).unwrap();
    journal.store.write(&commit).unwrap();
    for by_commit in [false, true] {
        let (mut store, view) = Store::open(disk.clone(), RUNTIME).unwrap();
        assert!(store.needs_sync() && view.finished.is_some());
        if by_commit {
            let mut records = Records::new(view.clone(), MIB, store.filled());
            records.host(finished(), now(50));
            store.commit(&records.take_commit(false).unwrap()).unwrap();
        } else {
            store.settle().unwrap();
        }
        assert!(!store.needs_sync());
        disk.crash();
        let (_, again) = Store::open(disk.clone(), RUNTIME).unwrap();
        assert_eq!(again.next_n, view.next_n + u64::from(by_commit));
    }
}

/// Every bit of every byte: what is recovered is a prefix of what was written, what is behind is kept, or nothing is touched.
#[test]
fn a_flipped_bit_never_makes_a_wrong_record() {
    let disk = Memory::default();
    let mut journal = Journal::open(disk.clone()).unwrap();
    small_life(&mut journal);
    let (bytes, views) = (disk.get(FILE_NAME), prefix_views(&journal.lines));
    let header = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    for at in 0..bytes.len() {
        // All eight are flipped, though not all at each byte: that is a matter of the test's time.
        for bit in [at % 8, (at * 3 + 1) % 8] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let disk = Memory::default();
            disk.put(FILE_NAME, &flipped);
            match Store::open(disk.clone(), RUNTIME) {
                Ok((_, view)) => {
                    assert_eq!(view, views[usize::try_from(view.next_n).unwrap()], "bit {bit} of byte {at}");
                    let mut kept = disk.get(FILE_NAME);
                    let aside = disk.names().into_iter().find(|name| name.contains("damaged-at"));
                    kept.extend(aside.iter().flat_map(|name| disk.get(name)));
                    // The last line, and one that lost its end to it, have nothing behind them that could be told from a crash.
                    let is_last = !bytes[at + 1..].strip_suffix(b"\n").unwrap_or_default().contains(&b'\n');
                    assert!(kept == flipped || is_last, "bit {bit} of byte {at}: thrown away");
                }
                Err(JournalError::Damaged { .. } | JournalError::Version { .. }) => {
                    assert!(at < header, "bit {bit} of byte {at}");
                    assert_eq!(disk.get(FILE_NAME), flipped, "nothing is touched");
                }
                Err(error) => panic!("bit {bit} of byte {at}: {error}"),
            }
        }
    }
}

#[test]
fn a_damaged_first_line_is_no_reason_to_forget_the_rest() {
    let disk = Memory::default();
    small_life(&mut Journal::open(disk.clone()).unwrap());
    let mut bytes = disk.get(FILE_NAME);
    bytes[3] ^= 1;
    for bytes in [bytes, vec![b'x'; 5000]] {
        disk.put(FILE_NAME, &bytes);
        let error = Store::open(disk.clone(), RUNTIME).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("backup"), "{error}");
        assert_eq!(disk.get(FILE_NAME), bytes, "nothing is touched");
    }
}

#[test]
fn a_damaged_segment_falls_back_to_the_one_before_and_is_kept() {
    let (disk, _, lines) = long_life();
    let views = prefix_views(&lines);
    let newest = super::super::fs::segment_numbers(&disk.names()).pop().unwrap();
    let name = super::super::fs::segment_name(newest);
    let mut bytes = disk.get(&name);
    bytes[20] ^= 1;
    disk.put(&name, &bytes);
    let (store, view) = Store::open(disk.clone(), RUNTIME).unwrap();
    assert_eq!((&views[usize::try_from(view.next_n).unwrap()], store.durable().segment), (&view, newest - 1));
    assert_eq!(disk.get(&format!("journal.{newest}.damaged-at-0")), bytes);
    // Without the snapshots of a chain, what it goes on from is missing.
    let lone = Memory::default();
    lone.put("journal.3.jsonl", &format::write_header(RUNTIME, 3, 9, None));
    assert!(matches!(Store::open(lone, RUNTIME), Err(JournalError::Damaged { .. })));
}

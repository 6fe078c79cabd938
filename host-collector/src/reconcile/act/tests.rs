use super::*;
use crate::journal::Records;

fn at(secs: u64, wall: u64) -> Now {
    Now { mono: Duration::from_secs(secs), wall: Duration::from_secs(wall) }
}

/// A journal that was begun late in the host's first boot.
fn journal() -> Records {
    let mut records = Records::new(View::default(), 1 << 20, 0);
    records.boot("first", at(900_000, 1_000_000));
    records.begin("v1:aa".to_owned(), 0, at(900_000, 1_000_000));
    records
}

/// Invariant 4: this boot of the host is younger than what was kept in the last one, and wrote nothing yet.
#[test]
fn what_was_kept_before_the_host_booted_is_due_in_time() {
    let mut records = journal();
    records.host(HostRecord::Kept { for_secs: Some(3600) }, at(900_000, 1_000_000));
    let standing = |boot: &str, now: Now| standing(records.view(), true, boot, now);
    let (waits, is_due) = (Standing::Kept, Standing::Unfinished { needs_spec: false });
    assert_eq!(standing("first", at(903_599, 1_003_599)), waits);
    assert_eq!(standing("first", at(903_600, 1_003_600)), is_due);
    assert_eq!(standing("second", at(60, 1_003_599)), waits);
    assert_eq!(standing("second", at(60, 1_003_600)), is_due);
}

#[test]
fn what_was_kept_is_over_once_it_is_destroyed_and_goes_on_where_that_was_cut_short() {
    let mut records = journal();
    let now = at(900_001, 1_000_001);
    let standing = |records: &Records| standing(records.view(), true, "first", now);
    records.host(HostRecord::Kept { for_secs: None }, now);
    assert_eq!(standing(&records), Standing::Kept);
    records.host(HostRecord::Command { command: Command::Destroy }, now);
    assert_eq!(standing(&records), Standing::Unfinished { needs_spec: false });
    records.host(HostRecord::Finished { destroyed: true, restart_in_ms: None }, now);
    assert_eq!(standing(&records), Standing::Finished { destroyed: true });
}

/// Its values of `bootstrap.env` are on no disk.
#[test]
fn a_runtime_that_waits_for_its_next_start_needs_its_spec() {
    let mut records = journal();
    let now = at(900_001, 1_000_001);
    let needs_spec = |records: &Records, without_secrets| match standing(records.view(), without_secrets, "first", now)
    {
        Standing::Unfinished { needs_spec } => needs_spec,
        standing => panic!("{standing:?}"),
    };
    assert_eq!((needs_spec(&records, false), needs_spec(&records, true)), (true, false));
    records.host(HostRecord::Accepted { request_id: "job-7.1".to_owned() }, now);
    assert!(!needs_spec(&records, false), "its workload runs");
    records.host(HostRecord::Finished { destroyed: true, restart_in_ms: Some(1000) }, now);
    assert_eq!((needs_spec(&records, false), needs_spec(&records, true)), (true, false));
    records.host(HostRecord::Command { command: Command::Cancel }, now);
    assert!(!needs_spec(&records, false), "it is cancelled, and never started again");
}

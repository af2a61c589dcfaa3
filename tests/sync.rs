//! fsync, fdatasync and close reach the driver's flush and tell its failure.

#[path = "common/alone.rs"]
mod alone;
mod common;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;

use alone::alone;
use common::client::{close, errno};
use common::{Call, Mounted, for_queues};

type Sync = fn(File) -> io::Result<()>;

const WAYS: [(&str, Sync); 3] = [
    ("fsync", |f| f.sync_all()),
    ("fdatasync", |f| f.sync_data()),
    ("close", close),
];

#[test]
fn each_way_flushes_after_what_was_written() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_000, queues);
        for (what, sync) in WAYS {
            let file = m.open(true);
            file.write_all_at(b"x", 0).unwrap();
            let before = m.driver.flushes.load(SeqCst);
            m.driver.calls.lock().unwrap().clear();
            sync(file).unwrap();
            assert!(m.driver.flushes.load(SeqCst) > before, "{what}");
        }
    });
}

#[test]
fn closing_a_reader_flushes_nothing() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_000, queues);
        let file = m.open(false);
        file.read_at(&mut [0; 10], 0).unwrap();
        m.driver.fail_if(|call, _, _| {
            (call == Call::Flush).then(|| io::Error::from_raw_os_error(libc::EIO))
        });
        close(file).unwrap();
        assert_eq!(m.driver.flushes.load(SeqCst), 0);
    });
}

/// ENOSYS above all: the kernel would take it as "never ask again" and let
/// every later fsync succeed.
#[test]
fn a_failure_is_told_every_time() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_000, queues);
        for (says, arrives) in [
            (libc::ENOSYS, libc::EIO),
            (libc::EOPNOTSUPP, libc::EIO),
            (libc::EIO, libc::EIO),
            (libc::ENOSPC, libc::ENOSPC),
            (libc::EDQUOT, libc::EDQUOT),
        ] {
            m.driver.fail_if(move |call, _, _| {
                (call == Call::Flush).then(|| io::Error::from_raw_os_error(says))
            });
            for round in 0..3 {
                for (what, sync) in WAYS {
                    let file = m.open(true);
                    let result = sync(file);
                    assert_eq!(errno(result), arrives, "{what}, {says}, round {round}");
                }
            }
        }
        m.driver.fail_never();
        for (what, sync) in WAYS {
            let before = m.driver.flushes.load(SeqCst);
            sync(m.open(true)).unwrap();
            assert!(m.driver.flushes.load(SeqCst) > before, "{what}");
        }
    });
}

#[test]
fn an_fsync_through_a_reader_flushes_too() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_000, queues);
        m.open(true).write_all_at(b"x", 0).unwrap();
        let before = m.driver.flushes.load(SeqCst);
        m.open(false).sync_all().unwrap();
        assert!(m.driver.flushes.load(SeqCst) > before);
    });
}

/// A duplicate's close is a close, too.
#[test]
fn every_close_of_a_shared_descriptor_flushes() {
    alone("every_close_of_a_shared_descriptor_flushes", || {
        for_queues(|queues| {
            let m = Mounted::fixed(10_000, queues);
            let file = m.open(true);
            for n in 1..4 {
                close(file.try_clone().unwrap()).unwrap();
                assert_eq!(m.driver.flushes.load(SeqCst), n);
            }
        });
    });
}

#[test]
fn flushes_wait_for_the_writes_that_they_cover() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_000, queues);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (m, file) = (&m, m.open(true));
                scope.spawn(move || {
                    for i in 0..50 {
                        let data = [writer * 50 + i; 100];
                        let at = u64::from(writer) * 100;
                        file.write_all_at(&data, at).unwrap();
                        let before = m.driver.flushes.load(SeqCst);
                        file.sync_data().unwrap();
                        assert!(m.driver.flushes.load(SeqCst) > before);
                        assert_eq!(m.driver.bytes()[at as usize..][..100], data);
                    }
                });
            }
        });
    });
}

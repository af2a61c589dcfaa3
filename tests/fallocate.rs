//! fallocate(2): taking space, punching holes, zeroing; and what is refused.

mod common;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;

use common::client::{aio_write, errno, fallocate, size};
use common::sparse::{BLOCK, Exported, Sparse, Strict};
use common::{Call, Memory, Mounted, for_queues, pattern};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};

const PUNCH: i32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = FALLOC_FL_ZERO_RANGE;
const ZERO_KEEP: i32 = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
/// More than one request holds.
const LEN: usize = (2 << 20) + 70_001;

/// Every kind of export that must behave the same.
fn for_exports(test: impl Fn(Mounted)) {
    for_queues(|queues| {
        for native_zeroes in [true, false] {
            for growable in [true, false] {
                eprintln!("native zeroes: {native_zeroes}, growable: {growable}");
                let mut driver = Memory::patterned(LEN);
                driver.native_zeroes = native_zeroes;
                test(Mounted::with(driver, queues, |b| b.growable(growable)));
            }
        }
    });
}

/// What has been called; flushes come also when nobody asks for them, from
/// the child that the start of another test's export forks.
fn calls(m: &Mounted) -> Vec<(Call, u64, u64)> {
    let calls = std::mem::take(&mut *m.driver.calls.lock().unwrap());
    calls.into_iter().filter(|c| c.0 != Call::Flush).collect()
}

#[test]
fn allocating_inside_changes_nothing() {
    for_exports(|m| {
        let file = m.open(true);
        for (offset, len) in [(0, 1), (5, 4096), (0, LEN as u64), (LEN as u64 - 1, 1)] {
            fallocate(&file, 0, offset, len).unwrap();
        }
        assert_eq!(size(&file), LEN as u64);
        assert!(m.driver.bytes() == pattern(0, LEN));
        let changes = calls(&m);
        assert!(changes.iter().all(|(c, ..)| *c != Call::Write));
    });
}

#[test]
fn allocating_at_the_end_and_beyond_grows_and_takes_the_space() {
    for_exports(|m| {
        let file = m.open(true);
        let mut model = pattern(0, LEN);
        for (offset, len) in [
            (LEN, 5000),
            (LEN + 4000, 3001),
            (LEN + 50_000, 10),
            (100, LEN + 60_000),
        ] {
            let old = model.len();
            calls(&m);
            fallocate(&file, 0, offset as u64, len as u64).unwrap();
            model.resize(offset + len, 0);
            assert_eq!(size(&file), model.len() as u64);
            assert!(m.driver.bytes() == model);
            let from = offset.max(old) as u64;
            let wanted = (Call::WriteZeroes, from, model.len() as u64 - from);
            assert!(calls(&m).contains(&wanted), "{wanted:?}");
        }
    });
    // What was taken really occupies space.
    for_queues(|queues| {
        let sparse = Sparse::new(10 * BLOCK);
        let e = Exported::with(sparse.clone(), queues, |b| b);
        fallocate(&e.open(), 0, 20 * BLOCK, 2 * BLOCK).unwrap();
        assert!(sparse.has_block(20) && sparse.has_block(21));
        assert!(!sparse.has_block(19));
        assert_eq!(sparse.length(), 22 * BLOCK);
    });
}

/// Odd ranges, aligned ones, such as cross the end, and such as lie past it.
fn ranges() -> Vec<(usize, usize)> {
    vec![
        (4096, 8192),
        (20_001, 1),
        (30_001, 4097),
        (511, 2),
        (100_000, 1_500_000),
        (0, 512),
        (LEN - 100, 50),
        (LEN - 10, 10),
        (LEN - 40, 5000),
        (LEN, 4096),
        (LEN + 12_345, 1 << 20),
    ]
}

#[test]
fn punching_and_zeroing_within_the_size() {
    for mode in [PUNCH, ZERO_KEEP] {
        for_exports(|m| {
            let file = m.open(true);
            let mut model = pattern(0, LEN);
            for (offset, len) in ranges() {
                calls(&m);
                fallocate(&file, mode, offset as u64, len as u64).unwrap();
                let end = LEN.min(offset + len);
                model[offset.min(end)..end].fill(0);
                assert!(m.driver.bytes() == model, "{offset} {len}");
                assert_eq!(size(&file), LEN as u64);
                if offset >= LEN {
                    assert_eq!(calls(&m), [], "nothing to do");
                }
                let mut back = vec![1; 10_000];
                let n = file.read_at(&mut back, offset as u64).unwrap();
                assert!(back[..n] == model[offset.min(LEN)..][..n]);
            }
        });
    }
}

#[test]
fn punching_lets_storage_go_and_zeroing_keeps_it() {
    for_queues(|queues| {
        let mut driver = Memory::patterned(LEN);
        driver.native_zeroes = true;
        let m = Mounted::with(driver, queues, |b| b);
        let file = m.open(true);
        fallocate(&file, PUNCH, 100, 200).unwrap();
        assert_eq!(calls(&m), [(Call::Discard, 100, 200)]);
        fallocate(&file, ZERO_KEEP, 100, 200).unwrap();
        assert_eq!(calls(&m), [(Call::WriteZeroes, 100, 200)]);

        let sparse = Sparse::new(10 * BLOCK);
        for i in 0..10 {
            sparse.put_block(i, 7);
        }
        let e = Exported::with(sparse.clone(), queues, |b| b);
        fallocate(&e.open(), PUNCH, BLOCK, 2 * BLOCK).unwrap();
        fallocate(&e.open(), ZERO_KEEP, 5 * BLOCK, 2 * BLOCK).unwrap();
        let left: Vec<_> = (0..10).filter(|i| sparse.has_block(*i)).collect();
        assert_eq!(left, [0, 3, 4, 5, 6, 7, 8, 9]);
    });
}

#[test]
fn zeroing_without_keep_size_grows() {
    for_exports(|m| {
        let file = m.open(true);
        let mut model = pattern(0, LEN);
        for (offset, len) in [
            (5, 1000),
            (LEN - 10, 10),
            (LEN - 40, 5000),
            (LEN + 100_000, 77),
        ] {
            fallocate(&file, ZERO, offset as u64, len as u64).unwrap();
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].fill(0);
            assert!(m.driver.bytes() == model, "{offset} {len}");
            assert_eq!(size(&file), model.len() as u64);
        }
    });
}

#[test]
fn all_else_is_not_supported() {
    const COLLAPSE: i32 = libc::FALLOC_FL_COLLAPSE_RANGE;
    const INSERT: i32 = libc::FALLOC_FL_INSERT_RANGE;
    for_exports(|m| {
        let file = m.open(true);
        for mode in [
            FALLOC_FL_KEEP_SIZE,
            COLLAPSE,
            INSERT,
            libc::FALLOC_FL_UNSHARE_RANGE,
        ] {
            let result = fallocate(&file, mode, 0, 4096);
            assert_eq!(errno(result), libc::EOPNOTSUPP, "{mode:#x}");
            let past = fallocate(&file, mode, LEN as u64 + 10, 4096);
            assert_eq!(errno(past), libc::EOPNOTSUPP, "{mode:#x}");
        }
        for mode in [FALLOC_FL_PUNCH_HOLE, PUNCH | ZERO, 1 << 30] {
            let error = errno(fallocate(&file, mode, 0, 4096));
            assert!([libc::EOPNOTSUPP, libc::EINVAL].contains(&error));
        }
        assert_eq!(errno(fallocate(&file, 0, 0, 0)), libc::EINVAL);
        // A refusal is not for ever.
        fallocate(&file, PUNCH, 0, 4096).unwrap();
        assert_eq!(m.driver.bytes().len(), LEN);
        assert!(m.driver.bytes()[4096..] == pattern(4096, LEN - 4096));
    });
}

#[test]
fn the_far_end_of_all_offsets() {
    for_exports(|m| {
        let file = m.open(true);
        let last = i64::MAX as u64;
        for offset in [1 << 62, last - 10_000] {
            assert_eq!(errno(fallocate(&file, 0, offset, 4096)), libc::EFBIG);
            assert_eq!(errno(fallocate(&file, ZERO, offset, 4096)), libc::EFBIG);
            fallocate(&file, PUNCH, offset, 4096).unwrap();
        }
        assert_eq!(errno(fallocate(&file, 0, last, 4096)), libc::EFBIG);
        fallocate(&file, PUNCH, 4096, last - 4096).unwrap();
        assert_eq!(size(&file), LEN as u64);
        let bytes = m.driver.bytes();
        assert!(bytes[..4096] == pattern(0, 4096));
        assert!(bytes[4096..].iter().all(|b| *b == 0));
    });
}

#[test]
fn an_allocation_that_fails_leaves_the_length() {
    for_exports(|m| {
        let file = m.open(true);
        // No room even for the length; then for the length, not the space.
        for failing in [&[Call::Truncate][..], &[Call::WriteZeroes, Call::Write]] {
            // Undoing must work: only growing needs room.
            m.driver.fail_if(move |call, offset, _| {
                let grows = call != Call::Truncate || offset > LEN as u64;
                let full = failing.contains(&call) && grows;
                full.then(|| io::Error::from_raw_os_error(libc::ENOSPC))
            });
            for (mode, offset) in [(0, LEN), (0, LEN + 9999), (0, 10), (ZERO, LEN)] {
                let result = fallocate(&file, mode, offset as u64, LEN as u64 + 5);
                assert_eq!(errno(result), libc::ENOSPC);
                assert_eq!(size(&file), LEN as u64);
                assert!(m.driver.bytes() == pattern(0, LEN));
            }
        }
        m.driver.fail_never();
        fallocate(&file, 0, LEN as u64, 5000).unwrap();
        assert_eq!(size(&file), LEN as u64 + 5000);
        assert!(m.driver.bytes()[LEN..].iter().all(|b| *b == 0));
    });
}

#[test]
fn a_failure_to_punch_or_zero_is_reported() {
    for_exports(|m| {
        let file = m.open(true);
        m.driver.fail_if(|call, _, _| {
            let fails = [Call::Discard, Call::WriteZeroes, Call::Write].contains(&call);
            fails.then(|| io::Error::from_raw_os_error(libc::EIO))
        });
        for mode in [PUNCH, ZERO, ZERO_KEEP] {
            assert_eq!(errno(fallocate(&file, mode, 0, 4096)), libc::EIO);
        }
        assert!(m.driver.bytes() == pattern(0, LEN));
    });
}

/// A driver that zeroes natively but not everywhere falls back there.
#[test]
fn a_driver_that_refuses_to_zero_here_is_helped_out() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        m.driver.fail_if(|call, offset, _| {
            let refuses = match call {
                Call::Discard => offset >= 4096,
                Call::WriteZeroes => offset >= 8192,
                _ => false,
            };
            refuses.then(|| io::ErrorKind::Unsupported.into())
        });
        let file = m.open(true);
        fallocate(&file, PUNCH, 4096, 10).unwrap();
        assert_eq!(
            calls(&m),
            [(Call::Discard, 4096, 10), (Call::WriteZeroes, 4096, 10)]
        );
        fallocate(&file, PUNCH, 8192, 1 << 20).unwrap();
        let bytes = m.driver.bytes();
        assert!(bytes[8192..][..1 << 20].iter().all(|b| *b == 0));
        assert!(bytes[8192 + (1 << 20)..] == pattern(8192 + (1 << 20), LEN - 8192 - (1 << 20)));
    });
}

/// Undoing an allocation shrinks the device: not while somebody writes.
#[test]
fn undoing_an_allocation_waits_for_writes_and_loses_none() {
    const LEN: u64 = 100 * BLOCK;
    for_queues(|queues| {
        let driver = Strict::new(Sparse::new(LEN));
        driver.full.store(true, SeqCst);
        let e = Exported::with(driver.clone(), queues, |b| b.growable(true));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let file = e.open();
                scope.spawn(move || {
                    for i in 0..100 {
                        let data = [i; 5000];
                        let writes = [(0, &data[..]), (5000, &data), (LEN - 5000, &data)];
                        assert_eq!(aio_write(&file, &writes), [5000; 3]);
                    }
                });
            }
            let file = e.open();
            for _ in 0..200 {
                assert_eq!(errno(fallocate(&file, 0, LEN, 4096)), libc::ENOSPC);
                assert_eq!(size(&file), LEN);
            }
        });
        assert_eq!(driver.violations.load(SeqCst), 0, "shrunk while in use");
        let mut back = [0; 5000];
        for at in [0, 5000, LEN - 5000] {
            e.open().read_exact_at(&mut back, at).unwrap();
            assert!(back == [99; 5000]);
        }
    });
}

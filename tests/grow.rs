//! Writes that make a growable file longer: exactly, without losing or
//! shrinking anything, whatever fails.

mod common;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use common::client::{aio_write, errno, fallocate, have, run, size};
use common::sparse::{BLOCK, Exported, Sparse};
use common::{Call, Mounted, for_queues, pattern, skip};

/// The lengths that the driver was told, in order.
fn truncates(m: &Mounted) -> Vec<u64> {
    let calls = m.driver.calls.lock().unwrap();
    let truncates = calls.iter().filter(|(c, ..)| *c == Call::Truncate);
    truncates.map(|(_, length, _)| *length).collect()
}

#[test]
fn a_write_at_the_end_grows_by_its_length() {
    for_queues(|queues| {
        for flags in [0, libc::O_DIRECT] {
            let m = Mounted::growable(10_001, queues);
            let file = m.open_with(true, flags);
            let mut model = pattern(0, 10_001);
            for data in [&b"abc"[..], b"d", &pattern(9, 5000), &pattern(5, 3 << 20)] {
                file.write_all_at(data, model.len() as u64).unwrap();
                model.extend(data);
                assert_eq!(size(&file), model.len() as u64);
                assert!(m.driver.bytes() == model);
            }
            // Across the end.
            file.write_all_at(&[7; 100], model.len() as u64 - 60)
                .unwrap();
            assert_eq!(size(&file), model.len() as u64 + 40);
            assert_eq!(m.driver.bytes()[model.len() - 60..], [7; 100]);
        }
    });
}

#[test]
fn a_write_past_the_end_leaves_zeroes_in_between() {
    for_queues(|queues| {
        let m = Mounted::growable(1001, queues);
        let file = m.open(true);
        file.write_all_at(b"far", 70_001).unwrap();
        assert_eq!(size(&file), 70_004);
        let mut back = vec![1; 69_000];
        file.read_exact_at(&mut back, 1001).unwrap();
        assert!(back.iter().all(|b| *b == 0));
        assert_eq!(m.driver.bytes()[70_001..], *b"far");
        assert_eq!(m.driver.bytes()[..1001], pattern(0, 1001));

        let sparse = Sparse::new(0);
        let e = Exported::with(sparse.clone(), queues, |b| b.growable(true));
        let file = e.open();
        file.write_all_at(b"very far", 5 << 40).unwrap();
        assert_eq!(size(&file), (5 << 40) + 8);
        assert!(sparse.has_block((5 << 40) / BLOCK));
        assert!(!sparse.has_block(0));
    });
}

#[test]
fn o_trunc_empties() {
    for_queues(|queues| {
        let m = Mounted::growable(100_000, queues);
        std::fs::write(&m.path, b"new").unwrap();
        assert_eq!(m.driver.bytes(), b"new");
        File::create(&m.path).unwrap();
        assert_eq!(m.driver.bytes(), b"");
        assert_eq!(size(&m.open(false)), 0);
    });
}

#[test]
fn appended_records_are_all_there_and_whole() {
    const THREADS: usize = 6;
    const RECORDS: usize = 60;
    // Odd, and sometimes more than a page.
    let record = |thread: usize, n: usize| {
        let mut r = vec![thread as u8 + 1; 37 + n * 97 % 7001];
        r[0] = 0xff;
        r[1] = thread as u8;
        r[2] = n as u8;
        r
    };
    for_queues(|queues| {
        let m = Mounted::growable(0, queues);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let flags = if thread % 2 == 0 { 0 } else { libc::O_DIRECT };
                let mut file = OpenOptions::new()
                    .append(true)
                    .custom_flags(flags)
                    .open(&m.path)
                    .unwrap();
                scope.spawn(move || {
                    for n in 0..RECORDS {
                        let data = record(thread, n);
                        assert_eq!(file.write(&data).unwrap(), data.len());
                    }
                });
            }
        });
        let bytes = m.driver.bytes();
        let mut next = [0; THREADS];
        let mut at = 0;
        while at < bytes.len() {
            let thread = bytes[at + 1] as usize;
            let expected = record(thread, next[thread]);
            assert!(bytes[at..].starts_with(&expected), "record at {at}");
            next[thread] += 1;
            at += expected.len();
        }
        assert_eq!(next, [RECORDS; THREADS]);
    });
}

#[test]
fn one_large_asynchronous_write_past_the_end_loses_nothing() {
    for_queues(|queues| {
        for (old, offset, len) in [
            (0, 0, 8 << 20),
            (0, 12_345, (8 << 20) + 1),
            (3 << 20, (3 << 20) - 5, 8 << 20),
        ] {
            let m = Mounted::growable(old, queues);
            let file = m.open_with(true, libc::O_DIRECT);
            let data = pattern(17, len);
            let results = aio_write(&file, &[(offset as u64, &data)]);
            assert_eq!(results, [len as i32]);
            assert_eq!(size(&file), (offset + len) as u64);
            let bytes = m.driver.bytes();
            assert_eq!(bytes.len(), offset + len);
            assert!(bytes[offset..] == data);
            let kept = old.min(offset);
            assert!(bytes[..kept] == pattern(0, kept));
            let lengths = truncates(&m);
            assert!(!lengths.is_empty() && lengths.is_sorted(), "{lengths:?}");
        }
    });
}

#[test]
fn many_asynchronous_writes_past_the_end_in_any_order() {
    const PIECE: usize = 300_001;
    for_queues(|queues| {
        let m = Mounted::growable(0, queues);
        let file = m.open_with(true, libc::O_DIRECT);
        let data = pattern(3, 24 * PIECE);
        let mut writes: Vec<_> = data
            .chunks(PIECE)
            .enumerate()
            .map(|(i, c)| ((i * PIECE) as u64, c))
            .collect();
        writes.rotate_left(7);
        writes.reverse();
        let results = aio_write(&file, &writes);
        assert_eq!(results, vec![PIECE as i32; 24]);
        assert!(m.driver.bytes() == data);
        let lengths = truncates(&m);
        assert!(lengths.is_sorted(), "{lengths:?}");
        assert_eq!(size(&file), data.len() as u64);
    });
}

#[test]
fn fio_writes_and_verifies_a_file_that_grows() {
    if !have("fio") {
        return skip("no fio");
    }
    for_queues(|queues| {
        let m = Mounted::growable(0, queues);
        let line = "fio --name=grow --filename={} --rw=write --bs=2M --size=48M \
                    --ioengine=libaio --iodepth=4 --direct=1 --create_on_open=1 \
                    --fallocate=none --verify=crc32c --do_verify=1 --verify_fatal=1";
        run(common::client::command(line, &m.path).current_dir(std::env::temp_dir()));
        assert_eq!(m.driver.bytes().len(), 48 << 20);
        let lengths = truncates(&m);
        assert!(lengths.is_sorted(), "{lengths:?}");
    });
}

#[test]
fn the_far_end_of_all_offsets_is_refused_and_the_length_stays() {
    for_queues(|queues| {
        // A Memory refuses more than 1 GiB, as a full store would.
        let m = Mounted::growable(1000, queues);
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(true, flags);
            let last = i64::MAX as u64;
            for offset in [1 << 62, (1 << 62) + 1, last - 4096, last - 1] {
                assert_eq!(errno(file.write_at(b"x", offset)), libc::EFBIG);
            }
            // Of what lies at the very end, nothing fits.
            let error = errno(file.write_at(b"xy", last));
            assert!([libc::EFBIG, libc::EINVAL].contains(&error), "{error}");
            assert_eq!(errno(file.write_at(b"x", last + 1)), libc::EINVAL);
            assert_eq!(aio_write(&file, &[(1 << 62, b"x")]), [-libc::EFBIG]);
            assert_eq!(size(&file), 1000);
        }
        assert!(m.driver.bytes() == pattern(0, 1000));
        // A store without such a limit grows there.
        let sparse = Sparse::new(0);
        let e = Exported::with(sparse.clone(), queues, |b| b.growable(true));
        e.open().write_all_at(b"end", (1 << 62) + 5).unwrap();
        assert_eq!(sparse.length(), (1 << 62) + 8);
    });
}

/// Makes every write that touches `at` fail.
fn fail_at(m: &Mounted, at: u64, code: i32) {
    m.driver.fail_if(move |call, offset, len| {
        let hits = call == Call::Write && offset <= at && offset + len > at;
        hits.then(|| io::Error::from_raw_os_error(code))
    });
}

#[test]
fn a_growing_write_that_fails_leaves_length_and_bytes() {
    for_queues(|queues| {
        let m = Mounted::growable(10_001, queues);
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(true, flags);
            for (offset, len) in [(10_001, 3), (10_000, 5000), (50_000, 10)] {
                fail_at(&m, 10_001.max(offset), libc::EIO);
                let data = vec![7; len];
                assert_eq!(errno(file.write_at(&data, offset)), libc::EIO);
                assert_eq!(size(&file), 10_001, "write({len}) at {offset}");
                assert_eq!(aio_write(&file, &[(offset, &data)]), [-libc::EIO]);
                assert_eq!(size(&file), 10_001, "aio({len}) at {offset}");
                assert!(m.driver.bytes() == pattern(0, 10_001));
            }
            m.driver.fail_never();
            // Nothing of the attempts comes back.
            file.set_len(100_000).unwrap();
            assert!(m.driver.bytes()[10_001..].iter().all(|b| *b == 0));
            file.set_len(10_001).unwrap();
        }
    });
}

#[test]
fn of_a_large_growing_write_that_fails_midway_only_a_start_may_stay() {
    const LEN: usize = 8 << 20;
    for_queues(|queues| {
        for flags in [0, libc::O_DIRECT] {
            let m = Mounted::growable(1001, queues);
            let file = m.open_with(true, flags);
            let data = pattern(1, LEN);
            let bad = 1001 + LEN as u64 / 2;
            fail_at(&m, bad, libc::ENOSPC);
            // As for any file: what was written before counts.
            let n = file.write_at(&data, 1001).unwrap();
            assert!(1001 + n as u64 <= bad);
            let bytes = m.driver.bytes();
            assert_eq!(size(&file), 1001 + n as u64);
            assert!(bytes[..1001] == pattern(0, 1001));
            assert!(bytes[1001..] == data[..n]);

            // Its pieces are in flight at once, so that some behind the bad
            // place may be there; what is said to be written is.
            let m = Mounted::growable(1001, queues);
            let file = m.open_with(true, flags);
            fail_at(&m, bad, libc::ENOSPC);
            let n = aio_write(&file, &[(1001, &data)])[0];
            let bytes = m.driver.bytes();
            assert!(bytes[..1001] == pattern(0, 1001));
            if n < 0 {
                assert_eq!(n, -libc::ENOSPC);
                assert_eq!(size(&file), 1001);
                assert_eq!(bytes.len(), 1001);
            } else {
                assert!(1001 + n as u64 <= bad);
                assert!(bytes[1001..][..n as usize] == data[..n as usize]);
            }
            // Trying again heals it.
            m.driver.fail_never();
            assert_eq!(aio_write(&file, &[(1001, &data)]), [LEN as i32]);
            assert!(m.driver.bytes()[1001..] == data);
        }
    });
}

#[test]
fn a_full_device_recovers_when_there_is_space_again() {
    for_queues(|queues| {
        let m = Mounted::growable(0, queues);
        let room = Arc::new(AtomicU64::new(100_000));
        let limit = room.clone();
        m.driver.fail_if(move |call, offset, _| {
            let full = call == Call::Truncate && offset > limit.load(SeqCst);
            full.then(|| io::Error::from_raw_os_error(libc::ENOSPC))
        });
        let mut file = OpenOptions::new().append(true).open(&m.path).unwrap();
        let mut written = Vec::new();
        let error = loop {
            let data = [written.len() as u8; 7000];
            match file.write_all(&data) {
                Ok(()) => written.extend(data),
                Err(e) => break e,
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(written.len(), 98_000);
        assert_eq!(size(&file), 98_000);
        assert!(m.driver.bytes() == written);
        assert_eq!(errno(fallocate(&file, 0, 0, 200_000)), libc::ENOSPC);
        assert_eq!(errno(file.set_len(200_000)), libc::ENOSPC);
        assert_eq!(size(&file), 98_000);
        // Inside, and while reading, nothing is wrong.
        m.open(true).write_all_at(b"still", 50).unwrap();
        written[50..55].copy_from_slice(b"still");
        room.store(1 << 20, SeqCst);
        file.write_all(b"goes on").unwrap();
        written.extend(b"goes on");
        assert!(m.driver.bytes() == written);
    });
}

#[test]
fn writes_inside_go_on_while_a_growing_one_is_held_up() {
    for_queues(|queues| {
        let m = Mounted::growable(100_000, queues);
        m.driver.hold();
        std::thread::scope(|scope| {
            let (inside, growing) = (m.open(true), m.open(true));
            scope.spawn(move || inside.write_all_at(b"inside", 0).unwrap());
            m.driver.wait_for_held(1);
            scope.spawn(move || growing.write_all_at(b"growing", 200_000).unwrap());
            // The growing one comes to the driver too, unless the kernel
            // itself makes it wait; both end.
            m.driver.release();
        });
        assert_eq!(m.driver.bytes()[..6], *b"inside");
        assert_eq!(m.driver.bytes()[200_000..], *b"growing");
    });
}

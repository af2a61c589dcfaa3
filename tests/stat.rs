//! What stat shows of the exported file.

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::SystemTime;

use common::client::{fallocate, fresh_statx, fresh_times, seek, size, times};
use common::sparse::{BLOCK, Exported, Sparse};
use common::{Memory, Mounted, for_queues};
use nix::unistd::{getegid, geteuid};

#[test]
fn a_regular_file_of_the_exporting_user_with_the_exact_size() {
    for_queues(|queues| {
        for len in [0, 1, 100, 511, 4096, 1_000_001] {
            for writable in [false, true] {
                let m = Mounted::with(Memory::patterned(len), queues, |b| b.writable(writable));
                let meta = fs::metadata(&m.path).unwrap();
                let mode = if writable { 0o100600 } else { 0o100400 };
                assert_eq!(meta.mode(), mode);
                assert_eq!(meta.len(), len as u64);
                assert_eq!(meta.nlink(), 1);
                assert_eq!(meta.uid(), geteuid().as_raw());
                assert_eq!(meta.gid(), getegid().as_raw());
                let file = m.open(false);
                assert_eq!(meta.ino(), fresh_statx(&file).stx_ino);
                assert_eq!(meta.ino(), fs::symlink_metadata(&m.path).unwrap().ino());
            }
        }
    });
}

#[test]
fn sizes_beyond_all_disks_are_exact() {
    for_queues(|queues| {
        for len in [5 << 40, (5 << 40) + 1, (1 << 62) + 511, i64::MAX as u64] {
            let e = Exported::with(Sparse::new(len), queues, |b| b);
            assert_eq!(fs::metadata(&e.path).unwrap().len(), len);
            assert_eq!(fs::metadata(&e.path).unwrap().blocks(), 0);
            let file = e.open();
            assert_eq!(seek(&file, 0, libc::SEEK_END).unwrap(), len);
            let mut last = [1];
            file.read_exact_at(&mut last, len - 1).unwrap();
            assert_eq!(last, [0]);
        }
    });
}

#[test]
fn the_block_size_is_the_drivers() {
    for_queues(|queues| {
        for block_size in [512, 4096, 65536] {
            let mut driver = Memory::patterned(10_000);
            driver.block_size = block_size;
            let m = Mounted::with(driver, queues, |b| b);
            let meta = fs::metadata(&m.path).unwrap();
            assert_eq!(meta.blksize(), u64::from(block_size));
        }
    });
}

#[test]
fn the_blocks_are_those_that_the_driver_has_allocated() {
    for_queues(|queues| {
        // Unknown: all of it, rounded up to sectors.
        let m = Mounted::fixed(1_000_001, queues);
        assert_eq!(fs::metadata(&m.path).unwrap().blocks(), 1954);
        *m.driver.allocated.lock().unwrap() = Some(3 * 512 + 1);
        assert_eq!(fresh_statx(&m.open(false)).stx_blocks, 4);

        let sparse = Sparse::new(1 << 30);
        let e = Exported::with(sparse, queues, |b| b);
        let file = e.open();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        file.write_all_at(b"x", 5 * BLOCK + 7).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), BLOCK / 512);
        fallocate(
            &file,
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            0,
            1 << 29,
        )
        .unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    });
}

#[test]
fn looking_moves_no_time() {
    for_queues(|queues| {
        let before = SystemTime::now();
        let m = Mounted::growable(1 << 20, queues);
        let after = SystemTime::now();
        let file = m.open(true);
        let start = fresh_times(&file);
        assert!(start.0 >= before && start.0 <= after, "{start:?}");
        assert!(start.1 >= before && start.1 <= after, "{start:?}");

        m.open(false).read_to_end(&mut Vec::new()).unwrap();
        drop(m.open(true));
        seek(&file, 0, libc::SEEK_HOLE).unwrap();
        seek(&file, 5, libc::SEEK_DATA).unwrap();
        file.sync_all().unwrap();
        file.sync_data().unwrap();
        // None of these changes a byte either.
        fallocate(&file, 0, 0, 4096).unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(file.write_at(b"", 0).unwrap(), 0);
        drop(file);
        assert_eq!(fresh_times(&m.open(false)), start);
    });
}

#[test]
fn every_change_moves_mtime_and_ctime_to_its_own_time() {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    type Change = Box<dyn Fn(&fs::File)>;
    let changes: [(&str, Change); 7] = [
        ("write", Box::new(|f| f.write_all_at(b"x", 9).unwrap())),
        ("grow", Box::new(|f| f.write_all_at(b"x", 70_000).unwrap())),
        ("shrink", Box::new(|f| f.set_len(50_000).unwrap())),
        ("extend", Box::new(|f| f.set_len(60_000).unwrap())),
        (
            "allocate",
            Box::new(|f| fallocate(f, 0, 60_000, 4096).unwrap()),
        ),
        (
            "punch",
            Box::new(move |f| fallocate(f, punch, 0, 4096).unwrap()),
        ),
        (
            "zero",
            Box::new(|f| fallocate(f, libc::FALLOC_FL_ZERO_RANGE, 0, 4096).unwrap()),
        ),
    ];
    for_queues(|queues| {
        let m = Mounted::growable(65_536, queues);
        let file = m.open(true);
        for (what, change) in &changes {
            let before = SystemTime::now();
            change(&file);
            let after = SystemTime::now();
            let moved = times(&file);
            assert!(moved.0 >= before && moved.0 <= after, "{what}: {moved:?}");
            assert!(moved.1 >= before && moved.1 <= after, "{what}: {moved:?}");
            assert_eq!(fresh_times(&file), moved, "{what}");
        }
    });
}

#[test]
fn a_write_that_fails_moves_no_time() {
    for_queues(|queues| {
        let m = Mounted::fixed(65_536, queues);
        let file = m.open(true);
        let start = fresh_times(&file);
        m.driver
            .fail_if(|_, _, _| Some(std::io::Error::from_raw_os_error(libc::EIO)));
        file.write_at(b"x", 0).unwrap_err();
        file.write_at(b"x", 65_536).unwrap_err();
        assert_eq!(fresh_times(&file), start);
        assert_eq!(size(&file), 65_536);
    });
}

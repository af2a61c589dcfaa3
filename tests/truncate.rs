//! Explicit changes of the length, both ways, also on exports that writes do
//! not grow.

mod common;

use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::Poll;

use blkfuse::{BlockDriver, Extent, Features, Io, ReadBuf};
use common::client::{errno, size};
use common::sparse::{Exported, Sparse};
use common::{Call, Memory, Mounted, for_queues, pattern};

#[test]
fn the_length_becomes_exactly_what_was_asked_for() {
    for_queues(|queues| {
        for growable in [false, true] {
            let m = Mounted::with(Memory::patterned(70_001), queues, |b| b.growable(growable));
            let file = m.open(true);
            let mut model = pattern(0, 70_001);
            for len in [70_000, 4097, 1, 0, 3, 4096, 100_003, 99_999, 1 << 20, 512] {
                file.set_len(len).unwrap();
                model.resize(len as usize, 0);
                assert_eq!(size(&file), len);
                assert!(m.driver.bytes() == model, "{len}");
                let mut back = vec![9; len as usize + 100];
                let n = file.read_at(&mut back, 0).unwrap();
                assert!(back[..n] == model, "{len}");
                // By path, as well.
                nix::unistd::truncate(&m.path, len as i64 + 7).unwrap();
                model.resize(len as usize + 7, 0);
                assert_eq!(size(&m.open(false)), len + 7);
                assert!(m.driver.bytes() == model, "{len}");
            }
        }
    });
}

#[test]
fn lengths_beyond_all_disks() {
    for_queues(|queues| {
        let sparse = Sparse::new(100);
        let e = Exported::with(sparse.clone(), queues, |b| b);
        let file = e.open();
        for len in [5 << 40, (1 << 62) + 1, i64::MAX as u64, 100] {
            file.set_len(len).unwrap();
            assert_eq!((size(&file), sparse.length()), (len, len));
        }
        // The driver refuses.
        let m = Mounted::fixed(100, queues);
        let file = m.open(true);
        assert_eq!(errno(file.set_len(i64::MAX as u64)), libc::EFBIG);
        assert_eq!(size(&file), 100);
        assert_eq!(m.driver.bytes(), pattern(0, 100));
    });
}

#[test]
fn a_failure_leaves_the_length() {
    for_queues(|queues| {
        let m = Mounted::growable(50_000, queues);
        let file = m.open(true);
        m.driver.fail_if(|call, _, _| {
            (call == Call::Truncate).then(|| io::Error::from_raw_os_error(libc::ENOSPC))
        });
        assert_eq!(errno(file.set_len(60_000)), libc::ENOSPC);
        assert_eq!(errno(file.set_len(40_000)), libc::ENOSPC);
        assert_eq!(size(&file), 50_000);
        let mut back = vec![0; 60_000];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), 50_000);
        assert!(back[..50_000] == pattern(0, 50_000));
        m.driver.fail_never();
        file.set_len(40_000).unwrap();
        assert_eq!(size(&file), 40_000);
    });
}

#[test]
fn what_is_cut_off_does_not_come_back() {
    for_queues(|queues| {
        let m = Mounted::growable(100_000, queues);
        let file = m.open(true);
        file.set_len(5001).unwrap();
        file.write_all_at(b"far", 90_000).unwrap();
        let mut model = pattern(0, 5001);
        model.resize(90_000, 0);
        model.extend(b"far");
        let mut back = vec![1; 90_003];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == model);
        assert!(m.driver.bytes() == model);
    });
}

/// Writers that race a shrink either come before it, and their bytes are
/// gone, or after it, and are there: the area between the new end and the
/// first later write reads as zeroes.
#[test]
fn a_regrown_area_is_zero_although_writers_race_the_shrink() {
    const HEAD: usize = 8192;
    const LEN: usize = 1 << 20;
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for flags in [0, libc::O_DIRECT, 0] {
                let (file, stop) = (m.open_with(true, flags), &stop);
                scope.spawn(move || {
                    while !stop.load(SeqCst) {
                        match file.write_at(&[0xab; 70_000], LEN as u64 - 70_001) {
                            // As the end moves: whole, cut, or nothing of it.
                            Ok(n) => assert!(n > 0 && n <= 70_000),
                            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOSPC)),
                        }
                    }
                });
            }
            let file = m.open(true);
            for _ in 0..60 {
                file.set_len(HEAD as u64).unwrap();
                // No write reaches beyond the end, so until it grows again
                // nothing can be there.
                assert_eq!(m.driver.bytes().len(), HEAD);
                assert_eq!(size(&file), HEAD as u64);
                file.set_len(LEN as u64).unwrap();
                let bytes = m.driver.bytes();
                assert!(bytes[..HEAD] == pattern(0, HEAD));
                assert!(bytes[HEAD..LEN - 70_001].iter().all(|b| *b == 0));
                assert_eq!(bytes[LEN - 1], 0);
            }
            stop.store(true, SeqCst);
        });
    });
}

/// The driver is promised that nothing is being written while it shrinks; and
/// is held up in each of its calls to see whether that is so.
#[test]
fn the_driver_shrinks_only_while_nothing_is_being_written() {
    for_queues(|queues| {
        let m = Mounted::growable(100_000, queues);
        m.driver.hold();
        let order = std::thread::scope(|scope| {
            let (writer, shrinker) = (m.open(true), m.open(true));
            // In flight, so that the kernel has let go of its own lock.
            scope.spawn(move || {
                common::client::aio_write(&writer, &[(50_000, &[1; 10])]);
            });
            m.driver.wait_for_held(1);
            scope.spawn(move || shrinker.set_len(10).unwrap());
            m.driver.release();
            m.driver.calls.lock().unwrap()[0].0
        });
        assert_eq!(order, Call::Write);
        assert_eq!(m.driver.bytes(), pattern(0, 10));
    });
}

/// A driver that takes its time before it looks at what it was asked for.
struct Slow(Sparse);

impl Slow {
    async fn linger(&self) {
        for _ in 0..20 {
            let mut first = true;
            poll_fn(|cx| {
                if std::mem::take(&mut first) {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Ready(())
            })
            .await;
        }
    }
}

impl BlockDriver for Slow {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.length())
    }
    fn features(&self) -> Features {
        BlockDriver::features(&self.0)
    }
    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        self.linger().await;
        self.0.read(io, buf, offset).await
    }
    async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write(io, data, offset).await
    }
    async fn truncate(&self, io: &Io<'_>, length: u64) -> io::Result<()> {
        self.0.truncate(io, length).await
    }
    async fn block_status(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<Extent> {
        self.linger().await;
        self.0.block_status(io, offset, bytes).await
    }
}

/// Runs `look` in threads while the file shrinks and grows again.
fn while_shrinking(queues: usize, look: impl Fn(&File) + Sync) {
    let sparse = Sparse::new(LONG);
    sparse.put_block(0, 1);
    let e = Exported::with(Slow(sparse), queues, |b| b);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let (file, stop, look) = (e.open(), &stop, &look);
            scope.spawn(move || {
                let stopper = StopOnDrop(stop);
                while !stop.load(SeqCst) {
                    look(&file);
                }
                drop(stopper);
            });
        }
        let file = e.open();
        let _stopper = StopOnDrop(&stop);
        for _ in 0..200 {
            file.set_len(SHORT).unwrap();
            file.set_len(LONG).unwrap();
        }
    });
}

/// So that a thread's panic ends the others too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

const SHORT: u64 = 4096;
const LONG: u64 = 100 * 4096;

#[test]
fn readers_that_race_a_shrink_get_less_but_no_error() {
    for_queues(|queues| {
        while_shrinking(queues, |file| {
            let mut buf = vec![9; LONG as usize];
            let n = file.read_at(&mut buf, 0).unwrap();
            assert!(n >= SHORT as usize);
            assert!(buf[..SHORT as usize] == [1; SHORT as usize]);
            assert!(buf[SHORT as usize..n].iter().all(|b| *b == 0));
        });
    });
}

#[test]
fn looking_for_holes_while_the_file_shrinks_finds_them_or_the_end() {
    for_queues(|queues| {
        while_shrinking(queues, |file| {
            match common::client::seek(file, 50 * 4096, libc::SEEK_HOLE) {
                Ok(at) => assert_eq!(at, 50 * 4096),
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENXIO)),
            }
        });
    });
}

//! I/O on other files in the course of requests, which the queue does for a
//! driver.

#[path = "common/alone.rs"]
mod alone;
mod common;

use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::Poll;
use std::thread;

use alone::alone;
use blkfuse::{BlockDriver, Features, Io, ReadBuf};
use common::client::{aio_read, errno, fallocate};
use common::sparse::Exported;
use common::{eventually, for_transports_and_queues, pattern, skip};

/// Not a multiple of anything, and more than two of the largest requests.
const LEN: usize = (2 << 20) + 70_001;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// A device that is a part of a file.
struct Part {
    file: File,
    start: u64,
    /// What lies past the end of the file reads as zeroes.
    zeroes: bool,
    syncs: AtomicUsize,
}

impl Part {
    fn new(file: File, start: u64) -> Arc<Self> {
        Arc::new(Self {
            file,
            start,
            zeroes: true,
            syncs: AtomicUsize::new(0),
        })
    }
}

struct Handle(Arc<Part>);

impl BlockDriver for Handle {
    fn length(&self) -> io::Result<u64> {
        Ok(LEN as u64)
    }

    fn features(&self) -> Features {
        Features {
            write: true,
            truncate: false,
        }
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        let part = &*self.0;
        // In two pieces, one of which may be all.
        let first = buf.len().min(100_000);
        for len in [first, buf.len() - first] {
            let at = part.start + offset + buf.filled() as u64;
            io.read_at(part.file.as_fd(), buf, len, at).await?;
        }
        if part.zeroes {
            buf.zero_rest();
        }
        Ok(())
    }

    async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        let at = self.0.start + offset;
        io.write_at(self.0.file.as_fd(), data, at).await
    }

    async fn flush(&self, io: &Io<'_>) -> io::Result<()> {
        self.0.syncs.fetch_add(1, SeqCst);
        io.sync(self.0.file.as_fd(), false).await
    }

    async fn discard(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        let at = self.0.start + offset;
        io.discard(self.0.file.as_fd(), at, bytes).await
    }

    async fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        _may_unmap: bool,
    ) -> io::Result<()> {
        let at = self.0.start + offset;
        io.write_zeroes(self.0.file.as_fd(), at, bytes).await
    }
}

/// A file in the build's directory, which is on a real file system more often
/// than the temporary one.
fn scratch() -> tempfile::NamedTempFile {
    let program = std::env::current_exe().unwrap();
    tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap()
}

fn open(file: &tempfile::NamedTempFile, flags: i32) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags);
    options.open(file.path())
}

/// A file that holds the pattern from `start` on.
fn patterned(start: u64) -> tempfile::NamedTempFile {
    let file = scratch();
    file.as_file()
        .write_all_at(&pattern(0, LEN), start)
        .unwrap();
    file
}

fn bytes(file: &File, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    file.read_exact_at(&mut bytes, offset as u64).unwrap();
    bytes
}

#[test]
fn reads_and_writes_reach_the_file() {
    for_transports_and_queues(|transport, queues| {
        for (start, flags) in [(12_345, 0), (12_345, libc::O_DSYNC)] {
            let image = patterned(start);
            let part = Part::new(open(&image, flags).unwrap(), start);
            let exported = Exported::with(Handle(part), queues, |b| b.io_uring(transport));
            let file = exported.open();
            for (offset, len) in [
                (0, 1),
                (511, 4098),
                (99_999, 2),
                (1 << 20, 1 << 20),
                (7, LEN - 7),
            ] {
                let read = bytes(&file, offset, len);
                assert!(read == pattern(offset, len), "{len} bytes at {offset}");
            }
            for (offset, len) in [(0, 1), (4095, 4098), (300_000, 1 << 20), (LEN - 9, 9)] {
                let data = pattern(offset + 5, len);
                file.write_all_at(&data, offset as u64).unwrap();
                let stored = bytes(image.as_file(), start as usize + offset, len);
                assert!(stored == data, "{len} bytes at {offset}");
                assert!(bytes(&file, offset, len) == data, "{len} bytes at {offset}");
            }
        }
    });
}

#[test]
fn many_requests_at_once_get_their_own_bytes() {
    for_transports_and_queues(|transport, queues| {
        let image = patterned(4096);
        // Direct I/O does not complete at once.
        let Ok(direct) = open(&image, libc::O_DIRECT) else {
            return skip("no O_DIRECT in the build's directory");
        };
        let part = Part::new(direct, 4096);
        let exported = Exported::with(Handle(part), queues, |b| b.io_uring(transport));
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(&exported.path).unwrap();
        let place = |n: usize| n * 37 % 500 * 4096;
        let mut buffers = vec![vec![0; 8192]; 400];
        for round in buffers.chunks_mut(50).enumerate() {
            let (round, buffers) = round;
            let mut reads: Vec<_> = buffers
                .iter_mut()
                .enumerate()
                .map(|(n, buffer)| {
                    let memory = buffer.as_ptr().addr();
                    let start = memory.next_multiple_of(4096) - memory;
                    (place(round * 50 + n) as u64, &mut buffer[start..][..4096])
                })
                .collect();
            assert!(aio_read(&file, &mut reads).iter().all(|n| *n == 4096));
            for (offset, read) in &reads {
                assert!(**read == pattern(*offset as usize, 4096), "at {offset}");
            }
        }
    });
}

#[test]
fn syncs_discards_and_zeroing_reach_the_file() {
    alone("syncs_discards_and_zeroing_reach_the_file", || {
        for_transports_and_queues(|transport, queues| {
            let image = patterned(8192);
            let part = Part::new(open(&image, 0).unwrap(), 8192);
            let exported = Exported::with(Handle(part.clone()), queues, |b| b.io_uring(transport));
            let file = exported.open();
            file.sync_all().unwrap();
            assert_eq!(part.syncs.load(SeqCst), 1);
            for (mode, offset, len) in [
                (PUNCH, 65_536, 131_072),
                (PUNCH, 300_001, 5),
                (libc::FALLOC_FL_ZERO_RANGE, 400_000, 70_000),
            ] {
                fallocate(&file, mode, offset, len).unwrap();
                let (offset, len) = (offset as usize, len as usize);
                let stored = bytes(image.as_file(), 8192 + offset - 1, len + 2);
                assert_eq!(stored[0], pattern(offset - 1, 1)[0]);
                assert!(stored[1..=len].iter().all(|b| *b == 0), "{offset}");
                assert_eq!(stored[len + 1], pattern(offset + len, 1)[0]);
            }
            assert_eq!(image.as_file().metadata().unwrap().len(), 8192 + LEN as u64);
        });
    });
}

#[test]
fn what_a_file_cannot_zero_is_written() {
    for_transports_and_queues(|transport, queues| {
        // No memory file can ZERO_RANGE, and it has no disk to wait for.
        let image = nix::sys::memfd::memfd_create(c"image", nix::sys::memfd::MFdFlags::empty());
        let image = File::from(image.unwrap());
        image.write_all_at(&pattern(0, LEN), 0).unwrap();
        let part = Part::new(image.try_clone().unwrap(), 0);
        let exported = Exported::with(Handle(part), queues, |b| b.io_uring(transport));
        let file = exported.open();
        fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 1000, 200_000).unwrap();
        let stored = bytes(&image, 0, LEN);
        assert!(stored[..1000] == pattern(0, 1000));
        assert!(stored[1000..201_000].iter().all(|b| *b == 0));
        assert!(stored[201_000..] == pattern(201_000, LEN - 201_000));
    });
}

#[test]
fn a_file_that_is_too_short_fills_with_zeroes_if_the_driver_wants_it() {
    for_transports_and_queues(|transport, queues| {
        for zeroes in [true, false] {
            let image = patterned(0);
            image.as_file().set_len(70_000).unwrap();
            let part = Arc::new(Part {
                file: open(&image, 0).unwrap(),
                start: 0,
                zeroes,
                syncs: AtomicUsize::new(0),
            });
            let exported = Exported::with(Handle(part), queues, |b| b.io_uring(transport));
            let file = exported.open();
            assert!(bytes(&file, 0, 70_000) == pattern(0, 70_000));
            for (offset, there) in [(69_000, 1000), (70_000, 0), (1 << 20, 0)] {
                let mut read = vec![0xee; 9000];
                let result = file.read_exact_at(&mut read, offset as u64);
                if zeroes {
                    result.unwrap();
                    assert!(read[..there] == pattern(offset, there));
                    assert!(read[there..].iter().all(|b| *b == 0));
                } else {
                    // Whatever it succeeds with, it has not set all bytes.
                    assert_eq!(errno(result), libc::EIO);
                }
            }
        }
    });
}

#[test]
fn errors_are_the_clients() {
    for_transports_and_queues(|transport, queues| {
        let image = patterned(0);
        let write_only = File::options().write(true).open(image.path()).unwrap();
        let exported = Exported::with(Handle(Part::new(write_only, 0)), queues, |b| {
            b.io_uring(transport)
        });
        let file = exported.open();
        let mut byte = [0];
        assert_eq!(errno(file.read_at(&mut byte, 0)), libc::EBADF);
        file.write_all_at(&[1], 0).unwrap();

        let read_only = File::open(image.path()).unwrap();
        let exported = Exported::with(Handle(Part::new(read_only, 0)), queues, |b| {
            b.io_uring(transport)
        });
        let file = exported.open();
        assert_eq!(errno(file.write_at(&byte, 0)), libc::EBADF);
        assert_eq!(errno(fallocate(&file, PUNCH, 0, 4096)), libc::EBADF);
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1]);
    });
}

/// A device whose reads begin to read a pipe, give that up at once, and fail.
struct Impatient {
    pipe: OwnedFd,
    gave_up: Arc<AtomicBool>,
    forgets: bool,
}

impl BlockDriver for Impatient {
    fn length(&self) -> io::Result<u64> {
        Ok(4096)
    }

    fn features(&self) -> Features {
        Features {
            write: true,
            truncate: false,
        }
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, _: u64) -> io::Result<()> {
        let len = buf.len();
        let read = io.read_at(self.pipe.as_fd(), buf, len, 0);
        if self.forgets {
            let mut read = Box::pin(read);
            poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
            begun().await;
            std::mem::forget(read);
        } else {
            let mut read = pin!(read);
            poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
            begun().await;
        }
        self.gave_up.store(true, SeqCst);
        Err(io::ErrorKind::TimedOut.into())
    }
}

/// Lets the queue begin what waits.
async fn begun() {
    let mut turns = 0;
    poll_fn(|cx| {
        turns += 1;
        cx.waker().wake_by_ref();
        match turns {
            0..5 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    })
    .await;
}

#[test]
fn a_request_does_not_end_while_the_kernel_uses_its_memory() {
    for_transports_and_queues(|transport, queues| {
        for forgets in [false, true] {
            let (reader, mut writer) = io::pipe().unwrap();
            let gave_up = Arc::new(AtomicBool::new(false));
            let driver = Impatient {
                pipe: reader.into(),
                gave_up: gave_up.clone(),
                forgets,
            };
            let exported = Exported::with(driver, queues, |b| b.io_uring(transport));
            let export = exported.export.as_ref().unwrap();
            let file = exported.open();
            // The drain would hold up its close.
            let client = thread::spawn(move || (errno(file.read_at(&mut [0; 100], 0)), file));
            eventually("the driver gives up", || gave_up.load(SeqCst));
            export.drain_begin().unwrap();
            assert!(export.drain_poll());
            assert!(!client.is_finished());
            writer.write_all(&[7; 4096]).unwrap();
            let (outcome, _file) = client.join().unwrap();
            assert_eq!(outcome, libc::ETIMEDOUT);
            eventually("nothing is in flight", || !export.drain_poll());
            export.drain_end().unwrap();
        }
    });
}

//! Reading: every offset and length, every way of reading, every failure.

mod common;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use blkfuse::{BlockDriver, Io, ReadBuf};
use common::client::{aio_read, errno};
use common::sparse::{Exported, Sparse};
use common::{Call, Memory, Mounted, for_queues, pattern};
use memmap2::MmapOptions;
use nix::sys::uio::preadv;

/// Not a multiple of anything, and more than two of the largest requests.
const LEN: usize = (2 << 20) + 70_001;

/// What a read of `len` bytes at `offset` must give.
fn expected(offset: usize, len: usize) -> Vec<u8> {
    let end = LEN.min(offset + len);
    pattern(offset.min(end), end - offset.min(end))
}

fn read(file: &File, offset: usize, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    let n = file.read_at(&mut buf, offset as u64).unwrap();
    assert!(buf[n..].iter().all(|b| *b == 0xee), "bytes past the count");
    buf.truncate(n);
    buf
}

const OFFSETS: [usize; 12] = [
    0,
    1,
    511,
    512,
    4095,
    4097,
    65_536,
    (1 << 20) - 1,
    1 << 20,
    LEN - 4096,
    LEN - 1,
    LEN,
];
const LENGTHS: [usize; 10] = [
    1,
    2,
    511,
    513,
    4096,
    4097,
    131_072,
    1 << 20,
    (1 << 20) + 1,
    LEN + 5000,
];

#[test]
fn any_offset_and_length() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        for file in [m.open(false), m.open_with(false, libc::O_DIRECT)] {
            for offset in OFFSETS {
                for len in LENGTHS {
                    let what = format!("{len} bytes at {offset}");
                    assert!(read(&file, offset, len) == expected(offset, len), "{what}");
                }
            }
        }
    });
}

#[test]
fn larger_reads_come_in_pieces_of_the_largest_request() {
    const MAX: usize = 64 << 10;
    for_queues(|queues| {
        let m = Mounted::with(Memory::patterned(LEN), queues, |b| {
            b.max_request(MAX as u32)
        });
        assert_eq!(m.export().max_request(), MAX as u32);
        let line = common::mount_line(&m.path).unwrap();
        assert!(line.ends_with(",max_read=65536"), "{line}");
        let file = m.open_with(false, libc::O_DIRECT);
        for (offset, len) in [(0, 1 << 20), (4097, 1 << 20), (0, LEN)] {
            m.driver.calls.lock().unwrap().clear();
            assert!(read(&file, offset, len) == expected(offset, len));
            let calls = m.driver.calls.lock().unwrap().clone();
            let mut reads: Vec<_> = calls.iter().filter(|c| c.0 == Call::Read).collect();
            reads.sort_by_key(|(_, offset, _)| *offset);
            assert!(reads.iter().all(|(_, _, n)| *n <= MAX as u64), "{reads:?}");
            let mut next = offset as u64;
            for (_, at, n) in reads {
                assert_eq!(*at, next);
                next += n;
            }
            assert_eq!(next, (offset + len) as u64);
        }
    });
}

#[test]
fn many_at_once_through_io_uring() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let file = m.open_with(false, libc::O_DIRECT);
        let mut buffers = vec![vec![0; 300_007]; 64];
        let offset = |i: usize| i * 36_893 % LEN;
        let mut reads: Vec<_> = buffers
            .iter_mut()
            .enumerate()
            .map(|(i, b)| (offset(i) as u64, &mut b[..]))
            .collect();
        let results = aio_read(&file, &mut reads);
        for (i, (result, buffer)) in results.iter().zip(&buffers).enumerate() {
            let expected = expected(offset(i), buffer.len());
            assert_eq!(*result, expected.len() as i32, "read {i}");
            assert!(buffer[..expected.len()] == expected, "read {i}");
        }
    });
}

#[test]
fn scattered_into_pieces_of_odd_sizes() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(false, flags);
            let mut pieces: Vec<_> = [1, 4096, 0, 333, 200_000, 17]
                .map(|n| vec![0; n])
                .into_iter()
                .collect();
            let mut slices: Vec<_> = pieces.iter_mut().map(|p| IoSliceMut::new(p)).collect();
            let n = preadv(&file, &mut slices, 12_345).unwrap();
            assert_eq!(n, 204_447);
            assert!(pieces.concat() == pattern(12_345, n));
        }
    });
}

#[test]
fn mapped_private_and_shared() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let file = m.open(true);
        // SAFETY: the file is written only below, while no reference into the
        // maps exists.
        let (private, shared) = unsafe {
            (
                MmapOptions::new().map_copy_read_only(&file).unwrap(),
                MmapOptions::new().map_raw_read_only(&file).unwrap(),
            )
        };
        assert!(private[..] == pattern(0, LEN));
        let at = |i: usize| {
            // SAFETY: within the map, which lives; volatile since the file
            // changes under it.
            unsafe { shared.as_ptr().add(i).read_volatile() }
        };
        assert!((0..LEN).map(at).eq(pattern(0, LEN)));
        // A write through a descriptor shows in a shared map.
        file.write_all_at(b"changed", 5000).unwrap();
        assert!((5000..5007).map(at).eq(*b"changed"));
    });
}

#[test]
fn a_read_only_export_can_be_mapped_shared() {
    for_queues(|queues| {
        let m = Mounted::read_only(10_001, queues);
        let file = m.open(false);
        // SAFETY: nobody writes to the file.
        let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
        assert!(map[..] == pattern(0, 10_001));
    });
}

#[test]
fn short_at_the_end_and_empty_past_it() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(false, flags);
            assert_eq!(read(&file, LEN - 10, 4096), pattern(LEN - 10, 10));
            for past in [LEN, LEN + 1, LEN + 4096, 1 << 40] {
                assert_eq!(read(&file, past, 4096), []);
            }
            let mut buf = [0; 100];
            let mut reads = [(LEN as u64 - 10, &mut buf[..])];
            assert_eq!(aio_read(&file, &mut reads), [10]);
            let mut reads = [(LEN as u64, &mut buf[..])];
            assert_eq!(aio_read(&file, &mut reads), [0]);
        }
        // The engine, not the driver, knows where the end is.
        let calls = m.driver.calls.lock().unwrap().clone();
        assert!(calls.iter().all(|(_, o, n)| o + n <= LEN as u64));
    });
}

#[test]
fn the_far_end_of_all_offsets_is_empty_or_refused() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let last = i64::MAX as u64;
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(false, flags);
            let mut buf = [1; 4096];
            for offset in [1 << 62, (1 << 62) + 1, last - 4096] {
                assert_eq!(file.read_at(&mut buf, offset).unwrap(), 0);
            }
            // The sum overflows.
            for offset in [last - 100, last] {
                match file.read_at(&mut buf, offset) {
                    Ok(n) => assert_eq!(n, 0),
                    Err(e) => assert!(
                        [libc::EINVAL, libc::EOVERFLOW].contains(&e.raw_os_error().unwrap()),
                        "{e}"
                    ),
                }
            }
            assert_eq!(errno(file.read_at(&mut buf, last + 1)), libc::EINVAL);
        }
        // And where there is such an end, it can be read.
        let sparse = Sparse::new(last);
        sparse.put_block(last / 4096, 9);
        let e = Exported::with(sparse, queues, |b| b);
        let mut buf = [0; 200];
        e.open().read_exact_at(&mut buf, last - 200).unwrap();
        assert_eq!(buf, [9; 200]);
    });
}

#[test]
fn an_error_of_one_sector_is_eio_there_and_nowhere_else() {
    const BAD: u64 = 40 * 512;
    for_queues(|queues| {
        let m = Mounted::fixed(1 << 20, queues);
        m.driver.fail_if(|call, offset, len| {
            let hits = call == Call::Read && offset < BAD + 512 && offset + len > BAD;
            hits.then(|| io::Error::from_raw_os_error(libc::EIO))
        });
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(false, flags);
            for sector in 0..64 {
                let mut buf = [0; 512];
                let result = file.read_exact_at(&mut buf, sector * 512);
                if sector * 512 == BAD {
                    assert_eq!(errno(result), libc::EIO);
                    assert_eq!(buf, [0; 512]);
                } else {
                    result.unwrap();
                    assert_eq!(buf[..], pattern(sector as usize * 512, 512));
                }
            }
            for (offset, len) in [(BAD - 1, 2), (BAD + 511, 2), (0, 1 << 20)] {
                let mut buf = vec![0; len];
                assert_eq!(errno(file.read_exact_at(&mut buf, offset)), libc::EIO);
            }
            for (offset, len) in [(0, BAD), (BAD + 512, 100_000)] {
                let mut buf = vec![0; len as usize];
                file.read_exact_at(&mut buf, offset).unwrap();
            }
        }
        m.driver.fail_never();
        let mut buf = [0; 512];
        m.open(false).read_exact_at(&mut buf, BAD).unwrap();
        assert_eq!(buf[..], pattern(BAD as usize, 512));
    });
}

#[test]
fn other_errors_of_the_driver_arrive_as_they_are_if_they_can() {
    for_queues(|queues| {
        let m = Mounted::fixed(8192, queues);
        let file = m.open(false);
        for (says, arrives) in [
            (libc::ENOMEM, libc::ENOMEM),
            (libc::EBADMSG, libc::EBADMSG),
            (libc::ETIMEDOUT, libc::ETIMEDOUT),
            // It would switch the operation off for good.
            (libc::ENOSYS, libc::EOPNOTSUPP),
            // No errno at all.
            (0, libc::EIO),
            (-5, libc::EIO),
            (512, libc::EIO),
            (i32::MAX, libc::EIO),
        ] {
            m.driver
                .fail_if(move |_, _, _| Some(io::Error::from_raw_os_error(says)));
            let result = file.read_at(&mut [0; 100], 0);
            assert_eq!(errno(result), arrives, "the driver said {says}");
        }
        m.driver.fail_if(|_, _, _| Some(io::Error::other("odd")));
        assert_eq!(errno(file.read_at(&mut [0; 100], 0)), libc::EIO);
        m.driver.fail_never();
        file.read_exact_at(&mut [0; 100], 0).unwrap();
    });
}

/// Says Ok to every read, but touches the buffer only of those that end within
/// the first MiB.
struct Lazy;

impl BlockDriver for Lazy {
    fn length(&self) -> io::Result<u64> {
        Ok(2 << 20)
    }

    async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 <= 1 << 20 {
            buf.bytes_mut().fill(0x5e);
        }
        Ok(())
    }
}

#[test]
fn a_read_that_the_driver_did_not_fill_is_eio_and_never_what_was_there() {
    for_queues(|queues| {
        let e = Exported::with(Lazy, queues, |b| b.writable(false));
        for flags in [0, libc::O_DIRECT] {
            use std::os::unix::fs::OpenOptionsExt;
            let file = File::options()
                .read(true)
                .custom_flags(flags)
                .open(&e.path)
                .unwrap();
            for len in [1, 512, 65_536, 1 << 20] {
                let mut buf = vec![0; len];
                file.read_exact_at(&mut buf, 0).unwrap();
                assert!(buf.iter().all(|b| *b == 0x5e));
                let mut buf = vec![0x11; len];
                assert_eq!(errno(file.read_at(&mut buf, 1 << 20)), libc::EIO);
                assert!(!buf.contains(&0x5e), "another request's bytes");
                let result = aio_read(&file, &mut [(1 << 20, &mut buf)]);
                assert_eq!(result, [-libc::EIO]);
                assert!(!buf.contains(&0x5e), "another request's bytes");
            }
        }
        // A part that was filled before the failure may arrive, no more.
        let file = File::open(&e.path).unwrap();
        let mut buf = vec![0x11; 2 << 20];
        match file.read_at(&mut buf, 0) {
            Ok(n) => {
                assert!(n <= 1 << 20, "{n}");
                assert!(buf[..n].iter().all(|b| *b == 0x5e));
            }
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO)),
        }
    });
}

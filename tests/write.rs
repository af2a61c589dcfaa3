//! Writing: every offset and length, every way of writing; the fixed end; a
//! read-only file.

#[path = "common/alone.rs"]
mod alone;
mod common;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::sync::atomic::Ordering::SeqCst;
use std::time::SystemTime;

use alone::alone;
use common::client::{aio_read, aio_write, errno, fallocate, size};
use common::sparse::{BLOCK, Exported, Sparse};
use common::{Call, Mounted, for_queues, pattern};
use memmap2::MmapMut;
use nix::sys::uio::pwritev;

const LEN: usize = (2 << 20) + 70_001;

/// Bytes that differ from the pattern of a fresh device.
fn other(seed: usize, len: usize) -> Vec<u8> {
    pattern(seed + 100_003, len).iter().map(|b| !b).collect()
}

#[test]
fn any_offset_and_length() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let mut model = pattern(0, LEN);
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(true, flags);
            for offset in [0, 1, 511, 4097, 65_536, (1 << 20) - 1, LEN - 4096] {
                for len in [1, 511, 4096, 4097, 131_073, 1 << 20, (2 << 20) + 3] {
                    let len = len.min(LEN - offset);
                    let data = other(offset + len + flags as usize, len);
                    file.write_all_at(&data, offset as u64).unwrap();
                    model[offset..offset + len].copy_from_slice(&data);
                }
                assert!(m.driver.bytes() == model, "at {offset}");
            }
        }
    });
}

#[test]
fn far_out_on_a_huge_device() {
    for_queues(|queues| {
        let sparse = Sparse::new((5 << 40) + 1);
        let e = Exported::with(sparse.clone(), queues, |b| b);
        let file = e.open();
        for offset in [(1 << 32) - 3, (4 << 40) + 511, (5 << 40) - 8] {
            file.write_all_at(b"far out", offset).unwrap();
            let mut back = [1; 9];
            let n = file.read_at(&mut back, offset - 1).unwrap();
            assert_eq!(&back[..n], &b"\0far out\0"[..n]);
            assert!(n >= 8 && sparse.has_block(offset / BLOCK));
        }
        assert_eq!(file.write_at(b"xyz", 5 << 40).unwrap(), 1);
        assert_eq!(errno(file.write_at(b"x", (5 << 40) + 1)), libc::ENOSPC);
    });
}

#[test]
fn gathered_from_pieces_of_odd_sizes() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let pieces = [1, 4096, 0, 333, 200_000, 17].map(|n| other(n, n));
        let slices = pieces.each_ref().map(|p| IoSlice::new(p));
        for (flags, offset) in [(0, 777), (libc::O_DIRECT, 1_000_001)] {
            let file = m.open_with(true, flags);
            let n = pwritev(&file, &slices, offset as i64).unwrap();
            assert_eq!(n, 204_447);
            assert!(m.driver.bytes()[offset..offset + n] == pieces.concat());
        }
    });
}

#[test]
fn many_at_once_through_io_uring() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let file = m.open_with(true, libc::O_DIRECT);
        // Neighbours, none of them aligned.
        let data = other(0, LEN);
        let writes: Vec<_> = data
            .chunks(33_333)
            .enumerate()
            .map(|(i, c)| ((i * 33_333) as u64, c))
            .collect();
        let results = aio_write(&file, &writes);
        for (result, (_, data)) in results.iter().zip(&writes) {
            assert_eq!(*result, data.len() as i32);
        }
        assert!(m.driver.bytes() == data);
    });
}

#[test]
fn writers_of_slices_of_one_block_lose_nothing() {
    const SLICE: usize = 37;
    const WRITERS: usize = 12;
    for_queues(|queues| {
        let m = Mounted::fixed(4096, queues);
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let flags = if writer % 2 == 0 { 0 } else { libc::O_DIRECT };
                let file = m.open_with(true, flags);
                scope.spawn(move || {
                    let at = (writer * SLICE) as u64;
                    for round in 0..200 {
                        let data = [(writer * 20 + round) as u8; SLICE];
                        file.write_all_at(&data, at).unwrap();
                        let mut back = [0; SLICE];
                        file.read_exact_at(&mut back, at).unwrap();
                        assert_eq!(back, data);
                    }
                });
            }
        });
        let bytes = m.driver.bytes();
        for writer in 0..WRITERS {
            let slice = &bytes[writer * SLICE..][..SLICE];
            assert_eq!(slice, [(writer * 20 + 199) as u8; SLICE]);
        }
        let rest = WRITERS * SLICE;
        assert_eq!(bytes[rest..], pattern(rest, 4096 - rest));
    });
}

/// What has been called, without what merely looks.
fn changes(m: &Mounted) -> Vec<Call> {
    let calls = std::mem::take(&mut *m.driver.calls.lock().unwrap());
    let calls = calls.into_iter().map(|(call, ..)| call);
    calls.filter(|c| *c != Call::Read).collect()
}

#[test]
fn a_synchronous_write_is_flushed_before_it_returns() {
    alone("a_synchronous_write_is_flushed_before_it_returns", || {
        for_queues(|queues| {
            let m = Mounted::fixed(LEN, queues);
            for flags in [
                libc::O_SYNC,
                libc::O_DSYNC,
                libc::O_SYNC | libc::O_DIRECT,
                libc::O_DSYNC | libc::O_DIRECT,
            ] {
                let file = m.open_with(true, flags);
                changes(&m);
                file.write_all_at(b"sync", 4096).unwrap();
                assert_eq!(changes(&m), [Call::Write, Call::Flush], "{flags:#o}");
                assert_eq!(aio_write(&file, &[(8192, b"more")]), [4]);
                assert_eq!(changes(&m), [Call::Write, Call::Flush], "{flags:#o}");

                m.driver.fail_if(|call, _, _| {
                    (call == Call::Flush).then(|| io::Error::from_raw_os_error(libc::EIO))
                });
                assert_eq!(errno(file.write_all_at(b"sync", 0)), libc::EIO);
                m.driver.fail_never();
            }
            let file = m.open(true);
            changes(&m);
            file.write_all_at(b"lazy", 4096).unwrap();
            assert_eq!(changes(&m), [Call::Write], "nobody asked for a flush");
            let slices = [IoSlice::new(b"one write of many")];
            // SAFETY: the slices live; the flag asks for O_DSYNC of this write.
            let n = unsafe {
                libc::pwritev2(
                    file.as_raw_fd(),
                    slices.as_ptr().cast(),
                    1,
                    0,
                    libc::RWF_DSYNC,
                )
            };
            assert_eq!(n, 17);
            assert_eq!(changes(&m), [Call::Write, Call::Flush]);
        });
    });
}

#[test]
fn a_shared_map_reaches_the_image() {
    for_queues(|queues| {
        let m = Mounted::fixed(100_001, queues);
        let mut model = pattern(0, 100_001);
        let file = m.open(true);
        // SAFETY: nobody else changes the file while references exist.
        let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        map[5000..5010].copy_from_slice(b"from a map");
        map[100_000] = b'!';
        map.flush().unwrap();
        model[5000..5010].copy_from_slice(b"from a map");
        model[100_000] = b'!';
        assert!(m.driver.bytes() == model);
        assert!(m.driver.flushes.load(SeqCst) > 0, "msync makes durable");

        // Without msync: when somebody reads it through a descriptor, by
        // fsync, and at the latest at the end of the map.
        map[6000] = b'r';
        let mut byte = [0];
        m.open(false).read_exact_at(&mut byte, 6000).unwrap();
        assert_eq!(byte, *b"r");
        map[7000] = b's';
        file.sync_all().unwrap();
        assert_eq!(m.driver.bytes()[7000], b's');
        map[8000] = b'u';
        drop((map, file));
        model[6000] = b'r';
        model[7000] = b's';
        model[8000] = b'u';
        m.open(true).sync_all().unwrap();
        // The last page's rest, beyond the end, is nobody's.
        assert!(m.driver.bytes() == model);
        assert_eq!(size(&m.open(false)), 100_001);
    });
}

#[test]
fn a_failure_to_write_a_map_back_is_reported_by_msync() {
    for_queues(|queues| {
        let m = Mounted::fixed(8192, queues);
        let file = m.open(true);
        // SAFETY: nobody else changes the file while references exist.
        let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        map[10] = b'x';
        m.driver.fail_if(|call, _, _| {
            (call == Call::Write).then(|| io::Error::from_raw_os_error(libc::EIO))
        });
        assert_eq!(errno(map.flush()), libc::EIO);
        m.driver.fail_never();
        map[10] = b'y';
        map.flush().unwrap();
        assert_eq!(m.driver.bytes()[10], b'y');
    });
}

#[test]
fn descriptors_see_each_others_writes_at_once() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let files = [
            m.open(true),
            m.open_with(true, libc::O_DIRECT),
            m.open(true).try_clone().unwrap(),
        ];
        for round in 0..90 {
            let data = [round as u8; 5000];
            files[round % 3].write_all_at(&data, 4000).unwrap();
            for reader in &files {
                let mut back = [0; 5000];
                reader.read_exact_at(&mut back, 4000).unwrap();
                assert!(back == data, "round {round}");
            }
        }
    });
}

#[test]
fn a_write_across_the_fixed_end_is_cut_and_one_behind_it_refused() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let end = LEN as u64;
        for flags in [0, libc::O_DIRECT] {
            let file = m.open_with(true, flags);
            assert_eq!(file.write_at(&[7; 4096], end - 10).unwrap(), 10);
            assert_eq!(m.driver.bytes()[LEN - 11..].len(), 11);
            assert_eq!(m.driver.bytes()[LEN - 10..], [7; 10]);
            // More than one request long.
            let big = vec![8; 3 << 20];
            assert_eq!(file.write_at(&big, 100).unwrap(), LEN - 100);
            assert!(m.driver.bytes()[100..].iter().all(|b| *b == 8));
            for offset in [end, end + 1, end + 4096, 1 << 40, 1 << 62] {
                let result = file.write_at(b"beyond", offset);
                assert_eq!(errno(result), libc::ENOSPC, "at {offset}");
            }
            let result = aio_write(&file, &[(end, b"beyond"), (1 << 40, b"far")]);
            assert_eq!(result, [-libc::ENOSPC, -libc::ENOSPC]);
            // An asynchronous one is cut, or fails: but it stays within.
            let result = aio_write(&file, &[(end - 20, &[9; 4096])]);
            assert!(result == [20] || result[0] < 0, "{result:?}");
            assert_eq!(m.driver.bytes().len(), LEN);
            assert_eq!(size(&file), end);
        }
        let appender = OpenOptions::new().append(true).open(&m.path).unwrap();
        assert_eq!(errno((&appender).write(b"more")), libc::ENOSPC);
        assert_eq!(size(&appender), end);
        let resized = m.driver.calls.lock().unwrap().clone();
        assert!(resized.iter().all(|(c, ..)| *c != Call::Truncate));
    });
}

#[test]
fn o_trunc_leaves_a_fixed_size_alone() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let open = || {
            OpenOptions::new()
                .write(true)
                .read(true)
                .truncate(true)
                .open(&m.path)
                .unwrap()
        };
        assert_eq!(size(&open()), LEN as u64);
        assert!(m.driver.bytes() == pattern(0, LEN));
        // Without any stat in between.
        let mut back = vec![0; LEN];
        open().read_exact_at(&mut back, 0).unwrap();
        assert!(back == pattern(0, LEN));
        open().write_all_at(b"written", 5000).unwrap();
        assert_eq!(m.driver.bytes()[5000..5007], *b"written");
        fs::write(&m.path, b"by fs::write").unwrap();
        assert_eq!(m.driver.bytes()[..12], *b"by fs::write");
        assert_eq!(m.driver.bytes().len(), LEN);
    });
}

#[test]
fn an_ignored_o_trunc_takes_nothing_from_others() {
    const PART: usize = 4096;
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        let other = m.open_with(true, libc::O_DIRECT);
        assert_eq!(size(&other), LEN as u64);
        let shared = m.open(true);
        // SAFETY: nothing else changes the file's length.
        let mut map = unsafe { MmapMut::map_mut(&shared) }.unwrap();
        map[9000..9006].copy_from_slice(b"mapped");
        // Not yet written back; somebody else opens the file anew.
        drop(
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(&m.path)
                .unwrap(),
        );
        // No stat in between: asynchronous reads go by the kernel's length.
        let mut data = vec![0; PART];
        let read = aio_read(&other, &mut [(4 * PART as u64, &mut data)]);
        assert_eq!(read, [PART as i32]);
        assert_eq!(data, pattern(4 * PART, PART));
        map.flush().unwrap();
        assert_eq!(m.driver.bytes()[9000..9006], *b"mapped");
        // An explicit truncation is another thing.
        drop(map);
        shared.set_len(0).unwrap();
        assert_eq!(m.driver.bytes().len(), 0);
    });
}

/// The kernel takes O_TRUNC for granted and forgets the length until it asks
/// again. When an asynchronous write fails meanwhile it "restores" what it
/// believes: it truncates the file to nothing.
#[test]
fn a_failed_write_after_o_trunc_does_not_empty_a_fixed_image() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        for flags in [0, libc::O_DIRECT] {
            let file = OpenOptions::new()
                .write(true)
                .truncate(true)
                .custom_flags(flags)
                .open(&m.path)
                .unwrap();
            m.driver.fail_if(|call, _, _| {
                (call == Call::Write).then(|| io::Error::from_raw_os_error(libc::EIO))
            });
            assert_eq!(aio_write(&file, &[(4096, b"lost")]), [-libc::EIO]);
            m.driver.fail_never();
            assert!(m.driver.bytes() == pattern(0, LEN), "the image is intact");
            assert_eq!(size(&file), LEN as u64);
            // What is asked for explicitly happens.
            file.set_len(LEN as u64 - 1).unwrap();
            assert_eq!(m.driver.bytes().len(), LEN - 1);
            m.driver.set_bytes(pattern(0, LEN));
            m.export().resized().unwrap();
        }
    });
}

#[test]
fn a_failed_write_is_reported_and_leaves_the_rest_alone() {
    for_queues(|queues| {
        let m = Mounted::fixed(LEN, queues);
        for (says, arrives) in [
            (libc::EIO, libc::EIO),
            (libc::ENOSPC, libc::ENOSPC),
            (libc::EDQUOT, libc::EDQUOT),
            (libc::ENOSYS, libc::EOPNOTSUPP),
        ] {
            m.driver.fail_if(move |call, offset, len| {
                let hits = call == Call::Write && offset <= 8192 && offset + len > 8192;
                hits.then(|| io::Error::from_raw_os_error(says))
            });
            for flags in [0, libc::O_DIRECT] {
                let file = m.open_with(true, flags);
                assert_eq!(errno(file.write_at(&[1; 512], 8192)), arrives);
                file.write_all_at(&pattern(0, 8192), 0).unwrap();
                file.write_all_at(&pattern(8193, 512), 8193).unwrap();
            }
        }
        assert!(m.driver.bytes() == pattern(0, LEN));
    });
}

#[test]
fn a_read_only_file_can_be_changed_by_nobody() {
    for_queues(|queues| {
        let m = Mounted::read_only(10_000, queues);
        let path = CString::new(m.path.as_os_str().as_bytes()).unwrap();
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
            // SAFETY: a terminated path; std refuses some of the flags itself.
            let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
            assert_eq!(fd, -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EROFS));
        }
        let chmod = fs::set_permissions(&m.path, Permissions::from_mode(0o600));
        assert_eq!(errno(chmod), libc::EROFS);
        let chown = std::os::unix::fs::chown(&m.path, Some(1), None);
        assert_eq!(errno(chown), libc::EROFS);
        // SAFETY: a terminated path.
        assert_eq!(unsafe { libc::truncate(path.as_ptr(), 0) }, -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EROFS));

        let file = m.open(false);
        let now = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        assert_eq!(errno(file.set_times(now)), libc::EROFS);
        assert!([libc::EBADF, libc::EINVAL].contains(&errno(file.set_len(0))));
        assert_eq!(errno(fallocate(&file, 0, 0, 20_000)), libc::EBADF);
        assert_eq!(errno(file.write_at(b"x", 0)), libc::EBADF);
        assert_eq!(
            errno(File::open(&m.path).unwrap().write_at(b"x", 0)),
            libc::EBADF
        );
        // SAFETY: nothing is mapped, since that must fail.
        let map = unsafe { MmapMut::map_mut(&file) };
        assert_eq!(errno(map), libc::EACCES);
        assert!(m.driver.bytes() == pattern(0, 10_000));
        // fsync of a file that nobody can have written to succeeds.
        file.sync_all().unwrap();
        assert_eq!(m.driver.flushes.load(SeqCst), 0);
    });
}

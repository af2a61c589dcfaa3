//! The driver for raw images: regular files and block devices.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use blkfuse::{Extent, Io, ReadBuf};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::direct::Direct;

/// A raw image and what was asked for it.
#[derive(Debug)]
pub struct Raw {
    /// Goes through the page cache; also for everything that is not I/O.
    file: File,
    /// Goes around the page cache, where that is wanted and possible.
    direct: Option<Direct>,
    /// For looking for holes and the end: that moves a descriptor's position
    /// and takes its lock, which would be one for all queues. Reads and writes
    /// carry their own position and do not care.
    seek: File,
    block_device: bool,
    block_size: u32,
    /// Whether space may be given back.
    discard: bool,
    /// The length was changed since the last flush.
    resized: AtomicBool,
    /// The errno of the first flush that failed, or 0.
    flush_error: AtomicI32,
}

impl Raw {
    /// `file`, `direct` and `seek` are separately opened descriptors of the
    /// image that `metadata` describes.
    pub fn new(
        file: File,
        direct: Option<File>,
        seek: File,
        metadata: &Metadata,
        discard: bool,
    ) -> Self {
        Self {
            direct: direct.map(|file| Direct::new(file, metadata)),
            file,
            seek,
            block_device: metadata.file_type().is_block_device(),
            block_size: block_size(metadata.blksize()),
            discard,
            resized: AtomicBool::new(false),
            flush_error: AtomicI32::new(0),
        }
    }

    pub fn length(&self) -> io::Result<u64> {
        if self.block_device {
            // The status of a device node knows no length.
            return (&self.seek).seek(SeekFrom::End(0));
        }
        Ok(self.file.metadata()?.len())
    }

    pub fn allocated_size(&self) -> io::Result<Option<u64>> {
        if self.block_device {
            return Ok(None);
        }
        // st_blocks counts in 512 bytes, whatever the file system's blocks.
        Ok(Some(self.file.metadata()?.blocks() * 512))
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// A block device has the length it has.
    pub fn can_truncate(&self) -> bool {
        !self.block_device
    }

    /// The image itself.
    pub fn backing_file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        let mut direct = self.direct.as_ref();
        while buf.filled() < buf.len() {
            let at = offset + buf.filled() as u64;
            let (file, len) = self.route(direct, buf.unfilled(), at);
            match io.read_at(file.as_fd(), buf, len, at).await {
                // The image was cut short behind our back.
                Ok(n) if n < len => buf.zero_rest(),
                Ok(_) => {}
                Err(e) => direct = retry(e, direct)?,
            }
        }
        Ok(())
    }

    pub async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        let mut direct = self.direct.as_ref();
        while done < data.len() {
            let at = offset + done as u64;
            let (file, len) = self.route(direct, &data[done..], at);
            match io.write_at(file.as_fd(), &data[done..done + len], at).await {
                Ok(()) => done += len,
                Err(e) => direct = retry(e, direct)?,
            }
        }
        Ok(())
    }

    /// Which descriptor does the first piece of an I/O, and how long that is.
    fn route<'a>(
        &'a self,
        direct: Option<&'a Direct>,
        data: &[u8],
        offset: u64,
    ) -> (&'a File, usize) {
        match direct.map(|direct| (direct, direct.first_piece(data, offset))) {
            Some((direct, piece)) if piece.direct => (&direct.file, piece.len),
            Some((_, piece)) => (&self.file, piece.len),
            None => (&self.file, data.len()),
        }
    }

    /// Makes everything written so far durable, in whichever way it was
    /// written.
    pub async fn flush(&self, io: &Io<'_>) -> io::Result<()> {
        self.check_flushes()?;
        let result = io.sync(self.file.as_fd(), !self.take_resized()).await;
        self.note_flush(result)
    }

    /// As [`flush`](Self::flush), when nobody serves requests.
    pub fn flush_now(&self) -> io::Result<()> {
        self.check_flushes()?;
        let result = match self.take_resized() {
            true => self.file.sync_all(),
            false => self.file.sync_data(),
        };
        self.note_flush(result)
    }

    /// The kernel reports a failed write-back once, then counts the lost pages
    /// as clean: the next fsync would succeed. It must not, because what it
    /// covers did not reach the disk.
    fn check_flushes(&self) -> io::Result<()> {
        match self.flush_error.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn take_resized(&self) -> bool {
        self.resized.swap(false, Ordering::AcqRel)
    }

    fn note_flush(&self, result: io::Result<()>) -> io::Result<()> {
        result.inspect_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            self.flush_error.store(errno, Ordering::Release);
        })
    }

    pub async fn discard(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        if !self.discard {
            return Err(io::ErrorKind::Unsupported.into());
        }
        io.discard(self.file.as_fd(), offset, bytes).await
    }

    pub async fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        if may_unmap && self.discard {
            match self.discard(io, offset, bytes).await {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        io.write_zeroes(self.file.as_fd(), offset, bytes).await
    }

    pub fn truncate(&self, length: u64) -> io::Result<()> {
        if self.block_device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.file.set_len(length)?;
        self.resized.store(true, Ordering::Release);
        Ok(())
    }

    pub fn block_status(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        let start = to_off(offset)?;
        match self.find(start, Whence::SeekData)? {
            // From here on there is no data. Behind the end of an image that
            // was cut short it reads as zeroes, too.
            None => Ok(Extent {
                bytes: self.length()?.saturating_sub(offset).max(bytes),
                hole: true,
            }),
            Some(data) if data > offset => Ok(Extent {
                bytes: data - offset,
                hole: true,
            }),
            Some(_) => match self.find(start, Whence::SeekHole)? {
                // Cut short since the first look.
                None => Ok(Extent { bytes, hole: true }),
                Some(hole) if hole > offset => Ok(Extent {
                    bytes: hole - offset,
                    hole: false,
                }),
                // Punched since the first look; data is never wrong.
                Some(_) => Ok(Extent { bytes, hole: false }),
            },
        }
    }

    /// The next data or hole; `None` if there is nothing more.
    fn find(&self, start: i64, what: Whence) -> io::Result<Option<u64>> {
        match lseek(&self.seek, start, what) {
            Ok(at) => Ok(u64::try_from(at).ok()),
            Err(Errno::ENXIO) => Ok(None),
            // Devices and some file systems cannot tell.
            Err(Errno::EINVAL) => Err(io::ErrorKind::Unsupported.into()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// After a failed call: how to go on, if at all. A direct I/O that the kernel
/// does not take (its device may be pickier than expected) is tried buffered;
/// if the fault was another, it will show there.
fn retry(error: io::Error, direct: Option<&Direct>) -> io::Result<Option<&Direct>> {
    if direct.is_some() && error.raw_os_error() == Some(libc::EINVAL) {
        return Ok(None);
    }
    Err(error)
}

fn to_off(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// `st_blksize` as a power of two within sensible bounds.
fn block_size(st_blksize: u64) -> u32 {
    match u32::try_from(st_blksize) {
        Ok(n) if n.is_power_of_two() => n.clamp(512, 65536),
        Ok(0) | Err(_) => 4096,
        Ok(n) => (1 << n.ilog2()).clamp(512, 65536),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::skip;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// The outcome of a future that never waits.
    fn now<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => panic!("it waits"),
        }
    }

    fn read(raw: &Raw, memory: &mut [u8], offset: u64) {
        now(raw.read(&Io::detached(), &mut ReadBuf::from(memory), offset)).unwrap();
    }

    fn write(raw: &Raw, data: &[u8], offset: u64) {
        now(raw.write(&Io::detached(), data, offset)).unwrap();
    }

    fn open(path: &Path, flags: i32) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    }

    fn raw(path: &Path, direct: bool, discard: bool) -> io::Result<Raw> {
        let file = open(path, 0)?;
        let metadata = file.metadata()?;
        let direct = direct.then(|| open(path, libc::O_DIRECT)).transpose()?;
        Ok(Raw::new(file, direct, open(path, 0)?, &metadata, discard))
    }

    /// An image in the build's directory, which is on a real file system more
    /// often than the temporary one.
    fn image(length: u64) -> tempfile::NamedTempFile {
        let directory = std::env::current_exe().unwrap();
        let file = tempfile::NamedTempFile::new_in(directory.parent().unwrap()).unwrap();
        file.as_file().set_len(length).unwrap();
        file
    }

    /// Numbers that look random and are always the same.
    fn noise(seed: u64) -> impl Iterator<Item = u64> {
        let mut state = seed;
        std::iter::from_fn(move || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            Some(state >> 33)
        })
    }

    /// Every mixture of aligned and unaligned I/O behaves like plain memory.
    fn check_random_io(direct: bool) {
        const LENGTH: usize = 300_001;
        let image = image(LENGTH as u64);
        let raw = match raw(image.path(), direct, true) {
            Ok(raw) => raw,
            Err(e) => return skip(&format!("no O_DIRECT here: {e}")),
        };
        let mut model = vec![0u8; LENGTH];
        // The payload's pages are aligned; a place in it need not be.
        let mut pages = vec![0u8; 80_000 + 4096];
        let page = pages.as_ptr().addr().next_multiple_of(4096) - pages.as_ptr().addr();
        let mut numbers = noise(1);
        let mut number = |below: usize| numbers.next().unwrap() as usize % below;
        for round in 0..2000 {
            let unit = [1, 512, 4096][number(3)];
            let offset = number(LENGTH) / unit * unit;
            let len = ((number(70_000) / unit + 1) * unit).min(LENGTH - offset);
            let place = page + [0, offset % 4096, 512, 3][number(4)];
            let memory = &mut pages[place..place + len];
            if number(2) == 0 {
                memory.fill((round % 255) as u8 + 1);
                write(&raw, memory, offset as u64);
                model[offset..offset + len].copy_from_slice(memory);
            } else {
                memory.fill(0);
                read(&raw, memory, offset as u64);
                assert!(*memory == model[offset..offset + len], "round {round}");
            }
        }
        raw.flush_now().unwrap();
        assert!(std::fs::read(image.path()).unwrap() == model);
    }

    #[test]
    fn random_io_is_exact_through_the_page_cache() {
        check_random_io(false);
    }

    #[test]
    fn random_io_is_exact_around_the_page_cache() {
        check_random_io(true);
    }

    #[test]
    fn parallel_writers_of_one_block_lose_nothing() {
        // Slices that begin and end within blocks, with whole ones between.
        let image = image(1 << 20);
        let raw = match raw(image.path(), true, true) {
            Ok(raw) => raw,
            Err(e) => return skip(&format!("no O_DIRECT here: {e}")),
        };
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let raw = &raw;
                scope.spawn(move || {
                    let memory = vec![thread as u8 + 1; 7680 + 512];
                    let aligned = memory.as_ptr().addr().next_multiple_of(512);
                    let slice = &memory[aligned - memory.as_ptr().addr()..][..7680];
                    for stripe in 0..32 {
                        write(raw, slice, stripe * 32768 + thread * 7680);
                    }
                });
            }
        });
        let content = std::fs::read(image.path()).unwrap();
        for stripe in content.chunks(32768) {
            for (thread, slice) in stripe[..4 * 7680].chunks(7680).enumerate() {
                assert!(slice.iter().all(|b| *b == thread as u8 + 1));
            }
        }
    }

    #[test]
    fn an_image_that_was_cut_short_reads_as_zeroes() {
        for direct in [false, true] {
            let image = image(100_000);
            let raw = match raw(image.path(), direct, true) {
                Ok(raw) => raw,
                Err(e) => return skip(&format!("no O_DIRECT here: {e}")),
            };
            write(&raw, &[7; 100_000], 0);
            image.as_file().set_len(5000).unwrap();
            let mut buf = vec![0xaa; 100_000];
            read(&raw, &mut buf, 0);
            assert!(buf[..5000].iter().all(|b| *b == 7));
            assert!(buf[5000..].iter().all(|b| *b == 0));
            read(&raw, &mut buf[..10], 50_000);
            assert_eq!(buf[..10], [0; 10]);
            let past = raw.block_status(50_000, 10).unwrap();
            assert_eq!(
                past,
                Extent {
                    bytes: 10,
                    hole: true
                }
            );
        }
    }

    #[test]
    fn holes_are_reported_and_made() {
        let image = image(1 << 20);
        let raw = raw(image.path(), false, true).unwrap();
        let hole = |bytes| Extent { bytes, hole: true };
        let data = |bytes| Extent { bytes, hole: false };
        assert_eq!(raw.block_status(100, 1).unwrap(), hole((1 << 20) - 100));
        assert_eq!(raw.allocated_size().unwrap(), Some(0));

        write(&raw, &[1; 65536], 65536);
        raw.flush_now().unwrap();
        assert_eq!(raw.block_status(0, 1).unwrap(), hole(65536));
        assert_eq!(raw.block_status(65536 + 1, 1).unwrap(), data(65535));
        assert_eq!(raw.allocated_size().unwrap(), Some(65536));

        now(raw.discard(&Io::detached(), 65536, 32768 + 1)).unwrap();
        assert_eq!(raw.allocated_size().unwrap(), Some(32768));
        let mut buf = [9; 2];
        read(&raw, &mut buf, 65536 + 32768);
        assert_eq!(buf, [0, 1]);
        assert_eq!(raw.length().unwrap(), 1 << 20);
    }

    #[test]
    fn zeroes_stay_allocated_unless_they_may_go() {
        let image = image(1 << 20);
        let raw = raw(image.path(), false, true).unwrap();
        write(&raw, &[1; 65536], 0);
        raw.flush_now().unwrap();
        match now(raw.write_zeroes(&Io::detached(), 0, 65536, false)) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                return skip("this file system has no ZERO_RANGE");
            }
            result => result.unwrap(),
        }
        assert_eq!(raw.allocated_size().unwrap(), Some(65536));
        assert!(std::fs::read(image.path()).unwrap().iter().all(|b| *b == 0));
        now(raw.write_zeroes(&Io::detached(), 0, 65536, true)).unwrap();
        assert_eq!(raw.allocated_size().unwrap(), Some(0));
    }

    #[test]
    fn without_discard_nothing_frees_space() {
        let image = image(1 << 20);
        let raw = raw(image.path(), false, false).unwrap();
        write(&raw, &[1; 65536], 0);
        raw.flush_now().unwrap();
        let refused = now(raw.discard(&Io::detached(), 0, 65536)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        match now(raw.write_zeroes(&Io::detached(), 0, 65536, true)) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
            result => result.unwrap(),
        }
        assert_eq!(raw.allocated_size().unwrap(), Some(65536));
    }

    #[test]
    fn the_length_is_set_to_the_byte() {
        let image = image(10);
        let raw = raw(image.path(), false, true).unwrap();
        assert!(raw.can_truncate());
        raw.truncate(1_000_001).unwrap();
        raw.flush_now().unwrap();
        assert_eq!(raw.length().unwrap(), 1_000_001);
    }

    #[test]
    fn a_failed_flush_stays_failed() {
        let image = image(10);
        let raw = raw(image.path(), false, true).unwrap();
        raw.flush_error.store(libc::ENOSPC, Ordering::Release);
        for result in [raw.flush_now(), now(raw.flush(&Io::detached()))] {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        }
    }

    #[test]
    fn the_block_size_is_a_sane_power_of_two() {
        let sizes = [0, 1, 512, 1000, 4096, 1 << 20, 1 << 40].map(block_size);
        assert_eq!(sizes, [4096, 512, 512, 512, 4096, 65536, 4096]);
    }
}

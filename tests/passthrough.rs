//! Passthrough: the kernel reads the backing file, and nobody else does.

mod common;
mod daemon_support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use blkfuse::{BlockDriver, Builder, Error, Export, Io, IoUring, OpKind, ReadBuf, Stop};
use common::client::{aio_read, errno, no_children, run, seek, size};
use common::{SOON, eventually, for_queues, is_mounted, pattern, skip};
use daemon_support::{Daemon, Loop, Scratch, can_mount, connection_at, refusal};
use memmap2::{Mmap, MmapOptions};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

/// Not a multiple of anything.
const LEN: usize = (2 << 20) + 70_001;

/// A device whose bytes are a file's, and which does not read them itself.
struct Backed {
    file: Option<File>,
    /// What it says of its length; 0: the file's.
    length: AtomicU64,
    reads: AtomicU64,
}

#[derive(Clone)]
struct Handle(Arc<Backed>);

impl BlockDriver for Handle {
    fn length(&self) -> io::Result<u64> {
        match (self.0.length.load(SeqCst), &self.0.file) {
            (0, Some(file)) => Ok(file.metadata()?.len()),
            (length, _) => Ok(length),
        }
    }

    fn features(&self) -> blkfuse::Features {
        blkfuse::Features {
            write: true,
            truncate: true,
        }
    }

    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        self.0.file.as_ref().map(File::as_fd)
    }

    async fn read(&self, _: &Io<'_>, _: &mut ReadBuf<'_>, _: u64) -> io::Result<()> {
        self.0.reads.fetch_add(1, SeqCst);
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

fn backed(file: impl Into<Option<File>>) -> Handle {
    Handle(Arc::new(Backed {
        file: file.into(),
        length: AtomicU64::new(0),
        reads: AtomicU64::new(0),
    }))
}

/// A passthrough export of an image.
struct Passed {
    driver: Handle,
    export: Option<Export>,
    image: PathBuf,
    path: PathBuf,
    s: Scratch,
}

fn builder(driver: &Handle, path: &Path) -> Builder<Handle> {
    let builder = Export::builder(driver.clone()).mountpoint(path);
    builder.passthrough(true)
}

impl Passed {
    fn new(queues: usize) -> Self {
        Self::over(IoUring::Auto, queues)
    }

    fn over(io_uring: IoUring, queues: usize) -> Self {
        let s = Scratch::new();
        let image = s.file("image", &pattern(0, LEN));
        let path = s.mountpoint("disk");
        let driver = backed(File::open(&image).unwrap());
        let builder = builder(&driver, &path).io_uring(io_uring);
        let export = builder.queues(queues).start().unwrap();
        Self {
            driver,
            export: Some(export),
            image,
            path,
            s,
        }
    }

    fn export(&self) -> &Export {
        self.export.as_ref().unwrap()
    }

    fn open(&self, flags: i32) -> File {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(flags).open(&self.path);
        file.unwrap()
    }

    /// Nobody but the kernel has read.
    fn assert_unread(&self) {
        assert_eq!(self.driver.0.reads.load(SeqCst), 0);
        let stats = self.export().stats();
        assert_eq!(stats.of(OpKind::Read).operations, 0);
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        if let Some(export) = self.export.take() {
            let _quiet = no_children();
            let deleted = export.delete(Some(SOON));
            assert!(deleted.is_ok() || thread::panicking(), "{deleted:?}");
        }
    }
}

fn read_at(file: &File, offset: usize, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    let n = file.read_at(&mut data, offset as u64).unwrap();
    data.truncate(n);
    data
}

/// What a read of `len` bytes at `offset` must give.
fn expected(offset: usize, len: usize) -> Vec<u8> {
    let end = LEN.min(offset + len);
    pattern(offset.min(end), end - offset.min(end))
}

/// What comes of the file through a socket, for which std uses sendfile(2).
fn sent(mut file: &File) -> Vec<u8> {
    let (mut from, mut to) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || io::copy(&mut file, &mut from).unwrap());
        let mut sent = Vec::new();
        to.read_to_end(&mut sent).unwrap();
        sent
    })
}

#[test]
fn every_way_of_reading_reads_the_backing_file() {
    // OPEN is answered over either transport; reads need none.
    for_queues(|queues| read_in_every_way(&Passed::new(queues)));
    for_queues(|queues| read_in_every_way(&Passed::over(IoUring::Off, queues)));
}

fn read_in_every_way(p: &Passed) {
    let file = p.open(0);
    assert_eq!(size(&file), LEN as u64);
    for offset in [0, 1, 4095, 65_536, (1 << 20) - 1, LEN - 1, LEN, LEN + 9] {
        for len in [1, 513, 4097, 1 << 20, LEN] {
            let what = format!("{len} bytes at {offset}");
            assert!(
                read_at(&file, offset, len) == expected(offset, len),
                "{what}"
            );
        }
    }
    // SAFETY: nobody writes the image while this maps it.
    let maps: [Mmap; 2] = unsafe {
        [
            MmapOptions::new().map(&file).unwrap(),
            MmapOptions::new().map_copy_read_only(&file).unwrap(),
        ]
    };
    for map in maps {
        assert!(map[..] == pattern(0, LEN));
    }
    assert!(sent(&file) == pattern(0, LEN));
    let copied = p.s.join("copied");
    run(Command::new("cp").args([&p.path, &copied]));
    assert!(fs::read(&copied).unwrap() == pattern(0, LEN));
    p.assert_unread();
}

#[test]
fn direct_and_asynchronous_reads_go_through() {
    for_queues(|queues| {
        let p = Passed::new(queues);
        let mut options = OpenOptions::new();
        let bare = options.read(true).custom_flags(libc::O_DIRECT);
        if let Err(e) = bare.open(&p.image) {
            return skip(&format!("no O_DIRECT in the temporary directory: {e}"));
        }
        for flags in [0, libc::O_DIRECT] {
            let file = p.open(flags);
            let mut memory = vec![0; 65 * 8192];
            let skew = memory.as_ptr().align_offset(4096);
            let mut buffers: Vec<_> = memory[skew..].chunks_exact_mut(8192).collect();
            let offset = |i: usize| (i * 37 % 256) * 8192;
            let mut reads: Vec<_> = buffers
                .iter_mut()
                .enumerate()
                .map(|(i, b)| (offset(i) as u64, &mut **b))
                .collect();
            let results = aio_read(&file, &mut reads);
            for (i, (result, data)) in results.iter().zip(&buffers).enumerate() {
                assert_eq!(*result, 8192, "read {i}");
                assert!(**data == expected(offset(i), 8192), "read {i}");
            }
        }
        p.assert_unread();
    });
}

#[test]
fn nobody_can_write() {
    for_queues(|queues| {
        let p = Passed::new(queues);
        let reader = p.open(0);
        let refused = OpenOptions::new().write(true).open(&p.path);
        assert_eq!(errno(refused), libc::EROFS);
        let refused = OpenOptions::new().write(true).truncate(true).open(&p.path);
        assert_eq!(errno(refused), libc::EROFS);
        assert_eq!(errno(reader.write_at(b"x", 0)), libc::EBADF);
        assert_eq!(errno(reader.set_len(0)), libc::EINVAL);
        let chmod = fs::set_permissions(&p.path, Permissions::from_mode(0o666));
        assert_eq!(errno(chmod), libc::EROFS);
        // SAFETY: the map is never made.
        let map = unsafe { MmapOptions::new().map_mut(&reader) };
        assert_eq!(errno(map), libc::EACCES);
        assert!(fs::read(&p.image).unwrap() == pattern(0, LEN));
    });
}

#[test]
fn a_writable_connection_of_somebody_else_cannot_write_either() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    let (image, path) = (s.file("image", &pattern(0, LEN)), s.mountpoint("disk"));
    let device = connection_at(&path, 0, "");
    let driver = backed(File::open(&image).unwrap());
    let builder = Export::builder(driver.clone()).fuse_fd(device.into());
    let export = builder.passthrough(true).start().unwrap();
    assert!(fs::read(&path).unwrap() == pattern(0, LEN));
    for truncate in [false, true] {
        let mut options = OpenOptions::new();
        let refused = options.read(true).write(true).truncate(truncate);
        assert_eq!(errno(refused.open(&path)), libc::EROFS);
    }
    assert_eq!(driver.0.reads.load(SeqCst), 0);
    assert!(fs::read(&image).unwrap() == pattern(0, LEN));
    export.delete(Some(SOON)).unwrap();
    umount2(&path, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_drain_does_not_hold_reads_up() {
    for_queues(|queues| {
        let p = Passed::new(queues);
        let file = p.open(0);
        p.export().drain_begin().unwrap();
        eventually("nothing is in flight", || !p.export().drain_poll());
        assert!(read_at(&file, 4096, 4096) == pattern(4096, 4096));
        assert!(!p.export().drain_poll());
        p.export().drain_end().unwrap();
    });
}

#[test]
fn who_has_the_file_open_can_go_on_reading_after_the_end() {
    for_queues(|queues| {
        for how in [Stop::Lazy, Stop::Force] {
            let mut p = Passed::new(queues);
            let file = p.open(0);
            p.export().stop(how).unwrap();
            assert!(!is_mounted(&p.path));
            let _quiet = no_children();
            p.export.take().unwrap().delete(Some(SOON)).unwrap();
            assert_eq!(Arc::strong_count(&p.driver.0), 1);
            assert!(read_at(&file, 4096, 4096) == pattern(4096, 4096));
        }
    });
}

/// A temporary file system; unmounted when dropped, which fails if it is used.
struct TmpFs(PathBuf);

impl TmpFs {
    fn at(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let flags = MsFlags::empty();
        mount(Some("tmpfs"), &path, Some("tmpfs"), flags, None::<&str>).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for TmpFs {
    fn drop(&mut self) {
        // The release of a closed file comes a little after its close.
        eventually("nothing keeps the image", || {
            umount2(&self.0, MntFlags::empty()).is_ok()
        });
    }
}

#[test]
fn nothing_keeps_the_backing_file_after_the_end() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    let images = TmpFs::at(s.join("images"));
    let (image, path) = (images.file("image", &pattern(0, LEN)), s.mountpoint("disk"));
    // Somebody else's mount stays, and with it the connection.
    let device = connection_at(&path, 0, "");
    let driver = backed(File::open(&image).unwrap());
    let builder = Export::builder(driver).fuse_fd(device.into());
    let export = builder.passthrough(true).start().unwrap();
    assert!(fs::read(&path).unwrap() == pattern(0, LEN));
    let busy = umount2(&images.0, MntFlags::empty());
    assert_eq!(busy, Err(nix::errno::Errno::EBUSY));
    export.delete(Some(SOON)).unwrap();
    drop(images);
    umount2(&path, MntFlags::MNT_DETACH).unwrap();
}

/// How a start fails, after which nothing is left of it.
fn refused(
    driver: Handle,
    change: impl FnOnce(Builder<Handle>) -> Builder<Handle>,
    s: &Scratch,
) -> Error {
    let path = s.mountpoint("disk");
    let error = change(builder(&driver, &path)).start().unwrap_err();
    assert_eq!(Arc::strong_count(&driver.0), 1);
    assert!(s.mounts().iter().all(|mount| *mount != path));
    error
}

#[test]
fn what_cannot_be_passed_through_is_refused_with_the_reason() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    let image = s.file("image", &pattern(0, LEN));
    let open = || backed(File::open(&image).unwrap());
    let check = |error: Error, errno: i32, words: &str| {
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.message().contains(words), "{error}");
    };
    let writable = refused(open(), |b| b.writable(true), &s);
    check(writable, libc::EINVAL, "read-only exports");
    for length in [LEN - 1, LEN + 1] {
        let driver = open();
        driver.0.length.store(length as u64, SeqCst);
        let words = format!("the device has {length} bytes and its backing file {LEN}");
        check(refused(driver, |b| b, &s), libc::EINVAL, &words);
    }
    let without = backed(None);
    without.0.length.store(LEN as u64, SeqCst);
    let without = refused(without, |b| b, &s);
    check(without, libc::EOPNOTSUPP, "no backing file");
    for irregular in ["/dev/zero", "/"] {
        let driver = backed(File::open(irregular).unwrap());
        driver.0.length.store(LEN as u64, SeqCst);
        let irregular = refused(driver, |b| b, &s);
        check(irregular, libc::EINVAL, "not a regular file");
    }
    // The same mountpoint still works.
    let export = builder(&open(), &s.join("disk")).start().unwrap();
    assert!(fs::read(s.join("disk")).unwrap() == pattern(0, LEN));
    export.delete(Some(SOON)).unwrap();
}

/// An overlay of `lower` at `lower`/../`name`; unmounted when dropped.
struct Overlay(PathBuf);

impl Overlay {
    /// `None`, and the test is skipped, if there are none.
    fn of(lower: &Path, at: PathBuf) -> Option<Self> {
        let below = at.with_extension("below");
        fs::create_dir(&at).unwrap();
        fs::create_dir(&below).unwrap();
        let options = format!("lowerdir={}:{}", lower.display(), below.display());
        let options = Some(&options[..]);
        let flags = MsFlags::empty();
        match mount(Some("overlay"), &at, Some("overlay"), flags, options) {
            Ok(()) => Some(Self(at)),
            Err(e) => {
                skip(&format!("no overlayfs: {e}"));
                None
            }
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn an_image_on_an_overlay_works_and_one_on_two_is_refused() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    fs::create_dir(s.join("plain")).unwrap();
    s.file("plain/image", &pattern(0, LEN));
    let Some(one) = Overlay::of(&s.join("plain"), s.join("one")) else {
        return;
    };
    let driver = backed(File::open(one.0.join("image")).unwrap());
    let path = s.mountpoint("disk");
    let export = builder(&driver, &path).start().unwrap();
    assert!(fs::read(&path).unwrap() == pattern(0, LEN));
    assert_eq!(driver.0.reads.load(SeqCst), 0);
    export.delete(Some(SOON)).unwrap();
    let Some(two) = Overlay::of(&one.0, s.join("two")) else {
        return;
    };
    let driver = backed(File::open(two.0.join("image")).unwrap());
    let error = refused(driver, |b| b, &s);
    assert_eq!(error.errno(), libc::ELOOP, "{error}");
    assert!(error.message().contains("on top of one another"), "{error}");
}

#[test]
fn a_passthrough_of_a_passthrough_works() {
    for_queues(|queues| {
        let lower = Passed::new(queues);
        let path = lower.s.mountpoint("upper");
        let driver = backed(lower.open(0));
        let export = builder(&driver, &path).queues(queues).start().unwrap();
        assert!(fs::read(&path).unwrap() == pattern(0, LEN));
        lower.assert_unread();
        {
            let _quiet = no_children();
            export.delete(Some(SOON)).unwrap();
        }
        drop(driver);
    });
}

#[test]
fn the_device_grows_only_with_its_backing_file() {
    for_queues(|queues| {
        let p = Passed::new(queues);
        let file = p.open(0);
        assert_eq!(size(&file), LEN as u64);
        let device_only = |length: u64| {
            p.driver.0.length.store(length, SeqCst);
            let error = p.export().resized().unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
            assert!(error.message().contains("to be equal"), "{error}");
            p.driver.0.length.store(0, SeqCst);
            assert_eq!(size(&file), LEN as u64);
        };
        device_only(4096);
        device_only(LEN as u64 + 1);
        let image = OpenOptions::new().write(true).open(&p.image).unwrap();
        image
            .write_at(&pattern(LEN, 100_000), LEN as u64)
            .map(|n| assert_eq!(n, 100_000))
            .unwrap();
        p.export().resized().unwrap();
        assert_eq!(size(&file), LEN as u64 + 100_000);
        assert!(read_at(&file, LEN - 5, 200_000) == pattern(LEN - 5, 100_005));
        let mut data = [0; 5000];
        let results = aio_read(&file, &mut [(LEN as u64, &mut data[..])]);
        assert_eq!(results, [5000]);
        assert!(data[..] == pattern(LEN, 5000));
        assert_eq!(
            seek(&file, 0, libc::SEEK_END).unwrap(),
            LEN as u64 + 100_000
        );
        p.assert_unread();
    });
}

#[test]
fn the_daemon_passes_an_image_through_over_itself() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    let image = s.sparse("image", LEN as u64);
    let data = [(0, 70_000), (1 << 20, 100_001)];
    let writer = OpenOptions::new().write(true).open(&image).unwrap();
    for (offset, len) in data {
        writer
            .write_all_at(&pattern(offset, len), offset as u64)
            .unwrap();
    }
    let bare = File::open(&image).unwrap();
    let daemon = Daemon::start(args!["--passthrough", image, image]);
    let file = File::open(&image).unwrap();
    assert_ne!(
        file.metadata().unwrap().dev(),
        bare.metadata().unwrap().dev()
    );
    assert_eq!(
        file.metadata().unwrap().blocks(),
        bare.metadata().unwrap().blocks()
    );
    assert!(read_at(&file, 0, LEN) == read_at(&bare, 0, LEN));
    let mut at = 0;
    for whence in [libc::SEEK_HOLE, libc::SEEK_DATA, libc::SEEK_HOLE] {
        let place = seek(&file, at, whence).unwrap();
        assert_eq!(place, seek(&bare, at, whence).unwrap());
        at = place as i64;
    }
    // Nobody needs the daemon for that.
    daemon.signal(Signal::SIGSTOP);
    let read = read_at(&file, 0, 70_000);
    daemon.signal(Signal::SIGCONT);
    assert!(read == pattern(0, 70_000));
    drop(file);
    daemon.stop();
}

#[test]
fn the_daemon_says_what_it_cannot_pass_through() {
    if !can_mount() {
        return;
    }
    let s = Scratch::new();
    let (image, at) = (s.file("image", &pattern(0, 1 << 20)), s.mountpoint("disk"));
    let why = refusal(args!["--passthrough", "ram:1M", at]);
    assert!(why.contains("no backing file"), "{why}");
    let Some(device) = Loop::attach(&image, &[]) else {
        return;
    };
    let why = refusal(args!["--passthrough", device.0, at]);
    assert!(why.contains("not a regular file"), "{why}");
    // And the other way round: a loop device over the exported file.
    device.detach();
    let daemon = Daemon::start(args!["--passthrough", image, at]);
    let Some(device) = Loop::attach(&at, &["--read-only"]) else {
        return;
    };
    assert!(fs::read(&device.0).unwrap() == pattern(0, 1 << 20));
    device.detach();
    daemon.stop();
}

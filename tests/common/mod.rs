//! What the tests on real mounts share: a driver in memory that can be told
//! to fail or to wait, an export of it under a watchdog, and skipping.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use blkfuse::{
    BlockDriver, Builder, Event, Export, Extent, Features, Io, IoUring, Limits, ReadBuf, Threads,
};
use loops::Loops;
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

pub mod checked;
pub mod client;
pub mod loops;
pub mod running;
pub mod sparse;

/// How long a test may take before its connection is aborted.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long tests wait for something that should happen at once.
pub const SOON: Duration = Duration::from_secs(10);
/// The numbers of queues that every behaviour is tried with.
pub const QUEUES: [usize; 3] = [1, 2, 4];

/// Runs `test` for every number of queues.
pub fn for_queues(test: impl Fn(usize)) {
    if !can_export() {
        return;
    }
    for queues in QUEUES {
        eprintln!("with {queues} queue(s)");
        test(queues);
    }
}

/// Whether these tests can mount here; skips if not.
pub fn can_export() -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        skip("it needs root and /dev/fuse");
    }
    can
}

/// Says why a test cannot run here. CI sets BLKFUSE_NO_SKIP, which makes that
/// a failure.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("BLKFUSE_NO_SKIP").is_none(),
        "skipped, which BLKFUSE_NO_SKIP forbids: {reason}"
    );
    eprintln!("SKIPPED: {reason}");
}

/// Runs `test` for every transport: for all that can be had here, or only for
/// the one that BLKFUSE_EXPECT_TRANSPORT names.
pub fn for_transports(test: impl Fn(IoUring)) {
    if !can_export() {
        return;
    }
    let expected = std::env::var_os("BLKFUSE_EXPECT_TRANSPORT");
    for (transport, name) in [(IoUring::Off, "/dev/fuse"), (IoUring::On, "io_uring")] {
        if expected.as_ref().is_some_and(|expected| expected != name) {
            continue;
        }
        let enabled = fs::read_to_string("/sys/module/fuse/parameters/enable_uring");
        if transport == IoUring::On && enabled.map_or(true, |text| text.trim() != "Y") {
            skip("the kernel does not have FUSE over io_uring, or root has not enabled it");
            continue;
        }
        eprintln!("over {name}");
        test(transport);
    }
}

/// Runs `test` for every transport with every number of queues.
pub fn for_transports_and_queues(test: impl Fn(IoUring, usize)) {
    for_transports(|transport| for_queues(|queues| test(transport, queues)));
}

/// Whose threads run the queues of these tests' exports: the tests' own if
/// BLKFUSE_TEST_THREADS is "host".
fn threads() -> Threads {
    match std::env::var("BLKFUSE_TEST_THREADS").as_deref() {
        Ok("host") => Threads::Host,
        _ => Threads::Library,
    }
}

/// Fails if BLKFUSE_EXPECT_TRANSPORT names another transport than the export
/// has come to: a run of the tests over one of them is to be just that.
fn expect_transport(export: &Export) {
    if let Some(expected) = std::env::var_os("BLKFUSE_EXPECT_TRANSPORT") {
        assert_eq!(OsStr::new(export.transport()), expected);
    }
}

/// Where Cargo has put the package's C libraries: beside the test programs.
pub fn library_dir() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let dir = program.parent().unwrap().to_owned();
    for library in ["libblkfuse.so", "libblkfuse.a"] {
        assert!(dir.join(library).exists(), "no {library} in {dir:?}");
    }
    dir
}

/// Waits until `condition` holds; panics if it does not soon.
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    within(SOON, what, condition);
}

/// Waits until `condition` holds; panics if it does not within `limit`.
pub fn within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < end, "did not happen: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Aborts the connection at a path unless it is dropped in time, so that a
/// defect makes a test fail and not hang.
pub struct Watchdog {
    path: PathBuf,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watchdog {
    pub fn new(path: &Path) -> Self {
        let (stop, stopped) = mpsc::channel();
        let path = path.to_owned();
        let watched = path.clone();
        let thread = thread::spawn(move || {
            if stopped.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("WATCHDOG: aborting {}", watched.display());
                abort(&watched);
                // A panic here fails the test when the watchdog is joined.
                panic!("the watchdog had to abort {}", watched.display());
            }
        });
        Self {
            path,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        let bitten = self.thread.take().is_some_and(|t| t.join().is_err());
        // Whatever the test did, nothing stays mounted.
        abort(&self.path);
        assert!(!bitten || thread::panicking(), "the watchdog bit");
    }
}

/// Ends every FUSE connection mounted at `path`.
pub fn abort(path: &Path) {
    while is_mounted(path) {
        if umount2(path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).is_err() {
            break;
        }
    }
}

/// Unmounts what nobody uses any more. A child that another test is starting
/// may for a moment still hold what this one had open.
pub fn unmount(at: &Path, flags: MntFlags) {
    let mut result = umount2(at, flags);
    eventually("the unmount", || {
        if result == Err(nix::errno::Errno::EBUSY) {
            result = umount2(at, flags);
        }
        result != Err(nix::errno::Errno::EBUSY)
    });
    result.unwrap();
}

/// Whether something is mounted at `path` (which is not touched).
pub fn is_mounted(path: &Path) -> bool {
    mount_line(path).is_some()
}

/// The line of mountinfo about the topmost mount at `path`.
pub fn mount_line(path: &Path) -> Option<String> {
    let escaped = path.to_str()?.replace('\\', "\\134").replace(' ', "\\040");
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some(&escaped));
    line.map(str::to_owned)
}

/// What a driver's method is, for faults and counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Truncate,
    BlockStatus,
}

type Fault = Box<dyn Fn(Call, u64, u64) -> Option<io::Error> + Send + Sync>;

/// A block device in memory, observable and controllable from the test.
pub struct Memory {
    data: Mutex<Vec<u8>>,
    pub calls: Mutex<Vec<(Call, u64, u64)>>,
    pub count: AtomicU64,
    pub flushes: AtomicU64,
    fault: Mutex<Option<Fault>>,
    held: Mutex<Held>,
    arrived: Condvar,
    pub events: Mutex<Vec<Event>>,
    event_seen: Condvar,
    pub idle_calls: AtomicUsize,
    pub dropped: Arc<AtomicUsize>,
    pub writable: bool,
    /// Holes are kept in units of this many bytes; 0: everything is data.
    pub block_size: u32,
    pub allocated: Mutex<Option<u64>>,
    /// Without it write_zeroes and discard are unsupported.
    pub native_zeroes: bool,
}

#[derive(Default)]
struct Held {
    holding: bool,
    waiting: usize,
    wakers: Vec<Waker>,
}

/// A handle to a `Memory` that is exported.
#[derive(Clone)]
pub struct Handle(pub Arc<Memory>);

impl std::ops::Deref for Handle {
    type Target = Memory;
    fn deref(&self) -> &Memory {
        &self.0
    }
}

impl Memory {
    pub fn new(data: Vec<u8>) -> Self {
        Self {
            data: Mutex::new(data),
            calls: Mutex::new(Vec::new()),
            count: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            fault: Mutex::new(None),
            held: Mutex::new(Held::default()),
            arrived: Condvar::new(),
            events: Mutex::new(Vec::new()),
            event_seen: Condvar::new(),
            idle_calls: AtomicUsize::new(0),
            dropped: Arc::new(AtomicUsize::new(0)),
            writable: true,
            block_size: 4096,
            allocated: Mutex::new(None),
            native_zeroes: true,
        }
    }

    /// `len` bytes that differ from their neighbours.
    pub fn patterned(len: usize) -> Self {
        Self::new(pattern(0, len))
    }

    pub fn handle(self) -> Handle {
        Handle(Arc::new(self))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    /// Changes the device behind the export's back.
    pub fn set_bytes(&self, data: Vec<u8>) {
        *self.data.lock().unwrap() = data;
    }

    /// From now on `fault` decides which calls fail.
    pub fn fail_if(
        &self,
        fault: impl Fn(Call, u64, u64) -> Option<io::Error> + Send + Sync + 'static,
    ) {
        *self.fault.lock().unwrap() = Some(Box::new(fault));
    }

    pub fn fail_never(&self) {
        *self.fault.lock().unwrap() = None;
    }

    /// From now on data calls wait until `release`.
    pub fn hold(&self) {
        self.held.lock().unwrap().holding = true;
    }

    /// Lets the waiting calls, and all later ones, go on.
    pub fn release(&self) {
        let mut held = self.held.lock().unwrap();
        held.holding = false;
        held.wakers.drain(..).for_each(Waker::wake);
    }

    /// Waits until `n` calls wait.
    pub fn wait_for_held(&self, n: usize) {
        let held = self.held.lock().unwrap();
        let (held, timeout) = self
            .arrived
            .wait_timeout_while(held, SOON, |h| h.waiting < n)
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "{} of {n} calls arrived",
            held.waiting
        );
    }

    /// Waits until an event satisfies `wanted`.
    pub fn wait_for_event(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        let events = self.events.lock().unwrap();
        let (events, _) = self
            .event_seen
            .wait_timeout_while(events, SOON, |e| !e.iter().any(&wanted))
            .unwrap();
        let found = events.iter().find(|e| wanted(e)).cloned();
        found.unwrap_or_else(|| panic!("the event did not come: {events:?}"))
    }

    async fn call(&self, call: Call, offset: u64, bytes: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push((call, offset, bytes));
        self.count.fetch_add(1, SeqCst);
        let mut counted = false;
        poll_fn(|cx| {
            let mut held = self.held.lock().unwrap();
            if !held.holding {
                held.waiting -= usize::from(counted);
                return Poll::Ready(());
            }
            held.waiting += usize::from(!counted);
            counted = true;
            held.wakers.push(cx.waker().clone());
            self.arrived.notify_all();
            Poll::Pending
        })
        .await;
        let fault = self.fault.lock().unwrap();
        match fault.as_ref().and_then(|f| f(call, offset, bytes)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
    }
}

/// `len` bytes of a pattern as it is at `offset`.
pub fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len)
        .map(|i| ((i * 7) ^ (i >> 8)) as u8)
        .collect()
}

fn range(offset: u64, len: usize) -> std::ops::Range<usize> {
    offset as usize..offset as usize + len
}

fn past_end() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl BlockDriver for Handle {
    fn length(&self) -> io::Result<u64> {
        Ok(self.data.lock().unwrap().len() as u64)
    }

    fn allocated_size(&self) -> io::Result<Option<u64>> {
        Ok(*self.allocated.lock().unwrap())
    }

    fn limits(&self) -> Limits {
        Limits {
            block_size: self.block_size,
        }
    }

    fn features(&self) -> Features {
        Features {
            write: self.writable,
            truncate: self.writable,
        }
    }

    async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        self.call(Call::Read, offset, buf.len() as u64).await?;
        let data = self.data.lock().unwrap();
        let from = data.get(range(offset, buf.len())).ok_or_else(past_end)?;
        buf.bytes_mut().copy_from_slice(from);
        Ok(())
    }

    async fn write(&self, _: &Io<'_>, from: &[u8], offset: u64) -> io::Result<()> {
        self.call(Call::Write, offset, from.len() as u64).await?;
        let mut data = self.data.lock().unwrap();
        let to = data.get_mut(range(offset, from.len()));
        to.ok_or_else(past_end)?.copy_from_slice(from);
        Ok(())
    }

    async fn flush(&self, _: &Io<'_>) -> io::Result<()> {
        self.call(Call::Flush, 0, 0).await?;
        self.flushes.fetch_add(1, SeqCst);
        Ok(())
    }

    async fn discard(&self, _: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        self.call(Call::Discard, offset, bytes).await?;
        if !self.native_zeroes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.data.lock().unwrap()[range(offset, bytes as usize)].fill(0);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        _: &Io<'_>,
        offset: u64,
        bytes: u64,
        _may_unmap: bool,
    ) -> io::Result<()> {
        self.call(Call::WriteZeroes, offset, bytes).await?;
        if !self.native_zeroes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut data = self.data.lock().unwrap();
        let to = data.get_mut(range(offset, bytes as usize));
        to.ok_or_else(past_end)?.fill(0);
        Ok(())
    }

    async fn truncate(&self, _: &Io<'_>, length: u64) -> io::Result<()> {
        self.call(Call::Truncate, length, 0).await?;
        if length > 1 << 30 {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        self.data.lock().unwrap().resize(length as usize, 0);
        Ok(())
    }

    /// Blocks of zeroes are holes.
    async fn block_status(&self, _: &Io<'_>, offset: u64, bytes: u64) -> io::Result<Extent> {
        self.call(Call::BlockStatus, offset, bytes).await?;
        const BLOCK: usize = 4096;
        let data = self.data.lock().unwrap();
        let block = |at: usize| at / BLOCK * BLOCK..data.len().min(at / BLOCK * BLOCK + BLOCK);
        let is_hole = |at: usize| data[block(at)].iter().all(|b| *b == 0);
        let start = offset as usize;
        let hole = is_hole(start);
        let mut end = block(start).end;
        while end < data.len() && is_hole(end) == hole {
            end = block(end).end;
        }
        Ok(Extent {
            bytes: (end - start) as u64,
            hole,
        })
    }

    fn idle(&self) {
        self.idle_calls.fetch_add(1, SeqCst);
    }

    fn event(&self, event: &Event) {
        self.events.lock().unwrap().push(event.clone());
        self.event_seen.notify_all();
    }
}

/// An exported `Memory`, under a watchdog.
pub struct Mounted {
    pub export: Option<Export>,
    pub driver: Handle,
    pub path: PathBuf,
    loops: Loops,
    _watchdog: Watchdog,
    _dir: TempDir,
}

impl Mounted {
    /// Exports `driver` writable, with what `configure` changes of that.
    pub fn with(
        driver: Memory,
        queues: usize,
        configure: impl FnOnce(Builder<Handle>) -> Builder<Handle>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let watchdog = Watchdog::new(&path);
        let driver = driver.handle();
        let builder = Export::builder(driver.clone())
            .mountpoint(&path)
            .writable(true)
            .queues(queues)
            .threads(threads());
        let export = configure(builder).start().unwrap();
        expect_transport(&export);
        Self {
            loops: Loops::of(&export),
            export: Some(export),
            driver,
            path,
            _watchdog: watchdog,
            _dir: dir,
        }
    }

    /// `len` bytes of the pattern, writable, of fixed size.
    pub fn fixed(len: usize, queues: usize) -> Self {
        Self::with(Memory::patterned(len), queues, |b| b)
    }

    /// `len` bytes of the pattern, writable and growable.
    pub fn growable(len: usize, queues: usize) -> Self {
        Self::with(Memory::patterned(len), queues, |b| b.growable(true))
    }

    /// `len` bytes of the pattern, read-only.
    pub fn read_only(len: usize, queues: usize) -> Self {
        Self::with(Memory::patterned(len), queues, |b| b.writable(false))
    }

    /// An export of a driver that wraps `driver`; `start` is given the path.
    pub fn started(driver: Handle, start: impl FnOnce(&Path) -> Export) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let watchdog = Watchdog::new(&path);
        let export = start(&path);
        Self {
            loops: Loops::of(&export),
            export: Some(export),
            driver,
            path,
            _watchdog: watchdog,
            _dir: dir,
        }
    }

    pub fn export(&self) -> &Export {
        self.export.as_ref().expect("not deleted yet")
    }

    /// Opens the file for reading, and for writing too if `write`.
    pub fn open(&self, write: bool) -> File {
        self.open_with(write, 0)
    }

    pub fn open_with(&self, write: bool, flags: i32) -> File {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(&self.path)
            .unwrap()
    }

    /// Deletes the export and waits for its end.
    pub fn delete(&mut self) {
        let export = self.export.take().expect("not deleted yet");
        let _quiet = client::no_children();
        export.delete(Some(SOON)).unwrap();
        std::mem::take(&mut self.loops).join();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.driver.release();
        if let Some(export) = self.export.take() {
            let _quiet = client::no_children();
            let deleted = export.delete(Some(SOON));
            assert!(
                deleted.is_ok() || thread::panicking(),
                "delete failed: {deleted:?}"
            );
        }
    }
}

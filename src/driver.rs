//! The block driver: what a program supplies to have its device exported.
//!
//! [`BlockDriver`] is the one interface the engine calls. It knows nothing of
//! FUSE. The C API's table of callbacks is one implementation of it.
//!
//! Every data method is asynchronous: a driver that has the answer at hand
//! returns a ready future and costs no allocation; one that must wait returns
//! a future which the queue's executor polls again after it was woken, from
//! whatever thread.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use crate::forward::{Call, Port, What};
use crate::region::Keeper;
use crate::slot::{Payload, Traces};

/// A block device, as the engine sees it.
///
/// **Threads.** Methods are called from the threads of all queues at once, so
/// a driver synchronises its own state. A future is polled only by the queue
/// that created it, and is always polled to its end, never dropped midway.
///
/// **No short I/O.** `Ok(())` means all of it. The engine keeps every request
/// within the length, except where a method says otherwise.
///
/// **Errors** are passed to the client as the error's `errno`
/// ([`io::Error::raw_os_error`]); an error without one becomes the errno that
/// fits its [`io::ErrorKind`], and `EIO` when nothing fits. The kind
/// [`Unsupported`](io::ErrorKind::Unsupported) (also `EOPNOTSUPP`, `ENOSYS`)
/// asks the engine for its fallback where a method has one.
///
/// **Panics** do not leave the engine: the request fails with `EIO` and the
/// export halts ([`Event::Halted`]).
///
/// The driver is dropped once, when the export is gone: no request is in
/// flight, nothing is mounted, no method will be called again.
#[expect(
    unused_variables,
    reason = "default methods ignore what they are given"
)]
pub trait BlockDriver: Send + Sync + 'static {
    /// The device's length in bytes; any number up to 2^63 − 1.
    ///
    /// Asked when the export starts, when
    /// [`Export::resized`](crate::Export::resized) is called, and before the
    /// engine truncates, so that it does not cut off what was added meanwhile.
    fn length(&self) -> io::Result<u64>;

    /// Bytes of storage the device really occupies (`st_blocks`), or `None`
    /// if that is not known; then all of the length counts as occupied.
    fn allocated_size(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// What the device prefers; asked once, at start.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// What the driver can do beyond reading; asked once, at start.
    fn features(&self) -> Features {
        Features::default()
    }

    /// A descriptor of the regular file whose bytes are the device's, each at
    /// its own offset, if there is one. Asked for by an export with
    /// [`passthrough`](crate::Builder::passthrough), when it starts and when
    /// [`Export::resized`](crate::Export::resized) is called. How it was opened
    /// does not matter: the kernel opens the file anew for each client, with
    /// the client's flags.
    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Reads `buf.len()` bytes at `offset`, which lie within the length.
    fn read(
        &self,
        io: &Io<'_>,
        buf: &mut ReadBuf<'_>,
        offset: u64,
    ) -> impl Future<Output = io::Result<()>>;

    /// Writes `data` at `offset`; the range lies within the length.
    fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> impl Future<Output = io::Result<()>> {
        async { unsupported() }
    }

    /// Makes everything that was written before this call durable.
    fn flush(&self, io: &Io<'_>) -> impl Future<Output = io::Result<()>> {
        async { Ok(()) }
    }

    /// Gives the range's storage back. Afterwards it must read as zeroes.
    /// Unsupported: the engine calls [`write_zeroes`](Self::write_zeroes)
    /// with `may_unmap`.
    fn discard(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> impl Future<Output = io::Result<()>> {
        async { unsupported() }
    }

    /// Makes the range read as zeroes. With `may_unmap` its storage may be
    /// given back; without, it stays (or becomes) allocated. Unsupported: the
    /// engine writes zeroes.
    fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> impl Future<Output = io::Result<()>> {
        async { unsupported() }
    }

    /// Sets the length, in bytes. What is cut off is gone; what is added
    /// reads as zeroes. Called by one request at a time; while no other data
    /// method but [`flush`](Self::flush) is in flight if the length becomes
    /// smaller.
    fn truncate(&self, io: &Io<'_>, length: u64) -> impl Future<Output = io::Result<()>> {
        async { unsupported() }
    }

    /// Says what is at `offset`. The extent starts there, has at least one
    /// byte, and may be longer or shorter than the `bytes` asked about.
    /// Unsupported: everything counts as data.
    fn block_status(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> impl Future<Output = io::Result<Extent>> {
        async { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// A queue begins to serve; called on its thread, before any request of
    /// that queue. An error makes the export's start fail, or
    /// [`HostQueue::attach`](crate::HostQueue::attach), which calls it anew for
    /// every thread.
    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        Ok(())
    }

    /// A queue has ended, or its thread leaves it: no request of it is in
    /// flight, none will follow. Called on its thread, once for each successful
    /// [`queue_start`](Self::queue_start).
    fn queue_stop(&self, queue: usize) {}

    /// Requests will follow on this queue; the driver may hold their
    /// submission back until [`batch_end`](Self::batch_end).
    fn batch_begin(&self, queue: usize) {}

    /// The batch is over.
    fn batch_end(&self, queue: usize) {}

    /// During a drain, the number of requests in flight reached zero.
    fn idle(&self) {}

    /// Something happened to the export; may come from any thread.
    fn event(&self, event: &Event) {}
}

/// Answers "the driver does not do this".
pub(crate) fn unsupported() -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Which request a driver's method is called for.
///
/// A (queue, slot) pair names one request at a time: a driver that wants
/// state for each request in flight can keep it in a table of
/// [`QueueInfo::slots`] places for each queue and need not allocate.
#[derive(Debug)]
pub struct Io<'a> {
    queue: usize,
    slot: usize,
    /// `None`: of no export.
    home: Option<Home<'a>>,
    /// How many jobs were left at the port and not seen to their end.
    unfinished: Cell<usize>,
}

/// Where a request leaves jobs, and its payload.
#[derive(Debug)]
struct Home<'a> {
    port: &'a Port,
    payload: Payload,
}

impl<'a> Io<'a> {
    pub(crate) fn new(queue: usize, slot: usize, port: &'a Port, payload: Payload) -> Self {
        Self {
            queue,
            slot,
            home: Some(Home { port, payload }),
            unfinished: Cell::new(0),
        }
    }

    /// For tests of drivers: of no export's request, and what it is asked to do
    /// is done when the future is first polled.
    pub fn detached() -> Self {
        Self {
            queue: 0,
            slot: 0,
            home: None,
            unfinished: Cell::new(0),
        }
    }

    /// The queue's number, from 0.
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// The slot's number within its queue, from 0: below
    /// [`QueueInfo::slots`], and no other request's as long as this one lasts.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// Reads from `offset` of `file` what `buf` lacks, but no more than `len`
    /// bytes. Returns how many: fewer only if the file ends there. What was
    /// read before an error counts as filled.
    pub async fn read_at(
        &self,
        file: BorrowedFd<'_>,
        buf: &mut ReadBuf<'_>,
        len: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let len = len.min(buf.len() - buf.filled());
        check_range(offset, len as u64)?;
        let mut done = 0;
        while done < len {
            let (to, len) = buf.lend(len - done);
            let what = What::Read { to, len };
            // SAFETY: the memory is lent: until it is taken back, which is
            // after the end of the job, nobody gets at it through `buf`.
            let read = unsafe { self.job(file, what, offset + done as u64) }.await;
            buf.take_back();
            let read = read?;
            if read == 0 {
                break;
            }
            buf.advance(read);
            done += read;
        }
        Ok(done)
    }

    /// Writes all of `data` at `offset` of `file`.
    pub async fn write_at(&self, file: BorrowedFd<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        check_range(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let (from, len) = (rest.as_ptr(), rest.len());
            let what = What::Write { from, len };
            // SAFETY: `data` is borrowed, and what of it is the request's stays
            // as it is until the engine has settled with the port.
            match unsafe { self.job(file, what, offset + done as u64) }.await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Makes what was written to `file` durable; with `data_only`, not such
    /// attributes as nobody needs to read it back: as fdatasync(2).
    pub async fn sync(&self, file: BorrowedFd<'_>, data_only: bool) -> io::Result<()> {
        // SAFETY: no memory is spoken of.
        let synced = unsafe { self.job(file, What::Sync { data_only }, 0) };
        synced.await.map(drop)
    }

    /// Punches a hole into `file`: the range's storage is given back, and it
    /// reads as zeroes. The length of the file stays. Unsupported: the file
    /// cannot do that, or not for this range.
    pub async fn discard(&self, file: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(file, What::Discard { bytes }, offset, bytes)
            .await
    }

    /// Makes the range of `file` read as zeroes, while its storage stays or
    /// becomes allocated. The length of the file stays. Unsupported: as for
    /// [`discard`](Self::discard).
    pub async fn write_zeroes(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: u64,
    ) -> io::Result<()> {
        self.allocate(file, What::WriteZeroes { bytes }, offset, bytes)
            .await
    }

    async fn allocate(
        &self,
        file: BorrowedFd<'_>,
        what: What,
        offset: u64,
        bytes: u64,
    ) -> io::Result<()> {
        check_range(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: no memory is spoken of.
        match unsafe { self.job(file, what, offset) }.await {
            // The range is fine: a device does this by whole sectors only.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => unsupported(),
            result => result.map(drop),
        }
    }

    /// One system call's worth. May transfer less than was asked for.
    ///
    /// # Safety
    ///
    /// The memory that `what` speaks of must be valid, and be used by nobody
    /// else (for a write: changed by nobody), as long as the future lives, and
    /// what of it is the request's also after that, until
    /// [`settled`](Self::settled).
    async unsafe fn job(&self, file: BorrowedFd<'_>, what: What, offset: u64) -> io::Result<usize> {
        // SAFETY: the caller's promise; `file` is open as long as this runs.
        let call = unsafe { Call::new(file, what, offset) };
        let kept = self.kept(&what);
        let mut kept = kept.filter(|(port, _)| !port.is_copy(&call));
        loop {
            let result = match &kept {
                Some((port, keeper)) => {
                    let unfinished = &self.unfinished;
                    // SAFETY: the memory, if any, is the request's: whatever
                    // becomes of this future, nobody uses it until the engine
                    // has settled with the port, and it stays mapped.
                    unsafe { port.leave(self.slot, unfinished, file, call, keeper.clone()) }.await
                }
                None => call.run(),
            };
            match result {
                Err(Errno::EINTR) => {}
                // To be had only by waiting.
                Err(Errno::EAGAIN) if kept.is_some() => kept = None,
                result => return result.map_err(io::Error::from),
            }
        }
    }

    /// Where to leave a job, and what keeps its memory; `None` if that is not
    /// the request's own, and could go while the job is under way.
    fn kept(&self, what: &What) -> Option<(&'a Port, Option<Keeper>)> {
        let Home { port, payload } = self.home.as_ref()?;
        let (start, len) = match *what {
            What::Read { to, len } => (to.addr(), len),
            What::Write { from, len } => (from.addr(), len),
            _ => return Some((port, None)),
        };
        let keeper = payload.keeper_of(start, len)?;
        Some((port, Some(keeper)))
    }

    /// Waits until no job of the request is in flight, though nobody waits for
    /// it any more: a driver may have dropped a future midway.
    pub(crate) async fn settled(&self) {
        if self.unfinished.get() > 0
            && let Some(home) = &self.home
        {
            poll_fn(|cx| home.port.settle(self.slot, cx.waker())).await;
            self.unfinished.set(0);
        }
    }
}

/// Refuses what no file has, and what would mean something else to the kernel.
fn check_range(offset: u64, bytes: u64) -> io::Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Errno::EINVAL.into()),
    }
}

/// A queue that begins to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueInfo {
    /// The queue's number, from 0.
    pub index: usize,
    /// How many requests it can have in flight at once.
    pub slots: usize,
}

/// Where a read's bytes go: a part of the request's own payload.
///
/// It is filled from its beginning, all at once or piece by piece. It holds
/// what an earlier request left there; therefore a read that succeeds without
/// having filled it is answered with `EIO`.
///
/// While [`Io::read_at`] works on it nobody else can, also if its future was
/// dropped midway: then whatever would touch the bytes panics, and the request
/// can only fail.
#[derive(Debug)]
pub struct ReadBuf<'a> {
    data: &'a mut [u8],
    /// What is known of the memory, if it is a payload.
    traces: Option<&'a mut Traces>,
    /// How many bytes have been set.
    filled: usize,
    /// The kernel is, or may be, writing to what is not filled.
    lent: bool,
}

impl<'a> ReadBuf<'a> {
    /// `data` is the beginning of what `traces` speaks of.
    pub(crate) fn new(data: &'a mut [u8], traces: &'a mut Traces) -> Self {
        Self {
            data,
            traces: Some(traces),
            filled: 0,
            lent: false,
        }
    }

    /// How many bytes are to be read; never 0.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a read of nothing never reaches a driver"
    )]
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// The bytes, all of which the driver must set; they count as filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.check_not_lent();
        self.filled = self.data.len();
        self.wrote(self.data.len());
        self.data
    }

    /// Sets all bytes to zero, at no cost where they are known to be.
    pub fn zero(&mut self) {
        self.check_not_lent();
        self.filled = 0;
        self.zero_rest();
    }

    /// Sets to zero what is not filled yet.
    pub fn zero_rest(&mut self) {
        self.check_not_lent();
        let (start, len) = (self.filled, self.data.len());
        self.filled = len;
        let Some(traces) = &mut self.traces else {
            return self.data[start..].fill(0);
        };
        let dirty = traces.dirty.clamp(start, len);
        self.data[start..dirty].fill(0);
        if traces.untouched < len {
            self.data[traces.untouched.max(start)..].fill(0);
            traces.untouched = len;
        }
        if traces.dirty <= len {
            traces.dirty = traces.dirty.min(start);
        }
    }

    /// How many bytes, from the first on, have been set.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// What has not been set yet; [`advance`](Self::advance) says how much of
    /// it is.
    pub fn unfilled(&mut self) -> &mut [u8] {
        self.check_not_lent();
        self.wrote(self.data.len());
        &mut self.data[self.filled..]
    }

    /// The next `bytes` bytes have been set.
    pub fn advance(&mut self, bytes: usize) {
        self.check_not_lent();
        let filled = self.filled + bytes;
        assert!(filled <= self.data.len(), "more than the buffer holds");
        self.filled = filled;
    }

    pub(crate) fn is_filled(&self) -> bool {
        self.filled == self.data.len() && !self.lent
    }

    /// At most `len` of the bytes that are not filled, for the kernel to write
    /// to until they are taken back.
    fn lend(&mut self, len: usize) -> (*mut u8, usize) {
        self.check_not_lent();
        self.lent = true;
        self.wrote(self.filled + len);
        let bytes = &mut self.data[self.filled..][..len];
        (bytes.as_mut_ptr(), len)
    }

    /// Somebody writes to the first `len` bytes.
    fn wrote(&mut self, len: usize) {
        if let Some(traces) = &mut self.traces {
            traces.wrote(len);
        }
    }

    fn take_back(&mut self) {
        self.lent = false;
    }

    fn check_not_lent(&self) {
        assert!(!self.lent, "a read into this buffer has been given up");
    }
}

/// For tests of drivers: memory of the test's own.
impl<'a> From<&'a mut [u8]> for ReadBuf<'a> {
    fn from(data: &'a mut [u8]) -> Self {
        Self {
            data,
            traces: None,
            filled: 0,
            lent: false,
        }
    }
}

/// What a device prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The preferred size of one I/O in bytes, shown as `st_blksize`; a power
    /// of two of at least 512.
    pub block_size: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { block_size: 4096 }
    }
}

/// What a driver can do; an export that asks for more does not start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// [`BlockDriver::write`] works: the export may be writable.
    pub write: bool,
    /// [`BlockDriver::truncate`] works: the export may be growable.
    pub truncate: bool,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes, at least 1.
    pub bytes: u64,
    /// Whether it reads as zeroes because nothing is stored there.
    pub hole: bool,
}

/// What can happen to an export without its owner's doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The file can be used.
    Started,
    /// The export has given up: requests in flight are still answered, every
    /// other one fails. The owner should delete it, though not from within
    /// this method.
    Halted {
        /// The reason as a positive errno.
        errno: i32,
        /// The reason in words.
        message: String,
    },
    /// Somebody else unmounted the file. The owner should delete the export,
    /// though not from within this method.
    Unmounted,
}

//! The block driver: what a program supplies to have its device exported.
//!
//! [`BlockDriver`] is the one interface the engine calls. It knows nothing of
//! FUSE. The C API's table of callbacks is one implementation of it.
//!
//! Every data method is asynchronous: a driver that has the answer at hand
//! returns a ready future and costs no allocation; one that must wait returns
//! a future which the queue's executor polls again after it was woken, from
//! whatever thread.

use std::future::Future;
use std::io;
use std::os::fd::BorrowedFd;

use crate::slot::Traces;

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
    /// that queue. An error makes the export's start fail.
    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        Ok(())
    }

    /// A queue has ended: no request of it is in flight, none will follow.
    /// Called on its thread, once for each successful
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
    // The lifetime is that of the request; it keeps an `Io` from outliving it.
    _request: std::marker::PhantomData<&'a ()>,
}

impl Io<'_> {
    pub(crate) fn new(queue: usize, slot: usize) -> Self {
        Self {
            queue,
            slot,
            _request: std::marker::PhantomData,
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
/// It holds what an earlier request left there. Therefore a read that
/// succeeds without having touched it is answered with `EIO`.
#[derive(Debug)]
pub struct ReadBuf<'a> {
    data: &'a mut [u8],
    traces: &'a mut Traces,
    filled: bool,
}

impl<'a> ReadBuf<'a> {
    /// `data` is the beginning of what `traces` speaks of.
    pub(crate) fn new(data: &'a mut [u8], traces: &'a mut Traces) -> Self {
        Self {
            data,
            traces,
            filled: false,
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

    /// The bytes, all of which the driver must set.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.filled = true;
        self.traces.wrote(self.data.len());
        self.data
    }

    /// Sets all bytes to zero, at no cost where they are known to be.
    pub fn zero(&mut self) {
        self.filled = true;
        let len = self.data.len();
        self.data[..self.traces.dirty.min(len)].fill(0);
        if self.traces.untouched < len {
            self.data[self.traces.untouched..].fill(0);
            self.traces.untouched = len;
        }
        if self.traces.dirty <= len {
            self.traces.dirty = 0;
        }
    }

    pub(crate) fn is_filled(&self) -> bool {
        self.filled
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

//! The table of C callbacks as a block driver.

use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use super::error::{c_text, invalid};
use super::request::{
    Answer, BLKFUSE_PENDING, CRequest, blkfuse_extent, blkfuse_request, result_of,
};
use crate::config::QUEUES_LIMIT;
use crate::driver::{BlockDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};
use crate::error::{Error, Result};

/// The version of struct blkfuse_driver_ops that this header describes.
pub const BLKFUSE_API_VERSION: u32 = 1;

/// write_zeroes: the range's storage may be given back.
pub const BLKFUSE_MAY_UNMAP: u32 = 1;
/// struct blkfuse_extent: nothing is stored there; it reads as zeroes.
pub const BLKFUSE_EXTENT_HOLE: u32 = 1;

/// The file can be used.
pub const BLKFUSE_EVENT_STARTED: u32 = 1;
/// The export has given up: requests in flight are still answered, others
/// fail. `error` and `message` say why. The host should delete it, though not
/// from within the callback.
pub const BLKFUSE_EVENT_HALTED: u32 = 2;
/// Somebody else unmounted the file. The host should delete the export, though
/// not from within the callback.
pub const BLKFUSE_EVENT_UNMOUNTED: u32 = 3;

/// What a device prefers. Grows only at its end.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct blkfuse_limits {
    /// sizeof(struct blkfuse_limits) as the library knows it; a host must not
    /// touch members beyond it.
    pub struct_size: usize,
    /// The preferred size of one I/O in bytes, shown as st_blksize: a power of
    /// two of at least 512. Preset to 4096.
    pub block_size: u32,
    /// 0.
    pub reserved: u32,
}

/// A block driver: what the host implements.
///
/// Fill in by blkfuse_driver_ops_init() or BLKFUSE_DRIVER_OPS_INIT and set what
/// the device can do; `length` and `read` are required, everything else may be
/// NULL. The struct grows only at its end, and the library copies it.
///
/// Threads: callbacks are called from the threads of all queues at once; those
/// of one queue come one after the other. They should not block for long: a
/// queue serves nothing else meanwhile.
///
/// Data callbacks (read to block_status) return 0 for success, which means all
/// of it; a negative errno; or BLKFUSE_PENDING, after which the host calls
/// blkfuse_request_complete() or blkfuse_request_forward() exactly once. If
/// they did not return BLKFUSE_PENDING `request` is not valid any more. Buffers stay valid until
/// the request is completed, and are page-aligned. `flags` are 0 unless a
/// callback says otherwise; a callback that finds a flag it does not know must
/// fail with -ENOTSUP.
///
/// Any callback may call any function, except where that one says otherwise.
/// A callback must not longjmp through the library; one that unwinds through
/// it (a C++ exception) ends the process.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blkfuse_driver_ops {
    /// sizeof(struct blkfuse_driver_ops) as the host knows it.
    pub struct_size: usize,
    /// BLKFUSE_API_VERSION as the host knows it.
    pub api_version: u32,
    /// Bytes of blkfuse_request_ctx() that the host wants with each request;
    /// at most 1 MiB.
    pub request_ctx_size: u32,

    /// The device's length in bytes, or a negative errno. Required. Called by
    /// blkfuse_export_start() and blkfuse_export_resized().
    pub length: Option<unsafe extern "C-unwind" fn(opaque: *mut c_void) -> i64>,
    /// The bytes of storage that the device really occupies (st_blocks), or a
    /// negative errno; -ENOTSUP, or NULL: all of the length.
    pub allocated_size: Option<unsafe extern "C-unwind" fn(opaque: *mut c_void) -> i64>,
    /// Changes what is not as preset in `*limits`. Called by
    /// blkfuse_export_start().
    pub limits:
        Option<unsafe extern "C-unwind" fn(opaque: *mut c_void, limits: *mut blkfuse_limits)>,

    /// Reads `bytes` at `offset`, which lie within the length, into `buffer`.
    /// Success means that all of it was set: what a callback leaves as it was
    /// may be another request's. Required.
    pub read: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            buffer: *mut c_void,
            offset: u64,
            bytes: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Writes `bytes` at `offset`, which lie within the length. NULL: the
    /// export cannot be writable.
    pub write: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            buffer: *const c_void,
            offset: u64,
            bytes: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Makes durable everything that was written before. NULL: nothing is to
    /// be done for that.
    pub flush: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            flags: u32,
        ) -> c_int,
    >,
    /// Gives the range's storage back; afterwards it must read as zeroes. NULL
    /// or -ENOTSUP: write_zeroes with BLKFUSE_MAY_UNMAP is tried.
    pub discard: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            offset: u64,
            bytes: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Makes the range read as zeroes. Unless `flags` has BLKFUSE_MAY_UNMAP,
    /// its storage stays, or becomes, allocated. NULL or -ENOTSUP: zeroes are
    /// written.
    pub write_zeroes: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            offset: u64,
            bytes: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Sets the length. What is cut off is gone; what is added reads as
    /// zeroes. One at a time, and no write, discard or zeroing is in flight
    /// when the length becomes smaller. NULL: the export cannot be growable,
    /// and clients cannot truncate.
    pub truncate: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            length: u64,
            flags: u32,
        ) -> c_int,
    >,
    /// Stores in `*extent` what is at `offset`: it starts there, and may be
    /// longer or shorter than `bytes`. NULL or -ENOTSUP: everything counts as
    /// data.
    pub block_status: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            request: *mut blkfuse_request,
            offset: u64,
            bytes: u64,
            extent: *mut blkfuse_extent,
            flags: u32,
        ) -> c_int,
    >,

    /// Queue `queue` (from 0) begins to serve; called on its thread before
    /// anything else of it. May store a pointer in `*queue_ctx`. Returns 0 or
    /// a negative errno, which makes the start fail, or blkfuse_queue_attach(),
    /// which calls this anew for every thread.
    pub queue_start: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            queue: u32,
            queue_ctx: *mut *mut c_void,
        ) -> c_int,
    >,
    /// The queue has ended, or its thread leaves it; called on its thread, once
    /// for each queue_start that returned 0.
    pub queue_stop: Option<
        unsafe extern "C-unwind" fn(opaque: *mut c_void, queue: u32, queue_ctx: *mut c_void),
    >,
    /// Requests will follow on this queue: their submission may be held back
    /// until batch_end.
    pub batch_begin: Option<
        unsafe extern "C-unwind" fn(opaque: *mut c_void, queue: u32, queue_ctx: *mut c_void),
    >,
    /// The batch is over.
    pub batch_end: Option<
        unsafe extern "C-unwind" fn(opaque: *mut c_void, queue: u32, queue_ctx: *mut c_void),
    >,

    /// In a drain, the number of requests in flight has become 0: ask
    /// blkfuse_export_drain_poll(). From any queue's thread; may come more
    /// often than needed, and late.
    pub idle: Option<unsafe extern "C-unwind" fn(opaque: *mut c_void)>,
    /// Something has happened: BLKFUSE_EVENT_*. From any thread. `error` is 0
    /// or a negative errno, `message` a sentence or "", valid in the call.
    pub event: Option<
        unsafe extern "C-unwind" fn(
            opaque: *mut c_void,
            event: u32,
            error: c_int,
            message: *const c_char,
        ),
    >,
    /// The export has gone; no callback is running or will follow. Called
    /// once for each successful blkfuse_export_create().
    pub deleted: Option<unsafe extern "C-unwind" fn(opaque: *mut c_void)>,

    /// A descriptor of the regular file whose bytes are the device's, each at
    /// its own offset, for the property "passthrough"; or a negative errno:
    /// there is none. It stays the host's, must stay open until `deleted`, and
    /// may be opened in any mode: the kernel opens the file anew for each
    /// client. Called by blkfuse_export_start() and blkfuse_export_resized().
    /// NULL: there is none.
    pub backing_fd: Option<unsafe extern "C-unwind" fn(opaque: *mut c_void) -> c_int>,
}

/// The most that a host may want with each request.
const REQUEST_CTX_LIMIT: u32 = 1 << 20;

/// A driver that C code has described by a table of callbacks, for an export
/// of a Rust program's: what `blkfuse_export_create()` makes of its arguments.
///
/// It can be exported once. When it is dropped the table's callback `deleted`
/// is called.
pub struct CDriver {
    queues: Box<[OnceLock<CQueue>]>,
    host: Arc<Host>,
}

/// What the host gave; its last owner tells it that the export has gone.
struct Host {
    ops: blkfuse_driver_ops,
    opaque: *mut c_void,
}

/// What the host has for one queue.
struct CQueue {
    ctx: AtomicPtr<c_void>,
    requests: Box<[CRequest]>,
}

impl fmt::Debug for CDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CDriver").finish_non_exhaustive()
    }
}

// SAFETY: the host promises that its callbacks can be called from any thread
// with its pointer, which is only ever handed to them.
unsafe impl Send for Host {}
// SAFETY: as above, from several threads at once.
unsafe impl Sync for Host {}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(deleted) = self.ops.deleted {
            // SAFETY: the host's callback with the host's pointer; the last
            // one, since this is the last owner.
            unsafe { deleted(self.opaque) };
        }
    }
}

/// The least table: up to and with what is required.
const LEAST_SIZE: usize =
    std::mem::offset_of!(blkfuse_driver_ops, read) + size_of::<Option<unsafe extern "C" fn()>>();

/// More than any table will ever have: a size that was not initialised.
const MOST_SIZE: usize = 4096;

impl CDriver {
    /// Takes a copy of the `struct blkfuse_driver_ops` at `ops`, whose
    /// callbacks will be called with `opaque`. `include/blkfuse.h` describes
    /// both, and what is refused with which errno.
    ///
    /// # Safety
    ///
    /// `ops` must be NULL, or point to as many bytes of such a struct as it
    /// says in its first member. Its callbacks must do what they promise when
    /// they are called with `opaque`, from whatever thread, until `deleted`.
    pub unsafe fn new(ops: *const c_void, opaque: *mut c_void) -> Result<Self> {
        let ops = ops.cast::<blkfuse_driver_ops>();
        if ops.is_null() {
            return Err(invalid("the driver's table is NULL"));
        }
        let full = size_of::<blkfuse_driver_ops>();
        // SAFETY: the caller promises a table, which has at least its size.
        let given = unsafe { (&raw const (*ops).struct_size).read() };
        if given < LEAST_SIZE {
            let text = format!("the driver's table has {given} bytes, and needs {LEAST_SIZE}");
            return Err(invalid(&text));
        }
        if given > MOST_SIZE || !given.is_multiple_of(size_of::<*const c_void>()) {
            let text = format!("the driver's table cannot have {given} bytes");
            return Err(invalid(&text));
        }
        let known = given.min(full);
        let mut copy = std::mem::MaybeUninit::<blkfuse_driver_ops>::zeroed();
        // SAFETY: both sides have `known` bytes. All zeroes is a valid table
        // (NULL callbacks), and so is the host's beginning of one.
        let copy = unsafe {
            copy.as_mut_ptr()
                .cast::<u8>()
                .copy_from_nonoverlapping(ops.cast(), known);
            copy.assume_init()
        };
        if copy.api_version == 0 || copy.api_version > BLKFUSE_API_VERSION {
            let text = format!(
                "the driver's table is of API version {}; this library knows {BLKFUSE_API_VERSION}",
                copy.api_version
            );
            return Err(Error::new(libc::ENOTSUP, text));
        }
        // SAFETY: the caller promises `given` bytes.
        let unknown =
            unsafe { std::slice::from_raw_parts(ops.cast::<u8>().add(known), given - known) };
        if unknown.iter().any(|byte| *byte != 0) {
            let text = "the driver's table has callbacks that this library does not know";
            return Err(Error::new(libc::E2BIG, text));
        }
        if copy.length.is_none() || copy.read.is_none() {
            return Err(invalid("a driver needs the callbacks length and read"));
        }
        if copy.request_ctx_size > REQUEST_CTX_LIMIT {
            return Err(invalid("request_ctx_size is more than 1 MiB"));
        }
        Ok(Self::of(Arc::new(Host { ops: copy, opaque })))
    }

    fn of(host: Arc<Host>) -> Self {
        Self {
            queues: (0..QUEUES_LIMIT).map(|_| OnceLock::new()).collect(),
            host,
        }
    }

    /// The same host's driver, for another start.
    pub(super) fn again(&self) -> Self {
        Self::of(self.host.clone())
    }

    fn request(&self, io: &Io<'_>) -> &CRequest {
        let queue = self.queues[io.queue()].get();
        &queue.expect("a queue starts before it serves").requests[io.slot()]
    }

    fn queue_ctx(&self, queue: usize) -> *mut c_void {
        self.queues[queue]
            .get()
            .map_or(std::ptr::null_mut(), |q| q.ctx.load(Relaxed))
    }
}

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

/// A size, or the negative errno that a callback returned in its place.
fn size_of_device(value: i64) -> io::Result<u64> {
    u64::try_from(value).map_err(|_| match value {
        -4095..0 => io::Error::from_raw_os_error(-value as i32),
        _ => io::Error::from_raw_os_error(libc::EIO),
    })
}

// SAFETY, for all calls of callbacks below: the host promises by
// blkfuse_export_create() that the callbacks in its table can be called with
// its pointer, from the threads they are called from, and with what their
// descriptions say. Buffers are a slot's payload, which is neither moved nor
// used by anybody else until the request's future has ended, and it ends only
// when the host has completed the request.
impl BlockDriver for CDriver {
    fn length(&self) -> io::Result<u64> {
        let length = self.host.ops.length.ok_or_else(unsupported)?;
        // SAFETY: see above.
        size_of_device(unsafe { length(self.host.opaque) })
    }

    fn allocated_size(&self) -> io::Result<Option<u64>> {
        let Some(allocated_size) = self.host.ops.allocated_size else {
            return Ok(None);
        };
        // SAFETY: see above.
        match unsafe { allocated_size(self.host.opaque) } {
            value if value == -i64::from(libc::ENOTSUP) => Ok(None),
            value => size_of_device(value).map(Some),
        }
    }

    fn limits(&self) -> Limits {
        let mut limits = blkfuse_limits {
            struct_size: size_of::<blkfuse_limits>(),
            block_size: Limits::default().block_size,
            reserved: 0,
        };
        if let Some(callback) = self.host.ops.limits {
            // SAFETY: see above; the struct is a live local.
            unsafe { callback(self.host.opaque, &mut limits) };
        }
        Limits {
            block_size: limits.block_size,
        }
    }

    fn features(&self) -> Features {
        Features {
            write: self.host.ops.write.is_some(),
            truncate: self.host.ops.truncate.is_some(),
        }
    }

    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        let backing_fd = self.host.ops.backing_fd?;
        // SAFETY: see above.
        let fd = unsafe { backing_fd(self.host.opaque) };
        // SAFETY: the host promises a descriptor that is open until `deleted`,
        // which is called no sooner than `self` is dropped.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        let callback = self.host.ops.read.ok_or_else(unsupported)?;
        let bytes = buf.unfilled();
        let (buffer, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        let request = self.request(io);
        // SAFETY: see above.
        let call =
            |name| unsafe { callback(self.host.opaque, name, buffer, offset, len as u64, 0) };
        match request.run_or_forward(call).await {
            Answer::Result(result) => {
                result?;
                buf.advance(len);
            }
            Answer::Forward(place) => {
                io.read_at(place.file(), buf, len, place.offset).await?;
                buf.zero_rest();
            }
        }
        Ok(())
    }

    async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        let callback = self.host.ops.write.ok_or_else(unsupported)?;
        let (buffer, len) = (data.as_ptr().cast(), data.len() as u64);
        let request = self.request(io);
        // SAFETY: see above.
        let call = |name| unsafe { callback(self.host.opaque, name, buffer, offset, len, 0) };
        match request.run_or_forward(call).await {
            Answer::Result(result) => result,
            Answer::Forward(place) => io.write_at(place.file(), data, place.offset).await,
        }
    }

    async fn flush(&self, io: &Io<'_>) -> io::Result<()> {
        let Some(callback) = self.host.ops.flush else {
            return Ok(());
        };
        // SAFETY: see above.
        let call = |name| unsafe { callback(self.host.opaque, name, 0) };
        match self.request(io).run_or_forward(call).await {
            Answer::Result(result) => result,
            Answer::Forward(place) => io.sync(place.file(), true).await,
        }
    }

    async fn discard(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        let callback = self.host.ops.discard.ok_or_else(unsupported)?;
        // SAFETY: see above.
        let call = |name| unsafe { callback(self.host.opaque, name, offset, bytes, 0) };
        match self.request(io).run_or_forward(call).await {
            Answer::Result(result) => result,
            Answer::Forward(place) => io.discard(place.file(), place.offset, bytes).await,
        }
    }

    async fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        let callback = self.host.ops.write_zeroes.ok_or_else(unsupported)?;
        let flags = if may_unmap { BLKFUSE_MAY_UNMAP } else { 0 };
        // SAFETY: see above.
        let call = |name| unsafe { callback(self.host.opaque, name, offset, bytes, flags) };
        let place = match self.request(io).run_or_forward(call).await {
            Answer::Result(result) => return result,
            Answer::Forward(place) => place,
        };
        if may_unmap {
            match io.discard(place.file(), place.offset, bytes).await {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        io.write_zeroes(place.file(), place.offset, bytes).await
    }

    async fn truncate(&self, io: &Io<'_>, length: u64) -> io::Result<()> {
        let callback = self.host.ops.truncate.ok_or_else(unsupported)?;
        // SAFETY: see above.
        let call = |name, _| unsafe { callback(self.host.opaque, name, length, 0) };
        self.request(io).run(call).await
    }

    async fn block_status(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<Extent> {
        let callback = self.host.ops.block_status.ok_or_else(unsupported)?;
        let request = self.request(io);
        // SAFETY: see above; the extent is the request's own, and the host's
        // until the request is completed.
        let call =
            |name, extent| unsafe { callback(self.host.opaque, name, offset, bytes, extent, 0) };
        request.run(call).await?;
        let extent = request.extent();
        Ok(Extent {
            bytes: extent.bytes,
            hole: extent.flags & BLKFUSE_EXTENT_HOLE != 0,
        })
    }

    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        let mut ctx = std::ptr::null_mut();
        if let Some(queue_start) = self.host.ops.queue_start {
            // SAFETY: see above; the place is a live local.
            result_of(unsafe { queue_start(self.host.opaque, queue.index as u32, &mut ctx) })?;
        }
        let size = self.host.ops.request_ctx_size as usize;
        let queue = self.queues[queue.index].get_or_init(|| CQueue {
            ctx: AtomicPtr::default(),
            requests: (0..queue.slots).map(|_| CRequest::new(size)).collect(),
        });
        queue.ctx.store(ctx, Relaxed);
        queue.requests.iter().for_each(|r| r.set_queue_ctx(ctx));
        Ok(())
    }

    fn queue_stop(&self, queue: usize) {
        if let Some(queue_stop) = self.host.ops.queue_stop {
            // SAFETY: see above.
            unsafe { queue_stop(self.host.opaque, queue as u32, self.queue_ctx(queue)) };
        }
    }

    fn batch_begin(&self, queue: usize) {
        if let Some(batch_begin) = self.host.ops.batch_begin {
            // SAFETY: see above.
            unsafe { batch_begin(self.host.opaque, queue as u32, self.queue_ctx(queue)) };
        }
    }

    fn batch_end(&self, queue: usize) {
        if let Some(batch_end) = self.host.ops.batch_end {
            // SAFETY: see above.
            unsafe { batch_end(self.host.opaque, queue as u32, self.queue_ctx(queue)) };
        }
    }

    fn idle(&self) {
        if let Some(idle) = self.host.ops.idle {
            // SAFETY: see above.
            unsafe { idle(self.host.opaque) };
        }
    }

    fn event(&self, event: &Event) {
        let Some(callback) = self.host.ops.event else {
            return;
        };
        let (code, errno, text) = match event {
            Event::Started => (BLKFUSE_EVENT_STARTED, 0, ""),
            Event::Halted { errno, message } => (BLKFUSE_EVENT_HALTED, *errno, message.as_str()),
            Event::Unmounted => (BLKFUSE_EVENT_UNMOUNTED, 0, ""),
        };
        let text = c_text(text);
        // SAFETY: see above; the text lives through the call.
        unsafe { callback(self.host.opaque, code, -errno, text.as_ptr()) };
    }
}

const _: () = assert!(BLKFUSE_PENDING > 0, "0 and negative values are results");

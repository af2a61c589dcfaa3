//! A request as C sees it, and its completion from any thread.
//!
//! Each slot of each queue has one [`CRequest`], used by one request after the
//! other. What the host gets is its address with the number of the use in the
//! low bits: a completion that comes twice, or for a request that was answered
//! long ago, is noticed as long as the export lives.
//!
//! The state is one word, so that the callback's return and a completion from
//! another thread cannot both win or both lose:
//!
//! ```text
//!   Idle --begin--> Calling --returned PENDING--> Waiting --complete--> Waking --> Done
//!                      |\-------------------complete---------------------------------^
//!                      \---forward---> Storing --returned PENDING--> Waking --> Done
//!                                         \----------------------------------------^
//! ```
//!
//! The completing thread touches the waker only between Waking and Done, when
//! the queue leaves it alone, and nothing at all after Done. A request is
//! forwarded instead in the same way, but for the place, which is more than a
//! word: it is stored in Storing or Waking.

use std::cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering::*};
use std::task::{Context, Poll, Waker};

use super::error::{guard, invalid};
use crate::error::{Error, Result};
use crate::sync::{AtomicU64, UnsafeCell};

/// A callback's answer: the host will call blkfuse_request_complete().
pub const BLKFUSE_PENDING: c_int = 1;

/// A request in flight. The pointer is a name, not an address to look at.
pub struct blkfuse_request {
    _private: [u8; 0],
}

/// A run of bytes of one kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct blkfuse_extent {
    /// Its length in bytes, at least 1.
    pub bytes: u64,
    /// BLKFUSE_EXTENT_HOLE or 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// How many uses of a request can be told apart; its alignment.
const USES: usize = 1024;

/// One slot's request.
#[repr(align(1024))]
pub(super) struct CRequest {
    state: AtomicU64,
    waker: UnsafeCell<Option<Waker>>,
    /// Where a block_status callback stores its answer.
    extent: cell::UnsafeCell<blkfuse_extent>,
    /// Where the host has the request done, if it is forwarded.
    offset: AtomicU64,
    queue_ctx: AtomicPtr<c_void>,
    /// The host's room, in units that are aligned for anything; dangling if
    /// there are none. Not a `Box`: the host's pointers into it may be used
    /// whatever this side does.
    ctx: NonNull<[u128]>,
}

const _: () = assert!(align_of::<CRequest>() == USES);

// SAFETY: `waker` is written by the queue's thread in Idle and used by one
// completing thread in Waking, which the state keeps apart; `extent` is the
// host's between begin and completion, and the queue's thread's otherwise;
// `ctx` is never changed, only what it points to is, by the host.
unsafe impl Sync for CRequest {}
// SAFETY: nothing in it is tied to a thread.
unsafe impl Send for CRequest {}

/// Where a use of a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    Idle,
    Calling,
    Waiting,
    Waking,
    Done,
    Storing,
}

/// The state's parts: the use's number, its phase, the completion's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    usage: u16,
    phase: Phase,
    /// Whether the request is of a kind that can be forwarded.
    forwardable: bool,
    /// It was; the result is the descriptor.
    forwarded: bool,
    result: i32,
}

/// What the host has said to a request.
#[derive(Debug)]
pub(super) enum Answer {
    Result(io::Result<()>),
    /// To do it there.
    Forward(Place),
}

/// A place in another file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    fd: RawFd,
    pub(super) offset: u64,
}

impl Place {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        // SAFETY: the host promises, by blkfuse_request_forward(), that the
        // descriptor stays open until the request is answered.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl State {
    fn pack(self) -> u64 {
        u64::from(self.usage) << 48
            | u64::from(self.forwarded) << 41
            | u64::from(self.forwardable) << 40
            | (self.phase as u64) << 32
            | u64::from(self.result as u32)
    }

    fn unpack(word: u64) -> Self {
        let phase = match (word >> 32) as u8 {
            0 => Phase::Idle,
            1 => Phase::Calling,
            2 => Phase::Waiting,
            3 => Phase::Waking,
            4 => Phase::Done,
            _ => Phase::Storing,
        };
        Self {
            usage: (word >> 48) as u16,
            phase,
            forwardable: word >> 40 & 1 == 1,
            forwarded: word >> 41 & 1 == 1,
            result: word as u32 as i32,
        }
    }
}

impl CRequest {
    pub(super) fn new(ctx_size: usize) -> Self {
        Self {
            state: AtomicU64::new(0),
            waker: UnsafeCell::new(None),
            extent: cell::UnsafeCell::default(),
            offset: AtomicU64::new(0),
            queue_ctx: AtomicPtr::default(),
            ctx: Box::leak(vec![0u128; ctx_size.div_ceil(size_of::<u128>())].into_boxed_slice())
                .into(),
        }
    }

    /// What the host has for the queue, and its thread, from now on.
    pub(super) fn set_queue_ctx(&self, queue_ctx: *mut c_void) {
        self.queue_ctx.store(queue_ctx, Relaxed);
    }

    /// The queue's thread begins a use; returns the host's name for it.
    fn begin(&self, waker: &Waker, forwardable: bool) -> *mut blkfuse_request {
        let before = State::unpack(self.state.load(Acquire));
        debug_assert_eq!(before.phase, Phase::Idle);
        self.waker.with_mut(|place| {
            // SAFETY: in Idle no other thread touches the waker: a completing
            // one does so only in Waking, which it alone can leave, for Done,
            // and only this thread turns Done into Idle.
            let place = unsafe { &mut *place };
            if !place.as_ref().is_some_and(|w| w.will_wake(waker)) {
                *place = Some(waker.clone());
            }
        });
        // SAFETY: in Idle the extent is the queue's thread's.
        unsafe { *self.extent.get() = blkfuse_extent::default() };
        let usage = (before.usage + 1) % USES as u16;
        let state = State {
            usage,
            phase: Phase::Calling,
            forwardable,
            forwarded: false,
            result: 0,
        };
        self.state.store(state.pack(), Release);
        let base = (&raw const *self).cast_mut().cast::<blkfuse_request>();
        base.wrapping_byte_add(usize::from(usage))
    }

    /// The callback has returned `answer`. Ready with the request's answer, or
    /// pending until there is one.
    fn returned(&self, answer: c_int) -> Poll<Answer> {
        let mut word = self.state.load(Acquire);
        loop {
            let state = State::unpack(word);
            let phase = match state.phase {
                Phase::Calling if answer == BLKFUSE_PENDING => Phase::Waiting,
                Phase::Calling => Phase::Idle,
                // Whoever forwards it is told to wake us.
                Phase::Storing => Phase::Waking,
                _ => {
                    check_pending(answer);
                    return self.poll_done();
                }
            };
            let next = State {
                phase,
                result: 0,
                ..state
            };
            match self
                .state
                .compare_exchange_weak(word, next.pack(), AcqRel, Acquire)
            {
                Err(now) => word = now,
                Ok(_) if phase == Phase::Idle => {
                    return Poll::Ready(Answer::Result(result_of(answer)));
                }
                Ok(_) => {
                    check_pending(answer);
                    return Poll::Pending;
                }
            }
        }
    }

    /// The answer, if the host has given it.
    fn poll_done(&self) -> Poll<Answer> {
        let state = State::unpack(self.state.load(Acquire));
        if state.phase != Phase::Done {
            return Poll::Pending;
        }
        let answer = if state.forwarded {
            Answer::Forward(Place {
                fd: state.result,
                offset: self.offset.load(Relaxed),
            })
        } else {
            Answer::Result(result_of(state.result))
        };
        let idle = State {
            phase: Phase::Idle,
            forwarded: false,
            result: 0,
            ..state
        };
        self.state.store(idle.pack(), Release);
        Poll::Ready(answer)
    }

    /// The host has use `usage` done at `place`.
    fn forward(&self, usage: u16, place: Place) -> Result<()> {
        let mut word = self.state.load(Acquire);
        let mut claimed = loop {
            let state = State::unpack(word);
            let phase = match state.phase {
                _ if state.usage != usage => return Err(answered_already()),
                Phase::Calling => Phase::Storing,
                Phase::Waiting => Phase::Waking,
                _ => return Err(answered_already()),
            };
            if !state.forwardable {
                return Err(invalid("requests of this kind cannot be forwarded"));
            }
            let claimed = State { phase, ..state };
            match self
                .state
                .compare_exchange_weak(word, claimed.pack(), AcqRel, Acquire)
            {
                Ok(_) => break claimed,
                Err(now) => word = now,
            }
        };
        // Nobody else stores it: we alone have claimed this use.
        self.offset.store(place.offset, Relaxed);
        claimed.forwarded = true;
        claimed.result = place.fd;
        if claimed.phase == Phase::Storing {
            let storing = State {
                forwarded: false,
                result: 0,
                ..claimed
            };
            let done = State {
                phase: Phase::Done,
                ..claimed
            };
            let exchange =
                self.state
                    .compare_exchange(storing.pack(), done.pack(), AcqRel, Acquire);
            if exchange.is_ok() {
                // The callback's return will find it: nobody sleeps.
                return Ok(());
            }
        }
        self.finish(claimed);
        Ok(())
    }

    /// From Waking to Done, as `claimed` says; by who has claimed it.
    fn finish(&self, claimed: State) {
        let waker = self.waker.with(|waker| {
            // SAFETY: we alone have claimed this use, which is in Waking, and
            // until it is Done the queue's thread does not touch the waker.
            unsafe { &*waker }.clone()
        });
        let done = State {
            phase: Phase::Done,
            ..claimed
        };
        self.state.store(done.pack(), Release);
        // From here on the request, and with it the whole export, may be gone;
        // the waker keeps alive what it needs.
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The host completes use `usage` with `result`.
    fn complete(&self, usage: u16, result: i32) -> Result<()> {
        let mut word = self.state.load(Acquire);
        loop {
            let state = State::unpack(word);
            let next = match state.phase {
                _ if state.usage != usage => return Err(answered_already()),
                Phase::Calling => Phase::Done,
                Phase::Waiting => Phase::Waking,
                _ => return Err(answered_already()),
            };
            let claimed = State {
                phase: next,
                result,
                ..state
            };
            match self
                .state
                .compare_exchange_weak(word, claimed.pack(), AcqRel, Acquire)
            {
                Err(now) => word = now,
                // The callback's return will find it: nobody sleeps.
                Ok(_) if next == Phase::Done => return Ok(()),
                Ok(_) => {
                    self.finish(claimed);
                    return Ok(());
                }
            }
        }
    }

    /// Calls `callback` and waits for its request's end. `callback` gets the
    /// host's name for the request, and where to store an extent.
    pub(super) async fn run(
        &self,
        callback: impl FnOnce(*mut blkfuse_request, *mut blkfuse_extent) -> c_int,
    ) -> io::Result<()> {
        match self.call(false, callback).await {
            Answer::Result(result) => result,
            Answer::Forward(_) => unreachable!("refused"),
        }
    }

    /// As [`run`](Self::run), for a request that may be forwarded.
    pub(super) async fn run_or_forward(
        &self,
        callback: impl FnOnce(*mut blkfuse_request) -> c_int,
    ) -> Answer {
        self.call(true, |name, _| callback(name)).await
    }

    async fn call(
        &self,
        forwardable: bool,
        callback: impl FnOnce(*mut blkfuse_request, *mut blkfuse_extent) -> c_int,
    ) -> Answer {
        let mut callback = Some(callback);
        std::future::poll_fn(|cx: &mut Context<'_>| match callback.take() {
            Some(callback) => {
                let name = self.begin(cx.waker(), forwardable);
                self.returned(callback(name, self.extent.get()))
            }
            None => self.poll_done(),
        })
        .await
    }

    /// What the last callback stored.
    pub(super) fn extent(&self) -> blkfuse_extent {
        // SAFETY: called by the queue's thread after the request's end, when
        // the host has no claim to it any more.
        unsafe { *self.extent.get() }
    }
}

impl Drop for CRequest {
    fn drop(&mut self) {
        // SAFETY: `new` leaked this box, and the host has no claim to it any
        // more: no request is in flight.
        drop(unsafe { Box::from_raw(self.ctx.as_ptr()) });
    }
}

/// Says what is wrong with a callback that answers a request twice.
fn check_pending(returned: c_int) {
    if returned != BLKFUSE_PENDING {
        log::error!(
            "a driver callback completed or forwarded its request and also returned {returned}; \
             it must return BLKFUSE_PENDING"
        );
    }
}

fn answered_already() -> Error {
    let text = "the request was completed before, or its callback did not return BLKFUSE_PENDING";
    Error::new(libc::EALREADY, text)
}

/// What a host's result means: 0, or a negative errno; anything else is the
/// host's defect and must not count as success.
pub(super) fn result_of(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -4095..0 => Err(io::Error::from_raw_os_error(-result)),
        other => {
            log::error!("a driver answered {other}, which is neither 0 nor a negative errno");
            Err(io::Error::from_raw_os_error(libc::EIO))
        }
    }
}

/// The request behind a host's name for it, and which use is meant.
///
/// # Safety
/// `request` is NULL or was given to a callback of an export that still
/// lives: a request in flight keeps it alive.
unsafe fn resolve<'a>(request: *const blkfuse_request) -> Result<(&'a CRequest, u16)> {
    let usage = request.addr() % USES;
    let base = request.wrapping_byte_sub(usage).cast::<CRequest>();
    // SAFETY: `begin` made the name by adding the use's number to the address
    // of an aligned CRequest; the caller promises that it is still there.
    let request = unsafe { base.as_ref() }.ok_or_else(|| invalid("the request is NULL"))?;
    Ok((request, usage as u16))
}

/// Completes a request whose callback returned BLKFUSE_PENDING, or is about
/// to: 0 for success (all of it), or a negative errno. To be called exactly
/// once for each such request; afterwards its buffer and its request_ctx are
/// not the host's any more.
///
/// May be called from any thread, also before the callback has returned, in a
/// drain, and after blkfuse_export_delete(). It neither blocks nor calls back,
/// so the host may hold locks.
///
/// Returns 0; -EALREADY: the request was completed before, which is noticed
/// while the export lives and unless very many requests have come since;
/// -EINVAL: `request` is NULL.
///
/// # Safety
/// `request` must be NULL or have been given to a callback of an export that
/// has not gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_request_complete(
    request: *mut blkfuse_request,
    result: c_int,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (request, usage) = unsafe { resolve(request) }?;
        request.complete(usage, result).map(|()| 0)
    })
}

/// Has a request done elsewhere: its bytes are those from `offset` on of the
/// file that `fd` is open on, a regular file or a block device. The library
/// does the I/O itself, between that file and the request's buffer and without
/// a thread waiting for it, and completes the request. To be called in place
/// of blkfuse_request_complete(), with all that is said there; within the
/// callback, which then returns what this returns:
///
///   return blkfuse_request_forward(request, disk->fd, disk->start + offset);
///
/// or later, if the callback returned BLKFUSE_PENDING.
///
/// - read: as pread(2); what lies past the end of the file is zeroes
/// - write: as pwrite(2)
/// - flush: as fdatasync(2); `offset` is of no meaning
/// - discard: punches a hole with fallocate(2)
/// - write_zeroes: zeroes the range with fallocate(2), or punches a hole if it
///   comes with BLKFUSE_MAY_UNMAP
///
/// What a file cannot discard or zero is done as if the callback had returned
/// -ENOTSUP. Other errors of the I/O are the request's: also those of a
/// descriptor that is not open for what is asked of it. The descriptor must
/// stay open until the request has been answered, which a drain waits for; it
/// is used with its status flags, O_DIRECT and the alignment it wants among
/// them (the buffer is page-aligned).
///
/// Returns BLKFUSE_PENDING; -EALREADY: as for blkfuse_request_complete();
/// -EBADF: `fd` is negative; -EINVAL: `request` is NULL, or is a truncate or a
/// block_status. After an error the request is as it was before.
///
/// # Safety
/// As for blkfuse_request_complete(), and `fd` is open until the request has
/// been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_request_forward(
    request: *mut blkfuse_request,
    fd: c_int,
    offset: u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (request, usage) = unsafe { resolve(request) }?;
        if fd < 0 {
            let text = format!("a request cannot be forwarded to descriptor {fd}");
            return Err(Error::new(libc::EBADF, text));
        }
        let forwarded = request.forward(usage, Place { fd, offset });
        forwarded.map(|()| BLKFUSE_PENDING)
    })
}

/// The host's room of ops->request_ctx_size bytes for this request, aligned
/// for any type; NULL if the size is 0. What it holds at the beginning is
/// undefined. Valid until the request is completed.
///
/// # Safety
/// `request` must be NULL or a request in flight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_request_ctx(request: *mut blkfuse_request) -> *mut c_void {
    // SAFETY: the caller's promise.
    let Ok((request, _)) = (unsafe { resolve(request) }) else {
        return std::ptr::null_mut();
    };
    if request.ctx.is_empty() {
        return std::ptr::null_mut();
    }
    request.ctx.cast::<c_void>().as_ptr()
}

/// What ops->queue_start stored for the queue of this request, or NULL.
///
/// # Safety
/// `request` must be NULL or a request in flight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_request_queue_ctx(request: *mut blkfuse_request) -> *mut c_void {
    // SAFETY: the caller's promise.
    match unsafe { resolve(request) } {
        Ok((request, _)) => request.queue_ctx.load(Relaxed),
        Err(_) => std::ptr::null_mut(),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::Arc;
    use std::thread;

    struct Unpark(thread::Thread);

    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(output) => return output,
                Poll::Pending => thread::park(),
            }
        }
    }

    fn complete(name: usize, request: &CRequest, result: i32) -> c_int {
        let base = &raw const *request;
        let name = base.wrapping_byte_add(name - base.addr());
        // SAFETY: the request lives on the test's stack or in its Arc.
        unsafe { blkfuse_request_complete(name.cast::<blkfuse_request>().cast_mut(), result) }
    }

    #[test]
    fn a_synchronous_answer_is_the_result() {
        let request = CRequest::new(0);
        block_on(request.run(|_, _| 0)).unwrap();
        let error = block_on(request.run(|_, _| -libc::ENOSPC)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        for odd in [2, 4096, -4096, i32::MIN] {
            let error = block_on(request.run(|_, _| odd)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
    }

    #[test]
    fn a_completion_may_come_before_the_callback_returns() {
        let request = CRequest::new(0);
        let result = block_on(request.run(|name, _| {
            assert_eq!(complete(name.addr(), &request, -libc::EIO), 0);
            assert_eq!(complete(name.addr(), &request, 0), -libc::EALREADY);
            BLKFUSE_PENDING
        }));
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn a_completion_may_come_from_any_thread_at_any_time() {
        let rounds = if cfg!(miri) { 30 } else { 20_000 };
        let request = Arc::new(CRequest::new(16));
        let (send, receive) = std::sync::mpsc::channel::<(usize, i32)>();
        let completing = request.clone();
        let worker = thread::spawn(move || {
            for (name, result) in receive {
                assert_eq!(complete(name, &completing, result), 0);
                let again = complete(name, &completing, 0);
                assert_eq!(again, -libc::EALREADY);
            }
        });
        for round in 0..rounds {
            let expected = if round % 2 == 0 { 0 } else { -libc::EPERM };
            let result = block_on(request.run(|name, _| {
                send.send((name.addr(), expected)).unwrap();
                BLKFUSE_PENDING
            }));
            assert_eq!(result.is_ok(), expected == 0);
        }
        drop(send);
        worker.join().unwrap();
    }

    #[test]
    fn a_request_answered_by_return_cannot_be_completed_later() {
        let request = CRequest::new(0);
        let mut stale = 0;
        block_on(request.run(|name, _| {
            stale = name.addr();
            0
        }))
        .unwrap();
        assert_eq!(complete(stale, &request, 0), -libc::EALREADY);
        let result = block_on(request.run(|_, _| {
            assert_eq!(complete(stale, &request, 0), -libc::EALREADY);
            -libc::EROFS
        }));
        assert!(result.is_err());
    }

    fn forward(name: usize, request: &CRequest, fd: c_int, offset: u64) -> c_int {
        let base = &raw const *request;
        let name = base.wrapping_byte_add(name - base.addr());
        // SAFETY: the request lives on the test's stack or in its Arc.
        unsafe { blkfuse_request_forward(name.cast::<blkfuse_request>().cast_mut(), fd, offset) }
    }

    fn place(answer: Answer) -> (RawFd, u64) {
        match answer {
            Answer::Forward(place) => (place.fd, place.offset),
            Answer::Result(result) => panic!("not forwarded: {result:?}"),
        }
    }

    #[test]
    fn a_request_is_forwarded_or_completed_but_not_both() {
        let request = CRequest::new(0);
        let answer = block_on(request.run_or_forward(|name| {
            assert_eq!(forward(name.addr(), &request, -1, 9), -libc::EBADF);
            let pending = forward(name.addr(), &request, 7, 1 << 40);
            assert_eq!(forward(name.addr(), &request, 8, 0), -libc::EALREADY);
            assert_eq!(complete(name.addr(), &request, 0), -libc::EALREADY);
            pending
        }));
        assert_eq!(place(answer), (7, 1 << 40));
        let answer = block_on(request.run_or_forward(|name| {
            assert_eq!(complete(name.addr(), &request, -libc::EIO), 0);
            assert_eq!(forward(name.addr(), &request, 8, 0), -libc::EALREADY);
            BLKFUSE_PENDING
        }));
        assert!(matches!(answer, Answer::Result(Err(_))));
        // The use after a forwarded one is an ordinary one again.
        assert!(matches!(
            block_on(request.run_or_forward(|_| 0)),
            Answer::Result(Ok(()))
        ));
    }

    #[test]
    fn what_is_returned_beside_a_forward_does_not_count() {
        let request = CRequest::new(0);
        let answer = block_on(request.run_or_forward(|name| {
            forward(name.addr(), &request, 7, 3);
            -libc::EIO
        }));
        assert_eq!(place(answer), (7, 3));
    }

    #[test]
    fn some_requests_cannot_be_forwarded() {
        let request = CRequest::new(0);
        block_on(request.run(|name, _| {
            assert_eq!(forward(name.addr(), &request, 7, 0), -libc::EINVAL);
            0
        }))
        .unwrap();
    }

    #[test]
    fn a_request_may_be_forwarded_from_any_thread_at_any_time() {
        let rounds = if cfg!(miri) { 30 } else { 20_000 };
        let request = Arc::new(CRequest::new(0));
        let (send, receive) = std::sync::mpsc::channel::<(usize, c_int)>();
        let forwarding = request.clone();
        let worker = thread::spawn(move || {
            for (name, fd) in receive {
                let offset = 1000 + fd as u64;
                let forwarded = forward(name, &forwarding, fd, offset);
                assert_eq!(forwarded, BLKFUSE_PENDING);
                assert_eq!(forward(name, &forwarding, 0, 0), -libc::EALREADY);
            }
        });
        for fd in 0..rounds {
            let answer = block_on(request.run_or_forward(|name| {
                send.send((name.addr(), fd)).unwrap();
                BLKFUSE_PENDING
            }));
            assert_eq!(place(answer), (fd, 1000 + fd as u64));
        }
        drop(send);
        worker.join().unwrap();
    }

    #[test]
    fn contexts_are_aligned_and_apart() {
        let a = CRequest::new(17);
        let name = a.begin(Waker::noop(), false);
        // SAFETY: the request lives on this stack.
        let ctx = unsafe { blkfuse_request_ctx(name) };
        assert!(ctx.addr().is_multiple_of(16));
        // SAFETY: the room is at least 17 bytes.
        unsafe { ctx.cast::<u8>().write_bytes(7, 17) };
        // SAFETY: NULL is allowed.
        assert!(unsafe { blkfuse_request_ctx(std::ptr::null_mut()) }.is_null());
    }
}

#[cfg(all(test, loom))]
mod model {
    use std::sync::Arc;

    use loom::future::block_on;
    use loom::{model, thread};

    use super::*;

    /// A request, and a buffer that the host fills before it completes.
    struct Served {
        request: CRequest,
        buffer: UnsafeCell<i32>,
    }

    impl Served {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                request: CRequest::new(0),
                buffer: UnsafeCell::new(0),
            })
        }

        /// One use, whose callback begins with `call` and then returns
        /// `answer`.
        fn serve(&self, answer: c_int, call: impl FnOnce(u16)) -> io::Result<()> {
            block_on(self.request.run(|name, _| {
                call((name.addr() % USES) as u16);
                answer
            }))
        }

        /// The host fills the buffer and completes.
        fn complete(&self, usage: u16, filled: i32, result: i32) -> bool {
            // SAFETY: a model's access, which loom checks.
            self.buffer.with_mut(|buffer| unsafe { *buffer = filled });
            self.request.complete(usage, result).is_ok()
        }

        fn filled(&self) -> i32 {
            // SAFETY: a model's access, which loom checks.
            self.buffer.with(|buffer| unsafe { *buffer })
        }
    }

    fn error_of(result: io::Result<()>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn a_completion_meets_the_return_or_wakes() {
        model(|| {
            let served = Served::new();
            let mut completing = None;
            let result = served.serve(BLKFUSE_PENDING, |usage| {
                let served = served.clone();
                completing = Some(thread::spawn(move || served.complete(usage, 7, -5)));
            });
            assert_eq!(error_of(result), Some(5));
            assert_eq!(served.filled(), 7, "what the host did before is seen");
            assert!(completing.unwrap().join().unwrap());
        });
    }

    #[test]
    fn of_two_completions_one_counts() {
        model(|| {
            let served = Served::new();
            let mut completing = Vec::new();
            let result = served.serve(BLKFUSE_PENDING, |usage| {
                for result in [-1, -2] {
                    let served = served.clone();
                    completing.push(thread::spawn(move || {
                        (result, served.request.complete(usage, result).is_ok())
                    }));
                }
            });
            let ends = completing.into_iter().map(|t| t.join().unwrap());
            let counted: Vec<_> = ends.filter(|(_, ok)| *ok).collect();
            assert_eq!(counted.len(), 1);
            assert_eq!(error_of(result), Some(-counted[0].0));
        });
    }

    /// The thread of the first completion may still be at it when the slot
    /// serves its next request, with another waker.
    #[test]
    fn the_next_use_has_nothing_to_do_with_the_last() {
        model(|| {
            let served = Served::new();
            let mut completing = Vec::new();
            for n in 1..=2 {
                let result = served.serve(BLKFUSE_PENDING, |usage| {
                    let served = served.clone();
                    completing.push(thread::spawn(move || {
                        assert!(served.complete(usage, n, -n));
                        // A defect of the host, and noticed.
                        assert!(served.request.complete(usage, 0).is_err());
                    }));
                });
                assert_eq!(error_of(result), Some(n));
                assert_eq!(served.filled(), n);
            }
            completing.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    /// One use that may be forwarded, for which `others` run beside the
    /// callback's return; the answer as an errno or an offset, and whether each
    /// of them was accepted.
    fn serve_beside(
        served: &Arc<Served>,
        others: &[fn(&CRequest, u16) -> bool],
    ) -> (std::result::Result<u64, i32>, Vec<bool>) {
        let mut running = Vec::new();
        let answer = block_on(served.request.run_or_forward(|name| {
            let usage = (name.addr() % USES) as u16;
            for other in others.iter().copied() {
                let served = served.clone();
                running.push(thread::spawn(move || other(&served.request, usage)));
            }
            BLKFUSE_PENDING
        }));
        let answer = match answer {
            Answer::Forward(place) => Ok(place.offset),
            Answer::Result(result) => Err(error_of(result).unwrap()),
        };
        let accepted = running.into_iter().map(|t| t.join().unwrap());
        (answer, accepted.collect())
    }

    fn forward(request: &CRequest, usage: u16) -> bool {
        let offset = 100 + u64::from(usage);
        request.forward(usage, Place { fd: 3, offset }).is_ok()
    }

    fn fail(request: &CRequest, usage: u16) -> bool {
        request.complete(usage, -5).is_ok()
    }

    #[test]
    fn a_forward_meets_the_return_or_wakes() {
        model(|| {
            let served = Served::new();
            for offset in [101, 102] {
                let (answer, accepted) = serve_beside(&served, &[forward]);
                assert_eq!((answer, &accepted[..]), (Ok(offset), &[true][..]));
            }
        });
    }

    #[test]
    fn of_a_forward_and_a_completion_one_counts() {
        model(|| {
            let (answer, accepted) = serve_beside(&Served::new(), &[forward, fail]);
            match accepted[..] {
                [true, false] => assert_eq!(answer, Ok(101)),
                [false, true] => assert_eq!(answer, Err(5)),
                _ => panic!("both or none: {accepted:?}"),
            }
        });
    }

    #[test]
    fn a_request_that_is_answered_both_ways_ends_once() {
        model(|| {
            let served = Served::new();
            let mut completing = None;
            let result = served.serve(-1, |usage| {
                let served = served.clone();
                completing = Some(thread::spawn(move || {
                    served.request.complete(usage, -2).is_ok()
                }));
            });
            let completed = completing.unwrap().join().unwrap();
            assert_eq!(error_of(result), Some(if completed { 2 } else { 1 }));
        });
    }
}

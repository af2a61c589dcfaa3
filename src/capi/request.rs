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
//!                      \-------------------complete---------------------------------^
//! ```
//!
//! The completing thread touches the waker only between Waking and Done, when
//! the queue leaves it alone, and nothing at all after Done.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::*};
use std::task::{Context, Poll, Waker};

use super::error::{guard, invalid};
use crate::error::{Error, Result};

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
    extent: UnsafeCell<blkfuse_extent>,
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
}

/// The state's parts: the use's number, its phase, the completion's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    usage: u16,
    phase: Phase,
    result: i32,
}

impl State {
    fn pack(self) -> u64 {
        u64::from(self.usage) << 48 | (self.phase as u64) << 32 | u64::from(self.result as u32)
    }

    fn unpack(word: u64) -> Self {
        let phase = match (word >> 32) as u8 {
            0 => Phase::Idle,
            1 => Phase::Calling,
            2 => Phase::Waiting,
            3 => Phase::Waking,
            _ => Phase::Done,
        };
        Self {
            usage: (word >> 48) as u16,
            phase,
            result: word as u32 as i32,
        }
    }
}

impl CRequest {
    pub(super) fn new(queue_ctx: *mut c_void, ctx_size: usize) -> Self {
        Self {
            state: AtomicU64::new(0),
            waker: UnsafeCell::new(None),
            extent: UnsafeCell::default(),
            queue_ctx: AtomicPtr::new(queue_ctx),
            ctx: Box::leak(vec![0u128; ctx_size.div_ceil(size_of::<u128>())].into_boxed_slice())
                .into(),
        }
    }

    /// The queue's thread begins a use; returns the host's name for it.
    fn begin(&self, waker: &Waker) -> *mut blkfuse_request {
        let before = State::unpack(self.state.load(Acquire));
        debug_assert_eq!(before.phase, Phase::Idle);
        // SAFETY: in Idle no other thread touches the waker: a completing one
        // does so only in Waking, which it alone can leave, for Done, and only
        // this thread turns Done into Idle.
        let place = unsafe { &mut *self.waker.get() };
        if !place.as_ref().is_some_and(|w| w.will_wake(waker)) {
            *place = Some(waker.clone());
        }
        // SAFETY: in Idle the extent is the queue's thread's.
        unsafe { *self.extent.get() = blkfuse_extent::default() };
        let usage = (before.usage + 1) % USES as u16;
        let state = State {
            usage,
            phase: Phase::Calling,
            result: 0,
        };
        self.state.store(state.pack(), Release);
        let base = (&raw const *self).cast_mut().cast::<blkfuse_request>();
        base.wrapping_byte_add(usize::from(usage))
    }

    /// The callback has returned `answer`. Ready with the request's result, or
    /// pending until it is completed.
    fn returned(&self, answer: c_int) -> Poll<io::Result<()>> {
        let state = State::unpack(self.state.load(Acquire));
        if answer == BLKFUSE_PENDING {
            let calling = State {
                phase: Phase::Calling,
                result: 0,
                ..state
            };
            let waiting = State {
                phase: Phase::Waiting,
                ..calling
            };
            let exchange =
                self.state
                    .compare_exchange(calling.pack(), waiting.pack(), AcqRel, Acquire);
            return match exchange {
                Ok(_) => Poll::Pending,
                // Completed before the callback returned.
                Err(_) => self.poll_done(),
            };
        }
        let idle = State {
            phase: Phase::Idle,
            result: 0,
            ..state
        };
        let before = State::unpack(self.state.swap(idle.pack(), AcqRel));
        if before.phase == Phase::Done {
            log::error!(
                "a driver callback completed its request and also returned {answer}; \
                 it must return BLKFUSE_PENDING"
            );
            return Poll::Ready(result_of(before.result));
        }
        Poll::Ready(result_of(answer))
    }

    /// The result, if the host has completed the request.
    fn poll_done(&self) -> Poll<io::Result<()>> {
        let state = State::unpack(self.state.load(Acquire));
        if state.phase != Phase::Done {
            return Poll::Pending;
        }
        let idle = State {
            phase: Phase::Idle,
            result: 0,
            ..state
        };
        self.state.store(idle.pack(), Release);
        Poll::Ready(result_of(state.result))
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
                Phase::Idle | Phase::Waking | Phase::Done => return Err(answered_already()),
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
                    // SAFETY: we alone have moved this use to Waking, and
                    // until it is Done the queue's thread does not touch the
                    // waker.
                    let waker = unsafe { &*self.waker.get() }.clone();
                    let done = State {
                        phase: Phase::Done,
                        ..claimed
                    };
                    self.state.store(done.pack(), Release);
                    // From here on the request, and with it the whole export,
                    // may be gone; the waker keeps alive what it needs.
                    if let Some(waker) = waker {
                        waker.wake();
                    }
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
        let mut callback = Some(callback);
        std::future::poll_fn(|cx: &mut Context<'_>| match callback.take() {
            Some(callback) => {
                let name = self.begin(cx.waker());
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

#[cfg(test)]
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
        let request = CRequest::new(std::ptr::null_mut(), 0);
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
        let request = CRequest::new(std::ptr::null_mut(), 0);
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
        let request = Arc::new(CRequest::new(std::ptr::null_mut(), 16));
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
        let request = CRequest::new(std::ptr::null_mut(), 0);
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

    #[test]
    fn contexts_are_aligned_and_apart() {
        let a = CRequest::new(std::ptr::null_mut(), 17);
        let name = a.begin(Waker::noop());
        // SAFETY: the request lives on this stack.
        let ctx = unsafe { blkfuse_request_ctx(name) };
        assert!(ctx.addr().is_multiple_of(16));
        // SAFETY: the room is at least 17 bytes.
        unsafe { ctx.cast::<u8>().write_bytes(7, 17) };
        // SAFETY: NULL is allowed.
        assert!(unsafe { blkfuse_request_ctx(std::ptr::null_mut()) }.is_null());
    }
}

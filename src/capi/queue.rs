//! Queues that the host's own threads run, as C sees them.
//!
//! What the host gets is a number that no other queue of the process ever has,
//! in the shape of a pointer: so a queue that has gone is known for one.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd};

use parking_lot::Mutex;

use super::error::{guard, invalid};
use super::{blkfuse_export, export_ref};
use crate::error::{Error, Result};
use crate::hostqueue::{Dispatched, HostQueue, WeakQueue, dispatch_here, has_events_here};

/// A queue of an export with "threads" set to "host": what one of the host's
/// threads runs. The pointer is a name, not an address to look at: it stays
/// valid, and no other queue of the process will ever have it.
///
/// One thread at a time attaches itself to a queue, and then calls
/// blkfuse_queue_dispatch() whenever the queue's descriptor is readable, until
/// that returns -ESHUTDOWN or the thread has detached itself. A thread may run
/// several queues. Different queues are independent; all need a thread, for
/// clients wait while one has none.
pub struct blkfuse_queue {
    _private: [u8; 0],
}

/// The queues that hosts have asked for, by their names.
static NAMED: Mutex<BTreeMap<u64, WeakQueue>> = Mutex::new(BTreeMap::new());

/// Names are multiples of this, so that they look like pointers.
const STEP: usize = 16;

fn name(queue: &HostQueue) -> *mut blkfuse_queue {
    std::ptr::without_provenance_mut(queue.id() as usize * STEP)
}

fn id(queue: *const blkfuse_queue) -> Result<u64> {
    if queue.is_null() {
        return Err(invalid("the queue is NULL"));
    }
    if !queue.addr().is_multiple_of(STEP) {
        return Err(unknown());
    }
    Ok((queue.addr() / STEP) as u64)
}

fn unknown() -> Error {
    invalid("there was never such a queue")
}

fn has_ended() -> Error {
    Error::new(libc::ESHUTDOWN, "the queue has ended")
}

/// The queue `id`, which need not be the calling thread's; `ESHUTDOWN` if it
/// has gone.
fn find(id: u64) -> Result<HostQueue> {
    if !HostQueue::was_made(id) {
        return Err(unknown());
    }
    let found = NAMED.lock().get(&id).and_then(WeakQueue::upgrade);
    found.ok_or_else(|| Error::new(libc::ESHUTDOWN, "the queue has ended, and its export gone"))
}

/// Queue number `index`, counted from 0 up to the property "queues", of a
/// started export with "threads" set to "host". The same at every call. NULL if
/// there is none, and then blkfuse_error_message() says why.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_get_queue(
    export: *const blkfuse_export,
    index: u32,
) -> *mut blkfuse_queue {
    let mut found = std::ptr::null_mut();
    guard(|| {
        // SAFETY: the caller's promise.
        let started = unsafe { export_ref(export) }?.started()?;
        let queue = started.queue(index as usize).ok_or_else(|| {
            let text = match started.queue(0) {
                Some(_) => "the export has fewer queues than that",
                None => {
                    "the library's threads run this export's queues; set \"threads\" to \"host\""
                }
            };
            invalid(text)
        })?;
        let mut named = NAMED.lock();
        named.retain(|_, queue| queue.upgrade().is_some());
        named.insert(queue.id(), queue.downgrade());
        found = name(queue);
        Ok(0)
    });
    found
}

/// The descriptor to wait for: readable when the queue has something to do, and
/// now and then for nothing. Level-triggered, for epoll(7), poll(2), select(2)
/// and an io_uring's poll. It stays the same for the queue's life, also from
/// one thread to the next, and while no thread is attached it is not readable.
/// It is the library's: do not read or close it. Once the export was deleted,
/// the dispatch that returns -ESHUTDOWN closes it, and with that epoll forgets it
/// by itself; do not use the number after that. Over /dev/fuse a thread's sleep
/// may end with EINTR without a signal, if requests are forwarded.
///
/// May be called from any thread. Returns the descriptor; -ESHUTDOWN: the queue
/// and its export have gone; -EINVAL: there was never such a queue.
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_queue_get_fd(queue: *const blkfuse_queue) -> c_int {
    guard(|| Ok(find(id(queue)?)?.as_fd().as_raw_fd()))
}

/// Makes the calling thread the one that runs the queue. Calls
/// ops->queue_start, whose error it returns. Afterwards the descriptor is
/// readable, so that the thread's loop begins to dispatch. Over io_uring this
/// makes a ring for the thread, so a thread should not attach itself for every
/// little thing.
///
/// A thread must not end while it is attached (the main thread may, with the
/// process): the export halts then, and if the host does not complete what that
/// queue has in flight within two seconds, `deleted` is never called.
///
/// Returns 0; -EBUSY: a thread is attached; -ESHUTDOWN: the queue has ended;
/// -EINVAL: there was never such a queue; another errno: there is no io_uring
/// for the thread, and the queue is as it was.
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_queue_attach(queue: *mut blkfuse_queue) -> c_int {
    guard(|| find(id(queue)?)?.attach().map(|()| 0))
}

/// Serves what has come, and begins at most `budget` requests (0: 64); the rest
/// waits. Never blocks, unless a callback does. Callbacks are called from
/// here: a completion by blkfuse_request_complete() only makes the descriptor
/// readable. To be called by the attached thread whenever the descriptor is
/// readable.
///
/// Returns 1: there is more to do at once, and the descriptor is readable; 0: there is nothing to do until the
/// descriptor is readable; -ESHUTDOWN: the queue has ended, for good: the thread
/// is not attached any more, and ops->queue_stop was called; -EPERM: another
/// thread is attached; -EINVAL: none is, or there was never such a queue;
/// -EDEADLK: within a callback of the same queue.
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_queue_dispatch(queue: *mut blkfuse_queue, budget: u32) -> c_int {
    guard(|| {
        let id = id(queue)?;
        let dispatched = match dispatch_here(id, budget as usize) {
            Some(dispatched) => dispatched,
            None => find(id)?.dispatch(budget as usize),
        };
        match dispatched? {
            Dispatched::More => Ok(1),
            Dispatched::Idle => Ok(0),
            Dispatched::Ended => Err(has_ended()),
        }
    })
}

/// Whether blkfuse_queue_dispatch() may find something to do. Makes no system
/// call: for a thread that looks again and again for a while before it sleeps.
/// What comes by /dev/fuse shows only at the descriptor, so over that transport
/// there is little to see.
///
/// To be called by the attached thread. Returns 1 or 0; errors as
/// blkfuse_queue_dispatch().
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_queue_has_events(queue: *mut blkfuse_queue) -> c_int {
    guard(|| {
        let id = id(queue)?;
        let has = match has_events_here(id) {
            Some(has) => has,
            None => match find(id)? {
                ended if ended.has_ended() => Err(has_ended()),
                other => other.has_events(),
            },
        };
        has.map(c_int::from)
    })
}

/// Lets the calling thread leave the queue: it may end, or another one attach
/// itself. Within a drain (blkfuse_export_drain_begin()), once nothing is in
/// flight (blkfuse_export_drain_poll()); requests that come meanwhile wait for
/// the next thread. Also while the export ends, which then needs no thread of
/// the host's any more. Calls ops->queue_stop. Over io_uring this has a thread
/// run on each CPU for a moment, and waits for it: what waits in this thread's
/// ring must be asked back from the kernel.
///
/// To be called by the attached thread. Returns 0; -EBUSY: there is no drain,
/// or a request is in flight; -EPERM: over io_uring, and this thread may not
/// run on every CPU, and stays attached; -ESHUTDOWN: the queue has ended; otherwise as
/// blkfuse_queue_dispatch().
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_queue_detach(queue: *mut blkfuse_queue) -> c_int {
    guard(|| find(id(queue)?)?.detach().map(|()| 0))
}

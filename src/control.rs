//! What an export's owner, its queues and its unmounting share: where in its
//! life the export is, the drain, and who must be told.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::driver::{BlockDriver, Event, QueueInfo};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::mount::Aborter;
use crate::passthrough;
use crate::protocol::MAX_LENGTH;
use crate::wakeups::Wakeups;

/// Where an export is in its life; it only moves on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Requests are served.
    Serving,
    /// It is being unmounted: requests are served, for an unmount may need
    /// that, but those that a drain holds up are refused.
    Stopping,
    /// No more requests are taken; those in flight are answered.
    Closed,
}

/// The driver, owned by its export. `gone` is signalled after the driver's
/// own drop has returned.
pub(crate) struct Owned<D> {
    pub(crate) driver: D,
    _gone: SignalOnDrop,
}

impl<D> Owned<D> {
    pub(crate) fn new(driver: D, gone: Arc<Latch>) -> Self {
        Self {
            driver,
            _gone: SignalOnDrop(gone),
        }
    }
}

/// Something that happens once and can be waited for.
#[derive(Debug, Default)]
pub(crate) struct Latch {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Latch {
    pub(crate) fn signal(&self) {
        *self.done.lock() = true;
        self.changed.notify_all();
    }

    /// Waits until it has happened or `deadline` is there; whether it has.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> bool {
        let mut done = self.done.lock();
        while !*done {
            match deadline {
                None => self.changed.wait(&mut done),
                Some(at) => {
                    if self.changed.wait_until(&mut done, at).timed_out() {
                        break;
                    }
                }
            }
        }
        *done
    }
}

struct SignalOnDrop(Arc<Latch>);

impl Drop for SignalOnDrop {
    fn drop(&mut self) {
        self.0.signal();
    }
}

/// The driver's methods that are not part of a request, apart from its type.
pub(crate) trait Hooks: Send + Sync {
    fn length(&self) -> io::Result<u64>;
    fn backing_file(&self) -> Option<BorrowedFd<'_>>;
    fn queue_start(&self, queue: QueueInfo) -> io::Result<()>;
    fn queue_stop(&self, queue: usize);
    fn batch_begin(&self, queue: usize);
    fn batch_end(&self, queue: usize);
    fn idle(&self);
    fn event(&self, event: &Event);
}

impl<D: BlockDriver> Hooks for Owned<D> {
    fn length(&self) -> io::Result<u64> {
        self.driver.length()
    }
    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        self.driver.backing_file()
    }
    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        self.driver.queue_start(queue)
    }
    fn queue_stop(&self, queue: usize) {
        self.driver.queue_stop(queue);
    }
    fn batch_begin(&self, queue: usize) {
        self.driver.batch_begin(queue);
    }
    fn batch_end(&self, queue: usize) {
        self.driver.batch_end(queue);
    }
    fn idle(&self) {
        self.driver.idle();
    }
    fn event(&self, event: &Event) {
        self.driver.event(event);
    }
}

/// Shared by everything that belongs to one export.
pub(crate) struct Control {
    /// The export's name in the log.
    pub(crate) name: String,
    hooks: Arc<dyn Hooks>,
    /// Whole requests pass here; a drain closes it. Those inside are what is
    /// in flight.
    pub(crate) requests: Gate,
    phase: AtomicU8,
    /// Whether the driver is told of events: not before the start has
    /// succeeded.
    announced: AtomicBool,
    /// Whether somebody is unmounting on the owner's behalf.
    pub(crate) expects_unmount: AtomicBool,
    /// Why the export halted.
    failure: Mutex<Option<Error>>,
    queues: OnceLock<Box<[Arc<Wakeups>]>>,
    /// How many queues may still have requests in flight.
    unfinished: AtomicUsize,
    /// No queue had any more, and the connection was ended.
    finished: AtomicBool,
    /// Ends the connection; not there without the privilege.
    aborter: OnceLock<Aborter>,
}

/// A queue that may still have requests in flight, until it is dropped.
pub(crate) struct Unfinished(Arc<Control>);

impl Unfinished {
    pub(crate) fn new(control: &Arc<Control>) -> Self {
        control.unfinished.fetch_add(1, SeqCst);
        Self(control.clone())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.0.unfinished.fetch_sub(1, SeqCst) == 1 {
            // Everything in flight is answered. What is not gets an error,
            // also if a forked child keeps the connection's descriptors open.
            // It must come before any ring is closed: without an entry the
            // kernel would forget who waits for one.
            self.0.abort();
            self.0.finished.store(true, SeqCst);
            self.0.kick();
        }
    }
}

thread_local! {
    /// The export whose queue this thread is dispatching.
    static DISPATCHING: Cell<*const Control> = const { Cell::new(ptr::null()) };
}

/// Marks its thread as one that dispatches, until it is dropped.
pub(crate) struct Dispatching(*const Control);

impl Drop for Dispatching {
    fn drop(&mut self) {
        DISPATCHING.set(self.0);
    }
}

impl Control {
    pub(crate) fn new(name: String, hooks: Arc<dyn Hooks>, queues: usize) -> Self {
        Self {
            name,
            hooks,
            requests: Gate::new(queues),
            phase: AtomicU8::new(Phase::Serving as u8),
            announced: AtomicBool::new(false),
            expects_unmount: AtomicBool::new(false),
            failure: Mutex::new(None),
            queues: OnceLock::new(),
            unfinished: AtomicUsize::new(0),
            finished: AtomicBool::new(false),
            aborter: OnceLock::new(),
        }
    }

    /// Says how the connection can be ended; once.
    pub(crate) fn set_aborter(&self, aborter: Aborter) {
        let set = self.aborter.set(aborter);
        debug_assert!(set.is_ok(), "an export has one connection");
    }

    /// Ends the connection and every request that waits in it.
    pub(crate) fn abort(&self) {
        if let Some(aborter) = self.aborter.get() {
            aborter.abort();
        }
    }

    /// Whether no queue has requests in flight any more, nor will have, because
    /// the connection has ended.
    pub(crate) fn all_finished(&self) -> bool {
        self.finished.load(SeqCst) && self.unfinished.load(SeqCst) == 0
    }

    /// Says how the queues are woken; once, before any of them serves.
    pub(crate) fn set_queues(&self, queues: Box<[Arc<Wakeups>]>) {
        self.queues
            .set(queues)
            .expect("an export gets its queues once");
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(SeqCst) {
            0 => Phase::Serving,
            1 => Phase::Stopping,
            _ => Phase::Closed,
        }
    }

    /// Moves on to `phase`; returns where the export was.
    pub(crate) fn advance(&self, phase: Phase) -> Phase {
        let before = self.phase.fetch_max(phase as u8, SeqCst);
        self.kick();
        match before {
            0 => Phase::Serving,
            1 => Phase::Stopping,
            _ => Phase::Closed,
        }
    }

    /// Makes every queue look at the phase and the drain again.
    pub(crate) fn kick(&self) {
        for queue in self.queues.get().into_iter().flatten() {
            queue.kick();
        }
    }

    /// Gives up: requests in flight are answered, no others are taken.
    pub(crate) fn halt(&self, error: Error) {
        {
            let mut failure = self.failure.lock();
            if failure.is_some() || self.phase() == Phase::Closed {
                return;
            }
            *failure = Some(error.clone());
        }
        self.advance(Phase::Closed);
        log::error!("{}: halted: {error}", self.name);
        self.tell(&Event::Halted {
            errno: error.errno(),
            message: error.message().to_owned(),
        });
    }

    /// The kernel has ended the connection.
    pub(crate) fn disconnected(&self) {
        // Several queues notice; the first one tells.
        let expected = self.expects_unmount.load(SeqCst);
        if self.advance(Phase::Closed) == Phase::Serving && !expected {
            log::info!("{}: unmounted from outside", self.name);
            self.tell(&Event::Unmounted);
        }
    }

    /// The export has started: from now on the driver is told of events.
    pub(crate) fn announce(&self) {
        self.announced.store(true, SeqCst);
        self.tell(&Event::Started);
    }

    /// Tells the driver what has happened.
    pub(crate) fn tell(&self, event: &Event) {
        if !self.announced.load(SeqCst) {
            return;
        }
        let _marked = self.dispatching();
        let told = catch_unwind(AssertUnwindSafe(|| self.hooks.event(event)));
        if let Err(panic) = told {
            let message = panic_message(&*panic);
            log::error!("{}: the event hook panicked: {message}", self.name);
        }
    }

    /// Calls one of the driver's hooks; if it panics the export halts.
    pub(crate) fn hook(&self, call: impl FnOnce(&dyn Hooks)) {
        let _marked = self.dispatching();
        let called = catch_unwind(AssertUnwindSafe(|| call(&*self.hooks)));
        if let Err(panic) = called {
            self.panicked(&panic_message(&*panic));
        }
    }

    /// The driver panicked and said `message`.
    pub(crate) fn panicked(&self, message: &str) {
        let text = format!("the driver panicked: {message}");
        self.halt(Error::new(libc::ENOTRECOVERABLE, text));
    }

    /// The length that the driver says it has, checked.
    pub(crate) fn driver_length(&self) -> Result<u64> {
        let mut length = Err(io::Error::from_raw_os_error(libc::ENOTRECOVERABLE));
        {
            // Also where the owner's own thread asks, this is a callback.
            let _marked = self.dispatching();
            self.hook(|h| length = h.length());
        }
        let length = length.map_err(|e| Error::from_io("the driver's length", &e))?;
        if length > MAX_LENGTH {
            let text = format!("the driver's length of {length} bytes is more than 2^63 - 1");
            return Err(Error::new(libc::EFBIG, text));
        }
        Ok(length)
    }

    /// Checks that the driver's backing file has the device's `length`.
    pub(crate) fn check_backing(&self, length: u64) -> Result<()> {
        let panicked = "the driver panicked when asked for its backing file";
        let mut outcome = Err(Error::new(libc::ENOTRECOVERABLE, panicked));
        let _marked = self.dispatching();
        self.hook(|h| outcome = passthrough::checked(h.backing_file(), length).map(drop));
        outcome
    }

    /// Why the export halted, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failure.lock().clone()
    }

    /// Marks this thread as one that runs a callback of this export, or may.
    pub(crate) fn dispatching(&self) -> Dispatching {
        Dispatching(DISPATCHING.replace(self))
    }

    /// Whether the caller is inside a callback of this export.
    pub(crate) fn is_dispatching(&self) -> bool {
        ptr::eq(DISPATCHING.get(), self)
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

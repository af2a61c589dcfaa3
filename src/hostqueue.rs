//! Queues that the program's own threads run.
//!
//! A queue belongs to the thread that has attached itself to it, and lies in
//! that thread's own storage: so [`HostQueue::dispatch`] takes no lock, and a
//! call from another thread, or after the end, finds nothing to run. Between
//! two threads, and before the first, a queue is a [`DetachedQueue`] that lies
//! in its handle.
//!
//! If an export ends while nobody is attached to one of its queues, a thread of
//! the library's runs that to its end ([`HostQueue::take_over`]).

use std::cell::RefCell;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::Epoll;
use nix::unistd::{Pid, getpid, gettid};
use parking_lot::Mutex;

use crate::control::{Control, Phase, panic_message};
use crate::driver::QueueInfo;
use crate::error::{Error, Result};
use crate::export::Shared;
use crate::forward::Port;
use crate::queue::{BUDGET, DetachedQueue, Progress, Queue};
use crate::seat;
use crate::start::{EndOfQueue, StartedQueue};
use crate::task::Tasks;
use crate::transport::Transport;

/// How long a thread that ends waits for what its queue has in flight.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// How far a dispatch got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dispatched {
    /// There is more to do at once; the queue's descriptor is readable.
    More,
    /// There is nothing to do until the queue's descriptor is readable.
    Idle,
    /// The queue has ended, for good: it has no thread and no descriptor any
    /// more.
    Ended,
}

/// A queue of an export with [`Threads::Host`](crate::Threads::Host), for the
/// thread that is to run it. A copy stands for the same queue.
///
/// One thread at a time [attaches](Self::attach) itself, then
/// [dispatches](Self::dispatch) whenever [`as_fd`](AsFd::as_fd) is readable,
/// until the queue has ended or the thread [detaches](Self::detach) itself.
/// Clients wait while nobody does. Different queues are independent, and one
/// thread may run several. The methods may be called from any thread, and say
/// so if it is the wrong one.
///
/// A thread must not end while it is attached: the export then halts, and what
/// the driver has in hand for that queue after another two seconds is never
/// answered by it, nor is the driver dropped.
///
/// The descriptor can be given to epoll(7), poll(2), select(2) and an io_uring's
/// poll, all of them level-triggered. Now and then it is readable for nothing.
/// It is valid as long as this handle, or a copy of it, is. Over /dev/fuse a
/// thread's sleep may end with EINTR without a signal, if the driver forwards
/// requests.
///
/// A loop that does nothing but that:
///
/// ```no_run
/// use std::os::fd::AsFd;
///
/// use blkfuse::{Dispatched, Export, HostQueue, Threads};
/// use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
///
/// fn io_thread(queue: &HostQueue) -> blkfuse::Result<()> {
///     queue.attach()?;
///     loop {
///         match queue.dispatch(0)? {
///             Dispatched::More => {}
///             Dispatched::Idle => {
///                 let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
///                 let _ = poll(&mut fds, PollTimeout::NONE); // interrupted, it looks again
///             }
///             Dispatched::Ended => return Ok(()),
///         }
///     }
/// }
///
/// # fn run(driver: impl blkfuse::BlockDriver) -> blkfuse::Result<()> {
/// let builder = Export::builder(driver).mountpoint("disk");
/// let export = builder.threads(Threads::Host).queues(1).start()?;
/// let queue = export.queue(0).expect("it has one").clone();
/// let thread = std::thread::spawn(move || io_thread(&queue));
/// // ... the file is there; clients wait until the thread is ...
/// export.delete(None)?; // the thread ends with it
/// thread.join().expect("it does not panic")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct HostQueue(Arc<Inner>);

struct Inner {
    id: u64,
    index: usize,
    descriptor: Arc<Epoll>,
    place: Mutex<Place>,
}

/// The name of the next queue.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A queue's handle that does not keep it.
pub(crate) struct WeakQueue(Weak<Inner>);

impl WeakQueue {
    pub(crate) fn upgrade(&self) -> Option<HostQueue> {
        self.0.upgrade().map(HostQueue)
    }
}

/// Where a queue is.
enum Place {
    Detached(Box<Rest>),
    /// In the storage of that thread, or on the way there.
    Attached(Pid),
    Ended,
}

/// Makes the tasks of a queue, in the thread that will run them.
pub(crate) type TaskMaker = Box<dyn Fn() -> (Tasks, Rc<Port>) + Send>;

/// What a queue takes from one thread to the next beside itself.
pub(crate) struct Core {
    pub(crate) make_tasks: TaskMaker,
    pub(crate) info: QueueInfo,
    pub(crate) shared: Arc<Shared>,
    /// Dropped last.
    pub(crate) _end: EndOfQueue,
}

/// A queue that is at no thread, with what belongs to it.
struct Rest {
    // Dropped, and its descriptors closed, before the queue's end is told.
    queue: DetachedQueue,
    core: Core,
}

/// A queue that a thread runs. Dropped in this order.
struct Running {
    queue: Queue<Box<dyn Transport>>,
    /// `None`: the driver was not told of this thread.
    started: Option<StartedQueue>,
    core: Core,
}

impl Rest {
    fn bind(
        self,
        started: Option<StartedQueue>,
    ) -> std::result::Result<Running, (Box<Self>, Error)> {
        let Self { queue, core } = self;
        let (tasks, port) = (core.make_tasks)();
        match queue.attach(tasks, port) {
            Ok(queue) => Ok(Running {
                queue: match started {
                    Some(_) => queue,
                    None => queue.unannounced(),
                },
                started,
                core,
            }),
            Err((queue, error)) => Err((Box::new(Self { queue, core }), error)),
        }
    }

    fn control(&self) -> &Arc<Control> {
        &self.core.shared.control
    }
}

impl Running {
    /// Leaves the thread; nothing is in flight, and what waited was recalled.
    fn detach(self) -> Box<Rest> {
        let queue = self.queue.detach();
        drop(self.started);
        Box::new(Rest {
            queue,
            core: self.core,
        })
    }

    /// The thread cannot go on with it. Other queues can, and end.
    fn forsake(self) {
        self.queue.forsake();
    }

    fn control(&self) -> &Arc<Control> {
        &self.core.shared.control
    }
}

/// One queue of the calling thread's.
struct Attached {
    handle: HostQueue,
    /// Borrowed as long as it is dispatched.
    running: RefCell<Option<Running>>,
    control: Arc<Control>,
}

/// The queues of one thread.
struct Here(RefCell<Vec<Rc<Attached>>>);

thread_local! {
    static HERE: Here = const { Here(RefCell::new(Vec::new())) };
}

impl Here {
    fn find(id: u64) -> Option<Rc<Attached>> {
        let find = |here: &Here| {
            let all = here.0.borrow();
            all.iter().find(|a| a.handle.id() == id).cloned()
        };
        // A thread that is at its end has none any more.
        HERE.try_with(find).ok().flatten()
    }

    fn add(attached: Attached) {
        HERE.with(|here| here.0.borrow_mut().push(Rc::new(attached)));
    }

    fn remove(id: u64) {
        HERE.with(|here| here.0.borrow_mut().retain(|a| a.handle.id() != id));
    }
}

/// Whether the calling thread runs queues of the export that `control` is of.
pub(crate) fn runs_queue_of(control: &Control) -> bool {
    let runs = |here: &Here| {
        let all = here.0.borrow();
        all.iter().any(|a| ptr::eq(&*a.control, control))
    };
    HERE.try_with(runs).unwrap_or(false)
}

/// [`HostQueue::dispatch`] of the queue `id`, if it is the calling thread's.
pub(crate) fn dispatch_here(id: u64, budget: usize) -> Option<Result<Dispatched>> {
    let attached = Here::find(id)?;
    Some(attached.dispatch(budget))
}

/// [`HostQueue::has_events`] of the queue `id`, if it is the calling thread's.
pub(crate) fn has_events_here(id: u64) -> Option<Result<bool>> {
    let attached = Here::find(id)?;
    let has = |running: &mut Running| running.queue.has_news();
    Some(attached.with(has))
}

impl Attached {
    /// Does something with the queue, unless its driver's callback calls this.
    fn with<R>(&self, f: impl FnOnce(&mut Running) -> R) -> Result<R> {
        let mut running = self.running.try_borrow_mut();
        match running.as_deref_mut() {
            Ok(Some(running)) => Ok(f(running)),
            _ => Err(self.handle.refuse(libc::EDEADLK, "its callback is running")),
        }
    }

    /// Takes the queue from its thread.
    fn take(&self) -> Option<Running> {
        let running = self.running.take();
        Here::remove(self.handle.id());
        running
    }

    fn dispatch(&self, budget: usize) -> Result<Dispatched> {
        let budget = if budget == 0 { BUDGET } else { budget };
        let dispatch = || self.with(|running| running.queue.dispatch_between_sleeps(budget));
        let progress = match catch_unwind(AssertUnwindSafe(dispatch)) {
            Ok(progress) => progress?,
            Err(panic) => return Err(self.panicked(&panic_message(&*panic))),
        };
        if self.control.phase() != Phase::Serving {
            self.release_others();
        }
        match progress {
            Progress::More => Ok(Dispatched::More),
            Progress::Idle => Ok(Dispatched::Idle),
            Progress::Finished => {
                drop(self.end());
                Ok(Dispatched::Ended)
            }
        }
    }

    /// The queue's end: nobody finds it any more.
    fn end(&self) -> Option<Running> {
        self.handle.note_end();
        self.take()
    }

    /// Not the driver, but the queue: it may be in any state.
    fn panicked(&self, message: &str) -> Error {
        let text = format!("a queue panicked: {message}");
        let error = Error::new(libc::ENOTRECOVERABLE, text);
        self.control.halt(error.clone());
        if let Some(running) = self.end() {
            running.forsake();
        }
        error
    }

    /// The export ends: so must queues that no thread runs.
    fn release_others(&self) {
        let shared = match &*self.running.borrow() {
            Some(running) => running.core.shared.clone(),
            None => return,
        };
        shared.release_queues();
    }

    /// The thread ends.
    fn abandon(&self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        let text = format!(
            "the thread of queue {} has ended without detaching it",
            self.handle.index()
        );
        self.control.halt(Error::new(libc::EOWNERDEAD, text));
        let end = Instant::now() + LAST_PATIENCE;
        loop {
            match running.queue.dispatch_between_sleeps(BUDGET) {
                Progress::Finished => return self.handle.note_end(),
                Progress::Idle if running.queue.is_at_rest() => break,
                Progress::Idle => {
                    let left = end.saturating_duration_since(Instant::now());
                    self.handle.sleep(Some(left));
                }
                Progress::More => {}
            }
            if Instant::now() > end {
                let name = &self.control.name;
                log::error!("{name}: the driver does not complete what that thread began");
                self.handle.note_end();
                return running.forsake();
            }
        }
        match running.queue.recall() {
            Ok(()) => self.handle.put(running.detach()),
            Err(error) => {
                log::error!("{}: {error}", self.control.name);
                self.handle.note_end();
                running.forsake();
            }
        }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        // With its main thread the process ends, and all of this with it.
        let is_main = gettid() == getpid();
        for attached in self.0.take() {
            if is_main {
                std::mem::forget(attached);
            } else {
                attached.abandon();
            }
        }
    }
}

impl HostQueue {
    /// The queue of `core`, at no thread yet.
    pub(crate) fn new(queue: DetachedQueue, descriptor: Arc<Epoll>, core: Core) -> Self {
        Self(Arc::new(Inner {
            id: NEXT.fetch_add(1, Relaxed),
            index: core.info.index,
            descriptor,
            place: Mutex::new(Place::Detached(Box::new(Rest { queue, core }))),
        }))
    }

    /// What no other queue of this process is, was or will be called.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// Whether there is or was a queue of that name.
    pub(crate) fn was_made(id: u64) -> bool {
        (1..NEXT.load(Relaxed)).contains(&id)
    }

    pub(crate) fn downgrade(&self) -> WeakQueue {
        WeakQueue(Arc::downgrade(&self.0))
    }

    /// Its number within its export, from 0.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// Makes the calling thread the one that runs the queue. Calls
    /// [`BlockDriver::queue_start`](crate::BlockDriver::queue_start), whose
    /// error it passes on. Afterwards the descriptor is readable.
    ///
    /// `EBUSY`: a thread runs it; `ESHUTDOWN`: it has ended. Fails, too, if the
    /// thread cannot have an io_uring; the queue is then as before.
    pub fn attach(&self) -> Result<()> {
        let rest = {
            let mut place = self.0.place.lock();
            match std::mem::replace(&mut *place, Place::Attached(gettid())) {
                Place::Detached(rest) => rest,
                other => {
                    let refused = match other {
                        Place::Ended => self.refuse(libc::ESHUTDOWN, "it has ended"),
                        _ => self.refuse(libc::EBUSY, "a thread is attached to it"),
                    };
                    *place = other;
                    return Err(refused);
                }
            }
        };
        let control = rest.control().clone();
        let bound = match StartedQueue::tell(&control, rest.core.info) {
            Ok(started) => (*rest).bind(Some(started)),
            Err(error) => Err((rest, error)),
        };
        match bound {
            Ok(running) => {
                Here::add(Attached {
                    handle: self.clone(),
                    running: RefCell::new(Some(running)),
                    control,
                });
                Ok(())
            }
            Err((rest, error)) => {
                self.put(rest);
                Err(error)
            }
        }
    }

    /// Serves what has come, and begins at most `budget` requests (0: 64).
    /// Never blocks, unless the driver does. To be called by the thread that
    /// is attached, whenever the descriptor is readable.
    ///
    /// After [`Dispatched::Ended`] the thread is not attached any more.
    ///
    /// `EPERM`: another thread is attached; `EINVAL`: none is; `EDEADLK`: within
    /// a callback of the same queue.
    pub fn dispatch(&self, budget: usize) -> Result<Dispatched> {
        match dispatch_here(self.id(), budget) {
            Some(dispatched) => dispatched,
            None if self.has_ended() => Ok(Dispatched::Ended),
            None => Err(self.not_here()),
        }
    }

    /// Whether [`dispatch`](Self::dispatch) may find something to do. Makes no
    /// system call: for a thread that looks again and again before it sleeps.
    /// What comes by /dev/fuse shows only at the descriptor. Errors as there;
    /// of a queue that has ended it is true.
    pub fn has_events(&self) -> Result<bool> {
        match has_events_here(self.id()) {
            Some(has) => has,
            None if self.has_ended() => Ok(true),
            None => Err(self.not_here()),
        }
    }

    /// Lets the calling thread leave the queue, so that it can end, or another
    /// one [attach](Self::attach) itself. In a drain, once nothing is in flight;
    /// or when the export ends, which then goes on without the thread. Calls
    /// [`BlockDriver::queue_stop`](crate::BlockDriver::queue_stop). Afterwards
    /// the descriptor is not readable.
    ///
    /// Over io_uring this waits for a thread that runs on each CPU for a moment:
    /// the kernel must be asked for what waits in the thread's ring.
    ///
    /// `EBUSY`: there is no drain, or a request is in flight; `EPERM`: over
    /// io_uring, and the thread may not run on every CPU (or another thread is
    /// attached); otherwise as [`dispatch`](Self::dispatch), but for
    /// `ESHUTDOWN`: it has ended.
    pub fn detach(&self) -> Result<()> {
        let Some(attached) = Here::find(self.id()) else {
            return Err(match self.has_ended() {
                true => self.refuse(libc::ESHUTDOWN, "it has ended"),
                false => self.not_here(),
            });
        };
        let why_not = attached.with(|running| {
            let control = running.control();
            let is_held = control.requests.is_closed() || control.phase() != Phase::Serving;
            if !is_held {
                Some("there is no drain")
            } else if !running.queue.is_at_rest() {
                Some("a request is in flight")
            } else {
                None
            }
        })?;
        if let Some(why) = why_not {
            return Err(self.refuse(libc::EBUSY, why));
        }
        attached.with(|running| running.queue.recall())??;
        if let Some(running) = attached.take() {
            self.put(running.detach());
        }
        Ok(())
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(*self.0.place.lock(), Place::Ended)
    }

    fn note_end(&self) {
        *self.0.place.lock() = Place::Ended;
    }

    /// Why the calling thread cannot do that.
    fn not_here(&self) -> Error {
        match *self.0.place.lock() {
            Place::Attached(thread) if thread != gettid() => {
                let why = format!("thread {thread} is attached to it, and this is another one");
                self.refuse(libc::EPERM, &why)
            }
            _ => self.refuse(
                libc::EINVAL,
                "no thread is attached to it; attach this one first",
            ),
        }
    }

    fn refuse(&self, errno: i32, why: &str) -> Error {
        Error::new(errno, format!("queue {}: {why}", self.index()))
    }

    /// Keeps the queue for the next thread.
    fn put(&self, rest: Box<Rest>) {
        let control = rest.control().clone();
        *self.0.place.lock() = Place::Detached(rest);
        // Whoever ends an export first says so, and then looks for its queues.
        if control.phase() != Phase::Serving {
            self.take_over();
        }
    }

    /// The export ends. If no thread is attached to the queue, one of the
    /// library's runs it from now on; the driver is not called any more then.
    pub(crate) fn take_over(&self) {
        let rest = {
            let mut place = self.0.place.lock();
            match std::mem::replace(&mut *place, Place::Ended) {
                Place::Detached(rest) => rest,
                other => {
                    *place = other;
                    return;
                }
            }
        };
        let control = rest.control().clone();
        control.requests.close();
        let ending = rest.core.shared.ending.clone();
        let handle = self.clone();
        let spawned = thread::Builder::new()
            .name(format!("blkfuse-{}", self.index()))
            .spawn(move || handle.run_to_the_end(*rest));
        match spawned {
            Ok(thread) => ending.keep_thread(thread),
            // The queue is dropped, and with the last one the connection ends.
            Err(e) => log::warn!("{}: no thread for its end: {e}", control.name),
        }
    }

    fn run_to_the_end(&self, rest: Rest) {
        seat::block_signals();
        let name = rest.control().name.clone();
        let mut running = match rest.bind(None) {
            Ok(running) => running,
            Err((_, error)) => return log::warn!("{name}: {error}"),
        };
        loop {
            match running.queue.dispatch_between_sleeps(BUDGET) {
                Progress::More => {}
                Progress::Idle => self.sleep(None),
                Progress::Finished => break,
            }
        }
    }

    /// Sleeps until the queue has something to do.
    fn sleep(&self, limit: Option<Duration>) {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let timeout = limit.and_then(|time| PollTimeout::try_from(time).ok());
        // Interrupted, it looks again.
        let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE));
    }
}

impl AsFd for HostQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.0.as_fd()
    }
}

impl fmt::Debug for HostQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostQueue")
            .field("index", &self.index())
            .finish_non_exhaustive()
    }
}

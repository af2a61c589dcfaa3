//! The export: its life from start to deletion.
//!
//! Two counts are kept apart. *In flight* are requests that were begun and not
//! answered; a drain waits for them ([`Control::requests`]). *References* keep
//! memory alive: the owner's handle, every queue's thread, and the thread that
//! unmounts each hold one, and when the last is gone the driver is dropped.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::{Config, IoUring, Threads};
use crate::control::{Control, Latch, Phase};
use crate::driver::BlockDriver;
use crate::ending::{Ending, Wait};
use crate::error::{Error, Result};
use crate::file::File;
use crate::hostqueue::{self, HostQueue, WeakQueue};
use crate::legacy;
use crate::mount::{AllowOther, Mount, Unmount};
use crate::passthrough::Backing;
use crate::protocol::Agreement;
use crate::start::{self, Carrier, QueueRunners};
use crate::stats::{AllStats, Stats};
use crate::unforked::FuseDevice;

/// How long a stop waits for the unmounting that it began. It takes longer
/// only if the driver must first write what clients left in the page cache.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(2);

/// How an export is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The file vanishes at once, also while it is open; requests in flight
    /// are answered, and whoever still has it open gets errors.
    Lazy,
    /// The same, but requests that wait are ended with an error first, so that
    /// no client waits for the driver.
    Force,
    /// As `Lazy`, but only if nobody has the file open (else `EBUSY`).
    IfIdle,
}

/// Where an export is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It serves.
    Started,
    /// It was asked to end.
    Stopping,
    /// It has ended: stopped, unmounted from outside, or halted.
    Ended,
}

/// Builds an [`Export`]; made by [`Export::builder`].
#[derive(Debug)]
pub struct Builder<D> {
    driver: D,
    config: Config,
    device: Option<OwnedFd>,
}

impl<D: BlockDriver> Builder<D> {
    pub(crate) fn new(driver: D, config: Config) -> Self {
        Self {
            driver,
            config,
            device: None,
        }
    }

    /// The existing regular file to appear at. Required, unless
    /// [`fuse_fd`](Self::fuse_fd) is given.
    pub fn mountpoint(mut self, path: impl Into<PathBuf>) -> Self {
        self.config.mountpoint = Some(path.into());
        self
    }

    /// Serves a connection that somebody else has mounted: a /dev/fuse
    /// descriptor whose INIT nobody has read. It is to be mounted with
    /// `default_permissions`, which makes the kernel check the file's mode, and
    /// `max_read=1048576`, or what [`max_request`](Self::max_request) says. The
    /// mount is its maker's to undo; the export's end leaves it dead.
    pub fn fuse_fd(mut self, device: OwnedFd) -> Self {
        self.config.fuse_fd = Some(device.as_raw_fd());
        self.device = Some(device);
        self
    }

    /// What is shown as the mounted device, such as the image's name.
    pub fn source(mut self, name: impl Into<OsString>) -> Self {
        self.config.source = Some(name.into());
        self
    }

    /// Allows writing. Default: the file is read-only.
    pub fn writable(mut self, writable: bool) -> Self {
        self.config.writable = writable;
        self
    }

    /// Lets writes past the end grow the file. Default: they fail.
    pub fn growable(mut self, growable: bool) -> Self {
        self.config.growable = growable;
        self
    }

    /// Has the kernel read [`BlockDriver::backing_file`] itself, at the bare
    /// file's speed, in the place of calling [`BlockDriver::read`]. Default:
    /// it does not. Only for a read-only export of a device that is as long as
    /// its backing file, a regular one; by a process with CAP_SYS_ADMIN in the
    /// initial user namespace; since Linux 6.9. Otherwise the start fails.
    ///
    /// Reads are then out of the export's hands. They are not held up by a
    /// drain, not counted in [`Stats`], not limited to the device's length, and
    /// who has the file open when the export ends can go on reading. They are
    /// what reads of the backing file are: O_DIRECT needs the alignment that
    /// its file system wants, and other reads go through the page cache.
    pub fn passthrough(mut self, passthrough: bool) -> Self {
        self.config.passthrough = passthrough;
        self
    }

    /// Who besides the owner may use the file.
    pub fn allow_other(mut self, others: AllowOther) -> Self {
        self.config.allow_other = others;
        self
    }

    /// How many queues serve it, each with a thread. 0, the default: one for
    /// each CPU available, at most 8.
    pub fn queues(mut self, queues: usize) -> Self {
        self.config.queues = queues;
        self
    }

    /// Whose threads these are. Default: [`Threads::Library`]. With
    /// [`Threads::Host`] clients wait from the start on until threads of the
    /// program have attached themselves to every [queue](Export::queue); over
    /// io_uring this process must be allowed to run on every CPU.
    pub fn threads(mut self, threads: Threads) -> Self {
        self.config.threads = threads;
        self
    }

    /// Whether requests come through FUSE-over-io_uring. Default:
    /// [`IoUring::Auto`].
    pub fn io_uring(mut self, io_uring: IoUring) -> Self {
        self.config.io_uring = io_uring;
        self
    }

    /// How many entries each of the kernel's ring queues gets, of which there
    /// is one for every possible CPU: so many requests of one CPU can be in
    /// flight. 1 to 1024, else the start fails with `EINVAL`. Default: at most
    /// 64, as the [memory budget](Self::memory_budget) allows. Only over
    /// io_uring.
    pub fn queue_depth(mut self, depth: usize) -> Self {
        self.config.queue_depth = Some(depth);
        self
    }

    /// The largest read and write that reaches the driver, in bytes; larger
    /// ones come in pieces. A multiple of 4096 from 65536 to 1048576, else the
    /// start fails with `EINVAL`. Default: 1048576, or over io_uring what the
    /// [memory budget](Self::memory_budget) allows. The kernel may make it
    /// less; [`Export::max_request`] tells.
    pub fn max_request(mut self, bytes: u32) -> Self {
        self.config.max_request = Some(bytes);
        self
    }

    /// How much memory io_uring's buffers may take, in bytes: possible CPUs ×
    /// queue depth × (4096 + the largest request). Default: 256 MiB.
    ///
    /// To fit, the queue depth is lowered, to 4 at first (or as many as there
    /// are queues for each possible CPU); then the largest request, down to
    /// 64 KiB; then the queue depth, down to 1. What was set is not lowered: if
    /// it does not fit, io_uring cannot be used.
    pub fn memory_budget(mut self, bytes: u64) -> Self {
        self.config.memory_budget = Some(bytes);
        self
    }

    /// Mounts the file and begins to serve it. When this returns `Ok` the
    /// file can be used; when it fails nothing is left behind.
    ///
    /// Must not be called by a thread that must answer for the driver before
    /// [`BlockDriver::length`] or [`BlockDriver::queue_start`] can return.
    pub fn start(self) -> Result<Export> {
        start::start(self.driver, self.config, self.device)
    }
}

/// An export that was started.
///
/// All methods may be called from any thread, at the same time, and from the
/// driver's methods except where they say otherwise. Dropping an export stops
/// it ([`Stop::Lazy`]); [`delete`](Self::delete) also waits for its end.
#[derive(Debug)]
pub struct Export {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Option<HostQueue>>>,
    /// Those that the program's threads run.
    queues: Vec<HostQueue>,
    gone: Arc<Latch>,
    carrier: Carrier,
    /// How long dropping it waits for the unmounting.
    patience: Duration,
}

/// What an export's handle, threads and unmounting share.
pub(crate) struct Shared {
    // Dropped, and so its path free for another export, before the driver is,
    // whose end is how the owner learns of that.
    mount: OnceLock<Mount>,
    pub(crate) control: Arc<Control>,
    pub(crate) file: Arc<File>,
    pub(crate) stats: Arc<AllStats>,
    pub(crate) agreement: Agreement,
    /// The connection's first descriptor; closed with the last queue, which
    /// ends the connection.
    device: Mutex<Option<Arc<FuseDevice>>>,
    /// What the kernel reads by itself; closed before `device`.
    backing: Mutex<Option<Backing>>,
    /// Queues that have not ended.
    running: AtomicUsize,
    pub(crate) ending: Arc<Ending>,
    /// The queues that the program's threads run.
    host_queues: OnceLock<Vec<WeakQueue>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.control.name)
            .field("phase", &self.control.phase())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Of an export with `queues` queues whose connection is `device`.
    pub(crate) fn new(
        control: Control,
        file: File,
        agreement: Agreement,
        device: Arc<FuseDevice>,
        queues: usize,
    ) -> Self {
        Self {
            control: Arc::new(control),
            file: Arc::new(file),
            stats: Arc::new(AllStats::new(queues)),
            agreement,
            device: Mutex::new(Some(device)),
            backing: Mutex::default(),
            mount: OnceLock::new(),
            running: AtomicUsize::new(queues),
            ending: Arc::default(),
            host_queues: OnceLock::new(),
        }
    }

    /// The export ends, if it does: queues that no thread is attached to are run
    /// to their end by threads of the library's.
    pub(crate) fn release_queues(&self) {
        if self.control.phase() != Phase::Serving {
            let queues = self.host_queues.get().into_iter().flatten();
            let queues = queues.filter_map(WeakQueue::upgrade);
            queues.for_each(|queue| queue.take_over());
        }
    }

    /// Has the kernel read `backing` by itself, before anybody opens the file.
    pub(crate) fn pass_through(&self, backing: Backing) {
        self.file.pass_through(backing.id());
        *self.backing.lock() = Some(backing);
    }

    /// A descriptor for one queue: its own, or the shared one where /dev/fuse
    /// cannot be opened.
    pub(crate) fn queue_device(&self) -> Result<Arc<FuseDevice>> {
        let device = self.device.lock().clone();
        let device =
            device.ok_or_else(|| Error::new(libc::ENOTCONN, "the connection has ended"))?;
        match legacy::clone_device(device.as_fd()) {
            Ok(clone) => Ok(Arc::new(clone.into())),
            Err(e) => {
                log::debug!("queues share one FUSE descriptor: {e}");
                Ok(device)
            }
        }
    }

    /// One queue has ended; it has closed its descriptor.
    pub(crate) fn queue_ended(&self) {
        if self.running.fetch_sub(1, SeqCst) == 1 {
            self.backing.lock().take();
            self.device.lock().take();
        }
    }

    /// Takes the file away, then has the queues end.
    fn unmount(&self, how: Stop) -> Result<()> {
        let Some(mount) = self.mount.get() else {
            self.control.advance(Phase::Closed);
            return Ok(());
        };
        let unmounted = match how {
            Stop::Force => mount.unmount(Unmount::Force),
            Stop::IfIdle => {
                self.control.expects_unmount.store(true, SeqCst);
                let unmounted = mount.unmount(Unmount::IfIdle);
                if let Err(error) = unmounted {
                    self.control.expects_unmount.store(false, SeqCst);
                    return Err(error);
                }
                unmounted
            }
            Stop::Lazy if self.is_to_be_written_back() => {
                self.file.keep_cache();
                let (unmounted, written_back, child) = mount.unmount_written_back();
                self.ending.keep(child);
                if let Err(error) = written_back {
                    log::warn!("{error}");
                }
                unmounted
            }
            Stop::Lazy => mount.unmount(Unmount::Lazy),
        };
        if let Err(error) = &unmounted {
            log::warn!("{error}");
        }
        self.control.advance(Phase::Closed);
        unmounted
    }

    /// Whether clients may have changed mapped memory that nobody has written
    /// back: closing the file does that, but the export ends before.
    fn is_to_be_written_back(&self) -> bool {
        self.control.phase() == Phase::Stopping && self.file.writer_count() > 0
    }
}

impl Export {
    /// An export that serves, and is mounted if it has a `mount`.
    pub(crate) fn new(
        shared: Arc<Shared>,
        runners: QueueRunners,
        mount: Option<Mount>,
        carrier: Carrier,
        gone: Arc<Latch>,
    ) -> Self {
        if let Some(mount) = mount {
            let set = shared.mount.set(mount);
            debug_assert!(set.is_ok(), "an export is mounted once");
        }
        let (threads, queues) = match runners {
            QueueRunners::Threads(threads) => (threads, Vec::new()),
            QueueRunners::Host(queues) => {
                let weak = queues.iter().map(HostQueue::downgrade).collect();
                let set = shared.host_queues.set(weak);
                debug_assert!(set.is_ok(), "an export gets its queues once");
                (Vec::new(), queues)
            }
        };
        Self {
            shared,
            threads,
            queues,
            gone,
            carrier,
            patience: UNMOUNT_PATIENCE,
        }
    }

    /// Begins to describe an export of `driver`.
    pub fn builder<D: BlockDriver>(driver: D) -> Builder<D> {
        Builder::new(driver, Config::default())
    }

    /// Asks for the end. Whatever `how` is, requests in flight are answered
    /// when the driver is done with them; [`delete`](Self::delete) waits for
    /// that, this does not. It returns when the file has been unmounted and what
    /// clients have written into mapped memory is written back, or after two
    /// seconds if that takes longer, or at once within a callback and in a
    /// thread that is attached to one of the queues. Requests are served until
    /// everything is written back; [`Stop::Force`] and a drain leave that out.
    ///
    /// `EBUSY`: [`Stop::IfIdle`] and the file is in use; nothing has happened.
    /// Another error: the mount could not be removed; the export ends all the
    /// same, and a further call tries again.
    pub fn stop(&self, how: Stop) -> Result<()> {
        self.stop_within(how, UNMOUNT_PATIENCE)
    }

    /// [`stop`](Self::stop), waiting no longer than `patience`.
    fn stop_within(&self, how: Stop, patience: Duration) -> Result<()> {
        let shared = self.shared.clone();
        let control = &self.shared.control;
        match how {
            Stop::Lazy => {
                control.advance(Phase::Stopping);
            }
            Stop::Force => {
                control.advance(Phase::Closed);
                control.abort();
            }
            // Without a mount of ours there is nobody but us to ask; and whoever
            // serves does not wait for what the unmounting says.
            Stop::IfIdle
                if (shared.mount.get().is_none() || self.is_needed())
                    && shared.file.open_count() > 0 =>
            {
                let text = format!("{}: the file is open", control.name);
                return Err(Error::new(libc::EBUSY, text));
            }
            Stop::IfIdle => {}
        }
        shared.release_queues();
        let wait = if self.is_needed() {
            Wait::No
        } else {
            Wait::Until(deadline_after(patience))
        };
        let ending = shared.ending.clone();
        let unmount = move || {
            let unmounted = shared.unmount(how);
            shared.release_queues();
            unmounted
        };
        ending.run(unmount, wait)
    }

    /// Whether the calling thread is one that serves this export.
    fn is_needed(&self) -> bool {
        let control = &self.shared.control;
        control.is_dispatching() || hostqueue::runs_queue_of(control)
    }

    /// Stops the export if that has not happened, and waits until it is gone:
    /// everything answered, nothing mounted, the driver dropped, no thread
    /// left. Waits at most `timeout` if one is given (`ETIMEDOUT`); the export
    /// then goes when the driver has completed what is in flight. Another
    /// error: the export is gone, but its mount could not be removed.
    ///
    /// Refused within a callback of this export, and in a thread that is
    /// attached to one of its queues (`EDEADLK`); it is then stopped and goes by
    /// itself. Its queues go on until they are [ended](crate::Dispatched::Ended).
    pub fn delete(mut self, timeout: Option<Duration>) -> Result<()> {
        let deadline = timeout.and_then(deadline_after);
        if self.is_needed() {
            return Err(deadlock("delete"));
        }
        let name = self.shared.control.name.clone();
        let patience = timeout.map_or(UNMOUNT_PATIENCE, |t| t.min(UNMOUNT_PATIENCE));
        let stopped = self.stop_within(Stop::Lazy, patience);
        self.patience = Duration::ZERO;
        let threads = std::mem::take(&mut self.threads);
        let ending = self.shared.ending.clone();
        let gone = self.gone.clone();
        let stats = self.shared.stats.clone();
        drop(self);
        if !gone.wait(deadline) {
            let what = match stats.sum().in_flight {
                0 => "it is still being unmounted, or the driver dropped",
                _ => "the driver has not completed every request",
            };
            return Err(Error::new(libc::ETIMEDOUT, format!("{name}: {what}")));
        }
        join(ending.take_threads());
        join(threads);
        ending.drop_children();
        stopped
    }

    /// Begins a drain: no further request is begun until as many
    /// [`drain_end`](Self::drain_end)s have followed; those that arrive wait.
    /// Does not wait for those in flight. `EDEADLK` within a callback.
    pub fn drain_begin(&self) -> Result<()> {
        if self.shared.control.is_dispatching() {
            return Err(deadlock("drain"));
        }
        self.shared.control.requests.close();
        Ok(())
    }

    /// Whether a request is still in flight.
    pub fn drain_poll(&self) -> bool {
        !self.shared.control.requests.is_empty()
    }

    /// Ends a drain. `EINVAL` if there is none.
    pub fn drain_end(&self) -> Result<()> {
        match self.shared.control.requests.open() {
            None => Err(Error::new(libc::EINVAL, "there is no drain to end")),
            Some(false) => Ok(()),
            Some(true) => {
                self.shared.control.kick();
                Ok(())
            }
        }
    }

    /// Waits until every request that has been begun is answered, holding
    /// later ones up meanwhile. `ETIMEDOUT` if that takes longer than
    /// `timeout`; `EDEADLK` within a callback, and in a thread that is attached
    /// to one of the queues.
    pub fn drain(&self, timeout: Option<Duration>) -> Result<()> {
        if self.is_needed() {
            return Err(deadlock("drain"));
        }
        self.drain_begin()?;
        let deadline = timeout.and_then(deadline_after);
        let empty = self.shared.control.requests.wait_empty(deadline);
        self.drain_end()?;
        if empty {
            Ok(())
        } else {
            Err(Error::new(libc::ETIMEDOUT, "requests are still in flight"))
        }
    }

    /// The driver's length has changed without a client's doing: asks
    /// [`BlockDriver::length`] and tells the kernel. When this returns,
    /// clients that ask see the new length; asynchronous reads and appends
    /// through open descriptors go by it, too, unless this is called within a
    /// drain or a callback, or by a thread that is attached to a queue, and the
    /// length grew within a page (of 4096 bytes): then from the next stat on.
    ///
    /// `EINVAL`: with [`Builder::passthrough`] the device and its backing file
    /// are of different lengths now; clients still see the old one.
    pub fn resized(&self) -> Result<()> {
        let Shared {
            control,
            file,
            device,
            ..
        } = &*self.shared;
        let present_length = || {
            let length = control.driver_length()?;
            if file.backing().is_some() {
                control.check_backing(length)?;
            }
            Ok(length)
        };
        let mut length = present_length()?;
        loop {
            file.set_length(length);
            // A client's truncation may have come between the look and the
            // note; then what was noted is old.
            let again = present_length()?;
            if again == length {
                break;
            }
            length = again;
        }
        let device = device.lock().clone();
        // Whoever serves must not wait for requests, nor may anybody in a drain.
        let served = !self.is_needed() && !control.requests.is_closed();
        if device.is_some_and(|d| legacy::notify_resized(d.as_fd(), file.told(), length, served)) {
            file.tell_reached(length);
        }
        Ok(())
    }

    /// What has been done so far.
    pub fn stats(&self) -> Stats {
        self.shared.stats.sum()
    }

    /// Where the export is in its life.
    pub fn state(&self) -> State {
        match self.shared.control.phase() {
            Phase::Serving => State::Started,
            Phase::Stopping => State::Stopping,
            Phase::Closed => State::Ended,
        }
    }

    /// Why the export halted, if it did.
    pub fn failure(&self) -> Option<Error> {
        self.shared.control.failure()
    }

    /// How many queues serve it.
    pub fn queue_count(&self) -> usize {
        self.shared.stats.queue_count()
    }

    /// The queue number `index`, counted from 0, of an export with
    /// [`Threads::Host`]; `None` if there is none, or the library runs it.
    pub fn queue(&self, index: usize) -> Option<&HostQueue> {
        self.queues.get(index)
    }

    /// The largest read and write that reaches the driver, in bytes.
    pub fn max_request(&self) -> u32 {
        self.shared.agreement.max_request
    }

    /// Whether the caller is inside a callback of this export.
    pub(crate) fn is_dispatching(&self) -> bool {
        self.shared.control.is_dispatching()
    }

    /// Whether the calling thread is attached to a queue of this export.
    pub(crate) fn is_attached(&self) -> bool {
        hostqueue::runs_queue_of(&self.shared.control)
    }

    /// Whether others than the owner may use the file, as far as its mode lets
    /// them.
    pub fn allows_others(&self) -> bool {
        self.shared.file.policy.others
    }

    /// The minor version of the protocol spoken.
    pub(crate) fn protocol_minor(&self) -> u32 {
        self.shared.agreement.minor
    }

    /// By what its requests come: "/dev/fuse" or "io_uring".
    pub fn transport(&self) -> &'static str {
        self.carrier.name()
    }

    /// How many entries each of the kernel's ring queues has; `None` without
    /// rings.
    pub fn queue_depth(&self) -> Option<usize> {
        match self.carrier {
            Carrier::DevFuse => None,
            Carrier::Rings(plan) => Some(plan.depth),
        }
    }

    /// How the file was mounted; `None` if somebody else did it.
    pub(crate) fn mount_method(&self) -> Option<&'static str> {
        self.shared.mount.get().map(Mount::method)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.stop_within(Stop::Lazy, self.patience) {
            log::warn!("{error}");
        }
    }
}

/// Waits for threads to end, except for the caller's own.
pub(crate) fn join<T>(threads: Vec<JoinHandle<T>>) {
    for thread in threads {
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            log::error!("one of the export's threads panicked");
        }
    }
}

/// `None`: so far off that it never comes.
fn deadline_after(time: Duration) -> Option<Instant> {
    Instant::now().checked_add(time)
}

fn deadlock(what: &str) -> Error {
    let text = format!("{what} within a callback of the same export would wait for itself");
    Error::new(libc::EDEADLK, text)
}

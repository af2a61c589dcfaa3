//! Starting an export: everything that may fail before the file can be used,
//! in an order in which each failure leaves nothing behind.
//!
//! The order matters most for io_uring. From the answer to INIT that promises
//! rings until every ring is registered, the kernel makes all clients wait,
//! for ever if need be; and once it sends requests through the rings there is
//! no way back. So:
//!
//! 1. mount, where nobody can see it, and read INIT;
//! 2. start the queues' threads, each of which makes its ring and its memory;
//! 3. answer INIT, with the promise only if all of that went well, and then
//!    register the file to pass through, before anybody can open the export;
//! 4. have the threads register their entries;
//! 5. be a client, in a process of its own, and see that its requests come
//!    through a ring. If they do not, withdraw the promise and fall back to
//!    /dev/fuse;
//! 6. attach the mount.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::config::{Config, IoUring, Threads};
use crate::control::{Control, Latch, Owned, Phase};
use crate::driver::{BlockDriver, Limits, QueueInfo};
use crate::error::{Error, Result};
use crate::export::{Export, Shared, join};
use crate::file::{File, FilePolicy};
use crate::forward::Port;
use crate::hostqueue::{Core, HostQueue, TaskMaker};
use crate::legacy::{self, Init, Legacy};
use crate::mount::{self, Aborter, AllowOther, MountOptions, Mounting, Outcome, Probe};
use crate::operations::{Device, serve};
use crate::passthrough::{self, Backing};
use crate::plan::{Plan, Wish};
use crate::protocol::{Agreement, Offer};
use crate::queue::{BUDGET, DetachedQueue, Progress, Queue};
use crate::seat;
use crate::system::System;
use crate::task::Tasks;
use crate::transport::Transport;
use crate::unforked::FuseDevice;
use crate::uring::{self, Prepared, Share};
use crate::wakeups::Wakeups;

/// The least that the kernel is told to keep in flight in the background,
/// which is what asynchronous clients and readahead do.
const MIN_BACKGROUND: usize = 256;
/// How long a descriptor may take to bring INIT.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the rings may take to bring a first request.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the kernel may take to send what it was asked for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// By what an export's requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    DevFuse,
    Rings(Plan),
}

impl Carrier {
    /// Its name, as the property "transport" tells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Carrier::DevFuse => "/dev/fuse",
            Carrier::Rings(_) => "io_uring",
        }
    }
}

/// Starts an export of `driver`, on `device` if there is one.
pub(crate) fn start<D: BlockDriver>(
    driver: D,
    config: Config,
    device: Option<OwnedFd>,
) -> Result<Export> {
    let gone = Arc::new(Latch::default());
    let driver = Arc::new(Owned::new(driver, gone.clone()));
    config.check()?;
    let queues = config.queue_count();
    let limits = checked_limits(&driver.driver)?;
    check_features(&driver.driver, &config)?;
    let control = Control::new(config.name(), driver.clone(), queues);
    let length = control.driver_length()?;
    let backing = if config.passthrough {
        let file = passthrough::checked(driver.driver.backing_file(), length);
        Some(file.map_err(|e| named(&config, e))?)
    } else {
        None
    };

    let choice = Choice {
        config: &config,
        queues,
    };
    let mut plan = choice.plan(&System::new())?;
    let mut connection = Connection::open(&config, device, plan.as_ref(), queues, backing)?;
    if backing.is_some() && !connection.agreement.passes_through() {
        return Err(named(&config, passthrough::not_offered()));
    }
    if plan.is_some() && !connection.agreement.io_uring() {
        let text = "the kernel does not offer FUSE over io_uring";
        choice.without_rings(Error::new(libc::EOPNOTSUPP, text))?;
        plan = None;
    }
    let policy = FilePolicy {
        writable: config.writable,
        growable: config.growable,
        others: connection.allows_others(&config),
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        block_size: limits.block_size,
    };
    if let Some(aborter) = Aborter::new(connection.device.as_fd()) {
        control.set_aborter(aborter);
    }
    let shared = Arc::new(Shared::new(
        control,
        File::new(policy, length, queues),
        connection.agreement,
        connection.device.clone(),
        queues,
    ));
    let slots = plan.as_ref().map_or(legacy::SLOTS, uring::slots);
    let wakeups = (0..queues)
        .map(|_| Wakeups::new(slots).map(Arc::new))
        .collect::<nix::Result<Box<[_]>>>()
        .map_err(|e| Error::from_io("cannot make an eventfd", &e.into()))?;
    let hosted = config.threads == Threads::Host;
    let share = plan.map(|plan| {
        let share = Share::new(plan, seat::some_cpu(), &wakeups, hosted);
        Arc::new(share)
    });
    // Its clients are there already, and are to wait for the program's threads.
    let held_up = (hosted && config.fuse_fd.is_some()).then(|| HeldUp::new(&shared.control));
    let threads = QueueThreads::start(&shared, &driver, share.as_ref(), wakeups, slots, hosted)?;
    let began = Beginning {
        choice,
        threads: &threads,
        backing,
    }
    .run(&connection, share);
    let carrier = match began {
        Ok(carrier) => carrier,
        Err(error) => {
            // Before the mount goes: the kernel waits for what they serve.
            threads.end();
            return Err(error);
        }
    };
    let runners = if hosted {
        threads.leave()?
    } else {
        threads.settle()
    };
    drop(held_up);
    let mount = match connection.mounting.take().map(Mounting::attach).transpose() {
        Ok(attached) => attached.map(|(_device, mount)| mount),
        Err(error) => {
            runners.end(&shared);
            return Err(error);
        }
    };
    shared.file.publish();
    log_start(&shared, queues, carrier);
    let export = Export::new(shared.clone(), runners, mount, carrier, gone);
    shared.control.announce();
    if shared.control.phase() == Phase::Closed {
        let name = &shared.control.name;
        let ended = Error::new(
            libc::ENOTCONN,
            format!("{name}: unmounted while it started"),
        );
        return Err(export.failure().unwrap_or(ended));
    }
    Ok(export)
}

/// Requests wait as long as it lives.
struct HeldUp(Arc<Control>);

impl HeldUp {
    fn new(control: &Arc<Control>) -> Self {
        control.requests.close();
        Self(control.clone())
    }
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        self.0.requests.open();
        self.0.kick();
    }
}

/// An error that says which export it is about.
fn named(config: &Config, error: Error) -> Error {
    Error::new(error.errno(), format!("{}: {error}", config.name()))
}

fn log_start(shared: &Shared, queues: usize, carrier: Carrier) {
    let depth = match carrier {
        Carrier::DevFuse => String::new(),
        Carrier::Rings(plan) => format!(
            " ({} entries for each of {} CPUs)",
            plan.depth, plan.kernel_queues
        ),
    };
    log::info!(
        "{}: {} bytes, {queues} queues over {}{depth}, FUSE 7.{}, requests of up to {} bytes",
        shared.control.name,
        shared.file.length(),
        carrier.name(),
        shared.agreement.minor,
        shared.agreement.max_request,
    );
}

fn checked_limits(driver: &impl BlockDriver) -> Result<Limits> {
    let limits = driver.limits();
    if limits.block_size < 512 || !limits.block_size.is_power_of_two() {
        let text = format!(
            "the driver's block size of {} bytes is not a power of two of at least 512",
            limits.block_size
        );
        return Err(Error::new(libc::EINVAL, text));
    }
    Ok(limits)
}

fn check_features(driver: &impl BlockDriver, config: &Config) -> Result<()> {
    let features = driver.features();
    if config.writable && !features.write {
        return Err(Error::new(
            libc::EROFS,
            "the driver cannot write; export it read-only",
        ));
    }
    if config.growable && !features.truncate {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "the driver cannot change its length; export it without \"growable\"",
        ));
    }
    Ok(())
}

/// What is wished for, and what becomes of the wish.
#[derive(Clone, Copy)]
struct Choice<'a> {
    config: &'a Config,
    queues: usize,
}

impl Choice<'_> {
    /// The rings to make; `None` if there are to be none.
    fn plan(&self, system: &System) -> Result<Option<Plan>> {
        if self.config.io_uring == IoUring::Off {
            return Ok(None);
        }
        match self.possible_plan(system) {
            Ok(plan) => Ok(Some(plan)),
            Err(why) => self.without_rings(why).map(|()| None),
        }
    }

    fn possible_plan(&self, system: &System) -> Result<Plan> {
        // Loads the module, which knows whether it can.
        drop(fs::File::open("/dev/fuse"));
        if let Some(obstacle) = system.obstacle() {
            return Err(obstacle);
        }
        let is_auto = self.config.io_uring == IoUring::Auto;
        if let Some(doubt) = system.doubt().filter(|_| is_auto) {
            return Err(Error::new(libc::EOPNOTSUPP, doubt));
        }
        if is_auto && self.config.fuse_fd.is_some() {
            let text = "whether io_uring works cannot be tried on somebody else's mount; \
                        to use it, set \"io-uring\" to on";
            return Err(Error::new(libc::EOPNOTSUPP, text));
        }
        if self.config.threads == Threads::Host {
            self.check_reach(system)?;
        }
        let kernel_queues = system
            .possible_cpus()
            .map_err(|e| Error::from_io("cannot count the CPUs", &e))?;
        Plan::new(&Wish {
            kernel_queues,
            queues: self.queues,
            depth: self.config.queue_depth,
            max_request: self.config.max_request,
            budget: self.config.memory_budget(),
        })
    }

    /// A queue can change threads only if this process may run wherever there
    /// are clients (uring.rs).
    fn check_reach(&self, system: &System) -> Result<()> {
        let online = system
            .online_cpus()
            .map_err(|e| Error::from_io("cannot list the CPUs", &e))?;
        let closed = seat::on_each_cpu(online.into_iter(), |_| ())
            .map_err(|e| Error::from_io("cannot start a thread", &e))?;
        match closed.first() {
            None => Ok(()),
            Some(cpu) => {
                let text = format!(
                    "this process may not run on CPU {cpu}, which io_uring with host threads \
                     needs; let its cpuset have all CPUs"
                );
                Err(Error::new(libc::EOPNOTSUPP, text))
            }
        }
    }

    /// There can be no rings: goes on without, unless they were insisted on.
    fn without_rings(&self, why: Error) -> Result<()> {
        if self.config.io_uring == IoUring::On {
            return Err(named(self.config, why));
        }
        log::info!("{}: over /dev/fuse: {why}", self.config.name());
        Ok(())
    }
}

/// A connection whose INIT was read and is not answered.
struct Connection {
    device: Arc<FuseDevice>,
    /// To be attached; `None` if somebody else did the mounting.
    mounting: Option<Mounting>,
    init: Init,
    offer: Offer,
    agreement: Agreement,
}

impl Connection {
    fn open(
        config: &Config,
        fuse_fd: Option<OwnedFd>,
        plan: Option<&Plan>,
        queues: usize,
        backing: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        let max_request = plan.map_or(config.max_request(), |p| p.max_request);
        let mounting = match (&fuse_fd, &config.mountpoint) {
            (None, Some(mountpoint)) => Some(mount::prepare(&MountOptions {
                mountpoint,
                source: &config.source(),
                writable: config.writable,
                allow_other: config.allow_other,
                max_read: max_request,
            })?),
            _ => None,
        };
        let device = match (&mounting, fuse_fd) {
            (Some(mounting), _) => mounting
                .device()
                .try_clone_to_owned()
                .map_err(|e| Error::from_io("cannot duplicate the FUSE descriptor", &e))?,
            (None, Some(fd)) => fd,
            (None, None) => unreachable!("checked: a mountpoint or a descriptor"),
        };
        let in_flight = match plan {
            Some(plan) => plan.kernel_queues * plan.depth,
            None => queues * legacy::SLOTS,
        };
        let offer = Offer {
            max_request,
            truncates_on_open: config.growable,
            max_background: in_flight.clamp(MIN_BACKGROUND, u16::MAX.into()) as u16,
            io_uring: plan.is_some(),
            passthrough_depth: backing.map_or(0, passthrough::stack_depth),
        };
        let (init, agreement) =
            Init::receive(device.as_fd(), &offer, INIT_TIMEOUT).map_err(|e| named(config, e))?;
        Ok(Self {
            device: Arc::new(device.into()),
            mounting,
            init,
            offer,
            agreement,
        })
    }

    /// Whether the mount lets others than its owner in. Of a mount that
    /// somebody else made only its maker knows, and may say so.
    fn allows_others(&self, config: &Config) -> bool {
        match &self.mounting {
            Some(mounting) => mounting.allows_others(),
            None => config.allow_other == AllowOther::On,
        }
    }
}

/// The queues' threads are there; nobody serves yet.
struct Beginning<'a> {
    choice: Choice<'a>,
    threads: &'a QueueThreads,
    /// What the kernel is to read by itself.
    backing: Option<BorrowedFd<'a>>,
}

impl Beginning<'_> {
    /// Answers INIT and has the queues serve, through the rings of `share` if
    /// that can be.
    fn run(&self, connection: &Connection, share: Option<Arc<Share>>) -> Result<Carrier> {
        self.threads.outcome()?;
        // Who waits for a connection that has no rings may go after its return
        // to /dev/fuse only.
        let mut probe = None;
        let share = match share {
            Some(share) => self.prepare(connection, &mut probe)?.then_some(share),
            None => None,
        };
        let offer = Offer {
            io_uring: share.is_some(),
            ..connection.offer
        };
        connection.init.answer(connection.device.as_fd(), &offer)?;
        if let Some(file) = self.backing {
            let backing = Backing::open(connection.device.clone(), file);
            let backing = backing.map_err(|e| named(self.choice.config, e))?;
            self.threads.shared.pass_through(backing);
        }
        let Some(share) = share else {
            self.threads.order(Order::Serve);
            self.threads.outcome()?;
            return Ok(Carrier::DevFuse);
        };
        self.threads.order(Order::Register);
        let refused = self.threads.outcome()?;
        let untaken = probe.as_mut().and_then(|probe| untaken(probe, &share));
        let device = connection.device.as_fd();
        let why = match refused {
            // Each CPU has an entry at least, and there is no way back.
            Some(why) if has_switched_all_the_same(device, &share) => {
                log::warn!("{}: {why}; the others serve", self.choice.config.name());
                None
            }
            refused => refused.or(untaken),
        };
        let Some(why) = why else {
            if share.has_switched() {
                share.drop_anchor(device);
            }
            return Ok(Carrier::Rings(share.plan()));
        };
        self.fall_back(&connection.device, &share)?;
        self.choice.without_rings(why)?;
        Ok(Carrier::DevFuse)
    }

    /// Makes what the rings need, and begins to be a client, who waits for the
    /// answer to INIT. False if there can be no rings.
    fn prepare(&self, connection: &Connection, probe: &mut Option<Probe>) -> Result<bool> {
        self.threads.order(Order::Prepare);
        let mut lack = self.threads.outcome()?;
        if let (None, Some(mounting)) = (&lack, &connection.mounting) {
            match mounting.probe() {
                Ok(begun) => *probe = Some(begun),
                Err(why) if self.choice.config.io_uring == IoUring::On => {
                    log::info!("io_uring is not tried: {why}");
                }
                Err(why) => lack = Some(why),
            }
        }
        match lack {
            Some(why) => self.choice.without_rings(why).map(|()| false),
            None => Ok(true),
        }
    }

    /// Has the kernel and the queues return to /dev/fuse.
    fn fall_back(&self, device: &FuseDevice, share: &Share) -> Result<()> {
        uring::give_up(device.as_fd())
            .map_err(|e| Error::from_io("cannot return to /dev/fuse", &e))?;
        // What has switched does not go back.
        if share.has_switched() {
            let text = "only some of the rings could be registered";
            return Err(Error::new(libc::EIO, text));
        }
        self.threads.order(Order::FallBack);
        Ok(())
    }
}

/// Waits for a client. Why its requests do not come through the rings, if they
/// do not.
fn untaken(probe: &mut Probe, share: &Share) -> Option<Error> {
    let outcome = probe.wait(PROBE_TIMEOUT);
    if share.has_switched() {
        return None;
    }
    let text = match outcome {
        Outcome::TimedOut => "the kernel does not take the rings for ready",
        _ => "the kernel does not send requests through the rings",
    };
    Some(Error::new(libc::ETIMEDOUT, text))
}

/// Whether the kernel uses the rings, though it has refused an entry of theirs.
/// The probe may have come before the last one was registered; what is asked
/// for now comes through the rings, if anything does.
fn has_switched_all_the_same(device: BorrowedFd<'_>, share: &Share) -> bool {
    if !share.has_switched() {
        share.drop_anchor(device);
    }
    let end = Instant::now() + ANSWER_TIMEOUT;
    while !share.has_switched() && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
    share.has_switched()
}

/// What a queue's thread is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Serve /dev/fuse.
    Serve,
    /// Make a ring, and wait for what is to become of it.
    Prepare,
    /// Register the ring's entries, and serve it.
    Register,
    /// Serve /dev/fuse after all.
    FallBack,
    /// Leave the queue to the program's threads.
    Leave,
}

/// Who runs an export's queues.
pub(crate) enum QueueRunners {
    Threads(Vec<JoinHandle<Option<HostQueue>>>),
    Host(Vec<HostQueue>),
}

impl QueueRunners {
    /// Undoes a start.
    fn end(self, shared: &Shared) {
        shared.control.advance(Phase::Closed);
        match self {
            Self::Threads(threads) => join(threads),
            Self::Host(queues) => {
                queues.iter().for_each(HostQueue::take_over);
                join(shared.ending.take_threads());
            }
        }
    }
}

/// What it says: that it cannot go on; that it goes on without its ring; or
/// that all is well.
type Report = Result<Option<Error>>;

/// One queue's thread, as who starts it sees it.
struct QueueThread {
    orders: mpsc::Sender<Order>,
    reports: mpsc::Receiver<Report>,
    thread: JoinHandle<Option<HostQueue>>,
}

/// The threads of all queues.
struct QueueThreads {
    shared: Arc<Shared>,
    threads: Vec<QueueThread>,
}

impl QueueThreads {
    /// Starts them, each with a ring if there is a `share`; they report when
    /// they have what they need. If one cannot be started, none is left.
    /// `slots`: how many requests each may have in flight; `hosted`: they will
    /// leave the queues to the program's threads.
    fn start<D: BlockDriver>(
        shared: &Arc<Shared>,
        driver: &Arc<Owned<D>>,
        share: Option<&Arc<Share>>,
        wakeups: Box<[Arc<Wakeups>]>,
        slots: usize,
        hosted: bool,
    ) -> Result<Self> {
        shared.control.set_queues(wakeups.clone());
        let mut threads = Self {
            shared: shared.clone(),
            threads: Vec::with_capacity(wakeups.len()),
        };
        for (index, wakeups) in wakeups.iter().enumerate() {
            let starter = QueueStarter {
                shared: shared.clone(),
                driver: driver.clone(),
                wakeups: wakeups.clone(),
                share: share.cloned(),
                info: QueueInfo { index, slots },
                hosted,
            };
            if let Err(e) = threads.spawn(starter) {
                threads.end();
                return Err(Error::from_io("cannot start a queue's thread", &e));
            }
        }
        Ok(threads)
    }

    fn spawn<D: BlockDriver>(&mut self, starter: QueueStarter<D>) -> std::io::Result<()> {
        let (orders, take_orders) = mpsc::channel();
        let (report, reports) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("blkfuse-{}", starter.info.index))
            .spawn(move || starter.run(&report, take_orders))?;
        self.threads.push(QueueThread {
            orders,
            reports,
            thread,
        });
        Ok(())
    }

    /// What all of them report next.
    fn outcome(&self) -> Report {
        let died = || Error::new(libc::ENOTRECOVERABLE, "a queue's thread panicked");
        let mut lack = None;
        let mut failure = None;
        for thread in &self.threads {
            match thread.reports.recv().unwrap_or_else(|_| Err(died())) {
                Ok(reason) => lack = lack.or(reason),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(lack), Err)
    }

    fn order(&self, order: Order) {
        for thread in &self.threads {
            // One that has ended needs none.
            let _ = thread.orders.send(order);
        }
        self.shared.control.kick();
    }

    /// They go on as they are.
    fn settle(self) -> QueueRunners {
        QueueRunners::Threads(self.threads.into_iter().map(|t| t.thread).collect())
    }

    /// They leave their queues to the program's threads, and end.
    fn leave(self) -> Result<QueueRunners> {
        self.order(Order::Leave);
        let count = self.threads.len();
        let threads = self.threads.into_iter();
        let queues: Vec<_> = threads
            .filter_map(|thread| thread.thread.join().ok().flatten())
            .collect();
        let have_all = queues.len() == count;
        let runners = QueueRunners::Host(queues);
        if have_all {
            return Ok(runners);
        }
        runners.end(&self.shared);
        let ended = || Error::new(libc::ENOTCONN, "the connection has ended");
        Err(self.shared.control.failure().unwrap_or_else(ended))
    }

    /// Undoes the start of a connection that nobody uses.
    fn end(self) {
        self.shared.control.advance(Phase::Closed);
        let threads = self.threads.into_iter();
        // Without orders to come, those that wait for one end.
        join(threads.map(|t| t.thread).collect());
    }
}

/// What a queue's thread begins with.
struct QueueStarter<D> {
    shared: Arc<Shared>,
    driver: Arc<Owned<D>>,
    info: QueueInfo,
    wakeups: Arc<Wakeups>,
    share: Option<Arc<Share>>,
    /// The queue is for one of the program's threads, of which the driver is
    /// told instead of this one.
    hosted: bool,
}

/// What a queue's thread has before it is told how to serve.
struct Opened {
    legacy: Box<Legacy>,
    /// The driver knows of the queue.
    started: Option<StartedQueue>,
}

/// A queue whose start the driver has agreed to, and of whose end it is told.
pub(crate) struct StartedQueue {
    control: Arc<Control>,
    index: usize,
}

impl StartedQueue {
    /// Tells the driver; in the thread that will run the queue.
    pub(crate) fn tell(control: &Arc<Control>, info: QueueInfo) -> Result<Self> {
        let mut started = Err(Error::new(
            libc::ENOTRECOVERABLE,
            "the driver panicked while it started a queue",
        ));
        control.hook(|h| {
            started = h
                .queue_start(info)
                .map_err(|e| Error::from_io("the driver cannot start a queue", &e));
        });
        started.map(|()| Self {
            control: control.clone(),
            index: info.index,
        })
    }
}

impl Drop for StartedQueue {
    fn drop(&mut self) {
        self.control.hook(|h| h.queue_stop(self.index));
    }
}

/// The end of a queue, however it comes.
pub(crate) struct EndOfQueue(Arc<Shared>);

impl Drop for EndOfQueue {
    fn drop(&mut self) {
        if thread::panicking() {
            let text = "a queue's thread panicked";
            self.0.control.halt(Error::new(libc::ENOTRECOVERABLE, text));
        }
        self.0.queue_ended();
    }
}

impl<D: BlockDriver> QueueStarter<D> {
    /// The thread of one queue. Returns the queue if it is to be left.
    fn run(
        self,
        report: &mpsc::Sender<Report>,
        orders: mpsc::Receiver<Order>,
    ) -> Option<HostQueue> {
        seat::block_signals();
        let end = EndOfQueue(self.shared.clone());
        let control = self.shared.control.clone();
        // All of this thread's calls of the driver are callbacks, not only
        // those in a dispatch.
        let _marked = control.dispatching();
        // Whoever started the thread waits for its reports.
        let Opened { legacy, started } = match self.open() {
            Ok(opened) => opened,
            Err(error) => {
                let _ = report.send(Err(error));
                return None;
            }
        };
        let _ = report.send(Ok(None));
        let mut ring = None;
        let mut order = orders.recv();
        if order == Ok(Order::Prepare) {
            let lack = match self.prepare() {
                Ok(prepared) => {
                    ring = prepared;
                    None
                }
                Err(lack) => Some(lack),
            };
            let _ = report.send(Ok(lack));
            order = orders.recv();
        }
        let order = order.ok()?;
        let descriptor = legacy.descriptor();
        let (transport, refused) = match self.transport(legacy, ring, order) {
            Ok(transport) => transport,
            Err(error) => {
                let _ = report.send(Err(error));
                return None;
            }
        };
        let (info, shared) = (self.info, self.shared.clone());
        let wakeups = self.wakeups.clone();
        let make_tasks = self.task_maker();
        let (tasks, port) = make_tasks();
        let mut queue = Queue::new(info.index, control, wakeups, transport, tasks, port);
        if started.is_none() {
            queue = queue.unannounced();
        }
        let _ = report.send(Ok(refused));
        let queue = serve_queue(queue, orders);
        drop(started);
        let core = Core {
            make_tasks,
            info,
            shared,
            _end: end,
        };
        queue.map(|queue| HostQueue::new(queue, descriptor, core))
    }

    /// Makes what serving /dev/fuse takes.
    fn open(&self) -> Result<Opened> {
        let device = self.shared.queue_device()?;
        let max_request = self.shared.agreement.max_request as usize;
        let legacy = Legacy::new(device, self.wakeups.clone(), max_request)
            .map_err(|e| Error::from_io("cannot watch /dev/fuse", &e.into()))?;
        let started = match self.hosted {
            true => None,
            false => Some(StartedQueue::tell(&self.shared.control, self.info)?),
        };
        Ok(Opened {
            legacy: Box::new(legacy),
            started,
        })
    }

    /// Makes the ring. After every queue has opened /dev/fuse, so that rings do
    /// not take what that needs.
    fn prepare(&self) -> Result<Option<Prepared>> {
        let share = self.share.as_ref();
        let prepared = share.map(|share| Prepared::new(share.clone(), self.info.index));
        let prepared = prepared.transpose();
        prepared.map_err(|e| Error::from_io("cannot make an io_uring", &e))
    }

    /// The transport to serve, and why the kernel does not have all of its
    /// entries.
    fn transport(
        &self,
        legacy: Box<Legacy>,
        ring: Option<Prepared>,
        order: Order,
    ) -> Result<(Box<dyn Transport>, Option<Error>)> {
        let Some(ring) = ring.filter(|_| order == Order::Register) else {
            return Ok((legacy, None));
        };
        let (uring, refused) = ring.register(legacy, self.wakeups.clone())?;
        Ok((Box::new(uring), refused))
    }

    fn task_maker(self) -> TaskMaker {
        Box::new(move || {
            let port = Rc::new(Port::default());
            let device = Rc::new(Device {
                driver: self.driver.clone(),
                file: self.shared.file.clone(),
                stats: self.shared.stats.clone(),
                queue: self.info.index,
                port: port.clone(),
            });
            let tasks = Tasks::new(self.wakeups.clone(), move |task, mailbox| {
                serve(device.clone(), task, mailbox)
            });
            (tasks, port)
        })
    }
}

/// Serves until the export's end, or until the queue is to be left; `orders`
/// may change how, until nobody gives any more.
fn serve_queue(
    mut queue: Queue<Box<dyn Transport>>,
    orders: mpsc::Receiver<Order>,
) -> Option<DetachedQueue> {
    let mut orders = Some(orders);
    let mut leaves = false;
    loop {
        let progress = queue.dispatch(BUDGET);
        if progress == Progress::Finished {
            return None;
        }
        // Looked for after the dispatch: that may have taken the kick which
        // came with an order, and no other would come.
        match orders.as_ref().map(mpsc::Receiver::try_recv) {
            Some(Ok(Order::FallBack)) => {
                queue = queue.fall_back();
                continue;
            }
            Some(Ok(Order::Leave)) => leaves = true,
            Some(Err(mpsc::TryRecvError::Disconnected)) => orders = None,
            _ => {}
        }
        if leaves && queue.is_at_rest() {
            leaves = false;
            match queue.recall() {
                Ok(()) => return Some(queue.detach()),
                Err(error) => queue.broken(error),
            }
        }
        if progress == Progress::Idle {
            queue.wait();
        }
    }
}

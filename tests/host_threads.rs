//! Queues that the program's own threads run, on real mounts: every kind of
//! loop, moving from thread to thread, ends, and what is done wrong.

#[path = "common/alone.rs"]
mod alone;
mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use alone::{Belongings, alone, assert_rests, own_dir, wait_for_rest};
use blkfuse::{
    BlockDriver, Builder, Dispatched, Event, Export, Features, HostQueue, Io, IoUring, QueueInfo,
    ReadBuf, State, Stop, Threads,
};
use common::client::{command, output, start};
use common::loops::{Loops, go_on, is_readable, run};
use common::{
    SOON, Watchdog, eventually, for_transports, for_transports_and_queues, pattern, within,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{Pid, gettid};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
const LENGTH: usize = BLOCKS * BLOCK;

/// A disk in memory that notes which threads call it.
struct Noting {
    data: Mutex<Vec<u8>>,
    /// Of data callbacks.
    callers: Mutex<BTreeSet<Pid>>,
    calls: AtomicU64,
    /// Queues' starts and stops: their numbers, and the threads.
    starts: Mutex<Vec<(usize, Pid)>>,
    stops: Mutex<Vec<(usize, Pid)>>,
    events: Mutex<Vec<Event>>,
    idle: AtomicUsize,
    refuses_to_start: AtomicBool,
    /// What a read of block 7 does.
    in_callback: Mutex<Option<Box<dyn FnMut() + Send>>>,
    /// Reads of block 9 wait for this.
    held: Mutex<Option<Gate>>,
    dropped: Arc<AtomicBool>,
}

/// A gate for futures, without a runtime.
mod gate {
    use std::future::poll_fn;
    use std::sync::{Arc, Mutex};
    use std::task::{Poll, Waker};

    #[derive(Clone, Default)]
    pub struct Gate(Arc<Mutex<(bool, Vec<Waker>)>>);

    impl Gate {
        pub fn waiting(&self) -> usize {
            self.0.lock().unwrap().1.len()
        }

        pub fn open(&self) {
            let mut state = self.0.lock().unwrap();
            state.0 = true;
            state.1.drain(..).for_each(Waker::wake);
        }

        pub async fn pass(&self) {
            poll_fn(|cx| {
                let mut state = self.0.lock().unwrap();
                if state.0 {
                    return Poll::Ready(());
                }
                state.1.push(cx.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }
}
use gate::Gate;

#[derive(Clone)]
struct Disk(Arc<Noting>);

impl Disk {
    fn new() -> Self {
        Self(Arc::new(Noting {
            data: Mutex::new(pattern(0, LENGTH)),
            callers: Mutex::default(),
            calls: AtomicU64::new(0),
            starts: Mutex::default(),
            stops: Mutex::default(),
            events: Mutex::default(),
            idle: AtomicUsize::new(0),
            refuses_to_start: AtomicBool::new(false),
            in_callback: Mutex::new(None),
            held: Mutex::new(None),
            dropped: Arc::default(),
        }))
    }

    fn noted(&self) {
        self.0.callers.lock().unwrap().insert(gettid());
        self.0.calls.fetch_add(1, SeqCst);
    }

    fn calls(&self) -> u64 {
        self.0.calls.load(SeqCst)
    }

    /// Reads of block 9 wait until the gate is opened.
    fn hold(&self) -> Gate {
        let gate = Gate::default();
        *self.0.held.lock().unwrap() = Some(gate.clone());
        gate
    }

    fn halted(&self) -> Option<(i32, String)> {
        let events = self.0.events.lock().unwrap();
        events.iter().find_map(|event| match event {
            Event::Halted { errno, message } => Some((*errno, message.clone())),
            _ => None,
        })
    }
}

/// The driver: dropped with its export.
struct Exported(Disk);

impl Drop for Exported {
    fn drop(&mut self) {
        self.0.0.dropped.store(true, SeqCst);
    }
}

impl BlockDriver for Exported {
    fn length(&self) -> io::Result<u64> {
        Ok(LENGTH as u64)
    }

    fn features(&self) -> Features {
        Features {
            write: true,
            truncate: false,
        }
    }

    async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        self.0.noted();
        let block = offset as usize / BLOCK;
        if block == 7
            && let Some(f) = &mut *self.0.0.in_callback.lock().unwrap()
        {
            f();
        }
        let gate = self.0.0.held.lock().unwrap().clone();
        if block == 9
            && let Some(gate) = gate
        {
            gate.pass().await;
        }
        let data = self.0.0.data.lock().unwrap();
        let len = buf.len();
        buf.bytes_mut()
            .copy_from_slice(&data[offset as usize..][..len]);
        Ok(())
    }

    async fn write(&self, _: &Io<'_>, from: &[u8], offset: u64) -> io::Result<()> {
        self.0.noted();
        self.0.0.data.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        if self.0.0.refuses_to_start.load(SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.0
            .0
            .starts
            .lock()
            .unwrap()
            .push((queue.index, gettid()));
        Ok(())
    }

    fn queue_stop(&self, queue: usize) {
        self.0.0.stops.lock().unwrap().push((queue, gettid()));
    }

    fn idle(&self) {
        self.0.0.idle.fetch_add(1, SeqCst);
    }

    fn event(&self, event: &Event) {
        self.0.0.events.lock().unwrap().push(event.clone());
    }
}

/// An export whose queues are this test's, under a watchdog.
struct Mounted {
    export: Option<Export>,
    disk: Disk,
    path: PathBuf,
    _watchdog: Watchdog,
    _dir: tempfile::TempDir,
}

impl Mounted {
    fn new(transport: IoUring, queues: usize) -> Self {
        Self::with(|b| b.io_uring(transport).queues(queues))
    }

    fn with(configure: impl FnOnce(Builder<Exported>) -> Builder<Exported>) -> Self {
        let dir = own_dir();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let watchdog = Watchdog::new(&path);
        let disk = Disk::new();
        let builder = Export::builder(Exported(disk.clone()))
            .mountpoint(&path)
            .writable(true)
            .threads(Threads::Host);
        let export = configure(builder).start().unwrap();
        Self {
            export: Some(export),
            disk,
            path,
            _watchdog: watchdog,
            _dir: dir,
        }
    }

    fn export(&self) -> &Export {
        self.export.as_ref().unwrap()
    }

    fn queue(&self, index: usize) -> HostQueue {
        self.export().queue(index).unwrap().clone()
    }

    fn queues(&self) -> Vec<HostQueue> {
        (0..self.export().queue_count())
            .map(|n| self.queue(n))
            .collect()
    }

    /// Opens the file, for which somebody must serve.
    fn open(&self) -> File {
        let path = self.path.clone();
        let options = File::options().read(true).write(true).clone();
        thread::spawn(move || options.open(path).unwrap())
            .join()
            .unwrap()
    }

    fn delete(mut self) {
        let export = self.export.take().unwrap();
        export.delete(Some(SOON)).unwrap();
        assert!(self.disk.0.dropped.load(SeqCst));
        assert!(!common::is_mounted(&self.path));
    }
}

fn errno<T: std::fmt::Debug>(result: blkfuse::Result<T>) -> i32 {
    result.unwrap_err().errno()
}

/// Reads a block in a thread; the result comes through the channel.
fn read_block(file: &File, block: usize) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (done, result) = mpsc::channel();
    let file = file.try_clone().unwrap();
    thread::spawn(move || {
        let mut data = vec![0; BLOCK];
        let read = file.read_exact_at(&mut data, (block * BLOCK) as u64);
        let _ = done.send(read.map(|()| data));
    });
    result
}

/// The status of the file at `path`, asked for by another process.
fn stat_elsewhere(path: &Path) -> std::process::Child {
    start(&mut command("stat -c %s {}", path))
}

// --- every kind of loop -----------------------------------------------------

/// Waits until the descriptor is readable, in one of the ways there are.
type Wait = fn(BorrowedFd<'_>);

fn by_poll(fd: BorrowedFd<'_>) {
    let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE);
}

fn by_epoll(fd: BorrowedFd<'_>) {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    epoll
        .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 1))
        .unwrap();
    let _ = epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE);
}

fn by_select(fd: BorrowedFd<'_>) {
    // SAFETY: a zeroed set is an empty one; the descriptor is below FD_SETSIZE,
    // which is looked at; and select only uses the set, a live local.
    unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        assert!((fd.as_raw_fd() as usize) < libc::FD_SETSIZE);
        libc::FD_SET(fd.as_raw_fd(), &mut set);
        libc::select(
            fd.as_raw_fd() + 1,
            &mut set,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
    }
}

fn by_io_uring(fd: BorrowedFd<'_>) {
    use io_uring::{IoUring, opcode, types};
    let mut ring = IoUring::new(2).unwrap();
    let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).build();
    // SAFETY: a poll speaks of no memory.
    unsafe { ring.submission().push(&poll) }.unwrap();
    let _ = ring.submit_and_wait(1);
}

#[test]
fn every_kind_of_loop_serves() {
    const WAYS: [(&str, Wait); 4] = [
        ("poll", by_poll),
        ("epoll", by_epoll),
        ("select", by_select),
        ("io_uring", by_io_uring),
    ];
    for_transports_and_queues(|transport, queues| {
        for (way, wait) in WAYS {
            eprintln!("by {way}");
            let m = Mounted::new(transport, queues);
            let loops = m.queues().into_iter().map(|queue| {
                thread::spawn(move || {
                    queue.attach().unwrap();
                    loop {
                        match queue.dispatch(0).unwrap() {
                            Dispatched::More => {}
                            Dispatched::Idle => wait(queue.as_fd()),
                            Dispatched::Ended => return gettid(),
                        }
                    }
                })
            });
            let loops: Vec<_> = loops.collect();
            let file = m.open();
            let mut all = vec![0; LENGTH];
            file.read_exact_at(&mut all, 0).unwrap();
            assert!(all == pattern(0, LENGTH));
            thread::scope(|scope| {
                for client in 0..4 {
                    let file = &file;
                    scope.spawn(move || {
                        for round in 0..100 {
                            let at = ((client * 16 + round % 16) * BLOCK) as u64;
                            let data = [(round + client) as u8; BLOCK];
                            file.write_all_at(&data, at).unwrap();
                            let mut back = [0; BLOCK];
                            file.read_exact_at(&mut back, at).unwrap();
                            assert_eq!(data, back);
                        }
                    });
                }
            });
            drop(file);
            let disk = m.disk.clone();
            m.delete();
            let threads: Vec<_> = loops.into_iter().map(|t| t.join().unwrap()).collect();
            let callers = disk.0.callers.lock().unwrap().clone();
            assert!(callers.iter().all(|caller| threads.contains(caller)));
            let of_each: Vec<_> = threads.iter().copied().enumerate().collect();
            let mut starts = disk.0.starts.lock().unwrap().clone();
            let mut stops = disk.0.stops.lock().unwrap().clone();
            starts.sort_unstable();
            stops.sort_unstable();
            assert_eq!(starts, of_each);
            assert_eq!(stops, of_each);
        }
    });
}

#[test]
fn one_thread_can_run_all_queues_and_end_the_export_in_between() {
    for_transports_and_queues(|transport, queues| {
        let mut m = Mounted::new(transport, queues);
        let all = m.queues();
        all.iter().for_each(|q| q.attach().unwrap());
        let round = |all: &[HostQueue]| {
            let dispatched = all.iter().map(|q| q.dispatch(0).unwrap());
            dispatched.filter(|d| *d != Dispatched::Ended).count()
        };
        let mut client = start(&mut command("cmp {} /dev/stdin", &m.path));
        // It compares with nothing: its output is what it says of the length.
        while client.try_wait().unwrap().is_none() {
            assert_eq!(round(&all), queues);
        }
        let said = client.wait_with_output().unwrap();
        assert!(String::from_utf8_lossy(&said.stderr).contains("EOF on /dev/stdin"));
        let began = Instant::now();
        let export = m.export.take().unwrap();
        assert_eq!(errno(export.drain(None)), libc::EDEADLK);
        export.stop(Stop::Lazy).unwrap();
        drop(export);
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "it waited for itself"
        );
        let end = Instant::now() + SOON;
        while round(&all) > 0 {
            assert!(Instant::now() < end);
        }
        eventually("the driver goes", || m.disk.0.dropped.load(SeqCst));
        assert_eq!(all[0].dispatch(0).unwrap(), Dispatched::Ended);
        assert_eq!(errno(all[0].attach()), libc::ESHUTDOWN);
        assert_eq!(errno(all[0].detach()), libc::ESHUTDOWN);
    });
}

#[test]
fn a_delete_that_would_wait_for_its_own_thread_is_refused() {
    for_transports(|transport| {
        let mut m = Mounted::new(transport, 1);
        let queue = m.queue(0);
        queue.attach().unwrap();
        let export = m.export.take().unwrap();
        assert_eq!(errno(export.delete(None)), libc::EDEADLK);
        while go_on(&queue) {}
        eventually("the driver goes", || m.disk.0.dropped.load(SeqCst));
    });
}

// --- the descriptor ---------------------------------------------------------

#[test]
fn the_descriptor_shows_what_there_is_to_do_and_nothing_else() {
    for_transports(|transport| {
        let m = Mounted::new(transport, 1);
        let queue = m.queue(0);
        let rests = |queue: &HostQueue| {
            // Work may end in several steps, but it ends.
            let end = Instant::now() + SOON;
            while is_readable(queue, PollTimeout::from(100u16)) {
                assert!(Instant::now() < end, "it is readable for ever");
                queue.dispatch(0).unwrap();
            }
        };
        queue.attach().unwrap();
        assert!(is_readable(&queue, PollTimeout::ZERO), "to begin with");
        rests(&queue);
        let client = stat_elsewhere(&m.path);
        assert!(is_readable(&queue, PollTimeout::from(10_000u16)));
        // It stays so until it was looked at.
        assert!(is_readable(&queue, PollTimeout::ZERO));
        let serving = thread::scope(|scope| {
            let answered = scope.spawn(|| client.wait_with_output().unwrap());
            while !answered.is_finished() {
                queue.dispatch(0).unwrap();
            }
            answered.join().unwrap()
        });
        assert_eq!(
            String::from_utf8_lossy(&serving.stdout).trim(),
            LENGTH.to_string()
        );
        rests(&queue);
        // Completing from another thread shows, too.
        let file = open_served(&m, &queue);
        let gate = m.disk.hold();
        let read = read_block(&file, 9);
        within(SOON, "the read waits", || {
            queue.dispatch(0).unwrap();
            gate.waiting() == 1
        });
        rests(&queue);
        thread::spawn(move || gate.open());
        assert!(is_readable(&queue, PollTimeout::from(10_000u16)));
        let mut served = None;
        within(SOON, "the read ends", || {
            queue.dispatch(0).unwrap();
            served = read.try_recv().ok();
            served.is_some()
        });
        assert_eq!(served.unwrap().unwrap(), pattern(9 * BLOCK, BLOCK));
        rests(&queue);
        end_here(m, &queue, file);
    });
}

/// Opens the file while this thread serves its only queue.
fn open_served(m: &Mounted, queue: &HostQueue) -> File {
    let path = m.path.clone();
    let opening = thread::spawn(move || {
        let options = File::options().read(true).write(true).clone();
        options.open(path).unwrap()
    });
    while !opening.is_finished() {
        queue.dispatch(0).unwrap();
        thread::yield_now();
    }
    opening.join().unwrap()
}

/// Ends an export whose only queue is this thread's.
fn end_here(mut m: Mounted, queue: &HostQueue, file: File) {
    drop(m.export.take());
    while go_on(queue) {}
    drop(file);
    eventually("the driver goes", || m.disk.0.dropped.load(SeqCst));
}

#[test]
fn a_loop_sleeps_while_nothing_is_to_be_done_and_in_a_drain() {
    alone(
        "a_loop_sleeps_while_nothing_is_to_be_done_and_in_a_drain",
        || {
            for_transports_and_queues(|transport, queues| {
                let m = Mounted::new(transport, queues);
                let loops = Loops::of(m.export());
                let file = m.open();
                for round in 0..2000 {
                    let mut data = [0; BLOCK];
                    let at = (round % BLOCKS * BLOCK) as u64;
                    file.read_exact_at(&mut data, at).unwrap();
                }
                wait_for_rest();
                assert_rests("idle after load");
                m.export().drain_begin().unwrap();
                let reads: Vec<_> = (0..8).map(|n| read_block(&file, n)).collect();
                wait_for_rest();
                assert_rests("requests wait in a drain");
                assert!(reads.iter().all(|read| read.try_recv().is_err()));
                m.export().drain_end().unwrap();
                for (n, read) in reads.iter().enumerate() {
                    let data = read.recv_timeout(SOON).unwrap().unwrap();
                    assert_eq!(data, pattern(n * BLOCK, BLOCK));
                }
                drop(file);
                m.delete();
                loops.join();
            });
        },
    );
}

#[test]
fn looking_for_events_makes_no_system_call_and_sees_what_a_ring_brings() {
    for_transports(|transport| {
        let m = Mounted::new(transport, 1);
        let queue = m.queue(0);
        queue.attach().unwrap();
        let file = open_served(&m, &queue);
        while is_readable(&queue, PollTimeout::from(50u16)) {
            queue.dispatch(0).unwrap();
        }
        // A request is seen without entering the kernel.
        let read = read_block(&file, 3);
        if transport == IoUring::On {
            within(SOON, "the request shows", || queue.has_events().unwrap());
        }
        let mut got = None;
        within(SOON, "the answer", || {
            queue.dispatch(0).unwrap();
            got = read.try_recv().ok();
            got.is_some()
        });
        assert_eq!(got.unwrap().unwrap(), pattern(3 * BLOCK, BLOCK));
        // And so is a completion by another thread.
        let gate = m.disk.hold();
        let read = read_block(&file, 9);
        within(SOON, "the read waits", || {
            queue.dispatch(0).unwrap();
            gate.waiting() == 1
        });
        while is_readable(&queue, PollTimeout::from(50u16)) {
            queue.dispatch(0).unwrap();
        }
        thread::spawn(move || gate.open());
        within(SOON, "the completion shows", || queue.has_events().unwrap());
        within(SOON, "the read ends", || {
            queue.dispatch(0).unwrap();
            read.try_recv().is_ok()
        });
        end_here(m, &queue, file);
        assert!(queue.has_events().unwrap());
    });
}

#[test]
fn a_dispatch_begins_no_more_than_its_budget() {
    for_transports(|transport| {
        let m = Mounted::new(transport, 1);
        let queue = m.queue(0);
        queue.attach().unwrap();
        let file = open_served(&m, &queue);
        let mut reads: Vec<_> = (0..20).map(|n| read_block(&file, n)).collect();
        let mut most = 0;
        let mut more = 0;
        within(SOON, "all reads", || {
            let before = m.disk.calls();
            if queue.dispatch(1).unwrap() == Dispatched::More {
                more += 1;
                assert!(is_readable(&queue, PollTimeout::ZERO), "there is more");
            }
            most = most.max(m.disk.calls() - before);
            reads.retain(|read| read.try_recv().is_err());
            reads.is_empty()
        });
        assert_eq!(most, 1);
        assert!(more > 0);
        end_here(m, &queue, file);
    });
}

// --- from thread to thread --------------------------------------------------

/// A thread with a loop, which can be given queues and asked to leave them.
struct LoopThread {
    orders: mpsc::Sender<(Order, mpsc::Sender<()>)>,
    wake: Arc<EventFd>,
    thread: JoinHandle<()>,
}

enum Order {
    Attach(HostQueue),
    DetachAll,
}

impl LoopThread {
    fn start() -> Self {
        let (orders, taken) = mpsc::channel::<(Order, mpsc::Sender<()>)>();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags).unwrap());
        let woken = wake.clone();
        let thread = thread::spawn(move || {
            let mut queues: Vec<HostQueue> = Vec::new();
            loop {
                let _ = woken.read();
                match taken.try_recv() {
                    Ok((Order::Attach(queue), done)) => {
                        queue.attach().unwrap();
                        queues.push(queue);
                        done.send(()).unwrap();
                    }
                    Ok((Order::DetachAll, done)) => {
                        for queue in queues.drain(..) {
                            queue.detach().unwrap();
                            let silent = !is_readable(&queue, PollTimeout::ZERO);
                            assert!(silent, "nobody runs it");
                        }
                        done.send(()).unwrap();
                    }
                    Err(mpsc::TryRecvError::Empty) => {}
                    Err(mpsc::TryRecvError::Disconnected) if queues.is_empty() => return,
                    Err(mpsc::TryRecvError::Disconnected) => {}
                }
                queues.retain(|q| q.dispatch(0).unwrap() != Dispatched::Ended);
                let mut fds = vec![PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
                let of_queues = queues.iter();
                fds.extend(of_queues.map(|q| PollFd::new(q.as_fd(), PollFlags::POLLIN)));
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => panic!("poll: {e}"),
                }
            }
        });
        Self {
            orders,
            wake,
            thread,
        }
    }

    fn tell(&self, order: Order) {
        let (done, is_done) = mpsc::channel();
        self.orders.send((order, done)).unwrap();
        self.wake.write(1).unwrap();
        is_done.recv_timeout(SOON).expect("it obeys");
    }

    /// It ends once it has no queues any more.
    fn end(self) -> JoinHandle<()> {
        drop(self.orders);
        self.wake.write(1).unwrap();
        self.thread
    }
}

fn drained(export: &Export) {
    export.drain_begin().unwrap();
    within(SOON, "the drain", || !export.drain_poll());
}

#[test]
fn queues_move_between_threads_under_load_and_nothing_is_lost() {
    for_transports_and_queues(|transport, queues| {
        move_under_load(transport, queues, None);
        // An entry for each CPU: all of them may be in hand when a thread leaves.
        move_under_load(transport, queues, Some(1));
    });
}

fn move_under_load(transport: IoUring, queues: usize, depth: Option<usize>) {
    const CLIENTS: usize = 4;
    const MOVES: usize = 60;
    let m = Mounted::with(|b| {
        let b = b.io_uring(transport).queues(queues);
        match depth {
            Some(depth) => b.queue_depth(depth),
            None => b,
        }
    });
    let mut current = LoopThread::start();
    for queue in m.queues() {
        current.tell(Order::Attach(queue));
    }
    let file = m.open();
    let over = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (file, over, rounds) = (&file, &over, &rounds);
            scope.spawn(move || {
                for round in 0.. {
                    if over.load(SeqCst) {
                        break;
                    }
                    let at = ((client * 16 + round % 16) * BLOCK) as u64;
                    let data = [(round * 5 + client) as u8; BLOCK];
                    file.write_all_at(&data, at).unwrap();
                    let mut back = [0; BLOCK];
                    file.read_exact_at(&mut back, at).unwrap();
                    assert_eq!(data, back);
                    rounds.fetch_add(1, SeqCst);
                }
            });
        }
        let _over = SetOnDrop(&over);
        for moved in 0..MOVES {
            let before = rounds.load(SeqCst);
            drained(m.export());
            current.tell(Order::DetachAll);
            // The old thread lives on, or is gone before the next begins.
            let next = LoopThread::start();
            let old = std::mem::replace(&mut current, next).end();
            if moved % 2 == 0 {
                old.join().unwrap();
            }
            let calls = m.disk.calls();
            for queue in m.queues() {
                current.tell(Order::Attach(queue));
            }
            assert_eq!(m.disk.calls(), calls, "a call in a drain");
            m.export().drain_end().unwrap();
            // Everybody gets on.
            within(SOON, "clients go on", || {
                rounds.load(SeqCst) >= before + 2 * CLIENTS
            });
        }
    });
    drop(file);
    let starts = m.disk.0.starts.lock().unwrap().len();
    assert_eq!(starts, queues * (MOVES + 1));
    m.delete();
    current.end().join().unwrap();
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn who_waits_while_no_thread_is_attached_is_served_by_the_next_one() {
    for_transports_and_queues(|transport, queues| {
        let m = Mounted::new(transport, queues);
        // From the start on, and again after a thread has left.
        for _ in 0..2 {
            let client = stat_elsewhere(&m.path);
            let thread = LoopThread::start();
            for queue in m.queues() {
                thread.tell(Order::Attach(queue));
            }
            let said = client.wait_with_output().unwrap();
            assert_eq!(
                String::from_utf8_lossy(&said.stdout).trim(),
                LENGTH.to_string()
            );
            drained(m.export());
            thread.tell(Order::DetachAll);
            m.export().drain_end().unwrap();
            thread.end().join().unwrap();
        }
        m.delete();
    });
}

// --- what is done wrong -----------------------------------------------------

#[test]
fn wrong_use_is_noticed() {
    for_transports(|transport| {
        let m = Mounted::new(transport, 2);
        let (a, b) = (m.queue(0), m.queue(1));
        assert!(m.export().queue(2).is_none());
        // Before a thread is attached, and in another one.
        assert_eq!(errno(a.dispatch(0)), libc::EINVAL);
        assert_eq!(errno(a.has_events()), libc::EINVAL);
        assert_eq!(errno(a.detach()), libc::EINVAL);
        m.disk.0.refuses_to_start.store(true, SeqCst);
        assert_eq!(errno(a.attach()), libc::EMFILE);
        m.disk.0.refuses_to_start.store(false, SeqCst);
        a.attach().unwrap();
        let other = a.clone();
        let elsewhere = thread::spawn(move || {
            assert_eq!(errno(other.attach()), libc::EBUSY);
            assert_eq!(errno(other.has_events()), libc::EPERM);
            assert_eq!(errno(other.detach()), libc::EPERM);
            let error = other.dispatch(0).unwrap_err();
            assert_eq!(error.errno(), libc::EPERM);
            error.to_string()
        });
        let said = elsewhere.join().unwrap();
        assert!(said.starts_with("queue 0: thread "), "{said}");
        assert_eq!(errno(a.attach()), libc::EBUSY);
        // Without a drain, and with something in flight.
        assert_eq!(errno(a.detach()), libc::EBUSY);
        b.attach().unwrap();
        let both = || {
            a.dispatch(0).unwrap();
            b.dispatch(0).unwrap();
        };
        let path = m.path.clone();
        let opening = thread::spawn(move || File::open(path).unwrap());
        while !opening.is_finished() {
            both();
        }
        let file = opening.join().unwrap();
        let gate = m.disk.hold();
        let read = read_block(&file, 9);
        within(SOON, "the read waits", || {
            both();
            gate.waiting() == 1
        });
        m.export().drain_begin().unwrap();
        let detached = [a.detach(), b.detach()];
        let refused = detached.iter().filter(|d| d.is_err()).count();
        assert_eq!(refused, 1, "{detached:?}");
        let (with_it, left) = match detached[0] {
            Err(_) => (&a, &b),
            Ok(()) => (&b, &a),
        };
        assert_eq!(errno(with_it.detach()), libc::EBUSY);
        gate.open();
        within(SOON, "it is answered", || {
            with_it.dispatch(0).unwrap();
            read.try_recv().is_ok()
        });
        left.attach().unwrap();
        m.export().drain_end().unwrap();
        // Within a callback of the same queue.
        let seen = Arc::new(Mutex::new(Vec::new()));
        let in_callback = {
            let (a, b, seen) = (a.clone(), b.clone(), seen.clone());
            move || {
                let mut seen = seen.lock().unwrap();
                for queue in [&a, &b] {
                    let dispatched = queue.dispatch(0).map_err(|e| e.errno());
                    let detached = queue.detach().map_err(|e| e.errno());
                    seen.push((dispatched.err(), detached.err()));
                }
            }
        };
        *m.disk.0.in_callback.lock().unwrap() = Some(Box::new(in_callback));
        let read = read_block(&file, 7);
        within(SOON, "the read", || {
            both();
            read.try_recv().is_ok()
        });
        *m.disk.0.in_callback.lock().unwrap() = None;
        let mut seen = seen.lock().unwrap().clone();
        seen.sort_unstable();
        let deadlock = Some(libc::EDEADLK);
        assert!(seen.contains(&(deadlock, deadlock)), "{seen:?}");
        assert!(seen.contains(&(None, Some(libc::EBUSY))), "{seen:?}");
        drop(file);
        let mut m = m;
        drop(m.export.take());
        within(SOON, "both end", || {
            let ended = [&a, &b].map(|q| q.dispatch(0).unwrap() == Dispatched::Ended);
            ended == [true, true]
        });
    });
}

#[test]
fn a_thread_that_ends_attached_halts_the_export_and_nobody_hangs() {
    for_transports_and_queues(|transport, queues| {
        let m = Mounted::new(transport, queues);
        let mut all = m.queues();
        let lost = all.pop().unwrap();
        let loops: Vec<_> = all
            .into_iter()
            .map(|queue| thread::spawn(move || run(&queue)))
            .collect();
        let (leave, told) = mpsc::channel::<()>();
        let index = lost.index();
        let leaving = thread::spawn(move || {
            lost.attach().unwrap();
            while told.try_recv() == Err(mpsc::TryRecvError::Empty) {
                lost.dispatch(0).unwrap();
                is_readable(&lost, PollTimeout::from(5u16));
            }
        });
        let file = m.open();
        drop(leave);
        leaving.join().unwrap();
        eventually("the export halts", || m.disk.halted().is_some());
        let (errno, message) = m.disk.halted().unwrap();
        assert_eq!(errno, libc::EOWNERDEAD);
        let expected = format!("the thread of queue {index} has ended");
        assert!(message.starts_with(&expected), "{message}");
        // Whoever asks now gets an error.
        let read = read_block(&file, 1).recv_timeout(SOON).unwrap();
        assert!(read.is_err());
        drop(file);
        m.delete();
        loops.into_iter().for_each(|t| t.join().unwrap());
    });
}

// --- ends -------------------------------------------------------------------

#[test]
fn an_export_ends_without_its_threads() {
    for_transports_and_queues(|transport, queues| {
        for left_after in [false, true] {
            let m = Mounted::new(transport, queues);
            if left_after {
                let thread = LoopThread::start();
                for queue in m.queues() {
                    thread.tell(Order::Attach(queue));
                }
                drop(m.open());
                drained(m.export());
                thread.tell(Order::DetachAll);
                m.export().drain_end().unwrap();
                thread.end().join().unwrap();
            }
            let client = start(&mut command("head -c 1 {}", &m.path));
            let waiting = m.queues();
            m.delete();
            let said = client.wait_with_output().unwrap();
            // It was served by nobody, or it came so late that it has seen the
            // file below.
            assert!(said.stdout.is_empty(), "{said:?}");
            for queue in waiting {
                assert_eq!(queue.dispatch(0).unwrap(), Dispatched::Ended);
            }
        }
    });
}

#[test]
fn a_thread_may_leave_while_the_export_ends() {
    for_transports(|transport| {
        let m = Mounted::new(transport, 1);
        let queue = m.queue(0);
        queue.attach().unwrap();
        let file = open_served(&m, &queue);
        assert_eq!(
            errno(queue.detach()),
            libc::EBUSY,
            "it has not begun to end"
        );
        let export = m.export();
        thread::scope(|scope| {
            scope.spawn(|| export.stop(Stop::Lazy).unwrap());
            within(SOON, "it ends", || export.state() == State::Ended);
            queue.detach().unwrap();
        });
        drop(file);
        m.delete();
        assert_eq!(queue.dispatch(0).unwrap(), Dispatched::Ended);
    });
}

#[test]
fn an_unmount_from_outside_ends_the_queues() {
    for_transports_and_queues(|transport, queues| {
        let m = Mounted::new(transport, queues);
        let loops = Loops::of(m.export());
        drop(m.open());
        output(&mut command("umount {}", &m.path));
        eventually("it is told", || {
            m.disk.0.events.lock().unwrap().contains(&Event::Unmounted)
        });
        loops.join();
        m.delete();
    });
}

#[test]
fn many_lives_leave_nothing_behind() {
    alone("many_lives_leave_nothing_behind", || {
        for_transports(|transport| {
            let life = || {
                let m = Mounted::new(transport, 2);
                let thread = LoopThread::start();
                for queue in m.queues() {
                    thread.tell(Order::Attach(queue));
                }
                let file = m.open();
                let mut data = [0; BLOCK];
                file.read_exact_at(&mut data, 0).unwrap();
                drop(file);
                drained(m.export());
                thread.tell(Order::DetachAll);
                let next = LoopThread::start();
                for queue in m.queues() {
                    next.tell(Order::Attach(queue));
                }
                m.export().drain_end().unwrap();
                drop(m.open());
                m.delete();
                thread.end().join().unwrap();
                next.end().join().unwrap();
            };
            life();
            let before = Belongings::now();
            let rounds = std::env::var("BLKFUSE_CYCLES").map_or(20, |n| n.parse().unwrap());
            for _ in 0..rounds {
                life();
            }
            before.are_all();
        });
    });
}

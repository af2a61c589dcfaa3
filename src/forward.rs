//! In-ring I/O: what a request wants done with another descriptor.
//!
//! A *job* is one system call's worth of it: a read into the request's
//! payload, a write out of it, a sync, a discard, a zeroing. The driver's
//! future leaves it at the queue's [`Port`] and waits; the transport takes it
//! from there, has the kernel do it (in a ring, where there is one), and brings
//! the result back. All of that happens on the queue's thread.
//!
//! **Whose memory it is.** The kernel uses a job's memory until the job is
//! done, whatever becomes of the future: a driver may drop it, or forget it.
//! So a job speaks of nothing but the payload of the request that it is for,
//! and a request is not answered before its jobs are done ([`Port::settle`]).
//! Should the queue's thread unwind, the memory stays mapped for good.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use io_uring::{opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{fdatasync, fsync};
use slab::Slab;

use crate::region::Keeper;

/// How many jobs wait at a port, at most, before they are begun: the whole of
/// a batch at once would leave a disk idle from one batch to the next.
const JOBS_AT_ONCE: usize = 4;

/// After how many writes a descriptor is asked again what they are: its owner
/// may have changed its flags, or its number be another file's.
const WRITES_UNASKED: u32 = 64;

/// What is to be done.
#[derive(Debug, Clone, Copy)]
pub(crate) enum What {
    Read { to: *mut u8, len: usize },
    Write { from: *const u8, len: usize },
    Sync { data_only: bool },
    Discard { bytes: u64 },
    WriteZeroes { bytes: u64 },
}

impl What {
    /// The mode of fallocate(2), for what it does.
    fn mode(&self) -> FallocateFlags {
        let kind = match self {
            What::Discard { .. } => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            _ => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        kind | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }
}

/// What is to be done, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    fd: RawFd,
    what: What,
    offset: u64,
}

impl Call {
    /// # Safety
    ///
    /// Until the call has been made, the descriptor must be open, and the
    /// memory that `what` speaks of be valid and be used by nobody else (for a
    /// write: changed by nobody).
    pub(crate) unsafe fn new(fd: BorrowedFd<'_>, what: What, offset: u64) -> Self {
        let fd = fd.as_raw_fd();
        Self { fd, what, offset }
    }

    /// Whether its descriptor's writes are copies into the page cache.
    fn is_cached(&self) -> bool {
        // SAFETY: the promise made to `new`: it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let flags = fcntl(fd, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
        !flags.intersects(OFlag::O_DIRECT | OFlag::O_DSYNC)
    }

    /// As an entry of a ring, not yet marked.
    pub(crate) fn entry(&self) -> squeue::Entry {
        let (fd, offset) = (types::Fd(self.fd), self.offset);
        match self.what {
            What::Read { to, len } => opcode::Read::new(fd, to, len as u32).offset(offset).build(),
            What::Write { from, len } => opcode::Write::new(fd, from, len as u32)
                .offset(offset)
                .build(),
            What::Sync { data_only } => {
                let flags = match data_only {
                    true => types::FsyncFlags::DATASYNC,
                    false => types::FsyncFlags::empty(),
                };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            What::Discard { bytes } | What::WriteZeroes { bytes } => {
                opcode::Fallocate::new(fd, bytes)
                    .offset(offset)
                    .mode(self.what.mode().bits())
                    .build()
            }
        }
    }

    /// Does it now, in this thread.
    pub(crate) fn run(&self) -> nix::Result<usize> {
        // SAFETY: the promise made to `new`: it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let offset = self.offset as i64;
        match self.what {
            What::Read { to, len } => {
                // SAFETY: as above: it is valid, and nobody else uses it.
                let to = unsafe { std::slice::from_raw_parts_mut(to, len) };
                pread(fd, to, offset)
            }
            What::Write { from, len } => {
                // SAFETY: as above: it is valid, and nobody changes it.
                let from = unsafe { std::slice::from_raw_parts(from, len) };
                pwrite(fd, from, offset)
            }
            What::Sync { data_only: true } => fdatasync(fd).map(|()| 0),
            What::Sync { data_only: false } => fsync(fd).map(|()| 0),
            What::Discard { bytes } | What::WriteZeroes { bytes } => {
                fallocate(fd, self.what.mode(), offset, bytes as i64).map(|()| 0)
            }
        }
    }
}

/// A call for the kernel to make.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    /// Its number, which no other job of the port has until it is done.
    pub(crate) id: usize,
    call: Call,
}

impl Job {
    /// As an entry of a ring, not yet marked.
    pub(crate) fn entry(&self) -> squeue::Entry {
        self.call.entry()
    }

    /// Does it now, in this thread. The result is as a completion's: what the
    /// system call returns, or a negative errno.
    pub(crate) fn run(&self) -> i32 {
        let result = self.call.run();
        // No job has more bytes than a payload.
        result.map_or_else(|errno| -(errno as i32), |n| n as i32)
    }
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// At the port.
    Waiting,
    /// With the transport: the kernel may be using its memory.
    InFlight,
    /// With this result.
    Done(i32),
}

/// A job, and who waits for it.
#[derive(Debug)]
struct Errand {
    job: Job,
    /// The task whose request it is for.
    task: usize,
    stage: Stage,
    waker: Waker,
    /// Keeps the job's memory, if it has any.
    _keeper: Option<Keeper>,
}

/// What is known of the descriptor that was written to last.
#[derive(Debug, Clone, Copy)]
struct Written {
    fd: RawFd,
    is_cached: bool,
    /// How many writes have relied on it.
    writes: u32,
}

/// One queue's jobs.
#[derive(Debug, Default)]
pub(crate) struct Port {
    written: Cell<Option<Written>>,
    errands: RefCell<Slab<Errand>>,
    /// Those that wait, in the order of their arrival.
    waiting: RefCell<VecDeque<usize>>,
    in_flight: Cell<usize>,
}

impl Port {
    /// Whether the call is a write into the page cache: a copy, which is done at
    /// once. Several file systems (ext4) have a ring employ a thread for it,
    /// which costs many times as much. To ask the descriptor each time would be
    /// a system call for each write; what is known of it may be out of date
    /// for a while, which costs nothing but time.
    pub(crate) fn is_copy(&self, call: &Call) -> bool {
        let What::Write { .. } = call.what else {
            return false;
        };
        let known = self.written.get();
        let known = known.filter(|w| w.fd == call.fd && w.writes < WRITES_UNASKED);
        let mut written = known.unwrap_or_else(|| Written {
            fd: call.fd,
            is_cached: call.is_cached(),
            writes: 0,
        });
        written.writes += 1;
        self.written.set(Some(written));
        written.is_cached
    }

    /// How many jobs wait to be begun.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Whether it is time to begin what waits: there is enough of it, or nothing
    /// else to keep the disk busy meanwhile.
    pub(crate) fn is_due(&self) -> bool {
        let waiting = self.waiting();
        waiting >= JOBS_AT_ONCE || (waiting > 0 && self.in_flight() == 0)
    }

    /// How many jobs have been taken and are not done.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// The next job; for the transport, which must report it
    /// [`done`](Self::done), once, when the kernel is.
    pub(crate) fn take(&self) -> Option<Job> {
        let id = self.waiting.borrow_mut().pop_front()?;
        self.in_flight.set(self.in_flight.get() + 1);
        let errand = &mut self.errands.borrow_mut()[id];
        errand.stage = Stage::InFlight;
        Some(errand.job)
    }

    /// A job is done, and the kernel with its memory.
    pub(crate) fn done(&self, id: usize, result: i32) {
        let waker = {
            let errand = &mut self.errands.borrow_mut()[id];
            debug_assert_eq!(errand.stage, Stage::InFlight);
            errand.stage = Stage::Done(result);
            std::mem::replace(&mut errand.waker, Waker::noop().clone())
        };
        self.in_flight.set(self.in_flight.get() - 1);
        // It may be the driver's own, and do anything.
        waker.wake();
    }

    /// Does all jobs that wait, now and in this thread.
    pub(crate) fn run(&self) {
        while let Some(job) = self.take() {
            self.done(job.id, job.run());
        }
    }

    /// Leaves a job, for the request that `task` serves, and returns what waits
    /// for its result. `unfinished` counts that request's jobs whose end nobody
    /// has seen; `fd` is the call's; `keeper` keeps the call's memory mapped.
    ///
    /// # Safety
    ///
    /// Also if what this returns is dropped or forgotten, the call's memory must
    /// be as [`Call::new`] wants it until the job is done or
    /// [`settle`](Self::settle) has made an end of it.
    pub(crate) unsafe fn leave<'a>(
        &'a self,
        task: usize,
        unfinished: &'a Cell<usize>,
        fd: BorrowedFd<'a>,
        call: Call,
        keeper: Option<Keeper>,
    ) -> Left<'a> {
        unfinished.set(unfinished.get() + 1);
        let mut errands = self.errands.borrow_mut();
        let entry = errands.vacant_entry();
        let id = entry.key();
        entry.insert(Errand {
            job: Job { id, call },
            task,
            stage: Stage::Waiting,
            waker: Waker::noop().clone(),
            _keeper: keeper,
        });
        self.waiting.borrow_mut().push_back(id);
        Left {
            port: self,
            unfinished,
            id: Some(id),
            _fd: fd,
        }
    }

    /// Makes an end of all jobs of the request that `task` serves: those that
    /// wait are not begun; ready when none is in flight. The driver is done
    /// with the request: nobody looks for their results any more.
    pub(crate) fn settle(&self, task: usize, waker: &Waker) -> Poll<()> {
        let mut in_flight = Poll::Ready(());
        self.errands.borrow_mut().retain(|_, errand| {
            let stays = errand.task != task || errand.stage == Stage::InFlight;
            if stays && errand.task == task {
                errand.waker.clone_from(waker);
                in_flight = Poll::Pending;
            }
            stays
        });
        self.forget_removed();
        in_flight
    }

    fn forget_removed(&self) {
        let errands = self.errands.borrow();
        self.waiting.borrow_mut().retain(|id| errands.contains(*id));
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if self.in_flight.get() > 0 {
            // The queue's thread unwinds, and nobody will hear when the kernel
            // is done with the jobs' memory.
            std::mem::forget(self.errands.take());
        }
    }
}

/// A job that was left at the port: waits for its result. Dropped before the
/// job has been taken, the job is not done.
#[derive(Debug)]
pub(crate) struct Left<'a> {
    port: &'a Port,
    unfinished: &'a Cell<usize>,
    /// `None`: the result has been told.
    id: Option<usize>,
    /// Is open as long as somebody waits.
    _fd: BorrowedFd<'a>,
}

impl Left<'_> {
    fn remove(&mut self, id: usize) {
        self.id = None;
        self.unfinished.set(self.unfinished.get() - 1);
        self.port.errands.borrow_mut().remove(id);
    }
}

impl Future for Left<'_> {
    type Output = Result<usize, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = self.id.expect("not polled after its end");
        let stage = {
            let errand = &mut self.port.errands.borrow_mut()[id];
            errand.waker.clone_from(cx.waker());
            errand.stage
        };
        let Stage::Done(result) = stage else {
            return Poll::Pending;
        };
        self.remove(id);
        Poll::Ready(usize::try_from(result).map_err(|_| Errno::from_raw(-result)))
    }
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else {
            return;
        };
        let stage = self.port.errands.borrow()[id].stage;
        // One in flight is left to `settle`.
        if stage != Stage::InFlight {
            self.remove(id);
            self.port.forget_removed();
        }
    }
}

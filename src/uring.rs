//! The transport over FUSE-over-io_uring: entries that wait in the kernel come
//! back with a request in their memory, and go again with its reply. Protocol:
//! the kernel's `Documentation/filesystems/fuse/fuse-io-uring.rst` and
//! `fs/fuse/dev_uring.c`.
//!
//! **Entries.** An entry belongs to one of the kernel's queues, of which there
//! is one for each possible CPU: a request goes to the queue of the CPU that
//! its client runs on, and waits there if the queue has no entry. An entry is
//! a slot, and at any moment either the kernel has it (it is in `in_kernel`)
//! or we do. Answering is the only way to give it back, and an answered entry
//! waits for its next request in the ring that it was answered through.
//!
//! **Memory.** The kernel uses an entry's memory only inside `io_uring_enter`
//! of the thread whose ring has it: it copies requests in in that thread's
//! task work, and replies out when the answer is submitted. So once a queue's
//! thread enters its ring no more, the memory may go.
//!
//! **The end.** If a ring is closed, or its thread exits, the kernel cancels
//! the entries that wait in it. If no entry is left, `fuse_uring_abort` does
//! nothing, and whoever waits for an entry waits for ever, beyond the help of
//! umount -f. Hence two rules. In an orderly end the connection is aborted
//! before any ring is closed (control.rs), and each ring's thread enters the
//! kernel once more (ring.rs). And against an end without order
//! there is the *anchor*: one entry that we keep for as long as the connection
//! lives, in that its request is never answered. It is one that we ask for,
//! and not any that nobody waits for: a RELEASE is a background request, and
//! when there are many of those the kernel holds them back until one of the
//! same queue ends, unless none is under way there. With one that never ends
//! it would hold them back for ever.
//!
//! **Another thread.** A thread of the program's own may leave its queue to
//! another one, or end, and what waits in its ring cannot be taken out of it:
//! an entry comes back only with a request. So the kernel is asked for requests
//! that nobody waits for, on each CPU as many as there are entries, which are
//! kept unanswered until the queue has its next thread, and answered through
//! that one's ring. For CPUs that are not there nothing can be asked, nor has
//! their queue clients; their entries are cancelled with the ring, and
//! registered anew.
//!
//! **/dev/fuse** goes on beside it: FORGET, INTERRUPT, and what was asked
//! before the kernel switched come by it. The first queue reads it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use slab::Slab;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::{Error, Result};
use crate::exchange::{Exchange, ReviewClock};
use crate::forward::Port;
use crate::jobring;
use crate::legacy::{self, ASKED_FOR, Legacy};
use crate::placement::{Placement, near};
use crate::plan::Plan;
use crate::protocol::{InHeader, OPERATION_SIZE, OutHeader, opcode};
use crate::region::{self, Piece};
use crate::ring::{COMMAND_BODY, Command, Completion, Ring};
use crate::seat::{self, SeatedThread};
use crate::slot::{FRONT, Reply, RingOrigin, Slot};
use crate::system::System;
use crate::transport::{Fetched, Transport, Unbound};
use crate::wakeups::Wakeups;

/// How many entries for each CPU stay in use, at least, when most are spared.
const FEW_ENTRIES: usize = 4;

/// How long an entry that was asked back may be on its way.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// `enum fuse_uring_cmd`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// `struct fuse_uring_req_header`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct EntryHeader {
    in_out: [u8; 128],
    operation: [u8; OPERATION_SIZE],
    flags: u64,
    commit_id: u64,
    payload_len: u32,
    padding: u32,
    reserved: u64,
}

/// `struct fuse_uring_cmd_req`, which lies in the ring's entry.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct CommandRequest {
    flags: u64,
    commit_id: u64,
    kernel_queue: u16,
    padding: [u8; 6],
}

/// What a completion is about: the low bits of its mark.
mod mark {
    pub(super) const BITS: u32 = 2;
    /// An entry; the rest is its key.
    pub(super) const ENTRY: u64 = 0;
    /// Somebody wakes the queue.
    pub(super) const WAKE: u64 = 1;
    /// /dev/fuse has something.
    pub(super) const DEVICE: u64 = 2;
    /// A job; the rest is its number.
    pub(super) const JOB: u64 = 3;
}

/// What the queues of one export share.
pub(crate) struct Share {
    plan: Plan,
    exchange: Exchange,
    /// The queues' threads are the program's own: they are not told where to
    /// run, and as nobody knows what else they do, they hand each other nothing.
    hosted: bool,
    /// How many queues have their entries come back.
    recalls: AtomicUsize,
    /// Few entries are in use, and what was asked for is kept.
    spares: AtomicBool,
    /// How many requests the kernel was asked for.
    asked_for: AtomicU64,
    /// A request has come through a ring: the kernel has switched, for good.
    switched: AtomicBool,
    anchor: Anchor,
}

/// The entry that is never given back while the connection lives.
#[derive(Debug)]
struct Anchor {
    /// The kernel queue that has an entry more for it.
    spared_by: usize,
    asked_for: AtomicBool,
    slot: Mutex<Option<Box<Slot>>>,
}

impl Share {
    /// `anchored_at`: the kernel queue that is to have the anchor; `hosted`: the
    /// program's own threads will run the queues.
    pub(crate) fn new(
        plan: Plan,
        anchored_at: usize,
        wakeups: &[Arc<Wakeups>],
        hosted: bool,
    ) -> Self {
        Self {
            plan,
            exchange: Exchange::new(plan.kernel_queues, wakeups),
            hosted,
            recalls: AtomicUsize::new(0),
            spares: AtomicBool::new(false),
            // The first number is the anchor's.
            asked_for: AtomicU64::new(1),
            switched: AtomicBool::new(false),
            anchor: Anchor {
                spared_by: anchored_at,
                asked_for: AtomicBool::new(false),
                slot: Mutex::new(None),
            },
        }
    }

    /// Asks the kernel, which has taken the rings for ready, for the anchor;
    /// once, since an answer to a second one would be taken for the first one's.
    pub(crate) fn drop_anchor(&self, device: BorrowedFd<'_>) {
        if self.anchor.asked_for.swap(true, Relaxed) {
            return;
        }
        let ask = || legacy::ask_for_a_request(device, ASKED_FOR);
        let asked = seat::on_cpu(self.anchor.spared_by, ask);
        if let Err(error) = asked.and_then(|asked| asked.map_err(io::Error::from)) {
            log::debug!("io_uring: no anchor: {error}");
        }
    }

    /// Asks the kernel for as many requests of each CPU as `wanted` says.
    /// Returns the CPUs where that cannot be.
    fn ask(&self, device: BorrowedFd<'_>, wanted: &[usize]) -> io::Result<Vec<usize>> {
        if wanted.iter().all(|n| *n == 0) {
            return Ok(Vec::new());
        }
        let cpus = (0..wanted.len()).filter(|cpu| wanted[*cpu] > 0);
        seat::on_each_cpu(cpus, |cpu| {
            for _ in 0..wanted[cpu] {
                // The kernel's own numbers are even, too.
                let unique = ASKED_FOR + 2 * self.asked_for.fetch_add(1, Relaxed);
                if let Err(errno) = legacy::ask_for_a_request(device, unique) {
                    log::debug!("io_uring: no request was to be had: {errno}");
                    return;
                }
            }
        })
    }

    /// Has most entries kept out of use: those that are left are soon used
    /// again. For as long as the driver answers at once; one that lets requests
    /// wait needs an entry for each.
    fn spare_entries(&self, device: BorrowedFd<'_>) {
        let few = self.exchange.queues().max(FEW_ENTRIES);
        let cpus = 0..self.plan.kernel_queues;
        let wanted: Vec<_> = cpus.map(|_| self.plan.depth.saturating_sub(few)).collect();
        self.spares.store(true, SeqCst);
        if let Err(error) = self.ask(device, &wanted) {
            log::debug!("io_uring: all entries stay in use: {error}");
        }
    }

    /// Has all entries used again.
    fn use_all_entries(&self) {
        if self.spares.load(Relaxed) && self.spares.swap(false, SeqCst) {
            self.exchange.kick();
        }
    }

    /// Whether what was asked for, and came, is not to be given back yet.
    fn keeps_recalled(&self) -> bool {
        self.recalls.load(SeqCst) > 0 || self.spares.load(SeqCst)
    }

    pub(crate) fn plan(&self) -> Plan {
        self.plan
    }

    /// Whether the kernel sends its requests through the rings.
    pub(crate) fn has_switched(&self) -> bool {
        self.switched.load(Relaxed)
    }

    /// How many entries a kernel's queue has. One has another one, for the
    /// anchor.
    fn depth(&self, kernel_queue: usize) -> usize {
        self.plan.depth + usize::from(kernel_queue == self.anchor.spared_by)
    }

    /// The kernel's queues of the entries that `queue` registers; those of one
    /// kernel queue are spread over all queues.
    fn entries_of(&self, queue: usize) -> impl Iterator<Item = u16> {
        let kernel_queues = self.plan.kernel_queues;
        // CPU 0's come last: with them the last queue becomes ready, and until
        // then the kernel does not switch.
        (0..kernel_queues).rev().flat_map(move |kernel_queue| {
            (0..self.depth(kernel_queue))
                .filter(move |n| (kernel_queue + n) % self.exchange.queues() == queue)
                .map(move |_| kernel_queue as u16)
        })
    }
}

/// How many requests a queue may have in flight: those of all entries, and what
/// comes by /dev/fuse.
pub(crate) fn slots(plan: &Plan) -> usize {
    plan.kernel_queues * plan.depth + 1 + legacy::SLOTS
}

impl Anchor {
    /// Keeps the entry that was asked for; one of one kernel queue: only there is
    /// one to spare, and those that come by another queue might have none.
    fn keep(&self, slot: Box<Slot>) -> Option<Box<Slot>> {
        let can_be_spared = slot.header.unique == ASKED_FOR
            && slot
                .ring
                .is_some_and(|ring| usize::from(ring.kernel_queue) == self.spared_by);
        let mut kept = self.slot.lock();
        if !can_be_spared || kept.is_some() {
            return Some(slot);
        }
        *kept = Some(slot);
        None
    }
}

/// Slots as they travel, and as the kernel's keys find them again.
type Slots = Vec<Box<Slot>>;

/// A ring and the memory of its entries: all that can fail before the kernel
/// is told that there will be rings.
pub(crate) struct Prepared {
    ring: Ring,
    slots: Slots,
    queue: usize,
    share: Arc<Share>,
}

impl Prepared {
    /// For the calling thread, which is to serve `queue`.
    pub(crate) fn new(share: Arc<Share>, queue: usize) -> io::Result<Self> {
        let entries: Vec<_> = share.entries_of(queue).collect();
        let memory = region::pieces(FRONT + share.plan.max_request as usize, entries.len(), true)?;
        let slot = |(memory, kernel_queue): (Piece, u16)| {
            let mut slot = Box::new(Slot::within(memory));
            slot.ring = Some(RingOrigin {
                kernel_queue,
                commit_id: 0,
            });
            slot
        };
        Ok(Self {
            // All entries of all queues may come to be answered by this one.
            ring: Ring::new(slots(&share.plan))?,
            slots: memory.into_iter().zip(entries).map(slot).collect(),
            queue,
            share,
        })
    }

    /// Registers the entries. `legacy` serves what comes by /dev/fuse. Also
    /// returns why the kernel has refused an entry, if it has: it may still
    /// use the others.
    pub(crate) fn register(
        self,
        legacy: Box<Legacy>,
        wakeups: Arc<Wakeups>,
    ) -> Result<(Uring, Option<Error>)> {
        let apart = Apart {
            legacy,
            recalled: Slots::new(),
            unregistered: Slots::new(),
            arrived: VecDeque::new(),
            in_hand: 0,
            device_is_ready: false,
            gone: false,
            queue: self.queue,
            share: self.share,
            wakeups,
        };
        let mut uring = apart.with(self.ring);
        uring.watch(mark::WAKE)?;
        uring.watch_device()?;
        let refused = uring.register(self.slots)?;
        Ok((uring, refused))
    }
}

/// What a queue has over io_uring beside a ring, and takes from one to the
/// next. Nothing is in the kernel.
struct Apart {
    legacy: Box<Legacy>,
    /// Entries that are to be answered.
    recalled: Slots,
    /// Entries that the kernel does not know any more.
    unregistered: Slots,
    /// Requests that nobody has begun to serve.
    arrived: VecDeque<Box<Slot>>,
    /// How many requests have come by entries and were not answered.
    in_hand: usize,
    device_is_ready: bool,
    gone: bool,
    queue: usize,
    share: Arc<Share>,
    wakeups: Arc<Wakeups>,
}

impl Apart {
    /// Joined to a ring of the calling thread's.
    fn with(self, ring: Ring) -> Uring {
        Uring {
            ring,
            legacy: self.legacy,
            in_kernel: Slab::new(),
            in_hand: self.in_hand,
            arrived: self.arrived,
            recalled: self.recalled,
            jobs_done: Vec::new(),
            seat: (!self.share.hosted).then(SeatedThread::new),
            placement: Placement::Wide,
            changes: 0,
            clock: ReviewClock::default(),
            queue: self.queue,
            share: self.share,
            wakeups: self.wakeups,
            device_is_ready: self.device_is_ready,
            gone: self.gone,
            ending: false,
            broken: None,
        }
    }
}

impl Unbound for Apart {
    fn bind(
        mut self: Box<Self>,
    ) -> std::result::Result<Box<dyn Transport>, (Box<dyn Unbound>, Error)> {
        let ring = Ring::new(slots(&self.share.plan))
            .and_then(|ring| ring.signal(self.wakeups.descriptor()).map(|()| ring));
        let ring = match ring {
            Ok(ring) => ring,
            Err(e) => return Err((self, failed("cannot make a ring", &e))),
        };
        let unregistered = std::mem::take(&mut self.unregistered);
        let mut uring = Box::new(self.with(ring));
        // Entries may be on their way: there is no way back from here.
        uring.broken = uring.go_on(unregistered).err();
        Ok(uring)
    }
}

/// One queue's ring.
pub(crate) struct Uring {
    // Dropped, and so closed, before the memory of its entries.
    ring: Ring,
    /// The entries that the kernel has through this ring, by their keys.
    in_kernel: Slab<Box<Slot>>,
    /// The requests that have come and were not fetched yet.
    arrived: VecDeque<Box<Slot>>,
    /// Entries that were asked back, to be answered when all have come.
    recalled: Slots,
    /// The jobs that are done, with their results, and were not reported yet.
    jobs_done: Vec<(usize, i32)>,
    legacy: Box<Legacy>,
    queue: usize,
    share: Arc<Share>,
    /// The arrangement as this queue knows it, and how often it had changed.
    placement: Placement,
    changes: u64,
    clock: ReviewClock,
    /// `None`: the thread is the program's own.
    seat: Option<SeatedThread>,
    /// How many requests have come by entries and were not answered.
    in_hand: usize,
    wakeups: Arc<Wakeups>,
    device_is_ready: bool,
    /// The connection has ended.
    gone: bool,
    /// Nobody may leave entries here any more.
    ending: bool,
    /// Why it cannot go on, to be told.
    broken: Option<Error>,
}

impl Uring {
    /// Registers entries; why one was refused, if one was.
    fn register(&mut self, mut slots: Slots) -> Result<Option<Error>> {
        let areas: Vec<_> = slots.iter_mut().map(|slot| areas(slot)).collect();
        for (slot, areas) in slots.into_iter().zip(&areas) {
            let key = self.in_kernel.insert(slot);
            self.push(REGISTER, key, areas.as_ptr() as u64, areas.len() as u32)?;
        }
        // The kernel has read the areas after this.
        self.ring.submit().map_err(|e| failed("submit", &e))?;
        let mut refused = None;
        while let Some(completion) = self.ring.next() {
            refused = refused.or(self.completed(completion).err());
        }
        if self.gone {
            return Err(Error::new(libc::ENOTCONN, "the connection has ended"));
        }
        Ok(refused)
    }

    /// Goes on in a new ring, and with entries that are to be registered.
    fn go_on(&mut self, unregistered: Slots) -> Result<()> {
        if self.gone {
            return Ok(());
        }
        if !self.device_is_ready {
            self.watch_device()?;
        }
        let anew = unregistered.iter().filter_map(|slot| slot.ring);
        let mut wanted = vec![0; self.share.plan.kernel_queues];
        anew.for_each(|ring| wanted[usize::from(ring.kernel_queue)] = 1);
        if let Some(refused) = self.register(unregistered)? {
            return Err(refused);
        }
        // A CPU that was not there and is now may have clients that wait, and a
        // new entry is not given what waits: only one that is answered is.
        let asked = self.share.ask(self.legacy.device(), &wanted);
        asked.map_err(|e| failed("cannot ask for a request", &e))?;
        self.answer_recalled()?;
        self.flush()
    }

    /// One is enough for what little still comes by /dev/fuse.
    fn watch_device(&mut self) -> Result<()> {
        if self.queue == 0 {
            self.watch(mark::DEVICE)?;
        }
        Ok(())
    }

    fn watch(&mut self, what: u64) -> Result<()> {
        let watched = match what {
            mark::WAKE => self
                .ring
                .push_poll(self.wakeups.descriptor().as_raw_fd(), true, what),
            _ => self
                .ring
                .push_poll(self.legacy.device().as_raw_fd(), false, what),
        };
        watched.map_err(|e| failed("cannot watch a descriptor", &e))
    }

    /// Queues a command about the entry `key`, which the kernel then has.
    fn push(&mut self, code: u32, key: usize, addr: u64, len: u32) -> Result<()> {
        let ring = self.in_kernel[key].ring.expect("an entry is a ring's slot");
        let request = CommandRequest {
            flags: 0,
            commit_id: ring.commit_id,
            kernel_queue: ring.kernel_queue,
            padding: [0; 6],
        };
        let mut body = [0; COMMAND_BODY];
        body[..size_of::<CommandRequest>()].copy_from_slice(request.as_bytes());
        let command = Command {
            file: self.legacy.device(),
            code,
            addr,
            len,
            body,
        };
        let mark = (key as u64) << mark::BITS | mark::ENTRY;
        // SAFETY: the memory that was registered for the entry is that of the
        // slot in `in_kernel`, which nobody touches until the completion takes
        // it out, or until the ring has been dropped. What `addr` points to is
        // only read when the command is submitted, and `register` keeps it
        // until then. The device is open as long as `legacy` is.
        unsafe { self.ring.push_command(&command, mark) }.map_err(|e| failed("submit", &e))
    }

    /// Looks at everything that has arrived; makes no system call, unless
    /// something is amiss.
    fn reap(&mut self) -> Result<()> {
        self.reaps().map(drop)
    }

    /// As [`reap`](Self::reap); whether anything had arrived.
    fn reaps(&mut self) -> Result<bool> {
        let mut some = false;
        while let Some(completion) = self.ring.next() {
            some = true;
            self.completed(completion)?;
        }
        Ok(some)
    }

    fn completed(&mut self, completion: Completion) -> Result<()> {
        let number = (completion.mark >> mark::BITS) as usize;
        match completion.mark & ((1 << mark::BITS) - 1) {
            mark::WAKE if !completion.more => self.watch(mark::WAKE),
            mark::WAKE => Ok(()),
            mark::DEVICE => {
                self.device_is_ready = true;
                Ok(())
            }
            mark::JOB => {
                self.jobs_done.push((number, completion.result));
                Ok(())
            }
            _ => self.entry_completed(number, completion.result),
        }
    }

    fn entry_completed(&mut self, key: usize, result: i32) -> Result<()> {
        match -result {
            0 => {
                let mut slot = self.in_kernel.remove(key);
                self.share.note_switch();
                if !receive(&mut slot) {
                    self.distrusted(slot);
                    return Err(Error::new(libc::EPROTO, "a FUSE entry makes no sense"));
                }
                if slot.header.opcode == opcode::NOTIFY_REPLY {
                    return self.asked_for(slot);
                }
                self.arrived.push_back(slot);
                self.in_hand += 1;
                Ok(())
            }
            // The kernel did not look at it.
            libc::EAGAIN | libc::EINTR if self.is_answer(key) => {
                self.push(COMMIT_AND_FETCH, key, 0, 0)
            }
            errno => {
                self.in_kernel.remove(key);
                let ended = matches!(errno, libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED);
                // An answer to a request that the connection's end has ended.
                if ended || (errno == libc::ENOENT && self.legacy.has_ended()) {
                    self.gone = true;
                    return Ok(());
                }
                let error = io::Error::from_raw_os_error(errno);
                Err(failed("the kernel refused an entry", &error))
            }
        }
    }

    /// Whether the kernel was told an answer with the entry, not registered it.
    fn is_answer(&self, key: usize) -> bool {
        self.in_kernel[key].ring.is_some_and(|r| r.commit_id != 0)
    }

    /// A request that was asked for has come.
    fn asked_for(&mut self, slot: Box<Slot>) -> Result<()> {
        let Some(slot) = self.share.anchor.keep(slot) else {
            return Ok(());
        };
        self.recalled.push(slot);
        self.answer_recalled()
    }

    /// Gives back what was asked for, unless somebody still asks (then it would
    /// come in the place of another one), or it is to be kept.
    fn answer_recalled(&mut self) -> Result<()> {
        if self.recalled.is_empty() || self.share.keeps_recalled() {
            return Ok(());
        }
        for mut slot in std::mem::take(&mut self.recalled) {
            slot.reply = Reply::Payload(0);
            self.answer(slot)?;
        }
        Ok(())
    }

    /// Has the entries that wait in this ring come back, but for those of CPUs
    /// that are not there.
    fn have_all_back(&mut self) -> Result<()> {
        self.settle()?;
        self.reap()?;
        // Those of other rings may come first: then all are asked for.
        for all in [false, true] {
            let mut wanted = self.waiting_by_cpu();
            if all {
                for (cpu, n) in wanted.iter_mut().enumerate().filter(|(_, n)| **n > 0) {
                    *n = self.share.depth(cpu);
                }
            }
            let asked = self.share.ask(self.legacy.device(), &wanted);
            let closed = asked.map_err(|e| failed("cannot ask entries back", &e))?;
            if let Some(cpu) = first_online(&closed)? {
                let text = format!(
                    "io_uring: this thread may not run on CPU {cpu}, which it must to leave; \
                     let its cpuset have all CPUs"
                );
                return Err(Error::new(libc::EPERM, text));
            }
            // An entry may still be on its way, in a thread that lost its CPU.
            let end = Instant::now() + ON_THE_WAY;
            loop {
                self.settle()?;
                self.reap()?;
                let waiting = self.waiting_by_cpu().into_iter().enumerate();
                let mut open = waiting.filter(|(cpu, n)| *n > 0 && !closed.contains(cpu));
                self.gone |= self.legacy.has_ended();
                if self.gone || open.next().is_none() {
                    return Ok(());
                }
                if Instant::now() > end || !all {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
        let text = "io_uring: the entries of a thread that leaves do not come back";
        Err(Error::new(libc::EIO, text))
    }

    /// How many entries of each CPU wait in this ring.
    fn waiting_by_cpu(&self) -> Vec<usize> {
        let mut waiting = vec![0; self.share.plan.kernel_queues];
        for ring in self.in_kernel.iter().filter_map(|(_, slot)| slot.ring) {
            waiting[usize::from(ring.kernel_queue)] += 1;
        }
        waiting
    }

    fn settle(&mut self) -> Result<()> {
        self.ring.settle().map_err(|e| failed("submit", &e))
    }

    /// Answers what makes no sense, so that nobody waits for it.
    fn distrusted(&mut self, mut slot: Box<Slot>) {
        slot.reply = Reply::Error(libc::EIO);
        if let Err(error) = self.answer(slot) {
            log::debug!("{error}");
        }
    }

    /// Counts an answer, and now and then looks at the traffic.
    fn count(&mut self, slot: &Slot) {
        if self.share.hosted {
            return;
        }
        let Some(ring) = slot.ring else { return };
        let bytes = slot.payload_len() + slot.reply.payload_len();
        let exchange = &self.share.exchange;
        exchange.count(self.queue, self.in_hand, ring.kernel_queue.into(), bytes);
        if self.clock.tick() {
            match exchange.review() {
                None => {}
                Some(Placement::Large) => self.share.spare_entries(self.legacy.device()),
                Some(_) => self.share.use_all_entries(),
            }
        }
    }

    /// Others may leave entries here until the next dispatch.
    fn rest(&self) {
        if !self.ending && !self.share.hosted {
            self.share.exchange.open_door(self.queue);
        }
        // It cannot do more, and has not answered.
        if self.in_hand > 0 {
            self.share.use_all_entries();
        }
    }

    /// Follows the others to a new arrangement.
    fn rearrange(&mut self) {
        let changes = self.share.exchange.changes();
        let Some(seat) = self.seat.as_mut().filter(|_| changes != self.changes) else {
            return;
        };
        self.changes = changes;
        self.placement = self.share.exchange.placement();
        let cpus = self.share.plan.kernel_queues;
        let queues = self.share.exchange.queues();
        let clients = |cpu: usize| near(cpu, cpus, queues) == self.queue;
        seat.take(self.placement.seat(self.queue), clients);
    }

    /// Puts the reply where the kernel looks for it, and queues its command.
    fn answer(&mut self, mut slot: Box<Slot>) -> Result<()> {
        let (errno, len) = match slot.reply {
            Reply::Error(errno) => (errno, 0),
            reply => (0, reply.payload_len()),
        };
        let out = OutHeader::new(slot.header.unique, -errno, len);
        let front = slot.front_mut();
        front[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        let at = std::mem::offset_of!(EntryHeader, payload_len);
        front[at..at + 4].copy_from_slice((len as u32).as_bytes());
        let key = self.in_kernel.insert(slot);
        self.push(COMMIT_AND_FETCH, key, 0, 0)
    }
}

impl Share {
    fn note_switch(&self) {
        if !self.switched.load(Relaxed) {
            self.switched.store(true, Relaxed);
        }
    }
}

/// Takes apart what the kernel has put into an entry's memory. False if that
/// cannot be.
fn receive(slot: &mut Slot) -> bool {
    let front = &slot.front_mut()[..size_of::<EntryHeader>()];
    let Ok(entry) = EntryHeader::read_from_bytes(front) else {
        return false;
    };
    let Ok((header, _)) = InHeader::read_from_prefix(&entry.in_out) else {
        return false;
    };
    slot.header = header;
    slot.operation = entry.operation;
    if let Some(ring) = &mut slot.ring {
        ring.commit_id = entry.commit_id;
    }
    let len = entry.payload_len as usize;
    if len > slot.capacity() {
        return false;
    }
    slot.arrived(len, len);
    true
}

/// An entry's memory, as the kernel is told of it.
fn areas(slot: &mut Slot) -> [libc::iovec; 2] {
    let area = |bytes: &mut [u8]| libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let header = area(&mut slot.front_mut()[..size_of::<EntryHeader>()]);
    [header, area(slot.payload_mut())]
}

/// The first of these CPUs that is there.
fn first_online(cpus: &[usize]) -> Result<Option<usize>> {
    if cpus.is_empty() {
        return Ok(None);
    }
    let online = System::new().online_cpus();
    let online = online.map_err(|e| Error::from_io("cannot list the CPUs", &e))?;
    Ok(cpus.iter().copied().find(|cpu| online.contains(cpu)))
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::from_io(format_args!("io_uring: {what}"), error)
}

/// Has the kernel give up a ring that it was promised and that does not become
/// ready: after a registration that it must refuse, it stays with /dev/fuse.
pub(crate) fn give_up(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut ring = Ring::new(1)?;
    let command = Command {
        file: device,
        code: REGISTER,
        addr: 0,
        // There must be two areas.
        len: 0,
        body: [0; COMMAND_BODY],
    };
    // SAFETY: the command speaks of no memory, and the device is borrowed
    // until the kernel has been entered.
    unsafe { ring.push_command(&command, 0) }?;
    ring.submit()?;
    match ring.next() {
        Some(refused) if refused.result < 0 => Ok(()),
        _ => Err(io::Error::other("the kernel did not refuse it")),
    }
}

impl Transport for Uring {
    fn slots(&self) -> usize {
        slots(&self.share.plan)
    }

    fn begin(&mut self) -> Result<()> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let left = self.share.exchange.close_door(self.queue);
        if !left.is_empty() {
            for slot in left {
                self.answer(slot)?;
            }
            self.flush()?;
        }
        self.answer_recalled()?;
        self.rearrange();
        Ok(())
    }

    fn end(&mut self) {
        // The door is closed since the dispatch began. Whoever has found it open
        // before has kept this queue, and with it the connection, from ending.
        self.ending = true;
    }

    fn fetch(&mut self) -> Fetched {
        if let Some(slot) = self.arrived.pop_front() {
            return Fetched::Request(slot);
        }
        if let Err(error) = self.reap() {
            return Fetched::Broken(error);
        }
        if let Some(slot) = self.arrived.pop_front() {
            return Fetched::Request(slot);
        }
        if self.device_is_ready {
            match self.legacy.fetch() {
                Fetched::Nothing => {
                    self.device_is_ready = false;
                    if let Err(error) = self.watch(mark::DEVICE) {
                        return Fetched::Broken(error);
                    }
                }
                other => return other,
            }
        }
        if self.gone {
            Fetched::Gone
        } else {
            Fetched::Nothing
        }
    }

    fn commit(&mut self, slot: Box<Slot>) -> Result<()> {
        if slot.ring.is_none() {
            return self.legacy.commit(slot);
        }
        if self.gone {
            return Ok(());
        }
        self.count(&slot);
        let in_hand = self.in_hand;
        self.in_hand -= 1;
        if self.share.hosted {
            return self.answer(slot);
        }
        let exchange = &self.share.exchange;
        match exchange.hand_over(slot, self.queue, in_hand, self.placement) {
            Some(slot) => self.answer(slot),
            None => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        if self.ring.is_unsubmitted() {
            self.ring.submit().map_err(|e| failed("submit", &e))?;
        }
        Ok(())
    }

    fn may_poll(&self) -> bool {
        let has_choice = self.seat.as_ref().is_some_and(SeatedThread::has_choice);
        has_choice && self.placement.may_poll(self.queue)
    }

    fn is_ready(&mut self) -> Result<bool> {
        self.rest();
        self.is_overslept(true)
    }

    fn has_news(&mut self, wanted: bool) -> bool {
        (wanted && !self.arrived.is_empty()) || self.ring.has_news()
    }

    fn is_overslept(&mut self, wanted: bool) -> Result<bool> {
        self.answer_recalled()?;
        // What has come may be answered at once, and that may bring more.
        while self.ring.is_unsubmitted() || self.ring.has_news() {
            self.settle()?;
            if !self.reaps()? && !self.ring.is_unsubmitted() {
                break;
            }
        }
        let has_request = !self.arrived.is_empty() || self.device_is_ready || self.gone;
        Ok(!self.jobs_done.is_empty() || (wanted && has_request))
    }

    fn carry(&mut self, port: &Port) -> Result<()> {
        self.reap()?;
        for (job, result) in self.jobs_done.drain(..) {
            port.done(job, result);
        }
        jobring::begin(&mut self.ring, port, |job| {
            (job as u64) << mark::BITS | mark::JOB
        });
        self.flush()
    }

    fn want_requests(&mut self, _: bool) -> Result<()> {
        // Those that come while they are not wanted are kept in `arrived`, and
        // an entry comes only once. /dev/fuse is not watched while it is ready.
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        if !self.jobs_done.is_empty() {
            return self.flush();
        }
        self.rest();
        self.ring.wait().map_err(|e| failed("wait", &e))?;
        self.reap()
    }

    fn recall(&mut self) -> Result<()> {
        self.share.recalls.fetch_add(1, SeqCst);
        let recalled = self.have_all_back();
        self.share.recalls.fetch_sub(1, SeqCst);
        // Others may have been given some meanwhile.
        self.share.exchange.kick();
        if recalled.is_err() {
            self.answer_recalled()?;
            self.flush()?;
        }
        recalled
    }

    fn unbind(self: Box<Self>) -> Box<dyn Unbound> {
        let Uring {
            ring,
            in_kernel,
            arrived,
            recalled,
            in_hand,
            legacy,
            queue,
            share,
            wakeups,
            device_is_ready,
            gone,
            ..
        } = *self;
        ring.signal_nobody();
        // The kernel uses memory of this ring's entries no more after that.
        drop(ring);
        let unregistered = in_kernel.into_iter().map(|(_, mut slot)| {
            slot.ring = slot.ring.map(|ring| RingOrigin {
                commit_id: 0,
                ..ring
            });
            slot
        });
        let apart = Apart {
            legacy: legacy.unbound(),
            recalled,
            unregistered: unregistered.collect(),
            arrived,
            in_hand,
            device_is_ready,
            gone,
            queue,
            share,
            wakeups,
        };
        Box::new(apart)
    }

    fn fall_back(self: Box<Self>) -> Box<dyn Transport> {
        self.legacy
    }
}

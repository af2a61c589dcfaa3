//! The queue: the unit of concurrency.
//!
//! It owns a transport and a task for each request that it can have in flight,
//! and one thread at a time runs it. [`Queue::dispatch`] is all the work there is; a
//! thread of the library's own repeats it and sleeps in between.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::{Control, Phase, Unfinished};
use crate::error::Error;
use crate::forward::Port;
use crate::polling::Polling;
use crate::slot::{Reply, Slot};
use crate::task::{Answered, Tasks};
use crate::transport::{Fetched, Transport, Unbound};
use crate::wakeups::Wakeups;

/// How many requests are begun before the queue looks around again.
pub(crate) const BUDGET: usize = 64;

/// Answers do not wait for others of their batch that take longer than this,
/// all told.
const LONG: Duration = Duration::from_micros(50);

/// How far a dispatch got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There may be more to do at once.
    More,
    /// Nothing can be done before something happens.
    Idle,
    /// The queue has ended: nothing is in flight, nothing will come.
    Finished,
}

/// One queue.
pub(crate) struct Queue<T> {
    index: usize,
    control: Arc<Control>,
    wakeups: Arc<Wakeups>,
    transport: T,
    tasks: Tasks,
    port: Rc<Port>,
    /// Requests that arrived in a drain, to be served after it.
    parked: VecDeque<Box<Slot>>,
    in_flight: usize,
    wants_requests: bool,
    in_batch: bool,
    /// Whether the driver is told of batches: it knows of this thread.
    tells_batches: bool,
    /// The connection has ended or the transport is broken.
    ended: bool,
    polling: Polling,
    /// The descriptor shows that there is more to do, until it is cleared.
    is_shown: bool,
    /// How long the driver has worked since answers were sent.
    unsent_for: Duration,
    /// As long as this queue may have requests in flight.
    unfinished: Option<Unfinished>,
}

impl Queue<Box<dyn Transport>> {
    /// Goes on with what its transport falls back to.
    pub(crate) fn fall_back(self) -> Self {
        let transport = Box::new(self.transport).fall_back();
        let mut queue = Self { transport, ..self };
        queue.announce_wants();
        queue
    }
}

/// A queue that no thread runs. It has nothing in flight.
pub(crate) struct DetachedQueue {
    index: usize,
    control: Arc<Control>,
    wakeups: Arc<Wakeups>,
    transport: Box<dyn Unbound>,
    parked: VecDeque<Box<Slot>>,
    ended: bool,
    unfinished: Option<Unfinished>,
}

impl Queue<Box<dyn Transport>> {
    /// Prepares to [`detach`](Self::detach); if that cannot be, it goes on.
    pub(crate) fn recall(&mut self) -> Result<(), Error> {
        self.transport.recall()
    }

    /// Leaves the thread; without anything in flight, for futures belong to
    /// their thread, and right after [`recall`](Self::recall).
    pub(crate) fn detach(mut self) -> DetachedQueue {
        debug_assert!(self.is_at_rest(), "a request is in flight");
        // Nobody wakes it, so that its descriptor does not keep anybody awake.
        self.wakeups.awake();
        if let Err(error) = self.transport.want_requests(false) {
            self.broken(error);
        }
        let transport = Box::new(self.transport).unbind();
        self.wakeups.clear();
        DetachedQueue {
            index: self.index,
            control: self.control,
            wakeups: self.wakeups,
            transport,
            parked: self.parked,
            ended: self.ended,
            unfinished: self.unfinished,
        }
    }

    /// Its thread cannot go on: ends the connection, and whatever is in flight
    /// stays where it is for good.
    pub(crate) fn forsake(mut self) {
        self.control.abort();
        drop(self.unfinished.take());
        // Futures belong to their thread, and the kernel may use the memory of
        // what is in flight.
        std::mem::forget(self);
    }
}

impl DetachedQueue {
    /// Goes on in the calling thread, which is not to call [`Queue::wait`]. Its
    /// descriptor is readable. Can be tried again if it fails.
    pub(crate) fn attach(
        self,
        tasks: Tasks,
        port: Rc<Port>,
    ) -> Result<Queue<Box<dyn Transport>>, (Self, Error)> {
        let transport = match self.transport.bind() {
            Ok(transport) => transport,
            Err((transport, error)) => return Err((Self { transport, ..self }, error)),
        };
        let mut queue = Queue {
            parked: self.parked,
            ended: self.ended,
            unfinished: self.unfinished,
            ..Queue::idle(
                self.index,
                self.control,
                self.wakeups,
                transport,
                tasks,
                port,
            )
        };
        queue.announce_wants();
        queue.wakeups.rouse();
        Ok(queue)
    }
}

impl<T: Transport> Queue<T> {
    /// `tasks`: as many as the transport has slots; they leave their jobs at
    /// `port`.
    pub(crate) fn new(
        index: usize,
        control: Arc<Control>,
        wakeups: Arc<Wakeups>,
        transport: T,
        tasks: Tasks,
        port: Rc<Port>,
    ) -> Self {
        let mut queue = Self {
            unfinished: Some(Unfinished::new(&control)),
            ..Self::idle(index, control, wakeups, transport, tasks, port)
        };
        queue.announce_wants();
        queue
    }

    /// For a thread that the driver has not been told of: no queue_start came,
    /// so nothing else of a queue's may.
    pub(crate) fn unannounced(self) -> Self {
        Self {
            tells_batches: false,
            ..self
        }
    }

    /// One that nobody knows of.
    fn idle(
        index: usize,
        control: Arc<Control>,
        wakeups: Arc<Wakeups>,
        transport: T,
        tasks: Tasks,
        port: Rc<Port>,
    ) -> Self {
        Self {
            index,
            control,
            wakeups,
            transport,
            tasks,
            port,
            parked: VecDeque::new(),
            in_flight: 0,
            wants_requests: true,
            in_batch: false,
            tells_batches: true,
            ended: false,
            polling: Polling::default(),
            is_shown: false,
            unsent_for: Duration::ZERO,
            unfinished: None,
        }
    }

    /// Runs what can run and begins at most `budget` requests. Never blocks,
    /// unless the driver does.
    pub(crate) fn dispatch(&mut self, budget: usize) -> Progress {
        let control = self.control.clone();
        let _marked = control.dispatching();
        if let Err(error) = self.transport.begin() {
            self.broken(error);
        }
        self.unsent_for = Duration::ZERO;
        let progress = self.run(budget);
        if self.in_batch {
            self.in_batch = false;
            if self.tells_batches {
                self.control.hook(|h| h.batch_end(self.index));
            }
            self.leave();
        }
        // Whoever is idle waits next, which sends as well.
        if progress != Progress::Idle {
            self.flush();
        }
        progress
    }

    fn flush(&mut self) {
        if let Err(error) = self.transport.flush() {
            self.broken(error);
        }
    }

    fn run(&mut self, budget: usize) -> Progress {
        let wakeups = self.wakeups.clone();
        if self.port.in_flight() > 0 {
            self.carry();
        }
        wakeups.take(|task| self.resume(task));
        if self.is_ending() {
            return self.finish();
        }
        let mut begun = 0;
        // The last request may have halted the export.
        while begun < budget && !self.is_ending() {
            // Who got at once what it waits for does not wait for the rest of
            // the batch.
            if wakeups.is_needed() {
                wakeups.take(|task| self.resume(task));
            }
            let slot = match self.parked.pop_front() {
                Some(slot) => slot,
                None => match self.fetch() {
                    Some(slot) => slot,
                    None => break,
                },
            };
            if !self.begin(slot) {
                break;
            }
            begun += 1;
        }
        if self.is_ending() {
            return self.finish();
        }
        self.carry_rest();
        self.listen();
        if begun == budget || wakeups.is_needed() {
            Progress::More
        } else {
            Progress::Idle
        }
    }

    /// As [`dispatch`](Self::dispatch), for a thread that sleeps until the
    /// queue's descriptor is readable, and not in [`wait`](Self::wait). While
    /// there is [`More`](Progress::More) to do it is.
    pub(crate) fn dispatch_between_sleeps(&mut self, budget: usize) -> Progress {
        self.wakeups.awake();
        let progress = match self.dispatch(budget) {
            Progress::Idle if !self.may_sleep() => Progress::More,
            progress => progress,
        };
        if progress == Progress::More && !self.is_shown {
            self.is_shown = true;
            self.wakeups.show();
        }
        progress
    }

    /// Has the descriptor tell from now on that there is something to do; false
    /// if there is already.
    fn may_sleep(&mut self) -> bool {
        self.flush();
        // What comes after this makes it readable again; what came before is
        // found by the looks that follow.
        self.wakeups.clear();
        self.is_shown = false;
        if !self.wakeups.fall_asleep() {
            return false;
        }
        let overslept = self.transport.is_overslept(self.wants_requests);
        let may_sleep = match overslept {
            Ok(overslept) => !overslept,
            Err(error) => {
                self.broken(error);
                false
            }
        };
        if !may_sleep {
            self.wakeups.awake();
        }
        may_sleep
    }

    /// Whether there may be something to do; makes no system call, and may not
    /// know of everything.
    pub(crate) fn has_news(&mut self) -> bool {
        self.wakeups.is_needed() || self.transport.has_news(self.wants_requests)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.in_flight == 0 && self.port.in_flight() == 0
    }

    /// Waits until there is something to dispatch; awake, as long as that pays.
    pub(crate) fn wait(&mut self) {
        let since = Instant::now();
        if !self.poll(since) {
            self.sleep();
        }
        self.polling.waited(since.elapsed());
    }

    /// Waits awake; whether there is something to do. Not while requests are
    /// not wanted: one that waits would keep it awake.
    fn poll(&mut self, since: Instant) -> bool {
        if !self.wants_requests || !self.polling.is_worth_it() || !self.transport.may_poll() {
            return false;
        }
        self.flush();
        let (transport, wakeups) = (&mut self.transport, &self.wakeups);
        let mut broken = None;
        let found = self.polling.look(since, || {
            wakeups.is_needed()
                || transport.is_ready().unwrap_or_else(|error| {
                    broken = Some(error);
                    true
                })
        });
        if let Some(error) = broken {
            self.broken(error);
        }
        found
    }

    fn sleep(&mut self) {
        if !self.wakeups.fall_asleep() {
            self.flush();
            return;
        }
        let result = self.transport.wait();
        self.wakeups.awake();
        if let Err(error) = result {
            self.broken(error);
        }
    }

    fn fetch(&mut self) -> Option<Box<Slot>> {
        match self.transport.fetch() {
            Fetched::Request(slot) => return Some(slot),
            Fetched::Nothing => {}
            Fetched::Gone => {
                self.ended = true;
                self.control.disconnected();
            }
            Fetched::Broken(error) => self.broken(error),
        }
        None
    }

    /// Begins a request, or keeps it if there is a drain; false: no more now.
    fn begin(&mut self, slot: Box<Slot>) -> bool {
        // The end may have come between the look for it and the fetch.
        if self.is_ending() {
            self.refuse(slot);
            return true;
        }
        if let Err(closed) = self.control.requests.try_enter(self.index) {
            if closed.emptied {
                self.control.hook(|h| h.idle());
            }
            if self.control.phase() >= Phase::Stopping {
                self.refuse(slot);
                return true;
            }
            self.parked.push_front(slot);
            return false;
        }
        if !self.in_batch {
            self.in_batch = true;
            // Until the batch's end has been told the queue is not idle.
            self.control.requests.enter_again(self.index);
            if self.tells_batches {
                self.control.hook(|h| h.batch_begin(self.index));
            }
        }
        self.in_flight += 1;
        let answered = self.tasks.start(slot);
        let took = answered.as_ref().map_or(Duration::ZERO, |a| a.took);
        self.answer(answered);
        self.unsent_for += took;
        if self.unsent_for >= LONG {
            self.unsent_for = Duration::ZERO;
            self.flush();
        }
        true
    }

    /// Goes on with a request whose future was woken.
    fn resume(&mut self, task: usize) {
        let answered = self.tasks.resume(task);
        self.answer(answered);
    }

    fn answer(&mut self, answered: Option<Answered>) {
        if self.port.is_due() {
            self.carry();
        }
        let Some(Answered { slot, panic, .. }) = answered else {
            return;
        };
        self.commit(slot);
        self.in_flight -= 1;
        self.leave();
        if let Some(message) = panic {
            self.control.panicked(&message);
        }
    }

    /// Has the jobs carried out that still wait.
    fn carry_rest(&mut self) {
        if self.port.waiting() > 0 {
            self.carry();
        }
    }

    fn carry(&mut self) {
        if let Err(error) = self.transport.carry(&self.port) {
            self.broken(error);
        }
    }

    fn leave(&self) {
        if self.control.requests.leave(self.index) {
            self.control.hook(|h| h.idle());
        }
    }

    fn commit(&mut self, slot: Box<Slot>) {
        if let Err(error) = self.transport.commit(slot) {
            self.broken(error);
        }
    }

    /// Answers a request that will not be served any more.
    fn refuse(&mut self, mut slot: Box<Slot>) {
        slot.reply = Reply::Error(libc::ENOTCONN);
        self.commit(slot);
    }

    pub(crate) fn broken(&mut self, error: Error) {
        self.ended = true;
        self.control.halt(error);
    }

    #[cfg(any(test, feature = "bench"))]
    pub(crate) fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    fn is_ending(&self) -> bool {
        self.ended || self.control.phase() == Phase::Closed
    }

    /// Begins no more requests, and ends once none is in flight in any queue:
    /// the kernel has nobody else for the requests that it gives this one.
    /// Until then those that arrive are refused: nobody waits for another's
    /// request.
    fn finish(&mut self) -> Progress {
        while let Some(slot) = self.parked.pop_front() {
            self.refuse(slot);
        }
        if self.in_flight == 0 && self.unfinished.is_some() {
            // The last answers leave before the connection ends.
            self.transport.end();
            self.flush();
            self.unfinished = None;
        }
        if self.control.all_finished() {
            return Progress::Finished;
        }
        let mut refused = 0;
        while refused < BUDGET
            && !self.ended
            && let Some(slot) = self.fetch()
        {
            self.refuse(slot);
            refused += 1;
        }
        self.carry_rest();
        self.listen();
        if refused == BUDGET || self.wakeups.is_needed() {
            Progress::More
        } else {
            Progress::Idle
        }
    }

    /// Has the transport wake the queue for requests only if they can be
    /// served, so that a waiting request does not keep it awake.
    fn listen(&mut self) {
        let has_room = self.in_flight < self.transport.slots();
        let wanted = !self.ended && has_room && self.parked.is_empty();
        if wanted != self.wants_requests {
            self.wants_requests = wanted;
            if !has_room {
                // The wake-up for a request that this queue cannot take may
                // have come to it alone.
                self.control.kick();
            }
            self.announce_wants();
        }
    }

    fn announce_wants(&mut self) {
        if let Err(error) = self.transport.want_requests(self.wants_requests) {
            self.broken(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::driver::Event;
    use crate::protocol::opcode;
    use crate::rig::{Disk, Rig, SLOTS};

    const PLACE: usize = 16;

    /// A disk whose every place holds its own number.
    fn numbered(places: usize) -> Disk {
        Disk::new((0..places * PLACE).map(|n| (n / PLACE) as u8).collect())
    }

    fn read_place(rig: &mut Rig, place: usize) -> u64 {
        rig.send_read((place * PLACE) as u64, PLACE)
    }

    #[test]
    fn requests_wait_for_the_end_of_a_drain() {
        let mut rig = Rig::new(numbered(8), false);
        rig.control.requests.close();
        rig.control.requests.close();
        let sent: Vec<_> = (0..6).map(|n| read_place(&mut rig, n)).collect();
        assert_eq!(rig.run(), Progress::Idle);
        assert!(rig.answers().is_empty());
        assert!(rig.disk.log.lock().is_empty());
        assert!(!rig.queue.transport().wanted, "it would not sleep");
        assert_eq!(rig.control.requests.open(), Some(false));
        assert_eq!(rig.run(), Progress::Idle);
        assert!(rig.answers().is_empty());
        assert_eq!(rig.control.requests.open(), Some(true));
        rig.control.kick();
        assert_eq!(rig.run(), Progress::Idle);
        let answers: Vec<_> = rig.answers().iter().map(|a| a.unique).collect();
        assert_eq!(answers, sent, "in the order of their arrival");
        assert!(rig.queue.transport().wanted);
    }

    #[test]
    fn a_queue_sleeps_through_a_drain_however_close_requests_came() {
        let mut rig = Rig::new(numbered(8), false);
        rig.queue.transport().may_poll = true;
        let waits = |rig: &mut Rig| {
            rig.queue.polling = Polling::default();
            (0..100).for_each(|_| rig.queue.polling.waited(Duration::from_micros(10)));
            assert!(rig.queue.polling.is_worth_it());
            rig.queue.wait();
            rig.queue.transport().sleeps
        };
        assert_eq!(waits(&mut rig), 0, "it waits awake");
        rig.control.requests.close();
        read_place(&mut rig, 0);
        rig.run();
        assert_eq!(waits(&mut rig), 1);
    }

    #[test]
    fn a_drain_is_idle_once_what_is_in_flight_is_answered() {
        let mut rig = Rig::new(numbered(8), false);
        rig.disk.hold();
        for n in 0..2 {
            read_place(&mut rig, n);
        }
        rig.run();
        rig.control.requests.close();
        read_place(&mut rig, 2);
        rig.run();
        for left in [1, 0] {
            assert_eq!(rig.disk.idle.load(SeqCst), 0);
            rig.disk.release(0);
            rig.run();
            assert_eq!(rig.control.requests.count(), left);
        }
        assert_eq!(rig.disk.idle.load(SeqCst), 1);
        assert_eq!(rig.answers().len(), 2);
    }

    #[test]
    fn who_waits_in_a_drain_is_refused_when_the_export_stops() {
        for phase in [Phase::Stopping, Phase::Closed] {
            let mut rig = Rig::new(numbered(8), false);
            rig.disk.hold();
            let first = read_place(&mut rig, 0);
            rig.run();
            rig.control.requests.close();
            let waiting = read_place(&mut rig, 1);
            rig.run();
            rig.control.advance(phase);
            rig.run();
            let answers = rig.answers();
            assert_eq!(answers.len(), 1);
            assert_eq!(
                (answers[0].unique, answers[0].error),
                (waiting, libc::ENOTCONN)
            );
            // What is in flight is answered all the same.
            rig.control.advance(Phase::Closed);
            assert_eq!(rig.run(), Progress::Idle);
            rig.disk.release(0);
            assert_eq!(rig.run(), Progress::Finished);
            let answers = rig.answers();
            assert_eq!((answers[0].unique, answers[0].error), (first, 0));
        }
    }

    #[test]
    fn a_full_queue_does_not_listen() {
        let mut rig = Rig::new(numbered(8), false);
        rig.disk.hold();
        for n in 0..SLOTS + 1 {
            read_place(&mut rig, n);
        }
        assert_eq!(rig.run(), Progress::Idle);
        assert_eq!(rig.disk.waiting().len(), SLOTS);
        assert!(!rig.queue.transport().wanted);
        rig.disk.release(0);
        rig.run();
        // The one that had no slot has taken its place.
        assert_eq!(rig.disk.waiting().len(), SLOTS);
        rig.disk.release(0);
        rig.run();
        assert!(rig.queue.transport().wanted);
    }

    #[test]
    fn a_panic_is_eio_and_ends_the_export_at_once() {
        let mut disk = numbered(8);
        disk.panics_at = Some(PLACE as u64);
        let mut rig = Rig::new(disk, false);
        let sent: Vec<_> = (0..4).map(|n| read_place(&mut rig, n)).collect();
        assert_eq!(rig.run(), Progress::Finished);
        let answers = rig.answers();
        let answered: Vec<_> = answers.iter().map(|a| (a.unique, a.error)).collect();
        assert_eq!(answered, [(sent[0], 0), (sent[1], libc::EIO)]);
        assert_eq!(rig.disk.log.lock().len(), 2, "no more is begun");
        let events = rig.disk.events.lock();
        let errno = libc::ENOTRECOVERABLE;
        assert!(matches!(&events[..], [Event::Halted { errno: e, .. }] if *e == errno));
    }

    #[test]
    fn a_connection_that_ends_is_told_once_and_what_is_in_flight_goes_on() {
        let mut rig = Rig::new(numbered(8), false);
        rig.disk.hold();
        read_place(&mut rig, 0);
        rig.run();
        rig.queue.transport().gone = true;
        assert_eq!(rig.run(), Progress::Idle);
        assert!(!rig.queue.transport().wanted, "it would not sleep");
        rig.control.disconnected();
        rig.disk.release(0);
        assert_eq!(rig.run(), Progress::Finished);
        assert_eq!(*rig.disk.events.lock(), [Event::Unmounted]);
    }

    #[test]
    fn another_thread_may_complete_what_the_driver_began() {
        let mut rig = Rig::new(numbered(8), false);
        rig.disk.hold();
        let rounds = if cfg!(miri) { 5 } else { 500 };
        for round in 0..rounds {
            let place = round % 8;
            let unique = read_place(&mut rig, place);
            rig.run();
            let disk = rig.disk.clone();
            let completer = thread::spawn(move || disk.release(0));
            let answer = loop {
                // As the queue's thread does, with a transport that never
                // sleeps: a wake-up that was lost would never come.
                rig.run();
                if let Some(answer) = rig.answers().pop() {
                    break answer;
                }
                rig.queue.wait();
                thread::yield_now();
            };
            completer.join().unwrap();
            assert_eq!(answer.unique, unique);
            assert_eq!(answer.data, [place as u8; PLACE]);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "works on a file")]
    fn no_request_ends_before_its_jobs_whatever_its_driver_does() {
        let mut disk = numbered(8);
        disk.gives_up_on = Some(tempfile::tempfile().unwrap());
        let mut rig = Rig::new(disk, false);
        rig.queue.transport().holds_jobs = true;
        let sent: Vec<_> = (0..2).map(|n| read_place(&mut rig, n)).collect();
        rig.run();
        assert!(rig.answers().is_empty());
        assert_eq!(rig.control.requests.count(), 2);
        rig.queue.transport().holds_jobs = false;
        rig.run();
        let answers = rig.answers();
        let answered: Vec<_> = answers.iter().map(|a| (a.unique, a.error)).collect();
        let errno = libc::ETIMEDOUT;
        assert_eq!(answered, [(sent[0], errno), (sent[1], errno)]);
        assert_eq!(rig.control.requests.count(), 0);
    }

    #[test]
    fn what_wants_no_answer_gets_none_and_frees_its_slot() {
        let mut rig = Rig::new(numbered(8), false);
        for _ in 0..3 * SLOTS {
            rig.send(opcode::FORGET, &[0; 8], &[]);
            rig.send(opcode::INTERRUPT, &[0; 8], &[]);
        }
        rig.run();
        assert!(rig.answers().is_empty());
        assert_eq!(rig.read(0, 1).data, [0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Whatever the order of arrivals, completions and drains.
        #[test]
        fn every_request_is_answered_once_and_with_its_own_data(
            steps in prop::collection::vec((0u8..4, 0usize..64), 1..60),
        ) {
            let mut rig = Rig::new(numbered(64), false);
            rig.disk.hold();
            let mut expected = std::collections::BTreeMap::new();
            let mut drained = false;
            let mut answered = 0;
            for (step, n) in steps {
                match step {
                    0 => {
                        expected.insert(read_place(&mut rig, n), n);
                    }
                    1 => {
                        rig.run();
                    }
                    2 => {
                        let waiting = rig.disk.waiting().len();
                        if waiting > 0 {
                            rig.disk.release(n % waiting);
                        }
                    }
                    _ => {
                        if drained {
                            rig.control.requests.open();
                            rig.control.kick();
                        } else {
                            rig.control.requests.close();
                        }
                        drained = !drained;
                    }
                }
            }
            if drained {
                rig.control.requests.open();
            }
            rig.control.kick();
            loop {
                rig.run();
                for answer in rig.answers() {
                    let place = expected.remove(&answer.unique);
                    prop_assert!(place.is_some(), "answered twice");
                    prop_assert_eq!(answer.data, vec![place.unwrap() as u8; PLACE]);
                    answered += 1;
                }
                if rig.disk.waiting().is_empty() {
                    break;
                }
                rig.disk.release(0);
            }
            prop_assert!(expected.is_empty(), "after {} answers: {:?}", answered, expected);
            prop_assert!(rig.control.requests.is_empty());
        }
    }
}

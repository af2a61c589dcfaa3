//! The queue: the unit of concurrency.
//!
//! It owns a transport and a task for each of the transport's slots, and one
//! thread at a time runs it. [`Queue::dispatch`] is all the work there is; a
//! thread of the library's own repeats it and sleeps in between.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::control::{Control, Phase};
use crate::error::Error;
use crate::slot::{Reply, Slot};
use crate::task::{Answered, Task};
use crate::transport::{Fetched, Transport};
use crate::wakeups::Wakeups;

/// How many requests are begun before the queue looks around again.
pub(crate) const BUDGET: usize = 64;

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
    tasks: Vec<Task>,
    /// Requests that arrived in a drain, to be served after it.
    parked: VecDeque<Box<Slot>>,
    in_flight: usize,
    wants_requests: bool,
    in_batch: bool,
    /// The connection has ended or the transport is broken.
    ended: bool,
}

impl<T: Transport> Queue<T> {
    /// `tasks`: one for each slot of the transport.
    pub(crate) fn new(
        index: usize,
        control: Arc<Control>,
        wakeups: Arc<Wakeups>,
        transport: T,
        tasks: Vec<Task>,
    ) -> Self {
        Self {
            index,
            control,
            wakeups,
            transport,
            tasks,
            parked: VecDeque::new(),
            in_flight: 0,
            wants_requests: true,
            in_batch: false,
            ended: false,
        }
    }

    /// Runs what can run and begins at most `budget` requests. Never blocks,
    /// unless the driver does.
    pub(crate) fn dispatch(&mut self, budget: usize) -> Progress {
        let control = self.control.clone();
        let _marked = control.dispatching();
        let progress = self.run(budget);
        if self.in_batch {
            self.in_batch = false;
            self.control.hook(|h| h.batch_end(self.index));
            self.leave();
        }
        progress
    }

    fn run(&mut self, budget: usize) -> Progress {
        let wakeups = self.wakeups.clone();
        wakeups.take(|slot| self.resume(slot));
        if self.is_ending() {
            return self.finish();
        }
        let mut begun = 0;
        // The last request may have halted the export.
        while begun < budget && !self.is_ending() {
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
        self.listen();
        if begun == budget || wakeups.is_needed() {
            Progress::More
        } else {
            Progress::Idle
        }
    }

    /// Sleeps until there is something to dispatch.
    pub(crate) fn wait(&mut self) {
        if self.wakeups.fall_asleep() {
            let result = self.transport.wait();
            self.wakeups.awake();
            if let Err(error) = result {
                self.broken(error);
            }
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
            self.control.hook(|h| h.batch_begin(self.index));
        }
        self.in_flight += 1;
        let answered = self.tasks[slot.index()].start(slot);
        self.answer(answered);
        true
    }

    /// Goes on with a request whose future was woken.
    fn resume(&mut self, slot: usize) {
        // A future may be woken once more after its end.
        if self.tasks[slot].is_busy() {
            let answered = self.tasks[slot].run();
            self.answer(answered);
        }
    }

    fn answer(&mut self, answered: Option<Answered>) {
        let Some(Answered { slot, panic }) = answered else {
            return;
        };
        self.commit(slot);
        self.in_flight -= 1;
        self.leave();
        if let Some(message) = panic {
            self.control.panicked(&message);
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

    fn broken(&mut self, error: Error) {
        self.ended = true;
        self.control.halt(error);
    }

    fn is_ending(&self) -> bool {
        self.ended || self.control.phase() == Phase::Closed
    }

    /// Takes no more requests; ends once none is in flight.
    fn finish(&mut self) -> Progress {
        while let Some(slot) = self.parked.pop_front() {
            self.refuse(slot);
        }
        if self.in_flight == 0 {
            return Progress::Finished;
        }
        self.listen();
        if self.wakeups.is_needed() {
            Progress::More
        } else {
            Progress::Idle
        }
    }

    /// Has the transport wake the queue for requests only if they can be
    /// served, so that a waiting request does not keep it awake.
    fn listen(&mut self) {
        let has_room = self.in_flight < self.transport.slots();
        let wanted = !self.is_ending() && has_room && self.parked.is_empty();
        if wanted != self.wants_requests {
            self.wants_requests = wanted;
            if let Err(error) = self.transport.want_requests(wanted) {
                self.broken(error);
            }
        }
    }
}

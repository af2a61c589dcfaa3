//! Tasks: what serves requests, and the mailbox through which a queue gives a
//! task its request and takes the answer.
//!
//! A task is one future that lives as long as its queue and serves one
//! request after the other, so nothing is allocated for a request. A queue has
//! as many as it ever had requests in flight at once.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::slot::Slot;
use crate::wakeups::Wakeups;

/// A slot with its reply, and the driver's panic if that is the reason.
pub(crate) struct Answered {
    pub(crate) slot: Box<Slot>,
    pub(crate) panic: Option<String>,
    /// The time since the task was given the request.
    pub(crate) took: Duration,
}

/// Between a queue and one of its tasks; both on the same thread.
#[derive(Default)]
pub(crate) struct Mailbox {
    request: Cell<Option<Box<Slot>>>,
    answer: Cell<Option<Answered>>,
}

impl Mailbox {
    /// The next request; for the task.
    pub(crate) async fn receive(&self) -> Box<Slot> {
        // Nobody need be woken: the queue polls the task it gave a request.
        poll_fn(|_| match self.request.take() {
            Some(slot) => Poll::Ready(slot),
            None => Poll::Pending,
        })
        .await
    }

    /// The request is done; for the task.
    pub(crate) fn answer(&self, slot: Box<Slot>, panic: Option<String>, took: Duration) {
        self.answer.set(Some(Answered { slot, panic, took }));
    }
}

/// One task.
struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    mailbox: Rc<Mailbox>,
    waker: Waker,
    busy: bool,
}

impl Task {
    /// Runs it until it waits; the answer, if it got that far.
    fn run(&mut self) -> Option<Answered> {
        let mut context = Context::from_waker(&self.waker);
        let poll = self.future.as_mut().poll(&mut context);
        debug_assert!(poll.is_pending(), "a task ends only with its queue");
        let answer = self.mailbox.answer.take();
        self.busy &= answer.is_none();
        answer
    }
}

/// What a task does: serve what comes in its mailbox, for ever. It gets its
/// number, too.
type Body = dyn Fn(usize, Rc<Mailbox>) -> Pin<Box<dyn Future<Output = ()>>>;

/// A queue's tasks.
pub(crate) struct Tasks {
    made: Vec<Task>,
    /// The numbers of those that have no request.
    free: Vec<usize>,
    body: Box<Body>,
    wakeups: Arc<Wakeups>,
}

impl Tasks {
    /// Tasks that do `body`, and are woken through `wakeups`.
    pub(crate) fn new<F>(
        wakeups: Arc<Wakeups>,
        body: impl Fn(usize, Rc<Mailbox>) -> F + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + 'static,
    {
        Self {
            made: Vec::new(),
            free: Vec::new(),
            body: Box::new(move |index, mailbox| Box::pin(body(index, mailbox))),
            wakeups,
        }
    }

    /// Has a request served by a task that has none.
    pub(crate) fn start(&mut self, slot: Box<Slot>) -> Option<Answered> {
        let index = self.free.pop().unwrap_or_else(|| self.make());
        let task = &mut self.made[index];
        task.mailbox.request.set(Some(slot));
        task.busy = true;
        self.run(index)
    }

    /// Goes on with a task whose future was woken.
    pub(crate) fn resume(&mut self, index: usize) -> Option<Answered> {
        // A future may be woken once more after its end.
        if self.made[index].busy {
            self.run(index)
        } else {
            None
        }
    }

    fn run(&mut self, index: usize) -> Option<Answered> {
        let answered = self.made[index].run();
        if answered.is_some() {
            self.free.push(index);
        }
        answered
    }

    fn make(&mut self) -> usize {
        let index = self.made.len();
        let mailbox = Rc::new(Mailbox::default());
        self.made.push(Task {
            future: (self.body)(index, mailbox.clone()),
            mailbox,
            waker: self.wakeups.waker(index),
            busy: false,
        });
        index
    }
}

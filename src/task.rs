//! One slot's task, and the mailbox through which the queue gives it requests
//! and takes answers.
//!
//! A task is one future that lives as long as its queue and serves one
//! request after the other, so nothing is allocated for a request.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::slot::Slot;

/// A slot with its reply, and the driver's panic if that is the reason.
pub(crate) struct Answered {
    pub(crate) slot: Box<Slot>,
    pub(crate) panic: Option<String>,
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
    pub(crate) fn answer(&self, slot: Box<Slot>, panic: Option<String>) {
        self.answer.set(Some(Answered { slot, panic }));
    }
}

/// A task as its queue holds it.
pub(crate) struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    mailbox: Rc<Mailbox>,
    waker: Waker,
    busy: bool,
}

impl Task {
    pub(crate) fn new<F>(waker: Waker, body: impl FnOnce(Rc<Mailbox>) -> F) -> Self
    where
        F: Future<Output = ()> + 'static,
    {
        let mailbox = Rc::new(Mailbox::default());
        Self {
            future: Box::pin(body(mailbox.clone())),
            mailbox,
            waker,
            busy: false,
        }
    }

    /// Whether it has a request that is not answered yet.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    /// Gives it a request and runs it.
    pub(crate) fn start(&mut self, slot: Box<Slot>) -> Option<Answered> {
        self.mailbox.request.set(Some(slot));
        self.busy = true;
        self.run()
    }

    /// Runs it until it waits; the answer, if it got that far.
    pub(crate) fn run(&mut self) -> Option<Answered> {
        let mut context = Context::from_waker(&self.waker);
        let poll = self.future.as_mut().poll(&mut context);
        debug_assert!(poll.is_pending(), "a task ends only with its queue");
        let answer = self.mailbox.answer.take();
        self.busy &= answer.is_none();
        answer
    }
}

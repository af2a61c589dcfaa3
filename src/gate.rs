//! A gate that work passes on its way in and out, and that can be closed to
//! wait until nobody is inside.
//!
//! Every queue counts its own passages in a cache line of its own, so passing
//! costs no memory that two queues share. Closing is rare and pays for it.
//! A drain is a gate around whole requests; shrinking the image is a gate
//! around the operations that use its content.
//!
//! Ordering: who enters counts itself and then looks whether the gate is
//! closed; who closes marks the gate and then looks at the counts. All four
//! are `SeqCst`, so at least one of the two sees the other.

use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicUsize, Condvar, Mutex};

/// The gate could not be entered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed {
    /// Trying was the last thing that kept the gate from being empty, as
    /// [`Gate::leave`] says it.
    pub(crate) emptied: bool,
}

/// Counts who is inside, by queue, and can be closed any number of times.
#[derive(Debug)]
pub(crate) struct Gate {
    inside: Box<[CachePadded<AtomicUsize>]>,
    closers: AtomicUsize,
    /// Futures that wait for emptiness; threads wait on `emptied`.
    waiting: Mutex<Vec<Waker>>,
    emptied: Condvar,
}

impl Gate {
    pub(crate) fn new(queues: usize) -> Self {
        Self {
            inside: (0..queues).map(|_| CachePadded::default()).collect(),
            closers: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
            emptied: Condvar::new(),
        }
    }

    /// Goes inside, unless the gate is closed.
    pub(crate) fn try_enter(&self, queue: usize) -> Result<(), Closed> {
        // Looked at first, so that a closed gate seldom seems to be in use.
        if self.is_closed() {
            return Err(Closed { emptied: false });
        }
        self.inside[queue].fetch_add(1, SeqCst);
        if self.is_closed() {
            let emptied = self.leave(queue);
            return Err(Closed { emptied });
        }
        Ok(())
    }

    /// Goes inside once more, whether or not the gate is closed: for who is
    /// inside and needs to stay a little longer.
    pub(crate) fn enter_again(&self, queue: usize) {
        let before = self.inside[queue].fetch_add(1, SeqCst);
        debug_assert!(before > 0, "only who is inside may enter again");
    }

    /// Goes out; true if the gate is closed and nobody is left inside.
    pub(crate) fn leave(&self, queue: usize) -> bool {
        self.inside[queue].fetch_sub(1, SeqCst);
        if !self.is_closed() || !self.is_empty() {
            return false;
        }
        // Under the lock, so that nobody is between its look at the counts
        // and its sleep.
        let wakers = std::mem::take(&mut *self.waiting.lock());
        self.emptied.notify_all();
        wakers.into_iter().for_each(Waker::wake);
        true
    }

    /// Closes the gate once more: whoever is outside stays there.
    pub(crate) fn close(&self) {
        self.closers.fetch_add(1, SeqCst);
    }

    /// Takes one [`close`](Self::close) back; true if that opened the gate,
    /// `None` if it was not closed.
    pub(crate) fn open(&self) -> Option<bool> {
        let before = self
            .closers
            .fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1));
        before.ok().map(|n| n == 1)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closers.load(SeqCst) != 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// How many are inside.
    pub(crate) fn count(&self) -> usize {
        self.inside.iter().map(|n| n.load(SeqCst)).sum()
    }

    /// With the gate closed: ready once nobody is inside.
    pub(crate) fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_empty() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock();
        if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        drop(waiting);
        if self.is_empty() {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// With the gate closed: blocks until nobody is inside, or until
    /// `deadline`; true if the gate is empty.
    pub(crate) fn wait_empty(&self, deadline: Option<Instant>) -> bool {
        let mut guard = self.waiting.lock();
        while !self.is_empty() {
            match deadline {
                None => self.emptied.wait(&mut guard),
                Some(at) => {
                    if self.emptied.wait_until(&mut guard, at).timed_out() {
                        return self.is_empty();
                    }
                }
            }
        }
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_closed_gate_lets_nobody_in_until_the_last_opening() {
        let gate = Gate::new(2);
        assert!(gate.try_enter(1).is_ok());
        gate.close();
        gate.close();
        assert!(gate.try_enter(0).is_err());
        gate.enter_again(1);
        assert!(!gate.leave(1));
        assert!(!gate.is_empty());
        assert!(gate.leave(1));
        assert_eq!(gate.open(), Some(false));
        assert!(gate.try_enter(0).is_err());
        assert_eq!(gate.open(), Some(true));
        assert!(gate.try_enter(0).is_ok());
        assert!(!gate.leave(0));
        assert_eq!(gate.open(), None);
    }

    #[test]
    fn waiting_ends_at_the_deadline_while_somebody_is_inside() {
        let gate = Gate::new(1);
        assert!(gate.try_enter(0).is_ok());
        gate.close();
        assert!(!gate.wait_empty(Some(Instant::now() + Duration::from_millis(5))));
        gate.leave(0);
        assert!(gate.wait_empty(None));
    }

    #[test]
    fn nobody_is_inside_while_a_closer_has_seen_it_empty() {
        let rounds = if cfg!(miri) { 20 } else { 5_000 };
        let gate = Arc::new(Gate::new(2));
        let alone = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..2)
            .map(|queue| {
                let (gate, alone) = (gate.clone(), alone.clone());
                thread::spawn(move || {
                    for _ in 0..rounds {
                        if gate.try_enter(queue).is_ok() {
                            assert!(!alone.load(SeqCst));
                            gate.leave(queue);
                        }
                        thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..rounds / 10 {
            gate.close();
            gate.wait_empty(None);
            alone.store(true, SeqCst);
            thread::yield_now();
            alone.store(false, SeqCst);
            gate.open();
        }
        workers.into_iter().for_each(|w| w.join().unwrap());
    }
}

#[cfg(all(test, loom))]
mod model {
    use std::future::poll_fn;
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::future::block_on;
    use loom::{model, thread};

    use super::*;
    use crate::sync::AtomicBool;
    use crate::wakeups::Wakeups;

    /// What must not be used while the gate is closed: a part for each queue.
    struct Guarded {
        gate: Gate,
        parts: [UnsafeCell<usize>; 2],
    }

    impl Guarded {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                gate: Gate::new(2),
                parts: Default::default(),
            })
        }

        /// Uses the part of one queue, if the gate lets it; what that was
        /// told of the gate's emptiness.
        fn pass(&self, queue: usize) -> bool {
            if let Err(Closed { emptied }) = self.gate.try_enter(queue) {
                return emptied;
            }
            // SAFETY: a model's access, which loom checks.
            self.parts[queue].with_mut(|part| unsafe { *part += 1 });
            self.gate.leave(queue)
        }

        /// Uses all parts, with the gate closed and empty.
        fn use_alone(&self) {
            for part in &self.parts {
                // SAFETY: a model's access, which loom checks.
                part.with_mut(|part| unsafe { *part += 10 });
            }
        }
    }

    /// Closes, waits for emptiness by `wait`, and opens, while one thread
    /// passes on each of `queues`.
    fn drain(queues: &'static [usize], wait: impl Fn(&Gate) + Send + Sync + 'static) {
        model(move || {
            let guarded = Guarded::new();
            let passing = queues.iter().map(|&queue| {
                let guarded = guarded.clone();
                thread::spawn(move || guarded.pass(queue))
            });
            let passing: Vec<_> = passing.collect();
            guarded.gate.close();
            wait(&guarded.gate);
            guarded.use_alone();
            guarded.gate.open();
            for thread in passing {
                thread.join().unwrap();
            }
            assert!(guarded.gate.is_empty());
        });
    }

    #[test]
    fn who_waits_for_emptiness_is_alone_then() {
        drain(&[0, 1], |gate| assert!(gate.wait_empty(None)));
    }

    #[test]
    fn a_future_that_waits_for_emptiness_is_alone_then() {
        drain(&[0, 1], |gate| block_on(poll_fn(|cx| gate.poll_empty(cx))));
    }

    /// As a host does that drains without blocking in the library: it closes,
    /// looks, and otherwise waits until somebody tells it.
    #[test]
    fn a_closer_finds_the_gate_empty_or_is_told() {
        model(|| {
            let guarded = Guarded::new();
            let told = Arc::new((Mutex::new(false), Condvar::new()));
            let passing = [0, 1].map(|queue| {
                let (guarded, told) = (guarded.clone(), told.clone());
                thread::spawn(move || {
                    if guarded.pass(queue) {
                        *told.0.lock() = true;
                        told.1.notify_all();
                    }
                })
            });
            guarded.gate.close();
            if !guarded.gate.is_empty() {
                let mut is_told = told.0.lock();
                while !*is_told {
                    told.1.wait(&mut is_told);
                }
            }
            passing.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    /// As a queue does with a request that came in a drain.
    #[test]
    fn who_was_kept_out_and_sleeps_is_let_in_at_the_opening() {
        model(|| {
            let gate = Arc::new(Gate::new(1));
            let wakeups = Arc::new(Wakeups::new(1).unwrap());
            let served = Arc::new(AtomicBool::new(false));
            gate.close();
            let queue = {
                let (gate, wakeups, served) = (gate.clone(), wakeups.clone(), served.clone());
                thread::spawn(move || {
                    loop {
                        wakeups.take(|_| {});
                        if gate.try_enter(0).is_ok() {
                            break;
                        }
                        wakeups.sleep();
                    }
                    served.store(true, SeqCst);
                    gate.leave(0);
                })
            };
            assert!(!served.load(SeqCst), "it was served in the drain");
            assert_eq!(gate.open(), Some(true));
            wakeups.kick();
            queue.join().unwrap();
        });
    }
}

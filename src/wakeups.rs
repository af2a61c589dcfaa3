//! How a queue is woken: by a future that can go on, and by the
//! export's owner.
//!
//! Waking costs a system call only if the queue sleeps. Before it sleeps the
//! queue says so and looks again; who wakes it leaves the reason and then
//! looks whether it sleeps. All `SeqCst`, so one of them sees the other.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Wake, Waker};

use nix::sys::eventfd::EfdFlags;

use crate::sync::{AtomicBool, AtomicU64, EventFd};

/// One queue's reasons to run.
#[derive(Debug)]
pub(crate) struct Wakeups {
    /// A bit for each task that can go on.
    tasks: Box<[AtomicU64]>,
    /// Something else is to be looked at.
    kicked: AtomicBool,
    sleeping: AtomicBool,
    event: EventFd,
}

impl Wakeups {
    pub(crate) fn new(tasks: usize) -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            tasks: (0..tasks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            kicked: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            event: EventFd::from_value_and_flags(0, flags)?,
        })
    }

    /// The waker of one task.
    pub(crate) fn waker(self: &Arc<Self>, task: usize) -> Waker {
        Waker::from(Arc::new(TaskWaker {
            queue: self.clone(),
            task,
        }))
    }

    /// Wakes the queue for something that is not a task's.
    pub(crate) fn kick(&self) {
        self.kicked.store(true, SeqCst);
        self.signal();
    }

    /// As [`kick`](Self::kick); also makes the descriptor readable, whether or
    /// not the queue sleeps.
    pub(crate) fn rouse(&self) {
        self.kicked.store(true, SeqCst);
        self.show();
    }

    /// Makes the descriptor readable.
    pub(crate) fn show(&self) {
        // Fails only if the counter is full: then it is readable already.
        let _ = self.event.write(1);
    }

    fn wake(&self, task: usize) {
        self.tasks[task / 64].fetch_or(1 << (task % 64), SeqCst);
        self.signal();
    }

    fn signal(&self) {
        if self.sleeping.swap(false, SeqCst) {
            self.show();
        }
    }

    /// Announces that the queue will sleep; false if it has a reason not to.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.sleeping.store(true, SeqCst);
        if self.is_needed() {
            self.awake();
            return false;
        }
        true
    }

    /// The queue runs again.
    pub(crate) fn awake(&self) {
        self.sleeping.store(false, SeqCst);
    }

    /// Whether there is a reason to run.
    pub(crate) fn is_needed(&self) -> bool {
        self.kicked.load(SeqCst) || self.tasks.iter().any(|w| w.load(SeqCst) != 0)
    }

    /// Takes the tasks that can go on, and the kick.
    pub(crate) fn take(&self, mut run: impl FnMut(usize)) {
        if self.kicked.load(SeqCst) {
            self.kicked.store(false, SeqCst);
        }
        for (i, word) in self.tasks.iter().enumerate() {
            if word.load(SeqCst) == 0 {
                continue;
            }
            let mut bits = word.swap(0, SeqCst);
            while bits != 0 {
                run(i * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    /// What becomes readable when the sleeping queue is woken.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes the descriptor unreadable again.
    pub(crate) fn clear(&self) {
        // Fails only if it is not readable.
        let _ = self.event.read();
    }
}

struct TaskWaker {
    queue: Arc<Wakeups>,
    task: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.queue.wake(self.task);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_wake_before_sleeping_forbids_sleep_and_is_taken_once() {
        let queue = Arc::new(Wakeups::new(70).unwrap());
        queue.waker(69).wake();
        queue.waker(3).wake_by_ref();
        queue.waker(3).wake();
        assert!(!queue.fall_asleep());
        let mut taken = Vec::new();
        queue.take(|slot| taken.push(slot));
        assert_eq!(taken, [3, 69]);
        assert!(queue.fall_asleep());
    }

    #[test]
    fn a_sleeping_queue_is_signalled() {
        let queue = Arc::new(Wakeups::new(1).unwrap());
        assert!(queue.event.read().is_err());
        queue.kick();
        assert!(queue.event.read().is_err(), "it did not sleep");
        queue.take(|_| {});
        assert!(queue.fall_asleep());
        queue.waker(0).wake();
        assert_eq!(queue.event.read(), Ok(1));
    }
}

#[cfg(all(test, loom))]
mod model {
    use std::sync::atomic::Ordering::Relaxed;

    use loom::sync::atomic::AtomicUsize;
    use loom::{model, thread};

    use super::*;

    impl Wakeups {
        /// What a queue does with a transport that gets no requests.
        pub(crate) fn sleep(&self) {
            if self.fall_asleep() {
                self.event.poll();
                self.clear();
                self.awake();
            }
        }
    }

    /// What a program's own thread does between two dispatches.
    fn sleep_elsewhere(queue: &Wakeups) {
        queue.clear();
        if queue.fall_asleep() {
            queue.event.poll();
        }
        queue.awake();
    }

    /// Runs the queue until each of its tasks has seen all that was done for
    /// it: `wakes` says how often each task is woken, by a thread of its own,
    /// with something new.
    fn run(tasks: usize, wakes: &'static [(usize, usize)], returns_early: bool) {
        run_sleeping(tasks, wakes, returns_early, Wakeups::sleep);
    }

    fn run_sleeping(
        tasks: usize,
        wakes: &'static [(usize, usize)],
        returns_early: bool,
        sleep: fn(&Wakeups),
    ) {
        model(move || {
            let queue = Arc::new(Wakeups::new(tasks).unwrap());
            let done: Arc<Vec<_>> = Arc::new(wakes.iter().map(|_| AtomicUsize::new(0)).collect());
            let mut threads = Vec::new();
            for (n, &(task, times)) in wakes.iter().enumerate() {
                let (waker, done) = (queue.waker(task), done.clone());
                threads.push(thread::spawn(move || {
                    for time in 1..=times {
                        // The wake-up is what makes it visible.
                        done[n].store(time, Relaxed);
                        waker.wake_by_ref();
                    }
                }));
            }
            if returns_early {
                let queue = queue.clone();
                threads.push(thread::spawn(move || {
                    queue.event.write(1).unwrap();
                }));
            }
            let mut seen = vec![0; wakes.len()];
            while wakes.iter().zip(&seen).any(|(wake, seen)| wake.1 > *seen) {
                queue.take(|task| {
                    for (n, wake) in wakes.iter().enumerate() {
                        if wake.0 == task {
                            seen[n] = done[n].load(Relaxed);
                        }
                    }
                });
                if wakes.iter().zip(&seen).any(|(wake, seen)| wake.1 > *seen) {
                    sleep(&queue);
                }
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn two_tasks_of_a_word_are_both_woken() {
        run(2, &[(0, 1), (1, 1)], false);
    }

    #[test]
    fn tasks_of_two_words_are_both_woken() {
        run(65, &[(0, 1), (64, 1)], false);
    }

    #[test]
    fn a_task_is_woken_for_each_news() {
        run(1, &[(0, 3)], false);
    }

    #[test]
    fn a_wake_is_not_lost_where_the_transport_returns_early() {
        run(1, &[(0, 2)], true);
    }

    #[test]
    fn a_wake_is_not_lost_by_a_thread_that_sleeps_elsewhere() {
        run_sleeping(2, &[(0, 1), (1, 1)], false, sleep_elsewhere);
        run_sleeping(1, &[(0, 2)], true, sleep_elsewhere);
    }

    #[test]
    fn what_is_behind_a_kick_is_seen() {
        model(|| {
            let queue = Arc::new(Wakeups::new(1).unwrap());
            let reasons = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
            let kicking = [0, 1].map(|n| {
                let (queue, reasons) = (queue.clone(), reasons.clone());
                thread::spawn(move || {
                    reasons[n].store(true, SeqCst);
                    queue.kick();
                })
            });
            loop {
                queue.take(|_| {});
                if reasons.iter().all(|reason| reason.load(SeqCst)) {
                    break;
                }
                queue.sleep();
            }
            kicking.into_iter().for_each(|t| t.join().unwrap());
        });
    }
}

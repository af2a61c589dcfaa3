//! How an export's mount ends: unmounted in a thread of its own, once, with
//! what clients hold in mapped memory written back before if there is time.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::mount::Child;

/// How far the unmounting has come.
#[derive(Debug, Default)]
enum Unmounting {
    #[default]
    NotBegun,
    Running,
    Done(Result<()>),
}

/// The unmounting of one export.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    state: Mutex<Unmounting>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    children: Mutex<Vec<Child>>,
}

/// How a caller waits for the end of the unmounting.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wait {
    /// Not at all: it is needed to serve what the unmounting waits for.
    No,
    Until(Option<Instant>),
}

impl Ending {
    /// Has `unmount` run in a thread, unless that has succeeded before or is
    /// under way, and waits for it. The thread is needed because the unmounting
    /// may wait for requests that only the caller can complete. Its result, or
    /// `Ok` if that is not known in time.
    pub(crate) fn run(
        self: &Arc<Self>,
        unmount: impl FnOnce() -> Result<()> + Send + 'static,
        wait: Wait,
    ) -> Result<()> {
        let mut state = self.state.lock();
        if matches!(*state, Unmounting::NotBegun | Unmounting::Done(Err(_))) {
            *state = Unmounting::Running;
            match self.spawn(unmount) {
                Ok(thread) => self.threads.lock().push(thread),
                // Better to wait for what may need us than not to end at all;
                // but not where we are surely needed.
                Err((_, unmount)) if !matches!(wait, Wait::No) => {
                    drop(state);
                    self.done(unmount());
                    state = self.state.lock();
                }
                Err((e, _)) => {
                    *state = Unmounting::NotBegun;
                    return Err(Error::from_io("cannot start a thread to unmount in", &e));
                }
            }
        }
        while matches!(*state, Unmounting::Running) {
            match wait {
                Wait::No => return Ok(()),
                Wait::Until(None) => self.changed.wait(&mut state),
                Wait::Until(Some(at)) => {
                    if self.changed.wait_until(&mut state, at).timed_out() {
                        return Ok(());
                    }
                }
            }
        }
        match &*state {
            Unmounting::Done(result) => result.clone(),
            Unmounting::NotBegun | Unmounting::Running => Ok(()),
        }
    }

    /// Runs `unmount` in a thread, or gives it back.
    fn spawn<F>(self: &Arc<Self>, unmount: F) -> std::result::Result<JoinHandle<()>, (io::Error, F)>
    where
        F: FnOnce() -> Result<()> + Send + 'static,
    {
        let ending = self.clone();
        let (give, take) = mpsc::channel::<F>();
        let spawned = thread::Builder::new()
            .name("blkfuse-unmount".to_owned())
            .spawn(move || {
                if let Ok(unmount) = take.recv() {
                    ending.done(unmount());
                }
            });
        match spawned {
            Ok(thread) => {
                // The thread waits for it, so it is taken.
                let _ = give.send(unmount);
                Ok(thread)
            }
            Err(e) => Err((e, unmount)),
        }
    }

    fn done(&self, result: Result<()>) {
        *self.state.lock() = Unmounting::Done(result);
        self.changed.notify_all();
    }

    /// Keeps a child process, which may wait for the connection's end.
    pub(crate) fn keep(&self, child: Option<Child>) {
        self.children.lock().extend(child);
    }

    /// The connection has ended: lets the child processes go.
    pub(crate) fn drop_children(&self) {
        self.children.lock().clear();
    }

    /// Keeps a thread that ends with the export.
    pub(crate) fn keep_thread(&self, thread: JoinHandle<()>) {
        self.threads.lock().push(thread);
    }

    /// The threads that have unmounted, or run queues to their end; to be joined.
    pub(crate) fn take_threads(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.threads.lock())
    }
}

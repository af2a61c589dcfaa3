//! The library's own threads: one that may be told where to run, within what it
//! was allowed at first, and what takes no signals.

use std::{io, thread};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::SigSet;
use nix::unistd::Pid;

use crate::placement::Seat;

/// The calling thread's choice of CPUs.
pub(crate) struct SeatedThread {
    /// What it was allowed before it was told anything.
    allowed: CpuSet,
    has_choice: bool,
    seat: Seat,
}

/// The calling thread, in sched_setaffinity(2).
const THIS: Pid = Pid::from_raw(0);

impl SeatedThread {
    /// The calling thread, as it is.
    pub(crate) fn new() -> Self {
        // Without an answer there is no choice.
        let allowed = sched_getaffinity(THIS).unwrap_or_default();
        Self {
            has_choice: cpus_of(&allowed).nth(1).is_some(),
            allowed,
            seat: Seat::Anywhere,
        }
    }

    /// Whether it may run on more than one CPU.
    pub(crate) fn has_choice(&self) -> bool {
        self.has_choice
    }

    /// Moves to `seat`; `clients` says of a CPU whether its clients are this
    /// thread's. Called by the thread itself.
    pub(crate) fn take(&mut self, seat: Seat, clients: impl Fn(usize) -> bool) {
        if seat == self.seat {
            return;
        }
        self.seat = seat;
        let fits = |cpu: &usize| match seat {
            Seat::Anywhere => true,
            Seat::Beside(client) => *cpu != client,
            Seat::Among => clients(*cpu),
        };
        let mut cpus = CpuSet::new();
        let mut some = false;
        for cpu in cpus_of(&self.allowed).filter(fits) {
            some |= cpus.set(cpu).is_ok();
        }
        // Where there is no such CPU, any will do; and so it will if the
        // kernel refuses.
        let _ = sched_setaffinity(THIS, if some { &cpus } else { &self.allowed });
    }
}

/// Runs `f` in a thread of its own on one CPU, if it may run there.
pub(crate) fn on_cpu<T: Send>(cpu: usize, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    in_a_thread(|| {
        let _ = move_to(cpu);
        f()
    })
}

/// Runs `f` in a thread of its own on each of `cpus`, one after the other.
/// Returns those where that thread may not run: they are not there, or not for
/// this process.
pub(crate) fn on_each_cpu(
    cpus: impl Iterator<Item = usize> + Send,
    f: impl FnMut(usize) + Send,
) -> io::Result<Vec<usize>> {
    in_a_thread(|| {
        let mut f = f;
        let mut closed = Vec::new();
        for cpu in cpus {
            match move_to(cpu) {
                Ok(()) => f(cpu),
                Err(_) => closed.push(cpu),
            }
        }
        closed
    })
}

/// Has the calling thread take no signals: the program's are for the program's
/// own threads.
pub(crate) fn block_signals() {
    if let Err(errno) = SigSet::all().thread_block() {
        log::warn!("a thread of the library's cannot block signals: {errno}");
    }
}

/// Has the calling thread run on one CPU.
fn move_to(cpu: usize) -> nix::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(THIS, &cpus)
}

fn in_a_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    let unsignalled = || {
        block_signals();
        f()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, unsignalled)?;
        thread
            .join()
            .map_err(|_| io::Error::other("a thread panicked"))
    })
}

/// The number of a CPU that the calling thread may run on.
pub(crate) fn some_cpu() -> usize {
    let allowed = sched_getaffinity(THIS).unwrap_or_default();
    cpus_of(&allowed).next().unwrap_or(0)
}

fn cpus_of(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false))
}

//! Threads of a program's own that run an export's queues, each with a loop
//! that does nothing else.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use blkfuse::{Dispatched, Export, HostQueue};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A thread for each queue of an export; they end with the export, and are then
/// to be joined.
#[derive(Default)]
pub struct Loops(Vec<JoinHandle<()>>);

impl Loops {
    pub fn of(export: &Export) -> Self {
        let queues = (0..).map_while(|n| export.queue(n).cloned());
        Self(queues.map(|q| thread::spawn(move || run(&q))).collect())
    }

    pub fn join(self) {
        for thread in self.0 {
            thread.join().unwrap();
        }
    }
}

/// Runs a queue in the calling thread until it has ended.
pub fn run(queue: &HostQueue) {
    match queue.attach() {
        Err(e) if e.errno() == libc::ESHUTDOWN => return,
        attached => attached.unwrap(),
    }
    while go_on(queue) {}
}

/// Serves what there is, and waits for more; false if that will never come.
pub fn go_on(queue: &HostQueue) -> bool {
    match queue.dispatch(0).unwrap() {
        Dispatched::More => true,
        Dispatched::Idle => {
            is_readable(queue, PollTimeout::NONE);
            true
        }
        Dispatched::Ended => false,
    }
}

/// Whether a queue's descriptor becomes readable in time.
pub fn is_readable(queue: &HostQueue, timeout: PollTimeout) -> bool {
    let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            result => return result.unwrap() > 0,
        }
    }
}

//! What the library's threads tell the main thread about exports.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use blkfuse::Event;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

/// How an export ended by itself.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// It gave up; the reason.
    Halted(String),
    /// Somebody else unmounted it.
    Unmounted,
}

/// The endings that were not looked at yet, with a descriptor to poll.
#[derive(Debug)]
pub struct Events {
    endings: Mutex<Vec<(usize, Ending)>>,
    wake: EventFd,
}

impl Events {
    pub fn new() -> nix::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Arc::new(Self {
            endings: Mutex::default(),
            wake: EventFd::from_flags(flags)?,
        }))
    }

    /// Takes what has happened, with the exports' numbers.
    pub fn take(&self) -> Vec<(usize, Ending)> {
        // Before looking, so that what comes after the look wakes again. If
        // there is nothing to read there is nothing to take back, either.
        let _ = self.wake.read();
        std::mem::take(&mut self.endings.lock())
    }

    /// One that speaks for the export of that number.
    pub fn notifier(self: &Arc<Self>, export: usize) -> Notifier {
        Notifier {
            events: Arc::clone(self),
            export,
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Speaks for one export.
#[derive(Debug)]
pub struct Notifier {
    events: Arc<Events>,
    export: usize,
}

impl Notifier {
    pub fn notify(&self, event: &Event) {
        let ending = match event {
            Event::Halted { message, .. } => Ending::Halted(message.clone()),
            Event::Unmounted => Ending::Unmounted,
            _ => return,
        };
        self.events.endings.lock().push((self.export, ending));
        // It can only fail when the counter is full, and then it is awake.
        let _ = self.events.wake.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn is_awake(events: &Events) -> bool {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn endings_wake_the_main_thread_once() {
        let events = Events::new().unwrap();
        let second = events.notifier(1);
        second.notify(&Event::Started);
        assert!(!is_awake(&events));
        second.notify(&Event::Unmounted);
        events.notifier(0).notify(&Event::Halted {
            errno: libc::EIO,
            message: "broken".into(),
        });
        assert!(is_awake(&events));
        assert_eq!(
            events.take(),
            [(1, Ending::Unmounted), (0, Ending::Halted("broken".into()))]
        );
        assert!(!is_awake(&events));
        assert_eq!(events.take(), []);
    }
}

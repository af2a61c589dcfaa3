//! The signals that end the daemon, as something to poll.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that ask for the end.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Takes the signals over. Threads inherit what is blocked, so this comes
    /// before the first of them.
    pub fn take_over() -> nix::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        // A blocked signal is delivered even if it is ignored; who runs us
        // under nohup means it.
        if !is_ignored(Signal::SIGHUP) {
            set.add(Signal::SIGHUP);
        }
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        SignalFd::with_flags(&set, flags).map(Self)
    }

    /// The next signal that came, if one did.
    pub fn next(&self) -> nix::Result<Option<Signal>> {
        let info = self.0.read_signal()?;
        info.map(|info| Signal::try_from(info.ssi_signo as i32))
            .transpose()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the signal was ignored when the process was started.
fn is_ignored(signal: Signal) -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| ignored_mask(&status) & (1 << (signal as u32 - 1)) != 0)
}

/// The ignored signals, a bit each, in the text of `/proc/PID/status`.
fn ignored_mask(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "SigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored_mask(status), 0x1001);
        assert_eq!(ignored_mask("Name:\tblkfused\n"), 0);
        // The test program ignores SIGPIPE, as every Rust program does.
        assert!(is_ignored(Signal::SIGPIPE));
        assert!(!is_ignored(Signal::SIGHUP));
    }
}

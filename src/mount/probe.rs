//! Whether a connection is served: a child process is its client for a moment.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

use super::child::Child;
use crate::error::{Error, Result};

/// What came of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// STATFS had an answer without an error.
    Answered,
    Failed(Errno),
    TimedOut,
}

/// A client of the connection: asks for the file system's state.
///
/// It dies with the thread that began it. If it has timed out, it is to be
/// dropped after the connection's end, which it may wait for.
#[derive(Debug)]
pub(crate) struct Probe(pub(super) Child);

impl Probe {
    /// Of the root of a mount that is nowhere yet.
    pub(super) fn of_detached(root: BorrowedFd<'_>) -> Result<Self> {
        // SAFETY: the body only makes system calls, and owns nothing that would
        // be freed in the child.
        unsafe { Child::start(&[root], &|| use_mount(root)) }.map(Self)
    }

    /// Of the file mounted at `path`.
    pub(super) fn of_visible(path: &Path) -> Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::new(libc::EINVAL, "a path with a zero byte"))?;
        let body = || {
            let root = open(&*path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            use_mount(root.as_fd())
        };
        // SAFETY: the body only makes system calls; what it opens it closes.
        unsafe { Child::start(&[], &body) }.map(Self)
    }

    /// Waits for the outcome, at most `timeout`; it is then called off.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Outcome {
        match self.0.wait(Instant::now().checked_add(timeout)) {
            Some(Ok(())) => Outcome::Answered,
            Some(Err(errno)) => Outcome::Failed(errno),
            None => {
                self.0.kill();
                Outcome::TimedOut
            }
        }
    }
}

/// What the child does: only system calls.
fn use_mount(root: BorrowedFd<'_>) -> nix::Result<()> {
    match fstatfs(root)?.filesystem_type() {
        FUSE_SUPER_MAGIC => Ok(()),
        _ => Err(Errno::ESTALE),
    }
}

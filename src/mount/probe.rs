//! Whether a connection is served: a child process uses the mounted file as a
//! client would.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::stat::Mode;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use nix::unistd::Pid;

use super::child::Child;
use super::mountpoint::descriptor_path;
use crate::error::{Error, Result};

/// What came of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// STATFS, GETATTR and OPEN had answers without an error, and RELEASE has
    /// been sent.
    Answered,
    Failed(Errno),
    TimedOut,
}

/// A client of the connection: asks for the file system's state, opens the
/// file, and closes it again.
///
/// It dies with the thread that began it. If it has timed out, it is to be
/// dropped after the connection's end, which it may wait for.
#[derive(Debug)]
pub(crate) struct Probe(pub(super) Child);

impl Probe {
    /// Of the root of a mount that is nowhere yet. Without /proc that can not
    /// be opened, and only STATFS shows something.
    pub(super) fn of_detached(root: BorrowedFd<'_>, cpu: Option<usize>) -> Result<Self> {
        let path = descriptor_path(root);
        // About the link, not the file.
        let path = path.symlink_metadata().is_ok().then_some(path);
        let path = path.as_deref().map(c_path).transpose()?;
        Self::begin(&[root], cpu, &|| use_file(root, path.as_deref()))
    }

    /// Of the file mounted at `path`.
    pub(super) fn of_visible(path: &Path, cpu: Option<usize>) -> Result<Self> {
        let path = c_path(path)?;
        Self::begin(&[], cpu, &|| {
            let root = open(&*path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            use_file(root.as_fd(), Some(&path))
        })
    }

    /// Has a child do `using`, which must be fit for [`Child::start`].
    fn begin(
        keep: &[BorrowedFd<'_>],
        cpu: Option<usize>,
        using: &dyn Fn() -> nix::Result<()>,
    ) -> Result<Self> {
        let cpus = cpu.and_then(only);
        let body = || {
            if let Some(cpus) = &cpus {
                // It still is a probe if it is of another CPU's queue.
                let _ = sched_setaffinity(Pid::from_raw(0), cpus);
            }
            using()
        };
        // SAFETY: `body` only makes system calls, as `using` does in both of the
        // functions above, and owns nothing that would be freed in the child.
        unsafe { Child::start(keep, &body) }.map(Self)
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

/// The set of that one CPU; `None` if no such set can be had.
fn only(cpu: usize) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).is_ok().then_some(cpus)
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(libc::EINVAL, "a path with a zero byte"))
}

/// What the child does: only system calls.
fn use_file(root: BorrowedFd<'_>, path: Option<&CStr>) -> nix::Result<()> {
    if fstatfs(root)?.filesystem_type() != FUSE_SUPER_MAGIC {
        return Err(Errno::ESTALE);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    match path {
        Some(path) => open(path, flags, Mode::empty()).map(drop),
        None => Ok(()),
    }
}

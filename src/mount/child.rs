//! A short-lived process for what must wait for the mounted file.
//!
//! A thread that waits for its own export could not be trusted with that: if
//! the host is killed, the thread stays until its request is answered, and
//! while it stays so do the process's memory and, with it, the io_uring
//! instances mapped there. They hold /dev/fuse open, so the connection is never
//! aborted and nobody answers. A process of its own holds nothing of the host's:
//! it has closed every descriptor, and the rings are not mapped in it.
//!
//! The host does not see the process: its end sends no SIGCHLD, and only a wait
//! that asks for such children (`__WALL`, `__WCLONE`) finds it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::error::{Error, Result};

/// How long a child that has been killed may take to end. It takes longer only
/// if it waits for a request that the server has in hand.
const DYING: Duration = Duration::from_millis(500);

/// A child process, which dies with the *thread* that started it.
///
/// Dropping it kills it. If it then waits for a request that the server has in
/// hand, it ends with that request or with the connection; dropped before, it
/// stays as a zombie from then on until the host ends.
#[derive(Debug)]
pub(crate) struct Child {
    process: OwnedFd,
    end: Option<nix::Result<()>>,
}

impl Child {
    /// Starts a process that runs `body` and ends with its result. Of the
    /// host's descriptors it has those in `keep`, under the same numbers. It
    /// first closes all others, for which some file systems let it wait.
    ///
    /// # Safety
    ///
    /// The process is a copy of one in which other threads may have held any
    /// lock, and they are not there to release it. So `body` must do nothing
    /// but system calls: no allocating, freeing, locking, or panicking.
    pub(super) unsafe fn start(
        keep: &[BorrowedFd<'_>],
        body: &dyn Fn() -> nix::Result<()>,
    ) -> Result<Self> {
        let mut keep: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
        keep.sort_unstable();
        let host = process::id();
        // The host's signal handlers must not run in the child.
        let mask = SigSet::all()
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .map_err(refused)?;
        let cloned = clone_process();
        if let Ok(None) = cloned {
            run(host, &keep, body);
        }
        let restored = mask.thread_set_mask();
        let child = cloned
            .map_err(refused)?
            .map(|process| Self { process, end: None });
        restored.map_err(refused)?;
        Ok(child.expect("the child does not get here"))
    }

    /// Waits until the child has ended, or until `deadline`. `Err(EINTR)` if
    /// it was killed; `None` if it still runs.
    pub(super) fn wait(&mut self, deadline: Option<Instant>) -> Option<nix::Result<()>> {
        if self.end.is_none() && wait_for([self.process.as_fd()], deadline) == [true] {
            self.end = Some(self.reap());
        }
        self.end
    }

    /// Waits until `event` can be read; `false` if that is not so when the
    /// child has ended, or by `deadline`.
    pub(super) fn wait_told(&self, event: BorrowedFd<'_>, deadline: Instant) -> bool {
        wait_for([event, self.process.as_fd()], Some(deadline))[0]
    }

    /// Has it end as soon as it can.
    pub(super) fn kill(&self) {
        let none = std::ptr::null::<libc::siginfo_t>();
        let fd = self.process.as_raw_fd();
        // SAFETY: the call takes numbers and a null pointer, which is allowed.
        // The descriptor means our child, whatever its number means by now. It
        // fails only if the child has ended.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) };
    }

    /// Takes the result of a child that has ended.
    fn reap(&self) -> nix::Result<()> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::__WALL;
        match waitid(Id::PIDFd(self.process.as_fd()), flags)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(Errno::from_raw(errno)),
            _ => Err(Errno::EINTR),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.wait(Some(Instant::now())).is_some() {
            return;
        }
        self.kill();
        if self.wait(Some(Instant::now() + DYING)).is_none() {
            log::warn!("a helper process still waits for a file system that does not answer");
        }
    }
}

fn refused(errno: Errno) -> Error {
    let advice = match errno {
        Errno::ENOSYS | Errno::EPERM => "; clone3 needs Linux 5.3, and seccomp to let it pass",
        _ => "",
    };
    let message = format!("cannot start a helper process: {}{advice}", errno.desc());
    Error::new(errno as i32, message)
}

/// Which of `files` can be read by `deadline`, when one can.
fn wait_for<const N: usize>(files: [BorrowedFd<'_>; N], deadline: Option<Instant>) -> [bool; N] {
    let mut fds = files.map(|file| PollFd::new(file, PollFlags::POLLIN));
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => break,
            Ok(0) | Err(Errno::EINTR) => {}
            _ => break,
        }
    }
    fds.map(|fd| fd.any().unwrap_or(false))
}

/// Forks, without the handlers that fork() would run; `None` in the child.
fn clone_process() -> nix::Result<Option<OwnedFd>> {
    let mut process: RawFd = -1;
    // SAFETY: it is plain numbers, for which zero means none.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut process) as u64;
    // No exit_signal: the host is not to be told of the end.
    // SAFETY: without CLONE_VM the child has a copy of the memory, and goes on
    // with a copy of this stack. The kernel reads one `clone_args` of the size
    // that it is told, and writes one descriptor to `process`.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    if Errno::result(result)? == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(process) }))
}

/// All that happens in the child: only system calls.
fn run(host: u32, keep: &[RawFd], body: &dyn Fn() -> nix::Result<()>) -> ! {
    let result = leave(host, keep).and_then(|()| body());
    let code = result.map_or_else(|errno| errno as i32, |()| 0);
    // SAFETY: ends the process at once; nothing of the host's copy is run.
    unsafe { libc::_exit(code) }
}

/// Ties the child's life to the host's, and lets go of the host's files.
fn leave(host: u32, keep: &[RawFd]) -> nix::Result<()> {
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    Errno::result(result)?;
    // SAFETY: the call takes nothing, and cannot fail.
    if unsafe { libc::getppid() } as u32 != host {
        // It had died before.
        return Err(Errno::ESRCH);
    }
    let mut first = 0;
    for &fd in keep {
        let fd = fd as libc::c_uint;
        if first < fd {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, libc::c_uint::MAX)
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> nix::Result<()> {
    // SAFETY: the call touches no memory, and only this process's descriptors,
    // whose owners' code will never run here.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Errno::result(result).map(drop)
}

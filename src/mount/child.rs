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

/// A child process. It dies with the host, and already with the *thread* that
/// started it, which therefore must stay until the result has come.
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{PipeReader, Read, Write, pipe};
    use std::thread;

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, Signal, sigaction};
    use nix::sys::wait::{WaitPidFlag, waitpid};
    use nix::unistd::{ForkResult, Pid, close, fork, pause, read, write};

    /// How long what should happen at once may take.
    const SOON: Duration = Duration::from_secs(20);

    fn soon() -> Option<Instant> {
        Some(Instant::now() + SOON)
    }

    /// Starts a child with a body of these tests, which only make system calls.
    fn start(keep: &[BorrowedFd<'_>], body: &dyn Fn() -> nix::Result<()>) -> Child {
        // SAFETY: see above.
        unsafe { Child::start(keep, body) }.unwrap()
    }

    fn sleep_for_ever() -> nix::Result<()> {
        loop {
            pause();
        }
    }

    /// A second descriptor of the child, which outlives the first.
    pub(in crate::mount) fn witness(child: &Child) -> OwnedFd {
        child.process.try_clone().unwrap()
    }

    /// Whether a process has ended, and nothing is left of it.
    pub(in crate::mount) fn is_gone(process: &OwnedFd) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        waitid(Id::PIDFd(process.as_fd()), flags) == Err(Errno::ECHILD)
    }

    /// Whether all other ends of a pipe are closed, at once or soon.
    fn is_at_its_end(reader: &mut PipeReader) -> bool {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        assert!(poll(&mut fds, 20_000_u16).unwrap() > 0, "nothing comes");
        reader.read(&mut [0]).unwrap() == 0
    }

    #[test]
    fn the_result_arrives_and_nothing_is_left() {
        for result in [Ok(()), Err(Errno::ENOSPC), Err(Errno::EIO)] {
            let mut child = start(&[], &|| result);
            let witness = witness(&child);
            assert_eq!(child.wait(soon()), Some(result));
            assert!(is_gone(&witness));
            assert_eq!(child.wait(None), Some(result));
        }
    }

    #[test]
    fn a_child_that_waits_is_waited_for_until_the_deadline_and_dies_when_killed() {
        let mut child = start(&[], &sleep_for_ever);
        let begun = Instant::now();
        let patience = Duration::from_millis(30);
        assert_eq!(child.wait(Some(begun + patience)), None);
        assert!(begun.elapsed() >= patience);
        child.kill();
        assert_eq!(child.wait(soon()), Some(Err(Errno::EINTR)));
    }

    #[test]
    fn dropping_leaves_no_zombie() {
        for body in [&sleep_for_ever as &dyn Fn() -> _, &|| Ok(())] {
            let child = start(&[], body);
            let witness = witness(&child);
            drop(child);
            assert!(is_gone(&witness));
        }
    }

    #[test]
    fn it_has_the_descriptors_that_it_was_given_and_no_other() {
        let (mut below, end_below) = pipe().unwrap();
        let (mut kept, kept_end) = pipe().unwrap();
        let (gate, gates_end) = pipe().unwrap();
        let (mut above, end_above) = pipe().unwrap();
        // In no order, and more than once.
        let keep = [gate.as_fd(), kept_end.as_fd(), gate.as_fd()];
        let mut child = start(&keep, &|| {
            write(&kept_end, b"x")?;
            read(&gate, &mut [0]).map(drop)
        });
        let mut byte = [0];
        kept.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        drop((end_below, kept_end, end_above));
        assert!(is_at_its_end(&mut below));
        assert!(is_at_its_end(&mut above));
        // It still runs, as it waits for the gate.
        assert_eq!(child.wait(Some(Instant::now())), None);
        (&gates_end).write_all(b"g").unwrap();
        assert_eq!(child.wait(soon()), Some(Ok(())));
        assert!(is_at_its_end(&mut kept));
    }

    #[test]
    fn no_signal_reaches_it_and_the_hosts_mask_is_as_before() {
        let before = SigSet::thread_get_mask();
        let mut child = start(&[], &|| {
            let mask = SigSet::thread_get_mask()?;
            match Signal::iterator().all(|signal| mask.contains(signal) || is_special(signal)) {
                true => Ok(()),
                false => Err(Errno::EINVAL),
            }
        });
        assert_eq!(child.wait(soon()), Some(Ok(())));
        assert_eq!(SigSet::thread_get_mask(), before);
    }

    /// The kernel lets nobody block these.
    fn is_special(signal: Signal) -> bool {
        matches!(signal, Signal::SIGKILL | Signal::SIGSTOP)
    }

    #[test]
    fn it_dies_with_the_thread_that_started_it() {
        let (mut reader, writer) = pipe().unwrap();
        let starter = thread::spawn(move || {
            let child = start(&[writer.as_fd()], &|| {
                write(&writer, b"r")?;
                sleep_for_ever()
            });
            // Only now the child is tied to this thread.
            reader.read_exact(&mut [0]).unwrap();
            child
        });
        let mut child = starter.join().unwrap();
        assert_eq!(child.wait(soon()), Some(Err(Errno::EINTR)));
    }

    /// Runs `host` in a process of its own with one thread, whose result is
    /// the exit status.
    fn in_a_host(host: impl FnOnce() -> i32) -> Pid {
        // SAFETY: the C library makes its allocator usable in the forked process,
        // and nothing else that may be locked is used there.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let status = host();
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(status) }
            }
        }
    }

    #[test]
    fn it_dies_with_its_host() {
        let (mut reader, writer) = pipe().unwrap();
        let host = in_a_host(|| {
            let child = start(&[writer.as_fd()], &|| {
                write(&writer, b"r")?;
                sleep_for_ever()
            });
            std::mem::forget(child);
            let _ = close(writer.as_raw_fd());
            loop {
                pause();
            }
        });
        drop(writer);
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        nix::sys::signal::kill(host, Signal::SIGKILL).unwrap();
        waitpid(host, None).unwrap();
        assert!(is_at_its_end(&mut reader));
    }

    #[test]
    fn the_host_sees_no_child_and_gets_no_signal() {
        extern "C" fn on_signal(_: libc::c_int) {
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(1) }
        }
        let host = in_a_host(|| {
            let handler = SigHandler::Handler(on_signal);
            let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler does nothing but end the process.
            unsafe { sigaction(Signal::SIGCHLD, &action) }.unwrap();
            let mut child = start(&[], &sleep_for_ever);
            let any = || waitpid(None, Some(WaitPidFlag::WNOHANG));
            if any() != Err(Errno::ECHILD) {
                return 2;
            }
            child.kill();
            while wait_for([child.process.as_fd()], soon()) != [true] {}
            // It has ended, and nobody has waited for it yet.
            if any() != Err(Errno::ECHILD) {
                return 3;
            }
            match child.wait(soon()) {
                Some(Err(Errno::EINTR)) => 0,
                _ => 4,
            }
        });
        assert_eq!(waitpid(host, None), Ok(WaitStatus::Exited(host, 0)));
    }

    /// Has the kernel refuse `call` to the calling thread with `errno`.
    fn refuse(call: libc::c_long, errno: i32) {
        let code = |code: u32| code as u16;
        let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let compare = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
        let end = code(libc::BPF_RET | libc::BPF_K);
        let mut filter = [
            // The call's number.
            instruction(code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), 0, 0, 0),
            instruction(compare, 0, 1, call as u32),
            instruction(end, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            instruction(end, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the kernel reads the filter that `program` points to, which
        // outlives the calls.
        let results = unsafe {
            [
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program),
            ]
        };
        assert_eq!(results, [0, 0]);
    }

    #[test]
    fn where_it_is_refused_that_is_said() {
        for errno in [libc::ENOSYS, libc::EPERM] {
            let refused = thread::spawn(move || {
                refuse(libc::SYS_clone3, errno);
                // SAFETY: the body does nothing.
                unsafe { Child::start(&[], &|| Ok(())) }.unwrap_err()
            });
            let error = refused.join().unwrap();
            assert_eq!(error.errno(), errno);
            assert!(error.message().contains("clone3"), "{error}");
        }
        let mut child = thread::scope(|scope| {
            let started = scope.spawn(|| {
                refuse(libc::SYS_close_range, libc::ENOSYS);
                let mut child = start(&[], &|| Ok(()));
                child.wait(soon());
                child
            });
            started.join().unwrap()
        });
        assert_eq!(child.wait(soon()), Some(Err(Errno::ENOSYS)));
    }
}

//! One io_uring, as a queue's thread uses it: entries go in, completions come
//! out, and both happen in as few system calls as can be.
//!
//! **Whose it is.** Only the thread that made it may submit to it
//! (`SINGLE_ISSUER`), and the kernel does everything it has to do for that
//! thread while the thread is inside `io_uring_enter`, and at no other time
//! (`DEFER_TASKRUN`). That doubles the speed at depth 16, and it is what the
//! lifetime of a FUSE entry's memory rests on (uring.rs). A thread that sleeps
//! elsewhere, in epoll, has to have it done in whatever system call it is in
//! (`COOP_TASKRUN`).
//!
//! Behaviour: io_uring_setup(2), io_uring_enter(2); FUSE wants entries of 128
//! bytes, and `SUBMIT_ALL`, so that one bad entry does not hold up the rest.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::unforked::Unforked;

/// The most entries that are queued before they are submitted.
const SUBMISSIONS: u32 = 256;
/// How much of what it has to do for a thread the kernel does at once, if that
/// does not wait: `IO_LOCAL_TW_DEFAULT_MAX`.
const TASKS: u32 = 20;
/// The most completions that the kernel lets a ring hold.
const MOST_COMPLETIONS: u32 = 65536;

/// What has come of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    /// What the entry was marked with.
    pub(crate) mark: u64,
    /// Its result, or a negative errno.
    pub(crate) result: i32,
    /// Whether the same entry will complete again.
    pub(crate) more: bool,
}

/// A command that a file's driver carries out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Command<'a> {
    pub(crate) file: BorrowedFd<'a>,
    /// Which command, as the driver numbers it.
    pub(crate) code: u32,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// What the driver finds in the entry.
    pub(crate) body: [u8; COMMAND_BODY],
}

/// How many bytes of a command are the driver's.
pub(crate) const COMMAND_BODY: usize = 80;

/// `struct io_uring_sqe` of 128 bytes as `IORING_OP_URING_CMD` has it. The
/// io-uring crate's own `UringCmd80` leaves no way to set `len`.
#[derive(Clone, Copy, IntoBytes, FromBytes, Immutable)]
#[repr(C)]
struct CommandEntry {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    cmd_op: u32,
    pad: u32,
    addr: u64,
    len: u32,
    uring_cmd_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    file_index: u32,
    cmd: [u8; COMMAND_BODY],
}

impl Command<'_> {
    /// As an entry of the ring.
    fn entry(&self, mark: u64) -> Entry128 {
        let entry = CommandEntry {
            opcode: opcode::UringCmd80::CODE,
            flags: 0,
            ioprio: 0,
            fd: self.file.as_raw_fd(),
            cmd_op: self.code,
            pad: 0,
            addr: self.addr,
            len: self.len,
            uring_cmd_flags: 0,
            user_data: mark,
            buf_index: 0,
            personality: 0,
            file_index: 0,
            cmd: self.body,
        };
        // SAFETY: both types are the 128 bytes of the kernel's
        // `struct io_uring_sqe`, `repr(C)`, without padding and valid for
        // every pattern of bits; their sizes are compared at compile time.
        unsafe { std::mem::transmute::<CommandEntry, Entry128>(entry) }
    }
}

type Builder = io_uring::Builder<Entry128, cqueue::Entry>;

/// An io_uring.
pub(crate) struct Ring {
    // Dropped, and so forgotten, before the ring is closed.
    _unforked: Unforked,
    inner: IoUring<Entry128, cqueue::Entry>,
    /// How many entries may be in the kernel.
    most: u32,
}

impl Ring {
    /// A ring for the calling thread that may have `in_flight` entries in the
    /// kernel at once.
    pub(crate) fn new(in_flight: usize) -> io::Result<Self> {
        Self::build(in_flight, |builder| {
            builder.setup_defer_taskrun();
        })
    }

    /// As [`new`](Self::new), for a thread that does not sleep in the ring but
    /// until its descriptor is readable.
    pub(crate) fn for_epoll(in_flight: usize) -> io::Result<Self> {
        Self::build(in_flight, |builder| {
            builder.setup_coop_taskrun();
        })
    }

    fn build(in_flight: usize, run_tasks: impl FnOnce(&mut Builder)) -> io::Result<Self> {
        let completions = u32::try_from(in_flight).unwrap_or(MOST_COMPLETIONS);
        let completions = completions.clamp(2 * SUBMISSIONS, MOST_COMPLETIONS);
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_submit_all()
            .setup_single_issuer()
            .setup_taskrun_flag()
            .setup_cqsize(completions);
        run_tasks(&mut builder);
        let inner = builder.build(SUBMISSIONS)?;
        // SAFETY: the ring's descriptor is open as long as the ring is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(inner.as_raw_fd()) };
        Ok(Self {
            _unforked: Unforked::new(fd),
            inner,
            most: completions,
        })
    }

    /// Has the kernel raise `event`, an eventfd, whenever it has something for
    /// this ring's thread that comes after nothing: completions, or what brings
    /// them when the thread enters.
    pub(crate) fn signal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.submitter().register_eventfd(event.as_raw_fd())
    }

    /// Has it raise no eventfd any more: otherwise its closing does, at some
    /// time.
    pub(crate) fn signal_nobody(&self) {
        // Fails only if there was none.
        let _ = self.inner.submitter().unregister_eventfd();
    }

    /// Queues a command; it reaches the kernel with the next call that enters
    /// it.
    ///
    /// # Safety
    ///
    /// The memory that the command speaks of must stay valid, and be used by
    /// nobody else, until the command has completed or the ring is dropped.
    /// Its file must stay open until the kernel has been entered.
    pub(crate) unsafe fn push_command(
        &mut self,
        command: &Command<'_>,
        mark: u64,
    ) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.push(&command.entry(mark)) }
    }

    /// Queues an entry.
    ///
    /// # Safety
    ///
    /// As for [`push_command`](Self::push_command).
    pub(crate) unsafe fn push(&mut self, entry: &Entry128) -> io::Result<()> {
        if self.inner.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller's promise; the entry itself is copied.
        let pushed = unsafe { self.inner.submission().push(entry) };
        // The kernel takes all of them at every entry, unless it is out of
        // memory.
        pushed.map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Queues a look-out for `file` to become readable: once, or every time.
    pub(crate) fn push_poll(&mut self, file: RawFd, always: bool, mark: u64) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(file), libc::POLLIN as u32).multi(always);
        // SAFETY: a poll speaks of no memory.
        unsafe { self.push(&poll.build().user_data(mark).into()) }
    }

    /// Hands over what is queued and runs what the kernel has to do for this
    /// thread. Does not wait.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Runs all that the kernel has to do for this thread, which one call does
    /// only a part of. The flag that says so is not to be waited for: the
    /// kernel raises it after it has added the work, so that it may stay up
    /// when the work has long been done.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        for _ in 0..=self.most / TASKS {
            self.submit()?;
            if !self.inner.submission().taskrun() {
                break;
            }
        }
        Ok(())
    }

    /// As [`submit`](Self::submit), and waits until there is a completion or a
    /// signal.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, least: u32) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        let queued = self.inner.submission().len() as u32;
        // SAFETY: no further argument is passed; whoever queued the entries
        // has promised that what they speak of is valid.
        let entered = unsafe {
            self.inner
                .submitter()
                .enter::<()>(queued, least, GETEVENTS, None)
        };
        match entered {
            Ok(_) => Ok(()),
            // Nothing is lost: what was not taken stays queued.
            Err(e) if is_passing(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The next completion that has arrived; makes no system call.
    pub(crate) fn next(&mut self) -> Option<Completion> {
        let entry = self.inner.completion().next()?;
        Some(Completion {
            mark: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        })
    }

    /// Whether [`submit`](Self::submit) or [`next`](Self::next) would find
    /// something that the kernel has for us; makes no system call.
    pub(crate) fn has_news(&mut self) -> bool {
        // What is still to be run for this thread shows in the flags of the
        // submission queue (also, now and then, what is not any more).
        !self.inner.completion().is_empty() || self.inner.submission().taskrun()
    }

    /// Whether something is queued that the kernel has not been told.
    pub(crate) fn is_unsubmitted(&mut self) -> bool {
        !self.inner.submission().is_empty()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.inner.as_raw_fd()) }
    }
}

impl Drop for Ring {
    /// The kernel may be about to hand this thread something. Closing the ring
    /// would make it give that up, but not while a forked child has a copy of
    /// the ring, and then whoever is concerned would wait as long as the child
    /// lives.
    fn drop(&mut self) {
        // In another thread than the ring's this does nothing.
        let _ = self.settle();
    }
}

/// Whether an entry into the kernel is to be tried again: interrupted, or out
/// of something until completions have been taken.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use nix::sys::eventfd::EventFd;

    #[test]
    fn an_entry_has_the_kernels_size_and_the_command_at_its_place() {
        assert_eq!(size_of::<CommandEntry>(), size_of::<Entry128>());
        assert_eq!(std::mem::offset_of!(CommandEntry, cmd), 48);
        assert_eq!(std::mem::offset_of!(CommandEntry, user_data), 32);
    }

    #[test]
    fn a_look_out_is_told_every_time_and_waiting_ends_with_it() {
        let mut ring = Ring::new(8).unwrap();
        let event = EventFd::new().unwrap();
        ring.push_poll(event.as_fd().as_raw_fd(), true, 7).unwrap();
        ring.submit().unwrap();
        assert_eq!(ring.next(), None);
        for _ in 0..3 {
            event.write(1).unwrap();
            ring.wait().unwrap();
            let completion = ring.next().expect("waiting ends with a completion");
            assert_eq!((completion.mark, completion.more), (7, true));
            assert_eq!(ring.next(), None);
        }
    }

    #[test]
    fn a_command_that_the_file_does_not_know_completes_with_an_error() {
        let mut ring = Ring::new(8).unwrap();
        let event = EventFd::new().unwrap();
        let command = Command {
            file: event.as_fd(),
            code: 1,
            addr: 0,
            len: 0,
            body: [0; COMMAND_BODY],
        };
        // SAFETY: the command speaks of no memory.
        unsafe { ring.push_command(&command, 9) }.unwrap();
        ring.submit().unwrap();
        let completion = ring.next().unwrap();
        assert_eq!((completion.mark, completion.result), (9, -libc::EOPNOTSUPP));
    }
}

//! Having the kernel hand over what clients have written into mapped memory.
//!
//! It does so when they unmap or close the file. If the export ends before,
//! somebody must ask for it, by an fsync of the mounted file. A child process
//! does that (child.rs).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::Mode;
use nix::unistd::fsync;

use super::child::Child;
use super::covered;
use super::mountinfo::{MountId, MountTable};
use crate::error::{Error, Result};

/// How long the child may take to let go of the host's files. Where it closes
/// the last copy of one, another file system may let it wait, which need not
/// ever answer.
const LETTING_GO: Duration = Duration::from_secs(5);

/// A write-back that is under way.
pub(super) struct WriteBack {
    child: Child,
    /// Told when the child has nothing of the host's any more.
    ready: EventFd,
    deadline: Instant,
}

impl WriteBack {
    /// Starts a child that syncs the file of the mount `id`. It has the place
    /// of the file, so the mount may go before it has opened it.
    pub(super) fn begin(id: &MountId) -> Result<Self> {
        let refused = |what: &str, errno: Errno| Error::from_io(what, &errno.into());
        let path = visible_path(id)?;
        // This asks no file system for anything: neither ours, which might not
        // answer for long, nor what else may be there by now.
        let place = open(&*path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| refused("cannot find it", errno))?;
        if !id.admits(place.as_fd()) {
            return Err(Error::new(libc::ESTALE, "another mount is in its place"));
        }
        let ready = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| refused("cannot make an eventfd", errno))?;
        let reopened = CString::new(format!("/proc/self/fd/{}", place.as_raw_fd()))
            .expect("a number has no zero byte");
        let body = || write_back(&reopened, &ready);
        // SAFETY: `write_back` only makes system calls, and `body` owns nothing
        // that would be freed in the child.
        let child = unsafe { Child::start(&[place.as_fd(), ready.as_fd()], &body) }?;
        Ok(Self {
            child,
            ready,
            deadline: Instant::now() + LETTING_GO,
        })
    }

    /// Waits until everything is written back. It is called off if the child
    /// does not even come to begin; it may then wait for the connection's end,
    /// and is to be dropped after that.
    pub(super) fn finish(mut self) -> (nix::Result<()>, Child) {
        let has_begun = self.child.wait_told(self.ready.as_fd(), self.deadline);
        let deadline = (!has_begun).then(Instant::now);
        let result = self.child.wait(deadline).unwrap_or(Err(Errno::ETIMEDOUT));
        self.child.kill();
        (result, self.child)
    }
}

/// Where the mount `id` is, if a look-up of that path ends in it.
fn visible_path(id: &MountId) -> Result<CString> {
    let no_path = |errno: Errno| Error::new(errno as i32, errno.desc());
    let table =
        MountTable::read().map_err(|e| Error::from_io("cannot read the table of mounts", &e))?;
    let entry = table.find(id).ok_or_else(|| no_path(Errno::ENOENT))?;
    if let Some(cover) = table.hiding(entry) {
        return Err(covered(entry, cover));
    }
    CString::new(entry.mount_point.as_os_str().as_bytes()).map_err(|_| no_path(Errno::EINVAL))
}

/// What the child does: only system calls.
fn write_back(file: &CStr, ready: &EventFd) -> nix::Result<()> {
    ready.write(1)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    fsync(open(file, flags, Mode::empty())?)
}

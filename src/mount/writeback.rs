//! Having the kernel hand over what clients have written into mapped memory.
//!
//! It does so when they unmap or close the file. If the export ends before,
//! somebody must ask for it, by an fsync of the mounted file. A child process
//! does that (child.rs).

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
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

/// How long opening the file may take. It is quick unless the driver blocks
/// every queue, and then the unmounting must not wait for it.
const OPENING: Duration = Duration::from_millis(500);

/// A write-back that is under way.
pub(super) struct WriteBack {
    child: Child,
    opened: EventFd,
    is_open: bool,
}

impl WriteBack {
    /// Opens the file of the mount `id`, to be synced.
    pub(super) fn begin(id: &MountId) -> Result<Self> {
        // Before it is opened: what else is there might be a file that hangs.
        let path = visible_path(id)?;
        let opened = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::from_io("cannot make an eventfd", &errno.into()))?;
        let body = || write_back(&path, id, &opened);
        // SAFETY: `write_back` only makes system calls, and `body` owns nothing
        // that would be freed in the child.
        let child = unsafe { Child::start(&[opened.as_fd()], &body) }?;
        Ok(Self {
            child,
            opened,
            is_open: false,
        })
    }

    /// Waits until the file is open, so that it can be unmounted; not for long.
    pub(super) fn wait_open(&mut self) {
        let deadline = Instant::now() + OPENING;
        self.is_open = self.child.wait_told(self.opened.as_fd(), deadline);
    }

    /// Waits until everything is written back, if the file could be opened in
    /// time; otherwise calls it off. The child may wait for the connection's
    /// end, and is to be dropped after that.
    pub(super) fn finish(mut self) -> (nix::Result<()>, Child) {
        let deadline = (!self.is_open).then(Instant::now);
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
fn write_back(path: &CStr, id: &MountId, opened: &EventFd) -> nix::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = open(path, flags, Mode::empty())?;
    if !id.admits(file.as_fd()) {
        return Err(Errno::ESTALE);
    }
    opened.write(1)?;
    fsync(&file)
}

//! Ending a connection for all of its users, by the kernel's control file
//! system (`Documentation/filesystems/fuse/fuse.rst`, "Control filesystem").
//!
//! Closing /dev/fuse ends a connection only when the last copy of the
//! descriptor goes, and a child that the host has forked may hold one. The
//! control file works always, wherever the mount is or is no longer; but only
//! for who may mount.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::{kernel, mountinfo};

/// The power to end one connection.
#[derive(Debug)]
pub(crate) struct Aborter(OwnedFd);

impl Aborter {
    /// For the connection that `device` belongs to, if this process may.
    pub(crate) fn new(device: BorrowedFd<'_>) -> Option<Self> {
        let connection = mountinfo::connection_number(device)?;
        // A mount that nobody sees and that goes with its descriptor.
        let control = kernel::detached_control_file_system().ok()?;
        let path = format!("{connection}/abort");
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = openat(&control, path.as_str(), flags, Mode::empty()).ok()?;
        Some(Self(file))
    }

    /// Ends every request of the connection, and the connection.
    pub(crate) fn abort(&self) {
        // Fails only if the connection has gone.
        let _ = nix::unistd::write(&self.0, b"1");
    }
}

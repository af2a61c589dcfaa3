//! Passthrough: the kernel itself reads the file behind a driver.
//!
//! A backing file is registered with the connection and named in the answer to
//! every OPEN; what is read through such a descriptor, or mapped, never comes
//! to the server. Protocol: the kernel's `fs/fuse/passthrough.c`, `backing.c`
//! and `iomode.c`; it wants one mode, and one backing file, for all opens of
//! an inode.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{ECRYPTFS_SUPER_MAGIC, FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, fstatfs};

use crate::error::{Error, Result};
use crate::unforked::FuseDevice;

mod ioctl {
    /// `struct fuse_backing_map`.
    #[repr(C)]
    pub(super) struct BackingMap {
        pub(super) fd: i32,
        pub(super) flags: u32,
        pub(super) padding: u64,
    }

    nix::ioctl_write_ptr!(
        /// `FUSE_DEV_IOC_BACKING_OPEN`: returns the backing file's id.
        fuse_dev_backing_open, 229, 1, BackingMap
    );
    nix::ioctl_write_ptr!(
        /// `FUSE_DEV_IOC_BACKING_CLOSE`: takes the id.
        fuse_dev_backing_close, 229, 2, u32
    );
}

/// What the kernel calls a backing file in OPEN's answer.
pub(crate) type BackingId = i32;

/// A file that the kernel may read for one connection's clients. Dropping it
/// takes that back for opens to come; who has the file open keeps it.
#[derive(Debug)]
pub(crate) struct Backing {
    device: Arc<FuseDevice>,
    id: BackingId,
}

impl Backing {
    /// Registers `file` with the connection of `device`, which has agreed to
    /// passthrough.
    pub(crate) fn open(device: Arc<FuseDevice>, file: BorrowedFd<'_>) -> Result<Self> {
        let map = ioctl::BackingMap {
            fd: file.as_raw_fd(),
            flags: 0,
            padding: 0,
        };
        // SAFETY: the ioctl reads one map, a live local, takes a reference of
        // its own to the file, and keeps nothing else.
        match unsafe { ioctl::fuse_dev_backing_open(device.as_raw_fd(), &map) } {
            Ok(id) => Ok(Self { device, id }),
            Err(errno) => Err(refused(errno)),
        }
    }

    pub(crate) fn id(&self) -> BackingId {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let id = self.id as u32;
        // SAFETY: the ioctl reads one u32, a live local, and keeps nothing.
        if let Err(errno) = unsafe { ioctl::fuse_dev_backing_close(self.device.as_raw_fd(), &id) } {
            log::debug!("the backing file was not closed: {errno}");
        }
    }
}

fn refused(errno: Errno) -> Error {
    let reason = match errno {
        Errno::EPERM => {
            "it wants CAP_SYS_ADMIN in the initial user namespace; \
             start the export as root, or without \"passthrough\""
        }
        Errno::ELOOP => {
            "too many file systems lie on top of one another under it; \
             move it to a plain one, or export it without \"passthrough\""
        }
        errno => errno.desc(),
    };
    let text = format!("the kernel does not take the driver's backing file: {reason}");
    Error::new(errno as i32, text)
}

/// The error of a kernel that does not agree to passthrough.
pub(crate) fn not_offered() -> Error {
    Error::new(
        libc::EOPNOTSUPP,
        "this kernel has no passthrough, which needs Linux 6.9 or later with \
         CONFIG_FUSE_PASSTHROUGH; export without \"passthrough\"",
    )
}

/// The driver's backing file, if the kernel may read it in the place of a
/// device of `length` bytes.
pub(crate) fn checked(file: Option<BorrowedFd<'_>>, length: u64) -> Result<BorrowedFd<'_>> {
    let Some(file) = file else {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            "the driver has no backing file that the kernel could read; \
             export it without \"passthrough\"",
        ));
    };
    let failed = |e: Errno| Error::from_io("the driver's backing file", &e.into());
    let stat = fstat(file).map_err(failed)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Error::new(
            libc::EINVAL,
            "the driver's backing file is not a regular file, and the kernel reads no other; \
             export it without \"passthrough\"",
        ));
    }
    // The kernel reads up to the file's end, whatever the device's is.
    if stat.st_size as u64 != length {
        let text = format!(
            "the device has {length} bytes and its backing file {}; \
             passthrough needs them to be equal",
            stat.st_size
        );
        return Err(Error::new(libc::EINVAL, text));
    }
    Ok(file)
}

/// How deep the kernel is to let file systems be stacked under the export,
/// which counts as one of them: 2, its limit, only where it takes that. Less
/// leaves room for others on top.
pub(crate) fn stack_depth(file: BorrowedFd<'_>) -> u32 {
    let stacked = [
        OVERLAYFS_SUPER_MAGIC,
        ECRYPTFS_SUPER_MAGIC,
        FUSE_SUPER_MAGIC,
    ];
    match fstatfs(file) {
        Ok(fs) if stacked.contains(&fs.filesystem_type()) => 2,
        _ => 1,
    }
}

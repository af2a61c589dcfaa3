//! The file to mount over: finding it, checking it, and clearing dead mounts
//! away.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag};

use super::mountinfo::{MountId, MountTable};
use super::registry::Claim;
use super::{Unmount, failed, kernel, quoted, unmount_path};
use crate::error::{Error, Result};

/// How many dead mounts on top of each other are cleared away.
const STALE_LIMIT: usize = 32;

/// A regular file that is ours to mount over.
#[derive(Debug)]
pub(super) struct Mountpoint {
    file: OwnedFd,
    claim: Claim,
}

impl Mountpoint {
    /// Opens and checks `path`, and claims it for this process.
    pub(super) fn claim(path: &Path) -> Result<Self> {
        for _ in 0..STALE_LIMIT {
            let candidate = Self::open(path)?;
            match kernel::present_mode(candidate.file()) {
                Ok(mode) => {
                    require_regular(path, mode)?;
                    return Ok(candidate);
                }
                // The last when a server with io_uring is just dying.
                Err(errno @ (Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ECANCELED)) => {
                    candidate.remove_stale(path, errno)?;
                }
                Err(errno) => return Err(failed(path, "cannot use the mountpoint", errno)),
            }
        }
        let message = format!(
            "{}: more than {STALE_LIMIT} dead mounts lie on it; unmount them",
            quoted(path)
        );
        Err(Error::new(libc::ELOOP, message))
    }

    /// Opens `path` without touching what it is, and claims it. The claim comes
    /// before any question to the file, which may be one of our own exports.
    fn open(path: &Path) -> Result<Self> {
        let file = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| failed(path, "cannot open the mountpoint", errno))?;
        let on = MountId::of_file(file.as_fd());
        let claim = Claim::new(canonical_path(file.as_fd(), path), on.as_ref());
        let claim = claim.ok_or_else(|| already_exported(path))?;
        Ok(Self { file, claim })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Absolute, and without symbolic links.
    pub(super) fn path(&self) -> &Path {
        self.claim.path()
    }

    pub(super) fn into_claim(self) -> Claim {
        self.claim
    }

    /// Unmounts the FUSE file whose server is dead, which is what `errno` says.
    fn remove_stale(self, path: &Path, errno: Errno) -> Result<()> {
        if kernel::cached_type(self.file()) == Some(SFlag::S_IFDIR) {
            return Err(not_regular(path, SFlag::S_IFDIR));
        }
        if !self.is_topmost_fuse_mount() {
            return Err(failed(path, "cannot use the mountpoint", errno));
        }
        log::warn!(
            "{}: removing the mount of a server that is gone",
            quoted(path)
        );
        unmount_path(self.path(), Unmount::Lazy)
    }

    fn is_topmost_fuse_mount(&self) -> bool {
        let Some(id) = MountId::of_file(self.file()) else {
            return false;
        };
        MountTable::read().is_ok_and(|table| {
            table
                .topmost(self.path())
                .is_some_and(|entry| entry.is_fuse() && entry.id == id.id)
        })
    }
}

/// A path that means an open file, even if it has been renamed.
pub(super) fn descriptor_path(file: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/thread-self/fd/{}", file.as_raw_fd()).into()
}

fn canonical_path(file: BorrowedFd<'_>, path: &Path) -> PathBuf {
    // Without /proc this sees through no symbolic link, which is all we can do.
    fs::read_link(descriptor_path(file))
        .or_else(|_| std::path::absolute(path))
        .unwrap_or_else(|_| path.to_owned())
}

fn already_exported(path: &Path) -> Error {
    let message = format!(
        "there already is an export on {}; stop it first, or choose another mountpoint",
        quoted(path)
    );
    Error::new(libc::EEXIST, message)
}

fn require_regular(path: &Path, mode: libc::mode_t) -> Result<()> {
    let kind = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFREG {
        return Ok(());
    }
    Err(not_regular(path, kind))
}

fn not_regular(path: &Path, kind: SFlag) -> Error {
    let (errno, name) = match kind {
        SFlag::S_IFDIR => (libc::EISDIR, "a directory"),
        SFlag::S_IFIFO => (libc::EINVAL, "a FIFO"),
        SFlag::S_IFCHR => (libc::EINVAL, "a character device"),
        SFlag::S_IFBLK => (libc::EINVAL, "a block device"),
        SFlag::S_IFSOCK => (libc::EINVAL, "a socket"),
        _ => (libc::EINVAL, "something else"),
    };
    let message = format!(
        "{} is not a regular file but {name}; the mountpoint must be an existing regular file",
        quoted(path)
    );
    Error::new(errno, message)
}

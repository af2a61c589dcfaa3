//! Taking over a descriptor that the parent process left open for us.
//!
//! A number is no proof that one owns the descriptor, so there is no safe
//! conversion. Sending the number through a socket to ourselves yields a
//! descriptor that is ours without doubt; then the old one can be closed.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::failure::{Failure, Result};

/// The number in `/dev/fd/N`, if the path has that form.
pub fn number(path: &Path) -> Option<RawFd> {
    let digits = path.as_os_str().as_bytes().strip_prefix(b"/dev/fd/")?;
    // `parse` would take a sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Takes over `/dev/fd/N`, which must be a mounted `/dev/fuse`. The number is
/// closed, so that the mount ends with the export.
pub fn take(path: &Path, number: RawFd) -> Result<OwnedFd> {
    let fail = |e: &io::Error| {
        Failure::io(path.display(), e).advise("pass an open descriptor of a mounted /dev/fuse")
    };
    let fd = duplicate(number).map_err(|e| fail(&e))?;
    if !is_fuse(&fd).map_err(|e| fail(&e))? {
        return Err(
            Failure::new(path.display(), "is not a /dev/fuse descriptor")
                .advise("pass one that was mounted"),
        );
    }
    nix::unistd::close(number).map_err(|e| fail(&e.into()))?;
    Ok(fd)
}

fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let byte = [0];
    sendmsg::<()>(
        std::os::fd::AsRawFd::as_raw_fd(&ours),
        &[IoSlice::new(&byte)],
        &[ControlMessage::ScmRights(&[number])],
        MsgFlags::empty(),
        None,
    )?;

    let mut byte = [0];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut messages = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        theirs.as_fd(),
        &mut [IoSliceMut::new(&mut byte)],
        &mut messages,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    messages
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        // The process has no room for one more.
        .ok_or_else(|| Errno::EMFILE.into())
}

fn is_fuse(fd: &OwnedFd) -> io::Result<bool> {
    /// The character device that `/dev/fuse` is on every Linux.
    const FUSE: u64 = nix::sys::stat::makedev(10, 229);
    let status = nix::sys::stat::fstat(fd)?;
    let is_device = status.st_mode & libc::S_IFMT == libc::S_IFCHR;
    Ok(is_device && status.st_rdev == FUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::IntoRawFd;

    #[test]
    fn only_plain_numbers_are_descriptors() {
        assert_eq!(number("/dev/fd/17".as_ref()), Some(17));
        for path in [
            "/dev/fd/",
            "/dev/fd/+1",
            "/dev/fd/1/x",
            "/dev/fd/99999999999",
            "fd/1",
        ] {
            assert_eq!(number(path.as_ref()), None, "{path}");
        }
    }

    #[test]
    fn the_duplicate_is_the_same_open_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        file.rewind().unwrap();
        let mut copy = File::from(duplicate(file.into_raw_fd()).unwrap());
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn what_is_no_fuse_descriptor_is_refused() {
        let number = File::open("/dev/null").unwrap().into_raw_fd();
        let path = format!("/dev/fd/{number}");
        let failure = take(path.as_ref(), number).unwrap_err();
        assert!(
            failure
                .to_string()
                .ends_with("is not a /dev/fuse descriptor; pass one that was mounted")
        );
        let failure = take("/dev/fd/65000".as_ref(), 65000).unwrap_err();
        assert!(
            failure
                .to_string()
                .starts_with("/dev/fd/65000: Bad file number;"),
            "{failure}"
        );
    }
}

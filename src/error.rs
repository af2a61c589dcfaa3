//! What a failed call says: an errno for programs, a sentence for people.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// A failure: an errno, and a message that names the object and the reason.
///
/// Neither is part of the API's promise except where a function documents the
/// errno of a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    errno: i32,
    message: String,
}

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with a positive `errno` and a message that says it all.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Self {
            errno,
            message: message.into(),
        }
    }

    /// What was attempted, followed by why it failed.
    pub(crate) fn from_io(what: impl fmt::Display, error: &io::Error) -> Self {
        let errno = errno_of(error);
        let reason = match error.raw_os_error() {
            Some(code) => Errno::from_raw(code).desc().to_owned(),
            None => error.to_string(),
        };
        Self::new(errno, format!("{what}: {reason}"))
    }

    /// The positive errno.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The message: no newline, no errno number.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::from_raw_os_error(error.errno)
    }
}

/// The errno that stands for `error`: its own, or that of its kind.
pub(crate) fn errno_of(error: &io::Error) -> i32 {
    use io::ErrorKind as K;
    if let Some(code) = error.raw_os_error() {
        return code;
    }
    match error.kind() {
        K::Unsupported => libc::EOPNOTSUPP,
        K::InvalidInput => libc::EINVAL,
        K::PermissionDenied => libc::EPERM,
        K::StorageFull => libc::ENOSPC,
        K::FileTooLarge => libc::EFBIG,
        K::ReadOnlyFilesystem => libc::EROFS,
        K::OutOfMemory => libc::ENOMEM,
        K::TimedOut => libc::ETIMEDOUT,
        K::QuotaExceeded => libc::EDQUOT,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_errno_and_names_the_object() {
        let e = Error::from_io("disk.img", &io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(e.errno(), libc::ENOENT);
        assert_eq!(e.to_string(), "disk.img: No such file or directory");
        assert_eq!(errno_of(&io::ErrorKind::StorageFull.into()), libc::ENOSPC);
        assert_eq!(errno_of(&io::Error::other("odd")), libc::EIO);
    }
}

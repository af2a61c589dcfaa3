//! How the daemon reports a failure: what it is about, why, and what to do.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// A failure in words; shown as `OBJECT: REASON; WHAT TO DO`.
#[derive(Debug)]
pub struct Failure(String);

/// What can fail with words for people.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Something is wrong with `object`.
    pub fn new(object: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self(format!("{object}: {reason}"))
    }

    /// A call that concerned `object` failed.
    pub fn io(object: impl fmt::Display, error: &io::Error) -> Self {
        Self::new(object, Reason(error))
    }

    /// Adds what the user can do about it.
    pub fn advise(self, advice: &str) -> Self {
        Self(format!("{}; {advice}", self.0))
    }
}

impl From<blkfuse::Error> for Failure {
    /// The library's messages name the object and the reason.
    fn from(error: blkfuse::Error) -> Self {
        Self(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An error's text without the `(os error N)` that std puts behind it.
pub struct Reason<'a>(pub &'a io::Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.raw_os_error() {
            Some(code) => f.write_str(Errno::from_raw(code).desc()),
            None => self.0.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_object_reason_and_advice() {
        let gone = io::Error::from_raw_os_error(Errno::ENOENT as i32);
        let failure = Failure::io("disk.img", &gone);
        assert_eq!(failure.to_string(), "disk.img: No such file or directory");
        assert_eq!(
            failure.advise("name an image").to_string(),
            "disk.img: No such file or directory; name an image"
        );
    }
}

//! How a function of the C API fails: a negative errno, and a message for its
//! thread.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::control::panic_message;
use crate::error::{Error, Result};

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function; an error or a panic in it becomes a negative
/// errno and this thread's message.
pub(super) fn guard(body: impl FnOnce() -> Result<c_int>) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = format!("a defect in blkfuse: {}", panic_message(&*panic));
        Err(Error::new(libc::ENOTRECOVERABLE, text))
    });
    outcome.unwrap_or_else(|error| {
        let text = c_text(error.message());
        // There is none any more in a thread that is ending.
        let _ = MESSAGE.try_with(|message| message.replace(text));
        match error.errno() {
            errno @ 1..=4095 => -errno,
            // Must not pass for success, whatever a driver made of it.
            _ => -libc::EIO,
        }
    })
}

/// Text for C, which ends at the first NUL.
pub(super) fn c_text(text: &str) -> CString {
    let bytes: Vec<u8> = text.bytes().filter(|b| *b != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

/// This thread's message.
pub(super) fn failed() -> *const c_char {
    MESSAGE
        .try_with(|message| message.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

pub(super) fn invalid(text: &str) -> Error {
    Error::new(libc::EINVAL, text)
}

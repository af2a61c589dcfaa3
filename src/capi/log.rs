//! The log, for hosts that are not Rust programs.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::RwLock;

use super::error::{c_text, guard, invalid};
use crate::error::Error;

/// Something failed; the export or the operation does not go on.
pub const BLKFUSE_LOG_ERROR: u32 = 1;
/// Something is not as it should be, and was dealt with.
pub const BLKFUSE_LOG_WARN: u32 = 2;
/// A fact worth a line: started, unmounted from outside, fell back.
pub const BLKFUSE_LOG_INFO: u32 = 3;
/// What helps to find a defect.
pub const BLKFUSE_LOG_DEBUG: u32 = 4;

/// Takes one line of the log. May be called from any thread, also from
/// several at once, and must not call blkfuse. `message` is valid during the
/// call.
pub type blkfuse_log_callback =
    Option<unsafe extern "C" fn(opaque: *mut c_void, level: u32, message: *const c_char)>;

struct Target {
    callback: unsafe extern "C" fn(*mut c_void, u32, *const c_char),
    opaque: *mut c_void,
}

// SAFETY: the host promises that its callback can be called from any thread;
// the pointer is only ever handed to it.
unsafe impl Send for Target {}
// SAFETY: as above, and from several threads at once.
unsafe impl Sync for Target {}

static TARGET: RwLock<Option<Target>> = RwLock::new(None);

/// Whether the process's logger is ours. Changed only with `TARGET` locked.
static INSTALLED: AtomicBool = AtomicBool::new(false);

struct Bridge;

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let target = TARGET.read();
        let Some(target) = target.as_ref() else {
            return;
        };
        let text = c_text(&record.args().to_string());
        // SAFETY: the host promised that callback and opaque stay valid until
        // they are replaced, which the lock holds up until we are done.
        unsafe { (target.callback)(target.opaque, record.level() as u32, text.as_ptr()) };
    }

    fn flush(&self) {}
}

/// Sends the library's log to `callback`, with everything up to `level`
/// (BLKFUSE_LOG_*). NULL ends that, whatever `level` is. There is one log in a
/// process; without a callback nothing is logged. When this returns, the
/// callback that it replaced is not running and will not be called again.
///
/// Returns 0; -EINVAL: no such level; -EBUSY: the process has a logger that is
/// not ours, as a Rust program may.
///
/// # Safety
/// `callback` and `opaque` must stay valid until they are replaced. Must not
/// be called from within the callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_set_log_callback(
    level: u32,
    callback: blkfuse_log_callback,
    opaque: *mut c_void,
) -> c_int {
    guard(|| {
        let Some(callback) = callback else {
            let mut target = TARGET.write();
            if target.take().is_some() {
                log::set_max_level(LevelFilter::Off);
            }
            return Ok(0);
        };
        let filter = match level {
            BLKFUSE_LOG_ERROR => LevelFilter::Error,
            BLKFUSE_LOG_WARN => LevelFilter::Warn,
            BLKFUSE_LOG_INFO => LevelFilter::Info,
            BLKFUSE_LOG_DEBUG => LevelFilter::Debug,
            _ => return Err(invalid("no such log level")),
        };
        let mut target = TARGET.write();
        if !INSTALLED.load(Relaxed) {
            log::set_logger(&Bridge).map_err(|_| {
                let text = "this process has a logger that is not blkfuse's";
                Error::new(libc::EBUSY, text)
            })?;
            INSTALLED.store(true, Relaxed);
        }
        *target = Some(Target { callback, opaque });
        log::set_max_level(filter);
        Ok(0)
    })
}

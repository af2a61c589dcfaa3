//! The C API: argument checks, ownership, panics into error codes.
//!
//! Nothing here decides anything about exports: each function checks what C
//! gave it and calls the Rust API, of which the C callbacks are one driver.
//! `include/blkfuse.h` is generated from these files.
#![allow(non_camel_case_types, reason = "these are the names that C sees")]

mod driver;
mod error;
#[cfg(test)]
mod layout;
mod log;
mod queue;
mod request;
mod stats;

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::Mutex;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::export::{Builder, Export, Stop};
use crate::properties::{self, Value, View};
pub use driver::CDriver;
use driver::blkfuse_driver_ops;
use error::{failed, guard, invalid};

/// blkfuse_export_stop(): end requests that wait with an error at once, by
/// aborting the connection, instead of serving what the unmount needs.
pub const BLKFUSE_STOP_FORCE: u32 = 1;
/// blkfuse_export_stop(): only if nobody has the file open; else -EBUSY.
pub const BLKFUSE_STOP_IF_IDLE: u32 = 2;

/// An export: a block device that appears as a regular file.
///
/// Life cycle: created, started, stopping, deleted; never back. Every function
/// that takes one may be called from any thread, and from several at once,
/// but none after or during blkfuse_export_delete() of the same export.
pub struct blkfuse_export {
    driver: CDriver,
    config: Mutex<Config>,
    starting: AtomicBool,
    started: OnceLock<Export>,
}

impl blkfuse_export {
    fn started(&self) -> Result<&Export> {
        self.started
            .get()
            .ok_or_else(|| Error::new(libc::EINVAL, "the export is not started"))
    }

    fn set(&self, key: &str, value: Value) -> Result<()> {
        let mut config = self.config.lock();
        if self.starting.load(SeqCst) {
            let text = format!("\"{key}\" can be set only before the start");
            return Err(Error::new(libc::EBUSY, text));
        }
        properties::set(&mut config, key, value)
    }

    fn get(&self, key: &str) -> Result<Value> {
        let config = self.config.lock().clone();
        let view = View {
            config: &config,
            export: self.started.get(),
        };
        properties::get(&view, key)
    }

    fn start(&self) -> Result<()> {
        let config = {
            let config = self.config.lock();
            if self.starting.swap(true, SeqCst) {
                return Err(Error::new(libc::EINVAL, "the export was started before"));
            }
            config.clone()
        };
        // Also if the start panics: an export must stay deletable.
        let starting = Starting(&self.starting);
        let device = config.fuse_fd;
        self.start_with(config)?;
        std::mem::forget(starting);
        if let Some(number) = device {
            // SAFETY: by the contract of "fuse-fd" a successful start takes
            // over the descriptor that the host gave; nobody else closes it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(())
    }

    fn start_with(&self, config: Config) -> Result<()> {
        let device = config.fuse_fd.map(duplicate).transpose()?;
        let builder = Builder::new(self.driver.again(), config);
        let builder = match device {
            Some(device) => builder.fuse_fd(device),
            None => builder,
        };
        let set = self.started.set(builder.start()?);
        debug_assert!(set.is_ok(), "starting excludes a second start");
        Ok(())
    }
}

/// A start that has not succeeded; its end lets another one be tried.
struct Starting<'a>(&'a AtomicBool);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

const _: fn() = || {
    fn any_thread<T: Send + Sync>() {}
    any_thread::<blkfuse_export>();
};

/// A descriptor of our own for what the host's `number` refers to, so that
/// the host keeps its own if the start fails.
fn duplicate(number: RawFd) -> Result<OwnedFd> {
    // SAFETY: fcntl takes any number and touches no memory.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::from_io(format!("fuse-fd {number}"), &error));
    }
    // SAFETY: fcntl has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The export behind a handle.
///
/// # Safety
/// `export` is NULL or a live handle, as every function's contract demands.
unsafe fn export_ref<'a>(export: *const blkfuse_export) -> Result<&'a blkfuse_export> {
    // SAFETY: the caller's promise.
    unsafe { export.as_ref() }.ok_or_else(|| invalid("the export is NULL"))
}

/// The text behind a pointer.
///
/// # Safety
/// `text` is NULL or a terminated string that lives as long as is needed.
unsafe fn string<'a>(text: *const c_char, what: &str) -> Result<&'a CStr> {
    if text.is_null() {
        return Err(invalid(&format!("the {what} is NULL")));
    }
    // SAFETY: the caller's promise, and it is not NULL.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// # Safety
/// As [`string`].
unsafe fn key<'a>(key: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    let key = unsafe { string(key, "key") }?;
    key.to_str().map_err(|_| invalid("the key is not UTF-8"))
}

fn timeout(milliseconds: i64) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// Creates an export of the device behind `ops` and stores it in `*out`.
///
/// `ops` is copied. `opaque` is passed to every callback and must stay valid
/// until ops->deleted was called. Nothing is mounted yet, and no callback is
/// called before blkfuse_export_start(). On failure `*out` is unchanged, and
/// `deleted` is not called.
///
/// Returns 0; -EINVAL: a pointer is NULL, or `struct_size` cannot be right, or
/// a required callback is missing, or `request_ctx_size` is too large;
/// -ENOTSUP: the table's API version is not one that this library knows;
/// -E2BIG: the table has callbacks that this library does not know.
///
/// # Safety
/// `out` and `ops` must point to what their types say, the latter to
/// `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_create(
    out: *mut *mut blkfuse_export,
    ops: *const blkfuse_driver_ops,
    opaque: *mut c_void,
) -> c_int {
    guard(|| {
        if out.is_null() {
            return Err(invalid("the place for the export is NULL"));
        }
        // SAFETY: the caller's promise.
        let driver = unsafe { CDriver::new(ops.cast(), opaque) }?;
        let export = Box::new(blkfuse_export {
            driver,
            config: Mutex::new(Config::default()),
            starting: AtomicBool::new(false),
            started: OnceLock::new(),
        });
        // SAFETY: the caller's promise, and it is not NULL.
        unsafe { *out = Box::into_raw(export) };
        Ok(0)
    })
}

/// Sets a property before the start.
///
/// | key         | type | default   | meaning                                   |
/// |-------------|------|-----------|-------------------------------------------|
/// | mountpoint  | str  |           | the existing regular file to appear at    |
/// | fuse-fd     | u64  |           | instead of mounting: the descriptor of a mounted /dev/fuse whose INIT nobody has read; mount it with default_permissions, which makes the kernel check the file's mode, and max_read=1048576, or what max-request says; a successful start takes it over |
/// | source      | str  | blkfuse   | what is shown as the mounted device       |
/// | writable    | bool | off       | allow writing                             |
/// | growable    | bool | off       | let writes past the end grow the file     |
/// | passthrough | bool | off       | have the kernel read ops->backing_fd itself, at the bare file's speed, in the place of ops->read; see below |
/// | allow-other | str  | auto      | who else may use the file: on, off, or auto (on if the system permits it) |
/// | queues      | u64  | 0         | how many queues serve it, each with a thread; 0: one for each CPU available, at most 8; after the start: how many there are |
/// | threads     | str  | library   | whose threads these are: library, or host: the host's own attach themselves to the queues, blkfuse_export_get_queue(), and dispatch them from their event loops; clients wait until they do, and over io_uring the process must be allowed to run on every CPU |
/// | io-uring    | str  | auto      | whether requests come through FUSE-over-io_uring: off; on, and start fails where that cannot be; or auto (where it is to be had and has no known defects) |
/// | queue-depth | u64  |           | over io_uring: entries for each of the kernel's ring queues, of which there is one for every possible CPU; 1 to 1024; if not set, at most 64, as memory-budget allows |
/// | max-request | u64  | 1048576   | bytes of the largest read and write; a multiple of 4096 from 65536 to 1048576; if not set, over io_uring it may be less, as memory-budget allows; after the start: what was negotiated |
/// | memory-budget | u64 | 268435456 | bytes that io_uring's buffers may take |
///
/// io_uring's buffers take possible CPUs x queue-depth x (4096 + max-request)
/// bytes. To fit memory-budget, queue-depth is lowered, to 4 at first (or as
/// many as there are queues for each possible CPU); then max-request, down to
/// 65536; then queue-depth, down to 1. What was set is not lowered: if it does
/// not fit, io_uring cannot be used.
///
/// These can only be read: state (str: created, started, stopping, ended),
/// transport (str), protocol (str: 7.45), mount-method (str: fsmount, mount,
/// fusermount3, fuse-fd), last-error (str: why the export halted, or empty).
///
/// "passthrough" is only for a read-only export of a device that is as long as
/// its backing file, a regular one, by a process with CAP_SYS_ADMIN in the
/// initial user namespace, since Linux 6.9; else blkfuse_export_start() fails.
/// Reads are then out of the export's hands: they are not held up by a drain,
/// not counted in the statistics, not limited to the device's length, and who
/// has the file open when the export ends can go on reading. They are what
/// reads of the backing file are: O_DIRECT needs the alignment that its file
/// system wants, and other reads go through the page cache.
/// blkfuse_export_resized() fails with -EINVAL while the two lengths differ.
///
/// Returns 0; -ENOENT: no such property; -EINVAL: the wrong type or value;
/// -EBUSY: the export was started, or is being started; -EPERM: the property
/// can only be read.
///
/// # Safety
/// `export` must be a live export or NULL, `key` a string or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_set_bool(
    export: *mut blkfuse_export,
    key: *const c_char,
    value: bool,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key) = unsafe { (export_ref(export)?, self::key(key)?) };
        export.set(key, Value::Bool(value)).map(|()| 0)
    })
}

/// Sets a numeric property; see blkfuse_export_set_bool().
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_set_u64(
    export: *mut blkfuse_export,
    key: *const c_char,
    value: u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key) = unsafe { (export_ref(export)?, self::key(key)?) };
        export.set(key, Value::U64(value)).map(|()| 0)
    })
}

/// Sets a property of any type from text (a bool: on or off); see
/// blkfuse_export_set_bool(). `value` is copied; paths need not be UTF-8.
///
/// # Safety
/// As there; `value` must be a string or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_set_str(
    export: *mut blkfuse_export,
    key: *const c_char,
    value: *const c_char,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key, value) = unsafe {
            (
                export_ref(export)?,
                self::key(key)?,
                string(value, "value")?,
            )
        };
        let value = OsStr::from_bytes(value.to_bytes()).to_owned();
        export.set(key, Value::Str(value)).map(|()| 0)
    })
}

/// Reads a property into `*value`; see blkfuse_export_set_bool() for the list.
///
/// Returns 0; -ENOENT: no such property; -EINVAL: it is of another type;
/// -ENODATA: it has no value at this time. On failure `*value` is unchanged.
///
/// # Safety
/// `export` must be a live export or NULL, `key` a string or NULL, `value`
/// writable or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_get_bool(
    export: *const blkfuse_export,
    key: *const c_char,
    value: *mut bool,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key) = unsafe { (export_ref(export)?, self::key(key)?) };
        let Value::Bool(got) = export.get(key)? else {
            return Err(invalid(&format!("\"{key}\" is no bool")));
        };
        // SAFETY: the caller's promise.
        let value = unsafe { value.as_mut() }.ok_or_else(|| invalid("the value is NULL"))?;
        *value = got;
        Ok(0)
    })
}

/// Reads a numeric property into `*value`; see blkfuse_export_get_bool().
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_get_u64(
    export: *const blkfuse_export,
    key: *const c_char,
    value: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key) = unsafe { (export_ref(export)?, self::key(key)?) };
        let Value::U64(got) = export.get(key)? else {
            return Err(invalid(&format!("\"{key}\" is no number")));
        };
        // SAFETY: the caller's promise.
        let value = unsafe { value.as_mut() }.ok_or_else(|| invalid("the value is NULL"))?;
        *value = got;
        Ok(0)
    })
}

/// Reads a property of any type as text into `buffer` of `size` bytes, with a
/// terminating NUL. Returns the text's length in bytes without the NUL;
/// -ERANGE: `size` is not more than that, and nothing was stored. Otherwise
/// as blkfuse_export_get_bool().
///
/// # Safety
/// As there; `buffer` must have room for `size` bytes, or be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_get_str(
    export: *const blkfuse_export,
    key: *const c_char,
    buffer: *mut c_char,
    size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let (export, key) = unsafe { (export_ref(export)?, self::key(key)?) };
        let text = match export.get(key)? {
            Value::Str(text) => text,
            Value::Bool(value) => if value { "on" } else { "off" }.into(),
            Value::U64(value) => value.to_string().into(),
        };
        let bytes = text.as_bytes();
        if buffer.is_null() {
            return Err(invalid("the buffer is NULL"));
        }
        if size <= bytes.len() {
            let text = format!("\"{key}\" needs {} bytes", bytes.len() + 1);
            return Err(Error::new(libc::ERANGE, text));
        }
        // SAFETY: the caller promises room for `size` bytes, which is more
        // than the text has; the text is memory of our own.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), buffer, bytes.len());
            *buffer.add(bytes.len()) = 0;
        }
        Ok(bytes.len() as c_int)
    })
}

/// Mounts the file and begins to serve it. When this returns 0 the file can be
/// used. When it fails nothing is left behind, and it can be tried again after
/// the properties were changed.
///
/// Calls length, limits and queue_start, the latter on the queues' threads,
/// and waits for them. Data callbacks and the event STARTED may come before
/// this returns; until then the export does not count as started.
///
/// Returns 0; -EINVAL: it was started before, or the settings contradict each
/// other; or another negative errno. The message says what of which object
/// failed, and what to do.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_start(export: *mut blkfuse_export) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| unsafe { export_ref(export) }?.start().map(|()| 0))
}

/// Begins a drain. From now on no request is begun; those that arrive wait.
/// Drains nest: requests are begun again when as many
/// blkfuse_export_drain_end() have followed. Does not block.
///
/// Returns 0; -EDEADLK: called from a callback of this export; -EINVAL: not
/// started.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_drain_begin(export: *mut blkfuse_export) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        export.drain_begin().map(|()| 0)
    })
}

/// Whether a request is still in flight: 1 or 0. Does not block. In a drain,
/// 0 means that no callback for a request is running or pending, and none will
/// start. ops->idle is called when that becomes so. -EINVAL: not started.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_drain_poll(export: *mut blkfuse_export) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        Ok(export.drain_poll().into())
    })
}

/// Ends a drain; with the last one, requests that have waited are served.
/// Does not block. -EINVAL: there is no drain, or not started.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_drain_end(export: *mut blkfuse_export) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        export.drain_end().map(|()| 0)
    })
}

/// Waits until every request begun so far is answered, holding later ones up
/// meanwhile. Waits at most `timeout_ms` milliseconds, or without end if that
/// is negative. Must not be called by a thread that is needed to complete
/// requests.
///
/// Returns 0; -ETIMEDOUT; -EDEADLK: called from a callback of this export, or by
/// a thread that is attached to one of its queues; -EINVAL: not started.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_drain(
    export: *mut blkfuse_export,
    timeout_ms: i64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        export.drain(timeout(timeout_ms)).map(|()| 0)
    })
}

/// The device's length has changed without a client's doing. Calls ops->length
/// and tells the kernel: when this returns, clients that ask see the new length;
/// asynchronous reads and appends through open descriptors go by it, too, unless
/// this is called within a drain or a callback, or by a thread that is attached
/// to a queue, and the length grew within a page (of 4096 bytes): then from the
/// next stat on. Does not wait for clients'
/// truncations that are under way; whichever comes last counts.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_resized(export: *mut blkfuse_export) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        export.resized().map(|()| 0)
    })
}

/// Asks for the end: the file vanishes, also while it is open; requests in
/// flight are answered when the driver completes them; whoever still has the
/// file open gets errors. What clients have written into mapped memory is
/// written back after the file has vanished, and requests are served until it
/// is, except with BLKFUSE_STOP_FORCE and in a drain. Returns when that is done,
/// or after two seconds if it takes longer, or at once within a callback and in
/// a thread that is attached to one of the export's queues. `flags`: 0 or
/// BLKFUSE_STOP_*.
///
/// Threads that are attached to queues go on dispatching until that returns
/// -ESHUTDOWN, or detach themselves. Queues without a thread are run to their
/// end by the library, without calling back but for `event`, `idle` and
/// `deleted`; what clients have in mapped memory is written back only if none
/// is without.
///
/// Returns 0; -EBUSY: BLKFUSE_STOP_IF_IDLE and the file is in use, and nothing
/// has happened; -EINVAL: unknown flags, or not started; another error: the
/// mount could not be removed, the export ends all the same, and a further call
/// tries again.
///
/// # Safety
/// `export` must be a live export or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_stop(export: *mut blkfuse_export, flags: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        let how = match flags {
            0 => Stop::Lazy,
            BLKFUSE_STOP_FORCE => Stop::Force,
            BLKFUSE_STOP_IF_IDLE => Stop::IfIdle,
            _ => return Err(invalid("unknown flags to stop an export")),
        };
        export.stop(how).map(|()| 0)
    })
}

/// Drops the host's reference to `*export` and clears the pointer. Stops the
/// export if that has not happened, and waits for the unmounting as
/// blkfuse_export_stop() does. The export goes away when its last request in
/// flight is completed; then ops->deleted is called once, by whatever thread,
/// perhaps before this returns. A NULL or cleared pointer is fine.
///
/// Returns 0; -EDEADLK: called from a callback of this export; -EBUSY: it is
/// being started. On failure nothing has changed.
///
/// # Safety
/// `export` must be NULL or point to NULL or to a live export, which nobody
/// else is using.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_delete(export: *mut *mut blkfuse_export) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        drop(unsafe { take(export, false) }?);
        Ok(0)
    })
}

/// As blkfuse_export_delete(), and waits until the export is gone: ops->deleted
/// has been called and no thread is left. Waits at most `timeout_ms`
/// milliseconds, or without end if that is negative. Must not be called by a
/// thread that is needed to complete requests (-EDEADLK in one that is attached
/// to a queue).
///
/// Returns 0; -ETIMEDOUT: the export is deleted, but the driver has not
/// completed every request; otherwise as blkfuse_export_delete().
///
/// # Safety
/// As blkfuse_export_delete().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_delete_wait(
    export: *mut *mut blkfuse_export,
    timeout_ms: i64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let Some(export) = unsafe { take(export, true) }? else {
            return Ok(0);
        };
        match export.started.into_inner() {
            Some(started) => started.delete(timeout(timeout_ms)).map(|()| 0),
            None => Ok(0),
        }
    })
}

/// Takes the export out of the host's pointer, if it may be deleted; `waits`:
/// by somebody who waits for its end.
///
/// # Safety
/// As [`blkfuse_export_delete`].
unsafe fn take(
    export: *mut *mut blkfuse_export,
    waits: bool,
) -> Result<Option<Box<blkfuse_export>>> {
    // SAFETY: the caller's promise.
    let Some(place) = (unsafe { export.as_mut() }) else {
        return Ok(None);
    };
    // SAFETY: the caller's promise.
    let Some(inner) = (unsafe { place.as_ref() }) else {
        return Ok(None);
    };
    match inner.started.get() {
        Some(started) if started.is_dispatching() => {
            let text = "an export cannot be deleted from within its callback";
            return Err(Error::new(libc::EDEADLK, text));
        }
        Some(started) if waits && started.is_attached() => {
            let text = "a thread that is attached to the export's queues would wait for itself; \
                        use blkfuse_export_delete(), and dispatch until -ESHUTDOWN";
            return Err(Error::new(libc::EDEADLK, text));
        }
        None if inner.starting.load(SeqCst) => {
            return Err(Error::new(libc::EBUSY, "the export is being started"));
        }
        _ => {}
    }
    let raw = std::mem::replace(place, std::ptr::null_mut());
    // SAFETY: it came from Box::into_raw in blkfuse_export_create, and the
    // host's only pointer to it has just been cleared.
    Ok(Some(unsafe { Box::from_raw(raw) }))
}

/// Why the last call on this thread that failed did so: a sentence in English,
/// or "" if none has failed. It stays valid until the next call that fails on
/// this thread. Neither this text nor an errno is stable, except where a
/// function documents it.
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_error_message() -> *const c_char {
    failed()
}

/// The library's version: major << 16 | minor << 8 | patch. The header's is
/// BLKFUSE_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn blkfuse_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let bytes = text.as_bytes();
        let (mut value, mut at) = (0, 0);
        while at < bytes.len() {
            value = value * 10 + (bytes[at] - b'0') as u32;
            at += 1;
        }
        value
    }
    number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | number(env!("CARGO_PKG_VERSION_PATCH"))
}

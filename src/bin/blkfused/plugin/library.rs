//! A plugin's shared library: loading it, its table, and the calls of what is
//! in it. The only code of the daemon that cannot be safe; what a plugin must
//! keep to is said in `include/blkfuse-plugin.h`.

use std::borrow::Cow;
use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::fs;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit, offset_of};
use std::path::{Path, PathBuf};
use std::ptr;

use blkfuse::CDriver;
use libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use log::error;
use nix::errno::Errno;

use crate::failure::{Failure, Reason, Result};

/// BLKFUSE_PLUGIN_API_VERSION.
const API_VERSION: u32 = 1;
/// BLKFUSE_PLUGIN_WRITABLE.
const WRITABLE: u32 = 1;
/// Bytes for what open has to say.
const MESSAGE: usize = 1024;
/// More than any table will ever have: a size that was not initialised.
const MOST_SIZE: usize = 4096;

/// A key and a value.
pub type Setting = (CString, CString);

/// struct blkfuse_plugin_key.
#[repr(C)]
struct CKey {
    key: *const c_char,
    help: *const c_char,
}

/// struct blkfuse_plugin_setting.
#[repr(C)]
#[derive(Debug)]
struct CSetting {
    key: *const c_char,
    value: *const c_char,
}

/// struct blkfuse_plugin. What unwinds out of a call ends the process where
/// the thread, or a catch_unwind, would end it for a panic.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table {
    struct_size: usize,
    api_version: u32,
    reserved: u32,
    request_complete: *const c_void,
    name: *const c_char,
    version: *const c_char,
    description: *const c_char,
    keys: *const CKey,
    help: *const c_char,
    open: Option<Open>,
    sync: Option<Sync>,
    close: Option<Close>,
}

type Get = unsafe extern "C-unwind" fn() -> *const Table;
type Open = unsafe extern "C-unwind" fn(
    settings: *const CSetting,
    flags: u32,
    ops: *mut *const c_void,
    opaque: *mut *mut c_void,
    message: *mut c_char,
    message_size: usize,
) -> c_int;
type Sync = unsafe extern "C-unwind" fn(opaque: *mut c_void) -> c_int;
type Close = unsafe extern "C-unwind" fn(opaque: *mut c_void);

unsafe extern "C" {
    /// The one that requests are completed by: a part of this program.
    fn blkfuse_request_complete(request: *mut c_void, result: c_int) -> c_int;
}

/// The least table: up to and with what is required.
const LEAST_SIZE: usize = offset_of!(Table, open) + size_of::<Option<Open>>();

impl Table {
    /// Copies a table. The error is a reason that fits behind the file's name.
    ///
    /// # Safety
    /// `given` is NULL or points to `struct_size` bytes of a table.
    unsafe fn read(given: *const Self) -> std::result::Result<Self, String> {
        if given.is_null() || !given.is_aligned() {
            return Err("blkfuse_plugin_get() has returned no table".into());
        }
        // SAFETY: the caller promises a table, which has at least its size.
        let size = unsafe { (&raw const (*given).struct_size).read() };
        if !(LEAST_SIZE..=MOST_SIZE).contains(&size) || !size.is_multiple_of(align_of::<Self>()) {
            return Err(format!(
                "its table cannot have {size} bytes; it must begin with BLKFUSE_PLUGIN_INIT"
            ));
        }
        let known = size.min(size_of::<Self>());
        let mut copy = MaybeUninit::<Self>::zeroed();
        // SAFETY: both sides have `known` bytes. All zeroes is a valid table
        // (of NULLs), and so is the plugin's beginning of one.
        let copy = unsafe {
            copy.as_mut_ptr()
                .cast::<u8>()
                .copy_from_nonoverlapping(given.cast(), known);
            copy.assume_init()
        };
        if copy.api_version == 0 || copy.api_version > API_VERSION {
            return Err(format!(
                "its table is of API version {}, and this blkfused knows {API_VERSION}; use one \
                 that fits",
                copy.api_version
            ));
        }
        // SAFETY: the caller promises `size` bytes.
        let rest =
            unsafe { std::slice::from_raw_parts(given.cast::<u8>().add(known), size - known) };
        if rest.iter().any(|byte| *byte != 0) {
            let reason = "its table has members that this blkfused does not know; use a newer one";
            return Err(reason.into());
        }
        for (member, missing) in [
            ("request_complete", copy.request_complete.is_null()),
            ("name", copy.name.is_null()),
            ("open", copy.open.is_none()),
        ] {
            if missing {
                return Err(format!("its table has no \"{member}\""));
            }
        }
        Ok(copy)
    }

    /// The keys in the table.
    ///
    /// # Safety
    /// `keys` is NULL or points to keys up to one that is NULL, whose texts
    /// stay for the rest of the process.
    unsafe fn keys(&self) -> Vec<Key> {
        let mut keys = Vec::new();
        let mut at = self.keys;
        while !at.is_null() {
            // SAFETY: the caller's promise; the end was not reached yet.
            let (key, help) = unsafe { (text((*at).key), text((*at).help)) };
            let Some(key) = key else { break };
            keys.push(Key { key, help });
            // SAFETY: another follows one that is not the last.
            at = unsafe { at.add(1) };
        }
        keys
    }
}

/// The text behind a pointer, unless that is NULL.
///
/// # Safety
/// It is a terminated string that stays for the rest of the process.
unsafe fn text(text: *const c_char) -> Option<&'static CStr> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
}

/// A key that a plugin understands.
pub struct Key {
    pub key: &'static CStr,
    pub help: Option<&'static CStr>,
}

/// A plugin that was loaded, and stays so: nobody knows when its last thread
/// has left its code.
pub struct Library {
    file: PathBuf,
    name: &'static CStr,
    version: Option<&'static CStr>,
    description: Option<&'static CStr>,
    help: Option<&'static CStr>,
    keys: Vec<Key>,
    open: Open,
    sync: Option<Sync>,
    close: Option<Close>,
}

impl Library {
    pub fn load(file: &Path) -> Result<Self> {
        let fail = |reason: &dyn fmt::Display| Failure::new(file.display(), reason);
        // Before dlopen(), which waits for a FIFO's other end.
        let metadata = fs::metadata(file).map_err(|e| fail(&Reason(&e)))?;
        if !metadata.is_file() {
            let reason = if metadata.is_dir() {
                "is a directory"
            } else {
                "is not a regular file"
            };
            return Err(fail(&reason).advise("name a shared library"));
        }
        // With a slash in it, or dlopen() looks elsewhere.
        let path = Path::new(".").join(file);
        // SAFETY: this runs what the library has to run at its beginning. Who
        // names a plugin trusts it with the process.
        let loaded = unsafe { Loaded::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
        let loaded = ManuallyDrop::new(loaded.map_err(|e| {
            let text = e.source().map_or_else(|| e.to_string(), |e| e.to_string());
            let own = format!("{}: ", path.display());
            let reason = text.strip_prefix(&own).unwrap_or(&text);
            fail(&format_args!("cannot be loaded: {reason}"))
        })?);
        // SAFETY: what has this name is of this type, says the header.
        let get = unsafe { loaded.get::<Get>(b"blkfuse_plugin_get\0") };
        let get = *get.map_err(|_| fail(&"has no function blkfuse_plugin_get, as a plugin has"))?;
        let copy = || {
            fail(&"has a copy of libblkfuse of its own, which knows nothing of blkfused's requests")
                .advise("link it without libblkfuse: it finds the functions in blkfused")
        };
        // Looks in the library and what it depends on, but not in the program.
        // SAFETY: the address is not used.
        if unsafe { loaded.get::<*const c_void>(b"blkfuse_request_complete\0") }.is_ok() {
            return Err(copy());
        }
        // SAFETY: the header says that it can be called, and what it returns.
        let table = unsafe { Table::read(get()) }.map_err(|reason| fail(&reason))?;
        // One that it keeps to itself.
        if table.request_complete != blkfuse_request_complete as *const c_void {
            return Err(copy());
        }
        // SAFETY: the header says that these are strings, which stay.
        let (name, version) = unsafe { (text(table.name), text(table.version)) };
        // SAFETY: as above.
        let (description, help) = unsafe { (text(table.description), text(table.help)) };
        Ok(Self {
            file: file.to_owned(),
            name: name.unwrap_or_default(),
            version,
            description,
            help,
            // SAFETY: as above; the list ends as it must.
            keys: unsafe { table.keys() },
            open: table
                .open
                .ok_or_else(|| fail(&"its table has no \"open\""))?,
            sync: table.sync,
            close: table.close,
        })
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn name(&self) -> Cow<'_, str> {
        self.name.to_string_lossy()
    }

    pub fn version(&self) -> Option<Cow<'_, str>> {
        self.version.map(CStr::to_string_lossy)
    }

    pub fn description(&self) -> Option<Cow<'_, str>> {
        self.description.map(CStr::to_string_lossy)
    }

    pub fn help(&self) -> Option<Cow<'_, str>> {
        self.help.map(CStr::to_string_lossy)
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter()
    }

    /// Opens a device.
    pub fn open(&self, settings: &[Setting], writable: bool) -> Result<Device> {
        let fail = |reason: &dyn fmt::Display| Failure::new(self.file.display(), reason);
        let settings = Settings::new(settings.to_vec());
        let flags = if writable { WRITABLE } else { 0 };
        let (mut ops, mut opaque) = (ptr::null(), ptr::null_mut());
        let mut message = [0u8; MESSAGE];
        // SAFETY: by the header; the places are live locals, and the settings
        // stay until close.
        let result = unsafe {
            (self.open)(
                settings.list.as_ptr(),
                flags,
                &mut ops,
                &mut opaque,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if let Err(e) = result_of(result) {
            let end = message.iter().position(|b| *b == 0);
            let text = String::from_utf8_lossy(&message[..end.unwrap_or(MESSAGE)]);
            return Err(match text.trim() {
                "" => fail(&format_args!("cannot open the device: {}", Reason(&e))),
                text => fail(&text),
            });
        }
        let opened = Opened {
            opaque,
            sync: self.sync,
            close: self.close,
            _settings: settings,
        };
        // SAFETY: the header demands of a plugin what this demands.
        let driver = unsafe { CDriver::new(ops, opaque) }.map_err(|e| fail(&e))?;
        Ok(Device { driver, opened })
    }
}

/// What a call has returned: 0 or a negative errno.
fn result_of(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -4095..0 => Err(Errno::from_raw(-result).into()),
        other => {
            error!("a plugin has returned {other}, which is neither 0 nor a negative errno");
            Err(Errno::EIO.into())
        }
    }
}

/// A list of settings as C knows it.
#[derive(Debug)]
struct Settings {
    list: Box<[CSetting]>,
    /// What the list points to.
    _texts: Vec<Setting>,
}

impl Settings {
    fn new(texts: Vec<Setting>) -> Self {
        let settings = texts.iter().map(|(key, value)| CSetting {
            key: key.as_ptr(),
            value: value.as_ptr(),
        });
        let end = CSetting {
            key: ptr::null(),
            value: ptr::null(),
        };
        Self {
            list: settings.chain([end]).collect(),
            _texts: texts,
        }
    }
}

/// A device that was opened and is to be closed.
#[derive(Debug)]
struct Opened {
    opaque: *mut c_void,
    sync: Option<Sync>,
    close: Option<Close>,
    _settings: Settings,
}

// SAFETY: the plugin's pointer is only handed to the plugin, whose functions
// can be called on any thread; the settings are never changed.
unsafe impl Send for Opened {}
// SAFETY: as above, also at once.
unsafe impl std::marker::Sync for Opened {}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(close) = self.close {
            // SAFETY: the last call for this device, and the only one of this.
            unsafe { close(self.opaque) };
        }
    }
}

/// An open device of a plugin.
#[derive(Debug)]
pub struct Device {
    /// Goes first: `deleted` comes before `close`.
    driver: CDriver,
    opened: Opened,
}

impl Device {
    pub fn driver(&self) -> &CDriver {
        &self.driver
    }

    /// Makes everything durable.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the device is open.
        let sync = |sync: Sync| result_of(unsafe { sync(self.opened.opaque) });
        self.opened.sync.map_or(Ok(()), sync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    macro_rules! members {
        ($text:expr, $c:literal, $rust:ident { $($member:ident),* }) => {
            // Members that are not listed do not compile.
            let _: fn($rust) = |s| { let $rust { $($member: _),* } = s; };
            let size = size_of::<$rust>();
            writeln!($text, "CHECK(sizeof(struct {}) == {size});", $c).unwrap();
            $(
                let (name, at) = (stringify!($member), offset_of!($rust, $member));
                writeln!($text, "CHECK(offsetof(struct {}, {name}) == {at});", $c).unwrap();
            )*
        };
    }

    #[test]
    fn the_header_says_the_same() {
        let mut text = String::from(
            "#include <blkfuse-plugin.h>\n#define CHECK(what) _Static_assert(what, \"of the ABI\")\n",
        );
        members!(text, "blkfuse_plugin_key", CKey { key, help });
        members!(text, "blkfuse_plugin_setting", CSetting { key, value });
        members!(
            text,
            "blkfuse_plugin",
            Table {
                struct_size,
                api_version,
                reserved,
                request_complete,
                name,
                version,
                description,
                keys,
                help,
                open,
                sync,
                close
            }
        );
        // What exists so far must stay where it is, whatever is added.
        if cfg!(target_pointer_width = "64") {
            text.push_str(
                "CHECK(offsetof(struct blkfuse_plugin, open) == 64);\n\
                 CHECK(offsetof(struct blkfuse_plugin, close) == 80);\n",
            );
        }
        let _ = writeln!(
            text,
            "CHECK(BLKFUSE_PLUGIN_API_VERSION == {API_VERSION});\n\
             CHECK(BLKFUSE_PLUGIN_WRITABLE == {WRITABLE});"
        );
        let spawned = Command::new("gcc")
            .args(["-std=c11", "-fsyntax-only", "-xc", "-", "-I"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/include"))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut compiler = spawned.expect("there is gcc");
        let mut input = compiler.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        let output = compiler.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}\n{text}");
    }
}

//! Mounting with the kernel's own calls, and what statx and statmount tell
//! about mounts.

use std::ffi::{CStr, CString, OsStr};
use std::fmt::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::{getegid, geteuid, read};

use super::mountpoint::{Mountpoint, descriptor_path};
use super::{AllowOther, MountOptions, failed, quoted};
use crate::error::{Error, Result};

const DEVICE: &str = "/dev/fuse";

/// The longest string that fsconfig accepts, without its terminator.
const FSCONFIG_STRING_MAX: usize = 255;

/// Opens a connection that is not mounted yet.
pub(super) fn open_device() -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    open(DEVICE, flags, Mode::empty()).map_err(|errno| {
        let advice = match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                "; load the module (modprobe fuse), or pass the device into the container"
            }
            Errno::EACCES => "; let this user read and write it, as most systems let everybody",
            _ => "",
        };
        let message = format!("{DEVICE}: cannot open: {}{advice}", errno.desc());
        Error::new(errno as i32, message)
    })
}

/// The mount options that FUSE needs, as names and values; flags have no value.
fn parameters(
    options: &MountOptions<'_>,
    device: BorrowedFd<'_>,
) -> Vec<(&'static str, Option<String>)> {
    let mut parameters = vec![
        ("fd", Some(device.as_raw_fd().to_string())),
        ("rootmode", Some(format!("{:o}", libc::S_IFREG))),
        ("user_id", Some(geteuid().to_string())),
        ("group_id", Some(getegid().to_string())),
        ("max_read", Some(options.max_read.to_string())),
        ("default_permissions", None),
    ];
    // The kernel leaves this policy to fusermount3 and refuses it to nobody.
    if options.allow_other != AllowOther::Off {
        parameters.push(("allow_other", None));
    }
    parameters
}

/// Creates the file system and a mount of it that is nowhere yet.
pub(super) fn create_detached(
    options: &MountOptions<'_>,
    device: BorrowedFd<'_>,
) -> Result<OwnedFd> {
    let context = fsopen(c"fuse").map_err(|errno| {
        let message = format!("{}: fsopen: {}", quoted(options.mountpoint), errno.desc());
        Error::new(errno as i32, message)
    })?;
    configure(&context, options, device)
        .and_then(|()| fsmount(&context, mount_attributes(options)))
        .map_err(|errno| {
            let what = "cannot create the file system";
            let error = failed(options.mountpoint, what, errno);
            Error::new(errno as i32, format!("{error}{}", diagnostics(&context)))
        })
}

fn configure(
    context: &OwnedFd,
    options: &MountOptions<'_>,
    device: BorrowedFd<'_>,
) -> nix::Result<()> {
    let source = c_string(shortened(options.source))?;
    set(context, c"source", Some(&source))?;
    set(context, c"subtype", Some(c"blkfuse"))?;
    for (name, value) in parameters(options, device) {
        let value = value.map(|text| c_string(text.as_bytes())).transpose()?;
        set(context, &c_string(name.as_bytes())?, value.as_deref())?;
    }
    if !options.writable {
        set(context, c"ro", None)?;
    }
    fsconfig(context, libc::FSCONFIG_CMD_CREATE, None, None)
}

/// Only for the eye, so the end of a long name is dispensable.
fn shortened(source: &OsStr) -> &[u8] {
    let bytes = source.as_bytes();
    &bytes[..bytes.len().min(FSCONFIG_STRING_MAX)]
}

fn c_string(bytes: &[u8]) -> nix::Result<CString> {
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}

fn mount_attributes(options: &MountOptions<'_>) -> u64 {
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOATIME;
    if options.writable {
        attributes
    } else {
        attributes | libc::MOUNT_ATTR_RDONLY
    }
}

/// Puts a detached mount onto the mountpoint.
pub(super) fn attach(tree: BorrowedFd<'_>, mountpoint: &Mountpoint) -> Result<()> {
    move_mount(tree, mountpoint.file())
        .map_err(|errno| failed(mountpoint.path(), "cannot attach the mount", errno))
}

/// Mounts with mount(2), which makes the file visible at once.
pub(super) fn mount(
    options: &MountOptions<'_>,
    device: BorrowedFd<'_>,
    mountpoint: &Mountpoint,
) -> Result<()> {
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    if !options.writable {
        flags |= MsFlags::MS_RDONLY;
    }
    let data = data_string(&parameters(options, device));
    let mount_at = |target: &Path| {
        nix::mount::mount(
            Some(options.source),
            target,
            Some("fuse.blkfuse"),
            flags,
            Some(data.as_str()),
        )
    };
    // The descriptor means the file that was checked; the path serves where
    // /proc is missing.
    match mount_at(&descriptor_path(mountpoint.file())) {
        Err(Errno::ENOENT) => mount_at(mountpoint.path()),
        result => result,
    }
    .map_err(|errno| failed(mountpoint.path(), "cannot mount", errno))
}

fn data_string(parameters: &[(&str, Option<String>)]) -> String {
    let mut data = String::new();
    for (name, value) in parameters {
        let separator = if data.is_empty() { "" } else { "," };
        let _ = match value {
            Some(value) => write!(data, "{separator}{name}={value}"),
            None => write!(data, "{separator}{name}"),
        };
    }
    data
}

/// What the kernel has to say about a failure: one message per read.
fn diagnostics(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = read(context, &mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..length]);
        // Each begins with its severity: "e ", "w " or "i ".
        let message = message.get(2..).unwrap_or_default().trim();
        let _ = write!(text, "; {message}");
    }
    text
}

/// A mount of the control file system of FUSE that is nowhere.
pub(super) fn detached_control_file_system() -> nix::Result<OwnedFd> {
    let context = fsopen(c"fusectl")?;
    fsconfig(&context, libc::FSCONFIG_CMD_CREATE, None, None)?;
    fsmount(
        &context,
        libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
    )
}

fn fsopen(fs_type: &CStr) -> nix::Result<OwnedFd> {
    // SAFETY: the kernel only reads the terminated string.
    let fd = unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), libc::FSOPEN_CLOEXEC) };
    owned(fd)
}

/// Sets a string, or without a value a flag.
fn set(context: &OwnedFd, key: &CStr, value: Option<&CStr>) -> nix::Result<()> {
    let command = match value {
        Some(_) => libc::FSCONFIG_SET_STRING,
        None => libc::FSCONFIG_SET_FLAG,
    };
    fsconfig(context, command, Some(key), value)
}

fn fsconfig(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> nix::Result<()> {
    let key = key.map_or(ptr::null(), CStr::as_ptr);
    let value = value.map_or(ptr::null(), CStr::as_ptr);
    let fd = context.as_raw_fd();
    // SAFETY: key and value are null or terminated strings that outlive the
    // call, and no command used here writes to them.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
    Errno::result(result).map(drop)
}

fn fsmount(context: &OwnedFd, attributes: u64) -> nix::Result<OwnedFd> {
    let fd = context.as_raw_fd();
    // The kernel takes an unsigned int.
    let attributes = attributes as libc::c_uint;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_fsmount, fd, libc::FSMOUNT_CLOEXEC, attributes) };
    owned(fd)
}

fn move_mount(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let empty = c"".as_ptr();
    let (tree, target) = (tree.as_raw_fd(), target.as_raw_fd());
    // SAFETY: the kernel only reads the two terminated strings, which are static.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree, empty, target, empty, flags) };
    Errno::result(result).map(drop)
}

/// Takes over the descriptor that a call has returned.
fn owned(result: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(result)? as RawFd;
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks for facts that the kernel knows without asking the file system.
fn statx_cached(file: BorrowedFd<'_>, mask: libc::c_uint) -> Option<libc::statx> {
    let facts = statx(file, libc::AT_STATX_DONT_SYNC, mask).ok()?;
    (facts.stx_mask & mask == mask).then_some(facts)
}

/// The mode of a file, asked of its server also where the kernel remembers it.
pub(super) fn present_mode(file: BorrowedFd<'_>) -> nix::Result<libc::mode_t> {
    let facts = statx(file, libc::AT_STATX_FORCE_SYNC, libc::STATX_TYPE)?;
    Ok(facts.stx_mode.into())
}

fn statx(file: BorrowedFd<'_>, sync: libc::c_int, mask: libc::c_uint) -> nix::Result<libc::statx> {
    let mut facts = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a terminated string, and the kernel writes at most one
    // statx to `facts`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | sync,
            mask,
            facts.as_mut_ptr(),
        )
    };
    Errno::result(result)?;
    // SAFETY: it was zeroed, which is a valid statx, before the kernel filled it.
    Ok(unsafe { facts.assume_init() })
}

/// The id that no other mount will ever have (Linux 6.8).
pub(super) fn unique_mount_id(file: BorrowedFd<'_>) -> Option<u64> {
    statx_cached(file, libc::STATX_MNT_ID_UNIQUE).map(|facts| facts.stx_mnt_id)
}

/// The id in mount tables of the mount that a file is on (Linux 5.8).
pub(super) fn mount_id(file: BorrowedFd<'_>) -> Option<u64> {
    statx_cached(file, libc::STATX_MNT_ID).map(|facts| facts.stx_mnt_id)
}

/// The type of a file whose server does not answer any more.
pub(super) fn cached_type(file: BorrowedFd<'_>) -> Option<SFlag> {
    let mode = libc::mode_t::from(statx_cached(file, libc::STATX_TYPE)?.stx_mode);
    Some(SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()))
}

/// The kernel's `struct mnt_id_req` in its first version.
#[repr(C)]
struct MountIdRequest {
    size: u32,
    spare: u32,
    mount_id: u64,
    param: u64,
}

impl MountIdRequest {
    fn new(mount_id: u64, param: u64) -> Self {
        Self {
            size: size_of::<Self>() as u32,
            spare: 0,
            mount_id,
            param,
        }
    }
}

// libc has no names for these on most machines, but everywhere the calls since
// Linux 5.1 follow each other in the same order.
const SYS_STATMOUNT: libc::c_long = libc::SYS_fsopen + 27;
const SYS_LISTMOUNT: libc::c_long = libc::SYS_fsopen + 28;

/// Whether statmount(2) says that the mount with this unique id is gone.
pub(super) fn is_unmounted(unique: u64) -> bool {
    old_mount_id(unique) == Err(Errno::ENOENT)
}

/// The unique id of the mount that mount tables show under `id`.
pub(super) fn find_unique_mount_id(id: u64) -> Option<u64> {
    let mut last = 0;
    let mut page = [0; 256];
    loop {
        let count = list_mounts(last, &mut page).ok()?;
        let found = |unique: &&u64| old_mount_id(**unique) == Ok(id);
        if let Some(unique) = page[..count].iter().find(found) {
            return Some(*unique);
        }
        if count < page.len() {
            return None;
        }
        last = page[count - 1];
    }
}

/// The id in mount tables of the mount with this unique id (Linux 6.8).
fn old_mount_id(unique: u64) -> nix::Result<u64> {
    const STATMOUNT_MNT_BASIC: u64 = 2;
    /// Where `struct statmount` has `mnt_id_old`, counted in 32-bit words.
    const MNT_ID_OLD: usize = 14;
    let request = MountIdRequest::new(unique, STATMOUNT_MNT_BASIC);
    // More than its fixed part needs.
    let mut answer = [0_u32; 256];
    // SAFETY: the kernel reads one request of the size that it names, and writes
    // at most as many bytes to `answer` as it has.
    let result = unsafe {
        libc::syscall(
            SYS_STATMOUNT,
            &raw const request,
            answer.as_mut_ptr(),
            size_of_val(&answer),
            0,
        )
    };
    Errno::result(result).map(|_| answer[MNT_ID_OLD].into())
}

/// Fills `page` with the unique ids that follow `last`, and returns how many.
fn list_mounts(last: u64, page: &mut [u64]) -> nix::Result<usize> {
    /// Means all mounts of the namespace.
    const LSMT_ROOT: u64 = u64::MAX;
    let request = MountIdRequest::new(LSMT_ROOT, last);
    // SAFETY: the kernel reads one request of the size that it names, and writes
    // at most `page.len()` ids to `page`.
    let result = unsafe {
        libc::syscall(
            SYS_LISTMOUNT,
            &raw const request,
            page.as_mut_ptr(),
            page.len(),
            0,
        )
    };
    Errno::result(result).map(|count| count as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_data_string_has_what_fuse_demands() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut options = MountOptions {
            mountpoint: Path::new("/x"),
            source: OsStr::new("/image,with\\odd name"),
            writable: true,
            allow_other: AllowOther::Off,
            max_read: 1 << 20,
        };
        let own = format!(
            "fd={},rootmode=100000,user_id={},group_id={},max_read=1048576,default_permissions",
            null.as_raw_fd(),
            geteuid(),
            getegid()
        );
        assert_eq!(data_string(&parameters(&options, null.as_fd())), own);
        options.allow_other = AllowOther::On;
        let all = format!("{own},allow_other");
        assert_eq!(data_string(&parameters(&options, null.as_fd())), all);
    }

    #[test]
    fn a_long_source_is_cut() {
        let long = "x".repeat(4000);
        assert_eq!(shortened(OsStr::new(&long)).len(), FSCONFIG_STRING_MAX);
        assert_eq!(shortened(OsStr::new("short")), b"short");
    }

    #[test]
    fn facts_about_files_need_no_privilege() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(cached_type(null.as_fd()), Some(SFlag::S_IFCHR));
        if let Some(unique) = unique_mount_id(null.as_fd()) {
            assert!(!is_unmounted(unique));
            let id = old_mount_id(unique).unwrap();
            assert_eq!(find_unique_mount_id(id), Some(unique));
            assert_eq!(find_unique_mount_id(u64::MAX), None);
        }
    }
}

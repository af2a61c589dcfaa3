//! What clients of the exported file do that std has no words for.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use io_uring::{IoUring, opcode, squeue, types};

/// The length that the kernel shows.
pub fn size(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

/// `st_mtime` and `st_ctime`, as the server says now: not what the kernel
/// remembers from a moment ago.
pub fn fresh_times(file: &File) -> (SystemTime, SystemTime) {
    let s = fresh_statx(file);
    let time = |t: libc::statx_timestamp| {
        SystemTime::UNIX_EPOCH + Duration::new(t.tv_sec as u64, t.tv_nsec)
    };
    (time(s.stx_mtime), time(s.stx_ctime))
}

/// All basic attributes, asked from the server.
pub fn fresh_statx(file: &File) -> libc::statx {
    // SAFETY: a statx of zeroes is valid.
    let mut s: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is empty and terminated, and `s` is a live local that
    // the kernel fills.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC,
            libc::STATX_BASIC_STATS,
            &mut s,
        )
    };
    assert_eq!(result, 0, "statx: {}", io::Error::last_os_error());
    s
}

/// `st_mtime` and `st_ctime` as an ordinary stat shows them.
pub fn times(file: &File) -> (SystemTime, SystemTime) {
    let m = file.metadata().unwrap();
    let time = |s: i64, n: i64| SystemTime::UNIX_EPOCH + Duration::new(s as u64, n as u32);
    (
        time(m.mtime(), m.mtime_nsec()),
        time(m.ctime(), m.ctime_nsec()),
    )
}

/// The errno of a failure; panics on success.
pub fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().expect("an errno")
}

/// fallocate(2).
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open; no memory is involved.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    checked(result.into()).map(drop)
}

/// lseek(2).
pub fn seek(file: &File, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: the descriptor is open; no memory is involved.
    checked(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }).map(|at| at as u64)
}

/// close(2), whose failure std ignores.
pub fn close(file: File) -> io::Result<()> {
    let fd = file.into_raw_fd();
    // SAFETY: the descriptor is open and now owned by nobody else.
    checked(unsafe { libc::close(fd) }.into()).map(drop)
}

fn checked(result: i64) -> io::Result<i64> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Starts all writes at once through io_uring and waits for all of them;
/// results (counts, or negative errnos) in their order.
pub fn aio_write(file: &File, writes: &[(u64, &[u8])]) -> Vec<i32> {
    let fd = types::Fd(file.as_raw_fd());
    run_ring(writes.iter().map(|(offset, data)| {
        opcode::Write::new(fd, data.as_ptr(), data.len() as u32)
            .offset(*offset)
            .build()
    }))
}

/// The same for reads.
pub fn aio_read(file: &File, reads: &mut [(u64, &mut [u8])]) -> Vec<i32> {
    let fd = types::Fd(file.as_raw_fd());
    run_ring(reads.iter_mut().map(|(offset, data)| {
        opcode::Read::new(fd, data.as_mut_ptr(), data.len() as u32)
            .offset(*offset)
            .build()
    }))
}

/// The entries' buffers are borrowed by the caller of this for as long as it
/// runs.
fn run_ring(entries: impl ExactSizeIterator<Item = squeue::Entry>) -> Vec<i32> {
    let count = entries.len();
    let mut ring = IoUring::new((count as u32).next_power_of_two()).unwrap();
    for (i, entry) in entries.enumerate() {
        // SAFETY: the two callers' buffers outlive this function, which does
        // not return (or unwind) before everything has completed.
        let pushed = unsafe { ring.submission().push(&entry.user_data(i as u64)) };
        if pushed.is_err() {
            std::process::abort();
        }
    }
    let mut results = vec![i32::MIN; count];
    let mut done = 0;
    while done < count {
        match ring.submit_and_wait(count - done) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(_) => std::process::abort(),
        }
        for completion in ring.completion() {
            results[completion.user_data() as usize] = completion.result();
            done += 1;
        }
    }
    results
}

/// Whether a program is installed.
pub fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .any(|dir| dir.join(program).exists())
}

/// Held for reading while a child is started, for writing while an export is
/// deleted.
///
/// Before its exec a child has copies of all descriptors: of the files that
/// other tests have open, and of the connections that serve them. Were such an
/// export deleted at that moment, the child would keep the connection alive
/// and wait for an answer to its own close, for ever.
static STARTING: RwLock<()> = RwLock::new(());

/// While this lives, no child is between its fork and its exec.
pub fn no_children() -> RwLockWriteGuard<'static, ()> {
    STARTING.write().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a program to its end.
pub fn output(command: &mut Command) -> Output {
    start(command).wait_with_output().unwrap()
}

/// Starts a program whose output is piped.
pub fn start(command: &mut Command) -> Child {
    spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

/// Starts a program.
pub fn spawn(command: &mut Command) -> Child {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    let child = command.spawn().unwrap();
    // Spawning may return before the exec has closed what it is to close.
    let descriptors = format!("/proc/{}/fd", child.id());
    let has_fuse = || {
        let links = fs::read_dir(&descriptors).into_iter().flatten().flatten();
        let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        targets.any(|target| target == Path::new("/dev/fuse"))
    };
    super::eventually("the child's exec", || !has_fuse());
    child
}

/// Runs a program to its end; panics with what it said unless it succeeds.
pub fn run(command: &mut Command) -> Output {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A command with the mounted file's path among its arguments: every `{}`.
pub fn command(line: &str, path: &Path) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    for word in words {
        command.arg(word.replace("{}", path.to_str().unwrap()));
    }
    command
}

//! What the tests of the daemon share: a directory under a watchdog, the
//! daemon as a child process, and other people's programs.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::{SOON, skip};

/// How long the daemon may take to end after a signal.
pub const STOP: Duration = Duration::from_secs(3);

/// Arguments of any kind of text.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        vec![$(::std::ffi::OsString::from(AsRef::<::std::ffi::OsStr>::as_ref(&$arg))),*]
    };
}

/// A directory for one test. Whatever is mounted in it when the test takes too
/// long, or ends, is aborted and unmounted.
pub struct Scratch {
    path: PathBuf,
    stop: Option<mpsc::Sender<()>>,
    watchdog: Option<JoinHandle<()>>,
    dir: TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        Self::with_patience(Duration::from_secs(100))
    }

    pub fn with_patience(patience: Duration) -> Self {
        Self::within(&std::env::temp_dir(), patience)
    }

    pub fn within(parent: &Path, patience: Duration) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let path = dir.path().canonicalize().unwrap();
        let (stop, stopped) = mpsc::channel();
        let watched = path.clone();
        let watchdog = thread::spawn(move || {
            if stopped.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("WATCHDOG: aborting the mounts in {}", watched.display());
                unmount_all(&watched);
                panic!("the watchdog had to abort {}", watched.display());
            }
        });
        Self {
            path,
            stop: Some(stop),
            watchdog: Some(watchdog),
            dir,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A new file with that content.
    pub fn file(&self, name: impl AsRef<Path>, content: &[u8]) -> PathBuf {
        let path = self.path.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// A new file that is one hole.
    pub fn sparse(&self, name: impl AsRef<Path>, length: u64) -> PathBuf {
        let path = self.path.join(name);
        File::create(&path).unwrap().set_len(length).unwrap();
        path
    }

    /// A file to mount over.
    pub fn mountpoint(&self, name: impl AsRef<Path>) -> PathBuf {
        self.file(name, b"")
    }

    /// What is mounted in the directory.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_in(&self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.stop.take());
        let bitten = self.watchdog.take().is_some_and(|t| t.join().is_err());
        let left = self.mounts();
        unmount_all(&self.path);
        if thread::panicking() {
            return;
        }
        assert!(!bitten, "the watchdog bit");
        assert_eq!(left, [] as [PathBuf; 0], "left mounted");
    }
}

/// The mounts of this thread's namespace at `dir` and in it, oldest first.
/// Nothing of them is touched.
pub fn mounts_in(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/thread-self/mountinfo").unwrap();
    let fields = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let paths = fields.map(|field| PathBuf::from(OsStr::from_bytes(&unescaped(field)).to_owned()));
    paths.filter(|path| path.starts_with(dir)).collect()
}

/// The mount table writes some characters as a backslash and three digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    let mut at = 0;
    while at < field.len() {
        if field[at] == b'\\' {
            let digits = std::str::from_utf8(&field[at + 1..at + 4]).unwrap();
            text.push(u8::from_str_radix(digits, 8).unwrap());
            at += 4;
        } else {
            text.push(field[at]);
            at += 1;
        }
    }
    text
}

fn unmount_all(dir: &Path) {
    for path in mounts_in(dir).iter().rev() {
        let _ = umount2(path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}

/// Whether this process may mount; the test is skipped otherwise.
pub fn can_mount() -> bool {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let reason = match device {
        Err(e) => format!("/dev/fuse: {e}"),
        Ok(_) if !nix::unistd::geteuid().is_root() => "not root".to_owned(),
        Ok(_) => return true,
    };
    skip(&reason);
    false
}

/// Where to work, unless nothing can be mounted here.
pub fn scratch() -> Option<Scratch> {
    can_mount().then(Scratch::new)
}

/// Opens an exported file.
pub fn open(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn assert_same(a: &[u8], b: &[u8]) {
    assert_eq!(a.len(), b.len());
    let differ = a.iter().zip(b).position(|(a, b)| a != b);
    assert_eq!(differ, None, "first difference");
}

/// The daemon's program.
pub fn blkfused() -> Command {
    Command::new(env!("CARGO_BIN_EXE_blkfused"))
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    /// What it said when it was ready, a line each.
    pub ready: Vec<String>,
    lines: mpsc::Receiver<String>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// How a daemon ended.
#[derive(Debug)]
pub struct End {
    pub status: ExitStatus,
    pub took: Duration,
    pub stderr: String,
}

impl Daemon {
    /// Starts the daemon and waits until one export is ready.
    pub fn start(args: impl IntoIterator<Item = OsString>) -> Self {
        Self::start_several(args, 1)
    }

    /// Starts the daemon and waits until it has said so many lines.
    pub fn start_several(args: impl IntoIterator<Item = OsString>, lines: usize) -> Self {
        let mut command = blkfused();
        command.args(args).stdin(Stdio::null());
        Self::spawn(command, lines)
    }

    pub fn spawn(mut command: Command, lines: usize) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (say, heard) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let stderr = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&stderr);
        let readers = vec![
            thread::spawn(move || {
                for line in stdout.split(b'\n') {
                    let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
                    if say.send(line).is_err() {
                        break;
                    }
                }
            }),
            thread::spawn(move || {
                let mut line = Vec::new();
                while errors.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    eprint!("{text}");
                    collected.lock().unwrap().push_str(&text);
                    line.clear();
                }
            }),
        ];
        let mut daemon = Self {
            child,
            ready: Vec::new(),
            lines: heard,
            stderr,
            readers,
        };
        for _ in 0..lines {
            match daemon.lines.recv_timeout(2 * SOON) {
                Ok(line) => daemon.ready.push(line),
                Err(e) => panic!("not ready ({e}): {}", daemon.stderr()),
            }
        }
        daemon
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, which must come within `limit`.
    pub fn wait(mut self, limit: Duration) -> End {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < limit, "does not end: {}", self.stderr());
            thread::sleep(Duration::from_millis(1));
        };
        let took = start.elapsed();
        self.readers
            .drain(..)
            .for_each(|reader| reader.join().unwrap());
        End {
            status,
            took,
            stderr: self.stderr(),
        }
    }

    /// Sends the signal and waits for the end, which must be a good one.
    pub fn stop_with(self, signal: Signal) -> End {
        self.signal(signal);
        let end = self.wait(STOP);
        assert!(end.status.success(), "{end:?}");
        end
    }

    pub fn stop(self) -> End {
        self.stop_with(Signal::SIGTERM)
    }

    /// Ends it without any chance to clean up.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        let end = self.child.wait().unwrap();
        assert_eq!(end.signal(), Some(Signal::SIGKILL as i32));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.readers.drain(..).for_each(|reader| {
            let _ = reader.join();
        });
    }
}

/// Starts a daemon that must fail: its exit status and what it complained.
pub fn failure(args: impl IntoIterator<Item = OsString>) -> (i32, String) {
    let mut command = blkfused();
    command.args(args).stdin(Stdio::null());
    let daemon = Daemon::spawn(command, 0);
    let mut lines = Vec::new();
    while let Ok(line) = daemon.lines.recv_timeout(SOON) {
        lines.push(line);
    }
    let end = daemon.wait(SOON);
    assert_eq!(lines, [] as [String; 0], "it said that it was ready");
    let code = end.status.code().unwrap_or_else(|| panic!("{end:?}"));
    (code, end.stderr)
}

/// Starts a daemon that must end with status 1: its complaint, which is its
/// last line.
pub fn refusal(args: impl IntoIterator<Item = OsString>) -> String {
    let (code, stderr) = failure(args);
    assert_eq!(code, 1, "{stderr}");
    let line = stderr.lines().last().unwrap_or_default();
    let message = line.strip_prefix("blkfused: ");
    message.unwrap_or_else(|| panic!("{stderr}")).to_owned()
}

/// Whether all programs are installed; the test is skipped otherwise.
pub fn installed(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing = programs.iter().find(|program| {
        !std::env::split_paths(&path)
            .chain(["/sbin", "/usr/sbin"].map(PathBuf::from))
            .any(|dir| dir.join(program).is_file())
    });
    if let Some(program) = missing {
        skip(&format!("{program} is not installed"));
    }
    missing.is_none()
}

/// Runs a program to its end.
pub fn output(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = OsString>) -> Output {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs a program that must succeed: what it wrote.
pub fn run(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = OsString>) -> String {
    let name = program.as_ref().display().to_string();
    let output = output(program, args);
    let text = text_of(&output);
    assert!(output.status.success(), "{name}: {}: {text}", output.status);
    text
}

/// All that a program wrote.
pub fn text_of(output: &Output) -> String {
    let bytes = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The bytes that a file takes.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// A loop device over a file; detached when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    /// `None` (and the test is skipped) if there are none.
    pub fn attach(file: &Path, options: &[&str]) -> Option<Self> {
        let mut args = args!["--find", "--show"];
        args.extend(options.iter().map(OsString::from));
        args.push(file.into());
        // Another process may take the free device first.
        for _ in 0..10 {
            let attached = output("losetup", args.clone());
            if attached.status.success() {
                let name = String::from_utf8(attached.stdout).unwrap();
                return Some(Self(name.trim().into()));
            }
            let text = text_of(&attached);
            if !text.contains("busy") {
                skip(&format!("losetup: {text}"));
                return None;
            }
        }
        panic!("losetup: always busy");
    }

    pub fn detach(self) {
        drop(self);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = output("losetup", args!["--detach", self.0]);
        let text = text_of(&detached);
        assert!(detached.status.success() || thread::panicking(), "{text}");
    }
}

/// A file system mounted from a device; unmounted when dropped.
pub struct Mount(PathBuf);

impl Mount {
    pub fn new(args: Vec<OsString>, at: &Path) -> Self {
        fs::create_dir(at).unwrap();
        let mut all = args;
        all.push(at.into());
        run("mount", all);
        Self(at.to_owned())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = output("umount", args![self.0]);
        let text = text_of(&unmounted);
        assert!(unmounted.status.success() || thread::panicking(), "{text}");
    }
}

/// Reads everything of a program's output that is still to come.
pub fn rest_of(mut source: impl Read) -> String {
    let mut text = String::new();
    let _ = source.read_to_string(&mut text);
    text
}

/// Mounts a FUSE connection of `owner` that nobody serves yet; `more` is
/// appended to its options.
pub fn connection_at(at: &Path, owner: u32, more: &str) -> File {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    let options = format!(
        "fd={},rootmode=100000,user_id={owner},group_id={owner},default_permissions{more}",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = Some(&options[..]);
    mount(Some("prepared"), at, Some("fuse"), flags, options).unwrap();
    device
}

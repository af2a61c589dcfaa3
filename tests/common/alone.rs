//! Tests that run in a process of their own: they count what it has, or are
//! disturbed if another test starts an export beside them over io_uring (that
//! forks, and a forked child's closing of a file is a close like any other).
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::common;

/// Runs `test` in a process of its own.
pub fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os("BLKFUSE_TEST_ALONE").is_some() {
        return test();
    }
    if !common::can_export() {
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("BLKFUSE_TEST_ALONE", "1")
        .status()
        .unwrap();
    assert!(status.success(), "{name} failed in its own process");
}

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    threads: usize,
    descriptors: Vec<String>,
    mounts: usize,
}

impl Belongings {
    pub fn now() -> Self {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        let mut descriptors: Vec<_> = links
            .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .map(|path| path.display().to_string())
            // The directory being read.
            .filter(|path| !path.starts_with("/proc/"))
            .collect();
        descriptors.sort();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        // Other processes mount too; ours lie in temporary directories.
        let ours = format!("/.blkfuse-test-{}-", std::process::id());
        Self {
            threads: fs::read_dir("/proc/self/task")
                .unwrap()
                .filter(|task| !is_ending(&task.as_ref().unwrap().path()))
                .count(),
            descriptors,
            mounts: mounts.lines().filter(|line| line.contains(&ours)).count(),
        }
    }
}

/// Whether a thread is past its last instruction: one that was joined stays in
/// the list for another moment.
fn is_ending(task: &Path) -> bool {
    /// `PF_EXITING` of the kernel's `struct task_struct`.
    const EXITING: u64 = 4;
    let Ok(stat) = fs::read_to_string(task.join("stat")) else {
        return true;
    };
    // Its name, which may contain anything, ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let flags: u64 = fields.split_whitespace().nth(6).unwrap().parse().unwrap();
    flags & EXITING != 0
}

impl Belongings {
    /// Waits until the process has these and nothing else.
    pub fn are_all(&self) {
        let end = Instant::now() + common::SOON;
        loop {
            let now = Self::now();
            if now == *self {
                return;
            }
            assert!(Instant::now() < end, "left is {now:?}, not {self:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A directory whose name tells its mounts from those of other processes.
pub fn own_dir() -> tempfile::TempDir {
    let prefix = format!(".blkfuse-test-{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir().unwrap()
}

pub fn resident_kib() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4
}

/// CPU time of this process.
fn cpu_time() -> Duration {
    // SAFETY: a zeroed rusage is valid, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// For so long it is looked at whether a process rests.
pub const WATCHED: Duration = Duration::from_millis(200);

/// Waits until what was begun is done with, such as the first use of memory.
pub fn wait_for_rest() {
    common::eventually("it rests", || {
        let before = cpu_time();
        thread::sleep(Duration::from_millis(20));
        cpu_time() - before < Duration::from_millis(2)
    });
}

/// How much of the CPU this process uses within `time`.
pub fn cpu_time_in(time: Duration) -> Duration {
    let before = cpu_time();
    thread::sleep(time);
    cpu_time() - before
}

/// Nothing is to be done, and nothing must be: no queue spins.
pub fn assert_rests(what: &str) {
    let used = cpu_time_in(WATCHED);
    assert!(used < WATCHED / 5, "{what}: {used:?} of CPU");
}

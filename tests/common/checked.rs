//! Programs whose use of memory is checked while they run: by valgrind, or by
//! what clang has built into them.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use std::thread;

use tempfile::TempDir;

use super::client::have;
use super::skip;

/// A way to begin the command line of a program that valgrind is to watch, with
/// which a misuse of memory is a failure; `None`, and said, if there is none.
pub fn valgrind() -> Option<impl Fn() -> Command> {
    if !have("valgrind") {
        skip("there is no valgrind");
        return None;
    }
    Some(|| {
        let mut command = Command::new("valgrind");
        command
            .args(["-q", "--error-exitcode=99", "--leak-check=full"])
            .args(["--show-leak-kinds=definite,indirect"])
            .args(["--errors-for-leak-kinds=definite,indirect"])
            .arg("--fair-sched=yes");
        command
    })
}

/// What has clang build AddressSanitizer, with LeakSanitizer, and
/// UndefinedBehaviorSanitizer into C.
pub const SANITIZE: [&str; 3] = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
];

/// Where programs that were built with `SANITIZE` report to. A report ends its
/// program; when this is dropped, it is shown, and is a failure.
pub struct Sanitizers {
    reports: TempDir,
}

impl Sanitizers {
    pub fn new() -> Self {
        let reports = tempfile::tempdir().unwrap();
        Self { reports }
    }

    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let reports = self.reports.path().join("report");
        let options = format!("detect_leaks=1:exitcode=99:log_path={}", reports.display());
        let mut command = Command::new(program);
        command.env("ASAN_OPTIONS", &options);
        command.env("UBSAN_OPTIONS", format!("print_stacktrace=1:{options}"));
        command
    }
}

impl Drop for Sanitizers {
    fn drop(&mut self) {
        let mut reports = 0;
        for entry in fs::read_dir(self.reports.path()).unwrap() {
            eprintln!("{}", fs::read_to_string(entry.unwrap().path()).unwrap());
            reports += 1;
        }
        assert!(reports == 0 || thread::panicking(), "{reports} reports");
    }
}

//! C and C++ programs that tests compile against the built libraries, and
//! programs that run beside a test.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::common::{self, Watchdog, is_mounted, skip, within};

/// How long valgrind may take to start a program.
pub const PATIENCE: Duration = Duration::from_secs(50);
pub const C: &str = "-std=c99";
pub const CXX: &str = "-std=c++17";
/// What libblkfuse.a needs besides the C library, as
/// `rustc --print native-static-libs` says.
const NATIVE: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linking {
    Shared,
    Static,
}

/// Where programs are built and run.
pub struct Workshop {
    dir: TempDir,
}

impl Workshop {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let library = common::library_dir().join("libblkfuse.so");
        for name in ["libblkfuse.so", "libblkfuse.so.0"] {
            symlink(&library, dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// Compiles `source` of the package; `None` if there is no such compiler.
    pub fn build(
        &self,
        compiler: &str,
        standard: &str,
        source: &str,
        linking: Linking,
    ) -> Option<PathBuf> {
        self.build_with(compiler, standard, source, linking, &[])
    }

    /// The same, with more arguments at the end.
    pub fn build_with(
        &self,
        compiler: &str,
        standard: &str,
        source: &str,
        linking: Linking,
        more: &[&str],
    ) -> Option<PathBuf> {
        if !common::can_export() {
            return None;
        }
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let name = Path::new(source).file_stem().unwrap().to_str().unwrap();
        let program = self.path(&format!("{name}-{compiler}-{linking:?}"));
        let mut command = Command::new(compiler);
        command
            .args([standard, "-pedantic", "-Wall", "-Wextra", "-Werror", "-g"])
            .arg("-I")
            .arg(package.join("include"))
            .args(["-x", if standard == CXX { "c++" } else { "c" }])
            .arg(package.join(source))
            .args(["-x", "none", "-o"])
            .arg(&program);
        match linking {
            Linking::Shared => command
                .arg("-L")
                .arg(self.dir.path())
                .arg(format!("-Wl,-rpath,{}", self.dir.path().display()))
                .args(["-lblkfuse", "-lpthread", "-ldl"]),
            Linking::Static => command
                .arg(common::library_dir().join("libblkfuse.a"))
                .args(NATIVE),
        };
        let Ok(output) = command.args(more).output() else {
            skip(&format!("there is no {compiler}"));
            return None;
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {errors}");
        Some(program)
    }

    /// An empty file to be mounted over.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap();
        path
    }
}

/// A program that runs; killed and waited for if the test fails before.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Running {
    /// Its input is the test's to write, if the command says that it is piped.
    pub fn start(command: &mut Command) -> Self {
        let spawned = command.stdout(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        // Ends with the program's output.
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self {
            input: child.stdin.take(),
            child,
            lines,
        }
    }

    /// Waits for the next line that it prints.
    pub fn line(&self, limit: Duration) -> String {
        self.lines
            .recv_timeout(limit)
            .expect("the program prints a line")
    }

    /// Writes a line to its input.
    pub fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{line}").unwrap();
    }

    /// Ends its input.
    pub fn end_input(&mut self) {
        self.input = None;
    }

    pub fn signal(&self, number: i32) {
        // SAFETY: kill touches no memory; the child was not waited for yet,
        // so its number is still its own.
        let result = unsafe { libc::kill(self.child.id() as i32, number) };
        assert_eq!(result, 0);
    }

    pub fn status(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        within(limit, "the program ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            // Its connection ends with it, so it does not stay in the kernel.
            let _ = self.child.wait();
        }
    }
}

/// Runs a program that tests by itself and ends with 0 if all is well.
pub fn try_test(workshop: &Workshop, program: &Path, more: &[&Path]) {
    let path = workshop.mountpoint("disk");
    let watchdog = Watchdog::new(&path);
    for queues in ["1", "4"] {
        eprintln!("{} {queues}", program.display());
        let mut running = Running::start(Command::new(program).arg(&path).arg(queues).args(more));
        // Its own watchdog comes first.
        let status = running.status(PATIENCE);
        assert!(status.success(), "{} {queues}: {status}", program.display());
        assert!(!is_mounted(&path), "{} stayed mounted", path.display());
    }
    drop(watchdog);
}

//! C and C++ programs that tests compile against the built libraries.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blkfuse::Threads;
use tempfile::TempDir;

pub use crate::common::running::Running;
use crate::common::{self, Watchdog, is_mounted, skip};

/// How long valgrind may take to start a program.
pub const PATIENCE: Duration = Duration::from_secs(50);
pub const C: &str = "-std=c99";
/// With threads and atomics of its own.
pub const C11: &str = "-std=c11";
pub const CXX: &str = "-std=c++17";
/// What libblkfuse.a needs besides the C library, as
/// `rustc --print native-static-libs` says.
const NATIVE: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linking {
    Shared,
    Static,
    /// Not at all: a plugin of blkfused, of a source that asks for PLUGIN.
    Plugin,
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
            Linking::Plugin => command.args(["-DPLUGIN", "-shared", "-fPIC"]),
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

/// Runs a program that tests by itself and ends with 0 if all is well.
pub fn try_test(workshop: &Workshop, program: &Path, more: &[&Path]) {
    try_test_with(workshop, program, more, Threads::Library);
}

/// The same; `threads`: whose run its exports' queues.
pub fn try_test_with(workshop: &Workshop, program: &Path, more: &[&Path], threads: Threads) {
    let path = workshop.mountpoint("disk");
    let watchdog = Watchdog::new(&path);
    let whose = match threads {
        Threads::Host => "host",
        _ => "library",
    };
    for queues in ["1", "4"] {
        eprintln!("{} {queues}, threads of the {whose}", program.display());
        let mut command = Command::new(program);
        command.arg(&path).arg(queues).args(more);
        let mut running = Running::start(command.env("BLKFUSE_TEST_THREADS", whose));
        // Its own watchdog comes first.
        let status = running.status(PATIENCE);
        assert!(status.success(), "{} {queues}: {status}", program.display());
        assert!(!is_mounted(&path), "{} stayed mounted", path.display());
    }
    drop(watchdog);
}

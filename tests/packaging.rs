//! The library as cargo-c installs it: the files, their names, and programs
//! that are built against them the way pkg-config says.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use common::running::Running;
use common::{SOON, Watchdog, can_export, is_mounted, pattern, skip};

/// A directory in which the library is installed under usr, with the libraries
/// in usr/lib. `None`, and said, if there is no cargo-c.
///
/// It is always the same one, in a target directory of its own: cargo-c builds
/// everything anew for another.
fn staged() -> Option<&'static Path> {
    static STAGED: OnceLock<Option<PathBuf>> = OnceLock::new();
    let staged = STAGED.get_or_init(|| {
        let cargo = || Command::new(env!("CARGO"));
        let found = cargo().args(["cinstall", "--version"]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            skip("there is no cargo-c: cargo install --locked cargo-c");
            return None;
        }
        let usual = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        let target = usual.join("packaging");
        let destination = target.join("stage");
        let _ = fs::remove_dir_all(&destination);
        let mut install = cargo();
        install
            .args(["cinstall", "--locked", "--no-default-features"])
            .args(["--prefix=/usr", "--libdir=lib"])
            .arg(format!("--destdir={}", destination.display()))
            .arg(format!("--target-dir={}", target.display()))
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        succeeded(&mut install);
        Some(destination)
    });
    staged.as_deref()
}

/// Runs a command to its end, which must be a good one.
fn succeeded(command: &mut Command) -> Output {
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output
}

/// All files below a directory, by their path from there, and where those that
/// are symbolic links lead.
fn tree(root: &Path) -> BTreeMap<String, Option<PathBuf>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                directories.push(path);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            files.insert(name.to_owned(), fs::read_link(&path).ok());
        }
    }
    files
}

/// The values that `readelf -d` shows of one kind of entry.
fn dynamic(file: &Path, kind: &str) -> Vec<String> {
    let output = succeeded(Command::new("readelf").arg("-d").arg(file));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| line.contains(kind));
    lines
        .map(|line| {
            let (_, value) = line.split_once('[').unwrap();
            value.trim_end_matches(']').to_owned()
        })
        .collect()
}

/// What pkg-config says of the staged library; `None`, and said, if there is
/// no pkg-config.
fn pkg_config(root: &Path, args: &[&str]) -> Option<Vec<String>> {
    if Command::new("pkg-config")
        .arg("--version")
        .output()
        .is_err()
    {
        skip("there is no pkg-config");
        return None;
    }
    let mut command = Command::new("pkg-config");
    command
        .env("PKG_CONFIG_LIBDIR", root.join("usr/lib/pkgconfig"))
        .env("PKG_CONFIG_SYSROOT_DIR", root)
        // Within the root these are not where the compiler looks by itself.
        .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
        .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1")
        .args(args)
        .arg("blkfuse");
    let output = succeeded(&mut command);
    let text = String::from_utf8(output.stdout).unwrap();
    Some(text.split_whitespace().map(str::to_owned).collect())
}

#[test]
fn everything_that_c_programs_need_is_installed() {
    let Some(root) = staged() else { return };
    let version = env!("CARGO_PKG_VERSION");
    let library = format!("libblkfuse.so.{version}");
    let link = || Some(PathBuf::from(&library));
    let expected = BTreeMap::from([
        ("usr/include/blkfuse-plugin.h".into(), None),
        ("usr/include/blkfuse.h".into(), None),
        ("usr/lib/libblkfuse.a".into(), None),
        ("usr/lib/libblkfuse.so".into(), link()),
        ("usr/lib/libblkfuse.so.0".into(), link()),
        (format!("usr/lib/{library}"), None),
        ("usr/lib/pkgconfig/blkfuse.pc".into(), None),
        ("usr/share/man/man3/blkfuse-driver.3".into(), None),
        ("usr/share/man/man3/blkfuse-plugin.3".into(), None),
        ("usr/share/man/man3/blkfuse.3".into(), None),
    ]);
    assert_eq!(tree(root), expected);

    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/blkfuse.h");
    let installed = fs::read(root.join("usr/include/blkfuse.h")).unwrap();
    assert!(installed == fs::read(header).unwrap());
    let library = root.join("usr/lib").join(library);
    assert_eq!(dynamic(&library, "(SONAME)"), ["libblkfuse.so.0"]);
    if let Some(told) = pkg_config(root, &["--modversion"]) {
        assert_eq!(told, [version]);
    }
}

/// Builds c-examples/ramdisk.c against the staged library, and uses its disk.
fn try_example(root: &Path, libraries: &[String], expected: &[&str]) {
    let Some(flags) = pkg_config(root, &["--cflags"]) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let workshop = dir.path().canonicalize().unwrap();
    let program = workshop.join("ramdisk");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-examples/ramdisk.c");
    let mut compile = Command::new("cc");
    compile.args(flags).arg(source).arg("-o").arg(&program);
    succeeded(compile.args(libraries));
    let mut needed = dynamic(&program, "(NEEDED)");
    needed.retain(|name| name.contains("blkfuse"));
    assert_eq!(needed, expected);

    if !can_export() {
        return;
    }
    let path = workshop.join("disk");
    File::create(&path).unwrap();
    let _watchdog = Watchdog::new(&path);
    let mut command = Command::new(&program);
    // In the place of what Cargo sets, with which the test's own would be found.
    command.env("LD_LIBRARY_PATH", root.join("usr/lib"));
    let mut running = Running::start(command.arg(&path));
    assert!(running.line(SOON).ends_with("until this ends"));
    let file = OpenOptions::new().read(true).write(true).open(&path);
    let file = file.unwrap();
    assert_eq!(file.metadata().unwrap().len(), 64 << 20);
    let data = pattern(0, 100_000);
    file.write_all_at(&data, 511).unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, 511).unwrap();
    assert!(back == data);
    drop(file);
    running.signal(libc::SIGTERM);
    assert!(running.status(Duration::from_secs(10)).success());
    assert!(!is_mounted(&path));
}

#[test]
fn a_program_is_linked_with_the_shared_library() {
    let Some(root) = staged() else { return };
    if let Some(libraries) = pkg_config(root, &["--libs"]) {
        try_example(root, &libraries, &["libblkfuse.so.0"]);
    }
}

#[test]
fn a_program_is_linked_with_the_static_library() {
    let Some(root) = staged() else { return };
    if let Some(mut libraries) = pkg_config(root, &["--static", "--libs"]) {
        let library = libraries.iter_mut().find(|name| *name == "-lblkfuse");
        // The linker prefers a shared library of the same name.
        *library.expect("it names the library") = "-l:libblkfuse.a".into();
        try_example(root, &libraries, &[]);
    }
}

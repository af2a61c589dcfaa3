//! The promise that programs built against an earlier release go on working:
//! today's header and library against the header of the first release.
//!
//! abidiff compares two libraries that do nothing, one for each header, as the
//! same C compiler describes them. What rustc writes about the real library's
//! Rust types is not C, and differs from one version of rustc to the next. That
//! the real one is what today's header says is tested elsewhere: its symbols
//! in tests/header.rs, its structs in src/capi/layout.rs.

#[path = "common/c_header.rs"]
mod c_header;
mod common;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use c_header::{Header, Item, Kind};
use common::running::Running;
use common::{Watchdog, can_export, is_mounted, skip};
use tempfile::TempDir;

const FIRST: &str = include_str!("abi/blkfuse-0.1.h");
const TODAYS: &str = include_str!("../include/blkfuse.h");

/// A directory with a header, and a library of functions that do nothing.
struct Stub {
    dir: TempDir,
}

impl Stub {
    /// `None`, and said, if there is no C compiler.
    fn build(header: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("blkfuse.h"), header).unwrap();
        let mut source = String::from("#include \"blkfuse.h\"\n");
        for function in Header::parse(header).functions() {
            source.push_str(&format!("{} {{ __builtin_trap(); }}\n", function.code));
        }
        fs::write(dir.path().join("stub.c"), source).unwrap();
        let mut compile = Command::new("gcc");
        compile
            .args(["-g", "-shared", "-fPIC", "-Wl,-soname,libblkfuse.so.0"])
            .args(["stub.c", "-o", "libblkfuse.so"])
            .current_dir(dir.path());
        compiled(&mut compile)?;
        Some(Self { dir })
    }

    fn library(&self) -> PathBuf {
        self.dir.path().join("libblkfuse.so")
    }
}

/// Runs a compiler; `None`, and said, if there is none.
fn compiled(command: &mut Command) -> Option<()> {
    let Ok(output) = command.output() else {
        skip("there is no gcc");
        return None;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    Some(())
}

/// The structs that begin with their size, or are handed over with it, and may
/// grow at their end.
const GROWING: [&str; 3] = ["blkfuse_driver_ops", "blkfuse_limits", "blkfuse_stats"];

/// The new header without what such structs have behind their members of old.
/// (abidiff could be told to overlook it, but then overlooks all other changes
/// of the struct as well.)
fn without_growth(old: &str, new: &str) -> String {
    let members = |header: &str, name: &str| {
        let items = Header::parse(header).items;
        let found = items.iter().find(|item| item.name == name);
        found.expect(name).members().to_vec()
    };
    let mut cut = new.to_owned();
    for name in GROWING {
        let known = members(old, name).len();
        if let Some(more) = members(new, name).get(known) {
            let start = cut.find(&format!("struct {name} {{")).unwrap();
            let from = start + cut[start..].find(&format!("{};", more.code)).unwrap();
            let to = from + cut[from..].find("\n};").unwrap();
            cut.replace_range(from..to, "");
        }
    }
    cut
}

/// What abidiff has against the second header in the place of the first; empty
/// if a program cannot tell. `None`, and said, if it cannot be asked.
fn incompatible(old: &str, new: &str) -> Option<String> {
    let (old, new) = (Stub::build(old)?, Stub::build(&without_growth(old, new))?);
    let output = Command::new("abidiff")
        .arg("--no-added-syms")
        .args([old.library(), new.library()])
        .output();
    let Ok(output) = output else {
        skip("there is no abidiff (abigail-tools)");
        return None;
    };
    // It has bits for failures, and for changes.
    let code = output.status.code().expect("abidiff ends");
    assert_eq!(code & 3, 0, "{output:?}");
    let report = String::from_utf8(output.stdout).unwrap();
    Some(if code == 0 { String::new() } else { report })
}

#[test]
fn the_header_is_compatible_with_the_first_releases() {
    if let Some(report) = incompatible(FIRST, TODAYS) {
        assert!(report.is_empty(), "{report}");
    }
}

fn macros(header: &Header) -> impl Iterator<Item = &Item> {
    let items = header.items.iter();
    items.filter(|item| item.kind == Kind::Macro)
}

#[test]
fn constants_have_the_values_of_the_first_release() {
    let today = Header::parse(TODAYS);
    let first = Header::parse(FIRST);
    let mut compared = 0;
    // These have comments; those that make up the version have none.
    for old in macros(&first).filter(|old| old.name != "BLKFUSE_VERSION") {
        let new = macros(&today).find(|new| new.name == old.name);
        let code = new.map(|new| new.code.as_str());
        assert_eq!(code, Some(old.code.as_str()));
        compared += 1;
    }
    assert!(compared > 10, "the headers were understood");
}

#[test]
fn incompatible_changes_are_noticed_and_growth_is_not_one() {
    let changed = |from: &str, to: &str| {
        assert_eq!(FIRST.matches(from).count(), 1, "{from}");
        incompatible(FIRST, &FIRST.replace(from, to))
    };
    let after_ops = "    int (*backing_fd)(void *opaque);\n};";
    let grown = "    int (*backing_fd)(void *opaque);\n    /**\n     * New.\n     */\n    \
                 int (*more)(void *opaque);\n};";
    let version = "uint32_t blkfuse_version(void);";
    for (from, to) in [
        // A function that is gone, or takes or gives something else.
        (version, "uint32_t blkfuse_other(void);"),
        (version, "uint64_t blkfuse_version(void);"),
        (
            "blkfuse_export_drain(struct blkfuse_export *export_, int64_t",
            "blkfuse_export_drain(struct blkfuse_export *export_, int32_t",
        ),
        // A member that is gone, inserted, or another.
        (after_ops, "};"),
        (
            "    int64_t (*length)(",
            "    int new;\n    int64_t (*length)(",
        ),
        (
            "    void (*idle)(void *opaque);",
            "    void (*idle)(int opaque);",
        ),
        ("    uint64_t latency[32];", "    uint64_t latency[33];"),
        // A struct that must not grow.
        (
            "    uint64_t errors;\n};",
            "    uint64_t errors;\n    uint64_t more;\n};",
        ),
    ] {
        let Some(report) = changed(from, to) else {
            return;
        };
        assert!(!report.is_empty(), "{from} -> {to}");
    }
    for (from, to) in [
        (after_ops, grown),
        (
            version,
            "uint32_t blkfuse_version(void);\n\n/**\n * New.\n */\nint blkfuse_new(void);",
        ),
    ] {
        let report = changed(from, to).unwrap();
        assert!(report.is_empty(), "{from} -> {to}: {report}");
    }
    // Nor does growth hide anything else.
    let worse = FIRST.replace(after_ops, grown).replace(
        "    void (*idle)(void *opaque);",
        "    void (*idle)(int opaque);",
    );
    assert!(!incompatible(FIRST, &worse).unwrap().is_empty());
}

#[test]
fn a_program_built_for_the_first_release_works() {
    // As then: linked with that release's library.
    let Some(then) = Stub::build(FIRST) else {
        return;
    };
    let program = then.dir.path().join("first");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi/first.c");
    let mut compile = Command::new("gcc");
    compile
        .args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-g"])
        .arg("-I")
        .arg(then.dir.path())
        .arg(source)
        .arg("-o")
        .arg(&program)
        .arg(then.library())
        .arg("-lpthread");
    if compiled(&mut compile).is_none() || !can_export() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let now = dir.path().canonicalize().unwrap();
    let library = common::library_dir().join("libblkfuse.so");
    symlink(library, now.join("libblkfuse.so.0")).unwrap();
    let path = now.join("disk");
    File::create(&path).unwrap();
    let watchdog = Watchdog::new(&path);
    let mut command = Command::new(&program);
    // All of its functions must be there.
    command.env("LD_LIBRARY_PATH", &now).env("LD_BIND_NOW", "1");
    let mut running = Running::start(command.arg(&path));
    let status = running.status(Duration::from_secs(50));
    assert!(status.success(), "{status}");
    assert!(!is_mounted(&path));
    drop(watchdog);
}

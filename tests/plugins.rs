//! Plugins of the daemon: the example and one with every callback, served in
//! every way; their help; what must be true of their lives; and everything that
//! can be wrong with one.

mod common;
mod daemon_support;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use blkfuse::IoUring;
use common::checked::{SANITIZE, Sanitizers, valgrind};
use common::client::errno;
use common::{SOON, eventually, for_transports, pattern, skip, unmount};
use daemon_support::*;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek};

const PUNCH: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);
const EXAMPLE: &str = "c-examples/plugin.c";
const TESTER: &str = "tests/c/plugin.c";

fn in_package(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Compiles a plugin as anybody would; `more` comes last.
fn build(s: &Scratch, compiler: &str, source: &str, more: Vec<OsString>) -> Option<PathBuf> {
    if !installed(&[compiler]) {
        return None;
    }
    let stem = Path::new(source).file_stem().unwrap();
    let library = s.join(stem).with_extension("so");
    let mut command = Command::new(compiler);
    command
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(in_package("include"))
        .arg(in_package(source))
        .arg("-o")
        .arg(&library)
        .args(more);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text_of(&output));
    Some(library)
}

fn example(s: &Scratch) -> Option<PathBuf> {
    build(s, "cc", EXAMPLE, vec![])
}

fn tester(s: &Scratch) -> Option<PathBuf> {
    build(s, "cc", TESTER, args!["-lpthread"])
}

/// The words that have the daemon use a transport.
fn over(transport: IoUring) -> Vec<OsString> {
    args![
        "--io-uring",
        if transport == IoUring::On {
            "on"
        } else {
            "off"
        }
    ]
}

/// A setting whose value is a path.
fn set(key: &str, value: &Path) -> OsString {
    let mut word = OsString::from(format!("{key}="));
    word.push(value);
    word
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

// --- Serving -----------------------------------------------------------------

#[test]
fn the_example_is_a_disk_over_both_transports() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = example(&s) else {
        return;
    };
    let at = s.mountpoint("disk");
    for_transports(|transport| {
        for threads in ["1", "3"] {
            let mut all = over(transport);
            all.extend(args!["-w", "--threads", threads, "--plugin", plugin]);
            all.extend(args!["size=3M", "pattern=0x5a", at]);
            let daemon = Daemon::start(all);
            assert_eq!(
                daemon.ready,
                [format!(
                    "blkfused: {} (3 MiB, writable) is at {at}; stop with Ctrl-C or: umount {at}",
                    plugin.display(),
                    at = at.display()
                )]
            );
            let queues = format!(" {threads} queues");
            eventually("a message", || daemon.stderr().contains(&queues));
            use_example(&at);
            daemon.stop();
        }
    });
}

/// Does all that can be done with a disk of the example: 3 MiB of 0x5a.
fn use_example(at: &Path) {
    assert_same(&fs::read(at).unwrap(), &vec![0x5a; 3 << 20]);
    thread::scope(|scope| {
        for part in 0..3 {
            scope.spawn(move || {
                let data = pattern(part << 20, 1 << 20);
                open(at).write_all_at(&data, (part << 20) as u64).unwrap();
            });
        }
    });
    assert_same(&fs::read(at).unwrap(), &pattern(0, 3 << 20));
    // Its driver can neither free space nor change its length.
    let file = open(at);
    fallocate(&file, PUNCH, 4096, 8192).unwrap();
    let mut back = [1; 8192];
    file.read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(back, [0; 8192]);
    assert_eq!(errno(file.set_len(1)), libc::EOPNOTSUPP);
}

/// Has a blkfused that is watched show a disk of the example. `command` begins
/// its command line.
fn try_watched(s: &Scratch, plugin: &Path, mut command: Command) {
    let at = s.mountpoint("disk");
    command.args(args!["-w", "--threads", "3", "--plugin", plugin]);
    command.args(args!["size=3M", "pattern=0x5a", at]);
    let daemon = Daemon::spawn(command, 1);
    use_example(&at);
    daemon.signal(Signal::SIGTERM);
    // It looks for leaks in the end.
    let end = daemon.wait(2 * SOON);
    assert!(end.status.success(), "{end:?}");
}

#[test]
fn the_example_uses_memory_rightly() {
    let Some(s) = scratch() else { return };
    let Some(valgrind) = valgrind() else { return };
    let Some(plugin) = example(&s) else { return };
    let mut command = valgrind();
    command.arg(blkfused().get_program());
    try_watched(&s, &plugin, command);
}

#[test]
fn sanitizers_find_nothing_in_the_example() {
    let Some(s) = scratch() else { return };
    // Their code comes with the plugin, and must be there before all other.
    let more = [&SANITIZE[..], &["-g", "-shared-libasan"]].concat();
    let more = more.iter().map(OsString::from).collect();
    let Some(plugin) = build(&s, "clang", EXAMPLE, more) else {
        return;
    };
    let library = format!("libclang_rt.asan-{}.so", std::env::consts::ARCH);
    let mut find = Command::new("clang");
    let found = find.arg(format!("-print-file-name={library}")).output();
    let path = String::from_utf8(found.unwrap().stdout).unwrap();
    let sanitizers = Sanitizers::new();
    let mut command = sanitizers.command(blkfused().get_program());
    command.env("LD_PRELOAD", path.trim_end());
    try_watched(&s, &plugin, command);
}

#[test]
fn requests_are_answered_at_once_later_or_by_forwarding() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let at = s.mountpoint("disk");
    for_transports(|transport| {
        for how in ["now", "thread", "forward"] {
            let (image, log) = (s.file("disk.img", &pattern(0, 1 << 20)), s.join("log"));
            let _ = fs::remove_file(&log);
            let mut all = over(transport);
            all.extend(args!["-w", "--threads", "2", "--plugin", plugin]);
            all.extend(args![set("file", &image), set("log", &log)]);
            all.extend(args![format!("how={how}"), at]);
            let daemon = Daemon::start(all);
            assert_same(&fs::read(&at).unwrap(), &pattern(0, 1 << 20));
            thread::scope(|scope| {
                for part in 0..4u64 {
                    let at = &at;
                    scope.spawn(move || {
                        let file = open(at);
                        for offset in (part << 18..(part + 1) << 18).step_by(7000) {
                            let len = 7000.min(((part + 1) << 18) - offset) as usize;
                            let data = pattern(offset as usize + 5, len);
                            file.write_all_at(&data, offset).unwrap();
                            let mut back = vec![0; len];
                            file.read_exact_at(&mut back, offset).unwrap();
                            assert_same(&back, &data);
                        }
                        file.sync_all().unwrap();
                    });
                }
            });
            daemon.stop();
            let written = fs::read(&image).unwrap();
            for part in 0..4 {
                let start = part << 18;
                assert_same(&written[start..start + 7000], &pattern(start + 5, 7000));
            }
            let log = lines(&log);
            assert_eq!(log[0], "open writable");
            for line in ["queue 0 starts", "queue 1 starts", "event 1", "flush"] {
                assert!(log.contains(&line.to_owned()), "{line}: {log:?}");
            }
            assert!(!log.iter().any(|line| line.contains("another")), "{log:?}");
            let place = |wanted: &str| log.iter().rposition(|line| line == wanted).unwrap();
            assert!(place("queue 0 stops") < place("deleted"), "{log:?}");
            assert!(place("queue 1 stops") < place("deleted"), "{log:?}");
            assert_eq!(log[log.len() - 3..], ["sync", "deleted", "close"]);
        }
    });
}

#[test]
fn what_the_driver_says_of_the_device_is_seen() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (image, at, log) = (
        s.file("disk.img", &[1; 100_000]),
        s.mountpoint("disk"),
        s.join("log"),
    );
    let settings = args![set("file", &image), set("log", &log)];
    let daemon = Daemon::start([args!["--plugin", plugin], settings, args![at]].concat());
    assert!(daemon.ready[0].contains("(100000 bytes, read-only)"));
    let line = common::mount_line(&at).unwrap();
    assert!(line.contains(plugin.to_str().unwrap()), "{line}");
    let refused = OpenOptions::new().write(true).open(&at);
    assert_eq!(errno(refused), libc::EROFS);
    let file = File::open(&at).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.blocks(), metadata.blksize()), (77, 8192));
    assert_eq!(lseek(&file, 5, Whence::SeekHole).unwrap(), 65536);
    drop(file);
    unmount(&at, MntFlags::empty());
    assert!(daemon.wait(STOP).status.success());
    let log = lines(&log);
    assert_eq!(log[0], "open read-only");
    assert!(log.contains(&"event 3".to_owned()), "{log:?}");
    // There was nothing to make durable.
    assert!(!log.contains(&"sync".to_owned()), "{log:?}");
    assert_eq!(log[log.len() - 2..], ["deleted", "close"]);
}

#[test]
fn the_daemons_options_reach_a_plugin() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (at, log) = (s.mountpoint("disk"), s.join("log"));
    for (discard, called) in [("on", "discard"), ("off", "write_zeroes")] {
        let _ = fs::remove_file(&log);
        let image = s.file("disk.img", &[7; 1 << 20]);
        let mut all = args!["-w", "--growable", "--discard", discard, "--plugin", plugin];
        all.extend(args![set("file", &image), set("log", &log), at]);
        let daemon = Daemon::start(all);
        let file = open(&at);
        fallocate(&file, PUNCH, 65536, 131_072).unwrap();
        file.write_all_at(b"grown", 2 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (2 << 20) + 5);
        drop(file);
        daemon.stop();
        let expected = [&[7; 65536][..], &[0; 131_072], &[7; (1 << 20) - 196_608]].concat();
        let written = fs::read(&image).unwrap();
        assert_same(&written[..1 << 20], &expected);
        assert_eq!(written.len(), (2 << 20) + 5);
        let log = lines(&log);
        assert!(log.contains(&called.to_owned()), "{log:?}");
        assert_eq!(
            log.contains(&"discard".to_owned()),
            discard == "on",
            "{log:?}"
        );
        assert!(
            !log.iter().any(|line| line.contains("may unmap")),
            "{log:?}"
        );
    }
}

#[test]
fn the_kernel_reads_a_plugins_backing_file() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (image, at) = (
        s.file("disk.img", &pattern(0, 1 << 20)),
        s.mountpoint("disk"),
    );
    let (file, log) = (set("file", &image), s.join("log"));
    for (passthrough, called) in [(&["--passthrough"][..], false), (&[], true)] {
        let _ = fs::remove_file(&log);
        let mut all: Vec<_> = passthrough.iter().map(Into::into).collect();
        all.extend(args!["--plugin", plugin, file, set("log", &log), at]);
        let daemon = Daemon::start(all);
        assert_same(&fs::read(&at).unwrap(), &pattern(0, 1 << 20));
        daemon.stop();
        assert_eq!(lines(&log).contains(&"read".to_owned()), called);
    }
    let Some(plugin) = example(&s) else {
        return;
    };
    let why = refusal(args!["--passthrough", "--plugin", plugin, at]);
    assert!(why.contains("passthrough"), "{why}");
}

#[test]
fn several_devices_of_plugins_and_images_are_exported_at_once() {
    let Some(s) = scratch() else { return };
    // With a comma and equals signs in its name, which are no separators.
    let Some(built) = example(&s) else {
        return;
    };
    let plugin = s.join("a,b=c.so");
    fs::rename(&built, &plugin).unwrap();
    let image = s.file("disk.img", &pattern(9, 5000));
    let at: Vec<_> = (0..4).map(|n| s.mountpoint(format!("disk{n}"))).collect();
    let doubled = plugin.to_str().unwrap().replace(',', ",,");
    let export = |name: &str, at: &Path| format!("{name}={}", at.display());
    let all = args![
        "-w",
        "--plugin",
        plugin,
        "pattern=1",
        "size=1M",
        at[0],
        "--export",
        export(&format!("plugin:{doubled},size=1K,pattern=2"), &at[1]),
        "--export",
        export(&format!("plugin:{doubled},size=2K,pattern=3"), &at[2]),
        "--export",
        export(image.to_str().unwrap(), &at[3]),
    ];
    let daemon = Daemon::start_several(all, 4);
    assert_same(&fs::read(&at[0]).unwrap(), &vec![1; 1 << 20]);
    assert_same(&fs::read(&at[1]).unwrap(), &[2; 1024]);
    assert_same(&fs::read(&at[3]).unwrap(), &pattern(9, 5000));
    open(&at[1]).write_all_at(&[9; 1024], 0).unwrap();
    assert_same(&fs::read(&at[2]).unwrap(), &[3; 2048]);
    // One may end before the others.
    unmount(&at[1], MntFlags::empty());
    eventually("it is unmounted", || !common::is_mounted(&at[1]));
    assert_same(&fs::read(&at[2]).unwrap(), &[3; 2048]);
    daemon.stop();
}

#[test]
fn a_plugin_is_looked_for_where_it_is_named() {
    let Some(s) = scratch() else { return };
    let Some(_plugin) = example(&s) else {
        return;
    };
    s.mountpoint("disk");
    let mut command = blkfused();
    command.current_dir(s.path()).stdin(Stdio::null());
    command.args(["--plugin", "plugin.so", "size=512", "disk"]);
    let daemon = Daemon::spawn(command, 1);
    assert_eq!(fs::metadata(s.join("disk")).unwrap().len(), 512);
    daemon.stop();
}

// --- The end -----------------------------------------------------------------

#[test]
fn an_opened_device_is_closed_once_however_the_start_fails() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (image, log, at) = (
        s.file("disk.img", b"x"),
        s.join("log"),
        s.mountpoint("disk"),
    );
    let gone = s.join("gone");
    let start = |more: Vec<OsString>| {
        let _ = fs::remove_file(&log);
        let settings = args![set("file", &image), set("log", &log)];
        let why = refusal([args!["-w", "--plugin", plugin], settings, more].concat());
        assert_eq!(s.mounts(), [] as [PathBuf; 0]);
        (why, lines(&log))
    };
    // Nothing to mount over; another image that is missing; a table of
    // callbacks that is refused; and an open that fails.
    let (why, log) = start(args![gone]);
    assert!(
        why.ends_with("No such file or directory") && why.contains("gone"),
        "{why}"
    );
    assert_eq!(log, ["open writable", "deleted", "close"]);
    let missing = format!("{}={}", gone.display(), at.display());
    let (why, log) = start(args![at, "--export", missing]);
    assert!(
        why.ends_with("No such file or directory") && why.contains("gone"),
        "{why}"
    );
    assert_eq!(log, ["open writable", "deleted", "close"]);
    let (why, log) = start(args!["fault=no-read", at]);
    assert!(
        why.ends_with("plugin.so: a driver needs the callbacks length and read"),
        "{why}"
    );
    assert_eq!(log, ["open writable", "close"]);
    let (why, log) = start(args!["fault=no-ops", at]);
    assert!(
        why.ends_with("plugin.so: the driver's table is NULL"),
        "{why}"
    );
    assert_eq!(log, ["open writable", "close"]);
    let (_, log) = start(args!["fault=silent", at]);
    assert_eq!(log, ["open writable"]);
}

#[test]
fn what_cannot_be_made_durable_fails_the_daemon() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (image, at) = (s.file("disk.img", b"x"), s.mountpoint("disk"));
    let settings = args![set("file", &image), "fault=sync"];
    let daemon = Daemon::start([args!["-w", "--plugin", plugin], settings, args![at]].concat());
    daemon.signal(Signal::SIGTERM);
    let end = daemon.wait(STOP);
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    let expected = "plugin.so: what was written may be lost: No space left on device\n";
    assert!(end.stderr.contains(expected), "{end:?}");
}

#[test]
fn exceptions_end_the_process() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = build(&s, "c++", "tests/c/throwing.cpp", vec![]) else {
        return;
    };
    let at = s.mountpoint("disk");
    let spawn = |words: Vec<OsString>, lines| {
        let mut command = blkfused();
        command
            .arg("--plugin")
            .arg(&plugin)
            .args(words)
            .stdin(Stdio::null());
        Daemon::spawn(command, lines)
    };
    let aborted = |daemon: Daemon| {
        let end = daemon.wait(SOON);
        assert_eq!(end.status.signal(), Some(libc::SIGABRT), "{end:?}");
        assert!(end.stderr.contains("foreign exception"), "{end:?}");
    };
    aborted(spawn(args!["early=1", at], 0));
    for threads in ["1", "2"] {
        let daemon = spawn(args!["--threads", threads, at], 1);
        // Not left waiting.
        let mut file = File::open(&at).unwrap();
        assert!(file.read(&mut [0; 512]).is_err());
        aborted(daemon);
        drop(file);
        umount2(&at, MntFlags::MNT_DETACH).unwrap();
    }
}

// --- The help ----------------------------------------------------------------

#[test]
fn a_plugin_has_its_own_help() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = example(&s) else {
        return;
    };
    let program = blkfused().get_program().to_owned();
    let expected = format!(
        "memory 1.0: a disk in memory, filled with a pattern\n\
         \n\
         Usage: blkfused [OPTIONS] --plugin {} [KEY=VALUE]... MOUNTPOINT\n\
         \n\
         Keys:\n\
         \x20 size     bytes of the disk, like 1000001, 64M (the default) or 1G\n\
         \x20 pattern  the byte that it is filled with, like 0 (the default) or 0x5a\n\
         \n\
         The OPTIONS are those of blkfused --help.\n",
        plugin.display()
    );
    assert_eq!(run(&program, args!["--plugin", plugin, "--help"]), expected);
    assert_eq!(
        run(&program, args!["-h", "size=1", "--plugin", plugin]),
        expected
    );

    let general = run(&program, args!["--help"]);
    assert!(general.contains("--plugin <FILE>"), "{general}");
    assert!(general.contains("blkfused [OPTIONS] --plugin FILE [KEY=VALUE]... MOUNTPOINT"));
    let (code, why) = failure(args!["--help", "--plugin", s.join("gone.so")]);
    assert_eq!(code, 1);
    assert!(
        why.ends_with("gone.so: No such file or directory\n"),
        "{why}"
    );

    let Some(plugin) = tester(&s) else {
        return;
    };
    let help = run(&program, args!["--plugin", plugin, "--help"]);
    let (_, keys) = help.split_once("\nKeys:\n").unwrap();
    assert_eq!(
        keys,
        "  file   the file that is served;\n         its bytes are the device's\n\
         \x20 log    where it is written down what happens\n  how\n  fault  what is wrong\n\
         \nNobody should need this.\n\nThe OPTIONS are those of blkfused --help.\n"
    );
}

// --- What can be wrong -------------------------------------------------------

/// The complaint about a plugin, behind its name.
fn complaint(plugin: &Path, words: Vec<OsString>) -> String {
    let why = refusal([args!["--plugin", plugin], words].concat());
    let name = format!("{}: ", plugin.display());
    let reason = why.strip_prefix(&name);
    reason.unwrap_or_else(|| panic!("{name}{why}")).to_owned()
}

#[test]
fn what_is_no_plugin_is_refused_with_the_reason() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    let fifo = s.join("fifo.so");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (file, reason) in [
        (s.join("gone.so"), "No such file or directory"),
        (s.path().to_owned(), "is a directory; name a shared library"),
        (fifo, "is not a regular file; name a shared library"),
        (s.file("empty.so", b""), "cannot be loaded: file too short"),
        (
            s.file("text.so", &[b'x'; 1000]),
            "cannot be loaded: invalid ELF header",
        ),
    ] {
        assert_eq!(complaint(&file, args![at]), reason);
    }
    let source = s.file("any.c", b"int frobnicate(void) { return 1; }\n");
    let Some(any) = build(&s, "cc", source.to_str().unwrap(), vec![]) else {
        return;
    };
    assert_eq!(
        complaint(&any, args![at]),
        "has no function blkfuse_plugin_get, as a plugin has"
    );
    let text = "int blkfuse_frobnicate(void);\nint any(void) { return blkfuse_frobnicate(); }\n";
    let source = s.file("future.c", text.as_bytes());
    let future = build(&s, "cc", source.to_str().unwrap(), vec![]).unwrap();
    assert_eq!(
        complaint(&future, args![at]),
        "cannot be loaded: undefined symbol: blkfuse_frobnicate"
    );
}

#[test]
fn a_table_that_cannot_be_used_is_refused_with_the_reason() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let (image, at) = (s.file("disk.img", b"x"), s.mountpoint("disk"));
    let daemon = |fault: &str, lines| {
        let mut command = blkfused();
        command.args(["--plugin".as_ref(), plugin.as_os_str()]);
        command.args([set("file", &image).as_os_str(), at.as_os_str()]);
        command.env("PLUGIN_FAULT", fault).stdin(Stdio::null());
        Daemon::spawn(command, lines)
    };
    for (fault, reason) in [
        ("null", "blkfuse_plugin_get() has returned no table"),
        (
            "size",
            "its table cannot have 8 bytes; it must begin with BLKFUSE_PLUGIN_INIT",
        ),
        (
            "large",
            "its table cannot have 1048576 bytes; it must begin with BLKFUSE_PLUGIN_INIT",
        ),
        (
            "version",
            "its table is of API version 2, and this blkfused knows 1; use one that fits",
        ),
        (
            "no version",
            "its table is of API version 0, and this blkfused knows 1; use one that fits",
        ),
        (
            "newer",
            "its table has members that this blkfused does not know; use a newer one",
        ),
        ("name", "its table has no \"name\""),
        ("open", "its table has no \"open\""),
        ("request_complete", "its table has no \"request_complete\""),
    ] {
        let end = daemon(fault, 0).wait(SOON);
        assert_eq!(end.status.code(), Some(1), "{fault}: {end:?}");
        let expected = format!("blkfused: {}: {reason}\n", plugin.display());
        assert_eq!(end.stderr, expected, "{fault}");
    }
    // One that is longer, but says nothing there, and one that is shorter.
    for fault in ["later", "older"] {
        daemon(fault, 1).stop();
    }
}

#[test]
fn a_device_that_cannot_be_opened_says_why() {
    let Some(s) = scratch() else { return };
    let Some(plugin) = tester(&s) else {
        return;
    };
    let at = s.mountpoint("disk");
    for (setting, reason) in [
        ("fault=message", "the stars are wrong"),
        ("fault=silent", "cannot open the device: Permission denied"),
        ("fault=positive", "cannot open the device: I/O error"),
        (
            "colour=red",
            "unknown key \"colour\"; it knows: file, log, how, fault",
        ),
        // A device without a length.
        ("file=/nonexistent/disk", "Bad file number"),
    ] {
        assert_eq!(complaint(&plugin, args![setting, at]), reason);
    }
    let endless = complaint(&plugin, args!["fault=unterminated", at]);
    assert!(
        endless.len() >= 255 && endless.bytes().all(|b| b == b'x'),
        "{endless}"
    );

    let Some(plugin) = example(&s) else {
        return;
    };
    for (setting, reason) in [
        ("size=much", "size=much: not a size"),
        ("size=-1", "size=-1: not a size"),
        ("size=99999999999G", "size=99999999999G: not a size"),
        ("size=", "size=: not a size"),
        ("pattern=256", "pattern=256: not a byte"),
        (
            "size=1024000000G",
            "no memory for 1099511627776000000 bytes",
        ),
    ] {
        assert_eq!(complaint(&plugin, args![setting, at]), reason);
    }
    let (code, text) = failure(args!["--plugin", plugin, "size", at]);
    assert_eq!(code, 2);
    assert!(
        text.ends_with("size: does not set anything; write KEY=VALUE\n"),
        "{text}"
    );
}

#[test]
fn a_plugin_with_a_library_of_its_own_is_refused() {
    let Some(s) = scratch() else { return };
    let (at, image) = (s.mountpoint("disk"), s.file("disk.img", b"x"));
    let libraries = common::library_dir();
    let (shared, archive) = (
        libraries.join("libblkfuse.so"),
        libraries.join("libblkfuse.a"),
    );
    std::os::unix::fs::symlink(&shared, s.join("libblkfuse.so.0")).unwrap();
    let rpath = format!("-Wl,-rpath,{}", s.path().display());
    let native = args!["-lpthread", "-lm", "-ldl", "-lgcc_s"];
    let hidden = args!["-Wl,--exclude-libs,ALL"];
    for more in [
        args![shared, rpath],
        [args![archive], native.clone()].concat(),
        [args![archive], native, hidden].concat(),
    ] {
        let Some(plugin) = build(&s, "cc", TESTER, more.clone()) else {
            return;
        };
        assert_eq!(
            complaint(&plugin, args![set("file", &image), at]),
            "has a copy of libblkfuse of its own, which knows nothing of blkfused's requests; \
             link it without libblkfuse: it finds the functions in blkfused",
            "{more:?}"
        );
    }
}

#[test]
fn the_daemon_offers_what_the_header_declares_and_nothing_else() {
    let symbols = |options: &[&str], file: &Path| -> Option<BTreeSet<String>> {
        let Ok(output) = Command::new("nm").args(options).arg(file).output() else {
            skip("there is no nm");
            return None;
        };
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let names = text
            .lines()
            .map(|l| l.split(' ').next().unwrap().to_owned());
        Some(names.collect())
    };
    let dynamic = ["-D", "--defined-only", "--format=posix"];
    let program = PathBuf::from(blkfused().get_program());
    let library = common::library_dir().join("libblkfuse.so");
    let Some((offered, declared)) = symbols(&dynamic, &program).zip(symbols(&dynamic, &library))
    else {
        return;
    };
    assert!(
        declared.contains("blkfuse_request_complete"),
        "{declared:?}"
    );
    let ours = |name: &&String| name.contains("blkfuse");
    let offered: Vec<_> = offered.iter().filter(ours).collect();
    assert_eq!(offered, declared.iter().collect::<Vec<_>>());
}

#[test]
fn the_header_stands_alone_and_can_be_included_twice() {
    for (compiler, language, standard) in [
        ("gcc", "c", "-std=c99"),
        ("clang", "c", "-std=c17"),
        ("g++", "c++", "-std=c++11"),
        ("clang++", "c++", "-std=c++17"),
    ] {
        if !installed(&[compiler]) {
            continue;
        }
        let include = "-include";
        let output = Command::new(compiler)
            .args([standard, "-pedantic", "-Wall", "-Wextra", "-Werror", "-I"])
            .arg(in_package("include"))
            .args([include, "blkfuse-plugin.h", include, "blkfuse-plugin.h"])
            .args(["-fsyntax-only", "-x", language, "/dev/null"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{compiler}: {}", text_of(&output));
    }
}

#[test]
fn the_example_is_plain_c_without_warnings() {
    for compiler in ["gcc", "clang"] {
        if !installed(&[compiler]) {
            continue;
        }
        let output = Command::new(compiler)
            .args([
                "-std=c99",
                "-pedantic",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fPIC",
                "-I",
            ])
            .arg(in_package("include"))
            .args(["-fsyntax-only"])
            .arg(in_package(EXAMPLE))
            .output()
            .unwrap();
        assert!(output.status.success(), "{compiler}: {}", text_of(&output));
    }
}

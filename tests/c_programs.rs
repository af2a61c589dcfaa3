//! C and C++ programs against the built libraries: the examples, and one
//! program for each group of things a host can do wrong, on real mounts.

mod common;
#[path = "common/compiled.rs"]
mod compiled;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blkfuse::Threads;
use common::checked::{SANITIZE, Sanitizers, valgrind};
use common::{SOON, Watchdog, eventually, is_mounted, pattern, skip};
use compiled::{C, CXX, Linking, PATIENCE, Running, Workshop, try_test, try_test_with};

fn fallocate(file: &File, mode: i32, offset: i64, len: i64) {
    // SAFETY: fallocate touches no memory.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn seek(file: &File, offset: i64, whence: i32) -> i64 {
    // SAFETY: lseek touches no memory.
    unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
}

/// Runs an example, uses its disk, and ends it with SIGTERM. `start` begins its
/// command line.
fn try_example(workshop: &Workshop, start: impl Fn() -> Command, limit: Duration, name: &str) {
    let path = workshop.mountpoint("disk");
    let watchdog = Watchdog::new(&path);
    for queues in ["1", "4"] {
        let mut command = start();
        if name == "raw" {
            let image = workshop.path("image");
            File::create(&image).unwrap().set_len(64 << 20).unwrap();
            command.args([&image, &path]);
            command.arg(format!("queues={queues}")).arg("writable");
        } else {
            command.arg(&path).arg(queues);
        }
        eprintln!("{command:?}");
        let mut running = Running::start(&mut command);
        let first = running.line(limit);
        assert!(first.ends_with("until this ends"), "{first}");
        assert!(is_mounted(&path));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        assert_eq!(file.metadata().unwrap().len(), 64 << 20);
        for (offset, len) in [(0, 1), (511, 4098), (1 << 20, 3 << 20), ((64 << 20) - 7, 7)] {
            let data = pattern(offset, len);
            file.write_all_at(&data, offset as u64).unwrap();
            let mut back = vec![0; len];
            file.read_exact_at(&mut back, offset as u64).unwrap();
            assert!(back == data, "{len} bytes at {offset}");
        }
        file.flush().unwrap();
        file.sync_all().unwrap();
        fallocate(
            &file,
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            1 << 20,
            1 << 20,
        );
        fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 2 << 20, 4096);
        let mut back = vec![1; (1 << 20) + 4097];
        file.read_exact_at(&mut back, 1 << 20).unwrap();
        let (zeroes, rest) = back.split_at((1 << 20) + 4096);
        assert!(zeroes.iter().all(|byte| *byte == 0));
        assert_eq!(rest, pattern((2 << 20) + 4096, 1));
        if name == "async" {
            assert_eq!(seek(&file, 1 << 20, libc::SEEK_HOLE), 1 << 20);
            assert_eq!(seek(&file, 1 << 20, libc::SEEK_DATA), 2 << 20);
            drain_under_load(&running, &file, limit);
        }
        drop(file);
        running.signal(libc::SIGTERM);
        let status = running.status(limit);
        assert!(status.success(), "{status}");
        assert!(!is_mounted(&path));
    }
    drop(watchdog);
}

/// Has the example drain itself while clients read and write.
fn drain_under_load(running: &Running, file: &File, limit: Duration) {
    thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let client = scope.spawn(move || {
            let data = pattern(0, 8192);
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                file.write_all_at(&data, 8 << 20).unwrap();
                let mut back = vec![0; data.len()];
                file.read_exact_at(&mut back, 8 << 20).unwrap();
                assert!(back == data);
            }
        });
        for _ in 0..5 {
            running.signal(libc::SIGUSR1);
            let line = running.line(limit);
            assert!(line.starts_with("drained after"), "{line}");
        }
        drop(stop);
        client.join().unwrap();
    });
}

/// Builds and runs one file of tests/c, both ways of linking.
fn c_test(name: &str) {
    let workshop = Workshop::new();
    for (compiler, linking) in [("gcc", Linking::Shared), ("clang", Linking::Static)] {
        let source = format!("tests/c/{name}.c");
        if let Some(program) = workshop.build(compiler, C, &source, linking) {
            try_test(&workshop, &program, &[]);
        }
    }
}

/// The same, and once more with threads of the test's own for the queues.
fn c_test_of_both_threads(name: &str) {
    c_test(name);
    let workshop = Workshop::new();
    let source = format!("tests/c/{name}.c");
    if let Some(program) = workshop.build("gcc", C, &source, Linking::Shared) {
        try_test_with(&workshop, &program, &[], Threads::Host);
    }
}

// It starts nothing, so it is nobody's threads.
#[test]
fn arguments_are_checked() {
    c_test("arguments");
}

#[test]
fn calls_at_the_wrong_time_are_refused_and_failed_starts_can_be_repeated() {
    c_test_of_both_threads("states");
}

#[test]
fn requests_end_once_whenever_and_wherever_they_are_completed() {
    c_test_of_both_threads("completion");
}

#[test]
fn forwarded_requests_end_once_and_with_the_right_bytes() {
    c_test_of_both_threads("forward");
}

// It has queue_start called within blkfuse_export_start(), as only the library's
// threads do. What callbacks may do in the host's threads, loops.c says.
#[test]
fn callbacks_cannot_wait_for_themselves() {
    c_test("reentrancy");
}

#[test]
fn the_kernel_reads_a_backing_file_by_itself() {
    c_test_of_both_threads("passthrough");
}

#[test]
fn the_log_goes_where_it_was_sent() {
    c_test_of_both_threads("log");
}

#[test]
fn drains_under_load_end_by_the_idle_hook() {
    c_test_of_both_threads("drain");
}

// Its queues are always its own threads', as are those of the next one.
#[test]
fn queues_are_run_by_the_right_thread_at_the_right_time() {
    c_test("loops");
}

#[test]
fn a_glib_loop_serves() {
    let workshop = Workshop::new();
    let flags = Command::new("pkg-config")
        .args(["--cflags", "--libs", "glib-2.0"])
        .output();
    let Some(flags) = flags.ok().filter(|output| output.status.success()) else {
        return skip("there is no glib-2.0");
    };
    let flags = String::from_utf8(flags.stdout).unwrap();
    let flags: Vec<_> = flags.split_whitespace().collect();
    for (compiler, linking) in [("gcc", Linking::Shared), ("clang", Linking::Static)] {
        let source = "tests/c/glib.c";
        if let Some(program) = workshop.build_with(compiler, C, source, linking, &flags) {
            try_test(&workshop, &program, &[]);
        }
    }
}

#[test]
fn a_cxx_host_works() {
    let workshop = Workshop::new();
    for (compiler, linking) in [("g++", Linking::Shared), ("clang++", Linking::Static)] {
        if let Some(program) = workshop.build(compiler, CXX, "tests/c/host.cpp", linking) {
            try_test(&workshop, &program, &[]);
        }
    }
}

#[test]
fn the_library_can_be_loaded_and_unloaded() {
    let workshop = Workshop::new();
    // Linked with nothing: whatever is used comes from dlopen().
    let Some(program) = workshop.build("gcc", C, "tests/c/dynamic.c", Linking::Shared) else {
        return;
    };
    let library = workshop.path("libblkfuse.so.0");
    try_test(&workshop, &program, &[&library]);
}

#[test]
fn the_header_stands_alone_and_can_be_included_twice() {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    for (compiler, language, standard) in [
        ("gcc", "c", "-std=c99"),
        ("gcc", "c", "-std=c17"),
        ("clang", "c", "-std=c99"),
        ("g++", "c++", "-std=c++11"),
        ("g++", "c++", "-std=c++17"),
        ("clang++", "c++", "-std=c++17"),
    ] {
        for text in [
            "#include <blkfuse.h>\n",
            "#include <blkfuse.h>\n#include <blkfuse.h>\n",
            "#include <blkfuse.h>\n#if BLKFUSE_VERSION < 1\n#error none\n#endif\n",
        ] {
            let spawned = Command::new(compiler)
                .args([standard, "-pedantic", "-Wall", "-Wextra", "-Werror"])
                .args(["-fsyntax-only", "-x", language, "-", "-I"])
                .arg(&include)
                .stdin(Stdio::piped())
                .spawn();
            let Ok(mut child) = spawned else {
                skip(&format!("there is no {compiler}"));
                continue;
            };
            let mut input = child.stdin.take().unwrap();
            input.write_all(text.as_bytes()).unwrap();
            drop(input);
            let status = child.wait().unwrap();
            assert!(status.success(), "{compiler} {standard}: {text}");
        }
    }
}

fn example(name: &str) {
    let workshop = Workshop::new();
    for (compiler, standard, linking) in [
        ("gcc", C, Linking::Shared),
        ("gcc", C, Linking::Static),
        ("clang", C, Linking::Shared),
        ("clang", C, Linking::Static),
        ("g++", CXX, Linking::Shared),
        ("clang++", CXX, Linking::Static),
    ] {
        let source = format!("c-examples/{name}.c");
        if let Some(program) = workshop.build(compiler, standard, &source, linking) {
            try_example(&workshop, || Command::new(&program), SOON, name);
        }
    }
}

#[test]
fn the_ramdisk_example_works() {
    example("ramdisk");
}

#[test]
fn the_async_example_works() {
    example("async");
}

#[test]
fn the_raw_example_works() {
    example("raw");
}

#[test]
fn the_raw_example_serves_the_image_and_says_what_is_wrong() {
    let workshop = Workshop::new();
    let Some(program) = workshop.build("gcc", C, "c-examples/raw.c", Linking::Shared) else {
        return;
    };
    let (path, image) = (workshop.mountpoint("disk"), workshop.path("image"));
    let _watchdog = Watchdog::new(&path);
    let run = |args: &[&str]| {
        let command = &mut Command::new(&program);
        command.args(args).output().unwrap()
    };
    assert_eq!(run(&["image"]).status.code(), Some(2));
    let text = |output: std::process::Output| {
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let disk = path.to_str().unwrap();
    let refused = text(run(&["/nonexistent/image", disk]));
    assert!(refused.contains("/nonexistent/image"), "{refused}");
    let data = pattern(0, 1_000_001);
    fs::write(&image, &data).unwrap();
    let image_name = image.to_str().unwrap();
    let refused = text(run(&[image_name, disk, "colour=red"]));
    assert!(refused.contains("colour"), "{refused}");

    let mut running = Running::start(
        Command::new(&program)
            .arg(&image)
            .arg(&path)
            .args(["writable=on", "growable=on"]),
    );
    running.line(SOON);
    assert!(fs::read(&path).unwrap() == data);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"grown", 2_000_000).unwrap();
    file.set_len(2_000_004).unwrap();
    drop(file);
    let mut expected = data;
    expected.resize(2_000_000, 0);
    expected.extend(b"grow");
    assert!(fs::read(&image).unwrap() == expected);
    running.signal(libc::SIGTERM);
    assert!(running.status(SOON).success());
}

#[test]
fn the_examples_say_what_is_wrong() {
    let workshop = Workshop::new();
    for name in ["ramdisk", "async"] {
        let source = format!("c-examples/{name}.c");
        let Some(program) = workshop.build("gcc", C, &source, Linking::Shared) else {
            return;
        };
        let run = |args: &[&str]| Command::new(&program).args(args).output().unwrap();
        assert_eq!(run(&[]).status.code(), Some(2));
        let output = run(&["/nonexistent/disk"]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("/nonexistent/disk"), "{text}");
        assert_eq!(run(&["/nonexistent/disk", "many"]).status.code(), Some(1));
    }
}

#[test]
fn the_async_example_ends_when_its_file_is_unmounted_from_outside() {
    let workshop = Workshop::new();
    let Some(program) = workshop.build("gcc", C, "c-examples/async.c", Linking::Shared) else {
        return;
    };
    let path = workshop.mountpoint("disk");
    let _watchdog = Watchdog::new(&path);
    let mut running = Running::start(Command::new(program).arg(&path));
    running.line(SOON);
    nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert!(running.status(SOON).success());
    eventually("the file is the old one", || {
        fs::metadata(&path).is_ok_and(|m| m.len() == 0)
    });
}

/// Runs the examples under valgrind. A program that is its own client cannot
/// run so: valgrind lets one of its threads run at a time.
#[test]
fn the_examples_use_memory_rightly() {
    let workshop = Workshop::new();
    let Some(valgrind) = valgrind() else { return };
    for name in ["ramdisk", "async", "raw"] {
        let source = format!("c-examples/{name}.c");
        let Some(program) = workshop.build("gcc", C, &source, Linking::Shared) else {
            return;
        };
        let start = || {
            let mut command = valgrind();
            command.arg(&program);
            command
        };
        try_example(&workshop, start, PATIENCE, name);
    }
}

#[test]
fn sanitizers_find_nothing_in_the_examples() {
    let workshop = Workshop::new();
    let sanitizers = Sanitizers::new();
    for name in ["ramdisk", "async", "raw"] {
        let source = format!("c-examples/{name}.c");
        let shared = Linking::Shared;
        let Some(program) = workshop.build_with("clang", C, &source, shared, &SANITIZE) else {
            return;
        };
        let start = || sanitizers.command(&program);
        try_example(&workshop, start, PATIENCE, name);
    }
}

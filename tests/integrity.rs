//! Data integrity in the eyes of programs that others wrote: what they store
//! through the daemon they find again, in the export and in the image.
//!
//! Each test takes seconds; with BLKFUSE_LONG=1 it does twenty times as much.

mod common;
mod daemon_support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use common::{pattern, skip};
use daemon_support::*;

/// How much more than usual is to be done.
fn scale() -> u64 {
    match std::env::var_os("BLKFUSE_LONG") {
        Some(_) => 20,
        None => 1,
    }
}

/// Where to work, unless nothing can be mounted here.
fn scratch() -> Option<Scratch> {
    let patience = Duration::from_secs(300 * scale());
    can_mount().then(|| Scratch::with_patience(patience))
}

/// A way to run the daemon.
#[derive(Debug, Clone, Copy)]
struct Setup {
    /// `None`: the device is in memory.
    cache: Option<&'static str>,
    threads: &'static str,
}

const SETUPS: [Setup; 6] = {
    const fn setup(cache: Option<&'static str>, threads: &'static str) -> Setup {
        Setup { cache, threads }
    }
    [
        setup(Some("none"), "1"),
        setup(Some("none"), "4"),
        setup(Some("writeback"), "1"),
        setup(Some("writeback"), "4"),
        setup(None, "1"),
        setup(None, "4"),
    ]
};

/// A daemon that exports one writable image.
struct Served {
    daemon: Daemon,
    image: Option<PathBuf>,
    at: PathBuf,
}

impl Served {
    fn start(s: &Scratch, setup: Setup, length: u64, growable: bool) -> Self {
        eprintln!("{setup:?}");
        let at = s.mountpoint("disk");
        let mut args = args!["-w", "--threads", setup.threads];
        if growable {
            args.push("--growable".into());
        }
        let image = setup.cache.map(|cache| {
            let image = s.sparse("disk.img", length);
            args.extend(args!["--cache", cache, image]);
            image
        });
        if image.is_none() {
            args.push(format!("ram:{length}").into());
        }
        args.push(at.clone().into());
        Self {
            daemon: Daemon::start(args),
            image,
            at,
        }
    }

    /// Ends the daemon; what was in the export then is in the image.
    fn stop(self, s: &Scratch) {
        let copy = s.join("copy");
        if self.image.is_some() {
            run("cp", args!["--sparse=always", self.at, copy]);
        }
        self.daemon.stop();
        if let Some(image) = self.image {
            run("cmp", args![copy, image]);
            fs::remove_file(&copy).unwrap();
        }
    }
}

/// Runs a test for every setup.
fn for_setups(length: u64, growable: bool, test: impl Fn(&Scratch, &Path)) {
    let Some(s) = scratch() else { return };
    for setup in SETUPS {
        let served = Served::start(&s, setup, length, growable);
        test(&s, &served.at);
        served.stop(&s);
    }
}

// --- fio --------------------------------------------------------------------

const JOBS: u64 = 4;

/// Four jobs write their own parts in random order, read between that, and
/// check everything that was written.
fn fio_verifies(engine: &str, extra: &[&str]) {
    fio_verifies_with(JOBS, engine, extra);
}

fn fio_verifies_with(jobs: u64, engine: &str, extra: &[&str]) {
    if !installed(&["fio"]) {
        return;
    }
    let each = (24 << 20) / jobs;
    for_setups(jobs * each, false, |s, at| {
        for blocks in [
            &["--bs=4k"][..],
            &["--bssplit=512/20:4k/30:12k/20:64k/20:512k/10"],
        ] {
            let mut args = args![
                "--name=verify",
                format!("--filename={}", at.display()),
                format!("--aux-path={}", s.path().display()),
                format!("--ioengine={engine}"),
                format!("--numjobs={jobs}"),
                format!("--size={each}"),
                format!("--offset_increment={each}"),
                format!("--loops={}", scale()),
                "--rw=randrw",
                "--rwmixread=30",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_backlog=512",
                "--verify_state_save=0",
                "--end_fsync=1",
                "--group_reporting",
            ];
            args.extend(blocks.iter().chain(extra).map(OsString::from));
            let said = run("fio", args);
            assert!(said.contains("err= 0"), "{said}");
        }
    });
}

#[test]
fn fio_psync() {
    fio_verifies("psync", &["--direct=0"]);
}

#[test]
fn fio_libaio() {
    fio_verifies("libaio", &["--direct=1", "--iodepth=32"]);
}

#[test]
fn fio_io_uring() {
    if io_uring_is_refused() {
        return skip("no io_uring here");
    }
    fio_verifies("io_uring", &["--direct=1", "--iodepth=32"]);
}

#[test]
fn fio_mmap() {
    // fio's engine mixes up the jobs' parts, on any file system.
    fio_verifies_with(1, "mmap", &[]);
}

fn io_uring_is_refused() -> bool {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled").map_or(true, |text| text.trim() == "2")
}

/// Large direct writes past the end, many at once: each is cut into pieces
/// that grow the file in any order.
#[test]
fn fio_grows_a_file() {
    if !installed(&["fio"]) {
        return;
    }
    for_setups(0, true, |s, at| {
        for round in 0..3 * scale() {
            fs::File::create(at).unwrap();
            let size = 64 << 20;
            let said = run(
                "fio",
                args![
                    "--name=grow",
                    format!("--filename={}", at.display()),
                    format!("--aux-path={}", s.path().display()),
                    format!("--size={size}"),
                    format!("--randseed={round}"),
                    "--rw=write",
                    "--bs=8M",
                    "--ioengine=libaio",
                    "--iodepth=16",
                    "--direct=1",
                    "--create_on_open=1",
                    "--fallocate=none",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                ],
            );
            assert!(said.contains("err= 0"), "{said}");
            assert_eq!(fs::metadata(at).unwrap().len(), size);
        }
    });
}

// --- fsx --------------------------------------------------------------------

/// Its program, or a skipped test.
fn fsx() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin"));
    let found = std::env::split_paths(&path)
        .chain(home)
        .map(|dir| dir.join("fsx"))
        .find(|program| program.is_file());
    if found.is_none() {
        skip("fsx is not installed: cargo install fsx");
    }
    found
}

const FSX_ALWAYS: &str = "fsync = 1\nfdatasync = 1\npunch_hole = 3\nsendfile = 2\n\
    posix_fadvise = 1\ncopy_file_range = 3\nread = 10\nwrite = 10\n";
const FSX_MMAP: &str = "mapread = 10\nmapwrite = 10\ninvalidate = 1\n";
const FSX_NO_MMAP: &str = "mapread = 0\nmapwrite = 0\ninvalidate = 0\n";
const FSX_FIXED: &str = "truncate = 0\n";
const FSX_GROWS: &str = "truncate = 5\nclose_open = 2\nposix_fallocate = 2\n";

/// Runs `steps` random operations, comparing what is read with what should be
/// there, with a configuration of that beginning and those weights.
fn fsx_agrees(length: u64, growable: bool, steps: u64, head: &str, weights: &[&str]) {
    let Some(fsx) = fsx() else { return };
    for_setups(length, growable, |s, at| {
        let text = format!(
            "{head}[opsize]\nmax = 80000\n[weights]\n{}",
            weights.concat()
        );
        let config = s.file("fsx.toml", text.as_bytes());
        for seed in 1..=scale() {
            let said = output(
                &fsx,
                args![
                    "-q",
                    "-f",
                    config,
                    "-P",
                    s.path(),
                    "-S",
                    seed.to_string(),
                    "-N",
                    steps.to_string(),
                    at
                ],
            );
            let text = text_of(&said);
            assert!(said.status.success(), "seed {seed}: {text}");
            assert!(text.contains("A-OK"), "seed {seed}: {text}");
        }
    });
}

#[test]
fn fsx_on_a_device_of_fixed_size() {
    let weights = [FSX_ALWAYS, FSX_NO_MMAP, FSX_FIXED];
    fsx_agrees(1_000_003, false, 3000, "blockmode = true\n", &weights);
}

#[test]
fn fsx_on_a_device_of_fixed_size_with_mappings() {
    let weights = [FSX_ALWAYS, FSX_MMAP, FSX_FIXED];
    fsx_agrees(1_000_003, false, 2000, "blockmode = true\n", &weights);
    // Dirty pages stay while reads and writes go around them.
    let lazy = "blockmode = true\nnomsyncafterwrite = true\n";
    fsx_agrees(1_000_003, false, 2000, lazy, &weights);
}

#[test]
fn fsx_on_a_growing_file() {
    let weights = [FSX_ALWAYS, FSX_NO_MMAP, FSX_GROWS];
    fsx_agrees(0, true, 3000, "flen = 1000003\n", &weights);
}

#[test]
fn fsx_on_a_growing_file_with_mappings() {
    let weights = [FSX_ALWAYS, FSX_MMAP, FSX_GROWS];
    fsx_agrees(0, true, 1500, "flen = 1000003\n", &weights);
    let lazy = "flen = 1000003\nnomsyncafterwrite = true\n";
    fsx_agrees(0, true, 1500, lazy, &weights);
}

// --- File systems -----------------------------------------------------------

/// What is in file number `n` of the workload.
fn file_content(n: usize) -> Vec<u8> {
    pattern(n * 17, (n * 7919) % 90_000)
}

/// Creates, overwrites, renames and removes files, several threads at once.
fn use_file_system(root: &Path, files: usize) {
    const THREADS: usize = 4;
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                let dir = root.join(thread.to_string());
                fs::create_dir(&dir).unwrap();
                for n in (thread..files).step_by(THREADS) {
                    let path = dir.join(format!("{n}.new"));
                    fs::write(&path, vec![0xee; 5000 + n]).unwrap();
                    fs::write(&path, file_content(n)).unwrap();
                    if n % 8 == 0 {
                        fs::File::open(&path).unwrap().sync_all().unwrap();
                    }
                    match n % 5 {
                        0 => fs::remove_file(&path).unwrap(),
                        _ => fs::rename(&path, dir.join(n.to_string())).unwrap(),
                    }
                }
            });
        }
    });
}

fn check_file_system(root: &Path, files: usize) {
    let mut found = 0;
    for entry in fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        if dir.ends_with("lost+found") {
            continue;
        }
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let n: usize = name.parse().unwrap();
            assert!(
                fs::read(&path).unwrap() == file_content(n),
                "{name} is wrong"
            );
            found += 1;
        }
    }
    assert_eq!(found, files - files.div_ceil(5));
}

#[test]
fn ext4_on_a_loop_device() {
    if !installed(&["mkfs.ext4", "e2fsck", "losetup", "mount"]) {
        return;
    }
    let files = 400;
    for_setups(96 << 20, false, |s, at| {
        for _ in 0..scale() {
            run("mkfs.ext4", args!["-q", "-F", at]);
            for direct in ["--direct-io=on", "--direct-io=off"] {
                let Some(device) = Loop::attach(at, &[direct]) else {
                    return;
                };
                let (inside, fresh) = (s.join("inside"), direct == "--direct-io=on");
                let mounted = Mount::new(args![device.0], &inside);
                if fresh {
                    use_file_system(mounted.path(), files);
                }
                check_file_system(mounted.path(), files);
                drop(mounted);
                fs::remove_dir(&inside).unwrap();
                device.detach();
                run("e2fsck", args!["-fn", at]);
            }
        }
    });
}

// --- QEMU -------------------------------------------------------------------

#[test]
fn qemu_img_converts_and_compares() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let length = 24 << 20;
    for growable in [false, true] {
        for_setups(if growable { 0 } else { length }, growable, |s, at| {
            // Data, holes and zeroes that are data.
            let source = s.sparse("source", length);
            let file = fs::File::options().write(true).open(&source).unwrap();
            for part in 0..6 {
                let offset = part * (4 << 20) + part * 4099;
                let data = [pattern(part as usize, 1_000_001), vec![0; 300_000]].concat();
                std::os::unix::fs::FileExt::write_all_at(&file, &data, offset).unwrap();
            }
            for round in 0..2 * scale() {
                // Out of order, in parallel; then plain.
                let how = if round % 2 == 0 { "-W" } else { "-p" };
                let mut convert = args!["convert", "-f", "raw", "-O", "raw", "-m", "16", how];
                convert.extend(args!["-t", "none", "-T", "none"]);
                if !growable {
                    convert.push("-n".into());
                }
                convert.extend(args![source, at]);
                run("qemu-img", convert);
                let compare = args!["compare", "-f", "raw", "-F", "raw", source, at];
                let said = run("qemu-img", compare);
                assert!(said.contains("Images are identical"), "{said}");
                run("cmp", args![source, at]);
            }
            // And out of it again, with a format in between.
            let out = s.join("out.qcow2");
            run(
                "qemu-img",
                args!["convert", "-f", "raw", "-O", "qcow2", at, out],
            );
            let said = run("qemu-img", args!["compare", "-f", "raw", source, out]);
            assert!(said.contains("Images are identical"), "{said}");
            fs::remove_file(&out).unwrap();
        });
    }
}

#[test]
fn qemu_img_bench_completes() {
    if !installed(&["qemu-img"]) {
        return;
    }
    for_setups(32 << 20, false, |_, at| {
        // With "native" qemu-img 10.0 recurses until its stack overflows.
        for engine in ["threads", "io_uring"] {
            for write in [&[][..], &["-w"], &["-w", "--flush-interval=64"]] {
                let count = (4000 * scale()).to_string();
                let mut bench = args![
                    "bench", "-f", "raw", "-t", "none", "-i", engine, "-d", "64", "-c", count
                ];
                bench.extend(write.iter().map(OsString::from));
                bench.push(at.into());
                let done = output("qemu-img", bench);
                let text = text_of(&done);
                if text.contains("Invalid aio option") {
                    skip(&format!("qemu-img bench -i {engine}: {text}"));
                    continue;
                }
                assert!(done.status.success(), "{engine} {write:?}: {text}");
            }
        }
    });
}

#[test]
fn qemu_io_finds_its_patterns() {
    if !installed(&["qemu-io"]) {
        return;
    }
    for_setups(64 << 20, false, |_, at| {
        for cache in ["none", "writeback", "writethrough", "directsync"] {
            let mut args = args!["-f", "raw", "-t", cache, "-d", "unmap"];
            let mut command = |text: &str| args.extend(args!["-c", text]);
            // Many at once, waited for, then checked.
            for n in 0..40u64 {
                command(&format!("aio_write -q -P {} {}k 300k", n + 1, n * 500));
            }
            command("aio_flush");
            for n in 0..40u64 {
                command(&format!("read -q -P {} {}k 300k", n + 1, n * 500));
            }
            command("write -q -z 1000k 100k");
            command("read -q -P 0 1000k 100k");
            command("read -q -P 3 1100k 200k");
            command("write -q -z -u 1500k 100k");
            command("read -q -P 0 1500k 100k");
            command("discard -q 2000k 100k");
            command("read -q -P 5 2100k 200k");
            command("write -q -P 99 33333 7777");
            command("read -q -P 99 33333 7777");
            command("read -q -P 1 0 33333");
            command("read -q -P 1 41110 266090");
            command("flush");
            args.push(at.into());
            let said = run("qemu-io", args);
            assert!(
                !said.contains("failed") && !said.contains("rror"),
                "{cache}: {said}"
            );
        }
    });
}

#[test]
fn dd_grows_a_file_in_any_order() {
    for_setups(0, true, |s, at| {
        let content = pattern(0, 20 << 20);
        let source = s.file("source", &content);
        let pieces = 20;
        // Four at a time, from the back to the front.
        for group in (0..pieces).rev().collect::<Vec<_>>().chunks(4) {
            thread::scope(|scope| {
                for piece in group {
                    let source = &source;
                    scope.spawn(move || {
                        run(
                            "dd",
                            args![
                                format!("if={}", source.display()),
                                format!("of={}", at.display()),
                                "bs=1M",
                                "count=1",
                                format!("skip={piece}"),
                                format!("seek={piece}"),
                                "conv=notrunc",
                                "oflag=direct"
                            ],
                        )
                    });
                }
            });
        }
        run("cmp", args![source, at]);
        fs::File::create(at).unwrap();
    });
}

//! The daemon as its users run it: every option, and every promise about its
//! beginning and its end.

mod common;
mod daemon_support;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Call, Memory, Mounted, SOON, eventually, pattern, skip};
use daemon_support::*;
use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek, mkfifo};

const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
const PUNCH: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

/// Where to work, unless nothing can be mounted here.
fn scratch() -> Option<Scratch> {
    can_mount().then(Scratch::new)
}

fn open(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn assert_same(a: &[u8], b: &[u8]) {
    assert_eq!(a.len(), b.len());
    let differ = a.iter().zip(b).position(|(a, b)| a != b);
    assert_eq!(differ, None, "first difference");
}

/// The data ranges of a file, by SEEK_DATA and SEEK_HOLE.
fn map_of(file: &File) -> Vec<(i64, i64)> {
    let mut map = Vec::new();
    let mut at = 0;
    while let Ok(data) = lseek(file, at, Whence::SeekData) {
        at = lseek(file, data, Whence::SeekHole).unwrap();
        map.push((data, at));
    }
    map
}

// --- Being ready, and the options -------------------------------------------

#[test]
fn the_ready_line_names_everything_and_the_default_is_read_only() {
    let Some(s) = scratch() else { return };
    let content = pattern(0, 100_000);
    let (image, at) = (s.file("disk.img", &content), s.mountpoint("disk"));
    let daemon = Daemon::start(args![image, at]);
    assert_eq!(
        daemon.ready,
        [format!(
            "blkfused: {} (100000 bytes, read-only) is at {at}; stop with Ctrl-C or: umount {at}",
            image.display(),
            at = at.display()
        )]
    );
    assert_same(&fs::read(&at).unwrap(), &content);
    assert_eq!(fs::metadata(&at).unwrap().mode() & 0o777, 0o400);
    let refused = OpenOptions::new().write(true).open(&at);
    assert_eq!(errno(refused), libc::EROFS);
    let refused = OpenOptions::new().write(true).truncate(true).open(&at);
    assert_eq!(errno(refused), libc::EROFS);
    let line = common::mount_line(&at).unwrap();
    assert!(line.contains(" ro,nosuid,nodev,noatime"), "{line}");
    assert!(line.contains("fuse.blkfuse"), "{line}");
    assert!(line.contains(image.to_str().unwrap()), "{line}");
    // Nor does the daemon hold the image in a way that could write it.
    for file in open_files(&daemon, &image) {
        assert_eq!(file.flags & libc::O_ACCMODE, libc::O_RDONLY);
    }
    daemon.stop();
    assert_same(&fs::read(&image).unwrap(), &content);
}

#[test]
fn a_writable_export_writes_what_it_is_told() {
    let Some(s) = scratch() else { return };
    for threads in ["1", "2", "4"] {
        for cache in ["none", "writeback"] {
            let image = s.file("disk.img", &pattern(0, 1_000_000));
            let at = s.mountpoint("disk");
            let daemon = Daemon::start(args![
                "-w",
                "--threads",
                threads,
                "--cache",
                cache,
                image,
                at
            ]);
            assert!(daemon.ready[0].contains("(1000000 bytes, writable)"));
            // Four writers at once, each with its own quarter.
            thread::scope(|scope| {
                for quarter in 0..4u8 {
                    let at = &at;
                    scope.spawn(move || {
                        let file = open(at);
                        for block in (0..250_000u64).step_by(1000) {
                            let offset = u64::from(quarter) * 250_000 + block;
                            file.write_all_at(&[quarter + 1; 1000], offset).unwrap();
                        }
                        file.sync_all().unwrap();
                    });
                }
            });
            let expected = [1u8, 2, 3, 4]
                .map(|quarter| vec![quarter; 250_000])
                .concat();
            assert_same(&fs::read(&at).unwrap(), &expected);
            daemon.stop();
            assert_same(&fs::read(&image).unwrap(), &expected);
        }
    }
}

/// A descriptor that the daemon has.
struct OpenFile {
    flags: i32,
}

/// The descriptors of a file that a daemon has.
fn open_files(daemon: &Daemon, path: &Path) -> Vec<OpenFile> {
    let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let numbers = fs::read_dir(proc.join("fd")).unwrap();
    let numbers = numbers.map(|entry| entry.unwrap().file_name());
    let ours = numbers.filter(|n| fs::read_link(proc.join("fd").join(n)).unwrap() == path);
    ours.map(|n| {
        let info = fs::read_to_string(proc.join("fdinfo").join(n)).unwrap();
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
        OpenFile {
            flags: i32::from_str_radix(flags.trim(), 8).unwrap(),
        }
    })
    .collect()
}

#[test]
fn the_cache_mode_decides_about_direct_io() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    for (options, expected) in [
        (&["--cache", "none"][..], true),
        (&["--cache", "writeback"], false),
        (&[], true),
    ] {
        let mut all = args!["-w", image, at];
        all.extend(options.iter().map(Into::into));
        let daemon = Daemon::start(all);
        let files = open_files(&daemon, &image);
        let direct = files.iter().any(|file| file.flags & libc::O_DIRECT != 0);
        assert_eq!(direct, expected, "{options:?}");
        daemon.stop();
    }
}

#[test]
fn a_file_system_without_direct_io_is_used_buffered() {
    let Some(s) = scratch() else { return };
    let ramfs = Mount::new(args!["-t", "ramfs", "none"], &s.join("ramfs"));
    let (image, at) = (ramfs.path().join("disk.img"), s.mountpoint("disk"));
    fs::write(&image, pattern(0, 10_000)).unwrap();
    let mut direct = OpenOptions::new();
    direct.read(true).custom_flags(libc::O_DIRECT);
    if direct.open(&image).is_ok() {
        return skip("ramfs supports O_DIRECT");
    }
    let why = refusal(args!["--cache", "none", image, at]);
    let expected = "disk.img: its file system does not support O_DIRECT; use --cache writeback";
    assert!(why.ends_with(expected), "{why}");
    let daemon = Daemon::start(args![image, at]);
    let end = "does not support O_DIRECT; using the page cache\n";
    eventually("a message", || daemon.stderr().ends_with(end));
    assert_same(&fs::read(&at).unwrap(), &pattern(0, 10_000));
    daemon.stop();
}

#[test]
fn growing_needs_both_options() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.file("disk.img", &[1; 1000]), s.mountpoint("disk"));
    let (code, text) = failure(args!["--growable", image, at]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("add --writable"), "{text}");

    let daemon = Daemon::start(args!["-w", image, at]);
    let file = open(&at);
    assert_eq!(errno(file.write_at(&[2; 10], 1000)), libc::ENOSPC);
    assert_eq!(file.write_at(&[2; 10], 995).unwrap(), 5);
    assert!(file.set_len(2000).is_err());
    // O_TRUNC of a device with a fixed size does nothing, as with a device.
    File::create(&at).unwrap();
    assert_eq!(fs::metadata(&at).unwrap().len(), 1000);
    drop(file);
    daemon.stop();
    assert_eq!(fs::metadata(&image).unwrap().len(), 1000);

    let daemon = Daemon::start(args!["-w", "--growable", image, at]);
    let file = open(&at);
    file.write_all_at(&[3; 10], 5000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 5010);
    assert_eq!(fs::metadata(&image).unwrap().len(), 5010);
    file.set_len(1_000_001).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len(), 1_000_001);
    file.set_len(998).unwrap();
    drop(file);
    daemon.stop();
    let expected = [&[1; 995][..], &[2; 3]].concat();
    assert_same(&fs::read(&image).unwrap(), &expected);

    let daemon = Daemon::start(args!["-w", "--growable", image, at]);
    File::create(&at).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len(), 0);
    daemon.stop();
}

#[test]
fn discard_decides_whether_holes_free_space() {
    let Some(s) = scratch() else { return };
    for (discard, frees) in [(&[][..], true), (&["on"], true), (&["off"], false)] {
        let (image, at) = (s.file("disk.img", &[7; 1 << 20]), s.mountpoint("disk"));
        let mut all = args!["-w", image, at];
        for whether in discard {
            all.extend(args!["--discard", whether]);
        }
        let daemon = Daemon::start(all);
        assert_eq!(allocated(&image), 1 << 20);
        let file = open(&at);
        fallocate(&file, PUNCH, 65536, 131_072).unwrap();
        // Unaligned ends, and what lies behind the end.
        fallocate(&file, PUNCH, 500_001, 9_999).unwrap();
        fallocate(&file, PUNCH, 2 << 20, 4096).unwrap();
        file.sync_all().unwrap();
        let space = allocated(&image);
        if frees {
            assert!(space <= (1 << 20) - 131_072, "{discard:?}: {space}");
        } else {
            assert_eq!(space, 1 << 20, "{discard:?}");
        }
        let mut expected = vec![7; 1 << 20];
        expected[65536..65536 + 131_072].fill(0);
        expected[500_001..510_000].fill(0);
        assert_same(&fs::read(&at).unwrap(), &expected);
        drop(file);
        daemon.stop();
        assert_same(&fs::read(&image).unwrap(), &expected);
    }
}

#[test]
fn images_of_other_formats_are_refused_unless_called_raw() {
    let Some(s) = scratch() else { return };
    if !installed(&["qemu-img"]) {
        return;
    }
    let at = s.mountpoint("disk");
    let secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s"];
    let luks = [&secret[..], &["-o", "iter-time=10"]].concat();
    for (format, options, name, advice) in [
        ("qcow2", &[][..], "qcow2", "qemu-img convert -O raw"),
        ("qcow", &[], "qcow1", "qemu-img convert"),
        ("qed", &[], "qed", "qemu-img convert"),
        ("vmdk", &[], "vmdk", "qemu-img convert"),
        ("vdi", &[], "vdi", "qemu-img convert"),
        ("vhdx", &[], "vhdx", "qemu-img convert"),
        ("vpc", &[], "vhd", "qemu-img convert"),
        ("vpc", &["-o", "subformat=fixed"], "vhd", "qemu-img convert"),
        ("parallels", &[], "parallels", "qemu-img convert"),
        ("luks", &luks, "luks", "cryptsetup"),
    ] {
        let image = s.join(format!("{format}{}.img", options.len()));
        let mut create = args!["create", "-q", "-f", format];
        create.extend(options.iter().map(Into::into));
        create.extend(args![image, "4M"]);
        let created = output("qemu-img", create);
        if !created.status.success() {
            skip(&format!("no {format} images: {}", text_of(&created)));
            continue;
        }
        let why = refusal(args![image, at]);
        let expected = format!("{}: looks like {name}; ", image.display());
        assert!(why.starts_with(&expected), "{why}");
        assert!(why.contains(advice) && why.contains("-f raw"), "{why}");
        assert_eq!(s.mounts(), [] as [PathBuf; 0]);

        let daemon = Daemon::start(args!["-f", "raw", image, at]);
        assert_same(&fs::read(&at).unwrap(), &fs::read(&image).unwrap());
        daemon.stop();
    }
}

#[test]
fn memory_devices_are_as_large_as_they_are_told() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    let daemon = Daemon::start(args!["-w", "ram:1000001", at]);
    assert!(daemon.ready[0].starts_with("blkfused: ram (1000001 bytes, writable) is at "));
    let file = open(&at);
    assert_eq!(file.metadata().unwrap().len(), 1_000_001);
    assert_eq!(file.metadata().unwrap().blocks(), 0);
    file.write_all_at(&pattern(3, 200_000), 800_001).unwrap();
    let expected = [vec![0; 800_001], pattern(3, 200_000)].concat();
    assert_same(&fs::read(&at).unwrap(), &expected);
    assert!(file.metadata().unwrap().blocks() > 0);
    drop(file);
    daemon.stop();

    let daemon = Daemon::start(args!["null:8G", at]);
    let mut block = vec![9; 100_000];
    open_to_read(&at)
        .read_exact_at(&mut block, 5 << 30)
        .unwrap();
    assert_eq!(block, vec![0; 100_000]);
    assert_eq!(fs::metadata(&at).unwrap().len(), 8 << 30);
    daemon.stop();

    for (bad, reason) in [
        ("ram:64MB", "not a size; write"),
        ("ram:", "not a size; write"),
        ("null:-1", "not a size; write"),
        ("null:8E", "too large; the largest size is"),
    ] {
        let (code, text) = failure(args![bad, at]);
        assert_eq!(code, 2, "{text}");
        let expected = format!("blkfused: {bad}: {reason}");
        assert!(text.starts_with(&expected), "{text}");
    }
}

fn open_to_read(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn usage_errors_have_a_status_of_their_own() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.file("disk.img", b"x"), s.mountpoint("disk"));
    for wrong in [
        args![image],
        args!["-w"],
        args!["--frobnicate", image, at],
        args!["--threads", "0", image, at],
        args!["--threads", "many", image, at],
        args!["--cache", "maybe", image, at],
        args!["--discard", "perhaps", image, at],
        args!["--allow-other", "some", image, at],
        args!["-f", "qcow2", image, at],
        args!["--log-level", "loud", image, at],
        args!["--export", "nothing"],
        args!["--export", "=x"],
    ] {
        let (code, text) = failure(wrong.clone());
        assert_eq!(code, 2, "{wrong:?}: {text}");
        assert!(!text.is_empty());
    }
    let help = run(blkfused().get_program(), args!["--help"]);
    for option in [
        "--growable",
        "--cache",
        "--discard",
        "--export",
        "Exit status",
    ] {
        assert!(help.contains(option), "{help}");
    }
    let version = run(blkfused().get_program(), args!["--version"]);
    assert_eq!(
        version,
        concat!("blkfused ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn the_log_level_is_obeyed() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    for (level, expected) in [
        ("off", false),
        ("error", false),
        ("info", true),
        ("trace", true),
    ] {
        let daemon = Daemon::start(args!["--log-level", level, "ram:1M", at]);
        let end = daemon.stop();
        assert_eq!(
            end.stderr.contains("SIGTERM: stopping"),
            expected,
            "{end:?}"
        );
    }
}

// --- Paths ------------------------------------------------------------------

#[test]
fn several_images_are_exported_at_once() {
    let Some(s) = scratch() else { return };
    let pairs: Vec<(PathBuf, PathBuf)> = (0..4)
        .map(|n| {
            let image = s.file(format!("{n}.img"), &pattern(n * 1000, 50_000 + n));
            (image, s.mountpoint(format!("disk{n}")))
        })
        .collect();
    let mut all = args!["-w", pairs[0].0, pairs[0].1];
    for (image, at) in &pairs[1..] {
        all.push("--export".into());
        all.push(
            [image.as_os_str(), "=".as_ref(), at.as_os_str()]
                .into_iter()
                .collect(),
        );
    }
    all.extend(args![
        "--export",
        format!("ram:1M={}", s.mountpoint("ram").display())
    ]);
    let daemon = Daemon::start_several(all, 5);
    for (n, (image, at)) in pairs.iter().enumerate() {
        assert!(
            daemon.ready[n].contains(image.to_str().unwrap()),
            "{:?}",
            daemon.ready
        );
        assert_same(&fs::read(at).unwrap(), &pattern(n * 1000, 50_000 + n));
        open(at).write_all_at(&[n as u8; 100], 100).unwrap();
    }
    daemon.stop();
    for (n, (image, _)) in pairs.iter().enumerate() {
        assert_eq!(fs::read(image).unwrap()[100..200], [n as u8; 100]);
    }
}

#[test]
fn all_exports_start_or_none() {
    let Some(s) = scratch() else { return };
    let (one, two) = (s.file("1.img", &[1; 5000]), s.file("2.img", &[2; 5000]));
    let (at, gone) = (s.mountpoint("disk"), s.join("gone"));
    let pair = |image: &Path, at: &Path| format!("{}={}", image.display(), at.display());
    for (second, reason) in [
        (pair(&two, &gone), "No such file or directory"),
        (pair(&two, &at), "there already is an export on"),
        (
            pair(&two, s.path()),
            "is not a regular file but a directory",
        ),
        (pair(&s.join("3.img"), &two), "No such file or directory"),
        (pair(&one, &two), "another process has it open for writing"),
    ] {
        let why = refusal(args!["-w", one, at, "--export", second]);
        assert!(why.contains(reason), "{second}: {why}");
        assert_eq!(s.mounts(), [] as [PathBuf; 0], "{second}");
        // Neither is anything still locked.
        Daemon::start(args!["-w", one, at]).stop();
    }
}

#[test]
fn an_image_may_be_its_own_mountpoint() {
    let Some(s) = scratch() else { return };
    let image = s.file("disk.img", &pattern(0, 70_000));
    let daemon = Daemon::start(args!["-w", "--growable", image, image]);
    assert_eq!(s.mounts(), [image.clone()]);
    assert_same(&fs::read(&image).unwrap(), &pattern(0, 70_000));
    let file = open(&image);
    file.write_all_at(b"through the export", 100).unwrap();
    file.write_all_at(b"grown", 80_000).unwrap();
    drop(file);
    daemon.stop();
    let content = fs::read(&image).unwrap();
    assert_eq!(content.len(), 80_005);
    assert_eq!(&content[100..118], b"through the export");
    assert_eq!(&content[80_000..], b"grown");
    assert_same(&content[118..70_000], &pattern(118, 69_882));
}

#[test]
fn a_mountpoint_may_be_a_symbolic_link() {
    let Some(s) = scratch() else { return };
    let (image, at, link) = (
        s.file("disk.img", &[5; 777]),
        s.mountpoint("disk"),
        s.join("link"),
    );
    symlink(&at, &link).unwrap();
    let daemon = Daemon::start(args![image, link]);
    assert_eq!(s.mounts(), [at.clone()]);
    assert_same(&fs::read(&link).unwrap(), &[5; 777]);
    assert_same(&fs::read(&at).unwrap(), &[5; 777]);
    daemon.stop();
    assert_eq!(fs::metadata(&link).unwrap().len(), 0);
    assert!(link.is_symlink());
}

#[test]
fn paths_may_contain_anything() {
    let Some(s) = scratch() else { return };
    for (number, name) in [
        &b"with spaces  and\ttabs"[..],
        b"a=b=c",
        b"=",
        b"not \xff\xfe UTF-8",
        b"line\nbreak",
        b"back\\slash\\040",
        b"comma,rw,fd=0",
        b"-w",
        b"#hash",
    ]
    .into_iter()
    .enumerate()
    {
        let name = OsStr::from_bytes(name);
        let dir = s.join(format!("{number}"));
        fs::create_dir(&dir).unwrap();
        let mut image = dir.join(name).into_os_string();
        image.push(".img");
        let (image, at) = (PathBuf::from(image), dir.join(name));
        fs::write(&image, pattern(number, 12_345)).unwrap();
        fs::write(&at, b"").unwrap();
        let pair = [image.as_os_str(), "=".as_ref(), at.as_os_str()];
        let pair = pair.into_iter().collect::<std::ffi::OsString>();
        for arguments in [args!["-w", image, at], args!["-w", "--export", pair]] {
            // A line break in the name is one in what is said, too.
            let lines = 1 + 3 * usize::from(name.as_bytes().contains(&b'\n'));
            let daemon = Daemon::start_several(arguments, lines);
            assert_eq!(s.mounts(), [at.clone()]);
            assert_same(&fs::read(&at).unwrap(), &pattern(number, 12_345));
            daemon.stop();
            assert_eq!(s.mounts(), [] as [PathBuf; 0]);
        }
    }
    // Relative ones, which begin with what could be an option.
    fs::write(s.join("-w"), b"").unwrap();
    fs::write(s.join("-i"), [3; 10]).unwrap();
    let mut command = blkfused();
    command.current_dir(s.path()).args(["--", "-i", "-w"]);
    let daemon = Daemon::spawn(command, 1);
    assert_same(&fs::read(s.join("-w")).unwrap(), &[3; 10]);
    daemon.stop();
}

#[test]
fn an_unusable_mountpoint_is_named_with_the_reason() {
    let Some(s) = scratch() else { return };
    let image = s.file("disk.img", &[1; 1000]);
    let (fifo, dangling, looped) = (s.join("fifo"), s.join("dangling"), s.join("loop"));
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    symlink("nowhere", &dangling).unwrap();
    symlink("loop", &looped).unwrap();
    let below_file = image.join("below");
    for (at, reason) in [
        (s.join("absent"), "No such file or directory"),
        (dangling, "No such file or directory"),
        (looped, "oo many"),
        (below_file, "ot a directory"),
        (s.path().to_owned(), "is not a regular file but a directory"),
        (fifo, "is not a regular file but a FIFO"),
        (
            "/dev/null".into(),
            "is not a regular file but a character device",
        ),
    ] {
        let why = refusal(args![image, at]);
        assert!(why.contains(at.to_str().unwrap()), "{why}");
        assert!(why.contains(reason), "{why}");
        assert_eq!(s.mounts(), [] as [PathBuf; 0]);
    }
    assert_eq!(
        refusal(args![s.join("no.img"), image]),
        format!("{}: No such file or directory", s.join("no.img").display())
    );
    let why = refusal(args![s.path(), image]);
    assert!(
        why.ends_with(": is a directory; name a disk image"),
        "{why}"
    );
    let why = refusal(args!["/dev/null", image]);
    assert!(
        why.contains("neither a regular file nor a block device"),
        "{why}"
    );
    if let Some(device) = Loop::attach(&image, &[]) {
        let why = refusal(args!["ram:1M", device.0]);
        assert!(
            why.contains("is not a regular file but a block device"),
            "{why}"
        );
    }
}

#[test]
fn without_arguments_there_is_something_to_look_at() {
    let Some(s) = scratch() else { return };
    let mut command = blkfused();
    command.env("TMPDIR", s.path()).stdin(Stdio::null());
    let daemon = Daemon::spawn(command, 4);
    let [at] = &s.mounts()[..] else {
        panic!("{:?}", s.mounts())
    };
    assert!(
        daemon
            .ready
            .iter()
            .any(|line| line.contains(at.to_str().unwrap()))
    );
    let mut text = vec![0; 200];
    open(at).read_exact_at(&mut text, 0).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.starts_with("This is the beginning of a disk image."),
        "{text}"
    );
    // What the hints propose.
    if installed(&["mkfs.ext4", "head"]) {
        let line = run("head", args!["-n", "1", at]);
        assert!(text.starts_with(&line));
        run("mkfs.ext4", args!["-q", "-F", at]);
        run("e2fsck", args!["-fn", at]);
    }
    daemon.stop_with(Signal::SIGINT);
    assert_eq!(
        fs::read_dir(s.path()).unwrap().count(),
        0,
        "something was left"
    );
}

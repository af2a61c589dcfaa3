//! The daemon as its users run it: every option, and every promise about its
//! beginning and its end.

mod common;
mod daemon_support;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use common::client::errno;
use common::{Call, Mounted, SOON, eventually, pattern, skip, unmount};
use daemon_support::*;
use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek, mkfifo};

const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
const PUNCH: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

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
            let queues = format!(" {threads} queues");
            eventually("a message", || daemon.stderr().contains(&queues));
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
    eventually("a message", || daemon.stderr().contains(end));
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
    // Only asking for another length in so many words changes it.
    file.set_len(2000).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().len(), 2000);
    file.set_len(1000).unwrap();
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
        assert!(allocated(&image) >= 1 << 20);
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
            assert!(space >= 1 << 20, "{discard:?}: {space}");
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
        args!["--io-uring", "perhaps", image, at],
        args!["--queue-depth", "0", image, at],
        args!["--max-request", "65537", image, at],
        args!["--memory-budget", "much", image, at],
        args!["--cache", "maybe", image, at],
        args!["--discard", "perhaps", image, at],
        args!["--allow-other", "some", image, at],
        args!["-f", "qcow2", image, at],
        args!["-w", "--passthrough", image, at],
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
        "--io-uring",
        "--queue-depth",
        "--max-request",
        "--memory-budget",
        "--passthrough",
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
fn a_size_that_does_not_fit_is_refused_with_the_reason() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    for (option, text, reason) in [
        ("--max-request", "2M", "not a multiple of 4K from 64K to 1M"),
        ("--max-request", "64KB", "not a size; write a number"),
        ("--memory-budget", "9E", "too large; the largest size"),
    ] {
        let (code, said) = failure(args![option, text, "null:1M", at]);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(option) && said.contains(reason), "{said}");
    }
}

#[test]
fn the_largest_request_is_what_it_is_told() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    let daemon = Daemon::start(args!["--max-request", "128K", "null:1M", at]);
    let line = common::mount_line(&at).unwrap();
    assert!(line.ends_with(",max_read=131072"), "{line}");
    assert_same(&fs::read(&at).unwrap(), &vec![0; 1 << 20]);
    let end = daemon.stop();
    assert!(
        end.stderr.contains("requests of up to 131072 bytes"),
        "{end:?}"
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
    assert_eq!(s.mounts(), std::slice::from_ref(&image));
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
    assert_eq!(s.mounts(), std::slice::from_ref(&at));
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
            assert_eq!(s.mounts(), std::slice::from_ref(&at));
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

// --- The end ----------------------------------------------------------------

#[test]
fn every_signal_ends_it_with_success() {
    let Some(s) = scratch() else { return };
    for signal in SIGNALS {
        for cache in ["none", "writeback"] {
            let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
            let daemon = Daemon::start(args!["-w", "--cache", cache, image, at]);
            // Open for ever, written but never synced.
            let file = open(&at);
            file.write_all_at(&pattern(0, 300_000), 12_345).unwrap();
            let end = daemon.stop_with(signal);
            assert!(
                end.stderr.contains(&format!("{signal}: stopping")),
                "{end:?}"
            );
            assert_eq!(s.mounts(), [] as [PathBuf; 0]);
            assert_same(
                &fs::read(&image).unwrap()[12_345..312_345],
                &pattern(0, 300_000),
            );
            assert!(file.sync_all().is_err(), "nobody is there any more");
        }
    }
}

#[test]
fn an_ignored_hangup_stays_ignored() {
    let Some(s) = scratch() else { return };
    if !installed(&["nohup"]) {
        return;
    }
    let at = s.mountpoint("disk");
    let mut command = Command::new("nohup");
    command.arg(blkfused().get_program()).arg("ram:1M").arg(&at);
    command.stdin(Stdio::null());
    let mut daemon = Daemon::spawn(command, 1);
    daemon.signal(Signal::SIGHUP);
    // It has looked at a later signal without having ended for the first.
    assert_eq!(fs::read(&at).unwrap().len(), 1 << 20);
    assert!(daemon.is_running());
    daemon.signal(Signal::SIGTERM);
    let end = daemon.wait(STOP);
    assert!(end.stderr.contains("SIGTERM: stopping"), "{end:?}");
    assert!(!end.stderr.contains("SIGHUP"), "{end:?}");
}

/// A program that runs beside the test; killed when dropped.
struct Beside(Child);

impl Beside {
    fn start(program: &str, args: impl IntoIterator<Item = std::ffi::OsString>) -> Self {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// Waits for its end.
    fn wait(mut self) -> std::process::ExitStatus {
        eventually("its end", || self.0.try_wait().unwrap().is_some());
        self.0.wait().unwrap()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn it_ends_under_load() {
    let Some(s) = scratch() else { return };
    if !installed(&["fio"]) {
        return;
    }
    for (engine, direct) in [("libaio", "1"), ("psync", "0"), ("mmap", "0")] {
        let (image, at) = (s.sparse("disk.img", 64 << 20), s.mountpoint("disk"));
        let daemon = Daemon::start(args!["-w", image, at]);
        let load = Beside::start(
            "fio",
            args![
                "--name=load",
                format!("--filename={}", at.display()),
                format!("--ioengine={engine}"),
                format!("--direct={direct}"),
                "--rw=randrw",
                "--bs=4k",
                "--size=64M",
                "--iodepth=16",
                "--numjobs=2",
                "--time_based",
                "--runtime=60",
                // An mmap engine that meets a dead file dies of SIGBUS.
                "--thread=0",
            ],
        );
        eventually("some load", || allocated(&image) > 1 << 20);
        let end = daemon.stop();
        assert!(end.took < STOP);
        assert_eq!(s.mounts(), [] as [PathBuf; 0]);
        assert!(!load.wait().success(), "{engine} noticed nothing");
    }
}

#[test]
fn what_was_acknowledged_is_in_the_image_at_the_end() {
    let Some(s) = scratch() else { return };
    const WRITERS: usize = 4;
    const PART: u64 = 8 << 20;
    for cache in ["none", "writeback"] {
        let length = PART * WRITERS as u64;
        let (image, at) = (s.sparse("disk.img", length), s.mountpoint("disk"));
        let daemon = Daemon::start(args!["-w", "--threads", "2", "--cache", cache, image, at]);
        let acknowledged = thread::scope(|scope| {
            let writers = [0, 1, 2, 3].map(|writer| {
                let file = open(&at);
                scope.spawn(move || {
                    let start = writer as u64 * PART;
                    // Round and round, until somebody ends it.
                    for block in 0.. {
                        let offset = start + (block * 5000) % (PART - 5000);
                        let data = block.to_le_bytes().repeat(625);
                        if file.write_all_at(&data, offset).is_err() {
                            return block;
                        }
                    }
                    unreachable!()
                })
            });
            eventually("some load", || allocated(&image) > 4 << 20);
            daemon.stop();
            writers.map(|writer| writer.join().unwrap())
        });
        let raw = fs::read(&image).unwrap();
        for (writer, end) in acknowledged.into_iter().enumerate() {
            // The last ones of each writer overlap nothing that came later.
            for block in end.saturating_sub(1000)..end {
                let offset = writer as u64 * PART + (block * 5000) % (PART - 5000);
                let found = &raw[offset as usize..offset as usize + 5000];
                // What was refused may have been written all the same.
                let refused = (end * 5000) % (PART - 5000) + writer as u64 * PART;
                if refused.abs_diff(offset) >= 5000 {
                    assert_same(found, &block.to_le_bytes().repeat(625));
                }
            }
        }
    }
}

#[test]
fn further_signals_force_the_end() {
    let Some(s) = scratch() else { return };
    let device = Mounted::fixed(200_000, 2);
    let at = s.mountpoint("disk");
    let daemon = Daemon::start(args!["-w", device.path, at]);
    device.driver.hold();
    thread::scope(|scope| {
        let file = open(&at);
        let reader = scope.spawn(move || file.read_exact_at(&mut [0; 4096], 0));
        device.driver.wait_for_held(1);
        daemon.signal(Signal::SIGTERM);
        eventually("the end", || daemon.stderr().contains("SIGTERM: stopping"));
        daemon.signal(Signal::SIGINT);
        eventually("force", || daemon.stderr().contains("stopping by force"));
        // Now the client is free, although the image does not answer.
        assert!(reader.join().unwrap().is_err());
        daemon.signal(Signal::SIGTERM);
        eventually("giving up", || daemon.stderr().contains("gave up waiting"));
        // The kernel lets no process end before its requests are answered.
        device.driver.release();
        let end = daemon.wait(STOP);
        assert_eq!(end.status.code(), Some(1), "{end:?}");
    });
}

#[test]
fn nobody_has_to_listen() {
    let Some(s) = scratch() else { return };
    let at = s.mountpoint("disk");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >&- 2>/dev/full </dev/null", "sh"]);
    command.arg(blkfused().get_program()).arg("ram:1M").arg(&at);
    let daemon = Daemon::spawn(command, 0);
    eventually("a mount", || !s.mounts().is_empty());
    assert_eq!(fs::read(&at).unwrap().len(), 1 << 20);
    daemon.stop();
}

/// All of a file in memory, for reading and writing.
fn map(file: &File) -> MmapMut {
    // SAFETY: the test changes the file in no other way while it is mapped, and
    // does not touch the memory after the export is gone.
    unsafe { MmapMut::map_mut(file).unwrap() }
}

#[test]
fn what_mapped_memory_holds_is_in_the_image_at_the_end() {
    let Some(s) = scratch() else { return };
    for threads in ["1", "4"] {
        for cache in ["none", "writeback"] {
            let (image, at) = (s.sparse("disk.img", 3_000_001), s.mountpoint("disk"));
            let daemon = Daemon::start(args![
                "-w",
                "--threads",
                threads,
                "--cache",
                cache,
                image,
                at
            ]);
            let file = open(&at);
            let mut memory = map(&file);
            memory.copy_from_slice(&pattern(5, 3_000_001));
            // Neither synced nor unmapped nor closed.
            daemon.stop();
            assert_same(&fs::read(&image).unwrap(), &pattern(5, 3_000_001));
            drop((memory, file));
        }
    }
}

#[test]
fn it_ends_when_somebody_else_unmounts() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    for flags in [MntFlags::empty(), MntFlags::MNT_DETACH, MntFlags::MNT_FORCE] {
        let daemon = Daemon::start(args!["-w", image, at]);
        open(&at).write_all_at(&[3; 5000], 777).unwrap();
        unmount(&at, flags);
        let end = daemon.wait(STOP);
        assert!(end.status.success(), "{flags:?}: {end:?}");
        assert_eq!(fs::read(&image).unwrap()[777..5777], [3; 5000]);
    }
    if installed(&["umount"]) {
        let daemon = Daemon::start(args![image, at]);
        run("umount", args![at]);
        assert!(daemon.wait(STOP).status.success());
    }
    if installed(&["fusermount3"]) {
        let daemon = Daemon::start(args![image, at]);
        run("fusermount3", args!["-u", at]);
        assert!(daemon.wait(STOP).status.success());
    }
}

#[test]
fn a_lazily_unmounted_file_lives_until_it_is_closed() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    let mut daemon = Daemon::start(args!["-w", image, at]);
    let file = open(&at);
    umount2(&at, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(s.mounts(), [] as [PathBuf; 0]);
    file.write_all_at(&[9; 100], 50).unwrap();
    file.sync_all().unwrap();
    assert!(daemon.is_running());
    drop(file);
    assert!(daemon.wait(STOP).status.success());
    assert_eq!(fs::read(&image).unwrap()[50..150], [9; 100]);
}

#[test]
fn one_export_may_end_before_the_others() {
    let Some(s) = scratch() else { return };
    let (one, two) = (s.mountpoint("one"), s.mountpoint("two"));
    let second = format!("ram:2M={}", two.display());
    let mut daemon = Daemon::start_several(args!["-w", "ram:1M", one, "--export", second], 2);
    unmount(&one, MntFlags::empty());
    let file = open(&two);
    for round in 0..100 {
        file.write_all_at(&[round; 4096], 4096).unwrap();
    }
    assert_eq!(fs::read(&two).unwrap()[4096..8192], [99; 4096]);
    assert!(daemon.is_running());
    drop(file);
    unmount(&two, MntFlags::empty());
    assert!(daemon.wait(STOP).status.success());
}

#[test]
fn a_killed_daemon_can_be_started_again_on_its_dead_mount() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    for round in 1..=3u8 {
        let daemon = Daemon::start(args!["-w", image, at]);
        let file = open(&at);
        file.write_all_at(&[round; 10_000], 0).unwrap();
        daemon.kill();
        // The kernel ends the connection a moment after the process; who asks
        // in between is told so by other errors.
        eventually("the connection ends", || {
            errno(fs::metadata(&at)) == libc::ENOTCONN
        });
        assert_eq!(s.mounts(), std::slice::from_ref(&at));
        assert!(file.write_at(&[0xff; 10], 0).is_err());
    }
    let daemon = Daemon::start(args![image, at]);
    assert_eq!(fs::read(&at).unwrap()[..10_000], [3; 10_000]);
    assert_eq!(s.mounts(), std::slice::from_ref(&at));
    daemon.stop();
    assert_eq!(s.mounts(), [] as [PathBuf; 0]);
}

#[test]
fn a_second_daemon_mounts_over_the_first_or_is_told_why_not() {
    let Some(s) = scratch() else { return };
    let (image, at) = (s.file("disk.img", &[1; 100]), s.mountpoint("disk"));
    let first = Daemon::start(args!["-w", image, at]);
    // What is served there is a regular file like any other.
    let second = Daemon::start(args!["ram:1M", at]);
    assert_eq!(fs::metadata(&at).unwrap().len(), 1 << 20);
    second.stop();
    assert_eq!(fs::read(&at).unwrap(), [1; 100]);
    first.stop();
}

// --- Locks ------------------------------------------------------------------

#[test]
fn qemu_does_not_write_an_image_that_is_exported_writable() {
    let Some(s) = scratch() else { return };
    if !installed(&["qemu-img", "qemu-io"]) {
        return;
    }
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    let write = args!["-f", "raw", "-c", "write 0 4k", image];
    let read = args!["-r", "-f", "raw", "-c", "read 0 4k", image];
    let resize = args!["resize", "-f", "raw", image, "2M"];
    let may = |program, args: &[std::ffi::OsString]| {
        let output = output(program, args.to_vec());
        let text = text_of(&output);
        assert!(output.status.success() || text.contains("lock"), "{text}");
        output.status.success()
    };
    for (options, writes, resizes) in [
        (&["-w"][..], false, false),
        (&["-w", "--growable"], false, false),
        (&[], true, false),
    ] {
        let mut all = args![image, at];
        all.extend(options.iter().map(Into::into));
        let daemon = Daemon::start(all);
        assert_eq!(may("qemu-io", &write), writes, "{options:?}");
        assert_eq!(may("qemu-img", &resize), resizes, "{options:?}");
        assert!(may("qemu-io", &read), "{options:?}");
        daemon.stop();
    }
    assert!(may("qemu-io", &write));
    assert!(may("qemu-img", &resize));
}

#[test]
fn an_image_that_qemu_writes_is_refused() {
    let Some(s) = scratch() else { return };
    if !installed(&["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let (image, at) = (s.sparse("disk.img", 1 << 20), s.mountpoint("disk"));
    let pidfile = s.join("pid");
    let blockdev = format!("file,node-name=disk,filename={}", image.display());
    let server = format!("addr.type=unix,addr.path={}", s.join("nbd").display());
    let holder = Beside::start(
        "qemu-storage-daemon",
        args![
            "--blockdev",
            blockdev,
            "--nbd-server",
            server,
            "--export",
            "nbd,id=export,node-name=disk,writable=on",
            "--pidfile",
            pidfile
        ],
    );
    eventually("qemu-storage-daemon", || pidfile.exists());
    let expected = format!(
        "{}: another process has it open for writing; stop that one first",
        image.display()
    );
    assert_eq!(refusal(args!["-w", image, at]), expected);
    assert_eq!(s.mounts(), [] as [PathBuf; 0]);
    Daemon::start(args![image, at]).stop();
    drop(holder);

    // qemu-io waits for commands with the image open.
    let holder = Beside::start("qemu-io", args!["-f", "raw", image]);
    let locked = || {
        let table = fs::read_to_string("/proc/locks").unwrap();
        let inode = format!(":{} ", fs::metadata(&image).unwrap().ino());
        table.contains(&inode)
    };
    eventually("qemu-io's lock", locked);
    eventually("a refusal", || {
        // Its last lock is not its first.
        let (code, text) = failure(args!["-w", image, at]);
        assert!(code == 1 && text.contains(" another process "), "{text}");
        text.contains(&expected)
    });
    drop(holder);
    Daemon::start(args!["-w", image, at]).stop();
}

#[test]
fn a_running_program_is_no_image_to_write() {
    let Some(s) = scratch() else { return };
    let (program, at) = (s.join("program"), s.mountpoint("disk"));
    run("cp", args![blkfused().get_program(), program]);
    let mut command = Command::new(&program);
    command
        .args(args!["ram:1M", s.mountpoint("other")])
        .stdin(Stdio::null());
    let running = Daemon::spawn(command, 1);
    let why = refusal(args!["-w", program, at]);
    assert!(
        why.contains("it is in use as a program or swap; stop that use first"),
        "{why}"
    );
    Daemon::start(args![program, at]).stop();
    running.stop();
}

#[test]
fn writers_exclude_each_other_and_readers_do_not() {
    let Some(s) = scratch() else { return };
    let image = s.file("disk.img", &pattern(0, 5000));
    let ats = [1, 2, 3].map(|n| s.mountpoint(format!("disk{n}")));
    let one = Daemon::start(args![image, ats[0]]);
    let two = Daemon::start(args![image, ats[1]]);
    for at in &ats[..2] {
        assert_same(&fs::read(at).unwrap(), &pattern(0, 5000));
    }
    // A writer's clients may truncate, which readers do not expect.
    let at = s.mountpoint("disk4");
    let why = refusal(args!["-w", image, at]);
    assert!(why.contains("lets nobody else resize it"), "{why}");
    drop((one.stop(), two.stop()));
    let writer = Daemon::start(args!["-w", image, ats[2]]);
    let why = refusal(args!["-w", image, at]);
    assert!(
        why.contains("another process has it open for writing"),
        "{why}"
    );
    drop(writer.stop());
    // By another name it is the same image.
    let link = s.join("link");
    fs::hard_link(&image, &link).unwrap();
    let owner = Daemon::start(args!["-w", "--growable", image, at]);
    let why = refusal(args![link, ats[0]]);
    assert!(why.contains("another process may resize it"), "{why}");
    owner.stop();
}

// --- A connection made by others --------------------------------------------

#[test]
fn an_inherited_connection_is_served() {
    let Some(s) = scratch() else { return };
    let image = s.file("disk.img", &pattern(0, 300_000));
    for (number, redirect) in [(0, ""), (7, "7<&0 0</dev/null")] {
        let at = s.mountpoint("disk");
        let device = connection_at(&at, 0, ",allow_other");
        let script = format!("exec \"$@\" {redirect}");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "sh"])
            .arg(blkfused().get_program());
        command
            .arg("-w")
            .arg(&image)
            .arg(format!("/dev/fd/{number}"));
        command.stdin(device);
        let daemon = Daemon::spawn(command, 1);
        let expected = format!("(300000 bytes, writable) is served over /dev/fd/{number}; stop");
        assert!(daemon.ready[0].contains(&expected), "{:?}", daemon.ready);
        assert_same(&fs::read(&at).unwrap(), &pattern(0, 300_000));
        let file = open(&at);
        file.write_all_at(&pattern(0, 1000), 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        daemon.stop();
        // Who mounted it unmounts it; the connection is gone.
        assert_eq!(errno(fs::metadata(&at)), libc::ENOTCONN);
        unmount(&at, MntFlags::empty());

        // Unmounting ends this one, too.
        let device = connection_at(&at, 0, ",allow_other");
        let mut command = blkfused();
        command.arg(&image).arg("/dev/fd/0").stdin(device);
        let daemon = Daemon::spawn(command, 1);
        unmount(&at, MntFlags::empty());
        assert!(daemon.wait(STOP).status.success());
    }
    for (wrong, reason) in [
        ("/dev/fd/0", "is not a /dev/fuse descriptor"),
        ("/dev/fd/77", "/dev/fd/77: Bad file"),
    ] {
        let why = refusal(args![image, wrong]);
        assert!(why.contains(reason) && why.contains("; pass "), "{why}");
    }
    // Open, but never mounted: there is no handshake to wait for.
    let mut command = blkfused();
    let device = open(Path::new("/dev/fuse"));
    command.arg(&image).arg("/dev/fd/0").stdin(device);
    let end = Daemon::spawn(command, 0).wait(SOON);
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert!(end.stderr.contains("fd"), "{end:?}");
}

// --- Data -------------------------------------------------------------------

#[test]
fn holes_and_allocation_pass_through() {
    let Some(s) = scratch() else { return };
    for cache in ["none", "writeback"] {
        let (image, at) = (s.sparse("disk.img", 10_000_001), s.mountpoint("disk"));
        let raw = open(&image);
        for data in [0, 1 << 20, 4 << 20, 9_990_000] {
            raw.write_all_at(&[7; 10_001], data).unwrap();
        }
        raw.sync_all().unwrap();
        let daemon = Daemon::start(args!["-w", "--growable", "--cache", cache, image, at]);
        let file = open(&at);
        let map = map_of(&raw);
        assert_eq!(map.len(), 4, "{map:?}");
        assert_eq!(map_of(&file), map);
        let same_space = || {
            // The kernel keeps attributes for a second.
            eventually("the same st_blocks", || allocated(&at) == allocated(&image));
            allocated(&image)
        };
        let space = same_space();
        assert!(space < 100_000, "{space}");

        // Written through the export, holes are filled; and made again.
        file.write_all_at(&[8; 65_536], 2 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(map_of(&file), map_of(&raw));
        assert_eq!(map_of(&file).len(), 5);
        // The file system's own notes about it may take blocks as well.
        let notes = 8192;
        assert!((space + 65_536..=space + 65_536 + notes).contains(&same_space()));
        fallocate(&file, PUNCH, 2 << 20, 65_536).unwrap();
        assert_eq!(map_of(&file), map);
        assert!((space..=space + notes).contains(&same_space()));

        // Reserved room behind the end takes space at once.
        fallocate(&file, FallocateFlags::empty(), 10_000_001, 3_000_000).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), 13_000_001);
        assert!(same_space() >= space + 3_000_000 - 4096);
        // As a hole it does not.
        file.set_len(50_000_000).unwrap();
        assert!(same_space() < space + 3_100_000);
        drop(file);
        daemon.stop();
        assert_eq!(fs::metadata(&image).unwrap().len(), 50_000_000);
    }
}

#[test]
fn odd_sizes_are_exact() {
    let Some(s) = scratch() else { return };
    for cache in ["none", "writeback"] {
        for length in [0, 1, 100, 511, 513, 4095, 4097, 65_537, 1_000_001] {
            let (image, at) = (
                s.file("disk.img", &pattern(0, length)),
                s.mountpoint("disk"),
            );
            let daemon = Daemon::start(args!["-w", "--cache", cache, image, at]);
            assert_same(&fs::read(&at).unwrap(), &pattern(0, length));
            let file = open(&at);
            assert_eq!(file.metadata().unwrap().len(), length as u64);
            // To the very end, and not a byte further.
            let changed = pattern(1000, length);
            let written = file.write_at(&[&changed[..], &[1; 100]].concat(), 0);
            match length {
                0 => assert_eq!(errno(written), libc::ENOSPC),
                _ => assert_eq!(written.unwrap(), length),
            }
            assert_eq!(errno(file.write_at(&[1], length as u64)), libc::ENOSPC);
            assert_eq!(file.read_at(&mut [0; 10], length as u64).unwrap(), 0);
            file.sync_all().unwrap();
            assert_same(&fs::read(&at).unwrap(), &changed);
            drop(file);
            daemon.stop();
            assert_same(&fs::read(&image).unwrap(), &changed);
        }
        // Growing to a length that no sector divides.
        let (image, at) = (s.file("disk.img", b""), s.mountpoint("disk"));
        let daemon = Daemon::start(args!["-w", "--growable", "--cache", cache, image, at]);
        for part in pattern(0, 50_021).chunks(4999) {
            let mut file = OpenOptions::new().append(true).open(&at).unwrap();
            file.write_all(part).unwrap();
        }
        assert_same(&fs::read(&image).unwrap(), &pattern(0, 50_021));
        daemon.stop();
        assert_same(&fs::read(&image).unwrap(), &pattern(0, 50_021));
    }
}

#[test]
fn five_sparse_tebibytes_are_no_trouble() {
    let Some(s) = scratch() else { return };
    let length = (5 << 40) + 5;
    let image = s.join("disk.img");
    if let Err(e) = File::create(&image).unwrap().set_len(length) {
        return skip(&format!("no file of 5 TiB: {e}"));
    }
    let at = s.mountpoint("disk");
    for cache in ["none", "writeback"] {
        let daemon = Daemon::start(args!["-w", "--cache", cache, image, at]);
        let file = open(&at);
        assert_eq!(file.metadata().unwrap().len(), length);
        let places = [0, (1 << 31) - 3, (1 << 32) - 5, (1 << 42) + 1, length - 6];
        for (seed, place) in places.iter().enumerate() {
            file.write_all_at(&pattern(seed, 6), *place).unwrap();
        }
        file.sync_all().unwrap();
        assert_eq!(map_of(&file), map_of(&open(&image)));
        drop(file);
        daemon.stop();
        let raw = open(&image);
        for (seed, place) in places.iter().enumerate() {
            let mut back = [0; 6];
            raw.read_exact_at(&mut back, *place).unwrap();
            assert_eq!(&back[..], pattern(seed, 6));
        }
        assert!(allocated(&image) < 1 << 20);
    }
}

#[test]
fn an_unreadable_sector_fails_alone() {
    let Some(s) = scratch() else { return };
    const BAD: u64 = 40_960;
    for cache in ["none", "writeback"] {
        // The image is a file on a device of ours, which has a bad sector.
        let device = Mounted::fixed(200_000, 2);
        let at = s.mountpoint("disk");
        let daemon = Daemon::start(args!["-w", "--cache", cache, device.path, at]);
        device.driver.fail_if(|call, offset, bytes| {
            let hit = offset < BAD + 512 && offset + bytes > BAD;
            let moves = matches!(call, Call::Read | Call::Write);
            (hit && moves).then(|| io::Error::from_raw_os_error(libc::EIO))
        });
        let file = open(&at);
        let mut back = [0; 512];
        for sector in (0..200_000 / 512).map(|n| n * 512) {
            let read = file.read_exact_at(&mut back, sector);
            if sector == BAD {
                assert_eq!(errno(read), libc::EIO);
                continue;
            }
            read.unwrap_or_else(|e| panic!("{sector}: {e}"));
            assert_eq!(&back[..], pattern(sector as usize, 512));
        }
        assert_eq!(errno(file.write_all_at(&[1; 4096], BAD)), libc::EIO);
        file.write_all_at(&[1; 4096], BAD + 4096).unwrap();
        assert_eq!(device.driver.bytes()[45_056..49_152], [1; 4096]);
        // The sector is well again, and nothing keeps the failure in mind.
        device.driver.fail_never();
        file.write_all_at(&[2; 4096], BAD).unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::read(&at).unwrap()[40_960..45_056], [2; 4096]);
        drop(file);
        daemon.stop();
    }
}

#[test]
fn a_failed_flush_is_not_forgotten() {
    let Some(s) = scratch() else { return };
    let device = Mounted::fixed(200_000, 2);
    let at = s.mountpoint("disk");
    let daemon = Daemon::start(args!["-w", device.path, at]);
    let file = open(&at);
    file.write_all_at(&[1; 5000], 0).unwrap();
    device.driver.fail_if(|call, _, _| {
        (call == Call::Flush).then(|| io::Error::from_raw_os_error(libc::EIO))
    });
    assert_eq!(errno(file.sync_all()), libc::EIO);
    device.driver.fail_never();
    // What the first covered is lost, so no other may say that all is well.
    assert_eq!(errno(file.sync_all()), libc::EIO);
    drop(file);
    daemon.signal(Signal::SIGTERM);
    let end = daemon.wait(STOP);
    assert_eq!(end.status.code(), Some(1), "{end:?}");
    assert!(
        end.stderr.contains("what was written may be lost"),
        "{end:?}"
    );
}

#[test]
fn a_full_file_system_is_no_space_and_recovers() {
    let Some(s) = scratch() else { return };
    for cache in ["none", "writeback"] {
        let small = Mount::new(
            args!["-t", "tmpfs", "-o", "size=4M", "none"],
            &s.join(format!("small-{cache}")),
        );
        let (image, other) = (small.path().join("disk.img"), small.path().join("other"));
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::write(&other, [1; 1 << 20]).unwrap();
        let at = s.mountpoint("disk");
        let daemon = Daemon::start(args!["-w", "--growable", "--cache", cache, image, at]);
        let file = open(&at);
        let block = pattern(0, 65_536);
        let mut written = 0;
        let error = loop {
            match file.write_all_at(&block, written) {
                Ok(()) => written += 65_536,
                Err(e) => break e,
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert!(written >= 2 << 20, "{written}");
        // What was written is there, and can be written over.
        file.write_all_at(&block, 0).unwrap();
        let mut back = vec![0; 65_536];
        file.read_exact_at(&mut back, written - 65_536).unwrap();
        assert_same(&back, &block);
        // Nor does reserving work, and it changes nothing.
        let all = fallocate(&file, FallocateFlags::empty(), 16 << 20, 8 << 20);
        assert_eq!(all, Err(nix::errno::Errno::ENOSPC));
        assert_eq!(file.metadata().unwrap().len(), 16 << 20);

        fs::remove_file(&other).unwrap();
        file.write_all_at(&block, written).unwrap();
        file.sync_all().unwrap();
        drop(file);
        daemon.stop();
        let content = fs::read(&image).unwrap();
        for piece in content[..written as usize + 65_536].chunks(65_536) {
            assert_same(piece, &block);
        }
        drop(small);
    }
}

#[test]
fn an_image_cut_short_behind_our_back_does_no_harm() {
    let Some(s) = scratch() else { return };
    for cache in ["none", "writeback"] {
        let (image, at) = (
            s.file("disk.img", &pattern(0, 1_000_000)),
            s.mountpoint("disk"),
        );
        let mut daemon = Daemon::start(args!["-w", "--cache", cache, image, at]);
        let file = open(&at);
        open(&image).set_len(300_000).unwrap();
        let mut back = vec![0xaa; 1_000_000];
        // Zeroes, the end, or an error: anything but a crash or old bytes.
        match file.read_at(&mut back, 0) {
            Ok(n) => {
                let kept = n.min(300_000);
                assert_same(&back[..kept], &pattern(0, kept));
                assert!(back[kept..n].iter().all(|b| *b == 0));
            }
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO)),
        }
        assert!(matches!(
            file.read_at(&mut back[..4096], 900_000),
            Ok(0 | 4096) | Err(_)
        ));
        let _ = map_of(&file);
        let _ = fallocate(&file, PUNCH, 500_000, 1000);
        let _ = file.write_at(&[1; 1000], 700_000);
        let _ = file.sync_all();
        let _ = file.metadata();
        file.write_all_at(&[2; 1000], 1000).unwrap();
        assert!(daemon.is_running());
        drop(file);
        daemon.stop();
        let content = fs::read(&image).unwrap();
        assert_same(&content[..1000], &pattern(0, 1000));
        assert_same(&content[1000..2000], &[2; 1000]);
        assert_same(&content[2000..300_000], &pattern(2000, 298_000));
    }
}

#[test]
fn a_block_device_is_exported_like_a_file() {
    let Some(s) = scratch() else { return };
    let image = s.file("disk.img", &pattern(0, 1 << 20));
    let Some(device) = Loop::attach(&image, &[]) else {
        return;
    };
    let at = s.mountpoint("disk");
    for cache in ["none", "writeback"] {
        let daemon = Daemon::start(args!["-w", "--cache", cache, device.0, at]);
        assert!(
            daemon.ready[0].contains("(1 MiB, writable)"),
            "{:?}",
            daemon.ready
        );
        let file = open(&at);
        file.write_all_at(&pattern(9, 10_001), 3333).unwrap();
        fallocate(&file, PUNCH, 65_536, 65_536).unwrap();
        file.sync_all().unwrap();
        let mut expected = pattern(0, 1 << 20);
        expected[3333..13_334].copy_from_slice(&pattern(9, 10_001));
        expected[65_536..131_072].fill(0);
        assert_same(&fs::read(&at).unwrap(), &expected);
        // Claimed: the kernel mounts it for nobody else.
        let claim = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&device.0);
        assert_eq!(errno(claim), libc::EBUSY);
        drop(file);
        daemon.stop();
    }
    let mut exclusive = OpenOptions::new();
    let exclusive = exclusive.read(true).custom_flags(libc::O_EXCL);
    let user = exclusive.open(&device.0).unwrap();
    let why = refusal(args!["-w", device.0, at]);
    assert!(
        why.contains(": the device is in use; unmount it first"),
        "{why}"
    );
    Daemon::start(args![device.0, at]).stop();
    drop(user);
    let why = refusal(args!["-w", "--growable", device.0, at]);
    assert!(
        why.ends_with("a block device cannot grow; leave --growable out"),
        "{why}"
    );
}

// --- Other people's programs ------------------------------------------------

#[test]
fn plain_tools_copy_in_and_out() {
    let Some(s) = scratch() else { return };
    let content = pattern(0, 3_000_001);
    let source = s.file("source", &content);
    let (image, at, copy) = (
        s.sparse("disk.img", 0),
        s.mountpoint("disk"),
        s.join("copy"),
    );
    let daemon = Daemon::start(args!["-w", "--growable", image, at]);
    run("cp", args![source, at]);
    run("cmp", args![source, at]);
    run("cp", args!["--sparse=always", at, copy]);
    run("cmp", args![source, copy]);
    let to = |path: &Path| format!("of={}", path.display());
    let from = |path: &Path| format!("if={}", path.display());
    run(
        "dd",
        args![
            from(&source),
            to(&at),
            "bs=7777",
            "oflag=append",
            "conv=notrunc"
        ],
    );
    assert_eq!(fs::metadata(&at).unwrap().len(), 6_000_002);
    run("dd", args![from(&at), to(&copy), "bs=1M", "iflag=direct"]);
    assert_same(
        &fs::read(&copy).unwrap(),
        &[&content[..], &content].concat(),
    );
    // Every time a file is copied in, it becomes exactly that file.
    let short = s.file("short", b"short");
    run("cp", args![short, at]);
    assert_eq!(fs::read(&at).unwrap(), b"short");
    run("truncate", args!["-s", "12345", at]);
    assert_eq!(fs::metadata(&image).unwrap().len(), 12_345);
    run("dd", args![from(&source), to(&at), "bs=1M", "oflag=direct"]);
    run("cmp", args![source, at]);
    daemon.stop();
    assert_same(&fs::read(&image).unwrap(), &content);
}

#[test]
fn a_database_lives_in_an_export() {
    let Some(s) = scratch() else { return };
    if !installed(&["sqlite3"]) {
        return;
    }
    let (image, at) = (s.sparse("db", 0), s.mountpoint("disk"));
    let daemon = Daemon::start(args!["-w", "--growable", image, at]);
    // Its journal lies beside it, on the file system below.
    let sql = "PRAGMA journal_mode=DELETE; CREATE TABLE t(n INTEGER PRIMARY KEY, s TEXT);\
        WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c WHERE n<20000)\
        INSERT INTO t SELECT n, hex(randomblob(20)) FROM c;\
        DELETE FROM t WHERE n%3=0; UPDATE t SET s='x'||s WHERE n%5=0; VACUUM;\
        PRAGMA mmap_size=10000000; PRAGMA integrity_check; SELECT count(*) FROM t;";
    let said = run("sqlite3", args![at, sql]);
    assert!(
        said.contains("\nok\n") && said.ends_with("13334\n"),
        "{said}"
    );
    daemon.stop();
    let check = "PRAGMA integrity_check; SELECT count(*) FROM t;";
    let said = run("sqlite3", args![image, check]);
    assert_eq!(said, "ok\n13334\n");
}

#[test]
fn a_file_system_lives_in_an_export() {
    let Some(s) = scratch() else { return };
    if !installed(&["mkfs.ext4", "e2fsck", "losetup", "mount"]) {
        return;
    }
    for cache in ["none", "writeback"] {
        let (image, at) = (s.sparse("disk.img", 64 << 20), s.mountpoint("disk"));
        let daemon = Daemon::start(args!["-w", "--cache", cache, image, at]);
        run("mkfs.ext4", args!["-q", "-F", at]);
        run("e2fsck", args!["-fn", at]);
        let Some(device) = Loop::attach(&at, &["--direct-io=on"]) else {
            return;
        };
        let inside = Mount::new(args![device.0], &s.join(format!("inside-{cache}")));
        let file = inside.path().join("file");
        fs::write(&file, pattern(0, 5_000_000)).unwrap();
        assert_same(&fs::read(&file).unwrap(), &pattern(0, 5_000_000));
        drop(inside);
        device.detach();
        run("e2fsck", args!["-fn", at]);
        daemon.stop();
        run("e2fsck", args!["-fn", image]);
    }
}

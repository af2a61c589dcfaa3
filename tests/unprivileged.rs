//! The daemon without privileges: as an ordinary user, whom fusermount3 helps,
//! and as root of a namespace of its own.

mod common;
mod daemon_support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use common::{SOON, eventually, pattern, skip};
use daemon_support::*;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

const NOBODY: u32 = 65534;
const NONE: Option<&str> = None;

/// What an ordinary user may do with /dev/fuse.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fuse {
    Open,
    /// Nothing, but root has prepared a mount.
    Prepared,
}

/// The user's directory, with a copy of the daemon's program in it, as the
/// original may lie where only its owner may look.
struct User {
    s: Scratch,
    program: PathBuf,
    /// Where a connection is mounted that root has made for the user; nobody
    /// serves it yet.
    prepared: PathBuf,
    device: Mutex<Option<File>>,
}

impl User {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null()).current_dir(self.s.path());
        command
    }

    fn start(&self, args: Vec<std::ffi::OsString>) -> Daemon {
        let mut command = self.command();
        command.args(args);
        Daemon::spawn(command, 1)
    }

    /// How a daemon ends that cannot start.
    fn refusal(&self, args: Vec<std::ffi::OsString>) -> String {
        let mut command = self.command();
        command.args(args);
        let end = Daemon::spawn(command, 0).wait(SOON);
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let line = end.stderr.lines().last().unwrap_or_default();
        line.strip_prefix("blkfused: ").unwrap().to_owned()
    }
}

/// Runs `body` as a user without privileges, in a thread with a mount namespace
/// of its own in which /dev/fuse is as `fuse` says and /etc/fuse.conf contains
/// `conf`. Whatever it leaves mounted vanishes with the thread.
fn as_nobody(fuse: Fuse, conf: &str, body: impl FnOnce(&User) + Send) {
    if !can_mount() || !installed(&["fusermount3"]) {
        return;
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(e) = unshare(CloneFlags::CLONE_NEWNS) {
                return skip(&format!("no mount namespace: {e}"));
            }
            mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).unwrap();
            forget_other_mounts();
            let user = user_directory();
            cover("/dev/fuse", |node| {
                let mode = if fuse == Fuse::Open { 0o666 } else { 0o600 };
                mknod(node, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(10, 229)).unwrap();
                fs::set_permissions(node, Permissions::from_mode(mode)).unwrap();
            });
            if Path::new("/etc/fuse.conf").exists() {
                cover("/etc/fuse.conf", |file| fs::write(file, conf).unwrap());
            } else if !conf.is_empty() {
                return skip("there is no /etc/fuse.conf to cover");
            }
            if fuse == Fuse::Prepared {
                *user.device.lock().unwrap() = Some(connection_at(&user.prepared, NOBODY, ""));
            }
            become_nobody();
            body(&user);
        });
    });
}

/// The copies of other tests' mounts would keep their connections alive.
fn forget_other_mounts() {
    let fuse = || {
        let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        table.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let path = fields.nth(1)?.to_owned();
            fields.next()?.starts_with("fuse.blkfuse").then_some(path)
        })
    };
    for _ in 0..1000 {
        let Some(path) = fuse() else { return };
        if umount2(&path[..], MntFlags::MNT_DETACH).is_err() {
            // Its path has a strange name, or has just been removed.
            return;
        }
    }
}

fn user_directory() -> User {
    let s = Scratch::new();
    let program = s.join("blkfused");
    // By a process that does nothing else: a program that is open for writing,
    // if only in a child that another test forks, cannot be run.
    let original = env!("CARGO_BIN_EXE_blkfused");
    run("install", args!["-m", "755", original, program]);
    chown(s.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let prepared = s.mountpoint("prepared");
    User {
        s,
        program,
        prepared,
        device: Mutex::new(None),
    }
}

/// Covers a file, for this thread's namespace alone, with one that `make` makes.
fn cover(path: &str, make: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    make(&file);
    mount(Some(&file), path, NONE, MsFlags::MS_BIND, NONE).unwrap();
}

/// Gives up all privileges, of this thread alone.
fn become_nobody() {
    // SAFETY: these calls take numbers, and a list of no groups.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
            libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY),
            libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
        ]
    };
    assert_eq!(results, [0; 3]);
}

fn mount_line(path: &Path) -> String {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let path = format!(" {} ", path.display());
    let line = table.lines().rfind(|line| line.contains(&path));
    line.unwrap_or_else(|| panic!("{path} in {table}"))
        .to_owned()
}

/// Four threads write their parts of an export of 500000 bytes.
fn write_in_parallel(at: &Path) {
    thread::scope(|scope| {
        for part in 0..4u8 {
            scope.spawn(move || {
                let file = OpenOptions::new().write(true).open(at).unwrap();
                for n in 0..100 {
                    let offset = u64::from(part) * 100_000 + n * 1000;
                    file.write_all_at(&[part + 1; 1000], offset).unwrap();
                }
            });
        }
    });
}

/// What is in an image of the pattern after `write_in_parallel`.
fn assert_written(image: &Path) {
    let content = fs::read(image).unwrap();
    for (part, bytes) in content[..400_000].chunks(100_000).enumerate() {
        assert!(bytes.iter().all(|b| usize::from(*b) == part + 1));
    }
    assert!(content[400_000..] == pattern(400_000, 100_000));
}

#[test]
fn an_ordinary_user_exports_an_image() {
    as_nobody(Fuse::Open, "", |user| {
        let s = &user.s;
        let (image, at) = (
            s.file("disk.img", &pattern(0, 500_000)),
            s.mountpoint("disk"),
        );
        let daemon = user.start(args!["-w", "--threads", "3", image, at]);
        let line = mount_line(&at);
        assert!(line.contains("user_id=65534,group_id=65534"), "{line}");
        assert!(line.contains("fuse.blkfuse"), "{line}");
        // Nothing was said in /etc/fuse.conf, so it is for its owner only.
        assert!(!line.contains("allow_other"), "{line}");
        let limited = "only this user can use the file";
        eventually("a message", || daemon.stderr().contains(limited));
        let status = fs::metadata(&at).unwrap();
        assert_eq!((status.uid(), status.gid()), (NOBODY, NOBODY));
        assert!(fs::read(&at).unwrap() == pattern(0, 500_000));
        write_in_parallel(&at);
        daemon.stop();
        assert!(s.mounts().is_empty());
        assert_written(&image);
    });
}

#[test]
fn queues_share_a_descriptor_where_there_is_no_second() {
    as_nobody(Fuse::Prepared, "", |user| {
        assert!(File::open("/dev/fuse").is_err());
        let image = user.s.file("disk.img", &pattern(0, 500_000));
        let mut command = user.command();
        command.args(args![
            "-w",
            "--threads",
            "4",
            "--log-level",
            "debug",
            image,
            "/dev/fd/0"
        ]);
        command.stdin(user.device.lock().unwrap().take().unwrap());
        let daemon = Daemon::spawn(command, 1);
        let shared = "queues share one FUSE descriptor";
        eventually("a message", || daemon.stderr().contains(shared));
        assert!(fs::read(&user.prepared).unwrap() == pattern(0, 500_000));
        write_in_parallel(&user.prepared);
        daemon.stop();
        assert_written(&image);
        run("fusermount3", args!["-u", "-z", user.prepared]);
        assert!(user.s.mounts().is_empty());
    });
}

#[test]
fn passthrough_is_not_for_users() {
    as_nobody(Fuse::Open, "", |user| {
        let (image, at) = (
            user.s.file("disk.img", &[1; 1000]),
            user.s.mountpoint("disk"),
        );
        let why = user.refusal(args!["--passthrough", image, at]);
        assert!(why.contains("CAP_SYS_ADMIN in the initial"), "{why}");
        assert!(user.s.mounts().is_empty());
        // Nor for the root of a namespace.
        if !installed(&["unshare"]) {
            return;
        }
        let probe = output("unshare", args!["-Urm", "true"]);
        if !probe.status.success() {
            return skip(&format!("no user namespaces: {}", text_of(&probe)));
        }
        let end = output(
            "unshare",
            args!["-Urm", user.program, "--passthrough", image, at],
        );
        let text = text_of(&end);
        assert_eq!(end.status.code(), Some(1), "{text}");
        assert!(text.contains("CAP_SYS_ADMIN in the initial"), "{text}");
    });
}

#[test]
fn every_signal_unmounts_what_a_user_mounted() {
    as_nobody(Fuse::Open, "", |user| {
        let at = user.s.mountpoint("disk");
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            let daemon = user.start(args!["-w", "ram:1M", at]);
            let file = OpenOptions::new().write(true).open(&at).unwrap();
            file.write_all_at(&[1; 10_000], 5).unwrap();
            daemon.stop_with(signal);
            assert!(user.s.mounts().is_empty());
            assert_eq!(fs::metadata(&at).unwrap().len(), 0);
        }
    });
}

#[test]
fn a_user_unmounts_with_fusermount() {
    as_nobody(Fuse::Open, "", |user| {
        let at = user.s.mountpoint("disk");
        let daemon = user.start(args!["ram:1M", at]);
        run("fusermount3", args!["-u", at]);
        assert!(daemon.wait(STOP).status.success());
        // What a killed one has left is cleared away by the next.
        user.start(args!["ram:1M", at]).kill();
        eventually("the connection ends", || {
            fs::metadata(&at).unwrap_err().raw_os_error() == Some(libc::ENOTCONN)
        });
        let daemon = user.start(args!["ram:2M", at]);
        assert_eq!(fs::metadata(&at).unwrap().len(), 2 << 20);
        daemon.stop();
        assert!(user.s.mounts().is_empty());
    });
}

/// Lets all users read a file.
fn chmod_to_all(path: &Path) -> io::Result<()> {
    // The kernel takes an owner that it has not asked for yet for root.
    fs::metadata(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o644))
}

#[test]
fn sharing_with_others_needs_the_systems_leave() {
    as_nobody(Fuse::Open, "# nothing\n", |user| {
        let at = user.s.mountpoint("disk");
        let why = user.refusal(args!["--allow-other", "on", "ram:1M", at]);
        assert!(why.contains("user_allow_other"), "{why}");
        assert!(why.contains("/etc/fuse.conf"), "{why}");
        assert!(user.s.mounts().is_empty());
        for whether in ["auto", "off"] {
            let daemon = user.start(args!["--allow-other", whether, "ram:1M", at]);
            assert!(!mount_line(&at).contains("allow_other"));
            daemon.stop();
        }
        // Bits for others would promise what is not so.
        let daemon = user.start(args!["-w", "ram:1M", at]);
        assert_eq!(
            chmod_to_all(&at).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
        daemon.stop();
    });
    as_nobody(Fuse::Open, "user_allow_other\n", |user| {
        let at = user.s.mountpoint("disk");
        for (whether, shared) in [("auto", true), ("on", true), ("off", false)] {
            let daemon = user.start(args!["-w", "--allow-other", whether, "ram:1M", at]);
            assert_eq!(mount_line(&at).contains("allow_other"), shared, "{whether}");
            if shared {
                chmod_to_all(&at).unwrap();
                assert_eq!(fs::metadata(&at).unwrap().mode() & 0o777, 0o644);
            }
            daemon.stop();
        }
    });
}

#[test]
fn a_user_is_told_what_is_in_the_way() {
    as_nobody(Fuse::Open, "", |user| {
        let s = &user.s;
        let (image, at) = (s.file("disk.img", &[1; 1000]), s.mountpoint("disk"));
        fs::set_permissions(&image, Permissions::from_mode(0o400)).unwrap();
        let why = user.refusal(args!["-w", image, at]);
        assert!(
            why.contains("disk.img: Permission denied; leave -w out"),
            "{why}"
        );
        user.start(args![image, at]).stop();
        fs::set_permissions(&image, Permissions::from_mode(0o000)).unwrap();
        let why = user.refusal(args![image, at]);
        assert!(why.ends_with("disk.img: Permission denied"), "{why}");

        let why = user.refusal(args!["ram:1M", "/etc/passwd"]);
        assert!(
            why.contains("/etc/passwd") && why.contains("fusermount3: "),
            "{why}"
        );
        // Without the helper it says what is missing.
        let mut command = user.command();
        command.args(args!["ram:1M", at]).env("PATH", s.path());
        let end = Daemon::spawn(command, 0).wait(SOON);
        assert_eq!(end.status.code(), Some(1));
        assert!(end.stderr.contains("install fuse3"), "{end:?}");
        assert!(s.mounts().is_empty());
    });
}

#[test]
fn root_of_a_namespace_needs_no_helper() {
    as_nobody(Fuse::Open, "", |user| {
        if !installed(&["unshare", "sh", "cmp", "umount"]) {
            return;
        }
        let s = &user.s;
        let (image, _) = (
            s.file("disk.img", &pattern(0, 300_000)),
            s.mountpoint("disk"),
        );
        let probe = output("unshare", args!["-Urm", "true"]);
        if !probe.status.success() {
            return skip(&format!("no user namespaces: {}", text_of(&probe)));
        }
        s.file("expected", &pattern(0, 300_000));
        // All of it in there: nobody outside sees the mount, or may use it.
        // The helper is not to be found; each step says its name if it fails.
        let script = r#"
            fail() { echo "failed: $*"; kill -KILL $pid; exit 1; }
            serve() {
                rm -f ready; mkfifo ready
                PATH=/nonexistent "$program" --threads 2 "$@" > ready &
                pid=$!
                read -r line < ready || fail start
            }
            is_mounted() { grep -q " $PWD/disk fuse.blkfuse " /proc/self/mounts; }
            program=$PWD/blkfused
            for signal in TERM INT HUP; do
                serve -w disk.img disk
                is_mounted || fail mounted
                cmp expected disk || fail read
                printf X | dd of=disk bs=1 seek=1000 conv=notrunc status=none || fail write
                printf X | dd of=expected bs=1 seek=1000 conv=notrunc status=none
                kill -$signal $pid
                wait $pid || fail "status after $signal"
                is_mounted && fail "unmounted after $signal"
                cmp expected disk.img || fail image
            done
            serve disk.img disk
            umount disk || fail umount
            wait $pid || fail "status after umount"
            serve --allow-other on disk.img disk
            kill -KILL $pid; wait $pid
            serve disk.img disk
            cmp expected disk || fail "read after kill"
            kill $pid; wait $pid || fail "status at the end"
            is_mounted && fail "unmounted at the end"
            echo fine
        "#;
        let mut command = Command::new("unshare");
        command
            .args(["-Urm", "sh", "-c", script])
            .current_dir(s.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut ended = false;
        for _ in 0..30_000 {
            ended = child.try_wait().unwrap().is_some();
            if ended {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if !ended {
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        let text = text_of(&output);
        assert!(ended && text.contains("fine\n"), "{text}");
        assert!(!text.contains("fusermount"), "{text}");
        let content = fs::read(&image).unwrap();
        assert_eq!(content[1000], b'X');
        eventually("nothing mounted", || s.mounts().is_empty());
    });
}

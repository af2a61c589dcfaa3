//! Against the real kernel. Hardly anything here answers requests, so no test
//! may touch a file once it is mounted: the table of mounts tells what is to be
//! known, and child processes do the touching that is tested.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::MsFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{geteuid, mkfifo};
use parking_lot::{Mutex, MutexGuard};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use super::child::tests::{is_gone, witness};
use super::probe::Outcome;
use super::*;
use crate::protocol::{
    Attr, AttrOut, InHeader, InitOut, OpenOut, OutHeader, StatfsOut, opcode, open_flag,
};

type Connect = fn(&MountOptions<'_>, &Mountpoint) -> Result<Connection>;

const METHODS: [(&str, Connect); 3] = [
    ("fsmount", by_fsmount),
    ("mount", by_mount),
    ("fusermount3", connect_by_fusermount),
];

fn by_fsmount(options: &MountOptions<'_>, _: &Mountpoint) -> Result<Connection> {
    connect_by_fsmount(options, kernel::open_device()?)
}

fn by_mount(options: &MountOptions<'_>, mountpoint: &Mountpoint) -> Result<Connection> {
    connect_by_mount(options, kernel::open_device()?, mountpoint)
}

/// The right to mount, if this process has it; else says why not, or panics if
/// it must not skip. One test at a time, as device numbers are reused at once.
fn can_mount() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock();
    let reason = if !geteuid().is_root() {
        "not root"
    } else if kernel::open_device().is_err() {
        "no /dev/fuse"
    } else if fusermount_is_missing() {
        "no fusermount3"
    } else {
        return Some(turn);
    };
    assert!(
        std::env::var_os("BLKFUSE_NO_SKIP").is_none(),
        "cannot run: {reason}"
    );
    eprintln!("skipped: {reason}");
    None
}

fn fusermount_is_missing() -> bool {
    let mut command = std::process::Command::new("fusermount3");
    command.arg("--version").output().is_err()
}

/// A directory from which every mount is removed in the end.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }

    fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path().join(name);
        File::create(&path).unwrap();
        path
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read("/proc/thread-self/mountinfo").unwrap();
        let text = String::from_utf8_lossy(&table);
        let lines = text.lines().map(|line| line.split(' ').nth(4).unwrap());
        let here = |path: &PathBuf| path.starts_with(self.path());
        lines.map(PathBuf::from).filter(here).collect()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let flags = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        for _ in 0..64 {
            let Ok(table) = MountTable::read() else {
                return;
            };
            let Some(entry) =
                table.find_visible(|entry| entry.mount_point.starts_with(self.0.path()))
            else {
                return;
            };
            let _ = umount2(&entry.mount_point, flags | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

fn options(mountpoint: &Path) -> MountOptions<'_> {
    MountOptions {
        mountpoint,
        source: OsStr::new("/images/a,b\\c d"),
        writable: true,
        allow_other: AllowOther::Auto,
        max_read: 1 << 20,
    }
}

fn start(path: &Path, connect: Connect) -> (OwnedFd, Mount) {
    prepare_by(&options(path), connect)
        .unwrap()
        .attach()
        .unwrap()
}

fn entry_at(path: &Path) -> Option<MountEntry> {
    MountTable::read().unwrap().topmost(path).cloned()
}

/// The line of the raw table that shows the mount at `path`.
fn line_at(path: &Path) -> String {
    let prefix = format!("{} ", entry_at(path).unwrap().id);
    let table = fs::read("/proc/thread-self/mountinfo").unwrap();
    let text = String::from_utf8_lossy(&table);
    let mut lines = text.lines();
    lines.find(|l| l.starts_with(&prefix)).unwrap().to_owned()
}

fn refusal(path: &Path) -> Error {
    prepare(&options(path)).unwrap_err()
}

fn events(device: BorrowedFd<'_>) -> PollFlags {
    let mut fds = [PollFd::new(device, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap()
}

/// Whether a connection ends, which a child that is being started may delay.
fn is_aborted(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::empty())];
    poll(&mut fds, 5000_u16).unwrap() == 1
}

/// How many descriptors of this process share a file with `witness`, which is
/// one of them.
fn sharers(witness: &OwnedFd) -> usize {
    /// Linux 6.10: 1 if two descriptors share a file.
    const F_DUPFD_QUERY: libc::c_int = 1027;
    let names = fs::read_dir("/proc/self/fd").unwrap();
    let numbers = names.filter_map(|name| name.ok()?.file_name().to_str()?.parse::<i32>().ok());
    // SAFETY: the call takes numbers, and changes nothing.
    let shares = |fd: &i32| unsafe { libc::fcntl(witness.as_raw_fd(), F_DUPFD_QUERY, *fd) } == 1;
    numbers.filter(shares).count()
}

/// Leaves `count` mounts of dead servers on top of each other.
fn leave_dead_mounts(path: &Path, count: usize) {
    let devices: Vec<OwnedFd> = (0..count).map(|_| foreign_mount(path)).collect();
    drop(devices);
}

/// What another process would mount; it lives as long as the descriptor.
fn foreign_mount(path: &Path) -> OwnedFd {
    let device = kernel::open_device().unwrap();
    let data = format!(
        "fd={},rootmode=100000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    let (source, kind) = (Some("stranger"), Some("fuse.stranger"));
    nix::mount::mount(source, path, kind, MsFlags::empty(), Some(data.as_str())).unwrap();
    device
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let dir = Dir::new();
    let at = dir.path();
    let (fifo, socket) = (at.join("fifo"), at.join("socket"));
    mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    symlink("nowhere", at.join("dangling")).unwrap();
    symlink("round", at.join("round")).unwrap();
    let cases: [(PathBuf, i32, &str); 8] = [
        (at.join("absent"), libc::ENOENT, "No such file"),
        (at.join("dangling"), libc::ENOENT, "No such file"),
        (at.join("round"), libc::ELOOP, "symbolic link"),
        (
            at.clone(),
            libc::EISDIR,
            "is not a regular file but a directory",
        ),
        (fifo, libc::EINVAL, "is not a regular file but a FIFO"),
        (socket, libc::EINVAL, "is not a regular file but a socket"),
        ("/dev/null".into(), libc::EINVAL, "a character device"),
        (
            dir.file("plain").join("below"),
            libc::ENOTDIR,
            "Not a directory",
        ),
    ];
    for (path, errno, words) in cases {
        let error = refusal(&path);
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.message().contains(words), "{error}");
        assert!(error.message().contains(&quoted(&path)), "{error}");
        // A refused path is not claimed.
        assert_eq!(refusal(&path).errno(), errno);
    }
    assert_eq!(refusal(Path::new("")).errno(), libc::ENOENT);
    assert_eq!(
        refusal(Path::new(OsStr::from_bytes(b"a\0b"))).errno(),
        libc::EINVAL
    );
}

#[test]
fn a_block_device_is_refused() {
    let devices = fs::read_dir("/dev")
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path()));
    let is_block =
        |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    let Some(path) = devices.into_iter().find(is_block) else {
        eprintln!("skipped: no block device");
        return;
    };
    let error = refusal(&path);
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.message().contains("a block device"), "{error}");
}

#[test]
fn messages_keep_to_one_line() {
    let error = refusal(Path::new(OsStr::from_bytes(b"/no\nsuch\xff\x1b[0m")));
    let text =
        "'/no\\nsuch\u{fffd}\\u{1b}[0m': cannot open the mountpoint: No such file or directory";
    assert_eq!(error.message(), text);
}

#[test]
fn every_method_mounts_and_unmounts() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let mounting = prepare_by(&options(&path), connect).unwrap();
        assert_eq!(entry_at(&path).is_some(), name != "fsmount");
        let flags = fcntl(mounting.device(), FcntlArg::F_GETFD).unwrap();
        assert!(
            FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC),
            "{name}"
        );
        assert_eq!(events(mounting.device()), PollFlags::POLLIN, "INIT waits");

        let (device, mount) = mounting.attach().unwrap();
        assert_eq!((mount.method(), mount.path()), (name, path.as_path()));
        let entry = entry_at(&path).unwrap();
        assert_eq!(entry.fs_type, "fuse.blkfuse");
        assert_eq!(entry.source, "/images/a,b\\c d", "{name}");
        let Presence::Mounted(id) = mount.claim.take() else {
            panic!("{name}: not identified");
        };
        assert_eq!((id.id, id.device.as_ref()), (entry.id, Some(&entry.device)));
        mount.claim.set(Presence::Mounted(id));
        let line = line_at(&path);
        assert!(line.contains(" rw,nosuid,nodev,noatime "), "{line}");
        for word in [
            "user_id=0",
            "group_id=0",
            "default_permissions",
            "allow_other",
            "max_read=1048576",
        ] {
            assert!(line.contains(word), "{line} lacks {word}");
        }

        mount.unmount(Unmount::Lazy).unwrap();
        assert_eq!(entry_at(&path), None, "{name}");
        mount.unmount(Unmount::Lazy).unwrap();
        mount.unmount(Unmount::Force).unwrap();
        drop((device, mount));
        assert!(fs::metadata(&path).unwrap().is_file());
    }
}

#[test]
fn the_first_choice_is_fsmount() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let (_device, mount) = prepare(&options(&path)).unwrap().attach().unwrap();
    assert_eq!(mount.method(), "fsmount");
    mount.unmount(Unmount::Force).unwrap();
}

#[test]
fn a_read_only_private_mount_says_so() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let options = MountOptions {
            writable: false,
            allow_other: AllowOther::Off,
            ..options(&path)
        };
        let (_device, mount) = prepare_by(&options, connect).unwrap().attach().unwrap();
        let line = line_at(&path);
        assert!(line.contains(" ro,nosuid,nodev,noatime "), "{name}: {line}");
        assert!(line.contains(" ro,user_id=0"), "{name}: {line}");
        assert!(!line.contains("allow_other"), "{name}: {line}");
        mount.unmount(Unmount::Force).unwrap();
    }
}

#[test]
fn force_aborts_the_connection() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let (device, mount) = start(&path, by_fsmount);
    mount.unmount(Unmount::Force).unwrap();
    assert!(is_aborted(&device));
}

#[test]
fn any_name_will_do() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let names: [&[u8]; 6] = [
        b"with blank",
        b"new\nline\ttab",
        b"not\xffutf8\xfe",
        b"back\\slash,comma",
        b"-u",
        b"gone (deleted)",
    ];
    for (method, connect) in METHODS {
        for name in names {
            let dir = Dir::new();
            let path = dir.file(OsStr::from_bytes(name));
            let (_device, mount) = start(&path, connect);
            assert_eq!(mount.path(), path, "{method}");
            assert!(entry_at(&path).is_some(), "{method}: {path:?}");
            mount.unmount(Unmount::Lazy).unwrap();
            assert!(entry_at(&path).is_none(), "{method}: {path:?}");
        }
    }
}

#[test]
fn symbolic_links_and_relative_paths_lead_to_the_file() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let up = "../".repeat(std::env::current_dir().unwrap().components().count());
    for (_, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let link = dir.path().join("link");
        symlink("file", &link).unwrap();
        let relative = Path::new(&up).join(link.strip_prefix("/").unwrap());
        for alias in [&link, &relative] {
            let (_device, mount) = start(alias, connect);
            assert_eq!(mount.path(), path);
            assert!(entry_at(&path).is_some());
            // Under no name can it be exported twice.
            for name in [&link, &relative, &path] {
                assert_eq!(refusal(name).errno(), libc::EEXIST);
            }
            mount.unmount(Unmount::Force).unwrap();
        }
    }
}

#[test]
fn a_second_export_on_a_path_is_refused() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let mounting = prepare(&options(&path)).unwrap();
    let expected = format!("there already is an export on '{}'", path.display());
    assert!(refusal(&path).message().starts_with(&expected));
    let (device, mount) = mounting.attach().unwrap();
    assert_eq!(refusal(&path).errno(), libc::EEXIST);
    mount.unmount(Unmount::Lazy).unwrap();
    assert_eq!(refusal(&path).errno(), libc::EEXIST);
    drop((device, mount));
    drop(prepare(&options(&path)).unwrap());
}

#[test]
fn of_concurrent_starts_one_wins() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let winners: Vec<Mounting> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| prepare(&options(&path))))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.filter_map(Result::ok).collect()
    });
    assert_eq!(winners.len(), 1);
}

#[test]
fn dropping_rolls_everything_back() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let mounting = prepare_by(&options(&path), connect).unwrap();
        let witness = mounting.device().try_clone_to_owned().unwrap();
        assert_eq!(events(witness.as_fd()), PollFlags::POLLIN);
        drop(mounting);
        assert_eq!(dir.mounts(), [] as [PathBuf; 0], "{name}");
        assert!(
            events(witness.as_fd()).contains(PollFlags::POLLERR),
            "{name}"
        );
        assert!(sharers(&witness) <= 1, "{name}");
        assert!(fs::metadata(&path).unwrap().is_file());
        drop(prepare(&options(&path)).unwrap());
    }
}

#[test]
fn a_failed_attach_leaves_nothing() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let mounting = prepare(&options(&path)).unwrap();
    let witness = mounting.device().try_clone_to_owned().unwrap();
    fs::remove_file(&path).unwrap();
    let error = mounting.attach().unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    assert!(is_aborted(&witness));
    assert!(sharers(&witness) <= 1);
    dir.file("file");
    drop(prepare(&options(&path)).unwrap());
}

#[test]
fn the_kernels_own_words_reach_the_message() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    let null = File::open("/dev/null").unwrap();
    let error = kernel::create_detached(&options(&path), null.as_fd()).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL, "{error}");
    let long = OsString::from_vec(vec![b'x'; 4000]);
    let with_long_source = MountOptions {
        source: &long,
        ..options(&path)
    };
    drop(prepare_by(&with_long_source, by_fsmount).unwrap());
    let on_but_refused = MountOptions {
        source: OsStr::from_bytes(b"a\0b"),
        ..options(&path)
    };
    assert_eq!(prepare(&on_but_refused).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(dir.mounts(), [] as [PathBuf; 0]);
}

#[test]
fn dead_mounts_are_removed() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for count in [1, 3] {
        let dir = Dir::new();
        let path = dir.file("file");
        leave_dead_mounts(&path, count);
        assert_eq!(dir.mounts().len(), count);
        let (_device, mount) = start(&path, by_fsmount);
        assert_eq!(dir.mounts().len(), 1);
        assert_eq!(entry_at(&path).unwrap().fs_type, "fuse.blkfuse");
        mount.unmount(Unmount::Force).unwrap();
        assert_eq!(dir.mounts(), [] as [PathBuf; 0]);
    }
}

#[test]
fn a_dead_mount_that_is_not_a_file_is_left_alone() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.path().join("directory");
    fs::create_dir(&path).unwrap();
    let device = kernel::open_device().unwrap();
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    let kind = Some("fuse.stranger");
    nix::mount::mount(
        Some("s"),
        &path,
        kind,
        MsFlags::empty(),
        Some(data.as_str()),
    )
    .unwrap();
    drop(device);
    assert_eq!(refusal(&path).errno(), libc::EISDIR);
    assert_eq!(dir.mounts().len(), 1);
    // What is below it cannot be reached, and says so.
    assert_eq!(refusal(&path.join("file")).errno(), libc::ENOTCONN);
    assert_eq!(dir.mounts(), [path]);
}

#[test]
fn a_mount_removed_by_somebody_else_is_no_error() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (_, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let (_device, mount) = start(&path, connect);
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
        mount.unmount(Unmount::Force).unwrap();
        mount.unmount(Unmount::Lazy).unwrap();
    }
}

#[test]
fn a_successor_with_the_same_ids_survives() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let (device, mount) = start(&path, connect);
        if kernel::unique_mount_id(device.as_fd()).is_none() {
            eprintln!("skipped: the kernel has no unique mount ids");
            return;
        }
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
        drop(device);
        let successor = foreign_mount(&path);
        mount.unmount(Unmount::Force).unwrap();
        assert_eq!(entry_at(&path).unwrap().source, "stranger", "{name}");
        drop(successor);
    }
}

#[test]
fn a_strangers_mount_on_top_is_not_removed() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (_, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let (_device, mount) = start(&path, connect);
        let stranger = foreign_mount(&path);
        for how in [Unmount::Lazy, Unmount::Force] {
            let error = mount.unmount(how).unwrap_err();
            assert_eq!(error.errno(), libc::EBUSY, "{error}");
            assert!(error.message().contains("'stranger' on"), "{error}");
            assert_eq!(entry_at(&path).unwrap().source, "stranger");
            assert_eq!(dir.mounts().len(), 2);
        }
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
        drop(stranger);
        mount.unmount(Unmount::Lazy).unwrap();
        assert_eq!(dir.mounts(), [] as [PathBuf; 0]);
    }
}

#[test]
fn a_hidden_mount_is_not_mistaken_for_what_hides_it() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let parent = dir.path().join("parent");
    fs::create_dir(&parent).unwrap();
    let path = dir.file("parent/file");
    let (_device, mount) = start(&path, by_fsmount);
    let kind = Some("tmpfs");
    nix::mount::mount(kind, &parent, kind, MsFlags::empty(), None::<&str>).unwrap();
    dir.file("parent/file");
    let stranger = foreign_mount(&path);
    assert_eq!(
        mount.unmount(Unmount::Force).unwrap_err().errno(),
        libc::EBUSY
    );
    assert_eq!(entry_at(&path).unwrap().source, "stranger");
    umount2(&parent, MntFlags::MNT_DETACH).unwrap();
    drop(stranger);
    mount.unmount(Unmount::Lazy).unwrap();
}

#[test]
fn a_renamed_directory_does_not_hide_the_mount() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (_, connect) in METHODS {
        let dir = Dir::new();
        let (old, new) = (dir.path().join("old"), dir.path().join("new \\ name"));
        fs::create_dir(&old).unwrap();
        let path = dir.file("old/file");
        let (_device, mount) = start(&path, connect);
        fs::rename(&old, &new).unwrap();
        assert_eq!(refusal(&new.join("file")).errno(), libc::EEXIST);
        // Another file under the old name is none of its business.
        fs::create_dir(&old).unwrap();
        dir.file("old/file");
        let stranger = foreign_mount(&path);
        mount.unmount(Unmount::Lazy).unwrap();
        assert!(entry_at(&new.join("file")).is_none());
        assert_eq!(entry_at(&path).unwrap().source, "stranger");
        drop(stranger);
    }
}

/// Runs `body` as a user without privileges, who owns the directory and may open
/// /dev/fuse, as most systems let everybody. Of the whole process only one
/// thread changes, and its mounts vanish with it.
fn as_nobody(dir: &Dir, body: impl FnOnce() + Send) {
    const NOBODY: libc::uid_t = 65534;
    chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        chown(entry.unwrap().path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            open_fuse_to_all();
            // SAFETY: these calls take numbers, and a list of no groups.
            let results = unsafe {
                [
                    libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
                    libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY),
                    libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
                ]
            };
            assert_eq!(results, [0; 3]);
            body();
        });
    });
}

/// Covers /dev/fuse with a node that everybody may open, in the mount namespace
/// of the calling thread alone.
fn open_fuse_to_all() {
    let none = None::<&str>;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    nix::mount::mount(none, "/", none, private, none).unwrap();
    // The copies would keep other tests' connections alive. They may vanish
    // with their mountpoints meanwhile.
    while let Some(entry) = MountTable::read()
        .unwrap()
        .find_visible(MountEntry::is_fuse)
    {
        let _ = umount2(&entry.mount_point, MntFlags::MNT_DETACH);
    }
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("fuse");
    let everybody = Mode::from_bits_truncate(0o666);
    mknod(&node, SFlag::S_IFCHR, everybody, makedev(10, 229)).unwrap();
    fs::set_permissions(&node, Permissions::from_mode(0o666)).unwrap();
    nix::mount::mount(Some(&node), "/dev/fuse", none, MsFlags::MS_BIND, none).unwrap();
}

/// Whether fusermount3 lets users share their mounts.
fn users_may_allow_other() -> bool {
    fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|text| text.lines().any(|line| line == "user_allow_other"))
}

#[test]
fn an_ordinary_user_mounts_with_fusermount3() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("a file, \\ or");
    as_nobody(&dir, || {
        let (device, mount) = prepare(&options(&path)).unwrap().attach().unwrap();
        assert_eq!(mount.method(), "fusermount3");
        assert_eq!(entry_at(&path).unwrap().source, "/images/a,b\\c d");
        let line = line_at(&path);
        assert!(line.contains("user_id=65534,group_id=65534"), "{line}");
        assert_eq!(line.contains("allow_other"), users_may_allow_other());
        assert_eq!(events(device.as_fd()), PollFlags::POLLIN);
        mount.unmount(Unmount::Force).unwrap();
        assert!(entry_at(&path).is_none());
        drop((device, mount));

        let mounting = prepare(&options(&path)).unwrap();
        assert!(entry_at(&path).is_some());
        drop(mounting);
        assert!(entry_at(&path).is_none());
    });
}

#[test]
fn an_ordinary_user_clears_dead_mounts_away() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let path = dir.file("file");
    as_nobody(&dir, || {
        drop(start(&path, connect_by_fusermount));
        assert_eq!(dir.mounts().len(), 1);
        drop(start(&path, connect_by_fusermount));
        assert_eq!(dir.mounts().len(), 1);
    });
}

#[test]
fn an_ordinary_user_is_told_why_not() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let (foreign, own) = (Dir::new(), dir.file("file"));
    let path = foreign.file("file");
    fs::set_permissions(foreign.path(), Permissions::from_mode(0o755)).unwrap();
    as_nobody(&dir, || {
        let error = refusal(&path);
        assert_eq!(error.errno(), libc::EPERM, "{error}");
        assert!(error.message().contains("fusermount3: "), "{error}");
        assert!(!error.message().contains('\n'), "{error}");
        let foreign_dir = refusal(Path::new("/root/.cache/file"));
        assert_eq!(foreign_dir.errno(), libc::EACCES, "{foreign_dir}");
        if users_may_allow_other() {
            return;
        }
        let on = MountOptions {
            allow_other: AllowOther::On,
            ..options(&own)
        };
        let error = prepare(&on).unwrap_err();
        assert!(error.message().contains("user_allow_other"), "{error}");
    });
    assert_eq!(foreign.mounts(), [] as [PathBuf; 0]);
    assert_eq!(dir.mounts(), [] as [PathBuf; 0]);
}

/// How long what should happen at once may take.
const SOON: Duration = Duration::from_secs(20);

/// Answers INIT.
fn greet(device: BorrowedFd<'_>) {
    let request = receive(device);
    assert_eq!(request.opcode, opcode::INIT);
    let agreed = InitOut {
        major: 7,
        minor: 31,
        max_background: 16,
        max_write: 1 << 20,
        ..InitOut::default()
    };
    answer(device, &request, Ok(agreed.as_bytes()));
}

/// Waits for a request and takes it.
fn receive(device: BorrowedFd<'_>) -> InHeader {
    let mut fds = [PollFd::new(device, PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 20_000_u16), Ok(1), "no request comes");
    let mut buffer = vec![0; 2 << 20];
    nix::unistd::read(device, &mut buffer).unwrap();
    InHeader::read_from_prefix(&buffer).unwrap().0
}

fn answer(device: BorrowedFd<'_>, request: &InHeader, result: std::result::Result<&[u8], i32>) {
    let body = result.unwrap_or_default();
    let error = result.err().map_or(0, |errno| -errno);
    let header = OutHeader::new(request.unique, error, body.len());
    nix::unistd::write(device, &[header.as_bytes(), body].concat()).unwrap();
}

/// Serves an empty file until a request of the kind `last` is answered, and
/// refuses those of the kind `refused`. The kinds that came.
fn serve(device: BorrowedFd<'_>, last: u32, refused: Option<(u32, i32)>) -> Vec<u32> {
    let attributes = AttrOut {
        attr: Attr {
            ino: 1,
            mode: libc::S_IFREG | 0o600,
            nlink: 1,
            ..Attr::default()
        },
        ..AttrOut::default()
    };
    let open = OpenOut {
        open_flags: open_flag::NOFLUSH,
        ..OpenOut::default()
    };
    let mut seen = Vec::new();
    while seen.last() != Some(&last) {
        let request = receive(device);
        let result = match (request.opcode, refused) {
            (kind, Some((refused, errno))) if kind == refused => Err(errno),
            (opcode::STATFS, _) => Ok(StatfsOut::default().as_bytes().to_vec()),
            (opcode::GETATTR, _) => Ok(attributes.as_bytes().to_vec()),
            (opcode::OPEN, _) => Ok(open.as_bytes().to_vec()),
            (opcode::FSYNC | opcode::RELEASE, _) => Ok(vec![]),
            _ => Err(libc::ENOSYS),
        };
        answer(device, &request, result.as_deref().map_err(|errno| *errno));
        seen.push(request.opcode);
    }
    seen
}

#[test]
fn a_probe_is_answered_by_a_server_and_tells_why_it_failed() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        for (refused, outcome) in [
            (None, Outcome::Answered),
            (
                Some((opcode::STATFS, libc::EIO)),
                Outcome::Failed(Errno::EIO),
            ),
        ] {
            let dir = Dir::new();
            let path = dir.file("file");
            let mounting = prepare_by(&options(&path), connect).unwrap();
            greet(mounting.device());
            let mut probe = mounting.probe().unwrap();
            let seen = serve(mounting.device(), opcode::STATFS, refused);
            assert_eq!(seen, [opcode::STATFS], "{name}");
            assert_eq!(probe.wait(SOON), outcome, "{name}");
        }
    }
}

#[test]
fn a_probe_that_nobody_answers_times_out() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        // Not even INIT; no request; a request that is taken.
        for served in 0..3 {
            let dir = Dir::new();
            let path = dir.file("file");
            let mounting = prepare_by(&options(&path), connect).unwrap();
            if served > 0 {
                greet(mounting.device());
            }
            let mut probe = mounting.probe().unwrap();
            if served > 1 {
                receive(mounting.device());
            }
            let patience = Duration::from_millis(50);
            assert_eq!(probe.wait(patience), Outcome::TimedOut, "{name}");
            let witness = witness(&probe.0);
            // One that waits for a request in hand waits for this.
            drop(mounting);
            drop(probe);
            assert!(is_gone(&witness), "{name}, {served}");
            assert_eq!(dir.mounts(), [] as [PathBuf; 0], "{name}");
        }
    }
}

#[test]
fn writing_back_syncs_the_file_and_tells_its_failure() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        for refused in [None, Some(opcode::OPEN), Some(opcode::FSYNC)] {
            let dir = Dir::new();
            let path = dir.file("file");
            let (device, mount) = start(&path, connect);
            greet(device.as_fd());
            let (unmounted, written, child) = thread::scope(|scope| {
                let unmounting = scope.spawn(|| mount.unmount_written_back());
                let last = refused.unwrap_or(opcode::FSYNC);
                let seen = serve(device.as_fd(), last, refused.map(|kind| (kind, libc::EIO)));
                let synced = refused != Some(opcode::OPEN);
                assert_eq!(seen.contains(&opcode::FSYNC), synced, "{name}");
                unmounting.join().unwrap()
            });
            unmounted.unwrap();
            assert_eq!(entry_at(&path), None, "{name}");
            match refused {
                None => written.unwrap(),
                Some(_) => {
                    let error = written.unwrap_err();
                    let text = "mapped memory was not written back: I/O error";
                    assert!(error.message().contains(text), "{error}");
                }
            }
            assert!(is_gone(&witness(&child.unwrap())), "{name}");
        }
    }
}

#[test]
fn unmounting_does_not_wait_for_the_writing_back_which_ends_with_the_connection() {
    let Some(_turn) = can_mount() else {
        return;
    };
    for (name, connect) in METHODS {
        let dir = Dir::new();
        let path = dir.file("file");
        let (device, mount) = start(&path, connect);
        greet(device.as_fd());
        let (unmounted, written, child) = thread::scope(|scope| {
            let unmounting = scope.spawn(|| mount.unmount_written_back());
            // The opening, which has no answer.
            receive(device.as_fd());
            let deadline = Instant::now() + SOON;
            while entry_at(&path).is_some() {
                assert!(Instant::now() < deadline, "{name}: it stays mounted");
                thread::yield_now();
            }
            drop(device);
            unmounting.join().unwrap()
        });
        unmounted.unwrap();
        let error = written.unwrap_err();
        let text = "mapped memory was not written back";
        assert!(error.message().contains(text), "{error}");
        assert!(is_gone(&witness(&child.unwrap())), "{name}");
    }
}

#[test]
fn writing_back_finds_the_mount_where_it_is_now() {
    let Some(_turn) = can_mount() else {
        return;
    };
    let dir = Dir::new();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    fs::create_dir(&old).unwrap();
    let path = dir.file("old/file");
    let (device, mount) = start(&path, by_fsmount);
    greet(device.as_fd());
    fs::rename(&old, &new).unwrap();
    fs::create_dir(&old).unwrap();
    dir.file("old/file");
    let stranger = foreign_mount(&path);
    thread::scope(|scope| {
        let unmounting = scope.spawn(|| mount.unmount_written_back());
        serve(device.as_fd(), opcode::FSYNC, None);
        let (unmounted, written, _) = unmounting.join().unwrap();
        unmounted.unwrap();
        written.unwrap();
    });
    // Of the stranger nothing was asked but to say hello.
    assert_eq!(receive(stranger.as_fd()).opcode, opcode::INIT);
    assert_eq!(events(stranger.as_fd()), PollFlags::empty());
}

//! Mode, owner, times, and what else a plain file has: extended attributes,
//! ioctls, locks, poll.

mod common;

use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use blkfuse::AllowOther;
use common::client::{errno, fresh_times, have, size, times};
use common::{Memory, Mounted, for_queues, skip};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

fn mounted(others: AllowOther, queues: usize) -> Mounted {
    let m = Mounted::with(Memory::patterned(10_000), queues, |b| b.allow_other(others));
    // Everybody gets as far as the file.
    let dir = m.path.parent().unwrap();
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    m
}

fn chmod(m: &Mounted, mode: u32) -> io::Result<()> {
    fs::set_permissions(&m.path, Permissions::from_mode(mode))
}

fn mode(m: &Mounted) -> u32 {
    fs::metadata(&m.path).unwrap().mode() & 0o7777
}

/// Runs a program as nobody; `{}` is the file.
fn as_nobody(m: &Mounted, line: &str) -> Output {
    let path = m.path.to_str().unwrap();
    Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["sh", "-c", &line.replace("{}", path)])
        .output()
        .unwrap()
}

#[test]
fn for_its_owner_alone_only_the_owners_bits_change() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        for bits in [0o400, 0o700, 0o200, 0, 0o600] {
            chmod(&m, bits).unwrap();
            assert_eq!(mode(&m), bits);
        }
        for bits in [0o640, 0o604, 0o601, 0o666] {
            assert_eq!(errno(chmod(&m, bits)), libc::EPERM);
            assert_eq!(mode(&m), 0o600);
        }
        assert_eq!(errno(chown(&m.path, Some(65534), None)), libc::EPERM);
        assert_eq!(errno(chown(&m.path, None, Some(65534))), libc::EPERM);
        let meta = fs::metadata(&m.path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (0, 0));
        // To whom it belongs already, it can be given.
        chown(&m.path, Some(0), Some(0)).unwrap();
    });
}

#[test]
fn nobody_else_gets_in_unless_allowed() {
    if !have("setpriv") {
        return skip("no setpriv");
    }
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let denied = as_nobody(&m, "cat {}");
        assert!(!denied.status.success() && denied.stdout.is_empty());
    });
}

#[test]
fn with_others_allowed_the_mode_decides_who_may_do_what() {
    if !have("setpriv") {
        return skip("no setpriv");
    }
    for_queues(|queues| {
        let m = mounted(AllowOther::On, queues);
        let reads = || as_nobody(&m, "cat {}").stdout == m.driver.bytes();
        let writes = || {
            let dd = "printf X | dd of={} conv=notrunc status=none";
            as_nobody(&m, dd).status.success()
        };
        assert!(!reads() && !writes());
        chmod(&m, 0o644).unwrap();
        assert_eq!(mode(&m), 0o644);
        assert!(reads() && !writes());
        chmod(&m, 0o666).unwrap();
        assert!(reads() && writes());
        assert_eq!(m.driver.bytes()[0], b'X');
        // Only the owner may change the mode, the owner, or (set) the times.
        assert!(!as_nobody(&m, "chmod 777 {}").status.success());
        assert!(!as_nobody(&m, "chown 65534 {}").status.success());
        assert!(!as_nobody(&m, "touch -d 2001-01-01 {}").status.success());
        assert_eq!(mode(&m), 0o666);

        chmod(&m, 0o600).unwrap();
        chown(&m.path, Some(65534), Some(65533)).unwrap();
        let meta = fs::metadata(&m.path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (65534, 65533));
        assert!(reads() && writes());
        assert!(as_nobody(&m, "chmod 400 {}").status.success());
        assert!(reads() && !writes());
        assert_eq!(mode(&m), 0o400);

        // By the group's bits.
        chown(&m.path, Some(0), Some(65534)).unwrap();
        chmod(&m, 0o640).unwrap();
        assert!(reads() && !writes());
        chmod(&m, 0o604).unwrap();
        assert!(!reads());
    });
}

#[test]
fn times_can_be_set_and_a_later_write_moves_them_again() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let file = m.open(true);
        let at = |s, n| SystemTime::UNIX_EPOCH + Duration::new(s, n);
        for (accessed, modified) in [
            (at(1_000_000_000, 1), at(1_234_567_890, 123_456_789)),
            (at(0, 0), at(0, 999_999_999)),
            (at(7_000_000_000, 5), at(8_000_000_000, 6)),
        ] {
            let before = SystemTime::now();
            let set = FileTimes::new()
                .set_accessed(accessed)
                .set_modified(modified);
            file.set_times(set).unwrap();
            let meta = file.metadata().unwrap();
            assert_eq!(meta.accessed().unwrap(), accessed);
            assert_eq!(meta.modified().unwrap(), modified);
            assert!(times(&file).1 >= before, "ctime is the time of setting");
            // Nobody who looks moves it.
            file.read_at(&mut [0; 10], 0).unwrap();
            file.sync_all().unwrap();
            assert_eq!(fresh_times(&file).0, modified);

            let before = SystemTime::now();
            file.write_all_at(b"x", 0).unwrap();
            let after = SystemTime::now();
            let written = times(&file).0;
            assert!(written >= before && written <= after, "{written:?}");
            assert_eq!(file.metadata().unwrap().accessed().unwrap(), accessed);
        }
        let before = SystemTime::now();
        assert!(
            Command::new("touch")
                .arg(&m.path)
                .status()
                .unwrap()
                .success()
        );
        assert!(fresh_times(&file).0 >= before);
        assert_eq!(size(&file), 10_000);
    });
}

#[test]
fn times_before_1970_survive() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let long_ago = SystemTime::UNIX_EPOCH - Duration::new(1_000_000, 250_000_000);
        let file = m.open(true);
        let set = FileTimes::new().set_modified(long_ago);
        file.set_times(set).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), long_ago);
    });
}

#[test]
fn changing_the_mode_moves_ctime_but_not_mtime() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let file = m.open(true);
        let old = fresh_times(&file);
        chmod(&m, 0o400).unwrap();
        let new = times(&file);
        assert_eq!(new.0, old.0);
        assert!(new.1 > old.1);
        // A descriptor keeps what it was opened for.
        file.write_all_at(b"x", 0).unwrap();
    });
}

#[test]
fn a_failed_setting_changes_nothing_of_the_rest() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let before = fresh_times(&m.open(true));
        errno(chmod(&m, 0o777));
        errno(chown(&m.path, Some(1), Some(1)));
        assert_eq!(fresh_times(&m.open(true)), before);
        assert_eq!(mode(&m), 0o600);
    });
}

#[test]
fn extended_attributes_fail_cleanly() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let fd = m.open(true);
        let raw = fd.as_raw_fd();
        for name in [c"user.test", c"security.capability", c"trusted.x"] {
            let mut buf = [0u8; 64];
            // SAFETY: the name is terminated, the buffers are live locals.
            let results = unsafe {
                [
                    libc::fgetxattr(raw, name.as_ptr(), buf.as_mut_ptr().cast(), 64),
                    libc::fsetxattr(raw, name.as_ptr(), buf.as_ptr().cast(), 3, 0) as isize,
                    libc::fremovexattr(raw, name.as_ptr()) as isize,
                ]
            };
            assert_eq!(results, [-1; 3], "{name:?}");
            let error = io::Error::last_os_error().raw_os_error();
            assert_eq!(error, Some(libc::EOPNOTSUPP));
        }
        // SAFETY: no buffer is given.
        let listed = unsafe { libc::flistxattr(raw, std::ptr::null_mut(), 0) };
        let unsupported = io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP);
        assert!(listed == 0 || (listed == -1 && unsupported));
        fd.write_all_at(b"still works", 0).unwrap();
    });
}

#[test]
fn foreign_ioctls_are_refused_as_by_a_plain_file() {
    const BLKGETSIZE64: u64 = 0x8008_1272;
    const BLKDISCARD: u64 = 0x1277;
    const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
    const SG_IO: u64 = 0x2285;
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let file = m.open(true);
        for request in [
            BLKGETSIZE64,
            BLKDISCARD,
            FS_IOC_GETFLAGS,
            SG_IO,
            libc::TCGETS,
            0xdead,
        ] {
            let mut room = [0u64; 64];
            // SAFETY: the argument points to more room than any of these
            // uses, should one be carried out after all.
            let result =
                unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, room.as_mut_ptr()) };
            let error = io::Error::last_os_error().raw_os_error();
            assert_eq!((result, error), (-1, Some(libc::ENOTTY)), "{request:#x}");
            assert_eq!(room, [0; 64]);
        }
        file.write_all_at(b"still works", 0).unwrap();
    });
}

#[test]
fn whole_file_locks_exclude_each_other() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let lock = |how| Flock::lock(m.open(true), how).map_err(|(_, e)| e);
        let held = lock(FlockArg::LockExclusiveNonblock).unwrap();
        let refused = lock(FlockArg::LockSharedNonblock).unwrap_err();
        assert_eq!(refused, nix::Error::EWOULDBLOCK);
        drop(held);
        let one = lock(FlockArg::LockSharedNonblock).unwrap();
        let two = lock(FlockArg::LockSharedNonblock).unwrap();
        drop((one, two));
        lock(FlockArg::LockExclusiveNonblock).unwrap();
    });
}

#[test]
fn record_locks_exclude_each_other() {
    fn lock(file: &File, kind: i32, start: i64, len: i64) -> nix::Result<i32> {
        let lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock))
    }
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let (one, two) = (m.open(true), m.open(true));
        lock(&one, libc::F_WRLCK, 0, 100).unwrap();
        lock(&two, libc::F_WRLCK, 100, 100).unwrap();
        assert!(lock(&two, libc::F_RDLCK, 50, 1).is_err());
        lock(&one, libc::F_UNLCK, 0, 100).unwrap();
        lock(&two, libc::F_RDLCK, 50, 1).unwrap();
        drop(two);
        lock(&one, libc::F_WRLCK, 0, 0).unwrap();
    });
}

#[test]
fn it_is_always_ready() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let file = m.open(true);
        for _ in 0..2 {
            let wanted = PollFlags::POLLIN | PollFlags::POLLOUT;
            let mut fds = [PollFd::new(file.as_fd(), wanted)];
            assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
            assert_eq!(fds[0].revents(), Some(wanted));
        }
    });
}

#[test]
fn the_file_system_has_the_files_size() {
    for_queues(|queues| {
        let m = mounted(AllowOther::Off, queues);
        let fs = nix::sys::statvfs::statvfs(&m.path).unwrap();
        assert_eq!(fs.fragment_size() * fs.blocks(), 3 * 4096);
        assert_eq!(fs.blocks_available(), 0);
        let m = Mounted::growable(10_000, queues);
        let fs = nix::sys::statvfs::statvfs(&m.path).unwrap();
        assert!(fs.fragment_size() * fs.blocks_available() > 1 << 40);
    });
}

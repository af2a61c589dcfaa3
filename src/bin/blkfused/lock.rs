//! Locking an image the way QEMU does, so that QEMU's programs and blkfused
//! refuse each other wherever two QEMU programs would.
//!
//! Every permission has two bytes in the file. Who *holds* a permission puts
//! a shared lock on its first byte; who *does not let others hold it* puts
//! one on its second byte. Whoever finds a foreign lock on the opposite byte
//! has a conflict. All locks are shared ones, so they never block; the probe
//! asks whether an exclusive lock would be possible. The bytes are a promise
//! between programs and may lie behind the end of the file.

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// First bytes of the two groups; QEMU leaves the lower ones to libvirt.
const HELD: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's block permissions, as bit numbers.
const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// What an export is going to do with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only read it. Others may write, as `qemu-nbd --read-only` has it, but
    /// nobody may change its length.
    Read,
    /// Write it, and change its length: clients may truncate any file that they
    /// can write. Nobody else may do either.
    Write,
}

impl Access {
    /// The permissions to hold.
    fn held(self) -> &'static [u8] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// The permissions that nobody else may hold.
    fn unshared(self) -> &'static [u8] {
        match self {
            Self::Read => &[RESIZE],
            Self::Write => &[WRITE, RESIZE],
        }
    }
}

/// Why an image could not be locked.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody's lock is in the way; the text says which.
    Conflict(&'static str),
    /// The file system does not lock.
    Impossible(Errno),
}

/// Locks `file` until its last descriptor is closed. Whatever was locked
/// before a failure is given back in the same way.
pub fn lock(file: &File, access: Access) -> Result<(), Refusal> {
    for (base, permissions) in [(HELD, access.held()), (UNSHARED, access.unshared())] {
        for permission in permissions {
            take(file, base + i64::from(*permission))?;
        }
    }
    // Only now: of two that start at once, at least one sees the other.
    for &permission in access.unshared() {
        if is_taken(file, HELD + i64::from(permission))? {
            return Err(Refusal::Conflict(match permission {
                WRITE => "another process has it open for writing",
                _ => "another process may resize it",
            }));
        }
    }
    for &permission in access.held() {
        if is_taken(file, UNSHARED + i64::from(permission))? {
            return Err(Refusal::Conflict(match permission {
                CONSISTENT_READ => "another process uses it exclusively",
                WRITE => "another process has it open and lets nobody else write it",
                _ => "another process has it open and lets nobody else resize it",
            }));
        }
    }
    Ok(())
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        // The constants fit; their C type depends on the C library.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Puts a shared lock on one byte.
fn take(file: &File, byte: i64) -> Result<(), Refusal> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Refusal::Conflict(
            "another process has locked it exclusively",
        )),
        Err(errno) => Err(Refusal::Impossible(errno)),
    }
}

/// Whether somebody else has a lock on the byte.
fn is_taken(file: &File, byte: i64) -> Result<bool, Refusal> {
    let mut probe = range(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).map_err(Refusal::Impossible)?;
    Ok(i32::from(probe.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{skip, tool};
    use std::fs::OpenOptions;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    fn image() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    }

    fn open(path: &Path) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn writers_exclude_each_other_and_readers_do_not() {
        let image = image();
        let (one, two, three) = (open(image.path()), open(image.path()), open(image.path()));
        assert_eq!(lock(&one, Access::Read), Ok(()));
        assert_eq!(lock(&two, Access::Read), Ok(()));
        drop((one, two));
        assert_eq!(lock(&three, Access::Write), Ok(()));
        let fourth = open(image.path());
        assert_eq!(
            lock(&fourth, Access::Write),
            Err(Refusal::Conflict("another process has it open for writing"))
        );
        // The failed attempt's locks go with its descriptor.
        drop((three, fourth));
        assert_eq!(lock(&open(image.path()), Access::Write), Ok(()));
    }

    #[test]
    fn nobody_may_resize_what_others_use() {
        let image = image();
        let reader = open(image.path());
        assert_eq!(lock(&reader, Access::Read), Ok(()));
        assert_eq!(
            lock(&open(image.path()), Access::Write),
            Err(Refusal::Conflict(
                "another process has it open and lets nobody else resize it"
            ))
        );
        drop(reader);
        let owner = open(image.path());
        assert_eq!(lock(&owner, Access::Write), Ok(()));
        assert_eq!(
            lock(&open(image.path()), Access::Read),
            Err(Refusal::Conflict("another process may resize it"))
        );
    }

    /// Whether a QEMU tool succeeds on the image; `None` if it is missing.
    fn allowed(program: &str, args: &[&str]) -> Option<bool> {
        let output = tool(program, args)?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(message.contains("lock"), "{program} {args:?}: {message}");
        }
        Some(output.status.success())
    }

    #[test]
    fn qemu_refuses_what_conflicts_with_our_locks() {
        let image = image();
        let path = image.path().to_str().unwrap();
        let write = ["-f", "raw", "-c", "write 0 4k", path];
        let read = ["-r", "-f", "raw", "-c", "read 0 4k", path];
        let resize = ["resize", "-q", "-f", "raw", path, "2M"];

        for (access, may_write) in [(Access::Read, true), (Access::Write, false)] {
            let ours = open(image.path());
            assert_eq!(lock(&ours, access), Ok(()));
            let Some(wrote) = allowed("qemu-io", &write) else {
                return;
            };
            assert_eq!(wrote, may_write, "write under {access:?}");
            assert_eq!(allowed("qemu-io", &read), Some(true));
            assert_eq!(allowed("qemu-img", &resize), Some(false));
        }
        assert_eq!(allowed("qemu-io", &write), Some(true));
        assert_eq!(allowed("qemu-img", &resize), Some(true));
    }

    /// Ends the program with the test.
    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Starts a program and waits until it holds the image for writing;
    /// `None` if it is not installed.
    fn start_writer(program: &str, args: &[&str], image: &Path) -> Option<Running> {
        // The pipe stays open, and with it the program.
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => Running(child),
            Err(e) => {
                skip(&format!("{program}: {e}"));
                return None;
            }
        };
        let probe = open(image);
        for _ in 0..500 {
            if is_taken(&probe, HELD + i64::from(WRITE)) == Ok(true) {
                return Some(child);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{program} did not open the image");
    }

    #[test]
    fn we_refuse_what_conflicts_with_qemus_locks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let name = path.to_str().unwrap();
        let blockdev = format!("file,node-name=disk,filename={name}");
        let server = format!("addr.type=unix,addr.path={}/nbd", dir.path().display());
        let daemon = [
            "--blockdev",
            &blockdev,
            "--nbd-server",
            &server,
            "--export",
            "nbd,id=export,node-name=disk,writable=on",
        ];
        for (program, args) in [
            ("qemu-io", &["-f", "raw", name][..]),
            ("qemu-storage-daemon", &daemon),
        ] {
            let Some(holder) = start_writer(program, args, &path) else {
                return;
            };
            assert_eq!(
                lock(&open(&path), Access::Write),
                Err(Refusal::Conflict("another process has it open for writing")),
                "{program}"
            );
            assert_eq!(lock(&open(&path), Access::Read), Ok(()), "{program}");
            drop(holder);
            assert_eq!(lock(&open(&path), Access::Write), Ok(()), "{program}");
        }
    }
}

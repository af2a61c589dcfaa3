//! Mounting as an ordinary user, with the setuid helper of libfuse.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};

use super::{AllowOther, MountOptions, quoted};
use crate::error::{Error, Result};

/// The helper's names: libfuse 3 and, where that is all there is, libfuse 2.
const PROGRAMS: [&str; 2] = ["fusermount3", "fusermount"];

/// Names the descriptor over which the helper hands back the connection.
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";

/// Mounts on `path`; returns the connection, and whether others may use it.
pub(super) fn mount(options: &MountOptions<'_>, path: &Path) -> Result<(OwnedFd, bool)> {
    let mount = |others| Ok((mount_for(options, others, path)?, others));
    match options.allow_other {
        AllowOther::Off => mount(false),
        AllowOther::On => mount(true),
        AllowOther::Auto => mount(true).or_else(|refusal: Error| {
            let mounted = mount(false)?;
            log::info!("{refusal}; only this user can use the file");
            Ok(mounted)
        }),
    }
}

fn mount_for(options: &MountOptions<'_>, allow_other: bool, path: &Path) -> Result<OwnedFd> {
    let failed = |reason: String| {
        let message = format!("{}: cannot mount: {reason}", quoted(path));
        Error::new(libc::EPERM, message)
    };
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| super::failed(path, "cannot reach fusermount3", errno))?;
    let child = spawn(|command| {
        command
            .arg("-o")
            .arg(option_string(options, allow_other))
            .arg("--")
            .arg(path)
            .env(SOCKET_VARIABLE, "0")
            .stdin(Stdio::from(theirs.try_clone()?));
        Ok(())
    })
    .map_err(|error| failed(not_run(&error)))?;
    // With our copy open the helper's death would go unnoticed.
    drop(theirs);
    let device = receive_descriptor(&ours);
    let end = wait(child);
    match device {
        Ok(Some(device)) => Ok(device),
        Ok(None) => Err(failed(end.complaint())),
        Err(errno) => Err(super::failed(path, "no answer from fusermount3", errno)),
    }
}

/// Unmounts what is topmost at `path`, if it is the user's; unless `lazy`,
/// only if nobody uses it.
pub(super) fn unmount(path: &Path, lazy: bool) -> Result<()> {
    let failed = |reason: String| {
        let message = format!("{}: cannot unmount: {reason}", quoted(path));
        Error::new(libc::EPERM, message)
    };
    let child = spawn(|command| {
        command.arg("-u");
        if lazy {
            command.arg("-z");
        }
        command.arg("--").arg(path);
        command.stdin(Stdio::null());
        Ok(())
    })
    .map_err(|error| failed(not_run(&error)))?;
    let end = wait(child);
    if end.is_success() {
        return Ok(());
    }
    Err(failed(end.complaint()))
}

/// How the helper ended.
struct End {
    // Unknown if the host reaps our child before we do, or ignores SIGCHLD.
    status: Option<ExitStatus>,
    stderr: String,
}

impl End {
    fn is_success(&self) -> bool {
        match self.status {
            Some(status) => status.success(),
            None => self.stderr.is_empty(),
        }
    }

    fn complaint(self) -> String {
        if self.stderr.is_empty() {
            return "fusermount3 gives no reason".to_owned();
        }
        self.stderr
    }
}

fn not_run(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "this needs the privilege to mount, or fusermount3; install fuse3".to_owned()
        }
        _ => format!("cannot run fusermount3: {error}"),
    }
}

/// Starts the helper, under whichever name there is.
fn spawn(configure: impl Fn(&mut Command) -> io::Result<()>) -> io::Result<Child> {
    let mut result = Err(io::ErrorKind::NotFound.into());
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        configure(&mut command)?;
        result = command.spawn();
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    result
}

/// Waits for the helper to end, and puts its complaints on one line.
fn wait(mut child: Child) -> End {
    let mut bytes = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What cannot be read is not worth a second error.
        let _ = stderr.read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    End {
        status: child.wait().ok(),
        stderr: lines.join("; "),
    }
}

/// Receives the connection; `None` if the helper ends without sending one.
fn receive_descriptor(socket: &OwnedFd) -> nix::Result<Option<OwnedFd>> {
    loop {
        match receive_once(socket) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn receive_once(socket: &OwnedFd) -> nix::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut control = cmsg_space!(RawFd);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut data,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            // SAFETY: the kernel has just installed them for us, and nobody else
            // has them. All are taken over, lest one more than expected leaks.
            received.extend(
                descriptors
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok(received.into_iter().next())
}

fn option_string(options: &MountOptions<'_>, allow_other: bool) -> OsString {
    let access = if options.writable { "rw" } else { "ro" };
    let mut text = format!(
        "{access},nosuid,nodev,noatime,subtype=blkfuse,max_read={},default_permissions",
        options.max_read
    )
    .into_bytes();
    if allow_other {
        text.extend_from_slice(b",allow_other");
    }
    text.extend_from_slice(b",fsname=");
    text.extend_from_slice(&escaped(options.source));
    OsString::from_vec(text)
}

/// The helper splits its options at commas, and a backslash protects what
/// follows it.
fn escaped(value: &OsStr) -> Vec<u8> {
    let mut text = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_cannot_smuggle_in_options() {
        let options = MountOptions {
            mountpoint: Path::new("/x"),
            source: OsStr::from_bytes(b"a,suid\\,\xff b"),
            writable: false,
            allow_other: AllowOther::Auto,
            max_read: 4096,
        };
        let expected: &[u8] = b"ro,nosuid,nodev,noatime,subtype=blkfuse,max_read=4096,\
            default_permissions,allow_other,fsname=a\\,suid\\\\\\,\xff b";
        assert_eq!(option_string(&options, true).as_bytes(), expected);
    }

    #[test]
    fn an_end_without_a_descriptor_is_none() {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        drop(theirs);
        assert!(receive_descriptor(&ours).unwrap().is_none());
    }
}

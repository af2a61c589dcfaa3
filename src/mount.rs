//! Mountpoints: checking them, mounting a FUSE connection over them, and
//! undoing that.
//!
//! Nothing here opens the mounted file or asks for its attributes, as the
//! answer would have to come from this very process; a child process does where
//! that is needed.

mod abort;
mod child;
mod fusermount;
mod kernel;
mod mountinfo;
mod mountpoint;
mod probe;
mod registry;
#[cfg(test)]
mod tests;
mod writeback;

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::error::{Error, Result};
use mountinfo::{MountEntry, MountId, MountTable};
use mountpoint::Mountpoint;
use registry::{Claim, Presence};
use writeback::WriteBack;

pub(crate) use abort::Aborter;
pub(crate) use child::Child;
pub(crate) use probe::{Outcome, Probe};

/// Who may use the exported file besides its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AllowOther {
    /// Only the exporting user.
    Off,
    /// Everybody whom the file's mode allows; start fails if that is refused.
    On,
    /// Everybody if the system permits it, otherwise only the exporting user.
    #[default]
    Auto,
}

/// What to mount, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MountOptions<'a> {
    /// An existing regular file, or a symbolic link to one.
    pub(crate) mountpoint: &'a Path,
    /// What mount tables show as the source: usually the image's path.
    pub(crate) source: &'a OsStr,
    /// Whether the mount accepts writes.
    pub(crate) writable: bool,
    /// Who may use the file.
    pub(crate) allow_other: AllowOther,
    /// The largest READ that the kernel may send, in bytes.
    pub(crate) max_read: u32,
}

/// How a connection came to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Fsmount,
    Mount,
    Fusermount,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Method::Fsmount => "fsmount",
            Method::Mount => "mount",
            Method::Fusermount => "fusermount3",
        }
    }
}

/// A connection, and its mount while that one is still detached.
#[derive(Debug)]
struct Connection {
    device: OwnedFd,
    detached: Option<OwnedFd>,
    method: Method,
    others: bool,
}

/// A connection whose file is not in use yet.
///
/// Dropping it undoes everything. Threads that read the device must be gone by
/// then, because the kernel waits for the requests that they have in hand.
#[derive(Debug)]
pub(crate) struct Mounting {
    // Declared, and so dropped, before the device: the mount disappears first.
    stage: Stage,
    device: OwnedFd,
    others: bool,
}

#[derive(Debug)]
enum Stage {
    /// Nobody can see it; closing `tree` destroys it.
    Detached {
        tree: OwnedFd,
        id: Option<MountId>,
        mountpoint: Mountpoint,
    },
    /// mount(2) and fusermount3 know no intermediate state.
    Visible(UndoOnDrop),
}

/// A visible mount that goes away again unless it is taken out.
#[derive(Debug)]
struct UndoOnDrop(Option<Mount>);

impl UndoOnDrop {
    fn get(&self) -> &Mount {
        self.0.as_ref().expect("only the end empties it")
    }
}

impl Drop for UndoOnDrop {
    fn drop(&mut self) {
        if let Some(mount) = self.0.take()
            && let Err(error) = mount.unmount(Unmount::Force)
        {
            log::warn!("{error}");
        }
    }
}

/// Checks the mountpoint, removes dead mounts from it, and creates the
/// connection: its INIT request then waits on [`Mounting::device`].
pub(crate) fn prepare(options: &MountOptions<'_>) -> Result<Mounting> {
    prepare_by(options, connect)
}

fn prepare_by(
    options: &MountOptions<'_>,
    connect: impl FnOnce(&MountOptions<'_>, &Mountpoint) -> Result<Connection>,
) -> Result<Mounting> {
    let mountpoint = Mountpoint::claim(options.mountpoint)?;
    let Connection {
        device,
        detached,
        method,
        others,
    } = connect(options, &mountpoint)?;
    let stage = match detached {
        Some(tree) => Stage::Detached {
            id: MountId::of_file(tree.as_fd()),
            tree,
            mountpoint,
        },
        None => {
            let id = mountinfo::find_fuse_mount(device.as_fd(), mountpoint.path());
            let mount = Mount::record(mountpoint.into_claim(), method, id);
            Stage::Visible(UndoOnDrop(Some(mount)))
        }
    };
    Ok(Mounting {
        stage,
        device,
        others,
    })
}

/// Mounts directly if this process may, else with the setuid helper.
fn connect(options: &MountOptions<'_>, mountpoint: &Mountpoint) -> Result<Connection> {
    match connect_directly(options, mountpoint) {
        Err(refusal) if matches!(refusal.errno(), libc::EPERM | libc::EACCES) => {
            log::debug!("{refusal}; trying fusermount3");
            connect_by_fusermount(options, mountpoint).map_err(|error| match refusal.errno() {
                // Of no use to the helper either, which opens the device as the user.
                libc::EACCES => Error::new(libc::EACCES, format!("{error} ({refusal})")),
                _ => error,
            })
        }
        result => result,
    }
}

fn connect_directly(options: &MountOptions<'_>, mountpoint: &Mountpoint) -> Result<Connection> {
    let device = kernel::open_device()?;
    connect_by_fsmount(options, device).or_else(|error| {
        log::debug!("{error}; trying mount(2)");
        // A new connection, in case the failed attempt has marked that one.
        connect_by_mount(options, kernel::open_device()?, mountpoint)
    })
}

fn connect_by_fsmount(options: &MountOptions<'_>, device: OwnedFd) -> Result<Connection> {
    let tree = kernel::create_detached(options, device.as_fd())?;
    Ok(Connection {
        device,
        detached: Some(tree),
        method: Method::Fsmount,
        others: options.allow_other != AllowOther::Off,
    })
}

fn connect_by_mount(
    options: &MountOptions<'_>,
    device: OwnedFd,
    mountpoint: &Mountpoint,
) -> Result<Connection> {
    kernel::mount(options, device.as_fd(), mountpoint)?;
    Ok(Connection {
        device,
        detached: None,
        method: Method::Mount,
        others: options.allow_other != AllowOther::Off,
    })
}

fn connect_by_fusermount(
    options: &MountOptions<'_>,
    mountpoint: &Mountpoint,
) -> Result<Connection> {
    let (device, others) = fusermount::mount(options, mountpoint.path())?;
    Ok(Connection {
        device,
        detached: None,
        method: Method::Fusermount,
        others,
    })
}

impl Mounting {
    /// The connection's /dev/fuse descriptor.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whether others than the owner may use the file.
    pub(crate) fn allows_others(&self) -> bool {
        self.others
    }

    /// Begins to be a client, from a child process, which shows whether the
    /// connection is served.
    pub(crate) fn probe(&self) -> Result<Probe> {
        match &self.stage {
            Stage::Detached { tree, .. } => Probe::of_detached(tree.as_fd()),
            Stage::Visible(mount) => Probe::of_visible(mount.get().path()),
        }
    }

    /// Makes the mount visible where it is not yet, and hands over what there
    /// is to own.
    pub(crate) fn attach(self) -> Result<(OwnedFd, Mount)> {
        let mount = match self.stage {
            Stage::Visible(mut undo) => undo.0.take(),
            Stage::Detached {
                tree,
                id,
                mountpoint,
            } => {
                kernel::attach(tree.as_fd(), &mountpoint)?;
                let claim = mountpoint.into_claim();
                let id = id.map(MountId::with_device);
                Some(Mount::record(claim, Method::Fsmount, id))
            }
        };
        let mount = mount.expect("only drop empties a visible mount");
        Ok((self.device, mount))
    }
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// The file disappears from its path; whoever has it open keeps it.
    Lazy,
    /// Moreover every request fails at once, and so will later ones. Where only
    /// fusermount3 may unmount this is `Lazy`: closing the device aborts.
    Force,
    /// Only if nobody uses the file; `EBUSY` otherwise.
    IfIdle,
}

/// A visible mount. Dropping it frees the path for another export of this
/// process; it does not unmount.
#[derive(Debug)]
pub(crate) struct Mount {
    claim: Claim,
    method: Method,
}

impl Mount {
    fn record(claim: Claim, method: Method, id: Option<MountId>) -> Self {
        claim.set(match id {
            Some(id) => Presence::Mounted(id),
            None => Presence::Unidentified,
        });
        Self { claim, method }
    }

    /// The mountpoint: absolute, and without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        self.claim.path()
    }

    /// How it was mounted: "fsmount", "mount" or "fusermount3".
    pub(crate) fn method(&self) -> &'static str {
        self.method.name()
    }

    /// As [`unmount`](Self::unmount) with [`Unmount::Lazy`], and has what
    /// clients hold in mapped memory written back after that; to that end the
    /// connection must be served until this returns, which it does when that is
    /// done or the connection has ended. The second result is about that, and
    /// the child process that did it, if any, is to be dropped after the
    /// connection's end.
    pub(crate) fn unmount_written_back(&self) -> (Result<()>, Result<()>, Option<Child>) {
        let failed = |e: &dyn std::fmt::Display| {
            let path = quoted(self.path());
            let text = format!("{path}: mapped memory was not written back: {e}");
            Error::new(libc::EIO, text)
        };
        let begun = match self.claim.presence() {
            Presence::Mounted(id) => WriteBack::begin(&id),
            _ => Err(Error::new(libc::ENOENT, "the mount is not known")),
        };
        match begun {
            Ok(write_back) => {
                let unmounted = self.unmount(Unmount::Lazy);
                let (result, child) = write_back.finish();
                let written = result.map_err(|errno| failed(&errno.desc()));
                (unmounted, written, Some(child))
            }
            Err(e) => (self.unmount(Unmount::Lazy), Err(failed(&e)), None),
        }
    }

    /// Removes the mount, and only this one. Succeeds if it is gone already, or
    /// if another thread is at it. Must not be called by a thread that serves
    /// the connection, which the kernel may wait for.
    pub(crate) fn unmount(&self, how: Unmount) -> Result<()> {
        // Whoever takes it does the work: a second umount2 of the same path
        // could hit what lies below.
        let presence = self.claim.take();
        let result = match &presence {
            Presence::Absent => Ok(()),
            Presence::Mounted(id) => unmount_by_id(id, self.path(), how),
            Presence::Unidentified => unmount_unidentified(self.path(), how),
        };
        if result.is_err() {
            self.claim.set(presence);
        }
        result
    }
}

/// Unmounts the mount `id` wherever it is now, which may not be `path` any more.
fn unmount_by_id(id: &MountId, path: &Path, how: Unmount) -> Result<()> {
    if id.is_known_to_be_gone() {
        return Ok(());
    }
    let Ok(table) = MountTable::read_until(|table| table.find(id).is_some()) else {
        return unmount_unidentified(path, how);
    };
    let Some(entry) = table.find(id) else {
        return Ok(());
    };
    if let Some(cover) = table.hiding(entry) {
        return Err(covered(entry, cover));
    }
    unmount_path(&entry.mount_point, how).or_else(|error| {
        // Somebody else may have been faster.
        match MountTable::read() {
            Ok(table) if table.find(id).is_none() => Ok(()),
            _ => Err(error),
        }
    })
}

fn covered(entry: &MountEntry, cover: &MountEntry) -> Error {
    Error::new(
        libc::EBUSY,
        format!(
            "{}: cannot unmount: another mount ({} on {}) covers it; unmount that one first",
            quoted(&entry.mount_point),
            quoted(&cover.source),
            quoted(&cover.mount_point),
        ),
    )
}

/// Without /proc the path is all there is to go by.
fn unmount_unidentified(path: &Path, how: Unmount) -> Result<()> {
    match unmount_path(path, how) {
        // Nothing is mounted there, or there is no such path any more.
        Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// Unmounts whatever is topmost at `path`.
fn unmount_path(path: &Path, how: Unmount) -> Result<()> {
    let flags = match how {
        Unmount::Lazy => MntFlags::MNT_DETACH,
        Unmount::Force => MntFlags::MNT_DETACH | MntFlags::MNT_FORCE,
        Unmount::IfIdle => MntFlags::empty(),
    };
    match umount2(path, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => fusermount::unmount(path, how != Unmount::IfIdle),
        Err(errno) => Err(failed(path, "cannot unmount", errno)),
    }
}

/// "path: what: the errno's words".
fn failed(path: &Path, what: &str, errno: Errno) -> Error {
    let message = format!("{}: {what}: {}", quoted(path), errno.desc());
    Error::new(errno as i32, message)
}

/// A name as a message shows it: in quotes, on one line.
fn quoted(name: impl AsRef<OsStr>) -> String {
    let mut text = String::from("'");
    for c in name.as_ref().to_string_lossy().chars() {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text.push('\'');
    text
}

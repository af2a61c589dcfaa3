//! Having the kernel hand over what clients have written into mapped memory.
//!
//! It does so when they unmap or close the file. If the export ends before,
//! somebody must ask for it, by an fsync of the mounted file. That happens in
//! a thread which shares no descriptors with the process: should the process
//! be killed while the thread waits for its own export, /dev/fuse is closed
//! all the same, and the wait ends.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::kernel;
use super::mountinfo::{MountId, MountTable};

/// How long opening the file may take. It is quick unless the driver blocks
/// every queue, and then the unmounting must not wait for it.
const OPENING: Duration = Duration::from_millis(500);

/// A write-back that is under way.
pub(super) struct WriteBack {
    opened: Receiver<()>,
    is_open: bool,
    done: Receiver<nix::Result<()>>,
    thread: JoinHandle<()>,
}

impl WriteBack {
    /// Opens the file at `path`, if it is on the mount `id`, to be synced.
    pub(super) fn begin(path: PathBuf, id: MountId) -> std::io::Result<Self> {
        let (opened, is_open) = channel();
        let (done, is_done) = channel();
        let thread = thread::Builder::new()
            .name("blkfuse-sync".to_owned())
            .spawn(move || {
                // The other end may have given up.
                let _ = done.send(write_back(&path, &id, &opened));
            })?;
        Ok(Self {
            opened: is_open,
            is_open: false,
            done: is_done,
            thread,
        })
    }

    /// Waits until the file is open, so that it can be unmounted; not for long.
    pub(super) fn wait_open(&mut self) {
        self.is_open = self.opened.recv_timeout(OPENING).is_ok();
    }

    /// Waits until everything is written back, if the file could be opened in
    /// time. The thread is then about to end, or waits for the connection's
    /// end.
    pub(super) fn finish(self) -> (nix::Result<()>, JoinHandle<()>) {
        let result = if self.is_open {
            self.done.recv().unwrap_or(Err(Errno::EIO))
        } else {
            self.done.try_recv().unwrap_or(Err(Errno::ETIMEDOUT))
        };
        (result, self.thread)
    }
}

fn write_back(path: &PathBuf, id: &MountId, opened: &Sender<()>) -> nix::Result<()> {
    kernel::unshare_descriptors()?;
    // Before it is opened: what else is there might be a file that hangs.
    let table = MountTable::read().map_err(|_| Errno::EIO)?;
    let entry = table.find(id).ok_or(Errno::ENOENT)?;
    if table.hiding(entry).is_some() {
        return Err(Errno::EBUSY);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = open(path, flags, Mode::empty())?;
    let _ = opened.send(());
    nix::unistd::fsync(&file)
}

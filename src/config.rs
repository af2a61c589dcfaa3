//! What an export is asked to be.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::mount::AllowOther;

/// The most queues an export makes when it is not told how many.
const MOST_QUEUES: usize = 8;
/// The most queues it can be told to make.
pub(crate) const QUEUES_LIMIT: u64 = 256;

/// An export's settings before it starts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Config {
    pub(crate) mountpoint: Option<PathBuf>,
    /// The number of a descriptor to serve instead of mounting.
    pub(crate) fuse_fd: Option<RawFd>,
    pub(crate) source: Option<OsString>,
    pub(crate) writable: bool,
    pub(crate) growable: bool,
    pub(crate) allow_other: AllowOther,
    /// 0: one for each CPU available.
    pub(crate) queues: usize,
}

impl Config {
    /// How many queues there will be.
    pub(crate) fn queue_count(&self) -> usize {
        if self.queues > 0 {
            return self.queues;
        }
        std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_QUEUES))
    }

    /// What is shown as the mounted device.
    pub(crate) fn source(&self) -> OsString {
        self.source.clone().unwrap_or_else(|| "blkfuse".into())
    }

    /// The export's name in messages.
    pub(crate) fn name(&self) -> String {
        match &self.mountpoint {
            Some(path) => path.display().to_string(),
            None => "fuse-fd".to_owned(),
        }
    }

    /// Refuses what no driver could satisfy.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |text: &str| Err(Error::new(libc::EINVAL, text));
        if self.mountpoint.is_none() && self.fuse_fd.is_none() {
            return refuse("no mountpoint is set; set \"mountpoint\" or \"fuse-fd\"");
        }
        if self.growable && !self.writable {
            return refuse("a growable export must be writable; set \"writable\" too");
        }
        if self.queues as u64 > QUEUES_LIMIT {
            return refuse("more than 256 queues");
        }
        Ok(())
    }
}

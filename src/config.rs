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
/// The most entries for each kernel queue it can be told to make.
const DEPTH_LIMIT: u64 = 1024;
/// The bounds of a request's size, in bytes; the larger one is the default.
pub(crate) const SMALLEST_REQUEST: u32 = 64 << 10;
pub(crate) const LARGEST_REQUEST: u32 = 1 << 20;
/// What io_uring's buffers may take unless told otherwise, in bytes.
pub(crate) const MEMORY_BUDGET: u64 = 256 << 20;

/// Whether requests come through FUSE-over-io_uring, which is faster than
/// /dev/fuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoUring {
    /// Only through /dev/fuse.
    Off,
    /// Through io_uring; start fails, and says why, if that cannot be.
    On,
    /// Through io_uring where it is to be had and has no known defects,
    /// otherwise through /dev/fuse.
    #[default]
    Auto,
}

/// Whose threads run an export's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Threads {
    /// The library's: one for each queue, from the start on.
    #[default]
    Library,
    /// The program's own, which attach themselves to the queues and dispatch
    /// them from their event loops: [`HostQueue`](crate::HostQueue).
    Host,
}

/// An export's settings before it starts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Config {
    pub(crate) mountpoint: Option<PathBuf>,
    /// The number of a descriptor to serve instead of mounting.
    pub(crate) fuse_fd: Option<RawFd>,
    pub(crate) source: Option<OsString>,
    pub(crate) writable: bool,
    pub(crate) growable: bool,
    /// The kernel reads the driver's backing file itself.
    pub(crate) passthrough: bool,
    pub(crate) allow_other: AllowOther,
    /// 0: one for each CPU available.
    pub(crate) queues: usize,
    pub(crate) threads: Threads,
    pub(crate) io_uring: IoUring,
    /// io_uring's entries for each kernel queue; `None`: as the budget allows.
    pub(crate) queue_depth: Option<usize>,
    /// In bytes; `None`: the largest, or less if the budget says so.
    pub(crate) max_request: Option<u32>,
    /// In bytes.
    pub(crate) memory_budget: Option<u64>,
}

impl Config {
    /// How many queues there will be.
    pub(crate) fn queue_count(&self) -> usize {
        if self.queues > 0 {
            return self.queues;
        }
        std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_QUEUES))
    }

    /// The largest READ and WRITE to ask the kernel for, in bytes.
    pub(crate) fn max_request(&self) -> u32 {
        self.max_request.unwrap_or(LARGEST_REQUEST)
    }

    /// How many bytes io_uring's buffers may take.
    pub(crate) fn memory_budget(&self) -> u64 {
        self.memory_budget.unwrap_or(MEMORY_BUDGET)
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
        if self.passthrough && self.writable {
            return refuse("passthrough is for read-only exports; leave out \"writable\" or it");
        }
        if self.queues as u64 > QUEUES_LIMIT {
            return refuse("more than 256 queues");
        }
        if let Some(depth) = self.queue_depth
            && let Err(why) = check_depth(depth as u64)
        {
            return refuse(&format!("\"queue-depth\" {why}"));
        }
        if let Some(bytes) = self.max_request
            && let Err(why) = check_request(bytes.into())
        {
            return refuse(&format!("\"max-request\" {why}"));
        }
        Ok(())
    }
}

/// Whether each kernel queue can have that many entries; says why not.
pub(crate) fn check_depth(depth: u64) -> std::result::Result<(), &'static str> {
    if (1..=DEPTH_LIMIT).contains(&depth) {
        Ok(())
    } else {
        Err("is not from 1 to 1024")
    }
}

/// Whether requests can have up to that many bytes; says why not.
pub(crate) fn check_request(bytes: u64) -> std::result::Result<(), &'static str> {
    let range = SMALLEST_REQUEST.into()..=LARGEST_REQUEST.into();
    if range.contains(&bytes) && bytes.is_multiple_of(4096) {
        Ok(())
    } else {
        Err("is not a multiple of 4096 from 65536 to 1048576")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of an export at a place, `changed`.
    fn checked(change: impl FnOnce(&mut Config)) -> std::result::Result<(), String> {
        let mut config = Config {
            mountpoint: Some("disk".into()),
            ..Config::default()
        };
        change(&mut config);
        config.check().map_err(|e| e.message().to_owned())
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        assert_eq!(checked(|_| ()), Ok(()));
        for depth in [1, 1024] {
            assert_eq!(checked(|c| c.queue_depth = Some(depth)), Ok(()));
        }
        for depth in [0, 1025, usize::MAX] {
            let refused = checked(|c| c.queue_depth = Some(depth)).unwrap_err();
            assert_eq!(refused, "\"queue-depth\" is not from 1 to 1024");
        }
        for bytes in [65_536, 69_632, 1 << 20] {
            assert_eq!(checked(|c| c.max_request = Some(bytes)), Ok(()));
        }
        for bytes in [0, 61_440, 65_537, (1 << 20) + 4096, u32::MAX] {
            let refused = checked(|c| c.max_request = Some(bytes)).unwrap_err();
            assert!(refused.starts_with("\"max-request\" is not a multiple"));
        }
    }
}

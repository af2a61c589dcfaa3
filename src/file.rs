//! The exported file as its users see it: length, mode, owner, times.
//!
//! All queues share it. What changes often is an atomic, or is counted by
//! each queue for itself; what changes rarely is behind a lock.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::*};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use crate::gate::Gate;
use crate::protocol::{Attr, ROOT_ID};

/// What the export's owner has decided about the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FilePolicy {
    pub(crate) writable: bool,
    /// Writes past the end grow the file.
    pub(crate) growable: bool,
    /// Others than the owner may use the file, as far as its mode lets them.
    pub(crate) others: bool,
    /// The owner.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// `st_blksize`.
    pub(crate) block_size: u32,
}

/// The file's state.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) policy: FilePolicy,
    length: AtomicU64,
    /// Which lengths the host has left behind lately by growing the image.
    outgrown: Mutex<Option<(RangeInclusive<u64>, Instant)>>,
    /// Held while the length is changed.
    pub(crate) resizing: async_lock::Mutex<()>,
    /// What changes the image's content passes here; shrinking closes it.
    pub(crate) changes: Gate,
    open_count: AtomicU64,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    times: Mutex<Times>,
    /// For each queue, when it last changed the content.
    changed: Box<[CachePadded<AtomicI64>]>,
}

/// How long after the host's growth of the image the kernel's old idea of the
/// length can still be under way to us.
const STALE_SETATTR: Duration = Duration::from_secs(10);

/// Nanoseconds since the epoch.
type Nanos = i64;

#[derive(Debug, Clone, Copy)]
struct Times {
    atime: Nanos,
    mtime: Nanos,
    /// When `mtime` was set; a later change of the content overrides it.
    mtime_set: Nanos,
    ctime: Nanos,
}

/// What SETATTR may change beside the size.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Changes {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) atime: Option<NewTime>,
    pub(crate) mtime: Option<NewTime>,
}

/// A time to set.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NewTime {
    Now,
    At { seconds: i64, nanos: u32 },
}

const NANOS: i64 = 1_000_000_000;

fn now() -> Nanos {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

impl NewTime {
    fn nanos(self, now: Nanos) -> Nanos {
        match self {
            NewTime::Now => now,
            NewTime::At { seconds, nanos } => seconds
                .saturating_mul(NANOS)
                .saturating_add(i64::from(nanos)),
        }
    }
}

impl File {
    pub(crate) fn new(policy: FilePolicy, length: u64, queues: usize) -> Self {
        let now = now();
        Self {
            policy,
            length: AtomicU64::new(length),
            outgrown: Mutex::new(None),
            resizing: async_lock::Mutex::new(()),
            changes: Gate::new(queues),
            open_count: AtomicU64::new(0),
            mode: AtomicU32::new(if policy.writable { 0o600 } else { 0o400 }),
            uid: AtomicU32::new(policy.uid),
            gid: AtomicU32::new(policy.gid),
            times: Mutex::new(Times {
                atime: now,
                mtime: now,
                mtime_set: now,
                ctime: now,
            }),
            changed: (0..queues).map(|_| CachePadded::default()).collect(),
        }
    }

    /// The length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length.load(Acquire)
    }

    /// The driver's length is this now.
    pub(crate) fn set_length(&self, length: u64) {
        self.length.store(length, Release);
    }

    /// The host has made the image this long; the caller holds `resizing`.
    pub(crate) fn host_set_length(&self, length: u64) {
        let old = self.length();
        if length > old {
            let mut outgrown = self.outgrown.lock();
            let earlier = outgrown
                .take()
                .filter(|(_, at)| at.elapsed() < STALE_SETATTR);
            let first = earlier.map_or(old, |(lengths, _)| old.min(*lengths.start()));
            *outgrown = Some((first..=old, Instant::now()));
        }
        self.set_length(length);
    }

    /// Whether the kernel may name `length` because it does not know yet that
    /// the host has grown the image. After a failed asynchronous write past
    /// its idea of the end it "restores" that length, unasked by any client
    /// (`fuse_do_truncate`), and ignores what it is answered.
    pub(crate) fn is_outgrown(&self, length: u64) -> bool {
        let outgrown = self.outgrown.lock();
        let recent = outgrown
            .as_ref()
            .filter(|(_, at)| at.elapsed() < STALE_SETATTR);
        recent.is_some_and(|(lengths, _)| lengths.contains(&length))
    }

    /// `queue` has changed the content.
    pub(crate) fn touch(&self, queue: usize) {
        self.changed[queue].store(now(), Relaxed);
    }

    pub(crate) fn opened(&self) {
        self.open_count.fetch_add(1, Relaxed);
    }

    pub(crate) fn released(&self) {
        // A connection that was handed to us may have been open already.
        let _ = self
            .open_count
            .fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
    }

    /// How often the file is open.
    pub(crate) fn open_count(&self) -> u64 {
        self.open_count.load(Relaxed)
    }

    /// Changes attributes, or says with a positive errno why not.
    pub(crate) fn change(&self, changes: &Changes) -> Result<(), i32> {
        if !self.policy.others {
            let foreign_bits = changes.mode.is_some_and(|m| m & 0o077 != 0);
            let new_owner = changes.uid.is_some_and(|u| u != self.uid.load(Relaxed))
                || changes.gid.is_some_and(|g| g != self.gid.load(Relaxed));
            if foreign_bits || new_owner {
                return Err(libc::EPERM);
            }
        }
        if let Some(mode) = changes.mode {
            self.mode.store(mode & 0o7777, Relaxed);
        }
        if let Some(uid) = changes.uid {
            self.uid.store(uid, Relaxed);
        }
        if let Some(gid) = changes.gid {
            self.gid.store(gid, Relaxed);
        }
        let mut times = self.times.lock();
        let now = now();
        if let Some(atime) = changes.atime {
            times.atime = atime.nanos(now);
        }
        if let Some(mtime) = changes.mtime {
            times.mtime = mtime.nanos(now);
            times.mtime_set = now;
        }
        times.ctime = now;
        Ok(())
    }

    /// The attributes; `allocated` is in bytes.
    pub(crate) fn attributes(&self, allocated: u64) -> Attr {
        let times = *self.times.lock();
        let changed = self.changed.iter().map(|t| t.load(Relaxed)).max();
        let changed = changed.unwrap_or(0);
        let mtime = if changed > times.mtime_set {
            changed
        } else {
            times.mtime
        };
        let ctime = times.ctime.max(changed);
        let seconds = |t: Nanos| t.div_euclid(NANOS) as u64;
        let nanos = |t: Nanos| t.rem_euclid(NANOS) as u32;
        Attr {
            ino: ROOT_ID,
            size: self.length(),
            blocks: allocated.div_ceil(512),
            atime: seconds(times.atime),
            mtime: seconds(mtime),
            ctime: seconds(ctime),
            atimensec: nanos(times.atime),
            mtimensec: nanos(mtime),
            ctimensec: nanos(ctime),
            mode: libc::S_IFREG | self.mode.load(Relaxed),
            nlink: 1,
            uid: self.uid.load(Relaxed),
            gid: self.gid.load(Relaxed),
            rdev: 0,
            blksize: self.policy.block_size,
            flags: 0,
        }
    }
}

//! The exported file as its users see it: length, mode, owner, times.
//!
//! All queues share it. What changes often is an atomic, or is counted by
//! each queue for itself; what changes rarely is behind a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::*};
use std::time::SystemTime;

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use crate::gate::Gate;
use crate::passthrough::BackingId;
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
    /// How far the content reaches. Less than the length while writes that
    /// have made the file longer are under way.
    reached: AtomicU64,
    /// Held while the length is changed.
    pub(crate) resizing: async_lock::Mutex<()>,
    /// What reads or changes the image's content passes here; shrinking
    /// closes it.
    pub(crate) uses: Gate,
    /// Whether the export has started. Before, only the start itself looks at
    /// the file, to see whether it is served.
    public: AtomicBool,
    /// Whether opening it leaves what the kernel has cached of it.
    keeps_cache: AtomicBool,
    open_count: AtomicU64,
    writer_count: AtomicU64,
    /// The length that the kernel believes in: the last one it was told.
    told: AtomicU64,
    /// A write past `told` has failed since.
    failed_past_told: AtomicBool,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    times: Mutex<Times>,
    /// For each queue, when it last changed the content.
    changed: Box<[CachePadded<AtomicI64>]>,
    /// What the kernel reads by itself, whoever opens the file.
    backing: OnceLock<BackingId>,
}

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
            reached: AtomicU64::new(length),
            resizing: async_lock::Mutex::new(()),
            uses: Gate::new(queues),
            public: AtomicBool::new(false),
            keeps_cache: AtomicBool::new(false),
            open_count: AtomicU64::new(0),
            writer_count: AtomicU64::new(0),
            // Until it has asked, the kernel takes the file for empty.
            told: AtomicU64::new(0),
            failed_past_told: AtomicBool::new(false),
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
            backing: OnceLock::new(),
        }
    }

    /// The length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length.load(Acquire)
    }

    /// The driver's length is this now.
    pub(crate) fn set_length(&self, length: u64) {
        self.reached.store(length, Relaxed);
        self.length.store(length, Release);
    }

    /// The driver's length is this now, so that a write has room.
    pub(crate) fn make_room(&self, length: u64) {
        self.length.store(length, Release);
    }

    /// A write up to `end` has succeeded.
    pub(crate) fn written(&self, end: u64) {
        if end > self.reached.load(Relaxed) {
            self.reached.fetch_max(end, Relaxed);
        }
        self.tell_reached(end);
    }

    /// From the first open on the kernel reads that by itself.
    pub(crate) fn pass_through(&self, backing: BackingId) {
        let set = self.backing.set(backing);
        debug_assert!(set.is_ok(), "a file has one backing file");
    }

    /// What the kernel reads by itself, if it does.
    pub(crate) fn backing(&self) -> Option<BackingId> {
        self.backing.get().copied()
    }

    /// How far the content reaches; exact while no write is under way.
    pub(crate) fn reached(&self) -> u64 {
        self.reached.load(Relaxed)
    }

    /// `queue` has changed the content.
    pub(crate) fn touch(&self, queue: usize) {
        self.changed[queue].store(now(), Relaxed);
    }

    /// The export has started.
    pub(crate) fn publish(&self) {
        self.public.store(true, Release);
    }

    pub(crate) fn is_public(&self) -> bool {
        self.public.load(Acquire)
    }

    /// From now on, opening it leaves what the kernel has cached of it: for who
    /// opens it to sync that. Otherwise the kernel drops it, after it has
    /// written back what clients have changed in mapped memory, page by page.
    pub(crate) fn keep_cache(&self) {
        self.keeps_cache.store(true, Release);
    }

    pub(crate) fn keeps_cache(&self) -> bool {
        self.keeps_cache.load(Acquire)
    }

    pub(crate) fn opened(&self, writer: bool) {
        self.open_count.fetch_add(1, Relaxed);
        self.writer_count.fetch_add(writer.into(), Relaxed);
    }

    pub(crate) fn released(&self, writer: bool) {
        // A connection that was handed to us may have been open already.
        let less = |n: u64, by: bool| Some(n.saturating_sub(by.into()));
        let _ = self
            .open_count
            .fetch_update(Relaxed, Relaxed, |n| less(n, true));
        let _ = self
            .writer_count
            .fetch_update(Relaxed, Relaxed, |n| less(n, writer));
    }

    /// The kernel has been told this length.
    pub(crate) fn tell(&self, length: u64) {
        self.told.store(length, SeqCst);
        self.failed_past_told.store(false, SeqCst);
    }

    /// The kernel is told of a success by which the file reaches up to `end`.
    pub(crate) fn tell_reached(&self, end: u64) {
        if end > self.told() {
            self.told.fetch_max(end, SeqCst);
        }
    }

    /// The length that the kernel believes in.
    pub(crate) fn told(&self) -> u64 {
        self.told.load(SeqCst)
    }

    /// A write up to `end` has failed.
    pub(crate) fn write_failed(&self, end: u64) {
        if end > self.told() {
            self.failed_past_told.store(true, SeqCst);
        }
    }

    /// Whether a truncation of the open file to `length` is no client's wish.
    /// After a failed asynchronous write past the end that it believes in, the
    /// kernel goes back to that end (`fuse_do_truncate`). If it had not heard
    /// of the file's growth, that would undo the growth.
    pub(crate) fn is_false_rollback(&self, length: u64) -> bool {
        let told = self.told();
        length == told && told < self.length() && self.failed_past_told.load(SeqCst)
    }

    /// How often the file is open.
    pub(crate) fn open_count(&self) -> u64 {
        self.open_count.load(Relaxed)
    }

    /// How often it is open for writing.
    pub(crate) fn writer_count(&self) -> u64 {
        self.writer_count.load(Relaxed)
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

    /// The attributes, for the kernel; `allocated` is in bytes.
    pub(crate) fn attributes(&self, allocated: u64) -> Attr {
        let length = self.length();
        self.tell(length);
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
            size: length,
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

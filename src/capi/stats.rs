//! Statistics as C sees them.

use std::ffi::{c_int, c_void};

use super::error::{guard, invalid};
use super::{blkfuse_export, export_ref};
use crate::stats::{LATENCY_BUCKETS, OpKind, OpStats, Stats};

/// What one kind of operation has come to.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct blkfuse_op_stats {
    /// Requests answered.
    pub operations: u64,
    /// Bytes of data successfully moved.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// What an export has done since it started. Grows only at its end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blkfuse_stats {
    /// Reads of data.
    pub read: blkfuse_op_stats,
    /// Writes of data.
    pub write: blkfuse_op_stats,
    /// fsync, fdatasync, and close of a descriptor open for writing.
    pub flush: blkfuse_op_stats,
    /// fallocate: holes punched, ranges zeroed, space allocated.
    pub allocate: blkfuse_op_stats,
    /// Everything else: attributes, open, release, lseek, statfs.
    pub other: blkfuse_op_stats,
    /// Requests that were begun and not yet answered.
    pub in_flight: u64,
    /// Reads and writes by their time from arrival to answer: element n counts
    /// those of at least 2^n and less than 2^(n+1) nanoseconds; the first
    /// holds what was faster, the last what was slower.
    pub latency: [u64; 32],
}

const _: () = assert!(LATENCY_BUCKETS == 32);

impl From<&OpStats> for blkfuse_op_stats {
    fn from(stats: &OpStats) -> Self {
        Self {
            operations: stats.operations,
            bytes: stats.bytes,
            errors: stats.errors,
        }
    }
}

impl From<Stats> for blkfuse_stats {
    fn from(stats: Stats) -> Self {
        Self {
            read: stats.of(OpKind::Read).into(),
            write: stats.of(OpKind::Write).into(),
            flush: stats.of(OpKind::Flush).into(),
            allocate: stats.of(OpKind::Allocate).into(),
            other: stats.of(OpKind::Other).into(),
            in_flight: stats.in_flight,
            latency: stats.latency,
        }
    }
}

/// Stores in `*stats` what a started export has done. `size` is
/// sizeof(struct blkfuse_stats) as the host knows it: a host older than the
/// library gets what it knows, a newer one zeroes for the rest.
///
/// Returns 0; -EINVAL: a pointer is NULL, or not started.
///
/// # Safety
/// `export` must be a live export or NULL; `stats` must have room for `size`
/// bytes, or be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blkfuse_export_get_stats(
    export: *const blkfuse_export,
    stats: *mut blkfuse_stats,
    size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let export = unsafe { export_ref(export) }?.started()?;
        if stats.is_null() {
            return Err(invalid("the place for the statistics is NULL"));
        }
        let full = blkfuse_stats::from(export.stats());
        let known = size.min(size_of::<blkfuse_stats>());
        let to = stats.cast::<c_void>();
        // SAFETY: the caller promises room for `size` bytes; the source has
        // `known` bytes, all initialised, since the struct is made of u64s and
        // so has no padding.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const full).cast::<c_void>(), to, known);
            std::ptr::write_bytes(to.add(known), 0, size - known);
        }
        Ok(0)
    })
}

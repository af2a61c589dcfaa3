//! Counters of what an export has done.
//!
//! Each queue counts for itself without atomic read-modify-writes: only its
//! own thread writes its counters. Reading adds the queues up; the sum is
//! exact once the queues rest.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam_utils::CachePadded;

/// The kinds of operation that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum OpKind {
    /// Reads of data.
    Read,
    /// Writes of data.
    Write,
    /// fsync, fdatasync, and close of a descriptor open for writing.
    Flush,
    /// fallocate: holes punched, ranges zeroed, space allocated.
    Allocate,
    /// Everything else: attributes, open, release, lseek, statfs…
    Other,
}

/// How many kinds of operation there are.
pub const OP_KINDS: usize = 5;
/// How many buckets the latency histogram has.
pub const LATENCY_BUCKETS: usize = 32;

/// What one kind of operation has come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Requests answered.
    pub operations: u64,
    /// Bytes of data successfully moved.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// What an export has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// By [`OpKind`].
    pub by_kind: [OpStats; OP_KINDS],
    /// Requests that were begun and not yet answered.
    pub in_flight: u64,
    /// Reads and writes by their time from arrival to answer: bucket `n`
    /// counts those of at least 2^n and less than 2^(n+1) nanoseconds; the
    /// first holds what was faster, the last what was slower.
    pub latency: [u64; LATENCY_BUCKETS],
}

impl Stats {
    /// One kind's counters.
    pub fn of(&self, kind: OpKind) -> &OpStats {
        &self.by_kind[kind as usize]
    }
}

#[derive(Debug, Default)]
struct OpCounters {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// One queue's counters.
#[derive(Debug, Default)]
pub(crate) struct QueueStats {
    by_kind: [OpCounters; OP_KINDS],
    latency: [AtomicU64; LATENCY_BUCKETS],
    begun: AtomicU64,
    answered: AtomicU64,
}

impl QueueStats {
    /// Counts one request that was begun; called by the queue's own thread.
    pub(crate) fn begun(&self) {
        add(&self.begun, 1);
    }

    /// Counts one answer; called by the queue's own thread only.
    pub(crate) fn record(&self, kind: OpKind, outcome: Result<u64, i32>, took: Duration) {
        let counters = &self.by_kind[kind as usize];
        add(&counters.operations, 1);
        add(&self.answered, 1);
        match outcome {
            Ok(bytes) => add(&counters.bytes, bytes),
            Err(_) => add(&counters.errors, 1),
        }
        if matches!(kind, OpKind::Read | OpKind::Write) {
            let nanos = took.as_nanos().clamp(1, u64::MAX.into()) as u64;
            add(
                &self.latency[(nanos.ilog2() as usize).min(LATENCY_BUCKETS - 1)],
                1,
            );
        }
    }
}

/// An addition by the counter's only writer.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// The counters of all queues.
#[derive(Debug)]
pub(crate) struct AllStats(Box<[CachePadded<QueueStats>]>);

impl AllStats {
    pub(crate) fn new(queues: usize) -> Self {
        Self((0..queues).map(|_| CachePadded::default()).collect())
    }

    pub(crate) fn queue_count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn queue(&self, index: usize) -> &QueueStats {
        &self.0[index]
    }

    /// The sum over all queues.
    pub(crate) fn sum(&self) -> Stats {
        let mut sum = Stats::default();
        for queue in &self.0 {
            // In this order what is answered in between counts as neither.
            let answered = queue.answered.load(Relaxed);
            sum.in_flight += queue.begun.load(Relaxed).saturating_sub(answered);
            for (to, from) in sum.by_kind.iter_mut().zip(&queue.by_kind) {
                to.operations += from.operations.load(Relaxed);
                to.bytes += from.bytes.load(Relaxed);
                to.errors += from.errors.load(Relaxed);
            }
            for (to, from) in sum.latency.iter_mut().zip(&queue.latency) {
                *to += from.load(Relaxed);
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_add_up_and_errors_move_no_bytes() {
        let all = AllStats::new(2);
        (0..2).for_each(|_| all.queue(0).begun());
        (0..4).for_each(|_| all.queue(1).begun());
        all.queue(0)
            .record(OpKind::Read, Ok(4096), Duration::from_nanos(1500));
        all.queue(1)
            .record(OpKind::Read, Err(5), Duration::from_secs(3600));
        all.queue(1)
            .record(OpKind::Flush, Ok(0), Duration::from_secs(1));
        let sum = all.sum();
        assert_eq!(sum.in_flight, 3);
        let reads = OpStats {
            operations: 2,
            bytes: 4096,
            errors: 1,
        };
        assert_eq!(*sum.of(OpKind::Read), reads);
        assert_eq!(sum.of(OpKind::Flush).operations, 1);
        assert_eq!(sum.latency[10], 1);
        assert_eq!(sum.latency[LATENCY_BUCKETS - 1], 1);
        assert_eq!(sum.latency.iter().sum::<u64>(), 2);
    }
}

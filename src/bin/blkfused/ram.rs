//! A device in memory, allocated as it is written.
//!
//! The device is cut into chunks, and neighbouring chunks belong to different
//! shards, each with a lock of its own. Whoever copies bytes holds the chunk's
//! shard, so two writers of one chunk never lose each other's bytes.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use blkfuse::Extent;
use parking_lot::RwLock;

/// Bytes in a chunk, the unit of allocation.
const CHUNK: u64 = 64 << 10;
/// Enough that threads rarely meet.
const SHARDS: u64 = 64;

/// The allocated chunks of one shard, by number; ordered, because finding the
/// end of a hole must not cost a look at every chunk that is not there.
type Shard = RwLock<BTreeMap<u64, Vec<u8>>>;

/// The memory device. Every chunk that is present has exactly [`CHUNK`] bytes,
/// and those behind the device's end are zero.
#[derive(Debug)]
pub struct Ram {
    length: AtomicU64,
    /// Chunks allocated.
    chunks: AtomicU64,
    shards: Box<[Shard]>,
}

impl Ram {
    pub fn new(length: u64) -> Self {
        Self {
            length: AtomicU64::new(length),
            chunks: AtomicU64::new(0),
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }

    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    pub fn allocated_size(&self) -> u64 {
        self.chunks.load(Ordering::Relaxed) * CHUNK
    }

    fn shard(&self, chunk: u64) -> &Shard {
        &self.shards[(chunk % SHARDS) as usize]
    }

    pub fn read(&self, buf: &mut [u8], offset: u64) {
        let mut rest = buf;
        for (chunk, inside) in pieces(offset, rest.len() as u64) {
            let (piece, after) = rest.split_at_mut(inside.len());
            match self.shard(chunk).read().get(&chunk) {
                Some(data) => piece.copy_from_slice(&data[inside]),
                None => piece.fill(0),
            }
            rest = after;
        }
    }

    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut rest = data;
        for (chunk, inside) in pieces(offset, data.len() as u64) {
            let (piece, after) = rest.split_at(inside.len());
            let mut shard = self.shard(chunk).write();
            match shard.get_mut(&chunk) {
                Some(data) => data[inside].copy_from_slice(piece),
                None => {
                    shard.insert(chunk, new_chunk(piece, inside)?);
                    self.chunks.fetch_add(1, Ordering::Relaxed);
                }
            }
            rest = after;
        }
        Ok(())
    }

    /// Frees the chunks that lie wholly within the range and zeroes the rest
    /// of it.
    pub fn discard(&self, offset: u64, bytes: u64) {
        let end = offset + bytes;
        let whole = offset.div_ceil(CHUNK)..end / CHUNK;
        if whole.start > whole.end {
            // Both ends lie inside one chunk.
            return self.clear(offset..end);
        }
        self.clear(offset..whole.start * CHUNK);
        self.clear(whole.end * CHUNK..end);
        self.free(whole);
    }

    /// Zeroes a range inside one chunk, if that is present.
    fn clear(&self, range: Range<u64>) {
        for (chunk, inside) in pieces(range.start, range.end - range.start) {
            if let Some(data) = self.shard(chunk).write().get_mut(&chunk) {
                data[inside].fill(0);
            }
        }
    }

    /// Frees chunks by number.
    fn free(&self, chunks: Range<u64>) {
        for shard in &self.shards {
            let mut shard = shard.write();
            let present: Vec<u64> = shard.range(chunks.clone()).map(|(n, _)| *n).collect();
            for number in &present {
                shard.remove(number);
            }
            self.chunks
                .fetch_sub(present.len() as u64, Ordering::Relaxed);
        }
    }

    /// Sets the length. What is cut off is freed or zeroed, so that it does
    /// not come back when the device grows again.
    pub fn truncate(&self, length: u64) {
        let old = self.length.swap(length, Ordering::AcqRel);
        if length < old {
            // To the end of the last chunk: that one may then be freed whole.
            self.discard(length, old.next_multiple_of(CHUNK) - length);
        }
    }

    pub fn block_status(&self, offset: u64, bytes: u64) -> Extent {
        let first = offset / CHUNK;
        let present = |n: u64| self.shard(n).read().contains_key(&n);
        let hole = !present(first);
        let end = if hole {
            let next = |shard: &Shard| shard.read().range(first..).next().map(|(n, _)| *n);
            match self.shards.iter().filter_map(next).min() {
                Some(chunk) => chunk * CHUNK,
                None => self.length(),
            }
        } else {
            // No further than was asked, or all of a big device is walked.
            let last = (offset + bytes).div_ceil(CHUNK);
            (first + 1..last).find(|n| !present(*n)).unwrap_or(last) * CHUNK
        };
        // Another thread may have changed what is there in between.
        Extent {
            bytes: end.min(self.length()).saturating_sub(offset).max(1),
            hole,
        }
    }
}

/// A chunk that is zero except for `data` at `inside`.
fn new_chunk(data: &[u8], inside: Range<usize>) -> io::Result<Vec<u8>> {
    let mut chunk = Vec::new();
    chunk.try_reserve_exact(CHUNK as usize)?;
    chunk.resize(inside.start, 0);
    chunk.extend_from_slice(data);
    chunk.resize(CHUNK as usize, 0);
    Ok(chunk)
}

/// Cuts a range of bytes at the chunks' borders: a chunk's number, and the
/// part of it.
fn pieces(offset: u64, bytes: u64) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = offset + bytes;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let chunk = at / CHUNK;
        let start = at % CHUNK;
        let len = (CHUNK - start).min(end - at);
        at += len;
        Some((chunk, start as usize..(start + len) as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::MAX;

    fn bytes(ram: &Ram, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        ram.read(&mut data, offset);
        data
    }

    #[test]
    fn what_was_written_is_read_and_the_rest_is_zero() {
        let ram = Ram::new(4 * CHUNK);
        let data: Vec<u8> = (0..2 * CHUNK + 7).map(|n| (n % 251 + 1) as u8).collect();
        ram.write(&data, CHUNK - 3).unwrap();
        assert_eq!(bytes(&ram, CHUNK - 3, data.len()), data);
        assert_eq!(bytes(&ram, CHUNK - 5, 2), [0, 0]);
        assert_eq!(bytes(&ram, 3 * CHUNK + 4, 4), [0; 4]);
        assert_eq!(ram.allocated_size(), 4 * CHUNK);
    }

    #[test]
    fn parallel_writers_of_one_chunk_lose_nothing() {
        let ram = Ram::new(CHUNK);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let ram = &ram;
                scope.spawn(move || {
                    for at in (thread..CHUNK).step_by(8) {
                        ram.write(&[thread as u8 + 1], at).unwrap();
                    }
                });
            }
        });
        let expected: Vec<u8> = (0..CHUNK).map(|n| (n % 8) as u8 + 1).collect();
        assert_eq!(bytes(&ram, 0, CHUNK as usize), expected);
        assert_eq!(ram.allocated_size(), CHUNK);
    }

    #[test]
    fn discarding_frees_whole_chunks_and_zeroes_exactly_the_range() {
        let ram = Ram::new(4 * CHUNK);
        ram.write(&vec![1; 4 * CHUNK as usize], 0).unwrap();
        ram.discard(CHUNK - 1, CHUNK + 2);
        assert_eq!(ram.allocated_size(), 3 * CHUNK);
        assert_eq!(bytes(&ram, CHUNK - 2, 2), [1, 0]);
        assert_eq!(bytes(&ram, 2 * CHUNK, 2), [0, 1]);
        // Inside one chunk, and up to a border from within.
        ram.discard(3 * CHUNK + 1, 2);
        assert_eq!(bytes(&ram, 3 * CHUNK, 4), [1, 0, 0, 1]);
        ram.discard(3 * CHUNK + 4, CHUNK - 4);
        assert_eq!(bytes(&ram, 3 * CHUNK + 3, 3), [1, 0, 0]);
        assert_eq!(bytes(&ram, 3 * CHUNK - 1, 1), [1]);
        assert_eq!(ram.allocated_size(), 3 * CHUNK);
    }

    #[test]
    fn extents_are_merged_in_both_kinds() {
        let ram = Ram::new(1 << 40);
        ram.write(&[1; 2], 10 * CHUNK - 1).unwrap();
        let hole = |bytes| Extent { bytes, hole: true };
        let data = |bytes| Extent { bytes, hole: false };
        assert_eq!(ram.block_status(0, 1), hole(9 * CHUNK));
        assert_eq!(ram.block_status(5, 1), hole(9 * CHUNK - 5));
        assert_eq!(
            ram.block_status(9 * CHUNK + 5, 10 * CHUNK),
            data(2 * CHUNK - 5)
        );
        assert_eq!(ram.block_status(9 * CHUNK, 1), data(CHUNK));
        assert_eq!(
            ram.block_status(11 * CHUNK, 1),
            hole((1 << 40) - 11 * CHUNK)
        );
    }

    #[test]
    fn shrinking_and_growing_again_yields_zeroes() {
        let ram = Ram::new(2 * CHUNK + 100);
        ram.write(&vec![1; 2 * CHUNK as usize + 100], 0).unwrap();
        ram.truncate(CHUNK + 10);
        assert_eq!(ram.allocated_size(), 2 * CHUNK);
        ram.truncate(MAX);
        assert_eq!(ram.length(), MAX);
        assert_eq!(ram.allocated_size(), 2 * CHUNK);
        assert_eq!(bytes(&ram, CHUNK + 8, 4), [1, 1, 0, 0]);
        assert_eq!(bytes(&ram, 2 * CHUNK, 100), [0; 100]);

        ram.write(&[9], MAX - 1).unwrap();
        assert_eq!(bytes(&ram, MAX - 2, 2), [0, 9]);
        assert_eq!(ram.block_status(MAX - 1, 1).bytes, 1);
        ram.truncate(0);
        assert_eq!(ram.allocated_size(), 0);
    }
}

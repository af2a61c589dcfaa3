//! The memory of payloads: mapped once, page-aligned, not copied into forked
//! processes, released when nobody uses it any more.
//!
//! Untouched pages cost nothing. A region that many slots share asks for huge
//! pages, because the kernel looks up every page of a payload at every
//! request; with huge ones reads of 1 MiB are a quarter faster.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use memmap2::{Advice, MmapMut};

/// A part of a mapping that has one owner.
#[derive(Debug)]
pub(crate) struct Piece {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the mapping; never dereferenced, since its parts have owners.
    mapping: Arc<Mapping>,
}

/// A mapping that was given away in pieces.
#[derive(Debug)]
struct Mapping {
    _memory: MmapMut,
}

// SAFETY: a piece is the only way to its bytes, as a box would be, and memory
// belongs to no thread.
unsafe impl Send for Piece {}
// SAFETY: through a shared piece its bytes can only be read.
unsafe impl Sync for Piece {}

impl Piece {
    /// A mapping of its own, of `len` bytes.
    pub(crate) fn alone(len: usize) -> io::Result<Self> {
        let mut pieces = pieces(len, 1, false)?;
        Ok(pieces.remove(0))
    }

    pub(crate) fn keeper(&self) -> Keeper {
        Keeper {
            _mapping: self.mapping.clone(),
        }
    }
}

/// Keeps the mapping that a piece lies in, though the piece itself may go.
#[derive(Debug, Clone)]
pub(crate) struct Keeper {
    _mapping: Arc<Mapping>,
}

/// `count` pieces of `len` bytes each, which lie in one mapping. `len` is a
/// multiple of the page size if there are several.
pub(crate) fn pieces(len: usize, count: usize, huge: bool) -> io::Result<Vec<Piece>> {
    let total = len.checked_mul(count).ok_or(io::ErrorKind::OutOfMemory)?;
    let mut memory = MmapMut::map_anon(total)?;
    if !cfg!(miri) {
        memory.advise(Advice::DontFork)?;
        if huge {
            // Without huge pages it works as well.
            let _ = memory.advise(Advice::HugePage);
        }
    }
    let start = NonNull::from(&mut memory[..]).cast::<u8>();
    let mapping = Arc::new(Mapping { _memory: memory });
    let piece = |n| Piece {
        // SAFETY: `n` is less than `count`, so this stays within the mapping.
        start: unsafe { start.add(n * len) },
        len,
        mapping: mapping.clone(),
    };
    Ok((0..count).map(piece).collect())
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped and initialised (with zeroes) as long as
        // the mapping lives, which this piece keeps; no other piece has them.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; that the piece is borrowed mutably makes this the
        // only reference.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_outlive_each_other() {
        let mut all = pieces(4096, 3, true).unwrap();
        for (n, piece) in all.iter_mut().enumerate() {
            assert!(piece.iter().all(|b| *b == 0));
            piece.fill(n as u8 + 1);
        }
        let last = all.pop().unwrap();
        assert_eq!(all[0][4095], 1);
        assert_eq!(all[1][0], 2);
        drop(all);
        assert!(last.iter().all(|b| *b == 3));
        assert!(last.as_ptr().addr().is_multiple_of(4096));
    }
}

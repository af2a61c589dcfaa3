//! Which part of an I/O may bypass the page cache.
//!
//! `O_DIRECT` wants offset, length and memory aligned. An I/O is therefore
//! cut into pieces, and what is not aligned goes through a second, buffered
//! descriptor of the same file. The kernel keeps the two coherent: a direct
//! write writes the cached pages of its range back and drops them, and file
//! systems let no buffered write of the same file run beside it. Block devices
//! do not exclude each other so; for them a direct piece consists of whole
//! pages, so no page is ever written both ways at once by disjoint requests.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::unistd::{SysconfVar, sysconf};

/// What memory must be aligned to: the largest sector in common use. Where
/// more is needed the kernel says `EINVAL` and the piece goes the other way.
const MEMORY_ALIGN: usize = 512;
/// Sectors are at most this long, and so are file systems' blocks, mostly.
const BLOCK: u64 = 4096;

/// A descriptor opened with `O_DIRECT`.
#[derive(Debug)]
pub struct Direct {
    pub file: File,
    /// Offsets and lengths must be multiples of this power of two.
    align: u64,
}

impl Direct {
    pub fn new(file: File, metadata: &Metadata) -> Self {
        let mut align = BLOCK;
        if metadata.file_type().is_block_device() {
            let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
            let page = page.and_then(|n| u64::try_from(n).ok()).unwrap_or(BLOCK);
            align = align.max(page).max(metadata.blksize());
        }
        Self {
            file,
            align: align.next_power_of_two(),
        }
    }

    /// How the I/O at `offset`, with the memory at `data`, begins.
    pub fn first_piece(&self, data: &[u8], offset: u64) -> Piece {
        first_piece(self.align, data.as_ptr().addr(), data.len(), offset)
    }
}

/// The first piece of an I/O; never empty if the I/O is not.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    pub direct: bool,
    pub len: usize,
}

fn first_piece(align: u64, memory: usize, len: usize, offset: u64) -> Piece {
    let buffered = |len| Piece { direct: false, len };
    let head = (offset.next_multiple_of(align) - offset) as usize;
    if head >= len {
        return buffered(len);
    }
    let aligned = (len - head) & !(align as usize - 1);
    if aligned == 0 || !(memory + head).is_multiple_of(MEMORY_ALIGN) {
        return buffered(len);
    }
    if head > 0 {
        return buffered(head);
    }
    Piece {
        direct: true,
        len: aligned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All pieces of an I/O.
    fn pieces(memory: usize, len: usize, offset: u64) -> Vec<(bool, usize)> {
        let mut all = Vec::new();
        let mut done = 0;
        while done < len {
            let piece = first_piece(BLOCK, memory + done, len - done, offset + done as u64);
            all.push((piece.direct, piece.len));
            done += piece.len;
        }
        all
    }

    #[test]
    fn only_aligned_pieces_are_direct() {
        assert_eq!(pieces(0x10000, 65536, 8192), [(true, 65536)]);
        assert_eq!(pieces(0x10000, 4097, 0), [(true, 4096), (false, 1)]);
        assert_eq!(
            pieces(0x10000, 8192, 512),
            [(false, 3584), (true, 4096), (false, 512)]
        );
        assert_eq!(pieces(0x10000, 4096, 512), [(false, 4096)]);
        assert_eq!(pieces(0x10000, 100, 5), [(false, 100)]);
    }

    #[test]
    fn an_io_whose_memory_is_never_aligned_is_not_cut() {
        assert_eq!(pieces(0x10001, 65536, 0), [(false, 65536)]);
        assert_eq!(pieces(0x10000, 65536, 1), [(false, 65536)]);
        // The head's length makes up for the memory's.
        assert_eq!(pieces(0x10001, 8191, 4097), [(false, 4095), (true, 4096)]);
    }
}

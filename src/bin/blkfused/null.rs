//! A device that holds nothing: it reads as zeroes and forgets what is
//! written. For measuring everything around a driver.

use std::sync::atomic::{AtomicU64, Ordering};

use blkfuse::Extent;

/// The null device; only its length is real.
#[derive(Debug)]
pub struct Null {
    length: AtomicU64,
}

impl Null {
    pub fn new(length: u64) -> Self {
        Self {
            length: AtomicU64::new(length),
        }
    }

    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    pub fn truncate(&self, length: u64) {
        self.length.store(length, Ordering::Release);
    }

    /// All of it is one hole.
    pub fn block_status(&self, offset: u64, bytes: u64) -> Extent {
        Extent {
            bytes: self.length().saturating_sub(offset).max(bytes),
            hole: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_null_device_is_a_hole() {
        let null = Null::new(1000);
        let hole = |bytes| Extent { bytes, hole: true };
        assert_eq!(null.block_status(0, 1), hole(1000));
        null.truncate(crate::size::MAX);
        assert_eq!(null.length(), crate::size::MAX);
        assert_eq!(null.block_status(1000, 5), hole(crate::size::MAX - 1000));
    }
}

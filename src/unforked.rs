//! Descriptors that a child made by `fork` does not keep. The kernel takes a
//! connection for alive while anybody has a copy of /dev/fuse or of a ring, so
//! that clients of a host that was killed would wait for a child of its that
//! does not serve them; some of them beyond the help of umount -f.
//!
//! Linux has no flag for it, so the child closes them before `fork` returns.
//! Nothing that it does there may wait for a lock: who holds it may be a thread
//! that the child does not have.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::sync::{Once, OnceLock};

const NONE: RawFd = -1;

/// Places for descriptors; more follow as they are needed, and stay.
struct List {
    places: [AtomicI32; 64],
    next: OnceLock<Box<List>>,
}

static FIRST: List = List::new();

impl List {
    const fn new() -> Self {
        Self {
            places: [const { AtomicI32::new(NONE) }; 64],
            next: OnceLock::new(),
        }
    }

    fn add(&self, fd: RawFd) -> &AtomicI32 {
        let mut list = self;
        loop {
            for place in &list.places {
                if place.compare_exchange(NONE, fd, SeqCst, SeqCst).is_ok() {
                    return place;
                }
            }
            list = list.next.get_or_init(|| Box::new(List::new()));
        }
    }
}

/// As long as it lives, a descriptor is closed in children. To be dropped
/// before that is closed.
#[derive(Debug)]
pub(crate) struct Unforked {
    place: &'static AtomicI32,
    fd: RawFd,
}

impl Unforked {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: the handler is a function of this library, which the C
            // library forgets when this one is unloaded.
            let errno = unsafe { libc::pthread_atfork(None, None, Some(close_all)) };
            if errno != 0 {
                log::warn!("forked children will keep descriptors: errno {errno}");
            }
        });
        let fd = fd.as_raw_fd();
        Self {
            place: FIRST.add(fd),
            fd,
        }
    }
}

impl Drop for Unforked {
    fn drop(&mut self) {
        // In a child it has gone already.
        let _ = self.place.compare_exchange(self.fd, NONE, SeqCst, SeqCst);
    }
}

/// What a child does before `fork` returns in it.
unsafe extern "C" fn close_all() {
    let mut list = Some(&FIRST);
    while let Some(List { places, next }) = list {
        for place in places {
            let fd = place.swap(NONE, SeqCst);
            if fd != NONE {
                // SAFETY: it was the parent's and is this process's copy, which
                // nobody uses: a child must not call the library.
                unsafe { libc::close(fd) };
            }
        }
        list = next.get().map(|next| &**next);
    }
}

/// A descriptor of a FUSE connection.
#[derive(Debug)]
pub(crate) struct FuseDevice {
    // Dropped first.
    _unforked: Unforked,
    fd: OwnedFd,
}

impl From<OwnedFd> for FuseDevice {
    fn from(fd: OwnedFd) -> Self {
        Self {
            _unforked: Unforked::new(fd.as_fd()),
            fd,
        }
    }
}

impl AsFd for FuseDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for FuseDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_place_for_each_of_many() {
        let list: &'static List = Box::leak(Box::new(List::new()));
        let places: Vec<_> = (0..200).map(|fd| (fd, list.add(fd))).collect();
        assert!(places.iter().all(|(fd, place)| place.load(SeqCst) == *fd));
        places[70].1.store(NONE, SeqCst);
        assert!(std::ptr::eq(list.add(7), places[70].1), "it is used again");
    }
}

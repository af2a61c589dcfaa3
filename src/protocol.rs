//! The FUSE ABI: the structures of `include/uapi/linux/fuse.h` that a block
//! device served as the root of a mount meets, and INIT as a pure function.
//!
//! No I/O happens here. Names follow the kernel's.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version; a peer with another one cannot be served.
pub(crate) const MAJOR: u32 = 7;
/// The newest minor version whose behaviour this code knows.
pub(crate) const MINOR: u32 = 45;
/// The oldest minor version served: it brought today's `fuse_attr`,
/// `fuse_write_in` and `fuse_getattr_in`.
pub(crate) const OLDEST_MINOR: u32 = 9;

/// The inode number of the only file.
pub(crate) const ROOT_ID: u64 = 1;
/// The largest offset a file may end at (`MAX_LFS_FILESIZE` on 64 bits).
pub(crate) const MAX_LENGTH: u64 = i64::MAX as u64;

/// Operation codes.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const BMAP: u32 = 37;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const POLL: u32 = 40;
    pub(crate) const NOTIFY_REPLY: u32 = 41;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const STATX: u32 = 52;
    pub(crate) const COPY_FILE_RANGE_64: u32 = 53;
}

/// Bits of `init_in.flags` and `init_in.flags2` as one number.
pub(crate) mod init_flag {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const ABORT_ERROR: u64 = 1 << 21;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub(crate) const PASSTHROUGH: u64 = 1 << 37;
    pub(crate) const OVER_IO_URING: u64 = 1 << 41;
}

/// Bits of `open_out.open_flags`.
pub(crate) mod open_flag {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub(crate) const PASSTHROUGH: u32 = 1 << 7;
}

/// Bits of `setattr_in.valid`.
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    /// Of an open file, not of a path.
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const CTIME: u32 = 1 << 10;
}

/// Notification codes, which travel in `out_header.error`.
pub(crate) mod notify {
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const STORE: i32 = 4;
    pub(crate) const RETRIEVE: i32 = 5;
}

macro_rules! abi {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $type,)* }
    )*};
}

abi! {
    /// Begins every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Begins every reply and notification.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// INIT before minor 36 ends after `flags`.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
    /// INIT's reply before minor 23 ends after `max_write`.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16,
        unused: [u16; 11],
    }
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32,
        gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    OpenIn { flags: u32, open_flags: u32 }
    OpenOut { fh: u64, open_flags: u32, backing_id: i32 }
    ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteOut { size: u32, padding: u32 }
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut { offset: u64 }
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    }
    NotifyInvalInodeOut { ino: u64, off: i64, len: i64 }
    NotifyStoreOut { nodeid: u64, offset: u64, size: u32, padding: u32 }
    NotifyRetrieveOut { unique: u64, nodeid: u64, offset: u64, size: u32, padding: u32 }
}

impl OutHeader {
    /// Of a message about the request `unique`, with `body` bytes behind it.
    /// `error`: a negative errno, or 0; or a notification's code.
    pub(crate) fn new(unique: u64, error: i32, body: usize) -> Self {
        Self {
            len: (size_of::<Self>() + body) as u32,
            error,
            unique,
        }
    }
}

/// Room for any operation's first argument, as in `fuse_uring_req_header`.
pub(crate) const OPERATION_SIZE: usize = 128;

/// How many bytes of a request are its operation's own structure: what goes
/// before names and data. It is what the kernel passes as `in_args[0]`, and so
/// what FUSE-over-io_uring puts in the operation header.
pub(crate) fn operation_size(op: u32) -> usize {
    match op {
        opcode::GETATTR | opcode::FSYNC | opcode::FSYNCDIR => 16,
        opcode::BMAP | opcode::MKNOD | opcode::CREATE | opcode::RENAME2 => 16,
        opcode::SETATTR => size_of::<SetattrIn>(),
        opcode::OPEN | opcode::OPENDIR | opcode::ACCESS | opcode::INTERRUPT | opcode::MKDIR => 8,
        opcode::READ | opcode::WRITE | opcode::READDIR | opcode::READDIRPLUS => 40,
        opcode::NOTIFY_REPLY => 40,
        opcode::RELEASE | opcode::RELEASEDIR | opcode::FLUSH | opcode::POLL => 24,
        opcode::STATX | opcode::LSEEK => 24,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::LINK | opcode::RENAME => 8,
        opcode::SETXATTR | opcode::GETXATTR | opcode::LISTXATTR => 8,
        opcode::IOCTL | opcode::FALLOCATE => 32,
        opcode::GETLK | opcode::SETLK | opcode::SETLKW => 48,
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => 56,
        opcode::INIT => size_of::<InitIn>(),
        _ => 0,
    }
}

/// What the server offers in INIT.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer {
    /// The largest READ and WRITE in bytes; a multiple of the page size.
    pub(crate) max_request: u32,
    /// How many background requests the kernel may keep in flight.
    pub(crate) max_background: u16,
    /// Whether an open with O_TRUNC is to empty the file.
    pub(crate) truncates_on_open: bool,
    /// Whether there are rings for FUSE-over-io_uring.
    pub(crate) io_uring: bool,
    /// How deep file systems may be stacked under a passthrough, 1 or 2; 0: no
    /// passthrough.
    pub(crate) passthrough_depth: u32,
}

/// What was agreed upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreement {
    /// The kernel's minor version, or ours if that is older.
    pub(crate) minor: u32,
    /// The largest READ and WRITE in bytes.
    pub(crate) max_request: u32,
    /// Flags that both sides know.
    pub(crate) flags: u64,
}

impl Agreement {
    /// Whether the kernel will read backing files.
    pub(crate) fn passes_through(&self) -> bool {
        self.flags & init_flag::PASSTHROUGH != 0
    }
}

/// The answer to one INIT message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InitReply {
    out: InitOut,
    len: usize,
    /// `None`: the kernel will send INIT again, with our major version.
    pub(crate) agreement: Option<Agreement>,
}

impl Agreement {
    /// Whether requests are to come through rings.
    pub(crate) fn io_uring(&self) -> bool {
        self.flags & init_flag::OVER_IO_URING != 0
    }
}

impl InitReply {
    /// What follows the reply's header.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.out.as_bytes()[..self.len]
    }
}

/// The page size that the protocol's `max_pages` counts in.
const PAGE: u32 = 4096;
/// The most pages in a request to or from a kernel without MAX_PAGES.
const DEFAULT_MAX_PAGES: u32 = 32;
/// `init_in` before minor 36, and `init_out` before minor 23 and 5.
const INIT_IN_OLD: usize = 16;
const INIT_OUT_OLD: usize = 24;
const INIT_OUT_VERSION: usize = 8;

/// Answers an INIT whose operation and payload are `body`. The error is the
/// reason in words why this kernel cannot be served.
pub(crate) fn negotiate(body: &[u8], offer: &Offer) -> Result<InitReply, String> {
    let mut init = InitIn::default();
    let given = body.len().min(size_of::<InitIn>());
    if given < INIT_OUT_VERSION {
        return Err(format!("an INIT message of {} bytes", body.len()));
    }
    init.as_mut_bytes()[..given].copy_from_slice(&body[..given]);
    let mut out = InitOut {
        major: MAJOR,
        minor: MINOR,
        ..InitOut::default()
    };
    if init.major > MAJOR {
        return Ok(InitReply {
            out,
            len: INIT_OUT_VERSION,
            agreement: None,
        });
    }
    if init.major < MAJOR || init.minor < OLDEST_MINOR || given < INIT_IN_OLD {
        return Err(format!(
            "the kernel speaks FUSE {}.{}, older than {MAJOR}.{OLDEST_MINOR}",
            init.major, init.minor
        ));
    }
    let known = u64::from(init.flags)
        | if init.flags & init_flag::INIT_EXT as u32 != 0 {
            u64::from(init.flags2) << 32
        } else {
            0
        };
    let flags = known & wanted_flags(offer);
    let pages = if flags & init_flag::MAX_PAGES != 0 {
        offer.max_request / PAGE
    } else {
        DEFAULT_MAX_PAGES.min(offer.max_request / PAGE)
    };
    let agreement = Agreement {
        minor: init.minor.min(MINOR),
        max_request: pages * PAGE,
        flags,
    };
    out.max_readahead = init.max_readahead;
    out.flags = flags as u32;
    out.flags2 = (flags >> 32) as u32;
    out.max_background = offer.max_background;
    out.congestion_threshold = offer.max_background / 4 * 3;
    out.max_write = agreement.max_request;
    out.time_gran = 1;
    out.max_pages = pages as u16;
    if agreement.passes_through() {
        out.max_stack_depth = offer.passthrough_depth;
    }
    Ok(InitReply {
        out,
        len: if init.minor < 23 {
            INIT_OUT_OLD
        } else {
            size_of::<InitOut>()
        },
        agreement: Some(agreement),
    })
}

/// The flags that serve a block device well.
///
/// ASYNC_DIO and ASYNC_READ let one client have many requests in flight.
/// ATOMIC_O_TRUNC brings O_TRUNC in OPEN; with it the kernel takes the file for
/// empty whatever the answer is, so it is only for files that then are. Left out on purpose: WRITEBACK_CACHE (the page cache
/// would hold data that the driver has not seen), locks (the kernel does them
/// by itself), and everything about directories but PARALLEL_DIROPS.
fn wanted_flags(offer: &Offer) -> u64 {
    use init_flag::*;
    let truncation = if offer.truncates_on_open {
        ATOMIC_O_TRUNC
    } else {
        0
    };
    let passthrough = if offer.passthrough_depth > 0 {
        PASSTHROUGH
    } else {
        0
    };
    let rings = if offer.io_uring { OVER_IO_URING } else { 0 };
    truncation
        | passthrough
        | rings
        | ASYNC_READ
        | BIG_WRITES
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | ABORT_ERROR
        | MAX_PAGES
        | INIT_EXT
        | DIRECT_IO_ALLOW_MMAP
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OFFER: Offer = Offer {
        max_request: 1 << 20,
        max_background: 256,
        truncates_on_open: true,
        io_uring: true,
        passthrough_depth: 0,
    };

    fn init(major: u32, minor: u32, flags: u64) -> InitIn {
        InitIn {
            major,
            minor,
            max_readahead: 131072,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            unused: [0; 11],
        }
    }

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitIn>(), 64);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<SetattrIn>(), 88);
        assert_eq!(size_of::<OpenIn>(), 8);
        assert_eq!(size_of::<OpenOut>(), 16);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<WriteIn>(), 40);
        assert_eq!(size_of::<WriteOut>(), 8);
        assert_eq!(size_of::<ReleaseIn>(), 24);
        assert_eq!(size_of::<FlushIn>(), 24);
        assert_eq!(size_of::<FsyncIn>(), 16);
        assert_eq!(size_of::<FallocateIn>(), 32);
        assert_eq!(size_of::<LseekIn>(), 24);
        assert_eq!(size_of::<LseekOut>(), 8);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<NotifyInvalInodeOut>(), 24);
        assert_eq!(size_of::<NotifyStoreOut>(), 24);
        assert_eq!(size_of::<NotifyRetrieveOut>(), 32);
    }

    #[test]
    fn todays_kernel_gets_everything_that_serves_a_block_device() {
        let reply = negotiate(init(7, 45, u64::MAX).as_bytes(), &OFFER).unwrap();
        assert_eq!(reply.bytes().len(), 64);
        let agreed = reply.agreement.unwrap();
        assert_eq!(agreed.max_request, 1 << 20);
        assert_eq!(agreed.flags, wanted_flags(&OFFER));
        let out = InitOut::read_from_bytes(reply.bytes()).unwrap();
        assert_eq!(out.max_pages, 256);
        assert_eq!(out.max_write, 1 << 20);
        let upper = init_flag::DIRECT_IO_ALLOW_MMAP | init_flag::OVER_IO_URING;
        assert_eq!(out.flags2, (upper >> 32) as u32);
    }

    #[test]
    fn passthrough_is_agreed_on_only_if_both_sides_want_it() {
        let both = init_flag::INIT_EXT | init_flag::PASSTHROUGH;
        for (offered, depth, agreed) in [
            (both, 1, 1),
            (both, 2, 2),
            (both, 0, 0),
            (init_flag::INIT_EXT, 1, 0),
            // The second half of the flags counts only if the first says so.
            (init_flag::PASSTHROUGH, 1, 0),
        ] {
            let offer = Offer {
                passthrough_depth: depth,
                ..OFFER
            };
            let reply = negotiate(init(7, 45, offered).as_bytes(), &offer).unwrap();
            assert_eq!(reply.out.max_stack_depth, agreed);
            let flag = u64::from(reply.out.flags2) << 32 & init_flag::PASSTHROUGH;
            assert_eq!(flag != 0, agreed > 0);
            assert_eq!(reply.agreement.unwrap().passes_through(), agreed > 0);
        }
    }

    #[test]
    fn the_reply_has_the_size_that_the_kernels_minor_version_knows() {
        for minor in OLDEST_MINOR..60 {
            let full = init(7, minor, u64::MAX);
            let body = if minor < 36 {
                &full.as_bytes()[..INIT_IN_OLD]
            } else {
                full.as_bytes()
            };
            let reply = negotiate(body, &OFFER).unwrap();
            assert_eq!(reply.bytes().len(), if minor < 23 { 24 } else { 64 });
            assert_eq!(reply.agreement.unwrap().minor, minor.min(MINOR));
        }
    }

    #[test]
    fn a_kernel_without_max_pages_sends_at_most_32_pages() {
        let reply = negotiate(&init(7, 27, 0).as_bytes()[..16], &OFFER).unwrap();
        assert_eq!(reply.agreement.unwrap().max_request, 128 << 10);
    }

    #[test]
    fn a_newer_major_is_asked_again_and_an_older_one_refused() {
        let reply = negotiate(init(8, 0, 0).as_bytes(), &OFFER).unwrap();
        assert!(reply.agreement.is_none());
        assert_eq!(reply.bytes().len(), 8);
        assert!(negotiate(init(6, 31, 0).as_bytes(), &OFFER).is_err());
        assert!(negotiate(init(7, 8, 0).as_bytes(), &OFFER).is_err());
        assert!(negotiate(&[7, 0, 0, 0], &OFFER).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn flags_that_the_kernel_does_not_offer_are_never_set(
            minor in OLDEST_MINOR..100, flags: u64, pages in 1u32..=256,
        ) {
            let offer = Offer {
                max_request: pages * PAGE,
                max_background: 64,
                truncates_on_open: false,
                io_uring: true,
                passthrough_depth: 1,
            };
            let reply = negotiate(init(7, minor, flags).as_bytes(), &offer).unwrap();
            let out = reply.out;
            prop_assert_eq!(out.flags & !(flags as u32), 0);
            prop_assert_eq!(out.flags2 & !((flags >> 32) as u32), 0);
            if flags & init_flag::INIT_EXT == 0 {
                prop_assert_eq!(out.flags2, 0);
            }
            prop_assert!(reply.agreement.unwrap().max_request <= offer.max_request);
            prop_assert!(out.max_write >= PAGE);
        }

        #[test]
        fn no_init_message_is_a_surprise(body: Vec<u8>) {
            let _ = negotiate(&body, &OFFER);
        }
    }
}

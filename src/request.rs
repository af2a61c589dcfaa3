//! From a slot's bytes to an operation: pure, total, and without I/O.
//!
//! Whatever the bytes are, decoding ends in an operation or in the error that
//! this request alone is answered with.

use zerocopy::FromBytes;

use crate::protocol::{
    FallocateIn, FlushIn, FsyncIn, InHeader, LseekIn, MAX_LENGTH, OPERATION_SIZE, OpenIn, ROOT_ID,
    ReadIn, ReleaseIn, SetattrIn, WriteIn, opcode,
};

/// A request's errno, positive.
pub(crate) type Errno = i32;

/// What a client asks for. A WRITE's data stay in the slot's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Getattr,
    Setattr(SetattrIn),
    Open {
        /// The flags of open(2).
        flags: i32,
    },
    /// The last descriptor of an open file is gone.
    Release {
        fh: u64,
    },
    Read {
        offset: u64,
        size: usize,
    },
    Write {
        offset: u64,
        size: usize,
        /// It must be durable when it is answered.
        durable: bool,
    },
    /// A descriptor is closed.
    Flush {
        fh: u64,
    },
    Fsync,
    Fallocate {
        offset: u64,
        length: u64,
        mode: i32,
    },
    Lseek {
        offset: u64,
        whence: i32,
    },
    Statfs,
    /// FORGET, BATCH_FORGET and INTERRUPT want no answer.
    Unanswered,
    /// The connection's end; answered with success.
    Destroy,
}

/// Takes `header`, the operation's structure and the payload's length apart.
/// `max_request` is the payload's capacity in bytes.
pub(crate) fn decode(
    header: &InHeader,
    operation: &[u8; OPERATION_SIZE],
    payload_len: usize,
    max_request: usize,
) -> Result<Operation, Errno> {
    let arguments = (header.len as usize).saturating_sub(size_of::<InHeader>());
    let given = arguments.min(OPERATION_SIZE);
    match header.opcode {
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => {
            return Ok(Operation::Unanswered);
        }
        opcode::DESTROY => return Ok(Operation::Destroy),
        opcode::STATFS => return Ok(Operation::Statfs),
        _ => {}
    }
    if header.nodeid != ROOT_ID {
        return Err(libc::ENOENT);
    }
    let body = &operation[..given];
    match header.opcode {
        opcode::GETATTR => Ok(Operation::Getattr),
        opcode::SETATTR => {
            let s: SetattrIn = structure(body)?;
            if s.valid & crate::protocol::set::SIZE != 0 && s.size > MAX_LENGTH {
                return Err(libc::EFBIG);
            }
            Ok(Operation::Setattr(s))
        }
        opcode::OPEN => {
            let o: OpenIn = structure(body)?;
            Ok(Operation::Open {
                flags: o.flags as i32,
            })
        }
        opcode::RELEASE => {
            let r: ReleaseIn = structure(body)?;
            Ok(Operation::Release { fh: r.fh })
        }
        opcode::READ => {
            let r: ReadIn = structure(body)?;
            if r.size as usize > max_request {
                return Err(libc::EINVAL);
            }
            Ok(Operation::Read {
                offset: r.offset,
                size: r.size as usize,
            })
        }
        opcode::WRITE => {
            let w: WriteIn = structure(body)?;
            if w.size as usize != payload_len || payload_len > max_request {
                return Err(libc::EINVAL);
            }
            if w.offset > MAX_LENGTH || u64::from(w.size) > MAX_LENGTH - w.offset {
                return Err(libc::EFBIG);
            }
            Ok(Operation::Write {
                offset: w.offset,
                size: payload_len,
                // O_SYNC includes it. No FSYNC follows a write that does not
                // go through the page cache.
                durable: w.flags & libc::O_DSYNC as u32 != 0,
            })
        }
        opcode::FLUSH => {
            let f: FlushIn = structure(body)?;
            Ok(Operation::Flush { fh: f.fh })
        }
        opcode::FSYNC => {
            let _: FsyncIn = structure(body)?;
            Ok(Operation::Fsync)
        }
        opcode::FALLOCATE => {
            let f: FallocateIn = structure(body)?;
            if f.offset > MAX_LENGTH || f.length > MAX_LENGTH - f.offset {
                return Err(libc::EFBIG);
            }
            Ok(Operation::Fallocate {
                offset: f.offset,
                length: f.length,
                mode: f.mode as i32,
            })
        }
        opcode::LSEEK => {
            let l: LseekIn = structure(body)?;
            Ok(Operation::Lseek {
                offset: l.offset,
                whence: l.whence as i32,
            })
        }
        // What a plain file answers to an ioctl that it does not know.
        // ENOSYS would do too, but is said to programs as "not implemented".
        opcode::IOCTL => Err(libc::ENOTTY),
        opcode::LOOKUP => Err(libc::ENOENT),
        // ENOSYS lasts for the whole connection; for everything that ends up
        // here the kernel's substitute is right: no xattrs, always ready,
        // copies by read and write, attributes by GETATTR.
        _ => Err(libc::ENOSYS),
    }
}

/// The structure at the start of `body`; EINVAL if it is cut short.
fn structure<T: FromBytes>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_prefix(body)
        .map(|(value, _)| value)
        .map_err(|_| libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn request(op: u32, body: &[u8], payload: usize) -> Result<Operation, Errno> {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len() + payload) as u32,
            opcode: op,
            nodeid: ROOT_ID,
            ..InHeader::default()
        };
        let mut operation = [0; OPERATION_SIZE];
        operation[..body.len()].copy_from_slice(body);
        decode(&header, &operation, payload, 1 << 20)
    }

    #[test]
    fn a_write_must_bring_what_it_announces() {
        let w = WriteIn {
            offset: 512,
            size: 100,
            ..WriteIn::default()
        };
        assert_eq!(
            request(opcode::WRITE, w.as_bytes(), 100),
            Ok(Operation::Write {
                offset: 512,
                size: 100,
                durable: false
            })
        );
        assert_eq!(request(opcode::WRITE, w.as_bytes(), 99), Err(libc::EINVAL));
        assert_eq!(
            request(opcode::WRITE, &w.as_bytes()[..39], 0),
            Err(libc::EINVAL)
        );
    }

    #[test]
    fn offsets_near_the_end_of_all_files_fail_cleanly() {
        for offset in [MAX_LENGTH, MAX_LENGTH + 1, u64::MAX] {
            let w = WriteIn {
                offset,
                size: 1,
                ..WriteIn::default()
            };
            assert_eq!(request(opcode::WRITE, w.as_bytes(), 1), Err(libc::EFBIG));
            let f = FallocateIn {
                offset,
                length: 1,
                ..FallocateIn::default()
            };
            assert_eq!(
                request(opcode::FALLOCATE, f.as_bytes(), 0),
                Err(libc::EFBIG)
            );
        }
    }

    #[test]
    fn a_read_larger_than_the_payload_fails_alone() {
        let r = ReadIn {
            size: (1 << 20) + 1,
            ..ReadIn::default()
        };
        assert_eq!(request(opcode::READ, r.as_bytes(), 0), Err(libc::EINVAL));
    }

    #[test]
    fn enosys_is_never_given_where_it_would_stick_and_lie() {
        for op in [
            opcode::READ,
            opcode::WRITE,
            opcode::GETATTR,
            opcode::SETATTR,
            opcode::OPEN,
            opcode::FSYNC,
            opcode::FLUSH,
            opcode::FALLOCATE,
            opcode::LSEEK,
            opcode::STATFS,
            opcode::RELEASE,
        ] {
            for len in 0..=OPERATION_SIZE {
                assert_ne!(
                    request(op, &[0xff; OPERATION_SIZE][..len], 0),
                    Err(libc::ENOSYS)
                );
            }
        }
        assert_eq!(request(opcode::GETXATTR, &[0; 8], 9), Err(libc::ENOSYS));
        assert_eq!(request(9999, &[], 0), Err(libc::ENOSYS));
    }

    #[test]
    fn no_other_inode_exists() {
        let header = InHeader {
            len: 56,
            opcode: opcode::GETATTR,
            nodeid: 2,
            ..InHeader::default()
        };
        let decoded = decode(&header, &[0; OPERATION_SIZE], 0, 4096);
        assert_eq!(decoded, Err(libc::ENOENT));
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn whatever_is_decoded_keeps_within_the_slot(
            op in 0u32..64, len: u32, nodeid in 0u64..3, bytes: [u8; OPERATION_SIZE], payload in 0usize..8192,
        ) {
            let header = InHeader { len, opcode: op, nodeid, ..InHeader::default() };
            match decode(&header, &bytes, payload, 4096) {
                Ok(Operation::Read { size, .. }) => prop_assert!(size <= 4096),
                Ok(Operation::Write { offset, size, .. }) => {
                    prop_assert!(size <= 4096 && size == payload);
                    prop_assert!(offset + size as u64 <= MAX_LENGTH);
                }
                Ok(Operation::Fallocate { offset, length, .. }) => {
                    prop_assert!(offset + length <= MAX_LENGTH);
                }
                Ok(_) => {}
                Err(errno) => prop_assert!((1..512).contains(&errno)),
            }
        }
    }
}

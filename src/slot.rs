//! The slot: the one shape a request has, whatever carried it.
//!
//! Header and operation lie as in the kernel's `fuse_uring_req_header`; the
//! payload is page-aligned memory of its own, into which a WRITE's data
//! arrive, from which a READ's data leave, and which the driver uses in
//! place. A slot is owned either by its transport (waiting for a request) or
//! by its task (serving one), and moves between the two as a box.

use std::io;

use memmap2::{Advice, MmapMut};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::driver::ReadBuf;
use crate::protocol::{InHeader, OPERATION_SIZE};
use crate::request::Errno;

/// What precedes a request's payload.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Head {
    /// The request's header, at the start.
    pub(crate) in_out: [u8; 128],
    /// The operation's own structure; the rest is of no meaning.
    pub(crate) operation: [u8; OPERATION_SIZE],
}

/// How a request is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Not at all.
    Nothing,
    /// With a positive errno.
    Error(Errno),
    /// With success and this many bytes of the payload.
    Payload(usize),
}

/// A request's place, from its arrival to its answer.
#[derive(Debug)]
pub(crate) struct Slot {
    index: usize,
    pub(crate) head: Box<Head>,
    payload: MmapMut,
    /// How many bytes of the payload came with the request.
    payload_len: usize,
    /// `payload[dirty..]` is zero.
    dirty: usize,
    pub(crate) reply: Reply,
}

impl Slot {
    /// A slot with `capacity` bytes of payload. Untouched payload costs no
    /// memory, and none is copied into forked processes.
    pub(crate) fn new(index: usize, capacity: usize) -> io::Result<Self> {
        let payload = MmapMut::map_anon(capacity)?;
        if !cfg!(miri) {
            payload.advise(Advice::DontFork)?;
        }
        Ok(Self {
            index,
            head: Box::new(Head::new_zeroed()),
            payload,
            payload_len: 0,
            dirty: 0,
            reply: Reply::Nothing,
        })
    }

    /// Its number within its queue.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn header(&self) -> InHeader {
        InHeader::read_from_prefix(&self.head.in_out)
            .expect("the area is larger than the header")
            .0
    }

    pub(crate) fn capacity(&self) -> usize {
        self.payload.len()
    }

    pub(crate) fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// A request has arrived with `len` bytes of payload; the transport has
    /// written to no more than the payload's first `touched` bytes.
    pub(crate) fn arrived(&mut self, len: usize, touched: usize) {
        self.payload_len = len;
        self.dirty = self.dirty.max(touched);
        self.reply = Reply::Nothing;
    }

    /// The payload that came with the request.
    pub(crate) fn data(&self) -> &[u8] {
        &self.payload[..self.payload_len]
    }

    /// The first `len` bytes of the payload, to send.
    pub(crate) fn outgoing(&self, len: usize) -> &[u8] {
        &self.payload[..len]
    }

    /// All of the payload, for the transport to receive into. It must tell
    /// [`arrived`](Self::arrived) how far it got.
    pub(crate) fn receive(&mut self) -> (&mut Head, &mut [u8]) {
        (&mut self.head, &mut self.payload)
    }

    /// The first `len` bytes of the payload, for a driver to read into.
    pub(crate) fn read_buf(&mut self, len: usize) -> ReadBuf<'_> {
        ReadBuf::new(&mut self.payload[..len], &mut self.dirty)
    }

    /// All of the payload as zeroes. What came with the request is lost.
    pub(crate) fn zeroes(&mut self) -> &[u8] {
        let capacity = self.payload.len();
        self.read_buf(capacity).zero();
        &self.payload
    }

    /// Answers with a structure, which takes the payload's place.
    pub(crate) fn answer_with(&mut self, value: &(impl IntoBytes + Immutable)) {
        let bytes = value.as_bytes();
        self.payload[..bytes.len()].copy_from_slice(bytes);
        self.dirty = self.dirty.max(bytes.len());
        self.reply = Reply::Payload(bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroing_covers_whatever_was_there_before() {
        let mut slot = Slot::new(0, 8192).unwrap();
        slot.receive().1[..5000].fill(7);
        slot.arrived(5000, 5000);
        slot.read_buf(100).zero();
        assert_eq!(slot.outgoing(101)[99..], [0, 7]);
        assert!(slot.zeroes().iter().all(|b| *b == 0));
        slot.read_buf(10).bytes_mut().fill(9);
        slot.answer_with(&0x0101_0101_0101_0101u64);
        slot.read_buf(8192).zero();
        assert!(slot.outgoing(8192).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_read_that_touched_nothing_is_known() {
        let mut slot = Slot::new(0, 4096).unwrap();
        assert!(!slot.read_buf(10).is_filled());
        let mut buf = slot.read_buf(10);
        buf.bytes_mut()[0] = 1;
        assert!(buf.is_filled());
    }
}

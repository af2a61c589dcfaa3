//! The slot: the one shape a request has, whatever carried it.
//!
//! A header, an operation's own structure, and a payload: page-aligned memory
//! into which a WRITE's data arrive, from which a READ's data leave, and which
//! the driver uses in place. A slot is owned either by its transport (waiting
//! for a request) or by its task (serving one), and moves between the two as a
//! box.

use std::io;
use std::ops::Range;

use zerocopy::{Immutable, IntoBytes};

use crate::driver::ReadBuf;
use crate::protocol::{InHeader, OPERATION_SIZE};
use crate::region::{Keeper, Piece};
use crate::request::Errno;

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

impl Reply {
    /// How many bytes of the payload it has.
    pub(crate) fn payload_len(self) -> usize {
        match self {
            Reply::Payload(len) => len,
            Reply::Nothing | Reply::Error(_) => 0,
        }
    }
}

/// What is known of the payload's memory.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traces {
    /// Everything from here on is zero.
    pub(crate) dirty: usize,
    /// Everything from here on may still be without memory of its own. The
    /// kernel is slow to read from such pages.
    pub(crate) untouched: usize,
}

impl Traces {
    /// Somebody may have written to the first `len` bytes.
    pub(crate) fn wrote(&mut self, len: usize) {
        self.dirty = self.dirty.max(len);
        self.untouched = self.untouched.max(len);
    }
}

/// The room in front of the payload, so that the payload begins a page.
pub(crate) const FRONT: usize = 4096;

/// Where in the kernel's ring queues a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingOrigin {
    /// The kernel's queue: the number of a CPU.
    pub(crate) kernel_queue: u16,
    /// What the request is answered by.
    pub(crate) commit_id: u64,
}

/// Where a payload is, which stays mapped as long as anybody has this.
#[derive(Debug)]
pub(crate) struct Payload {
    addresses: Range<usize>,
    keeper: Keeper,
}

impl Payload {
    /// What keeps `len` bytes at the address `start`, if they are in it.
    pub(crate) fn keeper_of(&self, start: usize, len: usize) -> Option<Keeper> {
        let has = start >= self.addresses.start && start + len <= self.addresses.end;
        has.then(|| self.keeper.clone())
    }
}

/// A request's place, from its arrival to its answer.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The transport's: `None` if the slot is one of /dev/fuse's.
    pub(crate) ring: Option<RingOrigin>,
    pub(crate) header: InHeader,
    /// The operation's own structure; the rest is of no meaning.
    pub(crate) operation: [u8; OPERATION_SIZE],
    /// `FRONT` bytes that are the transport's, then the payload.
    memory: Piece,
    /// How many bytes of the payload came with the request.
    payload_len: usize,
    traces: Traces,
    pub(crate) reply: Reply,
}

impl Slot {
    /// A slot with `capacity` bytes of payload, in memory of its own.
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self::within(Piece::alone(FRONT + capacity)?))
    }

    /// A slot in `memory`, of which the payload is what follows `FRONT` bytes.
    pub(crate) fn within(memory: Piece) -> Self {
        Self {
            ring: None,
            header: InHeader::default(),
            operation: [0; OPERATION_SIZE],
            memory,
            payload_len: 0,
            traces: Traces::default(),
            reply: Reply::Nothing,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.memory.len() - FRONT
    }

    /// Where the payload is, all of it.
    pub(crate) fn payload(&self) -> Payload {
        let bytes = self.memory[FRONT..].as_ptr_range();
        Payload {
            addresses: bytes.start.addr()..bytes.end.addr(),
            keeper: self.memory.keeper(),
        }
    }

    pub(crate) fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// A request has arrived with `len` bytes of payload; the transport has
    /// written to no more than the payload's first `touched` bytes.
    pub(crate) fn arrived(&mut self, len: usize, touched: usize) {
        self.payload_len = len;
        self.traces.wrote(touched);
        self.reply = Reply::Nothing;
    }

    /// The payload that came with the request.
    pub(crate) fn data(&self) -> &[u8] {
        &self.memory[FRONT..][..self.payload_len]
    }

    /// All of the payload, for the transport to arrange. It must tell
    /// [`arrived`](Self::arrived) how far it wrote.
    pub(crate) fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.memory[FRONT..]
    }

    /// The last `front` bytes before the payload, and all of it, for the
    /// transport to receive into; as [`payload_mut`](Self::payload_mut).
    pub(crate) fn receive(&mut self, front: usize) -> &mut [u8] {
        &mut self.memory[FRONT - front..]
    }

    /// The `FRONT` bytes before the payload, which are the transport's.
    pub(crate) fn front_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..FRONT]
    }

    /// `front` followed by the payload's first `len` bytes, to send.
    pub(crate) fn outgoing(&mut self, front: &[u8], len: usize) -> &[u8] {
        let start = FRONT - front.len();
        self.memory[start..FRONT].copy_from_slice(front);
        &self.memory[start..FRONT + len]
    }

    /// The first `len` bytes of the payload, for a driver to read into.
    pub(crate) fn read_buf(&mut self, len: usize) -> ReadBuf<'_> {
        ReadBuf::new(&mut self.memory[FRONT..][..len], &mut self.traces)
    }

    /// All of the payload as zeroes. What came with the request is lost.
    pub(crate) fn zeroes(&mut self) -> &[u8] {
        let capacity = self.capacity();
        self.read_buf(capacity).zero();
        &self.memory[FRONT..]
    }

    /// Answers with a structure, which takes the payload's place.
    pub(crate) fn answer_with(&mut self, value: &(impl IntoBytes + Immutable)) {
        let bytes = value.as_bytes();
        self.memory[FRONT..][..bytes.len()].copy_from_slice(bytes);
        self.traces.wrote(bytes.len());
        self.reply = Reply::Payload(bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroing_covers_whatever_was_there_before() {
        let mut slot = Slot::new(8192).unwrap();
        slot.payload_mut()[..5000].fill(7);
        slot.arrived(5000, 5000);
        slot.read_buf(100).zero();
        assert_eq!(slot.outgoing(&[], 101)[99..], [0, 7]);
        assert!(slot.zeroes().iter().all(|b| *b == 0));
        slot.read_buf(10).bytes_mut().fill(9);
        slot.answer_with(&0x0101_0101_0101_0101u64);
        slot.read_buf(8192).zero();
        assert!(slot.outgoing(&[], 8192).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_read_that_touched_nothing_is_known() {
        let mut slot = Slot::new(4096).unwrap();
        assert!(!slot.read_buf(10).is_filled());
        let mut buf = slot.read_buf(10);
        buf.bytes_mut()[0] = 1;
        assert!(buf.is_filled());
    }
}

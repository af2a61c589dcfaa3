//! What the benchmarks in benches/ measure: requests on their way through
//! the whole engine, from a transport in memory to a driver that does nothing
//! and back. No kernel, no copies, no other threads.

use std::io;

use zerocopy::IntoBytes;

use crate::driver::{BlockDriver, Io, ReadBuf};
use crate::engine::engine;
use crate::error::Error;
use crate::forward::Port;
use crate::protocol::{AttrOut, InHeader, ROOT_ID, ReadIn, WriteIn, WriteOut, opcode};
use crate::queue::{BUDGET, Progress, Queue};
use crate::slot::{Reply, Slot};
use crate::transport::{Fetched, Transport, Unbound};

const LENGTH: u64 = 1 << 30;
const BLOCK: usize = 4096;

/// The benchmarks' names, each with the request that it repeats.
pub const REQUESTS: [(&str, Request); 3] = [
    ("read", Request::Read),
    ("write", Request::Write),
    ("getattr", Request::Getattr),
];

/// A request that can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// READ of 4 KiB.
    Read,
    /// WRITE of 4 KiB.
    Write,
    /// GETATTR.
    Getattr,
}

impl Request {
    fn opcode(self) -> u32 {
        match self {
            Self::Read => opcode::READ,
            Self::Write => opcode::WRITE,
            Self::Getattr => opcode::GETATTR,
        }
    }

    /// The operation's own structure.
    fn operation(self) -> Vec<u8> {
        let (offset, size) = (LENGTH / 2, BLOCK as u32);
        match self {
            Self::Read => ReadIn {
                offset,
                size,
                ..ReadIn::default()
            }
            .as_bytes()
            .to_vec(),
            Self::Write => WriteIn {
                offset,
                size,
                ..WriteIn::default()
            }
            .as_bytes()
            .to_vec(),
            Self::Getattr => vec![0; 16],
        }
    }

    fn payload_len(self) -> usize {
        if self == Self::Write { BLOCK } else { 0 }
    }

    fn reply_len(self) -> usize {
        match self {
            Self::Read => BLOCK,
            Self::Write => size_of::<WriteOut>(),
            Self::Getattr => size_of::<AttrOut>(),
        }
    }
}

/// A device that does nothing, and reads as zeroes.
struct Null;

impl BlockDriver for Null {
    fn length(&self) -> io::Result<u64> {
        Ok(LENGTH)
    }

    async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, _offset: u64) -> io::Result<()> {
        buf.zero();
        Ok(())
    }

    async fn write(&self, _: &Io<'_>, _data: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Brings the same request again and again, and checks each reply.
struct Repeater {
    header: InHeader,
    operation: Vec<u8>,
    payload_len: usize,
    reply: Reply,
    /// A request is to be brought.
    due: bool,
    replies: u64,
    free: Option<Box<Slot>>,
}

impl Repeater {
    fn new(request: Request) -> Self {
        let operation = request.operation();
        let payload_len = request.payload_len();
        let len = size_of::<InHeader>() + operation.len() + payload_len;
        Self {
            header: InHeader {
                len: len as u32,
                opcode: request.opcode(),
                unique: 2,
                nodeid: ROOT_ID,
                ..InHeader::default()
            },
            operation,
            payload_len,
            reply: Reply::Payload(request.reply_len()),
            due: false,
            replies: 0,
            free: Some(Box::new(Slot::new(BLOCK).expect("a slot's memory"))),
        }
    }
}

impl Transport for Repeater {
    fn slots(&self) -> usize {
        1
    }

    fn fetch(&mut self) -> Fetched {
        if !std::mem::take(&mut self.due) {
            return Fetched::Nothing;
        }
        let mut slot = self.free.take().expect("the last request was answered");
        slot.header = self.header;
        slot.operation[..self.operation.len()].copy_from_slice(&self.operation);
        slot.arrived(self.payload_len, self.payload_len);
        Fetched::Request(slot)
    }

    fn commit(&mut self, slot: Box<Slot>) -> Result<(), Error> {
        assert_eq!(slot.reply, self.reply);
        self.replies += 1;
        self.free = Some(slot);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn carry(&mut self, _port: &Port) -> Result<(), Error> {
        Ok(())
    }

    fn want_requests(&mut self, _wanted: bool) -> Result<(), Error> {
        Ok(())
    }

    fn wait(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn has_news(&mut self, _wanted: bool) -> bool {
        false
    }

    fn is_overslept(&mut self, _wanted: bool) -> Result<bool, Error> {
        Ok(false)
    }

    fn unbind(self: Box<Self>) -> Box<dyn Unbound> {
        unreachable!("it stays in its thread")
    }

    fn fall_back(self: Box<Self>) -> Box<dyn Transport> {
        self
    }
}

/// An engine that serves one kind of request.
pub struct Bench(Queue<Repeater>);

impl Bench {
    /// An engine to which `request` will come.
    pub fn new(request: Request) -> Self {
        let (queue, _, _) = engine(Null, Repeater::new(request), false);
        Self(queue)
    }

    /// Serves one request, from its arrival until there is nothing to do.
    pub fn serve(&mut self) {
        let queue = &mut self.0;
        let before = queue.transport().replies;
        queue.transport().due = true;
        while queue.dispatch(BUDGET) == Progress::More {}
        assert_eq!(queue.transport().replies, before + 1);
    }
}

//! The transport over /dev/fuse: read(2) brings a request, write(2) takes its
//! reply. Protocol: the kernel's `Documentation/filesystems/fuse/fuse.rst`
//! and `fs/fuse/dev.c`.
//!
//! Each queue has a descriptor of its own, cloned from the connection's, and
//! waits for it in an epoll set of its own with EPOLLEXCLUSIVE, so that a
//! request wakes one queue and not all of them.

use std::fs::OpenOptions;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::uio::writev;
use nix::unistd::{read, write};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Result};
use crate::forward::Port;
use crate::jobring::JobRing;
use crate::protocol::{
    Agreement, InHeader, InitReply, NotifyInvalInodeOut, NotifyRetrieveOut, NotifyStoreOut,
    OPERATION_SIZE, Offer, OutHeader, ROOT_ID, negotiate, notify, opcode, operation_size,
};
use crate::ring::Ring;
use crate::seat::SeatedThread;
use crate::slot::{Reply, Slot};
use crate::transport::{Fetched, Transport, Unbound};
use crate::unforked::FuseDevice;
use crate::wakeups::Wakeups;

/// The unit of the kernel's page cache.
const PAGE: u64 = 4096;
/// How many requests a queue can have in flight. Slots are made as they are
/// needed: a driver that answers at once uses one.
pub(crate) const SLOTS: usize = 64;

/// The kernel refuses to read into less than this many bytes.
const MIN_READ_BUFFER: usize = 8192;
/// As much of the operation as is read in front of the payload: just a
/// WRITE's, so that its data arrive where they are wanted.
const OPERATION_READ: usize = 40;
/// What is received in front of the payload.
const FRONT: usize = size_of::<InHeader>() + OPERATION_READ;

mod ioctl {
    nix::ioctl_read!(
        /// `FUSE_DEV_IOC_CLONE`: ties a fresh /dev/fuse to a connection.
        fuse_dev_clone, 229, 0, u32
    );
}

/// A further descriptor of the connection that `device` belongs to. Fails
/// where /dev/fuse cannot be opened; then `device` itself is to be shared.
pub(crate) fn clone_device(device: BorrowedFd<'_>) -> std::io::Result<OwnedFd> {
    let clone = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse")?;
    let mut original = device.as_raw_fd() as u32;
    // SAFETY: the ioctl reads one u32 through the pointer, which is to a live
    // local, and keeps nothing. A kernel that does not know it says so.
    unsafe { ioctl::fuse_dev_clone(clone.as_raw_fd(), &mut original) }?;
    Ok(clone.into())
}

/// An INIT that has been read and is to be answered. Until that has happened
/// the kernel keeps everybody else waiting.
pub(crate) struct Init {
    unique: u64,
    body: Vec<u8>,
}

impl Init {
    /// Reads it, and finds out what comes of `offer`. Waits at most `timeout`.
    pub(crate) fn receive(
        device: BorrowedFd<'_>,
        offer: &Offer,
        timeout: Duration,
    ) -> Result<(Self, Agreement)> {
        let deadline = Instant::now() + timeout;
        loop {
            let init = receive_init(device, deadline)?;
            let reply = negotiate(&init.body, offer).map_err(|reason| {
                if let Err(errno) = init.refuse(device) {
                    log::debug!("INIT could not be refused: {errno}");
                }
                Error::new(libc::EPROTO, reason)
            })?;
            match reply.agreement {
                Some(agreement) => return Ok((init, agreement)),
                // It will try again with our version.
                None => init.reply(device, &reply)?,
            }
        }
    }

    /// Answers it with `offer`.
    pub(crate) fn answer(&self, device: BorrowedFd<'_>, offer: &Offer) -> Result<()> {
        let reply = negotiate(&self.body, offer);
        let reply = reply.map_err(|reason| Error::new(libc::EPROTO, reason))?;
        self.reply(device, &reply)
    }

    fn reply(&self, device: BorrowedFd<'_>, reply: &InitReply) -> Result<()> {
        let out = OutHeader::new(self.unique, 0, reply.bytes().len());
        let parts = [IoSlice::new(out.as_bytes()), IoSlice::new(reply.bytes())];
        writev(device, &parts)
            .map(drop)
            .map_err(|e| failed("cannot answer INIT", e))
    }

    fn refuse(&self, device: BorrowedFd<'_>) -> nix::Result<usize> {
        let out = OutHeader::new(self.unique, -libc::EPROTO, 0);
        writev(device, &[IoSlice::new(out.as_bytes())])
    }
}

fn receive_init(device: BorrowedFd<'_>, deadline: Instant) -> Result<Init> {
    let mut buffer = vec![0; 128 << 10];
    let head = size_of::<InHeader>();
    let len = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(device, PollFlags::POLLIN)];
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(0) if left.is_zero() => {
                return Err(Error::new(
                    libc::ETIMEDOUT,
                    "the FUSE descriptor brings no INIT; is it mounted, and not yet served?",
                ));
            }
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(failed("cannot wait for INIT", e)),
        }
        match read(device, &mut buffer) {
            Ok(0) => {
                return Err(Error::new(
                    libc::ENOTCONN,
                    "the FUSE descriptor was closed at its other end before it brought INIT",
                ));
            }
            Ok(len) => break len,
            Err(Errno::EINTR | Errno::EAGAIN) => continue,
            Err(e) => return Err(failed("cannot read INIT from the FUSE descriptor", e)),
        }
    };
    let header = parse_header(&buffer[..len]);
    match header {
        Some(header) if header.opcode == opcode::INIT => Ok(Init {
            unique: header.unique,
            body: buffer[head..len].to_vec(),
        }),
        _ => Err(Error::new(
            libc::EPROTO,
            "the FUSE descriptor's first message is not INIT; it was served before",
        )),
    }
}

/// The header, if the message is as long as it says.
fn parse_header(message: &[u8]) -> Option<InHeader> {
    let (header, _) = InHeader::read_from_prefix(message).ok()?;
    (header.len as usize == message.len()).then_some(header)
}

fn failed(what: &str, errno: Errno) -> Error {
    Error::new(errno as i32, format!("{what}: {}", errno.desc()))
}

/// Tells the kernel something that it did not ask for.
fn notify(device: BorrowedFd<'_>, code: i32, body: &[u8]) -> nix::Result<()> {
    let out = OutHeader::new(0, code, body.len());
    let parts = [IoSlice::new(out.as_bytes()), IoSlice::new(body)];
    writev(device, &parts).map(drop)
}

/// Tells the kernel, which believes in the length `told`, that the file is
/// `length` bytes long by the host's doing: its attributes are asked for anew,
/// and its idea of the end moves up at once, which asynchronous reads and
/// appends go by. `served`: requests are being served, by other threads, so
/// that this may wait for some. Returns whether the kernel believes in `length`
/// now.
pub(crate) fn notify_resized(device: BorrowedFd<'_>, told: u64, length: u64, served: bool) -> bool {
    let moves = length > told && (served || is_in_unknown_page(told, length));
    let moved = if moves {
        move_end(device, told, length)
    } else {
        Ok(())
    };
    // A negative offset: the attributes alone, no page of the cache.
    match moved.and_then(|()| invalidate(device, -1, 0)) {
        Ok(()) => moves,
        // Nobody has looked at the file yet, so there is nothing to tell.
        Err(Errno::ENOENT) => false,
        Err(errno) => {
            log::debug!("the kernel was not told of the new length: {errno}");
            false
        }
    }
}

/// Whether the last byte lies in a page of which the kernel can have nothing,
/// because it begins past what the kernel believes in.
fn is_in_unknown_page(told: u64, length: u64) -> bool {
    (length - 1) / PAGE >= told.div_ceil(PAGE)
}

/// Stores a byte at the new end in the page cache, for only that moves the
/// kernel's idea of the end; in such a way that nobody sees the byte.
fn move_end(device: BorrowedFd<'_>, told: u64, length: u64) -> nix::Result<()> {
    let last = length - 1;
    let is_known = !is_in_unknown_page(told, length);
    if is_known {
        // Writes back what a client may have changed in it, and waits for that.
        invalidate(device, last as i64, 1)?;
    }
    store_zero(device, last)?;
    // A page stored from its start to the end of the file counts as all there.
    if is_known || last.is_multiple_of(PAGE) {
        invalidate(device, last as i64, 1)?;
    }
    Ok(())
}

fn invalidate(device: BorrowedFd<'_>, offset: i64, bytes: i64) -> nix::Result<()> {
    let range = NotifyInvalInodeOut {
        ino: ROOT_ID,
        off: offset,
        len: bytes,
    };
    notify(device, notify::INVAL_INODE, range.as_bytes())
}

/// Stores a byte at `offset`: with none to store the end would not move.
fn store_zero(device: BorrowedFd<'_>, offset: u64) -> nix::Result<()> {
    let store = NotifyStoreOut {
        nodeid: ROOT_ID,
        offset,
        size: 1,
        padding: 0,
    };
    notify(device, notify::STORE, &[store.as_bytes(), &[0]].concat())
}

/// From here on numbers are free for requests that the kernel is asked for; it
/// gives them to no other.
pub(crate) const ASKED_FOR: u64 = 1 << 62;

/// Has the kernel send a request that nobody waits for and that does not count
/// as a background request: NOTIFY_REPLY, with none of the file's bytes, and
/// with the number `unique`, which no other request may have meanwhile.
pub(crate) fn ask_for_a_request(device: BorrowedFd<'_>, unique: u64) -> nix::Result<()> {
    let retrieve = NotifyRetrieveOut {
        unique,
        nodeid: ROOT_ID,
        offset: 0,
        size: 0,
        padding: 0,
    };
    notify(device, notify::RETRIEVE, retrieve.as_bytes())
}

/// One queue's connection to /dev/fuse.
pub(crate) struct Legacy {
    device: Arc<FuseDevice>,
    epoll: Arc<Epoll>,
    wakeups: Arc<Wakeups>,
    jobs: JobRing,
    /// What was found while the queue waited awake.
    found: Option<Fetched>,
    /// Whether its thread may run on more than one CPU.
    has_choice: bool,
    #[expect(clippy::vec_box, reason = "slots travel as boxes")]
    free: Vec<Box<Slot>>,
    made: usize,
    capacity: usize,
    /// Whether the epoll set has the device.
    watches: bool,
}

const EVENT_DEVICE: u64 = 0;
const EVENT_WAKEUP: u64 = 1;
const EVENT_JOB: u64 = 2;

impl Legacy {
    /// `device` is made non-blocking. It is not watched before requests are
    /// [wanted](Transport::want_requests).
    pub(crate) fn new(
        device: Arc<FuseDevice>,
        wakeups: Arc<Wakeups>,
        max_request: usize,
    ) -> nix::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&*device, FcntlArg::F_GETFL)?);
        fcntl(&*device, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(
            wakeups.descriptor(),
            EpollEvent::new(EpollFlags::EPOLLIN, EVENT_WAKEUP),
        )?;
        Ok(Self {
            device,
            epoll: Arc::new(epoll),
            wakeups,
            jobs: JobRing::Unmade,
            found: None,
            has_choice: SeatedThread::new().has_choice(),
            free: Vec::with_capacity(SLOTS),
            made: 0,
            capacity: max_request.max(MIN_READ_BUFFER),
            watches: false,
        })
    }

    /// Without what belongs to its thread.
    pub(crate) fn unbound(mut self: Box<Self>) -> Box<Self> {
        // The next thread makes a ring of its own.
        self.jobs = JobRing::Unmade;
        self
    }

    /// What becomes readable when the queue has something to do.
    pub(crate) fn descriptor(&self) -> Arc<Epoll> {
        self.epoll.clone()
    }

    /// Its descriptor of /dev/fuse.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whether the connection has ended.
    pub(crate) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.device.as_fd(), PollFlags::empty())];
        let ended = poll(&mut fds, PollTimeout::ZERO);
        ended.is_ok_and(|n| n > 0)
    }

    fn free_slot(&mut self) -> Result<Option<Box<Slot>>> {
        if let Some(slot) = self.free.pop() {
            return Ok(Some(slot));
        }
        if self.made == SLOTS {
            return Ok(None);
        }
        let slot =
            Slot::new(self.capacity).map_err(|e| Error::from_io("no memory for a request", &e))?;
        self.made += 1;
        Ok(Some(Box::new(slot)))
    }

    /// Takes a request from /dev/fuse, if there is one.
    fn receive(&mut self) -> Fetched {
        let mut slot = match self.free_slot() {
            Ok(Some(slot)) => slot,
            Ok(None) => return Fetched::Nothing,
            Err(error) => return Fetched::Broken(error),
        };
        let fetched = loop {
            match read(&*self.device, slot.receive(FRONT)) {
                // Not a kernel's doing: a stand-in for it has closed its end.
                Ok(0) => break Fetched::Gone,
                Ok(len) => {
                    if let Ok((header, _)) = InHeader::read_from_prefix(slot.receive(FRONT)) {
                        slot.header = header;
                    }
                    if len < size_of::<InHeader>() || slot.header.len as usize != len {
                        break Fetched::Broken(self.distrust(&mut slot, len));
                    }
                    if arrange(&mut slot, len) {
                        return Fetched::Request(slot);
                    }
                    let capacity = slot.capacity();
                    slot.arrived(0, capacity);
                    if let Err(error) = self.send(&mut slot, libc::EINVAL, 0) {
                        break Fetched::Broken(error);
                    }
                }
                // Interrupted; or the request was aborted, or could not be
                // copied and has been ended by the kernel: the next one.
                Err(Errno::EINTR | Errno::ENOENT | Errno::EIO) => {
                    let capacity = slot.capacity();
                    slot.arrived(0, capacity);
                }
                Err(Errno::EAGAIN) => break Fetched::Nothing,
                Err(Errno::ENODEV | Errno::ECONNABORTED | Errno::ENOTCONN) => break Fetched::Gone,
                Err(e) => break Fetched::Broken(failed("cannot read from /dev/fuse", e)),
            }
        };
        self.free.push(slot);
        fetched
    }

    /// Sends an error, or success with `len` bytes of the payload.
    fn send(&self, slot: &mut Slot, errno: i32, len: usize) -> Result<()> {
        let out = OutHeader::new(slot.header.unique, -errno, len);
        let message = slot.outgoing(out.as_bytes(), len);
        loop {
            return match write(&*self.device, message) {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                // The request was aborted, or the connection is gone: the
                // next read will tell.
                Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => Ok(()),
                // Without an answer the client would wait for ever, and only
                // ending the connection lets it go.
                Err(e) => Err(failed("cannot answer a request", e)),
            };
        }
    }

    /// Answers a message that cannot be trusted, if it shows its number.
    fn distrust(&self, slot: &mut Slot, len: usize) -> Error {
        let said = if len < size_of::<InHeader>() {
            0
        } else {
            if let Err(error) = self.send(slot, libc::EIO, 0) {
                log::debug!("{error}");
            }
            slot.header.len
        };
        Error::new(
            libc::EPROTO,
            format!("a FUSE message of {len} bytes says it has {said}"),
        )
    }
}

/// Puts a message of `len` bytes, just received, into the slot's shape:
/// header, operation, and the rest in the payload. False if that leaves more
/// than the payload can hold.
fn arrange(slot: &mut Slot, len: usize) -> bool {
    let mut front = [0; FRONT];
    front.copy_from_slice(&slot.receive(FRONT)[..FRONT]);
    let arguments = len - size_of::<InHeader>();
    let operation = operation_size(slot.header.opcode).min(arguments);
    let in_front = arguments.min(OPERATION_READ);
    let in_payload = arguments - in_front;
    let rest = arguments - operation;
    if rest > slot.capacity() {
        return false;
    }
    let before = &front[size_of::<InHeader>()..][..in_front];
    let kept = operation.min(in_front);
    slot.operation[..kept].copy_from_slice(&before[..kept]);
    if operation > in_front {
        let missing = operation - in_front;
        let mut tail = [0; OPERATION_SIZE];
        let payload = slot.payload_mut();
        tail[..missing].copy_from_slice(&payload[..missing]);
        payload.copy_within(missing..in_payload, 0);
        slot.operation[in_front..operation].copy_from_slice(&tail[..missing]);
    } else if operation < in_front {
        let surplus = &before[operation..];
        let payload = slot.payload_mut();
        payload.copy_within(..in_payload, surplus.len());
        payload[..surplus.len()].copy_from_slice(surplus);
    }
    slot.arrived(rest, rest.max(in_payload));
    true
}

impl Transport for Legacy {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn fetch(&mut self) -> Fetched {
        self.found.take().unwrap_or_else(|| self.receive())
    }

    fn may_poll(&self) -> bool {
        self.watches && self.has_choice
    }

    fn is_ready(&mut self) -> Result<bool> {
        if self.found.is_none() {
            self.found = match self.receive() {
                Fetched::Nothing => None,
                found => Some(found),
            };
        }
        Ok(self.found.is_some() || self.jobs.has_news())
    }

    fn commit(&mut self, mut slot: Box<Slot>) -> Result<()> {
        let sent = match slot.reply {
            Reply::Nothing => Ok(()),
            Reply::Error(errno) => self.send(&mut slot, errno, 0),
            Reply::Payload(len) => self.send(&mut slot, 0, len),
        };
        self.free.push(slot);
        sent
    }

    fn flush(&mut self) -> Result<()> {
        // write(2) has sent it.
        Ok(())
    }

    fn carry(&mut self, port: &Port) -> Result<()> {
        if let Some(ring) = self.jobs.make(|| Ring::for_epoll(SLOTS)) {
            let watch = EpollEvent::new(EpollFlags::EPOLLIN, EVENT_JOB);
            let watched = self.epoll.add(ring, watch);
            watched.map_err(|e| failed("cannot watch the io_uring for forwarded requests", e))?;
        }
        self.jobs.carry(port)
    }

    fn want_requests(&mut self, wanted: bool) -> Result<()> {
        if wanted == self.watches {
            return Ok(());
        }
        let result = if wanted {
            let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
            let event = EpollEvent::new(events, EVENT_DEVICE);
            self.epoll.add(self.device.as_fd(), event)
        } else {
            self.epoll.delete(self.device.as_fd())
        };
        result.map_err(|e| failed("cannot watch /dev/fuse", e))?;
        self.watches = wanted;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        if self.watches && self.found.is_some() {
            return Ok(());
        }
        let mut events = [EpollEvent::empty(); 3];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(n) => {
                if events[..n].iter().any(|e| e.data() == EVENT_WAKEUP) {
                    self.wakeups.clear();
                }
                Ok(())
            }
            Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(failed("cannot wait for requests", e)),
        }
    }

    fn has_news(&mut self, wanted: bool) -> bool {
        (wanted && self.found.is_some()) || self.jobs.has_news()
    }

    fn is_overslept(&mut self, wanted: bool) -> Result<bool> {
        // The descriptor shows everything else as long as it is there.
        Ok(wanted && self.found.is_some())
    }

    fn unbind(self: Box<Self>) -> Box<dyn Unbound> {
        self.unbound()
    }

    fn fall_back(self: Box<Self>) -> Box<dyn Transport> {
        self
    }
}

impl Unbound for Legacy {
    fn bind(self: Box<Self>) -> std::result::Result<Box<dyn Transport>, (Box<dyn Unbound>, Error)> {
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{SetattrIn, WriteIn};

    #[test]
    fn a_page_is_unknown_if_it_begins_past_the_end() {
        for (told, length) in [(4096, 8192), (0, 1), (0, 100), (4096, 4097), (100, 5000)] {
            assert!(is_in_unknown_page(told, length), "{told} {length}");
        }
        for (told, length) in [(100, 4096), (100, 101), (8192, 4096), (8192, 8192)] {
            assert!(!is_in_unknown_page(told, length), "{told} {length}");
        }
    }

    /// A slot into which `message` was read as from /dev/fuse.
    fn read_into_slot(opcode: u32, body: &[u8]) -> (Slot, bool) {
        let mut slot = Slot::new(MIN_READ_BUFFER).unwrap();
        let len = size_of::<InHeader>() + body.len();
        let header = InHeader {
            len: len as u32,
            opcode,
            nodeid: ROOT_ID,
            ..InHeader::default()
        };
        slot.header = header;
        let message = [header.as_bytes(), body].concat();
        slot.receive(FRONT)[..len].copy_from_slice(&message);
        let fits = arrange(&mut slot, len);
        (slot, fits)
    }

    #[test]
    fn every_message_takes_the_rings_shape() {
        let write = WriteIn {
            size: 3,
            ..WriteIn::default()
        };
        let body = [write.as_bytes(), b"abc"].concat();
        let (slot, _) = read_into_slot(opcode::WRITE, &body);
        assert_eq!(slot.data(), b"abc");

        let setattr = SetattrIn {
            valid: 8,
            size: 99,
            gid: 7,
            ..SetattrIn::default()
        };
        let (slot, _) = read_into_slot(opcode::SETATTR, setattr.as_bytes());
        assert_eq!(&slot.operation[..88], setattr.as_bytes());
        assert_eq!(slot.data(), b"");

        let name = [b'n'; 60];
        let body = [&[1, 2, 3, 4, 5, 6, 7, 8][..], &name].concat();
        let (slot, _) = read_into_slot(opcode::GETXATTR, &body);
        assert_eq!(slot.operation[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(slot.data(), name);

        let (slot, _) = read_into_slot(opcode::LOOKUP, b"x\0");
        assert_eq!(slot.data(), b"x\0");
        let (slot, _) = read_into_slot(opcode::STATFS, b"");
        assert_eq!(slot.data(), b"");
    }

    #[test]
    fn a_message_with_more_than_the_payload_holds_is_known() {
        let body = vec![0; OPERATION_READ + MIN_READ_BUFFER];
        assert!(read_into_slot(opcode::WRITE, &body).1);
        assert!(!read_into_slot(opcode::LOOKUP, &body).1);
    }
}

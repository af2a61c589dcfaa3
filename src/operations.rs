//! What each FUSE operation means for a block device.
//!
//! The only place with the semantics of the exported file. It runs over any
//! transport and any driver; one task for each slot serves one request after
//! the other, and waits only for the driver or for a lock that another
//! request holds while it waits for the driver.

use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use crate::control::{Owned, panic_message};
use crate::driver::{BlockDriver, Extent, Io};
use crate::error::errno_of;
use crate::file::{Changes, File, NewTime};
use crate::forward::Port;
use crate::protocol::{
    AttrOut, LseekOut, MAX_LENGTH, OpenOut, SetattrIn, StatfsOut, WriteOut, open_flag, set,
};
use crate::request::{Errno, Operation, decode};
use crate::slot::{Reply, Slot};
use crate::stats::{AllStats, OpKind};
use crate::task::Mailbox;

/// How long the kernel may keep attributes, in seconds. Changes through the
/// mount and resizes by the host invalidate them at once.
const ATTR_VALID: u64 = 1;
/// After how many extents a search lets other requests run.
const EXTENTS_AT_ONCE: u32 = 64;

/// What `serve` works on: the device of one export, as one queue sees it.
pub(crate) struct Device<D> {
    pub(crate) driver: Arc<Owned<D>>,
    pub(crate) file: Arc<File>,
    pub(crate) stats: Arc<AllStats>,
    pub(crate) queue: usize,
    /// Where requests leave what is to be done with other descriptors.
    pub(crate) port: Rc<Port>,
}

/// A task: serves the requests that arrive in the mailbox, for ever. `index` is
/// its number within its queue.
pub(crate) async fn serve<D: BlockDriver>(
    device: Rc<Device<D>>,
    index: usize,
    mailbox: Rc<Mailbox>,
) {
    loop {
        let mut slot = mailbox.receive().await;
        let stats = device.stats.queue(device.queue);
        stats.begun();
        let start = Instant::now();
        let request = Request {
            device: &device,
            io: Io::new(device.queue, index, &device.port, slot.payload()),
        };
        let decoded = decode(
            &slot.header,
            &slot.operation,
            slot.payload_len(),
            slot.capacity(),
        );
        let kind = decoded.as_ref().map_or(OpKind::Other, kind_of);
        let outcome = match decoded {
            Ok(operation) => caught(request.handle(operation, &mut slot)).await,
            Err(errno) => Ok(Err(errno)),
        };
        request.io.settled().await;
        let (outcome, panic) = match outcome {
            Ok(outcome) => (outcome, None),
            Err(message) => (Err(libc::EIO), Some(message)),
        };
        if let Err(errno) = outcome {
            slot.reply = Reply::Error(errno);
        }
        let took = start.elapsed();
        stats.record(kind, outcome, took);
        mailbox.answer(slot, panic, took);
    }
}

/// Polls `future` to its end; a panic in it becomes its message.
async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        // Unwind safety: after a panic the future is dropped unpolled, and the
        // export halts, so nobody relies on state the panic left half-done.
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(payload) => Poll::Ready(Err(panic_message(&*payload))),
        }
    })
    .await
}

fn kind_of(operation: &Operation) -> OpKind {
    match operation {
        Operation::Read { .. } => OpKind::Read,
        Operation::Write { .. } => OpKind::Write,
        Operation::Flush { .. } | Operation::Fsync => OpKind::Flush,
        Operation::Fallocate { .. } => OpKind::Allocate,
        _ => OpKind::Other,
    }
}

/// The errno to answer with. ENOSYS would make the kernel stop asking, and
/// pretend success where it must not (fsync); values that the protocol does
/// not carry would be refused and leave the client waiting.
fn answerable(error: &io::Error) -> Errno {
    match errno_of(error) {
        libc::ENOSYS => libc::EOPNOTSUPP,
        errno @ 1..512 => errno,
        _ => libc::EIO,
    }
}

/// Whether the driver asks for the engine's fallback.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(errno_of(error), libc::EOPNOTSUPP | libc::ENOSYS)
}

/// Bytes of data moved, or the errno to answer with.
type Outcome = Result<u64, Errno>;

struct Request<'a, D> {
    device: &'a Device<D>,
    io: Io<'a>,
}

impl<D: BlockDriver> Request<'_, D> {
    fn driver(&self) -> &D {
        &self.device.driver.driver
    }

    fn file(&self) -> &File {
        &self.device.file
    }

    async fn handle(&self, operation: Operation, slot: &mut Slot) -> Outcome {
        slot.reply = Reply::Payload(0);
        match operation {
            Operation::Read { offset, size } => self.read(slot, offset, size).await,
            Operation::Write {
                offset,
                size,
                durable,
            } => self.write(slot, offset, size, durable).await,
            Operation::Getattr => self.attributes(slot),
            Operation::Setattr(setattr) => self.setattr(slot, &setattr).await,
            Operation::Open { flags } => self.open(slot, flags).await,
            Operation::Release { fh } => {
                self.file().released(fh == FH_WRITER);
                Ok(0)
            }
            // A descriptor that could not write has nothing to make durable.
            Operation::Flush { fh } if fh == FH_READER => Ok(0),
            Operation::Flush { .. } | Operation::Fsync => self.flush().await,
            Operation::Fallocate {
                offset,
                length,
                mode,
            } => self.fallocate(slot, offset, length, mode).await,
            Operation::Lseek { offset, whence } => self.lseek(slot, offset, whence).await,
            Operation::Statfs => self.statfs(slot),
            Operation::Destroy => Ok(0),
            Operation::Unanswered => {
                slot.reply = Reply::Nothing;
                Ok(0)
            }
        }
    }

    async fn read(&self, slot: &mut Slot, offset: u64, size: usize) -> Outcome {
        let inside = self.begin_use().await;
        let rest = self.file().length().saturating_sub(offset);
        let len = rest.min(size as u64) as usize;
        if len == 0 {
            return Ok(0);
        }
        let mut buf = slot.read_buf(len);
        let result = self.driver().read(&self.io, &mut buf, offset).await;
        drop(inside);
        result.map_err(|e| answerable(&e))?;
        if !buf.is_filled() {
            return Err(libc::EIO);
        }
        slot.reply = Reply::Payload(len);
        Ok(len as u64)
    }

    async fn write(&self, slot: &mut Slot, offset: u64, size: usize, durable: bool) -> Outcome {
        self.check_writable()?;
        let end = offset + size as u64;
        let begun = self.begin_write(offset, end).await;
        let (inside, len) = begun.inspect_err(|_| self.file().write_failed(end))?;
        let data = &slot.data()[..len];
        let result = self.driver().write(&self.io, data, offset).await;
        // The answer takes the place of the data.
        self.io.settled().await;
        if result.is_ok() {
            self.file().written(offset + len as u64);
        }
        drop(inside);
        if let Err(e) = result {
            self.take_back_room().await;
            self.file().write_failed(end);
            return Err(answerable(&e));
        }
        self.file().touch(self.device.queue);
        if durable {
            self.flush().await?;
        }
        slot.answer_with(&WriteOut {
            size: len as u32,
            padding: 0,
        });
        Ok(len as u64)
    }

    /// Makes room for a write up to `end`, as far as the file may grow. Returns
    /// how many bytes of it may be written, with the length held from shrinking
    /// meanwhile.
    async fn begin_write(&self, offset: u64, end: u64) -> Result<(Use<'_>, usize), Errno> {
        let file = self.file();
        loop {
            if file.policy.growable && end > file.length() {
                self.grow(end).await?;
            }
            let inside = self.begin_use().await;
            let length = file.length();
            if end <= length {
                return Ok((inside, (end - offset) as usize));
            }
            if !file.policy.growable {
                return match length.saturating_sub(offset) {
                    0 => Err(libc::ENOSPC),
                    rest => Ok((inside, rest as usize)),
                };
            }
            // Somebody has shrunk the file in between: grow it again.
        }
    }

    /// Makes the file at least `end` bytes long; never shrinks it.
    async fn grow(&self, end: u64) -> Result<(), Errno> {
        let _resizing = self.file().resizing.lock().await;
        if end <= self.file().length() || end <= self.present_length()? {
            return Ok(());
        }
        let result = self.driver().truncate(&self.io, end).await;
        result.map_err(|e| answerable(&e))?;
        self.file().make_room(end);
        Ok(())
    }

    /// The length, after a look at the driver: the host may have made the
    /// device longer and not said so yet, and to truncate it to less than that
    /// would cut its bytes off. The caller holds `resizing`.
    fn present_length(&self) -> Result<u64, Errno> {
        let present = self.driver().length().map_err(|e| answerable(&e))?;
        if present > self.file().length() && present <= MAX_LENGTH {
            self.file().set_length(present);
        }
        Ok(self.file().length())
    }

    /// After a write has failed: gives back what room was made for writes and
    /// none has filled, so that an append which failed leaves no zeroes. The
    /// kernel does that by itself, but only for asynchronous writes.
    async fn take_back_room(&self) {
        let file = self.file();
        if file.reached() >= file.length() {
            return;
        }
        let _resizing = file.resizing.lock().await;
        let _alone = Alone::begin(file).await;
        let reached = file.reached();
        // What the host has added meanwhile is not ours to take back.
        let is_ours = self.driver().length().is_ok_and(|l| l == file.length());
        if reached >= file.length() || !is_ours {
            return;
        }
        match self.driver().truncate(&self.io, reached).await {
            Ok(()) => file.set_length(reached),
            Err(e) => log::error!(
                "cannot take back the growth to {} bytes: {e}",
                file.length()
            ),
        }
    }

    /// Tells the driver its new length. The caller holds `resizing`.
    async fn set_length(&self, length: u64) -> Result<(), Errno> {
        let result = self.driver().truncate(&self.io, length).await;
        result.map_err(|e| answerable(&e))?;
        self.file().set_length(length);
        self.file().touch(self.device.queue);
        Ok(())
    }

    /// Sets the length exactly, unless that is a false rollback.
    async fn truncate(&self, length: u64, may_be_rollback: bool) -> Result<(), Errno> {
        let _resizing = self.file().resizing.lock().await;
        let present = self.present_length()?;
        if may_be_rollback && self.file().is_false_rollback(length) {
            return Ok(());
        }
        if length == present {
            return Ok(());
        }
        let _alone = if length < present {
            // A write that is still under way past the new end would leave
            // its bytes there, to reappear when the file grows again; a read
            // would ask the driver for what it no longer has.
            Some(Alone::begin(self.file()).await)
        } else {
            None
        };
        self.set_length(length).await
    }

    async fn flush(&self) -> Outcome {
        if self.file().policy.writable {
            let result = self.driver().flush(&self.io).await;
            // Whatever the reason is, what was to be durable is not.
            result.map_err(|e| match answerable(&e) {
                libc::EOPNOTSUPP => libc::EIO,
                errno => errno,
            })?;
        }
        Ok(0)
    }

    fn attributes(&self, slot: &mut Slot) -> Outcome {
        let is_public = self.file().is_public();
        // During the start the driver is left alone: its owner may be unable to
        // answer for it then.
        let allocated = if is_public { self.allocated() } else { None };
        let allocated = allocated.unwrap_or_else(|| self.file().length());
        let attr = self.file().attributes(allocated);
        slot.answer_with(&AttrOut {
            attr_valid: if is_public { ATTR_VALID } else { 0 },
            attr,
            ..AttrOut::default()
        });
        Ok(0)
    }

    fn allocated(&self) -> Option<u64> {
        // Not worth failing a stat, or a truncation that has been done.
        self.driver().allocated_size().unwrap_or_else(|e| {
            log::warn!("the driver cannot say how much is allocated: {e}");
            None
        })
    }

    async fn setattr(&self, slot: &mut Slot, setattr: &SetattrIn) -> Outcome {
        self.check_writable()?;
        let valid = |bit| setattr.valid & bit != 0;
        let changes = Changes {
            mode: valid(set::MODE).then_some(setattr.mode),
            uid: valid(set::UID).then_some(setattr.uid),
            gid: valid(set::GID).then_some(setattr.gid),
            atime: valid(set::ATIME).then(|| {
                let (seconds, nanos) = (setattr.atime as i64, setattr.atimensec);
                new_time(valid(set::ATIME_NOW), seconds, nanos)
            }),
            mtime: valid(set::MTIME).then(|| {
                let (seconds, nanos) = (setattr.mtime as i64, setattr.mtimensec);
                new_time(valid(set::MTIME_NOW), seconds, nanos)
            }),
        };
        // Attributes first: they are refused before anything has happened.
        let others = set::MODE | set::UID | set::GID | set::ATIME | set::MTIME | set::CTIME;
        if valid(others) {
            self.file().change(&changes)?;
        }
        if valid(set::SIZE) {
            self.setattr_size(setattr).await?;
        }
        self.attributes(slot)
    }

    async fn setattr_size(&self, setattr: &SetattrIn) -> Result<(), Errno> {
        let of_open_file = setattr.valid & set::FH != 0;
        // An open with O_TRUNC, which leaves a file of fixed size alone. It
        // cannot be told from truncate(2) of the path to nothing.
        if setattr.size == 0 && !of_open_file && !self.file().policy.growable {
            return Ok(());
        }
        self.truncate(setattr.size, of_open_file).await
    }

    async fn open(&self, slot: &mut Slot, flags: i32) -> Outcome {
        const DIRECT: u32 = open_flag::DIRECT_IO | open_flag::PARALLEL_DIRECT_WRITES;
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let empties = flags & libc::O_TRUNC != 0;
        if writes || empties {
            self.check_writable()?;
        }
        // Comes here only if it was asked for in INIT, for a growable file.
        if empties && self.file().policy.growable {
            self.truncate(0, false).await?;
            self.file().tell(0);
        }
        self.file().opened(writes);
        let (flags, backing_id) = match self.file().backing() {
            Some(id) => (open_flag::PASSTHROUGH, id),
            None if self.file().keeps_cache() => (DIRECT | open_flag::KEEP_CACHE, 0),
            None => (DIRECT, 0),
        };
        // A reader's close needs no answer, which could not come if it is
        // this very process that exits with the file open.
        let (fh, open_flags) = match writes {
            true => (FH_WRITER, flags),
            false => (FH_READER, flags | open_flag::NOFLUSH),
        };
        slot.answer_with(&OpenOut {
            fh,
            open_flags,
            backing_id,
        });
        Ok(0)
    }

    async fn fallocate(&self, slot: &mut Slot, offset: u64, length: u64, mode: i32) -> Outcome {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = ZERO | libc::FALLOC_FL_KEEP_SIZE;
        self.check_writable()?;
        let end = offset + length;
        match mode {
            // Inside the file, space that a hole lacks is allocated when it
            // is written: to zero it now could race with that write.
            0 => self.allocate(slot, offset, end).await?,
            PUNCH => self.punch(slot, offset, end).await?,
            ZERO | ZERO_KEEP => {
                self.zero(slot, offset, end, false).await?;
                if mode == ZERO {
                    self.allocate(slot, offset, end).await?;
                }
            }
            _ => return Err(libc::EOPNOTSUPP),
        }
        Ok(length)
    }

    /// Grows the file to `end`, if that is more, and takes the space from
    /// `offset` or the old end on. If there is no space the length stays.
    async fn allocate(&self, slot: &mut Slot, offset: u64, end: u64) -> Result<(), Errno> {
        let _resizing = self.file().resizing.lock().await;
        if end <= self.file().length() || end <= self.present_length()? {
            return Ok(());
        }
        let old = self.file().length();
        let result = self.driver().truncate(&self.io, end).await;
        result.map_err(|e| answerable(&e))?;
        if let Err(errno) = self.zero_now(slot, offset.max(old), end, false).await {
            // Nobody has seen the new length yet, so nothing is cut off; but
            // the driver may rely on nothing being written meanwhile.
            let _alone = Alone::begin(self.file()).await;
            // Nor what the host has added meanwhile.
            if self.driver().length().is_ok_and(|l| l == end)
                && let Err(e) = self.driver().truncate(&self.io, old).await
            {
                log::error!("cannot take back the growth to {end} bytes: {e}");
                self.file().set_length(end);
            }
            return Err(errno);
        }
        self.file().set_length(end);
        self.file().tell_reached(end);
        self.file().touch(self.device.queue);
        Ok(())
    }

    /// Punches a hole; what lies past the end of the file is ignored.
    async fn punch(&self, slot: &mut Slot, offset: u64, end: u64) -> Result<(), Errno> {
        let inside = self.begin_use().await;
        let end = end.min(self.file().length());
        if offset >= end {
            return Ok(());
        }
        let result = self.driver().discard(&self.io, offset, end - offset).await;
        match result {
            Ok(()) => self.file().touch(self.device.queue),
            Err(e) if is_unsupported(&e) => {
                drop(inside);
                self.zero(slot, offset, end, true).await?;
            }
            Err(e) => return Err(answerable(&e)),
        }
        Ok(())
    }

    /// Zeroes what of `offset..end` lies inside the file.
    async fn zero(
        &self,
        slot: &mut Slot,
        offset: u64,
        end: u64,
        may_unmap: bool,
    ) -> Result<(), Errno> {
        let _inside = self.begin_use().await;
        let end = end.min(self.file().length());
        if offset >= end {
            return Ok(());
        }
        self.zero_now(slot, offset, end, may_unmap).await?;
        self.file().touch(self.device.queue);
        Ok(())
    }

    /// Zeroes `offset..end`, by writing where the driver knows nothing better.
    async fn zero_now(
        &self,
        slot: &mut Slot,
        offset: u64,
        end: u64,
        may_unmap: bool,
    ) -> Result<(), Errno> {
        let driver = self.driver();
        match driver
            .write_zeroes(&self.io, offset, end - offset, may_unmap)
            .await
        {
            Err(e) if is_unsupported(&e) => {}
            other => return other.map_err(|e| answerable(&e)),
        }
        let zeroes = slot.zeroes();
        let mut at = offset;
        while at < end {
            let len = (end - at).min(zeroes.len() as u64);
            let data = &zeroes[..len as usize];
            let result = driver.write(&self.io, data, at).await;
            result.map_err(|e| answerable(&e))?;
            at += len;
            yield_now().await;
        }
        Ok(())
    }

    async fn lseek(&self, slot: &mut Slot, offset: u64, whence: i32) -> Outcome {
        let wants_hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return Err(libc::EINVAL),
        };
        let _inside = self.begin_use().await;
        let length = self.file().length();
        if offset >= length {
            return Err(libc::ENXIO);
        }
        let mut at = offset;
        let mut extents = 0;
        while at < length {
            let extent = self.extent(at, length - at).await?;
            if extent.hole == wants_hole {
                slot.answer_with(&LseekOut { offset: at });
                return Ok(0);
            }
            at = at.saturating_add(extent.bytes);
            extents += 1;
            if extents % EXTENTS_AT_ONCE == 0 {
                yield_now().await;
            }
        }
        if !wants_hole {
            return Err(libc::ENXIO);
        }
        // The end of the file counts as a hole.
        slot.answer_with(&LseekOut { offset: length });
        Ok(0)
    }

    async fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, Errno> {
        match self.driver().block_status(&self.io, offset, bytes).await {
            Ok(Extent { bytes: 0, .. }) => Err(libc::EIO),
            Ok(extent) => Ok(extent),
            Err(e) if is_unsupported(&e) => Ok(Extent { bytes, hole: false }),
            Err(e) => Err(answerable(&e)),
        }
    }

    fn statfs(&self, slot: &mut Slot) -> Outcome {
        const BLOCK: u64 = 4096;
        let blocks = self.file().length().div_ceil(BLOCK);
        // What a growable file can still take only the driver's store knows.
        let free = if self.file().policy.growable {
            MAX_LENGTH / BLOCK - blocks.min(MAX_LENGTH / BLOCK)
        } else {
            0
        };
        slot.answer_with(&StatfsOut {
            blocks: blocks + free,
            bfree: free,
            bavail: free,
            files: 1,
            bsize: BLOCK as u32,
            frsize: BLOCK as u32,
            namelen: 255,
            ..StatfsOut::default()
        });
        Ok(0)
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.file().policy.writable {
            Ok(())
        } else {
            Err(libc::EROFS)
        }
    }

    /// Waits until the content may be used; until the guard is dropped the
    /// file does not shrink.
    async fn begin_use(&self) -> Use<'_> {
        let (file, queue) = (self.file(), self.device.queue);
        while file.uses.try_enter(queue).is_err() {
            // Who closed the gate holds this lock until it is open again.
            drop(file.resizing.lock().await);
        }
        Use { file, queue }
    }
}

/// `open_out.fh` of descriptors that can write, and of those that cannot.
/// Nothing else need be remembered of an open file.
const FH_WRITER: u64 = 1;
const FH_READER: u64 = 0;

fn new_time(now: bool, seconds: i64, nanos: u32) -> NewTime {
    if now {
        NewTime::Now
    } else {
        NewTime::At { seconds, nanos }
    }
}

/// A use of the content that is under way.
struct Use<'a> {
    file: &'a File,
    queue: usize,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.file.uses.leave(self.queue);
    }
}

/// No use of the content is under way, and none begins.
struct Alone<'a>(&'a File);

impl<'a> Alone<'a> {
    /// The caller holds `file.resizing`, and keeps it for as long.
    async fn begin(file: &'a File) -> Self {
        file.uses.close();
        let alone = Self(file);
        poll_fn(|cx| file.uses.poll_empty(cx)).await;
        alone
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.uses.open();
    }
}

/// Lets the queue's other requests run.
pub(crate) async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use libc::{FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE as ZERO};
    use proptest::prelude::*;

    use super::*;
    use crate::rig::{CAPACITY, Disk, Rig};

    const PUNCH: i32 = FALLOC_FL_PUNCH_HOLE | KEEP;

    fn written(answer: &crate::transport::memory::Answer) -> u32 {
        answer.structure::<WriteOut>().size
    }

    fn calls(rig: &Rig) -> Vec<&'static str> {
        rig.disk
            .log
            .lock()
            .drain(..)
            .map(|(name, ..)| name)
            .collect()
    }

    #[test]
    fn a_growing_write_truncates_first_and_leaves_zeroes_between() {
        let mut rig = Rig::new(Disk::new(vec![1; 10]), true);
        assert_eq!(written(&rig.write(100, b"abc")), 3);
        assert_eq!(calls(&rig), ["truncate", "write"]);
        let data = rig.disk.data.lock().clone();
        assert_eq!(data.len(), 103);
        assert!(data[10..100].iter().all(|b| *b == 0));
        assert_eq!(rig.read(101, 50).data, b"bc");
        assert_eq!(rig.read(103, 50).data, b"");
    }

    #[test]
    fn a_write_over_the_end_of_a_fixed_file_is_cut() {
        let mut rig = Rig::new(Disk::new(vec![1; 10]), false);
        assert_eq!(written(&rig.write(8, b"abc")), 2);
        assert_eq!(rig.write(10, b"abc").error, libc::ENOSPC);
        assert_eq!(rig.write(99, b"abc").error, libc::ENOSPC);
        assert_eq!(rig.disk.data.lock()[7..], *b"\x01ab");
    }

    #[test]
    fn growth_that_fails_changes_nothing() {
        let mut rig = Rig::new(Disk::new(vec![1; 10]), true);
        *rig.disk.fails.lock() = Some("truncate");
        assert_eq!(rig.write(8, b"abc").error, libc::EIO);
        assert_eq!(rig.file.length(), 10);
        *rig.disk.fails.lock() = Some("write");
        // Space that cannot be zeroed is given back.
        assert_eq!(rig.fallocate(0, 0, 50).error, libc::EIO);
        assert_eq!(rig.file.length(), 10);
        assert_eq!(*rig.disk.data.lock(), [1; 10]);
    }

    #[test]
    fn what_the_host_added_is_not_cut_off() {
        for how in 0..4 {
            let mut rig = Rig::new(Disk::new(vec![1; 10]), true);
            // Not told yet.
            *rig.disk.data.lock() = vec![2; 100];
            match how {
                0 => assert_eq!(written(&rig.write(20, b"abc")), 3),
                1 => assert_eq!(rig.truncate(50).error, 0, "an honest truncation"),
                2 => assert_eq!(rig.fallocate(0, 0, 50).error, 0),
                // The kernel's answer to a failed write, with its old length.
                _ => {
                    rig.file.tell(10);
                    rig.file.write_failed(20);
                    assert_eq!(rig.truncate(10).error, 0);
                }
            }
            let expected = if how == 1 { 50 } else { 100 };
            assert_eq!(rig.disk.data.lock().len(), expected, "{how}");
            assert_eq!(rig.file.length(), expected as u64);
        }
    }

    #[test]
    fn only_a_rollback_to_what_the_kernel_wrongly_believes_is_ignored() {
        let grown = || {
            let rig = Rig::new(Disk::new(vec![1; 100]), true);
            rig.file.tell(10);
            rig
        };
        // No write has failed: somebody wants it.
        let mut rig = grown();
        assert_eq!(rig.truncate(10).error, 0);
        assert_eq!(rig.file.length(), 10);
        // A write has failed, but not past what the kernel believes in.
        let mut rig = grown();
        rig.file.write_failed(5);
        assert_eq!(rig.truncate(10).error, 0);
        assert_eq!(rig.file.length(), 10);
        // Another length than that.
        let mut rig = grown();
        rig.file.write_failed(20);
        assert_eq!(rig.truncate(11).error, 0);
        assert_eq!(rig.file.length(), 11);
        // The answer has told the kernel better.
        let mut rig = grown();
        rig.file.write_failed(20);
        assert_eq!(rig.truncate(10).error, 0);
        assert_eq!(rig.file.length(), 100);
        assert_eq!(rig.truncate(10).error, 0);
        assert_eq!(rig.file.length(), 10);
    }

    #[test]
    fn zeroing_falls_back_to_what_the_driver_can_do() {
        for zeroes in [true, false] {
            let mut disk = Disk::new(vec![1; 3 * CAPACITY]);
            disk.zeroes = zeroes;
            let mut rig = Rig::new(disk, false);
            assert_eq!(rig.fallocate(PUNCH, 5, 2 * CAPACITY as u64).error, 0);
            if zeroes {
                assert_eq!(calls(&rig), ["discard"]);
            } else {
                assert_eq!(calls(&rig), ["discard", "write_zeroes", "write", "write"]);
            }
            let data = rig.disk.data.lock().clone();
            assert!(data[5..][..2 * CAPACITY].iter().all(|b| *b == 0));
            assert!(
                data[..5]
                    .iter()
                    .chain(&data[2 * CAPACITY + 5..])
                    .all(|b| *b == 1)
            );
        }
    }

    #[test]
    fn a_shrinking_truncation_waits_for_writes_and_holds_up_later_ones() {
        let mut rig = Rig::new(Disk::new(vec![1; 100]), true);
        rig.disk.hold();
        let send_write = |rig: &mut Rig, offset, data: &[u8]| {
            let body = crate::rig::write(offset, data.len());
            rig.send(
                crate::protocol::opcode::WRITE,
                zerocopy::IntoBytes::as_bytes(&body),
                data,
            )
        };
        send_write(&mut rig, 90, b"first");
        let body = SetattrIn {
            valid: set::SIZE,
            size: 50,
            ..SetattrIn::default()
        };
        rig.send(
            crate::protocol::opcode::SETATTR,
            zerocopy::IntoBytes::as_bytes(&body),
            &[],
        );
        send_write(&mut rig, 60, b"later");
        rig.run();
        assert_eq!(
            rig.disk.waiting(),
            [90],
            "neither the truncation nor the later write"
        );
        rig.disk.release(0);
        rig.run();
        assert_eq!(rig.disk.waiting(), [50], "the truncation alone");
        rig.disk.release(0);
        rig.run();
        // The later write grows the file again.
        assert_eq!(rig.disk.waiting(), [65]);
        rig.disk.release(0);
        rig.run();
        assert_eq!(rig.disk.waiting(), [60]);
        rig.disk.release(0);
        rig.run();
        assert_eq!(rig.answers().len(), 3);
        let data = rig.disk.data.lock().clone();
        assert_eq!(data[50..], [[0; 10].as_slice(), b"later"].concat());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Read(u64, usize),
        Write(u64, usize, u8),
        Truncate(u64),
        Fallocate(i32, u64, u64),
    }

    const MOST: u64 = 300;

    fn step() -> impl Strategy<Value = Step> {
        let mode = prop::sample::select(vec![0, PUNCH, ZERO, ZERO | KEEP, KEEP]);
        prop_oneof![
            (0..MOST, 0usize..200).prop_map(|(o, n)| Step::Read(o, n)),
            (0..MOST, 1usize..200, 1u8..).prop_map(|(o, n, b)| Step::Write(o, n, b)),
            (0..MOST).prop_map(Step::Truncate),
            (mode, 0..MOST, 1..MOST).prop_map(|(m, o, n)| Step::Fallocate(m, o, n)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// The file behaves as a plain one of the same policy would.
        #[test]
        fn any_sequence_does_what_it_does_to_a_vector(
            steps in prop::collection::vec(step(), 1..40), zeroes: bool, growable: bool,
        ) {
            let mut model = vec![9u8; 128];
            let mut disk = Disk::new(model.clone());
            disk.zeroes = zeroes;
            let mut rig = Rig::new(disk, growable);
            for step in steps {
                match step {
                    Step::Read(offset, size) => {
                        let from = model.len().min(offset as usize);
                        let to = model.len().min(from + size);
                        prop_assert_eq!(&rig.read(offset, size).data, &model[from..to]);
                    }
                    Step::Write(offset, size, byte) => {
                        let answer = rig.write(offset, &vec![byte; size]);
                        let (start, mut end) = (offset as usize, offset as usize + size);
                        if !growable {
                            end = end.min(model.len());
                        }
                        if start >= end {
                            prop_assert_eq!(answer.error, libc::ENOSPC);
                            continue;
                        }
                        prop_assert_eq!(written(&answer) as usize, end - start);
                        model.resize(model.len().max(end), 0);
                        model[start..end].fill(byte);
                    }
                    Step::Truncate(size) => {
                        let out = rig.truncate(size).structure::<AttrOut>();
                        prop_assert_eq!(out.attr.size, size);
                        model.resize(size as usize, 0);
                    }
                    Step::Fallocate(mode, offset, length) => {
                        let error = rig.fallocate(mode, offset, length).error;
                        if mode == KEEP {
                            prop_assert_eq!(error, libc::EOPNOTSUPP);
                            continue;
                        }
                        let end = (offset + length) as usize;
                        let grows = mode & KEEP == 0 && end > model.len();
                        if error == 0 && grows {
                            model.resize(end, 0);
                        }
                        prop_assert!(error == 0 || (grows && !growable), "{}", error);
                        if mode != 0 && error == 0 {
                            let end = end.min(model.len());
                            let start = end.min(offset as usize);
                            model[start..end].fill(0);
                        }
                    }
                }
                prop_assert_eq!(&*rig.disk.data.lock(), &model);
                prop_assert_eq!(rig.file.length(), model.len() as u64);
            }
            prop_assert!(rig.disk.events.lock().is_empty());
        }

        #[test]
        fn lseek_finds_what_a_walk_finds(
            extents in prop::collection::vec(1u64..9, 1..200), offset in 0u64..900,
        ) {
            let kinds: Vec<bool> = extents.iter().enumerate()
                .flat_map(|(n, len)| vec![n % 2 == 0; *len as usize])
                .collect();
            let mut disk = Disk::new(vec![0; kinds.len()]);
            disk.extents = extents;
            let mut rig = Rig::new(disk, false);
            for (whence, hole) in [(libc::SEEK_DATA, false), (libc::SEEK_HOLE, true)] {
                let answer = rig.lseek(whence, offset);
                let rest = kinds.iter().enumerate().skip(offset as usize);
                let found = rest.filter(|(_, k)| **k == hole).map(|(at, _)| at as u64).next();
                let end = (hole && offset < kinds.len() as u64).then_some(kinds.len() as u64);
                match found.or(end) {
                    Some(at) => prop_assert_eq!(answer.structure::<LseekOut>().offset, at),
                    None => prop_assert_eq!(answer.error, libc::ENXIO),
                }
            }
        }
    }
}

//! What tests of the engine without a kernel stand on: one queue over the
//! transport in memory, and a disk whose calls can be held up.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Poll, Waker};

use parking_lot::Mutex;
use zerocopy::IntoBytes;

use crate::control::Control;
use crate::driver::{BlockDriver, Event, Extent, Io, ReadBuf};
use crate::engine::engine;
use crate::file::File;
use crate::operations::yield_now;
use crate::protocol::{FallocateIn, LseekIn, ReadIn, SetattrIn, WriteIn, opcode, set};
use crate::queue::{Progress, Queue};
use crate::transport::memory::{Answer, Memory};

/// How many requests a rig's queue takes at once.
pub(crate) const SLOTS: usize = 4;
/// How many bytes its requests carry at most.
pub(crate) const CAPACITY: usize = 8192;

/// A disk in memory.
#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) data: Mutex<Vec<u8>>,
    /// Discard and write_zeroes work; else they are unsupported.
    pub(crate) zeroes: bool,
    /// A read of this offset panics.
    pub(crate) panics_at: Option<u64>,
    /// Reads begin to read this, give up and fail.
    pub(crate) gives_up_on: Option<std::fs::File>,
    /// Calls of this kind fail with EIO.
    pub(crate) fails: Mutex<Option<&'static str>>,
    pub(crate) log: Mutex<Vec<(&'static str, u64, u64)>>,
    pub(crate) events: Mutex<Vec<Event>>,
    pub(crate) idle: AtomicUsize,
    /// Extents as block_status tells them: lengths, holes first.
    pub(crate) extents: Vec<u64>,
    held: Mutex<Option<Vec<(u64, Waker)>>>,
}

impl Disk {
    pub(crate) fn new(data: Vec<u8>) -> Self {
        Self {
            data: Mutex::new(data),
            ..Self::default()
        }
    }

    /// Calls wait from now on.
    pub(crate) fn hold(&self) {
        *self.held.lock() = Some(Vec::new());
    }

    /// The offsets of the calls that wait.
    pub(crate) fn waiting(&self) -> Vec<u64> {
        let held = self.held.lock();
        held.iter().flatten().map(|(offset, _)| *offset).collect()
    }

    /// Lets the `n`th call that waits go on.
    pub(crate) fn release(&self, n: usize) {
        let (_, waker) = self.held.lock().as_mut().expect("it holds").remove(n);
        waker.wake();
    }

    async fn call(&self, name: &'static str, offset: u64, bytes: u64) -> io::Result<()> {
        self.log.lock().push((name, offset, bytes));
        let mut entered = false;
        poll_fn(|cx| {
            let mut held = self.held.lock();
            let Some(held) = held.as_mut() else {
                return Poll::Ready(());
            };
            let waker = cx.waker();
            match held.iter().any(|(o, w)| *o == offset && w.will_wake(waker)) {
                // Woken in vain.
                true => Poll::Pending,
                false if entered => Poll::Ready(()),
                false => {
                    entered = true;
                    held.push((offset, waker.clone()));
                    Poll::Pending
                }
            }
        })
        .await;
        match *self.fails.lock() {
            Some(failing) if failing == name => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        }
    }

    async fn zero(&self, name: &'static str, offset: u64, bytes: u64) -> io::Result<()> {
        self.call(name, offset, bytes).await?;
        if !self.zeroes {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.data.lock()[offset as usize..][..bytes as usize].fill(0);
        Ok(())
    }
}

impl BlockDriver for Arc<Disk> {
    fn length(&self) -> io::Result<u64> {
        Ok(self.data.lock().len() as u64)
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        if let Some(file) = &self.gives_up_on {
            let len = buf.len();
            let mut read = pin!(io.read_at(file.as_fd(), buf, len, offset));
            poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
            yield_now().await;
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.call("read", offset, buf.len() as u64).await?;
        assert_ne!(self.panics_at, Some(offset), "the test's panic");
        let data = self.data.lock();
        let bytes = buf.bytes_mut();
        bytes.copy_from_slice(&data[offset as usize..][..bytes.len()]);
        Ok(())
    }

    async fn write(&self, _: &Io<'_>, from: &[u8], offset: u64) -> io::Result<()> {
        self.call("write", offset, from.len() as u64).await?;
        self.data.lock()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    async fn flush(&self, _: &Io<'_>) -> io::Result<()> {
        self.call("flush", 0, 0).await
    }

    async fn discard(&self, _: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        self.zero("discard", offset, bytes).await
    }

    async fn write_zeroes(
        &self,
        _: &Io<'_>,
        offset: u64,
        bytes: u64,
        _may_unmap: bool,
    ) -> io::Result<()> {
        self.zero("write_zeroes", offset, bytes).await
    }

    async fn truncate(&self, _: &Io<'_>, length: u64) -> io::Result<()> {
        self.call("truncate", length, 0).await?;
        self.data.lock().resize(length as usize, 0);
        Ok(())
    }

    async fn block_status(&self, _: &Io<'_>, offset: u64, _: u64) -> io::Result<Extent> {
        if self.extents.is_empty() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut start = 0;
        for (n, len) in self.extents.iter().enumerate() {
            if offset < start + len {
                return Ok(Extent {
                    bytes: start + len - offset,
                    hole: n % 2 == 0,
                });
            }
            start += len;
        }
        Err(io::Error::other("past the end"))
    }

    fn idle(&self) {
        self.idle.fetch_add(1, SeqCst);
    }

    fn event(&self, event: &Event) {
        self.events.lock().push(event.clone());
    }
}

/// One queue over the transport in memory.
pub(crate) struct Rig {
    pub(crate) disk: Arc<Disk>,
    pub(crate) control: Arc<Control>,
    pub(crate) file: Arc<File>,
    pub(crate) queue: Queue<Memory>,
}

impl Rig {
    pub(crate) fn new(disk: Disk, growable: bool) -> Self {
        let disk = Arc::new(disk);
        let transport = Memory::new(SLOTS, CAPACITY);
        let (queue, control, file) = engine(disk.clone(), transport, growable);
        control.announce();
        disk.events.lock().clear();
        Self {
            disk,
            control,
            file,
            queue,
        }
    }

    pub(crate) fn send(&mut self, opcode: u32, operation: &[u8], payload: &[u8]) -> u64 {
        self.queue.transport().request(opcode, operation, payload)
    }

    /// Dispatches until there is nothing to do.
    pub(crate) fn run(&mut self) -> Progress {
        loop {
            match self.queue.dispatch(2) {
                Progress::More => {}
                progress => return progress,
            }
        }
    }

    /// The answers since the last look.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.queue.transport().answers)
    }

    /// Sends a request that is answered at once.
    pub(crate) fn ask(&mut self, opcode: u32, operation: &[u8], payload: &[u8]) -> Answer {
        let unique = self.send(opcode, operation, payload);
        self.run();
        let mut answers = self.answers();
        let answer = answers.pop().expect("an answer");
        assert!(answers.is_empty(), "one answer");
        assert_eq!(answer.unique, unique);
        answer
    }

    pub(crate) fn send_read(&mut self, offset: u64, size: usize) -> u64 {
        self.send(opcode::READ, read(offset, size).as_bytes(), &[])
    }

    pub(crate) fn read(&mut self, offset: u64, size: usize) -> Answer {
        self.ask(opcode::READ, read(offset, size).as_bytes(), &[])
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        self.ask(opcode::WRITE, write(offset, data.len()).as_bytes(), data)
    }

    pub(crate) fn truncate(&mut self, size: u64) -> Answer {
        let body = SetattrIn {
            valid: set::SIZE | set::FH,
            size,
            ..SetattrIn::default()
        };
        self.ask(opcode::SETATTR, body.as_bytes(), &[])
    }

    pub(crate) fn fallocate(&mut self, mode: i32, offset: u64, length: u64) -> Answer {
        let body = FallocateIn {
            mode: mode as u32,
            offset,
            length,
            ..FallocateIn::default()
        };
        self.ask(opcode::FALLOCATE, body.as_bytes(), &[])
    }

    pub(crate) fn lseek(&mut self, whence: i32, offset: u64) -> Answer {
        let body = LseekIn {
            whence: whence as u32,
            offset,
            ..LseekIn::default()
        };
        self.ask(opcode::LSEEK, body.as_bytes(), &[])
    }
}

fn read(offset: u64, size: usize) -> ReadIn {
    ReadIn {
        offset,
        size: size as u32,
        ..ReadIn::default()
    }
}

pub(crate) fn write(offset: u64, size: usize) -> WriteIn {
    WriteIn {
        offset,
        size: size as u32,
        ..WriteIn::default()
    }
}

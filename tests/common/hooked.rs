//! A driver that runs the test's code before whatever the engine calls.

use std::future::Future;
use std::io;

use blkfuse::{BlockDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};

use crate::common::Handle;

/// Which of the driver's methods is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "each test file uses a part of it")]
pub enum At {
    Length,
    Read,
    Write,
    Flush,
    Truncate,
    QueueStart(usize),
    QueueStop(usize),
    BatchBegin,
    BatchEnd,
    Idle,
    Event,
}

type Hook = Box<dyn Fn(At) -> io::Result<()> + Send + Sync>;

/// `inner`, with `hook` in front.
pub struct Hooked {
    pub inner: Handle,
    pub hook: Hook,
}

impl Hooked {
    pub fn new(inner: Handle, hook: impl Fn(At) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self {
            inner,
            hook: Box::new(hook),
        }
    }

    fn tell(&self, at: At) {
        let _ = (self.hook)(at);
    }
}

impl BlockDriver for Hooked {
    fn length(&self) -> io::Result<u64> {
        (self.hook)(At::Length)?;
        self.inner.length()
    }

    fn allocated_size(&self) -> io::Result<Option<u64>> {
        self.inner.allocated_size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn features(&self) -> Features {
        self.inner.features()
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        (self.hook)(At::Read)?;
        self.inner.read(io, buf, offset).await
    }

    async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        (self.hook)(At::Write)?;
        self.inner.write(io, data, offset).await
    }

    async fn flush(&self, io: &Io<'_>) -> io::Result<()> {
        (self.hook)(At::Flush)?;
        self.inner.flush(io).await
    }

    fn discard(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> impl Future<Output = io::Result<()>> {
        self.inner.discard(io, offset, bytes)
    }

    fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> impl Future<Output = io::Result<()>> {
        self.inner.write_zeroes(io, offset, bytes, may_unmap)
    }

    async fn truncate(&self, io: &Io<'_>, length: u64) -> io::Result<()> {
        (self.hook)(At::Truncate)?;
        self.inner.truncate(io, length).await
    }

    fn block_status(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> impl Future<Output = io::Result<Extent>> {
        self.inner.block_status(io, offset, bytes)
    }

    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        (self.hook)(At::QueueStart(queue.index))
    }

    fn queue_stop(&self, queue: usize) {
        self.tell(At::QueueStop(queue));
    }

    fn batch_begin(&self, _: usize) {
        self.tell(At::BatchBegin);
    }

    fn batch_end(&self, _: usize) {
        self.tell(At::BatchEnd);
    }

    fn idle(&self) {
        self.tell(At::Idle);
        self.inner.idle();
    }

    fn event(&self, event: &Event) {
        self.inner.event(event);
        self.tell(At::Event);
    }
}

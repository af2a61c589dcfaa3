//! The driver that an export gets: one of the image drivers, plus the way to
//! the main thread.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use blkfuse::{BlockDriver, CDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};

use crate::events::Notifier;
use crate::image::Image;

/// An image on behalf of an export.
#[derive(Debug)]
pub struct Backend {
    image: Arc<Image>,
    notifier: Notifier,
}

impl Backend {
    pub fn new(image: Arc<Image>, notifier: Notifier) -> Self {
        Self { image, notifier }
    }

    /// The driver that wants to know more than the requests.
    fn plugin(&self) -> Option<&CDriver> {
        match &*self.image {
            Image::Plugin(plugin) => Some(plugin.driver()),
            Image::Raw(_) | Image::Ram(_) | Image::Null(_) => None,
        }
    }
}

impl BlockDriver for Backend {
    fn length(&self) -> io::Result<u64> {
        self.image.length()
    }

    fn allocated_size(&self) -> io::Result<Option<u64>> {
        match &*self.image {
            Image::Raw(raw) => raw.allocated_size(),
            Image::Ram(ram) => Ok(Some(ram.allocated_size())),
            Image::Null(_) => Ok(Some(0)),
            Image::Plugin(plugin) => plugin.driver().allocated_size(),
        }
    }

    fn limits(&self) -> Limits {
        match &*self.image {
            Image::Raw(raw) => Limits {
                block_size: raw.block_size(),
            },
            Image::Ram(_) | Image::Null(_) => Limits::default(),
            Image::Plugin(plugin) => plugin.driver().limits(),
        }
    }

    fn features(&self) -> Features {
        match &*self.image {
            Image::Raw(raw) => Features {
                write: true,
                truncate: raw.can_truncate(),
            },
            Image::Ram(_) | Image::Null(_) => Features {
                write: true,
                truncate: true,
            },
            Image::Plugin(plugin) => plugin.driver().features(),
        }
    }

    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        match &*self.image {
            Image::Raw(raw) => Some(raw.backing_file()),
            Image::Ram(_) | Image::Null(_) => None,
            Image::Plugin(plugin) => plugin.driver().backing_file(),
        }
    }

    async fn read(&self, io: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.read(io, buf, offset).await?,
            Image::Ram(ram) => ram.read(buf.bytes_mut(), offset),
            Image::Null(_) => buf.zero(),
            Image::Plugin(plugin) => plugin.driver().read(io, buf, offset).await?,
        }
        Ok(())
    }

    async fn write(&self, io: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.write(io, data, offset).await,
            Image::Ram(ram) => ram.write(data, offset),
            Image::Null(_) => Ok(()),
            Image::Plugin(plugin) => plugin.driver().write(io, data, offset).await,
        }
    }

    async fn flush(&self, io: &Io<'_>) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.flush(io).await,
            // Nothing there outlives the process.
            Image::Ram(_) | Image::Null(_) => Ok(()),
            Image::Plugin(plugin) => plugin.driver().flush(io).await,
        }
    }

    async fn discard(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.discard(io, offset, bytes).await?,
            Image::Ram(ram) => ram.discard(offset, bytes),
            Image::Null(_) => {}
            Image::Plugin(plugin) => plugin.discard(io, offset, bytes).await?,
        }
        Ok(())
    }

    async fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.write_zeroes(io, offset, bytes, may_unmap).await,
            Image::Ram(ram) if may_unmap => {
                ram.discard(offset, bytes);
                Ok(())
            }
            // Memory is allocated by writing to it.
            Image::Ram(_) => Err(io::ErrorKind::Unsupported.into()),
            Image::Null(_) => Ok(()),
            Image::Plugin(plugin) => plugin.write_zeroes(io, offset, bytes, may_unmap).await,
        }
    }

    async fn truncate(&self, io: &Io<'_>, length: u64) -> io::Result<()> {
        match &*self.image {
            Image::Raw(raw) => raw.truncate(length)?,
            Image::Ram(ram) => ram.truncate(length),
            Image::Null(null) => null.truncate(length),
            Image::Plugin(plugin) => plugin.driver().truncate(io, length).await?,
        }
        Ok(())
    }

    async fn block_status(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<Extent> {
        match &*self.image {
            Image::Raw(raw) => raw.block_status(offset, bytes),
            Image::Ram(ram) => Ok(ram.block_status(offset, bytes)),
            Image::Null(null) => Ok(null.block_status(offset, bytes)),
            Image::Plugin(plugin) => plugin.driver().block_status(io, offset, bytes).await,
        }
    }

    fn queue_start(&self, queue: QueueInfo) -> io::Result<()> {
        self.plugin()
            .map_or(Ok(()), |driver| driver.queue_start(queue))
    }

    fn queue_stop(&self, queue: usize) {
        if let Some(driver) = self.plugin() {
            driver.queue_stop(queue);
        }
    }

    fn batch_begin(&self, queue: usize) {
        if let Some(driver) = self.plugin() {
            driver.batch_begin(queue);
        }
    }

    fn batch_end(&self, queue: usize) {
        if let Some(driver) = self.plugin() {
            driver.batch_end(queue);
        }
    }

    fn idle(&self) {
        if let Some(driver) = self.plugin() {
            driver.idle();
        }
    }

    fn event(&self, event: &Event) {
        if let Some(driver) = self.plugin() {
            driver.event(event);
        }
        self.notifier.notify(event);
    }
}

//! blkfuse presents a block device as a regular file through FUSE.

mod driver;
mod error;
mod mount;

pub use driver::{BlockDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};
pub use error::{Error, Result};
pub use mount::AllowOther;

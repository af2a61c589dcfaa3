//! blkfuse presents a block device as a regular file through FUSE.

mod config;
mod control;
mod driver;
mod error;
mod export;
mod file;
mod gate;
mod legacy;
mod mount;
mod operations;
mod protocol;
mod queue;
mod request;
#[cfg(test)]
mod rig;
mod slot;
mod stats;
mod task;
mod transport;
mod wakeups;

pub use driver::{BlockDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};
pub use error::{Error, Result};
pub use export::{Builder, Export, State, Stop};
pub use mount::AllowOther;
pub use stats::{LATENCY_BUCKETS, OP_KINDS, OpKind, OpStats, Stats};

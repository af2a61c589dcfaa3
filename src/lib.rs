//! blkfuse presents a block device as a regular file through FUSE.
//!
//! A program supplies a [`BlockDriver`]; [`Export`] mounts a file system whose
//! root *is* one regular file over an existing regular file, and turns every
//! read, write, flush, fallocate, lseek and truncate on it into calls on the
//! driver. The same engine has a C API, described in `include/blkfuse.h`.
//!
//! # Example
//!
//! A disk of one mebibyte that reads as the letter `b`:
//!
//! ```no_run
//! use std::io;
//!
//! use blkfuse::{BlockDriver, Export, Io, ReadBuf};
//!
//! struct Letters;
//!
//! impl BlockDriver for Letters {
//!     fn length(&self) -> io::Result<u64> {
//!         Ok(1 << 20)
//!     }
//!
//!     async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, _offset: u64) -> io::Result<()> {
//!         buf.bytes_mut().fill(b'b');
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! std::fs::write("disk", "")?;
//! let export = Export::builder(Letters).mountpoint("disk").start()?;
//! // From now on everybody can read the file "disk".
//! # let wait_for_a_reason_to_end = || {};
//! wait_for_a_reason_to_end();
//! export.delete(None)?;
//! # Ok(())
//! # }
//! ```
//!
//! # The way a request goes
//!
//! ```text
//! client: read(2)          transport  ->  slot  ->  decode  ->  operation  ->  driver
//!   -> kernel's FUSE  ->  (legacy.rs) (slot.rs) (request.rs) (operations.rs) (driver.rs)
//!                          transport  <-  slot  <-  reply   <--------------------+
//! ```
//!
//! Over io_uring (uring.rs, on a ring.rs) in place of /dev/fuse the way is the
//! same; start.rs says in which order the kernel is brought to that.
//!
//! A *queue* (queue.rs) owns a transport and a task (task.rs) for each of its
//! slots; a thread of the library's runs it, which waits awake where that pays
//! (polling.rs), or one of the program's own threads does (hostqueue.rs). Over
//! io_uring the library's queues hand each other the kernel's entries
//! (exchange.rs), so that each serves whom it serves best (placement.rs), from
//! the right CPU (seat.rs). The *export* (export.rs) is the life around the
//! queues: mounting (mount.rs), the drain and the phases of
//! life (control.rs, gate.rs), the file's attributes (file.rs), its end
//! (ending.rs). Data move once: the driver reads into and writes out of the
//! slot's payload, which is what the kernel copies from and to. What it wants
//! done with other files waits at the queue's port (forward.rs), and the
//! transport has the kernel do it. With passthrough (passthrough.rs) reads do
//! not come here at all.
//!
//! # What the library does to its process
//!
//! It starts threads, which block all signals, and now and then a child process
//! for a moment, of which the program's waits and its SIGCHLD handler see
//! nothing. It installs no signal handler, prints nothing (it logs through the
//! `log` crate), changes no state of the process, and opens every descriptor
//! close-on-exec.

#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod capi;
mod config;
mod control;
mod driver;
mod ending;
#[cfg(any(test, feature = "bench"))]
mod engine;
mod error;
mod exchange;
mod export;
mod file;
mod forward;
mod gate;
mod hostqueue;
mod jobring;
mod legacy;
mod mount;
mod operations;
mod passthrough;
mod placement;
mod plan;
mod polling;
mod properties;
mod protocol;
mod queue;
mod region;
mod request;
#[cfg(test)]
mod rig;
mod ring;
mod seat;
mod slot;
mod start;
mod stats;
mod sync;
mod system;
mod task;
mod transport;
mod unforked;
mod uring;
mod wakeups;

pub use capi::CDriver;
pub use config::{IoUring, Threads};
pub use driver::{BlockDriver, Event, Extent, Features, Io, Limits, QueueInfo, ReadBuf};
pub use error::{Error, Result};
pub use export::{Builder, Export, State, Stop};
pub use hostqueue::{Dispatched, HostQueue};
pub use mount::AllowOther;
pub use stats::{LATENCY_BUCKETS, OP_KINDS, OpKind, OpStats, Stats};

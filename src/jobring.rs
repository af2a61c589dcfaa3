//! Where a transport without a ring of its own has jobs done: in a ring that
//! is made at the first job; and where none can be had, by plain system calls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::error::{Error, Result};
use crate::forward::Port;
use crate::ring::Ring;

/// A ring for jobs, or what is to be done without one.
pub(crate) enum JobRing {
    /// Nobody has wanted it yet.
    Unmade,
    Ring(Box<Ring>),
    Refused,
}

impl JobRing {
    /// Makes the ring with `make`, unless that has been tried. Returns what to
    /// watch for its completions if it is new.
    pub(crate) fn make(
        &mut self,
        make: impl FnOnce() -> io::Result<Ring>,
    ) -> Option<BorrowedFd<'_>> {
        if !matches!(self, Self::Unmade) {
            return None;
        }
        *self = match make() {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(e) => {
                log::debug!("forwarded requests are served without io_uring: {e}");
                Self::Refused
            }
        };
        match self {
            Self::Ring(ring) => Some((**ring).as_fd()),
            _ => None,
        }
    }

    /// Whether a job may be done; makes no system call.
    pub(crate) fn has_news(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_news(),
            Self::Unmade | Self::Refused => false,
        }
    }

    /// Begins the jobs that wait at the port, and reports those that are done.
    pub(crate) fn carry(&mut self, port: &Port) -> Result<()> {
        match self {
            Self::Ring(ring) => carry(ring, port)
                .map_err(|e| Error::from_io("cannot use the io_uring for forwarded requests", &e)),
            _ => {
                port.run();
                Ok(())
            }
        }
    }
}

fn carry(ring: &mut Ring, port: &Port) -> io::Result<()> {
    let mut queued = false;
    while let Some(job) = port.take() {
        let entry = job.entry().user_data(job.id as u64).into();
        // SAFETY: the memory of a job is valid, and nobody else's, until it is
        // reported done; and its descriptor is open while its future waits.
        match unsafe { ring.push(&entry) } {
            Ok(()) => queued = true,
            // The kernel has no memory for it now.
            Err(_) => port.done(job.id, job.run()),
        }
    }
    report(ring, port);
    if queued || ring.has_news() {
        ring.submit()?;
        report(ring, port);
    }
    Ok(())
}

fn report(ring: &mut Ring, port: &Port) {
    while let Some(completion) = ring.next() {
        port.done(completion.mark as usize, completion.result);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::driver::Io;
    use crate::slot::Slot;

    /// A payload, and what carries out what is done with it.
    struct Bench {
        slot: Slot,
        port: Port,
        ring: JobRing,
    }

    impl Bench {
        fn new(make: impl FnOnce() -> io::Result<Ring>) -> Self {
            let mut ring = JobRing::Unmade;
            ring.make(make);
            Self {
                slot: Slot::new(8192).unwrap(),
                port: Port::default(),
                ring,
            }
        }

        fn in_ring() -> Self {
            Self::new(|| Ring::for_epoll(8))
        }
    }

    fn refused() -> io::Result<Ring> {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn run<F: Future>(port: &Port, ring: &mut JobRing, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            match poll(future.as_mut()) {
                Poll::Ready(output) => return output,
                Poll::Pending => ring.carry(port).unwrap(),
            }
        }
    }

    #[test]
    fn every_kind_of_job_does_its_work() {
        for (make, jobs_are_carried) in [
            ((|| Ring::for_epoll(8)) as fn() -> _, true),
            (refused, false),
        ] {
            let Bench {
                mut slot,
                port,
                mut ring,
            } = Bench::new(make);
            assert_eq!(matches!(ring, JobRing::Ring(_)), jobs_are_carried);
            let io = Io::new(0, 0, &port, slot.payload());
            let image = tempfile::tempfile().unwrap();
            let fd = image.as_fd();
            slot.payload_mut()[..5000].fill(7);
            slot.arrived(5000, 5000);
            run(&port, &mut ring, io.write_at(fd, slot.data(), 10)).unwrap();
            run(&port, &mut ring, io.sync(fd, true)).unwrap();
            run(&port, &mut ring, io.sync(fd, false)).unwrap();
            assert_eq!(image.metadata().unwrap().len(), 5010);

            // Piece by piece, and no further than the end of the file.
            let mut buf = slot.read_buf(6000);
            let read = run(&port, &mut ring, io.read_at(fd, &mut buf, 10, 5));
            assert_eq!((read.unwrap(), buf.filled()), (10, 10));
            let read = run(&port, &mut ring, io.read_at(fd, &mut buf, 9000, 15));
            assert_eq!((read.unwrap(), buf.filled()), (4995, 5005));
            assert!(!buf.is_filled());
            buf.zero_rest();
            assert!(buf.is_filled());
            let bytes = buf.bytes_mut();
            assert_eq!(bytes[..5], [0; 5]);
            assert_eq!(bytes[5..5005], [7; 5000]);
            assert_eq!(bytes[5005..], [0; 995]);
        }
    }
}

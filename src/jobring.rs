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

/// Queues the jobs that wait at the port, each with a `mark` for its number.
pub(crate) fn begin(ring: &mut Ring, port: &Port, mark: impl Fn(usize) -> u64) {
    while let Some(job) = port.take() {
        let entry = job.entry().user_data(mark(job.id)).into();
        // SAFETY: the memory of a job is valid, and nobody else's, until it is
        // reported done; and its descriptor is open while its future waits.
        if unsafe { ring.push(&entry) }.is_err() {
            // The kernel has no memory for it now.
            port.done(job.id, job.run());
        }
    }
}

fn carry(ring: &mut Ring, port: &Port) -> io::Result<()> {
    begin(ring, port, |job| job as u64);
    report(ring, port);
    if ring.is_unsubmitted() || ring.has_news() {
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
    use std::fs::File;
    use std::io::{Read, Write};
    use std::ops::Range;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::{Pin, pin};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::{Context, Poll, Wake, Waker};
    use std::thread;

    use super::*;
    use crate::driver::{Io, ReadBuf};
    use crate::forward::{Call, What};
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
    }

    fn a_ring() -> io::Result<Ring> {
        Ring::for_epoll(8)
    }

    fn none() -> io::Result<Ring> {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }

    /// A file in the build's directory, which is on a real file system more
    /// often than the temporary one; not written to as the page cache is.
    fn image() -> File {
        let program = std::env::current_exe().unwrap();
        let file = tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DSYNC);
        options.open(file.path()).unwrap()
    }

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Polls `future` to its end, and carries its jobs.
    fn run<F: Future>(port: &Port, ring: &mut JobRing, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            match poll(future.as_mut()) {
                Poll::Ready(output) => return output,
                Poll::Pending => ring.carry(port).unwrap(),
            }
            thread::yield_now();
        }
    }

    #[test]
    fn every_kind_of_job_does_its_work() {
        for make in [a_ring, none] {
            let Bench {
                mut slot,
                port,
                mut ring,
            } = Bench::new(make);
            let io = Io::new(0, 0, &port, slot.payload());
            let image = image();
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

            let zeroed = run(&port, &mut ring, io.discard(fd, 100, 100));
            check_zeroed(&image, zeroed, 100..200);
            let zeroed = run(&port, &mut ring, io.write_zeroes(fd, 4000, 90));
            check_zeroed(&image, zeroed, 4000..4090);
            assert_eq!(image.metadata().unwrap().len(), 5010);
        }
    }

    fn check_zeroed(image: &File, outcome: io::Result<()>, range: Range<u64>) {
        match outcome {
            // Some file systems cannot.
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::Unsupported),
            Ok(()) => {
                let mut bytes = vec![0; (range.end - range.start) as usize + 2];
                image.read_exact_at(&mut bytes, range.start - 1).unwrap();
                let [7, zeroes @ .., 7] = &bytes[..] else {
                    panic!("more than the range was zeroed");
                };
                assert!(zeroes.iter().all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn errors_are_passed_on() {
        for make in [a_ring, none] {
            let Bench {
                mut slot,
                port,
                mut ring,
            } = Bench::new(make);
            let io = Io::new(0, 0, &port, slot.payload());
            let write_only = File::create("/dev/null").unwrap();
            let read_only = File::open("/dev/zero").unwrap();
            let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
            let mut buf = slot.read_buf(10);
            let read = io.read_at(write_only.as_fd(), &mut buf, 10, 0);
            let read = run(&port, &mut ring, read).map(drop);
            assert_eq!(errno(read), libc::EBADF);
            assert!(!buf.is_filled());
            // An error leaves the buffer as it was: it can still be filled.
            let read = io.read_at(read_only.as_fd(), &mut buf, 10, 0);
            run(&port, &mut ring, read).unwrap();
            assert!(buf.is_filled());
            slot.arrived(10, 10);
            let write = io.write_at(read_only.as_fd(), slot.data(), 0);
            assert_eq!(errno(run(&port, &mut ring, write)), libc::EBADF);
            // The kernel takes this for "where the descriptor is".
            for offset in [u64::MAX, i64::MAX as u64 - 5] {
                let write = io.write_at(write_only.as_fd(), slot.data(), offset);
                assert_eq!(errno(run(&port, &mut ring, write)), libc::EINVAL);
            }
        }
    }

    #[test]
    fn a_future_that_is_dropped_before_its_job_is_taken_does_nothing() {
        let Bench {
            mut slot,
            port,
            mut ring,
        } = Bench::new(a_ring);
        slot.arrived(10, 10);
        let io = Io::new(0, 0, &port, slot.payload());
        let image = image();
        {
            let mut write = pin!(io.write_at(image.as_fd(), slot.data(), 0));
            assert!(poll(write.as_mut()).is_pending());
            assert_eq!(port.waiting(), 1);
        }
        assert_eq!(port.waiting(), 0);
        run(&port, &mut ring, io.settled());
        ring.carry(&port).unwrap();
        assert_eq!(image.metadata().unwrap().len(), 0);
    }

    /// A read that waits until something is written, as a slow disk would have
    /// it: of a pipe.
    fn begin_slow_read(bench: &mut Bench, abandon: fn(Pin<Box<dyn Future<Output = ()> + '_>>)) {
        let (mut reader, mut writer) = io::pipe().unwrap();
        let Bench { slot, port, ring } = bench;
        let io = Io::new(0, 3, port, slot.payload());
        let other = Io::new(0, 4, port, slot.payload());
        let mut buf = slot.read_buf(100);
        {
            let mut read: Pin<Box<dyn Future<Output = ()>>> = Box::pin(async {
                let _ = io.read_at(reader.as_fd(), &mut buf, 100, 0).await;
            });
            assert!(poll(read.as_mut()).is_pending());
            ring.carry(port).unwrap();
            assert!(poll(read.as_mut()).is_pending());
            assert_eq!(port.in_flight(), 1);
            abandon(read);
        }
        // Nobody gets at the memory, and the request does not end.
        assert!(!buf.is_filled());
        let touched = catch_unwind(AssertUnwindSafe(|| buf.bytes_mut().fill(1)));
        assert!(touched.is_err());
        assert!(poll(pin!(io.settled())).is_pending());
        assert!(poll(pin!(other.settled())).is_ready());

        let waker = Arc::new(Count::default());
        let mut settled = pin!(io.settled());
        let waker_of = Waker::from(waker.clone());
        let mut context = Context::from_waker(&waker_of);
        assert!(settled.as_mut().poll(&mut context).is_pending());
        writer.write_all(&[5; 100]).unwrap();
        while port.in_flight() > 0 {
            ring.carry(port).unwrap();
        }
        assert_eq!(waker.0.load(Relaxed), 1);
        assert!(settled.as_mut().poll(&mut context).is_ready());
        drop(writer);
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
        // And the next request's jobs are its own.
        let image = tempfile::tempfile().unwrap();
        assert!(run(port, ring, io.sync(image.as_fd(), true)).is_ok());
    }

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn memory_is_the_kernels_until_the_job_is_done_whatever_becomes_of_its_future() {
        begin_slow_read(&mut Bench::new(a_ring), |read| drop(read));
        begin_slow_read(&mut Bench::new(a_ring), |read| std::mem::forget(read));
    }

    #[test]
    fn what_is_known_of_a_descriptor_is_not_believed_for_long() {
        let port = Port::default();
        let mut file = OwnedFd::from(tempfile::tempfile().unwrap());
        let data = [0; 1];
        let (from, len) = (data.as_ptr(), data.len());
        let is_copy = |file: &OwnedFd| {
            // SAFETY: the call is not made.
            let call = unsafe { Call::new(file.as_fd(), What::Write { from, len }, 0) };
            port.is_copy(&call)
        };
        assert!(is_copy(&file));
        // The number is now that of a file whose writes reach the disk.
        nix::unistd::dup2(image(), &mut file).unwrap();
        assert!((0..100).any(|_| !is_copy(&file)));
        let other = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(is_copy(&other), "another descriptor is asked at once");
        assert!(!is_copy(&file));
    }

    #[test]
    fn memory_that_is_not_the_requests_is_used_at_once() {
        let Bench { slot, port, .. } = Bench::new(a_ring);
        let io = Io::new(0, 0, &port, slot.payload());
        let image = tempfile::tempfile().unwrap();
        let data = [9; 3];
        assert!(poll(pin!(io.write_at(image.as_fd(), &data, 0))).is_ready());
        let mut place = [0; 3];
        let mut buf = ReadBuf::from(&mut place[..]);
        assert!(poll(pin!(io.read_at(image.as_fd(), &mut buf, 3, 0))).is_ready());
        assert_eq!(place, data);
    }

    #[test]
    fn memory_that_the_kernel_may_use_outlives_the_queue() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut bench = Bench::new(a_ring);
        let start = bench.slot.payload_mut().as_mut_ptr();
        {
            let Bench { slot, port, ring } = &mut bench;
            let io = Io::new(0, 0, port, slot.payload());
            let mut buf = slot.read_buf(8);
            let mut read = pin!(io.read_at(reader.as_fd(), &mut buf, 8, 0));
            assert!(poll(read.as_mut()).is_pending());
            ring.carry(port).unwrap();
            assert_eq!(port.in_flight(), 1);
        }
        drop(bench);
        let _ = writer.write_all(&[5; 8]);
        // SAFETY: that the memory is still mapped is what is tested.
        let byte = unsafe { start.read_volatile() };
        assert!(byte == 0 || byte == 5);
    }
}

//! The transport seam: how requests arrive and replies leave.
//!
//! A transport owns the slots that wait for a request. Nothing above it can
//! tell by which transport a request came.

use crate::error::Error;
use crate::forward::Port;
use crate::slot::Slot;

/// What came of looking for a request.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// One has arrived.
    Request(Box<Slot>),
    /// There is none now, or no slot is free to take it.
    Nothing,
    /// The connection has ended: unmounted or aborted. There will be no more.
    Gone,
    /// The peer cannot be trusted or the transport is broken.
    Broken(Error),
}

/// Carries requests in and replies out, for one queue and on its thread.
pub(crate) trait Transport {
    /// How many requests the queue can have in flight at most.
    fn slots(&self) -> usize;

    /// The queue has something to do. Until [`flush`](Self::flush) or
    /// [`wait`](Self::wait) it may be long, for the driver may block.
    fn begin(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The queue is about to end, and will not answer for others any more.
    fn end(&mut self) {}

    /// Takes one request that has arrived. Does not block.
    fn fetch(&mut self) -> Fetched;

    /// Sends `slot.reply` and takes the slot back. An answer that the kernel
    /// no longer wants is not an error. It may leave with the next
    /// [`flush`](Self::flush) or [`wait`](Self::wait) only.
    fn commit(&mut self, slot: Box<Slot>) -> Result<(), Error>;

    /// Sends what was committed. Does not block.
    fn flush(&mut self) -> Result<(), Error>;

    /// Begins the jobs that wait at the port, and reports those that are done.
    /// They are the kernel's when this returns, or with the next
    /// [`flush`](Self::flush) or [`wait`](Self::wait), which those that are done
    /// wake up, too. Does not block, where there is an io_uring.
    fn carry(&mut self, port: &Port) -> Result<(), Error>;

    /// Whether requests are wanted: what [`wait`](Self::wait) wakes up for.
    fn want_requests(&mut self, wanted: bool) -> Result<(), Error>;

    /// Whether to wait awake may pay.
    fn may_poll(&self) -> bool {
        false
    }

    /// Whether there is something to fetch, or jobs are done. Cheap, for a
    /// queue that waits awake.
    fn is_ready(&mut self) -> Result<bool, Error> {
        Ok(true)
    }

    /// Sends what was committed, then blocks until a request has arrived (if
    /// wanted) or the queue's wake-up descriptor has been signalled; may return
    /// early.
    fn wait(&mut self) -> Result<(), Error>;

    /// Whether there may be something to do; makes no system call, and may not
    /// know of everything. `wanted`: whether requests are.
    fn has_news(&mut self, wanted: bool) -> bool;

    /// Whether something has come that the thread must not sleep over. To be
    /// asked last before it sleeps elsewhere than in [`wait`](Self::wait): until
    /// the queue's descriptor is readable. `wanted`: whether requests are.
    fn is_overslept(&mut self, wanted: bool) -> Result<bool, Error>;

    /// Has whatever waits for requests in this thread come back, as it must to
    /// be [unbound](Self::unbind). May wait for a moment. After an error it goes
    /// on as it was.
    fn recall(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Lets go of the thread, which is to have no job in flight. What was not
    /// recalled is lost, and the connection is to end then.
    fn unbind(self: Box<Self>) -> Box<dyn Unbound>;

    /// What to go on with if this one cannot; it is to hold no request.
    fn fall_back(self: Box<Self>) -> Box<dyn Transport>;
}

/// A transport that no thread uses, on its way to another one.
pub(crate) trait Unbound: Send {
    /// Goes on in the calling thread, which will sleep until the queue's
    /// descriptor is readable, and never in [`Transport::wait`]. It can be
    /// tried again if it fails.
    fn bind(self: Box<Self>) -> Result<Box<dyn Transport>, (Box<dyn Unbound>, Error)>;
}

impl Transport for Box<dyn Transport> {
    fn slots(&self) -> usize {
        (**self).slots()
    }
    fn begin(&mut self) -> Result<(), Error> {
        (**self).begin()
    }
    fn end(&mut self) {
        (**self).end();
    }
    fn fetch(&mut self) -> Fetched {
        (**self).fetch()
    }
    fn commit(&mut self, slot: Box<Slot>) -> Result<(), Error> {
        (**self).commit(slot)
    }
    fn flush(&mut self) -> Result<(), Error> {
        (**self).flush()
    }
    fn carry(&mut self, port: &Port) -> Result<(), Error> {
        (**self).carry(port)
    }
    fn want_requests(&mut self, wanted: bool) -> Result<(), Error> {
        (**self).want_requests(wanted)
    }
    fn may_poll(&self) -> bool {
        (**self).may_poll()
    }
    fn is_ready(&mut self) -> Result<bool, Error> {
        (**self).is_ready()
    }
    fn wait(&mut self) -> Result<(), Error> {
        (**self).wait()
    }
    fn has_news(&mut self, wanted: bool) -> bool {
        (**self).has_news(wanted)
    }
    fn is_overslept(&mut self, wanted: bool) -> Result<bool, Error> {
        (**self).is_overslept(wanted)
    }
    fn recall(&mut self) -> Result<(), Error> {
        (**self).recall()
    }
    fn unbind(self: Box<Self>) -> Box<dyn Unbound> {
        (*self).unbind()
    }
    fn fall_back(self: Box<Self>) -> Box<dyn Transport> {
        (*self).fall_back()
    }
}

#[cfg(test)]
pub(crate) mod memory {
    //! A transport without a kernel, for tests: messages in, replies out.

    use std::collections::VecDeque;

    use zerocopy::FromBytes;

    use super::*;
    use crate::forward::Job;
    use crate::protocol::{InHeader, OutHeader, ROOT_ID};
    use crate::slot::Reply;

    /// A reply as the kernel would see it.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Answer {
        pub(crate) unique: u64,
        /// 0 or a positive errno.
        pub(crate) error: i32,
        pub(crate) data: Vec<u8>,
    }

    impl Answer {
        pub(crate) fn structure<T: FromBytes>(&self) -> T {
            assert_eq!(self.error, 0, "the request failed");
            T::read_from_bytes(&self.data).expect("a reply of the structure's size")
        }
    }

    pub(crate) struct Memory {
        incoming: VecDeque<(InHeader, Vec<u8>, Vec<u8>)>,
        pub(crate) answers: Vec<Answer>,
        pub(crate) gone: bool,
        /// Whether the queue listens.
        pub(crate) wanted: bool,
        /// Jobs are begun and not done.
        pub(crate) holds_jobs: bool,
        /// Waiting awake may pay.
        pub(crate) may_poll: bool,
        /// How often the queue has gone to sleep.
        pub(crate) sleeps: usize,
        jobs: Vec<Job>,
        #[expect(clippy::vec_box, reason = "slots travel as boxes")]
        free: Vec<Box<Slot>>,
        slots: usize,
        next_unique: u64,
    }

    impl Memory {
        pub(crate) fn new(slots: usize, capacity: usize) -> Self {
            Self {
                incoming: VecDeque::new(),
                answers: Vec::new(),
                gone: false,
                wanted: true,
                holds_jobs: false,
                may_poll: false,
                sleeps: 0,
                jobs: Vec::new(),
                free: (0..slots)
                    .map(|_| Box::new(Slot::new(capacity).unwrap()))
                    .collect(),
                slots,
                next_unique: 2,
            }
        }

        /// Queues a request as the kernel would; returns its unique number.
        pub(crate) fn request(&mut self, opcode: u32, operation: &[u8], payload: &[u8]) -> u64 {
            let unique = self.next_unique;
            self.next_unique += 2;
            let len = size_of::<InHeader>() + operation.len() + payload.len();
            let header = InHeader {
                len: len as u32,
                opcode,
                unique,
                nodeid: ROOT_ID,
                ..InHeader::default()
            };
            self.incoming
                .push_back((header, operation.to_vec(), payload.to_vec()));
            unique
        }
    }

    impl Transport for Memory {
        fn slots(&self) -> usize {
            self.slots
        }

        fn fetch(&mut self) -> Fetched {
            if self.gone {
                return Fetched::Gone;
            }
            if self.incoming.is_empty() {
                return Fetched::Nothing;
            }
            let Some(mut slot) = self.free.pop() else {
                return Fetched::Nothing;
            };
            let (header, operation, payload) = self.incoming.pop_front().unwrap();
            slot.header = header;
            slot.operation[..operation.len()].copy_from_slice(&operation);
            slot.payload_mut()[..payload.len()].copy_from_slice(&payload);
            slot.arrived(payload.len(), payload.len());
            Fetched::Request(slot)
        }

        fn commit(&mut self, mut slot: Box<Slot>) -> Result<(), Error> {
            let unique = slot.header.unique;
            let (error, data) = match slot.reply {
                Reply::Nothing => (0, None),
                Reply::Error(errno) => (errno, Some(Vec::new())),
                Reply::Payload(len) => (0, Some(slot.outgoing(&[], len).to_vec())),
            };
            if let Some(data) = data {
                assert!(size_of::<OutHeader>() + data.len() <= u32::MAX as usize);
                self.answers.push(Answer {
                    unique,
                    error,
                    data,
                });
            }
            self.free.push(slot);
            Ok(())
        }

        fn flush(&mut self) -> Result<(), Error> {
            Ok(())
        }

        fn carry(&mut self, port: &Port) -> Result<(), Error> {
            self.jobs.extend(std::iter::from_fn(|| port.take()));
            if !self.holds_jobs {
                for job in self.jobs.drain(..) {
                    port.done(job.id, job.run());
                }
            }
            Ok(())
        }

        fn want_requests(&mut self, wanted: bool) -> Result<(), Error> {
            self.wanted = wanted;
            Ok(())
        }

        fn may_poll(&self) -> bool {
            self.may_poll
        }

        fn has_news(&mut self, wanted: bool) -> bool {
            wanted && !self.incoming.is_empty() && !self.free.is_empty()
        }

        fn is_overslept(&mut self, wanted: bool) -> Result<bool, Error> {
            Ok(self.has_news(wanted))
        }

        fn unbind(self: Box<Self>) -> Box<dyn Unbound> {
            unreachable!("it stays in its thread")
        }

        fn wait(&mut self) -> Result<(), Error> {
            self.sleeps += 1;
            Ok(())
        }

        fn fall_back(self: Box<Self>) -> Box<dyn Transport> {
            self
        }
    }
}

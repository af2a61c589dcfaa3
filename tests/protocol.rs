//! The protocol against a stand-in for the kernel: a socket that keeps
//! messages apart, on whose other end the test plays the kernel, well or badly.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blkfuse::{BlockDriver, Event, Export, Io, ReadBuf, Result, State};

use common::{Handle, Memory, SOON, eventually, for_queues, pattern};

const BLOCK: usize = 4096;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const LSEEK: u32 = 46;

const HEADER: usize = 40;

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    unique: u64,
    error: i32,
    data: Vec<u8>,
}

/// The kernel's end of the connection.
struct Kernel {
    socket: OwnedFd,
}

/// A connection: the kernel's end, and the end to serve.
fn connection() -> (Kernel, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for two descriptors, which nobody else owns.
    let [kernel, server] = unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(
            libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()),
            0
        );
        ends.map(|fd| OwnedFd::from_raw_fd(fd))
    };
    (Kernel { socket: kernel }, server)
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

/// A request's bytes, which say that they are `len` long.
fn message_of_length(len: usize, opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut message = u32s(&[len as u32, opcode]);
    message.extend(unique.to_ne_bytes());
    message.extend(1u64.to_ne_bytes());
    message.extend([0; 16]);
    assert_eq!(message.len(), HEADER);
    message.extend(body);
    message
}

fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    message_of_length(HEADER + body.len(), opcode, unique, body)
}

/// `fuse_read_in` or `fuse_write_in`.
fn io_body(offset: u64, size: u32) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(offset.to_ne_bytes());
    body.extend(size.to_ne_bytes());
    body.extend([0; 20]);
    body
}

impl Kernel {
    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe {
            let fd = self.socket.as_raw_fd();
            libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL)
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        assert_eq!(sent as usize, bytes.len());
        Ok(())
    }

    fn send(&self, opcode: u32, unique: u64, body: &[u8]) {
        self.send_bytes(&message(opcode, unique, body)).unwrap();
    }

    fn send_init(&self, major: u32, minor: u32) {
        let mut body = u32s(&[major, minor, 131072, u32::MAX]);
        if minor >= 36 {
            body.resize(64, 0);
        }
        self.send(INIT, 2, &body);
    }

    /// The next reply; `None` if the other end has been closed.
    fn receive(&self) -> Option<Answer> {
        let mut poll = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut buffer = vec![0u8; 1 << 20];
        let len = loop {
            // SAFETY: the structure and the buffer are valid for what is passed.
            let len = unsafe {
                let ready = libc::poll(&mut poll, 1, SOON.as_millis() as i32);
                assert_eq!(ready, 1, "no answer");
                libc::recv(poll.fd, buffer.as_mut_ptr().cast(), buffer.len(), 0)
            };
            // Closed with messages unread: told once, before what is here.
            let reset = io::Error::last_os_error().raw_os_error() == Some(libc::ECONNRESET);
            if len >= 0 || !reset {
                break len;
            }
        };
        if len <= 0 {
            return None;
        }
        let len = len as usize;
        let word = |at: usize| <[u8; 4]>::try_from(&buffer[at..at + 4]).unwrap();
        assert!(len >= 16);
        assert_eq!(
            u32::from_ne_bytes(word(0)) as usize,
            len,
            "a reply's length"
        );
        Some(Answer {
            unique: u64::from_ne_bytes(buffer[8..16].try_into().unwrap()),
            error: -i32::from_ne_bytes(word(4)),
            data: buffer[16..len].to_vec(),
        })
    }

    fn answer(&self) -> Answer {
        self.receive().expect("the connection is open")
    }

    /// Asks, and takes the answer to that.
    fn ask(&self, opcode: u32, unique: u64, body: &[u8]) -> Answer {
        self.send(opcode, unique, body);
        let answer = self.answer();
        assert_eq!(answer.unique, unique);
        answer
    }

    /// Every answer up to now: `sent` of them, and no more.
    fn answers(&self, sent: usize) -> BTreeMap<u64, Answer> {
        let mut answers = BTreeMap::new();
        for _ in 0..sent {
            let answer = self.answer();
            let before = answers.insert(answer.unique, answer);
            assert_eq!(before, None, "answered twice");
        }
        // Whatever else was to come would come before this or soon after.
        let end = self.ask(GETATTR, u64::MAX - 1, &[0; 16]);
        assert_eq!(end.error, 0);
        answers
    }

    fn assert_closed(&self) {
        assert_eq!(self.receive(), None, "it is closed");
    }
}

/// A served connection.
struct Served {
    kernel: Kernel,
    export: Option<Export>,
    driver: Handle,
}

fn starting(server: OwnedFd, driver: &Handle, queues: usize) -> JoinHandle<Result<Export>> {
    let builder = Export::builder(driver.clone())
        .fuse_fd(server)
        .queues(queues);
    thread::spawn(move || builder.writable(true).growable(true).start())
}

impl Served {
    fn new(queues: usize) -> Self {
        let (kernel, server) = connection();
        let driver = Memory::patterned(64 * BLOCK).handle();
        let start = starting(server, &driver, queues);
        kernel.send_init(7, 45);
        assert_eq!(kernel.answer().error, 0);
        let export = Some(start.join().unwrap().unwrap());
        Self {
            kernel,
            export,
            driver,
        }
    }

    fn state(&self) -> State {
        self.export.as_ref().unwrap().state()
    }

    fn halted(&self) -> usize {
        let events = self.driver.events.lock().unwrap();
        let halted = |e: &&Event| matches!(e, Event::Halted { .. });
        events.iter().filter(halted).count()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.driver.release();
        let export = self.export.take().unwrap();
        let deleted = export.delete(Some(SOON));
        assert!(deleted.is_ok() || thread::panicking());
        assert!(Arc::strong_count(&self.driver.0) == 1 || thread::panicking());
    }
}

#[test]
fn the_init_reply_has_the_size_that_the_kernel_knows() {
    for minor in [9, 12, 22, 23, 35, 36, 45, 60] {
        let (kernel, server) = connection();
        let driver = Memory::patterned(BLOCK).handle();
        let start = starting(server, &driver, 1);
        kernel.send_init(7, minor);
        let answer = kernel.answer();
        assert_eq!((answer.unique, answer.error), (2, 0));
        assert_eq!(
            answer.data.len(),
            if minor < 23 { 24 } else { 64 },
            "7.{minor}"
        );
        assert_eq!(answer.data[..8], u32s(&[7, 45]));
        let export = start.join().unwrap().unwrap();
        let attributes = kernel.ask(GETATTR, 4, &[0; 16]);
        assert_eq!((attributes.error, attributes.data.len()), (0, 104));
        export.delete(Some(SOON)).unwrap();
        kernel.assert_closed();
    }
}

#[test]
fn a_newer_major_version_is_asked_to_speak_ours() {
    let (kernel, server) = connection();
    let driver = Memory::patterned(BLOCK).handle();
    let start = starting(server, &driver, 1);
    kernel.send_init(8, 1);
    let answer = kernel.answer();
    assert_eq!((answer.error, &answer.data), (0, &u32s(&[7, 45])));
    kernel.send_init(7, 45);
    assert_eq!(kernel.answer().data.len(), 64);
    start.join().unwrap().unwrap().delete(Some(SOON)).unwrap();
}

#[test]
fn a_kernel_without_passthrough_makes_start_fail_if_it_is_wanted() {
    let (kernel, server) = connection();
    let image = tempfile::tempfile().unwrap();
    let builder = Export::builder(OnFile(image)).fuse_fd(server);
    let start = thread::spawn(move || builder.passthrough(true).start());
    kernel.send_init(7, 45);
    let error = start.join().unwrap().unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.message().contains("Linux 6.9"), "{error}");
    kernel.assert_closed();
}

/// A device whose bytes are a file's.
struct OnFile(std::fs::File);

impl BlockDriver for OnFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn backing_file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    async fn read(&self, _: &Io<'_>, _: &mut ReadBuf<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn a_peer_that_cannot_be_served_makes_start_fail() {
    let fails = |what: &str, errno: i32, act: &dyn Fn(&Kernel)| {
        let (kernel, server) = connection();
        let driver = Memory::patterned(BLOCK).handle();
        let start = starting(server, &driver, 2);
        act(&kernel);
        let error = start.join().unwrap().unwrap_err();
        assert_eq!(error.errno(), errno, "{what}: {error}");
        kernel.assert_closed();
        assert_eq!(Arc::strong_count(&driver.0), 1, "{what}");
        assert!(driver.events.lock().unwrap().is_empty(), "{what}");
    };
    let refused = |kernel: &Kernel| {
        let answer = kernel.answer();
        assert_eq!((answer.unique, answer.error), (2, libc::EPROTO));
    };
    fails("major 6", libc::EPROTO, &|kernel| {
        kernel.send_init(6, 31);
        refused(kernel);
    });
    fails("minor 8", libc::EPROTO, &|kernel| {
        kernel.send_init(7, 8);
        refused(kernel);
    });
    fails("half an INIT", libc::EPROTO, &|kernel| {
        kernel.send(INIT, 2, &[7, 0, 0, 0]);
        refused(kernel);
    });
    fails("not INIT", libc::EPROTO, &|kernel| {
        kernel.send(GETATTR, 2, &[0; 16])
    });
    fails("no message", libc::EPROTO, &|kernel| {
        kernel.send_bytes(&[0; 12]).unwrap()
    });
    fails("wrong length", libc::EPROTO, &|kernel| {
        let bytes = message_of_length(999, INIT, 2, &[0; 64]);
        kernel.send_bytes(&bytes).unwrap();
    });
}

#[test]
fn a_peer_that_closes_instead_of_init_makes_start_fail_at_once() {
    let (kernel, server) = connection();
    let driver = Memory::patterned(BLOCK).handle();
    let begin = Instant::now();
    let start = starting(server, &driver, 1);
    drop(kernel);
    let error = start.join().unwrap().unwrap_err();
    assert_eq!(error.errno(), libc::ENOTCONN);
    assert!(error.message().contains("closed"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_peers_close_is_an_unmount() {
    for_queues(|queues| {
        let (kernel, server) = connection();
        let driver = Memory::patterned(BLOCK).handle();
        let start = starting(server, &driver, queues);
        kernel.send_init(7, 45);
        kernel.answer();
        let export = start.join().unwrap().unwrap();
        drop(kernel);
        driver.wait_for_event(|e| *e == Event::Unmounted);
        export.delete(Some(SOON)).unwrap();
        let events = driver.events.lock().unwrap();
        assert_eq!(*events, [Event::Started, Event::Unmounted]);
    });
}

#[test]
fn a_message_that_lies_about_its_length_halts() {
    for_queues(|queues| {
        let too_short = [0; 20].to_vec();
        let lying = message_of_length(100, GETATTR, 6, &[0; 16]);
        let lying_more = message_of_length(41, GETATTR, 6, &[0; 16]);
        for bad in [too_short, lying, lying_more] {
            let served = Served::new(queues);
            let kernel = &served.kernel;
            // One request is in flight, and is answered in spite of all.
            served.driver.hold();
            kernel.send(READ, 4, &io_body(0, BLOCK as u32));
            served.driver.wait_for_held(1);
            kernel.send_bytes(&bad).unwrap();
            if bad.len() >= HEADER {
                let answer = kernel.answer();
                assert_eq!((answer.unique, answer.error), (6, libc::EIO));
            }
            served
                .driver
                .wait_for_event(|e| matches!(e, Event::Halted { .. }));
            assert_eq!(served.state(), State::Ended);
            let calls = served.driver.count.load(SeqCst);
            // Nobody serves this one; it may be refused.
            let _ = kernel.send_bytes(&message(READ, 8, &io_body(0, 512)));
            served.driver.release();
            let mut answers: Vec<_> = std::iter::from_fn(|| kernel.receive()).collect();
            answers.sort_by_key(|answer| answer.unique);
            let data = pattern(0, BLOCK);
            assert_eq!(
                answers[0],
                Answer {
                    unique: 4,
                    error: 0,
                    data
                }
            );
            for refused in &answers[1..] {
                assert_eq!((refused.unique, refused.error), (8, libc::ENOTCONN));
            }
            assert!(answers.len() <= 2, "{answers:?}");
            assert_eq!(served.driver.count.load(SeqCst), calls);
            assert_eq!(served.halted(), 1);
            let failure = served.export.as_ref().unwrap().failure().unwrap();
            assert_eq!(failure.errno(), libc::EPROTO);
        }
    });
}

#[test]
fn what_is_wrong_with_one_request_fails_that_one() {
    for_queues(|queues| {
        let served = Served::new(queues);
        let kernel = &served.kernel;
        let write = |size: u32, data: usize| [io_body(0, size), vec![7; data]].concat();
        let mut setattr = [0; 88];
        setattr[0] = 8;
        let bad: [(u32, Vec<u8>); 12] = [
            (READ, io_body(0, 512)[..39].to_vec()),
            (READ, Vec::new()),
            (READ, io_body(0, (1 << 20) + 1)),
            (READ, io_body(0, u32::MAX)),
            (WRITE, io_body(0, 512)[..20].to_vec()),
            (WRITE, write(512, 511)),
            (WRITE, write(512, 513)),
            (WRITE, write(u32::MAX, 10)),
            (SETATTR, setattr[..87].to_vec()),
            (FALLOCATE, vec![0; 31]),
            (LSEEK, vec![0; 23]),
            (OPEN, vec![0; 7]),
        ];
        for (n, (opcode, body)) in bad.iter().enumerate() {
            let answer = kernel.ask(*opcode, 100 + n as u64, body);
            assert_eq!(
                answer.error,
                libc::EINVAL,
                "{opcode} of {} bytes",
                body.len()
            );
            assert_eq!(answer.data, []);
        }
        assert_eq!(served.driver.count.load(SeqCst), 0);
        let answer = kernel.ask(READ, 500, &io_body(100, 200));
        assert_eq!(answer.data, pattern(100, 200));
        assert_eq!(served.state(), State::Started);
        assert_eq!(served.halted(), 0);
    });
}

#[test]
fn every_opcode_is_answered_once_and_lies_never() {
    for_queues(|queues| {
        let served = Served::new(queues);
        let kernel = &served.kernel;
        let silent = [FORGET, BATCH_FORGET, INTERRUPT];
        let sticky = [
            GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, FALLOCATE, LSEEK,
        ];
        let mut unique = 1 << 40;
        for body in [0, 3, 8, 24, 40, 88, 128, 300] {
            let opcodes = (1..80).chain([4096, u32::MAX]);
            for opcode in opcodes.filter(|op| !silent.contains(op)) {
                unique += 2;
                let answer = kernel.ask(opcode, unique, &vec![0; body]);
                let error = answer.error;
                assert!((0..512).contains(&error), "{opcode}: {error}");
                if sticky.contains(&opcode) {
                    assert_ne!(error, libc::ENOSYS, "{opcode} with {body} bytes");
                }
                if opcode > 60 {
                    assert_eq!(error, libc::ENOSYS, "{opcode}");
                }
                if opcode == DESTROY {
                    assert_eq!((error, answer.data.len()), (0, 0));
                }
                if opcode == STATFS {
                    assert_eq!((error, answer.data.len()), (0, 80));
                }
                if opcode == LOOKUP {
                    assert_eq!(error, libc::ENOENT);
                }
            }
        }
        assert_eq!(served.halted(), 0);
    });
}

#[test]
fn an_unsupported_driver_method_is_never_enosys() {
    for_queues(|queues| {
        let served = Served::new(queues);
        let kernel = &served.kernel;
        for errno in [libc::ENOSYS, 0, -5, 512, 100_000] {
            served
                .driver
                .fail_if(move |_, _, _| Some(io::Error::from_raw_os_error(errno)));
            for (opcode, body) in [
                (READ, io_body(0, 512)),
                (WRITE, [io_body(0, 4), vec![1; 4]].concat()),
                (FSYNC, vec![0; 16]),
            ] {
                let answer = kernel.ask(opcode, 10, &body);
                let expected: &[i32] = match (errno, opcode) {
                    // What a flush was to make durable is not.
                    (libc::ENOSYS, FSYNC) => &[libc::EIO],
                    (libc::ENOSYS, _) => &[libc::EOPNOTSUPP],
                    _ => &[libc::EIO],
                };
                assert!(expected.contains(&answer.error), "{errno}: {answer:?}");
            }
        }
    });
}

#[test]
fn forgetting_and_interrupting_want_no_answer() {
    for_queues(|queues| {
        let served = Served::new(queues);
        let kernel = &served.kernel;
        for n in 0..20 {
            kernel.send(FORGET, 1000 + n, &[0; 8]);
            kernel.send(BATCH_FORGET, 2000 + n, &[0; 8 + 5 * 16]);
            kernel.send(INTERRUPT, 3000 + n, &[0; 8]);
            kernel.send(FORGET, 4000 + n, &[]);
            let answer = kernel.ask(GETATTR, 5000 + n, &[0; 16]);
            assert_eq!(answer.error, 0);
        }
        kernel.answers(0);
    });
}

#[test]
fn every_request_is_answered_once_with_its_own_number() {
    for_queues(|queues| {
        let served = Served::new(queues);
        let kernel = &served.kernel;
        const RESENT: u64 = 1 << 63;
        // Small, so that all answers find room in the socket.
        const SIZE: usize = 512;
        let place = |n: u64| n * SIZE as u64;
        // All in flight at once, then all answered.
        served.driver.hold();
        for n in 0..60 {
            let resent = if n % 3 == 0 { RESENT } else { 0 };
            kernel.send(
                READ,
                resent | (1000 + 2 * n),
                &io_body(place(n), SIZE as u32),
            );
        }
        served.driver.wait_for_held(60);
        let in_flight = || served.export.as_ref().unwrap().stats().in_flight;
        assert_eq!(in_flight(), 60);
        served.driver.release();
        let answers = kernel.answers(60);
        for n in 0..60 {
            let resent = if n % 3 == 0 { RESENT } else { 0 };
            let answer = &answers[&(resent | (1000 + 2 * n))];
            assert_eq!(answer.error, 0);
            assert_eq!(answer.data, pattern(place(n) as usize, SIZE));
        }
        eventually("nothing is in flight", || in_flight() == 0);
        // Writes, whose data must not be mixed up.
        for n in 0..60 {
            let data = vec![n as u8; SIZE];
            let body = [io_body(place(n), SIZE as u32), data].concat();
            kernel.send(WRITE, RESENT | (1 + n), &body);
        }
        let answers = kernel.answers(60);
        let bytes = served.driver.bytes();
        for n in 0..60 {
            assert_eq!(answers[&(RESENT | (1 + n))].data, u32s(&[SIZE as u32, 0]));
            let written = &bytes[place(n) as usize..][..SIZE];
            assert!(written.iter().all(|b| *b == n as u8));
        }
    });
}

#[test]
fn requests_that_wait_for_a_drain_are_answered_when_it_or_all_ends() {
    for_queues(|queues| {
        for stop in [false, true] {
            let served = Served::new(queues);
            let export = served.export.as_ref().unwrap();
            export.drain(Some(SOON)).unwrap();
            export.drain_begin().unwrap();
            for n in 0..queues as u64 {
                served.kernel.send(READ, 10 + n, &io_body(0, 512));
            }
            if stop {
                export.stop(blkfuse::Stop::Lazy).unwrap();
                // What was taken is refused, the rest goes with the connection.
                while let Some(answer) = served.kernel.receive() {
                    assert_eq!(answer.error, libc::ENOTCONN);
                }
            } else {
                export.drain_end().unwrap();
                let answers = served.kernel.answers(queues);
                assert!(answers.values().all(|a| a.data == pattern(0, 512)));
            }
        }
    });
}

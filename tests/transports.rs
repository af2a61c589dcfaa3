//! What the two transports must both do, where they work differently: few
//! entries and many clients, any number of queues, requests of any size, drains
//! with everything waiting, and thousands of starts.

#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/hosted.rs"]
mod hosted;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use blkfuse::{Export, OpKind};
use memmap2::MmapMut;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use alone::{Belongings, alone, own_dir, resident_kib};
use common::{
    Memory, Mounted, SOON, Watchdog, eventually, for_transports, for_transports_and_queues, pattern,
};
use hosted::Connections;

const BLOCK: usize = 4096;
/// More queues than this machine has CPUs, and than there are entries at a
/// depth of 1.
const QUEUES: [usize; 4] = [1, 2, 4, 7];

/// CPU time of the threads that serve.
fn serving_time() -> Duration {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let times = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let spent = times.split(' ').next()?.parse().ok()?;
        name.starts_with("blkfuse-")
            .then(|| Duration::from_nanos(spent))
    });
    times.sum()
}

#[test]
fn thousands_of_requests_wait_for_the_end_of_a_drain() {
    const READS: usize = 2500;
    alone("thousands_of_requests_wait_for_the_end_of_a_drain", || {
        for_transports_and_queues(|transport, queues| {
            // 1024 entries for each CPU.
            let mut m = Mounted::with(Memory::patterned(READS * 512), queues, |b| {
                b.io_uring(transport).queue_depth(1024).max_request(65536)
            });
            let connections = Connections::new();
            let connection = connections.of(&m.path);
            let file = m.open_with(false, libc::O_DIRECT);
            m.export().drain_begin().unwrap();
            eventually("nothing is in flight", || !m.export().drain_poll());
            thread::scope(|scope| {
                for read in 0..READS {
                    let file = &file;
                    let reader = move || {
                        let mut data = [0; 512];
                        file.read_exact_at(&mut data, read as u64 * 512).unwrap();
                        assert!(data[..] == pattern(read * 512, 512), "wrong data");
                    };
                    let small = thread::Builder::new().stack_size(128 << 10);
                    small.spawn_scoped(scope, reader).unwrap();
                }
                eventually("all wait", || connection.waiting() >= READS);
                let before = serving_time();
                thread::sleep(Duration::from_millis(200));
                let spent = serving_time() - before;
                let most = Duration::from_millis(20);
                assert!(spent < most, "{spent:?} of CPU in a drain");
                assert_eq!(m.driver.count.load(SeqCst), 0, "a call in a drain");
                m.export().drain_end().unwrap();
            });
            assert_eq!(m.driver.count.load(SeqCst), READS as u64);
            drop(file);
            m.delete();
        });
    });
}

/// A driver that takes its time, and clients that look at the file meanwhile.
#[test]
fn one_entry_for_each_cpu_is_enough_for_everybody() {
    const CLIENTS: usize = 16;
    const ROUNDS: usize = 40;
    for_transports(|transport| {
        for queues in QUEUES {
            let mut m = Mounted::with(Memory::patterned(CLIENTS * BLOCK), queues, |b| {
                b.io_uring(transport).queue_depth(1)
            });
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let slow = scope.spawn(|| {
                    while !over.load(SeqCst) {
                        m.driver.hold();
                        thread::sleep(Duration::from_millis(1));
                        m.driver.release();
                        thread::sleep(Duration::from_micros(200));
                    }
                });
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|client| {
                        let file = m.open_with(true, libc::O_DIRECT);
                        let path = &m.path;
                        scope.spawn(move || {
                            let at = (client * BLOCK) as u64;
                            for round in 0..ROUNDS {
                                let mut back = [0; BLOCK];
                                match client % 4 {
                                    0 => {
                                        let length = fs::metadata(path).unwrap().len();
                                        assert_eq!(length, (CLIENTS * BLOCK) as u64);
                                        drop(File::open(path).unwrap());
                                    }
                                    1 => {
                                        let data = [round as u8; BLOCK];
                                        file.write_all_at(&data, at).unwrap();
                                        file.read_exact_at(&mut back, at).unwrap();
                                        assert!(back == data);
                                    }
                                    _ => {
                                        file.read_exact_at(&mut back, at).unwrap();
                                        assert!(back[..] == pattern(at as usize, BLOCK));
                                    }
                                }
                            }
                        })
                    })
                    .collect();
                clients.into_iter().for_each(|c| c.join().unwrap());
                over.store(true, SeqCst);
                slow.join().unwrap();
            });
            m.delete();
        }
    });
}

#[test]
fn requests_may_be_limited_to_any_size() {
    const LENGTH: usize = 3 << 20;
    for_transports(|transport| {
        for queues in QUEUES {
            for most in [64 << 10, 68 << 10, 300 << 10, (1 << 20) - BLOCK, 1 << 20] {
                let mut m = Mounted::with(Memory::patterned(LENGTH), queues, |b| {
                    b.io_uring(transport).max_request(most as u32)
                });
                assert_eq!(m.export().max_request(), most as u32);
                let direct = m.open_with(true, libc::O_DIRECT);
                let mut data = vec![0; LENGTH - 1000];
                direct.read_exact_at(&mut data, 777).unwrap();
                assert!(data == pattern(777, data.len()), "at most {most}");
                let content = pattern(5, LENGTH);
                m.open(true)
                    .write_all_at(&content[..LENGTH / 2], 0)
                    .unwrap();
                direct
                    .write_all_at(&content[LENGTH / 2..], LENGTH as u64 / 2)
                    .unwrap();
                m.open(true).sync_all().unwrap();
                assert!(m.driver.bytes() == content, "at most {most}");
                let calls = m.driver.calls.lock().unwrap().clone();
                let largest = calls.iter().map(|call| call.2).max().unwrap();
                assert!(largest <= most as u64, "{largest}, not {most}");
                drop(direct);
                m.delete();
            }
        }
    });
}

/// Entries go round and round, and from queue to queue, and every request has
/// its own data and is answered once.
#[test]
fn a_multitude_of_requests_each_have_their_own_data() {
    const CLIENTS: usize = 6;
    let rounds = match std::env::var_os("BLKFUSE_LONG") {
        Some(_) => 1_000_000,
        None => 10_000,
    };
    let content = pattern(0, 512 * BLOCK);
    for_transports(|transport| {
        for queues in QUEUES {
            let mut m = Mounted::with(Memory::new(content.clone()), queues, |b| {
                b.io_uring(transport)
            });
            thread::scope(|scope| {
                for client in 0..CLIENTS {
                    let file = m.open_with(false, libc::O_DIRECT);
                    let content = &content;
                    scope.spawn(move || {
                        let mut data = vec![0; 8 * BLOCK];
                        let mut random = client;
                        for _ in 0..rounds / CLIENTS {
                            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                            let at = (random >> 33) % 504 * BLOCK;
                            // Mostly small, so that queues change places.
                            let len = if random >> 60 == 0 { 8 * BLOCK } else { 512 };
                            file.read_exact_at(&mut data[..len], at as u64).unwrap();
                            assert!(data[..len] == content[at..][..len], "wrong data");
                        }
                    });
                }
            });
            let stats = m.export().stats();
            let reads = stats.of(OpKind::Read);
            assert_eq!(reads.operations, (rounds / CLIENTS * CLIENTS) as u64);
            assert_eq!(reads.errors, 0);
            assert_eq!(m.driver.count.load(SeqCst), reads.operations);
            eventually("nothing is in flight", || m.export().stats().in_flight == 0);
            m.delete();
        }
    });
}

/// With BLKFUSE_CYCLES=1000 as many times as that.
/// A driver that is done with large requests at once is given few entries to
/// have them in; one that lets requests wait needs all.
#[test]
fn after_many_large_requests_as_many_as_before_can_wait() {
    const READERS: usize = 40;
    for_transports_and_queues(|transport, queues| {
        let m = Mounted::with(Memory::patterned(1 << 20), queues, |b| {
            b.io_uring(transport)
        });
        let file = m.open_with(false, libc::O_DIRECT);
        let expected = pattern(0, 64 << 10);
        for _ in 0..2 {
            let mut data = vec![0; expected.len()];
            for _ in 0..1200 {
                file.read_exact_at(&mut data, 0).unwrap();
                assert!(data == expected);
            }
            m.driver.hold();
            thread::scope(|scope| {
                let reader = |n: usize| {
                    let file = &file;
                    move || {
                        let mut data = [0; BLOCK];
                        file.read_exact_at(&mut data, (n * BLOCK) as u64).unwrap();
                        assert_eq!(data[..], pattern(n * BLOCK, BLOCK));
                    }
                };
                for n in 0..READERS {
                    scope.spawn(reader(n));
                }
                m.driver.wait_for_held(READERS);
                m.driver.release();
            });
        }
    });
}

#[test]
fn starts_and_deletions_leave_nothing() {
    alone("starts_and_deletions_leave_nothing", || {
        let cycles = std::env::var("BLKFUSE_CYCLES").map_or(60, |n| n.parse().unwrap());
        let dir = own_dir();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        for_transports(|transport| {
            let mut starts = Vec::new();
            let mut cycle = |n: usize| {
                let _watchdog = Watchdog::new(&path);
                let driver = Memory::new(vec![7; 64 * BLOCK]).handle();
                let builder = Export::builder(driver.clone()).mountpoint(&path);
                let builder = builder.writable(true).queues(common::QUEUES[n % 3]);
                let start = Instant::now();
                let export = builder.io_uring(transport).start().unwrap();
                starts.push(start.elapsed());
                let clients: Vec<_> = (0..4)
                    .map(|client| {
                        let file = OpenOptions::new().read(true).write(true).open(&path);
                        let (file, at) = (file.unwrap(), client * 16 * BLOCK as u64);
                        thread::spawn(move || {
                            for n in 0..16 {
                                file.write_all_at(&[n; BLOCK], at).unwrap();
                                let mut data = vec![0; 16 * BLOCK];
                                file.read_exact_at(&mut data, at).unwrap();
                                assert!(data[..BLOCK] == [n; BLOCK]);
                            }
                            file
                        })
                    })
                    .collect();
                let files: Vec<_> = clients.into_iter().map(|c| c.join().unwrap()).collect();
                // Every other one is deleted while it is open.
                let kept = n.is_multiple_of(2).then_some(files);
                export.delete(Some(SOON)).unwrap();
                drop(kept);
                assert_eq!(Arc::strong_count(&driver.0), 1);
            };
            (0..cycles / 4).for_each(&mut cycle);
            let (before, resident) = (Belongings::now(), resident_kib());
            (0..cycles).for_each(&mut cycle);
            before.are_all();
            let more = resident_kib().saturating_sub(resident);
            assert!(more < 2048, "{more} KiB more resident");
            starts.sort();
            let (median, last) = (starts[starts.len() / 2], starts[starts.len() - 1]);
            eprintln!("{transport:?}: a start takes {median:?}, at most {last:?}; {more} KiB more");
        });
    });
}

/// Writes the first block back and waits for that, which fsync(2) would not
/// begin before another one has ended.
fn write_first_back(file: &File) {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call touches no memory of this process.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, BLOCK as i64, flags) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Runs `f` on one CPU.
fn on_cpu(cpu: usize, f: impl FnOnce()) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
    f();
}

/// The kernel limits how many requests that nobody waits for are under way, for
/// all CPUs together; what it has held back of one CPU goes on only with the
/// end of another one of that CPU.
#[test]
fn what_one_cpu_writes_back_does_not_hold_up_another() {
    const PAGES: usize = 1024;
    let cpus = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<_> = (0..CpuSet::count())
        .filter(|cpu| cpus.is_set(*cpu).unwrap())
        .collect();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    for_transports_and_queues(|transport, queues| {
        for (many, one) in [(first, last), (last, first)] {
            let m = Mounted::with(Memory::patterned(PAGES * BLOCK), queues, |b| {
                b.io_uring(transport)
            });
            let connections = Connections::new();
            let connection = connections.of(&m.path);
            let file = m.open(true);
            // SAFETY: nobody else changes the file while references exist.
            let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
            // A page that is there needs no read to be changed.
            let before = map.to_vec();
            m.driver.hold();
            // More than may be under way, each page by itself.
            (2..PAGES)
                .step_by(2)
                .for_each(|page| map[page * BLOCK] ^= 1);
            thread::scope(|scope| {
                scope.spawn(|| on_cpu(many, || file.sync_all().unwrap()));
                eventually("many wait", || connection.waiting() >= PAGES / 2 - 1);
                map[0] ^= 1;
                let waiting = connection.waiting();
                scope.spawn(|| on_cpu(one, || write_first_back(&file)));
                eventually("one more waits", || connection.waiting() > waiting);
                m.driver.release();
            });
            let written = m.driver.bytes();
            for page in 0..PAGES {
                let changed = before[page * BLOCK] ^ u8::from(page % 2 == 0);
                assert_eq!(written[page * BLOCK], changed, "page {page}");
            }
        }
    });
}

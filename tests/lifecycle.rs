//! The life of an export on real mounts: how it starts or fails to, how it
//! ends however that comes about, and what it leaves: nothing.

#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/hooked.rs"]
mod hooked;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blkfuse::{Event, Export, LATENCY_BUCKETS, OpKind, State, Stop};
use memmap2::MmapMut;
use nix::mount::{MntFlags, MsFlags, umount2};

use alone::{
    Belongings, WATCHED, alone, assert_rests, cpu_time_in, own_dir, resident_kib, wait_for_rest,
};
use common::{
    Call, Handle, Memory, Mounted, SOON, Watchdog, eventually, for_queues, is_mounted, pattern,
};
use hooked::{At, Hooked};

/// How long something that must not happen is given to happen.
const A_WHILE: Duration = Duration::from_millis(30);
const BLOCK: usize = 4096;

fn errno<T: std::fmt::Debug>(result: blkfuse::Result<T>) -> i32 {
    result.expect_err("it must fail").errno()
}

fn os_error<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    let error = result.expect_err("it must fail");
    error.raw_os_error().expect("an errno")
}

type Outcome = mpsc::Receiver<io::Result<Vec<u8>>>;

fn read_in_thread(file: File, block: usize) -> Outcome {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let mut data = vec![0; BLOCK];
        let read = file.read_exact_at(&mut data, (block * BLOCK) as u64);
        drop(file);
        let _ = done.send(read.map(|()| data));
    });
    result
}

fn events(driver: &Handle) -> Vec<Event> {
    driver.events.lock().unwrap().clone()
}

fn unmounted(driver: &Handle) -> usize {
    let is = |e: &&Event| matches!(e, Event::Unmounted);
    events(driver).iter().filter(is).count()
}

fn halted(driver: &Handle) -> usize {
    let is = |e: &&Event| matches!(e, Event::Halted { .. });
    events(driver).iter().filter(is).count()
}

#[test]
fn stop_takes_an_open_file_away() {
    for_queues(|queues| {
        for how in [Stop::Lazy, Stop::Force] {
            let mut m = Mounted::fixed(4 * BLOCK, queues);
            let file = m.open(true);
            assert_eq!(errno(m.export().stop(Stop::IfIdle)), libc::EBUSY);
            assert_eq!(m.export().state(), State::Started);
            m.export().stop(how).unwrap();
            assert!(!is_mounted(&m.path));
            // What lay below is back.
            assert_eq!(fs::metadata(&m.path).unwrap().len(), 0);
            eventually("the export ends", || m.export().state() == State::Ended);
            let mut data = [0; BLOCK];
            eventually("reads fail", || file.read_at(&mut data, 0).is_err());
            assert!(file.write_at(&data, 0).is_err());
            // Nobody's request reaches the driver, but what may have been
            // mapped and changed was to become durable.
            let calls = m.driver.calls.lock().unwrap().clone();
            assert!(calls.iter().all(|c| c.0 == Call::Flush), "{calls:?}");
            let driver = m.driver.clone();
            m.delete();
            // Gone: the test's handles are the only ones.
            assert_eq!(Arc::strong_count(&driver.0), 2);
            assert_eq!(events(&driver), [Event::Started]);
        }
    });
}

#[test]
fn an_idle_file_can_be_stopped_if_idle() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(BLOCK, queues);
        drop(m.open(true));
        // The release of a closed file comes a little after its close.
        eventually("it is idle", || m.export().stop(Stop::IfIdle).is_ok());
        assert!(!is_mounted(&m.path));
        m.delete();
    });
}

#[test]
fn delete_waits_for_the_driver_and_then_drops_it_once() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(8 * BLOCK, queues);
        m.driver.hold();
        let reads: Vec<_> = (0..4).map(|i| read_in_thread(m.open(false), i)).collect();
        m.driver.wait_for_held(4);
        let export = m.export.take().unwrap();
        let deleting = thread::spawn(move || export.delete(None));
        eventually("the file vanishes", || !is_mounted(&m.path));
        assert_eq!(Arc::strong_count(&m.driver.0), 2, "the driver is in use");
        assert!(!deleting.is_finished());
        m.driver.release();
        deleting.join().unwrap().unwrap();
        assert_eq!(Arc::strong_count(&m.driver.0), 1, "the driver is dropped");
        for (i, read) in reads.iter().enumerate() {
            let data = read.recv_timeout(SOON).unwrap().unwrap();
            assert_eq!(data, pattern(i * BLOCK, BLOCK));
        }
    });
}

#[test]
fn a_force_lets_clients_go_at_once() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(8 * BLOCK, queues);
        m.driver.hold();
        let read = read_in_thread(m.open(false), 0);
        m.driver.wait_for_held(1);
        m.export().stop(Stop::Force).unwrap();
        assert!(read.recv_timeout(SOON).unwrap().is_err());
        assert_eq!(Arc::strong_count(&m.driver.0), 2, "the driver is in use");
        m.driver.release();
        m.delete();
    });
}

#[test]
fn a_force_after_a_lazy_stop_lets_clients_go_too() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(8 * BLOCK, queues);
        m.driver.hold();
        let read = read_in_thread(m.open(false), 0);
        m.driver.wait_for_held(1);
        m.export().stop(Stop::Lazy).unwrap();
        assert!(!is_mounted(&m.path));
        assert!(read.try_recv().is_err(), "it is still served");
        m.export().stop(Stop::Force).unwrap();
        assert!(read.recv_timeout(SOON).unwrap().is_err());
        m.driver.release();
        m.delete();
    });
}

#[test]
fn nobody_waits_for_anothers_request_once_the_export_ends() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(8 * BLOCK, queues);
        let other = m.open(false);
        m.driver.hold();
        let held = read_in_thread(m.open(false), 0);
        m.driver.wait_for_held(1);
        m.export().stop(Stop::Lazy).unwrap();
        eventually("the export ends", || m.export().state() == State::Ended);
        let refused = read_in_thread(other, 1);
        assert!(refused.recv_timeout(SOON).unwrap().is_err());
        assert!(held.try_recv().is_err(), "it is still served");
        m.driver.release();
        assert_eq!(held.recv_timeout(SOON).unwrap().unwrap(), pattern(0, BLOCK));
        m.delete();
    });
}

#[test]
fn an_end_that_leaves_its_mount_says_so_and_can_be_tried_again() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(BLOCK, queues);
        let cover = m.path.with_file_name("cover");
        fs::write(&cover, "").unwrap();
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(&cover), &m.path, None::<&str>, bind, None::<&str>).unwrap();
        let refused = m.export().stop(Stop::Lazy);
        nix::mount::umount2(&m.path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert_eq!(errno(refused), libc::EBUSY);
        assert!(is_mounted(&m.path));
        m.delete();
        assert!(!is_mounted(&m.path));
    });
}

#[test]
fn a_delete_that_times_out_goes_on_by_itself() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(8 * BLOCK, queues);
        m.driver.hold();
        let read = read_in_thread(m.open(true), 2);
        m.driver.wait_for_held(1);
        let export = m.export.take().unwrap();
        let start = Instant::now();
        assert_eq!(errno(export.delete(Some(A_WHILE))), libc::ETIMEDOUT);
        assert!(start.elapsed() < Duration::from_secs(1));
        eventually("the unmounting", || !is_mounted(&m.path));
        m.driver.release();
        let data = read.recv_timeout(SOON).unwrap().unwrap();
        assert_eq!(data, pattern(2 * BLOCK, BLOCK));
        eventually("the driver is dropped", || {
            Arc::strong_count(&m.driver.0) == 1
        });
    });
}

#[test]
fn a_dropped_export_unmounts() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(BLOCK, queues);
        let file = m.open(false);
        drop(m.export.take());
        assert!(!is_mounted(&m.path));
        eventually("the driver is dropped", || {
            Arc::strong_count(&m.driver.0) == 1
        });
        assert!(file.read_at(&mut [0; 10], 0).is_err());
    });
}

#[test]
fn an_unmount_from_outside_is_told_once() {
    for_queues(|queues| {
        let flags = [
            MntFlags::empty(),
            MntFlags::MNT_DETACH,
            MntFlags::MNT_FORCE,
            MntFlags::MNT_FORCE | MntFlags::MNT_DETACH,
        ];
        for flags in flags {
            let mut m = Mounted::fixed(BLOCK, queues);
            let mut data = [0; BLOCK];
            m.open(true).read_exact_at(&mut data, 0).unwrap();
            // Its release may still be under way, which keeps it busy.
            eventually("it is unmounted", || umount2(&m.path, flags).is_ok());
            m.driver.wait_for_event(|e| *e == Event::Unmounted);
            assert_eq!(m.export().state(), State::Ended);
            m.export().stop(Stop::Lazy).unwrap();
            m.delete();
            assert_eq!(events(&m.driver), [Event::Started, Event::Unmounted]);
        }
    });
}

#[test]
fn a_lazily_unmounted_file_serves_who_has_it_open() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(BLOCK, queues);
        let file = m.open(false);
        umount2(&m.path, MntFlags::MNT_DETACH).unwrap();
        let mut data = vec![0; BLOCK];
        file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, pattern(0, BLOCK));
        assert_eq!(m.export().state(), State::Started);
        drop(file);
        m.driver.wait_for_event(|e| *e == Event::Unmounted);
        m.delete();
        assert_eq!(unmounted(&m.driver), 1);
    });
}

#[test]
fn an_abort_under_load_ends_everything() {
    for_queues(|queues| {
        for flags in [
            MntFlags::MNT_FORCE,
            MntFlags::MNT_FORCE | MntFlags::MNT_DETACH,
        ] {
            let mut m = Mounted::fixed(4 * BLOCK, queues);
            let done = Arc::new(AtomicUsize::new(0));
            let clients: Vec<_> = (0..4)
                .map(|client| {
                    let (file, done) = (m.open(true), done.clone());
                    thread::spawn(move || {
                        let mut data = [0; BLOCK];
                        while file.read_at(&mut data, (client * BLOCK) as u64).is_ok()
                            && file.write_at(&data, (client * BLOCK) as u64).is_ok()
                        {
                            done.fetch_add(1, SeqCst);
                        }
                    })
                })
                .collect();
            eventually("there is load", || done.load(SeqCst) > 200);
            // Without DETACH it says EBUSY, having aborted all the same.
            let _ = umount2(&m.path, flags);
            clients.into_iter().for_each(|c| c.join().unwrap());
            m.driver.wait_for_event(|e| *e == Event::Unmounted);
            m.delete();
            assert!(!is_mounted(&m.path));
            assert_eq!(unmounted(&m.driver), 1);
            assert_eq!(halted(&m.driver), 0);
        }
    });
}

#[test]
fn nothing_spins_after_an_abort_with_requests_held() {
    alone("nothing_spins_after_an_abort_with_requests_held", || {
        for_queues(|queues| {
            let mut m = Mounted::fixed(8 * BLOCK, queues);
            assert_rests("an idle export");
            m.driver.hold();
            let reads: Vec<_> = (0..4).map(|i| read_in_thread(m.open(false), i)).collect();
            m.driver.wait_for_held(4);
            assert_rests("with requests held");
            let late = m.open(false);
            m.export().drain_begin().unwrap();
            let late = read_in_thread(late, 5);
            assert_rests("in a drain");
            let _ = umount2(&m.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
            for read in reads.iter().chain([&late]) {
                assert!(read.recv_timeout(SOON).unwrap().is_err());
            }
            assert_rests("aborted in a drain, with requests held");
            m.export().drain_end().unwrap();
            m.driver.wait_for_event(|e| *e == Event::Unmounted);
            assert_rests("aborted, with requests held");
            m.driver.release();
            assert_rests("aborted");
            m.delete();
            assert_eq!(unmounted(&m.driver), 1);
        });
    });
}

#[test]
fn nothing_spins_in_a_drain_that_comes_amid_load() {
    alone("nothing_spins_in_a_drain_that_comes_amid_load", || {
        for_queues(|queues| {
            let mut m = Mounted::fixed(4 * BLOCK, queues);
            let over = AtomicBool::new(false);
            let done = AtomicUsize::new(0);
            let mut used = Duration::ZERO;
            thread::scope(|scope| {
                for client in 0..4 {
                    let (file, over, done) = (m.open(false), &over, &done);
                    scope.spawn(move || {
                        let mut data = [0; BLOCK];
                        while !over.load(SeqCst) {
                            let offset = (client * BLOCK) as u64;
                            file.read_exact_at(&mut data, offset).unwrap();
                            done.fetch_add(1, SeqCst);
                        }
                    });
                }
                // Requests that come close upon each other are waited for awake.
                for round in 1..=5 {
                    eventually("there is load", || done.load(SeqCst) > round * 2000);
                    m.export().drain_begin().unwrap();
                    eventually("it is drained", || !m.export().drain_poll());
                    used = used.max(cpu_time_in(WATCHED));
                    m.export().drain_end().unwrap();
                }
                over.store(true, SeqCst);
            });
            assert!(used < WATCHED / 5, "{used:?} of CPU in {WATCHED:?}");
            m.delete();
        });
    });
}

#[test]
fn nothing_spins_when_every_slot_is_in_use() {
    alone("nothing_spins_when_every_slot_is_in_use", || {
        for_queues(|queues| {
            // Slots of each queue over /dev/fuse, entries of each CPU over
            // io_uring; of those only one CPU's are sure to be used up.
            const SLOTS: usize = 64;
            let m = Mounted::with(Memory::patterned(BLOCK), queues, |b| b.queue_depth(SLOTS));
            m.driver.hold();
            let by_ring = m.export().transport() == "io_uring";
            let (least, most) = if by_ring {
                let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_CONF);
                (SLOTS, SLOTS * cpus.unwrap().unwrap() as usize)
            } else {
                (SLOTS * queues, SLOTS * queues)
            };
            let files: Vec<_> = (0..most + 5).map(|_| m.open(false)).collect();
            let reads: Vec<_> = files.into_iter().map(|f| read_in_thread(f, 0)).collect();
            m.driver.wait_for_held(least);
            // Those of other CPUs still come.
            wait_for_rest();
            assert_rests("with every slot in use");
            let in_flight = m.export().stats().in_flight as usize;
            assert!((least..=most).contains(&in_flight), "{in_flight}");
            m.driver.release();
            for read in reads {
                read.recv_timeout(SOON).unwrap().unwrap();
            }
        });
    });
}

#[test]
fn a_driver_that_panics_fails_its_request_and_halts() {
    for_queues(|queues| {
        for place in [At::Read, At::Write, At::Flush] {
            let armed = Arc::new(AtomicBool::new(false));
            let arm = armed.clone();
            let driver = Memory::patterned(4 * BLOCK).handle();
            let hooked = Hooked::new(driver.clone(), move |at| {
                assert!(at != place || !arm.load(SeqCst), "the test's panic");
                Ok(())
            });
            let mut m = Mounted::started(driver, |path| {
                let builder = Export::builder(hooked).mountpoint(path).queues(queues);
                builder.writable(true).start().unwrap()
            });
            let (file, other) = (m.open(true), m.open(true));
            armed.store(true, SeqCst);
            let mut data = [0; BLOCK];
            let result = match place {
                At::Read => file.read_at(&mut data, 0).map(drop),
                At::Write => file.write_at(&data, 0).map(drop),
                _ => file.sync_data(),
            };
            assert_eq!(os_error(result), libc::EIO, "{place:?}");
            m.driver
                .wait_for_event(|e| matches!(e, Event::Halted { .. }));
            assert_eq!(m.export().state(), State::Ended);
            let failure = m.export().failure().expect("a reason");
            assert_eq!(failure.errno(), libc::ENOTRECOVERABLE);
            assert!(failure.message().contains("the test's panic"));
            // Unusable, but nobody hangs.
            assert!(other.read_at(&mut data, 0).is_err());
            assert!(File::open(&m.path).is_err());
            drop((file, other));
            m.delete();
            assert!(!is_mounted(&m.path));
            assert_eq!((halted(&m.driver), unmounted(&m.driver)), (1, 0));
            assert_eq!(Arc::strong_count(&m.driver.0), 1);
        }
    });
}

#[test]
fn a_panic_in_a_hook_halts_too() {
    for_queues(|queues| {
        for place in [
            At::BatchBegin,
            At::BatchEnd,
            At::Idle,
            At::Event,
            At::Length,
        ] {
            let armed = Arc::new(AtomicBool::new(false));
            let arm = armed.clone();
            let driver = Memory::patterned(4 * BLOCK).handle();
            let hooked = Hooked::new(driver.clone(), move |at| {
                assert!(at != place || !arm.swap(false, SeqCst), "the test's panic");
                Ok(())
            });
            let mut m = Mounted::started(driver, |path| {
                let builder = Export::builder(hooked).mountpoint(path).queues(queues);
                builder.writable(true).start().unwrap()
            });
            let file = m.open(true);
            if place == At::Idle {
                m.driver.hold();
                let read = read_in_thread(file, 0);
                m.driver.wait_for_held(1);
                m.export().drain_begin().unwrap();
                armed.store(true, SeqCst);
                m.driver.release();
                read.recv_timeout(SOON).unwrap().unwrap();
            } else {
                armed.store(true, SeqCst);
                match place {
                    At::Length => {
                        assert_eq!(errno(m.export().resized()), libc::ENOTRECOVERABLE);
                    }
                    At::Event => {}
                    // Again and again: one batch may take several requests.
                    _ => eventually("it halts", || file.read_at(&mut [0; 10], 0).is_err()),
                }
                if place == At::Event {
                    // A panic in it is logged; the export serves on.
                    let _ = umount2(&m.path, MntFlags::MNT_FORCE);
                    eventually("it ends", || m.export().state() == State::Ended);
                    drop(file);
                    m.delete();
                    continue;
                }
                drop(file);
            }
            m.driver
                .wait_for_event(|e| matches!(e, Event::Halted { .. }));
            m.delete();
            assert_eq!(halted(&m.driver), 1, "{place:?}");
        }
    });
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    alone("a_start_that_fails_leaves_nothing", || {
        let dir = own_dir();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let missing = dir.path().join("missing");
        for_queues(|queues| {
            // The first start makes what the process keeps.
            let export = Export::builder(Memory::patterned(BLOCK).handle());
            let export = export.mountpoint(&path).queues(queues).start().unwrap();
            export.delete(Some(SOON)).unwrap();
            let before = Belongings::now();
            let failing = |what: &str, expected: i32, driver: Hooked, path: &Path, grow: bool| {
                let memory = driver.inner.clone();
                let builder = Export::builder(driver).mountpoint(path).queues(queues);
                let result = builder.writable(true).growable(grow).start();
                assert_eq!(errno(result), expected, "{what}");
                eventually(what, || Belongings::now() == before);
                assert_eq!(Arc::strong_count(&memory.0), 1, "{what}");
                assert!(!events(&memory).contains(&Event::Started), "{what}");
                assert_eq!(unmounted(&memory), 0, "{what}");
            };
            let plain = |memory: Memory| Hooked::new(memory.handle(), |_| Ok(()));
            let refusing = |place: At, errno: i32| {
                Hooked::new(Memory::patterned(BLOCK).handle(), move |at| {
                    if at == place {
                        return Err(io::Error::from_raw_os_error(errno));
                    }
                    Ok(())
                })
            };
            let panicking = |place: At| {
                Hooked::new(Memory::patterned(BLOCK).handle(), move |at| {
                    assert_ne!(at, place, "the test's panic");
                    Ok(())
                })
            };
            let last = At::QueueStart(queues - 1);
            let eremoteio = libc::EREMOTEIO;
            failing(
                "length",
                eremoteio,
                refusing(At::Length, eremoteio),
                &path,
                false,
            );
            failing(
                "length panics",
                libc::ENOTRECOVERABLE,
                panicking(At::Length),
                &path,
                false,
            );
            failing(
                "queue_start",
                eremoteio,
                refusing(last, eremoteio),
                &path,
                false,
            );
            failing(
                "queue_start panics",
                libc::ENOTRECOVERABLE,
                panicking(last),
                &path,
                false,
            );
            let mut odd = Memory::patterned(BLOCK);
            odd.block_size = 1000;
            failing("block size", libc::EINVAL, plain(odd), &path, false);
            let mut read_only = Memory::patterned(BLOCK);
            read_only.writable = false;
            failing("no write", libc::EROFS, plain(read_only), &path, false);
            let fine = || plain(Memory::patterned(BLOCK));
            failing("no mountpoint", libc::ENOENT, fine(), &missing, false);
            let result = Export::builder(fine())
                .mountpoint(dir.path())
                .queues(queues);
            assert!(result.start().is_err(), "a directory");
            eventually("nothing is left", || Belongings::now() == before);
            let result = Export::builder(fine()).queues(queues).start();
            assert_eq!(errno(result), libc::EINVAL);
            let result = Export::builder(fine()).mountpoint(&path).growable(true);
            assert_eq!(errno(result.start()), libc::EINVAL);
            // Twice at one place.
            let first = Export::builder(fine()).mountpoint(&path).start().unwrap();
            let second = Export::builder(fine()).mountpoint(&path).start();
            assert!(second.is_err());
            first.delete(Some(SOON)).unwrap();
            eventually("nothing is left", || Belongings::now() == before);
            // None of this keeps the next start from working.
            let export = Export::builder(fine()).mountpoint(&path).queues(queues);
            let export = export.start().unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), BLOCK as u64);
            export.delete(Some(SOON)).unwrap();
        });
    });
}

#[test]
fn queues_stop_once_for_each_that_started() {
    for_queues(|queues| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let driver = Memory::patterned(BLOCK).handle();
        let hooked = Hooked::new(driver.clone(), move |at| {
            if let At::QueueStart(_) | At::QueueStop(_) = at {
                log.lock().unwrap().push((at, thread::current().id()));
            }
            Ok(())
        });
        let mut m = Mounted::started(driver, |path| {
            let builder = Export::builder(hooked).mountpoint(path).queues(queues);
            builder.start().unwrap()
        });
        m.delete();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 2 * queues);
        for queue in 0..queues {
            let of = |at| seen.iter().find(|(a, _)| *a == at).expect("a call").1;
            assert_eq!(of(At::QueueStart(queue)), of(At::QueueStop(queue)));
        }
    });
}

#[test]
fn a_thousand_exports_leave_nothing() {
    alone("a_thousand_exports_leave_nothing", || {
        let dir = own_dir();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let _watchdog = Watchdog::new(&path);
        let round = |n: usize| {
            let queues = [1, 2, 4][n % 3];
            let driver = Memory::patterned(16 * BLOCK).handle();
            let builder = Export::builder(driver.clone()).mountpoint(&path);
            let export = builder.writable(true).queues(queues).start().unwrap();
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            let mut data = [0; BLOCK];
            for block in 0..16 {
                file.read_exact_at(&mut data, block * BLOCK as u64).unwrap();
                file.write_all_at(&data, block * BLOCK as u64).unwrap();
            }
            // Every other one is deleted while it is open.
            let kept = n.is_multiple_of(2).then_some(file);
            export.delete(Some(SOON)).unwrap();
            drop(kept);
            assert_eq!(Arc::strong_count(&driver.0), 1);
        };
        (0..30).for_each(round);
        let (before, resident) = (Belongings::now(), resident_kib());
        let start = Instant::now();
        (0..1000).for_each(round);
        eprintln!("1000 exports took {:?}", start.elapsed());
        eventually("nothing is left", || Belongings::now() == before);
        let more = resident_kib().saturating_sub(resident);
        assert!(more < 2048, "{more} KiB more resident");
        assert!(start.elapsed() < Duration::from_secs(45));
    });
}

/// One asynchronous I/O through the kernel's native interface, which goes the
/// way of O_DIRECT with an asynchronous kiocb; the result as of read or write.
fn native_aio(file: &File, write: bool, data: &mut [u8], offset: u64) -> io::Result<usize> {
    #[repr(C)]
    #[derive(Default)]
    struct Iocb {
        data: u64,
        key: u32,
        rw_flags: i32,
        opcode: u16,
        priority: i16,
        fd: u32,
        buf: u64,
        nbytes: u64,
        offset: i64,
        reserved: u64,
        flags: u32,
        resfd: u32,
    }
    let mut context: libc::c_ulong = 0;
    let control = Iocb {
        opcode: u16::from(write),
        fd: file.as_raw_fd() as u32,
        buf: data.as_mut_ptr() as u64,
        nbytes: data.len() as u64,
        offset: offset as i64,
        ..Iocb::default()
    };
    let mut event = [0i64; 4];
    // SAFETY: the control block, the buffer, and the event outlive the
    // request, whose end is waited for before the context is destroyed.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_io_setup, 1, &mut context), 0);
        let list = [&raw const control];
        let submitted = libc::syscall(libc::SYS_io_submit, context, 1, list.as_ptr());
        if submitted != 1 {
            let error = io::Error::last_os_error();
            libc::syscall(libc::SYS_io_destroy, context);
            return Err(error);
        }
        let null = std::ptr::null_mut::<libc::timespec>();
        let got = libc::syscall(
            libc::SYS_io_getevents,
            context,
            1,
            1,
            event.as_mut_ptr(),
            null,
        );
        assert_eq!(got, 1);
        libc::syscall(libc::SYS_io_destroy, context);
    }
    match event[2] {
        n @ 0.. => Ok(n as usize),
        e => Err(io::Error::from_raw_os_error(-e as i32)),
    }
}

/// The host makes the image `len` bytes long, filling with the pattern.
fn host_resizes(m: &Mounted, len: usize) {
    m.driver.set_bytes(pattern(0, len));
    m.export().resized().unwrap();
}

#[test]
fn growth_by_the_host_is_seen_at_once() {
    for_queues(|queues| {
        // The new end on a page's border, just past it, and within a page.
        for new in [
            4 * BLOCK,
            3 * BLOCK + 1,
            3 * BLOCK + 2,
            2 * BLOCK + 100,
            3 * BLOCK - 1,
        ] {
            let m = Mounted::fixed(2 * BLOCK, queues);
            let plain = m.open(true);
            let direct = m.open_with(true, libc::O_DIRECT);
            assert_eq!(plain.metadata().unwrap().len(), 2 * BLOCK as u64);
            host_resizes(&m, new);
            let past = new - 2 * BLOCK;
            // Nothing that asks for attributes comes before these.
            let mut data = vec![0; past];
            let read = native_aio(&direct, false, &mut data, 2 * BLOCK as u64).unwrap();
            assert_eq!(read, past, "an asynchronous read past the old end");
            assert_eq!(data, pattern(2 * BLOCK, past));
            let mut data = vec![0; past];
            plain.read_exact_at(&mut data, 2 * BLOCK as u64).unwrap();
            assert_eq!(data, pattern(2 * BLOCK, past));
            assert_eq!(plain.metadata().unwrap().len(), new as u64);
            assert_eq!(fs::metadata(&m.path).unwrap().len(), new as u64);
            assert_eq!(m.driver.bytes(), pattern(0, new), "nothing was written");
        }
    });
}

#[test]
fn a_mapping_sees_what_the_host_added() {
    for_queues(|queues| {
        for new in [2 * BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1] {
            let m = Mounted::fixed(2 * BLOCK, queues);
            let file = m.open(true);
            let map = |len: usize| {
                // SAFETY: a new private mapping, kept until it is unmapped.
                let at = unsafe {
                    let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
                    libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0)
                };
                assert_ne!(at, libc::MAP_FAILED);
                // SAFETY: `len` bytes were mapped, and lie within the file.
                let data = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), len) }.to_vec();
                // SAFETY: mapped above, and no longer used.
                assert_eq!(unsafe { libc::munmap(at, len) }, 0);
                data
            };
            assert_eq!(map(2 * BLOCK), pattern(0, 2 * BLOCK));
            host_resizes(&m, new);
            assert_eq!(map(new), pattern(0, new), "{new}");
        }
    });
}

#[test]
fn who_appends_appends_after_what_the_host_added() {
    for_queues(|queues| {
        let m = Mounted::growable(BLOCK, queues);
        let mut plain = OpenOptions::new().append(true).open(&m.path).unwrap();
        plain.write_all(b"one").unwrap();
        assert_eq!(m.driver.bytes().len(), BLOCK + 3);
        host_resizes(&m, 3 * BLOCK + 5);
        plain.write_all(b"two").unwrap();
        host_resizes(&m, 5 * BLOCK + 1);
        let mut options = OpenOptions::new();
        let direct = options
            .append(true)
            .custom_flags(libc::O_DIRECT)
            .open(&m.path);
        let direct = direct.unwrap();
        host_resizes(&m, 6 * BLOCK);
        native_aio(&direct, true, &mut b"three".to_owned(), 0).unwrap();
        let mut expected = pattern(0, 6 * BLOCK);
        expected.extend_from_slice(b"three");
        assert!(m.driver.bytes() == expected);
    });
}

#[test]
fn shrinking_by_the_host_is_seen_at_once() {
    for_queues(|queues| {
        let m = Mounted::fixed(4 * BLOCK, queues);
        let mut file = m.open(true);
        let direct = m.open_with(true, libc::O_DIRECT);
        assert_eq!(file.metadata().unwrap().len(), 4 * BLOCK as u64);
        host_resizes(&m, BLOCK + 7);
        let mut data = vec![0; 2 * BLOCK];
        assert_eq!(
            native_aio(&direct, false, &mut data, BLOCK as u64).unwrap(),
            7
        );
        assert_eq!(
            native_aio(&direct, false, &mut data, 2 * BLOCK as u64).unwrap(),
            0
        );
        let mut all = Vec::new();
        file.read_to_end(&mut all).unwrap();
        assert_eq!(all, pattern(0, BLOCK + 7));
        assert_eq!(fs::metadata(&m.path).unwrap().len(), BLOCK as u64 + 7);
    });
}

#[test]
fn a_failed_write_past_the_old_end_does_not_undo_the_hosts_growth() {
    for_queues(|queues| {
        // The host has told, and has not yet told.
        for told in [true, false] {
            let m = Mounted::growable(2 * BLOCK, queues);
            let direct = m.open_with(true, libc::O_DIRECT);
            assert_eq!(direct.metadata().unwrap().len(), 2 * BLOCK as u64);
            m.driver.fail_if(|call, _, _| {
                let fails = matches!(call, Call::Write);
                fails.then(|| io::Error::from_raw_os_error(libc::EIO))
            });
            m.driver.set_bytes(pattern(0, 5 * BLOCK));
            if told {
                m.export().resized().unwrap();
            }
            let mut data = vec![1; BLOCK];
            let at = if told { 3 * BLOCK } else { BLOCK + BLOCK / 2 };
            if told {
                let result = native_aio(&direct, true, &mut data, at as u64);
                assert_eq!(os_error(result), libc::EIO);
            }
            // The same, racing with the host's word.
            thread::scope(|scope| {
                let racer = scope.spawn(|| {
                    let mut data = vec![1; BLOCK];
                    native_aio(&direct, true, &mut data, 4 * BLOCK as u64)
                });
                m.export().resized().unwrap();
                assert!(racer.join().unwrap().is_err());
            });
            let bytes = m.driver.bytes();
            assert!(
                bytes.len() >= 5 * BLOCK,
                "the image shrank to {}",
                bytes.len()
            );
            assert_eq!(bytes[..5 * BLOCK], pattern(0, 5 * BLOCK));
        }
    });
}

#[test]
fn growth_by_the_host_and_by_clients_at_once_never_shrinks() {
    for_queues(|queues| {
        let m = Mounted::growable(BLOCK, queues);
        const ROUNDS: usize = 150;
        thread::scope(|scope| {
            let writer = OpenOptions::new().append(true).open(&m.path).unwrap();
            scope.spawn(move || {
                let mut writer = writer;
                for _ in 0..ROUNDS {
                    writer.write_all(&[7; 100]).unwrap();
                }
            });
            for _ in 0..ROUNDS {
                m.export().resized().unwrap();
            }
        });
        let appended = ROUNDS * 100;
        assert_eq!(m.driver.bytes().len(), BLOCK + appended);
        let length = fs::metadata(&m.path).unwrap().len();
        assert_eq!(length, (BLOCK + appended) as u64);
    });
}

#[test]
fn the_hosts_word_amid_a_clients_growth_undoes_nothing() {
    for_queues(|queues| {
        let m = Mounted::growable(BLOCK, queues);
        let file = m.open(true);
        m.driver.hold();
        thread::scope(|scope| {
            let writer = scope.spawn(|| file.write_all_at(b"grown", 2 * BLOCK as u64));
            // The truncation that makes room for it is under way.
            m.driver.wait_for_held(1);
            m.export().resized().unwrap();
            m.driver.release();
            writer.join().unwrap().unwrap();
        });
        let length = fs::metadata(&m.path).unwrap().len();
        assert_eq!(length, 2 * BLOCK as u64 + 5);
        assert_eq!(m.driver.bytes().len(), 2 * BLOCK + 5);
    });
}

#[test]
fn exports_in_one_process_are_independent() {
    for_queues(|queues| {
        let mut first = Mounted::fixed(BLOCK, queues);
        let second = Mounted::fixed(2 * BLOCK, queues);
        let third = Mounted::fixed(3 * BLOCK, queues);
        first.export().drain_begin().unwrap();
        second.driver.hold();
        let waiting = read_in_thread(second.open(false), 0);
        second.driver.wait_for_held(1);
        let mut data = [0; BLOCK];
        third.open(true).read_exact_at(&mut data, 0).unwrap();
        first.export().drain_end().unwrap();
        first.delete();
        third.open(true).read_exact_at(&mut data, 0).unwrap();
        second.driver.release();
        waiting.recv_timeout(SOON).unwrap().unwrap();
    });
}

/// Reads and writes another file, blocking.
struct OnFile(File);

impl blkfuse::BlockDriver for OnFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    async fn read(
        &self,
        _: &blkfuse::Io<'_>,
        buf: &mut blkfuse::ReadBuf<'_>,
        offset: u64,
    ) -> io::Result<()> {
        self.0.read_exact_at(buf.bytes_mut(), offset)
    }
}

#[test]
fn an_image_may_be_another_exports_file() {
    for_queues(|queues| {
        let mut lower = Mounted::fixed(64 * BLOCK, queues);
        let image = lower.open(false);
        let holder = Memory::patterned(1).handle();
        let mut upper = Mounted::started(holder, |path| {
            let builder = Export::builder(OnFile(image)).mountpoint(path);
            builder.queues(queues).start().unwrap()
        });
        assert_eq!(fs::read(&upper.path).unwrap(), pattern(0, 64 * BLOCK));
        // The lower one goes first: the upper one fails, and does not hang.
        let file = upper.open(false);
        lower.delete();
        assert!(file.read_at(&mut [0; BLOCK], 0).is_err());
        drop(file);
        upper.delete();
    });
}

#[test]
fn statistics_tell_what_was_done() {
    alone("statistics_tell_what_was_done", || {
        for_queues(|queues| {
            let m = Mounted::fixed(16 * BLOCK, queues);
            let file = m.open(true);
            let mut data = [0; BLOCK];
            for block in 0..10 {
                file.read_exact_at(&mut data, block * BLOCK as u64).unwrap();
            }
            for block in 0..6 {
                file.write_all_at(&data, block * BLOCK as u64).unwrap();
            }
            file.sync_all().unwrap();
            m.driver.fail_if(|call, _, _| {
                (call == Call::Read).then(|| io::Error::from_raw_os_error(libc::EREMOTEIO))
            });
            assert_eq!(os_error(file.read_at(&mut data, 0)), libc::EREMOTEIO);
            m.driver.fail_never();
            let stats = m.export().stats();
            let reads = stats.of(OpKind::Read);
            assert_eq!((reads.operations, reads.errors), (11, 1));
            assert_eq!(reads.bytes, 10 * BLOCK as u64);
            let writes = stats.of(OpKind::Write);
            assert_eq!((writes.operations, writes.errors), (6, 0));
            assert_eq!(writes.bytes, 6 * BLOCK as u64);
            assert_eq!(stats.of(OpKind::Flush).operations, 1);
            assert_eq!(stats.latency.iter().sum::<u64>(), 17);
            m.driver.hold();
            let reads: Vec<_> = (0..3).map(|i| read_in_thread(m.open(false), i)).collect();
            m.driver.wait_for_held(3);
            assert_eq!(m.export().stats().in_flight, 3);
            thread::sleep(Duration::from_millis(20));
            m.driver.release();
            for read in reads {
                read.recv_timeout(SOON).unwrap().unwrap();
            }
            let stats = m.export().stats();
            assert_eq!(stats.latency.iter().sum::<u64>(), 20);
            // At least three took more than 2^24 nanoseconds, 16 ms.
            assert!(stats.latency[24..LATENCY_BUCKETS].iter().sum::<u64>() >= 3);
            eventually("nothing is in flight", || m.export().stats().in_flight == 0);
        });
    });
}

#[test]
fn a_forked_child_does_not_keep_the_mount() {
    alone("a_forked_child_does_not_keep_the_mount", || {
        for_queues(|queues| {
            let mut m = Mounted::fixed(BLOCK, queues);
            let (reader, writer) = io::pipe().unwrap();
            // SAFETY: the child calls only what is safe after a fork, and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // Waits for the parent to close the pipe or to end.
                let mut byte = 0u8;
                // SAFETY: plain system calls on this frame's memory.
                unsafe {
                    libc::close(writer.as_raw_fd());
                    libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1);
                    libc::_exit(0);
                }
            }
            assert!(child > 0);
            drop(reader);
            let mut data = [0; BLOCK];
            let file = m.open(true);
            file.read_exact_at(&mut data, 0).unwrap();
            m.delete();
            assert!(!is_mounted(&m.path));
            // The child lives on, and yet the connection has ended.
            assert!(file.read_exact_at(&mut data, 0).is_err());
            drop(file);
            drop(writer);
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        });
    });
}

#[test]
fn mapped_memory_is_written_back_however_long_the_driver_takes() {
    for_queues(|queues| {
        let len = 40 * BLOCK + 3;
        let mut m = Mounted::fixed(len, queues);
        let file = m.open(true);
        // SAFETY: nobody else changes the file, and nothing touches the memory
        // after the export's end.
        let mut memory = unsafe { MmapMut::map_mut(&file) }.unwrap();
        drop(file);
        memory.copy_from_slice(&pattern(9, len));
        m.driver.hold();
        thread::scope(|scope| {
            let stop = scope.spawn(|| m.export().stop(Stop::Lazy));
            // The unmounting waits for none of it.
            eventually("the unmounting", || !is_mounted(&m.path));
            m.driver.wait_for_held(1);
            m.driver.release();
            stop.join().unwrap().unwrap();
        });
        m.delete();
        assert!(m.driver.bytes() == pattern(9, len), "it was lost");
        drop(memory);
    });
}

/// What the process to be killed has of the test's.
const VICTIM: &str = "BLKFUSE_TEST_VICTIM";

/// Exports at `path` and stops, which does not end: the driver does not answer
/// when a client's mapped memory is written back.
fn be_killed_while_writing_back(path: &Path) {
    let driver = Memory::patterned(BLOCK).handle();
    let builder = Export::builder(driver.clone()).mountpoint(path);
    let export = builder.writable(true).start().unwrap();
    driver.wait_for_event(|e| *e == Event::Started);
    // The client has written.
    io::stdin().read_exact(&mut [0]).unwrap();
    driver.hold();
    thread::scope(|scope| {
        scope.spawn(|| export.stop(Stop::Lazy));
        driver.wait_for_held(1);
        File::create(path.with_extension("held")).unwrap();
        loop {
            thread::park();
        }
    });
}

#[test]
fn a_host_killed_as_it_writes_back_leaves_no_client_waiting() {
    if let Some(path) = std::env::var_os(VICTIM) {
        return be_killed_while_writing_back(Path::new(&path));
    }
    if !common::can_export() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().canonicalize().unwrap();
    let (path, other) = (at.join("disk"), at.join("other"));
    File::create(&path).unwrap();
    File::create(&other).unwrap();
    let name = "a_host_killed_as_it_writes_back_leaves_no_client_waiting";
    let mut host = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(VICTIM, &path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the export", || is_mounted(&path));
    // The export's own mount goes; through this one a test that fails can end.
    let _watchdog = Watchdog::new(&other);
    let (none, bind) = (None::<&str>, MsFlags::MS_BIND);
    nix::mount::mount(Some(&path), &other, none, bind, none).unwrap();

    let file = OpenOptions::new().read(true).write(true).open(&path);
    let file = file.unwrap();
    // SAFETY: nobody else changes the file, and nothing touches the memory after
    // the export's end.
    let mut memory = unsafe { MmapMut::map_mut(&file) }.unwrap();
    memory[0] = !memory[0];
    host.stdin.take().unwrap().write_all(b"w").unwrap();
    let held = path.with_extension("held");
    eventually("the driver holds what is written back", || held.exists());
    // Who is killed before leaves the mount, too.
    eventually("the unmounting", || !is_mounted(&path));
    host.kill().unwrap();
    eventually("the host is gone", || host.try_wait().unwrap().is_some());
    let read = read_in_thread(file, 0);
    assert!(read.recv_timeout(SOON).unwrap().is_err());
    drop(memory);
}

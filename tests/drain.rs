//! Drains on real mounts: what is in flight is waited for, what arrives waits,
//! and nothing is lost.

mod common;
#[path = "common/hooked.rs"]
mod hooked;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use blkfuse::{Export, Result, State, Stop};

use common::{Memory, Mounted, SOON, eventually, for_queues, is_mounted, pattern};
use hooked::{At, Hooked};

/// How long something that must not happen is given to happen.
const A_WHILE: Duration = Duration::from_millis(30);
const BLOCK: usize = 4096;

fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    result.expect_err("it must fail").errno()
}

/// Reads one block in a thread; the result comes through the channel.
fn read_in_thread(file: File, block: usize) -> mpsc::Receiver<std::io::Result<Vec<u8>>> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let mut data = vec![0; BLOCK];
        let read = file.read_exact_at(&mut data, (block * BLOCK) as u64);
        let _ = done.send(read.map(|()| data));
    });
    result
}

/// Gives other threads many chances to run.
fn let_others_run() {
    for _ in 0..200 {
        thread::yield_now();
    }
}

#[test]
fn under_load_drains_are_quiet_and_lose_nothing() {
    for_queues(|queues| {
        const CLIENTS: usize = 4;
        const ROUNDS: u64 = 200;
        const DRAINS: u64 = 100;
        let mut m = Mounted::fixed(CLIENTS * BLOCK, queues);
        let drains = AtomicU64::new(0);
        thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let (file, drains) = (m.open(true), &drains);
                    scope.spawn(move || {
                        let at = (client * BLOCK) as u64;
                        let enough = || drains.load(SeqCst) >= DRAINS;
                        for round in (0u64..).take_while(|n| *n < ROUNDS || !enough()) {
                            let data = [(round as u8) ^ (client as u8); BLOCK];
                            file.write_all_at(&data, at).unwrap();
                            let mut back = [0; BLOCK];
                            file.read_exact_at(&mut back, at).unwrap();
                            assert_eq!(data, back);
                        }
                    })
                })
                .collect();
            let export = m.export();
            while clients.iter().any(|c| !c.is_finished()) {
                export.drain_begin().unwrap();
                while export.drain_poll() {
                    thread::yield_now();
                }
                let calls = m.driver.count.load(SeqCst);
                let_others_run();
                assert_eq!(calls, m.driver.count.load(SeqCst), "a call in a drain");
                assert!(!export.drain_poll());
                export.drain_end().unwrap();
                drains.fetch_add(1, SeqCst);
                let_others_run();
            }
            clients.into_iter().for_each(|c| c.join().unwrap());
        });
        assert!(drains.load(SeqCst) >= DRAINS);
        m.delete();
    });
}

#[test]
fn drains_nest() {
    for_queues(|queues| {
        let m = Mounted::fixed(BLOCK, queues);
        let file = m.open(false);
        let export = m.export();
        export.drain_begin().unwrap();
        export.drain_begin().unwrap();
        let read = read_in_thread(file, 0);
        assert!(read.recv_timeout(A_WHILE).is_err());
        export.drain_end().unwrap();
        // A drain inside a drain ends without letting anything pass.
        export.drain(Some(SOON)).unwrap();
        assert!(read.recv_timeout(A_WHILE).is_err());
        assert_eq!(m.driver.count.load(SeqCst), 0);
        export.drain_end().unwrap();
        let data = read.recv_timeout(SOON).unwrap().unwrap();
        assert_eq!(data, pattern(0, BLOCK));
        assert_eq!(errno(export.drain_end()), libc::EINVAL);
    });
}

#[test]
fn a_drain_waits_for_exactly_what_is_in_flight() {
    for_queues(|queues| {
        let m = Mounted::fixed(8 * BLOCK, queues);
        let files: Vec<_> = (0..5).map(|_| m.open(false)).collect();
        let export = m.export();
        m.driver.hold();
        let mut reads: Vec<_> = files.into_iter().enumerate().collect();
        let late = reads.split_off(3);
        let early: Vec<_> = reads
            .into_iter()
            .map(|(i, f)| read_in_thread(f, i))
            .collect();
        m.driver.wait_for_held(3);
        assert_eq!(export.stats().in_flight, 3);
        export.drain_begin().unwrap();
        assert!(export.drain_poll());
        let late: Vec<_> = late
            .into_iter()
            .map(|(i, f)| read_in_thread(f, i))
            .collect();
        assert!(late[0].recv_timeout(A_WHILE).is_err());
        assert_eq!(m.driver.count.load(SeqCst), 3, "a call in a drain");
        assert_eq!(m.driver.idle_calls.load(SeqCst), 0);
        m.driver.release();
        eventually("the drain is complete", || !export.drain_poll());
        eventually("idle is called", || m.driver.idle_calls.load(SeqCst) > 0);
        for (i, read) in early.iter().enumerate() {
            let data = read.recv_timeout(SOON).unwrap().unwrap();
            assert_eq!(data, pattern(i * BLOCK, BLOCK));
        }
        assert!(late[1].recv_timeout(A_WHILE).is_err());
        assert_eq!(m.driver.count.load(SeqCst), 3, "a call in a drain");
        export.drain_end().unwrap();
        for (i, read) in late.iter().enumerate() {
            let data = read.recv_timeout(SOON).unwrap().unwrap();
            assert_eq!(data, pattern((3 + i) * BLOCK, BLOCK));
        }
    });
}

#[test]
fn a_drain_that_takes_too_long_is_taken_back() {
    for_queues(|queues| {
        let m = Mounted::fixed(2 * BLOCK, queues);
        let export = m.export();
        m.driver.hold();
        let held = read_in_thread(m.open(false), 0);
        m.driver.wait_for_held(1);
        assert_eq!(errno(export.drain(Some(A_WHILE))), libc::ETIMEDOUT);
        assert_eq!(errno(export.drain_end()), libc::EINVAL);
        // Service goes on: another request gets to the driver.
        let other = read_in_thread(m.open(false), 1);
        m.driver.wait_for_held(2);
        m.driver.release();
        assert_eq!(held.recv_timeout(SOON).unwrap().unwrap(), pattern(0, BLOCK));
        assert!(other.recv_timeout(SOON).unwrap().is_ok());
        export.drain(Some(SOON)).unwrap();
    });
}

#[test]
fn waiting_for_idle_is_enough_and_no_hook_follows_it() {
    for_queues(|queues| {
        let drained = Arc::new(AtomicBool::new(false));
        let intruders = Arc::new(Mutex::new(Vec::new()));
        let idle = Arc::new((Mutex::new(0u64), Condvar::new()));
        let hook = {
            let (drained, intruders, idle) = (drained.clone(), intruders.clone(), idle.clone());
            move |at: At| {
                if at == At::Idle {
                    *idle.0.lock().unwrap() += 1;
                    idle.1.notify_all();
                } else if drained.load(SeqCst) {
                    intruders.lock().unwrap().push(at);
                }
                Ok(())
            }
        };
        let driver = Memory::patterned(8 * BLOCK).handle();
        let hooked = Hooked::new(driver.clone(), hook);
        let mut m = Mounted::started(driver, |path| {
            let builder = Export::builder(hooked).mountpoint(path).queues(queues);
            builder.writable(true).start().unwrap()
        });
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for client in 0..4 {
                let (file, over) = (m.open(true), &over);
                scope.spawn(move || {
                    let mut data = [0; BLOCK];
                    while !over.load(SeqCst) {
                        file.read_exact_at(&mut data, (client * BLOCK) as u64)
                            .unwrap();
                    }
                });
            }
            let export = m.export();
            let mut lost = None;
            for round in 0..500 {
                export.drain_begin().unwrap();
                let mut seen = idle.0.lock().unwrap();
                let mut before = *seen;
                drop(seen);
                while export.drain_poll() {
                    // As an event loop would: nothing but `idle` wakes it.
                    seen = idle.0.lock().unwrap();
                    let (now, waited) = idle
                        .1
                        .wait_timeout_while(seen, Duration::from_secs(3), |n| *n == before)
                        .unwrap();
                    before = *now;
                    drop(now);
                    if waited.timed_out() {
                        lost = Some((round, export.drain_poll()));
                        break;
                    }
                }
                if lost.is_none() {
                    drained.store(true, SeqCst);
                    let_others_run();
                    drained.store(false, SeqCst);
                }
                export.drain_end().unwrap();
                if lost.is_some() {
                    break;
                }
                // Let a random number of requests through.
                (0..round % 7).for_each(|_| thread::yield_now());
            }
            over.store(true, SeqCst);
            assert_eq!(lost, None, "idle was not called");
        });
        assert_eq!(*intruders.lock().unwrap(), [], "hooks in a drain");
        m.delete();
    });
}

#[test]
fn what_would_wait_for_itself_is_refused() {
    for_queues(|queues| {
        let export = Arc::new(Mutex::new(None::<Export>));
        let results = Arc::new(Mutex::new(Vec::new()));
        let hook = {
            let (export, results) = (export.clone(), results.clone());
            move |at: At| {
                let guard = export.lock().unwrap();
                let Some(export) = guard.as_ref().filter(|_| at == At::Read) else {
                    return Ok(());
                };
                let mut results = results.lock().unwrap();
                results.push(export.drain(None));
                results.push(export.drain_begin());
                Ok(())
            }
        };
        let driver = Memory::patterned(BLOCK).handle();
        let hooked = Hooked::new(driver.clone(), hook);
        let mut m = Mounted::started(driver, |path| {
            let builder = Export::builder(hooked).mountpoint(path).queues(queues);
            builder.start().unwrap()
        });
        let file = m.open(false);
        *export.lock().unwrap() = m.export.take();
        let read = read_in_thread(file, 0).recv_timeout(SOON).unwrap();
        assert!(read.is_ok());
        m.export = export.lock().unwrap().take();
        let results = std::mem::take(&mut *results.lock().unwrap());
        assert_eq!(results.len(), 2);
        for result in results {
            assert_eq!(errno(result), libc::EDEADLK);
        }
        // The refused drain holds nothing up.
        assert_eq!(errno(m.export().drain_end()), libc::EINVAL);
        m.delete();
    });
}

#[test]
fn an_export_deleted_by_its_own_driver_goes_by_itself() {
    for_queues(|queues| {
        for place in [At::Read, At::BatchEnd, At::Idle, At::QueueStop(0)] {
            let export = Arc::new(Mutex::new(None::<Export>));
            let (result, results) = mpsc::channel();
            let hook = {
                let export = export.clone();
                move |at: At| {
                    if at == place
                        && let Some(export) = export.lock().unwrap().take()
                    {
                        result.send(export.delete(None)).unwrap();
                    }
                    Ok(())
                }
            };
            let driver = Memory::patterned(BLOCK).handle();
            let dropped = driver.dropped.clone();
            let hooked = Hooked::new(driver.clone(), hook);
            let mut m = Mounted::started(driver, |path| {
                let builder = Export::builder(hooked).mountpoint(path).queues(queues);
                builder.start().unwrap()
            });
            let file = m.open(false);
            *export.lock().unwrap() = m.export.take();
            let with_export = |f: &dyn Fn(&Export)| {
                // Not locked while it waits: the hook takes the export.
                let taken = export.lock().unwrap().take();
                if let Some(taken) = taken {
                    f(&taken);
                    *export.lock().unwrap() = Some(taken);
                }
            };
            if let At::QueueStop(_) = place {
                // The mount goes, the queues end, and one of them deletes.
                with_export(&|e| e.stop(Stop::Lazy).unwrap());
            } else {
                if place == At::Idle {
                    m.driver.hold();
                }
                let read = read_in_thread(file, 0);
                if place == At::Idle {
                    m.driver.wait_for_held(1);
                    with_export(&|e| e.drain_begin().unwrap());
                    m.driver.release();
                }
                drop(read.recv_timeout(SOON).unwrap());
            }
            if let Ok(outcome) = results.recv_timeout(if place == At::QueueStop(0) {
                Duration::from_millis(200)
            } else {
                SOON
            }) {
                assert_eq!(errno(outcome), libc::EDEADLK, "{place:?}");
            } else {
                // The queue had ended before the test gave the export back.
                assert_eq!(place, At::QueueStop(0));
                drop(export.lock().unwrap().take());
            }
            eventually("the file is gone", || !is_mounted(&m.path));
            // All that is left of the driver is the test's own handle.
            eventually("the driver is dropped", || {
                Arc::strong_count(&m.driver.0) == 1
            });
            assert_eq!(dropped.load(SeqCst), 0);
        }
    });
}

#[test]
fn clients_that_a_drain_holds_up_get_an_error_from_stop_and_delete() {
    for_queues(|queues| {
        for force in [false, true] {
            let mut m = Mounted::fixed(8 * BLOCK, queues);
            let files: Vec<_> = (0..6).map(|_| m.open(false)).collect();
            m.export().drain_begin().unwrap();
            let reads: Vec<_> = files
                .into_iter()
                .enumerate()
                .map(|(i, f)| read_in_thread(f, i))
                .collect();
            assert!(reads[5].recv_timeout(A_WHILE).is_err());
            let how = if force { Stop::Force } else { Stop::Lazy };
            m.export().stop(how).unwrap();
            assert!(!is_mounted(&m.path));
            for read in reads {
                assert!(read.recv_timeout(SOON).unwrap().is_err());
            }
            assert_eq!(m.driver.count.load(SeqCst), 0);
            eventually("the export ends", || m.export().state() == State::Ended);
            m.export().drain_end().unwrap();
            m.delete();
        }
    });
}

#[test]
fn a_drains_end_may_meet_the_exports_end() {
    for_queues(|queues| {
        for round in 0..60 {
            let mut m = Mounted::fixed(8 * BLOCK, queues);
            let files: Vec<_> = (0..3).map(|_| m.open(false)).collect();
            m.export().drain_begin().unwrap();
            let reads: Vec<_> = files
                .into_iter()
                .enumerate()
                .map(|(i, f)| read_in_thread(f, i))
                .collect();
            thread::scope(|scope| {
                let export = m.export();
                let end = scope.spawn(move || {
                    (0..round % 5).for_each(|_| thread::yield_now());
                    export.drain_end()
                });
                export.stop(Stop::Lazy).unwrap();
                end.join().unwrap().unwrap();
            });
            if round % 2 == 0 {
                m.delete();
            } else {
                drop(m.export.take());
            }
            for read in reads {
                // Served or refused, but answered.
                drop(read.recv_timeout(SOON).expect("an answer"));
            }
        }
    });
}

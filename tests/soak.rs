//! Everything at once for a long time, over each transport: fio checks what it
//! has written while drains come every few milliseconds, and in between the
//! export is ended from outside under load and started again.
//!
//! Run only when asked for; README's "Developing" says how. BLKFUSE_SOAK is how
//! many seconds it takes over each transport, 600 if it is not set.

#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/hosted.rs"]
mod hosted;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use blkfuse::{Event, Export, IoUring, OpKind, Stop};
use nix::mount::{MntFlags, umount2};

use alone::{Belongings, own_dir, resident_kib};
use common::{Handle, Memory, SOON, Watchdog, client, eventually, for_transports, skip};
use hosted::Clients;

const LENGTH: usize = 64 << 20;

#[test]
fn a_role_in_another_test() {
    hosted::play();
}

/// What a soak has done.
#[derive(Debug, Default)]
struct Done {
    rounds: u64,
    drains: AtomicU64,
    operations: u64,
    bytes: u64,
}

#[test]
#[ignore = "it takes minutes; see README"]
fn a_soak() {
    if !client::have("fio") {
        return skip("fio is not installed");
    }
    let seconds = std::env::var("BLKFUSE_SOAK").map_or(600, |n| n.parse().unwrap());
    let dir = own_dir();
    let path = dir.path().canonicalize().unwrap().join("disk");
    File::create(&path).unwrap();
    for_transports(|transport| {
        let driver = Memory::patterned(LENGTH).handle();
        let mut done = Done::default();
        // The first rounds make what the process keeps.
        (0..3).for_each(|n| round(transport, n, &driver, &path, &mut done));
        let (before, resident) = (Belongings::now(), resident_kib());
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            let n = done.rounds as usize;
            round(transport, n, &driver, &path, &mut done);
            before.are_all();
        }
        let more = resident_kib().saturating_sub(resident);
        eprintln!("{transport:?}: {done:?}, {more} KiB more resident");
        assert!(more < 16384, "{more} KiB more resident");
        assert!(done.drains.load(SeqCst) > seconds * 20);
        assert!(done.operations > seconds * 1000);
    });
}

/// One export's life.
fn round(transport: IoUring, n: usize, driver: &Handle, path: &Path, done: &mut Done) {
    let _watchdog = Watchdog::new(path);
    driver.events.lock().unwrap().clear();
    driver.calls.lock().unwrap().clear();
    let builder = Export::builder(driver.clone()).mountpoint(path);
    let builder = builder.writable(true).queues(common::QUEUES[n % 3]);
    let export = builder.io_uring(transport).start().unwrap();

    while_draining(&export, &done.drains, || {
        fio(path, ["psync", "libaio", "io_uring"][n % 3]);
        let mut clients = Clients::of(path);
        thread::sleep(Duration::from_millis(500));
        match n % 5 {
            // Who has it open is served on.
            0 => {
                umount2(path, MntFlags::MNT_DETACH).unwrap();
                thread::sleep(Duration::from_millis(100));
                clients.finish();
            }
            1 => {
                let _ = umount2(path, MntFlags::MNT_FORCE);
                clients.fail();
            }
            2 => {
                let _ = umount2(path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
                clients.fail();
            }
            3 => {
                export.stop(Stop::Lazy).unwrap();
                clients.fail();
            }
            _ => {
                export.stop(Stop::Force).unwrap();
                clients.fail();
            }
        }
    });
    if n % 5 < 3 {
        driver.wait_for_event(|e| *e == Event::Unmounted);
    }
    eventually("nothing is in flight", || export.stats().in_flight == 0);
    let stats = export.stats();
    for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
        let of = stats.of(kind);
        assert_eq!(of.errors, 0, "{kind:?}");
        done.operations += of.operations;
        done.bytes += of.bytes;
    }
    assert_eq!(export.failure(), None);
    let _quiet = client::no_children();
    if let Err(error) = export.delete(Some(SOON)) {
        panic!("round {n}: {error}:{}", hosted::states(std::process::id()));
    }
    done.rounds += 1;
}

/// Runs `what` while the export is drained every few milliseconds.
fn while_draining(export: &Export, drains: &AtomicU64, what: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if over.load(SeqCst) {
                    break;
                }
                export.drain_begin().unwrap();
                while export.drain_poll() {
                    thread::yield_now();
                }
                thread::sleep(Duration::from_micros(n % 4 * 300));
                export.drain_end().unwrap();
                drains.fetch_add(1, SeqCst);
                thread::sleep(Duration::from_millis(1 + n % 8));
            }
        });
        // Also if it panics.
        let _over = SetOnDrop(&over);
        what();
    });
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Four jobs write their own parts in blocks of many sizes, and check them. The
/// clients' part comes before.
fn fio(path: &Path, engine: &str) {
    let mut fio = Command::new("fio");
    fio.args(["--name=soak", "--rw=randrw", "--numjobs=4", "--thread"]);
    fio.args(["--bssplit=512/20:4k/40:12k/20:64k/10:256k/10"]);
    fio.args(["--offset=1m", "--offset_increment=8m", "--size=8m"]);
    fio.args(["--direct=1", "--iodepth=16", "--allow_file_create=0"]);
    fio.args([
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ]);
    fio.arg(format!("--ioengine={engine}"));
    fio.arg(format!("--filename={}", path.display()));
    client::run(fio.current_dir("/tmp"));
}

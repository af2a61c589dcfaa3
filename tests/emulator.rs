//! The example of a host with event loops of its own, c-examples/emulator.c, as
//! its users meet it: commands in, answers out, and clients on its disk.

mod common;
#[path = "common/compiled.rs"]
mod compiled;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use blkfuse::IoUring;
use common::checked::{SANITIZE, Sanitizers, valgrind};
use common::client::{command, fallocate, have, size, start};
use common::{SOON, Watchdog, for_transports, is_mounted, pattern, skip, unmount, within};
use compiled::{C11, Linking, PATIENCE, Running, Workshop};
use nix::mount::MntFlags;

/// Not a multiple of the emulator's clusters, nor of the sectors.
const LENGTH: usize = (6 << 20) + 1000;
const CLUSTER: usize = 65536;

fn build(workshop: &Workshop) -> Option<PathBuf> {
    workshop.build("gcc", C11, "c-examples/emulator.c", Linking::Shared)
}

/// An emulator that runs.
struct Emulator {
    running: Running,
    path: PathBuf,
    base: PathBuf,
    said: PathBuf,
    /// How long it may take to do something.
    limit: Duration,
    _watchdog: Watchdog,
}

impl Emulator {
    fn start(workshop: &Workshop, program: impl AsRef<OsStr>, arguments: &[&str]) -> Self {
        Self::start_by(workshop, Command::new(program), arguments, SOON)
    }

    /// `command`: the beginning of its command line.
    fn start_by(
        workshop: &Workshop,
        mut command: Command,
        arguments: &[&str],
        limit: Duration,
    ) -> Self {
        let (path, base) = (workshop.mountpoint("disk"), workshop.path("base"));
        let said = workshop.path("said");
        fs::write(&base, pattern(0, LENGTH)).unwrap();
        let watchdog = Watchdog::new(&path);
        command.arg(&base).arg(&path).args(arguments);
        command.current_dir(workshop.path("")).stdin(Stdio::piped());
        command.stderr(File::create(&said).unwrap());
        eprintln!("{command:?}");
        let running = Running::start(&mut command);
        let first = running.line(limit);
        assert_eq!(
            first,
            format!("ok {} is a disk of {LENGTH} bytes", path.display())
        );
        Self {
            running,
            path,
            base,
            said,
            limit,
            _watchdog: watchdog,
        }
    }

    /// For every transport, with so many threads and queues.
    fn for_each(settings: &[(usize, usize)], test: impl Fn(Self)) {
        for_transports(|transport| {
            let workshop = Workshop::new();
            let Some(program) = build(&workshop) else {
                return;
            };
            for (threads, queues) in settings {
                let threads = threads.to_string();
                let queues = format!("queues={queues}");
                let arguments = [&threads, &queues, io_uring(transport)];
                test(Self::start(&workshop, &program, &arguments));
            }
        });
    }

    fn open(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .unwrap()
    }

    fn ask(&mut self, command: &str) -> String {
        self.running.tell(command);
        self.running.line(self.limit)
    }

    /// The disk, as a client sees it.
    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    /// How many requests each thread has begun.
    fn by_thread(&mut self) -> Vec<u64> {
        let answer = self.ask("stats");
        let (start, numbers) = answer.split_once("; by thread: ").unwrap();
        assert!(start.starts_with("ok "), "{answer}");
        numbers.split(' ').map(|n| n.parse().unwrap()).collect()
    }

    /// It is to have been told to end: it ends well, and all is as it was before.
    fn ended(&mut self) {
        let status = self.running.status(self.limit);
        let said = fs::read_to_string(&self.said).unwrap();
        assert!(status.success(), "{status}: {said}");
        // Valgrind says things, too.
        assert!(!said.contains("emulator: "), "{said}");
        assert!(!is_mounted(&self.path));
        assert_eq!(fs::metadata(&self.path).unwrap().len(), 0);
        assert!(
            fs::read(&self.base).unwrap() == pattern(0, LENGTH),
            "the base has changed"
        );
    }

    fn quit(mut self) {
        self.running.tell("quit");
        self.ended();
    }
}

fn io_uring(transport: IoUring) -> &'static str {
    match transport {
        IoUring::Off => "io-uring=off",
        _ => "io-uring=on",
    }
}

// --- clients ----------------------------------------------------------------

const CLIENTS: usize = 4;
const SLOTS: usize = 16;
/// What a client writes at once: across the border of two clusters, of which
/// others write to the rest.
const PIECE: usize = 6000;

/// Where a client's slot is.
fn place(client: usize, slot: usize) -> usize {
    (slot * CLIENTS + client + 1) * CLUSTER - PIECE / 2
}

/// What a client's write number `n` consists of.
fn piece(client: usize, n: usize) -> Vec<u8> {
    let word = ((n * CLIENTS + client) as u64 ^ 0x5bd1_e995_0000_0000).to_le_bytes();
    word.into_iter().cycle().take(PIECE).collect()
}

/// How many of a client's writes, its first ones, the disk has; panics if it has
/// anything but just these.
fn writes_on(disk: &[u8], client: usize, limit: usize) -> usize {
    let has = |n: usize, slot: usize| {
        let at = place(client, slot);
        let found = &disk[at..at + PIECE];
        // The last write to this slot among the first n.
        match (0..n).rev().find(|n| n % SLOTS == slot) {
            Some(last) => found == piece(client, last),
            None => found == pattern(at, PIECE),
        }
    };
    let fits = |n: &usize| (0..SLOTS).all(|slot| has(*n, slot));
    let found = (0..=limit).find(fits);
    found.unwrap_or_else(|| panic!("no moment of client {client} is on the disk"))
}

/// What clients do while something is done with their disk: each writes, and
/// reads back, pieces of its own.
struct Load {
    over: AtomicBool,
    begun: [AtomicUsize; CLIENTS],
    done: [AtomicUsize; CLIENTS],
}

impl Load {
    fn during(file: &File, test: impl FnOnce(&Self)) {
        let load = Self {
            over: AtomicBool::new(false),
            begun: Default::default(),
            done: Default::default(),
        };
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                let load = &load;
                scope.spawn(move || load.run(file, client));
            }
            let _over = SetOnDrop(&load.over);
            load.goes_on();
            test(&load);
        });
    }

    fn run(&self, file: &File, client: usize) {
        for n in 0.. {
            if self.over.load(SeqCst) {
                break;
            }
            let at = place(client, n % SLOTS) as u64;
            let data = piece(client, n);
            self.begun[client].store(n + 1, SeqCst);
            file.write_all_at(&data, at).unwrap();
            self.done[client].store(n + 1, SeqCst);
            let mut back = vec![0; PIECE];
            file.read_exact_at(&mut back, at).unwrap();
            assert!(back == data, "client {client} has lost its write {n}");
        }
    }

    fn done(&self) -> [usize; CLIENTS] {
        std::array::from_fn(|client| self.done[client].load(SeqCst))
    }

    fn begun(&self) -> [usize; CLIENTS] {
        std::array::from_fn(|client| self.begun[client].load(SeqCst))
    }

    /// Every client gets on.
    fn goes_on(&self) {
        let before = self.done();
        within(PATIENCE, "the clients go on", || {
            let mut both = self.done().into_iter().zip(before);
            both.all(|(now, before)| now >= before + 2)
        });
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

// --- what it shows ----------------------------------------------------------

#[test]
fn the_disk_is_the_base_with_what_was_written() {
    for_transports(|transport| {
        let workshop = Workshop::new();
        for (compiler, linking) in [
            ("gcc", Linking::Shared),
            ("gcc", Linking::Static),
            ("clang", Linking::Shared),
            ("clang", Linking::Static),
        ] {
            let source = "c-examples/emulator.c";
            let Some(program) = workshop.build(compiler, C11, source, linking) else {
                continue;
            };
            for threads in ["1", "3"] {
                let e = Emulator::start(&workshop, &program, &[threads, io_uring(transport)]);
                let mut expected = pattern(0, LENGTH);
                assert!(e.content() == expected);
                let file = e.open();
                // Within a cluster, over many, and to the very end.
                for (at, len) in [
                    (5, 1),
                    (CLUSTER - 1, 2),
                    (1 << 20, (1 << 20) + 77),
                    (LENGTH - 1300, 1300),
                ] {
                    let data = pattern(at + 3, len);
                    file.write_all_at(&data, at as u64).unwrap();
                    expected[at..at + len].copy_from_slice(&data);
                    assert!(e.content() == expected, "{len} bytes at {at}");
                }
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                fallocate(&file, punch, 4 << 20, 100_000).unwrap();
                expected[4 << 20..][..100_000].fill(0);
                file.sync_all().unwrap();
                assert!(e.content() == expected);
                drop(file);
                e.quit();
            }
        }
    });
}

#[test]
fn fio_finds_what_it_wrote_while_all_else_happens() {
    if !have("fio") {
        return skip("there is no fio");
    }
    Emulator::for_each(&[(1, 1), (3, 2)], |mut e| {
        let fio = &mut command(
            "fio --name=load --filename={} --size=1M --offset_increment=1M --numjobs=4 \
             --rw=randrw --bsrange=512-128k --blockalign=512 --ioengine=libaio --iodepth=8 \
             --fsync=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --loops=4 --thread \
             --group_reporting",
            &e.path,
        );
        let mut fio = start(fio);
        for round in 0.. {
            let answer = e.ask(["move", "snapshot", "move", "stats"][round % 4]);
            // It has room for so many snapshots.
            let is_full = answer == "failed: Too many links";
            assert!(answer.starts_with("ok ") || is_full, "{answer}");
            if fio.try_wait().unwrap().is_some() {
                break;
            }
        }
        let output = fio.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        e.quit();
    });
}

// --- snapshots --------------------------------------------------------------

#[test]
fn a_snapshot_under_load_is_a_moment_that_revert_brings_back() {
    Emulator::for_each(&[(1, 1), (2, 2), (2, 5)], |mut e| {
        let file = e.open();
        let (mut earliest, mut latest) = ([0; CLIENTS], [0; CLIENTS]);
        Load::during(&file, |load| {
            for snapshots in 1..=5 {
                earliest = load.done();
                assert_eq!(e.ask("snapshot"), format!("ok {} layers", snapshots + 2));
                latest = load.begun();
                load.goes_on();
            }
        });
        // The clients are done; now the disk is what it was then.
        assert_eq!(e.ask("revert"), "ok 7 layers");
        let disk = e.content();
        for (client, (earliest, latest)) in earliest.into_iter().zip(latest).enumerate() {
            let found = writes_on(&disk, client, latest);
            assert!(
                (earliest..=latest).contains(&found),
                "client {client}: {found} writes, not {earliest} to {latest}"
            );
        }
        // Whatever happens to it then is undone again.
        for round in 0..3 {
            Load::during(&file, |load| {
                load.goes_on();
                if round == 1 {
                    assert!(e.ask("move").starts_with("ok "));
                    load.goes_on();
                }
            });
            file.write_all_at(b"something else", 100).unwrap();
            assert!(e.content() != disk);
            assert_eq!(e.ask("revert"), "ok 7 layers");
            assert!(e.content() == disk, "round {round}");
        }
        drop(file);
        e.quit();
    });
}

#[test]
fn a_snapshot_has_no_half_of_a_request() {
    Emulator::for_each(&[(1, 1), (2, 2)], |mut e| {
        const LEN: usize = 1 << 19;
        let file = e.open();
        // Whoever comes late has not written before the first snapshot.
        for client in 0..CLIENTS {
            let at = (client * LEN) as u64;
            file.write_all_at(&[1; LEN], at).unwrap();
        }
        for round in 0..8 {
            let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
            thread::scope(|scope| {
                for client in 0..CLIENTS {
                    let (file, over, done) = (&file, &over, &done);
                    scope.spawn(move || {
                        for n in 0_u8..=u8::MAX {
                            if over.load(SeqCst) {
                                break;
                            }
                            let at = (client * LEN) as u64;
                            file.write_all_at(&[n; LEN], at).unwrap();
                            done.fetch_add(1, SeqCst);
                        }
                    });
                }
                let _over = SetOnDrop(&over);
                within(SOON, "the load", || done.load(SeqCst) >= 2 * CLIENTS);
                assert!(e.ask("snapshot").starts_with("ok "));
            });
            assert!(e.ask("revert").starts_with("ok "));
            let disk = e.content();
            for written in disk.chunks_exact(LEN).take(CLIENTS) {
                let other = written.iter().position(|byte| *byte != written[0]);
                assert_eq!(other, None, "round {round}: a part of a write");
            }
        }
        drop(file);
        e.quit();
    });
}

#[test]
fn writes_to_one_new_cluster_do_not_undo_each_other() {
    Emulator::for_each(&[(1, 1), (2, 2)], |mut e| {
        const BLOCK: usize = 4096;
        let file = e.open();
        for round in 0..40 {
            // A cluster that the top layer does not have, all at once.
            assert_eq!(e.ask("revert"), "ok 2 layers");
            let begin = Barrier::new(CLIENTS);
            thread::scope(|scope| {
                for client in 0..CLIENTS {
                    let (file, begin) = (&file, &begin);
                    scope.spawn(move || {
                        begin.wait();
                        for block in (client..CLUSTER / BLOCK).step_by(CLIENTS) {
                            let data = [(round * 16 + block) as u8; BLOCK];
                            let at = (CLUSTER + block * BLOCK) as u64;
                            file.write_all_at(&data, at).unwrap();
                        }
                    });
                }
            });
            let mut expected = pattern(0, LENGTH);
            for block in 0..CLUSTER / BLOCK {
                expected[CLUSTER + block * BLOCK..][..BLOCK].fill((round * 16 + block) as u8);
            }
            assert!(e.content() == expected, "round {round}");
        }
        drop(file);
        e.quit();
    });
}

#[test]
fn without_a_snapshot_revert_goes_back_to_the_base() {
    Emulator::for_each(&[(2, 2)], |mut e| {
        let file = e.open();
        file.write_all_at(&[7; 100_000], 50_000).unwrap();
        assert_eq!(e.ask("revert"), "ok 2 layers");
        assert!(e.content() == pattern(0, LENGTH));
        // Each snapshot is one more layer, until there is no room for another.
        for layers in 3..=64 {
            file.write_all_at(&[layers; PIECE], u64::from(layers) * 1000)
                .unwrap();
            assert_eq!(e.ask("snapshot"), format!("ok {layers} layers"));
        }
        let all = e.content();
        assert!(e.ask("snapshot").starts_with("failed: "));
        file.write_all_at(&[0; 1000], 64_000).unwrap();
        assert_eq!(e.ask("revert"), "ok 64 layers");
        assert!(e.content() == all);
        let mut expected = pattern(0, LENGTH);
        for layers in 3..=64 {
            expected[layers * 1000..][..PIECE].fill(layers as u8);
        }
        assert!(all == expected);
        drop(file);
        e.quit();
    });
}

// --- moving, resizing -------------------------------------------------------

#[test]
fn a_queue_moves_under_load_and_the_next_thread_does_the_work() {
    Emulator::for_each(&[(3, 1), (2, 1)], |mut e| {
        let file = e.open();
        Load::during(&file, |load| {
            let mut home = 0;
            for _ in 0..12 {
                let count = e.by_thread().len();
                home = (home + 1) % count;
                assert_eq!(e.ask("move"), format!("ok queue 0 runs in thread {home}"));
                let before = e.by_thread();
                load.goes_on();
                let now = e.by_thread();
                for thread in 0..count {
                    let works = now[thread] > before[thread];
                    assert_eq!(works, thread == home, "{before:?} {now:?}");
                }
            }
        });
        drop(file);
        e.quit();
    });
}

#[test]
fn all_queues_move_under_load_and_nothing_is_lost() {
    Emulator::for_each(&[(1, 1), (2, 2), (3, 5)], |mut e| {
        let file = e.open();
        Load::during(&file, |load| {
            for _ in 0..20 {
                assert!(e.ask("move").starts_with("ok "));
                load.goes_on();
            }
        });
        drop(file);
        e.quit();
    });
}

#[test]
fn clients_see_that_it_was_resized() {
    Emulator::for_each(&[(1, 1), (2, 2)], |mut e| {
        let file = e.open();
        let old = LENGTH as u64;
        let new = old + 3_000_000;
        assert!(file.write_at(b"no room", old).is_err());
        Load::during(&file, |load| {
            assert_eq!(e.ask(&format!("resize {new}")), format!("ok {new} bytes"));
            load.goes_on();
        });
        assert_eq!(size(&file), new);
        assert_eq!(fs::metadata(&e.path).unwrap().size(), new);
        let mut added = vec![1; 3_000_000];
        file.read_exact_at(&mut added, old).unwrap();
        assert!(added.iter().all(|byte| *byte == 0));
        file.write_all_at(b"the end", new - 7).unwrap();
        assert!(e.content().ends_with(b"\0the end"));
        for wrong in ["1000", "", "much", "-1", "99999999999999999999", "7000000x"] {
            let answer = e.ask(&format!("resize {wrong}"));
            assert!(answer.starts_with("failed: from "), "{answer}");
        }
        assert_eq!(size(&file), new);
        drop(file);
        e.quit();
    });
}

// --- ends -------------------------------------------------------------------

#[test]
fn it_ends_in_every_way_under_load() {
    type End = fn(&mut Emulator);
    const ENDS: [(&str, End); 4] = [
        ("quit", |e| e.running.tell("quit")),
        ("the end of its input", |e| e.running.end_input()),
        ("SIGTERM", |e| e.running.signal(libc::SIGTERM)),
        ("SIGINT", |e| e.running.signal(libc::SIGINT)),
    ];
    for_transports(|transport| {
        let workshop = Workshop::new();
        let Some(program) = build(&workshop) else {
            return;
        };
        for threads in ["1", "2"] {
            for (way, end) in ENDS {
                eprintln!("by {way}");
                let arguments = [threads, io_uring(transport)];
                let mut e = Emulator::start(&workshop, &program, &arguments);
                let file = e.open();
                let begun = AtomicUsize::new(0);
                thread::scope(|scope| {
                    for client in 0..CLIENTS {
                        let (file, begun) = (&file, &begun);
                        // Until its disk is gone; a write that hangs is what
                        // the watchdog waits for.
                        scope.spawn(move || {
                            let data = piece(client, 0);
                            let at = place(client, 0) as u64;
                            while file.write_all_at(&data, at).is_ok() {
                                begun.fetch_add(1, SeqCst);
                            }
                        });
                    }
                    within(SOON, "the load", || begun.load(SeqCst) > 100);
                    end(&mut e);
                });
                drop(file);
                e.ended();
            }
        }
    });
}

#[test]
fn it_ends_when_somebody_unmounts_its_disk() {
    Emulator::for_each(&[(1, 1), (2, 3)], |mut e| {
        let file = e.open();
        file.write_all_at(b"something", 0).unwrap();
        drop(file);
        unmount(&e.path, MntFlags::empty());
        e.ended();
    });
}

#[test]
fn its_answers_tell_what_is_wrong() {
    Emulator::for_each(&[(2, 2)], |mut e| {
        assert_eq!(e.ask("dance"), "failed: no such command");
        assert_eq!(e.ask(""), "failed: no such command");
        assert_eq!(e.ask(&"snapshot".repeat(511)), "failed: no such command");
        // Several at once.
        assert_eq!(e.ask("snapshot\nsnapshot"), "ok 3 layers");
        assert_eq!(e.running.line(SOON), "ok 4 layers");
        e.quit();
    });
}

#[test]
fn its_command_line_is_checked() {
    let workshop = Workshop::new();
    let Some(program) = build(&workshop) else {
        return;
    };
    let (path, base) = (workshop.mountpoint("disk"), workshop.path("base"));
    let _watchdog = Watchdog::new(&path);
    fs::write(&base, pattern(0, LENGTH)).unwrap();
    let (disk, base) = (path.to_str().unwrap(), base.to_str().unwrap());
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(arguments).current_dir(workshop.path(""));
        command.stdin(Stdio::null()).output().unwrap()
    };
    let text = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();
    for wrong in [
        &[][..],
        &[base],
        &[base, disk, "0"],
        &[base, disk, "17"],
        &[base, disk, "many"],
        &[base, disk, "2x"],
        &[base, disk, ""],
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(text(&output).starts_with("usage: "), "{wrong:?}");
    }
    let directory = workshop.path("");
    let directory = directory.to_str().unwrap();
    for (wrong, named) in [
        (&["/nonexistent/base", disk][..], "/nonexistent/base"),
        (&[directory, disk], "not a regular file"),
        (&[base, "/nonexistent/disk"], "/nonexistent/disk"),
        (&[base, disk, "2", "colour=red"], "colour"),
        (&[base, disk, "2", "io-uring=perhaps"], "io-uring"),
        (&[base, disk, "2", "queues=17"], "16"),
    ] {
        let output = run(wrong);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {said}");
        assert!(said.contains(named), "{wrong:?}: {said}");
        assert_eq!(output.stdout, b"", "{wrong:?}");
        assert!(!is_mounted(&path));
    }
    // Without input it ends at once, and its threads are its own all the same.
    let output = run(&[base, disk, "2", "threads=library"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(output.stdout.starts_with(b"ok "));
    assert!(!is_mounted(&path));
}

// --- what it does to memory -------------------------------------------------

/// Has it do all that it can, under load.
fn do_everything(mut e: Emulator) {
    let file = e.open();
    Load::during(&file, |load| {
        let longer = LENGTH + 100_000;
        for command in [
            "snapshot",
            "move",
            "stats",
            &format!("resize {longer}"),
            "snapshot",
            "move",
        ] {
            let answer = e.ask(command);
            assert!(answer.starts_with("ok "), "{command}: {answer}");
            load.goes_on();
        }
    });
    assert_eq!(e.ask("revert"), "ok 4 layers");
    assert!(e.ask("dance").starts_with("failed: "));
    file.sync_all().unwrap();
    drop(file);
    e.quit();
}

/// It is run so with one thread, and with more queues than threads.
const SHAPES: [[&str; 2]; 2] = [["1", "queues=1"], ["2", "queues=3"]];

/// Over /dev/fuse only: while one thread waits in io_uring_enter(2), valgrind
/// lets no other run, not even the one that would end the wait.
#[test]
fn it_uses_memory_rightly() {
    let workshop = Workshop::new();
    let (Some(valgrind), Some(program)) = (valgrind(), build(&workshop)) else {
        return;
    };
    for [threads, queues] in SHAPES {
        let mut command = valgrind();
        command.arg(&program);
        let arguments = [threads, queues, io_uring(IoUring::Off)];
        let e = Emulator::start_by(&workshop, command, &arguments, PATIENCE);
        do_everything(e);
    }
}

#[test]
fn sanitizers_find_nothing_in_it() {
    let workshop = Workshop::new();
    let sanitizers = Sanitizers::new();
    let (source, shared) = ("c-examples/emulator.c", Linking::Shared);
    let Some(program) = workshop.build_with("clang", C11, source, shared, &SANITIZE) else {
        return;
    };
    for_transports(|transport| {
        for [threads, queues] in SHAPES {
            let command = sanitizers.command(&program);
            let arguments = [threads, queues, io_uring(transport)];
            let e = Emulator::start_by(&workshop, command, &arguments, PATIENCE);
            do_everything(e);
        }
    });
}

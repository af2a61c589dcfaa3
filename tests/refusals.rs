//! What becomes of exports where io_uring cannot be had: `on` fails and says
//! why, `auto` is served over /dev/fuse and says why in one line. Each reason is
//! brought about for real.
//!
//! Some of it concerns the whole system for a moment: whoever starts an export
//! at that moment gets it over /dev/fuse, too.

#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/hooked.rs"]
mod hooked;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use blkfuse::{Builder, Export, IoUring};
use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use alone::{Belongings, alone, own_dir};
use common::{Handle, Memory, SOON, Watchdog, pattern, skip};
use hooked::{At, Hooked};

const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";
const IO_URING_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
const LENGTH: usize = 100_000;

// --- the system -------------------------------------------------------------

/// The tests of this file run one after the other, each in a process of its
/// own; what is set for the system is set by the first.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One of the system's settings, as it is to be until this is dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn set(path: &'static str, value: &str) -> Self {
        let before = fs::read_to_string(path).unwrap();
        if before.trim() != value {
            fs::write(path, value).unwrap();
        }
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if fs::read_to_string(self.path).unwrap() != self.before {
            fs::write(self.path, &self.before).unwrap();
        }
    }
}

/// Runs `test` in a process of its own, on a system where io_uring is to be had
/// but for `settings`.
fn on_a_system_with(settings: &[(&'static str, &str)], name: &str, test: impl FnOnce()) {
    if std::env::var_os("BLKFUSE_TEST_ALONE").is_some() {
        collect_log();
        return test();
    }
    if !common::can_export() {
        return;
    }
    if !Path::new(ENABLE_URING).exists() {
        return skip("the kernel does not have FUSE over io_uring");
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _enabled = Setting::set(ENABLE_URING, "Y");
    let _settings: Vec<_> = settings.iter().map(|(p, v)| Setting::set(p, v)).collect();
    alone(name, test);
}

/// From now on this process finds `content` in that file of the system's.
fn pretend(path: &str, content: &str) {
    let none = None::<&str>;
    let fake = tempfile::NamedTempFile::new().unwrap();
    fs::write(fake.path(), content).unwrap();
    mount(Some(fake.path()), path, none, MsFlags::MS_BIND, none).unwrap();
}

/// Gives this process mounts of its own.
fn have_own_mounts() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
}

/// From now on that system call of this thread, and of those that it starts,
/// fails with `errno`.
fn forbid(call: i64, errno: i32) {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: call as u32,
        },
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program and its statements are live locals, which the kernel
    // copies.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program),
            0
        );
    }
}

// --- the log ----------------------------------------------------------------

static LINES: Mutex<Vec<(Level, String)>> = Mutex::new(Vec::new());

struct Collector;

impl Log for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = (record.level(), record.args().to_string());
        LINES.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

fn collect_log() {
    log::set_logger(&Collector).unwrap();
    log::set_max_level(LevelFilter::Info);
}

fn take_log() -> Vec<(Level, String)> {
    std::mem::take(&mut LINES.lock().unwrap())
}

// --- exports ----------------------------------------------------------------

/// A place to export at, in a process that is alone.
struct Place {
    path: PathBuf,
    before: Belongings,
    _watchdog: Watchdog,
    _dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = own_dir();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let watchdog = Watchdog::new(&path);
        // The first export makes what the process keeps.
        let first = builder(&path, IoUring::Off).start().unwrap();
        first.delete(Some(SOON)).unwrap();
        take_log();
        Self {
            before: Belongings::now(),
            path,
            _watchdog: watchdog,
            _dir: dir,
        }
    }

    /// `on` fails because of `reason`, and nothing is left.
    fn refuses(&self, reason: &str, configure: impl Fn(Builder<Handle>) -> Builder<Handle>) {
        let result = configure(builder(&self.path, IoUring::On)).start();
        assert!(result.is_err(), "it must fail");
        self.expect(result, reason);
    }

    /// `auto` serves over /dev/fuse because of `reason`, and nothing is left.
    fn falls_back(&self, reason: &str, configure: impl Fn(Builder<Handle>) -> Builder<Handle>) {
        let result = configure(builder(&self.path, IoUring::Auto)).start();
        assert!(result.is_ok(), "{result:?}");
        self.expect(result, reason);
    }

    /// There is no io_uring because of `reason`, and nothing is left.
    fn expect(&self, result: blkfuse::Result<Export>, reason: &str) {
        let lines = take_log();
        let export = match result {
            Ok(export) => export,
            Err(error) => {
                assert!(error.message().contains(reason), "{error}, not {reason}");
                assert!(!common::is_mounted(&self.path));
                return self.before.are_all();
            }
        };
        assert_eq!(export.transport(), "/dev/fuse");
        let [(Level::Info, why), (Level::Info, started)] = &lines[..] else {
            panic!("one line says why, and one what has started: {lines:?}");
        };
        assert!(why.contains(": over /dev/fuse: "), "{why}");
        assert!(why.contains(reason), "{why}, not {reason}");
        assert!(started.contains("queues over /dev/fuse"), "{started}");
        self.works(export);
    }

    /// It is a file like any other, and goes without a trace.
    fn works(&self, export: Export) {
        let file = File::options().read(true).write(true).open(&self.path);
        let file = file.unwrap();
        let mut data = vec![0; LENGTH];
        file.read_exact_at(&mut data, 0).unwrap();
        assert!(data == pattern(0, LENGTH));
        file.write_all_at(b"more", 5000).unwrap();
        file.sync_all().unwrap();
        file.read_exact_at(&mut data[..4], 5000).unwrap();
        assert_eq!(&data[..4], b"more");
        drop(file);
        export.delete(Some(SOON)).unwrap();
        self.before.are_all();
        take_log();
    }
}

fn builder(path: &Path, io_uring: IoUring) -> Builder<Handle> {
    let driver = Memory::patterned(LENGTH).handle();
    let builder = Export::builder(driver).mountpoint(path).writable(true);
    builder.queues(2).io_uring(io_uring)
}

/// With `reason`, and with every number of queues.
fn refused(reason: &str) {
    refused_as(reason, |b| b);
}

fn refused_as(reason: &str, configure: impl Fn(Builder<Handle>) -> Builder<Handle>) {
    let place = Place::new();
    for queues in common::QUEUES {
        place.refuses(reason, |b| configure(b.queues(queues)));
        place.falls_back(reason, |b| configure(b.queues(queues)));
    }
}

// --- the reasons ------------------------------------------------------------

#[test]
fn root_has_not_enabled_it() {
    let settings = [(ENABLE_URING, "N")];
    on_a_system_with(&settings, "root_has_not_enabled_it", || {
        refused("FUSE over io_uring is switched off; as root, before the export starts: echo Y");
    });
}

#[test]
fn the_kernel_does_not_offer_it() {
    let settings = [(ENABLE_URING, "N")];
    on_a_system_with(&settings, "the_kernel_does_not_offer_it", || {
        have_own_mounts();
        pretend(ENABLE_URING, "Y\n");
        refused("the kernel does not offer FUSE over io_uring");
    });
}

#[test]
fn io_uring_is_disabled() {
    let settings = [(IO_URING_DISABLED, "2")];
    on_a_system_with(&settings, "io_uring_is_disabled", || {
        refused("io_uring is disabled for all processes");
    });
}

#[test]
fn a_sandbox_forbids_io_uring() {
    on_a_system_with(&[], "a_sandbox_forbids_io_uring", || {
        forbid(libc::SYS_io_uring_setup, libc::EPERM);
        refused("cannot make an io_uring");
    });
}

#[test]
fn the_memory_is_too_small() {
    on_a_system_with(&[], "the_memory_is_too_small", || {
        refused_as("io_uring needs at least", |b| b.memory_budget(65536));
        refused_as("\"queue-depth\" 1024 needs at least", |b| {
            b.queue_depth(1024).memory_budget(1 << 20)
        });
    });
}

#[test]
fn the_kernel_has_known_defects() {
    on_a_system_with(&[], "the_kernel_has_known_defects", || {
        have_own_mounts();
        pretend("/proc/sys/kernel/osrelease", "6.18.38\n");
        let place = Place::new();
        place.falls_back("Linux 6.18.38 has known defects", |b| b);
        // Who insists gets it.
        let export = builder(&place.path, IoUring::On).start().unwrap();
        assert_eq!(export.transport(), "io_uring");
        place.works(export);
    });
}

/// What the kernel has offered it no longer has when it is asked for it.
#[test]
fn the_kernel_rejects_every_registration() {
    on_a_system_with(&[], "the_kernel_rejects_every_registration", || {
        let place = Place::new();
        for queues in common::QUEUES {
            for io_uring in [IoUring::On, IoUring::Auto] {
                let driver = Hooked::new(Memory::patterned(LENGTH).handle(), |at| {
                    if let At::QueueStart(0) = at {
                        fs::write(ENABLE_URING, "N")?;
                    }
                    Ok(())
                });
                let builder = Export::builder(driver).mountpoint(&place.path);
                let builder = builder.writable(true).queues(queues).io_uring(io_uring);
                let result = builder.start();
                fs::write(ENABLE_URING, "Y").unwrap();
                assert_eq!(result.is_ok(), io_uring == IoUring::Auto);
                place.expect(result, "the kernel refused an entry");
            }
        }
    });
}

/// Only for a CPU that there is not: the others' are enough.
#[test]
fn the_kernel_rejects_some_registrations() {
    on_a_system_with(&[], "the_kernel_rejects_some_registrations", || {
        have_own_mounts();
        pretend(POSSIBLE_CPUS, &format!("0-{}\n", possible_cpus()));
        let place = Place::new();
        for queues in common::QUEUES {
            for io_uring in [IoUring::On, IoUring::Auto] {
                let builder = builder(&place.path, io_uring).queues(queues);
                let export = builder.start().unwrap();
                assert_eq!(export.transport(), "io_uring");
                let lines = take_log();
                assert!(lines[0].1.ends_with("the others serve"), "{lines:?}");
                place.works(export);
            }
        }
    });
}

#[test]
fn the_rings_never_become_ready() {
    on_a_system_with(&[], "the_rings_never_become_ready", || {
        if possible_cpus() == 1 {
            return skip("it needs a machine with two CPUs");
        }
        have_own_mounts();
        // The kernel waits for those of the other CPUs.
        pretend(POSSIBLE_CPUS, "0\n");
        let place = Place::new();
        let reason = "the kernel does not take the rings for ready";
        // Each takes five seconds.
        place.refuses(reason, |b| b.queues(1));
        place.falls_back(reason, |b| b.queues(2));
    });
}

fn possible_cpus() -> usize {
    let list = fs::read_to_string(POSSIBLE_CPUS).unwrap();
    let last = list.trim().rsplit(['-', ',']).next().unwrap();
    last.parse::<usize>().unwrap() + 1
}

/// A client cannot be tried, so `auto` does not dare.
#[test]
fn no_process_can_be_started_to_try_it() {
    on_a_system_with(&[], "no_process_can_be_started_to_try_it", || {
        forbid(libc::SYS_clone3, libc::ENOSYS);
        let place = Place::new();
        place.falls_back("cannot start a helper process", |b| b);
        let export = builder(&place.path, IoUring::On).start().unwrap();
        assert_eq!(export.transport(), "io_uring");
        place.works(export);
    });
}

/// Whatever it is that there is no descriptor left for: if /dev/fuse can be
/// served, `auto` does that.
#[test]
fn descriptors_run_out() {
    on_a_system_with(&[], "descriptors_run_out", || {
        let place = Place::new();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let open = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        let mut fell_back = 0;
        for limit in open..open + 60 {
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
            let start = |io_uring| builder(&place.path, io_uring).start();
            let [off, on, auto] = [IoUring::Off, IoUring::On, IoUring::Auto].map(|io_uring| {
                let result = start(io_uring);
                let transport = result.as_ref().map(Export::transport).map_err(Clone::clone);
                if let Ok(export) = result {
                    export.delete(Some(SOON)).unwrap();
                }
                transport
            });
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            place.before.are_all();
            match (off, on, auto) {
                (Ok(_), _, Ok("/dev/fuse")) => fell_back += 1,
                (Ok(_), Ok(_), Ok("io_uring")) | (Err(_), Err(_), Err(_)) => {}
                other => panic!("with {limit} descriptors: {other:?}"),
            }
        }
        assert!(fell_back > 0, "no limit was too small for io_uring only");
        let export = builder(&place.path, IoUring::On).start().unwrap();
        place.works(export);
    });
}

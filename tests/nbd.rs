//! The example that shows an NBD server's disk as a file, beside nbdkit, as a
//! program and as a plugin of blkfused: its data, and what becomes of clients
//! when the server is slow, stuck or dead.

// For hosted.rs.
#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/compiled.rs"]
mod compiled;
#[path = "common/hosted.rs"]
mod hosted;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use blkfuse::IoUring;

use common::checked::{SANITIZE, Sanitizers, valgrind};
use common::client::{errno, fallocate, have, run, seek};
use common::{
    SOON, Watchdog, eventually, for_transports, is_mounted, pattern, skip, unmount, within,
};
use compiled::{C, CXX, Linking, PATIENCE, Running, Workshop};
use hosted::Connections;
use memmap2::MmapMut;
use nix::mount::MntFlags;

const SIZE: usize = 64 << 20;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// How a list of properties says that data may go over several connections,
/// or over one.
const CONNECTIONS: [&str; 2] = ["connections=3", "connections=1"];
/// Before them: nobody is to write.
const READ_ONLY: &str = "read-only";

/// The ways in which the example serves: as a program and as a plugin.
const WAYS: [Linking; 2] = [Linking::Shared, Linking::Plugin];

/// The example and a place to run it in, if all is here that it takes.
struct Bench {
    workshop: Workshop,
    linking: Linking,
    built: PathBuf,
}

impl Bench {
    fn new(linking: Linking) -> Option<Self> {
        Self::with("gcc", C, linking, &[])
    }

    /// `more` comes last in the compiler's command line.
    fn with(compiler: &str, standard: &str, linking: Linking, more: &[&str]) -> Option<Self> {
        if !has_libnbd() {
            skip("there is no libnbd.h");
            return None;
        }
        if !have("nbdkit") {
            skip("there is no nbdkit");
            return None;
        }
        let workshop = Workshop::new();
        let source = "c-examples/nbd.c";
        let more = [&["-lnbd"], more].concat();
        let built = workshop.build_with(compiler, standard, source, linking, &more)?;
        Some(Self {
            workshop,
            linking,
            built,
        })
    }

    fn server(&self, arguments: &[&str]) -> Server {
        Server::start(&self.workshop, "server", arguments)
    }

    fn is_plugin(&self) -> bool {
        self.linking == Linking::Plugin
    }

    /// What is executed.
    fn program(&self) -> &Path {
        match self.is_plugin() {
            true => Path::new(env!("CARGO_BIN_EXE_blkfused")),
            false => &self.built,
        }
    }

    /// Adds all that stands behind the program in a command line.
    fn complete(
        &self,
        mut command: Command,
        uri: &str,
        path: &Path,
        transport: IoUring,
        more: &[&str],
    ) -> Command {
        let transport = format!("{transport:?}").to_lowercase();
        if self.is_plugin() {
            let (more, writable) = match more {
                [READ_ONLY, more @ ..] => (more, None),
                more => (more, Some("-w")),
            };
            command.args(["--io-uring", &transport]).args(writable);
            command.arg("--plugin").arg(&self.built);
            command.arg(format!("uri={uri}")).args(more).arg(path);
        } else {
            command.arg(uri).arg(path);
            command.arg(format!("io-uring={transport}"));
            // The server says it.
            command.args(more.iter().filter(|word| **word != READ_ONLY));
        }
        command
    }

    fn command(&self, uri: &str, path: &Path, transport: IoUring, more: &[&str]) -> Command {
        self.complete(Command::new(self.program()), uri, path, transport, more)
    }

    /// Shows a server's disk, which must work. `more`: keys and values, perhaps
    /// behind READ_ONLY.
    fn show(&self, server: &Server, transport: IoUring, more: &[&str]) -> Shown {
        let path = self.workshop.mountpoint("disk");
        let watchdog = Watchdog::new(&path);
        let mut command = self.command(&server.uri(), &path, transport, more);
        Shown::start(&mut command, path, watchdog)
    }

    /// What it says if it cannot show what is at `uri`.
    fn refusal(&self, uri: &str, more: &[&str]) -> String {
        let path = self.workshop.mountpoint("disk");
        let output = self.command(uri, &path, IoUring::Off, more).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(!is_mounted(&path));
        String::from_utf8(output.stderr).unwrap()
    }
}

/// Whether programs that use libnbd can be compiled.
fn has_libnbd() -> bool {
    let mut command = Command::new("cc");
    command.args(["-E", "-include", "libnbd.h", "-x", "c", "/dev/null"]);
    let output = command.output();
    output.is_ok_and(|output| output.status.success())
}

/// The example while it runs.
struct Shown {
    running: Running,
    path: PathBuf,
    _watchdog: Watchdog,
}

impl Shown {
    fn start(command: &mut Command, path: PathBuf, watchdog: Watchdog) -> Self {
        let running = Running::start(command);
        let line = running.line(PATIENCE);
        let known = ["until this ends", &format!("umount {}", path.display())];
        assert!(known.iter().any(|end| line.ends_with(end)), "{line}");
        assert!(is_mounted(&path));
        Self {
            running,
            path,
            _watchdog: watchdog,
        }
    }

    fn open(&self) -> File {
        let mut options = File::options();
        options.read(true).write(true).open(&self.path).unwrap()
    }

    /// Ends it, and sees that nothing is left.
    fn end(mut self, code: i32) {
        self.running.signal(libc::SIGTERM);
        let status = self.running.status(PATIENCE);
        assert_eq!(status.code(), Some(code), "{status}");
        assert!(!is_mounted(&self.path));
    }
}

/// An nbdkit that listens on a socket; killed when it is dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(workshop: &Workshop, name: &str, arguments: &[&str]) -> Self {
        let socket = workshop.path(name);
        let ready = socket.with_extension("ready");
        for old in [&socket, &ready] {
            let _ = fs::remove_file(old);
        }
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .arg("--pidfile")
            .arg(&ready)
            .args(arguments);
        let server = Self {
            child: command.stdin(Stdio::null()).spawn().unwrap(),
            socket,
        };
        eventually("nbdkit listens", || ready.exists());
        server
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn signal(&self, number: i32) {
        // SAFETY: kill touches no memory; the child was not waited for yet.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, number) }, 0);
    }

    /// Stops all of its threads, and waits for that.
    fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        eventually("the server is stopped", || {
            fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = fs::read_to_string(task.unwrap().path().join("stat"));
                // The state comes after the name in parentheses.
                stat.is_ok_and(|stat| stat.contains(") T "))
            })
        });
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn for_benches(test: impl Fn(&Bench, IoUring, &str)) {
    for_transports(|transport| {
        for way in WAYS {
            let Some(bench) = Bench::new(way) else { return };
            for connections in CONNECTIONS {
                eprintln!("{way:?} with {connections}");
                test(&bench, transport, connections);
            }
        }
    });
}

fn read(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0xee; len];
    file.read_exact_at(&mut data, offset)?;
    Ok(data)
}

/// Uses all that a disk can do; what it holds then.
fn use_disk(file: &File) -> Vec<u8> {
    assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    assert_eq!(seek(file, 0, libc::SEEK_HOLE).unwrap(), 0);
    let mut content = vec![0; SIZE];
    for (offset, len) in [
        (0, 1),
        (511, 4098),
        (1 << 20, 3 << 20),
        (10_000_001, 9_999_999),
        (SIZE - 7, 7),
    ] {
        let data = pattern(offset, len);
        file.write_all_at(&data, offset as u64).unwrap();
        content[offset..][..len].copy_from_slice(&data);
        assert!(read(file, offset as u64, len).unwrap() == data);
    }
    fallocate(file, PUNCH, 2 << 20, 1 << 20).unwrap();
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE, 12_000_000, 70_001).unwrap();
    content[2 << 20..3 << 20].fill(0);
    content[12_000_000..12_070_001].fill(0);
    file.sync_all().unwrap();
    assert_eq!(seek(file, 1 << 20, libc::SEEK_HOLE).unwrap(), 2 << 20);
    assert_eq!(seek(file, 2 << 20, libc::SEEK_DATA).unwrap(), 3 << 20);
    assert!(read(file, 0, SIZE).unwrap() == content);
    content
}

#[test]
fn what_is_written_is_on_the_servers_disk() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&["memory", "64M"]);
        let shown = bench.show(&server, transport, &[connections]);
        let content = use_disk(&shown.open());
        // As others see it: directly, and through the file.
        if have("nbdcopy") {
            let copy = bench.workshop.path("copy");
            run(Command::new("nbdcopy").arg(server.uri()).arg(&copy));
            assert!(fs::read(&copy).unwrap() == content);
            let mut command = Command::new("nbdcopy");
            run(command.arg(&shown.path).arg(server.uri()));
            run(Command::new("cmp").arg(&copy).arg(&shown.path));
        } else {
            skip("there is no nbdcopy");
        }
        if have("qemu-img") {
            let mut command = Command::new("qemu-img");
            command.args(["compare", "-s", "-f", "raw", "-F", "raw"]);
            run(command.arg(&shown.path).arg(server.uri()));
        } else {
            skip("there is no qemu-img");
        }
        shown.end(0);
    });
}

#[test]
fn it_is_c_and_cxx_and_can_be_linked_statically() {
    if !common::can_export() {
        return;
    }
    for (compiler, standard, linking) in [
        ("clang", C, Linking::Static),
        ("g++", CXX, Linking::Shared),
        ("clang++", CXX, Linking::Static),
        ("clang", C, Linking::Plugin),
        ("g++", CXX, Linking::Plugin),
    ] {
        let Some(bench) = Bench::with(compiler, standard, linking, &[]) else {
            return;
        };
        let server = bench.server(&["memory", "64M"]);
        let shown = bench.show(&server, IoUring::Auto, &[]);
        use_disk(&shown.open());
        shown.end(0);
    }
}

#[test]
fn a_server_can_have_room_for_more_than_one_command_can_zero() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&["memory", "6G"]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        let places = [0, (1 << 30) - 2, 4 << 30, (5 << 30) - 4, 5 << 30];
        for place in places {
            file.write_all_at(b"data", place).unwrap();
        }
        fallocate(&file, PUNCH, 0, 5 << 30).unwrap();
        for place in places {
            let expected = if place < 5 << 30 {
                b"\0\0\0\0"
            } else {
                b"data"
            };
            assert_eq!(read(&file, place, 4).unwrap(), expected, "at {place}");
        }
        assert!(seek(&file, 0, libc::SEEK_DATA).unwrap() > (5 << 30) - 65536);
        shown.end(0);
    });
}

#[test]
fn slow_requests_go_on_at_once() {
    for_benches(|bench, transport, connections| {
        const CLIENTS: u32 = 16;
        const DELAY: Duration = Duration::from_millis(300);
        let delay = format!("rdelay={}ms", DELAY.as_millis());
        let server = bench.server(&["--filter=delay", "memory", "64M", &delay]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        let data = pattern(0, 1 << 20);
        file.write_all_at(&data, 0).unwrap();
        let begin = Instant::now();
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (file, data) = (&file, &data);
                scope.spawn(move || {
                    let at = client as usize * 8192;
                    assert_eq!(read(file, at as u64, 8192).unwrap(), data[at..][..8192]);
                });
            }
        });
        let took = begin.elapsed();
        assert!(took >= DELAY, "{took:?}");
        assert!(took < CLIENTS * DELAY / 2, "{took:?}");
        shown.end(0);
    });
}

#[test]
fn a_server_that_pauses_is_waited_for() {
    for_benches(|bench, transport, connections| {
        const CLIENTS: usize = 8;
        let server = bench.server(&["memory", "64M"]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        let data = pattern(0, CLIENTS << 20);
        let connections = Connections::new();
        let waits = connections.of(&shown.path);
        server.freeze();
        thread::scope(|scope| {
            // More than a socket holds.
            for (client, part) in data.chunks(1 << 20).enumerate() {
                let file = &file;
                scope.spawn(move || file.write_all_at(part, (client << 20) as u64).unwrap());
            }
            // Read where nobody writes.
            scope.spawn(|| assert_eq!(read(&file, 32 << 20, 5).unwrap(), [0; 5]));
            eventually("they wait", || waits.waiting() > CLIENTS);
            server.signal(libc::SIGCONT);
        });
        assert!(read(&file, 0, data.len()).unwrap() == data);
        drop(file);
        shown.end(0);
    });
}

#[test]
fn a_server_that_dies_fails_what_it_has_and_all_that_follows() {
    for_benches(|bench, transport, connections| {
        let mut server = bench.server(&["--filter=delay", "memory", "64M", "delay-read=1ms"]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        // So that the next sync has something to do.
        file.write_all_at(b"data", 0).unwrap();
        let started = Barrier::new(13);
        thread::scope(|scope| {
            let begin = |once: fn(&File, u64) -> io::Result<()>, me: u64| {
                let (file, started) = (&file, &started);
                scope.spawn(move || {
                    once(file, me << 20).unwrap();
                    started.wait();
                    loop {
                        if let Err(error) = once(file, me << 20) {
                            return error.raw_os_error();
                        }
                    }
                })
            };
            let clients: Vec<_> = (0..12)
                .map(|me| match me % 4 {
                    0 | 1 => begin(|file, at| read(file, at, 65536).map(drop), me),
                    2 => begin(|file, at| file.write_all_at(&[1; 65536], at), me),
                    _ => begin(|file, at| fallocate(file, PUNCH, at, 65536), me),
                })
                .collect();
            started.wait();
            server.kill();
            for client in clients {
                within(SOON, "a client's error", || client.is_finished());
                assert_eq!(client.join().unwrap(), Some(libc::EIO));
            }
        });
        assert_eq!(errno(read(&file, 0, 4096)), libc::EIO);
        assert_eq!(errno(file.write_all_at(b"more", 0)), libc::EIO);
        assert_eq!(errno(file.sync_all()), libc::EIO);
        assert!(is_mounted(&shown.path));
        // Open or not.
        shown.end(1);
    });
}

#[test]
fn a_server_that_is_stuck_does_not_keep_it() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&["memory", "64M"]);
        let shown = bench.show(&server, transport, &[connections]);
        // Who may have changed mapped memory would be waited for longer; and the
        // closing of its copies keeps the processes that other tests start.
        let file = File::open(&shown.path).unwrap();
        assert!(read(&file, 0, 4096).is_ok());
        let connections = Connections::new();
        let waits = connections.of(&shown.path);
        server.freeze();
        let client = thread::spawn(move || read(&file, 0, 4096).map(drop));
        // With io_uring one request is always on its way.
        let usual = usize::from(transport == IoUring::On);
        eventually("it waits", || waits.waiting() > usual);
        shown.end(1);
        within(SOON, "the client's error", || client.is_finished());
        client.join().unwrap().unwrap_err();
    });
}

#[test]
fn it_can_be_unmounted_from_outside() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&["memory", "64M"]);
        let mut shown = bench.show(&server, transport, &[connections]);
        assert!(read(&shown.open(), 0, 4096).is_ok());
        unmount(&shown.path, MntFlags::empty());
        assert!(shown.running.status(SOON).success());
    });
}

#[test]
fn a_servers_errors_are_its_clients() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&[
            "--filter=error",
            "memory",
            "64M",
            "error-pwrite=ENOSPC",
            "error-pwrite-rate=100%",
            "error-pread=EPERM",
            "error-pread-rate=100%",
        ]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        assert_eq!(errno(file.write_all_at(b"data", 5)), libc::ENOSPC);
        assert_eq!(errno(read(&file, 0, 4096)), libc::EPERM);
        drop(file);
        shown.end(0);
    });
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&["--readonly", "pattern", "10000001"]);
        let shown = bench.show(&server, transport, &[READ_ONLY, connections]);
        let error = File::options().write(true).open(&shown.path);
        let code = errno(error);
        assert!([libc::EROFS, libc::EACCES].contains(&code), "{code}");
        let file = File::open(&shown.path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 10_000_001);
        // nbdkit's pattern: each place says where it is.
        assert_eq!(read(&file, 4096, 8).unwrap(), 4096_u64.to_be_bytes());
        let last = 9_999_992;
        assert_eq!(read(&file, last, 8).unwrap(), last.to_be_bytes());
        shown.end(0);
    });
}

#[test]
fn a_servers_largest_request_is_kept_to() {
    for_benches(|bench, transport, connections| {
        let server = bench.server(&[
            "--filter=blocksize-policy",
            "memory",
            "64M",
            "blocksize-minimum=1",
            "blocksize-preferred=4096",
            "blocksize-maximum=131072",
            "blocksize-error-policy=error",
        ]);
        let shown = bench.show(&server, transport, &[connections]);
        let file = shown.open();
        let data = pattern(0, 3 << 20);
        file.write_all_at(&data, 5).unwrap();
        assert!(read(&file, 5, data.len()).unwrap() == data);
        drop(file);
        shown.end(0);
    });
}

#[test]
fn it_says_what_is_wrong() {
    if !common::can_export() {
        return;
    }
    for way in WAYS {
        let Some(bench) = Bench::new(way) else { return };
        let refused = |uri: &str, more: &[&str], words: &[&str]| {
            let said = bench.refusal(uri, more);
            for word in words {
                assert!(said.contains(word), "{way:?} {more:?}: {said}");
            }
        };
        let nowhere = "nbd+unix:///?socket=/nonexistent/socket";
        refused(nowhere, &[], &[nowhere, "No such file"]);
        refused("colour", &[], &["colour"]);
        let server = bench.server(&["memory", "64M"]);
        for (setting, word) in [
            ("connections=0", "1 to 16"),
            ("connections=17", "1 to 16"),
            ("connections=two", "1 to 16"),
            ("connections=", "1 to 16"),
            ("colour=red", "colour"),
            // The program says why, blkfused that it has no such key.
            ("queues=2", "connections"),
            ("threads=library", "connections"),
        ] {
            refused(&server.uri(), &[setting], &[word]);
        }
        drop(server);
        for (policy, word) in [
            (
                ["blocksize-minimum=512", "blocksize-maximum=1M"],
                "whole blocks",
            ),
            (["blocksize-minimum=1", "blocksize-maximum=4096"], "64 KiB"),
        ] {
            let preferred = "blocksize-preferred=4096";
            let filter = "--filter=blocksize-policy";
            let server = bench.server(&[filter, "memory", "64M", policy[0], preferred, policy[1]]);
            refused(&server.uri(), &[], &[&server.uri(), word]);
        }
        if bench.is_plugin() {
            let server = bench.server(&["--readonly", "memory", "64M"]);
            refused(&server.uri(), &[], &[&server.uri(), "written"]);
        } else {
            let usage = Command::new(bench.program()).output().unwrap();
            assert_eq!(usage.status.code(), Some(2));
        }
    }
}

#[test]
fn the_plugin_says_what_it_can_be_told() {
    let Some(bench) = Bench::new(Linking::Plugin) else {
        return;
    };
    let start = || {
        let mut command = Command::new(bench.program());
        command.arg("--plugin").arg(&bench.built);
        command
    };
    let help = start().arg("--help").output().unwrap();
    assert!(help.status.success(), "{help:?}");
    let help = String::from_utf8(help.stdout).unwrap();
    for word in ["uri ", "nbd+unix", "connections ", "1 to 16"] {
        assert!(help.contains(word), "{help}");
    }
    let path = bench.workshop.mountpoint("disk");
    let output = start().arg("connections=2").arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("uri: must be given"), "{said}");
}

#[test]
fn a_plugin_has_several_disks_at_once() {
    for_transports(|transport| {
        let Some(bench) = Bench::new(Linking::Plugin) else {
            return;
        };
        let mut servers =
            ["one", "two"].map(|name| Server::start(&bench.workshop, name, &["memory", "64M"]));
        let paths = ["first", "second"].map(|name| bench.workshop.mountpoint(name));
        let _watchdogs = paths.each_ref().map(|path| Watchdog::new(path));
        let mut command = Command::new(bench.program());
        let transport = format!("{transport:?}").to_lowercase();
        command.args(["-w", "--io-uring", &transport]);
        for (server, path) in servers.iter().zip(&paths) {
            let (plugin, uri) = (bench.built.display(), server.uri());
            let path = path.display();
            command.arg("--export");
            command.arg(format!("plugin:{plugin},connections=2,uri={uri}={path}"));
        }
        let mut running = Running::start(&mut command);
        paths.iter().for_each(|_| drop(running.line(PATIENCE)));
        let files = paths.each_ref().map(|path| {
            let mut options = File::options();
            options.read(true).write(true).open(path).unwrap()
        });
        use_disk(&files[0]);
        use_disk(&files[1]);
        for (file, data) in files.iter().zip([b"a", b"b"]) {
            file.write_all_at(data, 5).unwrap();
        }
        assert_eq!(read(&files[0], 5, 1).unwrap(), b"a");
        assert_eq!(read(&files[1], 5, 1).unwrap(), b"b");
        // The one's end is none of the other's.
        servers[0].kill();
        assert_eq!(errno(read(&files[0], 1 << 20, 4096)), libc::EIO);
        assert_eq!(read(&files[1], 5, 1).unwrap(), b"b");
        files[1].sync_all().unwrap();
        drop(files);
        running.signal(libc::SIGTERM);
        assert_eq!(running.status(PATIENCE).code(), Some(1));
        assert!(!paths.iter().any(|path| is_mounted(path)));
    });
}

#[test]
fn what_was_written_is_flushed_when_the_daemon_ends() {
    for_transports(|transport| {
        let Some(bench) = Bench::new(Linking::Plugin) else {
            return;
        };
        let log = bench.workshop.path("log");
        let logfile = format!("logfile={}", log.display());
        let server = bench.server(&["--filter=log", "memory", "64M", &logfile]);
        let shown = bench.show(&server, transport, &[]);
        let file = shown.open();
        file.write_all_at(b"data", 0).unwrap();
        let flushes = || fs::read_to_string(&log).unwrap().matches(" Flush ").count();
        let before = flushes();
        // It is still open, so no client has flushed.
        shown.end(0);
        assert!(flushes() > before);
        drop(file);
    });
}

#[test]
fn what_mapped_memory_holds_reaches_a_slow_server_before_the_daemon_ends() {
    for_transports(|transport| {
        let Some(bench) = Bench::new(Linking::Plugin) else {
            return;
        };
        let image = bench.workshop.path("image");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let name = image.to_str().unwrap();
        // Longer than the daemon waits for anything else.
        let server = bench.server(&["--filter=delay", "file", name, "wdelay=3"]);
        let shown = bench.show(&server, transport, &[]);
        let file = shown.open();
        // SAFETY: nobody else changes the file, and nothing touches the memory
        // after the export's end.
        let mut memory = unsafe { MmapMut::map_mut(&file) }.unwrap();
        memory.copy_from_slice(&pattern(3, 1 << 20));
        shown.end(0);
        assert!(fs::read(&image).unwrap() == pattern(3, 1 << 20));
        drop((memory, file));
    });
}

/// Uses the disk of a server that lives on, and of one that dies. `start` begins
/// the command line with a program.
fn with_servers(bench: &Bench, start: impl Fn(&Path) -> Command) {
    for dies in [false, true] {
        let mut server = bench.server(&["memory", "64M"]);
        let path = bench.workshop.mountpoint("disk");
        let watchdog = Watchdog::new(&path);
        let command = start(bench.program());
        let mut command = bench.complete(command, &server.uri(), &path, IoUring::Auto, &[]);
        let shown = Shown::start(&mut command, path, watchdog);
        use_disk(&shown.open());
        if dies {
            server.kill();
            assert_eq!(errno(read(&shown.open(), 0, 4096)), libc::EIO);
        }
        shown.end(dies.into());
    }
}

#[test]
fn it_uses_memory_rightly() {
    if !common::can_export() {
        return;
    }
    let Some(valgrind) = valgrind() else { return };
    for way in WAYS {
        let Some(bench) = Bench::new(way) else { return };
        with_servers(&bench, |program| {
            let mut command = valgrind();
            command.arg(program);
            command
        });
    }
}

#[test]
fn sanitizers_find_nothing_in_it() {
    if !common::can_export() {
        return;
    }
    for way in WAYS {
        // In a plugin their code comes late, and must be there before all other.
        let late = (way == Linking::Plugin).then_some("-shared-libasan");
        let more: Vec<_> = SANITIZE.into_iter().chain(late).collect();
        let Some(bench) = Bench::with("clang", C, way, &more) else {
            return;
        };
        let library = late.map(|_| asan());
        let sanitizers = Sanitizers::new();
        with_servers(&bench, |program| {
            let mut command = sanitizers.command(program);
            command.envs(library.iter().map(|library| ("LD_PRELOAD", library)));
            command
        });
    }
}

/// The shared library of AddressSanitizer.
fn asan() -> String {
    let library = format!("libclang_rt.asan-{}.so", std::env::consts::ARCH);
    let mut find = Command::new("clang");
    let found = find.arg(format!("-print-file-name={library}")).output();
    let path = String::from_utf8(found.unwrap().stdout).unwrap();
    path.trim_end().to_owned()
}

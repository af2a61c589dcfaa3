//! Hosts that do not fit into tests/c_programs.rs, where C and C++ programs are
//! that link the library: one in Python, one that keeps the library loaded, and
//! ones that fork.

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
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use blkfuse::IoUring;
use nix::mount::MntFlags;

use common::client::{errno, fallocate, have, run, seek};
use common::{SOON, Watchdog, eventually, for_transports, is_mounted, pattern, skip, unmount};
use compiled::{C, Linking, PATIENCE, Running, Workshop, try_test};
use hosted::{Connection, Connections};

fn read_block(file: &File) -> io::Result<[u8; 4096]> {
    let mut block = [0xee; 4096];
    file.read_exact_at(&mut block, 0)?;
    Ok(block)
}

/// "io-uring=on" or off, for a host's command line.
fn setting(transport: IoUring) -> String {
    format!("io-uring={transport:?}").to_lowercase()
}

// --- Python -----------------------------------------------------------------

const PYTHON_HOST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_host.py");

/// The host in Python, before what it is told with a test's input.
fn python_host(path: &Path, transport: IoUring) -> Command {
    let mut command = Command::new("python3");
    command
        .arg(PYTHON_HOST)
        .arg(common::library_dir().join("libblkfuse.so"))
        .arg(path)
        .arg(setting(transport))
        .stdin(Stdio::piped());
    command
}

fn ask(host: &mut Running, line: &str) -> String {
    host.tell(line);
    host.line(SOON)
}

#[test]
fn a_python_host_serves() {
    if !have("python3") {
        return skip("there is no python3");
    }
    for_transports(|transport| {
        let workshop = Workshop::new();
        let path = workshop.mountpoint("disk");
        let _watchdog = Watchdog::new(&path);
        let connections = Connections::new();
        let mut host = Running::start(&mut python_host(&path, transport));
        let over = match transport {
            IoUring::Off => "/dev/fuse",
            _ => "io_uring",
        };
        assert_eq!(host.line(PATIENCE), format!("serving over {over}"));

        serves_other_programs(&workshop, &path);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let first = [pattern(0, 5), pattern(77, 4091)].concat();
        file.write_all_at(&first[5..], 5).unwrap();
        let before: u64 = ask(&mut host, "flushes").parse().unwrap();
        file.sync_all().unwrap();
        let after: u64 = ask(&mut host, "flushes").parse().unwrap();
        assert!(after > before, "{after} flushes, {before} before");
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, 4096, 8192).unwrap();
        assert_eq!(seek(&file, 0, libc::SEEK_HOLE).unwrap(), 4096);
        assert_eq!(seek(&file, 4096, libc::SEEK_DATA).unwrap(), 12288);

        let waits = connections.of(&path);
        drains(&mut host, &waits, || {
            assert!(read_block(&file).unwrap() == *first);
        });
        assert_eq!(ask(&mut host, "resize 5000000"), "resized");
        assert_eq!(fs::metadata(&path).unwrap().len(), 5_000_000);
        file.write_all_at(b"the end", 4_999_993).unwrap();
        assert_eq!(ask(&mut host, "resize 4096"), "resized");
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        assert!(read_block(&file).unwrap() == *first);

        // A callback that raises fails, and does not return what was there.
        assert_eq!(ask(&mut host, "spoil"), "spoilt");
        assert_eq!(errno(read_block(&file)), libc::EIO);
        assert_eq!(ask(&mut host, "mend"), "mended");
        assert!(read_block(&file).is_ok());

        // It deletes its export although the file is open.
        host.end_input();
        assert_eq!(host.line(SOON), "deleted");
        let status = host.status(SOON);
        assert!(status.success(), "{status}");
        assert!(!is_mounted(&path));
    });
}

/// What cmp and dd read and write is what was written and read.
fn serves_other_programs(workshop: &Workshop, path: &Path) {
    let (input, output) = (workshop.path("in"), workshop.path("out"));
    fs::write(&input, pattern(0, 1 << 20)).unwrap();
    let dd = |from: &Path, to: &Path, flags: &str| {
        let mut command = Command::new("dd");
        command.arg(format!("if={}", from.display()));
        command.arg(format!("of={}", to.display()));
        run(command.args(["bs=60000", flags]));
    };
    dd(&input, path, "conv=notrunc,fsync");
    run(Command::new("cmp").args([&input, path]));
    dd(path, &output, "status=none");
    assert!(fs::read(&output).unwrap() == pattern(0, 1 << 20));
}

/// In a drain nothing is begun, and who waits is served after it.
fn drains(host: &mut Running, connection: &Connection, read: impl FnOnce() + Send) {
    assert_eq!(ask(host, "drain"), "drained");
    let calls = ask(host, "calls");
    thread::scope(|scope| {
        let client = scope.spawn(read);
        eventually("the client waits", || connection.waiting() > 0);
        assert_eq!(ask(host, "calls"), calls);
        assert!(!client.is_finished());
        assert_eq!(ask(host, "resume"), "resumed");
        client.join().unwrap();
    });
}

#[test]
fn a_python_host_says_what_is_wrong() {
    if !common::can_export() {
        return;
    }
    if !have("python3") {
        return skip("there is no python3");
    }
    let mut command = python_host(Path::new("/nonexistent/disk"), IoUring::Off);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("/nonexistent/disk"), "{text}");
    assert!(!text.contains("Traceback"), "{text}");
}

// --- dlopen -----------------------------------------------------------------

#[test]
fn the_library_can_stay_loaded() {
    let workshop = Workshop::new();
    let Some(program) = workshop.build("gcc", C, "tests/c/dynamic.c", Linking::Shared) else {
        return;
    };
    let library = workshop.path("libblkfuse.so.0");
    try_test(&workshop, &program, &[&library, Path::new("stay")]);
}

// --- fork -------------------------------------------------------------------

/// A host of tests/c/fork.c, its child, and a file that a client has open.
struct Family {
    host: Running,
    child: u32,
    connection: Connection,
    _connections: Connections,
    file: File,
}

impl Family {
    /// `kind` of child: one that goes on ("fork"), that becomes another program
    /// ("exec"), or that was made past the C library ("clone").
    fn start(program: &Path, path: &Path, transport: IoUring, kind: &str) -> Self {
        let value = format!("{transport:?}").to_lowercase();
        let mut command = Command::new(program);
        command.arg(path).args(["2", &value, kind]);
        let host = Running::start(command.stdin(Stdio::piped()));
        let child = host.line(PATIENCE).parse().unwrap();
        if kind == "clone" {
            assert!(serves(&descriptors(child)));
        } else {
            eventually("the child has nothing", || !serves(&descriptors(child)));
        }
        let file = File::open(path).unwrap();
        assert!(read_block(&file).is_ok());
        let connections = Connections::new();
        Self {
            host,
            child,
            connection: connections.of(path),
            _connections: connections,
            file,
        }
    }

    /// The host dies without any chance to clean up.
    fn kill_host(&mut self) {
        self.host.signal(libc::SIGKILL);
        assert!(!self.host.status(SOON).success());
    }

    /// The client, too, gets no data, though the child goes on.
    fn fails(&self) {
        errno(read_block(&self.file));
        assert!(!descriptors(self.child).is_empty(), "the child has ended");
    }
}

/// What a process's descriptors are; none if it has ended.
fn descriptors(process: u32) -> Vec<String> {
    let links = fs::read_dir(format!("/proc/{process}/fd"));
    let links = links.into_iter().flatten().flatten();
    let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
    targets.map(|path| path.display().to_string()).collect()
}

/// Whether descriptors of an export are among them.
fn serves(descriptors: &[String]) -> bool {
    let kinds = ["/dev/fuse", "anon_inode:[io_uring]"];
    descriptors.iter().any(|d| kinds.contains(&d.as_str()))
}

/// Runs `test` for each transport with a child of each of these kinds.
fn for_families(kinds: &[&str], test: impl Fn(Family, &Path)) {
    for_transports(|transport| {
        let workshop = Workshop::new();
        let Some(program) = workshop.build("gcc", C, "tests/c/fork.c", Linking::Shared) else {
            return;
        };
        for kind in kinds {
            eprintln!("child: {kind}");
            let path = workshop.mountpoint("disk");
            let _watchdog = Watchdog::new(&path);
            test(Family::start(&program, &path, transport, kind), &path);
        }
    });
}

#[test]
fn a_child_does_not_keep_a_deleted_export() {
    for_families(&["fork", "exec", "clone"], |mut family, path| {
        family.host.signal(libc::SIGUSR1);
        assert_eq!(family.host.line(SOON), "deleted");
        assert!(!is_mounted(path));
        family.fails();
        family.host.signal(libc::SIGTERM);
        assert!(family.host.status(SOON).success());
        // Nor does it afterwards, as the host's heir.
        family.fails();
        drop(family.file);
        eventually("the connection goes", || !family.connection.exists());
        assert!(!descriptors(family.child).is_empty());
    });
}

#[test]
fn a_child_does_not_keep_a_dead_hosts_clients() {
    for_families(&["fork", "exec"], |mut family, path| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let file = family.file.try_clone().unwrap();
                thread::spawn(move || while read_block(&file).is_ok() {})
            })
            .collect();
        family.kill_host();
        for client in clients {
            eventually("a client's error", || client.is_finished());
            client.join().unwrap();
        }
        family.fails();
        drop(family.file);
        unmount(path, MntFlags::empty());
        eventually("the connection goes", || !family.connection.exists());
    });
}

#[test]
fn what_a_child_keeps_that_was_made_past_the_c_library_ends_with_it() {
    for_families(&["clone"], |mut family, path| {
        family.kill_host();
        let file = family.file.try_clone().unwrap();
        let client = thread::spawn(move || read_block(&file).is_err());
        // The child reads it.
        family.host.end_input();
        eventually("the child ends", || descriptors(family.child).is_empty());
        eventually("the client's read ends", || client.is_finished());
        assert!(client.join().unwrap());
        drop(family.file);
        assert!(family.connection.exists());
        unmount(path, MntFlags::empty());
        eventually("the connection goes", || !family.connection.exists());
    });
}

//! An export in a process of its own, and its clients in others: so a test can
//! end any of them in any way, and see what is left.
//!
//! The processes run the test program itself. It has a test named [`ROLE`]
//! that does nothing but call [`play`].
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{self, ChildStdin, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blkfuse::{Export, IoUring, Stop};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use crate::alone::{Belongings, own_dir};
use crate::common::{Handle, Memory, client, eventually, is_mounted, mount_line, pattern};

/// The name of the test that [`play`]s.
pub const ROLE: &str = "a_role_in_another_test";
const ENV: &str = "BLKFUSE_TEST_ROLE";

/// The exported device: first what is only read, then what is written.
const LENGTH: usize = 512 << 10;
const READ_ONLY: usize = 256 << 10;
const BLOCK: usize = 4096;
/// How long an end may take. The kernel's unmounting waits for all CPUs, which
/// clients keep busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// Clients' processes, and how many threads of each read, and write.
const PROCESSES: usize = 3;
const PAIRS: usize = 4;

/// Does what another process of these tests has started this one for, if that
/// is so.
pub fn play() {
    let Ok(role) = std::env::var(ENV) else { return };
    let words: Vec<_> = role.split(' ').collect();
    match words[..] {
        ["host", path, transport, queues] => {
            let transport = if transport == "Off" {
                IoUring::Off
            } else {
                IoUring::On
            };
            be_host(Path::new(path), transport, number(queues));
        }
        ["client", path, process] => be_client(Path::new(path), number(process)),
        _ => panic!("no such role: {role}"),
    }
}

fn number<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

// --- processes --------------------------------------------------------------

/// A process that plays a role. It says lines that begin with `@`, and ends when
/// its input does.
struct Player {
    child: process::Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Player {
    fn start(role: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", ROLE, "--nocapture", "--test-threads=1"])
            .env(ENV, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = client::spawn(&mut command);
        let output = BufReader::new(child.stdout.take().unwrap());
        let (say, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // The test harness writes its own before it.
                if let Some((_, said)) = line.split_once('@') {
                    let _ = say.send(said.to_owned());
                }
            }
        });
        Self {
            input: child.stdin.take(),
            child,
            lines,
            reader: Some(reader),
        }
    }

    /// What it says next.
    fn hear(&self) -> String {
        self.lines
            .recv_timeout(2 * PATIENCE)
            .expect("it says something")
    }

    fn tell(&mut self, command: &str) {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.hear()
    }

    /// Its status, if it ends soon; what it waits for, if not.
    fn wait(&mut self) -> Result<ExitStatus, String> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(1));
        }
        Err(states(self.child.id()))
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        if self.wait().is_ok()
            && let Some(reader) = self.reader.take()
        {
            let _ = reader.join();
        }
    }
}

/// Says a line to who has started this process.
fn say(text: impl std::fmt::Display) {
    println!("@{text}");
}

/// The threads of a process: their names, states, and what they wait for.
pub fn states(process: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    let mut text = String::new();
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let state = stat.rsplit(") ").next().unwrap_or_default();
        let stack = read("stack");
        let calls = stack.lines().filter_map(|line| line.split(' ').nth(1));
        let calls: Vec<_> = calls.filter_map(|call| call.split('+').next()).collect();
        text += &format!("\n{} {state:.1} {}", read("comm").trim(), calls.join(" < "));
    }
    text
}

// --- the kernel's control of connections ------------------------------------

/// fusectl(5), mounted privately.
pub struct Connections(TempDir);

impl Connections {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        mount(
            Some("none"),
            dir.path(),
            Some("fusectl"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        Self(dir)
    }

    /// The connection of the topmost mount at `path`.
    pub fn of(&self, path: &Path) -> Connection {
        let line = mount_line(path).expect("it is mounted");
        let device = line.split(' ').nth(2).unwrap();
        let number = device.strip_prefix("0:").expect("no driver's device");
        let dir = self.0.path().join(number);
        let inode = fs::metadata(&dir).unwrap().ino();
        Connection { dir, inode }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// One connection. The kernel soon uses its number again for another.
pub struct Connection {
    dir: PathBuf,
    inode: u64,
}

impl Connection {
    pub fn exists(&self) -> bool {
        fs::metadata(&self.dir).is_ok_and(|dir| dir.ino() == self.inode)
    }

    /// Ends it if it exists.
    pub fn abort(&self) {
        if self.exists() {
            let _ = fs::write(self.dir.join("abort"), "1");
        }
    }

    /// How many of its requests are not answered.
    pub fn waiting(&self) -> usize {
        let text = fs::read_to_string(self.dir.join("waiting")).unwrap();
        number(text.trim())
    }
}

// --- the host ---------------------------------------------------------------

/// A process with an export of a device in memory. At the latest when it is
/// dropped, its connection is aborted and unmounted.
pub struct Host {
    player: Player,
    pub path: PathBuf,
    pub connection: Connection,
    _connections: Connections,
    _dir: TempDir,
}

impl Host {
    pub fn start(transport: IoUring, queues: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let role = format!("host {} {transport:?} {queues}", path.display());
        let player = Player::start(&role);
        assert_eq!(player.hear(), "ready");
        let connections = Connections::new();
        Self {
            player,
            connection: connections.of(&path),
            _connections: connections,
            path,
            _dir: dir,
        }
    }

    /// How many calls the driver has had.
    pub fn calls(&mut self) -> u64 {
        number(&self.player.ask("calls"))
    }

    /// From now on the driver completes nothing; waits until clients wait.
    pub fn hold(&mut self) {
        assert_eq!(self.player.ask("hold"), "held");
    }

    /// The driver completes what it has, and what comes.
    pub fn release(&mut self) {
        assert_eq!(self.player.ask("release"), "released");
    }

    /// Forks a child that does nothing, and has copies of all descriptors.
    pub fn fork(&mut self) {
        assert_eq!(self.player.ask("fork"), "forked");
    }

    /// Puts /dev/null in the place of one of the rings.
    pub fn break_ring(&mut self) {
        assert_eq!(self.player.ask("break"), "broken");
    }

    pub fn begin_stop(&mut self, how: Stop) {
        self.player.tell(&format!("stop {how:?}"));
    }

    pub fn begin_delete(&mut self) {
        self.player.tell("delete");
    }

    /// Waits for the end of what was begun.
    pub fn finish(&mut self) {
        let result = self.player.ask("finish");
        let host = self.player.child.id();
        assert!(result == "Ok(())", "{result}; the host:{}", states(host));
    }

    /// Waits until the driver is told of an event.
    pub fn expect(&mut self, event: &str) {
        assert_eq!(self.player.ask(&format!("expect {event}")), "told");
    }

    /// Deletes the export if that was not done, and sees that nothing is left.
    /// Returns the driver's events.
    pub fn end(mut self) -> Vec<String> {
        let events = self.player.ask("end");
        drop(self.player.input.take());
        let status = self.player.wait().expect("the host ends");
        assert!(status.success(), "{status}");
        self.expect_no_connection();
        let lines = events.split(';').map(str::to_owned);
        lines.filter(|line| !line.is_empty()).collect()
    }

    /// Ends the process without any chance to clean up; what it leaves is a
    /// dead mount.
    pub fn kill(&mut self) {
        self.player.child.kill().unwrap();
        let status = self.player.wait().expect("the host dies");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }

    /// Takes away what a killed host has left.
    pub fn clean_up(self) {
        assert!(is_mounted(&self.path));
        umount2(&self.path, MntFlags::MNT_DETACH).unwrap();
        self.expect_no_connection();
    }

    fn expect_no_connection(&self) {
        assert!(!is_mounted(&self.path));
        eventually("the connection goes", || !self.connection.exists());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Nothing is there any more unless the test has failed.
        self.connection.abort();
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// What is exported in the host, and what is done about that in a thread.
struct Exported {
    export: Option<Export>,
    doing: Option<JoinHandle<(Option<Export>, blkfuse::Result<()>)>>,
}

impl Exported {
    fn begin<F>(&mut self, doing: F)
    where
        F: FnOnce(Export) -> (Option<Export>, blkfuse::Result<()>) + Send + 'static,
    {
        let export = self.export.take().expect("one thing at a time");
        self.doing = Some(thread::spawn(move || doing(export)));
    }

    fn finish(&mut self) -> blkfuse::Result<()> {
        let doing = self.doing.take().expect("something was begun");
        let (export, result) = doing.join().unwrap();
        self.export = export;
        result
    }
}

fn be_host(path: &Path, transport: IoUring, queues: usize) {
    let driver = Memory::patterned(LENGTH).handle();
    let start = |path: &Path| {
        let builder = Export::builder(driver.clone()).mountpoint(path);
        let builder = builder.writable(true).queues(queues).io_uring(transport);
        builder.start().unwrap()
    };
    // The first one makes what the process keeps.
    let dir = own_dir();
    let first = dir.path().canonicalize().unwrap().join("disk");
    File::create(&first).unwrap();
    start(&first).delete(Some(PATIENCE)).unwrap();
    driver.events.lock().unwrap().clear();
    let before = Belongings::now();

    let mut exported = Exported {
        export: Some(start(path)),
        doing: None,
    };
    say("ready");
    for command in io::stdin().lines() {
        match command.unwrap().as_str() {
            "calls" => say(driver.count.load(SeqCst)),
            "hold" => {
                driver.hold();
                // Writers wait for one another.
                driver.wait_for_held(PROCESSES * PAIRS);
                say("held");
            }
            "release" => {
                driver.release();
                say("released");
            }
            "fork" => {
                fork_idle();
                say("forked");
            }
            "break" => {
                break_ring();
                say("broken");
            }
            "stop Lazy" => exported.begin(|e| {
                let result = e.stop(Stop::Lazy);
                (Some(e), result)
            }),
            "stop Force" => exported.begin(|e| {
                let result = e.stop(Stop::Force);
                (Some(e), result)
            }),
            "delete" => exported.begin(|e| (None, e.delete(Some(PATIENCE)))),
            "finish" => say(format!("{:?}", exported.finish())),
            "end" => {
                if let Some(export) = exported.export.take() {
                    export.delete(Some(PATIENCE)).unwrap();
                }
                before.are_all();
                say(events(&driver).join(";"));
            }
            other => {
                let event = other.strip_prefix("expect ").expect("a command");
                driver.wait_for_event(|e| format!("{e:?}").starts_with(event));
                say("told");
            }
        }
    }
}

fn events(driver: &Handle) -> Vec<String> {
    let events = driver.events.lock().unwrap();
    events.iter().map(|event| format!("{event:?}")).collect()
}

/// Forks a child that waits for the end of this process.
fn fork_idle() {
    // SAFETY: the child only makes system calls.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain system calls without memory.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    assert!(child > 0);
}

/// Puts /dev/null in the place of one of this process's rings.
fn break_ring() {
    let null = File::open("/dev/null").unwrap();
    let is_ring = |fd: &i32| {
        let link = fs::read_link(format!("/proc/self/fd/{fd}"));
        link.is_ok_and(|target| target == Path::new("anon_inode:[io_uring]"))
    };
    let ring = (0..1000).find(is_ring).expect("a ring");
    // SAFETY: it changes what a descriptor means that the library uses, which
    // is the point; the library sees that as a ring that fails.
    assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), ring) }, ring);
}

// --- clients ----------------------------------------------------------------

/// Processes that read and write a file with O_DIRECT, each in many threads,
/// until that fails or they are told to end. They check what they read.
pub struct Clients {
    players: Vec<Player>,
    /// The host's process.
    host: u32,
}

impl Clients {
    /// Of a host's export.
    pub fn start(host: &Host) -> Self {
        Self::begin(&host.path, host.player.child.id())
    }

    /// Of an export of this process.
    pub fn of(path: &Path) -> Self {
        Self::begin(path, process::id())
    }

    fn begin(path: &Path, host: u32) -> Self {
        let role = |n| format!("client {} {n}", path.display());
        let players: Vec<_> = (0..PROCESSES).map(|n| Player::start(&role(n))).collect();
        for player in &players {
            assert_eq!(player.hear(), "ready");
        }
        Self { players, host }
    }

    /// They end, each thread with an error.
    pub fn fail(&mut self) {
        self.end(2 * PAIRS);
    }

    /// They end when they are told to, without an error.
    pub fn finish(&mut self) {
        for player in &mut self.players {
            drop(player.input.take());
        }
        self.end(0);
    }

    fn end(&mut self, errors: usize) {
        for player in &mut self.players {
            let status = player.wait().unwrap_or_else(|waits| {
                let host = states(self.host);
                panic!("a client does not end:{waits}\nthe host:{host}")
            });
            assert!(status.success(), "a client found something wrong: {status}");
            assert_eq!(player.hear(), format!("{errors} errors"));
        }
    }
}

fn be_client(path: &Path, process: usize) {
    let open = || {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true);
        options.custom_flags(libc::O_DIRECT).open(path).unwrap()
    };
    let over = Arc::new(AtomicBool::new(false));
    let told = over.clone();
    // Not joined: the clients may end before their input does.
    thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        told.store(true, SeqCst);
    });
    let content = pattern(0, READ_ONLY);
    let errors = AtomicUsize::new(0);
    let until_over = |once: &mut dyn FnMut(usize) -> io::Result<()>| {
        let mut rounds = 0..;
        while !over.load(SeqCst) {
            if once(rounds.next().unwrap()).is_err() {
                errors.fetch_add(1, SeqCst);
                break;
            }
        }
    };
    thread::scope(|scope| {
        for pair in 0..PAIRS {
            let me = process * PAIRS + pair;
            let (reader, writer) = (open(), open());
            let (content, until_over) = (&content, &until_over);
            scope.spawn(move || {
                let mut data = vec![0; 16 * BLOCK];
                until_over(&mut |n| {
                    let data = &mut data[..(1 + n % 16) * BLOCK];
                    let at = (n * 7 + me) % 48 * BLOCK;
                    reader.read_exact_at(data, at as u64)?;
                    assert!(*data == content[at..][..data.len()], "wrong data");
                    Ok(())
                });
            });
            scope.spawn(move || {
                let at = (READ_ONLY + me * BLOCK) as u64;
                until_over(&mut |n| {
                    let data = [(n + me) as u8; BLOCK];
                    writer.write_all_at(&data, at)?;
                    let mut back = [0; BLOCK];
                    writer.read_exact_at(&mut back, at)?;
                    assert!(data == back, "something else than was written");
                    Ok(())
                });
            });
        }
        say("ready");
    });
    say(format!("{} errors", errors.load(SeqCst)));
}

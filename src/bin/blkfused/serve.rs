//! The life of the exports: all of them start or none; each may end by
//! itself; a signal ends the rest.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use blkfuse::{Export, State, Stop};
use log::{error, info, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::backend::Backend;
use crate::cli::{Config, Pair};
use crate::events::{Ending, Events};
use crate::failure::{Failure, Reason, Result};
use crate::image::Image;
use crate::passed_fd;
use crate::signals::Signals;
use crate::size::Size;

/// How long requests in flight may take to end before the exports end anyway.
const DRAIN: Duration = Duration::from_millis(500);
/// How long the image may answer nothing while it is waited for because of what
/// clients have in mapped memory.
const SILENCE: Duration = Duration::from_secs(10);
/// How long the end of an export may take after that. It is near even while
/// clients hold the file open; only a driver that does not answer delays it.
const DELETE: Duration = Duration::from_secs(2);
/// How often the end of the work is looked for while signals are awaited.
const TICK: Duration = Duration::from_millis(10);

/// An export that was started.
struct Running {
    disk: Disk,
    export: Export,
}

/// What is exported; outlives the export, to be flushed after it.
struct Disk {
    name: String,
    writable: bool,
    image: Arc<Image>,
}

/// Exports everything until the end; true if nothing went wrong on the way.
/// `hints` is printed when all is ready.
pub fn serve(config: &Config, signals: &Signals, hints: Option<&str>) -> Result<bool> {
    let events = Events::new().map_err(|errno| Failure::io("eventfd", &errno.into()))?;

    // Mistakes in any image are found before anything is mounted.
    let images = config
        .exports
        .iter()
        .map(|pair| pair.image.open(config.options))
        .collect::<Result<Vec<_>>>()?;

    let mut running: Vec<Option<Running>> = Vec::new();
    let mut lines = Vec::new();
    for (pair, image) in config.exports.iter().zip(images) {
        match start(config, pair, image, &events, running.len()) {
            Ok((export, line)) => {
                running.push(Some(export));
                lines.push(line);
            }
            Err(failure) => {
                stop_all(running, signals);
                return Err(failure);
            }
        }
    }
    announce(&lines, hints);

    let mut clean = true;
    while running.iter().any(Option::is_some) {
        wait(signals, &events);
        match signals.next() {
            Ok(None) => {}
            Ok(Some(signal)) => {
                info!("{signal}: stopping");
                return Ok(stop_all(running, signals) && clean);
            }
            Err(errno) => error!("reading a signal: {}", errno.desc()),
        }
        for (number, ending) in events.take() {
            // An export may have more than one last word.
            if let Some(export) = running.get_mut(number).and_then(Option::take) {
                clean &= export.ended(&ending);
            }
        }
    }
    Ok(clean)
}

/// Starts one export; also makes the line that says so.
fn start(
    config: &Config,
    pair: &Pair,
    image: Image,
    events: &Arc<Events>,
    number: usize,
) -> Result<(Running, String)> {
    let name = pair.image.name().display().to_string();
    let mountpoint = Path::new(&pair.mountpoint);
    let length = image.length().map_err(|e| Failure::io(&name, &e))?;
    let mode = if config.options.writable {
        "writable"
    } else {
        "read-only"
    };
    let what = format!("blkfused: {name} ({}, {mode})", Size(length));

    let image = Arc::new(image);
    let backend = Backend::new(Arc::clone(&image), events.notifier(number));
    let builder = Export::builder(backend)
        .writable(config.options.writable)
        .growable(config.options.growable)
        .passthrough(config.passthrough)
        .allow_other(config.allow_other)
        .source(pair.image.name());
    let builder = config.serving.configure(builder);
    let path = mountpoint.display();
    let (builder, line) = match passed_fd::number(mountpoint) {
        Some(fd) => (
            builder.fuse_fd(passed_fd::take(mountpoint, fd)?),
            format!("{what} is served over {path}; stop with Ctrl-C"),
        ),
        None => (
            builder.mountpoint(mountpoint),
            format!("{what} is at {path}; stop with Ctrl-C or: umount {path}"),
        ),
    };
    let export = builder.start()?;
    let disk = Disk {
        name,
        writable: config.options.writable,
        image,
    };
    Ok((Running { disk, export }, line))
}

/// Says that everything is ready. Nobody has to listen.
fn announce(lines: &[String], hints: Option<&str>) {
    let mut out = io::stdout().lock();
    for line in lines.iter().map(String::as_str).chain(hints) {
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
}

/// Waits for a signal or an event.
fn wait(signals: &Signals, events: &Events) {
    let mut fds = [signals.as_fd(), events.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => {
            error!("poll: {}", errno.desc());
            // Not at full speed, should it never get better.
            thread::sleep(Duration::from_secs(1));
        }
    }
}

impl Disk {
    /// Makes what was written durable; true if it is.
    fn flush(&self) -> bool {
        if !self.writable {
            return true;
        }
        let result = self.image.flush();
        if let Err(e) = &result {
            let reason = Reason(e);
            error!("{}: what was written may be lost: {reason}", self.name);
        }
        result.is_ok()
    }
}

impl Running {
    /// Asks for the end without waiting for it.
    fn stop(&self, how: Stop) {
        if let Err(e) = self.export.stop(how) {
            warn!("{}: {e}", self.disk.name);
        }
    }

    /// Has mapped memory written back, and takes the file away. That may take
    /// long, but only while the image answers anything.
    fn finish(&self) {
        self.stop(Stop::Lazy);
        if self.export.state() == State::Stopping {
            info!(
                "{}: writing back what clients have in mapped memory",
                self.disk.name
            );
        }
        let (mut answered, mut since) = (self.answered(), Instant::now());
        while self.export.state() == State::Stopping && since.elapsed() < SILENCE {
            thread::sleep(TICK);
            let now = self.answered();
            if now != answered {
                (answered, since) = (now, Instant::now());
            }
        }
    }

    /// How many requests have been answered.
    fn answered(&self) -> u64 {
        let stats = self.export.stats();
        stats.by_kind.iter().map(|kind| kind.operations).sum()
    }

    /// After the export ended by itself: clears it away; true if that was no
    /// failure.
    fn ended(self, ending: &Ending) -> bool {
        let name = &self.disk.name;
        match ending {
            Ending::Unmounted => self.delete(),
            Ending::Halted(reason) => {
                error!("{name}: the export has halted: {reason}");
                self.stop(Stop::Force);
                self.delete();
                false
            }
        }
    }

    /// Ends the export, then flushes what came in until then; true if all
    /// went well.
    fn delete(self) -> bool {
        let deleted = self.export.delete(Some(DELETE));
        if let Err(e) = &deleted {
            error!("{}: {e}", self.disk.name);
        }
        self.disk.flush() && deleted.is_ok()
    }
}

/// Ends all exports at once; true if all went well. One more signal forces
/// the end, and yet another gives up waiting.
fn stop_all(running: Vec<Option<Running>>, signals: &Signals) -> bool {
    let running: Vec<Running> = running.into_iter().flatten().collect();
    let mut forced = false;
    let force = || {
        if forced {
            give_up();
        }
        forced = true;
        warn!("stopping by force; whoever uses the files gets errors");
        running.iter().for_each(|one| one.stop(Stop::Force));
    };
    let end = || {
        quiesce(&running);
        at_once(running.iter().collect(), Running::finish);
    };
    attend(signals, force, end);
    let delete_all = || at_once(running, Running::delete);
    !attend(signals, give_up, delete_all).contains(&false)
}

/// Lets the requests in flight end and makes everything written durable.
fn quiesce(running: &[Running]) {
    // A drain that cannot begin shows in the one that waits.
    let drains: Vec<_> = running.iter().map(|one| one.export.drain_begin()).collect();
    let deadline = Instant::now() + DRAIN;
    for (one, drain) in running.iter().zip(drains) {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(e) = drain.and_then(|()| one.export.drain(Some(left))) {
            warn!("{}: {e}", one.disk.name);
        }
        one.disk.flush();
    }
    // What waits now must be answered, or unmounting waits for it: it may be
    // what a client wrote into mapped memory.
    for one in running {
        if let Err(e) = one.export.drain_end() {
            warn!("{}: {e}", one.disk.name);
        }
    }
}

/// Does the same to all exports at the same time: none has to wait for another's
/// slow unmounting.
fn at_once<T: Send, R: Send>(exports: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = exports
            .into_iter()
            .map(|one| scope.spawn(move || work(one)))
            .collect();
        threads.into_iter().map(result_of).collect()
    })
}

/// A thread's result; its panic is ours.
fn result_of<R>(thread: ScopedJoinHandle<'_, R>) -> R {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Leaves everything as it is: the kernel answers clients with errors once
/// the process is gone.
fn give_up() {
    error!("gave up waiting");
    process::exit(1);
}

/// Does some work that may take long, and meanwhile answers every signal with
/// `on_signal`.
fn attend<R: Send>(
    signals: &Signals,
    mut on_signal: impl FnMut(),
    work: impl FnOnce() -> R + Send,
) -> R {
    thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            if matches!(poll(&mut fds, TICK.as_millis() as u16), Ok(n) if n > 0)
                && matches!(signals.next(), Ok(Some(_)))
            {
                on_signal();
            }
        }
        result_of(worker)
    })
}

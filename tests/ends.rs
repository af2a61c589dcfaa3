//! How exports end while many processes use them, over each transport: whatever
//! happens, every client gets data or an error, and nothing is left.

#[path = "common/alone.rs"]
mod alone;
mod common;
#[path = "common/hosted.rs"]
mod hosted;

use std::path::Path;

use blkfuse::{IoUring, Stop};
use nix::mount::{MntFlags, umount2};

use common::{eventually, for_transports, for_transports_and_queues, is_mounted};
use hosted::{Clients, Host};

/// How often a host is killed, unless BLKFUSE_ROUNDS says otherwise.
const KILLS: usize = 20;

#[test]
fn a_role_in_another_test() {
    hosted::play();
}

/// An export under load.
struct Scene {
    host: Host,
    clients: Clients,
    /// The driver has requests, which it does not complete.
    held: bool,
}

impl Scene {
    fn new(transport: IoUring, queues: usize, held: bool) -> Self {
        let host = Host::start(transport, queues);
        let mut scene = Self {
            clients: Clients::start(&host),
            host,
            held,
        };
        scene.serves();
        if held {
            scene.host.hold();
        }
        scene
    }

    /// The load is served, and goes on.
    fn serves(&mut self) {
        let before = self.host.calls();
        eventually("there is load", || self.host.calls() > before + 500);
    }

    fn release(&mut self) {
        if self.held {
            self.host.release();
        }
    }

    fn vanishes(&self) {
        let path: &Path = &self.host.path;
        eventually("the file vanishes", || !is_mounted(path));
    }

    fn umount(&self, flags: MntFlags) -> nix::Result<()> {
        umount2(&self.host.path, flags)
    }
}

/// Runs `test` on every kind of export, with a driver that is fast, and with
/// one that keeps what it has.
fn for_scenes(test: impl Fn(Scene)) {
    for_scenes_over(&[IoUring::Off, IoUring::On], test);
}

fn for_scenes_over(transports: &[IoUring], test: impl Fn(Scene)) {
    for_transports_and_queues(|transport, queues| {
        if transports.contains(&transport) {
            test(Scene::new(transport, queues, false));
            test(Scene::new(transport, queues, true));
        }
    });
}

#[test]
fn by_a_lazy_stop() {
    for_scenes(|mut scene| {
        scene.host.begin_stop(Stop::Lazy);
        scene.vanishes();
        scene.release();
        scene.host.finish();
        scene.clients.fail();
        assert_eq!(scene.host.end(), ["Started"]);
    });
}

#[test]
fn by_a_forced_stop() {
    for_scenes(|mut scene| {
        scene.host.begin_stop(Stop::Force);
        scene.host.finish();
        scene.vanishes();
        scene.clients.fail();
        scene.release();
        assert_eq!(scene.host.end(), ["Started"]);
    });
}

#[test]
fn by_deletion() {
    for_scenes(|mut scene| {
        scene.host.begin_delete();
        scene.vanishes();
        scene.release();
        scene.host.finish();
        scene.clients.fail();
        assert_eq!(scene.host.end(), ["Started"]);
    });
}

#[test]
fn by_a_lazy_unmount_from_outside() {
    for_scenes(|mut scene| {
        scene.umount(MntFlags::MNT_DETACH).unwrap();
        scene.release();
        // Who has it open is served on.
        scene.serves();
        scene.clients.finish();
        scene.host.expect("Unmounted");
        assert_eq!(scene.host.end(), ["Started", "Unmounted"]);
    });
}

#[test]
fn by_a_forced_unmount_from_outside() {
    for_scenes(|mut scene| {
        // The mount stays if a client still has it open then.
        let _ = scene.umount(MntFlags::MNT_FORCE);
        scene.clients.fail();
        scene.release();
        scene.host.expect("Unmounted");
        assert_eq!(scene.host.end(), ["Started", "Unmounted"]);
    });
}

#[test]
fn by_an_abort_of_the_connection() {
    for_scenes(|mut scene| {
        scene.host.connection.abort();
        scene.clients.fail();
        scene.release();
        scene.host.expect("Unmounted");
        assert_eq!(scene.host.end(), ["Started", "Unmounted"]);
    });
}

#[test]
fn by_the_hosts_death() {
    let rounds = std::env::var("BLKFUSE_ROUNDS").map_or(KILLS, |n| n.parse().unwrap());
    for_transports(|transport| {
        for round in 0..rounds {
            let queues = common::QUEUES[round % common::QUEUES.len()];
            let mut scene = Scene::new(transport, queues, round % 2 == 1);
            scene.host.kill();
            scene.clients.fail();
            scene.host.clean_up();
        }
    });
}

#[test]
fn by_a_ring_that_dies() {
    for_scenes_over(&[IoUring::On], |mut scene| {
        scene.host.break_ring();
        scene.release();
        scene.clients.fail();
        let events = scene.host.end();
        let [started, halted] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(started, "Started");
        assert!(halted.starts_with("Halted"), "{halted}");
        assert!(halted.contains("io_uring: "), "{halted}");
    });
}

#[test]
fn while_a_forked_child_has_copies_of_the_descriptors() {
    for_scenes(|mut scene| {
        scene.host.fork();
        scene.host.begin_stop(Stop::Force);
        scene.host.finish();
        scene.clients.fail();
        scene.release();
        assert_eq!(scene.host.end(), ["Started"]);
    });
    for_scenes(|mut scene| {
        scene.host.fork();
        scene.host.begin_delete();
        scene.vanishes();
        scene.release();
        scene.host.finish();
        scene.clients.fail();
        assert_eq!(scene.host.end(), ["Started"]);
    });
}

//! Which queue serves whose requests: a pure function of the traffic.
//!
//! The kernel keeps one ring queue for each CPU, and a request goes to that of
//! the CPU where its client runs. Whichever of our queues answers through its
//! ring gets the entry's next request, so who serves whom can be changed with
//! every answer (exchange.rs). No single arrangement is good for everybody:
//!
//! * **One request at a time.** That is all about wake-ups: to wake a thread on
//!   another CPU takes 45 us, one on the same CPU 6, and one that is awake no
//!   time. So one queue serves alone and waits awake, on another CPU than the
//!   client's. (The scheduler moves a client that is woken to any CPU that is
//!   idle, so a second one that waits awake would get it as often as not.) If
//!   that takes the CPU from somebody, each queue serves the CPUs that it may
//!   run on, asleep: then client and server share one.
//! * **One client with many requests.** Two threads would take them in turns,
//!   one of them on the client's own CPU, which has enough to do. So one queue
//!   serves it alone, from any other CPU, awake if that disturbs nobody.
//! * **Several clients.** Every CPU is taken. Each queue serves the CPUs that it
//!   may run on, in between its clients' turns: no request crosses CPUs, and
//!   what a client leaves behind is still in the cache.
//! * **Large requests.** They are all copying, and a client uses the entries of
//!   its own CPU only. So those are spread over all queues, each of which
//!   copies on a CPU of its own.

/// From here on requests count as large, in bytes on average.
const LARGE: u64 = 32 << 10;

/// An arrangement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Every queue serves every CPU; a queue with nothing to do is given some
    /// of another's entries.
    Wide,
    /// One queue serves all, away from the CPU of its client; it may wait awake.
    Solo {
        queue: usize,
        client: usize,
        awake: bool,
    },
    /// Each queue serves some CPUs, and runs there.
    Near,
}

/// What has come in a while.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// How many requests from each CPU.
    pub(crate) requests: Vec<u64>,
    /// How many of them while no other was in hand.
    pub(crate) lone: u64,
    /// How many bytes they have moved.
    pub(crate) bytes: u64,
}

impl Traffic {
    pub(crate) fn none(cpus: usize) -> Self {
        Self {
            requests: vec![0; cpus],
            ..Self::default()
        }
    }

    /// What has come since `then`.
    pub(crate) fn since(&self, then: &Self) -> Self {
        let requests = self.requests.iter().zip(&then.requests);
        Self {
            requests: requests.map(|(now, then)| now - then).collect(),
            lone: self.lone - then.lone,
            bytes: self.bytes - then.bytes,
        }
    }
}

/// Whether a part is nearly all of it. A client that moves from one CPU to
/// another counts for both.
fn is_most(part: u64, all: u64) -> bool {
    part * 8 >= all * 7
}

/// On which CPUs a queue's thread is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seat {
    Anywhere,
    /// Not on this CPU.
    Beside(usize),
    /// Where its clients are.
    Among,
}

/// The queue that serves a CPU when each queue serves some.
pub(crate) fn near(cpu: usize, cpus: usize, queues: usize) -> usize {
    cpu * queues / cpus
}

impl Placement {
    /// What suits the traffic of a while. `self` is what there is. `calm`: who
    /// waits awake disturbs nobody.
    pub(crate) fn next(self, traffic: &Traffic, queues: usize, calm: bool) -> Self {
        let requests = &traffic.requests;
        let all: u64 = requests.iter().sum();
        if all == 0 {
            return self;
        }
        if traffic.bytes / all >= LARGE {
            return Placement::Wide;
        }
        let client = (0..requests.len()).max_by_key(|cpu| requests[*cpu]);
        let client = client.unwrap_or(0);
        let alone = if is_most(traffic.lone, all) {
            calm
        } else {
            is_most(requests[client], all)
        };
        if !alone {
            return Placement::Near;
        }
        Placement::Solo {
            queue: self.soloist(client, requests.len(), queues),
            client,
            awake: calm,
        }
    }

    /// Whoever serves alone goes on with that; else one that has not been
    /// serving the client's CPU, so that the threads need not change places.
    fn soloist(self, client: usize, cpus: usize, queues: usize) -> usize {
        match self {
            Placement::Solo { queue, .. } => queue,
            _ => (near(client, cpus, queues) + 1) % queues,
        }
    }

    /// Whether it differs from `other` only in where the client is.
    pub(crate) fn follows_client_of(self, other: Self) -> bool {
        match (self, other) {
            (
                Placement::Solo { queue, awake, .. },
                Placement::Solo {
                    queue: before,
                    awake: was_awake,
                    ..
                },
            ) => (queue, awake) == (before, was_awake),
            _ => false,
        }
    }

    /// Where `queue`'s thread is to run.
    pub(crate) fn seat(self, queue: usize) -> Seat {
        match self {
            Placement::Solo {
                queue: soloist,
                client,
                ..
            } if soloist == queue => Seat::Beside(client),
            Placement::Near => Seat::Among,
            Placement::Solo { .. } | Placement::Wide => Seat::Anywhere,
        }
    }

    /// Whether `queue` may wait for requests without sleeping: only where no
    /// client needs the CPU.
    pub(crate) fn may_poll(self, queue: usize) -> bool {
        match self {
            Placement::Solo {
                queue: soloist,
                awake,
                ..
            } => awake && soloist == queue,
            Placement::Near | Placement::Wide => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(requests: &[u64], size: u64) -> Traffic {
        Traffic {
            requests: requests.to_vec(),
            lone: 0,
            bytes: requests.iter().sum::<u64>() * size,
        }
    }

    fn solo(queue: usize, client: usize, awake: bool) -> Placement {
        Placement::Solo {
            queue,
            client,
            awake,
        }
    }

    #[test]
    fn one_client_is_served_by_one_queue_from_another_cpu() {
        let placed = Placement::Wide.next(&traffic(&[100, 3], 4096), 2, true);
        assert_eq!(placed, solo(1, 0, true));
        assert_eq!(placed.seat(1), Seat::Beside(0));
        assert_eq!(placed.seat(0), Seat::Anywhere);
        assert!(placed.may_poll(1) && !placed.may_poll(0));
        // It may move, and keeps its queue.
        let moved = placed.next(&traffic(&[3, 100], 4096), 2, true);
        assert_eq!(moved, solo(1, 1, true));
        // Somebody else needs the CPU.
        let asleep = moved.next(&traffic(&[3, 100], 4096), 2, false);
        assert_eq!(asleep, solo(1, 1, false));
        assert!(!asleep.may_poll(1));
    }

    #[test]
    fn clients_on_several_cpus_are_served_there() {
        for calm in [false, true] {
            let placed = Placement::Wide.next(&traffic(&[60, 40], 4096), 2, calm);
            assert_eq!(placed, Placement::Near);
            assert_eq!(placed.seat(1), Seat::Among);
            assert!((0..2).all(|queue| !placed.may_poll(queue)));
        }
        let served: Vec<_> = (0..8).map(|cpu| near(cpu, 8, 3)).collect();
        assert_eq!(served, [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(near(1, 2, 4), 2);
    }

    #[test]
    fn one_request_at_a_time_is_awaited_awake_or_served_where_its_client_is() {
        // A client that is moved to and fro.
        let mut lonely = traffic(&[50, 49], 4096);
        lonely.lone = 99;
        let placed = Placement::Wide.next(&lonely, 2, true);
        assert_eq!(placed, solo(1, 0, true));
        assert_eq!(placed.next(&lonely, 2, false), Placement::Near);
    }

    #[test]
    fn large_requests_are_for_everybody() {
        let placed = Placement::Near.next(&traffic(&[100, 0], 1 << 20), 2, true);
        assert_eq!(placed, Placement::Wide);
        assert_eq!(placed.seat(0), Seat::Anywhere);
    }

    #[test]
    fn without_requests_nothing_changes() {
        assert_eq!(
            solo(1, 0, true).next(&Traffic::none(2), 2, false),
            solo(1, 0, true)
        );
        // A single queue is always right.
        let placed = Placement::Wide.next(&traffic(&[0, 9], 4096), 1, true);
        assert_eq!(placed, solo(0, 1, true));
    }
}

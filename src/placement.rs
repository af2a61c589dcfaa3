//! Which queue serves whose requests: a pure function of the traffic.
//!
//! The kernel keeps one ring queue for each CPU, and a request goes to that of
//! the CPU where its client runs. Whichever of our queues answers through its
//! ring gets the entry's next request, so who serves whom can be changed with
//! every answer (exchange.rs). No single arrangement is good for everybody:
//!
//! * **One request at a time.** That is all about wake-ups. Where client and
//!   server share a CPU the one is woken as the other goes to sleep, in 6 us;
//!   across CPUs it takes 45. So each queue serves the CPUs that it may run on,
//!   and waits awake there for its client to have had its turn (polling.rs).
//! * **One client with many requests.** Two threads would take them in turns,
//!   one of them on the client's own CPU, which has enough to do. So one queue
//!   serves it alone, from any other CPU, and may wait awake.
//! * **Several clients.** Every CPU is taken. Each queue serves the CPUs that it
//!   may run on, in between its clients' turns: no request crosses CPUs, and
//!   what a client leaves behind is still in the cache.
//! * **Large requests.** They are all copying, and a client uses the entries of
//!   its own CPU only. So those are spread over all queues, each of which
//!   copies on a CPU of its own. The kernel fills every entry that it can get
//!   before the first is answered; with a few entries in use, those that a
//!   driver is done with at once are used again while they are in the cache.

/// From here on requests count as large, in bytes on average.
const LARGE: u64 = 32 << 10;

/// An arrangement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Every queue serves every CPU; a queue with nothing to do is given some
    /// of another's entries.
    Wide,
    /// As `Wide`, with few entries in use.
    Large,
    /// One queue serves all, away from the CPU of its client.
    Solo { queue: usize, client: usize },
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
    /// What suits the traffic of a while. `self` is what there is.
    pub(crate) fn next(self, traffic: &Traffic, queues: usize) -> Self {
        let requests = &traffic.requests;
        let all: u64 = requests.iter().sum();
        if all == 0 {
            return self;
        }
        if traffic.bytes / all >= LARGE {
            return Placement::Large;
        }
        if is_most(traffic.lone, all) {
            return Placement::Near;
        }
        let client = (0..requests.len()).max_by_key(|cpu| requests[*cpu]);
        let client = client.unwrap_or(0);
        if is_most(requests[client], all) {
            return Placement::Solo {
                queue: self.soloist(client, requests.len(), queues),
                client,
            };
        }
        Placement::Near
    }

    /// Whoever serves alone goes on with that; else one that has not been
    /// serving the client's CPU, so that the threads need not change places.
    fn soloist(self, client: usize, cpus: usize, queues: usize) -> usize {
        match self {
            Placement::Solo { queue, .. } => queue,
            _ => (near(client, cpus, queues) + 1) % queues,
        }
    }

    /// Where `queue`'s thread is to run.
    pub(crate) fn seat(self, queue: usize) -> Seat {
        match self {
            Placement::Solo {
                queue: soloist,
                client,
            } if soloist == queue => Seat::Beside(client),
            Placement::Near => Seat::Among,
            Placement::Solo { .. } | Placement::Wide | Placement::Large => Seat::Anywhere,
        }
    }

    /// Whether `queue` may wait for requests without sleeping.
    pub(crate) fn may_poll(self, queue: usize) -> bool {
        match self {
            Placement::Solo { queue: soloist, .. } => soloist == queue,
            Placement::Near | Placement::Wide | Placement::Large => true,
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

    #[test]
    fn one_client_is_served_by_one_queue_from_another_cpu() {
        let placed = Placement::Wide.next(&traffic(&[100, 3], 4096), 2);
        assert_eq!(
            placed,
            Placement::Solo {
                queue: 1,
                client: 0
            }
        );
        assert_eq!(placed.seat(1), Seat::Beside(0));
        assert_eq!(placed.seat(0), Seat::Anywhere);
        assert!(placed.may_poll(1) && !placed.may_poll(0));
        // It may move, and keeps its queue.
        let moved = placed.next(&traffic(&[3, 100], 4096), 2);
        assert_eq!(
            moved,
            Placement::Solo {
                queue: 1,
                client: 1
            }
        );
    }

    #[test]
    fn clients_on_several_cpus_are_served_there() {
        let placed = Placement::Wide.next(&traffic(&[60, 40], 4096), 2);
        assert_eq!(placed, Placement::Near);
        assert_eq!(placed.seat(1), Seat::Among);
        assert!((0..2).all(|queue| placed.may_poll(queue)));
        let served: Vec<_> = (0..8).map(|cpu| near(cpu, 8, 3)).collect();
        assert_eq!(served, [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(near(1, 2, 4), 2);
    }

    #[test]
    fn one_request_at_a_time_is_served_where_its_client_is() {
        let mut lonely = traffic(&[100, 0], 4096);
        lonely.lone = 100;
        let placed = Placement::Wide.next(&lonely, 2);
        assert_eq!(placed, Placement::Near);
    }

    #[test]
    fn large_requests_are_for_everybody() {
        let placed = Placement::Near.next(&traffic(&[100, 0], 1 << 20), 2);
        assert_eq!(placed, Placement::Large);
        assert_eq!(placed.seat(0), Seat::Anywhere);
    }

    #[test]
    fn without_requests_nothing_changes() {
        let solo = Placement::Solo {
            queue: 1,
            client: 0,
        };
        assert_eq!(solo.next(&Traffic::none(2), 2), solo);
        // A single queue is always right.
        let placed = Placement::Wide.next(&traffic(&[0, 9], 4096), 1);
        assert_eq!(
            placed,
            Placement::Solo {
                queue: 0,
                client: 1
            }
        );
    }
}

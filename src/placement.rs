//! Which queue serves whose requests: a pure function of the traffic.
//!
//! The kernel keeps one ring queue for each CPU, and a request goes to that of
//! the CPU where its client runs. Whichever of our queues answers through its
//! ring gets the entry's next request, so who serves whom can be changed with
//! every answer (exchange.rs). No single arrangement is good for everybody:
//!
//! * **One client.** Two threads would take its requests in turns, one of them
//!   on the client's own CPU. So one queue serves it alone, from any other
//!   CPU, and may poll there. That the thread must not run beside the client is
//!   enforced; left alone, the scheduler moves either of them about, at 10 us
//!   a move.
//! * **Several clients.** Every CPU is taken. A queue serves the CPUs that it
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
    /// One queue serves all, away from the CPU of its client.
    Solo { queue: usize, client: usize },
    /// Each queue serves some CPUs, and runs there.
    Near,
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
    /// What suits the traffic of a while: how many requests came from each CPU,
    /// and how many bytes they moved. `self` is what there is.
    pub(crate) fn next(self, requests: &[u64], bytes: u64, queues: usize) -> Self {
        let all: u64 = requests.iter().sum();
        if all == 0 {
            return self;
        }
        if bytes / all >= LARGE {
            return Placement::Wide;
        }
        let client = (0..requests.len()).max_by_key(|cpu| requests[*cpu]);
        let client = client.unwrap_or(0);
        // A client that moves from one CPU to another counts for both.
        if requests[client] * 8 >= all * 7 {
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
            Placement::Solo { .. } | Placement::Wide => Seat::Anywhere,
        }
    }

    /// Whether `queue` may wait for requests without sleeping: only where no
    /// client needs the CPU.
    pub(crate) fn may_poll(self, queue: usize) -> bool {
        matches!(self, Placement::Solo { queue: soloist, .. } if soloist == queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: u64 = 4096;

    #[test]
    fn one_client_is_served_by_one_queue_from_another_cpu() {
        let placed = Placement::Wide.next(&[100, 3], 103 * SMALL, 2);
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
        let moved = placed.next(&[3, 100], 103 * SMALL, 2);
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
        let placed = Placement::Wide.next(&[60, 40], 100 * SMALL, 2);
        assert_eq!(placed, Placement::Near);
        assert!((0..2).all(|queue| !placed.may_poll(queue)));
        let served: Vec<_> = (0..8).map(|cpu| near(cpu, 8, 3)).collect();
        assert_eq!(served, [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(near(1, 2, 4), 2);
    }

    #[test]
    fn large_requests_are_for_everybody() {
        let placed = Placement::Near.next(&[100, 0], 100 << 20, 2);
        assert_eq!(placed, Placement::Wide);
        assert_eq!(placed.seat(0), Seat::Anywhere);
    }

    #[test]
    fn without_requests_nothing_changes() {
        let solo = Placement::Solo {
            queue: 1,
            client: 0,
        };
        assert_eq!(solo.next(&[0, 0], 0, 2), solo);
        // A single queue is always right.
        let placed = Placement::Near.next(&[0, 9], 9 * SMALL, 1);
        assert_eq!(
            placed,
            Placement::Solo {
                queue: 0,
                client: 1
            }
        );
    }
}

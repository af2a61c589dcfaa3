//! How entries get from one queue to another: after a look at the traffic,
//! answered entries are handed to the queue that should have them, which gives
//! them to the kernel through its own ring.
//!
//! **Doors.** An answer that lies with another queue must not wait there for a
//! driver that blocks. So a queue takes entries only while it has nothing to
//! do: its door is open from the moment it goes to rest until its next
//! dispatch, which begins with what was left there. Who finds a door closed
//! keeps the entry, until the next answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crossbeam_utils::CachePadded;
use parking_lot::Mutex;

use crate::placement::{Placement, Traffic, near};
use crate::slot::Slot;
use crate::wakeups::Wakeups;

/// How many answers of one queue lie between its looks at the traffic.
const REVIEW_EVERY: u32 = 256;
/// How many looks in a row must favour another arrangement. A client that the
/// scheduler moves looks like two clients for a while.
const CONVINCING: u32 = 3;

/// What the queues of an export hand each other, and by which arrangement.
pub(crate) struct Exchange {
    cpus: usize,
    places: Box<[CachePadded<Place>]>,
    review: Mutex<Review>,
    /// How often the arrangement has changed.
    changes: CachePadded<AtomicU64>,
}

/// One queue, as the others see it.
struct Place {
    wakeups: Arc<Wakeups>,
    /// Whether its door is open; a hint.
    rests: AtomicBool,
    door: Mutex<Door>,
    /// How many requests of each CPU it has answered.
    requests: Box<[AtomicU64]>,
    /// How many of these while it had no other.
    lone: AtomicU64,
    /// How many bytes they have moved.
    bytes: AtomicU64,
}

/// Slots as they travel.
type Slots = Vec<Box<Slot>>;

#[derive(Default)]
struct Door {
    is_open: bool,
    left: Slots,
}

/// What is known of the traffic.
struct Review {
    placement: Placement,
    /// As of the last look.
    traffic: Traffic,
    /// What the last looks have favoured, and how many.
    favoured: Placement,
    looks: u32,
}

impl Exchange {
    /// Between queues that are woken by `wakeups`, for requests from `cpus`
    /// CPUs.
    pub(crate) fn new(cpus: usize, wakeups: &[Arc<Wakeups>]) -> Self {
        let place = |wakeups: &Arc<Wakeups>| {
            CachePadded::new(Place {
                wakeups: wakeups.clone(),
                rests: AtomicBool::new(false),
                door: Mutex::default(),
                requests: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
                lone: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
            })
        };
        Self {
            cpus,
            places: wakeups.iter().map(place).collect(),
            review: Mutex::new(Review {
                placement: Placement::Wide,
                traffic: Traffic::none(cpus),
                favoured: Placement::Wide,
                looks: 0,
            }),
            changes: CachePadded::default(),
        }
    }

    /// Makes every queue look at what it has.
    pub(crate) fn kick(&self) {
        self.places.iter().for_each(|place| place.wakeups.kick());
    }

    pub(crate) fn queues(&self) -> usize {
        self.places.len()
    }

    /// How often the arrangement has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Relaxed)
    }

    /// The arrangement.
    pub(crate) fn placement(&self) -> Placement {
        self.review.lock().placement
    }

    /// `queue` goes to rest: others may leave it entries.
    pub(crate) fn open_door(&self, queue: usize) {
        let place = &self.places[queue];
        if self.queues() > 1 && !place.rests.load(Relaxed) {
            place.door.lock().is_open = true;
            place.rests.store(true, Relaxed);
        }
    }

    /// `queue` has something to do: takes what it was left. Only its own thread
    /// opens and closes its door.
    pub(crate) fn close_door(&self, queue: usize) -> Slots {
        let place = &self.places[queue];
        if !place.rests.load(Relaxed) {
            return Slots::new();
        }
        place.rests.store(false, Relaxed);
        let mut door = place.door.lock();
        door.is_open = false;
        std::mem::take(&mut door.left)
    }

    /// Hands the slot to another queue, if `placement` wants that and the other
    /// one rests; else gives it back. `in_hand`: how many `queue` has.
    pub(crate) fn hand_over(
        &self,
        slot: Box<Slot>,
        queue: usize,
        in_hand: usize,
        placement: Placement,
    ) -> Option<Box<Slot>> {
        let Some(to) = self.destination(&slot, queue, in_hand, placement) else {
            return Some(slot);
        };
        let place = &self.places[to];
        {
            let mut door = place.door.lock();
            if !door.is_open {
                return Some(slot);
            }
            door.left.push(slot);
        }
        place.wakeups.kick();
        None
    }

    fn destination(
        &self,
        slot: &Slot,
        queue: usize,
        in_hand: usize,
        placement: Placement,
    ) -> Option<usize> {
        let rests = |queue: &usize| self.places[*queue].rests.load(Relaxed);
        match placement {
            // Of two requests that would be served one after the other.
            Placement::Wide | Placement::Large if in_hand > 1 => (0..self.queues()).find(rests),
            Placement::Wide | Placement::Large => None,
            Placement::Solo { queue: soloist, .. } => Some(soloist),
            Placement::Near => {
                let cpu = slot.ring.map_or(0, |ring| ring.kernel_queue.into());
                Some(near(cpu, self.cpus, self.queues()))
            }
        }
        .filter(|to| *to != queue)
        .filter(rests)
    }

    /// `queue`, which has `in_hand` requests, answers one of `cpu` that has
    /// moved `bytes`. Its own thread's call, so nobody else changes these.
    pub(crate) fn count(&self, queue: usize, in_hand: usize, cpu: usize, bytes: usize) {
        let add = |counter: &AtomicU64, n| counter.store(counter.load(Relaxed) + n, Relaxed);
        let place = &self.places[queue];
        add(&place.requests[cpu], 1);
        add(&place.lone, (in_hand == 1).into());
        add(&place.bytes, bytes as u64);
    }

    /// All that has come so far.
    fn traffic(&self) -> Traffic {
        let mut all = Traffic::none(self.cpus);
        for place in &self.places {
            for (sum, counter) in all.requests.iter_mut().zip(&place.requests) {
                *sum += counter.load(Relaxed);
            }
            all.lone += place.lone.load(Relaxed);
            all.bytes += place.bytes.load(Relaxed);
        }
        all
    }

    /// Looks at the traffic since the last look, unless somebody does. The
    /// arrangement, if that has changed it.
    pub(crate) fn review(&self) -> Option<Placement> {
        let mut review = self.review.try_lock()?;
        let traffic = self.traffic();
        let since = traffic.since(&review.traffic);
        review.traffic = traffic;
        let favoured = review.placement.next(&since, self.queues());
        if review.convinced_of(favoured) {
            log::debug!("io_uring: now {favoured:?}, for {since:?}");
            review.placement = favoured;
            self.changes.fetch_add(1, Relaxed);
            return Some(favoured);
        }
        None
    }
}

impl Review {
    /// Whether to change to what is favoured this time.
    fn convinced_of(&mut self, favoured: Placement) -> bool {
        if favoured != self.favoured {
            self.favoured = favoured;
            self.looks = 0;
        }
        self.looks += 1;
        self.looks >= CONVINCING && favoured != self.placement
    }
}

/// Says when a queue is to look at the traffic.
#[derive(Debug, Default)]
pub(crate) struct ReviewClock(u32);

impl ReviewClock {
    /// One more answer; whether it is time.
    pub(crate) fn tick(&mut self) -> bool {
        self.0 += 1;
        self.0.is_multiple_of(REVIEW_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::RingOrigin;

    fn exchange(queues: usize) -> Exchange {
        let wakeups: Vec<_> = (0..queues)
            .map(|_| Arc::new(Wakeups::new(1).unwrap()))
            .collect();
        Exchange::new(2, &wakeups)
    }

    fn slot(cpu: u16) -> Box<Slot> {
        let mut slot = Box::new(Slot::new(4096).unwrap());
        slot.ring = Some(RingOrigin {
            kernel_queue: cpu,
            commit_id: 1,
        });
        slot
    }

    #[test]
    fn only_a_queue_at_rest_is_handed_entries() {
        let exchange = exchange(2);
        assert!(exchange.hand_over(slot(1), 0, 1, Placement::Near).is_some());
        exchange.open_door(1);
        assert!(exchange.hand_over(slot(1), 0, 1, Placement::Near).is_none());
        assert!(exchange.places[1].wakeups.is_needed(), "it is woken");
        assert!(exchange.hand_over(slot(0), 0, 1, Placement::Near).is_some());
        assert_eq!(exchange.close_door(1).len(), 1);
        assert!(exchange.close_door(1).is_empty());
        assert!(exchange.hand_over(slot(1), 0, 1, Placement::Near).is_some());
    }

    #[test]
    fn a_queue_with_several_requests_shares_them_with_one_that_rests() {
        let exchange = exchange(3);
        exchange.open_door(2);
        assert!(exchange.hand_over(slot(0), 0, 1, Placement::Wide).is_some());
        assert!(exchange.hand_over(slot(0), 0, 2, Placement::Wide).is_none());
        assert_eq!(exchange.close_door(2).len(), 1);
    }

    #[test]
    fn an_arrangement_must_look_better_several_times() {
        let exchange = exchange(2);
        for look in 1..=CONVINCING {
            assert_eq!(exchange.changes(), 0, "before look {look}");
            exchange.count(0, 2, 0, 4096);
            exchange.count(1, 2, 1, 4096);
            exchange.review();
        }
        assert_eq!(exchange.placement(), Placement::Near);
        assert_eq!(exchange.changes(), 1);
        // One client for a moment changes nothing.
        exchange.count(0, 2, 0, 4096);
        exchange.review();
        assert_eq!(exchange.placement(), Placement::Near);
    }
}

//! When a queue waits for its next request awake.
//!
//! To be woken takes longer than to serve a request: at depth 1 a client gets
//! four times as many answers from a server that has not gone to sleep. But
//! waiting awake costs a CPU. So a queue does it only while requests come close
//! upon each other and looking for them has lately been of use, and never for
//! more than [`LONGEST`] or [`LONGEST_LATE`]. After one pause it sleeps at once,
//! so an idle export uses no CPU.
//!
//! Between two looks it offers its CPU to whoever else could run there, be it
//! another process or the very client that it waits for. So it uses only what
//! would be left over; but it keeps the CPU from idling, and that is most of
//! what there is to gain: to leave idle takes a virtual CPU tens of
//! microseconds. Where others do need the CPU all the time, though, who offers
//! it gets it back milliseconds later, while a thread that is woken gets it at
//! once. So that, too, is learnt, and tried again ever more seldom.

use std::thread;
use std::time::{Duration, Instant};

/// The longest wait awake: beyond it the CPU is worth more than the time.
const LONGEST: Duration = Duration::from_micros(100);
/// The longest for one request that is late among others that come quickly.
/// Those of a client at depth 1 come some 10 us apart, but if the reply has to
/// wake it on an idle virtual CPU, and the host is busy, 100 us may go by; and
/// if the queue sleeps then, the client has the same wait for its next one. On
/// such machines this is worth a factor of three.
const LONGEST_LATE: Duration = Duration::from_micros(200);
/// Waits that usually are no longer than this are quick.
const QUICK: Duration = Duration::from_micros(60);
/// Waits that are no longer than this may get short enough by staying awake:
/// to fall asleep and be woken takes as long itself, on either side.
const CLOSE: Duration = Duration::from_micros(200);
/// What any longer wait counts as: one ends looking, and is soon forgotten.
const PAUSE: Duration = Duration::from_millis(2);
/// Between two looks: who was let run on this CPU keeps it, and there is more
/// waiting for it than is won.
const LOST: Duration = Duration::from_micros(500);
/// If so long lies between two looks, and there is nothing, somebody else has
/// had the CPU than whom we wait for.
const DISTURBED: Duration = Duration::from_micros(30);
/// Of how many waits the usual one is the average.
const MEMORY: u32 = 8;
/// What a look in vain costs, beside what one of use is worth: it takes longer.
const PRICE: u32 = 2;
/// How much looks may have cost more than they were worth, before they end.
const PATIENCE: u32 = 32;
/// After how many waits asleep looking is tried again, if it has cost too much.
const RETRY: u32 = 128;
/// And if the CPU was lost: at least, and at most.
const LOST_RETRY: u32 = 64;
const LAST_RETRY: u32 = 1 << 14;
/// After how many looks that got the CPU back, and in time, it is forgotten that
/// it was lost: a virtual one goes now and then to another machine, and on a
/// busy host a hundred times a second.
const FORGETTING: u32 = 32;

/// What one queue has learnt of its waits.
#[derive(Debug)]
pub(crate) struct Polling {
    usual: Duration,
    /// What looks have cost more than they were worth.
    cost: u32,
    /// How many looks have got the CPU back, and in time, since it was lost.
    back: u32,
    /// How many waits asleep there are to be yet.
    asleep: u32,
    /// How many there will be when the CPU is lost next.
    pause: u32,
}

/// What came of a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Found {
        /// Somebody else could have had the CPU meanwhile.
        offered: bool,
    },
    InVain,
    /// Whether there is something or not: the CPU was somebody else's.
    Lost {
        found: bool,
    },
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            usual: PAUSE,
            cost: 0,
            back: 0,
            asleep: 0,
            pause: LOST_RETRY,
        }
    }
}

impl Polling {
    /// Whether to wait awake at all.
    pub(crate) fn is_worth_it(&self) -> bool {
        self.usual <= CLOSE && self.asleep == 0
    }

    /// A wait has ended.
    pub(crate) fn waited(&mut self, time: Duration) {
        self.usual = (self.usual * (MEMORY - 1) + time.min(PAUSE)) / MEMORY;
        self.asleep = self.asleep.saturating_sub(1);
    }

    /// Looks until there is something, for as long as is sensible from `since`
    /// on. Returns whether there is.
    pub(crate) fn look(&mut self, since: Instant, is_there: impl FnMut() -> bool) -> bool {
        let longest = if self.usual <= QUICK {
            LONGEST_LATE
        } else {
            LONGEST
        };
        let look = watch(since, longest, is_there);
        self.learn(look);
        matches!(look, Look::Found { .. } | Look::Lost { found: true })
    }

    fn learn(&mut self, look: Look) {
        match look {
            Look::Found { offered } => {
                self.cost = self.cost.saturating_sub(1);
                self.back += u32::from(offered);
                if self.back == FORGETTING {
                    self.back = 0;
                    self.pause = LOST_RETRY;
                }
            }
            Look::InVain => {
                self.cost += PRICE;
                if self.cost >= PATIENCE {
                    self.cost = 0;
                    self.asleep = RETRY;
                }
            }
            Look::Lost { .. } => {
                self.back = 0;
                self.asleep = self.pause;
                self.pause = (self.pause * 4).min(LAST_RETRY);
            }
        }
    }
}

fn watch(since: Instant, longest: Duration, mut is_there: impl FnMut() -> bool) -> Look {
    let mut last = since;
    let mut offered = false;
    loop {
        let found = is_there();
        let now = Instant::now();
        if now - last > LOST {
            return Look::Lost { found };
        }
        if found {
            return Look::Found { offered };
        }
        if now - last > DISTURBED || now - since > longest {
            return Look::InVain;
        }
        last = now;
        offered = true;
        thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: Duration = Duration::from_micros(10);

    fn used_to(wait: Duration) -> Polling {
        let mut polling = Polling::default();
        for _ in 0..100 {
            polling.waited(wait);
        }
        polling
    }

    #[test]
    fn close_requests_are_awaited_and_one_pause_ends_that() {
        assert!(!Polling::default().is_worth_it(), "nothing is known");
        let mut polling = used_to(NEAR);
        assert!(polling.is_worth_it());
        polling.waited(Duration::from_secs(3600));
        assert!(!polling.is_worth_it());
        // However long it was, it is soon forgotten.
        for _ in 0..2 * MEMORY {
            polling.waited(NEAR);
        }
        assert!(polling.is_worth_it());
    }

    #[test]
    fn looks_in_vain_end_for_a_while() {
        let mut polling = used_to(NEAR);
        for _ in 0..3 {
            for look in 0..PATIENCE / PRICE {
                assert!(polling.is_worth_it(), "look {look}");
                polling.learn(Look::InVain);
            }
            for _ in 0..RETRY {
                assert!(!polling.is_worth_it());
                polling.waited(NEAR);
            }
            assert!(polling.is_worth_it());
        }
    }

    #[test]
    fn looks_that_are_mostly_of_use_do_not_end() {
        let mut polling = used_to(NEAR);
        for _ in 0..100 * PATIENCE {
            for _ in 0..PRICE {
                polling.learn(Look::Found { offered: true });
            }
            polling.learn(Look::InVain);
            assert!(polling.is_worth_it());
        }
    }

    #[test]
    fn a_lost_cpu_is_offered_ever_more_seldom() {
        let mut polling = used_to(NEAR);
        let mut asleep = 0;
        for _ in 0..6 {
            polling.learn(Look::Lost { found: true });
            assert!(!polling.is_worth_it());
            assert!(polling.asleep >= asleep);
            asleep = polling.asleep;
            for _ in 0..asleep {
                polling.waited(NEAR);
            }
            assert!(polling.is_worth_it());
        }
        assert_eq!(asleep, LAST_RETRY);
        // What is there at once does not tell whose the CPU would be.
        for _ in 0..2 * FORGETTING {
            polling.learn(Look::Found { offered: false });
        }
        polling.learn(Look::Lost { found: false });
        assert_eq!(polling.asleep, LAST_RETRY);
        // Not so if it happens now and then, whatever comes in between.
        for _ in 0..FORGETTING {
            polling.learn(Look::Found { offered: true });
            polling.learn(Look::InVain);
        }
        polling.learn(Look::Lost { found: false });
        assert_eq!(polling.asleep, LOST_RETRY);
    }

    #[test]
    fn what_was_found_late_is_found() {
        let late = Instant::now() - 2 * LOST;
        assert_eq!(watch(late, LONGEST, || true), Look::Lost { found: true });
        assert!(used_to(NEAR).look(late, || true));
        assert!(!used_to(NEAR).look(late, || false));
    }

    #[test]
    fn looking_ends_with_what_is_looked_for_or_in_time() {
        assert!(used_to(NEAR).look(Instant::now(), || true));
        assert!(!used_to(NEAR).look(Instant::now(), || false));
    }
}

//! When a queue waits for its next request awake.
//!
//! To be woken takes longer than to serve a request: at depth 1 a client gets
//! four times as many answers from a server that has not gone to sleep. But
//! waiting awake costs a CPU. So a queue does it only while requests come close
//! upon each other and looking for them has lately been of use, and never for
//! more than [`LONGEST`]. After one pause it sleeps at once, so an idle export
//! uses no CPU.
//!
//! Between two looks it offers its CPU to whoever else could run there, be it
//! another process or the very client that it waits for. So it uses only what
//! would be left over; but it keeps the CPU from idling, and that is most of
//! what there is to gain: to leave idle takes a virtual CPU tens of
//! microseconds.

use std::thread;
use std::time::{Duration, Instant};

/// The longest wait awake. Requests at depth 1 come some 10 us apart; beyond
/// this the CPU is worth more than the time.
const LONGEST: Duration = Duration::from_micros(50);
/// Waits that are no longer than this may get short enough by staying awake:
/// to fall asleep and be woken takes some 50 us itself, on either side.
const CLOSE: Duration = Duration::from_micros(120);
/// What any longer wait counts as, so that a pause is soon forgotten.
const PAUSE: Duration = Duration::from_millis(1);
/// If so long lies between two looks, somebody else has had the CPU, and it
/// was not whom we wait for.
const DISTURBED: Duration = Duration::from_micros(30);
/// Of how many waits the usual one is the average.
const MEMORY: u32 = 8;
/// How many looks in vain there may be before they end.
const PATIENCE: u32 = 4;
/// After how many waits asleep looking is tried again.
const RETRY: u32 = 64;

/// What one queue has learnt of its waits.
#[derive(Debug)]
pub(crate) struct Polling {
    usual: Duration,
    /// How many looks in a row were in vain.
    in_vain: u32,
    /// How many waits asleep there are to be yet.
    asleep: u32,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            usual: PAUSE,
            in_vain: 0,
            asleep: 0,
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
        let found = watch(since, is_there);
        if found {
            self.in_vain = 0;
            return true;
        }
        self.in_vain += 1;
        if self.in_vain >= PATIENCE {
            self.in_vain = 0;
            self.asleep = RETRY;
        }
        false
    }
}

fn watch(since: Instant, mut is_there: impl FnMut() -> bool) -> bool {
    let mut last = since;
    loop {
        if is_there() {
            return true;
        }
        let now = Instant::now();
        if now - last > DISTURBED || now - since > LONGEST {
            return false;
        }
        last = now;
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
        for look in 0..PATIENCE {
            assert!(polling.is_worth_it(), "look {look}");
            assert!(!polling.look(Instant::now(), || false));
        }
        for _ in 0..RETRY {
            assert!(!polling.is_worth_it());
            polling.waited(NEAR);
        }
        assert!(polling.is_worth_it());
    }

    #[test]
    fn looking_ends_with_what_is_looked_for() {
        let mut looks = 0;
        assert!(used_to(NEAR).look(Instant::now(), || {
            looks += 1;
            looks == 3
        }));
    }
}

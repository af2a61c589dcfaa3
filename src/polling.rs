//! When a queue waits for its next request awake.
//!
//! To be woken takes longer than to serve a request: at depth 1 a client gets
//! four times as many answers from a server that has not gone to sleep. But
//! waiting awake costs a CPU. So a queue does it only for as long as requests
//! have lately taken to come, and never for more than [`LONGEST`]: after one
//! pause it sleeps at once, so an idle export uses no CPU, until requests have
//! come close upon each other again.

use std::time::{Duration, Instant};

/// The longest wait awake. Requests at depth 1 come some 10 us apart; beyond
/// this the CPU is worth more than the time.
const LONGEST: Duration = Duration::from_micros(50);
/// What any longer wait counts as, so that a pause is soon forgotten.
const PAUSE: Duration = Duration::from_micros(400);
/// A look that takes so long has shared its CPU with somebody.
const DISTURBED: Duration = Duration::from_micros(30);
/// Of how many waits the usual one is the average.
const MEMORY: u32 = 8;

/// What one queue has learnt of its waits.
#[derive(Debug)]
pub(crate) struct Polling {
    usual: Duration,
}

impl Default for Polling {
    fn default() -> Self {
        Self { usual: PAUSE }
    }
}

impl Polling {
    /// How long to wait awake; `None`: sleep at once.
    pub(crate) fn budget(&self) -> Option<Duration> {
        (self.usual <= LONGEST).then_some(LONGEST)
    }

    /// A wait has ended.
    pub(crate) fn waited(&mut self, time: Duration) {
        self.usual = (self.usual * (MEMORY - 1) + time.min(PAUSE)) / MEMORY;
    }

    /// Somebody else needs the CPU.
    fn disturbed(&mut self) {
        self.usual = PAUSE;
    }

    /// Looks until there is something, for as long as is sensible from `since`
    /// on. Returns whether there is.
    pub(crate) fn look(&mut self, since: Instant, mut is_there: impl FnMut() -> bool) -> bool {
        let Some(budget) = self.budget() else {
            return false;
        };
        let mut last = since;
        loop {
            if is_there() {
                return true;
            }
            std::hint::spin_loop();
            let now = Instant::now();
            if now - last > DISTURBED {
                self.disturbed();
                return false;
            }
            last = now;
            if now - since > budget {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_requests_are_awaited_and_one_pause_ends_that() {
        let mut polling = Polling::default();
        assert_eq!(polling.budget(), None, "before anything is known");
        for _ in 0..4 * MEMORY {
            polling.waited(Duration::from_micros(10));
        }
        assert_eq!(polling.budget(), Some(LONGEST));
        polling.waited(Duration::from_secs(3600));
        assert_eq!(polling.budget(), None);
        assert!(!polling.look(Instant::now(), || panic!("it is to sleep")));
        // A pause is forgotten as soon, however long it was.
        for _ in 0..2 * MEMORY {
            polling.waited(Duration::from_micros(10));
        }
        assert_eq!(polling.budget(), Some(LONGEST));
    }

    #[test]
    fn looking_ends_with_what_is_looked_for() {
        let mut polling = Polling {
            usual: Duration::from_micros(1),
        };
        let mut looks = 0;
        assert!(polling.look(Instant::now(), || {
            looks += 1;
            looks == 3
        }));
    }
}

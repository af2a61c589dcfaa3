//! Whether a thread that waits awake takes its CPU from somebody else.
//!
//! The kernel tells: a thread that would go on and is taken off its CPU has been
//! in the way, of another process or of its own client. Where nobody else
//! wants the CPU that hardly happens; where somebody does it happens some
//! hundred times a second at least, once in each of the scheduler's slices.
//! Being in the way ends the waiting awake, for longer each time.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// How long a thread is watched before that says anything.
const WATCH: Duration = Duration::from_millis(10);
/// How often a calm thread may be taken off its CPU: once in so long.
const SELDOM: Duration = Duration::from_millis(5);
/// How long the disturbance counts, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What has been learnt about waiting awake.
#[derive(Debug)]
pub(crate) struct Calm {
    /// Since when it is watched, and how often it had been in the way then.
    watch: Option<(Instant, u64)>,
    /// Not before this is it tried again.
    until: Option<Instant>,
    pause: Duration,
}

impl Default for Calm {
    fn default() -> Self {
        Self {
            watch: None,
            until: None,
            pause: FIRST_PAUSE,
        }
    }
}

/// How often the calling thread was taken off its CPU against its will.
pub(crate) fn evictions() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD);
    usage.map_or(0, |usage| {
        usage.involuntary_context_switches().unsigned_abs()
    })
}

impl Calm {
    /// Whether one may wait awake.
    pub(crate) fn is_calm(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// Somebody waits awake, who had to go `evictions` times so far.
    pub(crate) fn watch(&mut self, now: Instant, evictions: impl FnOnce() -> u64) {
        let Some((since, before)) = self.watch else {
            self.watch = Some((now, evictions()));
            return;
        };
        let watched = now - since;
        if watched < WATCH {
            return;
        }
        let evictions = evictions();
        self.watch = Some((now, evictions));
        let evicted = u32::try_from(evictions - before).unwrap_or(u32::MAX);
        if SELDOM.saturating_mul(evicted) > watched {
            self.until = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.watch = None;
        } else if self.until.is_some_and(|until| now >= until + self.pause) {
            // It has gone well for as long as it was not tried.
            self.until = None;
            self.pause = FIRST_PAUSE;
        }
    }

    /// Nobody waits awake now.
    pub(crate) fn look_away(&mut self) {
        self.watch = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Watches for a second; `every`: how long lies between two evictions.
    fn a_second(calm: &mut Calm, from: Instant, every: Duration) -> usize {
        let mut calm_for = 0;
        for ms in 0..1000 {
            let now = from + Duration::from_millis(ms);
            let evictions = (now - from).as_nanos() / every.as_nanos();
            if calm.is_calm(now) {
                calm_for += 1;
                calm.watch(now, || evictions as u64);
            } else {
                calm.look_away();
            }
        }
        calm_for
    }

    #[test]
    fn who_is_seldom_in_the_way_may_go_on() {
        let mut calm = Calm::default();
        let now = Instant::now();
        assert_eq!(a_second(&mut calm, now, Duration::from_millis(20)), 1000);
    }

    #[test]
    fn who_is_often_in_the_way_tries_less_and_less_until_that_is_over() {
        let mut calm = Calm::default();
        let mut now = Instant::now();
        let mut tried = usize::MAX;
        for _ in 0..3 {
            let again = a_second(&mut calm, now, Duration::from_millis(2));
            assert!(again < 200 && again <= tried, "{again} ms");
            tried = again;
            now += Duration::from_secs(1);
        }
        for _ in 0..8 {
            a_second(&mut calm, now, Duration::from_secs(10));
            now += Duration::from_secs(1);
        }
        assert!(calm.is_calm(now));
        assert_eq!(calm.pause, FIRST_PAUSE, "it is forgotten");
    }
}

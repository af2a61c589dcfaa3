//! How much memory io_uring's ring entries get: a pure function.
//!
//! The kernel has one ring queue for every *possible* CPU, and each entry of
//! each of them needs a buffer of its own for the largest request there can be:
//!
//! ```text
//! memory = possible CPUs x depth x (4096 + max-request)
//! ```
//!
//! where 4096 bytes hold the entry's headers. The best that fits the budget is
//! chosen. Unless they were asked for, requests have up to 1 MiB and the depth
//! is 64; to fit, first the depth is lowered to 4 (or to as many entries as
//! there are queues of ours for one of the kernel's, so that each gets one),
//! then the request size is halved down to 64 KiB, then the depth is lowered
//! down to 1. What was asked for is kept or refused, never changed.

use std::iter;

use crate::config::{LARGEST_REQUEST, SMALLEST_REQUEST};
use crate::error::{Error, Result};

/// What an entry needs besides its payload: a page with its headers.
const HEADERS: u64 = 4096;
/// More entries for each kernel queue than this have to be asked for.
const MOST_DEPTH: usize = 64;
/// With fewer entries for each kernel queue, requests wait for one another;
/// smaller requests are the lesser evil.
const GOOD_DEPTH: usize = 4;

/// What is there, and what is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    /// At least one; [`possible_cpus`](crate::system::System::possible_cpus).
    pub(crate) kernel_queues: usize,
    /// Our queues, which the entries are spread over.
    pub(crate) queues: usize,
    /// Entries for each kernel queue.
    pub(crate) depth: Option<usize>,
    /// Bytes.
    pub(crate) max_request: Option<u32>,
    /// Bytes.
    pub(crate) budget: u64,
}

/// The ring entries to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) kernel_queues: usize,
    /// Entries for each kernel queue.
    pub(crate) depth: usize,
    /// The payload of each, in bytes.
    pub(crate) max_request: u32,
}

impl Plan {
    /// The best plan that fits the budget. `EINVAL` if none does.
    pub(crate) fn new(wish: &Wish) -> Result<Self> {
        let plan = |(depth, max_request)| Self {
            kernel_queues: wish.kernel_queues,
            depth,
            max_request,
        };
        let share = wish.queues.div_ceil(wish.kernel_queues);
        let (least, good, most) = match wish.depth {
            Some(depth) => (depth, depth, depth),
            None => (1, share.clamp(GOOD_DEPTH, MOST_DEPTH), MOST_DEPTH),
        };
        let (smallest, largest) = match wish.max_request {
            Some(bytes) => (bytes, bytes),
            None => (SMALLEST_REQUEST, LARGEST_REQUEST),
        };
        let halved = iter::successors(Some(largest), |bytes| Some(bytes / 2))
            .take_while(|bytes| *bytes >= smallest);

        let shallower = (good..=most).rev().map(|depth| (depth, largest));
        let smaller = halved.map(|bytes| (good, bytes));
        let shallowest = (least..good).rev().map(|depth| (depth, smallest));
        shallower
            .chain(smaller)
            .chain(shallowest)
            .map(plan)
            .find(|plan| plan.memory() <= wish.budget)
            .ok_or_else(|| plan((least, smallest)).excess(wish))
    }

    /// How many bytes all entries take.
    pub(crate) fn memory(&self) -> u64 {
        (self.kernel_queues as u64)
            .saturating_mul(self.depth as u64)
            .saturating_mul(HEADERS + u64::from(self.max_request))
    }

    /// That even this, the least that `wish` allows, is beyond its budget.
    fn excess(&self, wish: &Wish) -> Error {
        let (what, remedy) = match (wish.depth, wish.max_request) {
            (None, None) => ("io_uring".to_owned(), ""),
            (Some(depth), None) => (
                format!("\"queue-depth\" {depth}"),
                "lower \"queue-depth\", or ",
            ),
            (None, Some(bytes)) => (
                format!("\"max-request\" {bytes}"),
                "lower \"max-request\", or ",
            ),
            (Some(depth), Some(bytes)) => (
                format!("\"queue-depth\" {depth} with \"max-request\" {bytes}"),
                "lower one of them, or ",
            ),
        };
        let text = format!(
            "{what} needs at least {} bytes of memory for the kernel's {} queues, but \
             \"memory-budget\" is {}; {remedy}raise \"memory-budget\"",
            self.memory(),
            self.kernel_queues,
            wish.budget,
        );
        Error::new(libc::EINVAL, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MEMORY_BUDGET;
    use proptest::prelude::*;

    const KIB: u32 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn wish(kernel_queues: usize) -> Wish {
        Wish {
            kernel_queues,
            queues: kernel_queues.min(8),
            depth: None,
            max_request: None,
            budget: MEMORY_BUDGET,
        }
    }

    fn planned(wish: Wish) -> (usize, u32) {
        let plan = Plan::new(&wish).unwrap();
        (plan.depth, plan.max_request / KIB)
    }

    fn refused(wish: Wish) -> String {
        let error = Plan::new(&wish).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        error.message().to_owned()
    }

    #[test]
    fn machines_of_every_size_get_what_the_default_budget_allows() {
        assert_eq!(planned(wish(1)), (64, 1024));
        assert_eq!(planned(wish(2)), (64, 1024));
        // 256 MiB / (16 x 1 MiB) were 16 without the headers.
        assert_eq!(planned(wish(16)), (15, 1024));
        // 4 x 256 entries of 128 KiB and a page.
        assert_eq!(planned(wish(256)), (4, 128));
        for cpus in [1, 2, 16, 256] {
            let plan = Plan::new(&wish(cpus)).unwrap();
            let entry = u64::from(plan.max_request) + 4096;
            assert_eq!(plan.memory(), (cpus * plan.depth) as u64 * entry);
            assert!(plan.memory() <= 256 * MIB);
        }
    }

    #[test]
    fn a_smaller_budget_costs_depth_then_size_then_depth() {
        let with = |budget| planned(Wish { budget, ..wish(2) });
        assert_eq!(with(200 * MIB), (64, 1024));
        assert_eq!(with(64 * MIB), (31, 1024));
        assert_eq!(with(9 * MIB), (4, 1024));
        assert_eq!(with(8 * MIB), (4, 512));
        assert_eq!(with(MIB), (4, 64));
        assert_eq!(with(MIB / 2), (3, 64));
        assert_eq!(with(136 << 10), (1, 64));
        assert_eq!(
            refused(Wish {
                budget: (136 << 10) - 1,
                ..wish(2)
            }),
            "io_uring needs at least 139264 bytes of memory for the kernel's 2 queues, but \
             \"memory-budget\" is 139263; raise \"memory-budget\""
        );
    }

    #[test]
    fn each_of_our_queues_has_an_entry_before_requests_are_large() {
        let queues = |queues| Wish {
            queues,
            budget: 9 * MIB,
            ..wish(2)
        };
        assert_eq!(planned(queues(8)), (4, 1024));
        assert_eq!(planned(queues(15)), (8, 512));
        assert_eq!(planned(queues(256)), (64, 64));
    }

    #[test]
    fn what_was_asked_for_is_kept() {
        let deep = Wish {
            depth: Some(1024),
            ..wish(1)
        };
        assert_eq!(planned(deep), (1024, 128));
        let large = Wish {
            max_request: Some(1024 * KIB),
            ..wish(256)
        };
        let odd = Wish {
            max_request: Some(100 * KIB),
            ..wish(16)
        };
        assert_eq!(planned(odd), (64, 100));
        let both = Wish {
            depth: Some(3),
            ..large
        };
        assert_eq!(
            refused(large),
            "\"max-request\" 1048576 needs at least 269484032 bytes of memory for the kernel's \
             256 queues, but \"memory-budget\" is 268435456; lower \"max-request\", or raise \
             \"memory-budget\""
        );
        assert_eq!(
            refused(both),
            "\"queue-depth\" 3 with \"max-request\" 1048576 needs at least 808452096 bytes of \
             memory for the kernel's 256 queues, but \"memory-budget\" is 268435456; lower one \
             of them, or raise \"memory-budget\""
        );
        assert_eq!(
            refused(Wish {
                depth: Some(64),
                ..wish(256)
            }),
            "\"queue-depth\" 64 needs at least 1140850688 bytes of memory for the kernel's 256 \
             queues, but \"memory-budget\" is 268435456; lower \"queue-depth\", or raise \
             \"memory-budget\""
        );
    }

    fn wishes() -> impl Strategy<Value = Wish> {
        let some_depth = prop::option::of(1usize..=1024);
        let some_size = prop::option::of((16u32..=256).prop_map(|pages| pages * 4096));
        // Budgets of every order of magnitude.
        let budget = (0u32..36, any::<u64>()).prop_map(|(bits, n)| n >> (63 - bits));
        (1usize..=1024, 1usize..=256, some_depth, some_size, budget).prop_map(
            |(kernel_queues, queues, depth, max_request, budget)| Wish {
                kernel_queues,
                queues,
                depth,
                max_request,
                budget,
            },
        )
    }

    /// Orders plans of one wish by how good they are.
    fn rank(plan: &Result<Plan>) -> (usize, u32) {
        plan.as_ref().map_or((0, 0), |p| (p.depth, p.max_request))
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 8 } else { 1024 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn a_plan_is_within_its_bounds(wish in wishes()) {
            if let Ok(plan) = Plan::new(&wish) {
                prop_assert!(plan.memory() <= wish.budget);
                prop_assert_eq!(wish.depth.unwrap_or(plan.depth), plan.depth);
                prop_assert_eq!(wish.max_request.unwrap_or(plan.max_request), plan.max_request);
                prop_assert!(plan.depth >= 1);
                prop_assert!(wish.depth.is_some() || plan.depth <= MOST_DEPTH);
                prop_assert!((SMALLEST_REQUEST..=LARGEST_REQUEST).contains(&plan.max_request));
                prop_assert_eq!(plan.max_request % 4096, 0);
            }
        }

        #[test]
        fn it_is_refused_only_if_nothing_fits(wish in wishes()) {
            let least = Plan {
                kernel_queues: wish.kernel_queues,
                depth: wish.depth.unwrap_or(1),
                max_request: wish.max_request.unwrap_or(SMALLEST_REQUEST),
            };
            prop_assert_eq!(Plan::new(&wish).is_err(), least.memory() > wish.budget);
        }

        #[test]
        fn more_memory_never_makes_anything_worse(wish in wishes(), more in 0u64..1 << 32) {
            let richer = Wish { budget: wish.budget + more, ..wish };
            let (before, after) = (rank(&Plan::new(&wish)), rank(&Plan::new(&richer)));
            prop_assert!(after.0 >= before.0 && after.1 >= before.1, "{before:?} {after:?}");
        }

        #[test]
        fn more_cpus_never_mean_more_depth(wish in wishes(), more in 0usize..64) {
            let larger = Wish { kernel_queues: wish.kernel_queues + more, ..wish };
            prop_assert!(rank(&Plan::new(&larger)).0 <= rank(&Plan::new(&wish)).0);
        }
    }
}

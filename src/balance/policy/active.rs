//! The policy that a balancer uses: one of them all, without a virtual call for each pick.

use std::sync::Arc;
use std::time::Instant;

use super::adaptive::AdaptivePolicy;
use super::consistent::ConsistentPolicy;
use super::headroom::HeadroomPolicy;
use super::least_busy::{DEFAULT_CANDIDATES, LeastBusy};
use super::random::RandomPolicy;
use super::round_robin::RoundRobinPolicy;
use super::routing::{Picked, Reference, RoutingPolicy};
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::registration::Registration;
use crate::balance::roster::Roster;
use crate::balance::settings::{Adaptive, Consistent, Headroom, Policy};
use crate::balance::table::Table;
use crate::balance::weight::{Share, Weight};

/// Which policy to use, and the constants of all of them.
#[derive(Debug, Clone)]
pub(in crate::balance) struct PolicySettings {
    pub(in crate::balance) policy: Policy,
    pub(in crate::balance) headroom: Headroom,
    pub(in crate::balance) adaptive: Adaptive,
    pub(in crate::balance) consistent: Consistent,
    pub(in crate::balance) candidates: usize,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            headroom: Headroom::default(),
            adaptive: Adaptive::default(),
            consistent: Consistent::default(),
            candidates: DEFAULT_CANDIDATES,
        }
    }
}

/// One of the policies.
#[derive(Debug)]
pub(in crate::balance) enum ActivePolicy {
    RoundRobin(RoundRobinPolicy),
    Random(RandomPolicy),
    Consistent(ConsistentPolicy),
    Headroom(HeadroomPolicy),
    Adaptive(AdaptivePolicy),
}

impl ActivePolicy {
    pub(in crate::balance) fn new(settings: &PolicySettings) -> Self {
        let least_busy =
            |own_request| LeastBusy::new(settings.candidates, own_request, &settings.adaptive);
        match settings.policy {
            Policy::RoundRobin => Self::RoundRobin(RoundRobinPolicy::new()),
            Policy::Random => Self::Random(RandomPolicy),
            Policy::Consistent => Self::Consistent(ConsistentPolicy::new(settings.consistent)),
            Policy::Headroom => {
                Self::Headroom(HeadroomPolicy::new(settings.headroom, least_busy(1.0)))
            }
            Policy::Adaptive => {
                let least_busy = least_busy(settings.adaptive.own_request as f32);
                Self::Adaptive(AdaptivePolicy::new(settings.adaptive, least_busy))
            }
        }
    }
}

impl ActivePolicy {
    /// Goes on with what the one before counts.
    pub(in crate::balance) fn continue_from(&mut self, former: &Self) {
        match (self, former) {
            (Self::Consistent(policy), Self::Consistent(former)) => policy.continue_from(former),
            (Self::RoundRobin(policy), Self::RoundRobin(former)) => policy.continue_from(former),
            _ => {}
        }
    }

    /// Whether it chooses among several by their requests in flight.
    #[cfg(feature = "pingora")]
    pub(in crate::balance) fn compares_requests(&self) -> bool {
        matches!(self, Self::Headroom(_) | Self::Adaptive(_))
    }
}

macro_rules! dispatch {
    ($this:expr, $policy:ident => $call:expr) => {
        match $this {
            ActivePolicy::RoundRobin($policy) => $call,
            ActivePolicy::Random($policy) => $call,
            ActivePolicy::Consistent($policy) => $call,
            ActivePolicy::Headroom($policy) => $call,
            ActivePolicy::Adaptive($policy) => $call,
        }
    };
}

impl RoutingPolicy for ActivePolicy {
    fn count(&self) -> Option<Arc<()>> {
        dispatch!(self, policy => policy.count())
    }

    fn is_static(&self) -> bool {
        dispatch!(self, policy => policy.is_static())
    }

    fn heeds_outcomes(&self) -> bool {
        dispatch!(self, policy => policy.heeds_outcomes())
    }

    fn goes_by_keys(&self) -> bool {
        dispatch!(self, policy => policy.goes_by_keys())
    }

    fn weighs_by_load(&self) -> bool {
        dispatch!(self, policy => policy.weighs_by_load())
    }

    fn follows_zones(&self) -> bool {
        dispatch!(self, policy => policy.follows_zones())
    }

    fn uses_subset(&self) -> bool {
        dispatch!(self, policy => policy.uses_subset())
    }

    fn reduces_failing_shares(&self) -> bool {
        dispatch!(self, policy => policy.reduces_failing_shares())
    }

    fn reference(&self, roster: &Roster, now: Instant) -> Reference {
        dispatch!(self, policy => policy.reference(roster, now))
    }

    fn weight(&self, registration: &Registration, reference: &Reference, now: Instant) -> Weight {
        dispatch!(self, policy => policy.weight(registration, reference, now))
    }

    fn index(&self, table: &mut Table, shares: &[Share]) {
        dispatch!(self, policy => policy.index(table, shares));
    }

    #[inline]
    fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked> {
        dispatch!(self, policy => policy.pick(table, fleet, options, random))
    }
}

//! What distinguishes one policy from another, as a trait.

use std::sync::Arc;
use std::time::Instant;

use crate::balance::fleet::Fleet;
use crate::balance::load::Load;
use crate::balance::pick::PickOptions;
use crate::balance::registration::Registration;
use crate::balance::roster::Roster;
use crate::balance::table::Table;
use crate::balance::weight::{Share, Weight};

/// The result of a pick.
pub(in crate::balance) struct Picked {
    /// The position of the backend in the table.
    pub(in crate::balance) index: usize,
    /// Counts the request among all requests in flight, where the policy needs their number.
    pub(in crate::balance) in_flight: Option<Arc<()>>,
    /// The request finds out whether the backend works again.
    pub(in crate::balance) is_probe: bool,
}

impl From<usize> for Picked {
    fn from(index: usize) -> Self {
        Self {
            index,
            in_flight: None,
            is_probe: false,
        }
    }
}

/// What a weight depends on beside its registration. It changes little with a single one of many.
#[derive(Debug, Clone, Copy)]
pub(in crate::balance) struct Reference {
    /// The mean of the loads that are reported.
    pub(super) load: Load,
    /// The mean factor on static weights.
    pub(super) factor: f64,
    /// The part of its share that a backend which starts slowly gets at least.
    pub(super) slow_start_limit: f64,
}

impl Default for Reference {
    fn default() -> Self {
        Self {
            load: Load::default(),
            factor: 1.0,
            slow_start_limit: 1.0,
        }
    }
}

/// A policy: how weights follow from what is known about a group, and how a pick follows from them.
/// The defaults are those of a policy that metrics and outcomes play no part in.
pub(in crate::balance) trait RoutingPolicy {
    /// Whether shares do not depend on metrics and outcomes, so that an unchanged group needs no new
    /// table.
    fn is_static(&self) -> bool {
        true
    }

    /// Whether backends in other zones count with a part of their weight only.
    fn follows_zones(&self) -> bool {
        true
    }

    /// Whether outcomes play a part, so that backends that fail are ejected.
    fn heeds_outcomes(&self) -> bool {
        false
    }

    /// Whether what a backend gets depends on keys, so that one key whose requests fail would take one backend after the
    /// other out.
    fn goes_by_keys(&self) -> bool {
        false
    }

    /// Whether weights follow the load that backends report at once, so that whoever is loaded can be taken
    /// in its turn as others are.
    fn weighs_by_load(&self) -> bool {
        false
    }

    /// Whether a process that is one of many uses a part of the backends.
    fn uses_subset(&self) -> bool {
        false
    }

    /// Whether the share of a backend that fails is reduced.
    fn reduces_failing_shares(&self) -> bool {
        false
    }

    /// What all registrations together contribute to the weight of each.
    fn reference(&self, _roster: &Roster, _now: Instant) -> Reference {
        Reference::default()
    }

    /// The weight of a registration, before it is reduced for its zone.
    fn weight(&self, registration: &Registration, _: &Reference, _now: Instant) -> Weight {
        Weight::new(registration.base().get())
    }

    /// Counts a request that was not picked among all requests in flight, where the policy needs their
    /// number.
    fn count(&self) -> Option<Arc<()>> {
        None
    }

    /// Adds to a new table what [`pick`](Self::pick) needs to find.
    fn index(&self, table: &mut Table, shares: &[Share]);

    /// Picks a backend of a table that is not empty: without a lock, and without allocating.
    fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked>;
}

/// A random number from 0 to 1.
pub(super) fn random_unit(random: &mut fastrand::Rng) -> f32 {
    unit(random.u64(..))
}

/// A number from 0 to 1 of the high bits.
pub(super) fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1_u32 << 24) as f32
}

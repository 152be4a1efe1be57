//! What each policy does: one file for each, behind one trait.

mod active;
mod adaptive;
mod consistent;
mod headroom;
mod least_busy;
mod on_trial;
mod random;
mod round_robin;
mod routing;

pub(super) use active::{ActivePolicy, PolicySettings};
#[cfg(feature = "config")]
pub(crate) use least_busy::DEFAULT_CANDIDATES;
pub(super) use least_busy::MAX_CANDIDATES;
pub(super) use routing::{Reference, RoutingPolicy};

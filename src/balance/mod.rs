//! Picking a backend for a request. No I/O, no Pingora.
//!
//! A [`Balancer`] is given the changes of a group, turns what nodes report into weights, and
//! publishes a table. [`pick`](Balancer::pick) reads that table without a lock and without
//! allocating, and returns an [`Upstream`], which counts the request as in flight until it is
//! dropped.
//!
//! The pick of the weighted policies draws a few backends by weight and takes the one with the
//! fewest requests in flight for its weight. Weights follow what a proxy cannot see; its own counts
//! of requests in flight show what weights are too slow for.
//!
//! Time and randomness can come from the caller ([`Balancer::tick`], [`PickOptions`]), so that a test
//! or a simulation controls both; `benches/routing_quality` is one.

mod alias;
mod atomic;
mod balancer;
mod builder;
mod checked;
mod controller;
mod departed;
mod endpoint;
mod fleet;
mod follow;
mod heard;
mod index;
mod kept;
mod learned;
mod lingering;
mod load;
mod mean;
pub(crate) mod pace;
mod pick;
mod policy;
mod registration;
mod ring;
mod roster;
mod scale;
mod settings;
mod sharing;
mod spread;
mod subset;
mod successors;
mod table;
#[cfg(test)]
mod tests;
mod totals;
mod trial;
mod upstream;
mod weigher;
mod weight;
mod zone;

pub use balancer::{BackendStatus, Balancer, TICK};
pub use builder::BalancerBuilder;
pub use learned::Learned;
pub use load::Load;
pub use pick::{PickOptions, Probes};
pub use settings::{Adaptive, Consistent, Headroom, Policy, Zones};
pub use upstream::Upstream;

#[cfg(feature = "config")]
pub(crate) use builder::DEFAULT_PORT;
#[cfg(feature = "config")]
pub(crate) use policy::DEFAULT_CANDIDATES;
#[cfg(feature = "pingora")]
pub(crate) use {
    endpoint::{Endpoint, Holder},
    spread::Spread,
    weight::Share,
};

//! Adapters for [Pingora](https://docs.rs/pingora) (feature `pingora`, on by default).
//!
//! | you have | you use |
//! |---|---|
//! | a proxy with a `LoadBalancer` | [`ClusterBackends`] as its discovery, [`MetricsWeighted`] as its selection |
//! | the same, and want changes at once instead of every `update_frequency` | [`LiveLoadBalancer`] |
//! | nothing yet | [`ClusterProxy`](crate::proxy::ClusterProxy): a complete proxy, which the example `load_balancer` runs from a YAML file |
//! | a proxy to write | [`BalancerService`]: the pick that also counts requests in flight |
//! | requests for the leader only | [`LeaderRoute`] |
//! | to know what each node is used for, and why | [`BalancerService::backend_states`] |
//! | nodes that are to be asked whether they are well | [`NodeCheck`], for each of these |
//!
//! Everything runs inside Pingora's runtimes: no task is spawned, and no connection made, before the
//! server runs (it may fork). A service signals ready after the first complete view, so that a proxy
//! service that depends on it starts with backends. If etcd cannot be reached, it signals ready after
//! a limited time anyway (10 s by default), with an error in the log.
//!
//! Pingora does not supervise the tasks of its services. So each part of a service here that ends or
//! panics is started again, after 1 s to 30 s, with an error in the log. Meanwhile
//! [`status`](crate::ServiceDiscovery::status) is `Ended`, and `Stale` when it follows again. A server
//! without its listener is useless: [`ClusterProxy::add_to`](crate::proxy::ClusterProxy::add_to)
//! ends the process then.
//!
//! After SIGTERM Pingora continues to serve for `grace_period_seconds`. The services here keep
//! following the group during that time, so that requests still find live backends; they end with
//! their runtime.

mod backend_state;
mod backends;
mod check;
mod check_state;
mod checks;
mod exchange;
mod follow;
mod leader;
mod learned_file;
mod live;
mod operators;
mod peer;
mod restart;
mod selection;
mod service;
mod short_error;
mod slot;
mod system_cas;
mod turns;
mod weights;

pub use backend_state::{BackendState, StatedBackend};
pub use backends::ClusterBackends;
pub use check::NodeCheck;
pub use checks::CheckStatus;
pub(crate) use checks::Checker;
pub(crate) use exchange::exchange;
pub use leader::{LeaderRoute, LeaderUpstream};
pub(crate) use learned_file::{
    LearnedByGroup, LearnedFile, read as read_learned, teach as teach_learned,
    within as within_learned, write as write_learned,
};
pub use live::LiveLoadBalancer;
pub use peer::http_peer;
pub use selection::MetricsWeighted;
pub use service::BalancerService;
pub use short_error::shorten_error;
pub(crate) use system_cas::with_system_cas;
pub use weights::{BackendNode, LiveWeights};

//! Adapters for [Pingora](https://docs.rs/pingora) (feature `pingora`, on by default).
//!
//! | you have | you take |
//! |---|---|
//! | a proxy with a `LoadBalancer` | [`ClusterBackends`] as its discovery, [`MetricsWeighted`] as its selection |
//! | the same, and want changes at once instead of every `update_frequency` | [`LiveLoadBalancer`] |
//! | nothing yet | [`ClusterProxy`](crate::proxy::ClusterProxy): a complete proxy, which the example `load_balancer` runs from a YAML file |
//! | a proxy to write | [`BalancerService`]: the pick that also counts requests in flight |
//! | requests for the leader only | [`LeaderRoute`] |
//!
//! Everything runs inside Pingora's runtimes: nothing is spawned, and no connection made, before
//! the server runs (it may fork). A service signals ready after the first complete view, so that
//! a proxy service that depends on it starts with backends; if etcd cannot be reached it signals
//! ready anyway after a bounded wait (10 s by default), with an error in the log.
//!
//! Pingora does not look after the tasks of its services. So each part of a service here that ends or
//! panics is started again, after 1 s to 30 s, with an error in the log; meanwhile
//! [`status`](crate::ServiceDiscovery::status) is `Ended`, and `Stale` when it follows again. Without its listener a
//! server is of no use: [`ClusterProxy::add_to`](crate::proxy::ClusterProxy::add_to) ends the process then.
//!
//! After SIGTERM Pingora keeps serving for `grace_period_seconds`. The services here keep
//! following the group for as long, so that requests in that time still find live backends; they
//! end with their runtime.

mod balancer;
mod discovery;
mod keep;
mod leader;
mod selection;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ::pingora::upstreams::peer::HttpPeer;
use tokio::time::MissedTickBehavior;
use tracing::error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::balance::TICK;
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::node::Node;

pub use balancer::{BalancerService, LiveLoadBalancer};
pub use discovery::ClusterBackends;
pub use leader::{LeaderRoute, LeaderUpstream};
pub use selection::{BackendNode, LiveWeights, MetricsWeighted};

/// How long a service waits for the first complete view before it signals ready without one.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to look whether a discovery that somebody else runs is still being run.
const TAKE_OVER: Duration = Duration::from_secs(1);

/// The first of several changes takes effect at once, the next ones together after so long: with
/// many nodes, each of which reports every few seconds, every change by itself would cost too
/// much.
const COALESCE: Duration = Duration::from_millis(20);
/// From one to the next at least so many times as long as one took: 2 % of a core.
const PACE: u32 = 50;

/// A plain-text HTTP peer for a node. Its connections are kept apart from those to any other
/// process at the same address, so that a reused address never meets an old connection. A process
/// that has lost its lease and registered again keeps them.
pub fn http_peer(addr: SocketAddr, node: &Node) -> HttpPeer {
    let mut peer = HttpPeer::new(addr, false, String::new());
    let life = node.run().unwrap_or(node.incarnation().cast_unsigned());
    peer.group_key = xxh3_64_with_seed(node.id.as_bytes(), life);
    peer
}

/// Waits for the first complete view, for so long at most. Answers whether there is one.
async fn wait_ready(discovery: &ServiceDiscovery, at_most: Duration) -> bool {
    let ready = tokio::time::timeout(at_most, discovery.wait_ready()).await;
    if ready.is_err() {
        error!(
            group = discovery.group_name(),
            waited = ?at_most,
            "no view of the group yet; going on without, backends will come when etcd answers"
        );
    }
    ready.is_ok()
}

/// Calls `tick` as often as weights want it.
async fn every_tick(tick: impl Fn(Instant)) -> Infallible {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick(ticks.tick().await.into_std());
    }
}

/// Runs a discovery until it is dropped, or sees to it that somebody does: of several services
/// over one discovery one runs it, and another takes over should that end. Returns why it cannot be
/// run.
async fn follow(discovery: &ServiceDiscovery) -> ClusterError {
    loop {
        match discovery.run_until(std::future::pending()).await {
            Ok(()) | Err(ClusterError::AlreadyRunning { .. }) => {
                tokio::time::sleep(TAKE_OVER).await;
            }
            Err(error) => return error,
        }
    }
}

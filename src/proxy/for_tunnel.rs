//! Picking a backend for a request that becomes a tunnel, in groups where some backends cannot pass it on.

use std::time::Instant;

use ::pingora::Result;

use super::group::GroupProxy;
use super::reply::unavailable;
use super::request_state::RequestState;
use super::unserved::Unserved;
use crate::balance::Upstream;

/// Of so many backends that can pass a tunnel on, the one with the fewest requests in flight for its weight gets it.
const TUNNEL_CANDIDATES: usize = 5;

impl GroupProxy {
    /// Picks one of the backends that can pass a tunnel on, where others cannot; `false` if there is none. They are
    /// looked for among all nodes, once: draws could go on for long.
    pub(super) fn pick_for_tunnel(&self, state: &mut RequestState) -> Result<bool> {
        let nodes = self.balancer.discovery().nodes();
        let able = nodes.iter().filter(|node| self.peers.passes_upgrades(node));
        let addrs = able.map(|node| self.balancer.address_of(node));
        let untried = addrs.filter(|addr| !state.tried.contains(addr));
        let mut addrs: Vec<_> = untried
            .filter(|addr| self.balancer.works_at(*addr))
            .collect();
        fastrand::shuffle(&mut addrs);
        let is_any = !addrs.is_empty();
        let upstreams = addrs
            .into_iter()
            .filter_map(|addr| self.balancer.upstream_at(addr));
        let has_room = |it: &Upstream| self.picker.overload.allows(it.in_flight());
        let score = |it: &Upstream| f64::from(it.in_flight()) / it.weight();
        let candidates = upstreams.filter(has_room).take(TUNNEL_CANDIDATES);
        let best = candidates.min_by(|one, other| score(one).total_cmp(&score(other)));
        match best {
            Some(upstream) => {
                state.begins_try(Instant::now());
                state.tried.push(upstream.addr());
                state.upstream = Some(upstream);
                state.is_found = true;
                Ok(true)
            }
            None if is_any => {
                self.statistics.unserved(Unserved::BackendsFull);
                Err(unavailable(Unserved::BackendsFull.as_str()))
            }
            None => Ok(false),
        }
    }
}

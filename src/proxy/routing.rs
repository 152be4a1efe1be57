//! What a file says of requests: where they go, and what they may be. A reload replaces it as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use ::pingora::Result;
use ::pingora::proxy::Session;

use super::client::{TrustedProxies, is_claim, peer_of, replace_claims};
use super::group::GroupProxy;
use super::readiness::Readiness;
use super::request_state::RequestState;
use super::requests::RequestLimits;
use super::route::Route;
use crate::config::{ClusterConfig, DEFAULT_GROUP};
use crate::error::ClusterError;
use crate::pingora::BalancerService;

/// The groups, the routes to them, and what holds for all requests.
pub(super) struct Routing {
    /// By the names in the file.
    pub(super) groups: BTreeMap<String, Arc<GroupProxy>>,
    /// For requests that no route is for.
    pub(super) default: Arc<GroupProxy>,
    pub(super) routes: Vec<Arc<Route>>,
    pub(super) limits: RequestLimits,
    pub(super) readiness: Readiness,
    pub(super) trusted: TrustedProxies,
    /// Whether backends get `Forwarded`.
    pub(super) sends_forwarded: bool,
    /// Whether a missing `traceparent` is made, and which part of those says that it is sampled.
    pub(super) traceparent: bool,
    traceparent_sampled: f64,
    /// Something is decided by a field that a client may have no right to.
    reads_claims: bool,
}

impl Routing {
    /// One group for all requests.
    pub(super) fn of_one(config: &ClusterConfig, group: GroupProxy) -> Self {
        let group = Arc::new(group);
        let groups = BTreeMap::from([(group.name.clone(), group.clone())]);
        Self::of(config, groups, group, Vec::new())
    }

    /// These groups, with the routes to them. Routes continue to count from the former ones.
    pub(super) fn new(
        config: &ClusterConfig,
        groups: BTreeMap<String, Arc<GroupProxy>>,
        former: Option<&Self>,
    ) -> Result<Self, ClusterError> {
        let missing =
            |field: String| ClusterError::config(field, "names a group that is not there");
        let default = groups.get(DEFAULT_GROUP).cloned();
        let default = default.ok_or_else(|| missing("cluster.group".to_owned()))?;
        let mut routes = Vec::new();
        for (index, route) in config.routes.iter().enumerate() {
            let made = Route::new(route, index + 1, &groups);
            let mut made = made.ok_or_else(|| missing(format!("cluster.routes[{index}]")))?;
            let same = former.into_iter().flat_map(|former| &former.routes);
            // A number may be that of another route now.
            let has_name = route.name.is_some();
            let is_same =
                |same: &&Arc<Route>| same.name == made.name && (has_name || same.is_like(&made));
            if let Some(same) = same.clone().find(is_same) {
                made.count_with(same);
            }
            routes.push(Arc::new(made));
        }
        Ok(Self::of(config, groups, default, routes))
    }

    fn of(
        config: &ClusterConfig,
        groups: BTreeMap<String, Arc<GroupProxy>>,
        default: Arc<GroupProxy>,
        routes: Vec<Arc<Route>>,
    ) -> Self {
        let clients = &config.clients;
        let mut named = config.routes.iter().flat_map(|route| route.headers.keys());
        let reads_claims = named.any(|name| is_claim(name))
            || groups.values().any(|group| group.picker.hashes_claim());
        Self {
            reads_claims,
            groups,
            default,
            routes,
            limits: RequestLimits::new(config),
            readiness: Readiness::new(clients.ready_path.clone()),
            trusted: TrustedProxies::new(clients.trusted_proxies.iter().copied()),
            sends_forwarded: clients.forwarded,
            traceparent: config.traceparent,
            traceparent_sampled: config.traceparent_sampled,
        }
    }

    /// A request begins.
    pub(super) fn begin(&self, session: &mut Session, state: &mut RequestState) -> Result<()> {
        // Also for the log line of a request that is refused.
        let headers = &session.req_header().headers;
        state.client = peer_of(session).map(|peer| self.trusted.client_of(peer, headers));
        if self.reads_claims {
            replace_claims(&self.trusted, session)?;
        }
        self.limits.begin(session, state);
        Ok(())
    }

    /// The balancers of all groups.
    pub(super) fn balancers(&self) -> Vec<Arc<BalancerService>> {
        let groups = self.groups.values();
        groups.map(|group| group.balancer.clone()).collect()
    }

    /// Whether the next `traceparent` that is made says that it is sampled.
    pub(super) fn samples_trace(&self) -> bool {
        self.traceparent_sampled >= 1.0 || fastrand::f64() < self.traceparent_sampled
    }

    /// The first route that is for the request of this session. Costs time in proportion to the number of routes.
    pub(super) fn route_of(&self, session: &Session) -> Option<&Arc<Route>> {
        let is_over_tls = || self.trusted.is_over_tls(session);
        let mut routes = self.routes.iter();
        routes.find(|route| route.is_for(session.req_header(), is_over_tls))
    }

    /// Whether the view of every group is there, and some group has a backend.
    pub(super) fn is_ready(&self) -> bool {
        let mut groups = self.groups.values();
        let has_view = |group: &Arc<GroupProxy>| group.balancer.discovery().is_ready();
        groups.clone().all(has_view) && groups.any(|group| !group.balancer.is_empty())
    }
}

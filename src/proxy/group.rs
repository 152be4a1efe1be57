//! A group as the proxy serves it: how its backends are picked and spoken to, and what is tried again.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use http::StatusCode;

use super::last_connected::LastConnected;
use super::leader::{LeaderRequests, find_leader, is_misdirected};
use super::load_reports::LoadReports;
use super::log_limit::LogLimit;
use super::outcome::Outcome;
use super::peers::{Asked, Peers};
use super::pick::Picker;
use super::request_state::RequestState;
use super::rest::until_left;
use super::retry::RetryRules;
use super::retry_budget::RetryBudget;
use super::statistics::{Answered, RequestStatistics};
use super::tls::BackendTls;
use super::unserved::Unserved;
use crate::balance::Upstream;
use crate::config::{ClusterConfig, DEFAULT_GROUP};
use crate::error::ClusterError;
use crate::node::Node;
use crate::pingora::{BalancerService, Checker, LeaderRoute, LeaderUpstream, NodeCheck};

/// More backends than twice those that there are and these are not counted.
const KEPT_BACKENDS: usize = 100;

/// A group, and the settings by which it is served.
pub(super) struct GroupProxy {
    /// As the file names it.
    pub(super) name: String,
    pub(super) balancer: Arc<BalancerService>,
    leader: LeaderRoute,
    /// Instead of that one, given by a program; then writes go to the leader.
    given_leader: OnceLock<LeaderRoute>,
    leader_requests: LeaderRequests,
    takes_writes: bool,
    pub(super) picker: Picker,
    pub(super) retries: RetryRules,
    /// That connections are possible.
    pub(super) connected: LastConnected,
    /// For lines about requests that failed.
    pub(super) failures: LogLimit,
    pub(super) retry_on_status: Vec<u16>,
    pub(super) retry_budget: Arc<RetryBudget>,
    pub(super) peers: Arc<Peers>,
    /// The longest time for a whole request.
    pub(super) request_timeout: Option<Duration>,
    pub(super) load_reports: Option<LoadReports>,
    pub(super) statistics: Arc<RequestStatistics>,
}

/// Which settings are the same as before.
#[derive(Debug, Clone, Copy)]
pub(super) struct SameSettings {
    pub(super) overload: bool,
    pub(super) retry: bool,
    pub(super) peers: bool,
}

/// TLS to the backends of this group, if they may use it.
pub(super) fn backend_tls(
    config: &ClusterConfig,
    name: &str,
) -> Result<Option<BackendTls>, ClusterError> {
    // Without the feature, nodes that say that they want TLS cannot be spoken to.
    let has_tls = cfg!(feature = "proxy-tls");
    let backends = config.spoken_to();
    let is_needed = backends.protocol.is_tls() || has_tls && backends.may_use_tls();
    if !is_needed {
        return Ok(None);
    }
    let field = match name {
        DEFAULT_GROUP => "cluster.backends".to_owned(),
        name => format!("cluster.groups.{name}.backends"),
    };
    BackendTls::new(&backends, &field).map(Some)
}

impl GroupProxy {
    /// The group that `config` describes.
    pub(super) fn new(
        name: &str,
        config: &ClusterConfig,
        balancer: Arc<BalancerService>,
        tls: Option<BackendTls>,
        statistics: Arc<RequestStatistics>,
    ) -> Self {
        let upgrade = config.clients.upgrade;
        Self {
            name: name.to_owned(),
            leader: LeaderRoute::new(balancer.discovery().clone(), config.default_port),
            balancer,
            given_leader: OnceLock::new(),
            leader_requests: LeaderRequests::new(config),
            takes_writes: config.leader.writes,
            picker: Picker::new(config),
            retries: RetryRules::new(config.retries).on_timeout(config.retry.on_timeout),
            retry_on_status: config.retry.on_status.clone(),
            connected: LastConnected::default(),
            failures: LogLimit::new(),
            retry_budget: Arc::new(RetryBudget::new(&config.retry)),
            peers: Arc::new(Peers::new(
                &config.timeouts,
                &config.spoken_to(),
                upgrade,
                tls,
            )),
            request_timeout: some_time(config.timeouts.request_ms),
            load_reports: LoadReports::new(config),
            statistics,
        }
    }

    /// Goes on with what a former one counts and knows, where its settings are the same.
    pub(super) fn continue_from(&mut self, former: &Self, is_same: SameSettings) {
        match (is_same.overload, Arc::get_mut(&mut self.picker.overload)) {
            (false, Some(overload)) => overload.continue_from(&former.picker.overload),
            _ => self.picker.overload = former.picker.overload.clone(),
        }
        if is_same.retry {
            self.retry_budget = former.retry_budget.clone();
        }
        if is_same.peers {
            self.peers = former.peers.clone();
        }
    }

    /// How its nodes are checked, if the configuration says that they are. `check` is what it says.
    pub(super) fn checker(&self, check: Option<NodeCheck>) -> Option<Checker> {
        let peers = self.peers.clone();
        let peer = move |addr, node: &Node| peers.peer(addr, node, Asked::default());
        Some(Checker {
            check: check?,
            peer: Arc::new(peer),
        })
    }

    /// Sends writes to this leader.
    pub(super) fn send_writes_to(&self, leader: LeaderRoute) {
        // The first one stays: a program gives one.
        let _ = self.given_leader.set(leader);
    }

    /// A request is to be served by this group.
    pub(super) fn begin(&self, session: &Session, state: &mut RequestState) {
        self.retry_budget.count_request();
        self.statistics.begins();
        state.is_for_leader =
            self.sends_to_leader() && self.leader_requests.include(session, state.is_upgrade);
        state.most_retries = self.retries.most;
        state.timeout = self.request_timeout;
    }

    /// Whether writes are for the leader.
    pub(super) fn sends_to_leader(&self) -> bool {
        self.takes_writes || self.given_leader.get().is_some()
    }

    /// Which requests are for the leader.
    pub(super) fn leader_requests(&self) -> &LeaderRequests {
        &self.leader_requests
    }

    /// Lets a request in, and finds its backend. A leader is waited for before, because a request that
    /// waits for one is no load. Room at the leader is taken last, as room at a backend is, so that nobody who has it
    /// waits for anything.
    ///
    /// The inner error is the reason why it is not served, the outer one says that its client has left meanwhile.
    pub(super) async fn enter(
        &self,
        session: &mut Session,
        state: &mut RequestState,
    ) -> ::pingora::Result<Result<(), Unserved>> {
        let is_complete = state.is_complete;
        let waiting = async {
            let leader = match state.is_for_leader {
                true => Some(find_leader(self.leader(), &self.leader_requests, state).await?),
                false => None,
            };
            let left = state.time_left().unwrap_or(Some(Duration::ZERO));
            Ok((leader, self.picker.overload.enter(left).await?))
        };
        let waited = tokio::select! {
            biased;
            waited = waiting => waited,
            error = until_left(session, is_complete) => return Err(error),
        };
        let (leader, place) = match waited {
            Ok(found) => found,
            Err(reason) => return Ok(Err(reason)),
        };
        state.place = place;
        Ok(match leader {
            Some(leader) => self.send_to_leader(leader, state).await,
            None => self.find_backend(session, state).await,
        })
    }

    /// Finds the backend or the leader for a try, and stores it in the context; the error is the reason
    /// why there is none.
    pub(super) async fn find_backend(
        &self,
        session: &Session,
        state: &mut RequestState,
    ) -> Result<(), Unserved> {
        if !state.is_for_leader {
            return self.picker.pick(&self.balancer, session, state).await;
        }
        state.leader_load = None;
        let leader = find_leader(self.leader(), &self.leader_requests, state).await?;
        self.send_to_leader(leader, state).await
    }

    /// Whether this response says that the leader has to be asked, or another one that leads now; the next try does that. Once
    /// for each request.
    pub(super) fn is_asked_in_vain(
        &self,
        response: &ResponseHeader,
        is_safe: bool,
        state: &mut RequestState,
    ) -> bool {
        if state.misdirected.is_some() {
            return false;
        }
        match state.leader.as_ref().map(|it| (it.addr, it.epoch)) {
            Some((addr, epoch)) if is_misdirected(response, epoch, is_safe) => {
                self.statistics.backend_ends(addr, None);
                state.failed_epoch = Some(epoch);
                state.leader = None;
            }
            // A node that does not lead, and has nothing to answer with; or the request is for another host.
            None if is_safe
                && response.status == StatusCode::MISDIRECTED_REQUEST
                && self.is_led_by_another(state)
                && self.may_send_again(state) =>
            {
                state.is_for_leader = true;
                if let Some(upstream) = state.upstream.take() {
                    self.statistics.backend_ends(upstream.addr(), None);
                }
                self.picker.overload.freed();
            }
            _ => return false,
        }
        state.misdirected = Some(Instant::now());
        true
    }

    /// Whether writes go to a leader that is known, and is not the backend of this try.
    fn is_led_by_another(&self, state: &RequestState) -> bool {
        let leader = self.leader().leader().filter(|_| self.sends_to_leader());
        leader.is_some_and(|leader| Some(leader.addr) != state.addr())
    }

    fn leader(&self) -> &LeaderRoute {
        self.given_leader.get().unwrap_or(&self.leader)
    }

    /// Waits for room at the leader, who may be another one by then.
    async fn send_to_leader(
        &self,
        leader: LeaderUpstream,
        state: &mut RequestState,
    ) -> Result<(), Unserved> {
        let now_leading = || {
            let now_leading = self.leader().leader();
            now_leading.filter(|now_leading| Some(now_leading.epoch) != state.failed_epoch)
        };
        let at_leader = || {
            let leader = now_leading().unwrap_or_else(|| leader.clone());
            let load = self.balancer.upstream_at(leader.addr);
            (leader, load)
        };
        let found = self.picker.with_room(at_leader, state).await;
        let (leader, load) = found.ok_or(Unserved::LeaderFull)?;
        state.leader_load = load;
        state.leader = Some(leader);
        state.begins_try(Instant::now());
        Ok(())
    }

    /// A backend has failed in an earlier try; `report` says how.
    pub(super) fn blame(&self, upstream: Upstream, report: impl FnOnce(Upstream)) {
        self.statistics.backend_ends(upstream.addr(), None);
        report(upstream);
        self.picker.overload.freed();
    }

    /// Counts what has become of a request at its last backend.
    pub(super) fn count_backend(
        &self,
        addr: SocketAddr,
        outcome: Outcome,
        state: &RequestState,
        now: Instant,
    ) {
        match outcome {
            Outcome::Succeeded | Outcome::Answered => {
                let answered = Answered {
                    after: state.latency(),
                    client: state.client,
                    now,
                };
                self.statistics.backend_ends(addr, Some(answered));
            }
            Outcome::Failed | Outcome::Overloaded if !state.is_blameless => {
                self.statistics.backend_ends(addr, None);
            }
            Outcome::Failed | Outcome::Overloaded | Outcome::Unknown => {}
        }
        // Backends that are gone are not kept for ever.
        if self.statistics.backends() > 2 * self.balancer.len() + KEPT_BACKENDS {
            let backends = self.balancer.backends();
            let known = backends.iter().map(|backend| backend.addr).collect();
            self.statistics.retain(&known);
        }
    }

    /// Whether the request may be sent once more; if so, that counts.
    pub(super) fn may_send_again(&self, state: &mut RequestState) -> bool {
        state.may_try() && self.retry_budget.take(Instant::now()) && state.may_try_again()
    }
}

/// A time of the configuration, where 0 is none.
pub(super) fn some_time(milliseconds: u64) -> Option<Duration> {
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}

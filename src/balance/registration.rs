//! One registration of a node, with everything that only the updating side needs of it.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checked::Checked;
use super::controller::Controller;
use super::endpoint::Endpoint;
use super::fleet::Fleet;
use super::learned::{LearnedBackend, Lesson, Taught, millis_between};
use super::load::Load;
use super::settings::Adaptive;
use super::trial::Trial;
use super::weight::BaseWeight;
use crate::ids::Revision;
use crate::load_report::LoadReport;
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::view::NodeOverride;

/// The part of its weight that a node has that says that it is degraded.
const DEGRADED: f64 = 0.25;
/// The load of a response is preferred to the one in the registration for this long.
const RESPONSE_LOAD_VALID: Duration = Duration::from_secs(10);
/// A load in a response that is unchanged and has no sampling time counts as a new sample after
/// this long.
const UNCHANGED_COUNTS_AFTER: Duration = Duration::from_secs(5);
/// A sample that has been the same for longer than this no longer takes precedence over the
/// registration.
const UNCHANGED_VALID: Duration = Duration::from_secs(60);
/// Who would have had so many requests by its weight, and got none, is asked for one: by chance alone, one in ten million
/// backends would be (e^-16).
const MOST_MISSED: f32 = 16.0;
/// A sampling time that is behind the last one by more than this means that the sender's clock was
/// set back, not that the report is late: responses that overtake each other are almost of the same
/// time.
const CLOCK_SET_BACK_MS: i64 = 2_000;

/// A registration and what is known about it.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) endpoint: Arc<Endpoint>,
    node: Arc<Node>,
    base: BaseWeight,
    load: Load,
    /// What its entry says, without responses.
    registered: Load,
    pub(super) controller: Controller,
    /// What came with responses, if anything did.
    response_load: Option<Box<ResponseLoad>>,
    /// The load of its entry is newer than what responses have said, and was not used yet.
    pub(super) has_unread_entry: bool,
    /// What an operator says of it.
    said: Option<Box<NodeOverride>>,
    /// What health checks have said of it.
    pub(super) checked: Checked,
    /// It says that it cannot serve.
    is_failing: bool,
    /// Another registration holds its address.
    pub(super) is_shadowed: bool,
    /// Its load is new, and the controller has not had it yet.
    pub(super) has_new_load: bool,
    /// It was sent something since its last report.
    pub(super) was_used: bool,
    /// When this process last had a request there.
    used_at: Option<Instant>,
    taught: Option<Box<Taught>>,
    /// The number of the last complete view that contained it.
    pub(super) last_view: u32,
    /// Its outcomes as of the last tick.
    pub(super) outcomes_at_tick: u32,
    /// There was a request between the last two ticks.
    pub(super) is_active: bool,
    /// How many requests have ended between them.
    ended: u32,
    /// How many requests were its part of all since its last one.
    missed: f32,
    /// It does its work for so much fewer requests than the others that its low load says nothing.
    pub(super) is_refusing: bool,
    trial: Trial,
    /// The factor on its static weight when it was ejected, relative to those that work.
    held: Option<f64>,
}

#[derive(Debug)]
struct ResponseLoad {
    /// The last new sample, and when it came.
    sample: LoadReport,
    sampled_at: Instant,
    /// When the last sample came, new or not.
    received_at: Instant,
}

impl Registration {
    /// A registration about which nothing is known, and how many of its metrics were refused.
    pub(super) fn new(
        node: &Arc<Node>,
        addr: SocketAddr,
        fleet: &Arc<Fleet>,
        joined_at: Option<Instant>,
        now: Instant,
    ) -> (Self, u32) {
        let mut load = Load::default();
        let refused = load.read_metadata(node);
        let mut registration = Self {
            endpoint: Arc::new(Endpoint::new(node, addr, fleet)),
            node: node.clone(),
            base: BaseWeight::new(node.weight),
            load,
            registered: load,
            controller: Controller::new(joined_at, now),
            response_load: None,
            has_unread_entry: false,
            said: None,
            // The first nodes of all are used until they have been checked: the first one that passes could not carry
            // the load of all.
            checked: match joined_at {
                None => Checked::Well,
                Some(_) => Checked::Unknown,
            },
            is_failing: false,
            is_shadowed: false,
            has_new_load: true,
            was_used: false,
            used_at: None,
            taught: None,
            last_view: 0,
            outcomes_at_tick: 0,
            is_active: false,
            ended: 0,
            missed: 0.0,
            is_refusing: false,
            trial: Trial::default(),
            held: None,
        };
        // Whoever joins gets a request soon, however little traffic there is.
        registration.endpoint.set_due(joined_at.is_some());
        registration.weigh();
        (registration, refused)
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.endpoint.addr()
    }

    pub(super) fn base(&self) -> BaseWeight {
        self.base
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }

    /// Whether this process has ever had a request there.
    pub(super) fn was_ever_used(&self) -> bool {
        self.used_at.is_some()
    }

    /// The load that weights follow: who has little to do because it refuses its work is no better choice for that.
    pub(super) fn believed_load(&self) -> &Load {
        match self.is_refusing {
            true => &Load::UNKNOWN,
            false => &self.load,
        }
    }

    /// Whether `node` is of the same process at the same address. A process that has lost its lease
    /// and registered again is the same one.
    pub(super) fn is_same_process(&self, node: &Node, addr: SocketAddr) -> bool {
        self.addr() == addr && self.node.is_same_life(node)
    }

    /// Takes over an entry that was written again. Returns how many metrics were refused.
    pub(super) fn update(&mut self, node: &Arc<Node>, now: Instant) -> u32 {
        // A store delivers writes in their order. Without revisions only the writer's clock shows
        // which one is older.
        let behind = self.node.last_seen.saturating_sub(node.last_seen);
        let is_outdated = node.revision() == 0 && behind > 0 && behind < CLOCK_SET_BACK_MS;
        // Others than this crate's nodes do not say when they have written: each of their writes is a report.
        let is_same = node.last_seen == self.node.last_seen
            && (node.last_seen > 0 || node.revision() == self.node.revision())
            && node.metadata == self.node.metadata;
        self.node = node.clone();
        self.weigh();
        self.endpoint.set_node(node.clone());
        if is_outdated {
            return 0;
        }
        let refused = self.registered.read_metadata(node);
        if let Some(response) = &self.response_load
            && now.saturating_duration_since(response.received_at) < RESPONSE_LOAD_VALID
        {
            // What responses do not contain is still read from the registration.
            self.load = Load::from(&response.sample).or(self.registered);
            self.has_unread_entry |= !is_same;
            return refused;
        }
        self.has_new_load |= !is_same;
        self.has_unread_entry = false;
        self.load = self.registered;
        refused
    }

    /// Takes over what an operator says of it, if it is meant for this process.
    pub(super) fn set_override(&mut self, said: Option<&NodeOverride>) {
        let said = said.filter(|said| said.is_for(&self.node) && !said.is_empty());
        self.said = said.map(|said| Box::new(*said));
        self.weigh();
    }

    /// What an operator says of it.
    pub(super) fn said(&self) -> Option<NodeOverride> {
        self.said.as_deref().copied()
    }

    /// As it registered it, or as an operator has said.
    pub(super) fn static_weight(&self) -> BaseWeight {
        let said = self.said.as_ref().and_then(|said| said.weight);
        BaseWeight::new(said.or(self.node.weight))
    }

    fn weigh(&mut self) {
        let weight = self.static_weight();
        let health = self.node.metadata.string(metadata_keys::HEALTH);
        self.is_failing = health.as_deref() == Some("failing");
        self.base = match health.as_deref() {
            Some("degraded") => weight.times(DEGRADED),
            _ => weight,
        };
    }

    /// What health checks have said of it, and what it says of itself. Without checks, it is well if it says nothing else.
    pub(super) fn checked(&self, has_checks: bool) -> Checked {
        match (self.is_failing, has_checks) {
            (true, _) => Checked::Down,
            (false, true) => self.checked,
            (false, false) => Checked::Well,
        }
    }

    /// Takes over the load of an entry that came while responses were preferred, if none have come for some time: a
    /// node may not write again as long as its load stays what it is.
    pub(super) fn update_from_entry(&mut self, now: Instant) {
        let is_due = self.has_unread_entry
            && self.response_load.as_ref().is_none_or(|response| {
                now.saturating_duration_since(response.received_at) >= RESPONSE_LOAD_VALID
            });
        if is_due {
            self.has_unread_entry = false;
            self.load = self.registered;
            self.has_new_load = true;
        }
    }

    /// Takes over a load that came with a response.
    pub(super) fn update_from_response(&mut self, report: LoadReport, now: Instant) {
        if let Some(response) = &mut self.response_load {
            let age = now.saturating_duration_since(response.sampled_at);
            if age <= UNCHANGED_VALID {
                response.received_at = now;
            }
            let is_repeated = match (response.sample.sampled_at, report.sampled_at) {
                (Some(last), Some(this)) => {
                    this <= last && last - this < CLOCK_SET_BACK_MS.unsigned_abs()
                }
                _ => {
                    Load::from(&response.sample) == Load::from(&report)
                        && age < UNCHANGED_COUNTS_AFTER
                }
            };
            if is_repeated {
                return;
            }
        }
        let new = ResponseLoad {
            sample: report,
            sampled_at: now,
            received_at: now,
        };
        match &mut self.response_load {
            Some(response) => **response = new,
            None => self.response_load = Some(Box::new(new)),
        }
        // What an earlier response contained and this one does not is not known any more.
        self.load = Load::from(&report).or(self.registered);
        self.has_unread_entry = false;
        self.has_new_load = true;
    }

    /// Counts the requests that have ended since the last tick; before latencies are taken.
    pub(super) fn count_ended(&mut self) -> u32 {
        let outcomes = self.endpoint.outcomes();
        self.ended = outcomes.saturating_sub(self.outcomes_at_tick);
        self.ended
    }

    /// Whether it has had any since the last tick, or has one now. A tunnel is none.
    fn has_requests(&self) -> bool {
        self.ended > 0 || self.endpoint.busy() > 0
    }

    /// Asks for a request if it gets none, though many were its part; `part` of them since the last tick.
    pub(super) fn miss_requests(&mut self, part: f64) {
        self.missed = match self.has_requests() || self.endpoint.is_ejected() {
            true => 0.0,
            false => self.missed + part as f32,
        };
        if self.missed >= MOST_MISSED {
            self.missed = 0.0;
            self.endpoint.set_due(true);
        }
    }

    /// Decides whether a request is to try it.
    pub(super) fn tick_trial(&mut self, most_pause: Duration, now: Instant) {
        let endpoint = &self.endpoint;
        endpoint.readmit_if_alike();
        if !endpoint.is_ejected() {
            self.trial.reset();
            if endpoint.is_due() && self.has_requests() {
                endpoint.set_due(false);
            }
        } else if !endpoint.is_due() && !endpoint.is_probed() {
            let is_next = endpoint.state().take_begun_well();
            if is_next || self.trial.is_due(most_pause, now) {
                endpoint.set_due(true);
            }
        }
    }

    /// Whether it has had no request yet.
    pub(super) fn is_unused(&self) -> bool {
        self.used_at.is_none() && !self.endpoint.is_active_since(0)
    }

    /// Begins with what a former process has learned of it, unless requests have shown more by now.
    pub(super) fn learn(&mut self, taught: Taught, lesson: &Lesson) {
        if self.is_unused() {
            self.controller.learn(lesson);
            self.endpoint.learn(lesson);
            self.taught = Some(Box::new(taught));
        }
    }

    /// The factor on its static weight that was learned; `None` if it was never used.
    pub(super) fn learned_factor(&self) -> Option<f64> {
        self.used_at.map(|_| self.controller.factor())
    }

    /// It is ejected because a former process says so.
    pub(super) fn is_ejected_by_predecessor(&self) -> bool {
        self.taught.is_some() && self.endpoint.is_ejected()
    }

    /// It has had a request.
    pub(super) fn set_used(&mut self, now: Instant) {
        self.used_at = Some(now);
        self.taught = None;
    }

    /// What is learned of it, by this process or, if it had no request, by the one before; `None` if there is nothing.
    pub(super) fn learned(&self, now: Instant) -> Option<LearnedBackend> {
        // What has happened since the last tick counts, too.
        let is_active = self.endpoint.is_active_since(self.outcomes_at_tick);
        let used_at = match (is_active, self.used_at) {
            (true, _) => now,
            (false, Some(used_at)) => used_at,
            (false, None) => return Some(self.taught.as_ref()?.learned(now)),
        };
        Some(LearnedBackend {
            id: self.node.id.clone(),
            addr: self.addr(),
            run: self.node.run(),
            incarnation: self.node.incarnation(),
            requests_age_ms: millis_between(used_at, now),
            success: self.endpoint.success().max(0.0),
            is_ejected: self.endpoint.is_ejected(),
            weight: self.controller.learned(now),
        })
    }

    /// Keeps its weight, relative to the mean of those that work, while it is ejected and shows nothing of
    /// what it can do: so it has its share when it is back.
    pub(super) fn hold_weight(&mut self, settings: &Adaptive, mean_factor: f64) {
        if !self.endpoint.is_ejected() {
            self.held = None;
        } else if mean_factor > 0.0 {
            let factor = self.controller.factor() / mean_factor;
            let held = *self.held.get_or_insert(factor);
            self.controller.hold(settings, held * mean_factor);
        }
    }

    /// Whether it is in this zone; without a zone every registration is.
    pub(super) fn is_in_zone(&self, zone: Option<&str>) -> bool {
        zone.is_none() || self.node.zone.as_deref() == zone
    }

    /// Its claim to its address, for comparison. A node that drains or leaves has a weaker claim than
    /// one that serves. Of two nodes that serve, the one that was written last has the stronger claim,
    /// in the store's order, whatever the clocks of the nodes say.
    ///
    /// Where a group is followed in several registries, the word of the first one counts, so that a process that is in
    /// two of them drains where it says so.
    pub(super) fn claim(&self) -> (Reverse<u8>, bool, Revision, i64) {
        let node = &self.node;
        (
            Reverse(node.place()),
            node.is_serving(),
            node.revision(),
            node.last_seen,
        )
    }

    /// How it is used, whatever load it has.
    pub(super) fn usage(&self) -> (bool, bool, BaseWeight, BaseWeight) {
        let (base, own) = (self.base, self.static_weight());
        (self.takes_traffic(), self.is_failing, base, own)
    }

    /// Whether it gets traffic: it holds its address, serves, and its static weight is not 0.
    pub(super) fn takes_traffic(&self) -> bool {
        let is_drained = self.said.as_ref().is_some_and(|said| said.is_draining());
        !self.is_shadowed && self.node.is_serving() && !is_drained && self.base.allows_traffic()
    }
}

//! From the nodes of a group, and the outcomes of requests, to the weights of backends.

mod outside;
mod refusing;
mod trials;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checked::{Checked, Gate};
use super::controller::{Controller, ReportContext, Trust};
use super::endpoint::Endpoint;
#[cfg(feature = "pingora")]
use super::endpoint::Holder;
use super::fleet::Fleet;
use super::learned::{Learned, Lessons, too_many_ejected};
use super::mean::Mean;
use super::policy::ActivePolicy;
use super::roster::Roster;
use super::scale::{Scale, WeigherSettings};
use super::sharing::Sharing;
use super::subset::Subset;
use crate::node::Node;
use crate::view::NodeOverride;

/// With fewer backends than this, all are weighed again after each change, which costs little.
const WEIGHED_ALONE_FROM: usize = 256;
/// If more than one in so many have reported, all are weighed.
const FEW_OF: usize = 50;
/// The success rate of those that a former process says are ejected, and that are needed nevertheless: none that would
/// eject them again.
const READMITTED_SUCCESS: f32 = 0.5;
/// A tick that comes so long after the one before shows that the process was stopped.
const LATE: Duration = Duration::from_secs(5);
/// For how long nothing is looked at, at most, where nothing happens.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// How long a report of requests in flight counts.
const IN_FLIGHT_REPORT_VALID: Duration = Duration::from_secs(5);

/// Weighs the nodes of a group, and learns about each registration what a single report does not
/// show.
#[derive(Debug)]
pub(super) struct Weigher {
    settings: WeigherSettings,
    fleet: Arc<Fleet>,
    roster: Roster,
    trust: Trust,
    sharing: Sharing,
    subset: Subset,
    /// Some backends are outside the subset.
    leaves_some_out: bool,
    /// How many of the subset have reported, as of the last tick.
    reporting: usize,
    scale: Scale,
    /// The version of the roster that weights follow.
    settled_version: Option<u64>,
    /// Until when a tick without news would find nothing to do.
    rests_until: Option<Instant>,
    last_tick: Option<Instant>,
    /// When it was last time for a tick, and for how many more ones latencies are those of this process, which was
    /// stopped for a while.
    last_call: Option<Instant>,
    ticks_after_stop: u8,
    ticks_without_probe: u32,
    /// At the last tick, all had failed, and got this success rate.
    forgiven_rate: Option<f32>,
}

/// Which weights have been changed.
pub(super) enum Settled {
    All,
    /// Those of backends that have reported.
    Only(Vec<Arc<Endpoint>>),
}

/// What one tick found out about all backends together.
#[derive(Default)]
struct TickSummary {
    /// Some report their requests in flight.
    reports_in_flight: bool,
    /// How many have had requests since the last tick, and how many of these report.
    active: usize,
    active_reporting: usize,
    /// Of the logarithms of weights by metrics, where there is a recent report.
    metrics: Mean,
    loads: Mean,
    excess_latency: Mean,
    /// Mean latencies of this tick, in seconds.
    latencies: Vec<f64>,
    in_flight: Mean,
    all_in_flight: f64,
    has_tunnels: bool,
    /// How many requests have ended since the last tick.
    requests: f64,
}

impl Weigher {
    pub(super) fn new(settings: WeigherSettings) -> Self {
        let fleet = Arc::new(Fleet::new(&settings.adaptive));
        Self {
            roster: Roster::new(settings.default_port, fleet.clone()),
            fleet,
            settings,
            trust: Trust::default(),
            sharing: Sharing::default(),
            subset: Subset::default(),
            leaves_some_out: false,
            reporting: 0,
            scale: Scale::default(),
            settled_version: None,
            rests_until: None,
            last_tick: None,
            last_call: None,
            ticks_after_stop: 0,
            ticks_without_probe: 0,
            forgiven_rate: None,
        }
    }

    /// Works by other settings from now on, with what it knows of the nodes.
    pub(super) fn change(&mut self, settings: WeigherSettings, now: Instant) {
        self.fleet.change(&settings.adaptive);
        self.roster.set_default_port(settings.default_port, now);
        self.settled_version = None;
        self.scale.forget_zone();
        self.settings = settings;
    }

    pub(super) fn set_overrides(&mut self, overrides: &HashMap<String, NodeOverride>) {
        self.roster.set_overrides(overrides);
    }

    pub(super) fn override_of(&self, id: &str) -> Option<NodeOverride> {
        self.roster.get(id)?.said()
    }

    pub(super) fn set_checks(&mut self, panic_threshold: Option<f64>) {
        self.roster.set_checks(panic_threshold);
    }

    pub(super) fn set_checked(&mut self, node: &Node, is_well: bool) -> Option<bool> {
        self.roster.set_checked(node, is_well)
    }

    /// Whether health checks find so few nodes well that all are used.
    pub(super) fn is_panicking(&self) -> bool {
        let has_down = || {
            self.roster
                .active()
                .any(|it| self.roster.checked(it) == Checked::Down)
        };
        self.roster.gate() == Gate::Open && has_down()
    }

    /// Requests in flight at the nodes that are not used.
    pub(super) fn unused_in_flight(&self) -> Vec<(Arc<Node>, u32)> {
        let is_used = self.roster.is_used();
        let unused = self.roster.registrations().iter().filter(|it| !is_used(it));
        let in_flight = unused.map(|it| (it.node().clone(), it.endpoint.in_flight()));
        in_flight.filter(|(_, count)| *count > 0).collect()
    }

    /// What is learned of the backends, for another process.
    pub(super) fn learned(&self, now: Instant) -> Learned {
        let all = self.roster.registrations().iter();
        Learned {
            backends: all
                .filter_map(|registration| registration.learned(now))
                .collect(),
        }
    }

    /// Takes over what another process had learned `passed` ago; takes effect with the next
    /// [`settle`](Self::settle).
    pub(super) fn teach(&mut self, learned: &Learned, passed: Duration, now: Instant) {
        let lessons = Lessons::new(learned, &self.settings.adaptive, passed, now);
        self.roster.teach(lessons);
    }

    /// Of too many that are ejected only because a former process says so, those with the best success rates are used.
    fn limit_ejected_by_predecessor(&self) {
        let all = self.roster.used().count();
        let ejected = self
            .roster
            .used()
            .filter(|it| it.is_ejected_by_predecessor());
        let mut ejected: Vec<_> = ejected.map(|it| &it.endpoint).collect();
        let too_many = too_many_ejected(ejected.len(), all);
        ejected.sort_by(|one, other| other.success().total_cmp(&one.success()));
        for endpoint in ejected.into_iter().take(too_many) {
            endpoint.readmit_at_least(READMITTED_SUCCESS);
        }
    }

    /// Another number after each change of anything else than loads.
    #[cfg(feature = "pingora")]
    pub(super) fn version(&self) -> u64 {
        self.roster.version()
    }

    pub(super) fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    /// Replaces everything by these nodes; takes effect with the next [`settle`](Self::settle).
    pub(super) fn reset<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) {
        self.roster.reset(nodes, now);
    }

    /// Takes over a node that is new or has written its entry again; takes effect with the next
    /// [`settle`](Self::settle).
    pub(super) fn insert(&mut self, node: &Arc<Node>, now: Instant) {
        self.roster.insert(node, now);
    }

    /// Removes a node; requests avoid it from now on.
    pub(super) fn remove(&mut self, id: &str, now: Instant) {
        self.roster.remove(id, now);
    }

    /// Computes the weights that follow from the changes so far. Costs time in proportion to the number of nodes,
    /// unless there are many of them and only some have reported something.
    pub(super) fn settle(&mut self, policy: &ActivePolicy, now: Instant) -> Settled {
        self.rests_until = None;
        self.roster.start_slowly(now);
        self.scale.find_zone(&self.settings.zone, &self.roster);
        let reporting = self.learn_from_reports(now);
        let is_few = reporting.len() * FEW_OF < self.roster.registrations().len();
        if self.take_changed() {
            self.limit_ejected_by_predecessor();
            self.choose_subset(policy);
            self.measure_working();
        } else if is_few && self.roster.registrations().len() >= WEIGHED_ALONE_FROM {
            let (settings, roster) = (&self.settings, &self.roster);
            let weighed = self
                .scale
                .weigh_some(settings, policy, roster, &reporting, now);
            if !self.scale.has_moved() {
                return Settled::Only(weighed);
            }
        }
        self.scale.weigh(&self.settings, policy, &self.roster, now);
        Settled::All
    }

    /// The same, and takes over what time and requests have brought; to be called once a second. Returns whether
    /// there was anything to do; if there has been nothing for some time, this costs next to nothing.
    pub(super) fn tick(&mut self, policy: &ActivePolicy, now: Instant) -> bool {
        let late = self.last_call.replace(now).unwrap_or(now) + LATE;
        self.ticks_after_stop = match now > late {
            // What was in flight meanwhile may end only after this tick.
            true => 2,
            false => self.ticks_after_stop.saturating_sub(1),
        };
        self.roster.remove_expired(now);
        let has_news = self.fleet.take_news()
            || self.roster.has_new_loads()
            || self.settled_version != Some(self.roster.version());
        if !has_news && self.rests_until.is_some_and(|until| now < until) {
            return false;
        }
        let last = self.last_tick.replace(now).unwrap_or(now);
        let passed = now.saturating_duration_since(last);
        self.find_refusing();
        self.roster.tick(now);
        self.roster.start_slowly(now);
        self.scale.find_zone(&self.settings.zone, &self.roster);
        self.learn_from_reports(now);
        self.learn_from_requests(now, passed);
        self.decide_trials(policy, now);
        self.choose_subset(policy);
        self.scale.measure_zones(&self.settings, &self.roster);
        if self.take_changed() {
            self.limit_ejected_by_predecessor();
        }
        let is_still = self.scale.weigh(&self.settings, policy, &self.roster, now);
        self.rests_until = match is_still && !has_news {
            true => self.find_rest(now),
            false => None,
        };
        true
    }

    /// Whether anything has changed but loads that weights do not follow yet; they will now.
    fn take_changed(&mut self) -> bool {
        let version = Some(self.roster.version());
        std::mem::replace(&mut self.settled_version, version) != version
    }

    /// Until when nothing will change by itself.
    fn find_rest(&self, now: Instant) -> Option<Instant> {
        let adaptive = &self.settings.adaptive;
        let mut until = now.checked_add(LONGEST_REST)?;
        for registration in self.roster.used() {
            let controller = &registration.controller;
            let is_starting = controller.slow_start(adaptive, now) < 1.0;
            let is_fading = controller.is_fading(self.settings.counts_requests);
            let is_unread = registration.has_unread_entry;
            if registration.endpoint.is_ejected() || is_starting || is_fading || is_unread {
                return None;
            }
            let stale_at = controller.stale_at(adaptive);
            until = stale_at.map_or(until, |stale_at| until.min(stale_at));
        }
        (!self.fleet.some_report_in_flight()).then_some(until)
    }

    /// Gives the controllers the reports that are new. Returns whose they are, by their positions.
    fn learn_from_reports(&mut self, now: Instant) -> Vec<u32> {
        let adaptive = &self.settings.adaptive;
        let new = self.roster.take_new_loads();
        let mean = self.roster.mean_load();
        for at in &new {
            let at = *at as usize;
            let Some(registration) = self.roster.registrations().get(at) else {
                continue;
            };
            if registration.has_new_load {
                let success = registration.endpoint.success();
                let load = adaptive.load(registration.believed_load(), &mean, success);
                self.roster.set_controlled_load(at, load, now);
            }
        }
        let mean = *self.roster.controlled_load();
        let backends = match self.leaves_some_out {
            true => self.reporting,
            false => mean.count(),
        };
        let is_used = self.roster.is_used();
        let registrations = self.roster.registrations_mut();
        for at in &new {
            let Some(registration) = registrations.get_mut(*at as usize) else {
                continue;
            };
            let is_new = std::mem::take(&mut registration.has_new_load);
            // With a single report there is nothing to compare it with, and without traffic a low load says nothing.
            let is_outside = registration.endpoint.is_outside();
            if !is_new || mean.count() < 2 || is_outside || !is_used(registration) {
                continue;
            }
            let was_used = std::mem::take(&mut registration.was_used);
            let endpoint = &registration.endpoint;
            let context = ReportContext {
                success: endpoint.success(),
                is_idle: self.settings.counts_requests
                    && !was_used
                    && !endpoint.is_active_since(registration.outcomes_at_tick),
                backends,
            };
            let trust = &mut self.trust;
            let controller = &mut registration.controller;
            controller.correct_by_load(adaptive, trust, &mean, context);
        }
        new
    }

    /// Takes over what requests have found out since the last tick, which was `passed` ago.
    fn learn_from_requests(&mut self, now: Instant, passed: Duration) {
        let adaptive = &self.settings.adaptive;
        let mut summary = TickSummary::default();
        let shared = self.sharing.level(self.scale.calm_of_half());
        let was_stopped = self.ticks_after_stop > 0;
        let samples = match was_stopped {
            true => 1,
            false => adaptive.latency_samples_at(shared),
        };
        for registration in self.roster.registrations_mut() {
            let outcomes = registration.outcomes_at_tick;
            let is_active = registration.endpoint.is_active_since(outcomes);
            registration.is_active = is_active;
            summary.requests += f64::from(registration.count_ended());
            if is_active {
                registration.set_used(now);
            }
            let endpoint = &registration.endpoint;
            let controller = &mut registration.controller;
            controller.age(adaptive, now, passed);
            if registration.is_refusing {
                controller.set_load(None, now);
            }
            if is_active || !self.settings.counts_requests {
                registration.was_used = true;
            } else {
                controller.forget_a_part(adaptive, passed);
            }
            let latencies = endpoint.take_latencies(samples);
            controller.set_latencies(latencies.filter(|_| !was_stopped));
            registration.outcomes_at_tick = endpoint.outcomes();
            if registration.takes_traffic() {
                let controller = &registration.controller;
                summary.add(&registration.endpoint, controller, is_active, now);
            }
        }
        // Without those that have just become stale.
        self.roster.replace_controlled_load(summary.loads);
        for registration in self.roster.registrations_mut() {
            if registration.takes_traffic() && !registration.endpoint.is_outside() {
                let controller = &mut registration.controller;
                controller.center(summary.metrics.value());
                controller.correct_by_latency(adaptive, shared, &summary.excess_latency);
            }
        }
        self.sharing.tick(&summary.in_flight);
        self.reporting = summary.metrics.count();
        self.settle_subset(summary.all_in_flight, now);
        self.fleet.set_tunnels(summary.has_tunnels);
        if let Some(usual) = lower_median(&mut summary.latencies) {
            self.fleet.lingering().set_usual_latency(usual);
        }
        self.fleet.lingering().release(now);
        if !summary.reports_in_flight {
            self.fleet.clear_in_flight_reports();
        }
        // Those that get no requests cannot report.
        if summary.active > 0 {
            let most_report = summary.active_reporting * 2 > summary.active;
            self.fleet.set_most_report_in_flight(most_report);
        }
        self.judge_outcomes(summary.requests);
    }

    /// One backend for each address, including those that drain or have a static weight of 0.
    #[cfg(feature = "pingora")]
    pub(super) fn holders(&self) -> Vec<Holder> {
        self.roster.holders().collect()
    }

    /// The backends that take traffic.
    pub(super) fn active_endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> + Clone {
        self.roster.used().map(|it| &it.endpoint)
    }

    /// How many metrics were refused so far.
    pub(super) fn refused(&self) -> u64 {
        self.roster.refused() + self.fleet.refused()
    }
}

impl TickSummary {
    fn add(&mut self, endpoint: &Endpoint, controller: &Controller, is_active: bool, now: Instant) {
        let is_reporting = endpoint.reports_in_flight(IN_FLIGHT_REPORT_VALID, now);
        self.reports_in_flight |= is_reporting;
        self.active += usize::from(is_active);
        self.active_reporting += usize::from(is_active && is_reporting);
        let is_outside = endpoint.is_outside();
        if let Some(load) = controller.load() {
            self.loads.add(load, 1.0);
            if !is_outside {
                self.metrics.add(controller.metrics(), 1.0);
            }
        }
        let busy = f64::from(endpoint.busy());
        self.all_in_flight += busy;
        if !is_outside {
            self.in_flight.add(busy, 1.0);
        }
        self.has_tunnels |= endpoint.state().tunnels() > 0;
        self.latencies.extend(controller.new_mean_latency());
        if let Some(excess) = controller.excess_latency()
            && !is_outside
        {
            self.excess_latency.add(excess, endpoint.share().get());
        }
    }
}

/// The lower one of the two in the middle, if their number is even.
fn lower_median(values: &mut [f64]) -> Option<f64> {
    let middle = values.len().checked_sub(1)? / 2;
    Some(*values.select_nth_unstable_by(middle, f64::total_cmp).1)
}

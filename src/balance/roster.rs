//! The registrations of a group, and which of them holds which address. Pure.

mod used;

use std::cell::Cell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use super::checked::Gate;
use super::departed::Departed;
use super::fleet::Fleet;
use super::index::Index;
use super::learned::Lessons;
use super::load::Load;
use super::mean::Mean;
use super::registration::Registration;
use super::successors::Successors;
use super::totals::Totals;
use crate::node::Node;
use crate::view::NodeOverride;

/// All registrations of a group. Of several registrations at one address, the one with the strongest
/// [claim](Registration::claim) holds it: that process is there, and the others are leases that have
/// not expired yet. The others are *shadowed*.
#[derive(Debug)]
pub(super) struct Roster {
    default_port: u16,
    fleet: Arc<Fleet>,
    /// What operators say, by node id.
    overrides: HashMap<String, NodeOverride>,
    /// The panic threshold, if there are health checks.
    checks: Option<f64>,
    registrations: Vec<Registration>,
    /// The ids of nodes that are used from now on, after they were not.
    to_start: Vec<String>,
    index: Index,
    /// How many registrations are shadowed, for each address with any.
    shadowed_at: HashMap<SocketAddr, u32, Xxh3DefaultBuilder>,
    totals: Totals,
    /// Positions of registrations with a new load. Some may have moved since.
    with_new_load: Vec<u32>,
    /// Counts the changes of anything else than loads.
    version: u64,
    /// What was found of the gate at some version.
    gate: Cell<Option<(u64, Gate)>>,
    /// The number of complete views so far.
    views: u32,
    /// Whether there have been nodes: the first ones are not new.
    is_started: bool,
    departed: Departed,
    successors: Successors,
    lessons: Lessons,
    refused: u64,
}

impl Roster {
    pub(super) fn new(default_port: u16, fleet: Arc<Fleet>) -> Self {
        Self {
            default_port,
            fleet,
            overrides: HashMap::new(),
            checks: None,
            registrations: Vec::new(),
            to_start: Vec::new(),
            index: Index::default(),
            shadowed_at: HashMap::default(),
            totals: Totals::default(),
            with_new_load: Vec::new(),
            version: 0,
            gate: Cell::new(None),
            views: 0,
            is_started: false,
            departed: Departed::default(),
            successors: Successors::default(),
            lessons: Lessons::default(),
            refused: 0,
        }
    }

    pub(super) fn registrations(&self) -> &[Registration] {
        &self.registrations
    }

    /// Another number after each change of anything else than loads: which registrations take traffic, with which
    /// static weights, in which zones.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Whether there are loads that weights do not follow yet.
    pub(super) fn has_new_loads(&self) -> bool {
        !self.with_new_load.is_empty()
    }

    pub(super) fn registrations_mut(&mut self) -> &mut [Registration] {
        &mut self.registrations
    }

    /// The registrations that take traffic.
    pub(super) fn active(&self) -> impl Iterator<Item = &Registration> + Clone {
        let all = self.registrations.iter();
        all.filter(|registration| registration.takes_traffic())
    }

    /// Takes over what operators say of nodes.
    pub(super) fn set_overrides(&mut self, overrides: &HashMap<String, NodeOverride>) {
        self.overrides.clone_from(overrides);
        for registration in &mut self.registrations {
            let said = self.overrides.get(&registration.node().id);
            if said.is_some() || registration.said().is_some() {
                self.version += 1;
                self.totals.remove(registration);
                let took_traffic = registration.takes_traffic();
                registration.set_override(said);
                if !took_traffic && registration.takes_traffic() && registration.is_unused() {
                    self.to_start.push(registration.node().id.clone());
                }
                self.totals.add(registration);
            }
        }
    }

    pub(super) fn get(&self, id: &str) -> Option<&Registration> {
        let at = self.index.position_of(&self.registrations, id)?;
        self.registrations.get(at)
    }

    /// The mean load of the registrations that take traffic.
    pub(super) fn mean_load(&self) -> Load {
        self.totals.loads.mean()
    }

    /// The mean of the loads that the controllers work with.
    pub(super) fn controlled_load(&self) -> &Mean {
        &self.totals.controlled
    }

    /// Whether some backend says how many requests it has in flight.
    pub(super) fn some_report_in_flight(&self) -> bool {
        self.fleet.some_report_in_flight()
    }

    /// How many metrics in entries were refused so far.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Replaces everything by these nodes. Registrations that are not among them are removed.
    pub(super) fn reset<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) {
        self.views = self.views.wrapping_add(1);
        let nodes: Vec<_> = nodes.into_iter().collect();
        // Where all are new, nobody is there who could serve until they have been checked.
        let is_known = |node: &&Arc<Node>| {
            let at = self.index.position_of(&self.registrations, &node.id);
            let addr = node.addr(self.default_port);
            at.is_some_and(|at| self.registrations[at].is_same_process(node, addr))
        };
        let joined_at = nodes.iter().any(is_known).then_some(now);
        let more = nodes.len().saturating_sub(self.registrations.len());
        self.registrations.reserve_exact(more);
        for node in nodes {
            self.upsert(node, joined_at, now);
        }
        for at in (0..self.registrations.len()).rev() {
            if self.registrations[at].last_view != self.views {
                self.leave_at(at, now);
            }
        }
        // The group may have been much larger before.
        self.registrations.shrink_to_fit();
        self.is_started |= !self.registrations.is_empty();
    }

    /// Takes over a node that is new or has written its entry again. The cost does not depend on the
    /// number of nodes.
    pub(super) fn insert(&mut self, node: &Arc<Node>, now: Instant) {
        let joined_at = self.is_started.then_some(now);
        self.upsert(node, joined_at, now);
        self.is_started = true;
    }

    /// Removes a node. Requests avoid it from now on, before it is removed from the table. If its
    /// process returns soon, what was learned about it still holds.
    pub(super) fn remove(&mut self, id: &str, now: Instant) {
        if let Some(at) = self.index.position_of(&self.registrations, id) {
            self.leave_at(at, now);
        }
    }

    fn leave_at(&mut self, at: usize, now: Instant) {
        let success = self.registrations[at].endpoint.success();
        self.registrations[at].endpoint.retire();
        let gone = self.remove_at(at, now);
        self.departed.keep(gone, success, now);
    }

    /// Takes over what a former process has learned of nodes that are there, or will be soon.
    pub(super) fn teach(&mut self, mut lessons: Lessons) {
        for registration in &mut self.registrations {
            if let Some((taught, lesson)) = lessons.take(registration.node(), registration.addr()) {
                registration.learn(taught, &lesson);
            }
        }
        self.lessons = lessons;
        self.version += 1;
    }

    /// Moves the nodes that registered no port.
    pub(super) fn set_default_port(&mut self, port: u16, now: Instant) {
        if std::mem::replace(&mut self.default_port, port) == port {
            return;
        }
        let all = self.registrations.iter();
        let moved = all.filter(|it| it.node().addr(port) != it.addr());
        for node in moved.map(|it| it.node().clone()).collect::<Vec<_>>() {
            self.upsert(&node, None, now);
        }
    }

    fn upsert(&mut self, node: &Arc<Node>, joined_at: Option<Instant>, now: Instant) {
        let addr = node.addr(self.default_port);
        let mut claim_before = None;
        let at = match self.index.position_of(&self.registrations, &node.id) {
            Some(at) if self.registrations[at].is_same_process(node, addr) => {
                // Each report counts once, however often the group changes in the meantime.
                if !Arc::ptr_eq(self.registrations[at].node(), node) {
                    claim_before = Some(self.registrations[at].claim());
                    self.update_at(at, node, now);
                }
                at
            }
            predecessor => self.add(node, addr, predecessor, joined_at, now),
        };
        let registration = &mut self.registrations[at];
        registration.last_view = self.views;
        let is_weakened = claim_before.is_some_and(|before| registration.claim() < before);
        self.claim_address(at, is_weakened);
    }

    fn update_at(&mut self, at: usize, node: &Arc<Node>, now: Instant) {
        let registration = &mut self.registrations[at];
        self.totals.remove(registration);
        let (use_before, zone_before) = (registration.usage(), registration.node().zone.clone());
        self.refused += u64::from(registration.update(node, now));
        registration.set_override(self.overrides.get(&node.id));
        self.totals.add(registration);
        if !use_before.0 && registration.takes_traffic() && registration.is_unused() {
            registration.controller.start(now);
        }
        let is_used_alike = registration.usage() == use_before && node.zone == zone_before;
        self.version += u64::from(!is_used_alike);
        if registration.has_new_load {
            self.with_new_load.push(at as u32);
        }
    }

    /// Adds a registration, in the place of `predecessor`: another process with the same id, or the
    /// same one at another address. Returns its position.
    fn add(
        &mut self,
        node: &Arc<Node>,
        addr: SocketAddr,
        predecessor: Option<usize>,
        joined_at: Option<Instant>,
        now: Instant,
    ) -> usize {
        if let Some(predecessor) = predecessor {
            let former = &self.registrations[predecessor];
            if former.addr() != addr {
                // It is in the table until the next one.
                former.endpoint.retire();
            }
            self.remove_at(predecessor, now);
        }
        let mut registration = match self.departed.take(node, addr, now) {
            Some(mut registration) => {
                self.refused += u64::from(registration.update(node, now));
                registration.is_shadowed = false;
                // Whether it is in the subset is decided anew.
                registration.endpoint.set_subset_part(1.0, 1.0);
                registration.has_new_load = true;
                registration
            }
            None => {
                let (mut registration, refused) =
                    Registration::new(node, addr, &self.fleet, joined_at, now);
                self.refused += u64::from(refused);
                if let Some((taught, lesson)) = self.lessons.take(node, addr) {
                    registration.learn(taught, &lesson);
                } else if let Some(factor) = self.successors.get(node, now) {
                    registration.controller.begin_with(factor);
                }
                registration
            }
        };
        registration.set_override(self.overrides.get(&node.id));
        self.totals.add(&registration);
        let at = self.registrations.len();
        self.version += 1;
        self.registrations.push(registration);
        self.index.insert_id(&self.registrations, at);
        self.with_new_load.push(at as u32);
        at
    }

    pub(super) fn successors(&mut self) -> &mut Successors {
        &mut self.successors
    }

    fn remove_at(&mut self, at: usize, now: Instant) -> Registration {
        self.version += 1;
        self.index.remove_id(&self.registrations, at);
        let addr = self.registrations[at].addr();
        let is_holder = self.index.holder(&self.registrations, addr) == Some(at);
        if is_holder {
            self.index.release(&self.registrations, at);
        }
        let removed = self.registrations.swap_remove(at);
        self.totals.remove(&removed);
        let factor = removed.learned_factor();
        self.successors.keep(removed.node(), factor, now);
        if removed.is_shadowed {
            self.count_shadowed(addr, false);
        }
        if at < self.registrations.len() {
            let from = self.registrations.len();
            self.index.moved(&self.registrations, from, at);
            if self.registrations[at].has_new_load {
                self.with_new_load.push(at as u32);
            }
        }
        if is_holder && let Some(heir) = self.heir(addr) {
            self.set_shadowed(heir, false);
            self.index.hold(&self.registrations, heir);
        }
        removed
    }

    /// The registration with the strongest claim among those that are shadowed at an address.
    fn heir(&self, addr: SocketAddr) -> Option<usize> {
        if !self.shadowed_at.contains_key(&addr) {
            return None;
        }
        let shadowed = self.registrations.iter().enumerate();
        let heir = shadowed
            .filter(|(_, registration)| registration.is_shadowed && registration.addr() == addr)
            .max_by_key(|(_, registration)| registration.claim())?;
        Some(heir.0)
    }

    /// Gives a registration its address, unless another one has a stronger claim. `is_weakened`
    /// means that its own claim was stronger before.
    fn claim_address(&mut self, at: usize, is_weakened: bool) {
        let addr = self.registrations[at].addr();
        let claim = |at: usize| self.registrations[at].claim();
        match self.index.holder(&self.registrations, addr) {
            None => self.index.hold(&self.registrations, at),
            Some(holder) if holder == at => {
                let heir = if is_weakened { self.heir(addr) } else { None };
                if let Some(heir) = heir.filter(|heir| claim(*heir) > claim(at)) {
                    self.hand_over(at, heir);
                }
            }
            Some(holder) if claim(holder) < claim(at) => self.hand_over(holder, at),
            Some(_) => self.set_shadowed(at, true),
        }
    }

    fn hand_over(&mut self, holder: usize, heir: usize) {
        self.index.release(&self.registrations, holder);
        self.set_shadowed(holder, true);
        self.set_shadowed(heir, false);
        self.index.hold(&self.registrations, heir);
    }

    fn set_shadowed(&mut self, at: usize, is_shadowed: bool) {
        let registration = &mut self.registrations[at];
        if registration.is_shadowed == is_shadowed {
            return;
        }
        self.version += 1;
        self.totals.remove(registration);
        registration.is_shadowed = is_shadowed;
        self.totals.add(registration);
        let addr = registration.addr();
        self.count_shadowed(addr, is_shadowed);
    }

    fn count_shadowed(&mut self, addr: SocketAddr, one_more: bool) {
        let count = self.shadowed_at.entry(addr).or_default();
        if one_more {
            *count += 1;
        } else {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.shadowed_at.remove(&addr);
            }
        }
    }

    /// Forgets processes that left long ago.
    pub(super) fn remove_expired(&mut self, now: Instant) {
        self.departed.remove_expired(now);
        self.successors.remove_expired(now);
        self.lessons.tick(now);
    }

    /// Takes over what responses have reported since the last tick.
    pub(super) fn tick(&mut self, now: Instant) {
        // Added up from zero: sums that are only ever changed would drift.
        self.totals = Totals::default();
        for (at, registration) in self.registrations.iter_mut().enumerate() {
            if let Some(report) = registration.endpoint.take_load_report() {
                registration.update_from_response(report, now);
            }
            registration.update_from_entry(now);
            if registration.has_new_load {
                self.with_new_load.push(at as u32);
            }
            self.totals.add(registration);
        }
    }

    /// The positions of registrations with a new load; some may be out of date.
    pub(super) fn take_new_loads(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.with_new_load)
    }

    /// Gives a controller the load that it works with from now on.
    pub(super) fn set_controlled_load(&mut self, at: usize, load: Option<f64>, now: Instant) {
        if let Some(registration) = self.registrations.get_mut(at) {
            self.totals.remove(registration);
            registration.controller.set_load(load, now);
            self.totals.add(registration);
        }
    }

    /// Replaces the mean of the loads that the controllers work with, after some became stale.
    pub(super) fn replace_controlled_load(&mut self, mean: Mean) {
        self.totals.controlled = mean;
    }
}

#[cfg(test)]
mod tests;

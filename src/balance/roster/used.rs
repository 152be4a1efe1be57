//! Which registrations are used: what health checks say of them, and when too few are well.

use std::time::Instant;

use super::Roster;
use crate::balance::checked::{Checked, Gate, gate};
#[cfg(any(test, feature = "pingora"))]
use crate::balance::endpoint::Holder;
use crate::balance::registration::Registration;
use crate::node::Node;

/// The panic threshold without health checks, for nodes that say themselves that they cannot serve.
const PANIC_THRESHOLD: f64 = 0.5;

impl Roster {
    /// Whether there are health checks, and from which part of nodes that are well on these are used alone.
    pub(in crate::balance) fn set_checks(&mut self, panic_threshold: Option<f64>) {
        let is_new = self.checks.is_none() && panic_threshold.is_some();
        self.version += u64::from(self.checks != panic_threshold);
        self.checks = panic_threshold;
        if is_new {
            // They are used until they have been checked, as the first nodes of all are.
            for registration in &mut self.registrations {
                registration.checked = Checked::Well;
            }
        }
    }

    /// Takes over what a health check has found out. Returns whether that is new; `None` if this process is not
    /// known.
    pub(in crate::balance) fn set_checked(&mut self, node: &Node, is_well: bool) -> Option<bool> {
        let addr = node.addr(self.default_port);
        let at = self.index.position_of(&self.registrations, &node.id)?;
        if !self.registrations[at].is_same_process(node, addr) {
            return None;
        }
        let checked = match is_well {
            true => Checked::Well,
            false => Checked::Down,
        };
        if self.registrations[at].checked == checked {
            return Some(false);
        }
        if is_well && !self.is_used()(&self.registrations[at]) {
            // It got nothing until now: what it does first may be slow.
            self.to_start.push(node.id.clone());
        }
        self.registrations[at].checked = checked;
        self.version += 1;
        Some(true)
    }

    /// Those that were found to be well since the last call start slowly from now on.
    pub(in crate::balance) fn start_slowly(&mut self, now: Instant) {
        for id in std::mem::take(&mut self.to_start) {
            if let Some(at) = self.index.position_of(&self.registrations, &id) {
                self.registrations[at].controller.start(now);
            }
        }
    }

    /// Which of the registrations that take traffic are used. Looks at all of them only after a change.
    pub(in crate::balance) fn gate(&self) -> Gate {
        if let Some((version, gate)) = self.gate.get()
            && version == self.version
        {
            return gate;
        }
        let threshold = self.checks.unwrap_or(PANIC_THRESHOLD);
        let gate = gate(self.active().map(|it| self.checked(it)), threshold);
        self.gate.set(Some((self.version, gate)));
        gate
    }

    /// What is known of the health of a registration.
    pub(in crate::balance) fn checked(&self, registration: &Registration) -> Checked {
        registration.checked(self.checks.is_some())
    }

    /// The registrations that are used: they take traffic, and health checks say nothing against it.
    pub(in crate::balance) fn used(&self) -> impl Iterator<Item = &Registration> + Clone {
        let is_used = self.is_used();
        self.registrations.iter().filter(move |it| is_used(it))
    }

    /// Which registrations are used, as of now.
    pub(in crate::balance) fn is_used(&self) -> impl Fn(&Registration) -> bool + Clone + use<> {
        let (gate, has_checks) = (self.gate(), self.checks.is_some());
        let is_well = move |it: &Registration| it.checked(has_checks) == Checked::Well;
        move |it| it.takes_traffic() && (gate == Gate::Open || is_well(it))
    }

    /// One backend for each address, including those that drain or have a static weight of 0.
    #[cfg(any(test, feature = "pingora"))]
    pub(in crate::balance) fn holders(&self) -> impl Iterator<Item = Holder> {
        let is_used = self.is_used();
        let all = self.registrations.iter();
        all.filter(|registration| !registration.is_shadowed)
            .map(move |registration| Holder {
                endpoint: registration.endpoint.clone(),
                is_used: is_used(registration),
                static_weight: registration.static_weight().get(),
            })
    }
}

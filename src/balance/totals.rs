//! Sums over registrations. Pure.

use super::load::LoadSum;
use super::mean::Mean;
use super::registration::Registration;

/// Sums over the registrations that take traffic, kept up to date change by change, so that a change
/// costs the same whatever the number of nodes.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) loads: LoadSum,
    /// Of the loads that the controllers work with.
    pub(super) controlled: Mean,
}

impl Totals {
    pub(super) fn add(&mut self, registration: &Registration) {
        if registration.takes_traffic() {
            self.loads.add(registration.believed_load());
            if let Some(load) = registration.controller.load() {
                self.controlled.add(load, 1.0);
            }
        }
    }

    pub(super) fn remove(&mut self, registration: &Registration) {
        if registration.takes_traffic() {
            self.loads.remove(registration.believed_load());
            if let Some(load) = registration.controller.load() {
                self.controlled.remove(load);
            }
        }
    }
}

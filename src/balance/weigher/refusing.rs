//! Which backends answer without doing their work, and have little to do because of that.

use super::Weigher;
use crate::balance::mean::Mean;

/// Of so many backends one may do its work for more of its requests than is usual.
const BEST_OF: usize = 5;
/// By how much the part of the requests that a backend refuses is above the usual one, at least, if it is the backend
/// and not chance.
const LEAST_EXCESS: f32 = 0.3;
/// The same in standard deviations.
const EXCESS_DEVIATIONS: f32 = 4.0;

impl Weigher {
    /// Finds those whose reports of a low load are not to be believed. To be called before sums of loads are formed.
    pub(super) fn find_refusing(&mut self) {
        // How others fare now, of which this process uses none, it does not know.
        let known = || self.roster.used().filter(|it| !it.endpoint.is_outside());
        let tried = known().filter(|it| it.was_ever_used());
        let mut parts: Vec<f32> = tried.map(|it| it.endpoint.refusing()).collect();
        let is_any = parts.iter().any(|part| *part > 0.0);
        // Not the lowest one of many, which is low by chance.
        let usual = match parts.len().checked_sub(1) {
            Some(last) if is_any => {
                let place = last / BEST_OF;
                *parts.select_nth_unstable_by(place, f32::total_cmp).1
            }
            _ => 0.0,
        };
        self.fleet.set_usual_refusing(usual);
        let excess = (EXCESS_DEVIATIONS * self.fleet.deviation(usual)).max(LEAST_EXCESS);
        let refuses = |part: f32| is_any && part > usual + excess;
        let adaptive = &self.settings.adaptive;
        let mut load_of_others = Mean::default();
        if is_any {
            let others = known().filter(|it| !refuses(it.endpoint.refusing()));
            for load in others.filter_map(|it| adaptive.known_load(it.load())) {
                load_of_others.add(load, 1.0);
            }
        }
        for registration in self.roster.registrations_mut() {
            let known = adaptive.known_load(registration.load());
            let is_refusing = !registration.endpoint.is_outside()
                && refuses(registration.endpoint.refusing())
                && known.is_some_and(|load| load < load_of_others.value());
            // What it has reported counts from now on.
            registration.has_new_load |= registration.is_refusing && !is_refusing;
            registration.is_refusing = is_refusing;
        }
    }
}

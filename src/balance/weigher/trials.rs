//! Which backends are ejected, and which of them the next requests try.

use std::time::{Duration, Instant};

use super::Weigher;
use crate::balance::mean::Mean;
use crate::balance::policy::{ActivePolicy, RoutingPolicy};
use crate::balance::registration::Registration;

/// After this number of ticks for which a probe could not be sent, any request may be one.
const TICKS_WITHOUT_PROBE: u32 = 2;
/// Under a policy that goes by keys, one in so many may be ejected at most, and one in any case. As in Envoy.
const EJECTED_OF_KEYS: u32 = 10;
/// Whether all fail is asked of so many backends at least.
const FEWEST_FAILED: u32 = 3;

impl Weigher {
    /// Takes over what the outcomes since the last tick, of so many requests, say of the backends.
    pub(super) fn judge_outcomes(&mut self, requests: f64) {
        self.forgive_if_all_failed();
        self.compare_success_rates();
        self.ask_for_missed_requests(requests);
    }

    /// Takes over the success rates of the backends that are used.
    fn compare_success_rates(&self) {
        let used = || {
            let used = self.roster.used().map(|it| &it.endpoint);
            used.filter(|endpoint| !endpoint.is_outside())
        };
        // Without any backend all is well: the first one to come has not failed yet.
        let best = used().map(|it| it.success()).reduce(f32::max);
        let best = best.unwrap_or(1.0);
        let working = used().filter(|endpoint| !endpoint.is_ejected());
        let mut rates: Vec<f32> = working.map(|endpoint| endpoint.success()).collect();
        let worst = rates.iter().copied().fold(1.0, f32::min);
        // Of two the better one.
        let middle = rates.len() / 2;
        let median = match rates.is_empty() {
            true => best,
            false => *rates.select_nth_unstable_by(middle, f32::total_cmp).1,
        };
        self.fleet.set_success_rates(best, median, worst);
    }

    /// Forgives what has failed since the last tick if hardly any other has done better in between: then it was
    /// something that they share, such as a database, and not they. Who has failed more often than another one says as
    /// little as who was ejected. How well they have done is judged by what was usual at the last tick.
    fn forgive_if_all_failed(&mut self) {
        let (mut all, mut active, mut better) = (0_u32, 0_u32, 0_u32);
        let mut failed = Vec::new();
        for registration in self.roster.used() {
            let endpoint = &registration.endpoint;
            let (lowest, was_ejected) = endpoint.take_failures();
            let is_poor = self.fleet.is_poor(lowest, self.forgiven_rate);
            let is_better = !endpoint.is_ejected() && !is_poor;
            // Of the others too few requests are known.
            let is_inside = !endpoint.is_outside();
            all += u32::from(is_inside);
            if registration.is_active && is_inside {
                active += 1;
                better += u32::from(is_better);
            }
            // Those that were ejected longer ago have failed by themselves.
            if was_ejected && endpoint.is_ejected() || !endpoint.is_ejected() && !is_better {
                failed.push(endpoint);
            }
        }
        let all_failed = active >= FEWEST_FAILED && active * 2 >= all && better * 10 <= active;
        self.forgiven_rate = None;
        if all_failed && !failed.is_empty() {
            // Not the best rate of them: where a part of all requests fails for some time, chance would make most of
            // them look worse than that.
            let rates = failed.iter().map(|endpoint| endpoint.success());
            let mean = rates.sum::<f32>() / failed.len() as f32;
            for endpoint in failed {
                endpoint.forgive(mean);
            }
            self.forgiven_rate = Some(mean);
        }
    }

    /// Sees to it that backends which work get a request from time to time, when this many of all have ended since the
    /// last tick. Where all are busy with something else, and requests come one after the other, those with the greatest
    /// weights win each comparison; of the others nothing new would be learned.
    fn ask_for_missed_requests(&mut self, requests: f64) {
        if !self.settings.counts_requests {
            return;
        }
        let is_used = self.roster.is_used();
        let is_drawn = |it: &Registration| is_used(it) && !it.endpoint.is_outside();
        let drawn = self.roster.registrations().iter().filter(|it| is_drawn(it));
        let share = |it: &Registration| it.endpoint.subset_share();
        let all: f64 = drawn.map(share).sum();
        for registration in self.roster.registrations_mut() {
            if all > 0.0 && is_drawn(registration) {
                let part = share(registration) / all;
                registration.miss_requests(requests * part);
            }
        }
    }

    /// Which part of all weights belongs to backends that work.
    pub(super) fn measure_working(&self) {
        let (mut of_all, mut of_working) = (0.0, 0.0);
        for registration in self.roster.used() {
            let weight = registration.endpoint.weight().get();
            of_all += weight;
            if !registration.endpoint.is_ejected() {
                of_working += weight;
            }
        }
        let part = match of_working > 0.0 {
            true => of_working / of_all,
            false => 1.0,
        };
        self.fleet.set_working_part(part as f32);
    }

    /// Decides which of the backends that are new or ejected the next requests try.
    pub(super) fn decide_trials(&mut self, policy: &ActivePolicy, now: Instant) {
        let most_pause = Duration::from_millis(self.settings.adaptive.probe_most_ms);
        let (mut is_any_ejected, mut is_any_waiting, mut is_any_probed) = (false, false, false);
        for registration in self.roster.registrations_mut() {
            let endpoint = &registration.endpoint;
            is_any_waiting |= endpoint.is_ejected() && endpoint.is_due();
            is_any_probed |= endpoint.is_ejected() && endpoint.is_probed();
            registration.tick_trial(most_pause, now);
            is_any_ejected |= registration.endpoint.is_ejected();
        }
        self.fleet.set_ejected(is_any_ejected);
        let (mut working, mut ejected) = (Mean::default(), 0);
        for registration in self.roster.used() {
            // After the others, so that it is not compared with what was before it is ejected.
            if !registration.is_active {
                registration.endpoint.eject_if_avoided();
            }
            match registration.endpoint.is_ejected() {
                true => ejected += 1,
                false if !registration.endpoint.is_outside() => {
                    working.add(registration.controller.factor(), 1.0);
                }
                false => {}
            }
        }
        self.measure_working();
        self.roster.successors().set_mean(working.value());
        for registration in self.roster.registrations_mut() {
            registration.hold_weight(&self.settings.adaptive, working.value());
        }
        let count = u32::try_from(working.count()).unwrap_or(u32::MAX);
        // Where keys decide who gets a request, one whose requests all fail moves on from each that is ejected for it.
        let most = match policy.goes_by_keys() {
            true => ((count + ejected) / EJECTED_OF_KEYS)
                .max(1)
                .saturating_sub(ejected),
            false => (count / 2).max(1),
        };
        self.fleet.allow_ejections(most);
        match is_any_waiting && self.fleet.can_probe() {
            true => self.ticks_without_probe = self.ticks_without_probe.saturating_add(1),
            // That requests are as they were before it began, a probe under way does not change.
            false if is_any_probed => {}
            false => self.ticks_without_probe = 0,
        }
        let with_any = self.ticks_without_probe >= TICKS_WITHOUT_PROBE;
        self.fleet.set_probes_with_any(with_any);
    }
}

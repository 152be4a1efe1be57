//! What was learned of backends, in a form that another process can take over. Pure.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::settings::Adaptive;
use crate::node::Node;

/// What is older is not taken over.
const LONGEST: Duration = Duration::from_secs(600);
/// How long it waits for nodes that are not there yet.
const WAITS_FOR: Duration = Duration::from_secs(120);
/// The most backends that are taken over.
const MOST: usize = 100_000;
/// The part of the backends that are taken over as ejected, at most: if what is said is wrong, the others can
/// still carry the load.
const MOST_EJECTED: f64 = 0.5;
/// Longer latencies are none.
const LONGEST_LATENCY: f64 = 3_600.0;

/// What a [`Balancer`](super::Balancer) has learned of its backends by requests and reports: weights, success
/// rates, the lowest latencies, each with its age. It is for the next process, which begins where this one
/// ends: [`Balancer::learned`](super::Balancer::learned) and [`Balancer::teach`](super::Balancer::teach).
/// About 200 bytes for each backend, as JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    pub(super) backends: Vec<LearnedBackend>,
}

impl Learned {
    /// Adds what was learned of others.
    #[cfg(feature = "pingora")]
    pub(crate) fn extend(&mut self, other: Self) {
        self.backends.extend(other.backends);
    }

    /// Of how many backends there is something.
    pub fn len(&self) -> usize {
        self.backends.len()
    }

    /// Whether something was learned in the last `passed`.
    #[cfg(feature = "pingora")]
    pub(crate) fn is_new_since(&self, passed: Duration) -> bool {
        let ages = self.backends.iter().map(|backend| backend.requests_age_ms);
        ages.min()
            .is_some_and(|age| u128::from(age) <= passed.as_millis())
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty()
    }
}

/// What was learned of one backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct LearnedBackend {
    pub(super) id: String,
    pub(super) addr: SocketAddr,
    /// Which process it is of: its run or, if it has none, its incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) run: Option<u64>,
    pub(super) incarnation: i64,
    pub(super) requests_age_ms: u64,
    pub(super) success: f32,
    pub(super) is_ejected: bool,
    #[serde(flatten)]
    pub(super) weight: LearnedWeight,
}

/// What the controllers have come to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct LearnedWeight {
    /// The logarithm of the weight by metrics, and the age of the last report.
    pub(super) metrics: f64,
    pub(super) metrics_age_ms: u64,
    /// The logarithm of the weight by latency, which is as old as the last request.
    pub(super) latency: f64,
    /// In seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lowest_latency: Option<f64>,
    /// For how long it has been there, if it joined later than the balancer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) joined_ms: Option<u64>,
}

pub(super) fn millis_between(earlier: Instant, now: Instant) -> u64 {
    let passed = now.saturating_duration_since(earlier).as_millis();
    u64::try_from(passed).unwrap_or(u64::MAX)
}

/// What of it still holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lesson {
    pub(super) metrics: f64,
    pub(super) latency: f64,
    pub(super) lowest_latency: Option<f64>,
    pub(super) success: f32,
    pub(super) is_ejected: bool,
    pub(super) joined_at: Option<Instant>,
}

impl LearnedBackend {
    pub(super) fn is_of(&self, node: &Node, addr: SocketAddr) -> bool {
        let is_same_run = match node.run() {
            Some(run) => self.run == Some(run),
            None => self.run.is_none() && self.incarnation == node.incarnation(),
        };
        self.addr == addr && is_same_run
    }

    /// The same, some time later.
    pub(super) fn aged(mut self, passed: Duration) -> Self {
        let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        let age = |age: &mut u64| *age = age.saturating_add(passed);
        age(&mut self.requests_age_ms);
        age(&mut self.weight.metrics_age_ms);
        self.weight.joined_ms.as_mut().map(age);
        self
    }

    /// What of it still holds; `None` if nothing does. Whatever it says, nothing is beyond what the settings allow.
    fn lesson(&self, settings: &Adaptive, now: Instant) -> Option<Lesson> {
        let half_life = Duration::from_millis(settings.stale_half_life_ms).as_secs_f64();
        let rest = |millis: u64| match Duration::from_millis(millis) {
            age if age > LONGEST => 0.0,
            age => 0.5_f64.powf(age.as_secs_f64() / half_life),
        };
        let bounded = |log: f64, range: f64| match log.is_finite() {
            true => log.clamp(-range.ln(), range.ln()),
            false => 0.0,
        };
        let (by_reports, by_requests) =
            (rest(self.weight.metrics_age_ms), rest(self.requests_age_ms));
        if by_reports.max(by_requests) == 0.0 {
            return None;
        }
        let success = match self.success.is_finite() {
            true => self.success.clamp(0.0, 1.0),
            false => 1.0,
        };
        let is_latency = |latency: &f64| (0.0..LONGEST_LATENCY).contains(latency) && *latency > 0.0;
        let joined = self.weight.joined_ms.map(Duration::from_millis);
        Some(Lesson {
            metrics: bounded(self.weight.metrics, settings.metrics_range) * by_reports,
            latency: bounded(self.weight.latency, settings.latency_range) * by_requests,
            lowest_latency: self
                .weight
                .lowest_latency
                .filter(is_latency)
                .filter(|_| by_requests > 0.0),
            success: 1.0 - (1.0 - success) * by_requests as f32,
            is_ejected: self.is_ejected && by_requests > 0.0,
            joined_at: joined.and_then(|joined| now.checked_sub(joined)),
        })
    }
}

/// What a former process has learned of a backend, for a third one, until this one knows more.
#[derive(Debug)]
pub(super) struct Taught {
    backend: Box<LearnedBackend>,
    /// When that was taken over.
    since: Instant,
}

impl Taught {
    /// What it has come to.
    pub(super) fn learned(&self, now: Instant) -> LearnedBackend {
        let passed = now.saturating_duration_since(self.since);
        self.backend.as_ref().clone().aged(passed)
    }
}

/// How many of these backends, of which so many were taken over as ejected, have to be used after all.
pub(super) fn too_many_ejected(ejected: usize, all: usize) -> usize {
    ejected.saturating_sub((all as f64 * MOST_EJECTED) as usize)
}

/// What a former process has learned of backends that are not there yet.
#[derive(Debug, Default)]
pub(super) struct Lessons {
    by_id: HashMap<String, (LearnedBackend, Lesson)>,
    /// When this was taken over.
    since: Option<Instant>,
}

impl Lessons {
    /// What still holds of what was written `passed` ago.
    pub(super) fn new(
        learned: &Learned,
        settings: &Adaptive,
        passed: Duration,
        now: Instant,
    ) -> Self {
        let backends = learned.backends.iter().take(MOST);
        let holding = backends.filter_map(|backend| {
            let backend = backend.clone().aged(passed);
            let lesson = backend.lesson(settings, now)?;
            Some((backend.id.clone(), (backend, lesson)))
        });
        Self {
            by_id: holding.collect(),
            since: Some(now),
        }
    }

    /// What was learned of this process.
    pub(super) fn take(&mut self, node: &Node, addr: SocketAddr) -> Option<(Taught, Lesson)> {
        let since = self.since?;
        let (backend, lesson) = self.by_id.remove(&node.id)?;
        let taught = Taught {
            backend: Box::new(backend),
            since,
        };
        taught.backend.is_of(node, addr).then_some((taught, lesson))
    }

    /// Forgets what nobody has come for.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(since) = self.since
            && now.saturating_duration_since(since) > WAITS_FOR
        {
            *self = Self::default();
        }
    }
}

//! Everything that is compared, by name.

use std::time::Instant;

use pingora_etcd::balance::Policy;

use super::known::KnownCapacity;
use super::least::LeastOfAll;
use super::of_two::OfTwo;
use super::oracle::Oracle;
use super::ours::{DropIn, Ours, settings};
use super::prequal::Prequal;
use super::random::Random;
use super::turns::{Turns, grpc_weight, one_minus_load};
use crate::router::Router;
use crate::scenario::Scenario;
use crate::view::View;

/// A router to compare.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterKind {
    Oracle,
    Adaptive { candidates: usize },
    Headroom,
    RoundRobin,
    Random,
    OneMinusLoad,
    GrpcWeighted,
    LeastOfTwo,
    PeakEwma,
    LeastOfAll,
    Prequal,
    KnownCapacity,
    DropIn { is_informed: bool },
}

impl RouterKind {
    pub fn name(self) -> String {
        match self {
            Self::Oracle => "oracle".into(),
            Self::Adaptive { candidates: 5 } => "adaptive".into(),
            Self::Adaptive { candidates } => format!("adaptive, {candidates} candidates"),
            Self::Headroom => "headroom".into(),
            Self::RoundRobin => "round robin".into(),
            Self::Random => "random".into(),
            Self::OneMinusLoad => "1 - load".into(),
            Self::GrpcWeighted => "gRPC weighted round robin".into(),
            Self::LeastOfTwo => "choice of two, in flight".into(),
            Self::PeakEwma => "choice of two, peak EWMA".into(),
            Self::LeastOfAll => "least connections of all".into(),
            Self::Prequal => "probing, Prequal".into(),
            Self::KnownCapacity => "known capacity, own in flight".into(),
            Self::DropIn { is_informed: false } => "drop-in selection".into(),
            Self::DropIn { is_informed: true } => "drop-in selection, with outcomes".into(),
        }
    }

    /// Whether it is one of this crate.
    pub fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Adaptive { .. } | Self::Headroom | Self::DropIn { .. }
        )
    }

    /// Whether it is compared in the largest scenarios, too, which take long.
    pub fn is_for_many(self) -> bool {
        self.is_limited()
            || matches!(
                self,
                Self::Headroom
                    | Self::DropIn { .. }
                    | Self::LeastOfAll
                    | Self::Prequal
                    | Self::KnownCapacity
            )
    }

    /// Whether it can be simulated there. A pick of a stock load balancer takes no time from outside, which it
    /// needs for the age of a report of requests in flight.
    pub fn is_fit_for(self, scenario: &Scenario) -> bool {
        !(scenario.in_flight && self == Self::DropIn { is_informed: true })
    }

    /// Whether it is needed to check a limit.
    pub fn is_limited(self) -> bool {
        matches!(
            self,
            Self::Oracle | Self::Adaptive { candidates: 5 } | Self::LeastOfTwo
        )
    }

    pub fn build(
        self,
        scenario: &Scenario,
        view: &View,
        proxy: usize,
        seed: u64,
        start: Instant,
    ) -> Box<dyn Router> {
        let mut rng = fastrand::Rng::with_seed(seed ^ (proxy as u64) << 32);
        let count = scenario.servers;
        match self {
            Self::Oracle => Box::new(Oracle::new(scenario, view, proxy)),
            Self::Adaptive { candidates } => {
                let settings = settings(scenario).candidates(candidates);
                Box::new(Ours::new(settings, view, start))
            }
            Self::Headroom => {
                let settings = settings(scenario).policy(Policy::Headroom);
                Box::new(Ours::new(settings, view, start))
            }
            Self::RoundRobin => Box::new(Turns::new(count, &mut rng, |_, _| 1.0)),
            Self::Random => Box::new(Random::new(view)),
            Self::OneMinusLoad => Box::new(Turns::new(count, &mut rng, one_minus_load)),
            Self::GrpcWeighted => Box::new(Turns::new(count, &mut rng, grpc_weight)),
            Self::LeastOfTwo => Box::new(OfTwo::new(count, false)),
            Self::PeakEwma => Box::new(OfTwo::new(count, true)),
            Self::LeastOfAll => Box::new(LeastOfAll::new(count)),
            Self::Prequal => Box::new(Prequal::new(count)),
            Self::KnownCapacity => Box::new(KnownCapacity::new(view)),
            Self::DropIn { is_informed } => {
                Box::new(DropIn::new(scenario, is_informed, view, start))
            }
        }
    }
}

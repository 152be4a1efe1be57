//! Building a balancer from its settings.

use std::time::Instant;

use super::balancer::Balancer;
use super::policy::{ActivePolicy, MAX_CANDIDATES, PolicySettings};
use super::scale::WeigherSettings;
use super::settings::{Adaptive, Consistent, Headroom, Policy, Zones};
use super::weigher::Weigher;
use super::zone::ZoneSource;
use crate::error::{ClusterError, in_range};

/// The port of nodes that registered none, by default.
pub(crate) const DEFAULT_PORT: u16 = 80;

/// Builds a [`Balancer`].
#[derive(Debug, Clone)]
pub struct BalancerBuilder {
    policies: PolicySettings,
    zones: Zones,
    zone: ZoneSource,
    default_port: u16,
}

impl Default for BalancerBuilder {
    fn default() -> Self {
        Self {
            policies: PolicySettings::default(),
            zones: Zones::default(),
            zone: ZoneSource::default(),
            default_port: DEFAULT_PORT,
        }
    }
}

impl Balancer {
    /// A builder with every default.
    pub fn builder() -> BalancerBuilder {
        BalancerBuilder::default()
    }

    /// Takes over other settings: policy, coefficients, zones, candidates, default port. What has been learned
    /// of nodes stays, and so do the counts of requests in flight, but for nodes whose address is another one
    /// with another default port. Costs as much as [`publish`](Self::publish).
    ///
    /// ```
    /// use std::time::Instant;
    /// use pingora_etcd::balance::{Balancer, Policy};
    ///
    /// let balancer = Balancer::builder().try_build()?;
    /// let settings = Balancer::builder().policy(Policy::RoundRobin);
    /// balancer.reconfigure(settings, Instant::now())?;
    /// # Ok::<(), pingora_etcd::ClusterError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`try_build`](BalancerBuilder::try_build). Then nothing has changed.
    pub fn reconfigure(&self, settings: BalancerBuilder, now: Instant) -> Result<(), ClusterError> {
        settings.validate()?;
        self.change_to_valid(&settings, now);
        Ok(())
    }
}

impl Balancer {
    /// Takes over settings that are known to be valid.
    pub(crate) fn change_to_valid(&self, settings: &BalancerBuilder, now: Instant) {
        self.change(
            settings.active_policy(),
            settings.weigher_settings(true),
            now,
        );
    }
}

impl BalancerBuilder {
    /// Sets how a backend is chosen. Default: [`Policy::Adaptive`].
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policies.policy = policy;
        self
    }

    /// Sets the coefficients of [`Policy::Headroom`].
    #[must_use]
    pub fn headroom(mut self, headroom: Headroom) -> Self {
        self.policies.headroom = headroom;
        self
    }

    /// Sets the constants of [`Policy::Adaptive`].
    #[must_use]
    pub fn adaptive(mut self, adaptive: Adaptive) -> Self {
        self.policies.adaptive = adaptive;
        self
    }

    /// Sets the constants of [`Policy::Consistent`].
    #[must_use]
    pub fn consistent(mut self, consistent: Consistent) -> Self {
        self.policies.consistent = consistent;
        self
    }

    /// Sets the zone that this balancer is in, as nodes register theirs: backends in it are
    /// preferred. Default: none, all zones are alike. It has no effect on [`Policy::Consistent`],
    /// whose keys stay where they are.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = ZoneSource::Name(zone.into());
        self
    }

    /// Sets the zone to the one that the node with this id registered, for a balancer that runs
    /// beside a node of the group.
    #[must_use]
    pub fn zone_of(mut self, node_id: impl Into<String>) -> Self {
        self.zone = ZoneSource::OfNode(node_id.into());
        self
    }

    /// Sets how much traffic leaves the zone.
    #[must_use]
    pub fn zones(mut self, zones: Zones) -> Self {
        self.zones = zones;
        self
    }

    /// Sets the port of nodes that registered none. Default: 80. Range: 1 to 65,535.
    #[must_use]
    pub fn default_port(mut self, port: u16) -> Self {
        self.default_port = port;
        self
    }

    /// Sets how many backends [`Policy::Adaptive`] and [`Policy::Headroom`] draw to choose from.
    /// Default: 5. Range: 1 to 8; with 1 the weights alone decide.
    #[must_use]
    pub fn candidates(mut self, candidates: usize) -> Self {
        self.policies.candidates = candidates;
        self
    }

    /// Checks everything and builds the balancer, with no backends yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn try_build(self) -> Result<Balancer, ClusterError> {
        self.validate()?;
        Ok(self.build_valid(true))
    }

    /// A balancer with settings that are known to be valid. `counts_requests`: see [`WeigherSettings`].
    pub(crate) fn build_valid(&self, counts_requests: bool) -> Balancer {
        let weigher = Weigher::new(self.weigher_settings(counts_requests));
        Balancer::new(self.active_policy(), weigher, self.default_port)
    }

    pub(crate) fn validate(&self) -> Result<(), ClusterError> {
        self.policies.headroom.validate("headroom")?;
        self.policies.adaptive.validate("adaptive")?;
        self.policies.consistent.validate("consistent")?;
        self.zones.validate("zones")?;
        match &self.zone {
            ZoneSource::Name(zone) if zone.is_empty() => {
                return Err(ClusterError::config("zone", "is empty"));
            }
            ZoneSource::OfNode(id) if id.is_empty() => {
                return Err(ClusterError::config("zone_of", "is empty"));
            }
            _ => {}
        }
        in_range("", "default_port", self.default_port, 1..=u16::MAX)?;
        let candidates = self.policies.candidates;
        in_range("", "candidates", candidates, 1..=MAX_CANDIDATES)
    }

    /// Whether picks are by keys.
    #[cfg(feature = "pingora")]
    pub(crate) fn goes_by_keys(&self) -> bool {
        self.policies.policy == Policy::Consistent
    }

    fn active_policy(&self) -> ActivePolicy {
        ActivePolicy::new(&self.policies)
    }

    pub(super) fn weigher_settings(&self, counts_requests: bool) -> WeigherSettings {
        WeigherSettings {
            adaptive: self.policies.adaptive,
            zones: self.zones,
            zone: self.zone.clone(),
            default_port: self.default_port,
            counts_requests,
        }
    }
}

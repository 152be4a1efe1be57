//! The three kinds of weights, as types, so that they cannot be mixed up.

use crate::validate;

/// A node's static weight, as it registered it: 0 for a node that gets no traffic, 1 for one that
/// registered no weight or an invalid one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BaseWeight(f64);

impl BaseWeight {
    pub(super) fn new(given: Option<f64>) -> Self {
        Self(validate::weight(given))
    }

    pub(super) fn get(self) -> f64 {
        self.0
    }

    /// A part of it.
    pub(super) fn times(self, part: f64) -> Self {
        Self(self.0 * part)
    }

    /// Whether the node may get traffic.
    pub(super) fn allows_traffic(self) -> bool {
        self.0 > 0.0
    }
}

/// How much work a backend can take relative to the others, as its policy sees it now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Weight(f64);

impl Weight {
    pub(super) fn new(weight: f64) -> Self {
        Self(weight)
    }

    pub(super) fn get(self) -> f64 {
        self.0
    }
}

/// A backend's relative chance of being drawn: its weight, reduced while it fails.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share(f64);

impl Share {
    pub(crate) fn new(share: f64) -> Self {
        Self(share)
    }

    pub(crate) fn get(self) -> f64 {
        self.0
    }
}

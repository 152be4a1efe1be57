//! A weighted mean that values can be added to and removed from.

/// A weighted mean.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mean {
    sum: f64,
    total_weight: f64,
    count: usize,
}

impl Mean {
    pub(super) fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.total_weight += weight;
        self.count += 1;
    }

    /// Removes a value that was added with weight 1.
    pub(super) fn remove(&mut self, value: f64) {
        self.sum -= value;
        self.total_weight -= 1.0;
        self.count -= 1;
    }

    /// The number of values.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The mean; 0 if there are no values.
    pub(super) fn value(&self) -> f64 {
        if self.total_weight > 0.0 {
            self.sum / self.total_weight
        } else {
            0.0
        }
    }
}

//! An atomic `f32`.

use std::sync::atomic::{AtomicU32, Ordering};

/// An `f32` that several threads read and write, without any ordering.
#[derive(Debug)]
pub(super) struct AtomicF32(AtomicU32);

impl AtomicF32 {
    pub(super) fn new(value: f32) -> Self {
        Self(AtomicU32::new(value.to_bits()))
    }

    pub(super) fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

//! What is measured during a run.

use crate::figures::{Figures, quantile};

/// How many of some requests went to certain servers.
#[derive(Default)]
pub struct Part {
    all: u64,
    there: u64,
}

impl Part {
    pub fn add(&mut self, is_there: bool) {
        self.all += 1;
        self.there += u64::from(is_there);
    }

    fn get(&self) -> f64 {
        self.there as f64 / self.all.max(1) as f64
    }
}

/// What is measured during a run.
pub struct Measurements {
    pub latencies: Vec<f32>,
    /// Latencies of the last server in its first 30 s.
    pub joined: Vec<f32>,
    pub requests: u64,
    /// How many servers fail at a time.
    pub faulty: u64,
    /// While some server fails, before that, and after they have worked again for some time.
    pub while_faulty: Part,
    pub before_faults: Part,
    pub after_faults: Part,
    /// Requests that stayed in their zone.
    pub near: u64,
    pub failed: u64,
    /// The utilisation of each server in windows of one second.
    windows: Vec<Vec<f32>>,
    /// Core seconds used in the current window.
    pub window_busy: Vec<f64>,
}

impl Measurements {
    pub fn new(servers: usize) -> Self {
        Self {
            latencies: Vec::new(),
            joined: Vec::new(),
            requests: 0,
            faulty: 1,
            while_faulty: Part::default(),
            before_faults: Part::default(),
            after_faults: Part::default(),
            near: 0,
            failed: 0,
            windows: vec![Vec::new(); servers],
            window_busy: vec![0.0; servers],
        }
    }

    /// Ends the current window of a server.
    pub fn end_window(&mut self, server: usize, cores: f64, is_measured: bool) {
        let busy = std::mem::take(&mut self.window_busy[server]);
        if is_measured {
            self.windows[server].push((busy / cores) as f32);
        }
    }

    pub fn figures(mut self) -> Figures {
        let requests = self.requests;
        let share = |count: u64| count as f64 / requests.max(1) as f64;
        let variation = self.windows.iter().map(|windows| {
            let count = windows.len() as f32;
            let mean = windows.iter().sum::<f32>() / count;
            let squares = windows.iter().map(|used| (used - mean).powi(2));
            f64::from((squares.sum::<f32>() / count).sqrt() / mean.max(1e-6))
        });
        Figures {
            requests,
            variation: variation.sum::<f64>() / self.windows.len() as f64,
            p50: quantile(&mut self.latencies, 0.5),
            p99: quantile(&mut self.latencies, 0.99),
            joined_p99: quantile(&mut self.joined, 0.99),
            errors: share(self.failed),
            faulty: self.while_faulty.get() / self.faulty.max(1) as f64,
            before: self.before_faults.get(),
            returned: self.after_faults.get(),
            near: share(self.near),
        }
    }
}

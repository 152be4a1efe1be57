//! The results of all runs.

use std::collections::BTreeMap;

use crate::figures::Figures;
use crate::routers::RouterKind;
use crate::scenarios::Row;

/// The results of all runs, by scenario, router and seed.
pub struct Runs {
    pub rows: Vec<Row>,
    pub kinds: Vec<RouterKind>,
    pub seeds: Vec<u64>,
    pub figures: BTreeMap<(usize, usize, u64), Figures>,
}

impl Runs {
    /// The median over seeds of a measure of one router, compared with the oracle.
    pub fn median(
        &self,
        row: usize,
        kind: RouterKind,
        measure: impl Fn(&Figures, &Figures) -> f64,
    ) -> f64 {
        let index = self.kinds.iter().position(|other| *other == kind);
        let Some(index) = index else { return f64::NAN };
        let of_seed = |seed: &u64| {
            let oracle = &self.figures[&(row, 0, *seed)];
            measure(&self.figures[&(row, index, *seed)], oracle)
        };
        let mut values: Vec<f64> = self.seeds.iter().map(of_seed).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    pub fn relative_p99(&self, row: usize, kind: RouterKind) -> f64 {
        self.median(row, kind, |figures, oracle| figures.p99 / oracle.p99)
    }
}

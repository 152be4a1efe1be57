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
    /// The median over seeds of a measure of one router, compared with the oracle; not a number if it has not run.
    pub fn median(
        &self,
        row: usize,
        kind: RouterKind,
        measure: impl Fn(&Figures, &Figures) -> f64,
    ) -> f64 {
        let index = self.kinds.iter().position(|other| *other == kind);
        let Some(index) = index else { return f64::NAN };
        let of_seed = |seed: &u64| {
            let oracle = self.figures.get(&(row, 0, *seed))?;
            Some(measure(self.figures.get(&(row, index, *seed))?, oracle))
        };
        let mut values: Vec<f64> = self.seeds.iter().filter_map(of_seed).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The seeds that a scenario has run with.
    pub fn seeds_of(&self, row: usize) -> Vec<u64> {
        let has_run = |seed: &u64| self.figures.contains_key(&(row, 0, *seed));
        self.seeds.iter().copied().filter(has_run).collect()
    }

    pub fn relative_p99(&self, row: usize, kind: RouterKind) -> f64 {
        self.median(row, kind, |figures, oracle| figures.p99 / oracle.p99)
    }
}

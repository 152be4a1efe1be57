//! The limits, and what was measured.

use std::fmt;

use crate::routers::RouterKind::{self, DropIn, GrpcWeighted};
use crate::runs::Runs;
use crate::scenarios::{AGAINST_LEAST_OF_TWO, SPECIALS};

const OURS: RouterKind = RouterKind::Adaptive { candidates: 5 };
const LEAST_OF_TWO: RouterKind = RouterKind::LeastOfTwo;

/// A limit, and what was measured.
pub struct Check {
    pub scenario: &'static str,
    pub what: String,
    pub measured: f64,
    pub limit: f64,
}

impl Check {
    pub fn holds(&self) -> bool {
        self.measured <= self.limit
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scenario,
            what,
            measured,
            limit,
        } = self;
        let mark = if self.holds() { "ok    " } else { "BROKEN" };
        write!(f, "{mark} {measured:6.3} <= {limit:<5} {what}: {scenario}")
    }
}

/// What the selection of a stock load balancer is held to, where it has run.
fn of_drop_in(runs: &Runs, row: usize, scenario: &'static str) -> Vec<Check> {
    let of = |kind| runs.relative_p99(row, kind);
    let check = |what: &str, measured: f64, limit| Check {
        scenario,
        what: what.to_owned(),
        measured,
        limit,
    };
    let (without, with) = (DropIn { is_informed: false }, DropIn { is_informed: true });
    let mut checks = Vec::new();
    if scenario == "90 % load" {
        let what = "p99 of the drop-in selection / gRPC's";
        checks.push(check(what, of(without) / of(GrpcWeighted), 1.0));
    }
    if ["50 % load", "75 % load", "90 % load"].contains(&scenario) {
        let what = "p99 of the drop-in selection with outcomes / adaptive";
        checks.push(check(what, of(with) / of(OURS), 1.05));
    }
    checks.retain(|check| !check.measured.is_nan());
    checks
}

pub fn checks(runs: &Runs) -> Vec<Check> {
    let mut checks = Vec::new();
    for (row, described) in runs.rows.iter().enumerate() {
        let scenario = described.scenario.name;
        if let Some(limit) = described.limit {
            checks.push(Check {
                scenario,
                what: "p99 / oracle".to_owned(),
                measured: runs.relative_p99(row, OURS),
                limit,
            });
        }
        // Where most servers refuse, a choice of two serves next to nobody, and those fast.
        if described.scenario.dead == 0 {
            checks.push(Check {
                scenario,
                what: "p99 / choice of two".to_owned(),
                measured: runs.relative_p99(row, OURS) / runs.relative_p99(row, LEAST_OF_TWO),
                limit: AGAINST_LEAST_OF_TWO,
            });
        }
        checks.extend(of_drop_in(runs, row, scenario));
        for special in SPECIALS
            .iter()
            .filter(|special| special.scenario == scenario)
        {
            checks.push(Check {
                scenario,
                what: special.what.to_owned(),
                measured: runs.median(row, OURS, special.measure),
                limit: special.limit,
            });
        }
    }
    checks
}

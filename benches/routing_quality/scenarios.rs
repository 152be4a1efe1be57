//! The simulated worlds, and the limits that are checked.

use crate::figures::Figures;
use crate::scenario::{Metrics, Scenario, Trouble, Work};
use crate::server::{Discipline, Fault};

/// One row of the table.
pub struct Row {
    pub scenario: Scenario,
    /// The most that p99 may be, relative to the oracle's.
    pub limit: Option<f64>,
    /// Whether it is part of the shortened run: all but the largest are.
    pub quick: bool,
}

fn row(limit: impl Into<Option<f64>>, scenario: Scenario) -> Row {
    Row {
        quick: scenario.servers - scenario.dead < 100,
        limit: limit.into(),
        scenario,
    }
}

/// Ten servers, four proxies, 75 % load, metrics every 5 s.
fn usual(name: &'static str) -> Scenario {
    Scenario {
        name,
        ..Scenario::default()
    }
}

fn with(name: &'static str, change: impl FnOnce(&mut Scenario)) -> Scenario {
    let mut scenario = usual(name);
    change(&mut scenario);
    scenario
}

fn many_proxies(name: &'static str, load: f64, in_flight: bool) -> Scenario {
    with(name, |scenario| {
        scenario.proxies = 64;
        scenario.load = load;
        scenario.in_flight = in_flight;
    })
}

/// A large tier of proxies before many servers.
fn large(
    name: &'static str,
    proxies: usize,
    servers: usize,
    load: f64,
    in_flight: bool,
) -> Scenario {
    with(name, |it| {
        it.proxies = proxies;
        it.servers = servers;
        it.load = load;
        it.in_flight = in_flight;
        (it.warm, it.measure) = match servers {
            1_000 => (30.0, 15.0),
            _ => (60.0, 30.0),
        };
    })
}

/// Servers that fail from 20 to 100 s, and have to be back by 110 s.
fn failing(name: &'static str, trouble: Trouble) -> Scenario {
    with(name, |it| {
        it.trouble = trouble;
        it.neighbours = false;
        it.load = 0.5;
        it.measure = 130.0;
    })
}

/// Servers that work, beside more that do not take connections.
fn refusing(name: &'static str, alive: usize, dead: usize) -> Scenario {
    with(name, |it| {
        it.servers = alive + dead;
        it.dead = dead;
        it.neighbours = false;
        it.load = 0.5;
        it.warm = 5.0;
        it.measure = 55.0;
    })
}

#[allow(clippy::too_many_lines, reason = "a table of scenarios")]
pub fn all() -> Vec<Row> {
    vec![
        row(1.20, with("50 % load", |it| it.load = 0.5)),
        row(1.20, usual("75 % load")),
        row(1.30, with("90 % load", |it| it.load = 0.9)),
        row(None, with("metrics every 1 s", |it| it.interval = 1.0)),
        row(None, with("metrics every 30 s", |it| it.interval = 30.0)),
        row(1.30, with("no metrics", |it| it.metrics = Metrics::None)),
        row(
            None,
            with("half of the metrics lost", |it| it.metrics = Metrics::Lost),
        ),
        row(
            None,
            with("a third of the metrics frozen", |it| {
                it.metrics = Metrics::Frozen;
            }),
        ),
        row(
            1.30,
            with("one says it is idle", |it| it.metrics = Metrics::OneLies),
        ),
        row(
            1.40,
            with("random metrics", |it| it.metrics = Metrics::Random),
        ),
        row(
            None,
            with("exponential work", |it| it.work = Work::Exponential),
        ),
        row(
            None,
            with("cheap and expensive", |it| it.work = Work::Mixed),
        ),
        row(None, with("FIFO", |it| it.discipline = Discipline::Fifo)),
        row(
            None,
            with("FIFO, cheap and expensive", |it| {
                it.discipline = Discipline::Fifo;
                it.work = Work::Mixed;
            }),
        ),
        row(None, with("3 servers", |it| it.servers = 3)),
        row(None, with("1 proxy", |it| it.proxies = 1)),
        row(
            1.20,
            with("4 proxies, in flight reported", |it| it.in_flight = true),
        ),
        row(1.40, many_proxies("64 proxies, 75 %", 0.75, false)),
        row(1.70, many_proxies("64 proxies, 90 %", 0.9, false)),
        row(
            1.30,
            many_proxies("64 proxies, 75 %, in flight reported", 0.75, true),
        ),
        row(
            1.50,
            many_proxies("64 proxies, 90 %, in flight reported", 0.9, true),
        ),
        Row {
            // Two large scenarios are part of the shortened run.
            quick: true,
            ..row(1.10, {
                let mut it =
                    many_proxies("64 proxies, 100 servers, in flight reported", 0.75, true);
                it.servers = 100;
                it.measure = 60.0;
                it
            })
        },
        row(
            None,
            large("16 proxies, 1,000 servers", 16, 1_000, 0.75, false),
        ),
        Row {
            quick: true,
            ..row(
                1.20,
                large("64 proxies, 100 servers, 75 %", 64, 100, 0.75, false),
            )
        },
        row(
            1.40,
            large("64 proxies, 100 servers, 90 %", 64, 100, 0.9, false),
        ),
        row(None, {
            let name = "64 proxies, 100 servers, one with half of the traffic";
            let mut it = large(name, 64, 100, 0.75, false);
            it.is_uneven = true;
            it
        }),
        row(None, {
            let name = "64 proxies, 100 servers, a third fails";
            let mut it = failing(name, Trouble::ThirdFails(Fault::Fast));
            (it.proxies, it.servers) = (64, 100);
            it
        }),
        row(None, {
            let name = "8 proxies, 100 servers of one core, 45 %";
            let mut it = large(name, 8, 100, 0.45, false);
            it.cores = &[1.0];
            it
        }),
        row(
            None,
            large("64 proxies, 1,000 servers", 64, 1_000, 0.75, false),
        ),
        row(
            1.25,
            large(
                "64 proxies, 100 servers, 90 %, in flight reported",
                64,
                100,
                0.9,
                true,
            ),
        ),
        row(
            None,
            large(
                "64 proxies, 1,000 servers, in flight reported",
                64,
                1_000,
                0.75,
                true,
            ),
        ),
        row(1.75, {
            let mut it = many_proxies("64 proxies, all reports random", 0.75, true);
            it.metrics = Metrics::Random;
            it
        }),
        row(
            None,
            with("1,000 servers", |it| {
                it.servers = 1000;
                it.warm = 20.0;
                it.measure = 10.0;
            }),
        ),
        row(None, failing("one fails fast", Trouble::Fails(Fault::Fast))),
        row(
            None,
            failing("one fails slowly", Trouble::Fails(Fault::Slow)),
        ),
        row(
            None,
            failing(
                "one fails each third request",
                Trouble::Fails(Fault::EachThird),
            ),
        ),
        row(
            None,
            failing("a third fails fast", Trouble::ThirdFails(Fault::Fast)),
        ),
        row(
            None,
            failing(
                "a third fails each third request",
                Trouble::ThirdFails(Fault::EachThird),
            ),
        ),
        row(
            None,
            failing("a third fails in turn", Trouble::FailInTurn(Fault::Fast)),
        ),
        row(None, refusing("3 work, 3 refuse", 3, 3)),
        row(None, refusing("3 work, 9 refuse", 3, 9)),
        row(None, refusing("3 work, 27 refuse", 3, 27)),
        row(None, refusing("3 work, 97 refuse", 3, 97)),
        row(None, refusing("1 works, 200 refuse", 1, 200)),
        row(
            None,
            with("one joins, 90 %", |it| {
                it.trouble = Trouble::Joins;
                it.load = 0.9;
            }),
        ),
        row(
            None,
            with("one joins, cold, 90 %", |it| {
                it.trouble = Trouble::JoinsCold;
                it.load = 0.9;
            }),
        ),
        row(
            1.30,
            with("one of four joins, cold", |it| {
                it.trouble = Trouble::JoinsCold;
                it.servers = 4;
            }),
        ),
        row(
            None,
            with("one hangs for 20 s", |it| it.trouble = Trouble::Hangs),
        ),
        row(
            None,
            with("twice the load for 5 s", |it| {
                it.trouble = Trouble::Burst;
                it.load = 0.6;
            }),
        ),
        row(
            None,
            with("two zones, 50 %", |it| {
                it.zones = Some(0.005);
                it.load = 0.3;
            }),
        ),
        row(
            None,
            with("two zones, the near one hot", |it| {
                it.zones = Some(0.005);
                it.load = 0.7;
            }),
        ),
        row(
            None,
            with("two zones, the near one fails", |it| {
                it.zones = Some(0.005);
                it.load = 0.3;
                it.trouble = Trouble::ZoneFails;
            }),
        ),
        row(None, with("nothing changes", |it| it.neighbours = false)),
        row(
            None,
            with("size is speed", |it| it.discipline = Discipline::Pipe),
        ),
        row(None, {
            let mut it = many_proxies("size is speed, 64 proxies", 0.75, false);
            it.discipline = Discipline::Pipe;
            it
        }),
    ]
}

/// A limit that is not p99 relative to the oracle's.
pub struct Special {
    pub scenario: &'static str,
    pub what: &'static str,
    pub limit: f64,
    pub measure: fn(&Figures, &Figures) -> f64,
}

const fn gets_little(scenario: &'static str) -> Special {
    Special {
        scenario,
        what: "share of traffic of each that fails, %",
        limit: 0.3,
        measure: |ours, _| ours.faulty * 100.0,
    }
}

const fn is_back(scenario: &'static str) -> Special {
    Special {
        scenario,
        what: "share that is missing 10 s after they work again, %",
        limit: 10.0,
        measure: |ours, _| (1.0 - ours.returned / ours.before) * 100.0,
    }
}

const fn fails_few(scenario: &'static str) -> Special {
    Special {
        scenario,
        what: "requests that failed from the fifth second on, %",
        limit: 0.1,
        measure: |ours, _| ours.errors * 100.0,
    }
}

pub const SPECIALS: [Special; 18] = [
    gets_little("one fails fast"),
    gets_little("one fails slowly"),
    gets_little("one fails each third request"),
    gets_little("a third fails fast"),
    gets_little("a third fails each third request"),
    gets_little("a third fails in turn"),
    is_back("one fails fast"),
    is_back("one fails slowly"),
    is_back("one fails each third request"),
    is_back("a third fails fast"),
    is_back("a third fails each third request"),
    fails_few("3 work, 3 refuse"),
    fails_few("3 work, 9 refuse"),
    fails_few("3 work, 27 refuse"),
    fails_few("3 work, 97 refuse"),
    fails_few("1 works, 200 refuse"),
    Special {
        scenario: "one joins, 90 %",
        what: "p99 of the joining server in its first 30 s",
        limit: 1.5,
        measure: |ours, oracle| ours.joined_p99 / oracle.p99,
    },
    Special {
        scenario: "nothing changes",
        what: "variation of utilisation",
        limit: 1.0,
        measure: |ours, oracle| ours.variation / oracle.variation,
    },
];

/// The most that p99 may be, relative to a choice of two by requests in flight, in any scenario.
pub const AGAINST_LEAST_OF_TWO: f64 = 1.05;

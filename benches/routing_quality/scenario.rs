//! What can be varied in a simulated world.

use crate::server::{Discipline, Fault};
use crate::units::{MEAN_WORK, Seconds};

/// How the work of requests is distributed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    Exponential,
    /// With this standard deviation of the logarithm.
    Lognormal(f64),
    /// Nine of ten requests take a third of the mean, one takes seven times the mean.
    Mixed,
}

impl Work {
    /// Draws the work of a request.
    pub fn draw(self, random: &mut fastrand::Rng) -> Seconds {
        let relative = match self {
            Self::Exponential => -(1.0 - random.f64()).ln(),
            Self::Lognormal(sigma) => {
                let normal = (-2.0 * (1.0 - random.f64()).ln()).sqrt()
                    * (std::f64::consts::TAU * random.f64()).cos();
                (sigma * normal - sigma * sigma / 2.0).exp()
            }
            Self::Mixed if random.f64() < 0.9 => 1.0 / 3.0,
            Self::Mixed => 7.0,
        };
        relative * MEAN_WORK
    }
}

/// What servers report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metrics {
    None,
    Truthful,
    /// The first server always reports that it is idle.
    OneLies,
    /// All report random numbers.
    Random,
    /// Half of the reports get lost.
    Lost,
    /// A third of the servers repeat their first report, with a new time.
    Frozen,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trouble {
    None,
    /// The first server fails requests for 80 s.
    Fails(Fault),
    /// So does a third of the servers.
    ThirdFails(Fault),
    /// A third of the servers, one after the other, each for 20 s.
    FailInTurn(Fault),
    /// The last server joins.
    Joins,
    /// The same with cold caches: a third as fast at first, and ten seconds to warm up.
    JoinsCold,
    /// The first server hangs for 20 s.
    Hangs,
    /// Twice the load for 5 s.
    Burst,
    /// The near zone fails for 30 s.
    ZoneFails,
}

impl Trouble {
    pub fn joins(self) -> bool {
        matches!(self, Self::Joins | Self::JoinsCold)
    }
}

/// How long servers fail.
pub const FAILS_FOR: Seconds = 80.0;
/// How long each of several servers fails, one after the other.
pub const TURN: Seconds = 20.0;
/// How long a server that works again has until it is to have its share.
pub const RETURNS_WITHIN: Seconds = 10.0;

/// When the trouble begins, after the start of the measurement.
pub const TROUBLE_AFTER: Seconds = 20.0;

/// One simulated world.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: &'static str,
    pub servers: usize,
    /// The cores of servers, in turn.
    pub cores: &'static [f64],
    pub proxies: usize,
    /// Half of all requests come to the first proxy.
    pub is_uneven: bool,
    /// As a part of the capacity that neighbours leave.
    pub load: f64,
    pub work: Work,
    pub discipline: Discipline,
    /// The time between two reports of a server.
    pub interval: Seconds,
    pub metrics: Metrics,
    /// Whether responses report how many requests their server has in flight.
    pub in_flight: bool,
    pub trouble: Trouble,
    /// Whether a third of the servers have a neighbour that takes 20 to 60 %, for 10 to 60 s each.
    pub neighbours: bool,
    /// Two zones, with this additional latency between them, there and back.
    pub zones: Option<Seconds>,
    /// How many of the servers do not take connections at all; a request is tried three times.
    pub dead: usize,
    pub warm: Seconds,
    pub measure: Seconds,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: "",
            servers: 10,
            cores: &[2.0, 3.0, 4.0, 6.0, 8.0],
            proxies: 4,
            is_uneven: false,
            load: 0.75,
            work: Work::Lognormal(1.0),
            discipline: Discipline::ProcessorSharing,
            interval: 5.0,
            metrics: Metrics::Truthful,
            in_flight: false,
            trouble: Trouble::None,
            neighbours: true,
            zones: None,
            dead: 0,
            warm: 60.0,
            measure: 120.0,
        }
    }
}

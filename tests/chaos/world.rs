//! Everything that runs while faults are injected, and waiting until all is well again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::etcd_cluster::Cluster;
use super::fleet::{Fleet, TTL};
use super::measure::Monitor;
use super::traffic::{Balancer, Traffic};

const WORKERS: usize = 30;
const DISCOVERIES: usize = 3;
/// How long the recovery from a fault may take.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct World {
    pub cluster: Cluster,
    pub fleet: Fleet,
    pub balancer: Balancer,
    pub traffic: Traffic,
    pub monitor: Arc<Monitor>,
    pub rng: fastrand::Rng,
    /// Whether this is a long run, in which faults have random durations.
    pub long: bool,
}

/// How the cluster recovered.
pub struct Healed {
    /// The time until the state became right and stayed so.
    pub after: Duration,
    /// The time until every worker had responded through the balancer since the end of the fault.
    pub balancer: Duration,
    /// The last problems before the recovery.
    pub last: Vec<String>,
}

impl World {
    pub async fn start(
        binary: &Path,
        members: usize,
        quota: Option<u64>,
        monitor: &Arc<Monitor>,
        rng: fastrand::Rng,
        long: bool,
    ) -> Self {
        let cluster = Cluster::start(binary, members, quota).await;
        let addresses = cluster.addresses();
        let fleet = Fleet::start(&addresses, WORKERS, DISCOVERIES, monitor).await;
        let balancer = Balancer::start(&addresses, &fleet.group).await;
        let traffic = Traffic::start(balancer.url());
        Self {
            cluster,
            fleet,
            balancer,
            traffic,
            monitor: monitor.clone(),
            rng,
            long,
        }
    }

    /// How long the next fault lasts: longer than the TTL.
    pub fn longer_than_ttl(&mut self) -> Duration {
        let more = if self.long {
            self.rng.u64(500..6000)
        } else {
            1000
        };
        Duration::from_secs(TTL) + Duration::from_millis(more)
    }

    /// Waits until all is well and stays so for a while; returns the remaining problems if that
    /// does not happen in time.
    pub async fn heal(&self) -> Result<Healed, Vec<String>> {
        let start = Instant::now();
        let quiet = Duration::from_millis(if self.long { TTL * 1000 + 1000 } else { 600 });
        let expected = self.fleet.expected();
        let mut well_since: Option<Instant> = None;
        let mut balancer = None;
        let mut last = Vec::new();
        loop {
            let asked = Instant::now();
            let mut problems = self.fleet.problems(&self.cluster).await;
            if problems.is_empty() {
                let since = *well_since.get_or_insert(asked);
                if let (Some(balancer), true) = (balancer, since.elapsed() >= quiet) {
                    let after = since - start;
                    return Ok(Healed {
                        after,
                        balancer,
                        last,
                    });
                }
            } else {
                well_since = None;
                last.clone_from(&problems);
            }
            if balancer.is_none() {
                let missing = self.traffic.missing(expected.keys(), start);
                if missing.is_empty() {
                    balancer = Some(start.elapsed());
                } else {
                    problems.push(format!("the balancer: no response from {missing:?}"));
                }
            }
            if start.elapsed() > LIMIT {
                problems.insert(0, format!("not all well after {LIMIT:?}"));
                return Err(problems);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The index of the worker that leads; waits until there is one.
    pub async fn leading_worker(&self) -> usize {
        let start = Instant::now();
        loop {
            if let Some(leader) = self.fleet.leader() {
                return leader;
            }
            assert!(start.elapsed() < LIMIT, "no worker leads after {LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A random worker that does not lead.
    pub async fn other_worker(&mut self) -> usize {
        let leader = self.leading_worker().await;
        let turn = self.rng.usize(1..WORKERS);
        (leader + turn) % WORKERS
    }

    /// A random member of etcd other than this one.
    pub fn other_member(&mut self, than: usize) -> usize {
        let size = self.cluster.size();
        (than + self.rng.usize(1..size)) % size
    }
}

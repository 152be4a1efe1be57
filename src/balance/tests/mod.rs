//! The balancer as its users see it, by subject, and what these tests share.

mod adaptive;
mod answers;
mod consistent;
mod ejection;
mod large;
mod learned;
mod policies;
mod properties;
mod quiet;
mod registrations;
mod reports;
mod settings;
mod subset;
mod zones;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{BackendStatus, Balancer, BalancerBuilder, PickOptions, Policy, TICK, Upstream};
use crate::node::Node;
use crate::view::{Change, Nodes};

fn node(index: u16, cpu: f64) -> Arc<Node> {
    let node = Node::new(format!("n{index}"), "10.0.0.1".parse().unwrap())
        .with_port(1000 + index)
        .with_metadata(json!({ "cpu_usage_percent": cpu }));
    Arc::new(node)
}

fn nodes(count: u16) -> Vec<Arc<Node>> {
    (0..count).map(|index| node(index, 50.0)).collect()
}

/// Gives a balancer a complete view, and publishes it.
fn set_nodes<'a>(balancer: &Balancer, nodes: impl IntoIterator<Item = &'a Arc<Node>>) {
    set_nodes_at(balancer, nodes, Instant::now());
}

fn set_nodes_at<'a>(
    balancer: &Balancer,
    nodes: impl IntoIterator<Item = &'a Arc<Node>>,
    now: Instant,
) {
    let view: Nodes = nodes.into_iter().cloned().collect();
    balancer.apply(&Change::Reset(Arc::new(view)), now);
    balancer.publish(now);
}

fn balancer(policy: Policy, nodes: &[Arc<Node>]) -> Balancer {
    let balancer = Balancer::builder().policy(policy).try_build().unwrap();
    set_nodes(&balancer, nodes);
    balancer
}

fn rng() -> impl FnMut() -> u64 {
    let mut rng = fastrand::Rng::with_seed(1);
    move || rng.u64(..)
}

fn seeded<'a>(options: PickOptions<'a>, random: &mut impl FnMut() -> u64) -> PickOptions<'a> {
    PickOptions {
        random: Some(random()),
        ..options
    }
}

const POLICIES: [Policy; 5] = [
    Policy::RoundRobin,
    Policy::Random,
    Policy::Consistent,
    Policy::Headroom,
    Policy::Adaptive,
];

fn joined(node: &Arc<Node>) -> Change {
    Change::Joined(node.clone())
}

/// A balancer with a clock and a random generator of its own.
struct Rig {
    balancer: Balancer,
    now: Instant,
    rng: fastrand::Rng,
    nodes: BTreeMap<String, Arc<Node>>,
}

impl Rig {
    fn new(builder: BalancerBuilder) -> Self {
        Self {
            balancer: builder.try_build().unwrap(),
            now: Instant::now(),
            rng: fastrand::Rng::with_seed(7),
            nodes: BTreeMap::new(),
        }
    }

    fn of(count: u16) -> Self {
        let mut rig = Self::new(Balancer::builder());
        for index in 0..count {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        rig
    }

    fn update(&self) {
        set_nodes_at(&self.balancer, self.nodes.values(), self.now);
    }

    /// A node reports this CPU usage in percent; `at` is its time stamp.
    fn report(&mut self, index: u16, cpu: f64, at: i64) {
        let mut node = Node::clone(&bare(index)).with_metadata(json!({"cpu_usage_percent": cpu}));
        node.last_seen = at;
        self.nodes.insert(node.id.clone(), Arc::new(node));
        self.update();
    }

    fn seconds(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += TICK;
            self.balancer.tick(self.now);
        }
    }

    fn pick(&mut self) -> Upstream {
        let options = PickOptions {
            now: Some(self.now),
            random: Some(self.rng.u64(..)),
            ..PickOptions::default()
        };
        self.balancer.pick_with(options).unwrap()
    }

    /// Sends requests that are answered at once. Returns how many went to each backend.
    fn traffic(&mut self, requests: u32, fails: impl Fn(u16) -> bool) -> BTreeMap<u16, u32> {
        let mut counts = BTreeMap::new();
        for _ in 0..requests {
            let upstream = self.pick();
            let index = upstream.addr().port() - 1000;
            *counts.entry(index).or_default() += 1;
            if fails(index) {
                upstream.failed();
            } else {
                upstream.succeeded(Duration::from_millis(10));
            }
        }
        counts
    }

    /// Enough requests at the same time for every backend to get some.
    fn burst(&mut self) {
        let held: Vec<_> = (0..40).map(|_| self.pick()).collect();
        for upstream in held {
            upstream.succeeded(Duration::from_millis(10));
        }
    }

    fn weight(&self, index: u16) -> f64 {
        let backends = self.balancer.backends();
        let own = |backend: &&BackendStatus| backend.addr.port() == 1000 + index;
        backends.iter().find(own).unwrap().weight
    }
}

fn bare(index: u16) -> Arc<Node> {
    let node = Node::new(format!("n{index}"), "10.0.0.1".parse().unwrap()).with_port(1000 + index);
    Arc::new(node)
}

//! The cost of a request: the pick compared with Pingora's own `select`, and reads of the view; and
//! the cost of an update and a tick. Time and allocations, with 10 to 10,000 backends, on one and two
//! threads.
//!
//! A pick includes its guard, which counts the request as in flight until it is dropped; it reads no
//! clock.
//!
//! ```text
//! cargo bench --bench pick
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use pingora::lb::selection::{BackendIter, BackendSelection, Consistent, Random, RoundRobin};
use pingora::lb::{Backend, Backends, LoadBalancer, discovery};
use pingora::services::background::BackgroundService;
use pingora_etcd::balance::{Balancer, BalancerBuilder, PickOptions, Policy, TICK};
use pingora_etcd::metrics::LoadReport;
use pingora_etcd::pingora::{ClusterBackends, MetricsWeighted};
use pingora_etcd::store::{MemoryStore, Store, Txn};
use pingora_etcd::{Change, EtcdOptions, Node, ServiceDiscovery};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 3] = [10, 100, 1_000];
const FLEETS: [usize; 3] = [100, 1_000, 10_000];
const THREADS: [usize; 2] = [1, 2];
/// Picks per measured call, so that the cost of reading the clock does not matter.
const BATCH: usize = 1_000;

fn main() {
    divan::Divan::from_args()
        .sample_count(100)
        .items_count(ItemsCount::new(BATCH))
        .main();
}

fn node(index: usize) -> Node {
    let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + u32::try_from(index).unwrap());
    let load = serde_json::json!({
        "cpu_usage_percent": 20 + index % 50,
        "memory_usage_percent": 40,
        "queue_depth": index % 7,
    });
    Node::new(format!("n{index:05}"), ip.into())
        .with_port(8080)
        .with_metadata(load)
}

fn balancer(count: usize, builder: BalancerBuilder) -> Balancer {
    let balancer = builder.try_build().unwrap();
    set_nodes(&balancer, (0..count).map(|index| Arc::new(node(index))));
    balancer
}

fn set_nodes(balancer: &Balancer, nodes: impl Iterator<Item = Arc<Node>>) {
    let now = Instant::now();
    balancer.apply(&Change::Reset(Arc::new(nodes.collect())), now);
    balancer.publish(now);
}

fn pick(bencher: Bencher, count: usize, policy: Policy) {
    pick_of(bencher, count, Balancer::builder().policy(policy));
}

fn pick_of(bencher: Bencher, count: usize, builder: BalancerBuilder) {
    let balancer = balancer(count, builder);
    bencher.bench(|| {
        for _ in 0..BATCH {
            // Including the guard: dropping it is part of the cost.
            drop(black_box(balancer.pick()));
        }
    });
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_adaptive(bencher: Bencher, count: usize) {
    pick(bencher, count, Policy::Adaptive);
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_adaptive_3_candidates(bencher: Bencher, count: usize) {
    pick_of(bencher, count, Balancer::builder().candidates(3));
}

/// With the outcome, as a proxy reports it.
#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_adaptive_and_outcome(bencher: Bencher, count: usize) {
    let balancer = balancer(count, Balancer::builder());
    let latency = Duration::from_millis(3);
    bencher.bench(|| {
        for _ in 0..BATCH {
            if let Some(upstream) = black_box(balancer.pick()) {
                upstream.succeeded(latency);
            }
        }
    });
}

/// While one backend fails, so that the success rate of every drawn backend is checked.
#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_adaptive_gated(bencher: Bencher, count: usize) {
    let balancer = balancer(count, Balancer::builder());
    let failing = balancer.backends()[0].addr;
    let others: Vec<_> = balancer.backends()[1..].iter().map(|b| b.addr).collect();
    for _ in 0..100 {
        let options = PickOptions {
            exclude: &others,
            ..PickOptions::default()
        };
        let upstream = balancer.pick_with(options).unwrap();
        assert_eq!(upstream.addr(), failing);
        upstream.failed();
    }
    balancer.tick(Instant::now());
    bencher.bench(|| {
        for _ in 0..BATCH {
            drop(black_box(balancer.pick()));
        }
    });
}

/// Where backends report their requests in flight, and those that have just done so are considered, too.
#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_adaptive_told(bencher: Bencher, count: usize) {
    let balancer = balancer(count, Balancer::builder());
    let now = Instant::now();
    let mut report = LoadReport::new();
    for (index, backend) in balancer.backends().iter().enumerate() {
        let upstream = balancer.upstream_at(backend.addr).unwrap();
        report.in_flight = Some((index % 5) as f64);
        upstream.report(&report, now);
    }
    balancer.tick(now);
    let options = PickOptions {
        now: Some(now),
        ..PickOptions::default()
    };
    bencher.bench(|| {
        for _ in 0..BATCH {
            drop(black_box(balancer.pick_with(options)));
        }
    });
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_consistent(bencher: Bencher, count: usize) {
    let balancer = balancer(count, Balancer::builder().policy(Policy::Consistent));
    bencher.bench(|| {
        for turn in 0..BATCH {
            let options = PickOptions {
                key: &turn.to_le_bytes(),
                ..PickOptions::default()
            };
            drop(black_box(balancer.pick_with(options)));
        }
    });
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_headroom(bencher: Bencher, count: usize) {
    pick(bencher, count, Policy::Headroom);
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_round_robin(bencher: Bencher, count: usize) {
    pick(bencher, count, Policy::RoundRobin);
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pick_random(bencher: Bencher, count: usize) {
    pick(bencher, count, Policy::Random);
}

fn select<S>(bencher: Bencher, lb: LoadBalancer<S>)
where
    S: BackendSelection + Send + Sync + 'static,
    S::Iter: BackendIter,
    LoadBalancer<S>: BackgroundService,
{
    bencher.bench(|| {
        for turn in 0..BATCH {
            black_box(lb.select(&turn.to_le_bytes(), 256));
        }
    });
}

/// Something that a proxy may store beside a backend.
#[derive(Clone)]
struct Extension(#[allow(dead_code)] u64);

fn stock<S>(count: usize, extension: bool) -> LoadBalancer<S>
where
    S: BackendSelection + Send + Sync + 'static,
    S::Iter: BackendIter,
{
    let backend = |index: usize| {
        let addr = node(index).addr(80).to_string();
        let mut backend = Backend::new(&addr).unwrap();
        if extension {
            backend.ext.insert(Extension(index as u64));
        }
        backend
    };
    let backends: BTreeSet<_> = (0..count).map(backend).collect();
    let lb = LoadBalancer::from_backends(Backends::new(discovery::Static::new(backends)));
    runtime().block_on(lb.update()).unwrap();
    lb
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_round_robin(bencher: Bencher, count: usize) {
    select(bencher, stock::<RoundRobin>(count, false));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_round_robin_with_extension(bencher: Bencher, count: usize) {
    select(bencher, stock::<RoundRobin>(count, true));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_random(bencher: Bencher, count: usize) {
    select(bencher, stock::<Random>(count, false));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_random_with_extension(bencher: Bencher, count: usize) {
    select(bencher, stock::<Random>(count, true));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_consistent(bencher: Bencher, count: usize) {
    select(bencher, stock::<Consistent>(count, false));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_consistent_with_extension(bencher: Bencher, count: usize) {
    select(bencher, stock::<Consistent>(count, true));
}

/// Our selection inside Pingora's `select`.
#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_metrics_weighted(bencher: Bencher, count: usize) {
    let runtime = runtime();
    let discovery = group(&runtime, count);
    let backends = Backends::new(Box::new(ClusterBackends::new(discovery, 80)));
    let lb = LoadBalancer::<MetricsWeighted>::from_backends(backends);
    runtime.block_on(lb.update()).unwrap();
    select(bencher, lb);
}

/// One node has reported: its controller, its weight, and, of few nodes, every weight and the table.
#[divan::bench(args = FLEETS)]
fn update_after_one_report(bencher: Bencher, count: usize) {
    let balancer = Balancer::builder().try_build().unwrap();
    let mut nodes: Vec<_> = (0..count).map(|index| Arc::new(node(index))).collect();
    set_nodes(&balancer, nodes.iter().cloned());
    let mut time = 0;
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        time += 1;
        let index = time as usize % count;
        let old = nodes[index].clone();
        let mut new = Node::clone(&old);
        new.last_seen = time;
        let new = Arc::new(new);
        nodes[index] = new.clone();
        let now = Instant::now();
        balancer.apply(&Change::Updated { old, new }, now);
        balancer.publish(now);
    });
}

/// A request, and the tick that takes it over: the controllers, every weight, and the table.
#[divan::bench(args = FLEETS)]
fn tick(bencher: Bencher, count: usize) {
    let balancer = balancer(count, Balancer::builder());
    let mut now = Instant::now();
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        let upstream = balancer.pick().expect("a backend");
        upstream.succeeded(Duration::from_millis(10));
        now += TICK;
        balancer.tick(now);
    });
}

/// One node has left or joined, and the table with its ring is built.
#[divan::bench(args = FLEETS)]
fn consistent_rebuild(bencher: Bencher, count: usize) {
    let (balancer, nodes) = consistent(count);
    let mut is_there = true;
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        let last = nodes[count - 1].clone();
        let change = if is_there {
            Change::Left(last)
        } else {
            Change::Joined(last)
        };
        is_there = !is_there;
        let now = Instant::now();
        balancer.apply(&change, now);
        balancer.publish(now);
    });
}

/// A tick when nothing has changed.
#[divan::bench(args = FLEETS)]
fn consistent_tick(bencher: Bencher, count: usize) {
    let (balancer, _) = consistent(count);
    let mut now = Instant::now();
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        now += TICK;
        balancer.tick(now);
    });
}

/// A balancer of backends with a weight of 100 each.
fn consistent(count: usize) -> (Balancer, Vec<Arc<Node>>) {
    let builder = Balancer::builder().policy(Policy::Consistent);
    let balancer = builder.try_build().unwrap();
    let nodes: Vec<_> = (0..count)
        .map(|index| Arc::new(node(index).with_weight(100.0)))
        .collect();
    set_nodes(&balancer, nodes.iter().cloned());
    (balancer, nodes)
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn discovery_nodes(bencher: Bencher, count: usize) {
    let runtime = runtime();
    let discovery = group(&runtime, count);
    bencher.bench(|| {
        for _ in 0..BATCH {
            black_box(discovery.nodes());
        }
    });
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn discovery_leader(bencher: Bencher, count: usize) {
    let runtime = runtime();
    let discovery = group(&runtime, count);
    bencher.bench(|| {
        for _ in 0..BATCH {
            black_box(discovery.leader());
        }
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// A loaded view of a group of this size, with a leader.
fn group(runtime: &tokio::runtime::Runtime, count: usize) -> ServiceDiscovery {
    runtime.block_on(async {
        let store = Arc::new(MemoryStore::new());
        let nodes: Vec<_> = (0..count).map(node).collect();
        // Only a node whose candidacy and registration have one lease leads.
        let lease = store.grant(Duration::from_secs(3_600)).await.unwrap().id;
        for (index, node) in nodes.iter().enumerate() {
            let key = format!("registry/bench/{}", node.id);
            let lease = (index == 0).then_some(lease);
            let txn = Txn::new().put(key, serde_json::to_vec(node).unwrap(), lease);
            store.txn(txn).await.unwrap();
        }
        let id = nodes[0].id.clone().into_bytes();
        let leads = Txn::new().put("election/bench/1", id, Some(lease));
        store.txn(leads).await.unwrap();
        let discovery = ServiceDiscovery::builder(EtcdOptions::memory(""), "bench")
            .store(store)
            .try_build()
            .unwrap();
        let running = discovery.clone();
        tokio::spawn(async move { running.run(None).await });
        let ready = tokio::time::timeout(Duration::from_secs(10), discovery.wait_ready());
        ready.await.unwrap();
        assert!(discovery.leader().is_some());
        discovery
    })
}

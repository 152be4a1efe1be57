//! What a request pays: the pick beside Pingora's own `select`, and reads of the view. Time and
//! allocations, with 10 and 1,000 backends, on one and two threads.
//!
//! ```text
//! cargo bench --bench pick
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use pingora::lb::selection::{BackendIter, BackendSelection, Random, RoundRobin};
use pingora::lb::{Backend, Backends, LoadBalancer, discovery};
use pingora::services::background::BackgroundService;
use pingora_etcd::balance::{Balancer, Policy};
use pingora_etcd::pingora::{ClusterBackends, MetricsWeighted};
use pingora_etcd::store::{MemoryStore, Store, Txn};
use pingora_etcd::{EtcdOptions, Node, ServiceDiscovery};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 2] = [10, 1_000];
const THREADS: [usize; 2] = [1, 2];
/// Picks per measured call, so that reading the clock does not count.
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

fn pick(bencher: Bencher, count: usize, policy: Policy) {
    let balancer = Balancer::builder().policy(policy).try_build().unwrap();
    let nodes: Vec<_> = (0..count).map(|index| Arc::new(node(index))).collect();
    balancer.update(&nodes);
    bencher.bench(|| {
        for _ in 0..BATCH {
            // The guard too: counting out is part of the price.
            drop(black_box(balancer.pick()));
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
        for _ in 0..BATCH {
            black_box(lb.select(b"", 256));
        }
    });
}

fn stock<S>(count: usize) -> LoadBalancer<S>
where
    S: BackendSelection + Send + Sync + 'static,
    S::Iter: BackendIter,
{
    let backend = |index| {
        let addr = node(index).addr(80).to_string();
        Backend::new(&addr).unwrap()
    };
    let backends: BTreeSet<_> = (0..count).map(backend).collect();
    let lb = LoadBalancer::from_backends(Backends::new(discovery::Static::new(backends)));
    runtime().block_on(lb.update()).unwrap();
    lb
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_round_robin(bencher: Bencher, count: usize) {
    select(bencher, stock::<RoundRobin>(count));
}

#[divan::bench(args = SIZES, threads = THREADS)]
fn pingora_select_random(bencher: Bencher, count: usize) {
    select(bencher, stock::<Random>(count));
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
        for node in &nodes {
            let key = format!("registry/bench/{}", node.id);
            let txn = Txn::new().put(key, serde_json::to_vec(node).unwrap(), None);
            store.txn(txn).await.unwrap();
        }
        let leads = Txn::new().put("election/bench/1", nodes[0].id.clone().into_bytes(), None);
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

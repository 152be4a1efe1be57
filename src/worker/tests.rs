//! Nodes on the in-memory store under a paused clock: time is exact and costs nothing.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{ClusterNode, ClusterNodeBuilder};
use crate::cluster::Cluster;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::node::{HealthStatus, Node};
use crate::store::{
    Clock, EtcdOptions, Fault, Lease, LeaseId, LeaseKeeper, Listing, MemoryStore, Revision,
    Selector, Store, Txn, WatchEvent, WatchRange, Watcher, Write,
};
use crate::sync::lock;
use crate::testing::until;

const TTL: Duration = Duration::from_secs(5);
const SECOND: Duration = Duration::from_secs(1);
const MARGIN: Duration = Duration::from_millis(500);

struct Running {
    node: ClusterNode,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ClusterError>>,
}

fn builder(store: &MemoryStore, id: &str) -> ClusterNodeBuilder {
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    ClusterNodeBuilder::new(EtcdOptions::memory(""), id, ip, "g")
        .store(Arc::new(store.clone()))
        .ttl(5)
}

fn start(store: &MemoryStore, id: &str) -> Running {
    run(builder(store, id))
}

fn run(builder: ClusterNodeBuilder) -> Running {
    let node = builder.try_build().unwrap();
    let (stop, stopped) = oneshot::channel();
    let running = node.clone();
    let task = tokio::spawn(async move {
        let until = async { drop(stopped.await) };
        running.run_until(until).await
    });
    Running { node, stop, task }
}

#[tokio::test(start_paused = true)]
async fn leadership_ends_at_the_deadline_and_the_successor_comes_after_it() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    // Just after a renewal, when the deadline is as far away as possible.
    sleep(TTL / 3 + Duration::from_millis(1)).await;
    store.set_fault(Some(Fault::Silence));
    let ended = until("it no longer leads", || !running.node.is_leader()).await;
    assert!(ended <= TTL - MARGIN, "{ended:?}");
    assert!(
        ended > TTL - MARGIN - TTL / 3,
        "not earlier than necessary: {ended:?}"
    );
    // The lease itself lives on for the margin: no other node can have taken over yet.
    store.set_fault(None);
    assert_eq!(store.leases().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_counts_from_when_it_was_sent_even_if_its_answer_is_late() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    let granted = Instant::now();
    // The first renewal is sent after a third of the TTL, and answered a second later.
    sleep(TTL / 3 - Duration::from_millis(50)).await;
    store.set_fault(Some(Fault::Silence));
    sleep(Duration::from_millis(1050)).await;
    store.set_fault(None);
    sleep(Duration::from_millis(2)).await;
    store.set_fault(Some(Fault::Silence));
    until("it no longer leads", || !running.node.is_leader()).await;
    let deadline = TTL / 3 + TTL - MARGIN;
    let off = granted.elapsed().abs_diff(deadline);
    assert!(off < Duration::from_millis(10), "off by {off:?}");
}

#[tokio::test(start_paused = true)]
async fn unhealthy_after_three_missed_renewals_and_a_new_session_when_the_lease_is_gone() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    assert_eq!(running.node.current_health(), HealthStatus::Healthy);
    let first = running.node.leadership().unwrap().epoch;
    store.set_fault(Some(Fault::Refuse));
    let unhealthy = until("it is unhealthy", || {
        running.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    let third = TTL / 3 + 2 * (TTL / 9);
    assert!(
        unhealthy <= third + Duration::from_millis(5),
        "{unhealthy:?}"
    );
    assert!(
        unhealthy > third - TTL / 9,
        "not before the third: {unhealthy:?}"
    );
    // Long enough for the lease to expire, and for ten misses.
    sleep(Duration::from_secs(60)).await;
    store.set_fault(None);
    let back = until("it leads again", || running.node.is_leader()).await;
    assert!(back <= Duration::from_secs(30), "{back:?}");
    assert_eq!(running.node.current_health(), HealthStatus::Healthy);
    assert!(running.node.leadership().unwrap().epoch > first);
    assert_eq!(store.leases().len(), 1, "no lease is left behind");
}

#[tokio::test(start_paused = true)]
async fn three_misses_do_not_lose_a_lease_that_lives() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    let epoch = running.node.leadership().unwrap().epoch;
    store.set_fault(Some(Fault::Refuse));
    sleep(TTL - Duration::from_secs(1)).await;
    store.set_fault(None);
    sleep(TTL).await;
    assert_eq!(running.node.leadership().unwrap().epoch, epoch);
}

#[tokio::test(start_paused = true)]
async fn an_expired_lease_is_replaced_and_the_term_is_a_new_one() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    let epoch = running.node.leadership().unwrap().epoch;
    for lease in store.leases() {
        store.expire_lease(lease);
    }
    let back = until("it leads in a new term", || {
        running
            .node
            .leadership()
            .is_some_and(|term| term.epoch > epoch)
    })
    .await;
    assert!(back < TTL, "{back:?}");
    assert_eq!(store.entries().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn shutdown_takes_less_than_two_seconds_from_every_state() {
    for fault in [None, Some(Fault::Refuse), Some(Fault::Silence)] {
        for after in [0, 1, 5, 20, 100] {
            for fault_first in [false, true] {
                let store = MemoryStore::new();
                if fault_first {
                    store.set_fault(fault);
                }
                let running = start(&store, "n1");
                sleep(Duration::from_secs(1)).await;
                store.set_fault(fault);
                sleep(Duration::from_secs(after)).await;
                let asked = Instant::now();
                running.stop.send(()).unwrap();
                running.task.await.unwrap().unwrap();
                let took = asked.elapsed();
                assert!(
                    took < Duration::from_secs(2),
                    "{fault:?} {after} s: {took:?}"
                );
                assert!(!running.node.is_leader());
                if fault.is_none() {
                    assert!(store.entries().is_empty() && store.leases().is_empty());
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn never_two_leaders_and_always_one_soon_while_leases_expire_at_random() {
    let mut random = fastrand::Rng::with_seed(42);
    // Also the randomness of the nodes, which run on this thread.
    fastrand::seed(42);
    let store = MemoryStore::new();
    let nodes: Vec<_> = (0..5)
        .map(|index| start(&store, &format!("n{index}")))
        .collect();
    let mut last = 0;
    for _ in 0..200 {
        match random.u8(0..5) {
            0 => {
                // The lease of a candidate that waits. The leader's lease ends early only if
                // somebody revokes it, which the token covers and no deadline does.
                let mut waiting: Vec<_> = store
                    .entries()
                    .into_iter()
                    .filter(|entry| entry.key.starts_with("election/"))
                    .collect();
                waiting.sort_by_key(|entry| entry.create_revision);
                let waiting = waiting.into_iter().skip(1);
                if let Some(lease) = random.choice(waiting).and_then(|entry| entry.lease) {
                    store.expire_lease(lease);
                }
            }
            1 => {
                store.set_fault(Some(Fault::Refuse));
                sleep(Duration::from_millis(random.u64(0..8_000))).await;
                store.set_fault(None);
            }
            2 => {
                store.set_fault(Some(Fault::Silence));
                sleep(Duration::from_millis(random.u64(0..8_000))).await;
                store.set_fault(None);
            }
            3 => {
                store.set_fault(Some(Fault::LoseAnswers));
                sleep(Duration::from_millis(random.u64(0..8_000))).await;
                store.set_fault(None);
            }
            _ => {
                let node = &nodes[random.usize(0..nodes.len())].node;
                // The store may refuse it.
                let _ = node.resign().await;
            }
        }
        for _ in 0..random.u32(1..2_000) {
            sleep(Duration::from_millis(1)).await;
            let terms: Vec<_> = nodes
                .iter()
                .filter_map(|running| running.node.leadership())
                .collect();
            assert!(terms.len() <= 1, "two leaders: {terms:?}");
            for term in terms {
                assert!(term.epoch >= last, "tokens only grow");
                last = term.epoch;
            }
        }
    }
    until("everything settles", || {
        nodes
            .iter()
            .filter(|running| running.node.is_leader())
            .count()
            == 1
            && store.leases().len() == nodes.len()
            && store.entries().len() == 2 * nodes.len()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_answer_the_state_is_read_and_not_guessed() {
    let store = MemoryStore::new();
    store.set_fault(Some(Fault::LoseAnswers));
    let running = start(&store, "n1");
    // Leases are granted whose answers are lost.
    sleep(Duration::from_secs(4)).await;
    assert!(!store.leases().is_empty());
    store.set_fault(None);
    until("it leads", || running.node.is_leader()).await;
    // It resigns, and the answer to the delete is lost: it must not lead by that candidacy.
    let before = running.node.leadership().unwrap().epoch;
    store.set_fault(Some(Fault::LoseAnswers));
    running.node.resign().await.unwrap_err();
    assert!(!running.node.is_leader());
    store.set_fault(None);
    until("it leads again", || running.node.is_leader()).await;
    assert!(running.node.leadership().unwrap().epoch > before);
    until("no lease is left over", || store.leases().len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_drains_after_an_outage_if_it_was_asked_to_during_it() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    store.set_fault(Some(Fault::Refuse));
    sleep(Duration::from_secs(1)).await;
    running.node.drain().await.unwrap_err();
    assert!(!running.node.is_leader());
    store.set_fault(None);
    until("it says so", || {
        let entries = store.entries();
        entries.len() == 1 && String::from_utf8_lossy(&entries[0].value).contains("draining")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn no_command_is_refused_because_a_connection_was_replaced() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    store.end_watches();
    sleep(Duration::from_millis(10)).await;
    let (first, second) = tokio::join!(running.node.resign(), running.node.resign());
    first.unwrap();
    second.unwrap();
    until("it leads again", || running.node.is_leader()).await;
    // The members of etcd are stopped one after the other.
    for _ in 0..3 {
        store.end_watches();
        sleep(Duration::from_secs(10)).await;
        assert!(running.node.is_leader());
    }
    store.end_watches();
    sleep(Duration::from_millis(10)).await;
    running.node.drain().await.unwrap();
    let entries = store.entries();
    assert!(String::from_utf8_lossy(&entries[0].value).contains("draining"));
    assert!(!running.node.is_leader());
}

/// What is asked while the store fails for a moment takes effect in this process at once, and is answered when the store
/// has it.
#[tokio::test(start_paused = true)]
async fn a_store_that_fails_for_a_moment_refuses_no_command() {
    for fault in [Fault::Refuse, Fault::Silence, Fault::LoseAnswers] {
        for command in ["drain", "resign", "transfer"] {
            let store = MemoryStore::new();
            let running = start(&store, "n1");
            until("it leads", || running.node.is_leader()).await;
            let epoch = running.node.leadership().unwrap().epoch;
            let other = start(&store, "n2");
            other.node.until_registered().await.unwrap();
            until("n2 waits", || store.entries().len() == 4).await;
            store.set_fault(Some(fault));
            sleep(Duration::from_millis(100)).await;
            let node = running.node.clone();
            let asked = tokio::spawn(async move {
                match command {
                    "drain" => node.drain().await,
                    "resign" => node.resign().await,
                    _ => node.transfer_to("n2").await,
                }
            });
            sleep(Duration::from_millis(900)).await;
            // In silence, a request may have been under way that has to end first.
            if fault != Fault::Silence && command != "transfer" {
                assert!(!running.node.is_leader(), "{command}, {fault:?}");
            }
            store.set_fault(None);
            let outcome = asked.await.unwrap();
            if command != "transfer" || fault == Fault::Refuse {
                outcome.unwrap_or_else(|error| panic!("{command}, {fault:?}: {error}"));
            }
            until("n2 leads", || other.node.is_leader()).await;
            assert!(other.node.leadership().unwrap().epoch > epoch);
        }
    }
}

/// Who has no valid term any more may still be first in the queue, and lead again when the store works.
#[tokio::test(start_paused = true)]
async fn a_leader_whose_term_has_lapsed_resigns_all_the_same() {
    let store = MemoryStore::new();
    let running = run(builder(&store, "n1").ttl(2));
    until("it leads", || running.node.is_leader()).await;
    let epoch = running.node.leadership().unwrap().epoch;
    store.extend_leases();
    store.set_fault(Some(Fault::Refuse));
    until("its term has lapsed", || !running.node.is_leader()).await;
    let node = running.node.clone();
    let asked = tokio::spawn(async move { node.resign().await });
    sleep(Duration::from_millis(10)).await;
    store.set_fault(None);
    until("it leads again", || running.node.is_leader()).await;
    assert!(running.node.leadership().unwrap().epoch > epoch);
    let _ = asked.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_has_begun_when_the_node_is_stopped_is_not_said_to_be_refused() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    store.set_fault(Some(Fault::Refuse));
    sleep(Duration::from_millis(100)).await;
    let node = running.node.clone();
    let asked = tokio::spawn(async move { node.drain().await });
    sleep(Duration::from_millis(10)).await;
    running.stop.send(()).unwrap();
    let error = asked.await.unwrap().unwrap_err();
    assert!(matches!(error, ClusterError::Unavailable { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_drain_goes_on_under_the_next_lease() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    let lease = store.leases()[0];
    store.expire_lease(lease);
    running.node.drain().await.unwrap();
    let entries = store.entries();
    assert_eq!(entries.len(), 1);
    assert!(String::from_utf8_lossy(&entries[0].value).contains("draining"));
    assert_ne!(entries[0].lease, Some(lease));
}

#[tokio::test(start_paused = true)]
async fn a_command_during_shutdown_is_answered() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    until("it leads", || running.node.is_leader()).await;
    store.set_fault(Some(Fault::Silence));
    let asking: Vec<_> = (0..5)
        .map(|_| {
            let node = running.node.clone();
            tokio::spawn(async move { node.resign().await })
        })
        .collect();
    sleep(Duration::from_millis(10)).await;
    running.stop.send(()).unwrap();
    for asked in asking {
        let answer = tokio::time::timeout(Duration::from_secs(30), asked).await;
        answer.expect("an answer").unwrap().unwrap_err();
    }
}

/// A collector whose samples follow a function of their number.
struct Load {
    samples: Arc<AtomicU32>,
    next: fn(u32) -> f64,
}

impl crate::MetricsCollector for Load {
    fn collect(&self) -> crate::NodeMetadata {
        let sample = self.samples.fetch_add(1, Ordering::Relaxed);
        serde_json::json!({ crate::metadata_keys::CPU_USAGE_PERCENT: (self.next)(sample) })
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// A leader with such a load, sampled every second, and the number of its samples.
async fn loaded(store: &MemoryStore, next: fn(u32) -> f64) -> (Running, Arc<AtomicU32>) {
    let samples = Arc::<AtomicU32>::default();
    let load = Load {
        samples: samples.clone(),
        next,
    };
    let builder = builder(store, "n1");
    let node = builder.metrics_collector(load).metrics_update_interval(1);
    let running = run(node);
    until("it leads", || running.node.is_leader()).await;
    sleep(Duration::from_secs(2)).await;
    (running, samples)
}

fn published(store: &MemoryStore) -> f64 {
    let entry = store.entry("registry/g/n1").unwrap();
    let node: Node = serde_json::from_slice(&entry.value).unwrap();
    let cpu = node.metric(crate::metadata_keys::CPU_USAGE_PERCENT);
    cpu.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_load_that_hovers_is_written_a_tenth_as_often_as_it_is_sampled_and_never_far_off() {
    let store = MemoryStore::new();
    let hovers = |sample: u32| 50.0 + f64::from(sample * 7 % 11) / 11.0 * 1.9;
    let (running, samples) = loaded(&store, hovers).await;
    let (revision, before) = (store.revision(), samples.load(Ordering::Relaxed));
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        assert!((published(&store) - 51.0).abs() <= 2.0);
    }
    let taken = samples.load(Ordering::Relaxed) - before;
    let written = store.revision() - revision;
    // The predecessor writes each sample: 600 of them in ten minutes.
    assert!((540..=600).contains(&taken), "{taken} samples");
    assert!((19..=60).contains(&written), "{written} writes");
    assert!(running.node.is_leader());
}

#[tokio::test(start_paused = true)]
async fn a_load_that_moves_is_written_at_once_and_never_more_often_than_it_is_sampled() {
    let store = MemoryStore::new();
    let (_running, samples) = loaded(&store, |sample| f64::from(sample * 3 % 100)).await;
    let (revision, before) = (store.revision(), samples.load(Ordering::Relaxed));
    sleep(Duration::from_secs(100)).await;
    let taken = i64::from(samples.load(Ordering::Relaxed) - before);
    let written = store.revision() - revision;
    assert!(
        written <= taken && written >= taken - 1,
        "{written} of {taken}"
    );
    let latest = f64::from((samples.load(Ordering::Relaxed) - 1) * 3 % 100);
    assert_eq!(published(&store), latest);
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_slow_samples_are_dropped_not_queued_and_responses_have_them() {
    let store = MemoryStore::new();
    let (running, samples) = loaded(&store, |sample| f64::from(sample * 3 % 100)).await;
    store.set_fault(Some(Fault::Silence));
    sleep(Duration::from_secs(30)).await;
    // The reporter still gets new samples.
    let latest = samples.load(Ordering::Relaxed) - 1;
    let report = running.node.load_reporter().header_value();
    let report = crate::metrics::LoadReport::parse(&report).unwrap();
    assert_eq!(report.cpu, Some(f64::from(latest * 3 % 100) / 100.0));
    assert!(latest >= 25, "{latest} samples");
    store.set_fault(None);
    let revision = store.revision();
    let range = WatchRange {
        keys: Selector::Key("registry/g/n1".to_owned()),
        from: revision + 1,
    };
    let mut watch = store.watch(vec![range]).await.unwrap();
    sleep(Duration::from_millis(10)).await;
    let mut at_once = Vec::new();
    while let Ok(events) = timeout(Duration::from_millis(1), watch.next()).await {
        at_once.extend(events.unwrap());
    }
    // The lease has expired meanwhile, so the node registers and campaigns again. The point is that 30 samples are
    // not written now: at most one is.
    let writes = at_once
        .iter()
        .filter(|event| matches!(event, WatchEvent::Put(_)));
    assert!(writes.count() <= 2, "{at_once:?} in a burst");
    let all = store.revision() - revision;
    assert!(all <= 4, "{all} writes in a burst");
    until("it is back", || running.node.is_leader()).await;
}

/// A store whose user has only the rights that photon-etcd-cluster needs.
#[derive(Debug)]
struct NoHandover(MemoryStore);

impl NoHandover {
    fn check(&self, keys: &Selector) -> Result<(), ClusterError> {
        if keys.as_str().starts_with("handover/") {
            return Err(ClusterError::PermissionDenied {
                endpoint: "memory://".to_owned(),
                operation: "list",
                user: "user \"old\"".to_owned(),
                keys: keys.as_str().to_owned(),
            });
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Store for NoHandover {
    fn clock(&self) -> Arc<dyn Clock> {
        self.0.clock()
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.0.grant(ttl).await
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        self.0.keeper(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.0.revoke(lease).await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.0.keys_of(lease).await
    }
    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        for write in &txn.writes {
            if let Write::Put { key, .. } = write {
                self.check(&Selector::Key(key.clone()))?;
            }
        }
        self.0.txn(txn).await
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.check(keys)?;
        self.0.list(keys, at).await
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        for range in &ranges {
            self.check(&range.keys)?;
        }
        self.0.watch(ranges).await
    }
}

#[tokio::test(start_paused = true)]
async fn without_rights_to_hand_over_everything_else_works_and_the_error_says_what_is_missing() {
    let store = MemoryStore::new();
    let start = |id: &str| {
        let limited = Arc::new(NoHandover(store.clone()));
        run(builder(&store, id).store(limited).priority(3))
    };
    let nodes = ["n1", "n2", "n3"].map(start);
    until("one leads and all are registered", || {
        let leaders = nodes.iter().filter(|running| running.node.is_leader());
        leaders.count() == 1 && store.entries().len() == 6
    })
    .await;
    let mut line: Vec<_> = store.entries();
    line.retain(|entry| entry.key.starts_with("election/"));
    line.sort_by_key(|entry| entry.create_revision);
    let id = |place: usize| String::from_utf8(line[place].value.clone()).unwrap();
    let leader = nodes.iter().find(|running| running.node.id() == id(0));
    let leader = leader.unwrap();
    let error = leader.node.transfer_to(id(2)).await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
    assert!(leader.node.is_leader());
    leader.node.transfer_to(id(1)).await.unwrap();
    let next = nodes.iter().find(|running| running.node.id() == id(1));
    until("the next one leads", || next.unwrap().node.is_leader()).await;
}

/// A candidate between the leader and the one that is to lead, which takes its time to make way.
#[tokio::test(start_paused = true)]
async fn leadership_passes_on_as_soon_as_the_last_one_between_has_made_way() {
    for by_operator in [true, false] {
        let store = MemoryStore::new();
        let keys = GroupKeys::new("", "g");
        let put = async |key: String, value: Vec<u8>, lease: LeaseId| {
            let txn = Txn::new().put(key, value, Some(lease));
            store.txn(txn).await.unwrap();
        };
        let first = start(&store, "n1");
        until("the first one leads", || first.node.is_leader()).await;
        let between = store.grant(Duration::from_secs(600)).await.unwrap().id;
        let entry = br#"{"id":"between","ip":"10.0.0.2","last_seen":1,"priority":0}"#;
        put(keys.registration("between"), entry.to_vec(), between).await;
        put(keys.candidacy(between), b"between".to_vec(), between).await;
        let last = start(&store, "n3");
        until("the last one queues", || store.entries().len() == 6).await;
        let asking = match by_operator {
            true => {
                let queued = store.entries();
                let queued = queued.iter().find(|entry| entry.value == b"n3").unwrap();
                let wanted = super::operators_request(&queued.key, queued.create_revision);
                put(keys.operator_request(), wanted, between).await;
                None
            }
            false => {
                let node = first.node.clone();
                Some(tokio::spawn(async move { node.transfer_to("n3").await }))
            }
        };
        sleep(Duration::from_secs(2)).await;
        assert!(first.node.is_leader() && !last.node.is_leader());
        let made_way = Txn::new().delete(keys.candidacy(between));
        store.txn(made_way).await.unwrap();
        let took = until("the last one leads", || last.node.is_leader()).await;
        assert!(
            took < Duration::from_millis(300),
            "{took:?}, by an operator: {by_operator}"
        );
        if let Some(asking) = asking {
            asking.await.unwrap().unwrap();
        }
    }
}

/// Longer than the lease of its request lives without renewals.
#[tokio::test(start_paused = true)]
async fn an_operator_waits_for_a_transfer_as_long_as_is_said() {
    let store = MemoryStore::new();
    let keys = GroupKeys::new("", "g");
    let first = start(&store, "n1");
    until("the first one leads", || first.node.is_leader()).await;
    let between = store.grant(Duration::from_secs(600)).await.unwrap().id;
    let queued = Txn::new().put(keys.candidacy(between), b"between".to_vec(), Some(between));
    store.txn(queued).await.unwrap();
    let last = start(&store, "n3");
    until("the last one queues", || store.entries().len() == 5).await;
    let cluster = Cluster::builder(EtcdOptions::memory("")).store(Arc::new(store.clone()));
    let operator = crate::Operator::new(&cluster.try_build().unwrap(), "g").unwrap();
    let begun = Instant::now();
    let short = operator.transfer("n3", Duration::from_secs(15)).await;
    assert!(
        short
            .unwrap_err()
            .to_string()
            .contains("handed over in time")
    );
    assert_eq!(begun.elapsed().as_secs(), 15);
    let made_way = async {
        sleep(Duration::from_secs(25)).await;
        let txn = Txn::new().delete(keys.candidacy(between));
        store.txn(txn).await.unwrap();
    };
    let long = operator.transfer("n3", Duration::MAX);
    let (epoch, ()) = tokio::join!(long, made_way);
    assert_eq!(epoch.unwrap(), last.node.leadership().unwrap().epoch);
}

/// Counts all calls but those for leases, and what they read; panics in the next `panics` renewals.
#[derive(Debug)]
struct Observed {
    inner: MemoryStore,
    calls: AtomicU32,
    entries: AtomicU32,
    watches: AtomicU32,
    panics: Arc<AtomicU32>,
}

impl Observed {
    fn new(inner: &MemoryStore) -> Arc<Self> {
        Arc::new(Self {
            inner: inner.clone(),
            calls: AtomicU32::new(0),
            entries: AtomicU32::new(0),
            watches: AtomicU32::new(0),
            panics: Arc::default(),
        })
    }

    fn count(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    fn count_entries(&self, listings: &[Listing]) {
        let entries: usize = listings.iter().map(|listing| listing.entries.len()).sum();
        let entries = u32::try_from(entries).unwrap();
        self.entries.fetch_add(entries, Ordering::Relaxed);
    }
}

struct Panicking(Box<dyn LeaseKeeper>, Arc<AtomicU32>);

#[async_trait::async_trait]
impl LeaseKeeper for Panicking {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        if self.1.load(Ordering::Relaxed) > 0 {
            self.1.fetch_sub(1, Ordering::Relaxed);
            panic!("in a renewal, as the test requires");
        }
        self.0.renew(within).await
    }
}

#[async_trait::async_trait]
impl Store for Observed {
    fn clock(&self) -> Arc<dyn Clock> {
        self.inner.clock()
    }
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.inner.grant(ttl).await
    }
    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        Box::new(Panicking(self.inner.keeper(lease), self.panics.clone()))
    }
    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.inner.revoke(lease).await
    }
    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.count();
        self.inner.keys_of(lease).await
    }
    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        self.count();
        self.inner.txn(txn).await
    }
    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.count();
        let listing = self.inner.list(keys, at).await?;
        self.count_entries(std::slice::from_ref(&listing));
        Ok(listing)
    }
    async fn list_all(&self, all: &[Selector]) -> Result<Vec<Listing>, ClusterError> {
        self.count();
        let listings = self.inner.list_all(all).await?;
        self.count_entries(&listings);
        Ok(listings)
    }
    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let watcher = self.inner.watch(ranges).await?;
        self.watches.fetch_add(1, Ordering::Relaxed);
        Ok(watcher)
    }
}

fn cluster(store: Arc<dyn Store>) -> Cluster {
    let builder = Cluster::builder(EtcdOptions::memory("")).store(store);
    builder.ttl(5).try_build().unwrap()
}

fn member(cluster: &Cluster, group: &str) -> ClusterNodeBuilder {
    cluster.node("n1", "10.0.0.1".parse().unwrap(), group)
}

#[tokio::test(start_paused = true)]
async fn nodes_that_have_left_a_cluster_cost_the_same_whatever_their_number() {
    let mut quiet = Vec::new();
    for ended in [20, 200] {
        let store = MemoryStore::new();
        let observed = Observed::new(&store);
        let cluster = cluster(observed.clone());
        let stays = run(member(&cluster, "stays"));
        stays.node.until_registered().await.unwrap();
        for group in 0..ended {
            let running = run(member(&cluster, &format!("g{group}")));
            running.node.until_registered().await.unwrap();
            running.stop.send(()).unwrap();
            running.task.await.unwrap().unwrap();
        }
        assert_eq!(store.leases().len(), 1, "the nodes share it");
        assert_eq!(store.entries().len(), 2, "{:?}", store.entries());
        // A late request of one of them.
        let lease = Some(store.leases()[0]);
        let late = |key: &str| Txn::new().put(key, b"n1".to_vec(), lease);
        store.txn(late("registry/g7/n1")).await.unwrap();
        store.txn(late("app/of-the-leader")).await.unwrap();
        sleep(Duration::from_secs(60)).await;
        assert!(store.entry("registry/g7/n1").is_none());
        assert!(
            store.entry("app/of-the-leader").is_some(),
            "not a key of a node"
        );
        let before = observed.calls.load(Ordering::Relaxed);
        sleep(Duration::from_secs(300)).await;
        quiet.push(observed.calls.load(Ordering::Relaxed) - before);
        assert!(stays.node.session_state().is_registered());
    }
    assert!(quiet[1] <= quiet[0] + 1 && quiet[1] <= 12, "{quiet:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_not_polled_costs_no_node_the_lease() {
    let store = MemoryStore::new();
    let cluster = cluster(Arc::new(store.clone()));
    let stuck = member(&cluster, "a").try_build().unwrap();
    let mut never = Box::pin(stuck.run_until(std::future::pending()));
    tokio::select! {
        _ = &mut never => unreachable!("nothing stops it"),
        registered = stuck.until_registered() => registered.unwrap(),
    }
    let running = run(member(&cluster, "b"));
    running.node.until_leading().await.unwrap();
    let term = running.node.leadership().unwrap().epoch;
    // From here on the future of the first node is kept, but not polled.
    sleep(Duration::from_secs(120)).await;
    assert_eq!(running.node.leadership().unwrap().epoch, term);
    assert!(
        store.entry("registry/a/n1").is_some(),
        "its lease lives too"
    );
    drop(never);
    running.stop.send(()).unwrap();
    running.task.await.unwrap().unwrap();
    until("everything is gone", || store.entries().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_panics_is_started_again() {
    let store = MemoryStore::new();
    let observed = Observed::new(&store);
    let running = run(builder(&store, "n1").store(observed.clone()));
    let term = running.node.until_leading().await.unwrap().epoch;
    for _ in 0..5 {
        observed.panics.store(1, Ordering::Relaxed);
        sleep(Duration::from_secs(20)).await;
        assert_eq!(
            observed.panics.load(Ordering::Relaxed),
            0,
            "it has panicked"
        );
        assert_eq!(running.node.leadership().unwrap().epoch, term);
    }
}

#[tokio::test(start_paused = true)]
async fn waits_end_with_the_run() {
    let store = MemoryStore::new();
    let leader = start(&store, "n1");
    leader.node.until_leading().await.unwrap();
    let second = start(&store, "n2");
    let node = second.node.clone();
    let waiting = tokio::spawn(async move { node.until_leading().await });
    second.node.until_registered().await.unwrap();
    second.stop.send(()).unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, ClusterError::NotRunning { .. }), "{error}");
    let never = builder(&store, "n3").try_build().unwrap();
    assert!(never.until_registered().await.is_err());
    let wrong = builder(&store, "a/b").build();
    let error = wrong.until_leading().await.unwrap_err();
    assert!(
        matches!(error, ClusterError::InvalidConfig { .. }),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_node_is_idle_only_if_its_requests_are_counted() {
    let store = MemoryStore::new();
    let running = start(&store, "n1");
    running.node.until_registered().await.unwrap();
    let grace = Duration::from_secs(7);
    let begun = Instant::now();
    assert!(!running.node.drain_until_idle(grace).await);
    assert_eq!(begun.elapsed(), grace);
    drop(running.node.load_reporter().enter());
    let begun = Instant::now();
    assert!(running.node.drain_until_idle(grace).await);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_of_the_store_no_candidate_that_waits_reads_the_whole_queue() {
    const NODES: u32 = 40;
    let store = MemoryStore::new();
    let observed = Observed::new(&store);
    let mut all = Vec::new();
    for number in 0..NODES {
        let builder = builder(&store, &format!("n{number}")).store(observed.clone());
        let running = run(builder);
        running.node.until_registered().await.unwrap();
        all.push(running);
    }
    until("n0 leads", || all[0].node.is_leader()).await;
    let waiting = || observed.watches.load(Ordering::Relaxed);
    sleep(SECOND).await;
    for restart in 0..3 {
        let (watches, entries) = (waiting(), observed.entries.load(Ordering::Relaxed));
        store.end_watches();
        until("all wait again", || waiting() == watches + NODES).await;
        sleep(SECOND).await;
        let read = observed.entries.load(Ordering::Relaxed) - entries;
        // Its registration, twice, its candidacy, the one ahead and the leader's; the leader all.
        assert!(read <= 6 * NODES, "{read} entries in restart {restart}");
        assert!(all[0].node.is_leader());
    }
    // Two are gone while the watches of the others are broken: the leader, and one that another waits for.
    store.set_fault(Some(Fault::Refuse));
    store.end_watches();
    sleep(SECOND / 10).await;
    for id in ["n0", "n20"] {
        let registration = store.entry(&GroupKeys::new("", "g").registration(id));
        store.expire_lease(registration.unwrap().lease.unwrap());
    }
    store.set_fault(None);
    until("n1 leads", || all[1].node.is_leader()).await;
    until("the two are back", || store.leases().len() == all.len()).await;
    while !all.is_empty() {
        let leads = || all.iter().position(|running| running.node.is_leader());
        until("another one leads", || leads().is_some()).await;
        let leader = all.swap_remove(leads().unwrap());
        leader.stop.send(()).unwrap();
        leader.task.await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_term_is_announced_again_although_the_watch_of_the_leader_breaks_meanwhile() {
    let store = MemoryStore::new();
    let leader = start(&store, "n1");
    until("n1 leads", || leader.node.is_leader()).await;
    let other = start(&store, "n2");
    other.node.until_registered().await.unwrap();
    sleep(SECOND).await;
    let key = leader.node.leadership().unwrap().key;
    let written = || store.entry(&key).unwrap().mod_revision;
    let before = written();
    other.stop.send(()).unwrap();
    until("the other one has left", || store.leases().len() == 1).await;
    sleep(Duration::from_millis(50)).await;
    store.end_watches();
    until("the term is announced again", || written() > before).await;
}

/// It was killed while it asked for leadership, and is back under another lease: the request lasts as long as the former
/// one.
#[tokio::test(start_paused = true)]
async fn no_term_ends_for_a_candidate_whose_process_has_ended() {
    let store = MemoryStore::new();
    let leader = start(&store, "n1");
    until("n1 leads", || leader.node.is_leader()).await;
    let epoch = leader.node.leadership().unwrap().epoch;
    let keys = GroupKeys::new("", "g");
    let [former, now] = [40, 600].map(|seconds| store.grant(Duration::from_secs(seconds)));
    let (former, now) = (former.await.unwrap().id, now.await.unwrap().id);
    let candidacy = keys.candidacy(former);
    let node = r#"{"id":"p","ip":"10.0.0.1","priority":10}"#;
    let left = Txn::new()
        .put(keys.registration("p"), node.into(), Some(now))
        .put(candidacy.clone(), "p".into(), Some(former));
    store.txn(left).await.unwrap();
    let created = store.entry(&candidacy).unwrap().create_revision;
    let asks = format!(r#"{{"to":"{candidacy}","created":{created},"priority":10}}"#);
    let ask = Txn::new().put(keys.handover(former), asks.into(), Some(former));
    store.txn(ask).await.unwrap();
    let before = store.revision();
    for _ in 0..300 {
        sleep(SECOND / 10).await;
        assert_eq!(leader.node.leadership().map(|term| term.epoch), Some(epoch));
    }
    let written = store.revision() - before;
    assert!(written < 3, "{written} writes");
    // Once the former lease is over, nobody is ahead of the process itself.
    let priority = run(builder(&store, "p").priority(10));
    until("p leads", || priority.node.is_leader()).await;
}

/// Whoever revokes a lease by hand puts its node back in the queue, and does not take it out for as long as its TTL.
#[tokio::test(start_paused = true)]
async fn a_lease_that_was_revoked_is_replaced_at_once() {
    let store = MemoryStore::new();
    let running = run(builder(&store, "n1").ttl(3_600));
    running.node.until_registered().await.unwrap();
    until("it leads", || running.node.is_leader()).await;
    let registration = GroupKeys::new("", "g").registration("n1");
    for _ in 0..3 {
        let lease = store.entry(&registration).unwrap().lease.unwrap();
        sleep(SECOND * 60).await;
        store.expire_lease(lease);
        let back = until("it is registered again", || {
            let entry = store.entry(&registration);
            entry.is_some_and(|entry| entry.lease != Some(lease))
        });
        assert!(back.await < SECOND * 5);
        until("it leads again", || running.node.is_leader()).await;
    }
}

/// Collects what is logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// With one subscriber only, `tracing` asks the thread that reaches a log line first whether anybody
/// wants it; if that is the thread of another test, the line is off for this one too.
static SECOND_SUBSCRIBER: LazyLock<tracing::Dispatch> =
    LazyLock::new(|| tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default()));

#[tokio::test(start_paused = true)]
async fn every_line_of_a_run_has_the_group_and_the_node_at_any_level() {
    LazyLock::force(&SECOND_SUBSCRIBER);
    for level in [tracing::Level::WARN, tracing::Level::DEBUG] {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let store = MemoryStore::new();
        let running = start(&store, "n1");
        running.node.until_leading().await.unwrap();
        store.set_fault(Some(Fault::Refuse));
        sleep(3 * TTL).await;
        running.stop.send(()).unwrap();
        running.task.await.unwrap().unwrap();
        let text = String::from_utf8(lock(&log.0).clone()).unwrap();
        let of_worker = |line: &&str| line.contains("pingora_etcd::worker");
        let lines: Vec<_> = text.lines().filter(of_worker).collect();
        for said in [
            "cannot be renewed",
            "node is unhealthy",
            "node left without",
        ] {
            assert!(lines.iter().any(|line| line.contains(said)), "{text}");
        }
        for line in lines {
            assert!(line.contains("node{group=g node=n1}:"), "{line}");
        }
        if level == tracing::Level::DEBUG {
            let within = "node{group=g node=n1}:session{lease=";
            assert!(text.contains(within), "{text}");
            assert!(text.contains("}:election: "), "{text}");
        }
    }
}

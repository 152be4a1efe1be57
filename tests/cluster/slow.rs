//! Tests that a slow etcd is treated as slow and not as dead, that an etcd is found again soon
//! after an outage, and that a call that is not polled blocks nobody.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use pingora_etcd::store::{EtcdStore, Selector, Store, WatchRange};
use pingora_etcd::{
    ClusterError, ClusterNode, EtcdOptions, discovery::DiscoveryStatus, worker::SessionState,
};

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::{eventually, group, throughout, within};
use super::{Running, builder, watch_group};

/// The time limit for what takes many slow round trips.
const SLOW_DEADLINE: Duration = Duration::from_secs(50);

async fn soon(what: &str, time: Duration, mut state: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !state() {
        assert!(start.elapsed() < time, "not within {time:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    start.elapsed()
}

async fn put(etcd: &Etcd, group: &str, id: &str) {
    let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1","port":8080}}"#);
    let mut client = etcd.raw_client().await;
    let key = format!("registry/{group}/{id}");
    client.put(key, value, None).await.unwrap();
}

/// Checks that during `time` the lease is never lost and no other term begins. With responses that
/// take 4 s a leader has only a second to spare, which a busy machine may use up: it then does not
/// lead for a moment, and continues in the same term.
async fn keeps_its_lease(node: &ClusterNode, epoch: i64, time: Duration) {
    throughout("the lease is never lost", time, || {
        let state = node.session_state();
        let lives = !matches!(state, SessionState::Lost | SessionState::BackingOff);
        lives && node.leadership().is_none_or(|term| term.epoch == epoch)
    })
    .await;
    soon("the node leads", SLOW_DEADLINE, || {
        node.leadership().is_some_and(|term| term.epoch == epoch)
    })
    .await;
}

async fn changes_are_late_not_lost(each_way: Duration) {
    let etcd = Etcd::shared();
    let group = group("far");
    let (reading, working) = (
        Link::to(etcd.address()).await,
        Link::to(etcd.address()).await,
    );
    for link in [&reading, &working] {
        link.set_delay(each_way);
    }
    let start = Instant::now();
    let discovery = watch_group(&reading.options(), &group);
    let node = builder(&working.options(), &group, "w").ttl(10);
    let node = Running::new(node.try_build().unwrap());
    let took = soon("the discovery is ready", SLOW_DEADLINE, || {
        discovery.is_ready()
    })
    .await;
    println!("{each_way:?}: ready after {took:?}");
    // A connection and two lists, counted in round trips, with the same again in reserve.
    assert!(took < each_way * 2 * 8 + Duration::from_secs(2), "{took:?}");
    soon("the node leads", SLOW_DEADLINE, || node.node.is_leader()).await;
    println!("{each_way:?}: leads after {:?}", start.elapsed());
    let led_since = Instant::now();
    let lease = node.node.leadership().unwrap().epoch;
    for index in 0..8 {
        put(&etcd, &group, &format!("n{index}")).await;
    }
    let took = soon("the discovery shows all changes", SLOW_DEADLINE, || {
        discovery.nodes().len() == 9
    })
    .await;
    println!("{each_way:?}: 8 of 8 shown after {took:?}");
    let rest = Duration::from_secs(30).saturating_sub(led_since.elapsed());
    keeps_its_lease(&node.node, lease, rest).await;
    soon("the discovery is live", SLOW_DEADLINE, || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    println!(
        "{each_way:?}: {} and {} connections in {:?}",
        reading.connections(),
        working.connections(),
        start.elapsed()
    );
    assert!(reading.connections() <= 4 && working.connections() <= 4);
    // Crashes the node, because a regular stop over this link takes long.
    node.crash();
}

/// From the delay at which earlier versions failed, upwards.
#[tokio::test]
async fn with_400_to_1_400_ms_each_way_changes_are_late_and_a_lease_is_kept() {
    let all = [400, 600, 1_000, 1_400]
        .map(|each_way| tokio::spawn(changes_are_late_not_lost(Duration::from_millis(each_way))));
    for one in all {
        one.await.unwrap();
    }
}

#[tokio::test]
async fn with_800_ms_each_way_changes_are_late_and_a_lease_is_kept() {
    changes_are_late_not_lost(Duration::from_millis(800)).await;
}

#[tokio::test]
async fn with_2_s_each_way_changes_are_late_and_a_lease_is_kept() {
    changes_are_late_not_lost(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn a_link_that_becomes_slow_does_not_cost_the_lease() {
    let etcd = Etcd::shared();
    let group = group("slows");
    let link = Link::to(etcd.address()).await;
    let node = builder(&link.options(), &group, "w").ttl(10);
    let node = Running::new(node.try_build().unwrap());
    within("the node leads", node.node.wait_for_leadership()).await;
    let discovery = watch_group(&link.options(), &group);
    within("the discovery is ready", discovery.wait_ready()).await;
    let epoch = node.node.leadership().unwrap().epoch;
    // What the node writes at the start of its term has been answered: a request in flight just now would be lost with
    // its connection.
    let mut client = etcd.raw_client().await;
    let election = format!("election/{group}/");
    within("the term is announced", async {
        loop {
            let prefix = etcd_client::GetOptions::new().with_prefix();
            let found = client.get(&*election, Some(prefix)).await.unwrap();
            if found.kvs().first().is_some_and(|entry| entry.version() > 1) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    link.set_delay(Duration::from_secs(2));
    keeps_its_lease(&node.node, epoch, Duration::from_secs(30)).await;
    put(&etcd, &group, "n").await;
    soon("the discovery shows the change", SLOW_DEADLINE, || {
        discovery.nodes().len() == 2
    })
    .await;
    println!("{} connections", link.connections());
    assert!(link.connections() <= 10);
    node.crash();
}

#[tokio::test]
async fn an_etcd_that_stalls_for_three_seconds_is_not_left() {
    let etcd = Etcd::own();
    let group = group("stalls");
    let link = Link::to(etcd.address()).await;
    let discovery = watch_group(&link.options(), &group);
    within("the discovery is ready", discovery.wait_ready()).await;
    let node = builder(&link.options(), &group, "w").ttl(10);
    let node = Running::new(node.try_build().unwrap());
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let before = link.connections();
    etcd.pause();
    throughout("the node keeps leading", Duration::from_secs(3), || {
        node.node.is_leader()
    })
    .await;
    etcd.resume();
    throughout("the node keeps leading", Duration::from_secs(3), || {
        node.node.is_leader()
    })
    .await;
    assert!(link.connections() <= before + 1, "{}", link.connections());
    eventually("the discovery is live", || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    node.stop().await;
}

#[tokio::test]
async fn after_an_outage_all_are_back_within_five_seconds_without_hammering() {
    let etcd = Etcd::own();
    let group = group("away");
    let link = Link::to(etcd.address()).await;
    let discovery = watch_group(&link.options(), &group);
    within("the discovery is ready", discovery.wait_ready()).await;
    let node = builder(&etcd.options(), &group, "w").ttl(5);
    let node = Running::new(node.try_build().unwrap());
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    etcd.stop();
    let (before, start) = (link.connections(), Instant::now());
    // Long enough for an exponential backoff to become long.
    throughout(
        "the discovery is not live without etcd",
        Duration::from_secs(25),
        || discovery.status() != DiscoveryStatus::Live || start.elapsed() < Duration::from_secs(1),
    )
    .await;
    let dials = link.connections() - before;
    println!("{dials} dials in {:?}", start.elapsed());
    // The transport may dial once more before it notices that its connection is gone.
    assert!((8..=27).contains(&dials), "{dials}");
    etcd.start();
    let back = Instant::now();
    soon("the discovery is live", Duration::from_secs(5), || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    println!("live after {:?}", back.elapsed());
    soon("the worker leads", Duration::from_secs(5), || {
        node.node.is_leader()
    })
    .await;
    node.stop().await;
}

#[tokio::test]
async fn a_call_that_is_not_polled_holds_nobody_up() {
    let etcd = Etcd::shared();
    let (silent, good) = (
        Link::to(etcd.address()).await,
        Link::to(etcd.address()).await,
    );
    silent.set_silent(true);
    let endpoints = [silent.address(), good.address()].map(|address| format!("http://{address}"));
    let options = EtcdOptions::new(endpoints)
        .connect_timeout(Duration::from_millis(300))
        .shuffle_endpoints(false);
    let store = EtcdStore::new(options).unwrap();
    let any = Selector::Key("any".to_owned());
    // The call is started, polled once, and then kept without being polled.
    let mut begun = pin!(store.list(&any, None));
    let mut context = Context::from_waker(Waker::noop());
    assert!(begun.as_mut().poll(&mut context).is_pending());
    let start = Instant::now();
    store.list(&any, None).await.unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    let mut begun = pin!(async {
        let answered = begun.await;
        answered.map(drop)
    });
    assert!(matches!(
        within("the first call completes, too", &mut begun).await,
        Ok(())
    ));
    // The same with a runtime that nobody drives any more.
    let idle = tokio::task::spawn_blocking({
        let store = EtcdStore::new(
            EtcdOptions::new([format!("http://{}", silent.address())])
                .connect_timeout(Duration::from_millis(300)),
        )
        .unwrap();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let given_up = runtime.block_on(async {
                let any = Selector::Key("any".to_owned());
                tokio::time::timeout(Duration::from_millis(50), store.list(&any, None)).await
            });
            assert!(given_up.is_err());
            (runtime, store)
        }
    });
    let (runtime, store) = idle.await.unwrap();
    silent.set_silent(false);
    let answered = async {
        while store.list(&any, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("another runtime connects", answered).await;
    runtime.shutdown_background();
}

#[tokio::test]
async fn dialling_ends_with_the_last_handle() {
    let etcd = Etcd::shared();
    let link = Link::to(etcd.address()).await;
    link.set_silent(true);
    let store = EtcdStore::new(link.options()).unwrap();
    let any = Selector::Key("any".to_owned());
    let clone = store.clone();
    tokio::select! {
        _ = clone.list(&any, None) => panic!("nobody answers"),
        _ = eventually("it is dialled", || link.connections() == 1) => {}
    }
    drop((store, clone));
    let before = link.connections();
    assert_eq!(before, 1);
    link.set_silent(false);
    eventually("the connection is closed", || link.open() == 0).await;
    throughout(
        "no further connection is made",
        Duration::from_secs(2),
        || link.connections() == before,
    )
    .await;
}

#[tokio::test]
async fn a_watch_that_is_not_read_is_ended_and_costs_nobody_the_connection() {
    let etcd = Etcd::shared();
    let prefix = format!("{}/", group("unread"));
    let link = Link::to(etcd.address()).await;
    let store = Arc::new(EtcdStore::new(link.options()).unwrap());
    let ranges = || {
        vec![WatchRange {
            keys: Selector::Prefix(prefix.clone()),
            from: 0,
        }]
    };
    let mut unread = store.watch(ranges()).await.unwrap();
    let mut read = store.watch(ranges()).await.unwrap();
    let writing = {
        let (etcd, prefix) = (etcd.clone(), prefix.clone());
        tokio::spawn(async move {
            let mut client = etcd.raw_client().await;
            for index in 0..3_000 {
                client
                    .put(format!("{prefix}k"), index.to_string(), None)
                    .await
                    .unwrap();
            }
        })
    };
    let mut seen = 0;
    while seen < 3_000 {
        seen += within("a change arrives", read.next()).await.unwrap().len();
    }
    writing.await.unwrap();
    let ended = async {
        let mut received = 0;
        loop {
            match unread.next().await {
                Ok(events) => received += events.len(),
                Err(error) => return (received, error),
            }
        }
    };
    let (received, error) = within("the unread watch is ended", ended).await;
    assert!(matches!(error, ClusterError::TooSlow { .. }), "{error}");
    assert!(received < 3_000, "{received}");
    // A new watch continues from its position, and no connection was lost.
    let mut resumed = store.watch(unread.position().to_vec()).await.unwrap();
    drop(unread);
    while seen < 6_000 - received {
        seen += within("a change arrives", resumed.next())
            .await
            .unwrap()
            .len();
    }
    let mut client = etcd.raw_client().await;
    client
        .put(format!("{prefix}k"), "last", None)
        .await
        .unwrap();
    assert_eq!(
        within("a change arrives", read.next()).await.unwrap().len(),
        1
    );
    assert_eq!(link.connections(), 1);
}

#[tokio::test]
async fn what_runs_on_a_connection_ends_with_the_last_handle() {
    let etcd = Etcd::shared();
    let link = Link::to(etcd.address()).await;
    // The store runs a task that follows the members, one for the watches, and one that renews the
    // lease.
    let store = EtcdStore::new(link.options().sync_endpoints(true)).unwrap();
    let ranges = vec![WatchRange {
        keys: Selector::Key("any".to_owned()),
        from: 0,
    }];
    let watcher = store.watch(ranges).await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let mut keeper = store.keeper(lease);
    keeper.renew(Duration::from_secs(3)).await.unwrap();
    assert_eq!(link.open(), 1);
    drop((store, keeper));
    throughout(
        "the watch keeps the connection open",
        Duration::from_millis(500),
        || link.open() == 1,
    )
    .await;
    drop(watcher);
    eventually("the connection is closed", || link.open() == 0).await;
    assert_eq!(link.connections(), 1);
}

/// A runtime that shuts down drops tasks that are spawned on it, among them the task that connects;
/// the store must notice that.
#[test]
fn a_call_on_a_runtime_that_ends_or_on_none_holds_nobody_up() {
    let etcd = Etcd::shared();
    let store = EtcdStore::new(etcd.options()).unwrap();
    let any = Selector::Key("any".to_owned());
    // Polls a call while its runtime is shut down, as the last task in it.
    struct Last(EtcdStore, Selector);
    impl Drop for Last {
        fn drop(&mut self) {
            let mut list = pin!(self.0.list(&self.1, None));
            let mut context = Context::from_waker(Waker::noop());
            let _ = list.as_mut().poll(&mut context);
        }
    }
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let ending = runtime();
    let last = Last(store.clone(), any.clone());
    ending.spawn(async move {
        let _last = last;
        std::future::pending::<()>().await;
    });
    let (done, is_done) = std::sync::mpsc::channel();
    let (other, of_other) = (store.clone(), any.clone());
    std::thread::spawn(move || {
        ending.shutdown_timeout(Duration::from_secs(5));
        // Without a runtime the call panics, like every call that spawns a task, but leaves no lock
        // behind.
        let none = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut list = pin!(other.list(&of_other, None));
            let mut context = Context::from_waker(Waker::noop());
            let _ = list.as_mut().poll(&mut context);
        }));
        let _ = done.send(none.is_err());
    });
    let panicked = is_done.recv_timeout(Duration::from_secs(20));
    assert!(panicked.expect("the call must not hang"));
    runtime().block_on(async { within("an answer", store.list(&any, None)).await.unwrap() });
}

//! Tests the fields of `cluster.etcd` from outside: each is compared with the same balancer with
//! another value.

use std::time::{Duration, Instant};

use serde_json::json;

use super::common::etcd::{Etcd, Setup as EtcdSetup, binary};
use super::common::link::Link;
use super::common::scripted::{Answer, Scripted, status};
use super::common::{eventually, free_port, group, local, skipped};
use super::etcd_cluster::Cluster;
use super::world::{Backend, Balancer, Setup, may_replace_hosts, put, until};

const SECOND: Duration = Duration::from_secs(1);

fn behind(link: &Link) -> Vec<String> {
    vec![format!("http://{}", link.address())]
}

/// How long each balancer takes, from its start, until it serves `a`.
async fn served_after(setups: [Setup; 2]) -> [Duration; 2] {
    let [one, other] = setups.map(async |setup: Setup| {
        let start = Instant::now();
        let balancer = setup.with("ready_timeout_ms: 30000").start();
        let served = async || balancer.get().await == "a";
        until("a is served", served).await;
        start.elapsed()
    });
    let (one, other) = tokio::join!(one, other);
    [one, other]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_says_nothing_is_left_after_the_time_to_connect() {
    let (etcd, group) = (Etcd::shared(), group("connect"));
    let a = Backend::start("a").await;
    put(
        &mut etcd.raw_client().await,
        &group,
        &a.entry(json!({})),
        None,
    )
    .await;
    let link = Link::to(etcd.address()).await;
    link.set_silent(true);
    let setup = |fields: &str| {
        let endpoints = [behind(&link), etcd.endpoints()].concat();
        let fields = format!("{fields}, shuffle_endpoints: false");
        Setup::new(endpoints, &group).etcd(&fields)
    };
    let [short, long] = served_after([
        setup("connect_timeout_ms: 300"),
        setup("connect_timeout_ms: 6000"),
    ])
    .await;
    assert!(short >= Duration::from_millis(300), "{short:?}");
    assert!(
        short < 5 * SECOND && long >= 6 * SECOND,
        "{short:?}, {long:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_does_not_answer_is_left_after_the_time_for_a_request() {
    let (etcd, group) = (Etcd::shared(), group("request"));
    let a = Backend::start("a").await;
    put(
        &mut etcd.raw_client().await,
        &group,
        &a.entry(json!({})),
        None,
    )
    .await;
    // The member accepts connections and reports its status, but serves no other call.
    let stuck = Scripted::start(|call| match call {
        "Status" => Answer::Message(status("3.5.30", false)),
        _ => Answer::Nothing,
    })
    .await;
    let endpoints = [vec![stuck.endpoint()], etcd.endpoints()].concat();
    let setup = |fields: &str| {
        let fields = format!("{fields}, shuffle_endpoints: false");
        Setup::new(endpoints.clone(), &group).etcd(&fields)
    };
    let [short, long] = served_after([
        setup("request_timeout_ms: 300"),
        setup("request_timeout_ms: 6000"),
    ])
    .await;
    assert!(short >= Duration::from_millis(300), "{short:?}");
    assert!(
        short < 5 * SECOND && long >= 6 * SECOND,
        "{short:?}, {long:?}"
    );
}

/// A port that accepts connections and sends nothing.
struct Mute(std::net::TcpListener);

impl Mute {
    fn bound(address: (&str, u16)) -> Self {
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    /// Whether anybody has connected since the last call.
    fn was_dialled(&self) -> bool {
        std::iter::from_fn(|| self.0.accept().ok()).count() > 0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_name_with_several_addresses_one_that_is_of_use_is_found() {
    if !may_replace_hosts() {
        skipped("replacing /etc/hosts for a program needs root");
        return;
    }
    let (etcd, group) = (Etcd::shared(), group("names"));
    let a = Backend::start("a").await;
    put(
        &mut etcd.raw_client().await,
        &group,
        &a.entry(json!({})),
        None,
    )
    .await;
    let address: std::net::SocketAddr = etcd.address().parse().unwrap();
    let port = address.port();
    let good = Link::bound(&format!("127.0.0.9:{port}"), etcd.address()).await;
    let mute = Mute::bound(("127.0.0.2", port));
    let learner = Scripted::bound(&format!("127.0.0.3:{port}"), |call| match call {
        "Status" => Answer::Message(status("3.5.30", true)),
        _ => Answer::Refused(9, "etcdserver: rpc not supported for learner"),
    })
    .await;
    let serve = async |what: &str, bad: &[&str]| {
        let lines: String = bad
            .iter()
            .chain(&["127.0.0.9"])
            .map(|address| format!("{address} etcd.test\n"))
            .collect();
        let endpoints = vec![format!("http://etcd.test:{port}")];
        let setup = Setup::new(endpoints, &group).hosts(&lines);
        let (start, before) = (Instant::now(), good.connections());
        let balancer = setup.with("ready_timeout_ms: 30000").start();
        until(&format!("{what}: a is served"), async || {
            balancer.get().await == "a"
        })
        .await;
        let took = start.elapsed();
        println!("{what}: after {took:?}");
        assert!(took < 10 * SECOND, "{what}: {took:?}");
        assert!(good.connections() > before, "{what}");
    };
    serve("an address that nobody listens on", &["127.0.0.4"]).await;
    // A program begins with one of the addresses at random: one of the next programs begins with
    // the bad one.
    until("the silent address is dialled", async || {
        serve("a silent address", &["127.0.0.2"]).await;
        mute.was_dialled()
    })
    .await;
    until("the learner is dialled", async || {
        serve("the address of a learner", &["127.0.0.3"]).await;
        !learner.calls().is_empty()
    })
    .await;
    serve("all of these", &["127.0.0.4", "127.0.0.2", "127.0.0.3"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_on_which_nothing_is_heard_is_pinged_as_often_as_is_set() {
    let (etcd, group) = (Etcd::shared(), group("pinged"));
    let often = Link::to(etcd.address()).await;
    let seldom = Link::to(etcd.address()).await;
    let setup = |link: &Link, interval: u32| {
        // Progress requests are off as well, because their responses would prevent pings.
        let fields = format!("silence_timeout_ms: 300000, keep_alive_interval_ms: {interval}");
        Setup::new(behind(link), &group).etcd(&fields)
    };
    let _often = setup(&often, 10_000).serving().await;
    let _seldom = setup(&seldom, 3_600_000).serving().await;
    let start = Instant::now();
    eventually("the second ping is sent", || often.pings() >= 2).await;
    assert!(start.elapsed() > 8 * SECOND, "{:?}", start.elapsed());
    assert_eq!(seldom.pings(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_so_many_failures_etcd_is_asked_after_a_pause_only() {
    let group = group("breaker");
    let nowhere = vec![format!("http://{}:{}", local(), free_port())];
    let setup = |fields: &str| Setup::new(nowhere.clone(), &group).etcd(fields).start();
    let (once, often) = (
        setup("breaker_failures: 1, breaker_pause_ms: 60000"),
        setup("breaker_failures: 1000000"),
    );
    let logs_open_circuit =
        |balancer: &Balancer| balancer.log_text().contains("several times in a row");
    until("the open circuit is logged", async || {
        logs_open_circuit(&once)
    })
    .await;
    until("the other one keeps trying", async || {
        often.log_text().matches("etcd").count() >= 6
    })
    .await;
    assert!(!logs_open_circuit(&often), "{}", often.log_text());

    // A pause that is over soon, and a long one.
    let (etcd, group) = (Etcd::own(), super::common::group("breaker"));
    let mut keys = etcd.raw_client().await;
    let [a, b] = [Backend::start("a").await, Backend::start("b").await];
    put(&mut keys, &group, &a.entry(json!({})), None).await;
    let setup = |pause: u32| {
        let fields = format!("breaker_failures: 1, breaker_pause_ms: {pause}");
        Setup::new(etcd.endpoints(), &group).etcd(&fields)
    };
    let (short, long) = (setup(100).serving().await, setup(20_000).serving().await);
    for balancer in [&short, &long] {
        balancer.until_served_by(&["a"]).await;
    }
    etcd.stop();
    for balancer in [&short, &long] {
        until("the open circuit is logged", async || {
            logs_open_circuit(balancer)
        })
        .await;
    }
    let opened = Instant::now();
    etcd.start();
    put(&mut keys, &group, &b.entry(json!({})), None).await;
    short.until_served_by(&["a", "b"]).await;
    assert!(opened.elapsed() < 10 * SECOND, "{:?}", opened.elapsed());
    assert!(!long.gets(8).await.contains_key("b"));
    long.until_served_by(&["a", "b"]).await;
    assert!(opened.elapsed() > 15 * SECOND, "{:?}", opened.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_members_that_etcd_names_are_endpoints_too() {
    let group = group("members");
    // etcd is reached at another address than the one it advertises.
    let etcd = Etcd::with(EtcdSetup {
        arguments: vec!["--advertise-client-urls=http://localhost:{port}".to_owned()],
        ..EtcdSetup::default()
    });
    let mut keys = etcd.raw_client().await;
    let [a, b] = [Backend::start("a").await, Backend::start("b").await];
    put(&mut keys, &group, &a.entry(json!({})), None).await;
    let link = Link::to(etcd.address()).await;
    let setup = |fields: &str| Setup::new(behind(&link), &group).etcd(fields);
    let (follows, stays) = (
        setup("sync_endpoints: true").serving().await,
        setup("sync_endpoints: false").serving().await,
    );
    for balancer in [&follows, &stays] {
        balancer.until_served_by(&["a"]).await;
    }
    until("the new endpoints are logged", async || {
        follows.log_text().contains("follow the members")
    })
    .await;
    link.set_silent(true);
    put(&mut keys, &group, &b.entry(json!({})), None).await;
    follows.until_served_by(&["a", "b"]).await;
    assert!(!stays.gets(8).await.contains_key("b"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_with_one_list_of_endpoints_is_spread_over_them() {
    let (etcd, group) = (Etcd::shared(), group("shuffled"));
    let a = Backend::start("a").await;
    let mut keys = etcd.raw_client().await;
    put(&mut keys, &group, &a.entry(json!({})), None).await;
    let (first, second) = (
        Link::to(etcd.address()).await,
        Link::to(etcd.address()).await,
    );
    let serve = async |field: &str| {
        let setup = Setup::new([behind(&first), behind(&second)].concat(), &group);
        let balancer = setup.etcd(field).serving().await;
        assert_eq!(balancer.get().await, "a");
    };
    for _ in 0..4 {
        serve("shuffle_endpoints: false").await;
    }
    assert!(first.connections() >= 4);
    assert_eq!(second.connections(), 0);
    // As it is without the field. By chance all of so many would use the same one once in 10^11 times.
    let before = first.connections();
    for _ in 0..40 {
        serve("request_timeout_ms: 3000").await;
        if first.connections() > before && second.connections() > 0 {
            return;
        }
    }
    panic!("40 processes have used the same endpoint");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_it_starts_with_what_one_member_has_if_that_is_asked_for() {
    let binary = binary().expect("this needs an etcd binary");
    let group = group("quorum");
    let mut cluster = Cluster::start(&binary, 3, None).await;
    let a = Backend::start("a").await;
    put(&mut cluster.client(0), &group, &a.entry(json!({})), None).await;
    // Writes through every member, so that each of them has the entry of `a`.
    for index in 0..3 {
        put(
            &mut cluster.client(index),
            "other",
            &a.entry(json!({})),
            None,
        )
        .await;
    }
    cluster.kill(1);
    cluster.kill(2);
    let addresses = cluster.addresses().into_iter();
    let endpoints: Vec<_> = addresses
        .map(|address| format!("http://{address}"))
        .collect();
    let setup = |fields: &str| {
        let times = "connect_timeout_ms: 500, request_timeout_ms: 500";
        let setup = Setup::new(endpoints.clone(), &group).etcd(&format!("{times}, {fields}"));
        setup.with("ready_timeout_ms: 2000")
    };
    let (with, without) = (
        setup("serializable_fallback: true").serving().await,
        setup("serializable_fallback: false").serving().await,
    );
    with.until_served_by(&["a"]).await;
    assert_eq!(without.get().await, "503");
    cluster.launch(1);
    without.until_served_by(&["a"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_in_the_file_is_the_users() {
    let (etcd, group) = (Etcd::own(), group("password"));
    let mut root = etcd.raw_client().await;
    let a = Backend::start("a").await;
    put(&mut root, &group, &a.entry(json!({})), None).await;
    root.user_add("root", "secret-of-root", None).await.unwrap();
    root.role_add("root").await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.auth_enable().await.unwrap();
    let setup = |password: &str| {
        let fields = format!("user: root, password: {password}");
        Setup::new(etcd.endpoints(), &group)
            .etcd(&fields)
            .with("ready_timeout_ms: 1000")
    };
    let (right, wrong) = (
        setup("secret-of-root").serving().await,
        setup("another-secret").serving().await,
    );
    right.until_served_by(&["a"]).await;
    assert_eq!(wrong.get().await, "503");
    until("the reason is logged", async || {
        wrong.log_text().contains("password")
    })
    .await;
    for balancer in [&right, &wrong] {
        let text = balancer.log_text();
        assert!(!text.contains("secret"), "{text}");
    }
}

//! Tests that each field of the YAML file does what its comment says.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::stalls::Stalls;
use super::common::{free_port, group, local};
use super::world::{Backend, Balancer, Setup, delete, entry, put, until};

/// A group with two backends, registered with these fields and without a lease.
async fn two(name: &str, a: Value, b: Value) -> (Setup, etcd_client::Client, [Backend; 2]) {
    let (etcd, group) = (Etcd::shared(), group(name));
    let mut keys = etcd.raw_client().await;
    let backends = [Backend::start("a").await, Backend::start("b").await];
    for (backend, more) in backends.iter().zip([a, b]) {
        put(&mut keys, &group, &backend.entry(more), None).await;
    }
    (Setup::shared(&group), keys, backends)
}

/// Both have something else to do, which requests change nothing about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_static_weight_gets_its_part_of_requests_one_after_the_other() {
    let node = |weight: u32| json!({ "weight": weight, "metadata": { "cpu_usage_percent": 50 } });
    let (setup, _, _backends) = two("small-weight", node(1), node(9)).await;
    // That one of them is a little slower must not matter.
    let adaptive = "policy: adaptive\nadaptive: { idle_latency_ms: 10000 }";
    for policy in [adaptive, "policy: headroom"] {
        let got = count_of_a(&setup, policy, 400).await;
        assert!((25..=60).contains(&got), "{policy}: {got} of 400");
    }
}

/// How many of `count` GET requests are served by backend `a`.
async fn count_of_a(setup: &Setup, fields: &str, count: usize) -> usize {
    let balancer = setup.clone().with(fields).serving().await;
    let counted = balancer.gets(count).await;
    // Shown if the test fails.
    println!("{fields}: {counted:?}\n{}", balancer.log_text());
    let known = ["a", "b"].iter().filter_map(|id| counted.get(*id));
    assert_eq!(known.sum::<usize>(), count, "{counted:?}");
    counted.get("a").copied().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_robin_random_and_candidates_keep_to_static_weights() {
    let weight = |weight: u32| json!({ "weight": weight });
    let (setup, _, _backends) = two("weights", weight(1), weight(3)).await;
    // The turns are spread as evenly as a sequence can be: of any 400 in a row, 98 to 102 are a quarter. Chance would give
    // 83 to 117.
    let turns = count_of_a(&setup, "policy: round_robin", 400).await;
    assert!((98..=102).contains(&turns), "{turns} of 400");
    let chance = count_of_a(&setup, "policy: random", 400).await;
    assert!((60..=140).contains(&chance), "{chance} of 400");
    // With a single candidate there is nothing to compare, so the draw by weight decides.
    let drawn = count_of_a(&setup, "policy: headroom\ncandidates: 1", 400).await;
    assert!((60..=140).contains(&drawn), "{drawn} of 400");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headroom_follows_what_is_reported() {
    let cpu = |percent: u32| json!({ "metadata": { "cpu_usage_percent": percent } });
    let (setup, mut keys, [a, b]) = two("headroom", cpu(100), cpu(0)).await;
    let fields = "policy: headroom\nheadroom: { cpu: 1, memory: 0, queue: 0, floor: 0.05 }";
    let loaded = count_of_a(&setup, fields, 100).await;
    assert!(loaded < 20, "{loaded} of 100");
    // With no weight for CPU, the reported CPU does not matter.
    let alike = count_of_a(
        &setup,
        "policy: headroom\nheadroom: { cpu: 0, memory: 1 }",
        100,
    )
    .await;
    assert!((25..=75).contains(&alike), "{alike} of 100");
    let balancer = setup.clone().with(fields).serving().await;
    put(&mut keys, &setup.group, &a.entry(cpu(0)), None).await;
    put(&mut keys, &setup.group, &b.entry(cpu(100)), None).await;
    until("the weights follow new metrics", async || {
        let counted = balancer.gets(50).await;
        counted.get("a").is_some_and(|a| *a > 40)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adaptive_turns_away_from_what_fails_and_back() {
    let (setup, _, [a, _b]) = two("adaptive", json!({}), json!({})).await;
    a.set_status(500);
    let fields = "policy: adaptive\nadaptive: { slow_start_ms: 0, success_gain: 0.2 }";
    let balancer = setup.with(fields).serving().await;
    until("the failing backend is avoided", async || {
        let counted = balancer.gets(50).await;
        counted.get("b").is_some_and(|b| *b >= 48)
    })
    .await;
    a.set_status(200);
    until("the recovered backend is used again", async || {
        let counted = balancer.gets(50).await;
        counted.get("a").is_some_and(|a| *a >= 10)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consistent_keeps_a_key_with_its_backend_and_spills_what_is_hot() {
    let (setup, _, [a, b]) = two("consistent", json!({}), json!({})).await;
    let setup = setup.with("policy: consistent");
    let header = setup.clone().with("hash_on: header:x-key").serving().await;
    let mut used = BTreeSet::new();
    for key in 0..24 {
        let counted = header
            .gets_with(3, |_, request| request.header("x-key", key.to_string()))
            .await;
        assert_eq!(counted.len(), 1, "key {key}: {counted:?}");
        used.extend(counted.into_keys());
    }
    assert!(used.iter().eq(["a", "b"]), "{used:?}");

    // Who has no such header goes by its address, and not all to the same one.
    let behind = "hash_on: header:x-key\nclients: { trusted_proxies: [127.0.0.0/8] }";
    let header = setup.clone().with(behind).serving().await;
    let by_client = "hash_on: client_ip\nclients: { trusted_proxies: [127.0.0.0/8] }";
    let by_client = setup.clone().with(by_client).serving().await;
    for balancer in [&header, &by_client] {
        let mut used = BTreeSet::new();
        for client in 0..24 {
            let address = format!("192.0.2.{client}");
            let counted = balancer
                .gets_with(3, |_, request| request.header("x-forwarded-for", &*address))
                .await;
            assert_eq!(counted.len(), 1, "client {client}: {counted:?}");
            used.extend(counted.into_keys());
        }
        assert!(used.iter().eq(["a", "b"]), "{used:?}");
    }

    let uri = setup.clone().with("hash_on: uri").serving().await;
    let client = client();
    let mut used = BTreeSet::new();
    for path in 0..24 {
        let get = async || {
            let response = client.get(format!("{}/{path}", uri.url)).send().await;
            response.unwrap().headers()["x-upstream-node"].clone()
        };
        let first = get().await;
        assert_eq!(get().await, first, "{path}");
        used.insert(first.to_str().unwrap().to_owned());
    }
    assert!(used.iter().eq(["a", "b"]), "{used:?}");

    // All requests of one client have the same key, until its backend has more than its share.
    let bounds = "hash_on: client_ip\nconsistent: { balance_factor: 1.01, slack: 1 }";
    let hot = setup.clone().with(bounds).serving().await;
    let usual = setup.with("hash_on: client_ip").serving().await;
    let counted = hot.gets(20).await;
    assert_eq!(counted.len(), 1, "{counted:?}");
    // All of them are there before the first one is served.
    for backend in [&a, &b] {
        backend.set_delay(Duration::from_secs(3));
    }
    let (of_hot, of_usual) = tokio::join!(four_at_once(&hot), four_at_once(&usual));
    assert!(of_hot.iter().eq(["a", "b"]), "{of_hot:?}");
    // So few are no reason to leave it where nothing is set.
    let is_one = of_usual.len() == 1 && of_usual.is_subset(&of_hot);
    assert!(is_one, "{of_usual:?}");
}

/// Who serves four requests that are sent at once.
async fn four_at_once(balancer: &Balancer) -> BTreeSet<String> {
    let get = || balancer.get();
    <[String; 4]>::from(tokio::join!(get(), get(), get(), get())).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_own_zone_comes_first() {
    let zone = |zone: &str| json!({ "zone": zone });
    let (setup, _, _backends) = two("zone", zone("x"), zone("y")).await;
    // The response times of a busy machine must not matter.
    let own = count_of_a(&setup, "zone: x\nzones: { stretch_limit: 100 }", 100).await;
    assert!(own >= 80, "{own} of 100");
    let beside = count_of_a(&setup, "zone_of: b\nzones: { stretch_limit: 100 }", 100).await;
    assert!(beside <= 20, "{beside} of 100");
    let spilled = count_of_a(
        &setup,
        "zone: x\nzones: { least_spill: 1, stretch_limit: 100 }",
        100,
    )
    .await;
    assert!((25..=75).contains(&spilled), "{spilled} of 100");
    let none = count_of_a(&setup, "zone: null", 100).await;
    assert!((25..=75).contains(&none), "{none} of 100");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_traffic_leaves_a_zone_for_a_rise_of_latency_that_does_not_count() {
    let zone = |zone: &str| json!({ "zone": zone });
    let (setup, _, [a, _b]) = two("zone-latency", zone("x"), zone("y")).await;
    let start = async |idle_latency_ms: u32| {
        let fields = format!(
            "zone: x\nzones: {{ least_spill: 0 }}\nadaptive: {{ idle_latency_ms: {idle_latency_ms} }}"
        );
        setup.clone().with(&fields).serving().await
    };
    let (sensitive, tolerant) = (start(0).await, start(10_000).await);
    // Some ticks, which show how fast the zone is.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        sensitive.gets(25).await;
        assert_eq!(tolerant.gets(25).await.get("b"), None);
    }
    a.set_delay(Duration::from_millis(20));
    until("traffic leaves the zone", async || {
        assert_eq!(tolerant.gets(25).await.get("b"), None);
        let counted = sensitive.gets(25).await;
        counted.get("b").is_some_and(|b| *b >= 5)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once() {
    let (etcd, group) = (Etcd::shared(), group("entries"));
    let mut keys = etcd.raw_client().await;
    let [good, other] = [Backend::start("good").await, Backend::start("other").await];
    let last = Backend::start("last").await;
    let wanted = json!({ "zone": "x", "tags": ["web", "new"] });
    put(&mut keys, &group, &good.entry(wanted.clone()), None).await;
    // Each of these would be served if it were accepted.
    let with = |id: &str, field: &str, value: Value| {
        let mut fields = wanted.clone();
        fields[field] = value;
        let mut entry = entry(id, Some(good.port), fields);
        if field == "port" {
            entry[field] = json!(other.port);
        }
        entry
    };
    let nested = (0..12).fold(json!(1), |inner, _| json!([inner]));
    let skipped = [
        with("network", "ip", json!("127.0.0.2")),
        with("port", "port", json!(other.port)),
        with("large", "metadata", json!("x".repeat(4000))),
        with("deep", "metadata", json!({ "x": nested })),
        with("many", "metadata", json!({ "x": vec![1; 40] })),
    ];
    let filtered = [
        with("zone", "zone", json!("y")),
        with("tag", "tags", json!(["new"])),
    ];
    for entry in skipped.iter().chain(&filtered) {
        put(&mut keys, &group, entry, None).await;
    }
    for (id, text) in [
        ("broken", "{"),
        ("mismatch", "{\"id\":\"n\",\"ip\":\"127.0.0.1\"}"),
    ] {
        keys.put(format!("registry/{group}/{id}"), text, None)
            .await
            .unwrap();
    }
    let fields = format!(
        "policy: round_robin\nfilter: {{ zones: [x], tags: [web] }}\nallowed_networks: [127.0.0.1]\n\
         allowed_ports: [{}, {}]\nlimits: {{ value_bytes: 2000, depth: 8, values: 32 }}",
        good.port, last.port
    );
    let setup = Setup::shared(&group);
    let balancer = setup.clone().with(&fields).serving().await;
    balancer.until_served_by(&["good"]).await;
    // The rejected entries are written again, and the valid one too.
    for entry in &skipped {
        put(&mut keys, &group, entry, None).await;
    }
    put(
        &mut keys,
        &group,
        &good.entry(json!({ "zone": "x", "tags": ["web"] })),
        None,
    )
    .await;
    // Changes are seen in their order: with the last one the balancer has seen them all.
    put(&mut keys, &group, &last.entry(wanted.clone()), None).await;
    balancer.until_served_by(&["good", "last"]).await;
    assert_eq!(balancer.gets(40).await.len(), 2);
    assert_eq!(other.requests(), 0);
    let text = balancer.log_text();
    for id in [
        "network", "port", "large", "deep", "many", "broken", "mismatch",
    ] {
        let key = format!("registry/{group}/{id}");
        assert_eq!(text.matches(&key).count(), 1, "{id}: {text}");
    }
    drop(balancer);
    delete(&mut keys, &group, "last").await;

    // Limits on the number of nodes and on the length of a key.
    let long = entry(&"long".repeat(30), Some(good.port), json!({}));
    put(&mut keys, &group, &long, None).await;
    let fields = format!(
        "policy: round_robin\nfilter: {{ zones: [x] }}\nlimits: {{ nodes: 1, key_bytes: {} }}",
        64 + group.len()
    );
    let balancer = setup.with(&fields).serving().await;
    until("one node is served", async || {
        !balancer.gets(1).await.contains_key("503")
    })
    .await;
    assert_eq!(balancer.gets(20).await.len(), 1);
    assert!(
        balancer.log_text().contains("longlong"),
        "{}",
        balancer.log_text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tries_time_outs_and_the_default_port() {
    let (etcd, group) = (Etcd::shared(), group("tries"));
    let mut keys = etcd.raw_client().await;
    let good = Backend::start("good").await;
    put(&mut keys, &group, &entry("good", None, json!({})), None).await;
    let port = format!("default_port: {}\npolicy: round_robin", good.port);
    let setup = Setup::shared(&group).with(&port);
    setup.serving().await.until_served_by(&["good"]).await;

    // Nobody listens on this port.
    put(
        &mut keys,
        &group,
        &entry("dead", Some(free_port()), json!({})),
        None,
    )
    .await;
    let retrying = setup.clone().serving().await;
    until("both backends are known", async || {
        retrying.log_text().contains("group loaded")
    })
    .await;
    let counted = retrying.gets(20).await;
    assert_eq!(counted.get("good"), Some(&20), "{counted:?}");
    let once = setup.clone().with("retries: 0").serving().await;
    let counted = once.gets(20).await;
    assert!(counted.len() > 1, "{counted:?}");
    delete(&mut keys, &group, "dead").await;

    // A backend that responds too late, and one that accepts no connection.
    good.set_delay(Duration::from_secs(5));
    let fields = "retries: 0\ntimeouts: { response_ms: 200 }";
    let limited = setup.clone().with(fields).serving().await;
    let start = Instant::now();
    assert_eq!(limited.get().await, "504");
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(190) && took < Duration::from_secs(2),
        "{took:?}"
    );
    let (full, _held) = full_listener().await;
    put(
        &mut keys,
        &group,
        &entry("good", Some(full), json!({})),
        None,
    )
    .await;
    // The default is between these two.
    let after = async |connect_ms: u32| {
        let fields = format!("retries: 0\ntimeouts: {{ connect_ms: {connect_ms} }}");
        let balancer = setup.clone().with(&fields).listening().await;
        let (stalls, start) = (Stalls::watch(), Instant::now());
        assert_eq!(balancer.get().await, "504", "{connect_ms}");
        (start.elapsed(), stalls.so_far())
    };
    let ((short, stood), (long, _)) = tokio::join!(after(300), after(4_000));
    assert!(
        short >= Duration::from_millis(290) && short < Duration::from_secs(3) + stood,
        "{short:?}, of which the machine stood still for {stood:?}"
    );
    assert!(long >= Duration::from_millis(3_500), "{long:?}");
}

/// A port where connections are neither accepted nor refused, because its backlog is full.
async fn full_listener() -> (u16, impl Sized) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((local(), 0).into()).unwrap();
    let listener = socket.listen(1).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut held = Vec::new();
    let connect = || tokio::net::TcpStream::connect((local(), port));
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(300), connect()).await {
        held.push(stream);
    }
    (port, (listener, held))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_of_the_view_keep_their_distance() {
    let (setup, mut keys, [a, b]) = two("interval", json!({}), json!({})).await;
    let group = setup.group.clone();
    delete(&mut keys, &group, "b").await;
    let fields =
        "policy: round_robin\npublish_interval_ms: 6000\nself_preservation: { enabled: false }";
    let balancer = setup.with(fields).serving().await;
    balancer.until_served_by(&["a"]).await;
    put(&mut keys, &group, &b.entry(json!({})), None).await;
    balancer.until_served_by(&["a", "b"]).await;
    // The previous update has just been published, so this one must wait.
    let start = Instant::now();
    delete(&mut keys, &group, "a").await;
    balancer.until_served_by(&["b"]).await;
    let took = start.elapsed();
    assert!(
        took > Duration::from_secs(3) && took < Duration::from_secs(15),
        "{took:?}"
    );
    assert!(a.requests() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_prefix_goes_before_every_key() {
    let (etcd, group) = (Etcd::shared(), group("prefix"));
    let mut keys = etcd.raw_client().await;
    let [inside, outside] = [
        Backend::start("inside").await,
        Backend::start("outside").await,
    ];
    let key = format!("apps/one/registry/{group}/inside");
    keys.put(key, inside.entry(json!({})).to_string(), None)
        .await
        .unwrap();
    put(&mut keys, &group, &outside.entry(json!({})), None).await;
    let setup = Setup::shared(&group).etcd("key_prefix: 'apps/one/'");
    setup.serving().await.until_served_by(&["inside"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_waits_for_a_leader_for_as_long_as_is_set() {
    let (setup, _, _backends) = two("leader-wait", json!({}), json!({})).await;
    let setup = setup.program("leader_routing");
    for (fields, least, most) in [("leader_wait_ms: 300", 300, 1500), ("", 2000, 3500)] {
        let routing = setup.clone().with(fields).serving().await;
        let stalls = Stalls::watch();
        let start = Instant::now();
        let response = client().post(&routing.url).send().await.unwrap();
        let took = start.elapsed().as_millis();
        let most = most + stalls.so_far().as_millis();
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
        assert!((least..most).contains(&took), "{took} ms");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_expiry_does_not_empty_the_pool_while_requests_succeed() {
    let (etcd, group) = (Etcd::shared(), group("mass"));
    let mut keys = etcd.raw_client().await;
    let lease = keys.lease_grant(600, None).await.unwrap().id();
    let mut backends = Vec::new();
    for id in ["n1", "n2", "n3", "n4"] {
        let backend = Backend::start(id).await;
        put(&mut keys, &group, &backend.entry(json!({})), Some(lease)).await;
        backends.push(backend);
    }
    let setup = Setup::shared(&group).with("policy: round_robin");
    let default = setup.serving().await;
    let short = setup
        .clone()
        .with("self_preservation: { hold_ms: 10000, within_ms: 10000 }");
    let short = short.serving().await;
    let off = setup
        .with("self_preservation: { enabled: false }")
        .serving()
        .await;
    for balancer in [&default, &short, &off] {
        balancer.until_served_by(&["n1", "n2", "n3", "n4"]).await;
    }
    let start = Instant::now();
    keys.lease_revoke(lease).await.unwrap();
    let stalls = Stalls::watch();
    let took = until("the nodes are gone without self-preservation", async || {
        off.get().await == "503"
    })
    .await;
    let most = Duration::from_secs(1) + stalls.so_far();
    assert!(took < most, "{took:?} of {most:?}");
    assert_eq!(short.gets(40).await.len(), 4);
    until("the suspects are dropped", async || {
        short.get().await == "503"
    })
    .await;
    let held = start.elapsed();
    assert!((9900..25000).contains(&held.as_millis()), "{held:?}");
    assert_eq!(default.gets(40).await.len(), 4);
    assert!(
        default.log_text().contains("vanished"),
        "{}",
        default.log_text()
    );
}

//! Tests of configurations that are taken over while requests are served.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::common::certificates::{Authority, Directory};
use super::common::etcd::Etcd;
use super::common::load::{client, until_it_answers};
use super::common::programs::{COMMAND, Program, optimised};
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, in_front_of, ok, register, status};
use super::tls::{certificates, connect, get};
use super::world::{Balancer, Setup, entry, put, scratch, until};

/// A balancer with an admin listener, in front of backends `n0` and so on.
struct Reloaded {
    balancer: Balancer,
    admin: String,
    text: String,
    _shared: Option<Arc<Etcd>>,
}

impl Reloaded {
    async fn start(name: &str, backends: &[&RawBackend], fields: &str) -> Self {
        let etcd = Etcd::shared();
        let mut started = Self::start_with(&etcd, name, backends, fields).await;
        // It ends with the last one who has it.
        started._shared = Some(etcd);
        started
    }

    async fn start_with(etcd: &Etcd, name: &str, backends: &[&RawBackend], fields: &str) -> Self {
        let group = group(name);
        register(etcd, &group, backends).await;
        let admin = format!("127.0.0.1:{}", free_port());
        let setup = Setup::new(etcd.endpoints(), &group)
            .program(COMMAND)
            .with(&format!("admin: {{ listen: '{admin}' }}"));
        let balancer = setup.with(fields).listening().await;
        let text = std::fs::read_to_string(&balancer.conf).unwrap();
        let admin = format!("http://{admin}");
        let ready = Self {
            balancer,
            admin,
            text,
            _shared: None,
        };
        until("the page is there", async || {
            ready.try_status().await.is_some()
        })
        .await;
        ready
    }

    async fn try_status(&self) -> Option<Value> {
        let url = format!("{}/api/v1/status", self.admin);
        let text = client().get(url).send().await.ok()?.text().await.ok()?;
        serde_json::from_str(&text).ok()
    }

    async fn status(&self) -> Value {
        self.try_status().await.unwrap()
    }

    /// Writes the file with other fields, and asks for it to be read.
    fn write(&self, change: impl FnOnce(&str) -> String) {
        let new = self.balancer.conf.with_extension("new");
        std::fs::write(&new, change(&self.text)).unwrap();
        std::fs::rename(&new, &self.balancer.conf).unwrap();
        self.balancer.program.signal("HUP");
    }

    async fn until_taken_over(&self, count: u64) {
        until("it is taken over", async || {
            self.status().await["reload"]["taken_over"].as_u64() >= Some(count)
        })
        .await;
    }
}

/// Requests without a pause, on connections that stay, until it is dropped.
struct Load {
    ends: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: JoinSet<Vec<String>>,
}

impl Load {
    fn start(listen: &str, clients: usize) -> Self {
        let (ends, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut running = JoinSet::new();
        for _ in 0..clients {
            let (listen, ends, answered) = (listen.to_owned(), ends.clone(), answered.clone());
            running.spawn(async move {
                let mut failed = Vec::new();
                let mut client = Raw(tokio::net::TcpStream::connect(listen).await.unwrap());
                while !ends.load(Ordering::Relaxed) {
                    let response = client.get("").await;
                    if status(&response) == "200" {
                        answered.fetch_add(1, Ordering::Relaxed);
                    } else {
                        failed.push(response);
                        break;
                    }
                }
                failed
            });
        }
        Self {
            ends,
            answered,
            clients: running,
        }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    async fn end(self) -> u64 {
        self.ends.store(true, Ordering::Relaxed);
        let failed = self.clients.join_all().await.concat();
        assert!(failed.is_empty(), "{failed:?}");
        self.answered.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_over_without_a_lost_request_and_a_bad_one_refused() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let all: Vec<_> = backends.iter().collect();
    let started = Reloaded::start("reload", &all, "clients: { headers: 60 }").await;
    let (balancer, path) = (&started.balancer, started.balancer.conf.clone());
    let load = Load::start(&balancer.listen, 4);

    // A route, another policy, and another limit, at SIGHUP.
    started.write(|text| {
        text.replace("headers: 60", "headers: 8")
            + "  policy: round_robin\n  routes:\n  - { path: /new, answer: { body: new } }\n"
    });
    started.until_taken_over(1).await;
    let ask = async |path: &str, more: &str| {
        let mut client = Raw::to(balancer).await;
        client
            .send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{more}\r\n").as_bytes())
            .await;
        client.response().await
    };
    assert!(ask("/new", "").await.ends_with("\r\n\r\nnew"));
    let many: String = (0..9).map(|index| format!("x-{index}: 1\r\n")).collect();
    assert_eq!(status(&ask("/", &many).await), "431");

    // One that is wrong is refused, with its line, and the former one stays.
    started.write(|text| format!("{text}  polcy: random\n"));
    until("it is refused", async || {
        started.status().await["reload"]["refused"] == json!(1)
    })
    .await;
    let error = started.status().await["reload"]["error"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(error.contains("polcy") && error.contains("line"), "{error}");
    assert!(balancer.log_text().contains("polcy"));
    assert!(ask("/new", "").await.ends_with("\r\n\r\nnew"));
    let metrics = client()
        .get(format!("{}/metrics", started.admin))
        .send()
        .await
        .unwrap();
    let metrics = metrics.text().await.unwrap();
    for line in [
        "reloads_total{result=\"refused\"} 1",
        "config_refused 1",
        "route_requests_total{route=\"route-1\"} 2",
    ] {
        assert!(
            metrics.contains(&format!("pingora_etcd_{line}\n")),
            "{line}: {metrics}"
        );
    }

    // As Kubernetes does it: the file is a link to a link to a folder, and the second link is replaced.
    let folder = scratch(&format!("{}-mounted", balancer.group));
    let versions: Vec<PathBuf> = (1..3)
        .map(|version| folder.join(format!("..{version}")))
        .collect();
    for (version, body) in versions.iter().zip(["one", "two"]) {
        std::fs::create_dir_all(version).unwrap();
        let text = format!(
            "{}  routes:\n  - {{ path: /new, answer: {{ body: {body} }} }}\n",
            started.text
        );
        std::fs::write(version.join("conf.yaml"), text).unwrap();
    }
    symlink(&versions[0], folder.join("..data")).unwrap();
    std::fs::remove_file(&path).unwrap();
    symlink(folder.join("..data/conf.yaml"), &path).unwrap();
    until("the file is taken over without a signal", async || {
        ask("/new", "").await.ends_with("one")
    })
    .await;
    symlink(&versions[1], folder.join("..new")).unwrap();
    std::fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    until("the link is followed", async || {
        ask("/new", "").await.ends_with("two")
    })
    .await;

    // What needs a restart says so, and the rest is taken over.
    let text = started.text.replace(&balancer.listen, "127.0.0.1:1")
        + "  routes:\n  - { path: /new, answer: { body: three } }\n";
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, text).unwrap();
    balancer.program.signal("HUP");
    until("the rest is taken over", async || {
        ask("/new", "").await.ends_with("three")
    })
    .await;
    until("it is said", async || {
        let reload = started.status().await["reload"].clone();
        reload["needs_restart"] == json!(["cluster.listen"]) && reload["error"] == Value::Null
    })
    .await;
    let answered = load.end().await;
    println!("{answered} requests during the reloads, none failed");
    assert!(answered > 100, "{answered}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_learned_of_nodes_and_what_is_in_flight_stays() {
    let well = RawBackend::start(ok).await;
    let failing =
        RawBackend::start(|_| b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n".to_vec()).await;
    let started = Reloaded::start("learned", &[&well, &failing], "candidates: 4").await;
    let success = async |id: &str| {
        let status = started.status().await;
        let nodes = status["groups"][0]["nodes"].as_array().unwrap().clone();
        let node = nodes.into_iter().find(|node| node["id"] == id);
        node.and_then(|node| node["success"].as_f64())
    };
    let mut client = Raw::to(&started.balancer).await;
    until("the second one is known to fail", async || {
        client.get("").await;
        success("n1").await < Some(0.3)
    })
    .await;
    // Another policy over the same nodes; other coefficients; other nodes to follow, of which both are some.
    for (count, fields) in [
        (1, "policy: headroom"),
        (2, "adaptive: { eject_below: 0.7 }"),
        (3, "allowed_networks: [127.0.0.0/8]"),
        (4, "filter: {}\n  zone: a"),
    ] {
        started.write(|text| format!("{text}  {fields}\n"));
        started.until_taken_over(count).await;
        let (first, second) = (success("n0").await, success("n1").await);
        assert!(
            first > Some(0.9) && second < Some(0.35),
            "{fields}: {first:?} {second:?}"
        );
        assert_eq!(
            started.status().await["groups"][0]["view"],
            "live",
            "{fields}"
        );
    }
    // Nodes that a new filter leaves out are gone.
    started.write(|text| format!("{text}  allowed_ports: [{}]\n", well.address.port()));
    started.until_taken_over(5).await;
    assert_eq!(success("n1").await, None);
    for _ in 0..50 {
        assert_eq!(status(&client.get("").await), "200");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_come_and_go_and_one_without_a_view_is_refused() {
    let backend = RawBackend::start(ok).await;
    let etcd = Etcd::own();
    let fields = "ready_timeout_ms: 2000";
    let started = Reloaded::start_with(&etcd, "groups", &[&backend], fields).await;
    let other = group("groups-other");
    let mut keys = etcd.raw_client().await;
    put(
        &mut keys,
        &other,
        &entry("other", Some(backend.address.port()), json!({})),
        None,
    )
    .await;
    let names = async || {
        let status = started.status().await;
        let groups = status["groups"].as_array().unwrap().clone();
        groups
            .into_iter()
            .map(|group| group["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let mut client = Raw::to(&started.balancer).await;
    for count in 1..4 {
        let more = format!(
            "  groups:\n    more: {{ group: {other} }}\n  routes:\n  - {{ path: /, group: more }}\n"
        );
        started.write(|text| text.to_owned() + &more);
        started.until_taken_over(2 * count - 1).await;
        assert_eq!(names().await, [started.balancer.group.as_str(), "more"]);
        // Its nodes are known before the first request comes.
        assert!(
            client
                .get("")
                .await
                .to_ascii_lowercase()
                .contains("x-upstream-node: other")
        );
        started.write(str::to_owned);
        started.until_taken_over(2 * count).await;
        assert_eq!(names().await, [started.balancer.group.as_str()]);
        assert!(
            client
                .get("")
                .await
                .to_ascii_lowercase()
                .contains("x-upstream-node: n0")
        );
    }
    // Without etcd, nobody knows the nodes of a new group: the former configuration goes on.
    etcd.pause();
    let more = format!("  groups:\n    more: {{ group: {other} }}\n  retries: 1\n");
    started.write(|text| text.to_owned() + &more);
    until("it is refused", async || {
        started.status().await["reload"]["refused"] == json!(1)
    })
    .await;
    let error = started.status().await["reload"]["error"].to_string();
    assert!(error.contains("cluster.groups.more"), "{error}");
    assert!(client.get("").await.contains("n0"));
    etcd.resume();
    started.balancer.program.signal("HUP");
    started.until_taken_over(7).await;
    assert_eq!(names().await, [started.balancer.group.as_str(), "more"]);
}

/// An operator has drained a node of the group that a reload brings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_drained_in_another_group_gets_nothing_from_the_first_request_on() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let [serves, drained] = &backends;
    let etcd = Etcd::shared();
    let started = Reloaded::start_with(&etcd, "hears", &[serves], "").await;
    let load = Load::start(&started.balancer.listen, 4);
    for count in 1..=6 {
        let other = group("hears-other");
        let mut keys = etcd.raw_client().await;
        for (id, backend) in [("serves", serves), ("drained", drained)] {
            let entry = entry(id, Some(backend.address.port()), json!({}));
            put(&mut keys, &other, &entry, None).await;
        }
        let drain = Command::new(optimised(COMMAND))
            .args(["drain", "drained", "--group", &other])
            .args(["--endpoints", &etcd.endpoints().join(",")])
            .output();
        assert!(drain.unwrap().status.success());
        let more = format!(
            "  groups:\n    more: {{ group: {other} }}\n  routes:\n  - {{ path: /, group: more }}\n"
        );
        started.write(|text| text.to_owned() + &more);
        started.until_taken_over(count).await;
        let answered = load.answered();
        until("requests go there", async || {
            load.answered() > answered + 20
        })
        .await;
        assert_eq!(drained.requests().len(), 0);
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_reloads_under_load_leak_nothing() {
    let backend = RawBackend::start(ok).await;
    let started = Reloaded::start("hundred", &[&backend], "candidates: 4").await;
    let other = group("hundred-other");
    let load = Load::start(&started.balancer.listen, 4);
    let process = started.balancer.program.child.id();
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{process}/fd"))
            .unwrap()
            .count()
    };
    let change = |index: u64| match index % 4 {
        0 => "  policy: headroom\n".to_owned(),
        1 => "  allowed_networks: [127.0.0.0/8]\n".to_owned(),
        2 => format!(
            "  groups:\n    more: {{ group: {other} }}\n  routes:\n  - {{ path: /x, group: more }}\n"
        ),
        _ => "  retries: 1\n  clients: { connections: 1000 }\n".to_owned(),
    };
    let mut before = (0, 0, 0);
    for index in 0..120 {
        started.write(|text| text.to_owned() + &change(index));
        started.until_taken_over(index + 1).await;
        if index == 19 {
            before = (descriptors(), started.balancer.memory(), load.answered());
        }
    }
    let after = (descriptors(), started.balancer.memory());
    let answered = load.end().await;
    println!(
        "100 reloads under load: {} requests, none failed; {} to {} descriptors, {} to {} KiB",
        answered - before.2,
        before.0,
        after.0,
        before.1,
        after.1
    );
    assert!(after.0 <= before.0 + 8, "{before:?} {after:?}");
    assert!(after.1 < before.1 + 8_192, "{before:?} {after:?}");
    let reload = started.status().await["reload"].clone();
    assert_eq!(
        (&reload["refused"], &reload["taken_over"]),
        (&json!(0), &json!(120))
    );
}

/// Many signals at once are one reload or several, and none is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_of_many_changes_wins() {
    let backend = RawBackend::start(ok).await;
    let started = Reloaded::start("many", &[&backend], "candidates: 4").await;
    for index in 0..50 {
        started.write(|text| {
            format!("{text}  routes:\n  - {{ path: /n, answer: {{ body: 'version {index}' }} }}\n")
        });
    }
    until("the last one is in use", async || {
        let mut client = Raw::to(&started.balancer).await;
        client.send(b"GET /n HTTP/1.1\r\nHost: a\r\n\r\n").await;
        client.response().await.ends_with("version 49")
    })
    .await;
    assert_eq!(started.status().await["reload"]["refused"], json!(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_certificate_files_are_taken_over_and_shown_with_their_end() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let one = files.write_pair("one", &authority.server(&["one.test", "also.test"]));
    let two = files.write_pair("two", &authority.expired_server(&["two.test"]));
    let fields = |cert: &Path, key: &Path| {
        format!("tls: {{ certificates: {} }}", certificates(&[(cert, key)]))
    };
    let first = fields(&one.0, &one.1);
    let reloaded = Reloaded::start("certificates", &[&backend], &first).await;
    let shown = async || reloaded.status().await["certificates"].clone();
    let names = async |expected: Value| shown().await[0]["names"] == expected;
    assert!(names(json!(["one.test", "also.test"])).await);
    let certificate = shown().await[0].clone();
    assert_eq!(
        certificate["field"],
        "cluster.tls.certificates[0].cert_file"
    );
    assert_eq!(certificate["file"], one.0.display().to_string());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let ends =
        |certificate: &Value| Duration::from_millis(certificate["ends_ms"].as_u64().unwrap());
    assert!(ends(&certificate) > now);
    let address = &reloaded.balancer.listen;
    let mut client = connect(address, "one.test", &authority, None, &[])
        .await
        .unwrap();
    assert_eq!(status(&get(&mut client).await), "200");

    // Another file, for another name; a connection that is open goes on.
    let mut open = connect(address, "one.test", &authority, None, &[])
        .await
        .unwrap();
    reloaded.write(|text| text.replace(&first, &fields(&two.0, &two.1)));
    reloaded.until_taken_over(1).await;
    assert_eq!(status(&get(&mut open).await), "200");
    let refused = connect(address, "one.test", &authority, None, &[]).await;
    assert!(refused.is_err(), "it is another certificate");
    assert!(names(json!(["two.test"])).await, "{}", shown().await);
    assert_eq!(shown().await.as_array().unwrap().len(), 1);
    assert!(ends(&shown().await[0]) < now);
    let metrics = client_text(&format!("{}/metrics", reloaded.admin)).await;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("pingora_etcd_certificate_end_seconds{"))
        .unwrap();
    assert!(line.contains(two.0.to_str().unwrap()), "{line}");

    // A file that is not there is refused, and nothing changes.
    let nowhere = two.0.with_extension("nowhere");
    reloaded.write(|text| text.replace(&first, &fields(&nowhere, &two.1)));
    until("it is refused", async || {
        reloaded.status().await["reload"]["refused"] == 1
    })
    .await;
    assert!(names(json!(["two.test"])).await);
}

/// A file that sends everybody to `https` and adds the listener for it: the listener needs a restart, and until then nobody
/// is to be sent there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_sent_to_a_listener_that_is_not_there_yet() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let one = files.write_pair("one", &authority.server(&["one.test"]));
    let reloaded = Reloaded::start("no-listener", &[&backend], "").await;
    let listener = format!(
        "  further_listeners:\n  - listen: 127.0.0.1:{}\n    tls: {{ certificates: {} }}\n",
        free_port(),
        certificates(&[(&one.0, &one.1)])
    );
    let route = "  routes:\n  - { path: /, redirect: { to: 'https://one.test' } }\n";
    reloaded.write(|text| format!("{text}{listener}{route}"));
    until("it is refused", async || {
        reloaded.status().await["reload"]["refused"] == 1
    })
    .await;
    let error = reloaded.status().await["reload"]["error"].clone();
    let error = error.as_str().unwrap();
    assert!(error.contains("cluster.routes[0].redirect"), "{error}");
    let mut client = Raw::to(&reloaded.balancer).await;
    assert_eq!(status(&client.get("").await), "200");
    // The listener alone waits for a restart, and the rest of such a file is taken over.
    reloaded.write(|text| format!("{text}{listener}  policy: random\n"));
    reloaded.until_taken_over(1).await;
    let reload = reloaded.status().await["reload"].clone();
    assert_eq!(
        reload["needs_restart"],
        json!(["cluster.further_listeners"])
    );
    // Somebody else may listen there.
    reloaded.write(|text| format!("{text}{route}"));
    reloaded.until_taken_over(2).await;
    assert_eq!(status(&client.get("").await), "308");
}

/// What is known of nodes, and of their leader, is worth more than another filter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_etcd_is_away_the_nodes_that_are_known_stay() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let all: Vec<_> = backends.iter().collect();
    let etcd = Etcd::own();
    let file = scratch(&format!("{}.nodes", group("away-reload")));
    let fields = format!(
        "ready_timeout_ms: 300\nsnapshot: {{ file: '{}' }}",
        file.display()
    );
    let reloaded = Reloaded::start_with(&etcd, "away-reload", &all, &fields).await;
    let nodes = async || {
        let groups = reloaded.status().await["groups"].clone();
        let nodes = groups[0]["nodes"].as_array().unwrap().len();
        (groups[0]["view"].as_str().unwrap().to_owned(), nodes)
    };
    until("both are known", async || {
        nodes().await == ("live".to_owned(), 2)
    })
    .await;
    etcd.pause();
    until("it is noticed", async || nodes().await.0 == "stale").await;
    let fewer = format!("  allowed_ports: [{}]\n", backends[0].address.port());
    reloaded.write(|text| format!("{text}{fewer}"));
    until("it is refused", async || {
        reloaded.status().await["reload"]["refused"].as_u64() >= Some(1)
    })
    .await;
    assert_eq!(nodes().await, ("stale".to_owned(), 2));
    let mut client = Raw::to(&reloaded.balancer).await;
    for _ in 0..10 {
        assert_eq!(status(&client.get("").await), "200");
    }
    // What follows the same nodes is taken over, and the other change as soon as etcd is back, without another word.
    reloaded.write(|text| format!("{text}  policy: random\n"));
    reloaded.until_taken_over(1).await;
    reloaded.write(|text| format!("{text}{fewer}"));
    etcd.resume();
    until("it is taken over", async || {
        nodes().await == ("live".to_owned(), 1)
    })
    .await;
    let _ = std::fs::remove_file(file);
}

async fn client_text(url: &str) -> String {
    client()
        .get(url)
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_still_counts_after_a_reload() {
    let backend = RawBackend::start_slow(Duration::from_secs(20)).await;
    let fields = "overload: { max_in_flight_per_node: 1, queue: 1, queue_timeout_ms: 100 }";
    let started = Reloaded::start("counts", &[&backend], fields).await;
    let mut held = Raw::to(&started.balancer).await;
    held.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("the backend has it", async || {
        !backend.requests().is_empty()
    })
    .await;
    // Other settings over the same nodes, and another discovery for them.
    for (count, fields) in [(1, "retries: 1"), (2, "allowed_networks: [127.0.0.0/8]")] {
        started.write(|text| format!("{text}  {fields}\n"));
        started.until_taken_over(count).await;
        let response = Raw::to(&started.balancer).await.get("").await;
        assert_eq!(status(&response), "503", "{fields}: {response}");
        let status = started.status().await;
        assert_eq!(
            status["groups"][0]["nodes"][0]["in_flight"],
            json!(1),
            "{fields}"
        );
    }
    assert_eq!(status(&held.response().await), "200");
    assert_eq!(backend.requests().len(), 1);
}

/// A file that is made as it is read, by a program that knows the passwords in it: it can be read once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_from_a_pipe_is_read_once() {
    let backend = RawBackend::start(ok).await;
    let written = in_front_of(&backend, "piped", "").await;
    let text = std::fs::read_to_string(&written.conf).unwrap();
    drop(written);
    let log = scratch(&format!("piped-{}.log", fastrand::u32(..)));
    let mut command = Command::new(optimised(COMMAND));
    command.args(["serve", "--conf", "/dev/stdin"]);
    command
        .stdin(Stdio::piped())
        .stderr(File::create(&log).unwrap());
    let mut program = Program::spawn(&mut command);
    let mut stdin = program.child.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let listen = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("listen: "));
    let url = format!("http://{}", listen.unwrap().trim_matches('\''));
    until_it_answers(&url).await;
    // The file of another program would have been looked at three times by now.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let read = || std::fs::read_to_string(&log).unwrap();
    assert!(!read().contains("refused"), "{}", read());
    program.signal("HUP");
    until("the reason is told", async || read().contains("is no file")).await;
    let threads = std::fs::read_dir(format!("/proc/{}/task", program.child.id()));
    assert!(threads.unwrap().count() < 30);
    std::fs::remove_file(log).unwrap();
}

/// A file that a tool has written for another user only would be noticed at the next restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_cannot_be_read_for_long_is_a_refused_one() {
    let backend = RawBackend::start(ok).await;
    let started = Reloaded::start("reload-unreadable", &[&backend], "").await;
    let path = started.balancer.conf.clone();
    // No text, for whoever reads it: root may read any file.
    let moved = path.with_extension("moved");
    let refused = || {
        let log = started.balancer.log_text();
        log.matches("the new configuration is refused").count()
    };
    for (round, broken) in (1..).zip([None, Some(&[0xff, 0xfe, 0x00][..])]) {
        let start = Instant::now();
        std::fs::rename(&path, &moved).unwrap();
        if let Some(bytes) = broken {
            std::fs::write(&path, bytes).unwrap();
        }
        until("it is refused", async || {
            !started.status().await["reload"]["error"].is_null()
        })
        .await;
        // It may be on its way from one place to another.
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(5), "{took:?}");
        until("the log says so", async || refused() == round).await;
        assert_eq!(started.balancer.get().await, "n0");
        std::fs::rename(&moved, &path).unwrap();
        until("it is in use again", async || {
            started.status().await["reload"]["error"].is_null()
        })
        .await;
    }
}

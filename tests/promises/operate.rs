//! Tests of what an operator does to nodes, by the command and by the admin interface.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::programs::{COMMAND, optimised};
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{
    Balancer, Log, Setup, Worker, delete, entry, put, registered, scratch, until, until_registered,
};

const TOKEN: &str = "a-token-of-this-test";

/// Runs the command on a group.
fn command(etcd: &Etcd, group: &str, words: &[&str]) -> Output {
    let mut command = Command::new(optimised(COMMAND));
    command
        .args(&words[..1])
        .args(["--endpoints", &etcd.endpoints().join(","), "--group", group]);
    command.args(&words[1..]).output().unwrap()
}

fn succeeds(output: &Output, expected: &str) {
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains(expected),
        "{expected}: {output:?}"
    );
}

fn fails(output: &Output, code: i32, expected: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(expected), "{expected}: {said}");
}

/// Two nodes with leases, and a balancer in front of them with an admin listener.
struct Two {
    etcd: std::sync::Arc<Etcd>,
    group: String,
    backends: [RawBackend; 2],
    balancer: Balancer,
    admin: String,
}

impl Two {
    async fn start(name: &str, token: bool) -> Self {
        let (etcd, group) = (Etcd::shared(), group(name));
        let mut keys = etcd.raw_client().await;
        let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
        for (index, backend) in backends.iter().enumerate() {
            let lease = keys.lease_grant(600, None).await.unwrap().id();
            let entry = entry(
                &format!("n{index}"),
                Some(backend.address.port()),
                json!({}),
            );
            put(&mut keys, &group, &entry, Some(lease)).await;
        }
        let admin = format!("127.0.0.1:{}", free_port());
        let file = scratch(&format!("{group}.token"));
        std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
        let token = match token {
            true => format!(", token_file: {}", file.display()),
            false => String::new(),
        };
        let fields = format!("policy: round_robin\nadmin: {{ listen: '{admin}'{token} }}");
        let balancer = Setup::shared(&group)
            .program(COMMAND)
            .with(&fields)
            .listening()
            .await;
        let two = Self {
            etcd,
            group,
            backends,
            balancer,
            admin: format!("http://{admin}/api/v1"),
        };
        until("the page is there", async || {
            client()
                .get(format!("{}/status", two.admin))
                .send()
                .await
                .is_ok()
        })
        .await;
        two
    }

    /// How many of 40 requests each of them gets; none fails.
    async fn shares(&self) -> [usize; 2] {
        let before = self
            .backends
            .each_ref()
            .map(|backend| backend.requests().len());
        let mut client = Raw::to(&self.balancer).await;
        for _ in 0..40 {
            assert_eq!(status(&client.get("").await), "200");
        }
        let after = self
            .backends
            .each_ref()
            .map(|backend| backend.requests().len());
        [after[0] - before[0], after[1] - before[1]]
    }

    async fn until_shares(&self, what: &str, holds: impl Fn([usize; 2]) -> bool) {
        until(what, async || holds(self.shares().await)).await;
    }

    async fn post(&self, path: &str, token: Option<&str>, body: &str) -> (StatusCode, String) {
        let mut request = client()
            .post(format!("{}/{path}", self.admin))
            .body(body.to_owned());
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    async fn node(&self, id: &str) -> Value {
        let text = client()
            .get(format!("{}/status", self.admin))
            .send()
            .await
            .unwrap();
        let status: Value = serde_json::from_str(&text.text().await.unwrap()).unwrap();
        let nodes = status["groups"][0]["nodes"].as_array().unwrap().clone();
        nodes.into_iter().find(|node| node["id"] == id).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_and_weight_hold_for_the_process_that_they_are_meant_for() {
    let two = Two::start("operate", false).await;
    let run = |words: &[&str]| command(&two.etcd, &two.group, words);
    assert_eq!(two.shares().await, [20, 20]);
    succeeds(&run(&["drain", "n0"]), "n0 gets no new requests");
    two.until_shares("the first one gets nothing", |shares| shares == [0, 40])
        .await;
    let node = two.node("n0").await;
    assert_eq!(node["state"], "draining");
    assert!(
        node["reason"].as_str().unwrap().contains("an operator"),
        "{node}"
    );

    // Its own writes change nothing: the operator's word holds for as long as the process lives.
    let mut keys = two.etcd.raw_client().await;
    let (written, lease) = registered(&mut keys, &two.group, "n0").await.unwrap();
    let mut again = written.clone();
    again["metadata"] = json!({ "cpu_usage_percent": 7.5 });
    put(&mut keys, &two.group, &again, Some(lease)).await;
    until("it is written again", async || {
        two.node("n0").await["cpu"] == 7.5
    })
    .await;
    assert_eq!(two.shares().await, [0, 40]);
    // A weight beside it; then the drain ends, and the weight stays.
    succeeds(&run(&["weight", "n0", "3"]), "n0 has the weight 3");
    succeeds(&run(&["nodes"]), "drain, weight 3");
    succeeds(&run(&["nodes", "--json"]), r#""weight": 3.0"#);
    succeeds(&run(&["undrain", "n0"]), "n0 gets requests again");
    two.until_shares("three quarters", |shares| shares == [30, 10])
        .await;
    succeeds(&run(&["weight", "n0", "0"]), "weight 0");
    two.until_shares("no traffic", |shares| shares == [0, 40])
        .await;
    succeeds(&run(&["weight", "n0", "own"]), "its own weight");
    two.until_shares("as before", |shares| shares == [20, 20])
        .await;
    // Another process with the same id is not meant.
    succeeds(&run(&["drain", "n0"]), "n0");
    two.until_shares("it drains", |shares| shares == [0, 40])
        .await;
    let other = keys.lease_grant(600, None).await.unwrap().id();
    put(&mut keys, &two.group, &written, Some(other)).await;
    two.until_shares("its successor serves", |shares| shares == [20, 20])
        .await;
    keys.lease_revoke(lease).await.unwrap();
    // What was said of nodes that are gone is removed after a week, and of replaced processes at once.
    let said = |more: &str| format!(r#"{{"state":"draining","process":"lease 1"{more}}}"#);
    for (id, said) in [
        ("gone", said(r#","absent_since":1"#)),
        ("just-gone", said("")),
        ("n1", said("")),
    ] {
        let key = format!("override/{}/{id}", two.group);
        keys.put(key, said, None).await.unwrap();
    }
    succeeds(&run(&["weight", "n0", "1"]), "n0 has the weight 1");
    succeeds(&run(&["undrain", "n0"]), "n0 gets requests again");
    let all = etcd_client::GetOptions::new().with_prefix();
    let left = keys
        .get(format!("override/{}/", two.group), Some(all))
        .await
        .unwrap();
    let left: Vec<_> = left
        .kvs()
        .iter()
        .map(|entry| (entry.key_str().unwrap(), entry.value_str().unwrap()))
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left[0].0.ends_with("/just-gone"), "{left:?}");
    assert!(left[0].1.contains("absent_since"), "{left:?}");
    succeeds(&run(&["weight", "n0", "own"]), "its own weight");

    fails(
        &run(&["drain", "nobody"]),
        3,
        "is not registered in the group",
    );
    fails(&run(&["weight", "n0", "x"]), 2, "not a weight");
    fails(&run(&["weight", "n0", "-1"]), 2, "");
    fails(&run(&["weight", "n0", "9999999"]), 2, "not a weight");

    // Evict: one with a lease, and one without.
    succeeds(&run(&["evict", "n0"]), "n0 is removed");
    two.until_shares("it is gone", |shares| shares == [0, 40])
        .await;
    put(&mut keys, &two.group, &written, None).await;
    two.until_shares("it is back", |shares| shares == [20, 20])
        .await;
    succeeds(&run(&["drain", "n0"]), "n0");
    two.until_shares("without a lease it drains, too", |shares| shares == [0, 40])
        .await;
    succeeds(&run(&["evict", "n0"]), "n0 is removed");
    assert!(registered(&mut keys, &two.group, "n0").await.is_none());
    put(&mut keys, &two.group, &written, None).await;
    two.until_shares("another one of that name is not meant", |shares| {
        shares == [20, 20]
    })
    .await;
    delete(&mut keys, &two.group, "n1").await;
}

/// Who has made way is one again only after a moment.
async fn until_candidate(keys: &mut etcd_client::Client, group: &str, id: &str) {
    let election = format!("election/{group}/");
    let all = etcd_client::GetOptions::new().with_prefix();
    until("it is a candidate", async || {
        let listed = keys.get(election.clone(), Some(all.clone())).await.unwrap();
        let mut entries = listed.kvs().iter();
        entries.any(|entry| entry.value() == id.as_bytes())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_transferred_from_outside_without_a_gap() {
    let (etcd, group) = (Etcd::shared(), group("transfer"));
    let endpoint = etcd.endpoints().remove(0);
    let mut keys = etcd.raw_client().await;
    let mut workers = Vec::new();
    for id in ["w1", "w2", "w3"] {
        // The lease of one that is stopped for a while does not end meanwhile.
        workers.push(Worker::with_ttl(
            &endpoint,
            &group,
            id,
            "30",
            &[],
            Log::File,
        ));
        until_registered(&mut keys, &group, id, |_, _| true).await;
        until_candidate(&mut keys, &group, id).await;
    }
    let run = |words: &[&str]| command(&etcd, &group, words);
    let leader = || {
        let output = run(&["leader", "--json"]);
        let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (
            said["node"]["id"].as_str().unwrap_or("none").to_owned(),
            said["epoch"].as_i64().unwrap_or(0),
        )
    };
    let (first, before) = leader();
    assert_eq!(first, "w1");
    fails(&run(&["evict", "w1"]), 1, "its process leads by election/");
    // The last in the queue: the one between has to make way.
    let start = Instant::now();
    succeeds(
        &run(&["transfer", "w3"]),
        "w3 leads, with the fencing token",
    );
    println!("leadership was transferred within {:?}", start.elapsed());
    let (second, epoch) = leader();
    assert_eq!(second, "w3");
    // A later candidacy would have a greater one; this one was there before, and is valid from now on.
    assert!(epoch > before, "{epoch} {before}");
    // Nothing of the request is left, and it can be repeated.
    let all = etcd_client::GetOptions::new().with_prefix();
    let left = keys
        .get(format!("handover/{group}/"), Some(all))
        .await
        .unwrap();
    assert_eq!(left.count(), 0, "{left:?}");
    succeeds(&run(&["transfer", "w3"]), "w3 leads");
    succeeds(&run(&["transfer", "w1"]), "w1 leads");
    let term = leader();
    assert_eq!(term.0, "w1");
    fails(&run(&["transfer", "nobody"]), 3, "is not registered");
    // A process that cannot answer: nothing changes, and the reason is said.
    until_candidate(&mut keys, &group, "w2").await;
    workers[0].program.signal("STOP");
    let refused = run(&["transfer", "w2", "--timeout", "3"]);
    let same = leader();
    workers[0].program.signal("CONT");
    fails(&refused, 1, "");
    let reason = String::from_utf8_lossy(&refused.stderr);
    // The second one is said if the command itself has had to wait for too long.
    let reasons = ["has not handed over in time", "no answer from etcd within"];
    assert!(reasons.iter().any(|it| reason.contains(it)), "{reason}");
    assert_eq!(same, term);
    until("there is a leader again", async || leader().0 != "none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_interface_changes_nothing_without_its_token() {
    let two = Two::start("unwritable", false).await;
    let drain = format!("groups/{}/nodes/n0/drain", two.group);
    assert_eq!(
        two.post(&drain, Some(TOKEN), "").await.0,
        StatusCode::FORBIDDEN
    );
    assert_eq!(
        two.post("reload", Some(TOKEN), "").await.0,
        StatusCode::FORBIDDEN
    );

    let two = Two::start("writable", true).await;
    let drain = format!("groups/{}/nodes/n0/drain", two.group);
    for token in [
        None,
        Some(""),
        Some("wrong"),
        Some("a-token-of-this-tesT"),
        Some("a-token-of-this-test2"),
    ] {
        assert_eq!(
            two.post(&drain, token, "").await.0,
            StatusCode::UNAUTHORIZED,
            "{token:?}"
        );
    }
    // Never by GET.
    let request = client().get(format!("{}/{drain}", two.admin));
    let request = request.header("authorization", format!("Bearer {TOKEN}"));
    assert_eq!(
        request.send().await.unwrap().status(),
        StatusCode::METHOD_NOT_ALLOWED
    );
    assert_eq!(two.shares().await, [20, 20]);

    let group = &two.group;
    let act = async |path: &str, body: &str| {
        two.post(&format!("groups/{group}/nodes/{path}"), Some(TOKEN), body)
            .await
    };
    assert_eq!(act("n0/drain", "").await.0, StatusCode::OK);
    two.until_shares("it drains", |shares| shares == [0, 40])
        .await;
    assert_eq!(act("n0/undrain", "").await.0, StatusCode::OK);
    assert_eq!(act("n0/weight", "{\"weight\": 3}").await.0, StatusCode::OK);
    two.until_shares("it has the weight", |shares| shares == [30, 10])
        .await;
    for (path, body, expected) in [
        ("n0/weight", "3", StatusCode::BAD_REQUEST),
        ("n0/weight", "{}", StatusCode::BAD_REQUEST),
        ("n0/weight", "{\"weigth\": 0}", StatusCode::BAD_REQUEST),
        (
            "n0/weight",
            "{\"weight\": -1}",
            StatusCode::UNPROCESSABLE_ENTITY,
        ),
        ("n0/paint", "", StatusCode::NOT_FOUND),
        ("nobody/drain", "", StatusCode::NOT_FOUND),
        ("n0/transfer", "", StatusCode::CONFLICT),
    ] {
        let (status, text) = act(path, body).await;
        assert_eq!(status, expected, "{path} {body}: {text}");
        assert!(text.contains("error"), "{text}");
    }
    let elsewhere = two
        .post("groups/elsewhere/nodes/n0/drain", Some(TOKEN), "")
        .await;
    assert_eq!(elsewhere.0, StatusCode::NOT_FOUND);

    // The file: as it was, changed, and wrong.
    let (status, text) = two.post("reload", Some(TOKEN), "").await;
    assert_eq!(
        (status, text.contains("\"changed\":false")),
        (StatusCode::OK, true),
        "{text}"
    );
    let file = &two.balancer.conf;
    let before = std::fs::read_to_string(file).unwrap();
    std::fs::write(
        file,
        format!("{before}  routes:\n  - {{ path: /x, answer: {{ body: new }} }}\n"),
    )
    .unwrap();
    let (status, text) = two.post("reload", Some(TOKEN), "").await;
    // It may have been seen before.
    assert_eq!(status, StatusCode::OK, "{text}");
    let mut browser = Raw::to(&two.balancer).await;
    browser.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(browser.response().await.ends_with("new"));
    std::fs::write(file, format!("{before}  nothing: 1\n")).unwrap();
    let (status, text) = two.post("reload", Some(TOKEN), "").await;
    assert_eq!(
        (status, text.contains("nothing")),
        (StatusCode::UNPROCESSABLE_ENTITY, true),
        "{text}"
    );
    assert!(
        two.balancer
            .log_text()
            .contains("an operator has changed a node")
    );
}

/// Before a connection on which nothing happens would end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_that_waits_for_a_group_is_answered_meanwhile() {
    let (etcd, group) = (Etcd::own(), group("waits"));
    let admin = format!("127.0.0.1:{}", free_port());
    let file = scratch(&format!("{group}.token"));
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let file = file.display();
    let fields =
        format!("ready_timeout_ms: 120000\nadmin: {{ listen: '{admin}', token_file: {file} }}");
    let setup = Setup::new(etcd.endpoints(), &group).program(COMMAND);
    let balancer = setup.with(&fields).listening().await;
    let page = format!("http://{admin}/api/v1");
    until("the page is there", async || {
        reqwest::get(format!("{page}/status")).await.is_ok()
    })
    .await;
    // Without etcd, nobody knows the nodes of a new group.
    etcd.pause();
    let text = std::fs::read_to_string(&balancer.conf).unwrap();
    let more = format!("  groups:\n    more: {{ group: {group}-more }}\n");
    std::fs::write(&balancer.conf, text + &more).unwrap();
    let client = reqwest::Client::new();
    let request = client.post(format!("{page}/reload"));
    let answer = request.bearer_auth(TOKEN).send();
    let answer = tokio::time::timeout(Duration::from_secs(90), answer).await;
    let answer = answer.expect("an answer").unwrap();
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let text = answer.text().await.unwrap();
    assert!(text.contains("the reload goes on"), "{text}");
    etcd.resume();
    until("it is taken over", async || {
        let status = reqwest::get(format!("{page}/status")).await.unwrap();
        let status: Value = serde_json::from_str(&status.text().await.unwrap()).unwrap();
        status["groups"].as_array().unwrap().len() == 2
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_file_that_is_none_is_refused() {
    let file = scratch(&format!("{}.token", group("short")));
    std::fs::write(&file, "short").unwrap();
    let fields = format!(
        "admin: {{ listen: '127.0.0.1:{}', token_file: {} }}",
        free_port(),
        file.display()
    );
    let mut balancer = Setup::shared(&group("short"))
        .program(COMMAND)
        .with(&fields)
        .start();
    let (status, took) = balancer.program.ended().await;
    assert!(!status.success() && took < Duration::from_secs(5));
    assert!(
        balancer.log_text().contains("cluster.admin.token_file"),
        "{}",
        balancer.log_text()
    );
}

/// Whoever waits for 0 before stopping the worker must not cut off what it works on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_has_requests_in_flight_until_they_are_done() {
    let two = Two::start("drained-load", false).await;
    let slow = RawBackend::start_slow(Duration::from_secs(8)).await;
    let mut keys = two.etcd.raw_client().await;
    let entry = entry("slow", Some(slow.address.port()), json!({}));
    put(&mut keys, &two.group, &entry, None).await;
    // Its first request may be another's: all of these are answered.
    let mut clients = Vec::new();
    until("it has a request", async || {
        let mut client = Raw::to(&two.balancer).await;
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        clients.push(client);
        !slow.requests().is_empty()
    })
    .await;
    let in_flight = async || two.node("slow").await["in_flight"].as_u64().unwrap();
    assert!(in_flight().await >= 1);
    succeeds(
        &command(&two.etcd, &two.group, &["drain", "slow"]),
        "slow gets no new requests",
    );
    until("it drains", async || {
        two.node("slow").await["state"] == "draining"
    })
    .await;
    let sent = slow.requests().len();
    assert!(in_flight().await >= 1, "it works on {sent}");
    let text = client()
        .get(format!("{}/metrics", two.admin.replace("/api/v1", "")))
        .send();
    let text = text.await.unwrap().text().await.unwrap();
    let name = format!(
        "pingora_etcd_node_requests_in_flight{{group=\"{}\",node=\"slow\"}} ",
        two.group
    );
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    assert!(value.unwrap().parse::<f64>().unwrap() >= 1.0, "{text}");
    for client in &mut clients {
        assert_eq!(status(&client.response().await), "200");
    }
    until("they are done", async || in_flight().await == 0).await;
    assert_eq!(slow.requests().len(), sent);
}

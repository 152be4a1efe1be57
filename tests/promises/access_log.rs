//! Tests of the access log, and of traces.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, http_2, in_front_of, ok, status};
use super::world::{Balancer, Setup, entry, put, scratch, until};

/// A balancer with this access log in front of backends at these ports.
async fn before(ports: &[u16], name: &str, log: &str, more: &str) -> (Balancer, PathBuf) {
    let (etcd, group) = (Etcd::shared(), group(name));
    let mut keys = etcd.raw_client().await;
    for (index, port) in ports.iter().enumerate() {
        let entry = entry(&format!("n{index}"), Some(*port), json!({}));
        put(&mut keys, &group, &entry, None).await;
    }
    let file = scratch(&format!("{group}.access"));
    let log = log.replace("FILE", file.to_str().unwrap());
    let fields = format!("access_log: {{ {log} }}\n{more}");
    let setup = Setup::shared(&group).with(&fields);
    // With a grace period of 0, the process would not wait for the log.
    let setup = setup.server("grace_period_seconds: 20");
    (setup.listening().await, file)
}

fn lines(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn until_lines(file: &Path, count: usize) -> Vec<String> {
    until("the lines are there", async || lines(file).len() >= count).await;
    lines(file)
}

async fn get(balancer: &Balancer, head: &str) -> String {
    let mut client = Raw::to(balancer).await;
    client.get(head).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_has_a_line_that_says_what_happened() {
    let backend = RawBackend::start(ok).await;
    let ports = [backend.address.port(), free_port()];
    let fields =
        "policy: round_robin\nclients: { trusted_proxies: [127.0.0.0/8], body_bytes: 1000000 }";
    let (balancer, file) = before(&ports, "log", "file: FILE", fields).await;
    for _ in 0..4 {
        let response = get(
            &balancer,
            "X-Forwarded-For: 192.0.2.9\r\nUser-Agent: \"x\r\n",
        )
        .await;
        assert_eq!(status(&response), "200");
    }
    let read: Vec<Value> = until_lines(&file, 4)
        .await
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &read {
        assert_eq!(line["client"], "192.0.2.9", "{line}");
        assert_eq!(line["method"], "GET");
        assert_eq!(line["status"], 200);
        assert_eq!(line["node"], "n0");
        assert_eq!(line["outcome"], "succeeded");
        assert_eq!(line["bytes_sent"], 3);
        assert_eq!(line["user_agent"], "\"x");
        assert_eq!(line["protocol"], "HTTP/1.1");
        assert!(line["duration_ms"].as_f64().unwrap() >= line["upstream_ms"].as_f64().unwrap());
        let trace = line["traceparent"].as_str().unwrap();
        assert!(
            backend
                .requests()
                .iter()
                .any(|request| request.contains(trace))
        );
    }
    // The one that nobody answers at is tried by some, until it is known.
    assert!(read.iter().any(|line| line["tries"] == 2), "{read:?}");

    // Who is refused is named, too.
    get(&balancer, "Content-Length: 99999999999\r\n").await;
    let refused = until_lines(&file, 5).await;
    let refused: Value = serde_json::from_str(&refused[4]).unwrap();
    assert_eq!(
        (&refused["status"], &refused["client"]),
        (&json!(413), &json!("127.0.0.1"))
    );

    // The file is moved, and opened again at SIGUSR1.
    let moved = file.with_extension("moved");
    std::fs::rename(&file, &moved).unwrap();
    balancer.program.signal("USR1");
    until("it has the signal", async || {
        balancer.log_text().contains("opened again")
    })
    .await;
    // Whoever has moved it waits for the new one, whether there are requests or not.
    until("the new file is there", async || file.exists()).await;
    get(&balancer, "").await;
    assert_eq!(until_lines(&file, 1).await.len(), 1);
    assert_eq!(lines(&moved).len(), 5);
    let _ = (std::fs::remove_file(file), std::fs::remove_file(moved));
}

/// They reach no hook of the proxy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_none_has_a_line_too() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_header_ms: 500 }\nclients: { head_bytes: 4096 }";
    let ports = [backend.address.port()];
    let (balancer, file) = before(&ports, "log-refused", "file: FILE", fields).await;
    let large = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(200_000));
    for (bytes, expected, reason) in [
        (&b"GET / HTTP/1.1\r\nHo"[..], 408, "did not arrive in time"),
        (large.as_bytes(), 431, "too large"),
        (b"no request\r\n\r\n", 400, "cannot be served"),
        (
            b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
            405,
            "no tunnels",
        ),
    ] {
        let before = lines(&file).len();
        let mut client = Raw::to(&balancer).await;
        client.send(bytes).await;
        client.rest().await;
        let written = until_lines(&file, before + 1).await;
        assert_eq!(written.len(), before + 1, "{written:?}");
        let line: Value = serde_json::from_str(&written[before]).unwrap();
        assert_eq!(line["status"], expected, "{line}");
        assert_eq!(line["client"], "127.0.0.1", "{line}");
        let method = if expected == 405 { "CONNECT" } else { "" };
        assert_eq!(
            (&line["method"], &line["tls"]),
            (&json!(method), &json!(false))
        );
        let error = line["error"].as_str().unwrap();
        assert!(error.contains(reason), "{line}");
        // The first one has waited for half a second.
        let waited = line["duration_ms"].as_f64().unwrap();
        assert!(expected != 408 || waited >= 500.0, "{line}");
    }
    // Over HTTP/2 such a request has no path.
    let before = lines(&file).len();
    let connect = http::Request::builder().method("CONNECT").uri("a.test:443");
    let connect = connect.body(()).unwrap();
    let (response, _) = http_2(&balancer).await.send_request(connect, true).unwrap();
    assert_eq!(response.await.unwrap().status(), 405);
    let written = until_lines(&file, before + 1).await;
    let line: Value = serde_json::from_str(&written[before]).unwrap();
    assert_eq!(
        (&line["method"], &line["status"]),
        (&json!("CONNECT"), &json!(405))
    );
    // Who connects and asks for nothing has none.
    let before = lines(&file).len();
    drop(Raw::to(&balancer).await);
    get(&balancer, "").await;
    assert_eq!(until_lines(&file, before + 1).await.len(), before + 1);
    let _ = std::fs::remove_file(file);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_are_combined_sampled_and_written_before_the_end() {
    let backend = RawBackend::start(|request| match request.contains("/bad") {
        true => b"HTTP/1.1 500 Bad\r\nContent-Length: 0\r\n\r\n".to_vec(),
        false => ok(""),
    })
    .await;
    let port = [backend.address.port()];
    let log = "file: FILE, format: combined, sample: 0";
    let (mut balancer, file) = before(&port, "combined", log, "").await;
    for path in ["/", "/bad", "/", "/bad"] {
        let mut client = Raw::to(&balancer).await;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nReferer: r\r\nUser-Agent: u\r\n\r\n");
        client.send(request.as_bytes()).await;
        client.response().await;
    }
    // Nothing that was logged is lost at the end.
    balancer.program.signal("INT");
    balancer.program.ended().await;
    let read = lines(&file);
    assert_eq!(read.len(), 2, "{read:?}");
    for line in read {
        let (client, rest) = line.split_once(" - - [").unwrap();
        assert!(client.starts_with("127.0.0."), "{line}");
        let (_, rest) = rest.split_once("] ").unwrap();
        assert!(
            rest.starts_with("\"GET /bad HTTP/1.1\" 500 0 \"r\" \"u\" n0 1 0."),
            "{line}"
        );
    }
    let _ = std::fs::remove_file(file);
}

/// A status of 200 says little of a response that breaks off, and nothing of a call of gRPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_failed_has_a_line_whatever_its_status_is() {
    let backend = RawBackend::start(|request| match request.contains("/breaks") {
        true => b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nok\n".to_vec(),
        false => ok(""),
    })
    .await;
    let port = [backend.address.port()];
    let log = "file: FILE, sample: 0";
    let (balancer, file) = before(&port, "failed", log, "").await;
    for path in ["/", "/breaks"] {
        let mut client = Raw::to(&balancer).await;
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        client.send(request.as_bytes()).await;
        client.rest().await;
    }
    let read = until_lines(&file, 1).await;
    assert!(read.len() == 1 && read[0].contains("/breaks"), "{read:?}");
    let line: Value = serde_json::from_str(&read[0]).unwrap();
    assert_eq!(
        (&line["status"], &line["outcome"]),
        (&json!(200), &json!("failed"))
    );

    // A call that the proxy cannot pass on.
    let (balancer, file) = before(&[], "unserved", log, "").await;
    let mut sender = http_2(&balancer).await;
    let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = http::Request::post("http://a/echo.Echo/One")
        .header("content-type", "application/grpc")
        .header("traceparent", given)
        .body(())
        .unwrap();
    let (response, _) = sender.send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "14");
    let read = until_lines(&file, 1).await;
    let line: Value = serde_json::from_str(&read[0]).unwrap();
    assert_eq!(line["grpc_status"], 14, "{line}");
    assert_eq!(line["traceparent"], given, "{line}");
}

/// As a program that collects logs and has stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_holds_up_neither_requests_nor_the_end() {
    let backend = RawBackend::start(ok).await;
    let pipe = scratch(&group("unread"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    // Opened for reading and writing, so that nobody waits.
    let reader = std::fs::File::options().read(true).write(true).open(&pipe);
    let log = format!("file: {}, queue: 100", pipe.display());
    let (mut balancer, _) = before(&[backend.address.port()], "unread", &log, "").await;
    let mut client = Raw::to(&balancer).await;
    // More than a pipe and the queue take.
    for _ in 0..1_000 {
        assert_eq!(status(&client.get("").await), "200");
    }
    drop(client);
    let start = Instant::now();
    balancer.program.signal("INT");
    let (ended, _) = balancer.program.ended().await;
    assert!(ended.success(), "{ended}: {}", balancer.log_text());
    assert!(
        start.elapsed() < Duration::from_secs(12),
        "{:?}",
        start.elapsed()
    );
    drop(reader);
    let _ = std::fs::remove_file(pipe);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_costs_only_its_lines() {
    let backend = RawBackend::start(ok).await;
    let port = [backend.address.port()];
    let admin = format!("127.0.0.1:{}", free_port());
    let more = format!("admin: {{ listen: '{admin}' }}");
    let (balancer, _) = before(&port, "full", "file: /dev/full, queue: 1", &more).await;
    for _ in 0..50 {
        assert_eq!(status(&get(&balancer, "").await), "200");
    }
    until("it is said once", async || {
        balancer.log_text().contains("lines are lost")
    })
    .await;
    assert_eq!(balancer.log_text().matches("lines are lost").count(), 1);
    until("all are counted as lost", async || {
        let url = format!("http://{admin}/metrics");
        let metrics = client()
            .get(url)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let lost = metrics
            .lines()
            .find_map(|line| line.strip_prefix("pingora_etcd_access_log_lines_lost_total "));
        lost.unwrap_or_else(|| panic!("{metrics}"))
            .parse::<f64>()
            .unwrap()
            >= 50.0
    })
    .await;
    // More lines than there is room for: none waits, and it is counted.
    let (balancer, file) = before(&port, "queue", "file: FILE, queue: 1", "").await;
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let mut client = Raw::to(&balancer).await;
        requests.spawn(async move {
            for _ in 0..50 {
                assert_eq!(status(&client.get("").await), "200");
            }
        });
    }
    requests.join_all().await;
    let dropped = || {
        let text = balancer.log_text();
        let counts = text.lines().filter_map(|line| {
            let (_, rest) = line.split_once("dropped=")?;
            rest.split(' ').next()?.parse::<usize>().ok()
        });
        counts.sum::<usize>()
    };
    // Which were dropped is said with the next line, so that one more request is needed. There is room for its line when
    // the others have been written: the file does not grow any more. If it is dropped all the same, the next one says so.
    let mut asked = 0;
    until(
        "each line was written, or is said to have been dropped",
        async || {
            let before = lines(&file).len();
            let _ = get(&balancer, "").await;
            asked += 1;
            let start = Instant::now();
            while lines(&file).len() == before && start.elapsed() < Duration::from_secs(2) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            dropped() + lines(&file).len() == 2_000 + asked
        },
    )
    .await;
    assert!(dropped() > 0, "a queue of one line has had room for all");
    let _ = std::fs::remove_file(file);
    // A file that cannot be opened is an error at the start.
    let setup = Setup::shared(&group("nowhere")).with("access_log: { file: /nowhere/access }");
    let mut refused = setup.start();
    assert_eq!(refused.program.ended().await.0.code(), Some(1));
    assert!(
        refused.log_text().contains("cluster.access_log.file"),
        "{}",
        refused.log_text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_passed_on_or_begun_and_forwarded_is_sent_on_wish() {
    let backend = RawBackend::start(ok).await;
    let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    // Backends record what a trace says that it is recorded, and nothing of one that says it is not.
    for (fields, made) in [
        ("", Some("-01")),
        ("traceparent_sampled: 0", Some("-00")),
        ("traceparent: false", None),
    ] {
        let balancer = in_front_of(&backend, "trace", fields).await;
        get(
            &balancer,
            &format!("traceparent: {given}\r\ntracestate: a=1\r\n"),
        )
        .await;
        let last = backend.last();
        assert!(
            last.contains(given) && last.contains("tracestate: a=1"),
            "{last}"
        );
        get(&balancer, "").await;
        let last = backend.last();
        let sent = last
            .lines()
            .find_map(|line| line.strip_prefix("traceparent: 00-"));
        assert_eq!(sent.map(|sent| &sent[sent.len() - 3..]), made, "{last}");
    }
    let fields = "clients: { forwarded: true, trusted_proxies: [127.0.0.0/8] }";
    let balancer = in_front_of(&backend, "forwarded", fields).await;
    get(&balancer, "Forwarded: for=192.0.2.1\r\n").await;
    let last = backend.last();
    assert!(
        last.contains("\r\nforwarded: for=192.0.2.1, for=127.0.0."),
        "{last}"
    );
    assert!(last.contains(";host=\"a\";proto=http\r\n"), "{last}");
    // Of somebody who is not trusted nothing stays.
    let balancer = in_front_of(&backend, "forwarded", "clients: { forwarded: true }").await;
    get(&balancer, "Forwarded: for=192.0.2.1\r\n").await;
    let last = backend.last();
    assert!(last.contains("\r\nforwarded: for=127.0.0."), "{last}");
}

/// A user's 503 is to be explained by what the process says of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_a_backend_says_why_in_the_log_and_in_the_metrics() {
    let admin = format!("127.0.0.1:{}", free_port());
    let fields = format!(
        "admin: {{ listen: '{admin}' }}\nroutes:\n- {{ name: api, path: /api, group: default }}\noverload: {{ max_in_flight: 1, \
         queue: 0 }}"
    );
    let slow = RawBackend::start_slow(Duration::from_secs(2)).await;
    let (empty, file) = before(&[], "log-empty", "file: FILE", &fields).await;
    let mut asking = Raw::to(&empty).await;
    asking.send(b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(status(&asking.response().await), "503");
    let written: Value = serde_json::from_str(&until_lines(&file, 1).await[0]).unwrap();
    for (field, expected) in [
        ("error", json!("no backend is registered")),
        ("group", json!("default")),
        ("route", json!("api")),
        ("node", Value::Null),
        ("tries", json!(0)),
    ] {
        assert_eq!(written[field], expected, "{written}");
    }
    let counted = async |admin: &str, reason: &str| {
        let text = client().get(format!("http://{admin}/metrics")).send();
        let text = text.await.unwrap().text().await.unwrap();
        let name = "pingora_etcd_requests_without_backend_total";
        let labels =
            |line: &&str| line.starts_with(name) && line.contains(&format!("\"{reason}\""));
        let line = text.lines().find(labels).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(counted(&admin, "no_backend").await, 1.0);
    drop(empty);
    let _ = std::fs::remove_file(&file);

    let (full, file) = before(&[slow.address.port()], "log-full", "file: FILE", &fields).await;
    let mut first = Raw::to(&full).await;
    first.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it has arrived", async || !slow.requests().is_empty()).await;
    assert_eq!(status(&get(&full, "").await), "503");
    let written: Value = serde_json::from_str(&until_lines(&file, 1).await[0]).unwrap();
    assert_eq!(written["error"], "too many requests are being served");
    assert_eq!(counted(&admin, "too_many").await, 1.0);
    assert_eq!(status(&first.response().await), "200");
    let _ = std::fs::remove_file(&file);
}

//! Tests of how the programs end, and of which signals they survive.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::stalls::Stalls;
use super::common::{free_port, group, local, skipped};
use super::raw::{Raw, RawBackend, in_front_of, ok, status};
use super::world::{Balancer, Log, Setup, Worker, entry, put, scratch, until, until_registered};

const SECOND: Duration = Duration::from_secs(1);

/// A balancer with these fields, and this grace period in seconds, in front of one backend.
async fn balancer(backend: &RawBackend, name: &str, grace: u32, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let setup = Setup::shared(&group).with(fields);
    setup
        .server(&format!("grace_period_seconds: {grace}"))
        .serving()
        .await
}

fn is_listened_on(address: &str) -> bool {
    std::net::TcpStream::connect(address).is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_sigterm_it_says_so_goes_on_accepting_and_ends_when_nothing_is_in_flight() {
    let backend = RawBackend::start_slow(8 * SECOND).await;
    let fields = "drain_delay_ms: 4000\nclients: { ready_path: /ready }";
    let mut balancer = balancer(&backend, "term", 30, fields).await;
    let mut probe = Raw::to(&balancer).await;
    let ready = b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n";
    probe.send(ready).await;
    assert_eq!(status(&probe.response().await), "200");
    let (mut idle, mut half) = (Raw::to(&balancer).await, Raw::to(&balancer).await);
    idle.send(ready).await;
    idle.response().await;
    half.send(b"GET / HT").await;
    let requests = backend.requests().len();

    let start = Instant::now();
    balancer.program.signal("TERM");
    // Connections are accepted, and told that they end.
    until("readiness is off", async || {
        let mut probe = Raw::to(&balancer).await;
        probe.send(ready).await;
        // One response: before the signal is there, the connection is kept after it.
        let response = probe.response().await;
        let is_off = status(&response) == "503";
        assert!(
            !is_off || response.contains("Connection: close"),
            "{response}"
        );
        is_off
    })
    .await;
    assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
    let mut client = Raw::to(&balancer).await;
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("the backend has the request", async || {
        backend.requests().len() > requests
    })
    .await;
    // Nobody listens before the request is answered.
    until("nobody listens", async || !is_listened_on(&balancer.listen)).await;
    let closed = start.elapsed();
    assert!(closed > SECOND * 7 / 2 && closed < 7 * SECOND, "{closed:?}");
    assert_eq!(idle.rest().await, "");
    assert_eq!(half.rest().await, "");
    let response = client.rest().await;
    assert_eq!(status(&response), "200");
    assert!(response.contains("Connection: close"), "{response}");
    let (status, took) = balancer.program.ended().await;
    assert_eq!(status.code(), Some(0), "{}", balancer.log_text());
    assert!(took < 2 * SECOND, "{took:?}");
}

/// Over HTTP/2 the connection is told with GOAWAY, and what is under way ends as usual.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_sigterm_connections_of_http_2_are_told_and_requests_on_them_end() {
    let backend = RawBackend::start_slow(3 * SECOND).await;
    let mut balancer = balancer(&backend, "goaway", 30, "drain_delay_ms: 4000").await;
    let connected = async || {
        let stream = TcpStream::connect(&balancer.listen).await.unwrap();
        let (sender, connection) = h2::client::handshake(stream).await.unwrap();
        (sender, tokio::spawn(connection))
    };
    let (sender, driving) = connected().await;
    let requests = backend.requests().len();
    let mut sender = sender.ready().await.unwrap();
    let request = || http::Request::get("http://a/").body(()).unwrap();
    let (response, _) = sender.send_request(request(), true).unwrap();
    until("the backend has the request", async || {
        backend.requests().len() > requests
    })
    .await;
    let start = Instant::now();
    balancer.program.signal("TERM");
    // Told while the request is still under way.
    until("no more requests are taken on it", async || {
        sender.clone().ready().await.is_err()
    })
    .await;
    let told = start.elapsed();
    assert!(told < 2 * SECOND, "{told:?}");
    // Who connects now is served, and not sent away: it would come back.
    let (sender, later) = connected().await;
    let mut sender = sender.ready().await.unwrap();
    let (second, _) = sender.send_request(request(), true).unwrap();
    tokio::time::sleep(SECOND).await;
    assert!(sender.clone().ready().await.is_ok());
    assert_eq!(response.await.unwrap().status(), 200);
    assert_eq!(second.await.unwrap().status(), 200);
    assert!(tokio::time::timeout(5 * SECOND, later).await.is_ok());
    let ended = tokio::time::timeout(5 * SECOND, driving).await;
    assert!(ended.is_ok(), "the connection stays");
    let (status, _) = balancer.program.ended().await;
    assert_eq!(status.code(), Some(0), "{}", balancer.log_text());
    assert!(start.elapsed() < 9 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_process_ends_after_the_delay_and_at_ctrl_c_at_once() {
    let backend = RawBackend::start(ok).await;
    // The default of five seconds would be too long for the first and the last one.
    for (signal, program, delay, least, most) in [
        ("TERM", "load_balancer", 1_500, SECOND * 3 / 2, 4 * SECOND),
        ("INT", "load_balancer", 10_000, Duration::ZERO, 5 * SECOND),
        ("TERM", "leader_routing", 1_500, SECOND * 3 / 2, 4 * SECOND),
    ] {
        let (etcd, group) = (Etcd::shared(), group("idle-end"));
        let entry = entry("a", Some(backend.address.port()), json!({}));
        put(&mut etcd.raw_client().await, &group, &entry, None).await;
        let setup = Setup::shared(&group).program(program);
        let setup = setup.with(&format!("drain_delay_ms: {delay}"));
        let mut balancer = setup.server("grace_period_seconds: 30").serving().await;
        let (stalls, start) = (Stalls::watch(), Instant::now());
        balancer.program.signal(signal);
        let (status, _) = balancer.program.ended().await;
        let (took, stood) = (start.elapsed(), stalls.so_far());
        assert_eq!(status.code(), Some(0), "{}", balancer.log_text());
        assert!(
            took >= least && took < most + stood,
            "{signal} {program}: {took:?}, of which the machine stood still for {stood:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grace_period_and_a_second_signal_end_it_with_a_request_in_flight() {
    let backend = RawBackend::start_slow(60 * SECOND).await;
    // The signals, the grace period, and how long the end may take.
    for (signals, grace, most) in [
        (&["TERM"][..], 1, 4 * SECOND),
        (&["TERM", "TERM"], 30, 2 * SECOND),
        (&["INT", "INT"], 30, 2 * SECOND),
        (&["TERM", "HUP", "INT"], 30, 2 * SECOND),
    ] {
        let fields = "drain_delay_ms: 300\nclients: { ready_path: / }";
        let mut balancer = balancer(&backend, "grace", grace, fields).await;
        let mut client = Raw::to(&balancer).await;
        let requests = backend.requests().len();
        client.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await;
        until("the backend has the request", async || {
            backend.requests().len() > requests
        })
        .await;
        let start = Instant::now();
        for (index, signal) in signals.iter().enumerate() {
            balancer.program.signal(signal);
            let what = ["the process ends; it still", "without effect"][index.min(1)];
            if index + 1 < signals.len() && (index == 0 || *signal == "HUP") {
                until("it has the signal", async || {
                    balancer.log_text().contains(what)
                })
                .await;
            }
        }
        let (status, _) = balancer.program.ended().await;
        let took = start.elapsed();
        assert_eq!(
            status.code(),
            Some(1),
            "{signals:?}: {}",
            balancer.log_text()
        );
        assert!(took < most, "{signals:?}: {took:?}");
        assert!(signals.len() > 1 || took > SECOND, "{took:?}");
        assert_eq!(client.rest().await, "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_and_sigusr_never_end_a_program() {
    let backend = RawBackend::start(ok).await;
    let etcd = Etcd::shared();
    let balancer = in_front_of(&backend, "hup", "").await;
    let group = group("hup-worker");
    let mut worker = Worker::start(&etcd.endpoints()[0], &group, "w1", &[], Log::File);
    let mut keys = etcd.raw_client().await;
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let mut balancer = balancer;
    // SIGQUIT: nobody is there to take the sockets.
    for signal in ["HUP", "USR1", "USR2", "QUIT"] {
        balancer.program.signal(signal);
        if signal != "QUIT" {
            worker.program.signal(signal);
        }
    }
    until("the signals have arrived", async || {
        balancer.log_text().matches("without effect").count() == 1
            && balancer.log_text().contains("has not changed")
            && balancer.log_text().contains("opened again")
            && balancer.log_text().contains("waiting for a successor")
            && worker.log_text().matches("without effect").count() >= 1
    })
    .await;
    assert!(balancer.program.lives() && worker.program.lives());
    assert_eq!(balancer.get().await, "a");
    // While it waits for a successor, the end can be asked for.
    balancer.program.signal("INT");
    assert!(balancer.program.ended().await.0.success());
}

/// A process that starts is not ended by them either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_waits_for_etcd_survives_sighup_and_ends_at_sigterm() {
    let nowhere = vec![format!("http://{}:{}", local(), free_port())];
    let setup = Setup::new(nowhere, &group("starts")).with("drain_delay_ms: 200");
    let mut balancer = setup.server("grace_period_seconds: 20").start();
    until("it runs", async || balancer.log_text().contains("cannot")).await;
    balancer.program.signal("HUP");
    until("it has the signal", async || {
        balancer.log_text().contains("has not changed")
    })
    .await;
    balancer.program.signal("TERM");
    let (status, took) = balancer.program.ended().await;
    assert!(status.success() && took < 3 * SECOND, "{status} {took:?}");
}

/// A client that sends a request every 10 ms, each on a connection of its own, and one that keeps
/// its connection, as long as the guard exists.
pub(super) struct Clients {
    tasks: JoinSet<Vec<String>>,
    /// How many requests each of them has sent.
    sent: [Arc<AtomicUsize>; 2],
    stop: tokio::sync::watch::Sender<bool>,
}

impl Clients {
    pub(super) fn start(address: &str) -> Self {
        let mut tasks = JoinSet::new();
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let sent: [Arc<AtomicUsize>; 2] = Default::default();
        let stalls = Stalls::watch();
        for (keeps, sent) in [false, true].into_iter().zip(&sent) {
            let (address, stopped) = (address.to_owned(), stopped.clone());
            let (sent, stalls) = (sent.clone(), stalls.clone());
            tasks.spawn(async move {
                let mut failures = Vec::new();
                let mut kept: Option<TcpStream> = None;
                while !*stopped.borrow() {
                    let (start, before) = (Instant::now(), stalls.so_far());
                    if let Err(error) = request(&address, &mut kept, keeps).await {
                        failures.push(format!("{error} (kept: {keeps})"));
                    }
                    let (took, stood) = (start.elapsed(), stalls.so_far() - before);
                    if took > SECOND + stood {
                        failures.push(format!("a request took {took:?}, {stood:?} still"));
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                failures
            });
        }
        Self { tasks, sent, stop }
    }

    /// Ends once each of them has sent 50 more requests. None of all has failed.
    pub(super) async fn end(mut self) {
        for sent in &self.sent {
            let enough = sent.load(Ordering::Relaxed) + 50;
            until("more requests are served", async || {
                sent.load(Ordering::Relaxed) > enough
            })
            .await;
        }
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            let failures = ended.unwrap();
            assert!(failures.is_empty(), "{failures:#?}");
        }
    }
}

/// One request. A connection that was kept may have been closed meanwhile: then it is sent again on a
/// new one, as every client does.
async fn request(address: &str, kept: &mut Option<TcpStream>, keeps: bool) -> Result<(), String> {
    let reused = kept.is_some();
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => TcpStream::connect(address)
            .await
            .map_err(|error| format!("connect: {error}"))?,
    };
    let close = if keeps { "" } else { "Connection: close\r\n" };
    let head = format!("GET / HTTP/1.1\r\nHost: a\r\n{close}\r\n");
    let sent = stream.write_all(head.as_bytes()).await;
    let response = match sent {
        Ok(()) => super::raw::read_message(&mut stream).await,
        Err(_) => None,
    };
    match response {
        Some(response) if status(&response) == "200" => {
            if keeps && !response.contains("Connection: close") {
                *kept = Some(stream);
            }
            Ok(())
        }
        None if reused => Box::pin(request(address, kept, keeps)).await,
        other => Err(format!("{other:?}")),
    }
}

/// Writes the configuration of a predecessor for its successor, which has the same upgrade socket.
fn successor(setup: &Setup, old: &Balancer) -> Balancer {
    let setup = setup.clone().listen(&old.listen);
    setup.argument("--upgrade").start()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_handed_over_without_a_refused_or_waiting_connection() {
    let backend = RawBackend::start(ok).await;
    let etcd = Etcd::own();
    let group = group("handover");
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let snapshot = scratch(&format!("{group}-snapshot"));
    let with_snapshot = format!(
        "snapshot: {{ file: {}, interval_ms: 100 }}",
        snapshot.display()
    );
    let setup = Setup::new(etcd.endpoints(), &group).server("grace_period_seconds: 20");
    let setup = setup.with(&with_snapshot);
    let mut old = setup.serving().await;
    let clients = Clients::start(&old.listen);
    until("the snapshot is there", async || snapshot.exists()).await;

    // With etcd, then without, from the snapshot.
    for is_away in [false, true] {
        if is_away {
            etcd.stop();
        }
        let new = successor(&setup, &old);
        old.program.signal("QUIT");
        let (status, _) = old.program.ended().await;
        assert!(
            status.success(),
            "{status}\n{}\n{}",
            old.log_text(),
            new.log_text()
        );
        // It says so after it has told it.
        until("the former process knows", async || {
            new.log_text().contains("predecessor knows")
        })
        .await;
        old = new;
    }
    clients.end().await;
    let _ = std::fs::remove_file(snapshot);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_view_of_the_group_nothing_is_handed_over() {
    let backend = RawBackend::start(ok).await;
    let etcd = Etcd::own();
    let group = group("no-handover");
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let setup = Setup::new(etcd.endpoints(), &group).server("grace_period_seconds: 20");
    let setup = setup.with("ready_timeout_ms: 100");
    let mut old = setup.serving().await;
    let clients = Clients::start(&old.listen);
    etcd.pause();
    let mut new = successor(&setup, &old);
    old.program.signal("QUIT");
    until("it waits", async || {
        old.log_text().contains("waiting for a successor")
    })
    .await;
    // The successor itself has nothing to hand over.
    until("it runs", async || new.log_text().contains("no view")).await;
    new.program.signal("QUIT");
    until("it says so", async || {
        new.log_text().contains("does not listen yet")
    })
    .await;
    tokio::time::sleep(3 * SECOND).await;
    assert!(old.program.lives() && new.program.lives());
    // As soon as etcd is back, the successor is ready.
    etcd.resume();
    assert!(old.program.ended().await.0.success());
    clients.end().await;
    assert_eq!(new.get().await, "a");
    // Its predecessor is gone without a handover: then it listens by itself.
    let listen = new.listen.clone();
    let mut next = successor(&setup, &new);
    until("it is ready", async || {
        next.log_text().contains("ready to take")
    })
    .await;
    new.program.child.kill().unwrap();
    new.program.ended().await;
    until("it listens", async || is_listened_on(&listen)).await;
    assert!(next.program.lives());
    assert_eq!(next.get().await, "a");
}

/// Somebody takes the sockets, and does not confirm that it accepts connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_dies_in_between_costs_nothing() {
    let backend = RawBackend::start(ok).await;
    let mut balancer = balancer(&backend, "dies", 20, "").await;
    let socket = upgrade_socket(&balancer);
    let listener = UnixListener::bind(&socket).unwrap();
    balancer.program.signal("QUIT");
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut names = [0; 200];
    let count = stream.read(&mut names).await.unwrap();
    assert_eq!(&names[..count], balancer.listen.as_bytes());
    drop((stream, listener));
    std::fs::remove_file(&socket).unwrap();
    until("it notices", async || {
        balancer.log_text().contains("this process goes on")
    })
    .await;
    assert!(balancer.program.lives());
    for _ in 0..20 {
        assert_eq!(balancer.get().await, "a");
    }
    // The next one is a real one. Others who connect to it, and send nothing, are ignored.
    let setup = Setup::shared(&balancer.group).server("grace_period_seconds: 20");
    let mut new = successor(&setup, &balancer);
    until("it is ready", async || {
        new.log_text().contains("ready to take")
    })
    .await;
    let _silent = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    balancer.program.signal("QUIT");
    assert!(balancer.program.ended().await.0.success());
    assert!(new.program.lives());
    assert_eq!(new.get().await, "a");
}

fn upgrade_socket(balancer: &Balancer) -> PathBuf {
    let text = std::fs::read_to_string(&balancer.conf).unwrap();
    let line = text.lines().find(|line| line.starts_with("upgrade_sock"));
    PathBuf::from(line.unwrap().split_once(": ").unwrap().1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_manager_is_told() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("notify"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let path = scratch(&format!("{group}-notify"));
    let _ = std::fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(30 * SECOND)).unwrap();
    let told = || {
        let mut text = [0; 200];
        let count = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..count]).into_owned()
    };
    let setup = Setup::shared(&group)
        .with("drain_delay_ms: 100")
        .server("grace_period_seconds: 20")
        .variable("NOTIFY_SOCKET", path.to_str().unwrap());
    let mut old = setup.start();
    assert_eq!(told().trim(), "READY=1");
    assert!(is_listened_on(&old.listen));
    // A successor that is called off is no end of the service.
    let mut called_off = successor(&setup, &old);
    until("it waits for the sockets", async || {
        called_off
            .log_text()
            .contains("ready to take the sockets over")
    })
    .await;
    called_off.program.signal("TERM");
    called_off.program.ended().await;
    let mut new = successor(&setup, &old);
    old.program.signal("QUIT");
    let pid = new.program.child.id();
    assert_eq!(told().trim(), format!("MAINPID={pid}\nREADY=1"));
    old.program.ended().await;
    new.program.signal("TERM");
    // The old one has said nothing: it was not the main process any more.
    assert_eq!(told().trim(), "STOPPING=1");
    assert!(new.program.ended().await.0.success());
    // Both have ended, so whatever they have said is there.
    socket.set_nonblocking(true).unwrap();
    let more = socket.recv(&mut [0; 200]);
    assert!(
        more.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
        "somebody has said more than that"
    );
    let _ = std::fs::remove_file(path);
}

/// The first process of a container: signals that it does not handle have no effect there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_the_first_process_of_a_container_it_ends_all_the_same() {
    assert!(
        may_be_first_process(),
        "this needs unshare and root, or user namespaces"
    );
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("pid-1"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    for signal in ["TERM", "INT"] {
        let setup = Setup::shared(&group).with("drain_delay_ms: 100");
        let mut balancer = setup.starter(UNSHARE).serving().await;
        let inner = child_of(balancer.program.child.id());
        super::common::etcd::send_signal(inner, "HUP");
        super::common::etcd::send_signal(inner, signal);
        let (status, took) = balancer.program.ended().await;
        assert!(status.success() && took < 3 * SECOND, "{status} {took:?}");
    }
}

const UNSHARE: &[&str] = &["unshare", "--pid", "--fork", "--kill-child"];

fn may_be_first_process() -> bool {
    let mut command = std::process::Command::new(UNSHARE[0]);
    let tried = command.args(&UNSHARE[1..]).arg("true").status();
    tried.is_ok_and(|status| status.success())
}

fn child_of(parent: u32) -> u32 {
    let file = format!("/proc/{parent}/task/{parent}/children");
    let children = std::fs::read_to_string(file).unwrap();
    children.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_ends_within_its_grace_period_whatever_its_clients_do() {
    let etcd = Etcd::shared();
    let group = group("worker-grace");
    let more = ["--grace", "2"];
    let mut keys = etcd.raw_client().await;
    let gone = async |keys: &mut _| super::world::registered(keys, &group, "w1").await.is_none();
    for signal in ["QUIT", "TERM", "INT"] {
        let mut worker = Worker::start(&etcd.endpoints()[0], &group, "w1", &more, Log::File);
        until_registered(&mut keys, &group, "w1", |_, _| true).await;
        let mut client = TcpStream::connect((local(), worker.port)).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
        for signal in ["HUP", signal] {
            worker.program.signal(signal);
        }
        let (status, took) = worker.program.ended().await;
        assert!(
            status.success(),
            "{signal}, {status}: {}",
            worker.log_text()
        );
        assert!(took < 5 * SECOND, "{signal}: {took:?}");
        assert!(gone(&mut keys).await);
    }
    // Told to stop by a request, it leaves as well.
    let mut worker = Worker::start(&etcd.endpoints()[0], &group, "w1", &more, Log::File);
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let stop = super::common::load::client().post(format!("{}/stop", worker.url));
    assert!(stop.send().await.unwrap().status().is_success());
    assert!(worker.program.ended().await.0.success());
    assert!(gone(&mut keys).await);
}

/// The second one does not wait for whom the first one waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_worker_at_once() {
    let etcd = Etcd::shared();
    let group = group("worker-twice");
    let mut keys = etcd.raw_client().await;
    for signal in ["TERM", "INT"] {
        let more = ["--grace", "60"];
        let mut worker = Worker::start(&etcd.endpoints()[0], &group, "w1", &more, Log::File);
        until_registered(&mut keys, &group, "w1", |_, _| true).await;
        let mut client = TcpStream::connect((local(), worker.port)).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
        worker.program.signal(signal);
        let is_gone = async || {
            super::world::registered(&mut keys.clone(), &group, "w1")
                .await
                .is_none()
        };
        until("it has left the group", is_gone).await;
        let start = Instant::now();
        worker.program.signal(signal);
        worker.program.ended().await;
        assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    }
}

/// As root it opens its files and ports, and serves as somebody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_becomes_the_user_that_it_is_told() {
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let user = |status: &str| {
        let line = status.lines().find(|line| line.starts_with("Uid:"));
        line.unwrap().split_whitespace().nth(2).unwrap().to_owned()
    };
    if user(&own) != "0" {
        skipped("only root can become somebody else");
        return;
    }
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("user"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let directory = tempfile::tempdir().unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(directory.path(), everybody).unwrap();
    let (pid_file, log) = (directory.path().join("pid"), directory.path().join("log"));
    let daemon = format!(
        "grace_period_seconds: 20\ndaemon: true\nuser: nobody\ngroup: nogroup\npid_file: {}\nerror_log: {}",
        pid_file.display(),
        log.display()
    );
    let setup = Setup::shared(&group)
        .with("drain_delay_ms: 100")
        .server(&daemon);
    let mut started = setup.start();
    let (status, _) = started.program.ended().await;
    assert!(status.success(), "{}", started.log_text());
    until("it serves", async || started.get().await == "a").await;
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap();
    let of_nobody = |what: &str| {
        let output = std::process::Command::new("id")
            .args([what, "nobody"])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let group = std::fs::read_to_string("/etc/group").unwrap();
    let group = group.lines().find(|line| line.starts_with("nogroup:"));
    let group = group.unwrap().split(':').nth(2).unwrap();
    let set = |ids: &str| -> std::collections::BTreeSet<String> {
        ids.split_whitespace().map(str::to_owned).collect()
    };
    let ids = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        set(line.unwrap())
    };
    // The real id, the effective one, and those that it could go back to.
    assert_eq!(ids("Uid:"), set(&of_nobody("-u")));
    assert_eq!(ids("Gid:"), set(group));
    // None of the groups of root are left.
    assert_eq!(ids("Groups:"), set(&of_nobody("-G")));
    let pid = pid.trim().parse().unwrap();
    super::common::etcd::send_signal(pid, "TERM");
    until("it has ended", async || !is_listened_on(&started.listen)).await;
}

/// A daemon listens, and ends like any other process; what it cannot do is an error of the caller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_listens_or_its_start_is_an_error() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("daemon"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let (pid_file, log) = (
        scratch(&format!("{group}.pid")),
        scratch(&format!("{group}.daemon-log")),
    );
    let daemon = format!(
        "grace_period_seconds: 20\ndaemon: true\npid_file: {}\nerror_log: {}",
        pid_file.display(),
        log.display()
    );
    let setup = Setup::shared(&group).with("drain_delay_ms: 100");
    let setup = setup.server(&daemon);
    let mut started = setup.start();
    assert!(started.program.ended().await.0.success());
    until("it serves", async || started.get().await == "a").await;
    let read = |file: &Path| std::fs::read_to_string(file).unwrap_or_default();
    let pid: u32 = read(&pid_file).trim().parse().unwrap();
    // Relative paths of the file still name what they named at the start.
    let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(directory, std::env::current_dir().unwrap());
    // The port is taken now.
    let mut second = setup.clone().listen(&started.listen).start();
    let (status, _) = second.program.ended().await;
    assert_eq!(status.code(), Some(1));
    assert!(
        second.log_text().contains("in use"),
        "{}",
        second.log_text()
    );
    super::common::etcd::send_signal(pid, "HUP");
    super::common::etcd::send_signal(pid, "TERM");
    until("it has ended", async || {
        !Path::new(&format!("/proc/{pid}")).exists()
    })
    .await;
    assert!(
        read(&log).contains("everything has been served"),
        "{}",
        read(&log)
    );
    for (lines, reason) in [
        ("user: nobody", "has an effect only with daemon"),
        ("daemon: true\nuser: nobody", "is needed with user"),
        ("daemon: true", "a daemon has no standard output"),
    ] {
        let setup = match lines {
            "daemon: true" => setup.clone().with("access_log: { file: '-' }"),
            _ => setup.clone(),
        };
        let mut refused = setup.server(lines).start();
        assert_eq!(refused.program.ended().await.0.code(), Some(1));
        assert!(
            refused.log_text().contains(reason),
            "{}",
            refused.log_text()
        );
    }
    let first = read(Path::new("/proc/sys/net/ipv4/ip_unprivileged_port_start"));
    let first: u16 = first.trim().parse().unwrap();
    // In some containers every port is for everybody.
    if first > 81 {
        let lines = "daemon: true\nuser: nobody\ngroup: nogroup";
        let mut refused = setup.server(lines).listen("127.0.0.1:81").start();
        assert_eq!(refused.program.ended().await.0.code(), Some(1));
        let text = refused.log_text();
        assert!(text.contains("may not listen on ports below"), "{text}");
    }
    for file in [pid_file, log] {
        let _ = std::fs::remove_file(file);
    }
}

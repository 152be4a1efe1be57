//! Tests of programs that listen on several addresses, on the release programs.

use std::path::Path;
use std::time::Duration;

use tokio::net::TcpStream;

use super::common::certificates::{Authority, Directory};
use super::common::etcd::Etcd;
use super::common::{free_port, group, local};
use super::raw::{Raw, RawBackend, ok, register, status};
use super::shutdown::Clients;
use super::tls::{certificates, connect, get};
use super::world::{Balancer, Setup, scratch, until};

const SECOND: Duration = Duration::from_secs(1);

/// A balancer that also listens on a further address, with these certificates, in front of this backend.
async fn on_two(backend: &RawBackend, name: &str, pair: (&Path, &Path), more: &str) -> Two {
    let (etcd, group) = (Etcd::shared(), group(name));
    register(&etcd, &group, &[backend]).await;
    let second = format!("{}:{}", local(), free_port());
    let listed = certificates(&[pair]);
    let further = format!(
        "further_listeners: [{{ listen: '{second}', tls: {{ certificates: {listed} }} }}]\n"
    );
    let setup = Setup::shared(&group).with(&further).with(more);
    let setup = setup.server("grace_period_seconds: 20");
    Two {
        balancer: setup.listening().await,
        second,
    }
}

struct Two {
    balancer: Balancer,
    second: String,
}

impl Two {
    async fn over_tls(&self, name: &str, authority: &Authority) -> std::io::Result<String> {
        let mut client = connect(&self.second, name, authority, None, &[]).await?;
        Ok(get(&mut client).await)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_redirects_from_its_plain_port_to_the_one_with_tls() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let routes = "drain_delay_ms: 0\n\
         clients: { trusted_proxies: [127.0.0.9] }\n\
         routes:\n\
         - { path: /.well-known/acme-challenge, answer: { body: token } }\n\
         - { scheme: http, redirect: { to: 'https://{host}:4430{path}{query}' } }\n";
    let mut two = on_two(&backend, "listeners", (&pair.0, &pair.1), routes).await;

    // The plain one.
    let mut plain = Raw::to(&two.balancer).await;
    plain
        .send(b"GET /a?b=c HTTP/1.1\r\nHost: one.test:80\r\n\r\n")
        .await;
    let response = plain.response().await;
    assert_eq!(status(&response), "308", "{response}");
    let location = "location: https://one.test:4430/a?b=c\r\n";
    assert!(response.to_lowercase().contains(location), "{response}");
    plain
        .send(b"GET /.well-known/acme-challenge/x HTTP/1.1\r\nHost: one.test\r\n\r\n")
        .await;
    assert!(plain.response().await.ends_with("\r\n\r\ntoken"));
    assert!(backend.requests().is_empty());

    // The one with TLS, which says so to backends.
    let response = two.over_tls("one.test", &authority).await.unwrap();
    assert_eq!(status(&response), "200", "{response}");
    let port = two.second.rsplit_once(':').unwrap().1;
    for expected in [
        "x-forwarded-proto: https\r\n".to_owned(),
        format!("x-forwarded-port: {port}\r\n"),
    ] {
        assert!(backend.last().contains(&expected), "{}", backend.last());
    }
    let offered = ["h2", "http/1.1"];
    let client = connect(&two.second, "one.test", &authority, None, &offered).await;
    let client = client.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    drop(client);

    // Neither does what the other one does.
    let mut plain_to_tls = Raw(TcpStream::connect(&two.second).await.unwrap());
    plain_to_tls
        .send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await;
    assert!(!plain_to_tls.rest().await.contains("HTTP/"));
    let tls_to_plain = connect(&two.balancer.listen, "one.test", &authority, None, &[]).await;
    assert!(tls_to_plain.is_err());

    // What a load balancer in front says of its client is believed, and only from it.
    for (peer, said, expected) in [
        ("127.0.0.9", "https", "200"),
        ("127.0.0.9", "http", "308"),
        ("127.0.0.8", "https", "308"),
    ] {
        let mut client = Raw::at(peer.parse().unwrap(), &two.balancer).await;
        let response = client.get(&format!("X-Forwarded-Proto: {said}\r\n")).await;
        assert_eq!(status(&response), expected, "{peer} {said}");
    }

    two.balancer.program.signal("TERM");
    let (status, took) = two.balancer.program.ended().await;
    assert!(status.success() && took < 3 * SECOND, "{status} {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_for_all_listeners_together() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let limit = "clients: { connections: 2 }";
    let two = on_two(&backend, "listeners-limit", (&pair.0, &pair.1), limit).await;
    let mut plain = Raw::to(&two.balancer).await;
    // Those that looked whether it listens may still count.
    until("it answers", async || {
        let response = plain.get("").await;
        if response.is_empty() {
            plain = Raw::to(&two.balancer).await;
        }
        status(&response) == "200"
    })
    .await;
    let mut over_tls = None;
    until("it answers over TLS, too", async || {
        let connected = connect(&two.second, "one.test", &authority, None, &[]).await;
        over_tls = connected.ok();
        over_tls.is_some()
    })
    .await;
    for address in [&two.balancer.listen, &two.second] {
        let mut third = Raw(TcpStream::connect(address).await.unwrap());
        third.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(third.rest().await, "", "{address}");
    }
    assert_eq!(status(&plain.get("").await), "200");
    let response = get(&mut over_tls.unwrap()).await;
    assert_eq!(status(&response), "200", "{response}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_gives_a_further_listener_other_certificates_but_no_other_address() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let one = files.write_pair("one", &authority.server(&["one.test"]));
    let other = files.write_pair("other", &authority.server(&["other.test"]));
    let two = on_two(&backend, "listeners-reload", (&one.0, &one.1), "").await;
    assert!(two.over_tls("one.test", &authority).await.is_ok());
    assert!(two.over_tls("other.test", &authority).await.is_err());

    let text = std::fs::read_to_string(&two.balancer.conf).unwrap();
    let write = |text: String| {
        std::fs::write(&two.balancer.conf, text).unwrap();
        two.balancer.program.signal("HUP");
    };
    let [from, to] = [&one, &other].map(|pair| certificates(&[(&pair.0, &pair.1)]));
    let changed = text.replace(&from, &to);
    write(changed.clone());
    until("it has the other certificate", async || {
        two.over_tls("other.test", &authority).await.is_ok()
    })
    .await;
    assert!(two.over_tls("one.test", &authority).await.is_err());
    assert_eq!(two.balancer.get().await, "n0");

    // A file that renews itself.
    let renewed = authority.server(&["renewed.test"]);
    std::fs::write(&other.0, &renewed.cert).unwrap();
    std::fs::write(&other.1, &renewed.key).unwrap();
    until("it has been renewed", async || {
        two.over_tls("renewed.test", &authority).await.is_ok()
    })
    .await;

    // Another address is for the next start.
    let moved = format!("{}:{}", local(), free_port());
    write(changed.replace(&two.second, &moved));
    until("it is named", async || {
        let log = two.balancer.log_text();
        log.contains("cluster.further_listeners") && log.contains("restart")
    })
    .await;
    assert!(two.over_tls("renewed.test", &authority).await.is_ok());
    assert!(TcpStream::connect(&moved).await.is_err());
}

/// The successor has one more listener, and another one less.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_listeners_are_handed_over_without_a_refused_connection() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("listeners-handover"));
    register(&etcd, &group, &[&backend]).await;
    let address = || format!("{}:{}", local(), free_port());
    let [first, second, third, fourth] = [address(), address(), address(), address()];
    let setup = |further: [&str; 2]| {
        let [one, two] = further;
        let fields = format!("further_listeners: [{{ listen: '{one}' }}, {{ listen: '{two}' }}]");
        let setup = Setup::shared(&group).listen(&first).with(&fields);
        setup.server("grace_period_seconds: 20")
    };
    let mut old = setup([&second, &third]).serving().await;
    until("it listens everywhere", async || {
        TcpStream::connect(&third).await.is_ok()
    })
    .await;
    let clients = [&first, &second].map(|address| Clients::start(address));
    let new = setup([&second, &fourth]).argument("--upgrade").start();
    old.program.signal("QUIT");
    let (ended, _) = old.program.ended().await;
    assert!(ended.success(), "{}\n{}", old.log_text(), new.log_text());
    until("the former process knows", async || {
        new.log_text().contains("predecessor knows")
    })
    .await;
    // Some more requests go to the new one.
    for clients in clients {
        clients.end().await;
    }
    let mut client = Raw(TcpStream::connect(&fourth).await.unwrap());
    assert_eq!(status(&client.get("").await), "200");
    assert!(TcpStream::connect(&third).await.is_err());
}

/// The successor's first address belongs to somebody else, so it cannot serve, and its predecessor has to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_cannot_listen_everywhere_takes_nothing_away() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("listeners-in-part"));
    register(&etcd, &group, &[&backend]).await;
    let address = || format!("{}:{}", local(), free_port());
    let [first, second] = [address(), address()];
    let held = std::net::TcpListener::bind((local(), 0)).unwrap();
    let taken = held.local_addr().unwrap().to_string();
    let further = |address: &str| format!("further_listeners: [{{ listen: '{address}' }}]");
    let setup = Setup::shared(&group).server("grace_period_seconds: 20");
    let old = setup.clone().listen(&first).with(&further(&second));
    let mut old = old.serving().await;
    let clients = [&first, &second].map(|address| Clients::start(address));
    // Each has an upgrade socket of its own in these tests: that of the former process leads to that of the new one.
    let new = setup.listen(&taken).with(&further(&second));
    let socket = |address: &str| scratch(&format!("{}.sock", address.replace(':', "-")));
    let _ = std::fs::remove_file(socket(&first));
    std::os::unix::fs::symlink(socket(&taken), socket(&first)).unwrap();
    let mut new = new.argument("--upgrade").start();
    until("the successor waits", async || {
        new.log_text().contains("ready to take")
    })
    .await;
    old.program.signal("QUIT");
    let (ended, _) = new.program.ended().await;
    assert!(!ended.success(), "{}", new.log_text());
    let log = new.log_text();
    assert!(log.contains(&format!("cannot listen on {taken}")), "{log}");
    until("the former process goes on", async || {
        old.log_text().contains("this process goes on")
    })
    .await;
    for clients in clients {
        clients.end().await;
    }
    assert!(old.program.lives());
    let _ = std::fs::remove_file(socket(&first));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_further_address_that_is_taken_is_an_error_that_names_its_field() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("listeners-taken"));
    register(&etcd, &group, &[&backend]).await;
    let held = std::net::TcpListener::bind((local(), 0)).unwrap();
    let taken = held.local_addr().unwrap();
    let fields = format!("further_listeners: [{{ listen: '{taken}' }}]");
    let mut balancer = Setup::shared(&group).with(&fields).start();
    let (status, took) = balancer.program.ended().await;
    assert!(!status.success() && took < 5 * SECOND, "{status} {took:?}");
    let log = balancer.log_text();
    assert!(log.contains("cluster.further_listeners[0].listen"), "{log}");
    assert!(log.contains(&taken.to_string()), "{log}");
}

//! Tests TLS to a real etcd with certificates that are generated here: errors, mutual TLS,
//! rotation, and user names in certificates.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pingora_etcd::store::{EtcdStore, Selector, Store};
use pingora_etcd::{
    ClusterError, EtcdOptions, HealthStatus, ServiceDiscovery,
    discovery::DiscoveryStatus,
    store::{Credentials, Password, TlsOptions},
};

use super::auth::Captured;
use super::common::certificates::{Authority, Directory, Pair};
use super::common::etcd::{Etcd, Setup};
use super::common::link::Link;
use super::common::{eventually, group, throughout, within};
use super::{Running, WATCHED_TTL, leader_id, ready};

/// An etcd with TLS, and the files of server and client.
pub(super) struct Secure {
    pub(super) etcd: Etcd,
    server_files: Directory,
    files: Directory,
    pub(super) ca: Authority,
}

const LOCAL: &[&str] = &["127.0.0.1", "localhost"];

impl Secure {
    fn with_server(mutual: bool, server: impl Fn(&Authority) -> Pair) -> Self {
        let (server_files, files) = (Directory::new(), Directory::new());
        let ca = Authority::new("server CA");
        server_files.write_pair("server", &server(&ca));
        files.write("ca.pem", ca.pem());
        let mut arguments = vec![
            "--cert-file={files}/server.pem".to_owned(),
            "--key-file={files}/server.key".to_owned(),
        ];
        if mutual {
            arguments.push("--client-cert-auth".to_owned());
            arguments.push("--trusted-ca-file={files}/ca.pem".to_owned());
            server_files.write("ca.pem", ca.pem());
        }
        let etcd = Etcd::with(Setup {
            https: true,
            arguments,
            files: Some(server_files.path().to_owned()),
            ..Setup::default()
        });
        Self {
            etcd,
            server_files,
            files,
            ca,
        }
    }

    pub(super) fn new(mutual: bool) -> Self {
        Self::with_server(mutual, |ca| ca.server(LOCAL))
    }

    fn tls(&self) -> TlsOptions {
        TlsOptions::new().ca_file(self.files.file("ca.pem"))
    }

    fn client_certificate(&self, name: &str) -> (PathBuf, PathBuf) {
        self.files.write_pair(name, &self.ca.client(name))
    }
}

/// The error of a request, once etcd listens.
async fn refused(options: EtcdOptions) -> ClusterError {
    let store = EtcdStore::new(options).unwrap();
    within("the request is refused", async {
        loop {
            let any = Selector::Key("any".to_owned());
            match store.list(&any, None).await {
                Ok(_) => panic!("the request was not refused"),
                Err(ClusterError::Unavailable { reason, .. }) if reason.contains("refused (os") => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return error,
            }
        }
    })
    .await
}

fn assert_tls(error: &ClusterError, words: &[&str]) {
    println!("{error}");
    assert!(matches!(error, ClusterError::Tls { .. }), "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
}

async fn see_each_other(options: &EtcdOptions) {
    let group = group("tls");
    let discovery = ready(options, &group).await;
    let node = Running::start(options, &group, "n1").await;
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    within("the discovery shows a leader", discovery.wait_for_leader()).await;
    assert_eq!(leader_id(&discovery).as_deref(), Some("n1"));
    node.stop().await;
    eventually("the node leaves", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn worker_and_discovery_see_each_other_over_tls() {
    let secure = Secure::new(false);
    see_each_other(&secure.etcd.options().tls(secure.tls())).await;
    // The scheme may be omitted.
    let bare = EtcdOptions::new([secure.etcd.address()]).tls(secure.tls());
    see_each_other(&bare).await;
}

#[tokio::test]
async fn worker_and_discovery_see_each_other_over_mutual_tls() {
    let secure = Secure::new(true);
    let (cert, key) = secure.client_certificate("client");
    let tls = secure.tls().identity(cert, key);
    see_each_other(&secure.etcd.options().tls(tls)).await;

    // The TLS alert comes after the handshake, and is noticed in different ways: each must give
    // this error.
    for _ in 0..20 {
        let error = refused(secure.etcd.options().tls(secure.tls())).await;
        assert_tls(&error, &["client certificate", "tls.cert_file"]);
    }
    let other = Authority::new("other CA");
    let (cert, key) = secure.files.write_pair("stranger", &other.client("client"));
    let tls = secure.tls().identity(&cert, key);
    for _ in 0..20 {
        let error = refused(secure.etcd.options().tls(tls.clone())).await;
        assert_tls(&error, &["refuses the client certificate", "stranger.pem"]);
    }
}

#[tokio::test]
async fn each_fault_of_the_servers_certificate_has_its_own_error() {
    let secure = Secure::new(false);
    let options = secure.etcd.options();
    let other = Authority::new("other CA");
    let wrong = secure.files.write("wrong.pem", other.pem());
    let error = refused(options.clone().tls(TlsOptions::new().ca_file(wrong))).await;
    assert_tls(
        &error,
        &["not signed by a CA in tls.ca_file", &options.endpoints[0]],
    );
    // The system's CAs did not sign it either.
    let error = refused(options.clone()).await;
    assert_tls(&error, &["CA"]);

    let tls = secure.tls().server_name("etcd.example");
    let error = refused(options.clone().tls(tls)).await;
    assert_tls(&error, &["another name", "tls.server_name", "etcd.example"]);

    let named = Secure::with_server(false, |ca| ca.server(&["etcd.example"]));
    let error = refused(named.etcd.options().tls(named.tls())).await;
    assert_tls(&error, &["another name", "127.0.0.1"]);
    let tls = named.tls().server_name("etcd.example");
    see_each_other(&named.etcd.options().tls(tls)).await;

    let expired = Secure::with_server(false, |ca| ca.expired_server(LOCAL));
    let error = refused(expired.etcd.options().tls(expired.tls())).await;
    assert_tls(&error, &["has expired"]);

    let plain = Etcd::own();
    let https = format!("https://{}", plain.address());
    let error = refused(EtcdOptions::new([https]).tls(secure.tls())).await;
    assert_tls(&error, &["does not speak TLS", "http://"]);

    let http = format!("http://{}", secure.etcd.address());
    let error = refused(EtcdOptions::new([http])).await;
    println!("{error}");
    assert!(error.to_string().contains("https://"), "{error}");
}

#[tokio::test]
async fn one_endpoint_with_a_wrong_certificate_leaves_the_others_and_is_told_once() {
    let (captured, _logging) = Captured::start("pingora_etcd=warn");
    let (secure, other) = (Secure::new(false), Secure::new(false));
    let endpoints = [other.etcd.endpoints(), secure.etcd.endpoints()].concat();
    let both = EtcdOptions::new(endpoints)
        .tls(secure.tls())
        .shuffle_endpoints(false);
    see_each_other(&both).await;
    let expired = Secure::with_server(false, |ca| ca.expired_server(LOCAL));
    let store = EtcdStore::new(expired.etcd.options().tls(expired.tls())).unwrap();
    let any = Selector::Key("any".to_owned());
    for _ in 0..3 {
        store.list(&any, None).await.unwrap_err();
        // Longer than a second, so that the error text would contain another number of seconds.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    let logged = captured.text();
    let times_logged = |words: &str| logged.matches(words).count();
    assert_eq!(times_logged("its certificate has expired"), 1, "{logged}");
    // The worker and the discovery have separate connections.
    let unknown = times_logged("its certificate is not signed");
    assert!((1..=2).contains(&unknown), "{logged}");
}

#[tokio::test]
async fn replaced_certificates_are_in_use_without_a_restart() {
    let secure = Secure::new(true);
    let files = Directory::new();
    let put = |ca: &Authority, client: &Pair| {
        files.swap(&[
            ("ca.pem", ca.pem()),
            ("client.pem", &client.cert),
            ("client.key", &client.key),
        ]);
    };
    let first = secure.ca.client("client");
    put(&secure.ca, &first);
    let tls = TlsOptions::new()
        .ca_file(files.file("ca.pem"))
        .identity(files.file("client.pem"), files.file("client.key"));
    let (by_discovery, by_node) = (
        Link::to(secure.etcd.address()).await,
        Link::to(secure.etcd.address()).await,
    );
    let options =
        |link: &Link| EtcdOptions::new([format!("https://{}", link.address())]).tls(tls.clone());
    let group = group("rotate");
    let discovery = ready(&options(&by_discovery), &group).await;
    let node = Running::start_with_ttl(&options(&by_node), &group, "n1", WATCHED_TTL).await;
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let epoch = discovery.leadership().map(|leadership| leadership.epoch);
    let count = || (by_discovery.connections(), by_node.connections());
    assert_eq!(count(), (1, 1));

    // Replaces the client certificate only.
    let second = secure.ca.client("client");
    let start = Instant::now();
    put(&secure.ca, &second);
    eventually("both make a new connection", || count() == (2, 2)).await;
    let took = start.elapsed();
    println!("client certificate: new connections after {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");

    eventually("the old connections are closed", || {
        (by_discovery.open(), by_node.open()) == (1, 1)
    })
    .await;

    // Invalid files, and a CA that did not sign etcd's certificate: existing connections must
    // continue.
    let live = || discovery.status() == DiscoveryStatus::Live && node.node.is_leader();
    eventually("both work again", live).await;
    println!("and live with them after {:?}", start.elapsed());
    let half = Pair {
        cert: second.cert.clone(),
        key: second.key[..second.key.len() / 2].to_owned(),
    };
    put(&secure.ca, &half);
    throughout(
        "a truncated key changes nothing",
        Duration::from_secs(7),
        || live() && count() == (2, 2),
    )
    .await;
    let stranger = Authority::new("stranger");
    put(&stranger, &second);
    throughout("a foreign CA ends nothing", Duration::from_secs(7), live).await;
    let tried = count();
    assert!(
        tried.0 > 2 && tried.1 > 2,
        "new connections must have been tried: {tried:?}"
    );

    // Replaces etcd's certificate by one from another CA, and the client's once more.
    let new_ca = Authority::new("new server CA");
    let server = new_ca.server(LOCAL);
    secure.server_files.write_pair("server", &server);
    let start = Instant::now();
    put(&new_ca, &secure.ca.client("client"));
    eventually("both make a new connection", || {
        count().0 > tried.0 && count().1 > tried.1
    })
    .await;
    println!(
        "all certificates: new connections after {:?}",
        start.elapsed()
    );
    eventually("both work again", live).await;
    let late = Running::start(&options(&by_node), &group, "n2").await;
    within(
        "the discovery shows the node that joins later",
        discovery.wait_for_nodes(2),
    )
    .await;
    let now = discovery.leadership().map(|leadership| leadership.epoch);
    assert_eq!(now, epoch, "the term must not have ended");
    late.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn a_mended_ca_file_heals_without_a_restart() {
    let secure = Secure::new(false);
    let file = secure
        .files
        .write("mended.pem", Authority::new("other").pem());
    let options = secure.etcd.options().tls(TlsOptions::new().ca_file(&file));
    let discovery = super::watch_group(&options, &group("mended"));
    throughout("the discovery is not ready", Duration::from_secs(1), || {
        !discovery.is_ready()
    })
    .await;
    secure.files.write("mended.pem", secure.ca.pem());
    within("the discovery is ready", discovery.wait_ready()).await;
}

#[tokio::test]
async fn certificate_files_that_are_missing_for_a_while_end_nobody() {
    let secure = Secure::new(true);
    let (cert, key) = secure.client_certificate("client");
    let link = Link::to(secure.etcd.address()).await;
    let options = EtcdOptions::new([format!("https://{}", link.address())])
        .tls(secure.tls().identity(&cert, &key));
    let group = group("missing");
    // The files exist at the start, but not when they are needed.
    let node = super::builder(&options, &group, "n1").try_build().unwrap();
    let discovery = ServiceDiscovery::builder(options.clone(), &group)
        .try_build()
        .unwrap();
    let text = std::fs::read_to_string(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let error = super::builder(&options, &group, "n1").try_build();
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("tls.key_file"),
        "a missing file must be an error at the start: {error}"
    );
    let running = discovery.clone();
    let following = tokio::spawn(async move { running.run(None).await });
    let node = Running::new(node);
    let run = || !(following.is_finished() || node.task.is_finished());
    throughout("both keep waiting", Duration::from_secs(2), || {
        run() && !discovery.is_ready() && node.node.current_health() != HealthStatus::Healthy
    })
    .await;
    assert_tls(&node.node.resign().await.unwrap_err(), &["tls.key_file"]);
    std::fs::write(&key, &text).unwrap();
    within("the discovery is ready", discovery.wait_ready()).await;
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;

    // A file is also missing when a new connection must be made.
    let ca = secure.files.file("ca.pem");
    std::fs::remove_file(&ca).unwrap();
    link.cut();
    let stale = || matches!(discovery.status(), DiscoveryStatus::Stale { .. });
    eventually("the discovery is stale", stale).await;
    throughout("both keep running", Duration::from_secs(1), || {
        run() && discovery.nodes().len() == 1
    })
    .await;
    secure.files.write("ca.pem", secure.ca.pem());
    eventually("the discovery is live again", || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    node.wait_until_healthy().await;
    within("the node leads", node.node.wait_for_leadership()).await;
    node.stop().await;
    eventually("the node leaves", || discovery.nodes().is_empty()).await;
    assert!(!following.is_finished());
}

#[tokio::test]
async fn without_a_password_the_client_certificate_names_the_user() {
    use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission};
    let secure = Secure::new(true);
    let root = secure.ca.client("root");
    let tls = etcd_client::TlsOptions::new()
        .ca_certificate(Certificate::from_pem(secure.ca.pem()))
        .identity(Identity::from_pem(&root.cert, &root.key));
    let options = ConnectOptions::default().with_tls(tls);
    let root = Client::connect(secure.etcd.endpoints(), Some(options)).await;
    let mut root = root.unwrap();
    for name in ["root", "balancer"] {
        root.user_add(name, "password-of-it", None).await.unwrap();
        root.role_add(name).await.unwrap();
        root.user_grant_role(name, name).await.unwrap();
    }
    for prefix in ["registry/", "election/"] {
        let permission = Permission::read(prefix).with_prefix();
        root.role_grant_permission("balancer", permission)
            .await
            .unwrap();
    }
    // A password that is not needed yet, and another name in the certificate.
    let (cert, key) = secure.client_certificate("stranger");
    let password = Password::Text("password-of-it".to_owned());
    let early = secure.etcd.options().tls(secure.tls().identity(cert, key));
    let early = early.credentials(Credentials::new("balancer", password));
    let early = EtcdStore::new(early).unwrap();
    let all = Selector::Prefix("registry/".to_owned());
    early.list(&all, None).await.unwrap();
    root.auth_enable().await.unwrap();
    early.list(&all, None).await.unwrap();

    let (cert, key) = secure.client_certificate("balancer");
    let as_balancer = secure.etcd.options().tls(secure.tls().identity(cert, key));
    ready(&as_balancer, "any").await;
    let (cert, key) = secure.client_certificate("stranger");
    let tls = secure.tls().identity(cert, key);
    let error = refused(secure.etcd.options().tls(tls.clone())).await;
    println!("{error}");
    assert!(matches!(error, ClusterError::PermissionDenied { .. }));
    assert!(error.to_string().contains("client certificate"), "{error}");
    // A password takes precedence over the name in the certificate.
    let password = Password::Text("password-of-it".to_owned());
    let both = secure.etcd.options().tls(tls);
    ready(
        &both.credentials(Credentials::new("balancer", password)),
        "any",
    )
    .await;
}

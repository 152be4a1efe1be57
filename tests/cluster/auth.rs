//! Tests users, passwords, tokens and roles of a real etcd, and supplies an etcd with
//! authentication to other tests.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::store::{EtcdStore, Lease, LeaseId, Selector, Store, Txn, WatchRange};
use pingora_etcd::{
    ClusterError, EtcdOptions, HealthStatus,
    discovery::DiscoveryStatus,
    store::{Credentials, Password},
};

use super::common::certificates::Directory;
use super::common::etcd::{Etcd, Setup};
use super::common::link::Link;
use super::common::{eventually, group, subscribe, throughout, within};
use super::{LONGER_THAN_WATCHED, Running, WATCHED_TTL, builder, ready, watch_group};

pub(super) const ROOT: (&str, &str) = ("root", "of-the-root");
/// The password of every user but root; tests search for it where it must not appear.
pub(super) const SECRET: &str = "MARKER-7f3a";

/// An etcd with authentication enabled.
pub(super) struct Guarded {
    pub(super) etcd: Etcd,
    pub(super) root: Client,
}

impl Guarded {
    pub(super) async fn new(arguments: &[&str]) -> Self {
        Self::of(None, arguments).await
    }

    /// One with this binary.
    pub(super) async fn of(binary: Option<PathBuf>, arguments: &[&str]) -> Self {
        let setup = Setup {
            // Cheap password hashes, because these tests authenticate many times.
            arguments: [&["--bcrypt-cost=4"], arguments]
                .concat()
                .into_iter()
                .map(str::to_owned)
                .collect(),
            binary,
            ..Setup::default()
        };
        Self::with(setup).await
    }

    async fn with(setup: Setup) -> Self {
        let mut guarded = Self::open(setup).await;
        guarded.enable().await;
        guarded
    }

    /// Users and roles exist, but authentication is not enabled yet.
    pub(super) async fn open(setup: Setup) -> Self {
        let etcd = Etcd::with(setup);
        let mut root = etcd.raw_client().await;
        root.user_add(ROOT.0, ROOT.1, None).await.unwrap();
        root.role_add("root").await.unwrap();
        root.user_grant_role(ROOT.0, "root").await.unwrap();
        Self { etcd, root }
    }

    pub(super) async fn enable(&mut self) {
        self.root.auth_enable().await.unwrap();
        let options = ConnectOptions::default()
            .with_user(ROOT.0, ROOT.1)
            .with_auto_token_refresh(true);
        self.root = Client::connect(self.etcd.endpoints(), Some(options))
            .await
            .unwrap();
    }

    /// Adds a user with its own role.
    pub(super) async fn user(&self, name: &str, permissions: Vec<Permission>) {
        let mut root = self.root.clone();
        root.role_add(name).await.unwrap();
        for permission in permissions {
            root.role_grant_permission(name, permission).await.unwrap();
        }
        root.user_add(name, SECRET, None).await.unwrap();
        root.user_grant_role(name, name).await.unwrap();
    }

    pub(super) fn options(&self, user: &str) -> EtcdOptions {
        as_user(self.etcd.options(), user)
    }
}

pub(super) fn as_user(options: EtcdOptions, user: &str) -> EtcdOptions {
    options.credentials(Credentials::new(user, Password::Text(SECRET.to_owned())))
}

pub(super) fn read_prefix(prefix: String) -> Permission {
    Permission::read(prefix).with_prefix()
}

pub(super) fn write_prefix(prefix: String) -> Permission {
    Permission::new(PermissionType::Readwrite, prefix).with_prefix()
}

/// The rights of a balancer according to the guide.
pub(super) fn balancer() -> Vec<Permission> {
    vec![
        read_prefix("registry/".to_owned()),
        read_prefix("election/".to_owned()),
        read_prefix("override/".to_owned()),
    ]
}

/// The minimal rights of a worker.
pub(super) fn worker(group: &str, id: &str) -> Vec<Permission> {
    let own = format!("registry/{group}/{id}");
    vec![
        Permission::new(PermissionType::Readwrite, own),
        write_prefix(format!("election/{group}/")),
    ]
}

async fn error_of(options: EtcdOptions) -> ClusterError {
    let store = EtcdStore::new(options).unwrap();
    let any = Selector::Key("registry/any".to_owned());
    let error = store.list(&any, None).await.unwrap_err();
    println!("{error}");
    assert!(!format!("{error} {error:?}").contains(SECRET));
    error
}

fn assert_auth(error: &ClusterError, words: &[&str]) {
    assert!(matches!(error, ClusterError::Auth { .. }), "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
}

#[tokio::test]
async fn roles_that_allow_no_more_than_is_needed() {
    let guarded = Guarded::new(&[]).await;
    let group = group("roles");
    guarded.user("balancer", balancer()).await;
    let of_group = |prefix: &str| read_prefix(format!("{prefix}/{group}/"));
    let narrow = vec![of_group("registry"), of_group("election")];
    guarded.user("narrow", narrow).await;
    guarded.user("w1", worker(&group, "n1")).await;
    guarded.user("w2", worker(&group, "n2")).await;
    let mut mover = worker(&group, "n3");
    mover.push(write_prefix(format!("handover/{group}/")));
    guarded.user("w3", mover).await;

    let discovery = ready(&guarded.options("balancer"), &group).await;
    let narrow = ready(&guarded.options("narrow"), &group).await;
    let first = Running::start(&guarded.options("w1"), &group, "n1").await;
    within("the node leads", first.node.wait_for_leadership()).await;
    let second = Running::start(&guarded.options("w2"), &group, "n2").await;
    for discovery in [&discovery, &narrow] {
        within(
            "the discovery shows both nodes",
            discovery.wait_for_nodes(2),
        )
        .await;
        within("the discovery shows a leader", discovery.wait_for_leader()).await;
    }

    // An id that this user has no rights for.
    let thief = Running::new(
        builder(&guarded.options("w1"), &group, "n9")
            .try_build()
            .unwrap(),
    );
    eventually("the node with a foreign id is unhealthy", || {
        thief.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    let store = EtcdStore::new(guarded.options("w1")).unwrap();
    let lease = store.grant(Duration::from_secs(5)).await.unwrap();
    let key = format!("registry/{group}/n9");
    let put = Txn::new().put(key.clone(), b"{}".to_vec(), Some(lease.id));
    let error = store.txn(put).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, ClusterError::PermissionDenied { .. }));
    for word in [&*key, "txn", "user \"w1\"", "permission denied"] {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    // A balancer may not write.
    let store = EtcdStore::new(guarded.options("balancer")).unwrap();
    let key = format!("registry/{group}/n1");
    let put = Txn::new().put(key.clone(), b"{}".to_vec(), None);
    let error = store.txn(put).await.unwrap_err();
    assert!(error.to_string().contains(&key), "{error}");
    // A balancer of one group may not read another group.
    let store = EtcdStore::new(guarded.options("narrow")).unwrap();
    let all = Selector::Prefix("registry/".to_owned());
    let error = store.list(&all, None).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, ClusterError::PermissionDenied { .. }));
    assert!(error.to_string().contains("list of registry/"), "{error}");
    let watch = store.watch(vec![WatchRange { keys: all, from: 0 }]).await;
    let error = watch.err().unwrap();
    println!("{error}");
    assert!(matches!(error, ClusterError::PermissionDenied { .. }));
    assert!(error.to_string().contains("watch of registry/"), "{error}");

    let third = Running::start(&guarded.options("w3"), &group, "n3").await;
    first.stop().await;
    within("n2 leads next", second.node.wait_for_leadership()).await;
    second.stop().await;
    within("n3 leads last", third.node.wait_for_leadership()).await;
    third.stop().await;
    eventually("all nodes have left", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn each_refusal_of_a_user_has_its_own_error() {
    let guarded = Guarded::new(&[]).await;
    guarded.user("nobody", Vec::new()).await;
    let endpoint = guarded.etcd.endpoints().remove(0);

    let wrong = Credentials::new("nobody", Password::Text(format!("{SECRET}-not")));
    let error = error_of(guarded.etcd.options().credentials(wrong)).await;
    assert_auth(&error, &["wrong user or password", "\"nobody\"", &endpoint]);
    let error = error_of(guarded.options("stranger")).await;
    assert_auth(&error, &["wrong user or password", "\"stranger\""]);
    let error = error_of(guarded.etcd.options()).await;
    assert_auth(&error, &["wants a user"]);
    let error = error_of(guarded.options("nobody")).await;
    assert!(matches!(error, ClusterError::PermissionDenied { .. }));
    for word in ["user \"nobody\"", "list of registry/any"] {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    assert!(!error.is_transient());
}

#[tokio::test]
async fn a_wrong_password_heals_when_its_file_is_corrected() {
    let guarded = Guarded::new(&[]).await;
    let group = group("healing");
    guarded.user("balancer", balancer()).await;
    guarded.user("w1", worker(&group, "n1")).await;
    let files = Directory::new();
    let file = files.write("password", "wrong\n");
    let from_file = |user: &str| {
        let credentials = Credentials::new(user, Password::File(file.clone()));
        guarded.etcd.options().credentials(credentials)
    };
    let discovery = watch_group(&from_file("balancer"), &group);
    let node = builder(&from_file("w1"), &group, "n1").ttl(WATCHED_TTL);
    let node = Running::new(node.try_build().unwrap());
    throughout(
        "neither is accepted with the wrong password",
        Duration::from_secs(1),
        || !discovery.is_ready() && node.node.current_health() != HealthStatus::Healthy,
    )
    .await;
    files.write("password", &format!("{SECRET}\n"));
    within("the discovery is ready", discovery.wait_ready()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    node.wait_until_healthy().await;

    // The password changes while the node runs; etcd then discards all tokens of the user.
    let mut root = guarded.root.clone();
    root.user_change_password("w1", "another").await.unwrap();
    files.write("password", "another");
    throughout("the node stays registered", LONGER_THAN_WATCHED, || {
        discovery.nodes().len() == 1 && node.node.current_health() == HealthStatus::Healthy
    })
    .await;
    node.stop().await;
    eventually("the node can still write", || discovery.nodes().is_empty()).await;
}

/// Checks that a node, a discovery and watches keep working while their tokens are refused
/// repeatedly.
async fn works_despite_refused_tokens(
    guarded: &Guarded,
    time: Duration,
    mut disturb: impl AsyncFnMut(u32),
) {
    let group = group("tokens");
    guarded.user("balancer", balancer()).await;
    guarded.user("w1", worker(&group, "n1")).await;
    guarded.user("w2", worker(&group, "n2")).await;
    let link = Link::to(guarded.etcd.address()).await;
    let options = as_user(EtcdOptions::new([link.address().to_string()]), "balancer");
    let discovery = ready(&options, &group).await;
    let own = guarded.options("w1");
    let node = Running::start_with_ttl(&own, &group, "n1", WATCHED_TTL).await;
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let epoch = node.node.leadership().unwrap().epoch;
    let holds = || {
        discovery.nodes().get("n1").is_some()
            && discovery.status() == DiscoveryStatus::Live
            && node.node.is_leader()
            && node.node.current_health() == HealthStatus::Healthy
    };
    // A store, and a second watch on the same stream: what other users of a shared connection do.
    let store = EtcdStore::new(options.clone()).unwrap();
    let all = || WatchRange {
        keys: Selector::Prefix(format!("registry/{group}/")),
        from: 0,
    };
    let mut old = store.watch(vec![all()]).await.unwrap();
    let start = tokio::time::Instant::now();
    let mut round = 0;
    while start.elapsed() < time {
        round += 1;
        disturb(round).await;
        throughout(
            "the node and the discovery keep working",
            Duration::from_secs(3),
            holds,
        )
        .await;
        let late = Running::start(&guarded.options("w2"), &group, "n2").await;
        within("the node that joins is shown", discovery.wait_for_nodes(2)).await;
        // This call uses a token that is refused; the watch below then uses the stream that was
        // opened with it.
        store.list(&all().keys, None).await.unwrap();
        let opening = tokio::time::Instant::now();
        let mut new = within("a new watch", store.watch(vec![all()]))
            .await
            .unwrap();
        println!(
            "round {round}: a watch with a new token after {:?}",
            opening.elapsed()
        );
        late.stop().await;
        eventually("the node that leaves is not shown any more", || {
            discovery.nodes().len() == 1
        })
        .await;
        for watch in [&mut old, &mut new] {
            let events = within("an event arrives", watch.next()).await.unwrap();
            assert!(!events.is_empty());
        }
        assert!(holds());
    }
    throughout(
        "the node and the discovery keep working after the last refusal, too",
        LONGER_THAN_WATCHED,
        holds,
    )
    .await;
    assert_eq!(
        node.node.leadership().unwrap().epoch,
        epoch,
        "the term never ended"
    );
    assert_eq!(
        link.connections(),
        2,
        "the discovery and the store each kept their connection"
    );
    node.stop().await;
}

#[tokio::test]
async fn watches_and_renewals_outlive_tokens() {
    // etcd discards a token that was not used for a second.
    let guarded = Guarded::new(&["--auth-token-ttl=1"]).await;
    works_despite_refused_tokens(&guarded, Duration::from_secs(12), async |_| {}).await;
}

#[tokio::test]
async fn they_outlive_changes_of_users_and_roles() {
    // A signed token contains the revision of the user database, so each change of it invalidates
    // all tokens.
    let files = Directory::new();
    files.write("secret", "a secret of the server alone");
    let guarded = Guarded::with(Setup {
        arguments: vec![
            "--bcrypt-cost=4".to_owned(),
            "--auth-token=jwt,sign-method=HS256,priv-key={files}/secret,ttl=5s".to_owned(),
        ],
        files: Some(files.path().to_owned()),
        ..Setup::default()
    })
    .await;
    works_despite_refused_tokens(&guarded, Duration::from_secs(12), async |round| {
        // root's existing client does not recover from an invalidated token, so a new one is used.
        let options = ConnectOptions::default().with_user(ROOT.0, ROOT.1);
        let root = Client::connect(guarded.etcd.endpoints(), Some(options)).await;
        let mut root = root.unwrap();
        let name = format!("new-{round}");
        root.user_add(name, "password", None).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn many_refused_at_once_get_one_token() {
    let guarded = Guarded::new(&["--auth-token-ttl=1"]).await;
    guarded.user("balancer", balancer()).await;
    let store = EtcdStore::new(guarded.options("balancer")).unwrap();
    let any = Selector::Key("registry/any".to_owned());
    store.list(&any, None).await.unwrap();
    let counted = || async {
        let status = reqwest::get(format!("{}/metrics", guarded.etcd.endpoints()[0]));
        let text = status.await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| {
            line.starts_with("grpc_server_handled_total{")
                && line.contains("grpc_method=\"Authenticate\"")
                && line.contains("grpc_code=\"OK\"")
        });
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        count.unwrap_or(0.0)
    };
    let before = counted().await;
    for round in 1..=2 {
        // etcd looks for expired tokens once a second.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let calls: Vec<_> = (0..50)
            .map(|_| {
                let (store, any) = (store.clone(), any.clone());
                tokio::spawn(async move { store.list(&any, None).await.map(drop) })
            })
            .collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        let now = counted().await;
        assert_eq!(now - before, f64::from(round), "round {round}");
    }
    // A keeper that was created for an existing lease can renew it as well.
    let lease = store.grant(Duration::from_secs(10)).await.unwrap();
    let mut keeper = store.keeper(Lease {
        id: LeaseId(lease.id.0),
        ttl: lease.ttl,
    });
    keeper.renew(Duration::from_secs(2)).await.unwrap();
}

/// The log lines of one thread.
#[derive(Clone, Default)]
pub(super) struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// Captures what the current thread logs, until the guard is dropped.
    pub(super) fn start(filter: &str) -> (Self, tracing::subscriber::DefaultGuard) {
        let captured = Self::default();
        let writer = captured.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (captured, subscribe(subscriber))
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_password_is_shown_nowhere() {
    // The log is captured per thread; everything in this test runs on this one.
    let (captured, logging) = Captured::start("pingora_etcd=trace");
    let guarded = Guarded::new(&["--auth-token-ttl=1"]).await;
    let group = group("shown");
    guarded.user("balancer", balancer()).await;
    let options = guarded.options("balancer");
    let discovery = ready(&options, &group).await;
    let store = EtcdStore::new(options.clone()).unwrap();
    let any = Selector::Key("registry/any".to_owned());
    store.list(&any, None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    store.list(&any, None).await.unwrap();
    let wrong = Password::Text(format!("{SECRET}-wrong"));
    let wrong = guarded
        .etcd
        .options()
        .credentials(Credentials::new("balancer", wrong));
    let errors = [error_of(wrong).await, error_of(guarded.options("no")).await];
    let yaml = format!(
        "cluster: {{ group: g, etcd: {{ endpoints: ['h:1'], user: u, password: '{SECRET}' }} }}"
    );
    let config = ClusterConfig::from_yaml(&yaml, "file.yaml").unwrap();
    let node = builder(&options, &group, "n1").try_build().unwrap();
    drop(logging);

    let shown =
        format!("{options:?} {options:#?} {store:?} {errors:?} {config:?} {discovery:?} {node:?}");
    assert!(shown.contains("balancer"), "{shown}");
    assert!(!shown.contains(SECRET), "{shown}");
    let logged = captured.text();
    assert!(logged.contains("token refreshed"), "{logged}");
    assert!(logged.contains("wrong user or password"), "{logged}");
    assert!(!logged.contains(SECRET), "{logged}");
}

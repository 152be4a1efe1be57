//! Tests which rights each feature needs in a real etcd: every feature under every role of the
//! guide, rights that are granted later, authentication that is switched on and off, and
//! credential files that are missing for a while.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use etcd_client::{Permission, PermissionType};
use pingora_etcd::store::{EtcdStore, Selector, Store, WatchRange};
use pingora_etcd::{
    Change, Cluster, ClusterError, ClusterNodeBuilder, EtcdOptions, HealthStatus, MetricsCollector,
    NodeMetadata, Operator, ServiceDiscovery,
    discovery::{DiscoveryStatus, SnapshotFile},
    metadata_keys,
    store::{Credentials, Password},
};

use super::auth::{
    Captured, Guarded, ROOT, SECRET, as_user, balancer, read_prefix, worker, write_prefix,
};
use super::common::certificates::Directory;
use super::common::etcd::{Etcd, Setup, newest};
use super::common::{eventually, group, local, skipped, throughout, within};
use super::{
    LONGER_THAN_WATCHED, Running, WATCHED_TTL, builder, leader_id, ready, until_candidate,
    watch_group,
};

/// A TTL longer than any test: a key that disappears was removed and has not expired.
const LONG: i64 = 300;

/// A right on a key, written for the group `workers` and the id `w1`.
#[derive(Clone, Copy)]
struct Right {
    kind: &'static str,
    key: &'static str,
    is_prefix: bool,
}

const fn prefix(kind: &'static str, key: &'static str) -> Right {
    Right {
        kind,
        key,
        is_prefix: true,
    }
}

const READ: &str = "read";
const WRITE: &str = "readwrite";

const BALANCER: [Right; 3] = [
    prefix(READ, "registry/"),
    prefix(READ, "election/"),
    prefix(READ, "override/"),
];
/// Drains and weights, and then transfers and evictions, too.
const OPERATOR: [Right; 4] = [
    prefix(READ, "registry/"),
    prefix(READ, "election/"),
    prefix(WRITE, "override/"),
    prefix(WRITE, "handover/"),
];
const EVICTING: [Right; 2] = [prefix(WRITE, "registry/"), prefix(WRITE, "election/")];
const WORKER: [Right; 3] = [
    Right {
        kind: WRITE,
        key: "registry/workers/w1",
        is_prefix: false,
    },
    prefix(READ, "registry/workers/"),
    prefix(WRITE, "election/workers/"),
];
const HANDOVER: Right = prefix(WRITE, "handover/workers/");

impl Right {
    /// The permission for this group and id instead.
    fn permission(self, group: &str, id: &str) -> Permission {
        let key = self.key.replace("workers", group).replace("w1", id);
        let kind = match self.kind {
            READ => PermissionType::Read,
            _ => PermissionType::Readwrite,
        };
        let permission = Permission::new(kind, key);
        if self.is_prefix {
            permission.with_prefix()
        } else {
            permission
        }
    }

    fn command(self, role: &str) -> String {
        let Self { kind, key, .. } = self;
        let prefix = if self.is_prefix { "--prefix=true " } else { "" };
        format!("etcdctl role grant-permission {role} {prefix}{kind} {key}")
    }
}

/// The commands by which the guide creates the roles.
fn commands() -> String {
    let mut lines = Vec::new();
    for (role, rights) in [
        ("balancer", &BALANCER[..]),
        ("operator", &OPERATOR[..]),
        ("w1", &WORKER[..]),
    ] {
        lines.push(format!("etcdctl role add {role}"));
        lines.extend(rights.iter().map(|right| right.command(role)));
        if role == "operator" {
            let evicting = EVICTING.iter().map(|right| right.command(role));
            lines.extend(evicting.map(|command| format!("{command}    # optional: evict")));
        }
        if role == "w1" {
            lines.push(format!("{}    # optional", HANDOVER.command(role)));
        }
        lines.push(format!(
            "etcdctl user add {role}            # asks for the password"
        ));
        lines.push(format!("etcdctl user grant-role {role} {role}\n"));
    }
    lines.join("\n")
}

#[derive(Clone, Copy, PartialEq)]
enum Role {
    Balancer,
    Worker,
    Mover,
}

const ROLES: [Role; 3] = [Role::Balancer, Role::Worker, Role::Mover];

impl Role {
    fn title(self) -> &'static str {
        match self {
            Self::Balancer => "`balancer`",
            Self::Worker => "`w1` without `handover/`",
            Self::Mover => "`w1`",
        }
    }

    fn permissions(self, group: &str, id: &str) -> Vec<Permission> {
        let rights: &[Right] = match self {
            Self::Balancer => &BALANCER,
            Self::Worker | Self::Mover => &WORKER,
        };
        let optional = (self == Self::Mover).then_some(HANDOVER);
        let all = rights.iter().copied().chain(optional);
        all.map(|right| right.permission(group, id)).collect()
    }
}

/// One role, in a group that only one case of the test uses.
struct Setting<'a> {
    guarded: &'a Guarded,
    logged: &'a Captured,
    role: Role,
    group: String,
}

impl Setting<'_> {
    /// The options of a new user with this role, for a node with this id.
    async fn options(&self, id: &str) -> EtcdOptions {
        let user = format!("{}-{id}", self.group);
        let permissions = self.role.permissions(&self.group, id);
        self.guarded.user(&user, permissions).await;
        self.guarded.options(&user)
    }

    async fn node(&self, id: &str) -> Result<Running, ClusterError> {
        self.node_with(id, |builder| builder).await
    }

    async fn node_with(
        &self,
        id: &str,
        change: impl FnOnce(ClusterNodeBuilder) -> ClusterNodeBuilder,
    ) -> Result<Running, ClusterError> {
        let etcd = self.options(id).await;
        let builder = change(builder(&etcd, &self.group, id).ttl(LONG));
        joined(Running::new(builder.try_build().unwrap())).await
    }

    /// A discovery that may read everything.
    async fn seen(&self) -> ServiceDiscovery {
        ready(&as_root(&self.guarded.etcd), &self.group).await
    }
}

fn as_root(etcd: &Etcd) -> EtcdOptions {
    let password = Password::Text(ROOT.1.to_owned());
    etcd.options()
        .credentials(Credentials::new(ROOT.0, password))
}

/// The node once it is registered, or the error that it was refused with.
async fn joined(running: Running) -> Result<Running, ClusterError> {
    let mut health = running.node.watch_health();
    let is_known = |health: &HealthStatus| *health != HealthStatus::Unknown;
    let known = within("it joins or is refused", health.wait_for(is_known)).await;
    let known = *known.unwrap();
    match known {
        HealthStatus::Healthy => Ok(running),
        _ => Err(running.node.resign().await.unwrap_err()),
    }
}

/// Another figure each time.
#[derive(Default)]
struct Counting(AtomicU32);

impl MetricsCollector for Counting {
    fn collect(&self) -> NodeMetadata {
        let count = self.0.fetch_add(1, Ordering::Relaxed);
        serde_json::json!({ metadata_keys::QUEUE_DEPTH: count })
    }
}

struct Busy;

impl MetricsCollector for Busy {
    fn collect(&self) -> NodeMetadata {
        serde_json::json!({ metadata_keys::QUEUE_DEPTH: 7 })
    }
}

const WORKS: &str = "works";

type Outcome = Result<&'static str, ClusterError>;

async fn registers(setting: Setting<'_>) -> Outcome {
    let busy =
        |builder: ClusterNodeBuilder| builder.metrics_collector(Busy).metrics_update_interval(1);
    let node = setting.node_with("n1", busy).await?;
    let seen = setting.seen().await;
    within("the node leads", node.node.wait_for_leadership()).await;
    eventually("the discovery shows it as leader", || {
        leader_id(&seen).as_deref() == Some("n1")
    })
    .await;
    eventually("the discovery shows its metrics", || {
        let nodes = seen.nodes();
        let node = nodes.get("n1");
        node.and_then(|node| node.metric(metadata_keys::QUEUE_DEPTH)) == Some(7.0)
    })
    .await;
    Ok(WORKS)
}

async fn drains_and_leaves(setting: Setting<'_>) -> Outcome {
    let node = setting.node("n1").await?;
    let seen = setting.seen().await;
    within("the discovery shows the node", seen.wait_for_nodes(1)).await;
    node.node.drain().await?;
    eventually("the discovery shows it draining", || {
        seen.nodes().iter().all(|node| !node.is_serving())
    })
    .await;
    node.stop().await;
    eventually("the node is gone", || seen.nodes().is_empty()).await;
    Ok(WORKS)
}

async fn resigns(setting: Setting<'_>) -> Outcome {
    let first = setting.node("n1").await?;
    within("the node leads", first.node.wait_for_leadership()).await;
    let second = setting.node("n2").await?;
    first.node.resign().await?;
    within(
        "the next candidate leads",
        second.node.wait_for_leadership(),
    )
    .await;
    Ok(WORKS)
}

async fn transfers(setting: Setting<'_>, queued: &[&str]) -> Outcome {
    let first = setting.node("n1").await?;
    within("the node leads", first.node.wait_for_leadership()).await;
    let mut others = Vec::new();
    for id in queued {
        others.push(setting.node(id).await?);
    }
    let target = others.last().unwrap();
    let epoch = first.node.leadership().unwrap().epoch;
    if let Err(error) = first.node.transfer_to(target.node.id()).await {
        let leadership = first.node.leadership().unwrap();
        assert_eq!(
            leadership.epoch, epoch,
            "the refused transfer does not end the term"
        );
        return Err(error);
    }
    within("the target leads", target.node.wait_for_leadership()).await;
    Ok(WORKS)
}

async fn takes_over(setting: Setting<'_>) -> Outcome {
    let first = setting.node("n1").await?;
    within("the node leads", first.node.wait_for_leadership()).await;
    let high = |builder: ClusterNodeBuilder| {
        let soon = Duration::from_millis(200);
        builder.priority(7).takeover_after(soon)
    };
    let second = setting.node_with("n2", high).await?;
    let is_logged = || times_logged(setting.logged, &setting.group, "n2", "a right is missing") > 0;
    eventually("n2 leads, or logs why it does not", || {
        second.node.is_leader() || is_logged()
    })
    .await;
    if second.node.is_leader() {
        return Ok(WORKS);
    }
    throughout("n2 waits for its turn", Duration::from_secs(1), || {
        first.node.is_leader()
    })
    .await;
    assert_eq!(second.node.current_health(), HealthStatus::Healthy);
    first.stop().await;
    within(
        "n2 leads when its turn comes",
        second.node.wait_for_leadership(),
    )
    .await;
    Ok("waits for its turn")
}

async fn shares_a_lease(setting: Setting<'_>) -> Outcome {
    let etcd = setting.options("n1").await;
    let other = format!("{}-other", setting.group);
    let user = format!("{}-n1", setting.group);
    let mut root = setting.guarded.root.clone();
    for permission in setting.role.permissions(&other, "n1") {
        root.role_grant_permission(&user, permission).await.unwrap();
    }
    let cluster = Cluster::builder(etcd).ttl(LONG).try_build().unwrap();
    let node = |group: &str| cluster.node("n1", local(), group).try_build().unwrap();
    let stays = joined(Running::new(node(&setting.group))).await?;
    let goes = joined(Running::new(node(&other))).await?;
    let seen = setting.seen().await;
    let seen_other = ready(&as_root(&setting.guarded.etcd), &other).await;
    within("the discovery shows the node", seen.wait_for_nodes(1)).await;
    within(
        "the other group shows the node",
        seen_other.wait_for_nodes(1),
    )
    .await;
    goes.stop().await;
    eventually("the node has left the other group", || {
        seen_other.nodes().is_empty()
    })
    .await;
    assert_eq!(stays.node.current_health(), HealthStatus::Healthy);
    assert_eq!(seen.nodes().len(), 1);
    Ok(WORKS)
}

/// The discovery once it is ready, or the error that it was refused with.
async fn watches(etcd: &EtcdOptions, group: &str) -> Result<ServiceDiscovery, ClusterError> {
    let store = EtcdStore::new(etcd.clone())?;
    for prefix in ["registry", "election"] {
        let all = Selector::Prefix(format!("{prefix}/{group}/"));
        store.list(&all, None).await?;
    }
    Ok(ready(etcd, group).await)
}

async fn discovers(setting: Setting<'_>) -> Outcome {
    let discovery = watches(&setting.options("n1").await, &setting.group).await?;
    let mut changes = discovery.changes();
    let root = as_root(&setting.guarded.etcd);
    let node = Running::start(&root, &setting.group, "other").await;
    within("the discovery reports the new node", async {
        while !matches!(changes.next().await, Change::Joined(node) if node.id == "other") {}
    })
    .await;
    let leadership = within("the node leads", node.node.wait_for_leadership()).await;
    eventually("the discovery shows it as leader", || {
        discovery
            .leadership()
            .is_some_and(|seen| seen.epoch == leadership.epoch)
    })
    .await;
    Ok(WORKS)
}

async fn keeps_a_snapshot(setting: Setting<'_>) -> Outcome {
    let etcd = setting.options("n1").await;
    watches(&etcd, &setting.group).await?;
    let _node = Running::start(&as_root(&setting.guarded.etcd), &setting.group, "other").await;
    let files = Directory::new();
    let with_file = |etcd: EtcdOptions| {
        ServiceDiscovery::builder(etcd, &setting.group)
            .snapshot_file(SnapshotFile::new(files.file("nodes")))
            .try_build()
            .unwrap()
    };
    write_snapshot(&with_file(etcd)).await;
    let nowhere = EtcdOptions::new(["http://127.0.0.1:9"]);
    read_snapshot(&with_file(nowhere)).await;
    Ok(WORKS)
}

/// Runs the discovery until it has written a snapshot with one node.
async fn write_snapshot(discovery: &ServiceDiscovery) {
    let seen = async {
        within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    };
    discovery.run_until(seen).await.unwrap();
}

async fn read_snapshot(discovery: &ServiceDiscovery) {
    let from_disk = async {
        eventually("the snapshot is read", || {
            matches!(discovery.status(), DiscoveryStatus::FromDisk { .. })
        })
        .await;
    };
    discovery.run_until(from_disk).await.unwrap();
    assert_eq!(discovery.nodes().len(), 1);
}

async fn falls_back(setting: Setting<'_>) -> Outcome {
    let etcd = setting.options("n1").await.serializable_fallback(true);
    ServiceDiscovery::builder(etcd, &setting.group).try_build()?;
    Ok(WORKS)
}

const FEATURES: [&str; 10] = [
    "register, be elected, publish metrics",
    "drain, leave",
    "`resign`",
    "`transfer_to` the next in the queue",
    "`transfer_to` past others",
    "a higher `priority` takes over",
    "nodes of two groups in a `Cluster`, one of which leaves",
    "discovery: nodes, changes, the leader (for `LeaderRoute`, too)",
    "snapshot file",
    "`serializable_fallback`",
];

async fn outcome(feature: usize, setting: Setting<'_>) -> Outcome {
    match feature {
        0 => registers(setting).await,
        1 => drains_and_leaves(setting).await,
        2 => resigns(setting).await,
        3 => transfers(setting, &["n2"]).await,
        4 => transfers(setting, &["n2", "n3"]).await,
        5 => takes_over(setting).await,
        6 => shares_a_lease(setting).await,
        7 => discovers(setting).await,
        8 => keeps_a_snapshot(setting).await,
        _ => falls_back(setting).await,
    }
}

fn cell(outcome: Outcome) -> String {
    match outcome {
        Ok(text) => text.to_owned(),
        Err(ClusterError::PermissionDenied { .. }) => "refused: permission denied".to_owned(),
        Err(ClusterError::InvalidConfig { .. }) => "no, with a password".to_owned(),
        Err(other) => panic!("{other}"),
    }
}

/// How many times a node has logged this.
fn times_logged(logged: &Captured, group: &str, node: &str, what: &str) -> usize {
    let (group, node) = (format!("group={group} "), format!("node={node}}}"));
    let text = logged.text();
    let lines = text.lines();
    let matching =
        lines.filter(|line| line.contains(what) && line.contains(&group) && line.contains(&node));
    matching.count()
}

/// The guide must contain the commands and the table that this test prints.
#[tokio::test]
async fn every_feature_under_every_role_is_as_the_readme_says() {
    // The log is captured per thread; everything in this test runs on this one.
    let (logged, _logging) = Captured::start("pingora_etcd=info");
    let guarded = Guarded::new(&[]).await;
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let titles = ROLES.iter().map(|role| role.title().to_owned());
    let titles: Vec<_> = std::iter::once(String::new()).chain(titles).collect();
    let mut table = vec![line(&titles), "|---|---|---|---|".to_owned()];
    for (index, feature) in FEATURES.iter().enumerate() {
        let mut cells = vec![(*feature).to_owned()];
        for (number, role) in ROLES.into_iter().enumerate() {
            let setting = Setting {
                guarded: &guarded,
                logged: &logged,
                role,
                group: group(&format!("rights-{index}-{number}")),
            };
            cells.push(cell(outcome(index, setting).await));
        }
        table.push(line(&cells));
    }
    let (commands, table) = (commands(), table.join("\n"));
    println!("{commands}\n{table}");
    let chapter = include_str!("../../src/guide/security.md");
    for part in [commands, table] {
        assert!(
            chapter.contains(&part),
            "not in src/guide/security.md:\n{part}"
        );
    }
}

/// The rights of the role `operator` in the guide, on nodes that have no more than theirs.
#[tokio::test]
async fn operators_need_the_rights_of_the_guide_and_take_none_from_nodes() {
    operators_act(&Guarded::new(&[]).await).await;
}

/// Since 3.5.30 and 3.6.11, etcd asks for the right to write all keys of a lease under which a transaction writes.
#[tokio::test]
async fn operators_need_no_more_rights_in_an_etcd_that_checks_leases() {
    let Some(binary) = newest() else {
        skipped("ETCD_NEWEST names no etcd of 3.5.30 or newer");
        return;
    };
    operators_act(&Guarded::of(Some(binary), &[]).await).await;
}

async fn operators_act(guarded: &Guarded) {
    let group = group("operated");
    let rights = |rights: &[Right]| {
        let permissions = rights.iter().map(|right| right.permission(&group, "w1"));
        permissions.collect::<Vec<_>>()
    };
    guarded.user("balancer", rights(&BALANCER)).await;
    guarded.user("operator", rights(&OPERATOR)).await;
    let mut evicting = rights(&OPERATOR[2..]);
    evicting.extend(rights(&EVICTING));
    guarded.user("evicting", evicting).await;
    for id in ["n1", "n2"] {
        let worker = [&WORKER[..], &[HANDOVER]].concat();
        let worker = worker.iter().map(|right| right.permission(&group, id));
        guarded.user(id, worker.collect()).await;
    }
    let start = async |id: &str| {
        let busy = builder(&guarded.options(id), &group, id).ttl(LONG);
        let busy = busy.metrics_collector(Counting::default());
        let running = Running::new(busy.metrics_update_interval(1).try_build().unwrap());
        joined(running).await.unwrap()
    };
    let first = start("n1").await;
    let leadership = within("the node leads", first.node.wait_for_leadership()).await;
    let second = start("n2").await;

    let discovery = ready(&guarded.options("balancer"), &group).await;
    let cluster = Cluster::connect(guarded.options("balancer")).unwrap();
    let seen_by_balancer = Operator::new(&cluster, &group).unwrap();
    let said = async |id: &str| {
        let all = seen_by_balancer.overrides().await.unwrap();
        let nodes = discovery.nodes();
        let said = *all.get(id)?;
        said.is_for(nodes.get(id)?).then_some(said)
    };
    let cluster = Cluster::connect(guarded.options("operator")).unwrap();
    let operator = Operator::new(&cluster, &group).unwrap();
    operator.drain("n1").await.unwrap();
    assert!(said("n1").await.unwrap().is_draining());
    operator.set_weight("n2", Some(3.0)).await.unwrap();
    assert_eq!(said("n2").await.unwrap().weight, Some(3.0));
    // The nodes go on writing under their leases.
    for id in ["n1", "n2"] {
        let metric = || {
            let nodes = discovery.nodes();
            let node = nodes.get(id);
            node.and_then(|node| node.metric(metadata_keys::QUEUE_DEPTH))
        };
        let before = metric();
        eventually("it publishes", || {
            metric() > before.map(|count| count + 1.0).or(Some(1.0))
        })
        .await;
    }
    assert_eq!(
        first.node.leadership(),
        Some(leadership),
        "nor is a term lost"
    );
    operator
        .transfer("n2", Duration::from_secs(10))
        .await
        .unwrap();
    within("it is transferred", second.node.wait_for_leadership()).await;
    let error = operator.evict("n1", false).await.unwrap_err();
    assert!(
        matches!(error, ClusterError::PermissionDenied { .. }),
        "{error}"
    );
    // Of two that say something of one node at the same time, both are heard.
    let (weighed, drained) =
        tokio::join!(operator.set_weight("n1", Some(2.0)), operator.drain("n1"));
    weighed.and(drained).unwrap();
    let both = said("n1").await.unwrap();
    assert!(both.is_draining() && both.weight == Some(2.0), "{both:?}");
    operator.set_weight("n1", None).await.unwrap();
    operator.undrain("n1").await.unwrap();
    assert_eq!(said("n1").await, None);

    // A drained node that ends is gone at once, not with its lease.
    operator.drain("n2").await.unwrap();
    second.stop().await;
    eventually("it is gone", || discovery.nodes().get("n2").is_none()).await;
    let others = Cluster::connect(guarded.options("evicting")).unwrap();
    let others = Operator::new(&others, &group).unwrap();
    within("n1 leads", first.node.wait_for_leadership()).await;
    others.evict("n1", true).await.unwrap();
}

#[tokio::test]
async fn a_right_that_is_missing_is_named_once_and_one_that_is_granted_later_takes_effect() {
    let (logged, _logging) = Captured::start("pingora_etcd=debug");
    let guarded = Guarded::new(&[]).await;
    let group = group("later");
    let ids = ["n1", "n2", "n3"];
    for id in ids {
        guarded.user(id, worker(&group, id)).await;
    }
    let grant = async |permission: Permission| {
        let mut root = guarded.root.clone();
        for id in ids {
            let granted = root.role_grant_permission(id, permission.clone());
            granted.await.unwrap();
        }
    };
    let start = async |id: &str, priority: u16| {
        let node = builder(&guarded.options(id), &group, id)
            .ttl(LONG)
            .priority(priority)
            .takeover_after(Duration::from_millis(200));
        joined(Running::new(node.try_build().unwrap()))
            .await
            .unwrap()
    };
    let first = start("n1", 0).await;
    let leadership = within("the node leads", first.node.wait_for_leadership()).await;
    let _second = start("n2", 0).await;
    let third = start("n3", 7).await;
    let times_logged = |what: &str| times_logged(&logged, &group, "n3", what);

    let transfer = async || {
        let error = first.node.transfer_to("n3").await.unwrap_err();
        println!("{error}");
        assert!(matches!(error, ClusterError::PermissionDenied { .. }));
        error.to_string()
    };
    let error = transfer().await;
    let key = format!("list of registry/{group}/n");
    assert!(error.contains(&key), "{error}");

    let missing = |right: &str| format!("missing=\"{right}/{group}/\"");
    let (requests, nodes) = (missing("read handover"), missing("read registry"));
    eventually("the missing right is logged", || {
        times_logged(&requests) == 1
    })
    .await;
    throughout("n3 waits for its turn", Duration::from_secs(1), || {
        first.node.is_leader()
    })
    .await;
    grant(write_prefix(format!("handover/{group}/"))).await;
    eventually("the granted right is noticed", || {
        times_logged("has been granted") == 1
    })
    .await;
    eventually("the next missing right is logged", || {
        times_logged(&nodes) == 1
    })
    .await;
    // The candidate compares priorities five times a second, so it had many occasions.
    throughout(
        "n3 still waits for its turn",
        Duration::from_secs(2),
        || first.node.is_leader(),
    )
    .await;
    transfer().await;
    // Each is logged once, and never as an error, after which it would wait without watching.
    assert_eq!((times_logged(&requests), times_logged(&nodes)), (1, 1));
    assert_eq!(times_logged("cannot read or write"), 0);
    assert_eq!(first.node.leadership(), Some(leadership));
    grant(read_prefix(format!("registry/{group}/"))).await;
    within("n3 takes over", third.node.wait_for_leadership()).await;
    until_candidate(&mut guarded.root.clone(), &group, "n1").await;
    third.node.transfer_to("n1").await.unwrap();
    within(
        "n3 transfers leadership to n1",
        first.node.wait_for_leadership(),
    )
    .await;
}

#[tokio::test]
async fn authentication_is_switched_on_and_off_under_those_who_run() {
    let (logged, _logging) = Captured::start("pingora_etcd=info");
    let mut guarded = Guarded::open(Setup {
        arguments: vec!["--bcrypt-cost=4".to_owned()],
        ..Setup::default()
    })
    .await;
    let group = group("switched");
    guarded.user("balancer", balancer()).await;
    for id in ["n1", "n2"] {
        guarded.user(id, worker(&group, id)).await;
    }
    let etcd = guarded.etcd.options();
    let discovery = ready(&as_user(etcd.clone(), "balancer"), &group).await;
    let own = as_user(etcd.clone(), "n1");
    let node = Running::start_with_ttl(&own, &group, "n1", WATCHED_TTL).await;
    let leadership = within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let without = "authentication is not enabled there: going on without the user";
    let times_logged = |what: &str| {
        logged
            .text()
            .lines()
            .filter(|line| line.contains(what))
            .count()
    };
    assert_eq!(
        times_logged(without),
        2,
        "once by the node, once by the discovery"
    );

    let holds = || {
        discovery.nodes().get("n1").is_some()
            && discovery.status() == DiscoveryStatus::Live
            && node.node.current_health() == HealthStatus::Healthy
            && node.node.leadership().as_ref() == Some(&leadership)
    };
    let joins_and_leaves = async || {
        let late = Running::start(&as_user(etcd.clone(), "n2"), &group, "n2").await;
        within("the node that joins is shown", discovery.wait_for_nodes(2)).await;
        late.stop().await;
        eventually("the node that leaves is not shown any more", || {
            discovery.nodes().len() == 1
        })
        .await;
    };
    joins_and_leaves().await;
    // A store whose connection is in use, and a watch stream that is opened before etcd refuses any
    // token.
    let store = EtcdStore::new(as_user(etcd.clone(), "balancer")).unwrap();
    let all = || WatchRange {
        keys: Selector::Prefix(format!("registry/{group}/")),
        from: 0,
    };
    let mut old = store.watch(vec![all()]).await.unwrap();

    guarded.enable().await;
    let mut new = store.watch(vec![all()]).await.unwrap();
    store.list(&all().keys, None).await.unwrap();
    throughout(
        "authentication enabled: no node is lost",
        LONGER_THAN_WATCHED,
        holds,
    )
    .await;
    joins_and_leaves().await;
    for watch in [&mut old, &mut new] {
        let events = within("an event arrives", watch.next()).await.unwrap();
        assert!(!events.is_empty());
    }
    let nobody = watch_group(&etcd, &group);
    throughout(
        "a discovery without a user is refused",
        Duration::from_secs(1),
        || !nobody.is_ready() && holds(),
    )
    .await;

    guarded.root.auth_disable().await.unwrap();
    within("the refused discovery becomes ready", nobody.wait_ready()).await;
    throughout(
        "authentication disabled: no node is lost",
        LONGER_THAN_WATCHED,
        holds,
    )
    .await;
    joins_and_leaves().await;

    guarded.etcd.stop();
    guarded.etcd.start();
    let is_here = || discovery.nodes().get("n1").is_some();
    // Longer than two TTLs.
    throughout(
        "etcd restarted: no node is lost",
        2 * LONGER_THAN_WATCHED,
        is_here,
    )
    .await;
    let is_well = || {
        is_here()
            && discovery.status() == DiscoveryStatus::Live
            && node.node.current_health() == HealthStatus::Healthy
            && node.node.is_leader()
    };
    eventually("all is well", is_well).await;
    joins_and_leaves().await;

    guarded.root = guarded.etcd.raw_client().await;
    guarded.enable().await;
    throughout("authentication enabled again", LONGER_THAN_WATCHED, is_well).await;
    joins_and_leaves().await;
    node.node.resign().await.unwrap();
    within("the node can write again", node.node.wait_for_leadership()).await;
    // A session that ran all the time logged it once, or a second time if etcd had asked for its
    // user in between. The other sessions are new each time.
    let by = |user: &str| {
        let user = format!("user=\"{user}\"");
        let text = logged.text();
        let lines = text.lines();
        let matching = lines.filter(|line| line.contains(without) && line.contains(&user));
        matching.count()
    };
    assert!((1..=2).contains(&by("n1")), "{}", by("n1"));
    // Both the discovery and the store use this user.
    assert!((2..=4).contains(&by("balancer")), "{}", by("balancer"));
    assert!(!logged.text().contains(SECRET));
    node.stop().await;
    eventually("the node can leave", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn a_file_that_is_missing_for_a_while_ends_nobody() {
    let guarded = Guarded::new(&[]).await;
    let group = group("missing");
    guarded.user("balancer", balancer()).await;
    guarded.user("n1", worker(&group, "n1")).await;
    let files = Directory::new();
    let file = files.write("password", SECRET);
    let from_file = |user: &str| {
        let credentials = Credentials::new(user, Password::File(file.clone()));
        guarded.etcd.options().credentials(credentials)
    };
    // The file exists at the start, but not when the password is needed.
    let discovery = ServiceDiscovery::builder(from_file("balancer"), &group)
        .try_build()
        .unwrap();
    // The newest etcd renews no lease without a token, so the gap must be shorter than the lease.
    let node = builder(&from_file("n1"), &group, "n1").ttl(LONG);
    let node = node.try_build().unwrap();
    let cluster = Cluster::connect(from_file("balancer")).unwrap();
    let shared = cluster.discovery(&group).try_build().unwrap();
    std::fs::remove_file(&file).unwrap();
    let error = builder(&from_file("n1"), &group, "n1").try_build();
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("password_file"),
        "a missing file must be an error at the start: {error}"
    );

    let follow = |discovery: &ServiceDiscovery| {
        let running = discovery.clone();
        tokio::spawn(async move { running.run(None).await })
    };
    let (following, also) = (follow(&discovery), follow(&shared));
    let running = Running::new(node);
    let run = || !(following.is_finished() || also.is_finished() || running.task.is_finished());
    throughout("all of them keep waiting", Duration::from_secs(2), || {
        run() && !discovery.is_ready() && running.node.current_health() != HealthStatus::Healthy
    })
    .await;
    let error = running.node.resign().await.unwrap_err();
    println!("{error}");
    files.write("password", SECRET);
    within("the discovery is ready", discovery.wait_ready()).await;
    within("the shared discovery is ready", shared.wait_ready()).await;
    running.wait_until_healthy().await;
    within("the node leads", running.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;

    // The file is removed while they run, and their tokens become invalid, because etcd discards a
    // user's tokens with each change of its roles. The password is still the same.
    std::fs::remove_file(&file).unwrap();
    let mut root = guarded.root.clone();
    root.role_add("more").await.unwrap();
    root.user_grant_role("n1", "more").await.unwrap();
    running.node.resign().await.unwrap();
    within("the node leads again", running.node.wait_for_leadership()).await;

    // The password changes, and its new file appears only later.
    for user in ["balancer", "n1"] {
        root.user_change_password(user, "another").await.unwrap();
    }
    throughout("they keep running", Duration::from_secs(5), || {
        run() && discovery.nodes().len() == 1 && running.node.is_leader()
    })
    .await;
    files.write("password", "another");
    let store = EtcdStore::new(from_file("balancer")).unwrap();
    let any = Selector::Prefix(format!("registry/{group}/"));
    assert_eq!(store.list(&any, None).await.unwrap().entries.len(), 1);
    within("the node can write again", async {
        while running.node.resign().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    // One that is without a watch would find everything gone afterwards, and keep the node for a while.
    eventually("both discoveries are live", || {
        [&discovery, &shared]
            .iter()
            .all(|discovery| discovery.status() == DiscoveryStatus::Live)
    })
    .await;
    running.stop().await;
    let left = root.get(format!("registry/{group}/n1"), None).await;
    assert_eq!(left.unwrap().count(), 0, "the node has removed its entry");
    eventually("the node can leave", || discovery.nodes().is_empty()).await;
    assert!(!following.is_finished() && !also.is_finished());
}

#[tokio::test]
async fn a_key_prefix_without_a_slash_is_given_one_on_both_sides() {
    let etcd = Etcd::shared();
    let group = group("slash");
    for prefix in ["prod", "/prod"] {
        let with = |prefix: &str| etcd.options().key_prefix(prefix);
        let node = Running::start(&with(prefix), &group, "n1").await;
        let key = format!("{prefix}/registry/{group}/n1");
        let got = etcd.raw_client().await.get(key, None).await.unwrap();
        assert_eq!(got.kvs().len(), 1, "{prefix}");
        let with_slash = format!("{prefix}/");
        for same in [prefix, &with_slash] {
            let discovery = ready(&with(same), &group).await;
            within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
            within("the node leads", discovery.wait_for_leader()).await;
        }
        let files = Directory::new();
        let with_file = |etcd: EtcdOptions| {
            ServiceDiscovery::builder(etcd, &group)
                .snapshot_file(SnapshotFile::new(files.file("nodes")))
                .try_build()
                .unwrap()
        };
        write_snapshot(&with_file(with(prefix))).await;
        let nowhere = EtcdOptions::new(["http://127.0.0.1:9"]);
        read_snapshot(&with_file(nowhere.key_prefix(with_slash))).await;
        node.stop().await;
    }
    for wrong in [" ", "prod//"] {
        let options = etcd.options().key_prefix(wrong);
        let node = builder(&options, &group, "n1").try_build().unwrap_err();
        let discovery = ServiceDiscovery::builder(options.clone(), &group).try_build();
        let cluster = Cluster::connect(options).unwrap_err();
        for error in [node, discovery.unwrap_err(), cluster] {
            assert!(error.to_string().contains("key_prefix"), "{error}");
        }
    }
}

#[test]
fn a_password_in_an_endpoint_is_refused_and_shown_nowhere() {
    for endpoint in [
        "http://root:MARKER-1@127.0.0.1:1",
        "root:p@MARKER-1@127.0.0.1",
    ] {
        let endpoints = vec![endpoint.to_owned()];
        let ip = local();
        let built = ClusterNodeBuilder::new(endpoints.clone(), "n", ip, "g").build();
        let builder = ServiceDiscovery::builder(endpoints.clone(), "g");
        let cluster = Cluster::builder(endpoints.clone());
        let mut shown = format!("{built:?} {builder:?} {cluster:?}");
        let errors = [
            ClusterNodeBuilder::new(endpoints.clone(), "n", ip, "g")
                .try_build()
                .unwrap_err(),
            builder.try_build().unwrap_err(),
            cluster.try_build().unwrap_err(),
            EtcdStore::new(endpoints.into()).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, ClusterError::InvalidEndpoint { .. }));
            shown.push_str(&format!("{error} {error:?}"));
        }
        assert!(shown.contains("...@127.0.0.1"), "{shown}");
        assert!(!shown.contains("MARKER"), "{shown}");
    }
}

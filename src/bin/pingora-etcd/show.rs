//! `nodes`, `leader` and `watch`: what is in a group.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;
use pingora_etcd::discovery::DiscoveryStatus;
use pingora_etcd::{
    Change, ClusterError, Leadership, Node, NodeOverride, Nodes, Operator, ServiceDiscovery,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::connection::Connection;
use crate::table::table;
use crate::{Failure, Result, log, output};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON: an array for `nodes`, an object for `leader`, an object a line for `watch`.
    #[arg(long)]
    json: bool,
    /// How long to wait for etcd, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// Runs `show` while the group is followed, once there is a view of it.
fn with_group<T>(
    arguments: &Arguments,
    show: impl AsyncFnOnce(&ServiceDiscovery, &Operator) -> Result<T>,
) -> Result<T> {
    let target = arguments.connection.target()?;
    let runtime = Runtime::new()?;
    let shown = runtime.block_on(async {
        let cluster = target.cluster()?;
        let discovery = target.discovery(&cluster)?;
        // Only what is read of it is used here: in a group of others there is nothing.
        let operator = Operator::new(&cluster, &target.group)?;
        let within = Duration::from_secs(arguments.timeout);
        let following = discovery.run_until(std::future::pending());
        let shown = async {
            match tokio::time::timeout(within, discovery.until_ready()).await {
                Ok(ready) => ready?,
                Err(_) => {
                    let reason = format!("no answer from etcd within {within:?}");
                    return Err(Failure::Error(reason.into()));
                }
            }
            show(&discovery, &operator).await
        };
        tokio::select! {
            ended = following => Err(match ended {
                Ok(()) => "the group is not followed any more".into(),
                Err(error) => error.into(),
            }),
            shown = shown => shown,
        }
    });
    // A DNS server that does not answer does not keep the command.
    runtime.shutdown_background();
    shown
}

pub fn nodes(arguments: &Arguments) -> Result {
    with_group(arguments, async |discovery, operator| {
        let (nodes, leadership) = (discovery.nodes(), discovery.leadership());
        let overrides = match operator.overrides().await {
            Ok(overrides) => overrides,
            Err(error @ ClusterError::PermissionDenied { .. }) => {
                log::print_error(format_args!(
                    "what operators say of nodes is not shown: {error}"
                ));
                HashMap::new()
            }
            Err(error) => return Err(error.into()),
        };
        let members: Vec<_> = sorted(&nodes)
            .into_iter()
            .map(|node| Member::of(node, &nodes, leadership.as_ref(), &overrides))
            .collect();
        output::line(match arguments.json {
            true => format!(
                "{:#}",
                Value::from_iter(members.iter().map(Member::as_json))
            ),
            false => as_table(&members),
        })?;
        if nodes.is_empty() {
            let group = discovery.group_name();
            log::print_error(format_args!("the group {group} has no nodes"));
        }
        let rejected = discovery.rejected_entries().total();
        if rejected > 0 {
            log::print_error(format_args!("{rejected} entries were refused, see above"));
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn sorted(nodes: &Nodes) -> Vec<&Node> {
    let mut sorted: Vec<_> = nodes.iter().map(AsRef::as_ref).collect();
    sorted.sort_by(|one, other| one.id.cmp(&other.id));
    sorted
}

/// A node, as it is shown.
struct Member<'a> {
    node: &'a Node,
    /// The state in one word.
    state: &'static str,
    is_leader: bool,
    /// What an operator says of it.
    said: Option<&'a NodeOverride>,
}

impl<'a> Member<'a> {
    fn of(
        node: &'a Node,
        nodes: &Nodes,
        leadership: Option<&Leadership>,
        overrides: &'a HashMap<String, NodeOverride>,
    ) -> Self {
        let said = overrides.get(&node.id).filter(|said| said.is_for(node));
        let state = match () {
            () if nodes.is_suspect(&node.id) => "suspect",
            () if node.is_leaving() => "leaving",
            () if !node.is_serving() || said.is_some_and(NodeOverride::is_draining) => "draining",
            () => "serving",
        };
        Self {
            node,
            state,
            is_leader: leadership.is_some_and(|leadership| leadership.node.id == node.id),
            said,
        }
    }

    fn as_json(&self) -> Value {
        let mut value = json!(self.node);
        if let Some(fields) = value.as_object_mut() {
            let lease = self.node.lease().map(|lease| lease.to_string());
            let also = [
                ("state", json!(self.state)),
                ("leader", json!(self.is_leader)),
                ("lease", json!(lease)),
                ("override", json!(self.said)),
            ];
            fields.extend(also.map(|(name, value)| (name.to_owned(), value)));
        }
        value
    }

    fn row(&self) -> [String; 11] {
        let node = self.node;
        let metric = |key| {
            node.metric(key)
                .map_or(String::new(), |value| format!("{value:.1}"))
        };
        [
            node.id.clone(),
            match node.port {
                Some(_) => node.addr(0).to_string(),
                None => node.ip.to_string(),
            },
            self.state.to_owned(),
            if self.is_leader { "yes" } else { "" }.to_owned(),
            node.zone.clone().unwrap_or_default(),
            node.weight
                .map_or(String::new(), |weight| weight.to_string()),
            metric("cpu_usage_percent"),
            metric("memory_usage_percent"),
            metric("queue_depth"),
            age(node),
            self.said.map_or(String::new(), said_in_words),
        ]
    }
}

fn said_in_words(said: &NodeOverride) -> String {
    let drain = said.is_draining().then(|| "drain".to_owned());
    let weight = said.weight.map(|weight| format!("weight {weight}"));
    let words: Vec<_> = drain.into_iter().chain(weight).collect();
    words.join(", ")
}

fn as_table(members: &[Member<'_>]) -> String {
    let rows: Vec<_> = members.iter().map(Member::row).collect();
    let names = [
        "ID", "ADDRESS", "STATE", "LEADER", "ZONE", "WEIGHT", "CPU", "MEMORY", "QUEUE", "WRITTEN",
        "OPERATOR",
    ];
    table(names, &rows)
}

/// How long ago a node has written its entry, by two clocks.
fn age(node: &Node) -> String {
    if node.last_seen <= 0 {
        // Other registries do not say it.
        return "-".to_owned();
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let written = Duration::from_millis(node.last_seen.try_into().unwrap_or(0));
    match now.saturating_sub(written).as_secs() {
        seconds @ 0..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7_199 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3_600),
    }
}

pub fn leader(arguments: &Arguments) -> Result {
    with_group(arguments, async |discovery, _| {
        let Some(Leadership { node, epoch, .. }) = discovery.leadership() else {
            let group = discovery.group_name();
            return Err(Failure::NotFound(format!(
                "the group {group} has no leader"
            )));
        };
        output::line(match arguments.json {
            true => format!("{:#}", json!({ "node": *node, "epoch": epoch })),
            false => {
                let address = node.addr(0);
                format!("{} at {address}, fencing token {epoch}", node.id)
            }
        })?;
        Ok(ExitCode::SUCCESS)
    })
}

pub fn watch(arguments: &Arguments) -> Result {
    with_group(arguments, async |discovery, _| {
        let mut changes = discovery.changes();
        let mut status = discovery.watch_status();
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            let happened = tokio::select! {
                change = changes.next() => happened(&change),
                Ok(()) = status.changed() => {
                    vec![Happened::of_view(*status.borrow_and_update())]
                }
                _ = &mut interrupt => return Ok(ExitCode::SUCCESS),
            };
            for event in happened {
                output::line(match arguments.json {
                    true => event.as_json().to_string(),
                    false => event.as_text(),
                })?;
            }
        }
    })
}

/// A line of `watch`.
struct Happened {
    /// One of a few words, for programs: see the guide.
    what: &'static str,
    nodes: Option<usize>,
    node: Option<Value>,
    text: String,
    epoch: Option<i64>,
}

impl Happened {
    fn of_view(status: DiscoveryStatus) -> Self {
        let what = match status {
            DiscoveryStatus::Live => "live",
            DiscoveryStatus::Stale { .. } => "stale",
            DiscoveryStatus::FromDisk { .. } => "from_disk",
            DiscoveryStatus::Ended { .. } => "ended",
            _ => "connecting",
        };
        Self {
            text: match what {
                // How long ago that was.
                "stale" | "from_disk" | "ended" => status.to_string(),
                _ => String::new(),
            },
            ..Self::plain(what)
        }
    }

    fn plain(what: &'static str) -> Self {
        Self {
            what,
            nodes: None,
            node: None,
            text: String::new(),
            epoch: None,
        }
    }

    fn to(what: &'static str, node: &Node) -> Self {
        let mut text = format!("{} at {}", node.id, node.addr(0));
        if !node.is_serving() {
            text.push_str(", draining");
        }
        if !node.metadata.is_null() {
            text.push_str(&format!(" {}", node.metadata.as_json()));
        }
        Self {
            node: Some(json!(node)),
            text,
            ..Self::plain(what)
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "time": now(),
            "event": self.what,
            "nodes": self.nodes,
            "node": self.node,
            "epoch": self.epoch,
        })
    }

    fn as_text(&self) -> String {
        let token = self
            .epoch
            .map_or(String::new(), |epoch| format!(", fencing token {epoch}"));
        let line = format!("{}  {:8}  {}{token}", now(), self.what, self.text);
        line.trim_end().to_owned()
    }
}

fn now() -> String {
    DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn happened(change: &Change) -> Vec<Happened> {
    match change {
        Change::Reset(nodes) => {
            let mut all = vec![Happened {
                nodes: Some(nodes.len()),
                text: format!("{} nodes", nodes.len()),
                ..Happened::plain("reset")
            }];
            all.extend(
                sorted(nodes)
                    .into_iter()
                    .map(|node| Happened::to("present", node)),
            );
            all
        }
        Change::Joined(node) => vec![Happened::to("joined", node)],
        Change::Updated { new, .. } => vec![Happened::to("updated", new)],
        Change::Left(node) => vec![Happened::to("left", node)],
        Change::Leader(Some(leadership)) => vec![Happened {
            epoch: Some(leadership.epoch),
            text: leadership.node.id.clone(),
            ..Happened::to("leader", &leadership.node)
        }],
        Change::Leader(None) => vec![Happened::plain("no_leader")],
        _ => Vec::new(),
    }
}

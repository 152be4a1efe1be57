//! Metrics for Prometheus, made from the current state at each request for them.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, prometheus_text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::group::Group;
use super::shown::Shown;
use super::status::{GroupStatus, NodeStatus, Status};
use crate::pingora::BackendState;
use crate::proxy::{LATENCY_BUCKETS, LatencyCounts};

/// The statuses of gRPC, and what stands for all that are none.
const CALL_STATUSES: [&str; 18] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16",
    "other",
];

/// The classes of a status; the first one is for requests that ended without one.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// The text of `/metrics`.
pub(super) fn text(shown: &Shown, most_nodes: usize) -> Result<String, fmt::Error> {
    let groups = shown.groups();
    let of_group = |group: &Group| Some(group.requests.as_ref()?.counts().by_class);
    let unserved = shown.proxy.as_ref();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(State {
        durations: groups.iter().map(of_group).collect(),
        unserved: unserved.map(|parts| parts.unserved.counts().by_class),
        status: shown.status_of(&groups),
        most_nodes,
    }));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

/// What there is to tell at one time.
#[derive(Debug)]
struct State {
    status: Status,
    /// By group and class.
    durations: Vec<Option<[LatencyCounts; 6]>>,
    /// Those of requests that no group has served.
    unserved: Option<[LatencyCounts; 6]>,
    most_nodes: usize,
}

type Labels<'l> = Vec<(&'static str, &'l str)>;

/// Writes metrics, each with all of its label sets.
struct Writer<'w, 'e>(&'w mut DescriptorEncoder<'e>);

impl Writer<'_, '_> {
    /// Writes one metric: its description, and a value for each set of labels.
    fn family<'l, V>(
        &mut self,
        (name, help, kind): (&str, &str, MetricType),
        values: impl IntoIterator<Item = (Labels<'l>, V)>,
        encode: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let name = format!("pingora_etcd_{name}");
        let mut encoder = self.0.encode_descriptor(&name, help, None, kind)?;
        for (labels, value) in values {
            encode(&mut encoder.encode_family(&labels)?, value)?;
        }
        Ok(())
    }

    fn gauges<'l, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'l>, V)>,
    ) -> fmt::Result {
        self.family((name, help, MetricType::Gauge), values, |encoder, value| {
            encoder.encode_gauge(&value)
        })
    }

    /// The encoder adds `_total` to the name.
    fn counters<'l, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'l>, V)>,
    ) -> fmt::Result {
        self.family(
            (name, help, MetricType::Counter),
            values,
            |encoder, value| encoder.encode_counter::<Labels<'_>, V, f64>(&value, None),
        )
    }

    fn histograms<'l>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'l>, LatencyCounts)>,
    ) -> fmt::Result {
        self.family(
            (name, help, MetricType::Histogram),
            values,
            |encoder, counts| {
                // The encoder adds the last one, and adds up.
                let buckets: Vec<_> = LATENCY_BUCKETS.into_iter().zip(counts.buckets).collect();
                let (sum, count) = (counts.sum.as_secs_f64(), counts.count());
                encoder.encode_histogram::<Labels<'_>>(sum, count, &buckets, None)
            },
        )
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(&mut encoder);
        self.process(&mut writer)?;
        self.reloads(&mut writer)?;
        self.certificates(&mut writer)?;
        self.views(&mut writer)?;
        self.requests(&mut writer)?;
        self.nodes(&mut writer)
    }
}

fn flag(value: bool) -> i64 {
    i64::from(value)
}

impl State {
    /// One value for each group.
    fn by_group<'s, V>(
        &'s self,
        value: impl Fn(&'s GroupStatus) -> V,
    ) -> impl Iterator<Item = (Labels<'s>, V)> {
        let groups = self.status.groups.iter();
        groups.map(move |group| (vec![("group", &*group.name)], value(group)))
    }

    fn process(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let status = &self.status;
        let version = vec![("version", status.version)];
        writer.gauges(
            "build_info",
            "The version of the balancer; always 1",
            [(version, 1)],
        )?;
        let started = status.started_ms as f64 / 1e3;
        let help = "When the process started, in Unix seconds";
        writer.gauges("start_time_seconds", help, [(vec![], started)])?;
        let help = "1 while every group has a view, one has nodes, and the process does not drain";
        writer.gauges("ready", help, [(vec![], flag(status.ready))])?;
        let help = "1 while the process is about to end";
        writer.gauges("draining", help, [(vec![], flag(status.draining))])
    }

    fn reloads(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let Some(reload) = &self.status.reload else {
            return Ok(());
        };
        let results = [
            ("taken_over", reload.taken_over),
            ("refused", reload.refused),
        ];
        let results = results.map(|(result, count)| (vec![("result", result)], count));
        let help = "Configurations that were read while the process ran, by what became of them";
        writer.counters("reloads", help, results)?;
        let since = reload.since_ms as f64 / 1e3;
        let help = "When the configuration in use was taken over, in Unix seconds";
        writer.gauges("config_time_seconds", help, [(vec![], since)])?;
        let is_refused = flag(reload.error.is_some());
        let help = "1 while the file has a configuration that was refused";
        writer.gauges("config_refused", help, [(vec![], is_refused)])?;
        let needs_restart = flag(!reload.needs_restart.is_empty());
        let help = "1 while the file has values that take effect only after a restart";
        writer.gauges("config_needs_restart", help, [(vec![], needs_restart)])
    }

    fn certificates(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let files = self.status.certificates.iter();
        let files = files.map(|file| {
            let labels = vec![("field", &*file.field), ("file", &*file.file)];
            (labels, file.ends_ms as f64 / 1e3)
        });
        let help = "When the first certificate in the file ends, in Unix seconds";
        writer.gauges("certificate_end_seconds", help, files)
    }

    fn views(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let live = self.by_group(|group| flag(group.view == "live"));
        writer.gauges(
            "view_live",
            "1 while the view of the group follows etcd",
            live,
        )?;
        let stale = self.by_group(|group| group.stale_for_ms as f64 / 1e3);
        let help = "For how many seconds the view has not followed etcd; 0 while it does";
        writer.gauges("view_stale_seconds", help, stale)?;
        let revision = self.by_group(|group| group.revision);
        writer.gauges(
            "view_revision",
            "The revision of etcd that the view has",
            revision,
        )?;
        let open = self.by_group(|group| flag(group.breaker_open_after.is_some()));
        let help = "1 while calls to etcd fail at once, because too many have failed";
        writer.gauges("breaker_open", help, open)?;
        let round_trips = self.status.groups.iter().filter_map(|group| {
            let seconds = group.etcd_round_trip_ms? / 1e3;
            Some((vec![("group", &*group.name)], seconds))
        });
        let help = "How long etcd takes to answer: a mean of the last answers";
        writer.gauges("etcd_round_trip_seconds", help, round_trips)?;
        let failing = self.by_group(|group| flag(group.snapshot_failing));
        let help = "1 while the snapshot file cannot be written";
        writer.gauges("snapshot_failing", help, failing)?;
        let panicking = self.by_group(|group| flag(group.panicking));
        let help = "1 while health checks find so few nodes well that all are used";
        writer.gauges("panicking", help, panicking)?;
        let leads = self.by_group(|group| flag(group.leader.is_some()));
        writer.gauges("has_leader", "1 while the group has a leader", leads)?;
        let epoch = self.by_group(|group| group.leader.as_ref().map_or(0, |leader| leader.epoch));
        let help = "The fencing token of the leader; 0 without a leader";
        writer.gauges("leader_epoch", help, epoch)?;
        let rejected = self.status.groups.iter().flat_map(|group| {
            let by_reason = group.rejected.iter();
            by_reason
                .map(|(reason, count)| (vec![("group", &*group.name), ("reason", *reason)], *count))
        });
        let help = "Entries in etcd that were refused, by reason";
        writer.counters("rejected_entries", help, rejected)?;
        let nodes = self.status.groups.iter().flat_map(|group| {
            BackendState::ALL.map(|state| {
                let state = state.name();
                let count = group
                    .nodes
                    .iter()
                    .filter(|node| node.state == state)
                    .count();
                (
                    vec![("group", &*group.name), ("state", state)],
                    count as i64,
                )
            })
        });
        writer.gauges("nodes", "Nodes of the group, by state", nodes)
    }

    fn requests(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let groups = || {
            let with_requests = self.status.groups.iter();
            with_requests.filter_map(|group| Some((group, group.requests.as_ref()?)))
        };
        let in_flight = groups()
            .map(|(group, requests)| (vec![("group", &*group.name)], requests.in_flight as i64));
        writer.gauges("requests_in_flight", "Requests in flight", in_flight)?;
        let retried =
            groups().map(|(group, requests)| (vec![("group", &*group.name)], requests.retried));
        let help = "How often a request was sent again, or another backend was tried";
        writer.counters("retries", help, retried)?;
        let connected =
            groups().map(|(group, requests)| (vec![("group", &*group.name)], requests.connected));
        let help = "Connections made to backends; the other tries used one that was there";
        writer.counters("backend_connections", help, connected)?;
        let without = groups().flat_map(|(group, requests)| {
            let reasons = requests.without_backend.iter();
            reasons
                .map(|(reason, count)| (vec![("group", &*group.name), ("reason", *reason)], *count))
        });
        let help = "Requests for which no backend was found, by reason";
        writer.counters("requests_without_backend", help, without)?;
        self.calls(writer)?;
        let durations = self.status.groups.iter().zip(&self.durations);
        let durations = durations.flat_map(|(group, durations)| {
            let by_class = CLASSES.into_iter().zip(durations.iter().flatten());
            by_class
                .map(|(class, counts)| (vec![("group", &*group.name), ("status", class)], *counts))
        });
        let unserved = CLASSES.into_iter().zip(self.unserved.iter().flatten());
        let unserved =
            unserved.map(|(class, counts)| (vec![("group", ""), ("status", class)], *counts));
        let help = "How long requests took, by the class of the status, none without one; without a \
                    group those that no group has served";
        let all = durations.chain(unserved);
        writer.histograms("request_duration_seconds", help, all)?;
        let routes = self.status.routes.iter();
        let routes = routes.map(|route| (vec![("route", &*route.name)], route.requests));
        writer.counters(
            "route_requests",
            "Requests that the route has been for",
            routes,
        )?;
        let clients = self.status.groups.iter().flat_map(|group| {
            let counts = group.clients.iter();
            counts.map(|(what, count)| (vec![("group", &*group.name), ("event", *what)], *count))
        });
        let help = "What has happened to client connections";
        writer.counters("client_connections", help, clients)?;
        let lost = self.status.access_log_lines_lost.iter();
        let help =
            "Lines of the access log for which there was no room, or that could not be written";
        let lost = lost.map(|count| (vec![], *count));
        writer.counters("access_log_lines_lost", help, lost)
    }

    /// Those of gRPC, whose HTTP status is 200 whatever becomes of them.
    fn calls(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let calls = self.status.groups.iter().flat_map(|group| {
            let calls = group.requests.iter().flat_map(|requests| requests.calls);
            // From the first call on all of them: an increase is seen only of what was there before.
            let mut counts = group.requests.iter().flat_map(|requests| requests.calls);
            let has_calls = counts.any(|count| count > 0);
            let is_shown = move |(_, status): &(u64, &str)| has_calls || *status == "0";
            let with_any = calls.zip(CALL_STATUSES).filter(is_shown);
            let labelled = with_any.map(|(count, status)| {
                (
                    vec![("group", &*group.name), ("grpc_status", status)],
                    count,
                )
            });
            labelled.collect::<Vec<_>>()
        });
        let help = "Calls of gRPC that have ended, by their status";
        writer.counters("grpc_calls", help, calls)
    }

    /// Nodes up to the limit that have this value.
    fn by_node<'s>(
        &'s self,
        value: impl Fn(&NodeStatus) -> Option<f64> + 's,
    ) -> impl Iterator<Item = (Labels<'s>, f64)> + 's {
        self.status.groups.iter().flat_map(move |group| {
            let shown = group.nodes.iter().take(self.most_nodes);
            let with_value = shown.filter_map(|node| Some((node, value(node)?)));
            let labelled = with_value
                .map(|(node, value)| (vec![("group", &*group.name), ("node", &*node.id)], value));
            labelled.collect::<Vec<_>>()
        })
    }

    fn nodes(&self, writer: &mut Writer<'_, '_>) -> fmt::Result {
        let help = "The part of requests that the node is drawn for, 0 to 1";
        let share = self.by_node(|node| node.share);
        writer.gauges("node_share_ratio", help, share)?;
        let success = self.by_node(|node| node.success);
        writer.gauges(
            "node_success_ratio",
            "The recent success rate of the node",
            success,
        )?;
        let in_flight = self.by_node(|node| Some(f64::from(node.in_flight)));
        let help = "Requests of this process that the node is working on";
        writer.gauges("node_requests_in_flight", help, in_flight)?;
        let answered = self.by_node(|node| Some(node.answered as f64));
        writer.counters(
            "node_answered",
            "Requests that the node has answered",
            answered,
        )?;
        let failed = self.by_node(|node| Some(node.failed as f64));
        writer.counters(
            "node_failed",
            "Requests that have failed at the node",
            failed,
        )
    }
}

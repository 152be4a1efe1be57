//! A worker: a small HTTP server that is a member of a group. The example `worker` runs one as a
//! process, and `load_balancer --demo` runs several in its own process.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{post, put};
use pingora_etcd::{
    Cluster, ClusterError, ClusterNode, MetricsCollector, NodeMetadata, metadata_keys,
    metrics::{
        CompositeMetricsCollector, Health, HealthCollector, LOAD_REPORT_HEADER, LoadReporter,
    },
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::log;

/// How long a request takes on an idle worker.
const SERVICE_TIME: Duration = Duration::from_millis(2);

#[path = "slots.rs"]
mod slots;
#[path = "stream.rs"]
mod stream;

use slots::Slots;
use stream::GRPC;

/// How a worker is started.
pub struct WorkerOptions {
    /// The connection, which other nodes of the process may share, and the TTL.
    pub cluster: Cluster,
    pub group: String,
    pub id: String,
    pub listen: SocketAddr,
    /// The address that others reach the worker at; `None`: the address it listens on.
    pub advertise: Option<IpAddr>,
    pub zone: Option<String>,
    /// The priority as a candidate: a higher one takes leadership over.
    pub priority: u16,
    /// How long to wait for requests in flight when the worker is stopped.
    pub grace: Duration,
    /// How many requests are processed at a time, and how long each takes on average. `None`: any
    /// number, for as long as the load that was set makes them take.
    pub slots: Option<(u32, Duration)>,
}

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It left: its registration was removed.
    Left,
    /// It crashed: its registration remains until its lease expires.
    Crashed,
}

/// The load that `PUT /load` sets and that the node reports.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Load {
    /// In percent.
    cpu: f64,
    /// In percent.
    memory: f64,
    queue: u32,
}

impl Load {
    fn check(&self) -> Result<(), String> {
        for (field, value) in [("cpu", self.cpu), ("memory", self.memory)] {
            if !(0.0..=100.0).contains(&value) {
                return Err(format!("{field}: {value} is out of range, 0 to 100\n"));
            }
        }
        if self.queue > 10_000 {
            return Err(format!(
                "queue: {} is out of range, 0 to 10000\n",
                self.queue
            ));
        }
        Ok(())
    }

    /// How long a response takes: the mean response time of a single server whose utilisation is
    /// the CPU usage, after everything in the queue.
    fn delay(&self) -> Duration {
        let idle = 1.0 - (self.cpu / 100.0).min(0.99);
        SERVICE_TIME.div_f64(idle) + SERVICE_TIME * self.queue
    }
}

/// What `PUT /health` sets and the node says of its health: nothing is well.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    /// The reason.
    degraded: Option<String>,
    /// The reason.
    failing: Option<String>,
}

impl Said {
    fn health(self) -> Health {
        match (self.failing, self.degraded) {
            (Some(reason), _) => Health::Failing(reason),
            (None, Some(reason)) => Health::Degraded(reason),
            (None, None) => Health::Well,
        }
    }
}

#[derive(Clone)]
struct Shared {
    node: ClusterNode,
    reporter: LoadReporter,
    load: Arc<Mutex<Load>>,
    said: Arc<Mutex<Said>>,
    slots: Option<Arc<Slots>>,
    end: watch::Sender<Option<Ended>>,
    /// The greatest fencing token seen, so that requests by a replaced leader can be refused.
    greatest_epoch: Arc<AtomicI64>,
}

#[derive(Clone)]
struct Reported(Arc<Mutex<Load>>, Option<Arc<Slots>>);

impl MetricsCollector for Reported {
    fn collect(&self) -> NodeMetadata {
        if let Some(slots) = &self.1 {
            return serde_json::json!({
                metadata_keys::CPU_USAGE_PERCENT: slots.take_usage() * 100.0,
                metadata_keys::QUEUE_DEPTH: slots.waiting(),
            });
        }
        let load = *locked(&self.0);
        serde_json::json!({
            metadata_keys::CPU_USAGE_PERCENT: load.cpu,
            metadata_keys::MEMORY_USAGE_PERCENT: load.memory,
            metadata_keys::QUEUE_DEPTH: load.queue,
        })
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves requests and stays registered until `shutdown`, `POST /stop` or `POST /crash`.
pub async fn run_worker(
    options: WorkerOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<Ended, Box<dyn std::error::Error + Send + Sync>> {
    let ip = options.advertise.unwrap_or(options.listen.ip());
    if ip.is_unspecified() {
        return Err(Box::new(ClusterError::InvalidConfig {
            field: "advertise".to_owned(),
            reason: format!("others cannot reach {ip}: set an address that they can reach"),
        }));
    }
    let load = Arc::new(Mutex::new(Load::default()));
    let slots = options
        .slots
        .map(|(count, time)| Arc::new(Slots::new(count, time)));
    let said = Arc::<Mutex<Said>>::default();
    let own = said.clone();
    let health = HealthCollector::new(move || locked(&own).clone().health());
    let reported = Reported(load.clone(), slots.clone());
    let both = CompositeMetricsCollector::new()
        .with_collector(reported)
        .with_collector(health);
    let mut builder = options
        .cluster
        .node(&options.id, ip, options.group)
        .priority(options.priority)
        .metrics_collector(both)
        .metrics_update_interval(1);
    if let Some(zone) = options.zone {
        builder = builder.zone(zone);
    }
    // Listens before it registers, so that everybody who sees the node can reach it.
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", options.listen))?;
    let node = builder.port(listener.local_addr()?.port()).try_build()?;
    let (end, _) = watch::channel(None);
    let reporter = node.load_reporter();
    reporter.counts_requests();
    let shared = Shared {
        reporter,
        node: node.clone(),
        load,
        said,
        slots,
        end: end.clone(),
        greatest_epoch: Arc::default(),
    };
    let address = listener.local_addr()?;
    log::print(format_args!("{} serves on {address}", options.id));

    let app = router(shared);
    run_until_end(listener, app, &node, &end, options.grace, shutdown).await
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/load", put(set_load))
        .route("/slots", put(set_slots))
        .route("/health", put(set_health))
        .route("/stop", post(stop))
        .route("/crash", post(crash))
        .fallback(serve)
        .with_state(shared)
}

/// Serves and runs the node until it has left, or until a crash.
async fn run_until_end(
    listener: TcpListener,
    app: Router,
    node: &ClusterNode,
    end: &watch::Sender<Option<Ended>>,
    grace: Duration,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<Ended, Box<dyn std::error::Error + Send + Sync>> {
    let mut ended = end.subscribe();
    let mut left = end.subscribe();
    let told = OnceLock::new();
    let first = &told;
    let serving = axum::serve(listener, app).with_graceful_shutdown(async move {
        // The wait fails when the worker has ended, which also stops the server.
        let _ = left.wait_for(Option::is_some).await;
    });
    let membership = node.run_until(async {
        tokio::select! {
            () = shutdown => {}
            _ = ended.wait_for(Option::is_some) => {}
        }
        let _ = first.set(Instant::now());
        // Still registered, and still serving the requests that balancers have already sent.
        if !node.drain_until_idle(grace).await {
            tracing::warn!(id = node.id(), grace = ?grace, "leaving with requests in flight");
        }
    });
    let mut crashed = end.subscribe();
    let living = async {
        let leaving = async {
            membership.await?;
            // Deregistered, so nobody sends new requests; those in flight are finished.
            end.send_if_modified(|end| end.is_none() && end.replace(Ended::Left).is_none());
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        };
        let mut serving = std::pin::pin!(serving.into_future());
        let mut leaving = std::pin::pin!(leaving);
        tokio::select! {
            left = &mut leaving => left?,
            served = &mut serving => {
                served?;
                // Everybody has been served before; the registration still has to be removed.
                leaving.await?;
                return Ok(Ended::Left);
            }
        }
        let used = told.get().map_or(Duration::ZERO, Instant::elapsed);
        match tokio::time::timeout(grace.saturating_sub(used), serving).await {
            Ok(served) => served?,
            // Clients that have not sent the whole of a request, for example.
            Err(_) => tracing::warn!(id = node.id(), "ending with open connections"),
        }
        Ok(Ended::Left)
    };
    tokio::select! {
        // Checked first, so that nothing can clean up before a crash.
        biased;
        _ = crashed.wait_for(|end| *end == Some(Ended::Crashed)) => Ok(Ended::Crashed),
        result = living => result,
    }
}

/// Any other request: responds with the worker's id, after as long as the load requires.
async fn serve(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let epoch = headers.get("x-leader-epoch").map(HeaderValue::to_str);
    if let Some(epoch) = epoch {
        let Some(epoch) = epoch.ok().and_then(|epoch| epoch.parse().ok()) else {
            return (StatusCode::BAD_REQUEST, "x-leader-epoch is not a number\n").into_response();
        };
        let own = shared.node.leadership().map_or(0, |term| term.epoch);
        let greatest = shared
            .greatest_epoch
            .fetch_max(own.max(epoch), Ordering::AcqRel)
            .max(own);
        if epoch < greatest {
            let reason = format!("token {epoch} is from an older term than {greatest}\n");
            // A proxy that sees the newer token sends the request to the new leader.
            let newer = [("x-leader-epoch", greatest.to_string())];
            return (StatusCode::CONFLICT, newer, reason).into_response();
        }
    }
    let request = shared.reporter.enter();
    if let Some(slots) = &shared.slots
        && headers.get(CONTENT_TYPE).is_some_and(|it| it == GRPC)
    {
        let response = stream::answer(slots, request).await;
        return with_report(response, &shared);
    }
    match &shared.slots {
        Some(slots) => slots.serve().await,
        None => {
            let delay = {
                let load = locked(&shared.load);
                load.delay()
            };
            tokio::time::sleep(delay).await;
        }
    }
    drop(request);
    with_report(format!("{}\n", shared.node.id()).into_response(), &shared)
}

/// Says who has answered, and how much there is to do.
fn with_report(mut response: Response, shared: &Shared) -> Response {
    // With the feature `tower` its layer does this, and counts the request until the body is sent.
    let report = shared.reporter.header_value();
    response.headers_mut().insert(LOAD_REPORT_HEADER, report);
    if let Ok(id) = HeaderValue::from_bytes(shared.node.id().as_bytes()) {
        response.headers_mut().insert("x-served-by", id);
    }
    response
}

async fn set_health(
    State(shared): State<Shared>,
    said: Result<Query<Said>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let said = match said {
        Ok(Query(said)) => said,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    };
    *locked(&shared.said) = said.clone();
    format!("{:?}\n", said.health()).into_response()
}

async fn set_load(
    State(shared): State<Shared>,
    load: Result<Query<Load>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let load = match load {
        Ok(Query(load)) => load,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    };
    if let Err(reason) = load.check() {
        return (StatusCode::BAD_REQUEST, reason).into_response();
    }
    *locked(&shared.load) = load;
    format!("{load:?}, {:?} per request\n", load.delay()).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotCount {
    count: u32,
}

/// Sets how many slots the worker may use; a simulated neighbour takes the others.
async fn set_slots(
    State(shared): State<Shared>,
    slots: Result<Query<SlotCount>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let bad = |reason: String| (StatusCode::BAD_REQUEST, reason).into_response();
    let Some(worker_slots) = &shared.slots else {
        return bad("the worker was started without --slots\n".to_owned());
    };
    match slots {
        Ok(Query(SlotCount { count })) => match worker_slots.limit_to(count) {
            Ok(()) => format!("{count} slots\n").into_response(),
            Err(reason) => bad(format!("count: {reason}\n")),
        },
        Err(error) => bad(format!("{error}\n")),
    }
}

async fn stop(State(shared): State<Shared>) -> &'static str {
    shared.end.send_replace(Some(Ended::Left));
    "leaving\n"
}

async fn crash(State(shared): State<Shared>) -> &'static str {
    shared.end.send_replace(Some(Ended::Crashed));
    "crashed\n"
}

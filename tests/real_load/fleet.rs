//! The processes of one run, and the requests that go through them.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::balancers::{Kind, Surroundings, free_address};
use crate::common::programs::{Program, binary};
use crate::common::{DEADLINE, group};
use crate::shape::{Event, Shape};

pub const SERVICE_TIME: Duration = Duration::from_millis(40);
/// The load as a part of the workers' mean capacity.
pub const LOAD: f64 = 0.75;
/// Time for the weights to settle; requests in it are not measured.
const WARM_UP: Duration = Duration::from_secs(5);
/// A client waits no longer. A request that failed counts with this latency.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a worker answers to a call: five empty messages.
const STREAM_BYTES: usize = 25;

/// What a run has shown.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// In order.
    pub latencies: Vec<Duration>,
    pub failed: usize,
    /// The 99th percentile of the requests that were due in each phase.
    pub phases: Vec<Duration>,
}

/// The value at this rank, of values in order.
pub fn quantile<T: Copy + Default>(values: &[T], quantile: f64) -> T {
    let rank = (values.len().saturating_sub(1) as f64 * quantile) as usize;
    values.get(rank).copied().unwrap_or_default()
}

impl Figures {
    pub fn quantile(&self, rank: f64) -> Duration {
        quantile(&self.latencies, rank)
    }

    pub fn errors(&self) -> f64 {
        self.failed as f64 / self.latencies.len().max(1) as f64
    }
}

/// A worker process, which may be started again.
struct Worker {
    arguments: Vec<String>,
    url: String,
    program: Program,
}

impl Worker {
    fn start(arguments: Vec<String>, listen: SocketAddr) -> Self {
        let program = Self::spawn(&arguments);
        let url = format!("http://{listen}");
        Self {
            arguments,
            url,
            program,
        }
    }

    fn spawn(arguments: &[String]) -> Program {
        let mut command = std::process::Command::new(binary("worker"));
        command.args(arguments);
        command.stdout(std::process::Stdio::null());
        Program::spawn(command.stderr(std::process::Stdio::null()))
    }
}

/// The processes of one run.
pub struct Fleet {
    workers: Vec<Worker>,
    balancers: Vec<String>,
    _programs: Vec<Program>,
}

impl Fleet {
    pub async fn start(client: &reqwest::Client, etcd: &str, shape: &Shape, kind: Kind) -> Self {
        let group = group("load");
        let addresses: Vec<_> = shape.slots.iter().map(|_| free_address()).collect();
        let service = SERVICE_TIME.as_millis();
        let workers: Vec<_> = (shape.slots.iter().zip(&addresses).enumerate())
            .map(|(index, (slots, listen))| {
                let arguments = format!(
                    "--etcd {etcd} --group {group} --id w{index} --listen {listen} \
                     --slots {slots} --service-ms {service}"
                );
                let arguments = arguments.split(' ').map(str::to_owned).collect();
                Worker::start(arguments, *listen)
            })
            .collect();
        let around = Surroundings {
            etcd,
            group: &group,
            workers: &addresses,
            are_streams: shape.are_streams,
        };
        let (mut balancers, mut programs) = (Vec::new(), Vec::new());
        for _ in 0..shape.balancers {
            let listen = free_address();
            programs.push(kind.start(listen, &around));
            balancers.push(format!("http://{listen}/"));
        }
        for url in &balancers {
            until_nodes_answer(client, url, shape).await;
        }
        Self {
            workers,
            balancers,
            _programs: programs,
        }
    }

    /// Lets something happen to a worker.
    async fn happen(&mut self, client: &reqwest::Client, event: Event) {
        match event {
            Event::Slots(at, count) => {
                let url = format!("{}/slots?count={count}", self.workers[at].url);
                let answer = client.put(url).send().await;
                assert!(answer.unwrap().status().is_success());
            }
            Event::Restart(at) => {
                let worker = &mut self.workers[at];
                worker.program.signal("TERM");
                worker.program.ended().await;
                worker.program = Worker::spawn(&worker.arguments);
            }
            Event::Freeze(at) => self.workers[at].program.signal("STOP"),
            Event::Thaw(at) => self.workers[at].program.signal("CONT"),
        }
    }
}

/// A request of some user, or a call.
fn request(
    client: &reqwest::Client,
    url: &str,
    user: u32,
    shape: &Shape,
) -> reqwest::RequestBuilder {
    if !shape.are_streams {
        return client.get(url).header("x-user", user);
    }
    let call = client.post(format!("{url}load.Worker/Stream"));
    call.header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-user", user)
        .body(&[0_u8; 5][..])
}

/// Waits until all workers have responded through the balancer.
async fn until_nodes_answer(client: &reqwest::Client, url: &str, shape: &Shape) {
    let start = Instant::now();
    let mut nodes = HashSet::new();
    let mut user = 0;
    while nodes.len() < shape.slots.len() {
        assert!(
            start.elapsed() < DEADLINE,
            "only {nodes:?} responded at {url}"
        );
        user += 1;
        match request(client, url, user, shape).send().await {
            Ok(response) => nodes.extend(response.headers().get("x-served-by").cloned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Whether a request is answered to its end.
async fn is_answered(request: reqwest::RequestBuilder) -> bool {
    let Ok(answer) = request.send().await else {
        return false;
    };
    let is_well = answer.status().is_success();
    let is_stream = answer
        .headers()
        .get("content-type")
        .is_some_and(|it| it == "application/grpc");
    match answer.bytes().await {
        // A call that fails has the same status, but not all of its messages.
        Ok(body) => is_well && (!is_stream || body.len() == STREAM_BYTES),
        Err(_) => false,
    }
}

/// One run: requests with random arrival times, whatever becomes of those before. With the same seed they arrive at the same
/// times.
pub async fn run(
    client: &reqwest::Client,
    etcd: &str,
    shape: &Shape,
    kind: Kind,
    seed: u64,
) -> Figures {
    let mut random = fastrand::Rng::with_seed(seed);
    let fleet = Fleet::start(client, etcd, shape, kind).await;
    let urls = fleet.balancers.clone();
    let rate = LOAD * shape.mean_slots / SERVICE_TIME.as_secs_f64();
    let start = Instant::now();
    let at = |part: f64| WARM_UP + shape.measure.mul_f64(part);
    let happening = tokio::spawn(happen(fleet, client.clone(), shape.clone(), start));
    let mut requests = JoinSet::new();
    let (mut due, mut sent) = (Duration::ZERO, 0);
    while due < at(1.0) {
        due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
        tokio::time::sleep_until((start + due).into()).await;
        let url = &urls[sent % urls.len()];
        let request = request(client, url, random.u32(..1000), shape);
        let from = start + due;
        sent += 1;
        requests.spawn(async move {
            // The latency counts from the due time, so that a late generator does not make it look
            // short.
            let is_well = is_answered(request).await;
            (due, is_well.then(|| from.elapsed()))
        });
    }
    let ends: Vec<_> = shape.events.iter().map(|(part, _)| at(*part)).collect();
    let mut figures = Figures::default();
    let mut phases = vec![Vec::new(); ends.len() + 1];
    for (due, latency) in requests.join_all().await {
        if due <= WARM_UP {
            continue;
        }
        figures.failed += usize::from(latency.is_none());
        let latency = latency.unwrap_or(PATIENCE);
        figures.latencies.push(latency);
        phases[ends.partition_point(|end| *end <= due)].push(latency);
    }
    figures.latencies.sort_unstable();
    for latencies in &mut phases {
        latencies.sort_unstable();
        figures.phases.push(quantile(latencies, 0.99));
    }
    drop(happening.await.unwrap());
    figures
}

/// Lets the events of a shape happen at their times.
async fn happen(mut fleet: Fleet, client: reqwest::Client, shape: Shape, start: Instant) -> Fleet {
    for (part, event) in &shape.events {
        let at = start + WARM_UP + shape.measure.mul_f64(*part);
        tokio::time::sleep_until(at.into()).await;
        fleet.happen(&client, *event).await;
    }
    fleet
}

//! The discrete-event simulation: proxies that route requests to servers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use pingora_etcd::metrics::LoadReport;

use crate::routers::{Outcome, Router, RouterKind, Ticket, View};
use crate::server::{Discipline, Server};

pub type Seconds = f64;
pub type RequestId = u32;

/// How much work a request is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    Exponential,
    /// With this standard deviation of the logarithm.
    Lognormal(f64),
    /// Nine of ten take a third of the mean, one takes seven times the mean.
    Mixed,
}

/// What the servers say of themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metrics {
    None,
    Truthful,
    /// The first server always reports that it is idle.
    OneLies,
    /// All report random numbers.
    Random,
    /// Half of the reports get lost.
    Lost,
    /// A third of the servers repeat what they said first, with a fresh time.
    Frozen,
}

/// What happens besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trouble {
    None,
    /// The first server answers at once, and wrongly.
    FailsFast,
    /// The last server joins.
    Joins,
    /// The same with cold caches: a third as fast at first, and ten seconds to warm up.
    JoinsCold,
    /// The first server hangs for 20 s.
    Hangs,
    /// Twice the load for 5 s.
    Burst,
    /// The near zone fails for 30 s.
    ZoneFails,
}

impl Trouble {
    fn joins(self) -> bool {
        matches!(self, Self::Joins | Self::JoinsCold)
    }
}

/// When troubles begin, after the start of the measurement.
pub const TROUBLE_AFTER: Seconds = 20.0;
/// How long a request is waited for.
const TIMEOUT: Seconds = 5.0;
/// From a server's report to what a proxy makes of it.
const COALESCE: Seconds = 0.02;
/// How long a joining server is cold.
const WARM_UP: Seconds = 10.0;

#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: &'static str,
    pub servers: usize,
    pub proxies: usize,
    /// Of the capacity that neighbours leave.
    pub load: f64,
    pub work: Work,
    pub discipline: Discipline,
    /// Between two reports of a server.
    pub interval: Seconds,
    pub metrics: Metrics,
    /// Responses tell how many requests their server has in flight.
    pub in_flight: bool,
    pub trouble: Trouble,
    /// A third of the servers have a neighbour that takes 20 to 60 %, for 10 to 60 s each.
    pub neighbours: bool,
    /// Two zones, with this much more latency between them, both ways.
    pub zones: Option<Seconds>,
    pub warm: Seconds,
    pub measure: Seconds,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: "",
            servers: 10,
            proxies: 4,
            load: 0.75,
            work: Work::Lognormal(1.0),
            discipline: Discipline::ProcessorSharing,
            interval: 5.0,
            metrics: Metrics::Truthful,
            in_flight: false,
            trouble: Trouble::None,
            neighbours: true,
            zones: None,
            warm: 60.0,
            measure: 120.0,
        }
    }
}

/// Mean work of a request, in core seconds.
pub const MEAN_WORK: Seconds = 0.010;

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub requests: u64,
    /// In seconds.
    pub p50: f64,
    pub p99: f64,
    /// Share of requests that failed.
    pub errors: f64,
    /// Share of requests that went to the first server, since the trouble began if there is any.
    pub first: f64,
    /// p99 of the last server in its first 30 s.
    pub joined_p99: f64,
    /// How much the servers' utilisation varies over time: mean over servers of standard deviation
    /// by mean of one-second windows.
    pub variation: f64,
    /// Share of requests that stayed in their zone.
    pub near: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    Arrival,
    Finish { server: u32, generation: u64 },
    Timeout { request: RequestId, arrival: u32 },
    Report { server: u32 },
    Deliver,
    Tick { proxy: u32 },
    Neighbour { server: u32 },
    Window,
    Trouble,
    TroubleEnds,
    Warm,
}

struct Scheduled {
    at: Seconds,
    sequence: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at.total_cmp(&other.at)).then(self.sequence.cmp(&other.sequence))
    }
}

struct Request {
    arrival: Seconds,
    /// Tells this request from others in the same place.
    serial: u32,
    server: u32,
    proxy: u32,
    ticket: Option<Ticket>,
}

pub struct World {
    scenario: Scenario,
    servers: Vec<Server>,
    proxies: Vec<Box<dyn Router>>,
    view: View,
    requests: Vec<Request>,
    free: Vec<RequestId>,
    serial: u32,
    events: BinaryHeap<Reverse<Scheduled>>,
    sequence: u64,
    now: Seconds,
    start: Instant,
    rng: fastrand::Rng,
    /// What the arrivals, their work and the neighbours are drawn from: the same for every router.
    nature: fastrand::Rng,
    /// Requests per second.
    rate: f64,
    burst: bool,
    /// Of each server at its last report.
    reported: Vec<Seconds>,
    busy: Vec<f64>,
    requests_reported: Vec<u64>,
    dirty: bool,
    latencies: Vec<f32>,
    joined: Vec<f32>,
    /// Requests for each server since the trouble began, if there is any.
    counts: Vec<u64>,
    troubled: bool,
    since_trouble: u64,
    requests_measured: u64,
    near: u64,
    failed: u64,
    windows: Vec<Vec<f32>>,
    window_busy: Vec<f64>,
}

impl World {
    pub fn new(scenario: &Scenario, kind: RouterKind, seed: u64) -> Self {
        let scenario = scenario.clone();
        let mut nature = fastrand::Rng::with_seed(seed);
        let sizes = [2.0, 3.0, 4.0, 6.0, 8.0];
        let mut cores: Vec<f64> = (0..scenario.servers)
            .map(|index| sizes[index % sizes.len()])
            .collect();
        nature.shuffle(&mut cores);
        let servers: Vec<_> = cores
            .iter()
            .map(|cores| Server::new(*cores, scenario.discipline))
            .collect();
        let start = Instant::now();
        let view = View::new(&scenario);
        let proxies = (0..scenario.proxies)
            .map(|proxy| kind.build(&scenario, &view, proxy, seed, start))
            .collect();
        // A third of the servers, at 40 % each on average, belongs to neighbours.
        let left = if scenario.neighbours {
            1.0 - 0.4 / 3.0
        } else {
            1.0
        };
        let joining = scenario.trouble.joins();
        let capacity: f64 = cores.iter().take(cores.len() - usize::from(joining)).sum();
        let rate = scenario.load * capacity * left / MEAN_WORK;
        let count = scenario.servers;
        Self {
            servers,
            proxies,
            view,
            requests: Vec::new(),
            free: Vec::new(),
            serial: 0,
            events: BinaryHeap::new(),
            sequence: 0,
            now: 0.0,
            start,
            rng: fastrand::Rng::with_seed(seed ^ 0x5eed),
            nature,
            rate,
            burst: false,
            reported: vec![0.0; count],
            busy: vec![0.0; count],
            requests_reported: vec![0; count],
            dirty: false,
            latencies: Vec::new(),
            joined: Vec::new(),
            counts: vec![0; count],
            troubled: scenario.trouble == Trouble::None,
            since_trouble: 0,
            requests_measured: 0,
            near: 0,
            failed: 0,
            windows: vec![Vec::new(); count],
            window_busy: vec![0.0; count],
            scenario,
        }
    }

    fn at(&mut self, at: Seconds, event: Event) {
        self.sequence += 1;
        let sequence = self.sequence;
        self.events.push(Reverse(Scheduled {
            at,
            sequence,
            event,
        }));
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_secs_f64(self.now)
    }

    fn measuring(&self) -> bool {
        self.now >= self.scenario.warm
    }

    pub fn run(mut self) -> Figures {
        let end = self.scenario.warm + self.scenario.measure;
        self.prepare();
        while let Some(Reverse(next)) = self.events.pop() {
            if next.at > end {
                break;
            }
            self.now = next.at;
            self.handle(next.event);
        }
        self.figures()
    }

    fn prepare(&mut self) {
        self.at(0.0, Event::Arrival);
        self.at(0.0, Event::Deliver);
        self.at(0.0, Event::Window);
        for server in 0..self.servers.len() as u32 {
            let phase = self.nature.f64() * self.scenario.interval;
            self.at(phase, Event::Report { server });
        }
        for proxy in 0..self.proxies.len() as u32 {
            let phase = self.rng.f64();
            self.at(phase, Event::Tick { proxy });
        }
        if self.scenario.neighbours {
            let mut servers: Vec<u32> = (0..self.servers.len() as u32).collect();
            self.nature.shuffle(&mut servers);
            let disturbed = (self.servers.len() + 1) / 3;
            for server in servers.into_iter().take(disturbed) {
                self.disturb(server);
            }
        }
        if self.scenario.trouble != Trouble::None {
            self.at(self.scenario.warm + TROUBLE_AFTER, Event::Trouble);
        }
        if self.scenario.trouble.joins() {
            let last = self.servers.len() - 1;
            self.view.leave(last);
        }
        self.dirty = true;
    }

    /// A neighbour moves in.
    fn disturb(&mut self, server: u32) {
        let taken = 0.2 + 0.4 * self.nature.f64();
        let stays = 10.0 + 50.0 * self.nature.f64();
        self.change(server as usize, |server| server.stolen = taken);
        self.at(self.now + stays, Event::Neighbour { server });
    }

    fn change(&mut self, index: usize, change: impl FnOnce(&mut Server)) {
        let now = self.now;
        self.servers[index].advance(now);
        change(&mut self.servers[index]);
        self.reschedule(index);
    }

    fn reschedule(&mut self, index: usize) {
        let server = &mut self.servers[index];
        server.generation += 1;
        let generation = server.generation;
        if let Some(at) = server.next_finish() {
            let server = index as u32;
            self.at(at, Event::Finish { server, generation });
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrival => self.arrive(),
            Event::Finish { server, generation } => {
                let index = server as usize;
                if self.servers[index].generation == generation {
                    let now = self.now;
                    let done = self.servers[index].finish(now);
                    if let Some(request) = done {
                        self.answer(request);
                    }
                    self.reschedule(index);
                }
            }
            Event::Timeout { request, arrival } => {
                let timed_out = &mut self.requests[request as usize];
                if timed_out.serial == arrival
                    && let Some(ticket) = timed_out.ticket.take()
                {
                    let proxy = timed_out.proxy as usize;
                    self.failed += u64::from(self.measuring());
                    let now = self.instant();
                    self.proxies[proxy].done(ticket, Outcome::Failed, None, now);
                }
            }
            Event::Report { server } => self.report(server as usize),
            Event::Deliver => {
                if std::mem::take(&mut self.dirty) {
                    let now = self.instant();
                    for proxy in &mut self.proxies {
                        proxy.metrics(&self.view, now);
                    }
                }
                self.at(self.now + COALESCE, Event::Deliver);
            }
            Event::Tick { proxy } => {
                let now = self.instant();
                self.proxies[proxy as usize].tick(now);
                self.at(self.now + 1.0, Event::Tick { proxy });
            }
            Event::Neighbour { server } => {
                self.change(server as usize, |server| server.stolen = 0.0);
                let undisturbed: Vec<u32> = (0..self.servers.len() as u32)
                    .filter(|other| self.servers[*other as usize].stolen == 0.0)
                    .collect();
                let next = undisturbed[self.nature.usize(..undisturbed.len())];
                self.disturb(next);
            }
            Event::Window => self.window(),
            Event::Trouble => {
                self.troubled = true;
                self.trouble(true);
            }
            Event::TroubleEnds => self.trouble(false),
            Event::Warm => {
                let last = self.servers.len() - 1;
                let warmth = (self.servers[last].warmth + 0.07).min(1.0);
                self.change(last, |server| server.warmth = warmth);
                if warmth < 1.0 {
                    self.at(self.now + WARM_UP / 10.0, Event::Warm);
                }
            }
        }
    }

    fn trouble(&mut self, begins: bool) {
        let ends = match self.scenario.trouble {
            Trouble::None => return,
            Trouble::FailsFast => {
                self.servers[0].failing = begins;
                None
            }
            Trouble::Joins | Trouble::JoinsCold => {
                let last = self.servers.len() - 1;
                self.view.join(last);
                self.dirty = true;
                if self.scenario.trouble == Trouble::JoinsCold {
                    self.servers[last].warmth = 0.3;
                    self.at(self.now + WARM_UP / 10.0, Event::Warm);
                }
                None
            }
            Trouble::Hangs => {
                self.change(0, |server| server.hanging = begins);
                Some(20.0)
            }
            Trouble::Burst => {
                self.burst = begins;
                Some(5.0)
            }
            Trouble::ZoneFails => {
                for index in 0..self.servers.len() {
                    if self.view.zone(index) == 0 {
                        self.servers[index].failing = begins;
                    }
                }
                Some(30.0)
            }
        };
        if begins && let Some(after) = ends {
            self.at(self.now + after, Event::TroubleEnds);
        }
    }

    fn work(&mut self) -> Seconds {
        let random = &mut self.nature;
        let relative = match self.scenario.work {
            Work::Exponential => -(1.0 - random.f64()).ln(),
            Work::Lognormal(sigma) => {
                let normal = (-2.0 * (1.0 - random.f64()).ln()).sqrt()
                    * (std::f64::consts::TAU * random.f64()).cos();
                (sigma * normal - sigma * sigma / 2.0).exp()
            }
            Work::Mixed if random.f64() < 0.9 => 1.0 / 3.0,
            Work::Mixed => 7.0,
        };
        relative * MEAN_WORK
    }

    fn arrive(&mut self) {
        let rate = self.rate * if self.burst { 2.0 } else { 1.0 };
        let pause = -(1.0 - self.nature.f64()).ln() / rate;
        let work = self.work();
        let proxy = self.nature.u32(..self.proxies.len() as u32);
        self.at(self.now + pause, Event::Arrival);
        let now = self.instant();
        let picked = self.proxies[proxy as usize].pick(&self.servers, &mut self.rng, now);
        let Some(ticket) = picked else {
            self.failed += u64::from(self.measuring());
            return;
        };
        let server = ticket.server;
        let arrival = self.now;
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let request = Request {
            arrival,
            serial,
            server: server as u32,
            proxy,
            ticket: Some(ticket),
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.requests[id as usize] = request;
                id
            }
            None => {
                self.requests.push(request);
                (self.requests.len() - 1) as RequestId
            }
        };
        if self.measuring() {
            self.requests_measured += 1;
            self.since_trouble += u64::from(self.troubled);
            self.counts[server] += u64::from(self.troubled);
            let near = self.view.zone(server) == self.view.zone_of_proxy(proxy as usize);
            self.near += u64::from(near);
        }
        if self.scenario.trouble == Trouble::Hangs {
            let timeout = Event::Timeout {
                request: id,
                arrival: serial,
            };
            self.at(arrival + TIMEOUT, timeout);
        }
        if self.servers[server].failing {
            // Done with it before anything else happens.
            self.answer(id);
            return;
        }
        self.servers[server].accept(arrival, id, work);
        self.reschedule(server);
    }

    fn answer(&mut self, id: RequestId) {
        let request = &mut self.requests[id as usize];
        let (server, proxy) = (request.server as usize, request.proxy as usize);
        let arrival = request.arrival;
        let ticket = request.ticket.take();
        self.free.push(id);
        let Some(ticket) = ticket else { return };
        let now = self.instant();
        let measured = arrival >= self.scenario.warm;
        if self.servers[server].failing {
            self.failed += u64::from(measured);
            self.proxies[proxy].done(ticket, Outcome::Failed, None, now);
            return;
        }
        let mut latency = self.now - arrival;
        if let Some(far) = self.scenario.zones
            && self.view.zone(server) != self.view.zone_of_proxy(proxy)
        {
            latency += far;
        }
        let report = self.scenario.in_flight.then(|| {
            let mut report = LoadReport::new();
            let in_flight = match self.scenario.metrics {
                Metrics::Random => self.rng.f64() * 30.0,
                Metrics::OneLies if server == 0 => 0.0,
                _ => self.servers[server].in_flight() as f64,
            };
            report.in_flight = Some(in_flight);
            report
        });
        let outcome = Outcome::Succeeded(Duration::from_secs_f64(latency));
        self.proxies[proxy].done(ticket, outcome, report.as_ref(), now);
        if measured {
            self.latencies.push(latency as f32);
            let joined = self.scenario.warm + TROUBLE_AFTER;
            if server == self.servers.len() - 1 && (joined..joined + 30.0).contains(&arrival) {
                self.joined.push(latency as f32);
            }
        }
    }

    fn report(&mut self, index: usize) {
        let (now, interval) = (self.now, self.scenario.interval);
        self.at(
            now + interval,
            Event::Report {
                server: index as u32,
            },
        );
        self.collect(index);
        let busy = std::mem::take(&mut self.busy[index]);
        let server = &mut self.servers[index];
        let passed = (now - self.reported[index]).max(1e-3);
        self.reported[index] = now;
        // What the neighbour uses is in use.
        let mut cpu = (busy / passed / server.cores + server.stolen).min(1.0);
        let mut queue = server.queue();
        let served = server.served - self.requests_reported[index];
        self.requests_reported[index] = server.served;
        let qps = served as f64 / passed;
        match self.scenario.metrics {
            Metrics::None => return,
            Metrics::Truthful => {}
            Metrics::OneLies if index == 0 => (cpu, queue) = (0.01, 0.0),
            Metrics::OneLies => {}
            Metrics::Random => (cpu, queue) = (self.rng.f64(), (self.rng.f64() * 30.0).floor()),
            Metrics::Lost if self.rng.bool() => return,
            Metrics::Lost => {}
            Metrics::Frozen if index.is_multiple_of(3) && self.view.has_reported(index) => {
                self.view.repeat(index, now);
                self.dirty = true;
                return;
            }
            Metrics::Frozen => {}
        }
        self.view.report(index, now, cpu, queue, qps);
        self.dirty = true;
    }

    /// What the server has used since this was last asked, for its report and for the window.
    fn collect(&mut self, index: usize) {
        let busy = self.servers[index].take_busy(self.now);
        self.busy[index] += busy;
        self.window_busy[index] += busy;
    }

    fn window(&mut self) {
        let now = self.now;
        for index in 0..self.servers.len() {
            self.collect(index);
            let of_window = std::mem::take(&mut self.window_busy[index]);
            if self.now > self.scenario.warm {
                self.windows[index].push((of_window / self.servers[index].cores) as f32);
            }
        }
        self.at(now + 1.0, Event::Window);
    }

    fn figures(mut self) -> Figures {
        let requests = self.requests_measured;
        let share = |count: u64| count as f64 / requests.max(1) as f64;
        let variation = self.windows.iter().map(|windows| {
            let count = windows.len() as f32;
            let mean = windows.iter().sum::<f32>() / count;
            let squares = windows.iter().map(|used| (used - mean).powi(2));
            f64::from((squares.sum::<f32>() / count).sqrt() / mean.max(1e-6))
        });
        Figures {
            requests,
            variation: variation.sum::<f64>() / self.windows.len() as f64,
            p50: quantile(&mut self.latencies, 0.5),
            p99: quantile(&mut self.latencies, 0.99),
            joined_p99: quantile(&mut self.joined, 0.99),
            errors: share(self.failed),
            first: self.counts[0] as f64 / self.since_trouble.max(1) as f64,
            near: share(self.near),
        }
    }
}

fn quantile(values: &mut [f32], quantile: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = ((values.len() - 1) as f64 * quantile) as usize;
    let (_, value, _) = values.select_nth_unstable_by(rank, f32::total_cmp);
    f64::from(*value)
}

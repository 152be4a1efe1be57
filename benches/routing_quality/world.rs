//! The discrete-event simulation: proxies that route requests to servers.

use std::time::{Duration, Instant};

use pingora_etcd::metrics::LoadReport;

use crate::events::{Event, Events};
use crate::figures::Figures;
use crate::measurements::Measurements;
use crate::requests::{Request, Requests};
use crate::router::{Outcome, Router, Ticket};
use crate::routers::RouterKind;
use crate::scenario::{FAILS_FOR, Metrics, RETURNS_WITHIN, Scenario, TROUBLE_AFTER, TURN, Trouble};
use crate::server::{Fault, Server};
use crate::units::{MEAN_WORK, RequestId, Seconds};
use crate::view::View;

/// How often a request is tried.
const TRIES: usize = 3;
/// How long a proxy waits for a request.
const TIMEOUT: Seconds = 5.0;
/// The time from a report to its effect in a proxy.
const COALESCE: Seconds = 0.02;
/// How long a joining server is cold.
const WARM_UP: Seconds = 10.0;

pub struct World {
    scenario: Scenario,
    servers: Vec<Server>,
    proxies: Vec<Box<dyn Router>>,
    view: View,
    requests: Requests,
    events: Events,
    now: Seconds,
    start: Instant,
    rng: fastrand::Rng,
    /// The generator of arrivals, their work and the neighbours: the same for every router.
    nature: fastrand::Rng,
    /// Requests per second.
    rate: f64,
    burst: bool,
    /// The time of the last report of each server.
    reported: Vec<Seconds>,
    busy: Vec<f64>,
    requests_reported: Vec<u64>,
    dirty: bool,
    measured: Measurements,
}

impl World {
    pub fn new(scenario: &Scenario, kind: RouterKind, seed: u64) -> Self {
        let scenario = scenario.clone();
        let mut nature = fastrand::Rng::with_seed(seed);
        let sizes = scenario.cores;
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
        // 40 % on average of a third of the servers belongs to neighbours.
        let left = if scenario.neighbours {
            1.0 - 0.4 / 3.0
        } else {
            1.0
        };
        let joining = usize::from(scenario.trouble.joins());
        let serving = cores.len() - joining - scenario.dead;
        let capacity: f64 = cores.iter().take(serving).sum();
        let rate = scenario.load * capacity * left / MEAN_WORK;
        let count = scenario.servers;
        Self {
            servers,
            proxies,
            view,
            requests: Requests::default(),
            events: Events::default(),
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
            measured: Measurements::new(count),
            scenario,
        }
    }

    fn at(&mut self, at: Seconds, event: Event) {
        self.events.add(at, event);
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
        while let Some((at, event)) = self.events.next() {
            if at > end {
                break;
            }
            self.now = at;
            self.handle(event);
        }
        self.measured.figures()
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
        let alive = self.servers.len() - self.scenario.dead;
        for server in &mut self.servers[alive..] {
            server.fault = Some(Fault::Refuses);
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
            Event::Finish { server, generation } => self.finish(server as usize, generation),
            Event::Timeout { request, arrival } => self.time_out(request, arrival),
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
            Event::Neighbour { server } => self.move_neighbour(server as usize),
            Event::Window => self.window(),
            Event::Trouble => self.trouble(true),
            Event::TroubleEnds => self.trouble(false),
            Event::Warm => self.warm_up(),
        }
    }

    fn finish(&mut self, server: usize, generation: u64) {
        if self.servers[server].generation == generation {
            let now = self.now;
            if let Some(request) = self.servers[server].finish(now) {
                self.answer(request);
            }
            self.reschedule(server);
        }
    }

    fn time_out(&mut self, request: RequestId, serial: u32) {
        let request = self.requests.get(request);
        if request.serial == serial
            && let Some(ticket) = request.ticket.take()
        {
            let proxy = request.proxy as usize;
            self.measured.failed += u64::from(self.measuring());
            let now = self.instant();
            self.proxies[proxy].done(ticket, Outcome::Failed, None, now);
        }
    }

    /// A neighbour moves out, and another one moves in elsewhere.
    fn move_neighbour(&mut self, server: usize) {
        self.change(server, |server| server.stolen = 0.0);
        let undisturbed: Vec<u32> = (0..self.servers.len() as u32)
            .filter(|other| self.servers[*other as usize].stolen == 0.0)
            .collect();
        let next = undisturbed[self.nature.usize(..undisturbed.len())];
        self.disturb(next);
    }

    /// The caches of the server that joined become warmer.
    fn warm_up(&mut self) {
        let last = self.servers.len() - 1;
        let warmth = (self.servers[last].warmth + 0.07).min(1.0);
        self.change(last, |server| server.warmth = warmth);
        if warmth < 1.0 {
            self.at(self.now + WARM_UP / 10.0, Event::Warm);
        }
    }

    /// A third of the servers.
    fn third(&self) -> usize {
        self.servers.len() / 3
    }

    /// The servers that are to have a fault now, `since` after the trouble began.
    fn faulty(&self, since: Seconds) -> std::ops::Range<usize> {
        match self.scenario.trouble {
            Trouble::Fails(_) if since < FAILS_FOR => 0..1,
            Trouble::ThirdFails(_) if since < FAILS_FOR => 0..self.third(),
            Trouble::FailInTurn(_) if since < TURN * self.third() as f64 => {
                let turn = (since / TURN) as usize;
                turn..turn + 1
            }
            _ => 0..0,
        }
    }

    fn set_faults(&mut self, fault: Fault) -> Option<Seconds> {
        let since = self.now - self.scenario.warm - TROUBLE_AFTER;
        // The clock may be a little before the end of a turn.
        let faulty = self.faulty(since + 1e-6);
        for (index, server) in self.servers.iter_mut().enumerate() {
            server.fault = faulty.contains(&index).then_some(fault);
        }
        (!faulty.is_empty()).then_some(TURN)
    }

    fn trouble(&mut self, begins: bool) {
        let ends = match self.scenario.trouble {
            Trouble::None => return,
            Trouble::Fails(fault) | Trouble::ThirdFails(fault) | Trouble::FailInTurn(fault) => {
                if let Some(after) = self.set_faults(fault) {
                    self.at(self.now + after, Event::TroubleEnds);
                }
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
                        self.servers[index].fault = begins.then_some(Fault::Fast);
                    }
                }
                Some(30.0)
            }
        };
        if begins && let Some(after) = ends {
            self.at(self.now + after, Event::TroubleEnds);
        }
    }

    fn arrive(&mut self) {
        let rate = self.rate * if self.burst { 2.0 } else { 1.0 };
        let pause = -(1.0 - self.nature.f64()).ln() / rate;
        let work = self.scenario.work.draw(&mut self.nature);
        let proxy = match self.scenario.is_uneven && self.nature.bool() {
            true => 0,
            false => self.nature.u32(..self.proxies.len() as u32),
        };
        self.at(self.now + pause, Event::Arrival);
        let Some(ticket) = self.pick(proxy as usize) else {
            self.measured.failed += u64::from(self.measuring());
            self.measured.requests += u64::from(self.measuring());
            return;
        };
        let server = ticket.server;
        let arrival = self.now;
        let (id, serial) = self.requests.add(Request {
            arrival,
            serial: 0,
            server: server as u32,
            proxy,
            in_flight: self.servers[server].in_flight() as u32 + 1,
            ticket: Some(ticket),
        });
        if self.measuring() {
            self.measured.requests += 1;
            self.count_faults(server);
            let near = self.view.zone(server) == self.view.zone_of_proxy(proxy as usize);
            self.measured.near += u64::from(near);
        }
        if self.scenario.trouble == Trouble::Hangs {
            let timeout = Event::Timeout {
                request: id,
                arrival: serial,
            };
            self.at(arrival + TIMEOUT, timeout);
        }
        if self.servers[server].fault == Some(Fault::Fast) {
            // It is finished before anything else happens.
            self.answer(id);
            return;
        }
        self.servers[server].accept(arrival, id, work);
        self.reschedule(server);
    }

    /// The server that takes a request, after those that refuse a connection.
    fn pick(&mut self, proxy: usize) -> Option<Ticket> {
        let now = self.instant();
        let mut tried = Vec::new();
        while tried.len() < TRIES {
            let router = &mut self.proxies[proxy];
            let ticket = match tried.is_empty() {
                true => router.pick(&self.servers, &mut self.rng, now)?,
                false => router.pick_again(&tried, &self.servers, &mut self.rng, now)?,
            };
            if self.servers[ticket.server].fault != Some(Fault::Refuses) {
                return Some(ticket);
            }
            tried.push(ticket.server);
            router.done(ticket, Outcome::Refused, None, now);
        }
        None
    }

    /// Counts the requests of servers that fail, and of those that have failed.
    fn count_faults(&mut self, server: usize) {
        let since = self.now - self.scenario.warm - TROUBLE_AFTER;
        let is_to_fail = self.faulty(0.0).contains(&server);
        let now = self.faulty(since);
        if since < 0.0 {
            self.measured.before_faults.add(is_to_fail);
        } else if !now.is_empty() {
            self.measured.faulty = now.len() as u64;
            let is_faulty = self.servers[server].fault.is_some();
            self.measured.while_faulty.add(is_faulty);
        } else if since > FAILS_FOR + RETURNS_WITHIN {
            self.measured.after_faults.add(is_to_fail);
        }
    }

    fn answer(&mut self, id: RequestId) {
        let request = self.requests.get(id);
        let (server, proxy) = (request.server as usize, request.proxy as usize);
        let (arrival, in_flight) = (request.arrival, request.in_flight);
        let ticket = request.ticket.take();
        self.requests.free(id);
        let Some(ticket) = ticket else { return };
        let now = self.instant();
        let measured = arrival >= self.scenario.warm;
        if self.servers[server].fails() {
            self.measured.failed += u64::from(measured);
            self.proxies[proxy].done(ticket, Outcome::Failed, None, now);
            return;
        }
        let mut latency = self.now - arrival;
        self.servers[server].record(in_flight, latency);
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
            self.measured.latencies.push(latency as f32);
            let joined = self.scenario.warm + TROUBLE_AFTER;
            if server == self.servers.len() - 1 && (joined..joined + 30.0).contains(&arrival) {
                self.measured.joined.push(latency as f32);
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
        // What the neighbour uses counts as used.
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

    /// Adds what the server has used since the last call to its next report and to the window.
    fn collect(&mut self, index: usize) {
        let busy = self.servers[index].take_busy(self.now);
        self.busy[index] += busy;
        self.measured.window_busy[index] += busy;
    }

    fn window(&mut self) {
        let now = self.now;
        for index in 0..self.servers.len() {
            self.collect(index);
            let is_measured = self.now > self.scenario.warm;
            let cores = self.servers[index].cores;
            self.measured.end_window(index, cores, is_measured);
        }
        self.at(now + 1.0, Event::Window);
    }
}

//! A server: its cores, its discipline, and neighbours that take a part of it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::units::{RequestId, Seconds};

/// How a server shares itself among requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discipline {
    /// All requests at the same time: each gets a core, or an equal part of all cores if there are
    /// too few.
    ProcessorSharing,
    /// All requests at the same time, and a single request gets the whole server: classical processor
    /// sharing, where size is speed.
    Pipe,
    /// One request per core; the others wait in the order in which they came.
    Fifo,
}

/// How many answers a server remembers, and of how many it tells the latency.
const RECENT: usize = 64;
const ALIKE: usize = 16;

/// How a server fails requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It does not take connections.
    Refuses,
    /// Each at once.
    Fast,
    /// Each after the work is done.
    Slow,
    /// Each third one, after the work is done.
    EachThird,
}

/// A request finishes when the work done for each request, `progress` since the server started, has
/// reached what it needs. Progress runs at the rate that every request in service gets.
pub struct Server {
    pub cores: f64,
    pub discipline: Discipline,
    /// The part taken by a neighbour, 0 to 1.
    pub stolen: f64,
    pub fault: Option<Fault>,
    /// The latencies of its last answers, with the requests that were in flight when they began.
    recent: VecDeque<(u32, Seconds)>,
    /// How many requests it has answered since it has a fault.
    answers: u64,
    /// It does nothing at all.
    pub hanging: bool,
    /// Its speed relative to its final one: caches are cold after a start.
    pub warmth: f64,
    progress: f64,
    since: Seconds,
    in_service: BinaryHeap<Reverse<Finish>>,
    waiting: VecDeque<(RequestId, f64)>,
    /// Marks the events that are still valid.
    pub generation: u64,
    /// Core seconds used.
    busy: f64,
    pub served: u64,
}

#[derive(Debug, PartialEq)]
struct Finish {
    at: f64,
    request: RequestId,
}

impl Eq for Finish {}

impl PartialOrd for Finish {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Finish {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at.total_cmp(&other.at)).then(self.request.cmp(&other.request))
    }
}

impl Server {
    pub fn new(cores: f64, discipline: Discipline) -> Self {
        Self {
            cores,
            discipline,
            stolen: 0.0,
            fault: None,
            recent: VecDeque::new(),
            answers: 0,
            hanging: false,
            warmth: 1.0,
            progress: 0.0,
            since: 0.0,
            in_service: BinaryHeap::new(),
            waiting: VecDeque::new(),
            generation: 0,
            busy: 0.0,
            served: 0,
        }
    }

    /// Takes notice of an answer.
    pub fn record(&mut self, in_flight: u32, latency: Seconds) {
        self.recent.push_back((in_flight, latency));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    /// What it says to a probe that asks for its latency: the median of those of its last answers that
    /// began with about as many requests in flight.
    pub fn expected_latency(&self) -> Seconds {
        let now = self.in_flight() as u32 + 1;
        let mut recent: Vec<_> = self.recent.iter().copied().collect();
        recent.sort_unstable_by_key(|(in_flight, _)| in_flight.abs_diff(now));
        recent.truncate(ALIKE);
        let middle = recent.len() / 2;
        recent.sort_unstable_by(|(_, one), (_, two)| one.total_cmp(two));
        recent.get(middle).map_or(0.0, |(_, latency)| *latency)
    }

    /// Whether it fails the request that it answers now.
    pub fn fails(&mut self) -> bool {
        self.answers += 1;
        match self.fault {
            None => false,
            Some(Fault::EachThird) => self.answers.is_multiple_of(3),
            Some(Fault::Refuses | Fault::Fast | Fault::Slow) => true,
        }
    }

    /// Cores that are left for requests.
    pub fn capacity(&self) -> f64 {
        if self.hanging {
            return 0.0;
        }
        self.cores * (1.0 - self.stolen) * self.warmth
    }

    pub fn in_flight(&self) -> usize {
        self.in_service.len() + self.waiting.len()
    }

    /// Requests that no core is working on.
    pub fn queue(&self) -> f64 {
        match self.discipline {
            Discipline::Pipe => self.in_service.len().saturating_sub(1) as f64,
            Discipline::ProcessorSharing => (self.in_flight() as f64 - self.cores).max(0.0).floor(),
            Discipline::Fifo => self.waiting.len() as f64,
        }
    }

    fn slots(&self) -> usize {
        match self.discipline {
            Discipline::ProcessorSharing | Discipline::Pipe => usize::MAX,
            Discipline::Fifo => self.cores.round() as usize,
        }
    }

    /// Work per second for each request in service.
    fn rate(&self) -> f64 {
        if self.in_service.is_empty() {
            return 0.0;
        }
        let in_service = self.in_service.len() as f64;
        let share = self.capacity() / in_service;
        match self.discipline {
            Discipline::Pipe => share,
            Discipline::ProcessorSharing | Discipline::Fifo => share.min(self.warmth),
        }
    }

    /// Simulates it up to `now`. To be called before anything about it changes.
    pub fn advance(&mut self, now: Seconds) {
        let passed = now - self.since;
        self.since = now;
        let rate = self.rate();
        self.progress += rate * passed;
        self.busy += rate / self.warmth * self.in_service.len() as f64 * passed;
    }

    /// Core seconds used since the last call.
    pub fn take_busy(&mut self, now: Seconds) -> f64 {
        self.advance(now);
        std::mem::take(&mut self.busy)
    }

    pub fn accept(&mut self, now: Seconds, request: RequestId, work: f64) {
        self.advance(now);
        if self.in_service.len() < self.slots() {
            self.serve(request, work);
        } else {
            self.waiting.push_back((request, work));
        }
    }

    fn serve(&mut self, request: RequestId, work: f64) {
        let at = self.progress + work;
        self.in_service.push(Reverse(Finish { at, request }));
    }

    /// When the next request is done, if nothing changes.
    pub fn next_finish(&self) -> Option<Seconds> {
        let rate = self.rate();
        let Reverse(next) = self.in_service.peek()?;
        (rate > 0.0).then(|| self.since + ((next.at - self.progress) / rate).max(0.0))
    }

    /// The request that is done now.
    pub fn finish(&mut self, now: Seconds) -> Option<RequestId> {
        self.advance(now);
        let Reverse(done) = self.in_service.pop()?;
        self.served += 1;
        if let Some((request, work)) = self.waiting.pop_front() {
            self.serve(request, work);
        }
        Some(done.request)
    }
}

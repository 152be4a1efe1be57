//! What the proxy counts of its requests, in all and for each backend, for pages and metrics.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::last_clients::LastClients;
use super::unserved::Unserved;

/// The upper limits of the buckets of a [`LatencyCounts`], in seconds. Above the last one there is one more
/// bucket.
pub const LATENCY_BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// The same in microseconds.
const MICROSECONDS: [u64; LATENCY_BUCKETS.len()] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Durations, counted by bucket.
#[derive(Debug, Default)]
struct Latencies {
    buckets: [AtomicU64; LATENCY_BUCKETS.len() + 1],
    microseconds: AtomicU64,
}

impl Latencies {
    fn count(&self, duration: Duration) {
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = MICROSECONDS.partition_point(|limit| *limit < microseconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
    }

    fn counts(&self) -> LatencyCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        LatencyCounts {
            buckets: std::array::from_fn(|index| get(&self.buckets[index])),
            sum: Duration::from_micros(get(&self.microseconds)),
        }
    }
}

/// Durations since the start, by bucket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencyCounts {
    /// How many were at most as long as the limit in [`LATENCY_BUCKETS`], and longer than the one before.
    pub buckets: [u64; LATENCY_BUCKETS.len() + 1],
    /// The sum of all.
    pub sum: Duration,
}

impl LatencyCounts {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The duration that a part of them, from 0 to 1, does not exceed: interpolated within its bucket, and
    /// 60 s for all that were longer. `None` if there are none.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let wanted = self.count() as f64 * part.clamp(0.0, 1.0);
        let (mut below, mut from) = (0.0, 0.0);
        for (count, to) in self.buckets.iter().zip(LATENCY_BUCKETS) {
            let count = *count as f64;
            if count > 0.0 && below + count >= wanted {
                let seconds = from + (to - from) * ((wanted - below) / count);
                return Some(Duration::from_secs_f64(seconds));
            }
            below += count;
            from = to;
        }
        (self.count() > 0).then(|| Duration::from_secs_f64(from))
    }
}

/// The requests to one backend.
#[derive(Debug, Default)]
struct BackendCounters {
    answered: Latencies,
    failed: AtomicU64,
    clients: LastClients,
}

/// A response of a backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    /// How long it took.
    pub(super) after: Duration,
    pub(super) client: Option<IpAddr>,
    pub(super) now: Instant,
}

/// The requests to one backend since it has been known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackendCounts {
    /// How long it took until it answered, for those that it has answered.
    pub answered: LatencyCounts,
    /// The requests that failed, or were answered by a failure.
    pub failed: u64,
}

/// What has become of requests since the start.
#[derive(Debug, Default)]
pub struct RequestStatistics {
    begun: AtomicU64,
    retried: AtomicU64,
    /// By the first digit of the status; 0 for those without one.
    by_class: [Latencies; 6],
    connected: AtomicU64,
    unserved: [AtomicU64; Unserved::ALL.len()],
    calls: [AtomicU64; CALLS],
    backends: Backends,
}

/// The statuses of gRPC from 0 on, and one for what is none.
const CALLS: usize = 18;

/// In parts, because the first request to each backend copies one of them.
#[derive(Debug)]
struct Backends {
    parts: Box<[Part]>,
    /// How many there are in all.
    count: AtomicUsize,
}

type Part = ArcSwap<HashMap<SocketAddr, Arc<BackendCounters>>>;

/// The number of parts is 2 to the power of this.
const PARTS: u32 = 6;

impl Default for Backends {
    fn default() -> Self {
        Self {
            parts: (0..1 << PARTS).map(|_| ArcSwap::default()).collect(),
            count: AtomicUsize::new(0),
        }
    }
}

impl Backends {
    fn part_of(&self, addr: SocketAddr) -> &Part {
        let ip = match addr.ip() {
            IpAddr::V4(ip) => u64::from(u32::from(ip)),
            IpAddr::V6(ip) => {
                let bits = u128::from(ip);
                (bits >> 64) as u64 ^ bits as u64
            }
        };
        // Addresses differ in whatever digits; the upper bits of the product depend on all of them.
        let mixed =
            (ip << 16 ^ ip >> 48 ^ u64::from(addr.port())).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &self.parts[(mixed >> (64 - PARTS)) as usize]
    }
}

/// The counts of [`RequestStatistics`] at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestCounts {
    /// Requests that have begun.
    pub begun: u64,
    /// How often a request was sent again, or another backend was tried.
    pub retried: u64,
    /// How long requests took, by the first digit of the status that the client got; 0 for those that
    /// ended without one, because the client was gone.
    pub by_class: [LatencyCounts; 6],
    /// Connections that were made to backends. The other requests used one that was there.
    pub connected: u64,
    /// Requests for which no backend was found, or no other one after those that were tried, by reason.
    pub without_backend: [(&'static str, u64); 7],
    /// Calls of gRPC that have ended, by their status: 0 to 16, and all others in the last one. Those whose response
    /// broke off have none.
    pub calls: [u64; 18],
}

impl RequestCounts {
    /// Requests that have ended.
    pub fn ended(&self) -> u64 {
        self.by_class.iter().map(LatencyCounts::count).sum()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u64 {
        self.begun.saturating_sub(self.ended())
    }
}

impl RequestStatistics {
    /// The counts of all requests now.
    pub fn counts(&self) -> RequestCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        // The ended ones first, so that there are never more of them than have begun.
        let by_class = std::array::from_fn(|class| self.by_class[class].counts());
        RequestCounts {
            by_class,
            begun: get(&self.begun),
            retried: get(&self.retried),
            connected: get(&self.connected),
            without_backend: std::array::from_fn(|index| {
                (Unserved::ALL[index].label(), get(&self.unserved[index]))
            }),
            calls: std::array::from_fn(|status| get(&self.calls[status])),
        }
    }

    /// The counts of one backend.
    pub fn backend(&self, addr: SocketAddr) -> BackendCounts {
        let backends = self.backends.part_of(addr).load();
        backends
            .get(&addr)
            .map_or_else(BackendCounts::default, |counters| BackendCounts {
                answered: counters.answered.counts(),
                failed: counters.failed.load(Ordering::Relaxed),
            })
    }

    pub(super) fn begins(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ends(&self, status: Option<u16>, tries: usize, took: Duration) {
        // A status from 600 on, which there is none of, is a failure of the backend (RFC 9110, section 15).
        let class = status.map_or(0, |status| usize::from(status / 100).min(5));
        self.by_class[class].count(took);
        if tries > 1 {
            self.retried.fetch_add(tries as u64 - 1, Ordering::Relaxed);
        }
    }

    /// A connection to a backend was made.
    pub(super) fn connected(&self) {
        self.connected.fetch_add(1, Ordering::Relaxed);
    }

    /// No backend was found for a request.
    pub(super) fn unserved(&self, reason: Unserved) {
        self.unserved[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A call of gRPC has ended with this status.
    pub(super) fn call_ends(&self, status: u16) {
        let at = usize::from(status).min(CALLS - 1);
        self.calls[at].fetch_add(1, Ordering::Relaxed);
    }

    fn with_backend<T>(&self, addr: SocketAddr, then: impl FnOnce(&BackendCounters) -> T) -> T {
        let backends = self.backends.part_of(addr).load();
        match backends.get(&addr) {
            Some(counters) => then(counters),
            None => then(&self.insert(addr)),
        }
    }

    /// A backend has answered, or has failed.
    pub(super) fn backend_ends(&self, addr: SocketAddr, answered: Option<Answered>) {
        self.with_backend(addr, |counters| match answered {
            Some(answered) => {
                counters.answered.count(answered.after);
                counters.clients.note(answered.client, false, answered.now);
            }
            None => _ = counters.failed.fetch_add(1, Ordering::Relaxed),
        });
    }

    /// A backend refuses a client for a while. Whether it does that to most of its clients.
    pub(super) fn refuses_most(
        &self,
        addr: SocketAddr,
        client: Option<IpAddr>,
        now: Instant,
    ) -> bool {
        self.with_backend(addr, |counters| {
            counters.clients.note(client, true, now);
            counters.clients.are_mostly_refused(now)
        })
    }

    fn insert(&self, addr: SocketAddr) -> Arc<BackendCounters> {
        let new = Arc::<BackendCounters>::default();
        let part = self.backends.part_of(addr);
        part.rcu(|backends| {
            let mut backends = HashMap::clone(backends);
            backends.entry(addr).or_insert_with(|| new.clone());
            backends
        });
        let kept = part
            .load()
            .get(&addr)
            .cloned()
            .unwrap_or_else(|| new.clone());
        // Another thread may have been first.
        let is_new = Arc::ptr_eq(&kept, &new);
        self.backends
            .count
            .fetch_add(usize::from(is_new), Ordering::Relaxed);
        kept
    }

    /// How many backends are counted, about.
    pub(super) fn backends(&self) -> usize {
        self.backends.count.load(Ordering::Relaxed)
    }

    /// Forgets all other backends.
    pub(super) fn retain(&self, backends: &HashSet<SocketAddr>) {
        let mut count = 0;
        for part in &self.backends.parts {
            if !part.load().keys().all(|addr| backends.contains(addr)) {
                part.rcu(|known| {
                    let known = known.iter().filter(|(addr, _)| backends.contains(addr));
                    known
                        .map(|(addr, counters)| (*addr, counters.clone()))
                        .collect::<HashMap<_, _>>()
                });
            }
            count += part.load().len();
        }
        self.backends.count.store(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_are_the_same_in_both_units() {
        for (seconds, microseconds) in LATENCY_BUCKETS.iter().zip(MICROSECONDS) {
            assert_eq!((seconds * 1e6).round() as u64, microseconds);
        }
    }

    #[test]
    fn durations_are_counted_by_bucket_and_quantiles_lie_within() {
        let latencies = Latencies::default();
        assert_eq!(latencies.counts().quantile(0.5), None);
        for milliseconds in [1, 1, 2, 200, 100_000] {
            latencies.count(Duration::from_millis(milliseconds));
        }
        let counts = latencies.counts();
        assert_eq!(
            (counts.count(), counts.buckets[1], counts.buckets[16]),
            (5, 2, 1)
        );
        let quantile = |part| counts.quantile(part).unwrap().as_secs_f64();
        assert!(
            (0.0005..=0.001).contains(&quantile(0.3)),
            "{}",
            quantile(0.3)
        );
        assert!((0.1..=0.25).contains(&quantile(0.8)));
        assert_eq!(quantile(1.0), 60.0);
    }

    #[test]
    fn requests_and_backends_are_counted_and_backends_forgotten() {
        let statistics = RequestStatistics::default();
        let addr: SocketAddr = "10.0.0.1:80".parse().unwrap();
        for status in [Some(200), Some(503), None, Some(999)] {
            statistics.begins();
            statistics.ends(status, 2, Duration::from_millis(3));
        }
        statistics.begins();
        let counts = statistics.counts();
        assert_eq!(
            (counts.in_flight(), counts.ended(), counts.retried),
            (1, 4, 4)
        );
        assert_eq!(counts.by_class[0].count(), 1);
        assert_eq!(counts.by_class[5].count(), 2);
        let answered = Answered {
            after: Duration::from_millis(1),
            client: None,
            now: Instant::now(),
        };
        statistics.backend_ends(addr, Some(answered));
        statistics.backend_ends(addr, None);
        let backend = statistics.backend(addr);
        assert_eq!((backend.answered.count(), backend.failed), (1, 1));
        let others = (0..1_000).map(|port| SocketAddr::from(([10, 0, 1, 1], port)));
        for other in others {
            statistics.backend_ends(other, None);
        }
        assert_eq!(statistics.backends(), 1_001);
        let parts = statistics.backends.parts.iter();
        assert!(parts.map(|part| part.load().len()).max() < Some(64));
        statistics.retain(&HashSet::from([addr]));
        assert_eq!(statistics.backends(), 1);
        assert_eq!(statistics.backend(addr).failed, 1);
        statistics.retain(&HashSet::new());
        assert_eq!(statistics.backend(addr), BackendCounts::default());
    }
}

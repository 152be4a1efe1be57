//! What lies between a process and the store: a network with faults, and the process's clock.

use std::collections::{BTreeMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use pingora_etcd::ClusterError;
use pingora_etcd::store::{
    Clock, Condition, Entry, Lease, LeaseId, LeaseKeeper, Listing, MemoryStore, Revision, Selector,
    Store, Txn, WatchEvent, WatchRange, Watcher, Write,
};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::check::Checker;
use super::history::Moment;
use super::process::{Process, spawn};

/// How long a call waits for its answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// When a connection that carries nothing is given up.
const DEAD_AFTER: Duration = Duration::from_secs(10);

/// A clock that runs faster or slower than the store's.
#[derive(Debug)]
pub struct Skewed {
    start: Instant,
    rate: f64,
}

impl Skewed {
    pub fn new(rate: f64) -> Self {
        Self {
            start: Instant::now(),
            rate,
        }
    }
}

impl Clock for Skewed {
    fn now(&self) -> Duration {
        self.start.elapsed().mul_f64(self.rate)
    }
}

/// What one process's network does at the moment.
#[derive(Debug, Clone, Default)]
pub struct Weather {
    /// Nothing gets through; nothing is closed.
    pub silent: bool,
    /// Everything is refused at once.
    pub refused: bool,
    /// Of the requests, so many never arrive; 0 to 1.
    pub lost_requests: f64,
    /// Of the answers, so many never arrive, although what was asked was done; 0 to 1.
    pub lost_answers: f64,
    /// Each way takes up to so long.
    pub delay: Duration,
    /// Of the requests, so many come long after their caller has given up; 0 to 1.
    pub stragglers: f64,
}

#[derive(Debug)]
struct State {
    weather: Weather,
    silent_since: Option<Instant>,
    /// Counts connections: what was on an earlier one has ended.
    connection: u64,
}

/// A process's network.
#[derive(Debug)]
pub struct Net {
    state: Mutex<State>,
    /// Unlike a watch channel it wakes in a fixed order. Whoever waits looks at the state anew.
    changed: Notify,
}

impl Net {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                weather: Weather::default(),
                silent_since: None,
                connection: 0,
            }),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn set(&self, weather: Weather) {
        let mut state = self.state();
        state.silent_since = match (weather.silent, state.silent_since) {
            (false, _) => None,
            (true, since) => Some(since.unwrap_or_else(Instant::now)),
        };
        if weather.refused {
            state.connection += 1;
        }
        state.weather = weather;
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn weather(&self) -> Weather {
        self.state().weather.clone()
    }

    fn connection(&self) -> u64 {
        self.state().connection
    }

    /// Gives the connection up: every stream on it ends.
    pub fn hang_up(&self, connection: u64) {
        let mut state = self.state();
        if state.connection == connection {
            state.connection += 1;
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Waits out a silence.
    async fn carry(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.state().weather.silent {
                return;
            }
            changed.await;
        }
    }

    fn delay(&self) -> Duration {
        let most = self.state().weather.delay.max(Duration::from_millis(3));
        most.mul_f64(fastrand::f64())
    }
}

/// Up to when the discovery of each group has been told what happened.
pub type Heard = Arc<Mutex<BTreeMap<String, Moment>>>;

/// The store as one incarnation of a client sees it.
#[derive(Debug, Clone)]
pub struct Client {
    pub store: MemoryStore,
    pub process: Arc<Process>,
    pub net: Arc<Net>,
    pub clock: Arc<Skewed>,
    pub checker: Arc<Checker>,
    /// The store grants so much more than it is asked for.
    pub generosity: Duration,
    /// The leases that it was granted, whether it knows or not.
    leases: Arc<Mutex<HashSet<LeaseId>>>,
    /// The groups that somebody is a member of through it, and since which revision.
    groups: Arc<Mutex<BTreeMap<&'static str, Revision>>>,
    /// Keys that a member wrote which has ended since, and when: nobody counts on them.
    strays: Arc<Mutex<HashSet<(String, Revision)>>>,
    pub heard: Heard,
    /// Of which cluster the nodes of each group were listed last.
    listed: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// That a group has a running member.
#[derive(Debug)]
pub struct Presence {
    client: Client,
    group: &'static str,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.client.groups.lock().unwrap().remove(self.group);
    }
}

impl Client {
    pub fn new(
        store: &MemoryStore,
        process: &Arc<Process>,
        checker: &Arc<Checker>,
        generosity: Duration,
    ) -> Self {
        Self {
            store: store.clone(),
            process: process.clone(),
            net: process.net.clone(),
            clock: process.clock.clone(),
            checker: checker.clone(),
            generosity,
            leases: Arc::default(),
            groups: Arc::default(),
            strays: Arc::default(),
            heard: Arc::default(),
            listed: Arc::default(),
        }
    }

    pub fn enter(&self, group: &'static str) -> Presence {
        let since = self.store.revision();
        self.groups.lock().unwrap().insert(group, since);
        Presence {
            client: self.clone(),
            group,
        }
    }

    /// A lease is not ended under a member that counts on it.
    fn check_revocation(&self, lease: LeaseId) {
        if !self.owns(lease) {
            let text = format!("lease {lease} is revoked by another");
            return self.checker.violation(text);
        }
        if self.clock.now() >= self.checker.deadline(lease) {
            return;
        }
        let groups = self.groups.lock().unwrap();
        let strays = self.strays.lock().unwrap();
        for entry in self.store.entries() {
            if entry.lease == Some(lease)
                && let Some(group) = entry.key.split('/').nth(1)
                // Not of one that was there before.
                && groups.get(group).is_some_and(|since| entry.create_revision > *since)
                && !strays.contains(&(entry.key.clone(), entry.create_revision))
            {
                let text = format!("{} is revoked under a running member", entry.key);
                return self.checker.violation(text);
            }
        }
    }

    fn owns(&self, lease: LeaseId) -> bool {
        self.leases.lock().unwrap().contains(&lease)
    }

    /// One request and its answer, each of which may be late or lost.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        patience: Duration,
        request: impl FnOnce(Self) -> F + Send + 'static,
    ) -> Result<T, ClusterError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ClusterError>> + Send,
    {
        self.checker.called();
        let weather = self.net.weather();
        if weather.refused {
            return Err(unavailable(operation, "connection refused"));
        }
        let connection = self.net.connection();
        let (answer, answered) = oneshot::channel();
        let client = self.clone();
        let history = self.checker.history();
        let lost = fastrand::f64() < weather.lost_requests;
        let lost_answer = fastrand::f64() < weather.lost_answers;
        let straggles = fastrand::f64() < weather.stragglers;
        let survives_hang_up = fastrand::bool();
        // What is on the wire goes on whatever becomes of its sender.
        tokio::spawn(async move {
            let net = client.net.clone();
            sleep(net.delay()).await;
            if straggles {
                sleep(PATIENCE.mul_f64(1.0 + 2.0 * fastrand::f64())).await;
            }
            net.carry().await;
            let hung_up = net.connection() != connection;
            // Data is restored into a server that was started anew: what was sent to the one before
            // it does not reach it, however late it is.
            let has_another_server = client.checker.history() != history;
            if lost || (hung_up && !survives_hang_up) || has_another_server {
                return;
            }
            let result = request(client).await;
            if lost_answer {
                return;
            }
            sleep(net.delay()).await;
            net.carry().await;
            // Nobody hears an answer on a connection that was given up.
            if net.connection() == connection {
                let _ = answer.send(result);
            }
        });
        match timeout(patience, answered).await {
            Ok(Ok(result)) => result,
            // The task is gone without an answer: the same as silence.
            late => {
                if late.is_ok() {
                    sleep(patience).await;
                }
                self.net.hang_up(connection);
                Err(ClusterError::Timeout {
                    endpoint: "simulated".to_owned(),
                    operation,
                    after: patience,
                })
            }
        }
    }

    /// What a run sent that has ended since, perhaps with another one in its place.
    fn note_strays(&self, txn: &Txn, at: Revision, members: &BTreeMap<&'static str, Revision>) {
        let now = self.groups.lock().unwrap();
        for write in &txn.writes {
            if let Write::Put { key, .. } = write
                && let Some(group) = key.split('/').nth(1)
                && members.get(group) != now.get(group)
            {
                self.strays.lock().unwrap().insert((key.clone(), at));
            }
        }
    }

    /// Nobody removes what is not his, nor replaces what he has not looked at.
    fn check_writes(&self, txn: &Txn, before: &[Entry]) {
        for write in &txn.writes {
            let (Write::Delete { key } | Write::Put { key, .. }) = write;
            let entry = before.iter().find(|entry| entry.key == *key);
            let Some(lease) = entry.and_then(|entry| entry.lease) else {
                continue;
            };
            if self.owns(lease) {
                continue;
            }
            let is_removed = matches!(write, Write::Delete { .. });
            let is_looked_at = txn.conditions.iter().any(|condition| match condition {
                Condition::Absent(of) | Condition::HeldBy(of, _) | Condition::CreatedAt(of, _) => {
                    of == key
                }
            });
            if is_removed || !is_looked_at {
                self.checker
                    .violation(format!("{key} of lease {lease} is removed by another"));
            }
        }
    }
}

fn unavailable(operation: &'static str, reason: &str) -> ClusterError {
    ClusterError::Unavailable {
        endpoint: "simulated".to_owned(),
        operation,
        reason: reason.to_owned(),
    }
}

#[async_trait]
impl Store for Client {
    fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        let sent = self.clock.now();
        let ttl = ttl + self.generosity;
        let lease = self
            .call("grant", PATIENCE, move |client| async move {
                let lease = client.store.grant(ttl).await?;
                client.leases.lock().unwrap().insert(lease.id);
                Ok(lease)
            })
            .await?;
        self.checker.acknowledged(lease.id, sent, lease.ttl);
        Ok(lease)
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        Box::new(Keeper {
            client: self.clone(),
            lease,
        })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.call("revoke", PATIENCE, move |client| async move {
            client.check_revocation(lease);
            client.store.revoke(lease).await
        })
        .await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.call("lease", PATIENCE, move |client| async move {
            client.store.keys_of(lease).await
        })
        .await
    }

    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) -> AbortHandle {
        spawn(&self.process, &self.checker, task).abort_handle()
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let members = self.groups.lock().unwrap().clone();
        self.call("txn", PATIENCE, move |client| async move {
            let before: Vec<_> = txn
                .writes
                .iter()
                .filter_map(|write| {
                    let (Write::Delete { key } | Write::Put { key, .. }) = write;
                    client.store.entry(key)
                })
                .collect();
            let line = client.checker.line_of(&before);
            let result = client.store.txn(txn.clone()).await;
            if let Ok(Some(revision)) = result {
                client.note_strays(&txn, revision, &members);
                client.check_writes(&txn, &before);
                client.checker.left_the_line(&txn, &before, line);
                client.checker.committed(&txn);
            }
            result
        })
        .await
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        let of = |kind: &str| match keys {
            Selector::Prefix(prefix) => prefix
                .strip_prefix(kind)
                .map(|group| group.trim_end_matches('/').to_owned()),
            Selector::Key(_) => None,
        };
        // A discovery lists the candidates last, as they were when it listed the nodes.
        let (nodes, candidates) = (of("registry/"), of("election/").filter(|_| at.is_some()));
        let keys = keys.clone();
        let (listing, moment) = self
            .call("list", PATIENCE, move |client| async move {
                let listing = client.store.list(&keys, at).await?;
                let moment = client.checker.moment(listing.revision);
                Ok((listing, moment))
            })
            .await?;
        let mut listed = self.listed.lock().unwrap();
        if let Some(group) = nodes {
            listed.insert(group, listing.cluster_id);
        }
        // Those of another cluster than the nodes' say nothing: it lists both again.
        if let Some(group) = candidates
            && listed.get(&group) == Some(&listing.cluster_id)
        {
            self.heard.lock().unwrap().insert(group, moment);
        }
        drop(listed);
        Ok(listing)
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let connection = self.net.connection();
        // Nobody but a discovery watches all nodes.
        let registry = ranges.iter().find_map(|range| match &range.keys {
            Selector::Prefix(prefix) => prefix.strip_prefix("registry/"),
            Selector::Key(_) => None,
        });
        let group = registry.map(|group| group.trim_end_matches('/').to_owned());
        let inner = self
            .call("watch", PATIENCE, move |client| async move {
                client.store.watch(ranges).await
            })
            .await?;
        Ok(Box::new(Watching {
            net: self.net.clone(),
            connection,
            told: inner.position().to_vec(),
            inner,
            on_the_way: None,
            client: self.clone(),
            group,
        }))
    }
}

struct Keeper {
    client: Client,
    lease: Lease,
}

#[async_trait]
impl LeaseKeeper for Keeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let (client, lease) = (self.client.clone(), self.lease);
        let sent = client.clock.now();
        let ttl = client
            .call("renew", within, move |client| async move {
                let mut keeper = client.store.keeper(lease);
                keeper.renew(PATIENCE).await
            })
            .await?;
        client.checker.acknowledged(lease.id, sent, ttl);
        Ok(ttl)
    }
}

struct Watching {
    net: Arc<Net>,
    connection: u64,
    inner: Box<dyn Watcher>,
    /// Events that have been sent, when they arrive, and how far they tell.
    on_the_way: Option<(Instant, Vec<WatchEvent>, Vec<WatchRange>, Moment)>,
    told: Vec<WatchRange>,
    client: Client,
    /// Of the discovery that watches.
    group: Option<String>,
}

#[async_trait]
impl Watcher for Watching {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        let net = self.net.clone();
        loop {
            // Made before looking: what comes in between is not missed.
            let changed = net.changed.notified();
            let (silent_since, connection) = {
                let state = self.net.state();
                (state.silent_since, state.connection)
            };
            if connection != self.connection {
                return Err(unavailable("watch", "the connection was given up"));
            }
            if let Some(since) = silent_since {
                tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(since + DEAD_AFTER) => self.net.hang_up(connection),
                }
                continue;
            }
            if let Some((due, ..)) = &self.on_the_way {
                tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(*due) => {
                        if let Some((_, events, told, moment)) = self.on_the_way.take() {
                            self.told = told;
                            if let Some(group) = &self.group {
                                self.client.heard.lock().unwrap().insert(group.clone(), moment);
                            }
                            return Ok(events);
                        }
                    }
                }
                continue;
            }
            tokio::select! {
                biased;
                () = changed => {}
                events = self.inner.next() => {
                    let due = Instant::now() + self.net.delay();
                    let told = self.inner.position().to_vec();
                    let events = events?;
                    let newest = events.iter().map(WatchEvent::revision).max();
                    let moment = self.client.checker.moment(newest.unwrap_or(0));
                    self.on_the_way = Some((due, events, told, moment));
                }
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.told
    }
}

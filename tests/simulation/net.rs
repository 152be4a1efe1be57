//! What lies between a process and the store: a network with faults, and the clock of the process.

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

/// How long a call waits for its response.
const REQUEST_LIMIT: Duration = Duration::from_secs(3);
/// When a silent connection is considered dead.
const DEAD_AFTER: Duration = Duration::from_secs(10);

/// A clock that runs faster or slower than the store's.
#[derive(Debug)]
pub struct SkewedClock {
    start: Instant,
    rate: f64,
}

impl SkewedClock {
    pub fn new(rate: f64) -> Self {
        Self {
            start: Instant::now(),
            rate,
        }
    }
}

impl Clock for SkewedClock {
    fn now(&self) -> Duration {
        self.start.elapsed().mul_f64(self.rate)
    }
}

/// The current faults of one process's network.
#[derive(Debug, Clone, Default)]
pub struct NetFaults {
    /// Nothing is delivered; nothing is closed.
    pub silent: bool,
    /// Every request is refused immediately.
    pub refused: bool,
    /// The part of the requests that never arrive, from 0 to 1.
    pub lost_requests: f64,
    /// The part of the responses that never arrive although the request was carried out, from 0 to
    /// 1.
    pub lost_responses: f64,
    /// The maximum delay in each direction.
    pub delay: Duration,
    /// The part of the requests that arrive long after their caller has given up, from 0 to 1.
    pub late_requests: f64,
}

#[derive(Debug)]
struct State {
    faults: NetFaults,
    silent_since: Option<Instant>,
    /// The number of the current connection: streams of earlier connections have ended.
    connection: u64,
}

/// The network of one process.
#[derive(Debug)]
pub struct Net {
    state: Mutex<State>,
    /// Unlike a watch channel it wakes waiters in a fixed order. Each waiter reads the state again.
    changed: Notify,
}

impl Net {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                faults: NetFaults::default(),
                silent_since: None,
                connection: 0,
            }),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn set(&self, faults: NetFaults) {
        let mut state = self.state();
        state.silent_since = match (faults.silent, state.silent_since) {
            (false, _) => None,
            (true, since) => Some(since.unwrap_or_else(Instant::now)),
        };
        if faults.refused {
            state.connection += 1;
        }
        state.faults = faults;
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn faults(&self) -> NetFaults {
        self.state().faults.clone()
    }

    fn connection(&self) -> u64 {
        self.state().connection
    }

    /// Closes the connection, which ends every stream on it.
    pub fn close(&self, connection: u64) {
        let mut state = self.state();
        if state.connection == connection {
            state.connection += 1;
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Waits until the network is not silent.
    async fn wait_while_silent(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.state().faults.silent {
                return;
            }
            changed.await;
        }
    }

    fn delay(&self) -> Duration {
        let most = self.state().faults.delay.max(Duration::from_millis(3));
        most.mul_f64(fastrand::f64())
    }
}

/// The moment of the last event that was delivered to the discovery of each group.
pub type Delivered = Arc<Mutex<BTreeMap<String, Moment>>>;

/// The store as one client of a process sees it.
#[derive(Debug, Clone)]
pub struct Client {
    pub store: MemoryStore,
    pub process: Arc<Process>,
    pub net: Arc<Net>,
    pub clock: Arc<SkewedClock>,
    pub checker: Arc<Checker>,
    /// How much longer the granted TTL is than the requested one.
    pub extra_ttl: Duration,
    /// The leases that were granted to this client, whether it received the response or not.
    leases: Arc<Mutex<HashSet<LeaseId>>>,
    /// The groups with a running member that uses this client, and the revision at which it
    /// started.
    groups: Arc<Mutex<BTreeMap<&'static str, Revision>>>,
    /// Keys, with their revision, that were written by a member that has ended: no running member
    /// relies on them.
    orphaned: Arc<Mutex<HashSet<(String, Revision)>>>,
    pub delivered: Delivered,
    /// The id of the cluster from which the nodes of each group were last listed.
    listed: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// Marks a group as having a running member, until it is dropped.
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
        extra_ttl: Duration,
    ) -> Self {
        Self {
            store: store.clone(),
            process: process.clone(),
            net: process.net.clone(),
            clock: process.clock.clone(),
            checker: checker.clone(),
            extra_ttl,
            leases: Arc::default(),
            groups: Arc::default(),
            orphaned: Arc::default(),
            delivered: Arc::default(),
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

    /// A lease must not be revoked while a running member relies on it.
    fn check_revocation(&self, lease: LeaseId) {
        if !self.owns(lease) {
            let text = format!("lease {lease} is revoked by another client");
            return self.checker.violation(text);
        }
        if self.clock.now() >= self.checker.deadline(lease) {
            return;
        }
        let groups = self.groups.lock().unwrap();
        let orphaned = self.orphaned.lock().unwrap();
        for entry in self.store.entries() {
            if entry.lease == Some(lease)
                && let Some(group) = entry.key.split('/').nth(1)
                // Keys from before the member started are not its own.
                && groups.get(group).is_some_and(|since| entry.create_revision > *since)
                && !orphaned.contains(&(entry.key.clone(), entry.create_revision))
            {
                let text = format!("{} is revoked although its member is running", entry.key);
                return self.checker.violation(text);
            }
        }
    }

    fn owns(&self, lease: LeaseId) -> bool {
        self.leases.lock().unwrap().contains(&lease)
    }

    /// A request and its response, each of which may be late or lost.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        limit: Duration,
        request: impl FnOnce(Self) -> F + Send + 'static,
    ) -> Result<T, ClusterError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ClusterError>> + Send,
    {
        self.checker.called();
        let faults = self.net.faults();
        if faults.refused {
            return Err(unavailable(operation, "connection refused"));
        }
        let connection = self.net.connection();
        let (answer, answered) = oneshot::channel();
        let client = self.clone();
        let history = self.checker.history();
        let lost = fastrand::f64() < faults.lost_requests;
        let is_response_lost = fastrand::f64() < faults.lost_responses;
        let is_late = fastrand::f64() < faults.late_requests;
        let survives_close = fastrand::bool();
        // A message in transit does not depend on its sender any more.
        tokio::spawn(async move {
            let net = client.net.clone();
            sleep(net.delay()).await;
            if is_late {
                sleep(REQUEST_LIMIT.mul_f64(1.0 + 2.0 * fastrand::f64())).await;
            }
            net.wait_while_silent().await;
            let is_closed = net.connection() != connection;
            // A restored store is a restarted server: requests that were sent to the previous
            // server never reach it, however late they are.
            let has_another_server = client.checker.history() != history;
            if lost || (is_closed && !survives_close) || has_another_server {
                return;
            }
            let result = request(client).await;
            if is_response_lost {
                return;
            }
            sleep(net.delay()).await;
            net.wait_while_silent().await;
            // A response on a closed connection is not received.
            if net.connection() == connection {
                let _ = answer.send(result);
            }
        });
        match timeout(limit, answered).await {
            Ok(Ok(result)) => result,
            // The task ended without a response, which is the same as silence.
            late => {
                if late.is_ok() {
                    sleep(limit).await;
                }
                self.net.close(connection);
                Err(ClusterError::Timeout {
                    endpoint: "simulated".to_owned(),
                    operation,
                    after: limit,
                })
            }
        }
    }

    /// Records the keys that were written by a run that has ended, even if another run has replaced
    /// it.
    fn record_orphaned(&self, txn: &Txn, at: Revision, members: &BTreeMap<&'static str, Revision>) {
        let now = self.groups.lock().unwrap();
        for write in &txn.writes {
            if let Write::Put { key, .. } = write
                && let Some(group) = key.split('/').nth(1)
                && members.get(group) != now.get(group)
            {
                self.orphaned.lock().unwrap().insert((key.clone(), at));
            }
        }
    }

    /// A client must not remove entries of another client, nor replace them without a condition on
    /// them.
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
                Condition::Absent(of)
                | Condition::HeldBy(of, _)
                | Condition::CreatedAt(of, _)
                | Condition::ChangedAt(of, _) => of == key,
            });
            if is_removed || !is_looked_at {
                self.checker.violation(format!(
                    "{key} with lease {lease} is removed by another client"
                ));
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
        let ttl = ttl + self.extra_ttl;
        let lease = self
            .call("grant", REQUEST_LIMIT, move |client| async move {
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
        self.call("revoke", REQUEST_LIMIT, move |client| async move {
            client.check_revocation(lease);
            client.store.revoke(lease).await
        })
        .await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.call("lease", REQUEST_LIMIT, move |client| async move {
            client.store.keys_of(lease).await
        })
        .await
    }

    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) -> AbortHandle {
        spawn(&self.process, &self.checker, task).abort_handle()
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let members = self.groups.lock().unwrap().clone();
        self.call("txn", REQUEST_LIMIT, move |client| async move {
            let before: Vec<_> = txn
                .writes
                .iter()
                .filter_map(|write| {
                    let (Write::Delete { key } | Write::Put { key, .. }) = write;
                    client.store.entry(key)
                })
                .collect();
            let queue = client.checker.queue_of(&before);
            let result = client.store.txn(txn.clone()).await;
            if let Ok(Some(revision)) = result {
                client.record_orphaned(&txn, revision, &members);
                client.check_writes(&txn, &before);
                client.checker.record_queue(&txn, &before, queue);
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
        // A discovery lists the candidates last, at the revision at which it listed the nodes.
        let (nodes, candidates) = (of("registry/"), of("election/").filter(|_| at.is_some()));
        let keys = keys.clone();
        let (listing, moment) = self
            .call("list", REQUEST_LIMIT, move |client| async move {
                let listing = client.store.list(&keys, at).await?;
                let moment = client.checker.moment(listing.revision);
                Ok((listing, moment))
            })
            .await?;
        let mut listed = self.listed.lock().unwrap();
        if let Some(group) = nodes {
            listed.insert(group, listing.cluster_id);
        }
        // Candidates from another cluster than the nodes count for nothing: the discovery lists
        // both again.
        if let Some(group) = candidates
            && listed.get(&group) == Some(&listing.cluster_id)
        {
            self.delivered.lock().unwrap().insert(group, moment);
        }
        drop(listed);
        Ok(listing)
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let connection = self.net.connection();
        // Only a discovery watches all nodes of a group.
        let registry = ranges.iter().find_map(|range| match &range.keys {
            Selector::Prefix(prefix) => prefix.strip_prefix("registry/"),
            Selector::Key(_) => None,
        });
        let group = registry.map(|group| group.trim_end_matches('/').to_owned());
        let inner = self
            .call("watch", REQUEST_LIMIT, move |client| async move {
                client.store.watch(ranges).await
            })
            .await?;
        Ok(Box::new(NetWatcher {
            net: self.net.clone(),
            connection,
            position: inner.position().to_vec(),
            inner,
            in_transit: None,
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
                keeper.renew(REQUEST_LIMIT).await
            })
            .await?;
        client.checker.acknowledged(lease.id, sent, ttl);
        Ok(ttl)
    }
}

struct NetWatcher {
    net: Arc<Net>,
    connection: u64,
    inner: Box<dyn Watcher>,
    /// Events in transit, with their arrival time, the position after them, and their moment.
    in_transit: Option<(Instant, Vec<WatchEvent>, Vec<WatchRange>, Moment)>,
    position: Vec<WatchRange>,
    client: Client,
    /// The group of the discovery that watches.
    group: Option<String>,
}

#[async_trait]
impl Watcher for NetWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        let net = self.net.clone();
        loop {
            // Created before the state is read, so that no change in between is missed.
            let changed = net.changed.notified();
            let (silent_since, connection) = {
                let state = self.net.state();
                (state.silent_since, state.connection)
            };
            if connection != self.connection {
                return Err(unavailable("watch", "the connection was closed"));
            }
            if let Some(since) = silent_since {
                tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(since + DEAD_AFTER) => self.net.close(connection),
                }
                continue;
            }
            if let Some((due, ..)) = &self.in_transit {
                tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(*due) => {
                        if let Some((_, events, position, moment)) = self.in_transit.take() {
                            self.position = position;
                            if let Some(group) = &self.group {
                                self.client.delivered.lock().unwrap().insert(group.clone(), moment);
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
                    let position = self.inner.position().to_vec();
                    let events = events?;
                    let newest = events.iter().map(WatchEvent::revision).max();
                    let moment = self.client.checker.moment(newest.unwrap_or(0));
                    self.in_transit = Some((due, events, position, moment));
                }
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.position
    }
}

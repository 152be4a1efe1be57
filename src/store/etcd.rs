//! The store over etcd, and the only file that names `etcd-client`.
//!
//! One connection at a time, to one endpoint, made by the first call that needs it: the channel
//! belongs to the runtime that makes it. A call that finds the connection dead or silent discards
//! it, and the next call goes to the next endpoint. Streams (watches, lease keepers) end with
//! their connection; whoever holds one opens it again.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, KeyValue,
    LeaseKeepAliveStream, LeaseKeeper as EtcdLeaseKeeper, PutOptions, SortOrder, SortTarget, TxnOp,
    WatchOptions, WatchResponse, WatchStream,
};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{
    Condition, Entry, EtcdOptions, Lease, LeaseId, LeaseKeeper, Listing, Revision, Selector, Store,
    Txn, WatchEvent, WatchRange, Watcher, Write,
};
use crate::error::ClusterError;

/// Keys per page of a list.
const PAGE: i64 = 1_000;
/// The largest response accepted, to a page of a list or on a watch: 1,000 entries of 64 KiB. The
/// client's own limit of 4 MiB is too little for what etcd may send at once.
const LARGEST_RESPONSE: usize = 64 << 20;

/// The client of an etcd cluster; tested with 3.5. Clones share one connection.
#[derive(Debug, Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: EtcdOptions,
    link: Mutex<Link>,
    /// Held while connecting, so that many callers make one connection.
    dialing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Link {
    connection: Option<Connection>,
    /// Dropped with the connection: ends the streams on it that have not noticed yet.
    open: Option<watch::Sender<()>>,
    /// Counts connections, so that a failure is only held against the one it happened on.
    generation: u64,
    /// The endpoint to try next.
    next: usize,
    warned_about_version: bool,
}

#[derive(Clone)]
struct Connection {
    client: Client,
    endpoint: String,
    generation: u64,
    /// Fails once the connection has been given up.
    open: watch::Receiver<()>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} #{})", self.endpoint, self.generation)
    }
}

impl EtcdStore {
    /// A store that will connect when it is first used.
    ///
    /// # Errors
    ///
    /// When an option is out of range or an endpoint cannot be understood.
    pub fn new(options: EtcdOptions) -> Result<Self, ClusterError> {
        options.validate()?;
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                link: Mutex::new(Link::default()),
                dialing: tokio::sync::Mutex::new(()),
            }),
        })
    }

    fn timeout(&self) -> Duration {
        self.shared.options.request_timeout
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.shared
            .link
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self) -> Result<Connection, ClusterError> {
        if let Some(connection) = &self.link().connection {
            return Ok(connection.clone());
        }
        let _dialing = self.shared.dialing.lock().await;
        // Somebody else may have been faster.
        if let Some(connection) = &self.link().connection {
            return Ok(connection.clone());
        }
        let endpoints = &self.shared.options.endpoints;
        let mut last = None;
        for _ in 0..endpoints.len() {
            // Moved on before the try: a caller with little patience gives up in the middle of it,
            // and the next one must not get stuck at the same silent endpoint.
            let index = {
                let mut link = self.link();
                let index = link.next % endpoints.len();
                link.next = (index + 1) % endpoints.len();
                index
            };
            let endpoint = &endpoints[index];
            match self.dial(endpoint).await {
                Ok((client, version)) => {
                    return Ok(self.connected(client, index, endpoint, &version));
                }
                Err(error) => {
                    debug!(endpoint, %error, "cannot connect to etcd");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| ClusterError::config("endpoints", "must not be empty")))
    }

    fn connected(&self, client: Client, index: usize, endpoint: &str, version: &str) -> Connection {
        info!(endpoint, version, "connected to etcd");
        let mut link = self.link();
        if !link.warned_about_version && has_lease_bug(version) {
            link.warned_about_version = true;
            warn!(
                endpoint,
                version,
                "this etcd answers renewals of a revoked lease with success; upgrade to 3.5.23, \
                 3.6.5 or newer"
            );
        }
        let (open, is_open) = watch::channel(());
        link.generation += 1;
        link.next = index;
        let connection = Connection {
            client,
            endpoint: endpoint.to_owned(),
            generation: link.generation,
            open: is_open,
        };
        link.open = Some(open);
        link.connection = Some(connection.clone());
        connection
    }

    /// Connects to one endpoint and makes sure that it answers: connecting alone succeeds even
    /// where nobody listens.
    async fn dial(&self, endpoint: &str) -> Result<(Client, String), ClusterError> {
        let options = &self.shared.options;
        let connect = ConnectOptions::default()
            .with_connect_timeout(options.connect_timeout)
            // A member that has lost its leader says so, instead of staying silent.
            .with_require_leader(true)
            .with_tcp_keepalive(options.keep_alive_interval)
            .with_keep_alive(options.keep_alive_interval, options.request_timeout);
        let connecting = async {
            let mut client = Client::connect([endpoint], Some(connect)).await?;
            let status = client.status().await?;
            Ok((client, status.version().to_owned(), status.leader()))
        };
        let (client, version, leader) =
            bounded("connect", endpoint, options.connect_timeout, connecting).await?;
        if leader == 0 {
            return Err(ClusterError::Unavailable {
                endpoint: endpoint.to_owned(),
                operation: "connect",
                reason: "this member sees no leader".to_owned(),
            });
        }
        Ok((client, version))
    }

    /// Gives up the connection after a failure on it, unless it has been replaced already, and
    /// with it every stream on it: what holds for one holds for all.
    fn discard(&self, failed: u64) {
        let mut link = self.link();
        if link.connection.is_some() && link.generation == failed {
            link.connection = None;
            link.open = None;
            link.next = (link.next + 1) % self.shared.options.endpoints.len();
        }
    }

    /// One bounded request on the current connection, which is discarded if it turns out dead.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        request: impl FnOnce(Client) -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let connection = self.connection().await?;
        let result = bounded(
            operation,
            &connection.endpoint,
            self.timeout(),
            request(connection.client),
        )
        .await;
        if let Err(error) = &result
            && error.is_transient()
        {
            self.discard(connection.generation);
        }
        result
    }
}

/// Bounds a request in time and gives its error our words.
async fn bounded<T>(
    operation: &'static str,
    endpoint: &str,
    after: Duration,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(after, request).await {
        Ok(result) => result.map_err(|error| explain(operation, endpoint, after, &error)),
        Err(_) => Err(ClusterError::Timeout {
            endpoint: endpoint.to_owned(),
            operation,
            after,
        }),
    }
}

/// etcd's errors have no types, only gRPC codes and words.
fn explain(
    operation: &'static str,
    endpoint: &str,
    after: Duration,
    error: &etcd_client::Error,
) -> ClusterError {
    use etcd_client::Error as E;
    // `tonic::Code` by number, for the crate does not pass the type on.
    const CANCELLED: i32 = 1;
    const INVALID_ARGUMENT: i32 = 3;
    const DEADLINE_EXCEEDED: i32 = 4;
    const NOT_FOUND: i32 = 5;
    const PERMISSION_DENIED: i32 = 7;
    const FAILED_PRECONDITION: i32 = 9;
    const OUT_OF_RANGE: i32 = 11;
    const UNIMPLEMENTED: i32 = 12;
    const UNAUTHENTICATED: i32 = 16;

    let unavailable = |reason: String| ClusterError::Unavailable {
        endpoint: endpoint.to_owned(),
        operation,
        reason,
    };
    let rejected = |reason: &str| ClusterError::Rejected {
        endpoint: endpoint.to_owned(),
        operation,
        reason: reason.to_owned(),
    };
    match error {
        E::GRpcStatus(status) => {
            let words = status.message();
            match status.code() as i32 {
                DEADLINE_EXCEEDED => ClusterError::Timeout {
                    endpoint: endpoint.to_owned(),
                    operation,
                    after,
                },
                CANCELLED => unavailable(words.to_owned()),
                NOT_FOUND if words.contains("lease not found") => {
                    ClusterError::LeaseNotFound { lease: LeaseId(0) }
                }
                OUT_OF_RANGE if words.contains("has been compacted") => {
                    ClusterError::Compacted { oldest: 0 }
                }
                INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | FAILED_PRECONDITION
                | UNIMPLEMENTED | UNAUTHENTICATED => rejected(words),
                _ => unavailable(words.to_owned()),
            }
        }
        E::LeaseKeepAliveError(words) if words.contains("lease not found") => {
            ClusterError::LeaseNotFound { lease: LeaseId(0) }
        }
        E::InvalidArgs(words) => rejected(words),
        other => unavailable(other.to_string()),
    }
}

/// Puts the lease that a request was about into its error.
fn about_lease<T>(lease: LeaseId, result: Result<T, ClusterError>) -> Result<T, ClusterError> {
    result.map_err(|error| match error {
        ClusterError::LeaseNotFound { .. } => ClusterError::LeaseNotFound { lease },
        other => other,
    })
}

/// Renewals of a revoked lease succeed before 3.5.23 and 3.6.5.
fn has_lease_bug(version: &str) -> bool {
    let mut parts = version
        .split(['.', '-', '+'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    match (part(), part(), part()) {
        (3, 5, patch) => patch < 23,
        (3, 6, patch) => patch < 5,
        (major, minor, _) => (major, minor) < (3, 5),
    }
}

fn entry(kv: &KeyValue) -> Entry {
    Entry {
        // A key that is not UTF-8 cannot be ours; what it is turned into matches no node's id.
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: kv.value().to_vec(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        lease: (kv.lease() != 0).then_some(LeaseId(kv.lease())),
    }
}

fn compare(condition: &Condition) -> Compare {
    match condition {
        Condition::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Condition::HeldBy(key, lease) => Compare::lease(key.as_str(), CompareOp::Equal, lease.0),
        Condition::CreatedAt(key, revision) => {
            Compare::create_revision(key.as_str(), CompareOp::Equal, *revision)
        }
    }
}

fn operation(write: Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key, value, options)
        }
        Write::Delete { key } => TxnOp::delete(key, None),
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        // etcd counts whole seconds; rounding up keeps the promise "at least".
        let seconds = ttl.as_millis().div_ceil(1000).max(1);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let granted = self
            .call("grant", |mut client| async move {
                client.lease_grant(seconds, None).await
            })
            .await?;
        Ok(Lease {
            id: LeaseId(granted.id()),
            ttl: Duration::from_secs(granted.ttl().unsigned_abs()),
        })
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        Box::new(EtcdKeeper {
            store: self.clone(),
            lease,
            stream: None,
            used: None,
        })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        let result = self
            .call("revoke", |mut client| async move {
                client.lease_revoke(lease.0).await
            })
            .await;
        about_lease(lease, result).map(drop)
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let lease = txn.lease().unwrap_or(LeaseId(0));
        let conditions: Vec<_> = txn.conditions.iter().map(compare).collect();
        let writes: Vec<_> = txn.writes.into_iter().map(operation).collect();
        let request = etcd_client::Txn::new().when(conditions).and_then(writes);
        let result = self
            .call("txn", |mut client| async move { client.txn(request).await })
            .await;
        let response = about_lease(lease, result)?;
        let revision = response.header().map_or(0, |header| header.revision());
        Ok(response.succeeded().then_some(revision))
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        let mut entries = Vec::new();
        let mut revision = at;
        let (mut start, end) = match keys {
            Selector::Key(key) => (key.clone().into_bytes(), None),
            Selector::Prefix(prefix) => (prefix.clone().into_bytes(), Some(prefix_end(prefix))),
        };
        loop {
            let mut options = GetOptions::new()
                .with_limit(PAGE)
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            if let Some(end) = &end {
                options = options.with_range(end.clone());
            }
            if let Some(revision) = revision {
                options = options.with_revision(revision);
            }
            let from = start.clone();
            let page = self
                .call("list", |client| async move {
                    let mut kv = client
                        .kv_client()
                        .max_decoding_message_size(LARGEST_RESPONSE);
                    kv.get(from, Some(options)).await
                })
                .await?;
            let read_at = page.header().map_or(0, |header| header.revision());
            let revision = *revision.get_or_insert(read_at);
            entries.extend(page.kvs().iter().map(entry));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                _ => return Ok(Listing { revision, entries }),
            }
        }
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let connection = self.connection().await?;
        let after = self.timeout();
        let opened = tokio::time::timeout(after, EtcdWatcher::open(self, &connection, ranges))
            .await
            .unwrap_or_else(|_| {
                Err(ClusterError::Timeout {
                    endpoint: connection.endpoint.clone(),
                    operation: "watch",
                    after,
                })
            });
        match opened {
            Ok(watcher) => Ok(Box::new(watcher)),
            Err(error) => {
                if error.is_transient() {
                    self.discard(connection.generation);
                }
                Err(error)
            }
        }
    }
}

/// The end of the range of keys with this prefix: the prefix with its last byte that can grow
/// grown by one. An empty prefix, or one of 0xff only, means every key from it on.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

struct EtcdKeeper {
    store: EtcdStore,
    lease: Lease,
    stream: Option<KeepAliveStream>,
    /// The connection that the renewal in progress is on.
    used: Option<u64>,
}

struct KeepAliveStream {
    requests: EtcdLeaseKeeper,
    replies: LeaseKeepAliveStream,
    endpoint: String,
}

impl EtcdKeeper {
    async fn renew_on_stream(&mut self) -> Result<i64, ClusterError> {
        const OPERATION: &str = "renew";
        let after = self.store.timeout();
        match &mut self.stream {
            None => {
                self.used = None;
                let connection = self.store.connection().await?;
                self.used = Some(connection.generation);
                let mut client = connection.client;
                // Sends the first renewal and waits for its reply.
                let opened = client.lease_keep_alive(self.lease.id.0).await;
                let (requests, replies) = opened
                    .map_err(|error| explain(OPERATION, &connection.endpoint, after, &error))?;
                self.stream = Some(KeepAliveStream {
                    requests,
                    replies,
                    endpoint: connection.endpoint,
                });
                Ok(i64::try_from(self.lease.ttl.as_secs()).unwrap_or(i64::MAX))
            }
            Some(stream) => {
                let failed = |error| explain(OPERATION, &stream.endpoint, after, &error);
                stream.requests.keep_alive().await.map_err(failed)?;
                match stream.replies.message().await {
                    Ok(Some(reply)) => Ok(reply.ttl()),
                    Ok(None) => Err(ClusterError::Unavailable {
                        endpoint: stream.endpoint.clone(),
                        operation: OPERATION,
                        reason: "the stream has ended".to_owned(),
                    }),
                    Err(error) => Err(failed(error)),
                }
            }
        }
    }
}

#[async_trait]
impl LeaseKeeper for EtcdKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let lease = self.lease.id;
        let renewal = tokio::time::timeout(within, self.renew_on_stream()).await;
        let error = match renewal {
            Ok(Ok(ttl)) if ttl > 0 => return Ok(Duration::from_secs(ttl.unsigned_abs())),
            // Not an error for etcd: the lease has ended.
            Ok(Ok(_)) => return Err(ClusterError::LeaseNotFound { lease }),
            Ok(Err(error)) => error,
            Err(_) => ClusterError::Timeout {
                endpoint: self.store.shared.options.endpoints.join(","),
                operation: "renew",
                after: within,
            },
        };
        // A late reply must never be taken for the answer to the next renewal.
        self.stream = None;
        if let Some(generation) = self.used
            && error.is_transient()
        {
            self.store.discard(generation);
        }
        about_lease(lease, Err(error))
    }
}

struct EtcdWatcher {
    store: EtcdStore,
    stream: WatchStream,
    endpoint: String,
    generation: u64,
    open: watch::Receiver<()>,
    /// What is watched, and how far each range has been told.
    ranges: Vec<WatchRange>,
    /// Which range a watch id belongs to.
    ids: HashMap<i64, usize>,
    /// Responses that came while the watch was being opened.
    early: VecDeque<WatchResponse>,
}

impl EtcdWatcher {
    async fn open(
        store: &EtcdStore,
        connection: &Connection,
        ranges: Vec<WatchRange>,
    ) -> Result<Self, ClusterError> {
        let after = store.timeout();
        let failed =
            |error: &etcd_client::Error| explain("watch", &connection.endpoint, after, error);
        let mut client = connection
            .client
            .watch_client()
            .max_decoding_message_size(LARGEST_RESPONSE);
        let mut stream = None;
        let mut ids = HashMap::new();
        for (index, range) in ranges.iter().enumerate() {
            // A watch id of our own, so that order of creation does not matter. 0 means "choose".
            let id = i64::try_from(index).unwrap_or(i64::MAX) + 1;
            ids.insert(id, index);
            let mut options = WatchOptions::new()
                .with_start_revision(range.from)
                .with_watch_id(id)
                .with_progress_notify();
            if let Selector::Prefix(prefix) = &range.keys {
                options = options.with_range(prefix_end(prefix));
            }
            let key = range.keys.as_str();
            match &mut stream {
                None => {
                    let opened = client.watch(key, Some(options)).await;
                    stream = Some(opened.map_err(|error| failed(&error))?);
                }
                Some(stream) => {
                    let added = stream.watch(key, Some(options)).await;
                    added.map_err(|error| failed(&error))?;
                }
            }
        }
        let Some(stream) = stream else {
            return Err(ClusterError::config("watch", "needs at least one range"));
        };
        let mut watcher = Self {
            store: store.clone(),
            stream,
            endpoint: connection.endpoint.clone(),
            generation: connection.generation,
            open: connection.open.clone(),
            ranges,
            ids,
            early: VecDeque::new(),
        };
        let mut pending = watcher.ranges.len();
        while pending > 0 {
            let response = watcher.response().await?;
            if response.created() {
                watcher.check(&response)?;
                pending -= 1;
            } else {
                watcher.early.push_back(response);
            }
        }
        Ok(watcher)
    }

    async fn response(&mut self) -> Result<WatchResponse, ClusterError> {
        let after = self.store.timeout();
        let unavailable = |reason: &str| ClusterError::Unavailable {
            endpoint: self.endpoint.clone(),
            operation: "watch",
            reason: reason.to_owned(),
        };
        let message = tokio::select! {
            message = self.stream.message() => message,
            // Nothing is ever sent: this is its end.
            _ = self.open.changed() => {
                return Err(unavailable("its connection has been given up"));
            }
        };
        match message {
            Ok(Some(response)) => Ok(response),
            Ok(None) => Err(unavailable("the stream has ended")),
            Err(error) => Err(explain("watch", &self.endpoint, after, &error)),
        }
    }

    /// A watch that the server ended is told as a response, not as an error.
    fn check(&self, response: &WatchResponse) -> Result<(), ClusterError> {
        if response.compact_revision() > 0 {
            return Err(ClusterError::Compacted {
                oldest: response.compact_revision(),
            });
        }
        if response.canceled() {
            let reason = response.cancel_reason().to_owned();
            let (endpoint, operation) = (self.endpoint.clone(), "watch");
            return Err(if reason.contains("permission denied") {
                ClusterError::Rejected {
                    endpoint,
                    operation,
                    reason,
                }
            } else {
                ClusterError::Unavailable {
                    endpoint,
                    operation,
                    reason,
                }
            });
        }
        Ok(())
    }

    fn take(&mut self, response: &WatchResponse) -> Result<Vec<WatchEvent>, ClusterError> {
        self.check(response)?;
        let Some(range) = self
            .ids
            .get(&response.watch_id())
            .and_then(|index| self.ranges.get_mut(*index))
        else {
            return Ok(Vec::new());
        };
        let mut events = Vec::with_capacity(response.events().len());
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            // Told already, before a resume.
            if kv.mod_revision() < range.from {
                continue;
            }
            let entry = entry(kv);
            events.push(match event.event_type() {
                EventType::Put => WatchEvent::Put(entry),
                EventType::Delete => WatchEvent::Delete {
                    key: entry.key,
                    revision: entry.mod_revision,
                },
            });
        }
        // All changes of one revision come in one response, so the next revision is safe to go on
        // from. The header's revision is safe only where there are no events: it may be ahead of
        // changes still to be sent.
        let reached = match events.last() {
            Some(last) => last.revision(),
            None => response.header().map_or(0, |header| header.revision()),
        };
        range.from = range.from.max(reached + 1);
        Ok(events)
    }
}

#[async_trait]
impl Watcher for EtcdWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        loop {
            let response = match self.early.pop_front() {
                Some(response) => Ok(response),
                None => self.response().await,
            };
            let events = response.and_then(|response| self.take(&response));
            match events {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(error) => {
                    if error.is_transient() {
                        self.store.discard(self.generation);
                    }
                    return Err(error);
                }
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(prefix_end("registry/app/"), b"registry/app0");
        assert_eq!(prefix_end(""), [0]);
    }

    #[test]
    fn versions_with_the_lease_bug() {
        for version in ["3.4.30", "3.5.1", "3.5.22", "3.6.0", "3.6.4", "nonsense"] {
            assert!(has_lease_bug(version), "{version}");
        }
        for version in ["3.5.23", "3.5.30", "3.6.5", "3.7.0-rc.1", "4.0.0"] {
            assert!(!has_lease_bug(version), "{version}");
        }
    }
}

//! The store over etcd, and the only folder that names `etcd-client`.
//!
//! One connection at a time, to one endpoint, made by the first call that needs it: the channel
//! belongs to the runtime that makes it. It is made in a task of its own, so that nobody waits for
//! somebody else's call to be polled. A call that finds the connection dead or silent discards it, and
//! the next call goes to the next endpoint; how long something may be silent is told by what is
//! measured. Streams (one for all watches, one for each
//! lease) end with their connection; whoever holds one opens it again.

mod breaker;
mod connection;
#[cfg(feature = "tls")]
mod diagnosis;
mod dialling;
mod keeper;
mod members;
mod names;
#[cfg(feature = "tls")]
mod renewal;
mod round_trips;
mod security;
mod watcher;

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, GetOptions, GetResponse, KeyValue, KvClient,
    LeaseTimeToLiveOptions, PutOptions, ResponseHeader, SortOrder, SortTarget, TxnOp,
    TxnOpResponse,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{
    Condition, Entry, EtcdOptions, Lease, LeaseId, LeaseKeeper, Listing, Page, Revision, Selector,
    Store, StoreStatus, Txn, WatchRange, Watcher, Write,
};
use crate::error::ClusterError;
use crate::sync::lock;
use connection::{Connection, Link};
use keeper::EtcdKeeper;
use security::{LastPassword, refusal, tls_failure, words_of};
use watcher::EtcdWatcher;

/// How many bytes a page of a list is to have. How many entries that are is told by those before.
const PAGE_BYTES: usize = 1 << 20;
/// What an entry is taken for before one was seen.
const ENTRY_BYTES: usize = 1 << 10;
/// Entries of a page at most.
const PAGE_ENTRIES: usize = 2_000;
/// The largest response accepted, to a page of a list or on a watch. The client's own limit of 4 MiB
/// is too little for what etcd may send at once.
const LARGEST_RESPONSE: usize = 64 << 20;

/// Leases whose cluster is remembered: a process has a few.
const MOST_GRANTED: usize = 64;

/// The client of an etcd cluster; tested with 3.5. Clones share one connection.
#[derive(Debug, Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
    /// None where it is the background's own: that ends with the last handle.
    _handle: Option<Arc<Handle>>,
}

/// Ends `Shared::closed` when it is dropped.
#[derive(Debug)]
struct Handle {
    _open: watch::Sender<()>,
}

#[derive(Debug)]
struct Shared {
    options: EtcdOptions,
    link: Mutex<Link>,
    /// Ends with the last handle.
    closed: watch::Receiver<()>,
    /// What an entry takes under a prefix, as of the last page.
    entry_bytes: Mutex<HashMap<String, usize>>,
    /// There is a user, and authentication is not enabled, as has been told.
    has_no_token: AtomicBool,
    password: Mutex<LastPassword>,
    /// The leases granted last, and the id of the cluster that did it.
    granted: Mutex<VecDeque<(i64, u64)>>,
    /// Held by whoever reads files.
    reading: Arc<tokio::sync::Mutex<()>>,
}

impl EtcdStore {
    /// A store that will connect when it is first used.
    ///
    /// # Errors
    ///
    /// When an option is out of range, an endpoint cannot be understood, or a file cannot be used.
    pub fn new(options: EtcdOptions) -> Result<Self, ClusterError> {
        options.validate()?;
        Ok(Self::with(options))
    }

    /// With options that have been judged.
    pub(crate) fn with(options: EtcdOptions) -> Self {
        let (open, closed) = watch::channel(());
        let link = Link::new(&options.endpoints);
        Self {
            shared: Arc::new(Shared {
                options,
                link: Mutex::new(link),
                closed,
                entry_bytes: Mutex::default(),
                has_no_token: AtomicBool::new(false),
                granted: Mutex::default(),
                reading: Arc::default(),
                password: Mutex::default(),
            }),
            _handle: Some(Arc::new(Handle { _open: open })),
        }
    }

    /// The same store for a task of its own, which is not to keep it open.
    fn in_background(&self) -> Self {
        Self::background(self.shared.clone())
    }

    fn background(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            _handle: None,
        }
    }

    async fn watch_on(
        &self,
        connection: &Connection,
        ranges: &[WatchRange],
    ) -> Result<EtcdWatcher, ClusterError> {
        let sent = Instant::now();
        let after = connection.round_trips.request_timeout(self.timeout());
        let opening = EtcdWatcher::open(self, connection, ranges.to_vec());
        let opened = tokio::time::timeout(after, opening).await;
        let opened = opened.unwrap_or_else(|_| {
            Err(ClusterError::Timeout {
                endpoint: connection.endpoint.to_string(),
                operation: "watch",
                after,
            })
        });
        if let Err(error) = &opened {
            self.blame(connection, sent, error);
        }
        opened
    }

    /// For the answer of an etcd that is fast.
    fn timeout(&self) -> Duration {
        self.shared.options.request_timeout
    }

    /// Gives the connection up for a request that failed on it, if it is to blame.
    fn blame(&self, connection: &Connection, sent: Instant, error: &ClusterError) {
        if !error.blames_connection() {
            return;
        }
        let is_late = matches!(error, ClusterError::Timeout { .. });
        if is_late && !connection.round_trips.request_missed(sent) {
            // It is alive, and slow: another connection would be as slow.
            self.count_failure(&mut self.link(), error);
        } else {
            self.discard(connection.generation, error);
        }
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        lock(&self.shared.link)
    }

    /// One bounded request on the current connection, which is discarded if it turns out dead. With
    /// a new token it is made once more, if the token is refused: it has not taken effect then.
    async fn call<T, F>(
        &self,
        operation: &'static str,
        request: impl Fn(Client) -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let connection = self.connection(operation).await?;
        let (generation, token) = (connection.generation, connection.token.clone());
        let version = token.version();
        let result = self.call_on(operation, connection, &request).await;
        match result {
            Err(error) if self.may_renew_for(&error, &token) => {
                let connection = self.renew_token(generation, version).await?;
                self.call_on(operation, connection, &request).await
            }
            result => result,
        }
    }

    async fn call_on<T, F>(
        &self,
        operation: &'static str,
        connection: Connection,
        request: &impl Fn(Client) -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let sent = Instant::now();
        let after = connection.round_trips.request_timeout(self.timeout());
        let answer = request(connection.client.clone());
        let result = bounded(operation, &connection.endpoint, after, answer).await;
        match &result {
            Err(error) if error.blames_connection() => self.blame(&connection, sent, error),
            _ => {
                connection.round_trips.request_answered(sent);
                self.link().breaker.succeeded();
            }
        }
        result.map_err(|error| self.about_access(error, String::new))
    }
}

impl EtcdStore {
    fn entry_bytes(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        let bytes = self.shared.entry_bytes.lock();
        bytes.unwrap_or_else(PoisonError::into_inner)
    }

    /// How many entries to ask for.
    fn page_entries(&self, keys: &Selector) -> usize {
        let bytes = self.entry_bytes().get(keys.as_str()).copied();
        let bytes = bytes.unwrap_or(ENTRY_BYTES);
        (PAGE_BYTES / bytes.max(1)).clamp(1, PAGE_ENTRIES)
    }

    fn saw(&self, keys: &Selector, bytes: usize) {
        // There are as many prefixes as a process has groups.
        if let Selector::Prefix(prefix) = keys {
            self.entry_bytes().insert(prefix.clone(), bytes.max(1));
        }
    }

    fn saw_large(&self, keys: &Selector, entries: usize) {
        self.saw(keys, (PAGE_BYTES / entries).saturating_mul(4));
    }

    fn page(&self, keys: &Selector, page: &GetResponse, at: Option<Revision>) -> Page {
        let entries: Vec<Entry> = page.kvs().iter().map(entry).collect();
        if !entries.is_empty() {
            let bytes = |entry: &Entry| entry.key.len() + entry.value.len();
            let mean = entries.iter().map(bytes).sum::<usize>() / entries.len();
            self.saw(keys, mean);
        }
        let (read_at, cluster_id) = position(page.header());
        let next = page.kvs().last().filter(|_| page.more()).map(|last| {
            let mut next = last.key().to_vec();
            next.push(0);
            next
        });
        Page {
            listing: Listing {
                revision: at.unwrap_or(read_at),
                cluster_id,
                entries,
            },
            next,
        }
    }

    fn granted(&self, lease: i64, cluster: u64) {
        let mut granted = self.leases_granted();
        granted.truncate(MOST_GRANTED - 1);
        granted.push_front((lease, cluster));
    }

    /// Which cluster granted a lease; 0 if that is not known any more.
    fn cluster_of(&self, lease: i64) -> u64 {
        let granted = self.leases_granted();
        let mut granted = granted.iter();
        granted
            .find(|(id, _)| *id == lease)
            .map_or(0, |(_, cluster)| *cluster)
    }

    fn leases_granted(&self) -> MutexGuard<'_, VecDeque<(i64, u64)>> {
        let granted = self.shared.granted.lock();
        granted.unwrap_or_else(PoisonError::into_inner)
    }

    /// As one member has them, whatever the others say.
    async fn list_of_member(
        &self,
        endpoint: &str,
        keys: &Selector,
    ) -> Result<Listing, ClusterError> {
        self.paced().await;
        let within = self.shared.options.connect_timeout;
        let client = self.dial(endpoint, false, within).await?.client;
        let (mut start, end) = range(keys);
        let mut listing: Option<Listing> = None;
        loop {
            let at = listing.as_ref().map(|listing| listing.revision);
            let entries = self.page_entries(keys);
            let options = page_options(end.as_deref(), at, entries).with_serializable();
            let mut kv = large_kv(&client);
            let request = kv.get(start.clone(), Some(options));
            let page = match bounded("list", endpoint, self.timeout(), request).await {
                Err(ClusterError::TooLarge { .. }) if entries > 1 => {
                    self.saw_large(keys, entries);
                    continue;
                }
                page => self.page(keys, &page?, at),
            };
            let next = page.next;
            let listing = match &mut listing {
                Some(listing) => {
                    listing.entries.extend(page.listing.entries);
                    listing
                }
                None => listing.insert(page.listing),
            };
            match next {
                Some(next) => start = next,
                None => return Ok(std::mem::take(listing)),
            }
        }
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
    const INVALID_ARGUMENT: i32 = 3;
    const DEADLINE_EXCEEDED: i32 = 4;
    const NOT_FOUND: i32 = 5;
    const PERMISSION_DENIED: i32 = 7;
    const RESOURCE_EXHAUSTED: i32 = 8;
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
            if let Some(refused) = refusal(operation, endpoint, words) {
                return refused;
            }
            // By their words first: `etcd grpc-proxy` passes some of them on with another code, and
            // versions differ.
            if words.contains("required revision has been compacted") {
                return ClusterError::Compacted { oldest: 0 };
            }
            if words.contains("requested lease not found") {
                return ClusterError::LeaseNotFound { lease: LeaseId(0) };
            }
            // A refusal from 3.6 on, by its code; but another member does not refuse.
            if words.contains("rpc not supported for learner") {
                return unavailable(words.to_owned());
            }
            match status.code() as i32 {
                DEADLINE_EXCEEDED => ClusterError::Timeout {
                    endpoint: endpoint.to_owned(),
                    operation,
                    after,
                },
                RESOURCE_EXHAUSTED => ClusterError::Exhausted {
                    endpoint: endpoint.to_owned(),
                    operation,
                    reason: words.to_owned(),
                },
                // Said by our own side of the connection.
                OUT_OF_RANGE if words.contains("length too large") => ClusterError::TooLarge {
                    endpoint: endpoint.to_owned(),
                    operation,
                    reason: words.to_owned(),
                },
                INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | FAILED_PRECONDITION
                | UNIMPLEMENTED | UNAUTHENTICATED => rejected(words),
                _ => {
                    // Not the status itself, which shows all of it unordered.
                    let causes = std::error::Error::source(status).map(words_of);
                    let words = match causes {
                        Some(causes) => causes,
                        None => words.to_owned(),
                    };
                    tls_failure(endpoint, &words).unwrap_or_else(|| unavailable(words))
                }
            }
        }
        E::TransportError(error) => {
            let words = words_of(error);
            tls_failure(endpoint, &words).unwrap_or_else(|| unavailable(words))
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
        let cluster = granted.header().map_or(0, |header| header.cluster_id());
        self.granted(granted.id(), cluster);
        Ok(Lease {
            id: LeaseId(granted.id()),
            ttl: Duration::from_secs(granted.ttl().unsigned_abs()),
        })
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        let cluster = self.cluster_of(lease.id.0);
        Box::new(EtcdKeeper::new(self.clone(), lease, cluster))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        let result = self
            .call("revoke", |mut client| async move {
                client.lease_revoke(lease.0).await
            })
            .await
            .map_err(|error| self.about_access(error, || format!("the keys of lease {lease}")));
        about_lease(lease, result).map(drop)
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        let result = self
            .call("lease", |mut client| async move {
                let options = LeaseTimeToLiveOptions::new().with_keys();
                client.lease_time_to_live(lease.0, Some(options)).await
            })
            .await
            .map_err(|error| self.about_access(error, || format!("the keys of lease {lease}")));
        let answer = about_lease(lease, result)?;
        if answer.ttl() < 0 {
            return Err(ClusterError::LeaseNotFound { lease });
        }
        let text = |key: &Vec<u8>| String::from_utf8_lossy(key).into_owned();
        Ok(answer.keys().iter().map(text).collect())
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let lease = txn.lease().unwrap_or(LeaseId(0));
        let keys = keys_of(&txn);
        let conditions: Vec<_> = txn.conditions.iter().map(compare).collect();
        let writes: Vec<_> = txn.writes.into_iter().map(operation).collect();
        let request = etcd_client::Txn::new().when(conditions).and_then(writes);
        let result = self
            .call("txn", |mut client| {
                let request = request.clone();
                async move { client.txn(request).await }
            })
            .await
            .map_err(|error| self.about_access(error, || keys.join(", ")));
        let response = about_lease(lease, result)?;
        let revision = response.header().map_or(0, |header| header.revision());
        Ok(response.succeeded().then_some(revision))
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        let first = self.list_page(keys, None, at).await?;
        let (mut listing, mut next) = (first.listing, first.next);
        while let Some(start) = next {
            let at = Some(listing.revision);
            let page = self.list_page(keys, Some(start), at).await?;
            listing.entries.extend(page.listing.entries);
            next = page.next;
        }
        Ok(listing)
    }

    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        let (first, end) = range(keys);
        let start = start.unwrap_or(first);
        loop {
            let entries = self.page_entries(keys);
            let options = page_options(end.as_deref(), at, entries);
            let page = self
                .call("list", |client| {
                    let (from, options) = (start.clone(), options.clone());
                    async move { large_kv(&client).get(from, Some(options)).await }
                })
                .await;
            match page {
                // There is no telling how large each is: fewer of them.
                Err(ClusterError::TooLarge { .. }) if entries > 1 => self.saw_large(keys, entries),
                Err(error) => return Err(self.about_access(error, || keys.as_str().to_owned())),
                Ok(page) => return Ok(self.page(keys, &page, at)),
            }
        }
    }

    async fn list_stale(&self, keys: &Selector) -> Result<Listing, ClusterError> {
        let mut last = None;
        for endpoint in self.endpoints() {
            // Each address of its name in turn: how many there are is known from the first dial on.
            let mut tried = 0;
            while tried < self.link().addresses(std::slice::from_ref(&endpoint)) {
                tried += 1;
                match self.list_of_member(&endpoint, keys).await {
                    Ok(listing) => return Ok(listing),
                    Err(error) => last = Some(error),
                }
            }
        }
        Err(last.unwrap_or_else(|| ClusterError::config("endpoints", "must not be empty")))
    }

    fn status(&self) -> StoreStatus {
        let link = self.link();
        let connection = link.connection.as_ref();
        StoreStatus {
            endpoint: connection.map(|connection| connection.endpoint.to_string()),
            circuit: link.breaker.circuit(),
        }
    }

    /// One request, unless one of them takes more than a page.
    async fn list_all(&self, all: &[Selector]) -> Result<Vec<Listing>, ClusterError> {
        let reads: Vec<_> = all
            .iter()
            .map(|keys| {
                let (start, end) = range(keys);
                TxnOp::get(
                    start,
                    Some(page_options(end.as_deref(), None, self.page_entries(keys))),
                )
            })
            .collect();
        let request = etcd_client::Txn::new().and_then(reads);
        let response = self
            .call("list", |client| {
                let request = request.clone();
                async move { large_kv(&client).txn(request).await }
            })
            .await
            .map_err(|error| {
                self.about_access(error, || {
                    let all: Vec<_> = all.iter().map(Selector::as_str).collect();
                    all.join(", ")
                })
            })?;
        let (revision, cluster_id) = position(response.header());
        let mut listings = Vec::with_capacity(all.len());
        for (keys, answer) in all.iter().zip(response.op_responses()) {
            let TxnOpResponse::Get(page) = answer else {
                continue;
            };
            if page.more() {
                listings.push(self.list(keys, Some(revision)).await?);
                continue;
            }
            listings.push(Listing {
                revision,
                cluster_id,
                entries: page.kvs().iter().map(entry).collect(),
            });
        }
        Ok(listings)
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let connection = self.connection("watch").await?;
        let (generation, version) = (connection.generation, connection.token.version());
        let mut opened = self.watch_on(&connection, &ranges).await;
        if let Err(error) = &opened
            && self.may_renew_for_watch(error, &connection)
        {
            // The stream has the token that it was opened with.
            let fresh = self.renew_token(generation, version).await?;
            let fresh = self.with_fresh_watches(fresh, &connection.watches);
            opened = self.watch_on(&fresh, &ranges).await;
        }
        match opened {
            Ok(watcher) => Ok(Box::new(watcher)),
            Err(error) => Err(self.about_access(error, || {
                let all: Vec<_> = ranges.iter().map(|range| range.keys.as_str()).collect();
                all.join(", ")
            })),
        }
    }
}

/// Every key that a transaction is about.
fn keys_of(txn: &Txn) -> Vec<String> {
    let conditions = txn.conditions.iter().map(|condition| match condition {
        Condition::Absent(key) | Condition::HeldBy(key, _) | Condition::CreatedAt(key, _) => key,
    });
    let writes = txn.writes.iter().map(|write| match write {
        Write::Put { key, .. } | Write::Delete { key } => key,
    });
    let mut keys: Vec<_> = conditions.chain(writes).cloned().collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// A client for large answers.
fn large_kv(client: &Client) -> KvClient {
    client
        .kv_client()
        .max_decoding_message_size(LARGEST_RESPONSE)
}

fn range(keys: &Selector) -> (Vec<u8>, Option<Vec<u8>>) {
    match keys {
        Selector::Key(key) => (key.clone().into_bytes(), None),
        Selector::Prefix(prefix) => (prefix.clone().into_bytes(), Some(prefix_end(prefix))),
    }
}

fn page_options(end: Option<&[u8]>, revision: Option<Revision>, entries: usize) -> GetOptions {
    let mut options = GetOptions::new()
        .with_limit(entries as i64)
        .with_sort(SortTarget::Key, SortOrder::Ascend);
    if let Some(end) = end {
        options = options.with_range(end);
    }
    if let Some(revision) = revision {
        options = options.with_revision(revision);
    }
    options
}

/// The revision and the cluster that an answer is of.
fn position(header: Option<&ResponseHeader>) -> (Revision, u64) {
    header.map_or((0, 0), |header| (header.revision(), header.cluster_id()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(prefix_end("registry/app/"), b"registry/app0");
        assert_eq!(prefix_end(""), [0]);
    }
}

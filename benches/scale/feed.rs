//! A store that serves a group of nodes and delivers the events that the benchmark passes to it.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use pingora_etcd::ClusterError;
use pingora_etcd::store::{
    Entry, Lease, LeaseId, LeaseKeeper, Listing, Page, Revision, Selector, Store, Txn, WatchEvent,
    WatchRange, Watcher,
};
use tokio::sync::{mpsc, oneshot};

/// The number of entries on a page.
const PAGE: usize = 1_000;

#[derive(Debug, Clone)]
pub struct Feed {
    nodes: usize,
    revision: Arc<AtomicI64>,
    watched: Arc<AtomicBool>,
    sender: Arc<Mutex<mpsc::UnboundedSender<FeedMessage>>>,
}

#[derive(Debug)]
enum FeedMessage {
    Event(WatchEvent),
    /// Acknowledges that everything sent before it has been applied.
    Done(oneshot::Sender<()>),
}

fn entry(index: usize, revision: Revision) -> Entry {
    // The entry that a worker of this crate writes with the metrics of `SystemMetricsCollector`.
    let value = format!(
        r#"{{"id":"worker-{index}","ip":"10.{}.{}.{}","last_seen":1732450000{:03},"metadata":{{"cpu_usage_percent":{}.5,"memory_usage_percent":{}.25,"memory_available_bytes":{},"queue_depth":{}}},"port":8080,"priority":0}}"#,
        index >> 16,
        (index >> 8) & 255,
        index & 255,
        revision % 1000,
        revision % 50,
        revision % 70,
        8_000_000_000 + revision,
        revision % 7,
    );
    Entry {
        key: format!("registry/g/worker-{index}"),
        value: value.into_bytes(),
        create_revision: index as Revision + 2,
        mod_revision: revision,
        lease: Some(LeaseId(0x1000_0000 + index as i64)),
    }
}

impl Feed {
    pub fn new(nodes: usize) -> Self {
        let (sender, _) = mpsc::unbounded_channel();
        Self {
            nodes,
            revision: Arc::new(AtomicI64::new(nodes as Revision + 2)),
            watched: Arc::default(),
            sender: Arc::new(Mutex::new(sender)),
        }
    }

    /// Creates this many updates of random nodes.
    pub fn changes(&self, count: usize) -> Vec<WatchEvent> {
        (0..count)
            .map(|_| {
                let revision = self.revision.fetch_add(1, Ordering::Relaxed) + 1;
                WatchEvent::Put(entry(fastrand::usize(..self.nodes), revision))
            })
            .collect()
    }

    /// Whether a watcher is open.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// Delivers the events one by one, and waits until all have been applied.
    pub async fn deliver(&self, events: Vec<WatchEvent>) {
        let (done, wait) = oneshot::channel();
        {
            let sender = self.sender.lock().expect("the lock is not poisoned");
            for event in events {
                sender
                    .send(FeedMessage::Event(event))
                    .expect("a watcher is open");
            }
            sender
                .send(FeedMessage::Done(done))
                .expect("a watcher is open");
        }
        wait.await.expect("the events are applied");
    }

    fn refuse<T>(&self) -> Result<T, ClusterError> {
        Err(ClusterError::Rejected {
            endpoint: "feed".to_owned(),
            operation: "anything",
            reason: "only a discovery is served".to_owned(),
        })
    }
}

#[async_trait]
impl Store for Feed {
    async fn grant(&self, _: Duration) -> Result<Lease, ClusterError> {
        self.refuse()
    }

    fn keeper(&self, _: Lease) -> Box<dyn LeaseKeeper> {
        unreachable!("no lease is granted")
    }

    async fn revoke(&self, _: LeaseId) -> Result<(), ClusterError> {
        self.refuse()
    }

    async fn keys_of(&self, _: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.refuse()
    }

    async fn txn(&self, _: Txn) -> Result<Option<Revision>, ClusterError> {
        self.refuse()
    }

    async fn list(&self, keys: &Selector, _: Option<Revision>) -> Result<Listing, ClusterError> {
        let revision = self.revision.load(Ordering::Relaxed);
        let entries = match keys {
            // Prefixes are listed in pages, by `list_page`.
            Selector::Prefix(_) => Vec::new(),
            // The entry that was written last: a discovery uses it to recognise the history.
            Selector::Key(key) => {
                let index = key.rsplit('-').next().and_then(|index| index.parse().ok());
                index
                    .map(|index| entry(index, revision))
                    .into_iter()
                    .collect()
            }
        };
        Ok(Listing {
            revision,
            cluster_id: 1,
            entries,
        })
    }

    /// Returns a thousand entries per page, like a real store.
    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        _: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        let is_registry = matches!(keys, Selector::Prefix(prefix) if prefix == "registry/g/");
        let nodes = if is_registry { self.nodes } else { 0 };
        let first = start.map_or(0, |start| {
            let start = String::from_utf8(start).expect("a page start of this store");
            start.parse().expect("a page start of this store")
        });
        let end = nodes.min(first + PAGE);
        let revision = self.revision.load(Ordering::Relaxed);
        Ok(Page {
            listing: Listing {
                revision,
                cluster_id: 1,
                entries: (first..end).map(|index| entry(index, revision)).collect(),
            },
            next: (end < nodes).then(|| end.to_string().into_bytes()),
        })
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let (sender, inbox) = mpsc::unbounded_channel();
        *self.sender.lock().expect("the lock is not poisoned") = sender;
        self.watched.store(true, Ordering::Relaxed);
        Ok(Box::new(FeedWatcher {
            ranges,
            inbox,
            watched: self.watched.clone(),
        }))
    }
}

struct FeedWatcher {
    ranges: Vec<WatchRange>,
    inbox: mpsc::UnboundedReceiver<FeedMessage>,
    watched: Arc<AtomicBool>,
}

impl Drop for FeedWatcher {
    fn drop(&mut self) {
        self.watched.store(false, Ordering::Relaxed);
    }
}

#[async_trait]
impl Watcher for FeedWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        loop {
            match self.inbox.recv().await {
                Some(FeedMessage::Event(event)) => {
                    self.ranges[0].from = event.revision() + 1;
                    return Ok(vec![event]);
                }
                Some(FeedMessage::Done(done)) => drop(done.send(())),
                None => std::future::pending().await,
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.ranges
    }
}

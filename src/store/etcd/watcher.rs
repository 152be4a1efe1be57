//! One watch: reads what its stream delivers, and knows how far each of its ranges has been reported.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::connector::ConnectorHandle;
use super::link::Connection;
use super::status::{CallError, Failure, Subject};
use super::watch_response::Response;
use super::watch_stream::{Command, WatchStream};
use super::watch_table::{Delivery, ReaderQueue};
use crate::error::ClusterError;
use crate::store::traits::Watcher;
use crate::store::types::{WatchEvent, WatchRange};

/// Unread deliveries after which a watch is ended: the stream must not wait for it.
const MOST_UNREAD: usize = 1_024;

pub(super) struct EtcdWatcher {
    connector: ConnectorHandle,
    endpoint: Arc<str>,
    generation: u64,
    stream: WatchStream,
    deliveries: mpsc::Receiver<Delivery>,
    /// Whether the watch was ended because it was not read.
    is_behind: Arc<AtomicBool>,
    /// The ranges, and how far each has been reported.
    ranges: Vec<WatchRange>,
    /// The index of a range, by its id.
    ids: HashMap<i64, usize>,
    /// What was delivered while the watch was being opened.
    early: VecDeque<Delivery>,
}

impl Drop for EtcdWatcher {
    fn drop(&mut self) {
        for id in self.ids.keys() {
            self.stream.send(Command::Close(*id));
        }
    }
}

impl EtcdWatcher {
    /// Opens a watch on the current connection, or on a new one. If the token is refused, it is opened
    /// once more with a fresh one.
    pub(super) async fn open(
        connector: &ConnectorHandle,
        ranges: &[WatchRange],
    ) -> Result<Self, ClusterError> {
        let mut connection = connector.connection("watch").await?;
        let version = connection.token.version();
        let mut opened = Self::open_on(connector, &connection, ranges).await;
        if let Err(error) = &opened
            && connector.may_refresh_for_watch(error, &connection)
        {
            let fresh = connector
                .refresh_token(connection.generation, version)
                .await?;
            // The stream keeps the token that it was opened with.
            connection = connector.with_fresh_watches(fresh, &connection.watches);
            opened = Self::open_on(connector, &connection, ranges).await;
        }
        opened.map_err(|error| explain(connector, &connection.endpoint, ranges, &error))
    }

    /// Opens a watch on this connection, bounded in time.
    async fn open_on(
        connector: &ConnectorHandle,
        connection: &Connection,
        ranges: &[WatchRange],
    ) -> Result<Self, CallError> {
        let sent = Instant::now();
        let usual = connector.options.request_timeout;
        let after = connection.round_trips.request_timeout(usual);
        let opened = timeout(after, async {
            let mut watcher = Self::requested(connector, connection, ranges)?;
            watcher.confirmed().await?;
            Ok(watcher)
        });
        let opened = opened.await.unwrap_or(Err(Failure::Timeout(after).into()));
        if let Err(error) = &opened {
            connector.blame("watch", connection, sent, error);
        }
        opened
    }

    /// A watch whose ranges have been requested. Dropping it closes them.
    fn requested(
        connector: &ConnectorHandle,
        connection: &Connection,
        ranges: &[WatchRange],
    ) -> Result<Self, CallError> {
        if ranges.is_empty() {
            return Err(ClusterError::config("watch", "needs at least one range").into());
        }
        let (sender, deliveries) = mpsc::channel(MOST_UNREAD);
        let reader = ReaderQueue {
            deliveries: sender,
            is_behind: Arc::default(),
        };
        let stream = connection.watches.clone();
        let mut ids = HashMap::with_capacity(ranges.len());
        for (index, range) in ranges.iter().enumerate() {
            let id = stream.next_id();
            ids.insert(id, index);
            stream.send(Command::Open {
                id,
                range: range.clone(),
                reader: reader.clone(),
            });
        }
        Ok(Self {
            connector: connector.clone(),
            endpoint: connection.endpoint.clone(),
            generation: connection.generation,
            stream,
            deliveries,
            is_behind: reader.is_behind,
            ranges: ranges.to_vec(),
            ids,
            early: VecDeque::new(),
        })
    }

    /// Waits until the server has confirmed every range.
    async fn confirmed(&mut self) -> Result<(), CallError> {
        let mut pending = self.ranges.len();
        while pending > 0 {
            match self.delivery().await {
                Delivery::End(error) => return Err(error),
                Delivery::Response(id, response) if response.is_confirmation => {
                    if let Some(failure) = response.failure {
                        return Err(failure.into());
                    }
                    if let Some(range) = self.range(id) {
                        range.from = response.start_of(range);
                    }
                    pending -= 1;
                }
                early => self.early.push_back(early),
            }
        }
        Ok(())
    }

    fn range(&mut self, id: i64) -> Option<&mut WatchRange> {
        let index = self.ids.get(&id)?;
        self.ranges.get_mut(*index)
    }

    async fn delivery(&mut self) -> Delivery {
        self.deliveries.recv().await.unwrap_or_else(|| {
            Delivery::End(if self.is_behind.load(Ordering::Acquire) {
                // The connection is not the cause, and others use it.
                CallError::from(ClusterError::TooSlow {
                    operation: "watch",
                    behind: MOST_UNREAD,
                })
            } else {
                Failure::Unavailable("the stream has ended".to_owned()).into()
            })
        })
    }

    /// The events of a response that have not been reported.
    fn take(&mut self, id: i64, response: Response) -> Result<Vec<WatchEvent>, CallError> {
        if let Some(failure) = response.failure {
            return Err(failure.into());
        }
        let is_reliable = self.stream.has_reliable_progress;
        let last = response.last_event();
        let Some(range) = self.range(id) else {
            return Ok(Vec::new());
        };
        let mut events = response.events;
        // After a watch was replaced some may come twice.
        events.retain(|event| event.revision() >= range.from);
        // All changes of one revision come in one response, so the next revision is a safe position.
        // The revision of the header is safe only without events, because it may be ahead of changes
        // that are still to be sent; with an older server it is not safe at all.
        let reached = match last {
            Some(last) => last,
            None if is_reliable => response.revision,
            None => 0,
        };
        range.from = range.from.max(reached + 1);
        Ok(events)
    }
}

fn explain(
    connector: &ConnectorHandle,
    endpoint: &str,
    ranges: &[WatchRange],
    error: &CallError,
) -> ClusterError {
    let keys: Vec<_> = ranges.iter().map(|range| range.keys.as_str()).collect();
    let subject = Subject {
        keys: &keys,
        lease: None,
    };
    connector.explain("watch", endpoint, subject, error)
}

#[async_trait]
impl Watcher for EtcdWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        loop {
            let delivery = match self.early.pop_front() {
                Some(delivery) => delivery,
                None => self.delivery().await,
            };
            let events = match delivery {
                Delivery::Response(id, response) => self.take(id, response),
                Delivery::Progress(id, revision) => {
                    if let Some(range) = self.range(id) {
                        range.from = range.from.max(revision + 1);
                    }
                    continue;
                }
                Delivery::End(error) => Err(error),
            };
            match events {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(error) => {
                    let explained = explain(&self.connector, &self.endpoint, &self.ranges, &error);
                    // The stream also ends with an answer that is too large.
                    if error.blames_connection() || matches!(error.failure, Failure::TooLarge(_)) {
                        self.connector.discard(self.generation, &explained);
                    }
                    return Err(explained);
                }
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.ranges
    }
}

//! Watches: every one on a connection shares one stream.
//!
//! A task reads the stream and passes each response on to the watch that it belongs to. It ends
//! with the connection, or when nobody holds it any more.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, EventType, WatchClient, WatchOptions, WatchRequestSender, WatchResponse,
    WatchResponseStream,
};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::debug;

use super::connection::Connection;
use super::security::refusal;
use super::{EtcdStore, LARGEST_RESPONSE, entry, explain, prefix_end};
use crate::error::ClusterError;
use crate::store::{Selector, WatchEvent, WatchRange, Watcher};

/// Responses that one watch may be behind before it is ended: the stream must not wait for it.
const BEHIND: usize = 1_024;

/// A response, or why there are no more, for the watch with this id.
type Told = (i64, Result<WatchResponse, ClusterError>);

enum Command {
    Open {
        id: i64,
        range: WatchRange,
        told: mpsc::Sender<Told>,
    },
    Close(i64),
}

/// A handle to the stream that all watches of a connection share.
#[derive(Clone)]
pub(super) struct WatchStreams {
    commands: mpsc::UnboundedSender<Command>,
    next_id: Arc<AtomicI64>,
    started: Instant,
}

impl WatchStreams {
    /// Starts the task, which opens the stream when the first watch is asked for.
    pub(super) fn new(
        client: &Client,
        endpoint: Arc<str>,
        timeout: Duration,
        open: watch::Receiver<()>,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let dispatcher = Dispatcher {
            client: client
                .watch_client()
                .max_decoding_message_size(LARGEST_RESPONSE),
            endpoint,
            timeout,
            stream: None,
            pending: VecDeque::new(),
            watches: HashMap::new(),
        };
        tokio::spawn(dispatcher.run(inbox, open));
        Self {
            commands,
            // 0 would let the server choose.
            next_id: Arc::new(AtomicI64::new(1)),
            started: Instant::now(),
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.commands.same_channel(&other.commands)
    }

    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    fn next_id(&self) -> i64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn send(&self, command: Command) {
        // Without a receiver there is no stream any more, and each watch has been told.
        let _ = self.commands.send(command);
    }
}

struct Dispatcher {
    client: WatchClient,
    endpoint: Arc<str>,
    timeout: Duration,
    stream: Option<(WatchRequestSender, WatchResponseStream)>,
    /// Asked for, not yet confirmed, in this order.
    pending: VecDeque<i64>,
    watches: HashMap<i64, mpsc::Sender<Told>>,
}

impl Dispatcher {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Command>,
        mut open: watch::Receiver<()>,
    ) {
        let error = tokio::select! {
            // Nothing is ever sent: this is its end.
            _ = open.changed() => self.unavailable("its connection has been given up"),
            error = self.serve(&mut inbox) => error,
        };
        inbox.close();
        // Those that nobody has looked at yet are told as well.
        while let Some(command) = inbox.recv().await {
            if let Command::Open { id, told, .. } = command {
                self.watches.insert(id, told);
            }
        }
        debug!(endpoint = &*self.endpoint, %error, watches = self.watches.len(), "watch stream ends");
        for (id, told) in self.watches.drain() {
            // One that is full ends all the same, when its sender goes.
            let _ = told.try_send((id, Err(error.clone())));
        }
    }

    async fn serve(&mut self, inbox: &mut mpsc::UnboundedReceiver<Command>) -> ClusterError {
        loop {
            let message = async {
                match &mut self.stream {
                    Some((_, responses)) => responses.message().await,
                    None => std::future::pending().await,
                }
            };
            let result = tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return self.unavailable("nobody watches any more"),
                },
                message = message => match message {
                    Ok(Some(response)) => {
                        self.pass_on(response).await
                    }
                    Ok(None) => return self.unavailable("the stream has ended"),
                    Err(error) => return self.explain(&error),
                },
            };
            if let Err(error) = result {
                return self.explain(&error);
            }
        }
    }

    fn unavailable(&self, reason: &str) -> ClusterError {
        ClusterError::Unavailable {
            endpoint: self.endpoint.to_string(),
            operation: "watch",
            reason: reason.to_owned(),
        }
    }

    fn explain(&self, error: &etcd_client::Error) -> ClusterError {
        explain("watch", &self.endpoint, self.timeout, error)
    }

    async fn obey(&mut self, command: Command) -> Result<(), etcd_client::Error> {
        match command {
            Command::Open { id, range, told } => {
                let mut options = WatchOptions::new()
                    .with_start_revision(range.from)
                    .with_watch_id(id)
                    .with_progress_notify();
                if let Selector::Prefix(prefix) = &range.keys {
                    options = options.with_range(prefix_end(prefix));
                }
                self.watches.insert(id, told);
                self.pending.push_back(id);
                let key = range.keys.as_str();
                match &mut self.stream {
                    None => {
                        let opened = self.client.watch(key, Some(options)).await?;
                        self.stream = Some(opened.split());
                    }
                    Some((requests, _)) => requests.watch(key, Some(options)).await?,
                }
            }
            Command::Close(id) => {
                if self.watches.remove(&id).is_some()
                    && let Some((requests, _)) = &mut self.stream
                {
                    requests.cancel(id).await?;
                }
            }
        }
        Ok(())
    }

    async fn pass_on(&mut self, response: WatchResponse) -> Result<(), etcd_client::Error> {
        let mut id = response.watch_id();
        if response.created() {
            // A watch that is refused is answered with -1 for its id; answers come in the order
            // of the requests.
            match self.pending.iter().position(|pending| *pending == id) {
                Some(index) => drop(self.pending.remove(index)),
                None => id = self.pending.pop_front().unwrap_or(id),
            }
        }
        let Some(told) = self.watches.get(&id).cloned() else {
            return Ok(());
        };
        let ended = response.canceled();
        let full = matches!(
            told.try_send((id, Ok(response))),
            Err(mpsc::error::TrySendError::Full(_))
        );
        if ended {
            self.watches.remove(&id);
        }
        if full {
            // Every range of the same watcher ends with this one: it has missed something, and is
            // told so by the end of its channel.
            let of_it = self
                .watches
                .extract_if(|_, other| other.same_channel(&told));
            let ids: Vec<i64> = of_it.map(|(id, _)| id).collect();
            if let Some((requests, _)) = &mut self.stream {
                for id in ids {
                    requests.cancel(id).await?;
                }
            }
        }
        Ok(())
    }
}

pub(super) struct EtcdWatcher {
    store: EtcdStore,
    endpoint: Arc<str>,
    generation: u64,
    streams: WatchStreams,
    told: mpsc::Receiver<Told>,
    /// What is watched, and how far each range has been told.
    ranges: Vec<WatchRange>,
    /// Which range a watch id belongs to.
    ids: HashMap<i64, usize>,
    /// Responses that came while the watch was being opened.
    early: VecDeque<(i64, WatchResponse)>,
}

impl Drop for EtcdWatcher {
    fn drop(&mut self) {
        for id in self.ids.keys() {
            self.streams.send(Command::Close(*id));
        }
    }
}

impl EtcdWatcher {
    pub(super) async fn open(
        store: &EtcdStore,
        connection: &Connection,
        ranges: Vec<WatchRange>,
    ) -> Result<Self, ClusterError> {
        if ranges.is_empty() {
            return Err(ClusterError::config("watch", "needs at least one range"));
        }
        let streams = connection.watches.clone();
        let (told_to, told) = mpsc::channel(BEHIND);
        // Kept by the watcher from here on: if this future is dropped, the watches are closed.
        let mut watcher = Self {
            store: store.clone(),
            endpoint: connection.endpoint.clone(),
            generation: connection.generation,
            streams,
            told,
            ids: HashMap::with_capacity(ranges.len()),
            ranges,
            early: VecDeque::new(),
        };
        for (index, range) in watcher.ranges.iter().enumerate() {
            let id = watcher.streams.next_id();
            watcher.ids.insert(id, index);
            watcher.streams.send(Command::Open {
                id,
                range: range.clone(),
                told: told_to.clone(),
            });
        }
        drop(told_to);
        let mut pending = watcher.ranges.len();
        while pending > 0 {
            let (id, response) = watcher.response().await?;
            if response.created() {
                watcher.check(&response)?;
                pending -= 1;
            } else {
                watcher.early.push_back((id, response));
            }
        }
        Ok(watcher)
    }

    async fn response(&mut self) -> Result<(i64, WatchResponse), ClusterError> {
        match self.told.recv().await {
            Some((id, response)) => Ok((id, response?)),
            None => Err(ClusterError::Unavailable {
                endpoint: self.endpoint.to_string(),
                operation: "watch",
                reason: "the stream has ended, or this watch was too slow for it".to_owned(),
            }),
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
            let refused = refusal("watch", &self.endpoint, &reason);
            return Err(refused.unwrap_or_else(|| ClusterError::Unavailable {
                endpoint: self.endpoint.to_string(),
                operation: "watch",
                reason,
            }));
        }
        Ok(())
    }

    fn take(&mut self, id: i64, response: &WatchResponse) -> Result<Vec<WatchEvent>, ClusterError> {
        self.check(response)?;
        let Some(range) = self
            .ids
            .get(&id)
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
            let events = response.and_then(|(id, response)| self.take(id, &response));
            match events {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(error) => {
                    if error.blames_connection() {
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

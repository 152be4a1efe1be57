//! Watches: every one on a connection shares one stream.
//!
//! A task reads the stream and passes each response on to the watch that it belongs to. It ends
//! with the connection, or when nobody holds it any more.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, EventType, WatchClient, WatchOptions, WatchRequestSender, WatchResponse,
    WatchResponseStream,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::connection::Connection;
use super::round_trips::RoundTrips;
use super::security::refusal;
use super::{EtcdOptions, EtcdStore, LARGEST_RESPONSE, entry, explain, prefix_end};
use crate::error::ClusterError;
use crate::store::{Selector, WatchEvent, WatchRange, Watcher};

/// Progress requests whose answers are waited for.
const MOST_UNANSWERED: usize = 16;
/// Responses that one watch may be behind before it is ended: the stream must not wait for it.
const BEHIND: usize = 1_024;

/// What a watch is told.
enum Told {
    /// Of this range.
    Response(i64, WatchResponse),
    /// This range has been told everything up to this revision.
    Progress(i64, i64),
    /// There is no more.
    End(ClusterError),
}

enum Command {
    Open {
        id: i64,
        range: WatchRange,
        reader: Reader,
    },
    Close(i64),
}

/// Who is told what a watch tells.
#[derive(Clone)]
struct Reader {
    told: mpsc::Sender<Told>,
    /// Set before the channel is closed because it was full.
    is_behind: Arc<AtomicBool>,
}

/// A handle to the stream that all watches of a connection share.
#[derive(Clone)]
pub(super) struct WatchStreams {
    commands: mpsc::UnboundedSender<Command>,
    next_id: Arc<AtomicI64>,
    started: Instant,
    /// Whether a watch can be gone on with from the revision in an answer to a progress request.
    pub(super) tells_progress: bool,
}

impl WatchStreams {
    /// Starts the task, which opens the stream when the first watch is asked for.
    pub(super) fn new(
        client: &Client,
        endpoint: Arc<str>,
        tells_progress: bool,
        options: &EtcdOptions,
        round_trips: RoundTrips,
        open: watch::Receiver<()>,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        // 0 would let the server choose. None that a proxy would choose by itself, counting from there.
        let next_id = Arc::new(AtomicI64::new(fastrand::i64(1 << 32..1 << 48)));
        let dispatcher = Dispatcher {
            client: client
                .watch_client()
                .max_decoding_message_size(LARGEST_RESPONSE),
            endpoint,
            timeout: options.request_timeout,
            patience: options.silence_timeout,
            asks_for_progress: options.asks_for_progress,
            tells_progress,
            round_trips,
            stream: None,
            next_id: next_id.clone(),
            numbering: Numbering::Unknown,
            queued: VecDeque::new(),
            pending: VecDeque::new(),
            requests: 0,
            unanswered: VecDeque::new(),
            watches: HashMap::new(),
            numbers: HashMap::new(),
            silence: Silence::new(),
        };
        tokio::spawn(dispatcher.run(inbox, open));
        Self {
            commands,
            next_id,
            started: Instant::now(),
            tells_progress,
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

/// One watch on the server.
struct Watched {
    /// What its reader calls it.
    id: i64,
    reader: Reader,
    /// What the server calls it, once it has said so.
    number: Option<i64>,
    /// With how far it has been told.
    range: WatchRange,
    /// The one that it takes the place of, once it is there.
    replaces: Option<i64>,
    /// How many progress requests had been sent when it was confirmed: answers to those do not speak
    /// of it, for confirmations and answers may overtake each other.
    confirmed: Option<u64>,
}

/// What is done about a stream that says nothing.
struct Silence {
    heard: Instant,
    asked: Asked,
    /// When that was.
    asked_at: Instant,
}

#[derive(Clone, Copy, PartialEq)]
enum Asked {
    Nothing,
    /// How far it is.
    Progress,
    /// For every watch anew: which tells whether the stream is alive, and everything that the
    /// watch before may have missed.
    Watches,
}

impl Silence {
    fn new() -> Self {
        Self {
            heard: Instant::now(),
            asked: Asked::Nothing,
            asked_at: Instant::now(),
        }
    }

    fn ask(&mut self, what: Asked) {
        self.asked = what;
        self.asked_at = Instant::now();
    }

    fn heard(&mut self) {
        self.heard = Instant::now();
        self.asked = Asked::Nothing;
    }

    /// When to do something about it. All is over within nine tenths of `patience`, unless answers
    /// take longer by what was measured; but each question has its time from when it was asked,
    /// whatever this process was doing before.
    fn due(&self, patience: Duration, round_trips: &RoundTrips) -> Instant {
        match self.asked {
            Asked::Nothing => self.heard + patience.mul_f64(0.4),
            _ => self.asked_at + self.time_to_answer(patience, round_trips),
        }
    }

    fn time_to_answer(&self, patience: Duration, round_trips: &RoundTrips) -> Duration {
        round_trips.patience(match self.asked {
            Asked::Nothing => patience / 2,
            Asked::Progress | Asked::Watches => patience / 4,
        })
    }
}

/// Whose ids the server calls watches by. etcd takes those that are asked for; its `grpc-proxy`
/// counts by itself, and confirms watches in any order.
#[derive(Clone, Copy, PartialEq)]
enum Numbering {
    /// Nothing is confirmed yet.
    Unknown,
    Ours,
    /// Then one watch is asked for at a time, so that it is clear which one is confirmed.
    Theirs,
}

/// What the dispatcher acts on.
enum Next {
    Command(Command),
    Response(WatchResponse),
    /// Nothing was heard for a while.
    Silence,
}

struct Dispatcher {
    client: WatchClient,
    endpoint: Arc<str>,
    timeout: Duration,
    /// How long the stream may say nothing.
    patience: Duration,
    asks_for_progress: bool,
    /// Whether a watch can be gone on with from the revision in an answer to a progress request.
    tells_progress: bool,
    round_trips: RoundTrips,
    stream: Option<(WatchRequestSender, WatchResponseStream)>,
    next_id: Arc<AtomicI64>,
    numbering: Numbering,
    /// To be asked for, when it is clear what their confirmation will be.
    queued: VecDeque<i64>,
    /// Asked for, not yet confirmed, in this order, and when.
    pending: VecDeque<(i64, Instant)>,
    /// Progress requests sent, and of those not answered the numbers, and when.
    requests: u64,
    unanswered: VecDeque<(u64, Instant)>,
    /// By the id that was asked for.
    watches: HashMap<i64, Watched>,
    /// That id, by the server's.
    numbers: HashMap<i64, i64>,
    silence: Silence,
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
        let watches = self.watches.drain();
        let mut readers: Vec<_> = watches.map(|(_, watch)| watch.reader).collect();
        // Those that nobody has looked at yet are told as well.
        while let Some(command) = inbox.recv().await {
            if let Command::Open { reader, .. } = command {
                readers.push(reader);
            }
        }
        debug!(endpoint = &*self.endpoint, %error, watches = readers.len(), "watch stream ends");
        for reader in readers {
            // One that is full ends all the same, when its sender goes.
            let _ = reader.told.try_send(Told::End(error.clone()));
        }
    }

    async fn serve(&mut self, inbox: &mut mpsc::UnboundedReceiver<Command>) -> ClusterError {
        loop {
            let due = self.silence.due(self.patience, &self.round_trips);
            let is_watching = self.stream.is_some() && !self.watches.is_empty();
            let message = async {
                match &mut self.stream {
                    Some((_, responses)) => responses.message().await,
                    None => std::future::pending().await,
                }
            };
            let next = tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    Some(command) => Next::Command(command),
                    None => return self.unavailable("nobody watches any more"),
                },
                message = message => match message {
                    Ok(Some(response)) => Next::Response(response),
                    Ok(None) => return self.unavailable("the stream has ended"),
                    Err(error) => return self.explain(&error),
                },
                () = sleep_until(due), if is_watching => Next::Silence,
            };
            // Requests wait for room on the connection, which a silent one does not make.
            let time = match (&next, self.silence.asked) {
                (Next::Silence, Asked::Watches) => Duration::ZERO,
                (Next::Silence, Asked::Nothing | Asked::Progress) => self
                    .silence
                    .time_to_answer(self.patience, &self.round_trips),
                (Next::Command(_) | Next::Response(_), _) => {
                    self.round_trips.patience(self.patience)
                }
            };
            let act = async {
                match next {
                    Next::Command(command) => self.obey(command).await,
                    Next::Response(response) => {
                        self.silence.heard();
                        self.round_trips.heard();
                        self.pass_on(response).await
                    }
                    Next::Silence => match self.silence.asked {
                        Asked::Nothing => self.ask_for_progress().await,
                        Asked::Progress => self.ask_anew().await,
                        Asked::Watches => std::future::pending().await,
                    },
                }
            };
            match timeout(time, act).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.explain(&error),
                Err(_) => {
                    return ClusterError::Timeout {
                        endpoint: self.endpoint.to_string(),
                        operation: "watch",
                        after: self.silence.heard.elapsed(),
                    };
                }
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

    async fn ask_for_progress(&mut self) -> Result<(), etcd_client::Error> {
        self.silence.ask(Asked::Progress);
        let Some((requests, _)) = self.stream.as_mut().filter(|_| self.asks_for_progress) else {
            return Ok(());
        };
        self.requests += 1;
        self.unanswered.push_back((self.requests, Instant::now()));
        // The oldest number is the safe one, see there.
        self.unanswered.truncate(MOST_UNANSWERED);
        requests.request_progress().await
    }

    /// The server does not say how far it is: a proxy never does, and newer ones not while any watch on
    /// the stream begins at a revision that is still to come (etcd-io/etcd#20229). A watch from where the
    /// last one stopped is confirmed by one that is alive, and tells whatever has been missed.
    async fn ask_anew(&mut self) -> Result<(), etcd_client::Error> {
        self.silence.ask(Asked::Watches);
        let replaced: Vec<_> = self
            .watches
            .values()
            .filter_map(|watch| watch.replaces)
            .collect();
        let again: Vec<_> = self
            .watches
            .iter()
            // One from now on that is not confirmed: where it begins is not known yet.
            .filter(|(_, watch)| watch.range.from > 0)
            .filter(|(at, watch)| watch.replaces.is_none() && !replaced.contains(at))
            .map(|(at, watch)| (*at, watch.id, watch.reader.clone(), watch.range.clone()))
            .collect();
        for (at, id, reader, range) in again {
            let new = self.next_id.fetch_add(1, Ordering::Relaxed);
            let watch = Watched {
                id,
                reader,
                number: None,
                range,
                replaces: Some(at),
                confirmed: None,
            };
            self.open(new, watch).await?;
        }
        Ok(())
    }

    async fn obey(&mut self, command: Command) -> Result<(), etcd_client::Error> {
        match command {
            Command::Open { id, range, reader } => {
                let watch = Watched {
                    id,
                    reader,
                    number: None,
                    range,
                    replaces: None,
                    confirmed: None,
                };
                if self.watches.is_empty() {
                    // Until now there was nothing to hear.
                    self.silence.heard();
                }
                self.open(id, watch).await
            }
            Command::Close(id) => {
                let of_it = self.watches.extract_if(|_, watch| watch.id == id);
                let closed: Vec<_> = of_it.map(|(_, watch)| watch).collect();
                self.cancel(closed).await
            }
        }
    }

    async fn open(&mut self, at: i64, watch: Watched) -> Result<(), etcd_client::Error> {
        self.watches.insert(at, watch);
        self.queued.push_back(at);
        self.ask_for_queued().await
    }

    /// Asks for the watches that it is the turn of.
    async fn ask_for_queued(&mut self) -> Result<(), etcd_client::Error> {
        while self.numbering == Numbering::Ours || self.pending.is_empty() {
            let Some(at) = self.queued.pop_front() else {
                break;
            };
            // Closed meanwhile, perhaps.
            let Some(watch) = self.watches.get(&at) else {
                continue;
            };
            let mut options = WatchOptions::new()
                .with_start_revision(watch.range.from)
                .with_watch_id(at)
                .with_progress_notify();
            let key = watch.range.keys.as_str().to_owned();
            if let Selector::Prefix(prefix) = &watch.range.keys {
                options = options.with_range(prefix_end(prefix));
            }
            self.pending.push_back((at, Instant::now()));
            match &mut self.stream {
                None => {
                    let opened = self.client.watch(key, Some(options)).await?;
                    self.stream = Some(opened.split());
                    self.silence.heard();
                }
                Some((requests, _)) => requests.watch(key, Some(options)).await?,
            }
        }
        Ok(())
    }

    /// Cancels watches that have been taken out. One that is not confirmed yet is cancelled when it is.
    async fn cancel(
        &mut self,
        watches: impl IntoIterator<Item = Watched>,
    ) -> Result<(), etcd_client::Error> {
        for number in watches.into_iter().filter_map(|watch| watch.number) {
            self.numbers.remove(&number);
            self.cancel_number(number).await?;
        }
        Ok(())
    }

    async fn cancel_number(&mut self, number: i64) -> Result<(), etcd_client::Error> {
        match &mut self.stream {
            Some((requests, _)) => requests.cancel(number).await,
            None => Ok(()),
        }
    }

    /// Which watch is confirmed, or refused: that is answered with -1 for its id.
    fn confirmed(&mut self, number: i64) -> Option<i64> {
        let by_id = self.pending.iter().position(|(at, _)| *at == number);
        // Else answers come in the order of the requests, or there is one only: the first.
        let by_id = by_id.filter(|_| self.numbering != Numbering::Theirs);
        let index = by_id.unwrap_or_default();
        let (at, sent) = self.pending.remove(index)?;
        self.round_trips.answered(sent);
        if self.numbering == Numbering::Unknown && number >= 0 {
            self.numbering = if at == number {
                Numbering::Ours
            } else {
                debug!(
                    endpoint = &*self.endpoint,
                    "the server numbers watches by itself"
                );
                Numbering::Theirs
            };
        }
        Some(at)
    }

    async fn pass_on(&mut self, response: WatchResponse) -> Result<(), etcd_client::Error> {
        let number = response.watch_id();
        let ended = response.canceled();
        let at = if response.created() {
            let Some(at) = self.confirmed(number) else {
                return Ok(());
            };
            if !ended {
                self.numbers.insert(number, at);
            }
            self.ask_for_queued().await?;
            at
        } else if number == -1 && !ended {
            self.pass_on_progress(&response);
            return Ok(());
        } else {
            match self.numbers.get(&number) {
                Some(at) => *at,
                None => return Ok(()),
            }
        };
        let Some(watch) = self.watches.get_mut(&at) else {
            // Closed while it was being opened.
            if !ended && self.numbers.remove(&number).is_some() {
                self.cancel_number(number).await?;
            }
            return Ok(());
        };
        if let Some(last) = response.events().last().and_then(|event| event.kv()) {
            watch.range.from = watch.range.from.max(last.mod_revision() + 1);
        }
        if response.created() {
            watch.range.from = begins(&watch.range, &response);
            watch.confirmed = Some(self.requests);
            watch.number = (!ended).then_some(number);
        }
        if response.created()
            && let Some(replaced) = watch.replaces.take()
            && !ended
        {
            // Its reader never knows.
            let replaced = self.watches.remove(&replaced);
            return self.cancel(replaced).await;
        }
        let (id, reader) = (watch.id, watch.reader.clone());
        let full = matches!(
            reader.told.try_send(Told::Response(id, response)),
            Err(mpsc::error::TrySendError::Full(_))
        );
        if ended {
            self.watches.remove(&at);
            self.numbers.remove(&number);
        }
        if full {
            // Every range of the same watcher ends with this one: it has missed something, and is
            // told so by the end of its channel.
            reader.is_behind.store(true, Ordering::Release);
            let of_it = self
                .watches
                .extract_if(|_, other| other.reader.told.same_channel(&reader.told));
            let ended: Vec<_> = of_it.map(|(_, watch)| watch).collect();
            self.cancel(ended).await?;
        }
        Ok(())
    }

    /// The answer to a progress request is for all watches that the server knew of when it was asked.
    /// If one before it was never answered this one is taken for its answer: for fewer watches, then, and
    /// how long it took is not known.
    fn pass_on_progress(&mut self, response: &WatchResponse) {
        let revision = response.header().map_or(0, |header| header.revision());
        let answered = self.unanswered.pop_front();
        if let Some((_, sent)) = answered.filter(|_| self.unanswered.is_empty()) {
            self.round_trips.answered(sent);
        }
        let Some((request, _)) = answered.filter(|_| self.tells_progress) else {
            return;
        };
        let known = self
            .watches
            .values_mut()
            .filter(|watch| watch.confirmed.is_some_and(|before| before < request));
        for watch in known {
            watch.range.from = watch.range.from.max(revision + 1);
            // One that has no room for it learns how far it is from what it has.
            let _ = watch
                .reader
                .told
                .try_send(Told::Progress(watch.id, revision));
        }
    }
}

/// The first revision that is told of a watch that was just confirmed: one from now on begins after what
/// there is.
fn begins(range: &WatchRange, confirmed: &WatchResponse) -> i64 {
    match range.from {
        0 => confirmed.header().map_or(0, |header| header.revision()) + 1,
        from => from,
    }
}

pub(super) struct EtcdWatcher {
    store: EtcdStore,
    endpoint: Arc<str>,
    generation: u64,
    streams: WatchStreams,
    told: mpsc::Receiver<Told>,
    /// Whether it was ended because it was not read.
    is_behind: Arc<AtomicBool>,
    /// What is watched, and how far each range has been told.
    ranges: Vec<WatchRange>,
    /// Which range a watch id belongs to.
    ids: HashMap<i64, usize>,
    /// What came while the watch was being opened.
    early: VecDeque<Told>,
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
        let reader = Reader {
            told: told_to,
            is_behind: Arc::default(),
        };
        // Kept by the watcher from here on: if this future is dropped, the watches are closed.
        let mut watcher = Self {
            store: store.clone(),
            endpoint: connection.endpoint.clone(),
            generation: connection.generation,
            streams,
            told,
            is_behind: reader.is_behind.clone(),
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
                reader: reader.clone(),
            });
        }
        drop(reader);
        let mut pending = watcher.ranges.len();
        while pending > 0 {
            match watcher.told().await {
                Told::End(error) => return Err(error),
                Told::Response(id, response) if response.created() => {
                    watcher.check(&response)?;
                    let index = watcher.ids.get(&id);
                    if let Some(range) = index.and_then(|index| watcher.ranges.get_mut(*index)) {
                        range.from = begins(range, &response);
                    }
                    pending -= 1;
                }
                told => watcher.early.push_back(told),
            }
        }
        Ok(watcher)
    }

    async fn told(&mut self) -> Told {
        self.told.recv().await.unwrap_or_else(|| {
            Told::End(if self.is_behind.load(Ordering::Acquire) {
                // The connection is not to blame, and others use it.
                ClusterError::TooSlow {
                    operation: "watch",
                    behind: BEHIND,
                }
            } else {
                ClusterError::Unavailable {
                    endpoint: self.endpoint.to_string(),
                    operation: "watch",
                    reason: "the stream has ended".to_owned(),
                }
            })
        })
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
        // from. The header's revision is safe only where there are no events, for it may be ahead of
        // changes still to be sent; and of an older server not even there.
        let last = response.events().last().and_then(|event| event.kv());
        let reached = match last {
            Some(last) => last.mod_revision(),
            None if self.streams.tells_progress => {
                response.header().map_or(0, |header| header.revision())
            }
            None => 0,
        };
        range.from = range.from.max(reached + 1);
        Ok(events)
    }
}

#[async_trait]
impl Watcher for EtcdWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        loop {
            let told = match self.early.pop_front() {
                Some(told) => told,
                None => self.told().await,
            };
            let events = match told {
                Told::Response(id, response) => self.take(id, &response),
                Told::Progress(id, revision) => {
                    let index = self.ids.get(&id);
                    if let Some(range) = index.and_then(|index| self.ranges.get_mut(*index)) {
                        range.from = range.from.max(revision + 1);
                    }
                    continue;
                }
                Told::End(error) => Err(error),
            };
            match events {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(error) => {
                    // The stream has ended with an answer that was too large, too.
                    if error.blames_connection() || matches!(error, ClusterError::TooLarge { .. }) {
                        self.store.discard(self.generation, &error);
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

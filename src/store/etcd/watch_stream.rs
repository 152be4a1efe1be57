//! The stream that all watches of a connection share.
//!
//! A task sends the requests and reads the responses that its [`WatchTable`] decides about. It ends
//! with the connection, or when nobody holds a handle any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Error as EtcdError, WatchClient, WatchOptions, WatchRequestSender, WatchResponse,
    WatchResponseStream,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::convert::key_range;
use super::options::EtcdOptions;
use super::round_trips::RoundTrips;
use super::silence::{Probe, Silence};
use super::status::{CallError, Failure};
use super::watch_table::{Delivery, ReaderQueue, Request, WatchTable};
use crate::store::types::WatchRange;

/// The largest response accepted, for a page of a list or on a watch. The client's own limit of 4 MiB is
/// less than what etcd may send at once.
pub(super) const LARGEST_RESPONSE: usize = 64 << 20;

pub(super) enum Command {
    Open {
        id: i64,
        range: WatchRange,
        reader: ReaderQueue,
    },
    Close(i64),
}

/// A handle to the stream.
#[derive(Clone)]
pub(super) struct WatchStream {
    commands: mpsc::UnboundedSender<Command>,
    next_id: Arc<AtomicI64>,
    started: Instant,
    /// Whether a watch can continue from the revision in an answer to a progress request.
    pub(super) has_reliable_progress: bool,
}

impl WatchStream {
    /// Starts the task, which opens the stream when the first watch is requested. `open` ends with the
    /// connection.
    pub(super) fn new(
        client: &Client,
        endpoint: Arc<str>,
        has_reliable_progress: bool,
        options: &EtcdOptions,
        round_trips: RoundTrips,
        open: watch::Receiver<()>,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        // A random start: 0 would let the server choose, and a proxy counts its own numbers from 0.
        let next_id = Arc::new(AtomicI64::new(fastrand::i64(1 << 32..1 << 48)));
        let now = Instant::now();
        let task = StreamTask {
            client: client
                .watch_client()
                .max_decoding_message_size(LARGEST_RESPONSE),
            stream: None,
            table: WatchTable::new(
                endpoint.clone(),
                has_reliable_progress,
                round_trips.clone(),
                next_id.clone(),
            ),
            silence: Silence::new(options.silence_timeout, now),
            silence_timeout: options.silence_timeout,
            requests_progress: options.requests_progress,
            round_trips,
            endpoint,
        };
        tokio::spawn(task.run(inbox, open));
        Self {
            commands,
            next_id,
            started: now,
            has_reliable_progress,
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.commands.same_channel(&other.commands)
    }

    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn next_id(&self) -> i64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn send(&self, command: Command) {
        // If the task has ended, it has informed every reader.
        let _ = self.commands.send(command);
    }
}

/// What the task reacts to.
enum Input {
    Command(Command),
    Response(WatchResponse),
    /// Nothing was received for some time.
    Silence,
}

struct StreamTask {
    endpoint: Arc<str>,
    client: WatchClient,
    stream: Option<(WatchRequestSender, WatchResponseStream)>,
    table: WatchTable,
    silence: Silence,
    silence_timeout: Duration,
    requests_progress: bool,
    round_trips: RoundTrips,
}

impl StreamTask {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Command>,
        mut open: watch::Receiver<()>,
    ) {
        let error = tokio::select! {
            // Nothing is ever sent: the channel closes with the connection.
            _ = open.changed() => unavailable("its connection has been given up"),
            error = self.serve(&mut inbox) => error,
        };
        inbox.close();
        let mut readers = self.table.drain();
        // Commands that were sent before the inbox was closed.
        while let Some(command) = inbox.recv().await {
            if let Command::Open { reader, .. } = command {
                readers.push(reader);
            }
        }
        debug!(endpoint = &*self.endpoint, %error, watches = readers.len(), "watch stream ends");
        for reader in readers {
            // A reader whose queue is full notices the end when its queue closes.
            let _ = reader.deliveries.try_send(Delivery::End(error.clone()));
        }
    }

    async fn serve(&mut self, inbox: &mut mpsc::UnboundedReceiver<Command>) -> CallError {
        loop {
            let due = self.silence.due(&self.round_trips);
            let is_watching = self.stream.is_some() && !self.table.is_empty();
            let message = async {
                match &mut self.stream {
                    Some((_, responses)) => responses.message().await,
                    None => std::future::pending().await,
                }
            };
            let input = tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    Some(command) => Input::Command(command),
                    None => return unavailable("nobody watches any more"),
                },
                message = message => match message {
                    Ok(Some(response)) => Input::Response(response),
                    Ok(None) => return unavailable("the stream has ended"),
                    Err(error) => return error.into(),
                },
                () = sleep_until(due), if is_watching => Input::Silence,
            };
            // Requests wait for room on the connection, which may never come if it is dead.
            let time = match (&input, self.silence.probe) {
                (Input::Silence, Probe::Watches) => return self.silent(),
                (Input::Silence, Probe::None | Probe::Progress) => {
                    self.silence.time_to_answer(&self.round_trips)
                }
                (Input::Command(_) | Input::Response(_), _) => {
                    self.round_trips.patience(self.silence_timeout)
                }
            };
            self.react(input);
            match timeout(time, self.send_requests()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.into(),
                Err(_) => return self.silent(),
            }
        }
    }

    fn silent(&self) -> CallError {
        Failure::Timeout(self.silence.duration(Instant::now())).into()
    }

    fn react(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Command(Command::Open { id, range, reader }) => {
                if self.table.is_empty() {
                    // Until now there was nothing to receive.
                    self.silence.ends(now);
                }
                self.table.open(id, range, reader, now);
            }
            Input::Command(Command::Close(id)) => self.table.close(id),
            Input::Response(response) => {
                self.silence.ends(now);
                self.round_trips.heard();
                self.table.receive(response.into(), now);
            }
            Input::Silence if self.silence.probe == Probe::None => {
                self.silence.probes(Probe::Progress, now);
                if self.requests_progress {
                    self.table.request_progress(now);
                }
            }
            Input::Silence => {
                self.silence.probes(Probe::Watches, now);
                self.table.open_again(now);
            }
        }
    }

    async fn send_requests(&mut self) -> Result<(), EtcdError> {
        while let Some(request) = self.table.next_request() {
            match (request, &mut self.stream) {
                (Request::Watch(id, range), Some((requests, _))) => {
                    let (key, options) = watch_options(id, &range);
                    requests.watch(key, Some(options)).await?;
                }
                (Request::Watch(id, range), none) => {
                    let (key, options) = watch_options(id, &range);
                    let opened = self.client.watch(key, Some(options)).await?;
                    *none = Some(opened.split());
                    self.silence.ends(Instant::now());
                }
                (Request::Cancel(number), Some((requests, _))) => requests.cancel(number).await?,
                (Request::Progress, Some((requests, _))) => requests.request_progress().await?,
                (Request::Cancel(_) | Request::Progress, None) => {}
            }
        }
        Ok(())
    }
}

fn watch_options(id: i64, range: &WatchRange) -> (Vec<u8>, WatchOptions) {
    let (key, end) = key_range(&range.keys);
    let mut options = WatchOptions::new()
        .with_start_revision(range.from)
        .with_watch_id(id)
        .with_progress_notify();
    if let Some(end) = end {
        options = options.with_range(end);
    }
    (key, options)
}

fn unavailable(reason: &str) -> CallError {
    Failure::Unavailable(reason.to_owned()).into()
}

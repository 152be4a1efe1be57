//! The watches on one stream: which of them the server knows, which requests it must be sent, and
//! which reader a response belongs to. Does no I/O.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use super::round_trips::RoundTrips;
use super::status::CallError;
use super::watch_response::Response;
use crate::ids::Revision;
use crate::store::types::WatchRange;

/// Progress requests without an answer that are remembered.
const MOST_UNANSWERED: usize = 16;

/// What the reader of a watch receives. The numbers are the reader's own ids of its ranges.
#[derive(Debug)]
pub(super) enum Delivery {
    Response(i64, Response),
    /// Everything up to this revision has been delivered.
    Progress(i64, Revision),
    /// The stream has ended.
    End(CallError),
}

/// The queue of one reader, for all ranges of its watch.
#[derive(Debug, Clone)]
pub(super) struct ReaderQueue {
    pub(super) deliveries: mpsc::Sender<Delivery>,
    /// Set before the queue is closed because it was full.
    pub(super) is_behind: Arc<AtomicBool>,
}

/// A request to the server.
#[derive(Debug, PartialEq)]
pub(super) enum Request {
    /// Creates a watch with this id.
    Watch(i64, WatchRange),
    /// Cancels the watch with this number.
    Cancel(i64),
    Progress,
}

/// One watch on the server.
#[derive(Debug)]
struct ServerWatch {
    /// The reader's id of the range.
    range_id: i64,
    reader: ReaderQueue,
    /// The server's number of the watch, once it is confirmed.
    number: Option<i64>,
    /// The keys, and the first revision that has not been delivered.
    range: WatchRange,
    /// The watch that this one replaces once it is confirmed.
    replaces: Option<i64>,
    /// How many progress requests had been sent when it was confirmed. Answers to those do not cover
    /// it, because confirmations and answers may overtake each other.
    confirmed_after: Option<u64>,
}

/// Who assigns the numbers of watches. etcd uses the requested ids; `etcd grpc-proxy` assigns its own,
/// and confirms watches in any order.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Numbering {
    /// Nothing is confirmed yet.
    Unknown,
    Client,
    /// Then one watch is requested at a time, so that it is clear which one is confirmed.
    Server,
}

#[derive(Debug)]
pub(super) struct WatchTable {
    endpoint: Arc<str>,
    /// Whether a watch can continue from the revision in an answer to a progress request.
    has_reliable_progress: bool,
    round_trips: RoundTrips,
    next_id: Arc<AtomicI64>,
    numbering: Numbering,
    /// The ids of watches to be requested, once it is clear what will confirm them.
    queued: VecDeque<i64>,
    /// The ids of watches that are requested and not confirmed, in the order of the requests, and the
    /// times of the requests.
    pending: VecDeque<(i64, Instant)>,
    /// How many progress requests have been sent.
    progress_requests: u64,
    /// Their numbers and times, of those without an answer.
    unanswered: VecDeque<(u64, Instant)>,
    /// By requested id.
    watches: HashMap<i64, ServerWatch>,
    /// Requested ids, by the server's number.
    ids: HashMap<i64, i64>,
    outgoing: VecDeque<Request>,
}

impl WatchTable {
    /// An empty table. `next_id` also provides the ids of replacements.
    pub(super) fn new(
        endpoint: Arc<str>,
        has_reliable_progress: bool,
        round_trips: RoundTrips,
        next_id: Arc<AtomicI64>,
    ) -> Self {
        Self {
            endpoint,
            has_reliable_progress,
            round_trips,
            next_id,
            numbering: Numbering::Unknown,
            queued: VecDeque::new(),
            pending: VecDeque::new(),
            progress_requests: 0,
            unanswered: VecDeque::new(),
            watches: HashMap::new(),
            ids: HashMap::new(),
            outgoing: VecDeque::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.watches.is_empty()
    }

    /// Takes the next request that must be sent.
    pub(super) fn next_request(&mut self) -> Option<Request> {
        self.outgoing.pop_front()
    }

    /// The readers of all watches, which are removed.
    pub(super) fn drain(&mut self) -> Vec<ReaderQueue> {
        let watches = self.watches.drain();
        watches.map(|(_, watch)| watch.reader).collect()
    }

    pub(super) fn open(&mut self, id: i64, range: WatchRange, reader: ReaderQueue, now: Instant) {
        let watch = ServerWatch {
            range_id: id,
            reader,
            number: None,
            range,
            replaces: None,
            confirmed_after: None,
        };
        self.add(id, watch, now);
    }

    /// Closes a range: its watch, and the one that is to replace it.
    pub(super) fn close(&mut self, range_id: i64) {
        self.remove_where(|watch| watch.range_id == range_id);
    }

    /// Requests the progress of all watches.
    pub(super) fn request_progress(&mut self, now: Instant) {
        self.progress_requests += 1;
        self.unanswered.push_back((self.progress_requests, now));
        // Dropping the newest ones is safe: an answer is taken for that of the oldest one.
        self.unanswered.truncate(MOST_UNANSWERED);
        self.outgoing.push_back(Request::Progress);
    }

    /// Opens every watch again from its position, to replace the current one. For a server that does
    /// not answer progress requests: a proxy never does, and newer versions do not while any watch on
    /// the stream starts at a future revision (etcd-io/etcd#20229).
    pub(super) fn open_again(&mut self, now: Instant) {
        let replaced: Vec<_> = self
            .watches
            .values()
            .filter_map(|watch| watch.replaces)
            .collect();
        let replacements: Vec<_> = self
            .watches
            .iter()
            // The start of an unconfirmed watch "from now on" is not known yet.
            .filter(|(_, watch)| watch.range.from > 0)
            .filter(|(id, watch)| watch.replaces.is_none() && !replaced.contains(id))
            .map(|(id, watch)| ServerWatch {
                range_id: watch.range_id,
                reader: watch.reader.clone(),
                number: None,
                range: watch.range.clone(),
                replaces: Some(*id),
                confirmed_after: None,
            })
            .collect();
        for watch in replacements {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            self.add(id, watch, now);
        }
    }

    fn add(&mut self, id: i64, watch: ServerWatch, now: Instant) {
        self.watches.insert(id, watch);
        self.queued.push_back(id);
        self.request_queued(now);
    }

    /// Requests the watches whose turn it is.
    fn request_queued(&mut self, now: Instant) {
        while self.numbering == Numbering::Client || self.pending.is_empty() {
            let Some(id) = self.queued.pop_front() else {
                break;
            };
            // It may have been closed in the meantime.
            let Some(watch) = self.watches.get(&id) else {
                continue;
            };
            self.pending.push_back((id, now));
            self.outgoing
                .push_back(Request::Watch(id, watch.range.clone()));
        }
    }

    /// Removes watches and cancels them. One that is not confirmed yet is cancelled when it is.
    fn remove_where(&mut self, is_removed: impl Fn(&ServerWatch) -> bool) {
        let removed = self.watches.extract_if(|_, watch| is_removed(watch));
        for number in removed.filter_map(|(_, watch)| watch.number) {
            self.ids.remove(&number);
            self.outgoing.push_back(Request::Cancel(number));
        }
    }

    /// Processes a response of the server.
    pub(super) fn receive(&mut self, response: Response, now: Instant) {
        let number = response.number;
        let id = if response.is_confirmation {
            let Some(id) = self.confirmed(number) else {
                return;
            };
            if !response.is_end {
                self.ids.insert(number, id);
            }
            self.request_queued(now);
            id
        } else if number == -1 && !response.is_end {
            self.receive_progress(response.revision);
            return;
        } else {
            match self.ids.get(&number) {
                Some(id) => *id,
                None => return,
            }
        };
        let Some(watch) = self.watches.get_mut(&id) else {
            // It was closed while it was being opened.
            if !response.is_end && self.ids.remove(&number).is_some() {
                self.outgoing.push_back(Request::Cancel(number));
            }
            return;
        };
        if let Some(last) = response.last_event() {
            watch.range.from = watch.range.from.max(last + 1);
        }
        if response.is_confirmation {
            watch.range.from = response.start_of(&watch.range);
            watch.confirmed_after = Some(self.progress_requests);
            watch.number = (!response.is_end).then_some(number);
            if let Some(replaced) = watch.replaces.take()
                && !response.is_end
            {
                // The reader does not notice the replacement.
                self.remove(replaced);
                return;
            }
        }
        self.deliver(id, response);
    }

    fn remove(&mut self, id: i64) {
        let removed = self.watches.remove(&id);
        if let Some(number) = removed.and_then(|watch| watch.number) {
            self.ids.remove(&number);
            self.outgoing.push_back(Request::Cancel(number));
        }
    }

    fn deliver(&mut self, id: i64, response: Response) {
        let Some(watch) = self.watches.get(&id) else {
            return;
        };
        let (number, is_end) = (response.number, response.is_end);
        let (range_id, reader) = (watch.range_id, watch.reader.clone());
        let delivery = Delivery::Response(range_id, response);
        let sent = reader.deliveries.try_send(delivery);
        if is_end {
            self.watches.remove(&id);
            self.ids.remove(&number);
            if self.numbering == Numbering::Server && number >= 0 {
                // A proxy keeps the dead watch until it is cancelled, and attaches the next watch on
                // the same range to it, which then gets no events (etcd-io/etcd#21813).
                self.outgoing.push_back(Request::Cancel(number));
            }
        }
        if let Err(mpsc::error::TrySendError::Full(_)) = sent {
            // The reader has missed something, so all of its ranges end. The end of its queue is what
            // it notices.
            reader.is_behind.store(true, Ordering::Release);
            self.remove_where(|watch| watch.reader.deliveries.same_channel(&reader.deliveries));
        }
    }

    /// Returns the id of the watch that is confirmed, or refused: then its number is -1.
    fn confirmed(&mut self, number: i64) -> Option<i64> {
        let by_id = self.pending.iter().position(|(id, _)| *id == number);
        // Otherwise confirmations come in the order of the requests, or there is only one request:
        // it is the first one.
        let by_id = by_id.filter(|_| self.numbering != Numbering::Server);
        let (id, sent) = self.pending.remove(by_id.unwrap_or_default())?;
        self.round_trips.answered(sent);
        if self.numbering == Numbering::Unknown && number >= 0 {
            self.numbering = if id == number {
                Numbering::Client
            } else {
                debug!(
                    endpoint = &*self.endpoint,
                    "the server numbers watches by itself"
                );
                Numbering::Server
            };
        }
        Some(id)
    }

    /// The answer to a progress request covers all watches that the server knew when it was sent. If an
    /// earlier request was never answered, this answer is taken for that one's: then it covers fewer
    /// watches, and the time that it took is unknown.
    fn receive_progress(&mut self, revision: Revision) {
        let answered = self.unanswered.pop_front();
        if let Some((_, sent)) = answered.filter(|_| self.unanswered.is_empty()) {
            self.round_trips.answered(sent);
        }
        let Some((request, _)) = answered.filter(|_| self.has_reliable_progress) else {
            return;
        };
        let is_covered =
            |watch: &&mut ServerWatch| watch.confirmed_after.is_some_and(|before| before < request);
        for watch in self.watches.values_mut().filter(is_covered) {
            watch.range.from = watch.range.from.max(revision + 1);
            // A reader whose queue is full learns its position from what is in the queue.
            let progress = Delivery::Progress(watch.range_id, revision);
            let _ = watch.reader.deliveries.try_send(progress);
        }
    }
}

#[cfg(test)]
mod tests;

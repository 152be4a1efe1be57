//! The task that makes a connection. Callers that need one wait for it; a caller that stops waiting, or
//! is not polled any more, does not delay the others.
//!
//! A round dials each endpoint in turn, and each address of its name. One that does not answer within
//! `connect_timeout` is not waited for any longer, but not given up either: it may be slow. The first
//! to answer wins.

use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::connector::Connector;
use super::link::{DialTask, Dialed};
use super::round::Round;
use super::round_trips::LONGEST;
use crate::error::ClusterError;

/// Dials of one address at the same time: an old one, which may be slow, and a fresh one, in case what
/// the old one waits for is over.
const MOST_PER_ADDRESS: usize = 2;

struct Attempt {
    endpoint: Arc<str>,
    abort: AbortHandle,
}

pub(super) struct Dialler {
    connector: Arc<Connector>,
    id: u64,
    again: Arc<Notify>,
    result: watch::Sender<Option<ClusterError>>,
    dials: JoinSet<(Arc<str>, Result<Dialed, ClusterError>)>,
    /// The dials that have not ended, oldest first.
    in_flight: Vec<Attempt>,
}

impl Drop for Dialler {
    fn drop(&mut self) {
        // Also when its runtime ends.
        self.connector.link().dial_task_ended(self.id);
    }
}

impl Dialler {
    /// The task, and how it is seen by others.
    pub(super) fn new(connector: Arc<Connector>, id: u64) -> (Self, DialTask) {
        let (result, results) = watch::channel(None);
        let again = Arc::new(Notify::new());
        let dialler = Self {
            connector,
            id,
            again: again.clone(),
            result,
            dials: JoinSet::new(),
            in_flight: Vec::new(),
        };
        let task = DialTask {
            id,
            is_dialling: false,
            again,
            result: results,
        };
        (dialler, task)
    }

    pub(super) async fn run(mut self) {
        let mut closed = self.connector.closed.clone();
        tokio::select! {
            // Nothing is ever sent: the channel closes with the last handle.
            _ = closed.changed() => {}
            () = self.dial() => {}
        }
    }

    async fn dial(&mut self) {
        let again = self.again.clone();
        let mut round: Option<Round> = None;
        loop {
            let next = round.as_ref().map(|round| round.due);
            let due = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(ended) = self.dials.join_next() => {
                    self.in_flight.retain(|attempt| !attempt.abort.is_finished());
                    match ended {
                        Ok((endpoint, Ok(dialed))) => {
                            self.connected(dialed, &endpoint);
                            return;
                        }
                        Ok((endpoint, Err(error))) => {
                            self.connector.report_refusal(&endpoint, &error);
                            if let Some(round) = &mut round {
                                round.failed(&endpoint, error, Instant::now());
                            }
                        }
                        // It was aborted.
                        Err(_) => {}
                    }
                }
                () = again.notified(), if round.is_none() => {
                    round = Some(Round::new(self.connector.endpoints(), Instant::now()));
                }
                () = due => round = round.and_then(|round| self.step(round)),
            }
            if round.is_none() && self.is_over() {
                return;
            }
        }
    }

    /// Dials the next address, or ends the round.
    fn step(&mut self, mut round: Round) -> Option<Round> {
        let now = Instant::now();
        let connect_timeout = self.connector.options.connect_timeout;
        let mut link = self.connector.link();
        let addresses = link.addresses(&round.endpoints);
        if round.is_complete(addresses) {
            let error = round.into_error(connect_timeout);
            self.connector.count_failure(&mut link, &error);
            if let Some(task) = link.dial_task(self.id) {
                task.is_dialling = false;
            }
            drop(link);
            self.result.send_replace(Some(error));
            return None;
        }
        match link.pace.take(addresses, now) {
            Err(due) => round.due = due,
            Ok(()) => {
                let endpoint = link.take_endpoint(&round.endpoints);
                drop(link);
                round.dials(endpoint.clone(), now + connect_timeout);
                self.start(endpoint);
            }
        }
        Some(round)
    }

    fn start(&mut self, endpoint: Arc<str>) {
        let is_same = |attempt: &&Attempt| attempt.endpoint == endpoint;
        let addresses = self
            .connector
            .link()
            .addresses(std::slice::from_ref(&endpoint));
        if self.in_flight.iter().filter(is_same).count() >= MOST_PER_ADDRESS * addresses
            && let Some(freshest) = self
                .in_flight
                .iter()
                .rposition(|attempt| attempt.endpoint == endpoint)
        {
            self.in_flight.remove(freshest).abort.abort();
        }
        let connector = self.connector.clone();
        let dialled = endpoint.clone();
        let abort = self.dials.spawn(async move {
            let within = LONGEST.max(connector.options.connect_timeout);
            let dialed = connector.dial(&dialled, true, within).await;
            (dialled, dialed)
        });
        self.in_flight.push(Attempt { endpoint, abort });
    }

    fn connected(&self, dialed: Dialed, endpoint: &str) {
        let has_connection = {
            let mut link = self.connector.link();
            if link.dial_task(self.id).is_none() {
                // Another task dials instead of this one.
                return;
            }
            // Before anything that may panic, so that the next caller dials again.
            link.dialler = None;
            link.breaker.connected();
            link.connection.is_some()
        };
        if !has_connection {
            self.connector.install(dialed, endpoint);
        }
        self.result.send_replace(None);
    }

    /// Whether no connection is wanted, and no dial is in progress.
    fn is_over(&self) -> bool {
        if !self.dials.is_empty() {
            return false;
        }
        let mut link = self.connector.link();
        match link.dial_task(self.id) {
            Some(task) if task.is_dialling => return false,
            Some(_) => link.dialler = None,
            None => debug!("another task dials"),
        }
        true
    }
}

//! The state of the connection: the current one, the endpoints to try next, and the task that dials.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::{Notify, watch};

use super::breaker::Breaker;
use super::endpoint::is_same;
use super::names::Names;
use super::options::EtcdOptions;
use super::pace::Pace;
use super::round_trips::RoundTrips;
use super::token::Token;
use super::watch_stream::WatchStream;
use crate::error::ClusterError;

#[derive(Debug)]
pub(super) struct Link {
    /// In the order in which they are tried.
    pub(super) endpoints: Vec<Arc<str>>,
    pub(super) connection: Option<Connection>,
    /// Dropped with the connection: ends the tasks and streams of it that have not noticed yet.
    pub(super) open: Option<watch::Sender<()>>,
    /// The number of the current connection, so that a failure is counted only against the connection
    /// that it happened on.
    pub(super) generation: u64,
    /// The index of the endpoint to try next.
    pub(super) next: usize,
    pub(super) names: Names,
    /// The task that makes a connection, while there is none.
    pub(super) dialler: Option<DialTask>,
    /// How many such tasks there have been.
    pub(super) diallers: u64,
    pub(super) pace: Pace,
    /// Requests in a row that were not answered in time on the connection before.
    pub(super) missed: u32,
    pub(super) warned_about_version: bool,
    pub(super) breaker: Breaker,
    /// Endpoints that refuse TLS or the user, with the error that was logged.
    pub(super) refusals: BTreeMap<String, ClusterError>,
}

/// The task that dials, as seen by those who wait for a connection.
#[derive(Debug)]
pub(super) struct DialTask {
    pub(super) id: u64,
    /// A round is in progress. New callers wait for its result.
    pub(super) is_dialling: bool,
    /// Starts another round.
    pub(super) again: Arc<Notify>,
    /// The error of each round; `None` if it has made a connection.
    pub(super) result: watch::Receiver<Option<ClusterError>>,
}

/// A hash of the certificate files that a connection was made with, if it uses any.
pub(super) type Fingerprint = Option<u128>;

/// A client that has been answered.
pub(super) struct Dialed {
    pub(super) client: Client,
    pub(super) version: String,
    pub(super) files: Fingerprint,
    pub(super) token: Token,
    pub(super) round_trip: Duration,
    /// The id of the cluster, if the server said it.
    pub(super) cluster: Option<u64>,
}

#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) endpoint: Arc<str>,
    pub(super) generation: u64,
    /// The stream that every watch on this connection shares.
    pub(super) watches: WatchStream,
    pub(super) token: Token,
    pub(super) round_trips: RoundTrips,
    /// The id of the cluster, if the server said it.
    pub(super) cluster: Option<u64>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({} #{})", self.endpoint, self.generation)
    }
}

impl Link {
    pub(super) fn new(options: &EtcdOptions) -> Self {
        let endpoints = options.endpoints.iter();
        let mut endpoints: Vec<_> = endpoints.map(|endpoint| Arc::from(&**endpoint)).collect();
        if options.shuffle_endpoints {
            fastrand::shuffle(&mut endpoints);
        }
        Self {
            endpoints,
            connection: None,
            open: None,
            generation: 0,
            next: 0,
            names: Names::default(),
            dialler: None,
            diallers: 0,
            pace: Pace::default(),
            missed: 0,
            warned_about_version: false,
            breaker: Breaker::default(),
            refusals: BTreeMap::new(),
        }
    }

    /// How many addresses the endpoints have, as far as it is known.
    pub(super) fn addresses(&self, endpoints: &[Arc<str>]) -> usize {
        self.names
            .addresses(endpoints.iter().map(|endpoint| &**endpoint))
    }

    /// Takes the endpoint to try next.
    pub(super) fn take_endpoint(&mut self, endpoints: &[Arc<str>]) -> Arc<str> {
        let index = self.next % endpoints.len();
        self.next = (index + 1) % endpoints.len();
        endpoints[index].clone()
    }

    /// The index of an endpoint, which may have another form in the list.
    pub(super) fn position(&self, endpoint: &str) -> usize {
        let mut endpoints = self.endpoints.iter();
        endpoints
            .position(|other| is_same(other, endpoint))
            .unwrap_or(0)
    }

    /// The task that dials, if it is the one with this id.
    pub(super) fn dial_task(&mut self, id: u64) -> Option<&mut DialTask> {
        self.dialler.as_mut().filter(|dialler| dialler.id == id)
    }

    /// The task with this id does not dial any more.
    pub(super) fn dial_task_ended(&mut self, id: u64) {
        if self.dial_task(id).is_some() {
            self.dialler = None;
            self.breaker.abandoned();
        }
    }

    /// Whether this connection is still the current one.
    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.connection.is_some() && self.generation == generation
    }
}

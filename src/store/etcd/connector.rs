//! What all parts of one store share: the options, the state of the connection, and how a connection is
//! installed, replaced and given up.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::files::FileReader;
use super::link::{Connection, Dialed, Fingerprint, Link};
use super::options::EtcdOptions;
use super::password::LastPassword;
use super::round_trips::RoundTrips;
use super::status::{AUTH_NOT_ENABLED, CallContext, CallError, Subject};
use super::version::{has_lease_bug, has_reliable_progress};
use super::watch_stream::WatchStream;
use crate::error::ClusterError;
use crate::store::types::Circuit;
use crate::sync::lock;

#[derive(Debug)]
pub(super) struct Connector {
    pub(super) options: EtcdOptions,
    link: Mutex<Link>,
    /// Closed with the last [`ConnectorHandle`].
    pub(super) closed: watch::Receiver<()>,
    pub(super) password: LastPassword,
    pub(super) files: FileReader,
    /// A user is configured, and authentication is not enabled. This has been logged.
    has_no_token: AtomicBool,
    /// Starts the tasks of a new connection. They make connections themselves, so they belong to
    /// modules above this one.
    on_connected: fn(&Arc<Self>, NewConnection),
}

/// A connection that was just installed.
pub(super) struct NewConnection {
    pub(super) connection: Connection,
    #[cfg_attr(
        not(feature = "tls"),
        expect(dead_code, reason = "there are no certificate files")
    )]
    pub(super) files: Fingerprint,
    /// Closed with the connection.
    pub(super) open: watch::Receiver<()>,
}

/// A handle that keeps the connector dialling. Background tasks have none: they end with the last one.
#[derive(Debug, Clone)]
pub(super) struct ConnectorHandle {
    connector: Arc<Connector>,
    _open: Arc<watch::Sender<()>>,
}

impl Deref for ConnectorHandle {
    type Target = Arc<Connector>;

    fn deref(&self) -> &Arc<Connector> {
        &self.connector
    }
}

impl ConnectorHandle {
    pub(super) fn new(
        options: EtcdOptions,
        on_connected: fn(&Arc<Connector>, NewConnection),
    ) -> Self {
        let (open, closed) = watch::channel(());
        Self {
            connector: Arc::new(Connector {
                link: Mutex::new(Link::new(&options)),
                options,
                closed,
                password: LastPassword::default(),
                files: FileReader::default(),
                has_no_token: AtomicBool::new(false),
                on_connected,
            }),
            _open: Arc::new(open),
        }
    }
}

impl Connector {
    pub(super) fn link(&self) -> MutexGuard<'_, Link> {
        lock(&self.link)
    }

    /// The endpoints to try.
    pub(super) fn endpoints(&self) -> Vec<Arc<str>> {
        self.link().endpoints.clone()
    }

    /// All endpoints, for an error.
    pub(super) fn endpoints_text(&self) -> String {
        self.endpoints().join(",")
    }

    /// The current connection.
    pub(super) fn current(&self) -> Option<Connection> {
        self.link().connection.clone()
    }

    /// The error of a failed call, for its caller.
    pub(super) fn explain(
        &self,
        operation: &'static str,
        endpoint: &str,
        subject: Subject<'_>,
        error: &CallError,
    ) -> ClusterError {
        let context = CallContext {
            operation,
            endpoint,
            subject,
        };
        error.explain(&context, &self.options)
    }

    /// Counts a failure to connect or to be answered.
    pub(super) fn count_failure(&self, link: &mut Link, error: &ClusterError) {
        let (threshold, pause) = (self.options.breaker_failures, self.options.breaker_pause);
        let before = link.breaker.circuit();
        link.breaker.failed(error, threshold, pause, Instant::now());
        if before == Circuit::Closed && link.breaker.circuit() != before {
            warn!(%error, "etcd has failed several times in a row: until it answers, only trial calls are sent");
        }
    }

    /// Logs that an endpoint refuses TLS or the user: once, until the error changes.
    pub(super) fn report_refusal(&self, endpoint: &str, error: &ClusterError) {
        debug!(endpoint, %error, "cannot connect to etcd");
        if !error.needs_correction() {
            return;
        }
        let mut link = self.link();
        if link.refusals.get(endpoint) != Some(error) {
            warn!(endpoint, %error, "etcd cannot be used");
            link.refusals.insert(endpoint.to_owned(), error.clone());
        }
    }

    /// Logs that a user is configured and authentication is not enabled: once, until it is.
    pub(super) fn report_token(&self, endpoint: &str, has_token: bool) {
        let Some(credentials) = &self.options.credentials else {
            return;
        };
        let user = &credentials.user;
        let before = self.has_no_token.swap(!has_token, Ordering::AcqRel);
        match (before, has_token) {
            (false, false) => {
                warn!(
                    endpoint,
                    user, "{AUTH_NOT_ENABLED}: going on without the user, until etcd requires it"
                );
            }
            (true, true) => info!(
                endpoint,
                user, "authentication is enabled, and the user is accepted"
            ),
            _ => {}
        }
    }

    /// Makes this the current connection. One that there was before ends with its streams and tasks.
    pub(super) fn install(self: &Arc<Self>, dialed: Dialed, endpoint: &str) {
        let version = dialed.version;
        info!(endpoint, version, "connected to etcd");
        self.report_token(endpoint, !dialed.token.is_missing());
        let (open, is_open) = watch::channel(());
        let endpoint: Arc<str> = Arc::from(endpoint);
        let mut link = self.link();
        let round_trips = RoundTrips::new(dialed.round_trip, link.missed);
        let watches = WatchStream::new(
            &dialed.client,
            endpoint.clone(),
            has_reliable_progress(&version),
            &self.options,
            round_trips.clone(),
            is_open,
        );
        link.refusals.remove(&*endpoint);
        if !link.warned_about_version && has_lease_bug(&version) {
            link.warned_about_version = true;
            warn!(
                endpoint = &*endpoint,
                version,
                "this etcd confirms renewals of a revoked lease; upgrade to 3.5.23, 3.6.5 or newer"
            );
        }
        link.generation += 1;
        link.next = link.position(&endpoint);
        let connection = Connection {
            client: dialed.client,
            endpoint,
            generation: link.generation,
            watches,
            token: dialed.token,
            round_trips,
            cluster: dialed.cluster,
        };
        let new = NewConnection {
            connection: connection.clone(),
            files: dialed.files,
            open: open.subscribe(),
        };
        link.open = Some(open);
        link.connection = Some(connection);
        drop(link);
        (self.on_connected)(self, new);
    }

    /// Gives the connection a new watch stream, with its current token, unless somebody else has
    /// replaced `stale` already. The stale stream keeps its token, for the watches that are on it.
    pub(super) fn with_fresh_watches(
        &self,
        mut connection: Connection,
        stale: &WatchStream,
    ) -> Connection {
        let mut link = self.link();
        let Link {
            connection: Some(current),
            open: Some(open),
            ..
        } = &mut *link
        else {
            return connection;
        };
        if current.generation == connection.generation {
            if current.watches.is_same(stale) {
                current.watches = WatchStream::new(
                    &current.client,
                    current.endpoint.clone(),
                    current.watches.has_reliable_progress,
                    &self.options,
                    current.round_trips.clone(),
                    open.subscribe(),
                );
            }
            connection.watches = current.watches.clone();
        }
        connection
    }

    /// Gives up a connection after a failure on it, with every stream on it, unless it has been
    /// replaced already.
    pub(super) fn discard(&self, generation: u64, error: &ClusterError) {
        let mut link = self.link();
        if link.is_current(generation) {
            self.count_failure(&mut link, error);
            if let Some(connection) = link.connection.take() {
                link.missed = connection.round_trips.missed();
                link.names.failed(&connection.endpoint);
            }
            link.open = None;
            link.next = (link.next + 1) % link.endpoints.len();
        }
    }
}

//! Dialling one endpoint: with TLS and the user, up to the first answer of the member.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::time::{Instant, sleep_until};

use super::connector::Connector;
use super::convert::cluster_of;
use super::files::in_time;
#[cfg(feature = "tls")]
use super::handshake::{Target, find_alert};
use super::link::{Dialed, Fingerprint};
use super::names::resolve;
use super::round_trips::LONGEST;
use super::status::{CallError, Failure, Subject, bounded};
use super::tls_failure::{TlsFailure, is_closed};
#[cfg(feature = "tls")]
use super::tls_files;
use super::token::{User, connect_as};
use crate::error::ClusterError;

/// One address of an endpoint's name.
struct Address {
    endpoint: String,
    index: usize,
    /// The name that the server's certificate is for.
    name: String,
}

/// What a member says about itself.
struct Member {
    version: String,
    has_leader: bool,
    is_learner: bool,
    cluster: Option<u64>,
}

impl Member {
    /// Why this member cannot serve everything.
    fn unfit(&self) -> Option<&'static str> {
        // A learner refuses almost everything. Checked at each dial, because it may be promoted.
        if self.is_learner {
            Some("this member is a learner")
        } else if !self.has_leader {
            Some("this member sees no leader")
        } else {
            None
        }
    }
}

impl Connector {
    /// Connects to one endpoint and makes sure that it answers: connecting alone succeeds even where
    /// nobody listens. Without `quorum` a member that sees no leader is accepted, for what it can
    /// answer alone. Each step takes at most `within`: to look up the name, to read files, and to be
    /// answered.
    pub(super) async fn dial(
        &self,
        endpoint: &str,
        quorum: bool,
        within: Duration,
    ) -> Result<Dialed, ClusterError> {
        let address = self.next_address(endpoint, within).await;
        let name = address.as_ref().map(|address| &*address.name);
        let at = address
            .as_ref()
            .map_or(endpoint, |address| &*address.endpoint);
        let connect = self.connect_options(quorum, within);
        let preparing = self.with_access(endpoint, name, connect);
        let (connect, files, user) = in_time("connect", endpoint, within, preparing).await?;
        let connecting = async {
            let (mut client, token) = connect_as(at, connect, user).await?;
            let asked = Instant::now();
            let member = status_of(&mut client).await?;
            Ok::<_, CallError>((client, token, member, asked.elapsed()))
        };
        let (client, token, member, first_answer) = match bounded(within, connecting).await {
            Ok(dialed) => dialed,
            Err(error) => return Err(self.dial_error(endpoint, at, name, error).await),
        };
        if quorum {
            if let Some(reason) = member.unfit() {
                return Err(ClusterError::Unavailable {
                    endpoint: endpoint.to_owned(),
                    operation: "connect",
                    reason: reason.to_owned(),
                });
            }
            if let Some(address) = &address {
                self.link().names.worked(endpoint, address.index);
            }
        }
        Ok(Dialed {
            client,
            version: member.version,
            files,
            token,
            round_trip: first_answer / self.round_trips_of_first_answer(endpoint),
            cluster: member.cluster,
        })
    }

    fn connect_options(&self, quorum: bool, within: Duration) -> ConnectOptions {
        let interval = self.options.keep_alive_interval;
        ConnectOptions::default()
            .with_connect_timeout(within)
            // A member that has lost its leader then says so, instead of staying silent.
            .with_require_leader(quorum)
            .with_tcp_keepalive(interval)
            // Silence is judged by measured times. This only ends connections that nobody uses.
            .with_keep_alive(interval, LONGEST.max(self.options.request_timeout))
    }

    /// How many round trips the status request takes: the first request makes the connection.
    fn round_trips_of_first_answer(&self, endpoint: &str) -> u32 {
        match (&self.options.credentials, endpoint.starts_with("https://")) {
            (Some(_), _) => 1,
            (None, false) => 2,
            (None, true) => 3,
        }
    }

    /// The address to dial, if the endpoint's name has several.
    async fn next_address(&self, endpoint: &str, within: Duration) -> Option<Address> {
        let resolved = resolve(endpoint, within).await?;
        let count = resolved.count();
        let index = self.link().names.take(endpoint, count);
        let endpoint = resolved.endpoint(index).filter(|_| count > 1)?;
        Some(Address {
            endpoint,
            index,
            name: resolved.host.to_owned(),
        })
    }

    /// Adds TLS from the current files to the options of a connection, and gets the user to make it
    /// for.
    async fn with_access(
        &self,
        endpoint: &str,
        name: Option<&str>,
        connect: ConnectOptions,
    ) -> Result<(ConnectOptions, Fingerprint, Option<User>), ClusterError> {
        let (connect, fingerprint) = self.with_tls(endpoint, name, connect).await?;
        let user = self.password.user(&self.options, &self.files, endpoint);
        Ok((connect, fingerprint, user.await?))
    }

    #[cfg(not(feature = "tls"))]
    async fn with_tls(
        &self,
        _: &str,
        _: Option<&str>,
        connect: ConnectOptions,
    ) -> Result<(ConnectOptions, Fingerprint), ClusterError> {
        Ok((connect, None))
    }

    #[cfg(feature = "tls")]
    async fn with_tls(
        &self,
        endpoint: &str,
        name: Option<&str>,
        connect: ConnectOptions,
    ) -> Result<(ConnectOptions, Fingerprint), ClusterError> {
        use etcd_client::{Certificate, Identity, TlsOptions};
        if self.options.tls.is_none() && !endpoint.starts_with("https://") {
            return Ok((connect, None));
        }
        let given = self.options.tls.clone().unwrap_or_default();
        let server_name = given.server_name.clone().or(name.map(str::to_owned));
        let loading = move || tls_files::load(&given);
        let files = self.files.read(endpoint, loading).await?;
        let files = files.map_err(|error| ClusterError::Tls {
            endpoint: endpoint.to_owned(),
            reason: error.to_string(),
        })?;
        let fingerprint = files.fingerprint();
        let mut tls = TlsOptions::new();
        tls = match files.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(ca)),
            None => tls.with_native_roots(),
        };
        if let Some((cert, key)) = files.identity {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        if let Some(name) = server_name {
            tls = tls.domain_name(name);
        }
        Ok((connect.with_tls(tls), Some(fingerprint)))
    }

    /// The error of a dial, with the cause that a closed connection hides, or a hint at it. `at`: the
    /// endpoint with the address that was dialled; `name`: the name that it is an address of.
    async fn dial_error(
        &self,
        endpoint: &str,
        at: &str,
        name: Option<&str>,
        mut error: CallError,
    ) -> ClusterError {
        if let Failure::Unavailable(reason) = &mut error.failure
            && is_closed(reason)
        {
            let is_https = endpoint.starts_with("https://");
            let tls = self.options.tls.as_ref();
            // Without a CA file the server would not be trusted in a second handshake.
            if tls.is_some_and(|tls| tls.ca_file.is_some()) {
                if let Some(alert) = self.alert(endpoint, at, name).await {
                    error = Failure::Tls(alert).into();
                }
            } else if is_https {
                reason.push_str("; perhaps etcd requires another client certificate");
            } else if tls.is_none() {
                // A server that speaks TLS closes a connection without it.
                reason.push_str("; perhaps an endpoint for https://");
            }
        }
        self.explain("connect", endpoint, Subject::default(), &error)
    }

    #[cfg(not(feature = "tls"))]
    async fn alert(&self, _: &str, _: &str, _: Option<&str>) -> Option<TlsFailure> {
        None
    }

    #[cfg(feature = "tls")]
    async fn alert(&self, endpoint: &str, at: &str, name: Option<&str>) -> Option<TlsFailure> {
        let target = Target {
            endpoint,
            address: at,
            name,
        };
        let tls = self.options.tls.clone()?;
        find_alert(&target, tls, self.options.connect_timeout).await
    }

    /// Waits until one more dial may be made.
    pub(super) async fn paced(&self) {
        loop {
            let taken = {
                let mut link = self.link();
                let burst = link.addresses(&link.endpoints);
                link.pace.take(burst, Instant::now())
            };
            match taken {
                Ok(()) => return,
                Err(due) => sleep_until(due).await,
            }
        }
    }
}

/// Asks a member for its status. Some versions from 3.5.28 and 3.6.0 on answer this to root only
/// (etcd-io/etcd#21663). Then it is only known that it has answered, and that it has a leader, because
/// a client that requires one would have been refused before.
async fn status_of(client: &mut Client) -> Result<Member, CallError> {
    match client.status().await.map_err(CallError::from) {
        Ok(status) => Ok(Member {
            version: status.version().to_owned(),
            has_leader: status.leader() != 0,
            is_learner: status.is_learner(),
            cluster: cluster_of(status.header()),
        }),
        Err(error)
            if matches!(
                error.failure,
                Failure::PermissionDenied | Failure::UnknownUser
            ) =>
        {
            Ok(Member {
                version: "3.5.28+".to_owned(),
                has_leader: true,
                is_learner: false,
                cluster: None,
            })
        }
        Err(error) => Err(error),
    }
}

//! TLS and the user of a connection: made with what the files say now, kept current while it is
//! open, and told in clear words when it fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tracing::{debug, info, warn};

use super::connection::{Connection, in_time};
use super::{EtcdStore, bounded};
use crate::error::ClusterError;
use crate::store::Password;

/// What etcd says of a token that it does not know any more: it has expired, or its user has
/// changed.
const INVALID_TOKEN: &str = "invalid auth token";
/// What it says of a token from before the last change of any user or role; and what 3.5.1 says
/// where it passes its inner error on.
const OLD_REVISION: &str = "revision of auth store is old";
const OLD_REVISION_INSIDE: &str = "revision in header is old";
/// What it says where no role allows something.
const DENIED: &str = "permission denied";
/// What it says of the name in a client certificate that is none of its users.
const NOT_FOUND: &str = "user name not found";
/// What it says of a request without a token, where it wants one.
const NO_USER: &str = "user name is empty";
/// What it says of a user and a password, where it wants none.
const NOT_ENABLED: &str = "authentication is not enabled";

/// Our words for these two.
const NONE_GIVEN: &str = "it wants a user and a password, and none are given";
const NOT_ENABLED_THERE: &str = "authentication is not enabled there";

/// From this age of a stream on its token may have expired.
const DOUBT_AFTER: Duration = Duration::from_secs(1);

/// The token of a connection is renewed by one caller at a time; the others wait for its outcome.
#[derive(Clone, Default)]
pub(super) struct Token(Arc<Renewals>);

#[derive(Default)]
struct Renewals {
    count: AtomicU64,
    outcome: tokio::sync::Mutex<Option<ClusterError>>,
    /// There is a user, and no token: authentication was not enabled.
    is_missing: AtomicBool,
}

impl Token {
    pub(super) fn is_missing(&self) -> bool {
        self.0.is_missing.load(Ordering::Acquire)
    }

    /// Answers whether it was.
    fn set_missing(&self, missing: bool) -> bool {
        self.0.is_missing.swap(missing, Ordering::AcqRel)
    }

    /// Changes with each renewal. To be noted before what may find the token refused.
    pub(super) fn version(&self) -> u64 {
        self.0.count.load(Ordering::Acquire)
    }
}

/// Name and password.
pub(super) type User = (String, String);

/// A client for one endpoint, with a token of this user. Where authentication is not enabled it goes
/// on without one, as etcd's own client does: then whoever enables it loses nobody.
pub(super) async fn connect_as(
    endpoint: &str,
    connect: ConnectOptions,
    user: Option<User>,
) -> Result<(Client, Token), etcd_client::Error> {
    // Without a user this is no I/O yet.
    let mut client = Client::connect([endpoint], Some(connect)).await?;
    let has_token = match user {
        Some(user) => authenticate(&mut client, user).await?,
        None => true,
    };
    let token = Token::default();
    token.set_missing(!has_token);
    Ok((client, token))
}

/// What a member says of itself.
pub(super) struct Member {
    pub(super) version: String,
    pub(super) has_leader: bool,
    pub(super) is_learner: bool,
    /// Of its cluster; 0 where it did not say.
    pub(super) cluster: u64,
}

/// Asks a member for its status. From 3.5.28 and 3.6.0 on there are versions that tell it to root
/// alone (etcd-io/etcd#21663): then nothing is known but that it has answered, and that it has a leader,
/// for a client that requires one is told so first.
pub(super) async fn status_of(client: &mut Client) -> Result<Member, etcd_client::Error> {
    match client.status().await {
        Ok(status) => Ok(Member {
            version: status.version().to_owned(),
            has_leader: status.leader() != 0,
            is_learner: status.is_learner(),
            cluster: status.header().map_or(0, |header| header.cluster_id()),
        }),
        Err(etcd_client::Error::GRpcStatus(status))
            if [DENIED, NOT_FOUND]
                .iter()
                .any(|words| status.message().contains(words)) =>
        {
            Ok(Member {
                version: "3.5.28+".to_owned(),
                has_leader: true,
                is_learner: false,
                cluster: 0,
            })
        }
        Err(error) => Err(error),
    }
}

/// Gets a token, and answers whether there is one: false where authentication is not enabled.
async fn authenticate(client: &mut Client, user: User) -> Result<bool, etcd_client::Error> {
    match client.update_user(Some(user)).await {
        Err(etcd_client::Error::GRpcStatus(status)) if status.message().contains(NOT_ENABLED) => {
            client.update_user(None).await.map(|()| false)
        }
        result => result.map(|()| true),
    }
}

/// A password as it was last read.
#[derive(Debug, Default)]
pub(super) struct LastPassword {
    password: Option<Password>,
    /// That it cannot be read any more.
    is_told: bool,
}

/// The certificate files that a connection was made with.
pub(super) type Fingerprint = Option<u128>;

impl EtcdStore {
    /// Adds TLS to the options of a new connection, from the files as they are now, and answers with
    /// the user to make it for.
    pub(super) async fn secured(
        &self,
        endpoint: &str,
        name: Option<&str>,
        connect: ConnectOptions,
    ) -> Result<(ConnectOptions, Fingerprint, Option<User>), ClusterError> {
        let options = &self.shared.options;
        let (connect, fingerprint) = self.with_tls(endpoint, name, connect).await?;
        let user = match &options.credentials {
            Some(credentials) => Some((credentials.user.clone(), self.password(endpoint).await?)),
            None => None,
        };
        Ok((connect, fingerprint, user))
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
        let options = &self.shared.options;
        if options.tls.is_none() && !endpoint.starts_with("https://") {
            return Ok((connect, None));
        }
        let given = options.tls.clone().unwrap_or_default();
        let server_name = given.server_name.clone().or(name.map(str::to_owned));
        let files = self.read(endpoint, move || given.load()).await?;
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

    /// The password of now, or the last one if that cannot be read.
    async fn password(&self, endpoint: &str) -> Result<String, ClusterError> {
        let Some(credentials) = self.shared.options.credentials.clone() else {
            return Ok(String::new());
        };
        let password = self
            .read(endpoint, move || credentials.password.read())
            .await?;
        let last = self.shared.password.lock();
        let mut last = last.unwrap_or_else(PoisonError::into_inner);
        match (password, &last.password) {
            (Ok(password), _) => {
                *last = LastPassword {
                    password: Some(Password::Text(password.clone())),
                    is_told: false,
                };
                Ok(password)
            }
            // It is being replaced, perhaps: the one of before may still be right.
            (Err(error), Some(Password::Text(before))) => {
                let before = before.clone();
                if !std::mem::replace(&mut last.is_told, true) {
                    warn!(endpoint, %error, "the password cannot be read, the last one is tried until it can");
                }
                Ok(before)
            }
            (Err(error), _) => Err(ClusterError::Auth {
                endpoint: endpoint.to_owned(),
                reason: error.to_string(),
            }),
        }
    }

    /// Whether a new token would help.
    pub(super) fn may_renew(&self, error: &ClusterError) -> bool {
        self.shared.options.credentials.is_some() && error.is_token_refused()
    }

    /// The same for a request with this one. Without any it was perhaps asked as the user of the client
    /// certificate, who may not do this.
    pub(super) fn may_renew_for(&self, error: &ClusterError, token: &Token) -> bool {
        self.may_renew(error) || (token.is_missing() && error.is_missing_permission())
    }

    /// The same for a watch that was asked for on this connection. An older etcd answers
    /// "permission denied" when the token has expired, or when there is none, so that is believed of a
    /// new stream with a token only.
    pub(super) fn may_renew_for_watch(&self, error: &ClusterError, on: &Connection) -> bool {
        let doubtful = error.is_missing_permission()
            && (on.watches.age() > DOUBT_AFTER || on.token.is_missing());
        self.shared.options.credentials.is_some() && (doubtful || error.is_token_refused())
    }

    /// Gets a new token for a connection, unless somebody has got one since `version`, and
    /// answers with the connection to go on with.
    pub(super) async fn renew_token(
        &self,
        generation: u64,
        version: u64,
    ) -> Result<Connection, ClusterError> {
        let connection = self.connection("authenticate").await?;
        if connection.generation != generation {
            // Another one since, with a token of its own.
            return Ok(connection);
        }
        // In a task of its own, for a caller that is not polled must not hold the others up.
        let store = self.in_background();
        let renewal = tokio::spawn(async move {
            let renewals = connection.token.0.clone();
            let mut outcome = renewals.outcome.lock().await;
            if connection.token.version() == version {
                let renewed = store.authenticate(&connection).await;
                *outcome = renewed.err();
                renewals.count.fetch_add(1, Ordering::Release);
            }
            let error = outcome.clone();
            drop(outcome);
            match error {
                // Perhaps with another stream for watches than a moment ago.
                None => store.connection("authenticate").await,
                Some(error) => Err(error),
            }
        });
        renewal.await.unwrap_or_else(|error| {
            Err(ClusterError::Unavailable {
                endpoint: self.endpoints().join(","),
                operation: "authenticate",
                reason: error.to_string(),
            })
        })
    }

    async fn authenticate(&self, connection: &Connection) -> Result<(), ClusterError> {
        let Some(credentials) = &self.shared.options.credentials else {
            return Ok(());
        };
        let endpoint = &connection.endpoint;
        let reading = self.password(endpoint);
        let password = in_time("authenticate", endpoint, self.timeout(), reading).await?;
        let user = (credentials.user.clone(), password);
        let mut client: Client = connection.client.clone();
        let renewal = authenticate(&mut client, user);
        let result = bounded("authenticate", endpoint, self.timeout(), renewal).await;
        if let Err(error) = &result
            && error.blames_connection()
        {
            self.discard(connection.generation, error);
        }
        let has_token = result.map_err(|error| self.about_access(error, String::new))?;
        let was_missing = connection.token.set_missing(!has_token);
        self.tell_token(endpoint, has_token);
        if has_token && was_missing {
            // Watches that are asked for from now on must not be on a stream that has none.
            self.with_fresh_watches(connection.clone(), &connection.watches);
        }
        debug!(
            endpoint = &**endpoint,
            user = credentials.user,
            has_token,
            "token renewed"
        );
        Ok(())
    }

    /// Says that a user is given and authentication is not enabled: once, until it is.
    pub(super) fn tell_token(&self, endpoint: &str, has_token: bool) {
        let Some(credentials) = &self.shared.options.credentials else {
            return;
        };
        let user = &credentials.user;
        let before = self.shared.has_no_token.swap(!has_token, Ordering::AcqRel);
        match (before, has_token) {
            (false, false) => {
                warn!(
                    endpoint,
                    user, "{NOT_ENABLED_THERE}: going on without the user, until etcd asks for it"
                );
            }
            (true, true) => info!(
                endpoint,
                user, "authentication is enabled, and the user is accepted"
            ),
            _ => {}
        }
    }

    /// Puts into an error what only the options, or the caller, know: which user it is about,
    /// and which keys.
    pub(super) fn about_access(
        &self,
        error: ClusterError,
        keys: impl FnOnce() -> String,
    ) -> ClusterError {
        let options = &self.shared.options;
        match error {
            ClusterError::PermissionDenied {
                endpoint,
                operation,
                ..
            } => ClusterError::PermissionDenied {
                endpoint,
                operation,
                user: match &options.credentials {
                    Some(credentials) => format!("user {:?}", credentials.user),
                    None => "the user of the client certificate".to_owned(),
                },
                keys: keys(),
            },
            ClusterError::Auth { endpoint, reason } => {
                let reason = match &options.credentials {
                    Some(credentials) if !reason.contains("user \"") => {
                        format!("{reason} (user {:?})", credentials.user)
                    }
                    _ => reason,
                };
                ClusterError::Auth { endpoint, reason }
            }
            ClusterError::Tls { endpoint, reason } if reason == CERTIFICATE_REFUSED => {
                let tls = options.tls.as_ref();
                let reason = match tls.and_then(|tls| tls.cert_file.as_ref()) {
                    Some(path) => {
                        format!("etcd refuses the client certificate {}", path.display())
                    }
                    None => "etcd wants a client certificate, and tls.cert_file is not set".into(),
                };
                ClusterError::Tls { endpoint, reason }
            }
            other => other,
        }
    }
}

impl EtcdStore {
    /// Reads files. One read after the other: on a disk that hangs not more than one of them does.
    async fn read<T: Send + 'static>(
        &self,
        endpoint: &str,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ClusterError> {
        let reading = self.shared.reading.clone().lock_owned().await;
        blocking(endpoint, move || {
            let _reading = reading;
            read()
        })
        .await
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    endpoint: &str,
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ClusterError> {
    let read = tokio::task::spawn_blocking(read).await;
    read.map_err(|error| ClusterError::Unavailable {
        endpoint: endpoint.to_owned(),
        operation: "connect",
        reason: error.to_string(),
    })
}

impl ClusterError {
    /// Whether etcd refused the token, not the user.
    fn is_token_refused(&self) -> bool {
        matches!(self, Self::Auth { reason, .. } if is_about_token(reason) || reason.contains(NONE_GIVEN))
    }
}

fn is_about_token(words: &str) -> bool {
    [INVALID_TOKEN, OLD_REVISION, OLD_REVISION_INSIDE]
        .iter()
        .any(|refused| words.contains(refused))
}

/// What etcd's words say about the user, if they do. Errors and cancelled watches have the same.
pub(super) fn refusal(
    operation: &'static str,
    endpoint: &str,
    words: &str,
) -> Option<ClusterError> {
    let endpoint = endpoint.to_owned();
    if words.contains(DENIED) {
        return Some(ClusterError::PermissionDenied {
            endpoint,
            operation,
            user: String::new(),
            keys: String::new(),
        });
    }
    let reason = if words.contains(NOT_FOUND) {
        "it knows no such user".to_owned()
    } else if words.contains("invalid user ID or password") {
        "wrong user or password".to_owned()
    } else if words.contains(NOT_ENABLED) {
        NOT_ENABLED_THERE.to_owned()
    } else if words.contains(NO_USER) {
        NONE_GIVEN.to_owned()
    } else if is_about_token(words) {
        words.to_owned()
    } else {
        return None;
    };
    Some(ClusterError::Auth { endpoint, reason })
}

/// Stands for what only the options know more of.
const CERTIFICATE_REFUSED: &str = "the client certificate is refused";

/// What the words of a failed connection say about TLS, if they do. They are rustls's: its types
/// do not come through all the layers above it.
pub(super) fn tls_failure(endpoint: &str, words: &str) -> Option<ClusterError> {
    let has = |part: &str| words.contains(part);
    let reason = if has("UnknownIssuer") || has("BadSignature") {
        "its certificate is not signed by a CA in tls.ca_file, or by one that the system trusts \
         where that is not set"
            .to_owned()
    } else if has("certificate expired") || has("invalid peer certificate: Expired") {
        // Without the time of now, which would make each such error another one.
        let when = number_after(words, "not valid after ");
        format!(
            "its certificate has expired{}",
            when("; Unix time of its end: ")
        )
    } else if has("certificate not valid yet") || has("NotValidYet") {
        let when = number_after(words, "not valid before ");
        format!(
            "its certificate is not valid yet{}",
            when("; Unix time of its start: ")
        )
    } else if has("certificate not valid for name") || has("NotValidForName") {
        format!(
            "its certificate is for another name, see tls.server_name: not valid for name {}",
            after(words, "certificate not valid for name")
        )
    } else if has("received fatal alert") {
        let alert = after(words, "received fatal alert: ");
        let of_certificate = ["Certificate", "UnknownCA", "AccessDenied"];
        if of_certificate.iter().any(|part| alert.contains(part)) {
            CERTIFICATE_REFUSED.to_owned()
        } else {
            format!("it says {alert}")
        }
    } else if has("InvalidContentType") || has("tls handshake eof") {
        "it does not speak TLS there, perhaps an endpoint for http://".to_owned()
    } else if has("invalid peer certificate") {
        format!(
            "its certificate is refused: {}",
            after(words, "invalid peer certificate")
        )
    } else if has("no native certs found") {
        "the system has no CAs, set tls.ca_file".to_owned()
    } else if has("peer is incompatible") || has("peer misbehaved") || has("HTTP/2 was not neg") {
        words.to_owned()
    } else {
        return None;
    };
    Some(ClusterError::Tls {
        endpoint: endpoint.to_owned(),
        reason,
    })
}

/// Whether a connection that had come about was closed by the other side.
pub(super) fn is_closed(reason: &str) -> bool {
    [
        "broken pipe",
        "reset by peer",
        "operation was canceled",
        "closed",
        "eof",
    ]
    .iter()
    .any(|closed| reason.contains(closed))
}

/// A server that speaks TLS closes a connection without it.
pub(super) fn perhaps_https(endpoint: &str, mut error: ClusterError) -> ClusterError {
    if let ClusterError::Unavailable { reason, .. } = &mut error
        && !endpoint.starts_with("https://")
        && is_closed(reason)
    {
        reason.push_str("; perhaps an endpoint for https://");
    }
    error
}

/// The number behind `part`, if there is one, behind what it is.
fn number_after<'w>(words: &'w str, part: &str) -> impl FnOnce(&str) -> String + use<'w> {
    let rest = words.split_once(part).map_or("", |(_, rest)| rest);
    let end = rest.find(|c: char| !c.is_ascii_digit());
    let number = &rest[..end.unwrap_or(rest.len())];
    move |what| match number {
        "" => String::new(),
        number => format!("{what}{number}"),
    }
}

/// What follows, up to the next error in the chain.
fn after<'w>(words: &'w str, part: &str) -> &'w str {
    let start = words.find(part).map_or(0, |start| start + part.len());
    let rest = words[start..].trim_start_matches([':', ' ']);
    rest.split(SEPARATOR).next().unwrap_or_default()
}

const SEPARATOR: &str = " <- ";

/// Everything that an error and its causes say.
pub(super) fn words_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let said = error.to_string();
        // Most of them repeat their cause, or say nothing.
        let empty = said == "transport error" && error.source().is_some();
        if !empty && !words.iter().any(|before| before.contains(&said)) {
            words.push(said);
        }
        // An I/O error is the cause's cover: its own `source` is the cause of the cause.
        let io = error.downcast_ref::<std::io::Error>();
        next = match io.and_then(|io| io.get_ref()) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    words.join(SEPARATOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_user() {
        let told = |words| refusal("list", "e", words).map(|error| error.to_string());
        assert_eq!(told("etcdserver: requested lease not found"), None);
        for (words, part) in [
            ("etcdserver: permission denied", "allows list"),
            (
                "etcdserver: authentication failed, invalid user ID or password",
                "wrong user or password",
            ),
            ("etcdserver: authentication is not enabled", "not enabled"),
            ("etcdserver: user name is empty", "none are given"),
            ("etcdserver: invalid auth token", "invalid auth token"),
        ] {
            assert!(
                told(words).is_some_and(|told| told.contains(part)),
                "{words}"
            );
        }
        for words in [INVALID_TOKEN, OLD_REVISION, OLD_REVISION_INSIDE, NO_USER] {
            assert!(refusal("list", "e", words).is_some_and(|error| error.is_token_refused()));
        }
    }

    /// rustls's words are not promised to stay.
    #[cfg(feature = "tls")]
    #[test]
    fn failures_of_tls() {
        use rustls::pki_types::{ServerName, UnixTime};
        use rustls::{AlertDescription, CertificateError as C, Error, InvalidMessage};
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let expired = |now| C::ExpiredContext {
            time: at(now),
            not_after: at(1000),
        };
        let early = C::NotValidYetContext {
            time: at(1),
            not_before: at(1000),
        };
        let other_name = C::NotValidForNameContext {
            expected: ServerName::try_from("a.example").unwrap(),
            presented: vec!["b.example".to_owned()],
        };
        for (error, part) in [
            (C::UnknownIssuer.into(), "tls.ca_file"),
            (C::Expired.into(), "has expired"),
            (
                expired(2000).into(),
                "has expired; Unix time of its end: 1000",
            ),
            (C::NotValidYet.into(), "not valid yet"),
            (early.into(), "not valid yet; Unix time of its start: 1000"),
            (C::NotValidForName.into(), "tls.server_name"),
            (other_name.into(), "a.example"),
            (C::Revoked.into(), "is refused: Revoked"),
            (
                Error::AlertReceived(AlertDescription::CertificateRequired),
                CERTIFICATE_REFUSED,
            ),
            (
                Error::AlertReceived(AlertDescription::BadCertificate),
                CERTIFICATE_REFUSED,
            ),
            (
                Error::AlertReceived(AlertDescription::ProtocolVersion),
                "it says ProtocolVersion",
            ),
            (
                Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "does not speak TLS",
            ),
        ] {
            // As it comes: behind an I/O error.
            let words = words_of(&std::io::Error::other(error));
            let told = tls_failure("e", &words).map(|error| error.to_string());
            let told = told.unwrap_or_else(|| panic!("{words}"));
            assert!(told.contains(part), "{words}: {told}");
        }
        let told = |now| tls_failure("e", &words_of(&Error::from(expired(now))));
        assert_eq!(
            told(2000),
            told(3000),
            "told once, so it must stay the same"
        );
        assert_eq!(
            tls_failure("e", "transport error <- tcp connect error"),
            None
        );
    }
}

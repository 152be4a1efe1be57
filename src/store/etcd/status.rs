//! Why a call to etcd failed. Each gRPC status and transport error is classified here once, and turned
//! into a [`ClusterError`] once, where the operation, the endpoint, the user and the keys are known.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::Error as EtcdError;
use tonic::{Code, Status};

use super::options::EtcdOptions;
use super::tls_failure::{TlsFailure, error_chain};
use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};

/// A failed call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{failure}")]
pub(super) struct CallError {
    pub(super) failure: Failure,
    source: Option<Arc<EtcdError>>,
}

/// The reason of a failed call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the server's own deadline was exceeded")]
    DeadlineExceeded,
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    TooLarge(String),
    #[error("{0}")]
    Rejected(String),
    /// With the oldest revision that is kept, if the server said it.
    #[error("the requested revision has been compacted")]
    Compacted(Option<Revision>),
    #[error("requested lease not found")]
    LeaseNotFound,
    #[error("permission denied")]
    PermissionDenied,
    #[error("it knows no such user")]
    UnknownUser,
    #[error("wrong user or password")]
    WrongPassword,
    #[error("{AUTH_NOT_ENABLED}")]
    AuthNotEnabled,
    /// Authentication is enabled, and the request had no token.
    #[error("it wants a user and a password, and none are given")]
    NoUser,
    /// The token has expired, or is older than the last change of a user or role.
    #[error("{0}")]
    TokenRefused(String),
    #[error("TLS failed: {}", .0.reason(None))]
    Tls(TlsFailure),
    /// An earlier step failed, such as making the connection that the call needs.
    #[error("{0}")]
    Before(ClusterError),
}

/// The message where a user is configured, and etcd has authentication disabled.
pub(super) const AUTH_NOT_ENABLED: &str = "authentication is not enabled there";

/// What etcd's error messages mean, by the constants of its package `rpctypes`. A message comes
/// without its gRPC code in the reason of a cancelled watch, and with another one from
/// `etcd grpc-proxy`; and several messages share one code.
const MESSAGES: [(&str, Message); 11] = [
    // ErrGRPCPermissionDenied
    ("permission denied", Message::PermissionDenied),
    // ErrGRPCUserNotFound: also for the name in a client certificate
    ("user name not found", Message::UnknownUser),
    // ErrGRPCAuthFailed
    ("invalid user ID or password", Message::WrongPassword),
    // ErrGRPCAuthNotEnabled
    ("authentication is not enabled", Message::AuthNotEnabled),
    // ErrGRPCUserEmpty
    ("user name is empty", Message::NoUser),
    // ErrGRPCInvalidAuthToken
    ("invalid auth token", Message::TokenRefused),
    // ErrGRPCAuthOldRevision
    ("revision of auth store is old", Message::TokenRefused),
    // auth.ErrAuthOldRevision: 3.5.1 passes this inner error on
    ("revision in header is old", Message::TokenRefused),
    // ErrGRPCCompacted
    ("required revision has been compacted", Message::Compacted),
    // ErrGRPCLeaseNotFound
    ("requested lease not found", Message::LeaseNotFound),
    // ErrGRPCNotSupportedForLearner: from 3.6 on with a code for invalid requests, but another member
    // accepts the request
    ("rpc not supported for learner", Message::Learner),
];

/// How `etcd-client` reports that the first renewal of a lease was answered with a TTL of 0.
const KEEP_ALIVE_OF_UNKNOWN_LEASE: &str = "lease not found";
/// How `tonic` reports an answer that is larger than the client accepts.
const ANSWER_TOO_LARGE: &str = "length too large";

#[derive(Clone, Copy)]
enum Message {
    PermissionDenied,
    UnknownUser,
    WrongPassword,
    AuthNotEnabled,
    NoUser,
    TokenRefused,
    Compacted,
    LeaseNotFound,
    Learner,
}

impl Failure {
    /// Classifies a message of etcd, if it is a known one.
    pub(super) fn of_message(text: &str) -> Option<Self> {
        let (_, message) = MESSAGES.iter().find(|(part, _)| text.contains(part))?;
        Some(match message {
            Message::PermissionDenied => Self::PermissionDenied,
            Message::UnknownUser => Self::UnknownUser,
            Message::WrongPassword => Self::WrongPassword,
            Message::AuthNotEnabled => Self::AuthNotEnabled,
            Message::NoUser => Self::NoUser,
            Message::TokenRefused => Self::TokenRefused(text.to_owned()),
            Message::Compacted => Self::Compacted(None),
            Message::LeaseNotFound => Self::LeaseNotFound,
            Message::Learner => Self::Unavailable(text.to_owned()),
        })
    }

    fn of_status(status: &Status) -> Self {
        let text = status.message();
        if let Some(known) = Self::of_message(text) {
            return known;
        }
        match status.code() {
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::ResourceExhausted => Self::Exhausted(text.to_owned()),
            Code::OutOfRange if text.contains(ANSWER_TOO_LARGE) => Self::TooLarge(text.to_owned()),
            // All of etcd's own refusals have a text that is known. These come from what stands before
            // it, such as a proxy: another endpoint may do without.
            Code::PermissionDenied
            | Code::Unauthenticated
            | Code::InvalidArgument
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::Unimplemented => Self::Rejected(text.to_owned()),
            // The text of its causes: the status itself shows all of its fields.
            _ => Self::of_transport(match status.source() {
                Some(cause) => error_chain(cause),
                None => text.to_owned(),
            }),
        }
    }

    fn of_transport(text: String) -> Self {
        match TlsFailure::of_text(&text) {
            Some(failure) => Self::Tls(failure),
            None => Self::Unavailable(text),
        }
    }
}

impl From<EtcdError> for CallError {
    fn from(error: EtcdError) -> Self {
        let failure = match &error {
            EtcdError::GRpcStatus(status) => Failure::of_status(status),
            EtcdError::TransportError(error) => Failure::of_transport(error_chain(error)),
            EtcdError::LeaseKeepAliveError(text) if text.contains(KEEP_ALIVE_OF_UNKNOWN_LEASE) => {
                Failure::LeaseNotFound
            }
            EtcdError::InvalidArgs(text) => Failure::Rejected(text.clone()),
            other => Failure::Unavailable(other.to_string()),
        };
        Self {
            failure,
            source: Some(Arc::new(error)),
        }
    }
}

impl From<Failure> for CallError {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            source: None,
        }
    }
}

impl From<ClusterError> for CallError {
    fn from(error: ClusterError) -> Self {
        Failure::Before(error).into()
    }
}

/// What the error of a failed call has to name.
pub(super) struct CallContext<'a> {
    pub(super) operation: &'static str,
    pub(super) endpoint: &'a str,
    pub(super) subject: Subject<'a>,
}

/// The keys and the lease that a call is about.
#[derive(Clone, Copy, Default)]
pub(super) struct Subject<'a> {
    pub(super) keys: &'a [&'a str],
    pub(super) lease: Option<LeaseId>,
}

impl Subject<'_> {
    fn keys_text(&self) -> String {
        match self.lease {
            Some(lease) if self.keys.is_empty() => format!("the keys of lease {lease}"),
            _ => self.keys.join(", "),
        }
    }

    /// The reason of an error, with the keys that the request is about, as far as they are few.
    fn with_keys(&self, reason: String) -> String {
        const MOST: usize = 3;
        match self.keys {
            [] => reason,
            keys if keys.len() <= MOST => format!("{reason} ({})", keys.join(", ")),
            keys => {
                let (some, more) = (keys[..MOST].join(", "), keys.len() - MOST);
                format!("{reason} ({some} and {more} more)")
            }
        }
    }
}

impl CallError {
    pub(super) fn is_timeout(&self) -> bool {
        matches!(
            self.failure,
            Failure::Timeout(_)
                | Failure::DeadlineExceeded
                | Failure::Before(ClusterError::Timeout { .. })
        )
    }

    /// Whether the connection can no longer be used.
    pub(super) fn blames_connection(&self) -> bool {
        match &self.failure {
            Failure::Unavailable(_) | Failure::Tls(_) => true,
            Failure::Before(error) => error.blames_connection(),
            _ => self.is_timeout(),
        }
    }

    /// Whether the connection has ended during the call, and not the member has answered that it cannot serve.
    pub(super) fn has_lost_connection(&self) -> bool {
        let is_of_transport = match self.source.as_deref() {
            Some(EtcdError::GRpcStatus(status)) => status.source().is_some(),
            Some(EtcdError::TransportError(_)) => true,
            _ => false,
        };
        is_of_transport && matches!(self.failure, Failure::Unavailable(_))
    }

    /// Whether etcd refused the token, not the user.
    pub(super) fn is_token_refused(&self) -> bool {
        matches!(self.failure, Failure::TokenRefused(_) | Failure::NoUser)
    }

    pub(super) fn is_permission_denied(&self) -> bool {
        self.failure == Failure::PermissionDenied
    }

    /// The error for the caller of the store.
    pub(super) fn explain(&self, context: &CallContext<'_>, options: &EtcdOptions) -> ClusterError {
        let operation = context.operation;
        let endpoint = context.endpoint.to_owned();
        match self.failure.clone() {
            Failure::Before(error) => error,
            Failure::Timeout(after) => ClusterError::Timeout {
                endpoint,
                operation,
                after,
            },
            Failure::DeadlineExceeded => ClusterError::Timeout {
                endpoint,
                operation,
                after: options.request_timeout,
            },
            Failure::Unavailable(reason) => ClusterError::Unavailable {
                endpoint,
                operation,
                reason,
            },
            Failure::Exhausted(reason) => ClusterError::Exhausted {
                endpoint,
                operation,
                reason: context.subject.with_keys(reason),
            },
            Failure::TooLarge(reason) => ClusterError::TooLarge {
                endpoint,
                operation,
                reason: context.subject.with_keys(reason),
            },
            Failure::Compacted(oldest) => ClusterError::Compacted { oldest },
            refusal => refusal.explain(context, options),
        }
    }
}

impl Failure {
    /// The error for a request that the server refused.
    fn explain(self, context: &CallContext<'_>, options: &EtcdOptions) -> ClusterError {
        let operation = context.operation;
        let endpoint = context.endpoint.to_owned();
        match (self, context.subject.lease) {
            (Self::LeaseNotFound, Some(lease)) => ClusterError::LeaseNotFound { lease },
            (Self::PermissionDenied, _) => ClusterError::PermissionDenied {
                endpoint,
                operation,
                user: match &options.credentials {
                    Some(credentials) => format!("user {:?}", credentials.user),
                    None => "the user of the client certificate".to_owned(),
                },
                keys: context.subject.keys_text(),
            },
            (Self::Tls(failure), _) => ClusterError::Tls {
                endpoint,
                reason: failure.reason(options.tls.as_ref()),
            },
            (
                refusal @ (Self::UnknownUser
                | Self::WrongPassword
                | Self::AuthNotEnabled
                | Self::NoUser
                | Self::TokenRefused(_)),
                _,
            ) => ClusterError::Auth {
                endpoint,
                reason: with_user(refusal, options),
            },
            (rejected, _) => ClusterError::Rejected {
                endpoint,
                operation,
                reason: context.subject.with_keys(rejected.to_string()),
            },
        }
    }
}

/// The reason of an [`Auth`](ClusterError::Auth) error, with the user that it is about.
pub(super) fn with_user(reason: impl fmt::Display, options: &EtcdOptions) -> String {
    match &options.credentials {
        Some(credentials) => format!("{reason} (user {:?})", credentials.user),
        None => reason.to_string(),
    }
}

/// Bounds a call in time.
pub(super) async fn bounded<T, E: Into<CallError>>(
    after: Duration,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(after, call).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Failure::Timeout(after).into()),
    }
}

#[cfg(test)]
mod tests;

//! What can go wrong, and with which field, endpoint, key or revision.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::ids::{LeaseId, Revision};

/// Every error of this crate. Each variant carries what its reader needs in order to act.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// A setting makes no sense. Nothing was started.
    #[error("invalid {field}: {reason}")]
    InvalidConfig {
        /// The setting, as it is called in the builder or in the YAML file.
        field: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// An endpoint cannot be used. Nothing was started.
    #[error("invalid etcd endpoint {endpoint:?}: {reason}")]
    InvalidEndpoint {
        /// The endpoint as it was given, but for what may be a password in it.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store could not be reached, or cannot serve for the moment (no quorum). Trying again
    /// later may help.
    #[error("etcd at {endpoint} is unavailable for {operation}: {reason}")]
    Unavailable {
        /// The endpoint that failed.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// The transport's or the server's words.
        reason: String,
    },
    /// The store serves, but not this: it has no space left, or too many requests. Reads and
    /// renewals may go on.
    #[error("etcd at {endpoint} has no room for {operation}: {reason}")]
    Exhausted {
        /// The endpoint that said so.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// The server's words.
        reason: String,
    },
    /// An answer is larger than what is accepted.
    #[error("the answer of etcd at {endpoint} to {operation} is too large: {reason}")]
    TooLarge {
        /// The endpoint that answered.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// The transport's words.
        reason: String,
    },
    /// The store has failed again and again, so this call was not tried. It is tried again before
    /// long.
    #[error(
        "etcd is not asked for {operation}: {failures} failures in a row, the last one: {last}"
    )]
    CircuitOpen {
        /// What would have been asked.
        operation: &'static str,
        /// How many tries have failed.
        failures: u32,
        /// What the last one failed with.
        last: String,
    },
    /// What a call tells was not taken soon enough, so it was ended: others share its connection. Go
    /// on with another one from where this one has come to.
    #[error("{operation} was ended because it was not read: it was {behind} messages behind")]
    TooSlow {
        /// What was ended.
        operation: &'static str,
        /// How many messages are kept for it.
        behind: usize,
    },
    /// The store did not answer in time. Whether a write took effect is unknown: read before you
    /// claim.
    #[error("etcd at {endpoint} did not answer {operation} within {after:?}")]
    Timeout {
        /// The endpoint that stayed silent.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// How long the answer was waited for.
        after: Duration,
    },
    /// The store refused for good: an invalid request.
    #[error("etcd at {endpoint} refused {operation}: {reason}")]
    Rejected {
        /// The endpoint that refused.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// The server's words.
        reason: String,
    },
    /// No TLS connection to an endpoint comes about. It is tried for ever, at this endpoint and at
    /// the others, and certificate files are read again each time.
    #[error("TLS with etcd at {endpoint} fails: {reason}")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// Which certificate, file or name is the reason.
        reason: String,
    },
    /// The store does not take this client for the user that it says it is, or for any. It is
    /// tried for ever, and a password file or variable is read again each time.
    #[error("etcd at {endpoint} does not accept the user: {reason}")]
    Auth {
        /// The endpoint that refused.
        endpoint: String,
        /// What it did not accept.
        reason: String,
    },
    /// The user's roles do not allow this.
    #[error(
        "etcd at {endpoint}: permission denied: no role of {user} allows {operation} of {keys}"
    )]
    PermissionDenied {
        /// The endpoint that refused.
        endpoint: String,
        /// What was asked of it.
        operation: &'static str,
        /// Which user asked.
        user: String,
        /// The keys and prefixes it was about. One of them is not allowed; etcd does not say which.
        keys: String,
    },
    /// The revision asked for is no longer kept. List again, or go on from `oldest`.
    #[error("the revision asked for has been compacted; the oldest one kept is {oldest}")]
    Compacted {
        /// The oldest revision that a watch can still start from, 0 where the server did not say.
        oldest: Revision,
    },
    /// The lease expired, was revoked, or never existed. Keys under it are gone.
    #[error("lease {lease} is unknown, expired or revoked")]
    LeaseNotFound {
        /// The lease in question.
        lease: LeaseId,
    },
    /// The call needs leadership, and this node does not hold it.
    #[error("node {node:?} is not the leader of group {group:?}")]
    NotLeader {
        /// This node.
        node: String,
        /// Its group.
        group: String,
    },
    /// Leadership stays where it is, because it cannot be handed to that node.
    #[error("leadership cannot be transferred to {target:?}: {reason}")]
    TransferRefused {
        /// The node that should have taken over.
        target: String,
        /// Why it cannot.
        reason: String,
    },
    /// The call needs `run` to be in progress.
    #[error("{what} is not running: its run has ended, or has not begun")]
    NotRunning {
        /// The node or discovery concerned.
        what: String,
    },
    /// `run` was called while an earlier call of it had not returned.
    #[error("{what} is running already: one run at a time")]
    AlreadyRunning {
        /// The node or discovery concerned.
        what: String,
    },
    /// A snapshot file could not be written, or must not be used. It is left as it is.
    #[error("snapshot file {path}: {reason}")]
    SnapshotFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration file could not be read or parsed.
    #[error("{path}: {reason}")]
    ConfigFile {
        /// The file.
        path: String,
        /// What is wrong, with line and column where known.
        reason: String,
    },
}

/// Checks a setting's range.
pub(crate) fn in_range<T: PartialOrd + std::fmt::Display>(
    field: &str,
    name: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), ClusterError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = (range.start(), range.end());
    let field = match field {
        "" => name.to_owned(),
        field => format!("{field}.{name}"),
    };
    Err(ClusterError::config(
        field,
        format!("{value} is out of range, {least} to {most}"),
    ))
}

impl ClusterError {
    pub(crate) fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidConfig {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. }
                | Self::Timeout { .. }
                | Self::Exhausted { .. }
                | Self::TooSlow { .. }
                | Self::CircuitOpen { .. }
        )
    }

    /// Whether it says that the user may not do this.
    pub(crate) fn is_missing_permission(&self) -> bool {
        match self {
            Self::PermissionDenied { .. } => true,
            Self::Rejected { reason, .. } => reason.contains("permission denied"),
            _ => false,
        }
    }

    /// Whether it says that the connection is of no use any more.
    pub(crate) fn blames_connection(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::Timeout { .. } | Self::Tls { .. }
        )
    }
}

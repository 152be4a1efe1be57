//! The errors of this crate, and the check of a setting's range.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::ids::{LeaseId, Revision};

/// Every error of this crate. Each variant carries what its reader needs in order to act.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// A setting is invalid. Nothing was started.
    #[error("invalid {field}: {reason}")]
    InvalidConfig {
        /// The setting, by its name in the builder or in the YAML file.
        field: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// An endpoint cannot be used. Nothing was started.
    #[error("invalid etcd endpoint {endpoint:?}: {reason}")]
    InvalidEndpoint {
        /// The endpoint as it was given, without any part that may be a password.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store could not be reached, or cannot serve at the moment (no quorum). A later attempt
    /// may succeed.
    #[error("etcd at {endpoint} is unavailable for {operation}: {reason}")]
    Unavailable {
        /// The endpoint that failed.
        endpoint: String,
        /// The operation that failed.
        operation: &'static str,
        /// The message of the transport or of the server.
        reason: String,
    },
    /// The store is up but refuses this call, because it has no space left or too many requests.
    /// Reads and lease renewals may still succeed.
    #[error("etcd at {endpoint} has no room for {operation}: {reason}")]
    Exhausted {
        /// The endpoint that refused.
        endpoint: String,
        /// The operation that was refused.
        operation: &'static str,
        /// The server's message.
        reason: String,
    },
    /// An answer is larger than the client accepts.
    #[error("the answer of etcd at {endpoint} to {operation} is too large: {reason}")]
    TooLarge {
        /// The endpoint that answered.
        endpoint: String,
        /// The operation that was answered.
        operation: &'static str,
        /// The message of the transport.
        reason: String,
    },
    /// The store has failed several times in a row, so this call was not sent. Calls are sent again
    /// after a short pause.
    #[error(
        "{operation} was not sent to etcd after {failures} failures in a row, the last one: {last}"
    )]
    CircuitOpen {
        /// The operation that was not sent.
        operation: &'static str,
        /// The number of failures in a row.
        failures: u32,
        /// The message of the last failure.
        last: String,
    },
    /// A watch was ended because its events were not read fast enough, and others share its
    /// connection. Open another one from the position that this one has reached.
    #[error("{operation} was ended because its reader was {behind} messages behind")]
    TooSlow {
        /// The operation that was ended.
        operation: &'static str,
        /// How many unread messages are kept.
        behind: usize,
    },
    /// The store did not answer in time. Whether a write took effect is unknown: read before you
    /// rely on it.
    #[error("etcd at {endpoint} did not answer {operation} within {after:?}")]
    Timeout {
        /// The endpoint that did not answer.
        endpoint: String,
        /// The operation that was not answered.
        operation: &'static str,
        /// How long the client waited.
        after: Duration,
    },
    /// The store refused an invalid request. The same request will be refused again.
    #[error("etcd at {endpoint} refused {operation}: {reason}")]
    Rejected {
        /// The endpoint that refused.
        endpoint: String,
        /// The operation that was refused.
        operation: &'static str,
        /// The server's message.
        reason: String,
    },
    /// A TLS connection to an endpoint could not be made. It is retried without limit, at this
    /// endpoint and at the others, and certificate files are read again each time.
    #[error("TLS to etcd at {endpoint} failed: {reason}")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// Which certificate, file or name is the cause.
        reason: String,
    },
    /// The store does not accept the user or the password, or requires one that is not set. It is
    /// retried without limit, and a password file or variable is read again each time.
    #[error("etcd at {endpoint} does not accept the user: {reason}")]
    Auth {
        /// The endpoint that refused.
        endpoint: String,
        /// What it did not accept.
        reason: String,
    },
    /// The user's roles do not allow this operation.
    #[error(
        "etcd at {endpoint}: permission denied: no role of {user} allows {operation} of {keys}"
    )]
    PermissionDenied {
        /// The endpoint that refused.
        endpoint: String,
        /// The operation that was refused.
        operation: &'static str,
        /// The user of the request.
        user: String,
        /// The keys and prefixes of the request. At least one of them is not allowed; etcd does not
        /// say which.
        keys: String,
    },
    /// The requested revision is no longer kept. List again, or watch from `oldest`.
    #[error("the requested revision has been compacted{}", OldestKept(*.oldest))]
    Compacted {
        /// The oldest revision that a watch can still start from; `None` if the server did not say.
        oldest: Option<Revision>,
    },
    /// The lease expired, was revoked, or never existed. Its keys are gone.
    #[error("lease {lease} is unknown, expired or revoked")]
    LeaseNotFound {
        /// The lease in question.
        lease: LeaseId,
    },
    /// The call needs leadership, and this node is not the leader.
    #[error("node {node:?} is not the leader of group {group:?}")]
    NotLeader {
        /// This node.
        node: String,
        /// Its group.
        group: String,
    },
    /// Leadership cannot be transferred to that node. The leader is unchanged.
    #[error("leadership cannot be transferred to {target:?}: {reason}")]
    TransferRefused {
        /// The node that was to become the leader.
        target: String,
        /// Why it cannot.
        reason: String,
    },
    /// There is no such node.
    #[error("node {node:?} is not registered in the group {group:?}")]
    NotRegistered {
        /// The node.
        node: String,
        /// The group.
        group: String,
    },
    /// What an operator asked for cannot be done to that node. Nothing has changed.
    #[error("node {node:?}: {reason}")]
    OperationRefused {
        /// The node.
        node: String,
        /// Why it cannot be done.
        reason: String,
    },
    /// The call needs `run` to be in progress.
    #[error("{what} is not running: its run has ended, or has not begun")]
    NotRunning {
        /// The node or discovery concerned.
        what: String,
    },
    /// `run` was called before an earlier call of it had returned.
    #[error("{what} is running already: one run at a time")]
    AlreadyRunning {
        /// The node or discovery concerned.
        what: String,
    },
    /// A snapshot file could not be written, or must not be used. The file is left unchanged.
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

/// The end of the message of [`ClusterError::Compacted`].
struct OldestKept(Option<Revision>);

impl fmt::Display for OldestKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(oldest) => write!(f, "; the oldest one kept is {oldest}"),
            None => Ok(()),
        }
    }
}

/// A value of a setting that has a range: numbers, and durations, which are shown with their unit.
pub(crate) trait RangedValue: PartialOrd {
    fn to_text(&self) -> String;
}

macro_rules! ranged_numbers {
    ($($number:ty),*) => {
        $(impl RangedValue for $number {
            fn to_text(&self) -> String {
                self.to_string()
            }
        })*
    };
}

ranged_numbers!(f64, i64, u16, u32, u64, usize);

impl RangedValue for Duration {
    fn to_text(&self) -> String {
        format!("{self:?}")
    }
}

/// Checks that a setting is in its range. `field` is the section that the setting `name` belongs to,
/// such as `adaptive`; empty for a setting outside of any section.
///
/// # Errors
///
/// [`InvalidConfig`](ClusterError::InvalidConfig) with the setting, its value and the range.
pub(crate) fn in_range<T: RangedValue>(
    field: &str,
    name: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), ClusterError> {
    if range.contains(&value) {
        return Ok(());
    }
    let field = match field {
        "" => name.to_owned(),
        field => format!("{field}.{name}"),
    };
    let (value, least, most) = (
        value.to_text(),
        range.start().to_text(),
        range.end().to_text(),
    );
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

    /// Whether the user lacks a permission.
    pub(crate) fn is_missing_permission(&self) -> bool {
        matches!(self, Self::PermissionDenied { .. })
    }

    /// Whether somebody has to correct a certificate, a user or a password before this can succeed.
    pub(crate) fn needs_correction(&self) -> bool {
        matches!(self, Self::Tls { .. } | Self::Auth { .. })
    }

    /// Whether the connection can no longer be used after this error.
    pub(crate) fn blames_connection(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::Timeout { .. } | Self::Tls { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_shown_with_their_units() {
        in_range("adaptive", "gain", 0.5, 0.0..=1.0).unwrap();
        let error = in_range("adaptive", "gain", 2.0, 0.0..=1.0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid adaptive.gain: 2 is out of range, 0 to 1"
        );
        let range = Duration::from_millis(10)..=Duration::from_secs(60);
        let error = in_range("", "request_timeout", Duration::ZERO, range).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid request_timeout: 0ns is out of range, 10ms to 60s"
        );
    }

    #[test]
    fn a_compaction_names_the_oldest_revision_if_it_is_known() {
        let text = |oldest| ClusterError::Compacted { oldest }.to_string();
        assert_eq!(text(None), "the requested revision has been compacted");
        assert!(text(Some(7)).ends_with("the oldest one kept is 7"));
    }
}

//! Refreshing the token of a connection when etcd refuses it.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::connector::Connector;
use super::files::in_time;
use super::link::Connection;
use super::status::{CallError, Subject, bounded};
use super::token::{Token, authenticate};
use crate::error::ClusterError;

/// From this age on the token of a watch stream may have expired.
const DOUBT_AFTER: Duration = Duration::from_secs(1);

impl Connector {
    /// Whether a fresh token would help.
    pub(super) fn may_refresh(&self, error: &CallError) -> bool {
        self.options.credentials.is_some() && error.is_token_refused()
    }

    /// The same for a call with this token. Without one the call may have been made as the user of the
    /// client certificate, who lacks the permission.
    pub(super) fn may_refresh_for(&self, error: &CallError, token: &Token) -> bool {
        self.may_refresh(error) || (token.is_missing() && error.is_permission_denied())
    }

    /// The same for a watch that was opened on this connection. An older etcd reports "permission
    /// denied" if the token has expired, or if there is none, so that is final only on a new stream
    /// with a token.
    pub(super) fn may_refresh_for_watch(&self, error: &CallError, on: &Connection) -> bool {
        let is_doubtful = error.is_permission_denied()
            && (on.watches.age() > DOUBT_AFTER || on.token.is_missing());
        self.options.credentials.is_some() && (is_doubtful || error.is_token_refused())
    }

    /// Gets a fresh token for a connection, unless somebody else has since `version`. Returns the
    /// connection to continue with.
    pub(super) async fn refresh_token(
        self: &Arc<Self>,
        generation: u64,
        version: u64,
    ) -> Result<Connection, ClusterError> {
        let connection = self.connection("authenticate").await?;
        if connection.generation != generation {
            // It has been replaced by one with a token of its own.
            return Ok(connection);
        }
        // In a task of its own, because a caller that is not polled must not hold up the others.
        let connector = self.clone();
        let refresh = tokio::spawn(async move {
            let authenticating = connector.authenticate(&connection);
            connection
                .token
                .refresh_once(version, authenticating)
                .await?;
            // Its watch stream may be another one now.
            connector.connection("authenticate").await
        });
        refresh.await.unwrap_or_else(|error| {
            Err(ClusterError::Unavailable {
                endpoint: self.endpoints_text(),
                operation: "authenticate",
                reason: error.to_string(),
            })
        })
    }

    async fn authenticate(&self, connection: &Connection) -> Result<(), ClusterError> {
        let endpoint = &connection.endpoint;
        let after = self.options.request_timeout;
        let reading = self.password.user(&self.options, &self.files, endpoint);
        let Some(user) = in_time("authenticate", endpoint, after, reading).await? else {
            return Ok(());
        };
        let name = user.0.clone();
        let mut client = connection.client.clone();
        let result = bounded(after, authenticate(&mut client, user)).await;
        let has_token = result.map_err(|error| {
            let explained = self.explain("authenticate", endpoint, Subject::default(), &error);
            if error.blames_connection() {
                self.discard(connection.generation, &explained);
            }
            explained
        })?;
        let was_missing = connection.token.set_missing(!has_token);
        self.report_token(endpoint, has_token);
        if has_token && was_missing {
            // Later watches must not be opened on the stream without a token.
            self.with_fresh_watches(connection.clone(), &connection.watches);
        }
        debug!(
            endpoint = &**endpoint,
            user = name,
            has_token,
            "token refreshed"
        );
        Ok(())
    }
}

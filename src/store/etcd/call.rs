//! Calls on the current connection: bounded in time, repeated once with a fresh token, those that only read also on
//! another connection, and counted for and against the connection.

use std::future::Future;
use std::sync::Arc;

use etcd_client::{Client, Error as EtcdError};
use tokio::time::Instant;

use super::connector::Connector;
use super::link::Connection;
use super::status::{CallError, Subject, bounded};
use crate::error::ClusterError;

/// Whether a call is made once more on another connection after its own one has ended, as when a member of etcd stops: then
/// it is unknown whether it was carried out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    Never,
    /// It changes nothing.
    OnAnotherConnection,
}

impl Connector {
    /// Makes one call, bounded in time, and discards the connection if it turns out to be dead. If the
    /// token is refused, the call has had no effect, and is made once more with a fresh one. If its
    /// connection ends meanwhile, it is made once more as `repeat` says.
    pub(super) async fn call<T, F>(
        self: &Arc<Self>,
        operation: &'static str,
        subject: Subject<'_>,
        repeat: Repeat,
        request: impl Fn(Client) -> F,
    ) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let mut connection = self.connection(operation).await?;
        let (mut may_refresh, mut may_repeat) = (true, repeat == Repeat::OnAnotherConnection);
        let answer = loop {
            let version = connection.token.version();
            let answer = self.attempt(operation, &connection, &request).await;
            let Err(error) = &answer else { break answer };
            if may_refresh && self.may_refresh_for(error, &connection.token) {
                may_refresh = false;
                connection = self.refresh_token(connection.generation, version).await?;
            } else if may_repeat && error.has_lost_connection() {
                may_repeat = false;
                // Why there is no other one says less than why the first one has ended.
                let Ok(another) = self.connection(operation).await else {
                    break answer;
                };
                connection = another;
            } else {
                break answer;
            }
        };
        answer.map_err(|error| self.explain(operation, &connection.endpoint, subject, &error))
    }

    async fn attempt<T, F>(
        &self,
        operation: &'static str,
        connection: &Connection,
        request: &impl Fn(Client) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let sent = Instant::now();
        let usual = self.options.request_timeout;
        let after = connection.round_trips.request_timeout(usual);
        let result = bounded(after, request(connection.client.clone())).await;
        match &result {
            Err(error) if error.blames_connection() => {
                self.blame(operation, connection, sent, error);
            }
            _ => {
                connection.round_trips.request_answered(sent);
                self.link().breaker.succeeded();
            }
        }
        result
    }

    /// Gives the connection up for a call that failed on it, if the connection is the cause.
    pub(super) fn blame(
        &self,
        operation: &'static str,
        connection: &Connection,
        sent: Instant,
        error: &CallError,
    ) {
        if !error.blames_connection() {
            return;
        }
        let explained = self.explain(operation, &connection.endpoint, Subject::default(), error);
        if error.is_timeout() && !connection.round_trips.request_missed(sent) {
            // It is alive, but slow: another connection would be as slow.
            self.count_failure(&mut self.link(), &explained);
        } else {
            self.discard(connection.generation, &explained);
        }
    }
}

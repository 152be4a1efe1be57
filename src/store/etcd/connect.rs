//! The connection that a call is made on: the current one, or a new one that is waited for.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::connector::Connector;
use super::dialler::Dialler;
use super::link::{Connection, Link};
use super::pace::LONGEST_INTERVAL;
use crate::error::ClusterError;

/// The operation that is always tried: a lease that is not renewed in time is lost, and there are no
/// more renewals than leases.
pub(super) const RENEW: &str = "renew";
/// What a round may take longer than its dials.
const SLACK: Duration = Duration::from_secs(1);

/// A round of dialling to wait for.
struct PendingRound {
    task: u64,
    result: watch::Receiver<Option<ClusterError>>,
}

impl Connector {
    /// The current connection, or a new one.
    pub(super) async fn connection(
        self: &Arc<Self>,
        operation: &'static str,
    ) -> Result<Connection, ClusterError> {
        // Twice, because a new connection may be lost before it is used.
        for _ in 0..2 {
            let (round, started) = {
                let mut link = self.link();
                if let Some(connection) = &link.connection {
                    return Ok(connection.clone());
                }
                // A trial call waits for a round, which reports its result to the breaker.
                if operation != RENEW {
                    link.breaker.admit(operation, Instant::now())?;
                }
                self.join_round(&mut link)
            };
            // Without the lock: a runtime that has ended drops the task at once, which takes it.
            if let Some(dialler) = started {
                tokio::spawn(dialler.run());
            }
            self.wait_for(round).await?;
        }
        Err(ClusterError::Unavailable {
            endpoint: self.endpoints_text(),
            operation,
            reason: "connections break as soon as they are made".to_owned(),
        })
    }

    /// The round in progress, or a new one. Also returns the task that must be spawned for it, if none
    /// is running.
    fn join_round(self: &Arc<Self>, link: &mut Link) -> (PendingRound, Option<Dialler>) {
        let mut started = None;
        let task = match &mut link.dialler {
            Some(task) => task,
            none => {
                link.diallers += 1;
                let (dialler, task) = Dialler::new(self.clone(), link.diallers);
                started = Some(dialler);
                none.insert(task)
            }
        };
        if !task.is_dialling {
            task.is_dialling = true;
            task.again.notify_one();
        }
        let mut result = task.result.clone();
        // Results of earlier rounds do not count.
        result.mark_unchanged();
        (
            PendingRound {
                task: task.id,
                result,
            },
            started,
        )
    }

    /// Waits for a round to end, but not much longer than one takes.
    async fn wait_for(&self, mut round: PendingRound) -> Result<(), ClusterError> {
        let endpoints = self.endpoints();
        let each = self.options.connect_timeout + LONGEST_INTERVAL;
        let began = Instant::now();
        let longest = || {
            let addresses = self.link().addresses(&endpoints);
            let addresses = u32::try_from(addresses).unwrap_or(u32::MAX);
            each.saturating_mul(addresses).saturating_add(SLACK)
        };
        let mut after = longest();
        let changed = loop {
            let changed = timeout_at(began + after, round.result.changed()).await;
            // More addresses may have been found in the meantime.
            match (changed, longest()) {
                (Err(_), longer) if longer > after => after = longer,
                (changed, _) => break changed,
            }
        };
        match changed {
            Ok(Ok(())) => round.result.borrow().clone().map_or(Ok(()), Err),
            Ok(Err(_)) => Err(ClusterError::Unavailable {
                endpoint: endpoints.join(","),
                operation: "connect",
                reason: "the task that dialled has ended, or its runtime".to_owned(),
            }),
            Err(_) => {
                // The runtime of the task is not driven: the next caller starts another one.
                self.link().dial_task_ended(round.task);
                Err(ClusterError::Timeout {
                    endpoint: endpoints.join(","),
                    operation: "connect",
                    after,
                })
            }
        }
    }
}

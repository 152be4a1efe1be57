//! A watch of the in-memory store.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::server::{MemoryServer, refused};
use super::state::Fault;
use crate::error::ClusterError;
use crate::ids::Revision;
use crate::store::traits::Watcher;
use crate::store::types::{WatchEvent, WatchRange};

pub(super) struct MemoryWatcher {
    server: Arc<MemoryServer>,
    generation: u64,
    ranges: Vec<WatchRange>,
}

impl MemoryWatcher {
    /// A watch that was accepted at this generation and revision.
    pub(super) fn new(
        server: Arc<MemoryServer>,
        generation: u64,
        revision: Revision,
        mut ranges: Vec<WatchRange>,
    ) -> Self {
        for range in &mut ranges {
            if range.from == 0 {
                range.from = revision + 1;
            }
        }
        Self {
            server,
            generation,
            ranges,
        }
    }
}

#[async_trait]
impl Watcher for MemoryWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        let server = self.server.clone();
        let mut changed = server.changes();
        loop {
            let due = {
                let mut state = server.state();
                match state.fault {
                    _ if state.generation != self.generation => return Err(refused("watch")),
                    Some(Fault::Refuse) => return Err(refused("watch")),
                    Some(Fault::Silence) => {
                        changed.catch_up();
                        None
                    }
                    Some(Fault::LoseAnswers) | None => {
                        let before = state.revision;
                        state.expire(Instant::now());
                        if state.revision != before {
                            server.wake();
                        }
                        changed.catch_up();
                        let events = state.take_events(&mut self.ranges)?;
                        if !events.is_empty() {
                            return Ok(events);
                        }
                        state.next_expiry()
                    }
                }
            };
            let expiry = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = changed.changed() => {}
                () = expiry => {}
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.ranges
    }
}

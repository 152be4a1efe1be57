//! What all handles to one in-memory store share: its data behind a lock, and a signal for changes.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use super::state::{ENDPOINT, Fault, State};
use crate::error::ClusterError;
use crate::signal::{Listener, Signal};
use crate::store::clock::TokioClock;
use crate::sync::lock;

/// How long a call waits while the store is silent.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct MemoryServer {
    state: Mutex<State>,
    /// Updated after each change of the state that somebody may wait for.
    changed: Signal,
    pub(super) clock: TokioClock,
}

impl MemoryServer {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State::new()),
            changed: Signal::default(),
            clock: TokioClock::new(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The state, with due leases expired.
    #[cfg(any(test, feature = "test-util"))]
    pub(super) fn current_state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        state.expire(Instant::now());
        state
    }

    pub(super) fn wake(&self) {
        self.changed.update(|()| {});
    }

    pub(super) fn changes(&self) -> Listener<'_> {
        self.changed.listen()
    }

    /// Runs `call` on the state as soon as the store serves, with due leases expired.
    pub(super) async fn serve<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&mut State) -> Result<T, ClusterError>,
    ) -> Result<T, ClusterError> {
        let timeout = || ClusterError::Timeout {
            endpoint: ENDPOINT.to_owned(),
            operation,
            after: TIMEOUT,
        };
        let mut changed = self.changes();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let fault = self.state().fault;
            match fault {
                None => return self.execute(call),
                Some(Fault::Refuse) => return Err(refused(operation)),
                Some(Fault::LoseAnswers) => {
                    drop(self.execute(call));
                    tokio::time::sleep_until(deadline).await;
                    return Err(timeout());
                }
                Some(Fault::Silence) => {}
            }
            if tokio::time::timeout_at(deadline, changed.changed())
                .await
                .is_err()
            {
                return Err(timeout());
            }
        }
    }

    fn execute<T>(
        &self,
        call: impl FnOnce(&mut State) -> Result<T, ClusterError>,
    ) -> Result<T, ClusterError> {
        let mut state = self.state();
        let before = state.revision;
        state.expire(Instant::now());
        let result = call(&mut state);
        let is_changed = state.revision != before;
        drop(state);
        if is_changed {
            self.wake();
        }
        result
    }
}

pub(super) fn refused(operation: &'static str) -> ClusterError {
    ClusterError::Unavailable {
        endpoint: ENDPOINT.to_owned(),
        operation,
        reason: "the store refuses to serve".to_owned(),
    }
}

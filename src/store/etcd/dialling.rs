//! Making a connection, in a task of its own: whoever needs one waits for it, and whoever stops
//! waiting, or is not polled any more, holds nobody up.
//!
//! A round tries each endpoint in turn, and each address of its name. One that stays silent for
//! `connect_timeout` is not waited for any longer, but not given up either: it may be slow, with a
//! round trip for each step. The first to answer wins, whichever it is.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::EtcdStore;
use super::connection::{Dialed, Link, is_refusal};
use super::round_trips::LONGEST;
use crate::error::ClusterError;

/// After each endpoint has been dialled at once there is one dial in so much time, lengthened by up
/// to a quarter at random.
const DIAL_EVERY: Duration = Duration::from_secs(1);
const JITTER: f64 = 0.25;
/// Dials of one address at the same time: a patient one, and a fresh one, for what the patient one
/// hangs on may be over.
const AT_A_TIME: usize = 2;
/// What a round may take longer than its parts.
const SLACK: Duration = Duration::from_secs(1);

/// When the next dial may be.
#[derive(Debug, Default)]
pub(super) struct Pace(Option<Instant>);

impl Pace {
    /// Takes a dial, or says from when on there is one. Up to `burst` of them can be taken at once.
    pub(super) fn take(&mut self, burst: usize, now: Instant) -> Result<(), Instant> {
        let burst = u32::try_from(burst.saturating_sub(1)).unwrap_or(u32::MAX);
        let spent = self.0.unwrap_or(now);
        // However long those before have been made by chance.
        let longest = DIAL_EVERY.mul_f64(1.0 + JITTER);
        let earliest = spent.checked_sub(longest.saturating_mul(burst));
        match earliest {
            Some(earliest) if earliest > now => Err(earliest),
            _ => {
                let every = DIAL_EVERY.mul_f64(1.0 + JITTER * fastrand::f64());
                self.0 = Some(spent.max(now) + every);
                Ok(())
            }
        }
    }
}

/// The task that dials, as those see it who wait for it.
#[derive(Debug)]
pub(super) struct Dialler {
    id: u64,
    /// A round is in progress: whoever comes waits for its outcome.
    is_trying: bool,
    again: Arc<Notify>,
    outcome: watch::Receiver<Option<ClusterError>>,
}

/// A round to wait for.
pub(super) struct Waiting {
    id: u64,
    outcome: watch::Receiver<Option<ClusterError>>,
}

struct Attempt {
    endpoint: Arc<str>,
    abort: AbortHandle,
}

/// The task's own side.
pub(super) struct Dialling {
    store: EtcdStore,
    id: u64,
    again: Arc<Notify>,
    outcome: watch::Sender<Option<ClusterError>>,
    attempts: JoinSet<(Arc<str>, Result<Dialed, ClusterError>)>,
    /// Those that have not ended, oldest first.
    in_flight: Vec<Attempt>,
}

/// A round in progress.
struct Round {
    endpoints: Vec<Arc<str>>,
    tried: usize,
    /// The one tried last.
    current: Option<Arc<str>>,
    /// When it is the next one's turn.
    next: Instant,
    error: Option<ClusterError>,
}

impl EtcdStore {
    /// Has a round to wait for: the one in progress, or a new one; and the task that is to be started for
    /// it, when `link` is not locked any more: a runtime that ends drops what it is given at once.
    pub(super) fn dialling(&self, link: &mut Link) -> (Waiting, Option<Dialling>) {
        let mut started = None;
        let dialler = match &mut link.dialler {
            Some(dialler) => dialler,
            none => {
                link.diallers += 1;
                let id = link.diallers;
                let (outcome, outcomes) = watch::channel(None);
                let again = Arc::new(Notify::new());
                started = Some(Dialling {
                    store: self.in_background(),
                    id,
                    again: again.clone(),
                    outcome,
                    attempts: JoinSet::new(),
                    in_flight: Vec::new(),
                });
                none.insert(Dialler {
                    id,
                    is_trying: false,
                    again,
                    outcome: outcomes,
                })
            }
        };
        if !dialler.is_trying {
            dialler.is_trying = true;
            dialler.again.notify_one();
        }
        let mut outcome = dialler.outcome.clone();
        // Those of the rounds before do not count.
        outcome.mark_unchanged();
        let id = dialler.id;
        (Waiting { id, outcome }, started)
    }

    /// Waits for a round to end, but not much longer than one takes.
    pub(super) async fn dialled(&self, mut waiting: Waiting) -> Result<(), ClusterError> {
        let endpoints = self.endpoints();
        let each = self.shared.options.connect_timeout + DIAL_EVERY.mul_f64(1.0 + JITTER);
        let began = Instant::now();
        let round = || {
            let link = self.link();
            let count = u32::try_from(link.addresses(&endpoints)).unwrap_or(u32::MAX);
            each.saturating_mul(count).saturating_add(SLACK)
        };
        let mut after = round();
        let changed = loop {
            let changed = tokio::time::timeout_at(began + after, waiting.outcome.changed()).await;
            // How many addresses there are may have turned out meanwhile.
            match (changed, round()) {
                (Err(_), longer) if longer > after => after = longer,
                (changed, _) => break changed,
            }
        };
        match changed {
            Ok(Ok(())) => match waiting.outcome.borrow().clone() {
                None => Ok(()),
                Some(error) => Err(error),
            },
            Ok(Err(_)) => Err(ClusterError::Unavailable {
                endpoint: endpoints.join(","),
                operation: "connect",
                reason: "the runtime that it was tried on has ended".to_owned(),
            }),
            Err(_) => {
                // Its runtime is not driven: the next one dials on its own.
                let mut link = self.link();
                if link
                    .dialler
                    .as_ref()
                    .is_some_and(|dialler| dialler.id == waiting.id)
                {
                    link.dialler = None;
                    link.breaker.abandoned();
                }
                Err(ClusterError::Timeout {
                    endpoint: endpoints.join(","),
                    operation: "connect",
                    after,
                })
            }
        }
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

impl Drop for Dialling {
    fn drop(&mut self) {
        // With its runtime, or with the last handle.
        let mut link = self.store.link();
        if link
            .dialler
            .as_ref()
            .is_some_and(|dialler| dialler.id == self.id)
        {
            link.dialler = None;
            link.breaker.abandoned();
        }
    }
}

impl Dialling {
    pub(super) async fn run(mut self) {
        let mut closed = self.store.shared.closed.clone();
        tokio::select! {
            // Nothing is ever sent: this is the end of the last handle.
            _ = closed.changed() => {}
            () = self.dial() => {}
        }
    }

    async fn dial(&mut self) {
        let again = self.again.clone();
        let mut round: Option<Round> = None;
        loop {
            let next = round.as_ref().map(|round| round.next);
            let due = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(ended) = self.attempts.join_next() => {
                    self.in_flight.retain(|attempt| !attempt.abort.is_finished());
                    match ended {
                        Ok((endpoint, Ok(dialed))) => {
                            self.connected(dialed, &endpoint);
                            return;
                        }
                        Ok((endpoint, Err(error))) => {
                            self.failed(round.as_mut(), &endpoint, error);
                        }
                        // One that was given up says nothing.
                        Err(_) => {}
                    }
                }
                () = again.notified(), if round.is_none() => round = Some(self.round()),
                () = due => self.step(&mut round),
            }
            if round.is_none() && self.is_over() {
                return;
            }
        }
    }

    fn round(&self) -> Round {
        Round {
            endpoints: self.store.endpoints(),
            tried: 0,
            current: None,
            next: Instant::now(),
            error: None,
        }
    }

    /// Tries the next endpoint, or ends the round.
    fn step(&mut self, round: &mut Option<Round>) {
        let Some(current) = round else { return };
        let now = Instant::now();
        let addresses = self.store.link().addresses(&current.endpoints);
        if current.tried >= addresses {
            let error = self.error_of(current);
            *round = None;
            let mut link = self.store.link();
            self.store.count_failure(&mut link, &error);
            if let Some(dialler) = &mut link.dialler
                && dialler.id == self.id
            {
                dialler.is_trying = false;
            }
            self.outcome.send_replace(Some(error));
            return;
        }
        let taken = {
            let mut link = self.store.link();
            link.pace.take(addresses, now).map(|()| {
                let index = link.next % current.endpoints.len();
                link.next = (index + 1) % current.endpoints.len();
                current.endpoints[index].clone()
            })
        };
        match taken {
            Err(due) => current.next = due,
            Ok(endpoint) => {
                current.tried += 1;
                current.next = now + self.store.shared.options.connect_timeout;
                current.current = Some(endpoint.clone());
                self.attempt(endpoint);
            }
        }
    }

    fn attempt(&mut self, endpoint: Arc<str>) {
        let of_it = |attempt: &&Attempt| attempt.endpoint == endpoint;
        let addresses = self.store.link().addresses(std::slice::from_ref(&endpoint));
        if self.in_flight.iter().filter(of_it).count() >= AT_A_TIME * addresses
            && let Some(fresh) = self
                .in_flight
                .iter()
                .rposition(|attempt| attempt.endpoint == endpoint)
        {
            self.in_flight.remove(fresh).abort.abort();
        }
        let store = self.store.clone();
        let of = endpoint.clone();
        let abort = self.attempts.spawn(async move {
            let within = LONGEST.max(store.shared.options.connect_timeout);
            let dialed = store.dial(&of, true, within).await;
            (of, dialed)
        });
        self.in_flight.push(Attempt { endpoint, abort });
    }

    fn failed(&self, round: Option<&mut Round>, endpoint: &Arc<str>, error: ClusterError) {
        self.store.tell_refusal(endpoint, &error);
        let Some(round) = round else { return };
        // One that says what to mend is not hidden by one that is only silent.
        if !round.error.as_ref().is_some_and(is_refusal) || is_refusal(&error) {
            round.error = Some(error);
        }
        if round.current.as_ref() == Some(endpoint) {
            round.next = Instant::now();
        }
    }

    fn error_of(&self, round: &mut Round) -> ClusterError {
        round.error.take().unwrap_or_else(|| ClusterError::Timeout {
            endpoint: round.endpoints.join(","),
            operation: "connect",
            after: self.store.shared.options.connect_timeout,
        })
    }

    fn connected(&self, dialed: Dialed, endpoint: &Arc<str>) {
        {
            let mut link = self.store.link();
            match &link.dialler {
                Some(dialler) if dialler.id == self.id => {
                    link.dialler = None;
                    // Whatever becomes of this task now.
                    link.breaker.connected();
                }
                // Somebody dials in its place.
                _ => return,
            }
            if link.connection.is_some() {
                drop(link);
                self.outcome.send_replace(None);
                return;
            }
        }
        self.store.connected(dialed, endpoint);
        self.outcome.send_replace(None);
    }

    /// Nothing is wanted, and nothing is waited for.
    fn is_over(&self) -> bool {
        if !self.attempts.is_empty() {
            return false;
        }
        let mut link = self.store.link();
        match &link.dialler {
            Some(dialler) if dialler.id == self.id => {
                if dialler.is_trying {
                    return false;
                }
                link.dialler = None;
            }
            _ => debug!("another one dials"),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dial_a_second_after_one_of_each_endpoint() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            pace.take(3, now).unwrap();
        }
        let start = now;
        for count in 1..=20_u32 {
            now = pace.take(3, now).unwrap_err();
            let earliest = DIAL_EVERY * count;
            let passed = now - start;
            assert!(
                passed + DIAL_EVERY / 2 >= earliest
                    && passed <= earliest.mul_f64(1.0 + JITTER) + DIAL_EVERY,
                "{passed:?}"
            );
            pace.take(3, now).unwrap();
        }
        // After a rest each of them at once again.
        now += DIAL_EVERY * 10;
        for _ in 0..3 {
            pace.take(3, now).unwrap();
        }
        assert!(pace.take(3, now).is_err());
    }
}

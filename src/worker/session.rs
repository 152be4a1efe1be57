//! Where a node stands with its lease and its entry: a state machine without I/O and without a
//! clock of its own.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::bugs::{self, Bug};
use crate::store::{Clock, Lease};

/// Where a node stands with its lease and with its entry in the store.
///
/// ```text
///              granted          read                 read
/// BackingOff ---------> Granted ----> Registered <--------> Active
///     ^                   ^  |            |                   |
///     | waits             |  +------------+-------------------+--> Doubtful --+
///     |           renewed |                                           |       |
///    Lost <---------------+-------------------------------------------+ <-----+
///                                   the lease is gone
/// ```
///
/// A node that drains goes to `Draining` where it would go to `Registered`, and never to `Active`.
/// `Closed` is reached from everywhere, when the run ends, and left by the next run only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SessionState {
    /// It has no lease, and waits before it asks for one: for a connection, or after a failure,
    /// 0.5 s to 2 s while the store is away, up to 30 s where it refuses. Goes to `Granted` when
    /// there is a lease.
    BackingOff,
    /// It has a lease, and nothing is known of its keys: they are being read or written. Goes to
    /// `Registered`, `Active` or `Draining` by what is read, to `Doubtful` at the deadline, to
    /// `Lost` with the lease. While another process holds its id it stays here.
    Granted,
    /// Its entry was read back under its lease; it is not in the queue for leadership yet. Goes to
    /// `Active` when its candidacy was read too, back to `Granted` when the entry is gone.
    Registered,
    /// Registered, and in the queue for leadership or at its head.
    Active,
    /// The deadline has passed without an answered renewal: the lease may live or not, and nothing
    /// is claimed on it. Goes to `Granted` when a renewal is answered, for what the keys are has
    /// to be read again; to `Lost` when the lease turns out to be gone.
    Doubtful,
    /// The lease is gone, or has been given up. Goes to `BackingOff`, or to `Granted` when there is
    /// another one already.
    Lost,
    /// Registered with an entry that says `draining`, and not a candidate. As `Registered` in
    /// everything else.
    Draining,
    /// Not running.
    #[default]
    Closed,
}

impl fmt::Display for SessionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackingOff => "backing off",
            Self::Granted => "granted",
            Self::Registered => "registered",
            Self::Active => "active",
            Self::Doubtful => "doubtful",
            Self::Lost => "lost",
            Self::Draining => "draining",
            Self::Closed => "closed",
        })
    }
}

/// What a session goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// The run starts.
    Start,
    /// There is no lease, and none is being used.
    NoLease,
    /// There is a lease.
    Granted,
    /// The keys under the lease were read.
    Read { registered: Option<Registered> },
    /// The deadline has passed.
    DeadlinePassed,
    /// A renewal was answered.
    Renewed,
    /// The lease is gone or was given up.
    LeaseGone,
    /// The run ends.
    Close,
}

/// How it is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Registered {
    Candidate,
    NoCandidate,
    Draining,
}

impl SessionState {
    /// The state after this input. One that means nothing in a state leaves it as it is: it was
    /// sent before the sender could know.
    #[must_use]
    pub(super) fn after(self, input: Input) -> Self {
        use Input as I;
        use SessionState as S;
        match (self, input) {
            (_, I::Close) => S::Closed,
            (S::Closed, I::Start) => S::BackingOff,
            (S::Closed, _) | (_, I::Start) => self,
            (S::BackingOff | S::Lost, I::Granted) => S::Granted,
            (S::Lost, I::NoLease) => S::BackingOff,
            (S::BackingOff | S::Lost, _) => self,
            (_, I::LeaseGone) => S::Lost,
            (S::Doubtful, I::Renewed) => S::Granted,
            (S::Doubtful, _) => self,
            (_, I::DeadlinePassed) => S::Doubtful,
            (_, I::Read { registered: None }) => S::Granted,
            (
                _,
                I::Read {
                    registered: Some(how),
                },
            ) => match how {
                Registered::Candidate => S::Active,
                Registered::NoCandidate => S::Registered,
                Registered::Draining => S::Draining,
            },
            (_, I::Granted | I::NoLease | I::Renewed) => self,
        }
    }

    /// Whether its own entry is known to be in the store.
    pub fn is_registered(self) -> bool {
        matches!(self, Self::Registered | Self::Active | Self::Draining)
    }
}

/// A lease, with the instant up to which this process may count on it.
pub(super) struct Tenure {
    pub(super) lease: Lease,
    clock: Arc<dyn Clock>,
    /// On the clock, in nanoseconds.
    deadline: AtomicU64,
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenure({}, {:?})", self.lease.id, self.remaining())
    }
}

impl Tenure {
    /// A lease whose grant was asked for at `sent`.
    pub(super) fn new(lease: Lease, clock: Arc<dyn Clock>, sent: Duration) -> Self {
        let tenure = Self {
            lease,
            clock,
            deadline: AtomicU64::new(0),
        };
        tenure.renewed(sent, lease.ttl);
        tenure
    }

    /// A renewal that was sent at `sent` has been answered with `ttl`. The store counts from when
    /// it got the request, which is later: so this side stops counting on the lease first.
    pub(super) fn renewed(&self, sent: Duration, ttl: Duration) {
        let from = if bugs::has(Bug::DeadlineFromReceipt) {
            self.clock.now()
        } else {
            sent
        };
        let margin = if bugs::has(Bug::NoMargin) {
            Duration::ZERO
        } else {
            // Of the whole lease also where what is left of it is answered.
            margin(ttl.max(self.lease.ttl))
        };
        // Never back: an answer with a shorter TTL does not undo a promise made.
        let deadline = from + ttl.saturating_sub(margin);
        self.deadline.fetch_max(nanos(deadline), Ordering::AcqRel);
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// How much longer this process may count on the lease.
    pub(super) fn remaining(&self) -> Duration {
        let deadline = Duration::from_nanos(self.deadline.load(Ordering::Acquire));
        deadline.saturating_sub(self.clock.now())
    }

    /// Whether this process may count on the lease now.
    pub(super) fn is_valid(&self) -> bool {
        !self.remaining().is_zero()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// For the clocks of two machines that run at slightly different rates, and for the time between
/// asking `is_leader` and acting on it.
pub(super) fn margin(ttl: Duration) -> Duration {
    Duration::from_millis(500).max(ttl / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseId;
    use proptest::prelude::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Hands(Mutex<Duration>);

    impl Clock for Hands {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A tenure that begins at 100 s, and its clock.
    fn tenure(ttl: u64) -> (Tenure, Arc<Hands>) {
        let lease = Lease {
            id: LeaseId(1),
            ttl: Duration::from_secs(ttl),
        };
        let clock = Arc::new(Hands::default());
        (Tenure::new(lease, clock.clone(), T0), clock)
    }

    const T0: Duration = Duration::from_secs(100);

    fn is_valid_at(tenure: &(Tenure, Arc<Hands>), now: Duration) -> bool {
        *tenure.1.0.lock().unwrap() = T0 + now;
        tenure.0.is_valid()
    }

    #[test]
    fn counts_from_sending_less_the_margin() {
        let tenure = tenure(5);
        assert!(is_valid_at(&tenure, ms(4499)));
        assert!(!is_valid_at(&tenure, ms(4500)));
        tenure.0.renewed(T0 + ms(2000), Duration::from_secs(5));
        assert!(is_valid_at(&tenure, ms(6499)));
        assert!(!is_valid_at(&tenure, ms(6500)));
    }

    #[test]
    fn a_late_answer_to_an_early_renewal_takes_nothing_back() {
        let tenure = tenure(5);
        tenure.0.renewed(T0 + ms(3000), Duration::from_secs(5));
        tenure.0.renewed(T0 + ms(1000), Duration::from_secs(5));
        assert!(is_valid_at(&tenure, ms(7400)));
    }

    #[test]
    fn the_margin_leaves_at_least_half_of_every_ttl_there_is() {
        for ttl in (1..=86_400).map(Duration::from_secs) {
            assert!(margin(ttl) <= ttl / 2, "{ttl:?}");
        }
    }

    #[test]
    fn a_tenth_of_a_long_ttl() {
        let tenure = tenure(60);
        assert!(is_valid_at(&tenure, ms(53_999)));
        assert!(!is_valid_at(&tenure, ms(54_000)));
    }

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Start),
            Just(Input::NoLease),
            Just(Input::Granted),
            Just(Input::Read { registered: None }),
            prop_oneof![
                Just(Registered::Candidate),
                Just(Registered::NoCandidate),
                Just(Registered::Draining)
            ]
            .prop_map(|how| Input::Read {
                registered: Some(how)
            }),
            Just(Input::DeadlinePassed),
            Just(Input::Renewed),
            Just(Input::LeaseGone),
            Just(Input::Close),
        ]
    }

    #[test]
    fn a_life() {
        let candidate = Input::Read {
            registered: Some(Registered::Candidate),
        };
        let mut state = SessionState::default();
        for (input, then) in [
            (Input::Start, SessionState::BackingOff),
            (Input::Granted, SessionState::Granted),
            (candidate, SessionState::Active),
            (Input::DeadlinePassed, SessionState::Doubtful),
            // A late read proves nothing about the lease.
            (candidate, SessionState::Doubtful),
            (Input::Renewed, SessionState::Granted),
            (candidate, SessionState::Active),
            (Input::LeaseGone, SessionState::Lost),
            (Input::Renewed, SessionState::Lost),
            (Input::NoLease, SessionState::BackingOff),
            (Input::Close, SessionState::Closed),
            (Input::Granted, SessionState::Closed),
        ] {
            state = state.after(input);
            assert_eq!(state, then, "after {input:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_in(inputs in proptest::collection::vec(any_input(), 0..100)) {
            let mut state = SessionState::default();
            // What has to have happened since for the state to be what it is.
            let (mut open, mut leased, mut timely) = (false, false, false);
            for input in inputs {
                match input {
                    Input::Start => open = true,
                    Input::Close => (open, leased) = (false, false),
                    Input::Granted if open && !leased => (leased, timely) = (true, true),
                    Input::LeaseGone => leased = false,
                    Input::DeadlinePassed => timely = false,
                    Input::Renewed => timely = true,
                    _ => {}
                }
                state = state.after(input);
                prop_assert_eq!(state == SessionState::Closed, !open);
                if state.is_registered() {
                    prop_assert!(open && leased && timely);
                }
                prop_assert_eq!(state == SessionState::Doubtful, open && leased && !timely);
            }
        }
    }
}

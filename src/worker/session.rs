//! Where a node stands with its lease and its entry: a state machine without I/O and without a
//! clock.

use std::fmt;

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
/// A node that drains goes to `Draining` instead of `Registered`, and never to `Active`. `Closed`
/// is reached from every state, when the run ends; only the next run leaves it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SessionState {
    /// The node has no lease, and waits before it requests one: for a connection, or after a
    /// failure 0.5 s to 2 s while the store is away, and up to 30 s if the store refuses. The next
    /// state is `Granted`, when there is a lease.
    BackingOff,
    /// The node has a lease, and its keys are being read or written. The next state is
    /// `Registered`, `Active` or `Draining`, depending on what is read; `Doubtful` at the deadline;
    /// `Lost` with the lease. It stays `Granted` while another process holds its id.
    Granted,
    /// The node has read its entry back under its lease; it is not a candidate for leadership yet.
    /// The next state is `Active` when it has read its candidacy, too; `Granted` when the entry is
    /// gone.
    Registered,
    /// The node is registered, and a candidate or the leader.
    Active,
    /// The deadline has passed without an answered renewal. The lease may still live, but the node
    /// claims nothing that depends on it. The next state is `Granted` when a renewal is answered,
    /// because the keys have to be read again; `Lost` when the lease turns out to be gone.
    Doubtful,
    /// The lease is gone, or was given up. The next state is `BackingOff`, or `Granted` if there is
    /// another lease already.
    Lost,
    /// The node is registered with an entry that says `draining`, and is not a candidate. Otherwise
    /// the same as `Registered`.
    Draining,
    /// The node is not running.
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

/// What a session reacts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// The run starts.
    Start,
    /// There is no lease, and none is in use.
    NoLease,
    /// There is a lease.
    Granted,
    /// The keys under the lease were read; `None` if the entry is not there.
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

/// How a node is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Registered {
    Candidate,
    NoCandidate,
    Draining,
}

impl SessionState {
    /// The state after this input. An input that has no meaning in a state changes nothing: its
    /// sender could not know the state yet.
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

    /// Whether the node's own entry is known to be in the store.
    pub fn is_registered(self) -> bool {
        matches!(self, Self::Registered | Self::Active | Self::Draining)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn one_run() {
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
        fn any_sequence_of_inputs(inputs in proptest::collection::vec(any_input(), 0..100)) {
            let mut state = SessionState::default();
            // What must have happened for the state to be what it is.
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

//! Which host names the entries of a group have, and to which addresses they lead. No I/O.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::sync::lock;

/// An answer is used for at least and at most this long, whatever it says itself.
const VALID: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// A name that could not be resolved is tried again after this long.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The names and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: Mutex<HashMap<String, Name>>,
    /// There is something to resolve.
    pub(super) wanted: Notify,
    /// Addresses have changed.
    pub(super) changed: Notify,
}

#[derive(Debug, Default)]
struct Name {
    answer: Answer,
    /// When to resolve it; `None` while that is under way.
    due: Option<Instant>,
    is_used: bool,
}

/// What is known of a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// In the order of the addresses; the one that was the first of them before stays the first one. Empty until it is
    /// known.
    pub(super) addresses: Vec<IpAddr>,
    /// Why the last attempt failed.
    pub(super) error: Option<String>,
}

impl Names {
    /// What is known of a name that an entry has. One that is new is resolved next.
    pub(super) fn get(&self, name: &str) -> Answer {
        let mut known = lock(&self.known);
        if let Some(known) = known.get_mut(name) {
            known.is_used = true;
            return known.answer.clone();
        }
        let new = Name {
            due: Some(Instant::now()),
            is_used: true,
            ..Name::default()
        };
        known.insert(name.to_owned(), new);
        self.wanted.notify_one();
        Answer::default()
    }

    /// Forgets the names that no entry has any more: those that `look` does not ask for.
    pub(super) fn keep_what_is_used(&self, look: impl FnOnce()) {
        for name in lock(&self.known).values_mut() {
            name.is_used = false;
        }
        look();
        lock(&self.known).retain(|_, name| name.is_used);
    }

    /// The names to resolve now, which the caller does, and when the next one is due.
    #[cfg(any(test, feature = "host-names"))]
    pub(super) fn take_due(&self, now: Instant) -> (Vec<String>, Option<Instant>) {
        let mut known = lock(&self.known);
        let mut all = Vec::new();
        for (name, known) in known.iter_mut() {
            if known.due.is_some_and(|due| due <= now) {
                known.due = None;
                all.push(name.clone());
            }
        }
        (all, known.values().filter_map(|known| known.due).min())
    }

    /// Takes over what a name leads to, and until when that is valid; or why it could not be resolved: then the last
    /// addresses stay.
    #[cfg(any(test, feature = "host-names"))]
    pub(super) fn set(
        &self,
        name: &str,
        resolved: Result<(Vec<IpAddr>, Instant), String>,
        now: Instant,
    ) {
        let mut known = lock(&self.known);
        let Some(known) = known.get_mut(name) else {
            return;
        };
        let before = known.answer.clone();
        match resolved {
            Ok((mut addresses, valid_until)) => {
                addresses.sort_unstable();
                addresses.dedup();
                let first = before.addresses.first();
                if let Some(at) = addresses.iter().position(|it| Some(it) == first) {
                    addresses[..=at].rotate_right(1);
                }
                known.answer = Answer {
                    addresses,
                    error: None,
                };
                let valid = valid_until.saturating_duration_since(now);
                known.due = Some(now + valid.clamp(VALID.0, VALID.1));
            }
            Err(error) => {
                if known.answer.error.is_none() {
                    tracing::warn!(name, error, "a host name cannot be resolved");
                }
                known.answer.error = Some(error);
                known.due = Some(now + AGAIN_AFTER);
            }
        }
        if known.answer != before {
            self.changed.notify_one();
        }
        self.wanted.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_addresses_until_it_has_others() {
        let names = Names::default();
        let start = Instant::now();
        let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
        let soon = start + Duration::from_secs(10);
        assert_eq!(names.get("a.test"), Answer::default());
        names.get("b.test");
        let later = start + Duration::from_secs(1);
        let (mut due, next) = names.take_due(later);
        due.sort();
        assert_eq!(
            (due, next),
            (vec!["a.test".to_owned(), "b.test".to_owned()], None)
        );

        names.set("a.test", Ok((vec![ip(3), ip(2), ip(3)], soon)), start);
        assert_eq!(names.get("a.test").addresses, [ip(2), ip(3)]);
        let (due, next) = names.take_due(later);
        assert_eq!((due.len(), next), (0, Some(soon)));
        // The first one stays the first one.
        names.set("a.test", Ok((vec![ip(1), ip(2)], soon)), start);
        assert_eq!(names.get("a.test").addresses, [ip(2), ip(1)]);
        names.set("a.test", Err("away".to_owned()), start);
        let answer = names.get("a.test");
        assert_eq!(
            (answer.addresses.len(), answer.error.as_deref()),
            (2, Some("away"))
        );
        // Neither at once nor never, whatever the answer says.
        for (valid, after) in [(0, 1), (1_000_000, 3_600)] {
            let until = start + Duration::from_secs(valid);
            names.set("a.test", Ok((vec![ip(1)], until)), start);
            let due = names.take_due(start).1;
            assert_eq!(due, Some(start + Duration::from_secs(after)));
        }
        names.keep_what_is_used(|| drop(names.get("a.test")));
        names.set("b.test", Ok((vec![ip(9)], soon)), start);
        assert_eq!(
            names.take_due(start + VALID.1).0,
            ["a.test"],
            "b.test is forgotten"
        );
    }
}

//! Which host names the entries of a group have, and to which addresses they lead. No I/O.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::warn;

use crate::sync::lock;

/// An answer is used for at least and at most this long, whatever it says itself.
const VALID: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// A name that could not be resolved is tried again after this long, and then after twice as long each time.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How often that is doubled.
const DOUBLINGS: u32 = 5;
/// More addresses of one name are not used.
const MOST_ADDRESSES: usize = 64;

/// The names and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Names {
    state: Mutex<State>,
    /// There is something to resolve.
    pub(super) wanted: Notify,
    /// Addresses have changed.
    pub(super) changed: Notify,
    /// An answer has come, or a failure.
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<String, Name>,
    /// Those whose answers have changed since this was last asked.
    changed: HashSet<String>,
}

#[derive(Debug, Default)]
struct Name {
    answer: Answer,
    /// When to resolve it; `None` while that is under way.
    due: Option<Instant>,
    /// Attempts that have failed since the last one that has not.
    failures: u32,
    is_known: bool,
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

/// What has come of an attempt.
#[derive(Debug, Clone)]
pub(super) struct Resolved {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) valid_until: Instant,
    /// Whether one of the two kinds of addresses could not be asked for: the last ones of it stay. `true` for IPv6.
    pub(super) failed: Option<bool>,
}

impl Names {
    /// What is known of a name that an entry has. One that is new is resolved next.
    pub(super) fn get(&self, name: &str) -> Answer {
        let mut state = lock(&self.state);
        if let Some(known) = state.known.get(name) {
            return known.answer.clone();
        }
        let new = Name {
            due: Some(Instant::now()),
            ..Name::default()
        };
        state.known.insert(name.to_owned(), new);
        self.wanted.notify_one();
        Answer::default()
    }

    /// The names whose answers have changed since this was last called.
    pub(super) fn take_changed(&self) -> HashSet<String> {
        std::mem::take(&mut lock(&self.state).changed)
    }

    /// Forgets all names but these.
    pub(super) fn keep(&self, used: &HashSet<&str>) {
        let mut state = lock(&self.state);
        state.known.retain(|name, _| used.contains(&**name));
    }

    /// Waits until there is an answer or a failure for each name.
    pub(super) async fn until_settled(&self) {
        loop {
            let settled = self.settled.notified();
            if lock(&self.state).known.values().all(|name| name.is_known) {
                return;
            }
            settled.await;
        }
    }

    /// What was being resolved has to be resolved again: whoever did it is gone.
    pub(super) fn restart(&self) {
        let now = Instant::now();
        for name in lock(&self.state).known.values_mut() {
            name.due.get_or_insert(now);
        }
        self.wanted.notify_one();
    }

    /// The names to resolve now, which the caller does, and when the next one is due.
    pub(super) fn take_due(&self, now: Instant) -> (Vec<String>, Option<Instant>) {
        let mut state = lock(&self.state);
        let mut all = Vec::new();
        for (name, known) in &mut state.known {
            if known.due.is_some_and(|due| due <= now) {
                known.due = None;
                all.push(name.clone());
            }
        }
        (
            all,
            state.known.values().filter_map(|known| known.due).min(),
        )
    }

    /// Takes over what a name leads to; or why it could not be resolved: then the last addresses stay.
    pub(super) fn set(&self, name: &str, resolved: Result<Resolved, String>, now: Instant) {
        let mut state = lock(&self.state);
        let Some(known) = state.known.get_mut(name) else {
            return;
        };
        let before = known.answer.clone();
        known.is_known = true;
        match resolved {
            Ok(resolved) => {
                known.answer = before.followed_by(&resolved);
                known.failures = 0;
                let valid = resolved.valid_until.saturating_duration_since(now);
                known.due = Some(now + valid.clamp(VALID.0, VALID.1));
            }
            Err(error) => {
                if known.answer.error.is_none() {
                    warn!(name, error, "a host name cannot be resolved");
                }
                known.answer.error = Some(error);
                let factor = 1 << known.failures.min(DOUBLINGS);
                known.failures += 1;
                known.due = Some(now + AGAIN_AFTER * factor);
            }
        }
        if known.answer != before {
            state.changed.insert(name.to_owned());
            self.changed.notify_one();
        }
        self.settled.notify_waiters();
        self.wanted.notify_one();
    }
}

impl Answer {
    fn followed_by(&self, resolved: &Resolved) -> Self {
        let mut addresses = resolved.addresses.clone();
        if let Some(failed) = resolved.failed {
            let kept = self.addresses.iter().filter(|ip| ip.is_ipv6() == failed);
            addresses.extend(kept);
        }
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MOST_ADDRESSES);
        let first = self.addresses.first();
        if let Some(at) = addresses.iter().position(|ip| Some(ip) == first) {
            addresses[..=at].rotate_right(1);
        }
        Self {
            addresses,
            error: None,
        }
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
        let ok = |addresses: &[IpAddr], valid_until| {
            Ok(Resolved {
                addresses: addresses.to_vec(),
                valid_until,
                failed: None,
            })
        };
        assert_eq!(names.get("a.test"), Answer::default());
        names.get("b.test");
        let later = start + Duration::from_secs(1);
        let (mut due, next) = names.take_due(later);
        due.sort();
        assert_eq!(
            (due, next),
            (vec!["a.test".to_owned(), "b.test".to_owned()], None)
        );

        names.set("a.test", ok(&[ip(3), ip(2), ip(3)], soon), start);
        assert_eq!(names.take_changed().len(), 1);
        assert_eq!(names.get("a.test").addresses, [ip(2), ip(3)]);
        let (due, next) = names.take_due(later);
        assert_eq!((due.len(), next), (0, Some(soon)));
        // The first one stays the first one.
        names.set("a.test", ok(&[ip(1), ip(2)], soon), start);
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
            names.set("a.test", ok(&[ip(1)], until), start);
            let due = names.take_due(start).1;
            assert_eq!(due, Some(start + Duration::from_secs(after)));
        }
        // A name that fails again and again is asked for less and less.
        let mut pauses = Vec::new();
        for _ in 0..8 {
            names.set("a.test", Err("away".to_owned()), start);
            let due = names.take_due(start).1.unwrap();
            pauses.push((due - start).as_secs());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 160, 160]);
        names.keep(&HashSet::from(["a.test"]));
        names.set("b.test", ok(&[ip(9)], soon), start);
        assert_eq!(
            names.take_due(start + VALID.1).0,
            ["a.test"],
            "b.test is forgotten"
        );
        assert_eq!(names.take_due(start + VALID.1), (Vec::new(), None));
        names.restart();
        let due = names.take_due(Instant::now()).0;
        assert_eq!(due, ["a.test"], "whoever resolved it is gone");
    }

    #[test]
    fn a_kind_of_addresses_that_cannot_be_asked_for_stays() {
        let names = Names::default();
        let now = Instant::now();
        names.get("a.test");
        let ipv6: IpAddr = "fd00::1".parse().unwrap();
        let ipv4: IpAddr = "10.0.0.1".parse().unwrap();
        let set = |addresses: &[IpAddr], failed| {
            let resolved = Resolved {
                addresses: addresses.to_vec(),
                valid_until: now,
                failed,
            };
            names.set("a.test", Ok(resolved), now);
            names.get("a.test").addresses
        };
        assert_eq!(set(&[ipv4, ipv6], None), [ipv4, ipv6]);
        assert_eq!(set(&[ipv6], Some(false)), [ipv4, ipv6]);
        assert_eq!(set(&[ipv4], Some(true)), [ipv4, ipv6]);
        assert_eq!(set(&[ipv4], None), [ipv4]);
        let many: Vec<_> = (0..200)
            .map(|last| IpAddr::from([10, 0, 1, last]))
            .collect();
        assert_eq!(set(&many, None).len(), MOST_ADDRESSES);
    }
}

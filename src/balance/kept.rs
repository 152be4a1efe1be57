//! What is kept for a while. Pure.

use std::borrow::Borrow;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3DefaultBuilder;

/// How many values are kept at most.
pub(super) const MAX_KEPT: usize = 10_000;

/// Values by keys, each of which is kept for the same time, and the oldest of which go when there are too many.
#[derive(Debug)]
pub(super) struct Kept<K, V> {
    by_key: HashMap<K, (Instant, V), Xxh3DefaultBuilder>,
    /// In the order in which they came. Some may have been taken or replaced since.
    order: VecDeque<(Instant, K)>,
    kept_for: Duration,
}

impl<K: Clone + Eq + Hash, V> Kept<K, V> {
    pub(super) fn new(kept_for: Duration) -> Self {
        Self {
            by_key: HashMap::default(),
            order: VecDeque::new(),
            kept_for,
        }
    }

    pub(super) fn insert(&mut self, key: K, value: V, now: Instant) {
        self.remove_expired(now);
        if self.order.len() >= MAX_KEPT {
            self.remove_oldest();
        }
        self.order.push_back((now, key.clone()));
        self.by_key.insert(key, (now, value));
    }

    pub(super) fn get<Q>(&mut self, key: &Q, now: Instant) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.remove_expired(now);
        self.by_key.get(key).map(|(_, value)| value)
    }

    pub(super) fn take(&mut self, key: &K, now: Instant) -> Option<V> {
        self.remove_expired(now);
        self.by_key.remove(key).map(|(_, value)| value)
    }

    pub(super) fn remove_expired(&mut self, now: Instant) {
        while let Some((since, _)) = self.order.front() {
            if now.saturating_duration_since(*since) < self.kept_for {
                return;
            }
            self.remove_oldest();
        }
    }

    fn remove_oldest(&mut self) {
        // It may have been taken since, and there may be another value.
        if let Some((since, key)) = self.order.pop_front()
            && self.by_key.get(&key).is_some_and(|(at, _)| *at == since)
        {
            self.by_key.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT_FOR: Duration = Duration::from_secs(60);

    #[test]
    fn values_go_after_their_time_and_not_that_of_former_ones() {
        let (mut kept, start) = (Kept::new(KEPT_FOR), Instant::now());
        let half = KEPT_FOR / 2;
        kept.insert(1, "a", start);
        assert_eq!(kept.take(&1, start), Some("a"));
        assert_eq!(kept.take(&1, start), None);
        kept.insert(1, "b", start + half);
        assert_eq!(kept.get(&1, start + KEPT_FOR), Some(&"b"));
        kept.insert(1, "c", start + KEPT_FOR);
        assert_eq!(kept.get(&1, start + KEPT_FOR + half), Some(&"c"));
        assert_eq!(kept.get(&1, start + KEPT_FOR * 2), None);
        assert!(kept.by_key.is_empty() && kept.order.is_empty());
    }

    #[test]
    fn their_number_is_limited() {
        let (mut kept, start) = (Kept::new(KEPT_FOR), Instant::now());
        for key in 0..=MAX_KEPT {
            kept.insert(key, (), start);
        }
        assert_eq!((kept.by_key.len(), kept.order.len()), (MAX_KEPT, MAX_KEPT));
        assert_eq!(kept.get(&0, start), None, "the oldest one went");
        assert_eq!(kept.get(&1, start), Some(&()));
    }
}

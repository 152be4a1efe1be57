//! A value whose changes tasks can wait for.
//!
//! It differs from `tokio::sync::watch` in one thing: waiting tasks are woken in the order in which
//! they began to wait, not in random order, so that a simulation runs the same way each time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::sync::lock;

/// A value with a version that grows with each change.
#[derive(Debug, Default)]
pub(crate) struct Signal<T = ()> {
    value: Mutex<T>,
    version: AtomicU64,
    notify: Notify,
}

impl<T> Signal<T> {
    fn value(&self) -> MutexGuard<'_, T> {
        lock(&self.value)
    }

    /// Changes the value, and wakes every waiting task.
    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.value());
        self.version.fetch_add(1, Ordering::AcqRel);
        self.notify.notify_waiters();
    }

    /// A listener that counts the current value as seen.
    pub(crate) fn listen(&self) -> Listener<'_, T> {
        Listener {
            signal: self,
            seen: self.version.load(Ordering::Acquire),
        }
    }

    /// Reads the value.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value())
    }
}

/// Waits for changes of a [`Signal`], and remembers the last version it has seen.
#[derive(Debug)]
pub(crate) struct Listener<'a, T = ()> {
    signal: &'a Signal<T>,
    seen: u64,
}

impl<T> Listener<'_, T> {
    /// Waits for a change since the last one seen. Dropping the future loses nothing.
    pub(crate) async fn changed(&mut self) {
        loop {
            let notified = self.signal.notify.notified();
            tokio::pin!(notified);
            // Registered before the version is read, so that no change in between is missed.
            notified.as_mut().enable();
            let version = self.signal.version.load(Ordering::Acquire);
            if version != self.seen {
                self.seen = version;
                return;
            }
            notified.await;
        }
    }

    /// Counts the current value as seen.
    pub(crate) fn catch_up(&mut self) {
        self.seen = self.signal.version.load(Ordering::Acquire);
    }

    /// Waits until the value satisfies the predicate.
    pub(crate) async fn wait_for(&mut self, mut predicate: impl FnMut(&T) -> bool) {
        loop {
            self.catch_up();
            if self.signal.with(&mut predicate) {
                return;
            }
            self.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn waiters_wake_in_their_order_and_miss_nothing() {
        let signal = Arc::new(Signal::<u32>::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..20)
            .map(|index| {
                let (signal, order) = (signal.clone(), order.clone());
                tokio::spawn(async move {
                    signal.listen().wait_for(|value| *value == 1).await;
                    order.lock().unwrap().push(index);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        signal.update(|value| *value = 1);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), Vec::from_iter(0..20));
        let mut listener = signal.listen();
        signal.update(|value| *value = 2);
        listener.changed().await;
        assert_eq!(signal.with(|value| *value), 2);
    }
}

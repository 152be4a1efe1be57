//! A value that tasks wait on to change.
//!
//! As `tokio::sync::watch`, but for one thing: that one wakes its receivers in random order, this
//! one in the order in which they began to wait. So a simulation is the same each time it is run.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::lock;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

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

    /// Changes the value, and wakes everybody who waits.
    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.value());
        self.version.fetch_add(1, Ordering::AcqRel);
        self.notify.notify_waiters();
    }

    /// A listener that has seen what there is now.
    pub(crate) fn listen(&self) -> Listener<'_, T> {
        Listener {
            signal: self,
            seen: self.version.load(Ordering::Acquire),
        }
    }

    pub(crate) fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value())
    }
}

/// Remembers what it has seen of a [`Signal`].
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
            // In line before looking: what comes in between is not missed.
            notified.as_mut().enable();
            let version = self.signal.version.load(Ordering::Acquire);
            if version != self.seen {
                self.seen = version;
                return;
            }
            notified.await;
        }
    }

    /// What is there now counts as seen.
    pub(crate) fn catch_up(&mut self) {
        self.seen = self.signal.version.load(Ordering::Acquire);
    }

    /// Waits until the value is like that.
    pub(crate) async fn wait_for(&mut self, mut is_so: impl FnMut(&T) -> bool) {
        loop {
            self.catch_up();
            if self.signal.with(&mut is_so) {
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

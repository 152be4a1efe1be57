//! Locks that a panic elsewhere does not make useless.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks the mutex, also after a thread has panicked while holding it. The data behind such a lock
/// in this crate is valid between any two statements, so there is nothing to refuse.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! A store inside this process: for `memory://` endpoints, unit tests and the simulation.
//!
//! Nothing runs in the background. Leases are expired by every call, and by every watcher, which
//! sleeps until the next lease is due. So the store works in any runtime, in several at once, and
//! under a paused clock.

#[cfg(any(test, feature = "test-util"))]
mod faults;
mod handle;
mod keeper;
mod server;
mod state;
#[cfg(test)]
mod tests;
mod watch;

#[cfg(any(test, feature = "test-util"))]
pub use faults::Backup;
pub use handle::MemoryStore;
pub use state::Fault;

//! How a process ends: what it waits for, and which signals tell it to.

mod handover;
mod listeners;
mod process;
mod run;
mod service_manager;
mod signals;

pub(super) use handover::{Successor, take_over};
pub(super) use listeners::check_address;
pub use process::{Hold, Shutdown};
pub use run::run;

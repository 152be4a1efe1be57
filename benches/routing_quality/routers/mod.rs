//! Everything that is compared: this crate's balancer, what else is in use, and an oracle.

mod kinds;
mod known;
mod least;
mod of_two;
mod oracle;
mod ours;
mod prequal;
mod random;
mod turns;

pub use kinds::RouterKind;
pub use ours::ADAPTIVE;

//! Numbers that the store assigns: revisions and lease ids.

use std::fmt;

/// A point in the history of the whole store. Grows by one with each transaction that changes
/// something.
pub type Revision = i64;

/// Identifies a lease. Displayed as lower-case hexadecimal, as in election keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

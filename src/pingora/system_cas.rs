//! What Pingora makes with the CAs of the system.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::ClusterError;

/// Makes something that connects to backends. Pingora panics if it cannot use a certificate of the system, which it
/// reads in any case. The error names `field`.
pub(crate) fn with_system_cas<T>(field: &str, make: impl FnOnce() -> T) -> Result<T, ClusterError> {
    catch_unwind(AssertUnwindSafe(make)).map_err(|_| {
        let reason = "the CAs of the system (or SSL_CERT_FILE, SSL_CERT_DIR) cannot be used";
        ClusterError::config(field, reason)
    })
}

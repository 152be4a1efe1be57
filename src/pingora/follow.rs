//! Keeping a discovery running, and waiting for its first view.

use std::time::Duration;

use tracing::{Span, error, error_span};

pub(super) use crate::config::READY_TIMEOUT;
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::supervise::say;

/// How often to check whether a discovery that another service runs is still running.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The span of everything that a service does for this group.
/// None if the subscriber panics: it must not end a service.
pub(super) fn balancer_span(discovery: &ServiceDiscovery) -> Span {
    // At the level of errors: a filter for warnings would switch a lower one off, with its fields.
    let mut span = Span::none();
    say(|| span = error_span!("balancer", group = %discovery.group_name()));
    span
}

/// Waits for the first complete view, for at most `timeout`. Returns whether there is one.
pub(super) async fn wait_ready(discovery: &ServiceDiscovery, timeout: Duration) -> bool {
    let ready = tokio::time::timeout(timeout, discovery.wait_ready()).await;
    if ready.is_err() {
        error!(
            waited = ?timeout,
            "there is no view of the group yet; continuing without one, backends are added when etcd answers"
        );
    }
    ready.is_ok()
}

/// Runs a discovery until it is dropped. Of several services over one discovery one runs it; the
/// others take over if that one ends. Returns why the discovery cannot be run.
pub(super) async fn follow(discovery: &ServiceDiscovery) -> ClusterError {
    loop {
        match discovery.run_until(std::future::pending()).await {
            Ok(()) | Err(ClusterError::AlreadyRunning { .. }) => {
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
            Err(error) => return error,
        }
    }
}

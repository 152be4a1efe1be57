//! What operators say of the nodes of a group, and whether that is known yet.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::discovery::{DiscoveryStatus, Overrides, ServiceDiscovery};

/// How long is waited for it, after there is a view.
const MOST_WAIT: Duration = Duration::from_secs(1);

/// Follows what operators say.
#[derive(Debug, Default)]
pub(super) struct Operators {
    /// Whether what etcd has is known, and not only what a file has kept.
    are_heard: watch::Sender<bool>,
}

impl Operators {
    pub(super) async fn follow(
        &self,
        discovery: &ServiceDiscovery,
        take: impl Fn(&Overrides),
    ) -> Infallible {
        let take = |overrides: &Overrides, is_current: bool| {
            take(overrides);
            if is_current {
                self.are_heard.send_replace(true);
            }
        };
        discovery.follow_overrides(take).await
    }

    /// Waits for what comes with the view or never: whoever is drained is to get nothing from the first request on.
    pub(super) async fn hear(&self, discovery: &ServiceDiscovery) {
        if discovery.is_ours() && discovery.status() == DiscoveryStatus::Live {
            let mut are_heard = self.are_heard.subscribe();
            let _ = timeout(MOST_WAIT, are_heard.wait_for(|are_heard| *are_heard)).await;
        }
    }

    pub(super) async fn until_heard(&self) {
        // It cannot fail: the sender is here.
        let _ = self
            .are_heard
            .subscribe()
            .wait_for(|are_heard| *are_heard)
            .await;
    }
}

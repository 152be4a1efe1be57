//! What the etcd user turned out not to be allowed, of what a node can do without.
//!
//! Each of it is told once, in clear words, and looked for again: a right that is granted later
//! takes effect without a restart.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::Shared;
use crate::error::ClusterError;
use crate::store::{Selector, Store};

/// How soon it is looked again whether requests may be read by now, lengthened by up to a tenth at
/// random. Other rights are tried when they are needed.
const AGAIN_AFTER: Duration = Duration::from_secs(15);

/// A right that a node can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    /// To read `handover/{group}/`.
    ReadRequests,
    /// To write there.
    WriteRequests,
    /// To read `registry/{group}/`.
    ReadNodes,
}

impl Right {
    /// What does not work without it.
    fn without(self) -> &'static str {
        match self {
            Self::ReadRequests | Self::WriteRequests => {
                "no transfers past others and no take-over by priority here"
            }
            Self::ReadNodes => "no take-over by priority here, and transfers are refused",
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Access {
    missing: [bool; 3],
    again: Option<Instant>,
}

impl Shared {
    fn name(&self, right: Right) -> String {
        match right {
            Right::ReadRequests => format!("read {}", self.keys.handover_prefix()),
            Right::WriteRequests => format!("write {}", self.keys.handover_prefix()),
            Right::ReadNodes => format!("read {}", self.keys.registry_prefix()),
        }
    }

    /// Takes note that the user may not do this, and tells it if that is news.
    pub(super) fn lacks(&self, right: Right, error: &ClusterError) {
        let was_missing = {
            let mut access = self.access();
            if right == Right::ReadRequests {
                let jitter = AGAIN_AFTER.mul_f64(0.1 * fastrand::f64());
                access.again = Some(Instant::now() + AGAIN_AFTER + jitter);
            }
            std::mem::replace(&mut access.missing[right as usize], true)
        };
        if !was_missing {
            let (group, node) = (&self.config.group, &self.config.id);
            let missing = self.name(right);
            warn!(%group, %node, missing, %error, "a right is missing: {}", right.without());
        }
    }

    /// Takes note that the user may do this.
    pub(super) fn has(&self, right: Right) {
        let was_missing = std::mem::replace(&mut self.access().missing[right as usize], false);
        if was_missing {
            let (group, node) = (&self.config.group, &self.config.id);
            info!(%group, %node, granted = self.name(right), "a right that was missing has been granted");
        }
    }

    pub(super) fn is_missing(&self, right: Right) -> bool {
        self.access().missing[right as usize]
    }

    /// Waits until requests may be read, if they may not. What is watched meanwhile stays watched.
    pub(super) async fn until_requests_are_readable(&self, store: &dyn Store) {
        if !self.is_missing(Right::ReadRequests) {
            return std::future::pending().await;
        }
        let requests = Selector::Prefix(self.keys.handover_prefix().to_owned());
        loop {
            let again = self.access().again;
            sleep_until(again.unwrap_or_else(Instant::now)).await;
            match store.list(&requests, None).await {
                Ok(_) => return self.has(Right::ReadRequests),
                // Whatever the reason, it is looked again later.
                Err(error) => self.lacks(Right::ReadRequests, &error),
            }
        }
    }
}

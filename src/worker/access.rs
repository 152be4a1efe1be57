//! Optional rights of the etcd user: which of them turned out to be missing.
//!
//! A missing right is logged once, and tried again later: a right that is granted while the node
//! runs takes effect without a restart.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::store::{Selector, Store};
use crate::sync::lock;

/// How long after a refusal reading requests is tried again, lengthened by up to a tenth at random.
/// The other rights are tried when they are needed.
const RETRY_AFTER: Duration = Duration::from_secs(15);

/// A right that a node can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    /// To read `handover/{group}/`.
    ReadRequests,
    /// To write under `handover/{group}/`.
    WriteRequests,
    /// To read `registry/{group}/`.
    ReadNodes,
}

impl Right {
    /// What does not work without it.
    fn consequence(self) -> &'static str {
        match self {
            Self::ReadRequests | Self::WriteRequests => {
                "no transfers past others and no take-over by priority here"
            }
            Self::ReadNodes => "no take-over by priority here, and transfers are refused",
        }
    }
}

/// The optional rights of one node's etcd user.
#[derive(Debug)]
pub(super) struct Access {
    keys: GroupKeys,
    missing: Mutex<Missing>,
}

#[derive(Debug, Default)]
struct Missing {
    rights: [bool; 3],
    /// When to try again to read requests.
    retry_at: Option<Instant>,
}

impl Access {
    /// Every right counts as granted until it is refused.
    pub(super) fn new(keys: GroupKeys) -> Self {
        Self {
            keys,
            missing: Mutex::default(),
        }
    }

    /// The right in the words of etcd's own commands.
    fn name(&self, right: Right) -> String {
        match right {
            Right::ReadRequests => format!("read {}", self.keys.handover_prefix()),
            Right::WriteRequests => format!("write {}", self.keys.handover_prefix()),
            Right::ReadNodes => format!("read {}", self.keys.registry_prefix()),
        }
    }

    /// Records that the store refused something for lack of this right, and logs it the first time.
    pub(super) fn set_missing(&self, right: Right, error: &ClusterError) {
        let was_missing = {
            let mut missing = lock(&self.missing);
            if right == Right::ReadRequests {
                let jitter = RETRY_AFTER.mul_f64(0.1 * fastrand::f64());
                missing.retry_at = Some(Instant::now() + RETRY_AFTER + jitter);
            }
            std::mem::replace(&mut missing.rights[right as usize], true)
        };
        if !was_missing {
            let missing = self.name(right);
            warn!(missing, %error, "a right is missing: {}", right.consequence());
        }
    }

    /// Records that something succeeded that needs this right.
    pub(super) fn set_granted(&self, right: Right) {
        let was_missing = std::mem::replace(&mut lock(&self.missing).rights[right as usize], false);
        if was_missing {
            let granted = self.name(right);
            info!(granted, "a right that was missing has been granted");
        }
    }

    pub(super) fn is_missing(&self, right: Right) -> bool {
        lock(&self.missing).rights[right as usize]
    }

    /// Waits until requests can be read again; indefinitely if that right is not missing. It reads
    /// beside the open watch, so that nothing is missed meanwhile.
    pub(super) async fn until_requests_are_readable(&self, store: &dyn Store) {
        if !self.is_missing(Right::ReadRequests) {
            return std::future::pending().await;
        }
        let requests = Selector::Prefix(self.keys.handover_prefix().to_owned());
        loop {
            let retry_at = lock(&self.missing).retry_at;
            sleep_until(retry_at.unwrap_or_else(Instant::now)).await;
            match store.list(&requests, None).await {
                Ok(_) => return self.set_granted(Right::ReadRequests),
                // Any other failure is a reason to try again later, too.
                Err(error) => self.set_missing(Right::ReadRequests, &error),
            }
        }
    }
}

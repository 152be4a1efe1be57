//! A group as a page shows it.

use std::sync::Arc;

use crate::opaque::opaque_debug;
use crate::pingora::BalancerService;
use crate::proxy::{FrontStatistics, ProxyParts, RequestStatistics, ServedGroup};

/// A group to show: its balancer, and what a proxy counts of its requests, if there is one.
#[derive(Clone)]
pub struct Group {
    pub(super) name: String,
    pub(super) balancer: Arc<BalancerService>,
    pub(super) requests: Option<Arc<RequestStatistics>>,
    pub(super) clients: Option<Arc<FrontStatistics>>,
}

impl Group {
    /// The group that this balancer follows.
    pub fn new(balancer: Arc<BalancerService>) -> Self {
        Self {
            name: balancer.discovery().group_name().to_owned(),
            balancer,
            requests: None,
            clients: None,
        }
    }

    /// Shows these counts, too.
    #[must_use]
    pub fn requests(mut self, requests: Arc<RequestStatistics>) -> Self {
        self.requests = Some(requests);
        self
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl From<&ProxyParts> for Group {
    fn from(parts: &ProxyParts) -> Self {
        Self {
            requests: Some(parts.requests.clone()),
            clients: Some(parts.clients.clone()),
            ..Self::new(parts.balancer.clone())
        }
    }
}

impl From<ServedGroup> for Group {
    fn from(served: ServedGroup) -> Self {
        Self {
            name: served.name,
            requests: Some(served.requests),
            ..Self::new(served.balancer)
        }
    }
}

opaque_debug!(Group);

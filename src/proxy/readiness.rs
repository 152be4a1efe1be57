//! The request that asks whether this process is to get requests.

use ::pingora::proxy::Session;

use super::reply::{Reply, readiness};
use super::shutdown::Shutdown;

/// Answers requests for one path, if one is set.
#[derive(Debug)]
pub(super) struct Readiness(Option<String>);

impl Readiness {
    pub(super) fn new(path: Option<String>) -> Self {
        Self(path)
    }

    /// The answer, if that is what the request asks.
    pub(super) fn reply(
        &self,
        session: &Session,
        is_served: impl FnOnce() -> bool,
    ) -> Option<Reply<'static>> {
        let path = self.0.as_deref()?;
        let is_asked = session.req_header().uri.path() == path;
        is_asked.then(|| readiness(is_served() && !Shutdown::of_process().is_draining()))
    }
}

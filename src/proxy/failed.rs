//! What the log says of requests that were not served.

use std::time::Instant;

use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource, ErrorType};
use tracing::{debug, error};

use super::cluster_proxy::ClusterProxy;
use super::context::RequestContext;
use super::reply::is_slow_upload;

impl ClusterProxy {
    /// What clients do wrong, and what the proxy refuses by itself, are no errors of this process. Of the others a line
    /// for each would say the same again and again, thousands of times a second, while all backends are away.
    pub(super) fn tell_failure(&self, session: &Session, context: &RequestContext, error: &Error) {
        let is_refused = matches!(error.etype(), ErrorType::HTTPStatus(_));
        let is_of_client = error.esource() == &ErrorSource::Downstream;
        if is_refused || is_of_client || is_slow_upload(&context.state, error) {
            debug!(%error, "a request was not served");
            return;
        }
        // What went wrong here is not hidden by what a group cannot do.
        let of_backend = error.esource() == &ErrorSource::Upstream;
        let group = context.group.as_ref().filter(|_| of_backend);
        let limit = group.map_or(&self.failures, |group| &group.failures);
        match limit.take(Instant::now()) {
            Some(left_out) => {
                let request = session.as_ref().request_summary();
                let (group, tries) = (context.group_name(), context.state.tries);
                error!(%error, group, request, tries, left_out, "a request was not served");
            }
            None => debug!(%error, "a request was not served"),
        }
    }
}

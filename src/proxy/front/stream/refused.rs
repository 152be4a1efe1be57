//! Requests on this connection that the proxy never sees.

use std::time::Duration;

use super::ClientStream;
use crate::proxy::front::connection::Phase;
use crate::proxy::front::refused::RefusedRequest;

impl ClientStream {
    /// Counts what Pingora answers before the proxy sees a request: an error of the client.
    pub(super) fn look_at(&mut self, written: &[u8]) {
        // One that came with the request before it is found without a read.
        let is_between = matches!(self.phase(), Phase::Accepted | Phase::Head | Phase::Idle);
        if self.is_http2 || !is_between {
            return;
        }
        if let Some(status) = status_of(written).filter(|status| (400..500).contains(status)) {
            self.refusals.statistics.count_bad_request();
            self.tell_refused(status);
        }
    }

    /// The proxy never sees this request.
    pub(super) fn tell_refused(&self, status: u16) {
        let Some(tell) = &self.refusals.tell else {
            return;
        };
        let peer = self.socket.as_deref().and_then(|socket| socket.peer_addr());
        tell(RefusedRequest {
            client: peer.and_then(|peer| Some(peer.as_inet()?.ip().to_canonical())),
            is_over_tls: self.inner.get_ssl_digest().is_some(),
            status,
            lasted: self.since.map_or(Duration::ZERO, |since| since.elapsed()),
        });
    }
}

/// The status of a response of HTTP/1 that begins with these bytes.
fn status_of(written: &[u8]) -> Option<u16> {
    let digits = written.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

//! Connections to backends over plain HTTP/1, and what is kept of them between requests.
//!
//! Pingora's own pool starts a task for each idle connection, which has to be stopped before the connection is used
//! again, and asks the system whether the connection still leads to its backend: about a twentieth of what a short
//! request costs. Here a connection lies in a list. What Pingora decides stays as it is, above all whether a connection
//! may be used again; see [`Exchange`].

mod connect;
mod exchange;
mod pool;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use ::pingora::http::RequestHeader;
use ::pingora::server::configuration::ServerConf;
use ::pingora::upstreams::peer::{HttpPeer, Peer};

use exchange::{Body, Sent, Times};
pub(super) use exchange::{Exchange, Waits};
use http::header::CONTENT_LENGTH;
use pool::Pool;

use super::peers::Silence;

/// The connections of a proxy.
pub(super) struct Connections(Arc<Pool>);

impl Connections {
    /// As many are kept as the server's configuration says. `None` if it says how connections are made, which is left to
    /// Pingora then.
    pub(super) fn new(server: &ServerConf) -> Option<Self> {
        let is_bound =
            !server.client_bind_to_ipv4.is_empty() || !server.client_bind_to_ipv6.is_empty();
        if is_bound || server.upstream_connect_offload_threadpools.is_some() {
            return None;
        }
        let threads = server.threads.max(1);
        let most = server.upstream_keepalive_pool_size.saturating_mul(threads);
        let has_one_timer = server.work_stealing || threads == 1;
        Some(Self(Arc::new(Pool::new(most, has_one_timer))))
    }

    /// Lets a request use these connections, if its peer speaks HTTP/1 without TLS. `has_body` means that a body follows
    /// its head.
    pub(super) fn carry(
        &self,
        peer: &mut HttpPeer,
        (has_body, request): (bool, &RequestHeader),
        waits: Waits,
    ) -> Option<Arc<Exchange>> {
        let is_plain = !peer.tls() && peer.options.alpn.get_max_http_version() == 1;
        let idle = peer.options.idle_timeout.filter(|_| is_plain)?;
        let silence = peer.options.read_timeout.take()?;
        // Pingora would move what it begins, and set a timer for each of these.
        let times = Times {
            connect: peer.options.total_connection_timeout.take(),
            silence: waits.silence.unwrap_or(Silence::of(silence)),
            waits,
            idle,
        };
        // Pingora keeps none of them.
        peer.options.idle_timeout = Some(Duration::ZERO);
        let sent = Sent {
            body: match request.headers.contains_key(CONTENT_LENGTH) {
                _ if !has_body => Body::None,
                true => Body::Sized,
                false => Body::Chunked,
            },
            is_idempotent: request.method.is_idempotent(),
        };
        let exchange = Exchange::new(self.0.clone(), peer.group_key, times, sent);
        peer.options.custom_l4 = Some(exchange.clone());
        Some(exchange)
    }
}

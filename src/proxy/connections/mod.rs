//! Connections to backends over HTTP/1, with TLS or without, and what is kept of them between requests.
//!
//! Pingora's own pool starts a task for each idle connection, which has to be stopped before the connection is used
//! again, and asks the system whether the connection still leads to its backend: about a twentieth of what a short
//! request costs. Here a connection lies in a list. What Pingora decides stays as it is, above all whether a connection
//! may be used again; see [`Exchange`].

mod connect;
mod exchange;
#[cfg(not(feature = "proxy-tls"))]
mod no_tls;
mod pool;
#[cfg(feature = "proxy-tls")]
mod secure;
mod socket;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use ::pingora::http::RequestHeader;
use ::pingora::server::configuration::ServerConf;
use ::pingora::upstreams::peer::{HttpPeer, Peer, Scheme};

use exchange::{Body, Sent, Spoken, Times};
pub(super) use exchange::{Exchange, Silence, Waits};
use http::header::CONTENT_LENGTH;
#[cfg(not(feature = "proxy-tls"))]
pub(super) use no_tls::Secure;
use pool::Pool;
#[cfg(feature = "proxy-tls")]
pub(super) use secure::Secure;

/// The connections of a proxy.
pub(super) struct Connections(Arc<Pool>);

impl Connections {
    /// As many are kept as the server's configuration says. `None` if it says how connections are made, which is left to
    /// Pingora then.
    pub(super) fn new(server: &ServerConf) -> Option<Self> {
        let is_bound =
            !server.client_bind_to_ipv4.is_empty() || !server.client_bind_to_ipv6.is_empty();
        if is_bound || server.upstream_connect_offload_threadpool().is_some() {
            return None;
        }
        let threads = server.threads.max(1);
        let most = server.upstream_keepalive_pool_size.saturating_mul(threads);
        let has_one_timer = server.work_stealing || threads == 1;
        Some(Self(Arc::new(Pool::new(most, has_one_timer))))
    }

    /// Lets a request use these connections, if its peer speaks HTTP/1, either without TLS or with what is `secure`. `has_body`
    /// means that a body follows its head.
    pub(super) fn carry(
        &self,
        peer: &mut HttpPeer,
        (has_body, request): (bool, &RequestHeader),
        waits: Waits,
        secure: Option<Secure>,
    ) -> Option<Arc<Exchange>> {
        let is_http_1 = peer.options.alpn.get_max_http_version() == 1;
        let is_ours = is_http_1 && peer.tls() == secure.is_some();
        let idle = peer.options.idle_timeout.filter(|_| is_ours)?;
        let silence = peer.options.read_timeout.take()?;
        // Pingora would move what it begins, and set a timer for each of these.
        let open = peer.options.total_connection_timeout.take();
        let connect = match &secure {
            Some(secure) => open.map(|open| open.min(secure.connect)),
            None => open,
        };
        let times = Times {
            connect,
            open,
            silence: waits.silence.unwrap_or(Silence::of(silence)),
            waits,
            idle,
        };
        // Pingora keeps none of them.
        peer.options.idle_timeout = Some(Duration::ZERO);
        let mut group_key = peer.group_key;
        if let Some(secure) = &secure {
            group_key ^= secure.mark();
            // It is in these connections already.
            peer.scheme = Scheme::HTTP;
        }
        let sent = Sent {
            body: match request.headers.contains_key(CONTENT_LENGTH) {
                _ if !has_body => Body::None,
                true => Body::Sized,
                false => Body::Chunked,
            },
            is_idempotent: request.method.is_idempotent(),
        };
        let spoken = Spoken { group_key, secure };
        let exchange = Exchange::new(self.0.clone(), spoken, times, sent);
        peer.options.custom_l4 = Some(exchange.clone());
        Some(exchange)
    }
}

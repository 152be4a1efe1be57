//! What Pingora asks a stream about its connection.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::protocols::raw_connect::ProxyDigest;
use ::pingora::protocols::tls::{SslDigest, TlsRef};
use ::pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, SocketDigest, Ssl, TimingDigest,
    UniqueID, UniqueIDType,
};

use tokio::time::Instant;

use super::super::connection::Connection;
use super::ClientStream;

impl ClientStream {
    pub(in crate::proxy::front) fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    /// The time of the first head begins then.
    pub(in crate::proxy::front) fn accepted_at(mut self, start: Instant) -> Self {
        self.since = Some(start);
        self
    }

    /// How long a connection may have no request.
    pub(in crate::proxy::front) fn client_idle(&self) -> Duration {
        self.limits.timeouts.client_idle
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for ClientStream {
    fn get_ssl(&self) -> Option<&TlsRef> {
        self.inner.get_ssl()
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl GetTimingDigest for ClientStream {
    /// Nobody asks for it, and it would be made anew for each request.
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.digest.clone()
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.socket.clone()
    }
}

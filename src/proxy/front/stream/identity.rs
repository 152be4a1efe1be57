//! What Pingora asks a stream about its connection.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::protocols::raw_connect::ProxyDigest;
use ::pingora::protocols::tls::{SslDigest, TlsRef};
use ::pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, SocketDigest, Ssl, TimingDigest,
    UniqueID, UniqueIDType,
};

use super::super::connection::Connection;
use super::ClientStream;

impl ClientStream {
    pub(in crate::proxy::front) fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    /// How long a connection of HTTP/2 may have no request, and how long its end may take.
    pub(in crate::proxy::front) fn idle_and_drain(&self) -> (Duration, Duration) {
        let timeouts = &self.limits.timeouts;
        (timeouts.client_idle, timeouts.client_drain)
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

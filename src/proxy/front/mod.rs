//! The front: between the listener and Pingora's proxy, it gives what no hook can, such as deadlines
//! for whole heads, limits on connections, and the PROXY protocol.

mod connection;
mod http_2;
mod limits;
mod listener;
mod proxy_header;
mod refusal;
mod refused;
mod slots;
mod statistics;
mod stream;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ::pingora::apps::{HttpServerApp, ReusedHttpStream, ServerApp};
use ::pingora::protocols::http::ServerSession;
use ::pingora::protocols::{SocketDigest, Stream, l4};
use ::pingora::server::ShutdownWatch;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::BytesMut;
use http::HeaderValue;
use tokio::time::Instant;
use tracing::debug;

use refused::Refusals;
use slots::{Slot, Slots};
use stream::ClientStream;

use super::client::TrustedProxies;
use super::shutdown::Shutdown;
use super::tls::ClientTls;
pub(crate) use connection::{Connection, Ended, OpenStream, Phase};
pub(crate) use limits::{ClientTimeouts, FrontLimits};
pub(crate) use listener::FrontListener;
pub(crate) use proxy_header::ProxyHeaderRule;
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub use proxy_header::proxy_header_length;
pub(crate) use refused::{RefusedRequest, TellRefused};
pub use statistics::{FrontCounts, FrontStatistics};

/// What a front is made with.
pub(crate) struct FrontSettings {
    pub(crate) limits: Arc<FrontLimits>,
    /// Connections in all; 0 for any number.
    pub(crate) connections: usize,
    /// Connections of one client; 0 for any number.
    pub(crate) connections_per_client: usize,
    /// Who has connections for many clients.
    pub(crate) trusted: TrustedProxies,
    /// Who sends PROXY headers, if anybody does.
    pub(crate) proxy_header: Option<ProxyHeaderRule>,
    /// Where clients connect.
    pub(crate) listeners: Vec<FrontListener>,
}

/// A Pingora application behind the front.
pub(crate) struct Front<A> {
    app: Arc<A>,
    /// For connections from now on.
    settings: Arc<ArcSwap<FrontSettings>>,
    slots: Arc<Slots>,
    refusals: Refusals,
}

impl<A> Front<A> {
    /// `tell` is told of requests that the app never sees.
    pub(crate) fn new(
        app: A,
        settings: FrontSettings,
        statistics: Arc<FrontStatistics>,
        tell: Option<TellRefused>,
    ) -> Self {
        Self {
            app: Arc::new(app),
            settings: Arc::new(ArcSwap::from_pointee(settings)),
            slots: Arc::default(),
            refusals: Refusals { statistics, tell },
        }
    }

    /// The settings, which may be replaced: they hold for connections from then on.
    pub(crate) fn settings(&self) -> Arc<ArcSwap<FrontSettings>> {
        self.settings.clone()
    }
}

impl FrontSettings {
    /// Whose connection it is, if it is that of a client: a proxy in front has many, and checks of its own.
    fn counted(&self, client: Option<IpAddr>, peer: Option<IpAddr>) -> Option<IpAddr> {
        let is_from_proxy = |peer: &IpAddr| {
            let rule = self.proxy_header.as_ref();
            rule.is_some_and(|rule| rule.applies_to(*peer))
        };
        let client = client.or_else(|| peer.filter(|peer| !is_from_proxy(peer)));
        client.filter(|client| !self.trusted.contains(client.to_canonical()))
    }

    /// Reads the PROXY header, if this peer sends one: the addresses it names, and what follows it.
    async fn read_proxy_header(
        &self,
        stream: &mut Stream,
        peer: Option<IpAddr>,
    ) -> std::io::Result<(Option<Arc<SocketDigest>>, BytesMut)> {
        let mut ahead = BytesMut::new();
        let rule = self.proxy_header.as_ref();
        let Some(rule) = rule.filter(|rule| peer.is_some_and(|peer| rule.applies_to(peer))) else {
            return Ok((None, ahead));
        };
        let named = rule.read(stream, &mut ahead).await?;
        let digest = named.map(|(client, server)| {
            let digest = SocketDigest::from_raw_fd(stream.id());
            // The cells are new, so nothing is set yet.
            let _ = digest
                .peer_addr
                .set(Some(l4::socket::SocketAddr::Inet(client)));
            let _ = digest
                .local_addr
                .set(Some(l4::socket::SocketAddr::Inet(server)));
            Arc::new(digest)
        });
        Ok((digest, ahead))
    }

    /// The listener that a connection has come to.
    fn listener_of(&self, stream: &Stream) -> Option<&FrontListener> {
        match &self.listeners[..] {
            [only] => Some(only),
            several => {
                let digest = stream.get_socket_digest()?;
                FrontListener::of(several, *digest.local_addr()?.as_inet()?)
            }
        }
    }

    /// Does the TLS handshake, if there is TLS; otherwise nothing.
    async fn handshake(
        &self,
        tls: Option<&ClientTls>,
        stream: Stream,
        ahead: BytesMut,
        start: Instant,
    ) -> Result<(Stream, BytesMut, Option<HeaderValue>), String> {
        let Some(tls) = tls else {
            return Ok((stream, ahead, None));
        };
        // With the PROXY header before it, and the first head after it.
        let until = start + self.limits.timeouts.client_header;
        let done = tokio::time::timeout_at(until, tls.handshake(stream, &ahead)).await;
        let (stream, certificate) = done.map_err(|_| "it took too long".to_owned())??;
        Ok((stream, BytesMut::new(), certificate))
    }
}

fn peer_of(digest: &SocketDigest) -> Option<SocketAddr> {
    digest.peer_addr()?.as_inet().copied()
}

impl<A> Front<A> {
    /// What becomes of a connection that has been accepted, with its place among all; `None` if it is not served.
    async fn open(&self, mut stream: Stream) -> Option<(ClientStream, Slot)> {
        let start = Instant::now();
        let settings = self.settings.load_full();
        let Some(mut slot) = self.slots.take(settings.connections) else {
            self.refusals.statistics.count_refused();
            return None;
        };
        let peer = stream.get_socket_digest().as_deref().and_then(peer_of);
        let peer = peer.map(|peer| peer.ip());
        let Some(listener) = settings.listener_of(&stream) else {
            self.refusals.statistics.count_refused();
            debug!(?peer, "a connection came to none of the listeners");
            return None;
        };
        let (socket, ahead) = match settings.read_proxy_header(&mut stream, peer).await {
            Ok(read) => read,
            Err(error) => {
                self.refusals.statistics.count_bad_proxy_header();
                debug!(?peer, %error, "a connection without its PROXY header is closed");
                return None;
            }
        };
        let client = socket.as_deref().and_then(peer_of);
        if let Some(client) = settings.counted(client.map(|client| client.ip()), peer)
            && !slot.is_within(client, settings.connections_per_client)
        {
            self.refusals.statistics.count_refused();
            return None;
        }
        let tls = listener.tls.as_ref();
        let (stream, ahead, certificate) = match settings.handshake(tls, stream, ahead, start).await
        {
            Ok(ready) => ready,
            Err(error) => {
                self.refusals.statistics.count_failed_handshake();
                debug!(?peer, error, "a TLS handshake with a client failed");
                return None;
            }
        };
        let stream = ClientStream::new(
            stream,
            ahead,
            certificate,
            socket,
            settings.limits.clone(),
            self.refusals.clone(),
        );
        Some((stream.accepted_at(start), slot))
    }
}

#[async_trait]
impl<A: HttpServerApp + Send + Sync + 'static> ServerApp for Front<A> {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        self.refusals.statistics.count_accepted();
        let _open = Shutdown::of_process().connection();
        let (mut stream, _slot) = self.open(stream).await?;
        let options = self.app.server_options();
        let takes_h2c = options.is_some_and(|options| options.h2c);
        let Some(is_http_2) = stream.begins_http_2(takes_h2c).await else {
            debug!("a connection ended at its start, or one for HTTP/2 begins with something else");
            return None;
        };
        if is_http_2 {
            self.serve_http_2(stream, shutdown).await;
            return None;
        }
        let connection = stream.connection();
        self.app.process_new(Box::new(stream), shutdown).await;
        let mut kept = connection.take_kept();
        while let Some((stream, settings)) = kept.map(ReusedHttpStream::consume) {
            let mut session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
            }
            let reused = self.app.process_new_http(session, shutdown).await;
            kept = reused.or_else(|| connection.take_kept());
        }
        None
    }

    /// Nothing is accepted any more. Pingora's part closes idle connections, and those on which it
    /// waits for the rest of a head.
    async fn cleanup(&self) {
        let process = Shutdown::of_process();
        let listeners = self.settings.load().listeners.len();
        process.listeners().close(listeners);
        process.settle().await;
        self.app.cleanup().await;
    }
}

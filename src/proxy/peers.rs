//! Peers with the time-outs of the configuration.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use ::pingora::protocols::TcpKeepalive;
use ::pingora::upstreams::peer::{
    H1UpgradePolicy, HttpPeer, HttpUpstreamRequestPolicy, Peer, Scheme,
};
use arc_swap::ArcSwap;

use super::connections::{Secure, Silence};
use super::tls::BackendTls;
use crate::config::{Backends, Protocol, Timeouts, Upgrade, is_name};
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::pingora::http_peer;

/// How many probes without an answer end a quiet connection.
const PROBES: u32 = 3;
/// How much of each response an HTTP/2 backend may send before its client has taken it.
const STREAM_WINDOW: u64 = 524_288;
/// The largest window that HTTP/2 knows.
const LARGEST_WINDOW: u64 = (1 << 31) - 1;
/// Backends of which it is known how long they keep idle connections.
const MOST_HINTS: usize = 10_000;

/// How long to wait for backends, and how long to keep connections to them.
pub(super) struct Peers {
    connect: Duration,
    response: Duration,
    /// As `response` if it is not given.
    read: Option<Duration>,
    tunnel: Duration,
    pool_idle: Duration,
    keepalive: TcpKeepalive,
    handshake: Duration,
    backends: Backends,
    upgrade: H1UpgradePolicy,
    tls: Option<BackendTls>,
    /// How long backends keep idle connections, where they have said so and it is shorter.
    hints: ArcSwap<HashMap<SocketAddr, Duration>>,
}

/// What a request asks of its peer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    /// It may become a tunnel.
    pub(super) is_upgrade: bool,
    /// It finds room in the buffer of a socket.
    pub(super) is_short: bool,
    /// None of its fields is of the client's connection.
    pub(super) is_plain: bool,
    /// The rest of the request may take any time, and the backend speaks HTTP/2: until the response begins, Pingora has
    /// one time there, from the head of the request on.
    pub(super) is_open: bool,
    /// Nothing takes longer than this, if it is given.
    pub(super) left: Option<Duration>,
    /// The same for a silence of the backend.
    pub(super) left_to_answer: Option<Duration>,
    /// Instead of the group's times.
    pub(super) times: BackendTimes,
}

/// How long a backend may be silent, where a route has its own times.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct BackendTimes {
    pub(super) response: Option<Duration>,
    pub(super) read: Option<Duration>,
    pub(super) tunnel: Option<Duration>,
}

impl Peers {
    pub(super) fn new(
        timeouts: &Timeouts,
        backends: &Backends,
        upgrade: Upgrade,
        tls: Option<BackendTls>,
    ) -> Self {
        let milliseconds = Duration::from_millis;
        Self {
            handshake: milliseconds(timeouts.handshake_ms),
            backends: backends.clone(),
            upgrade: match upgrade {
                Upgrade::Websocket => H1UpgradePolicy::WebSocketOnly,
                Upgrade::Any => H1UpgradePolicy::Preserve,
                Upgrade::None => H1UpgradePolicy::Deny,
            },
            tls,
            connect: milliseconds(timeouts.connect_ms),
            response: milliseconds(timeouts.response_ms),
            read: timeouts.read_ms.map(milliseconds),
            tunnel: milliseconds(timeouts.tunnel_ms),
            pool_idle: milliseconds(timeouts.pool_idle_ms),
            keepalive: keepalive(milliseconds(timeouts.tcp_user_timeout_ms)),
            hints: ArcSwap::default(),
        }
    }

    /// How a node is spoken to, and the name that its certificate has to be for.
    fn protocol_of<'p>(&'p self, node: &'p Node) -> (Protocol, &'p str) {
        let group = self.backends.protocol;
        let name = self.backends.server_name.as_deref();
        if !self.backends.protocol_of_node {
            return (group, name.unwrap_or_default());
        }
        let said = |key| node.metadata.get(key).and_then(|value| value.as_str());
        let own = said(metadata_keys::PROTOCOL).and_then(Protocol::from_name);
        let own = own.filter(|own| own.is_tls() || !group.is_tls());
        // What the file says, nobody who registers can change.
        let name = name.or_else(|| said(metadata_keys::SERVER_NAME).filter(|name| is_name(name)));
        (own.unwrap_or(group), name.unwrap_or_default())
    }

    /// Whether a node is spoken to in a version of HTTP that has upgrades.
    pub(super) fn passes_upgrades(&self, node: &Node) -> bool {
        !self.protocol_of(node).0.is_http2()
    }

    /// How long a backend may be silent, unless that is a tunnel.
    pub(super) fn silence(&self, asked: &Asked) -> Silence {
        let within = |time: Duration| asked.left_to_answer.map_or(time, |left| time.min(left));
        let response = asked.times.response.unwrap_or(self.response);
        let read = asked.times.read.or(self.read).unwrap_or(response);
        Silence {
            response: within(response),
            read: within(read),
        }
    }

    /// A peer at this address. The error is why the node cannot be spoken to.
    pub(super) fn peer(
        &self,
        addr: SocketAddr,
        node: &Node,
        asked: Asked,
    ) -> Result<Box<HttpPeer>, &'static str> {
        let Asked {
            is_upgrade,
            is_short,
            left,
            ..
        } = asked;
        let (protocol, server_name) = self.protocol_of(node);
        let mut peer = http_peer(addr, node);
        if protocol.is_tls() {
            // Pingora verifies nothing if the name is empty.
            if server_name.is_empty() {
                return Err("there is no name to verify the backend's certificate by");
            }
            let Some(tls) = &self.tls else {
                return Err("this proxy is built without TLS to backends");
            };
            peer.scheme = Scheme::HTTPS;
            server_name.clone_into(&mut peer.sni);
            tls.add_to(&mut peer);
        }
        if protocol.is_http2() {
            peer.options.set_http_version(2, 2);
            peer.options.max_h2_streams = self.backends.streams;
            // Room for all streams of a connection: with less, one client that reads slowly would hold up the others.
            let room = STREAM_WINDOW.saturating_mul(self.backends.streams as u64);
            peer.options.h2_stream_window_size = u32::try_from(STREAM_WINDOW).ok();
            peer.options.h2_connection_window_size = Some(room.min(LARGEST_WINDOW) as u32);
            // Servers of gRPC end connections with more than a PING in five minutes, so that only TCP looks for life.
            peer.options.h2_ping_interval = None;
        }
        let options = &mut peer.options;
        match asked.is_plain && !protocol.is_http2() {
            // It would take ten fields out that are not there.
            true => options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve(),
            false => options.http_upstream_request_policy.h1_upgrade = self.upgrade,
        }
        let within = |time: Duration| Some(left.map_or(time, |left| time.min(left)));
        // Where Pingora connects, it takes the first one for the TLS handshake, too.
        let (connect, total) = match protocol.is_tls() {
            true => (
                self.connect.max(self.handshake),
                self.connect + self.handshake,
            ),
            false => (self.connect, self.connect),
        };
        options.connection_timeout = within(connect);
        options.total_connection_timeout = within(total);
        let silence = self.silence(&asked);
        let tunnel = asked.times.tunnel.unwrap_or(self.tunnel);
        // The same time-outs hold for the tunnel that such a request becomes.
        let response = Some(match (is_upgrade, asked.is_open) {
            (true, _) => tunnel,
            (false, true) => asked.left_to_answer.map_or(tunnel, |left| tunnel.min(left)),
            (false, false) => silence.longest(),
        });
        options.read_timeout = response;
        // A short request finds room in the socket's buffer: a timer would cost more than it is worth.
        options.write_timeout = match is_upgrade {
            true => Some(tunnel),
            false => (!is_short).then_some(silence.response),
        };
        let hint = self.hints.load().get(&addr).copied();
        options.idle_timeout = Some(hint.unwrap_or(self.pool_idle));
        options.tcp_keepalive = Some(self.keepalive.clone());
        Ok(Box::new(peer))
    }

    /// TLS for a peer of HTTP/1 that has it, if this process does not leave it to Pingora.
    pub(super) fn secure(&self, peer: &HttpPeer) -> Option<Secure> {
        let is_http_1 = peer.options.alpn.get_max_http_version() == 1;
        let tls = self.tls.as_ref().filter(|_| is_http_1 && peer.tls())?;
        tls.secure(&peer.sni, self.connect, self.handshake)
    }

    /// A backend closes idle connections after this number of seconds. The pool has to let go of them
    /// before.
    pub(super) fn closes_after(&self, addr: SocketAddr, seconds: u64) {
        let before = match seconds {
            0 | 1 => Duration::from_millis(500 * seconds),
            _ => Duration::from_secs(seconds - 1),
        };
        let hint = (before < self.pool_idle).then_some(before);
        if self.hints.load().get(&addr).copied() == hint {
            return;
        }
        self.hints.rcu(|hints| {
            let mut hints = HashMap::clone(hints);
            if hints.len() >= MOST_HINTS {
                // Mostly of backends that are gone.
                hints.clear();
            }
            match hint {
                Some(hint) => hints.insert(addr, hint),
                None => hints.remove(&addr),
            };
            hints
        });
    }
}

/// A quiet connection is probed from half of the time on, so that it is over after all of it.
fn keepalive(user_timeout: Duration) -> TcpKeepalive {
    let second = Duration::from_secs(1);
    TcpKeepalive {
        idle: (user_timeout / 2).max(second),
        interval: (user_timeout / 2 / PROBES).max(second),
        count: PROBES as usize,
        #[cfg(target_os = "linux")]
        user_timeout,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_lets_go_of_a_connection_before_the_backend_does() {
        let peers = Peers::new(
            &Timeouts::default(),
            &Backends::default(),
            Upgrade::Any,
            None,
        );
        let addr: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let node = Node::new("a", addr.ip());
        let idle = || {
            let peer = peers.peer(addr, &node, Asked::default()).unwrap();
            peer.options.idle_timeout
        };
        assert_eq!(idle(), Some(Duration::from_secs(4)));
        for (says, expected) in [(2, 1_000), (1, 500), (0, 0), (3, 2_000), (60, 4_000)] {
            peers.closes_after(addr, says);
            let expected = Duration::from_millis(expected);
            assert_eq!(idle(), Some(expected), "{says}");
        }
        assert!(peers.hints.load().is_empty());
    }
}

//! Peers with the time-outs of the configuration.

use std::net::SocketAddr;
use std::time::Duration;

use ::pingora::upstreams::peer::HttpPeer;

use crate::node::Node;
use crate::pingora::http_peer;

/// How long to wait for a backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    /// For reads and writes.
    pub(super) read: Duration,
}

impl Timeouts {
    pub(super) fn peer(&self, addr: SocketAddr, node: &Node) -> Box<HttpPeer> {
        let mut peer = http_peer(addr, node);
        peer.options.connection_timeout = Some(self.connect);
        peer.options.total_connection_timeout = Some(self.connect);
        peer.options.read_timeout = Some(self.read);
        peer.options.write_timeout = Some(self.read);
        Box::new(peer)
    }
}

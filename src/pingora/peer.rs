//! A Pingora peer for a node.

use std::net::SocketAddr;

use ::pingora::upstreams::peer::HttpPeer;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::node::Node;

/// A plain-text HTTP peer for a node. Its connections are kept apart from those to any other process
/// at the same address, so that no connection to a former process is used for a new one. A process
/// that has lost its lease and registered again keeps its connections.
pub fn http_peer(addr: SocketAddr, node: &Node) -> HttpPeer {
    let mut peer = HttpPeer::new(addr, false, String::new());
    let process = node.run().unwrap_or(node.incarnation().cast_unsigned());
    peer.group_key = xxh3_64_with_seed(node.id.as_bytes(), process);
    peer
}

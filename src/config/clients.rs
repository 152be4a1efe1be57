//! The `clients` section.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Deserialize;

use super::values::Upgrade;
use crate::error::{ClusterError, in_range};

/// What clients of the bundled proxy may do, and which of them are believed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Clients {
    /// Connections at one time. One more is closed at once. Default: 0, any number. Range: 0 to
    /// 10,000,000.
    pub connections: usize,
    /// Connections of one client at one time. A client is an IPv4 address, or an IPv6 network of 64
    /// bits; those of `trusted_proxies` have connections for many clients, and do not count. Default: 0, any number.
    /// Range: 0 to 10,000,000.
    pub connections_per_client: usize,
    /// Requests on one connection of HTTP/1, which is closed after the last one. Default: 0, any number. Range:
    /// 0 to 4,294,967,295.
    pub requests_per_connection: u32,
    /// Bytes of a request's head: request line and header fields. More gets 431. Default: 65,536.
    /// Range: 1,024 to 1,000,000.
    pub head_bytes: usize,
    /// Header fields of a request. More gets 431. Default: 128. Range: 8 to 250.
    pub headers: usize,
    /// Bytes of a request's body. More gets 413. Default: 0, any number.
    pub body_bytes: u64,
    /// Bytes a second that a client must read of a response while it is being waited for, after the
    /// first 5 s, over HTTP/1: over HTTP/2 a stream that stands still does not hold up its connection, and
    /// has `timeouts.client_write_ms`. Default: 0, any rate.
    pub least_rate: u64,
    /// Whether HTTP/2 is spoken to clients that begin with it without TLS. Default: `true`.
    pub h2c: bool,
    /// What happens to requests that want to go on in another protocol. `h2c` is none: such a request is
    /// answered in HTTP/1.1. Default: `websocket`.
    pub upgrade: Upgrade,
    /// Whether a client of HTTP/1 that ends its side of the connection after its request still gets the
    /// response (RFC 9112, section 9.6). Most clients that do so are gone, so the request is given up by
    /// default, as nginx and HAProxy do. Default: `false`.
    pub half_closed: bool,
    /// The path of a request that this process answers itself, for load balancers in front and for
    /// probes: 200 while there is a view of every group and some group has a node, otherwise, and as soon as the process is
    /// to end, 503.
    /// Default: none.
    pub ready_path: Option<String>,
    /// Load balancers in front of this one, as networks or addresses. Only they are believed what
    /// they say about their clients in `X-Forwarded-*`. Default: none.
    pub trusted_proxies: Vec<Network>,
    /// Whether backends also get `Forwarded` (RFC 7239), beside `X-Forwarded-*`. Default: `false`.
    pub forwarded: bool,
    /// Who sends a PROXY header, version 1 or 2, at the start of each connection, as networks or
    /// addresses. From them the header is required, from others it is refused. Default: none.
    pub proxy_protocol: Vec<Network>,
    /// How long to wait for that header. Default: 3,000 ms. Range: 10 to 60,000.
    pub proxy_protocol_timeout_ms: u64,
}

/// A network such as `10.0.0.0/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network(IpNet);

impl Network {
    /// Whether an address is in the network. An IPv4 address that is written as an IPv6 one is the
    /// IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for Network {
    type Err = ClusterError;

    fn from_str(text: &str) -> Result<Self, ClusterError> {
        Self::parse(text).map_err(|reason| ClusterError::config("network", reason))
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl Network {
    fn parse(text: &str) -> Result<Self, String> {
        let network = text.parse::<IpNet>();
        let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network
            .map(Self)
            .map_err(|_| format!("{text:?} is neither a network such as 10.0.0.0/8 nor an address"))
    }
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            connections: 0,
            connections_per_client: 0,
            requests_per_connection: 0,
            head_bytes: 65_536,
            headers: 128,
            body_bytes: 0,
            least_rate: 0,
            h2c: true,
            upgrade: Upgrade::Websocket,
            half_closed: false,
            ready_path: None,
            trusted_proxies: Vec::new(),
            forwarded: false,
            proxy_protocol: Vec::new(),
            proxy_protocol_timeout_ms: 3_000,
        }
    }
}

impl Clients {
    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        const MANY: usize = 10_000_000;
        let check = |name, value, range| in_range(field, name, value, range);
        check("connections", self.connections, 0..=MANY)?;
        let per_client = self.connections_per_client;
        check("connections_per_client", per_client, 0..=MANY)?;
        check("head_bytes", self.head_bytes, 1_024..=1_000_000)?;
        check("headers", self.headers, 8..=250)?;
        if let Some(path) = &self.ready_path
            && (!path.starts_with('/') || path.contains(['?', '#', ' ']))
        {
            let reason = format!("{path:?} is not a path such as /ready, without a query");
            return Err(ClusterError::config(format!("{field}.ready_path"), reason));
        }
        let timeout = self.proxy_protocol_timeout_ms;
        in_range(field, "proxy_protocol_timeout_ms", timeout, 10..=60_000)
    }
}

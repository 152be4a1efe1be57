//! The `timeouts` section.

use std::ops::RangeInclusive;

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// How long the bundled proxy waits for clients and backends, in milliseconds. The defaults are those
/// of nginx where it has the same time-out, otherwise what HAProxy's manual recommends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Timeouts {
    /// For the whole head of a request, from its first byte on; the first one of a connection from
    /// the accepting on. Then 408. Default: 30,000. Range: 10 to 60,000.
    pub client_header_ms: u64,
    /// From one part of a request's body to the next. Then 408. Default: 60,000. Range: 10 to
    /// 3,600,000.
    pub client_body_ms: u64,
    /// From a response to the next request on the same connection, which is closed then. Default:
    /// 75,000. Range: 10 to 3,600,000.
    pub client_idle_ms: u64,
    /// From one part of a response that the client reads to the next. Then the connection is closed.
    /// Default: 60,000. Range: 10 to 3,600,000.
    pub client_write_ms: u64,
    /// For the rest of a request's body that nobody wants, after the response. Default: 10,000.
    /// Range: 10 to 600,000.
    pub client_drain_ms: u64,
    /// Without a byte in either direction after a connection was upgraded, as a WebSocket is; also how long a backend of
    /// HTTP/2 may be silent while the request goes on, as with an upload or a stream of gRPC. Default: 3,600,000, an hour.
    /// Range: 10 to 86,400,000.
    pub tunnel_ms: u64,
    /// For a connection to a backend. Default: 1,500, because the kernel sends the first packet again after a
    /// second if it was lost. Range: 1 to 60,000.
    pub connect_ms: u64,
    /// For the TLS handshake with a backend, once it is connected. Default: 1,000. Range: 1 to 60,000.
    pub handshake_ms: u64,
    /// Until a response begins, with a WebSocket too, and until a backend has read a part of a request. Then 504.
    /// Default: 60,000. Range: 1 to 3,600,000.
    pub response_ms: u64,
    /// From one part of a response to the next; then it breaks off. Where client and backend speak HTTP/2, the
    /// longer one of this and `response_ms` holds for both, because Pingora has one time for them. Default: as
    /// `response_ms`. Range: 1 to 3,600,000.
    pub read_ms: Option<u64>,
    /// How long a connection to a backend may be unused, unless the backend says in `Keep-Alive:
    /// timeout=N` that it closes it earlier. Shorter than the 5 s after which many servers close it,
    /// because a request that meets the closing may be lost. Default: 4,000. Range: 1,000 to
    /// 3,600,000, in whole seconds.
    pub pool_idle_ms: u64,
    /// How long a backend may take nothing of what is sent to it, because its machine acknowledges nothing
    /// or its program reads nothing, and how long a quiet connection may be without a sign of life
    /// (`TCP_USER_TIMEOUT` and keep-alive probes). Then the connection is over: so a firewall that drops
    /// packets in silence does not cost `response_ms` or `tunnel_ms`. Default: 30,000. Range: 3,000 to
    /// 600,000.
    pub tcp_user_timeout_ms: u64,
    /// For a whole request, from its head to the end of its response, with all of its tries. Then
    /// 504. Default: 0, none. Range: 0 to 86,400,000.
    pub request_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            client_header_ms: 30_000,
            client_body_ms: 60_000,
            client_idle_ms: 75_000,
            client_write_ms: 60_000,
            client_drain_ms: 10_000,
            tunnel_ms: 3_600_000,
            connect_ms: 1_500,
            handshake_ms: 1_000,
            response_ms: 60_000,
            read_ms: None,
            pool_idle_ms: 4_000,
            tcp_user_timeout_ms: 30_000,
            request_ms: 0,
        }
    }
}

impl Timeouts {
    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        const HOUR: RangeInclusive<u64> = 10..=3_600_000;
        const DAY: u64 = 86_400_000;
        let check = |name, value, range| in_range(field, name, value, range);
        check("client_header_ms", self.client_header_ms, 10..=60_000)?;
        check("client_body_ms", self.client_body_ms, HOUR)?;
        check("client_idle_ms", self.client_idle_ms, HOUR)?;
        check("client_write_ms", self.client_write_ms, HOUR)?;
        check("client_drain_ms", self.client_drain_ms, 10..=600_000)?;
        check("tunnel_ms", self.tunnel_ms, 10..=DAY)?;
        check("connect_ms", self.connect_ms, 1..=60_000)?;
        check("handshake_ms", self.handshake_ms, 1..=60_000)?;
        check("response_ms", self.response_ms, 1..=3_600_000)?;
        if let Some(read) = self.read_ms {
            check("read_ms", read, 1..=3_600_000)?;
        }
        check("pool_idle_ms", self.pool_idle_ms, 1_000..=3_600_000)?;
        check(
            "tcp_user_timeout_ms",
            self.tcp_user_timeout_ms,
            3_000..=600_000,
        )?;
        check("request_ms", self.request_ms, 0..=DAY)
    }
}

/// The times that are about backends, where a group or a route has its own. Each is as the one of the same
/// name in [`Timeouts`]; what is not given is as there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
#[allow(missing_docs)] // Said above, once for all.
pub struct BackendTimeouts {
    pub tunnel_ms: Option<u64>,
    pub connect_ms: Option<u64>,
    pub handshake_ms: Option<u64>,
    pub response_ms: Option<u64>,
    pub read_ms: Option<u64>,
    pub pool_idle_ms: Option<u64>,
    pub tcp_user_timeout_ms: Option<u64>,
    pub request_ms: Option<u64>,
}

impl BackendTimeouts {
    pub(super) fn replace_in(&self, timeouts: &mut Timeouts) {
        macro_rules! replace {
            ($($field:ident),*) => {
                $(timeouts.$field = self.$field.unwrap_or(timeouts.$field);)*
            };
        }
        replace!(
            tunnel_ms,
            connect_ms,
            handshake_ms,
            response_ms,
            pool_idle_ms,
            tcp_user_timeout_ms,
            request_ms
        );
        timeouts.read_ms = self.read_ms.or(timeouts.read_ms);
    }
}

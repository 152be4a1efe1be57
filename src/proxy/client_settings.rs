//! What a file says of clients, as the front and Pingora take it.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::HttpServerOptions;
use ::pingora::protocols::http::v2::server::{H2Options, default_h2_options};

use super::client::TrustedProxies;
use super::front::{ClientTimeouts, FrontLimits, FrontListener, FrontSettings, ProxyHeaderRule};
use crate::config::{Clients, Timeouts};

/// What is kept, for each stream of HTTP/2, of a response that its client does not read, in bytes.
const MOST_UNSENT: usize = 65_536;

/// Requests at one time on a connection of HTTP/2.
const STREAMS: u32 = 100;
/// How much of the body of each may be sent before it is read, in bytes.
const STREAM_WINDOW: u32 = 65_535;

pub(super) fn server_options(clients: &Clients) -> HttpServerOptions {
    let mut options = HttpServerOptions::default();
    options.h2c = clients.h2c;
    // Otherwise Pingora refuses it without a hook, and there is no line for it. `RequestLimits` refuses it.
    options.allow_connect_method_proxying = true;
    options.keepalive_request_limit = match clients.requests_per_connection {
        0 => None,
        // Pingora counts those after the first one.
        limit => Some(limit - 1),
    };
    options
}

/// The largest head of a request over HTTP/2, as it counts there: each field has 32 bytes more (RFC 9113, section 6.5.2).
/// Where a hook has the exact limit, half as much again: what is larger reaches no hook, so that there is no line for it.
fn most_of_http_2(clients: &Clients, is_checked: bool) -> u32 {
    let most = clients.head_bytes + 32 * clients.headers;
    let more = if is_checked { most / 2 } else { 0 };
    u32::try_from(most + more).unwrap_or(u32::MAX)
}

/// `is_checked`: a hook checks the size of heads.
pub(super) fn h2_options(clients: &Clients, is_checked: bool) -> H2Options {
    let mut options = default_h2_options();
    options.max_send_buffer_size(MOST_UNSENT);
    options.max_concurrent_streams(STREAMS);
    // Room for all streams: with less, one upload that nobody reads would hold up those beside it.
    options.initial_window_size(STREAM_WINDOW);
    options.initial_connection_window_size(STREAMS * STREAM_WINDOW);
    options.max_header_list_size(most_of_http_2(clients, is_checked));
    options
}

pub(super) fn front_settings(
    clients: &Clients,
    timeouts: &Timeouts,
    listeners: Vec<FrontListener>,
) -> FrontSettings {
    let milliseconds = Duration::from_millis;
    FrontSettings {
        limits: Arc::new(FrontLimits {
            timeouts: ClientTimeouts {
                client_header: milliseconds(timeouts.client_header_ms),
                client_body: milliseconds(timeouts.client_body_ms),
                client_idle: milliseconds(timeouts.client_idle_ms),
                client_write: milliseconds(timeouts.client_write_ms),
                client_drain: milliseconds(timeouts.client_drain_ms),
                tunnel: milliseconds(timeouts.tunnel_ms),
            },
            head_bytes: clients.head_bytes,
            least_rate: clients.least_rate,
        }),
        connections: clients.connections,
        connections_per_client: clients.connections_per_client,
        trusted: TrustedProxies::new(clients.trusted_proxies.iter().copied()),
        proxy_header: (!clients.proxy_protocol.is_empty()).then(|| ProxyHeaderRule {
            from: clients.proxy_protocol.clone(),
            within: milliseconds(clients.proxy_protocol_timeout_ms),
        }),
        listeners,
    }
}

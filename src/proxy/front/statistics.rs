//! What the front counts, because no hook of the proxy is called for it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::refusal::Refusal;

/// What has happened to client connections since the start, before or beside the proxy's requests.
#[derive(Debug, Default)]
pub struct FrontStatistics {
    accepted: AtomicU64,
    refused: AtomicU64,
    idle: AtomicU64,
    read_timeouts: AtomicU64,
    write_timeouts: AtomicU64,
    bad_requests: AtomicU64,
    request_timeouts: AtomicU64,
    heads_too_large: AtomicU64,
    bad_proxy_headers: AtomicU64,
    failed_handshakes: AtomicU64,
}

/// The counts of [`FrontStatistics`] at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrontCounts {
    /// Connections that were accepted.
    pub accepted: u64,
    /// Connections that were closed at once, because there were too many.
    pub refused: u64,
    /// Connections that were closed because no request came.
    pub idle: u64,
    /// Connections that were closed because the body of a request, or a tunnel, was silent for too
    /// long.
    pub read_timeouts: u64,
    /// Connections that were closed because the client did not read.
    pub write_timeouts: u64,
    /// Requests that could not be parsed or must not be proxied (400, 405).
    pub bad_requests: u64,
    /// Requests whose head did not arrive in time (408).
    pub request_timeouts: u64,
    /// Requests whose head was too large (431).
    pub heads_too_large: u64,
    /// Connections that were closed because of their PROXY header.
    pub bad_proxy_headers: u64,
    /// TLS handshakes that failed or took too long.
    pub failed_handshakes: u64,
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl FrontStatistics {
    /// The counts now.
    pub fn counts(&self) -> FrontCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        FrontCounts {
            accepted: get(&self.accepted),
            refused: get(&self.refused),
            idle: get(&self.idle),
            read_timeouts: get(&self.read_timeouts),
            write_timeouts: get(&self.write_timeouts),
            bad_requests: get(&self.bad_requests),
            request_timeouts: get(&self.request_timeouts),
            heads_too_large: get(&self.heads_too_large),
            bad_proxy_headers: get(&self.bad_proxy_headers),
            failed_handshakes: get(&self.failed_handshakes),
        }
    }

    pub(super) fn count_accepted(&self) {
        add(&self.accepted);
    }

    pub(super) fn count_refused(&self) {
        add(&self.refused);
    }

    pub(super) fn count_idle(&self) {
        add(&self.idle);
    }

    pub(super) fn count_read_timeout(&self) {
        add(&self.read_timeouts);
    }

    pub(super) fn count_write_timeout(&self) {
        add(&self.write_timeouts);
    }

    pub(super) fn count_bad_proxy_header(&self) {
        add(&self.bad_proxy_headers);
    }

    pub(super) fn count_failed_handshake(&self) {
        add(&self.failed_handshakes);
    }

    /// Counts a response of the front.
    pub(super) fn count(&self, refusal: Refusal) {
        add(match refusal {
            Refusal::Timeout => &self.request_timeouts,
            Refusal::HeadTooLarge => &self.heads_too_large,
        });
    }

    /// Counts a request that is none, or must not be proxied.
    pub(crate) fn count_bad_request(&self) {
        add(&self.bad_requests);
    }

    /// Counts a request that the proxy refused because of the size of its head.
    pub(crate) fn count_head_too_large(&self) {
        add(&self.heads_too_large);
    }
}

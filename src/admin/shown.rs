//! What is shown, and under which names it may be asked for.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::http::Uri;
use tokio::sync::Semaphore;

use super::events::Events;
use super::group::Group;
use super::status::Status;
use crate::config;
use crate::proxy::ProxyParts;
use crate::sync::lock;

/// Open pages get the status once a second, not all at the same instant.
const TOLD_AGAIN_AFTER: Duration = Duration::from_millis(900);

/// What is shown to those who ask.
pub(super) struct Shown {
    pub(super) options: config::Admin,
    /// What those have to know who may change something.
    pub(super) token: Option<String>,
    /// Groups that stay the same.
    pub(super) fixed: Vec<Group>,
    /// The parts of a proxy, whose groups may change.
    pub(super) proxy: Option<ProxyParts>,
    pub(super) events: Events,
    /// One for each page that may be open.
    pub(super) pages: Arc<Semaphore>,
    pub(super) started: SystemTime,
    /// The status that open pages got last, and when.
    pub(super) told: Mutex<Option<(Instant, Arc<str>)>>,
}

impl Shown {
    /// The status as JSON, for open pages: made once a second for all of them, because it costs more with each node.
    pub(super) fn told(&self) -> Arc<str> {
        let mut told = lock(&self.told);
        if let Some((at, text)) = &*told
            && at.elapsed() < TOLD_AGAIN_AFTER
        {
            return text.clone();
        }
        // Strings and numbers cannot fail.
        let text = serde_json::to_string(&self.status()).unwrap_or_default();
        let text = Arc::<str>::from(text);
        *told = Some((Instant::now(), text.clone()));
        text
    }

    /// All groups, as of now.
    pub(super) fn groups(&self) -> Vec<Group> {
        let served = self.proxy.iter().flat_map(|parts| {
            let mut groups: Vec<_> = parts
                .reloader
                .groups()
                .into_iter()
                .map(Group::from)
                .collect();
            if let Some(first) = groups.first_mut() {
                first.clients = Some(parts.clients.clone());
            }
            groups
        });
        self.fixed.iter().cloned().chain(served).collect()
    }

    pub(super) fn status(&self) -> Status {
        self.status_of(&self.groups())
    }

    pub(super) fn status_of(&self, groups: &[Group]) -> Status {
        let mut status = Status::of(groups, self.proxy.as_ref(), self.started);
        status.writable = self.token.is_some() && self.proxy.is_some();
        status
    }

    pub(super) fn is_own_name(&self, host: &str) -> bool {
        let Some(host) = host_of(host) else {
            return false;
        };
        let mut hosts = self.options.hosts.iter();
        is_local_name(&host) || hosts.any(|own| own.eq_ignore_ascii_case(&host))
    }
}

/// The host of a `Host` field, without port and brackets.
fn host_of(text: &str) -> Option<String> {
    let uri: Uri = format!("http://{text}/").parse().ok()?;
    let host = uri.host()?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some(host.to_ascii_lowercase())
}

/// Whether a host is an address or `localhost`, which no page of others can have.
fn is_local_name(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_local_names() {
        for (text, host, is_local) in [
            ("127.0.0.1:6189", "127.0.0.1", true),
            ("[::1]:6189", "::1", true),
            ("LocalHost", "localhost", true),
            ("evil.example:6189", "evil.example", false),
            ("127.0.0.1.evil.example", "127.0.0.1.evil.example", false),
        ] {
            let found = host_of(text).unwrap();
            assert_eq!((&*found, is_local_name(&found)), (host, is_local), "{text}");
        }
        assert_eq!(host_of("a b"), None);
        assert_eq!(host_of(""), None);
    }
}

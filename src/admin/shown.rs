//! What is shown, and under which names it may be asked for.

use std::net::IpAddr;
use std::time::SystemTime;

use axum::http::Uri;

use super::events::Events;
use super::group::Group;
use super::status::Status;
use crate::config;

/// What is shown to those who ask.
pub(super) struct Shown {
    pub(super) options: config::Admin,
    pub(super) groups: Vec<Group>,
    pub(super) events: Events,
    pub(super) started: SystemTime,
}

impl Shown {
    pub(super) fn status(&self) -> Status {
        Status::of(&self.groups, self.started)
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

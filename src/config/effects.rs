//! Fields that would have no effect, because of what others say or do not say: whoever gives one of them believes that it
//! does something. What is often switched off for a while by another field, such as retries, is not looked at.

use super::clients::Clients;
use super::cluster::{ALL, ClusterConfig};
use super::group::Group;
use super::values::{HashOn, Scheme};
use crate::balance::{Policy, Zones};
use crate::error::ClusterError;

/// A field that was given, and what it lacks.
type Lacks = (&'static str, &'static str);

const HASHES: &str = "has an effect only with policy: consistent";
const REPORTS: &str = "has an effect only with load_reports: true";

impl ClusterConfig {
    /// Looks at the whole file, with its groups.
    pub(super) fn check_effects(&self) -> Result<(), ClusterError> {
        let error = |section: &str, (field, reason): (&str, &str)| {
            ClusterError::config(format!("{section}.{field}"), reason)
        };
        if let Some(lacks) = self.without_effect() {
            return Err(error("cluster", lacks));
        }
        for (name, group) in &self.groups {
            if let Some(lacks) = self.without_effect_in(group) {
                return Err(error(&format!("cluster.groups.{name}"), lacks));
            }
        }
        self.check_cookies()?;
        self.check_routes_have_effect()
    }

    /// Whether requests can come over TLS: here, or to a proxy in front that says so.
    fn may_have_tls(&self) -> bool {
        let has_tls = self.listeners().any(|listener| listener.tls.is_some());
        has_tls || !self.clients.trusted_proxies.is_empty()
    }

    /// Browsers take a cookie whose name begins so only with `Secure`, which it has only over TLS.
    fn check_cookies(&self) -> Result<(), ClusterError> {
        if self.may_have_tls() {
            return Ok(());
        }
        let groups = self.groups.iter();
        let groups = groups.map(|(name, it)| (format!("cluster.groups.{name}"), &it.sticky_cookie));
        let first = std::iter::once(("cluster".to_owned(), &self.sticky_cookie));
        for (section, cookie) in first.chain(groups) {
            let name = cookie.as_deref().unwrap_or_default().to_ascii_lowercase();
            if name.starts_with("__secure-") || name.starts_with("__host-") {
                let reason = "browsers take a cookie with this name over TLS only: there is no listener with tls, and nobody in clients.trusted_proxies who says how requests came";
                return Err(ClusterError::config(
                    format!("{section}.sticky_cookie"),
                    reason,
                ));
            }
        }
        Ok(())
    }

    /// Looks at the leader of each group, once it is known whether writes go to that of the first one.
    #[cfg(feature = "pingora")]
    pub(crate) fn check_leaders(&self) -> Result<(), ClusterError> {
        let groups = self.groups.iter();
        let groups = groups.map(|(name, it)| (format!("cluster.groups.{name}.leader"), &it.leader));
        let first = std::iter::once(("cluster.leader".to_owned(), &self.leader));
        for (section, leader) in first.chain(groups).filter(|(_, it)| !it.writes) {
            for (field, is_given) in [
                ("paths", !leader.paths.is_empty()),
                ("read_your_writes_ms", leader.read_your_writes_ms > 0),
            ] {
                if is_given {
                    let reason =
                        "has an effect only where writes go to the leader, by writes: true";
                    return Err(ClusterError::config(format!("{section}.{field}"), reason));
                }
            }
        }
        Ok(())
    }

    fn without_effect(&self) -> Option<Lacks> {
        let groups = || self.groups.values();
        let are_hashed = self.policy == Policy::Consistent
            || groups().any(|it| it.policy == Some(Policy::Consistent));
        let are_reported = self.load_reports || groups().any(|it| it.load_reports == Some(true));
        let has_zone = self.zone.is_some() || self.zone_of.is_some();
        let clients = &self.clients;
        let is_share =
            clients.connections > 0 && clients.connections_per_client > clients.connections;
        let time = clients.proxy_protocol_timeout_ms;
        let is_time_given = time != Clients::default().proxy_protocol_timeout_ms;
        let has_proxies = !clients.proxy_protocol.is_empty();
        let all = [
            (
                !are_hashed && self.hash_on != HashOn::default(),
                "hash_on",
                HASHES,
            ),
            (
                !are_reported && self.load_reports_to_clients,
                "load_reports_to_clients",
                REPORTS,
            ),
            (
                !are_reported && self.load_report_format.is_some(),
                "load_report_format",
                REPORTS,
            ),
            (
                !has_zone && self.zones != Zones::default(),
                "zones",
                "has an effect only with zone or zone_of",
            ),
            (
                !self.traceparent && self.traceparent_sampled != ALL,
                "traceparent_sampled",
                "has an effect only with traceparent: true",
            ),
            (
                is_share,
                "clients.connections_per_client",
                "is more than clients.connections, so that it has no effect",
            ),
            (
                is_time_given && !has_proxies,
                "clients.proxy_protocol_timeout_ms",
                "has an effect only with proxy_protocol",
            ),
        ];
        let mut lacking = all.into_iter().filter(|(is_given, ..)| *is_given);
        lacking.next().map(|(_, field, lacks)| (field, lacks))
    }

    fn without_effect_in(&self, group: &Group) -> Option<Lacks> {
        let policy = group.policy.unwrap_or(self.policy);
        let reports = group.load_reports.unwrap_or(self.load_reports);
        if policy != Policy::Consistent && group.hash_on.is_some() {
            return Some(("hash_on", HASHES));
        }
        if !reports && group.load_reports_to_clients == Some(true) {
            return Some(("load_reports_to_clients", REPORTS));
        }
        let has_format = group.load_report_format.is_some();
        (!reports && has_format).then_some(("load_report_format", REPORTS))
    }

    fn check_routes_have_effect(&self) -> Result<(), ClusterError> {
        for (index, route) in self.routes.iter().enumerate() {
            let error = |field, reason| {
                let field = format!("cluster.routes[{index}].{field}");
                Err(ClusterError::config(field, reason))
            };
            if route.scheme == Some(Scheme::Https) && !self.may_have_tls() {
                let reason = "no request can reach it: there is no listener with tls, and nobody in clients.trusted_proxies who says how requests came";
                return error("scheme", reason);
            }
            if route.methods.iter().any(|it| it == "CONNECT") {
                return error("methods", "CONNECT is never served");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(fields: &str) -> String {
        let yaml =
            format!("cluster:\n  etcd: {{ endpoints: ['http://a:1'] }}\n  group: g\n{fields}");
        match ClusterConfig::from_yaml(&yaml, "test") {
            Ok(_) => "none".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_field_without_effect_is_an_error_that_says_what_is_missing() {
        const HASH: &str = "  hash_on: uri\n";
        const ROUTE: &str = "  routes: [{ path: /a, group: b }]\n";
        for (fields, expected) in [
            (HASH.to_owned(), "line 4: invalid cluster.hash_on: has an effect only with policy: consistent"),
            (format!("{HASH}  policy: consistent\n"), "none"),
            (format!("{HASH}  groups: {{ b: {{ policy: consistent }} }}\n{ROUTE}"), "none"),
            (
                format!("  groups: {{ b: {{ hash_on: uri }} }}\n{ROUTE}"),
                "invalid cluster.groups.b.hash_on: has an effect only with policy: consistent",
            ),
            ("  load_reports: false\n  load_reports_to_clients: true\n".to_owned(), "cluster.load_reports_to_clients"),
            ("  traceparent: false\n  traceparent_sampled: 0.5\n".to_owned(), "cluster.traceparent_sampled"),
            ("  zones: { gain: 0.4 }\n".to_owned(), "cluster.zones: has an effect only with zone"),
            ("  zones: { gain: 0.4 }\n  zone: a\n".to_owned(), "none"),
            (
                "  clients: { connections: 10, connections_per_client: 11 }\n".to_owned(),
                "cluster.clients.connections_per_client: is more than clients.connections",
            ),
            ("  clients: { proxy_protocol_timeout_ms: 100 }\n".to_owned(), "has an effect only with proxy_protocol"),
            (
                "  routes: [{ scheme: https, group: default }]\n".to_owned(),
                "cluster.routes[0].scheme: no request can reach it",
            ),
            (
                "  routes: [{ scheme: https, group: default }]\n  clients: { trusted_proxies: [10.0.0.0/8] }\n".to_owned(),
                "none",
            ),
            (
                "  sticky_cookie: __Host-node\n".to_owned(),
                "cluster.sticky_cookie: browsers take a cookie with this name over TLS only",
            ),
            (
                "  sticky_cookie: __Host-node\n  clients: { trusted_proxies: [10.0.0.0/8] }\n".to_owned(),
                "none",
            ),
            (
                "  routes: [{ headers: { Host: a.b }, group: default }]\n".to_owned(),
                "cluster.routes[0].headers: \"host\" is no field over HTTP/2: use hosts instead",
            ),
            (
                "  routes: [{ redirect: { to: 'example.com/x' } }]\n".to_owned(),
                "cluster.routes[0].redirect.to: \"example.com/x\" is not an address; it begins with https://",
            ),
            ("  routes: [{ path: /a, redirect: { to: '{path}/b' } }]\n".to_owned(), "none"),
            ("  routes: [{ methods: [CONNECT], group: default }]\n".to_owned(), "CONNECT is never served"),
        ] {
            let found = error(&fields);
            assert!(found.contains(expected), "{fields}: {found}");
        }
    }
}
